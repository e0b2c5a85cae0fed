import { assert, describe, it } from "@effect/vitest"
import {
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

  it("notices every cut and every changed bit", () => {
    const bytes = encodeSegment(header, ops)
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
