import { assert, describe, it } from "@effect/vitest"
import fc from "fast-check"
import { SegmentCursor } from "../../../src/tiers/index/SegmentCursor.ts"
import { decodeSegment, encodeSegment, type LogOp } from "../../../src/tiers/LogSegment.ts"
import { apply, partitionOf, segmentOf, stamper } from "./indexSupport.ts"

const dimensions = 3

const operation: fc.Arbitrary<LogOp> = fc
  .record({
    kind: fc.constantFrom("upsert" as const, "metadata" as const, "delete" as const),
    id: fc.string({ unit: "grapheme", minLength: 1, maxLength: 40 }),
    time: fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }),
    region: fc.constantFrom("local", "europe-west1", "x".repeat(32)),
    counter: fc.nat(),
    metadata: fc.oneof(
      fc.constant(""),
      fc.jsonValue().map((value) => JSON.stringify({ value }))
    ),
    vector: fc.float32Array({ minLength: dimensions, maxLength: dimensions, noNaN: true })
  })
  .map(({ kind, id, time, region, counter, metadata, vector }): LogOp => {
    const version = { time, region, counter }
    if (kind === "upsert") return { kind, id, version, vector, metadata }
    return kind === "metadata" ? { kind, id, version, metadata } : { kind, id, version }
  })

const readAll = (bytes: Uint8Array): Array<LogOp> => {
  const cursor = new SegmentCursor(bytes, dimensions)
  const ops: Array<LogOp> = []
  while (cursor.next()) {
    const { kind, id, version, metadata, vector } = cursor
    if (kind === "upsert") ops.push({ kind, id, version, vector: vector.slice(), metadata })
    else ops.push(kind === "metadata" ? { kind, id, version, metadata } : { kind, id, version })
  }
  return ops
}

describe("a segment read one operation at a time", () => {
  it("has the operations that decoding it whole has, wherever its bytes lie", () => {
    fc.assert(
      fc.property(fc.array(operation, { maxLength: 12 }), fc.nat(7), (ops, shift) => {
        const bytes = segmentOf(dimensions, ops)
        const moved = new Uint8Array(bytes.length + shift + 5).subarray(shift, shift + bytes.length)
        moved.set(bytes)
        assert.deepStrictEqual(readAll(moved), decodeSegment(bytes).ops)
      })
    )
  })

  it("is refused before anything of it is applied, when any byte is another", () => {
    const stamp = stamper()
    const partition = partitionOf(dimensions)
    const upsert = (id: string): LogOp => ({
      kind: "upsert",
      id,
      version: stamp(),
      vector: Float32Array.of(1, 2, 3),
      metadata: `{"a":"ü"}`
    })
    apply(partition, [upsert("there")])
    const good = segmentOf(dimensions, [upsert("new-1"), { kind: "delete", id: "there", version: stamp() }])
    for (let i = 0; i < good.length; i++) {
      const bad = good.slice()
      bad[i] = bad[i]! ^ (1 << (i % 8))
      assert.throws(() => partition.apply(bad).next(), undefined, undefined, `byte ${i}`)
    }
    for (let length = 0; length < good.length; length += 7) {
      assert.throws(() => partition.apply(good.slice(0, length)).next())
    }
    assert.throws(
      () =>
        partition
          .apply(
            encodeSegment({ epoch: 1, seq: 1, nonce: 1n, dimensions: 2 }, [
              { kind: "upsert", id: "short", version: stamp(), vector: Float32Array.of(1, 2), metadata: "" }
            ])
          )
          .next(),
      /2 dimensions/
    )
    assert.deepStrictEqual([...partition.table.slots.keys()], ["there"])
    // One that says nothing, as a change of owner leaves behind, is fine.
    assert.lengthOf(apply(partition, []), 0)
  })
})
