/** Searches of one partition against brute force: scores, order, recall, and what churn does to them. */
import { assert, describe, it } from "@effect/vitest"
import fc from "fast-check"
import type { Metric } from "../../../src/protocol/Fields.ts"
import type { Partition } from "../../../src/tiers/index/Partition.ts"
import type { LogOp } from "../../../src/tiers/LogSegment.ts"
import { type Random, random, seedOf } from "../../support/Seeded.ts"
import { apply, nearest, partitionOf, scoreOf, stamper } from "./indexSupport.ts"

const metrics: ReadonlyArray<Metric> = ["cosine", "l2", "ip"]
const stamp = stamper()

const upsert = (id: string, vector: ArrayLike<number>, metadata = ""): LogOp => ({
  kind: "upsert",
  id,
  version: stamp(),
  vector: Float32Array.from(vector),
  metadata
})

/** Vectors around centres, as real ones are. */
const clustered = (source: Random, dimensions: number, clusters: number) => {
  const centres = Array.from({ length: clusters }, () => source.vector(dimensions))
  return (cluster = source.below(clusters)): Float32Array =>
    Float32Array.from(centres[cluster]!, (x) => x + (source.next() + source.next() - 1) * 0.7)
}

const idsOf = (partition: Partition, query: Float32Array, k: number, ef: number, filter?: string): Array<string> =>
  [...partition.find(query, k, ef, filter).slots].map((slot) => partition.table.ids[slot]!)

const recallOf = (
  partition: Partition,
  model: ReadonlyMap<string, Float32Array>,
  queries: ReadonlyArray<Float32Array>,
  options: {
    readonly k?: number
    readonly ef?: number
    readonly filter?: string
    readonly of?: (id: string) => boolean
  } = {}
): number => {
  const { k = 10, ef = 128, filter, of = () => true } = options
  const candidates = [...model].filter(([id]) => of(id))
  let hits = 0
  let expected = 0
  for (const query of queries) {
    const truth = nearest(partition.spec.metric, query, candidates, k)
    const found = new Set(idsOf(partition, query, k, ef, filter))
    assert.strictEqual(found.size, Math.min(k, candidates.length))
    hits += truth.filter((id) => found.has(id)).length
    expected += truth.length
  }
  return hits / expected
}

const settle = (partition: Partition): void => {
  while (partition.hasBackgroundWork) partition.backgroundStep()
}

describe("a search of few records", () => {
  it("is exact, best first, lower slot first among equals, and gives as many as there are", () => {
    const component = fc.integer({ min: -3, max: 3 })
    fc.assert(
      fc.property(
        fc.constantFrom(...metrics),
        fc.array(fc.tuple(component, component, component), { maxLength: 30 }),
        fc.tuple(component, component, component),
        fc.integer({ min: 1, max: 40 }),
        (metric, vectors, query, k) => {
          const partition = partitionOf(3, metric)
          apply(
            partition,
            vectors.map((vector, i) => upsert(`${i}`, vector))
          )
          const { slots, scores } = partition.find(Float32Array.from(query), k, 10, undefined)
          const expected = vectors
            .map((vector, slot) => ({ slot, score: scoreOf(metric, query, vector) }))
            .sort((a, b) => b.score - a.score)
            .slice(0, k)
          assert.strictEqual(slots.length, expected.length)
          for (let i = 0; i < slots.length; i++) {
            assert.closeTo(scores[i]!, expected[i]!.score, 1e-5)
            assert.closeTo(scores[i]!, scoreOf(metric, query, vectors[slots[i]!]!), 1e-5)
            if (i > 0 && scores[i] === scores[i - 1]) assert.isAbove(slots[i]!, slots[i - 1]!)
          }
          assert.strictEqual(new Set(slots).size, slots.length)
        }
      ),
      { numRuns: 500 }
    )
  })

  it("does not mind vectors of no, the greatest and the least length", () => {
    for (const metric of metrics) {
      const partition = partitionOf(2, metric)
      const vectors = [
        [0, 0],
        [1e-30, 0],
        [3e38, 3e38],
        [0, -3e38],
        [1, 1]
      ]
      apply(
        partition,
        vectors.map((vector, i) => upsert(`${i}`, vector))
      )
      for (const query of vectors) {
        const { slots, scores } = partition.find(Float32Array.from(query), 5, 10, undefined)
        assert.strictEqual(slots.length, 5)
        assert.isFalse(scores.some(Number.isNaN))
      }
    }
    const partition = partitionOf(2)
    apply(partition, [upsert("far", [0, 3e38]), upsert("near", [3e38, 3e38])])
    assert.deepStrictEqual(idsOf(partition, Float32Array.of(1e-30, 1e-31), 2, 10), ["near", "far"])
  })
})

