/** The index of standing queries misses none that a vector reaches, and names no other, whatever the numbers are. */
import { assert, describe, it } from "@effect/vitest"
import { StandingIndex } from "../../../src/tiers/index/StandingIndex.ts"
import { inverseNorm, scoreOf } from "../../../src/tiers/index/VectorArena.ts"
import { type Random, seeded, seedOf } from "../../support/Seeded.ts"

describe("the index of standing queries", () => {
  for (const metric of ["cosine", "ip", "l2"] as const) {
    for (const dimensions of [1, 3, 16, 100, 257]) {
      it(`finds exactly those reached: ${metric}, ${dimensions} dimensions`, () =>
        seeded(seedOf(61), async (source) => {
          // Small banks, so that there are several.
          const index = new StandingIndex(dimensions, metric, dimensions * 600)
          const queries = new Map<number, { readonly vector: Float32Array; bar: number }>()
          const near = vectorOf(source, dimensions, 1)
          for (let round = 0; round < 40; round++) {
            for (let i = 0; i < 20; i++) {
              const vector =
                source.below(3) === 0 ? nudged(source, near) : vectorOf(source, dimensions, source.pick(sizes))
              queries.set(index.add(vector), { vector, bar: Number.POSITIVE_INFINITY })
            }
            for (const slot of [...queries.keys()]) {
              if (source.below(8) > 0) continue
              index.remove(slot)
              queries.delete(slot)
            }
            const x = source.below(2) === 0 ? nudged(source, near) : vectorOf(source, dimensions, source.pick(sizes))
            const factor = metric === "cosine" ? inverseNorm(x, 0, dimensions) : 1
            const expected = new Map<number, number>()
            for (const [slot, query] of queries) {
              const own = metric === "cosine" ? inverseNorm(query.vector, 0, dimensions) : 1
              const score = Math.fround(scoreOf(metric, query.vector, 0, x, own * factor))
              // Some just reached, some just missed, some anywhere.
              const kind = source.below(4)
              query.bar =
                kind === 0 ? score : kind === 1 ? nextAbove(score) : Math.fround(score * (source.next() + 0.5))
              index.setBar(slot, query.bar)
              if (score >= query.bar) expected.set(slot, score)
            }
            const found = new Map<number, number>()
            index.reached(x, index.factorOf(x), (slot, score) => {
              assert.isFalse(found.has(slot), "named once")
              found.set(slot, score)
            })
            assert.deepStrictEqual(new Map([...found].sort()), new Map([...expected].sort()))
          }
        }))
    }
  }
})

/** Lengths of vectors, some of them beyond what squares of float32 can hold. */
const sizes = [1, 1, 1, 1e-3, 1e4, 1e-20, 1e19]

const vectorOf = (source: Random, dimensions: number, size: number): Float32Array =>
  Float32Array.from({ length: dimensions }, () => (source.next() * 2 - 1) * size)

const nudged = (source: Random, vector: Float32Array): Float32Array =>
  vector.map((component) => component * (1 + (source.next() - 0.5) * 1e-3))

const nextAbove = (x: number): number => {
  const floats = Float32Array.of(x)
  const bits = new Int32Array(floats.buffer)
  bits[0] = x === 0 ? 1 : (bits[0] as number) + (x > 0 ? 1 : -1)
  return floats[0] as number
}
