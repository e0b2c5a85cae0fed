/** Quantised forms find what an exact search finds, mostly, and say exactly how near it is. */
import { mkdtempSync, rmSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { afterAll, assert, beforeAll, describe, it } from "@effect/vitest"
import type { Metric, Quantization } from "../../../src/protocol/Fields.ts"
import { Encoder, listsFor, type RowSource, subspacesOf, trainQuantiser } from "../../../src/tiers/index/Quantiser.ts"
import type { LogOp } from "../../../src/tiers/LogSegment.ts"
import { random, seedOf } from "../../support/Seeded.ts"
import { done, finished, nearest, scoreOf } from "./indexSupport.ts"
import { applied, clustered, residentOf, settle } from "./sketchSupport.ts"

let directory = ""
beforeAll(() => {
  directory = mkdtempSync(join(tmpdir(), "quantiser-"))
})
afterAll(() => rmSync(directory, { recursive: true, force: true }))

const sourceOf = (vectors: ReadonlyArray<Float32Array>): RowSource => ({
  count: vectors.length,
  rows: (from, into) => {
    const dimensions = vectors[0]?.length ?? 1
    for (let i = 0; i * dimensions < into.length; i++) into.set(vectors[from + i]!, i * dimensions)
  }
})

/** Records that are the same; few enough for one list, more than are gathered at once. */
const equal = 3_500

interface Case {
  readonly metric: Metric
  readonly quantization: Quantization
  readonly dimensions: number
  readonly count: number
  readonly offset?: number
  readonly zeros?: boolean
  readonly scale?: number
}

const cases: ReadonlyArray<Case> = [
  { metric: "cosine", quantization: "pq", dimensions: 48, count: 9_000 },
  { metric: "cosine", quantization: "i8", dimensions: 48, count: 9_000 },
  { metric: "cosine", quantization: "bf16", dimensions: 33, count: 3_000, offset: 1 },
  { metric: "l2", quantization: "pq", dimensions: 48, count: 9_000, offset: 100 },
  { metric: "l2", quantization: "i8", dimensions: 31, count: 3_000, offset: 100, zeros: true },
  { metric: "l2", quantization: "bf16", dimensions: 16, count: 3_000, scale: 1e12 },
  { metric: "ip", quantization: "pq", dimensions: 48, count: 9_000, scale: 1e-12 },
  { metric: "ip", quantization: "i8", dimensions: 48, count: 3_000, offset: 3, zeros: true },
  { metric: "ip", quantization: "bf16", dimensions: 20, count: 9_000 },
  { metric: "l2", quantization: "pq", dimensions: 1, count: 2_000 },
  { metric: "cosine", quantization: "pq", dimensions: 3, count: 2_000 },
  { metric: "cosine", quantization: "pq", dimensions: 700, count: 1_000 }
]

describe("a quantised collection", () => {
  for (const [i, one] of cases.entries()) {
    const { metric, quantization, dimensions, count, offset = 0, zeros = false, scale = 1 } = one
    const about = `${offset === 0 ? "" : `, around ${offset}`}${scale === 1 ? "" : `, times ${scale}`}${zeros ? ", with zeros" : ""}`
    it(`finds 19 of 20 that are nearest, with their exact scores: ${quantization}, ${metric}, ${count} x ${dimensions}${about}`, async () => {
      const source = random(seedOf(50 + i))
      const draw = clustered(source, dimensions, 30, offset)
      const vectorOf = (at: number) =>
        zeros && at % 50 === 0 ? new Float32Array(dimensions) : draw().map((component) => component * scale)
      const records = Array.from({ length: count }, (_, at) => [`${at}`, vectorOf(at)] as const)
      const resident = residentOf({ dimensions, metric, m: 16, efConstruction: 200, quantization }, { graphFrom: 1e9 })
      const ops = records.map(([id, vector], at): LogOp => {
        return {
          kind: "upsert",
          id,
          version: { time: BigInt(at + 1), region: "a", counter: at + 1 },
          vector,
          metadata: ""
        }
      })
      await applied(resident, ops)
      await finished(resident.snapshot(join(directory, `${i}`)))
      assert.strictEqual(resident.form, "mapped")
      settle(resident)
      const { bytesOf } = resident.stats
      const narrow = { none: 4, bf16: 2, i8: 1, pq: 0 }[quantization]
      assert.isAtMost(bytesOf.narrow, count * (narrow * (dimensions + 16) + 8) + 200_000)
      let found = 0
      let wanted = 0
      const byId = new Map<string, Float32Array>(records)
      for (let q = 0; q < 30; q++) {
        const query = vectorOf(1)
        const hits = resident.search(query, 10, 128, undefined, false, false)
        const expected = nearest(metric, query, records, 10)
        // Of what is equally near, either may be given.
        const least = scoreOf(metric, query, byId.get(expected[9]!)!)
        assert.lengthOf(hits.ids, 10)
        assert.strictEqual(new Set(hits.ids).size, 10)
        for (const [rank, id] of hits.ids.entries()) {
          const score = scoreOf(metric, query, byId.get(id)!)
          assert.closeTo(hits.scores[rank]! / Math.max(1e-30, Math.abs(score)), Math.sign(score), 1e-5)
          if (rank > 0) assert.isAtMost(hits.scores[rank]!, hits.scores[rank - 1]!)
          if (score >= least) found += 1
        }
        wanted += 10
      }
      assert.isAtLeast(found / wanted, 0.95)
      resident.dispose()
    })
  }

  it("gives as many as are wanted where more are equally near than it can hold", async () => {
    const source = random(seedOf(71))
    const dimensions = 8
    const resident = residentOf({ dimensions, metric: "ip", m: 16, efConstruction: 200, quantization: "pq" })
    const middle = Float32Array.from(source.vector(dimensions))
    // All in one list, and those that are nearer come last.
    const vectors = Array.from({ length: equal }, () => middle)
    for (let i = 0; i < 3; i++) vectors.push(middle.map((x) => x * 1.5))
    await applied(
      resident,
      vectors.map((vector, at) => ({
        kind: "upsert",
        id: `${at}`,
        version: { time: 1n, region: "a", counter: at + 1 },
        vector,
        metadata: ""
      }))
    )
    await finished(resident.snapshot(join(directory, "equal")))
    const { ids, scores } = resident.search(middle, 5, 5, undefined, false, false)
    assert.lengthOf(ids, 5)
    const product = scoreOf("ip", middle, middle)
    for (let i = 0; i < 5; i++) assert.closeTo((scores[i] as number) / product, i < 3 ? 1.5 : 1, 1e-5)
    resident.dispose()
  })

  it("is exact where all records are candidates", async () => {
    const source = random(seedOf(70))
    const dimensions = 12
    const resident = residentOf({ dimensions, metric: "l2", m: 16, efConstruction: 200, quantization: "pq" })
    const records = Array.from(
      { length: 60 },
      (_, at) => [`${at}`, Float32Array.from(source.vector(dimensions))] as const
    )
    await applied(
      resident,
      records.map(([id, vector], at) => ({
        kind: "upsert",
        id,
        version: { time: 1n, region: "a", counter: at + 1 },
        vector,
        metadata: ""
      }))
    )
    await finished(resident.snapshot(join(directory, "exact")))
    for (let q = 0; q < 20; q++) {
      const query = Float32Array.from(source.vector(dimensions))
      const hits = resident.search(query, 10, 128, undefined, false, false)
      assert.deepStrictEqual(hits.ids, nearest("l2", query, records, 10))
    }
    resident.dispose()
  })
})

describe("a quantiser", () => {
  it("is the same for the same vectors", () => {
    const draw = clustered(random(seedOf(71)), 10)
    const source = sourceOf(Array.from({ length: 9_000 }, draw))
    const [first, second] = [0, 1].map(() => done(trainQuantiser({ dimensions: 10, metric: "l2" }, source)))
    assert.deepStrictEqual(first, second)
  })

  it("takes codes of an eighth of float32 at most, whatever the dimensions", () => {
    for (let dimensions = 1; dimensions <= 4_096; dimensions += 1) {
      assert.isAtMost(subspacesOf(dimensions) / 2, (dimensions * 4) / 8)
    }
  })

  it("has more lists for more vectors, a multiple of four, bounded", () => {
    assert.strictEqual(listsFor(0), 1)
    let before = 1
    for (const count of [1, 8_191, 8_192, 100_000, 1_000_000, 1e9]) {
      const lists = listsFor(count)
      assert.isAtLeast(lists, before)
      assert.isAtMost(lists, 4_096)
      assert.isTrue(lists === 1 || lists % 4 === 0)
      before = lists
    }
  })

  it("of no vectors, of one, and of many that are the same encodes them", () => {
    for (const metric of ["cosine", "l2", "ip"] as const) {
      for (const vectors of [
        [],
        [Float32Array.of(3, 4, 5)],
        Array.from({ length: 8_500 }, () => new Float32Array(3))
      ]) {
        const source = sourceOf(vectors)
        const quantiser = done(trainQuantiser({ dimensions: 3, metric }, source))
        assert.isTrue([...quantiser.centroids, ...quantiser.codebook].every(Number.isFinite))
        const encoder = new Encoder(quantiser)
        for (let from = 0; from < vectors.length; ) from += encoder.encode(source, from)
        assert.closeTo(encoder.squaredErrors, 0, 1e-6)
      }
    }
  })
})
