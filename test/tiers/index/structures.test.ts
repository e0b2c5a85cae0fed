/** The small parts that a partition is made of, against the plainest code that does the same. */
import { assert, describe, it } from "@effect/vitest"
import fc from "fast-check"
import type { Metric } from "../../../src/protocol/Fields.ts"
import { Bitset } from "../../../src/tiers/index/Bitset.ts"
import { Posting } from "../../../src/tiers/index/Posting.ts"
import { TopK } from "../../../src/tiers/index/TopK.ts"
import { VectorArena } from "../../../src/tiers/index/VectorArena.ts"
import { scoreOf } from "./indexSupport.ts"

const slots = fc.uniqueArray(fc.oneof(fc.nat(70), fc.nat(5_000)), { maxLength: 60 })

const bitsetOf = (slots: Iterable<number>): Bitset => {
  const set = new Bitset()
  for (const slot of slots) set.add(slot)
  return set
}

const slotsOf = (set: { forEach(use: (slot: number) => void): void }): Array<number> => {
  const all: Array<number> = []
  set.forEach((slot) => {
    all.push(slot)
  })
  return all
}

const ascending = (of: Iterable<number>): Array<number> => [...of].sort((a, b) => a - b)

describe("a set of slots", () => {
  it("is what a set is, and counts what it holds", () => {
    fc.assert(
      fc.property(slots, slots, slots, (first, second, gone) => {
        const a = new Set(first)
        const b = new Set(second)
        const check = (set: Bitset, expected: Iterable<number>) => {
          const all = ascending(expected)
          assert.deepStrictEqual(slotsOf(set), all)
          assert.strictEqual(set.count, all.length)
          const walked: Array<number> = []
          for (let slot = set.next(0); slot !== -1; slot = set.next(slot + 1)) walked.push(slot)
          assert.deepStrictEqual(walked, all)
          for (const slot of [...first, ...second]) assert.strictEqual(set.has(slot), all.includes(slot))
        }
        const changed = (change: (set: Bitset) => void) => {
          const set = bitsetOf(first)
          const copy = set.copy()
          change(set)
          check(copy, a)
          return set
        }
        check(
          changed((set) => set.union(bitsetOf(b))),
          new Set([...a, ...b])
        )
        check(
          changed((set) => set.intersect(bitsetOf(b))),
          [...a].filter((slot) => b.has(slot))
        )
        check(
          changed((set) => set.subtract(bitsetOf(b))),
          [...a].filter((slot) => !b.has(slot))
        )
        const fewer = changed((set) => {
          for (const slot of gone) assert.strictEqual(set.delete(slot), a.has(slot))
        })
        check(
          fewer,
          [...a].filter((slot) => !gone.includes(slot))
        )
      })
    )
  })

  it("is the same where few slots are kept as an array", () => {
    const change = fc.record({
      add: fc.boolean(),
      from: fc.nat(400),
      count: fc.integer({ min: 1, max: 200 }),
      step: fc.constantFrom(1, 3, 40)
    })
    fc.assert(
      fc.property(fc.array(change, { maxLength: 12 }), (changes) => {
        const posting = new Posting()
        const model = new Set<number>()
        for (const { add, from, count, step } of changes) {
          for (let i = 0; i < count; i++) {
            const slot = from + (add ? i : count - i) * step
            if (add) {
              posting.add(slot)
              model.add(slot)
            } else {
              posting.remove(slot)
              model.delete(slot)
            }
          }
          assert.deepStrictEqual(slotsOf(posting), ascending(model))
          assert.strictEqual(posting.size, model.size)
          const found = bitsetOf([3, 7_000])
          posting.addTo(found)
          assert.deepStrictEqual(slotsOf(found), ascending(new Set([3, 7_000, ...model])))
        }
      })
    )
  })
})

