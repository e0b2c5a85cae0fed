/** Records are registers that only move to greater versions: order and repetition of operations do not matter. */
import { assert, describe, it } from "@effect/vitest"
import fc from "fast-check"
import { compareVersions, type Version } from "../../../src/protocol/Version.ts"
import type { Partition } from "../../../src/tiers/index/Partition.ts"
import type { LogOp } from "../../../src/tiers/LogSegment.ts"
import { apply, partitionOf } from "./indexSupport.ts"

const ids = ["a", "b", "c"]

/** Operations whose versions are all different, as those of different writes are. */
const operations = fc
  .uniqueArray(
    fc.record({
      time: fc.integer({ min: 0, max: 4 }),
      region: fc.constantFrom("eu", "us", "us-2"),
      counter: fc.integer({ min: 1, max: 3 }),
      id: fc.constantFrom(...ids),
      kind: fc.constantFrom("upsert" as const, "upsert" as const, "metadata" as const, "delete" as const)
    }),
    { maxLength: 14, selector: ({ time, region, counter }) => `${time} ${region} ${counter}` }
  )
  .map((all) =>
    all.map(({ time, region, counter, id, kind }): LogOp => {
      const version = { time: BigInt(time), region, counter }
      const metadata = counter === 3 ? "" : JSON.stringify({ of: `${time} ${region} ${counter} ${kind}` })
      if (kind === "upsert") return { kind, id, version, vector: Float32Array.of(time + 1, counter), metadata }
      return kind === "metadata" ? { kind, id, version, metadata } : { kind, id, version }
    })
  )

const shuffledTwice = operations.chain((ops) =>
  fc.tuple(
    fc.constant(ops),
    fc.shuffledSubarray([...ops, ...ops], { minLength: ops.length * 2, maxLength: ops.length * 2 })
  )
)

/** Everything that can be seen of a partition, now or after more operations. */
const stateOf = ({ table, arena }: Partition) => ({
  visible: Object.fromEntries(
    [...table.slots].sort().map(([id, slot]) => [
      id,
      {
        vector: [...arena.row(slot)],
        vectorVersion: table.vectorVersion(slot),
        metadata: table.metadata[slot],
        metadataVersion: table.metadataVersion(slot)
      }
    ])
  ),
  hidden: Object.fromEntries([...table.hidden].sort()),
  maxTime: table.maxTime,
  counters: Object.fromEntries([...table.counters].sort()),
  count: table.count,
  tombstones: table.tombstones
})

/** The registers as they are defined: three of them, each the greatest it was given. */
class Registers {
  vector: { readonly version: Version; readonly value: Array<number> } | undefined
  metadata: { readonly version: Version; readonly value: string } | undefined
  deleted: Version | undefined

  give(op: LogOp): void {
    const { version } = op
    if (op.kind === "delete") {
      if (this.deleted === undefined || compareVersions(version, this.deleted) > 0) this.deleted = version
      return
    }
    if (op.kind === "upsert" && (this.vector === undefined || compareVersions(version, this.vector.version) > 0)) {
      this.vector = { version, value: [...op.vector] }
    }
    if (this.metadata === undefined || compareVersions(version, this.metadata.version) > 0) {
      this.metadata = { version, value: op.metadata }
    }
  }

  get visible(): { vector: Array<number>; metadata: string | undefined } | undefined {
    const alive = (version: Version) => this.deleted === undefined || compareVersions(version, this.deleted) > 0
    if (this.vector === undefined || !alive(this.vector.version)) return undefined
    const shown = this.metadata !== undefined && alive(this.metadata.version) ? this.metadata.value : ""
    return { vector: this.vector.value, metadata: shown }
  }
}

describe("records", () => {
  it("are the same whatever the order and repetition of operations", () => {
    fc.assert(
      fc.property(shuffledTwice, fc.integer({ min: 1, max: 5 }), ([ops, shuffled], inSegment) => {
        const once = partitionOf(2)
        apply(once, ops)
        const twice = partitionOf(2)
        for (let i = 0; i < shuffled.length; i += inSegment) apply(twice, shuffled.slice(i, i + inSegment))
        assert.deepStrictEqual(stateOf(twice), stateOf(once))
      }),
      { numRuns: 1_000 }
    )
  })

  it("are what the registers say", () => {
    fc.assert(
      fc.property(operations, (ops) => {
        const partition = partitionOf(2)
        const model = new Map(ids.map((id) => [id, new Registers()]))
        for (const op of ops) {
          const registers = model.get(op.id)!
          const before = registers.visible
          registers.give(op)
          const after = registers.visible
          const [effect] = apply(partition, [op])
          const allowed =
            before === undefined ? (after === undefined ? [0, 4] : [1]) : after === undefined ? [3] : [0, 2]
          assert.include(allowed, effect)
          if (effect === 0) assert.deepStrictEqual(after, before)
        }
        const { table, arena } = partition
        for (const [id, registers] of model) {
          const slot = table.slots.get(id)
          const shown =
            slot === undefined ? undefined : { vector: [...arena.row(slot)], metadata: table.metadata[slot] }
          assert.deepStrictEqual(shown, registers.visible)
        }
      }),
      { numRuns: 1_000 }
    )
  })

  it("order versions as the protocol does", () => {
    const version = fc.record({
      time: fc.bigInt({ min: 0n, max: 2n }),
      region: fc.constantFrom("a", "a-", "a0", "b"),
      counter: fc.integer({ min: 0, max: 2 })
    })
    fc.assert(
      fc.property(version, version, (first, second) => {
        const partition = partitionOf(2)
        const vector = Float32Array.of(1, 1)
        apply(partition, [
          { kind: "upsert", id: "a", version: first, vector, metadata: `{"from":1}` },
          { kind: "upsert", id: "a", version: second, vector, metadata: `{"from":2}` }
        ])
        const isLater = compareVersions(second, first) > 0
        assert.strictEqual(partition.table.metadata[0], isLater ? `{"from":2}` : `{"from":1}`)
      })
    )
  })

  it("count bytes that fall when records go", () => {
    const partition = partitionOf(2)
    const text = JSON.stringify({ text: "x".repeat(10_000) })
    const vector = Float32Array.of(1, 1)
    const upserts = Array.from({ length: 50 }, (_, i): LogOp => {
      const version = { time: 1n, region: "a", counter: i }
      return { kind: "upsert", id: `id-${i}`, version, vector, metadata: text }
    })
    apply(partition, upserts)
    const full = partition.bytes
    assert.isAbove(full, 500_000)
    apply(
      partition,
      upserts.map((op): LogOp => ({ kind: "delete", id: op.id, version: { time: 2n, region: "a", counter: 100 } }))
    )
    assert.isBelow(partition.bytes, full / 10)
    assert.isAtLeast(partition.bytes, 0)
  })
})