describe("a search of many records", () => {
  for (const metric of metrics) {
    it(`walks a graph, with the scores of an exact one and nearly its results: ${metric}`, () => {
      const source = random(seedOf(11))
      const vector = clustered(source, 24, 40)
      const partition = partitionOf(24, metric)
      const model = new Map<string, Float32Array>(Array.from({ length: 2_000 }, (_, i) => [`${i}`, vector()] as const))
      apply(
        partition,
        [...model].map(([id, vector]) => upsert(id, vector))
      )
      settle(partition)
      assert.isAtLeast(partition.graph?.nodes ?? 0, 2_000)
      const queries = Array.from({ length: 60 }, () => vector())
      assert.isAtLeast(recallOf(partition, model, queries), 0.95)
      for (const query of queries) {
        const { slots, scores } = partition.find(query, 10, 128, undefined)
        for (let i = 0; i < slots.length; i++) {
          const exact = scoreOf(metric, query, model.get(partition.table.ids[slots[i]!]!)!)
          assert.closeTo(scores[i]!, exact, Math.abs(exact) * 1e-5 + 1e-5)
          if (i > 0) assert.isAtMost(scores[i]!, scores[i - 1]!)
        }
      }
      // More than there are, and a beam narrower than what is wanted.
      assert.strictEqual(idsOf(partition, queries[0]!, 10_000, 1).length, 2_000)
      assert.strictEqual(new Set(idsOf(partition, queries[0]!, 300, 1)).size, 300)
    })
  }

  it("finds the records of a filter, however few and however far from the query they are", { timeout: 60_000 }, () => {
    const source = random(seedOf(12))
    const clusters = 40
    const vector = clustered(source, 16, clusters)
    const count = 4_000
    const partition = partitionOf(16)
    const model = new Map<string, Float32Array>()
    const meta = new Map<string, { readonly n: number; readonly cluster: number }>()
    for (let i = 0; i < count; i++) {
      const cluster = i % clusters
      model.set(`${i}`, vector(cluster))
      meta.set(`${i}`, { n: source.below(1_000), cluster })
    }
    apply(
      partition,
      [...model].map(([id, vector]) => upsert(id, vector, JSON.stringify(meta.get(id))))
    )
    settle(partition)
    const queries = Array.from({ length: 30 }, () => vector())
    for (const below of [900, 500, 100, 10, 1]) {
      const recall = recallOf(partition, model, queries, {
        filter: JSON.stringify({ n: { lt: below } }),
        of: (id) => meta.get(id)!.n < below
      })
      assert.isAtLeast(recall, 0.95, `${below / 10} %`)
    }
    // Queries in one cluster, records in all the others or in a single other one.
    const inFirst = Array.from({ length: 30 }, () => vector(0))
    for (const least of [1, clusters / 2, clusters - 1]) {
      const recall = recallOf(partition, model, inFirst, {
        filter: JSON.stringify({ cluster: { gte: least } }),
        of: (id) => meta.get(id)!.cluster >= least
      })
      assert.isAtLeast(recall, 0.95, `clusters from ${least}`)
    }
    assert.deepStrictEqual(idsOf(partition, inFirst[0]!, 10, 128, `{"n":-1}`), [])
  })

  it("keeps its recall when every vector is replaced again and again, in bounded memory", { timeout: 60_000 }, () => {
    const source = random(seedOf(13))
    const vector = clustered(source, 12, 30)
    const count = 1_500
    const partition = partitionOf(12)
    const model = new Map<string, Float32Array>()
    const replace = (ids: ReadonlyArray<string>) => {
      const ops = ids.map((id) => {
        const now = vector()
        model.set(id, now)
        return upsert(id, now)
      })
      apply(partition, ops)
    }
    const ids = Array.from({ length: count }, (_, i) => `${i}`)
    replace(ids)
    const queries = Array.from({ length: 40 }, () => vector())
    for (let round = 0; round < 3; round++) {
      for (let i = 0; i < count; i += 500) {
        replace(ids.slice(i, i + 500))
        assert.isAtLeast(recallOf(partition, model, queries.slice(0, 10)), 0.95, `round ${round}, ${i}`)
      }
      assert.isBelow(partition.graph!.nodes, count * 3)
    }
    // One record that never rests leaves its old nodes where the queries are.
    const hot = queries[0]!
    for (let i = 0; i < 1_000; i++) {
      const now = Float32Array.from(hot, (x) => x + (source.next() - 0.5) * 0.01)
      model.set("7", now)
      apply(partition, [upsert("7", now)])
      if (i % 100 === 99) assert.isAtLeast(recallOf(partition, model, [hot, queries[1]!]), 0.9)
    }
    settle(partition)
    assert.isBelow(partition.graph!.dead, count)
    assert.isAtLeast(recallOf(partition, model, queries), 0.95)
  })

  it("forgets deleted records, and the graph when few are left", () => {
    const source = random(seedOf(14))
    const vector = clustered(source, 8, 10)
    const partition = partitionOf(8, "l2")
    const model = new Map<string, Float32Array>(Array.from({ length: 1_500 }, (_, i) => [`${i}`, vector()] as const))
    apply(
      partition,
      [...model].map(([id, vector]) => upsert(id, vector))
    )
    settle(partition)
    assert.isDefined(partition.graph)
    const queries = Array.from({ length: 20 }, () => vector())
    for (let i = 0; i < 1_500; i++) {
      if (i % 20 === 0) continue
      model.delete(`${i}`)
      apply(partition, [{ kind: "delete", id: `${i}`, version: stamp() }])
      if (i % 250 === 1) assert.isAtLeast(recallOf(partition, model, queries), 0.95)
    }
    assert.strictEqual(recallOf(partition, model, queries), 1)
    assert.isUndefined(partition.graph)
    // Slots are used again.
    for (let i = 0; i < 1_425; i++) {
      model.set(`new-${i}`, vector())
    }
    apply(
      partition,
      [...model].filter(([id]) => id.startsWith("new")).map(([id, vector]) => upsert(id, vector))
    )
    assert.strictEqual(partition.table.slotCount, 1_500)
    settle(partition)
    assert.isAtLeast(recallOf(partition, model, queries), 0.95)
  })

  it("does not touch the graph when a record comes again with the same vector", () => {
    const source = random(seedOf(15))
    const vector = clustered(source, 8, 10)
    const partition = partitionOf(8)
    const model = new Map<string, Float32Array>(Array.from({ length: 1_500 }, (_, i) => [`${i}`, vector()] as const))
    apply(
      partition,
      [...model].map(([id, vector]) => upsert(id, vector))
    )
    settle(partition)
    const nodes = partition.graph!.nodes
    const effects = apply(
      partition,
      [...model].map(([id, vector]) => upsert(id, vector, `{"again":true}`))
    )
    assert.isTrue(effects.every((effect) => effect === 2))
    assert.strictEqual(partition.graph!.nodes, nodes)
    assert.strictEqual(partition.graph!.dead, 0)
    assert.lengthOf(idsOf(partition, model.get("1")!, 10_000, 10, `{"again":true}`), 1_500)
  })
})
