import { assert, describe, it } from "@effect/vitest"
import { SegmentCursor } from "../../src/tiers/index/SegmentCursor.ts"
import {
  decodeRequests,
  decodeSegment,
  decodeSegmentHeader,
  encodeSegment,
  type LogOp,
  opBytes,
  SegmentFault,
  segmentFormat,
  verifySegment
} from "../../src/tiers/LogSegment.ts"

const version = (counter: number, region = "local") => ({ time: 1_700_000_000_000_000_000n, region, counter })

const ops: ReadonlyArray<LogOp> = [
  { kind: "upsert", id: "a", version: version(1), vector: Float32Array.of(1, 2, 3), metadata: `{"x":"ü"}` },
  { kind: "metadata", id: "vector/ß", version: version(2, "eu-west-1"), metadata: "" },
  { kind: "delete", id: "c".repeat(512), version: version(Number.MAX_SAFE_INTEGER) },
  { kind: "upsert", id: "dd", version: version(4), vector: Float32Array.of(-0.5, 0, 1e-3), metadata: "" }
]

const header = { epoch: 7, seq: 42, nonce: 0xdead_beef_dead_beefn, dimensions: 3 }

const made = {
  millis: 1_700_000_000_123,
  requests: [
    { id: "AAECAwQFBgcICQoLDA0ODw", digest: 0xffff_ffff, kind: "upsert", first: 0, count: 1 },
    { id: "gAECAwQFBgcICQoLDA0ODw", digest: 0, kind: "metadata", first: 1, count: 1 },
    { id: "_____________________w", digest: 7, kind: "delete", first: 2, count: 1 }
  ]
} as const

const faultOf = (bytes: Uint8Array): SegmentFault => {
  try {
    decodeSegment(bytes)
  } catch (error) {
    assert.instanceOf(error, SegmentFault)
    return error
  }
  throw new Error("no fault")
}

describe("log segment", () => {
  it("gives back what was put in, also at an odd place in memory", () => {
    const bytes = encodeSegment(header, ops)
    assert.deepStrictEqual(decodeSegment(bytes), { ...header, count: 4, ops })
    assert.deepStrictEqual(verifySegment(bytes), { ...header, count: 4 })
    for (const shift of [1, 2, 3]) {
      const buffer = Buffer.alloc(bytes.length + 8)
      buffer.set(bytes, shift)
      assert.deepStrictEqual(decodeSegment(buffer.subarray(shift, shift + bytes.length)), { ...header, count: 4, ops })
    }
  })

  it("takes up no more than the bounds on batches count", () => {
    const counted = ops.reduce((sum, op) => sum + opBytes(op), 0)
    assert.isAtMost(encodeSegment(header, ops).length, counted + 64 + 32)
  })

  it("may hold no operation", () => {
    const bytes = encodeSegment({ ...header, dimensions: 0 }, [])
    assert.strictEqual(bytes.length, 68)
    assert.deepStrictEqual(decodeSegment(bytes), { ...header, dimensions: 0, count: 0, ops: [] })
  })

  it("says which requests it was made for, beside the same operations", () => {
    const plain = encodeSegment(header, ops)
    const bytes = encodeSegment(header, ops, made)
    assert.strictEqual(bytes.length, plain.length + made.requests.length * 32)
    assert.isUndefined(decodeRequests(plain))
    for (const shift of [0, 1, 2, 3]) {
      const buffer = Buffer.alloc(bytes.length + 8)
      buffer.set(bytes, shift)
      const moved = buffer.subarray(shift, shift + bytes.length)
      assert.deepStrictEqual(decodeRequests(moved), made)
      assert.deepStrictEqual(decodeSegment(moved), { ...header, count: 4, ops })
      const cursor = new SegmentCursor(moved, header.dimensions)
      const ids: Array<string> = []
      while (cursor.next()) ids.push(cursor.id)
      assert.deepStrictEqual(
        ids,
        ops.map(({ id }) => id)
      )
    }
  })

  it("is what it was before there were requests, and one from then is read", () => {
    const recorded = Buffer.from(
      "UlZTTAEAAAAAAAAAAAAcQAAAAAAAAEVA776t3u++rd4DAAAAAwAAAHgAAAA0Byx+AAAAAAAAAAAAAAAAznpgIwIFbG9jYWwJZXUtd2VzdC0xAAAAAAABAAcA" +
        "AAAAACo2/pyXFwAAAAAAAPA/YXsieCI6MX0AAIA/AAAAQAAAQEABAQEAAAAAAAAAKjb+nJcXAAAAAAAAAEBiAAAAAgABAAAAAAAAACo2/pyXFwAAAAAA" +
        "AAhAYwAAAA==",
      "base64"
    )
    const then: ReadonlyArray<LogOp> = [
      { kind: "upsert", id: "a", version: version(1), vector: Float32Array.of(1, 2, 3), metadata: `{"x":1}` },
      { kind: "metadata", id: "b", version: version(2, "eu-west-1"), metadata: "" },
      { kind: "delete", id: "c", version: version(3) }
    ]
    assert.deepStrictEqual(decodeSegment(recorded), { ...header, count: 3, ops: then })
    assert.isUndefined(decodeRequests(recorded))
    assert.isTrue(recorded.equals(encodeSegment(header, then)))
  })

  it("notices every cut and every changed bit", () => {
    const bytes = encodeSegment(header, ops, made)
    for (let length = 0; length < bytes.length; length++) {
      assert.strictEqual(faultOf(bytes.subarray(0, length)).kind, "short", `${length} bytes`)
    }
    for (let at = 0; at < bytes.length; at++) {
      const changed = bytes.slice()
      changed[at] = (changed[at] as number) ^ (1 << (at % 8))
      assert.strictEqual(faultOf(changed).kind, at < 4 ? "magic" : "checksum", `byte ${at}`)
    }
    const longer = new Uint8Array(bytes.length + 1)
    longer.set(bytes)
    assert.strictEqual(faultOf(longer).kind, "short")
  })

  it("tells a newer layout from a damaged one", async () => {
    const { crc32 } = await import("node:zlib")
    const bytes = encodeSegment(header, ops)
    const view = new DataView(bytes.buffer)
    view.setUint16(4, segmentFormat + 1, true)
    view.setUint32(60, crc32(bytes.subarray(0, 60)), true)
    const fault = faultOf(bytes)
    assert.deepStrictEqual([fault.kind, fault.format], ["format", segmentFormat + 1])
    assert.throws(() => decodeSegmentHeader(bytes), SegmentFault)
  })
})