describe("the best k", () => {
  it("are those that sorting puts first", () => {
    const offered = fc.array(fc.oneof(fc.integer({ min: 0, max: 5 }), fc.double({ noNaN: true })), { maxLength: 100 })
    const top = new TopK()
    fc.assert(
      fc.property(offered, fc.nat(120), (scores, k) => {
        top.reset(k)
        for (const [slot, score] of scores.entries()) top.offer(score, slot)
        const expected = scores
          .map((score, slot) => ({ score, slot }))
          .sort((a, b) => (a.score === b.score ? a.slot - b.slot : a.score < b.score ? 1 : -1))
          .slice(0, k)
        assert.strictEqual(top.size, expected.length)
        assert.deepStrictEqual(ascending(top.take()), ascending(expected.map(({ slot }) => slot)))
        const slots = new Int32Array(expected.length)
        top.drain(new Float32Array(expected.length), slots)
        assert.deepStrictEqual(
          [...slots],
          expected.map(({ slot }) => slot)
        )
        assert.strictEqual(top.size, 0)
      })
    )
  })
})

describe("vectors by slot", () => {
  it("are scanned with the scores that each has alone, whatever the dimensions, in one memory or in several", () => {
    const row = (dimensions: number) =>
      fc.float32Array({
        minLength: dimensions,
        maxLength: dimensions,
        noNaN: true,
        noDefaultInfinity: true,
        min: -100,
        max: 100
      })
    const arena = fc.integer({ min: 1, max: 70 }).chain((dimensions) =>
      fc.record({
        metric: fc.constantFrom<Metric>("cosine", "l2", "ip"),
        rows: fc.array(row(dimensions), { minLength: 1, maxLength: 12 }),
        query: row(dimensions),
        // Rows are repeated, so that there are several lists of them and several memories.
        count: fc.integer({ min: 1, max: 3_000 }),
        everyNth: fc.integer({ min: 1, max: 7 }),
        isOneMemory: fc.boolean()
      })
    )
    fc.assert(
      fc.property(arena, ({ metric, rows, query, count, everyNth, isOneMemory }) => {
        const dimensions = query.length
        const bankBytes = isOneMemory ? undefined : 256 * Math.ceil(dimensions / 4) * 16
        const vectors = new VectorArena(dimensions, metric, bankBytes)
        for (let slot = 0; slot < count; slot++) vectors.set(slot, rows[slot % rows.length]!)
        const wanted = new Bitset()
        for (let slot = 0; slot < count; slot += everyNth) wanted.add(slot)
        const top = new TopK()
        top.reset(wanted.count)
        vectors.scan(query, wanted, top)
        assert.deepStrictEqual(ascending(top.take()), slotsOf(wanted))
        const scores = new Float32Array(wanted.count)
        const found = new Int32Array(wanted.count)
        top.drain(scores, found)
        const factor = vectors.factorOf(query)
        for (let i = 0; i < found.length; i += 1 + (i >> 4)) {
          const vector = rows[found[i]! % rows.length]!
          const expected = scoreOf(metric, query, vector)
          const scale =
            metric === "ip"
              ? Math.sqrt(scoreOf("ip", query, query) * scoreOf("ip", vector, vector))
              : Math.abs(expected)
          assert.closeTo(scores[i]!, expected, scale * 1e-5 + 1e-3)
          assert.closeTo(vectors.score(query, factor, found[i]!), expected, scale * 1e-9 + 1e-9)
          assert.deepStrictEqual(vectors.row(found[i]!), vector)
          assert.isTrue(vectors.equals(found[i]!, vector))
        }
      }),
      { numRuns: 150 }
    )
  })

  it("read from a file's bytes are those set one by one", () => {
    for (const dimensions of [1, 4, 7]) {
      const rows = Array.from({ length: 300 }, (_, i) => Float32Array.from({ length: dimensions }, (_, d) => i - d))
      const arena = new VectorArena(dimensions, "cosine", 4_096)
      arena.reserve(rows.length)
      const bytes = new Uint8Array(Float32Array.from(rows.flatMap((row) => [...row])).buffer)
      arena.setBytes(0, bytes.subarray(0, 100 * dimensions * 4))
      arena.setBytes(100, bytes.subarray(100 * dimensions * 4))
      for (const [slot, row] of rows.entries()) assert.deepStrictEqual(arena.row(slot), row)
    }
  })
})
