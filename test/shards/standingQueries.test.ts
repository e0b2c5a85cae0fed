/**
 * Standing queries against a model: whatever is written, deleted, passivated, killed or opened again, once things have
 * settled each answer is what looking at every record gives, and the changes told fold to it.
 */
import { assert, describe, it } from "@effect/vitest"
import { Context, Effect, Layer } from "effect"
import { StandingQueries } from "../../src/index.ts"
import type { Collection } from "../../src/protocol/Collection.ts"
import type { Metric } from "../../src/protocol/Fields.ts"
import { parseFilter } from "../../src/protocol/Filter.ts"
import type {
  OpenStandingQuery,
  StandingMember,
  StandingQuery,
  StandingState
} from "../../src/shards/StandingQueries.ts"
import { meets, parseMetadata } from "../../src/tiers/index/MetadataIndex.ts"
import { ObjectStore } from "../../src/tiers/ObjectStore.ts"
import { type RunningActors, startActors } from "../support/Actors.ts"
import { type Random, seeded, seedOf } from "../support/Seeded.ts"
import { scoreOf } from "../tiers/index/indexSupport.ts"

const dimensions = 6

interface Stored {
  readonly vector: Float32Array
  readonly metadata: string
}

const run = <A, E>(effect: Effect.Effect<A, E>): Promise<A> => Effect.runPromise(effect)

/** Coarse, so that scores are equal now and then. */
const vectorOf = (source: Random): Float32Array =>
  Float32Array.from({ length: dimensions }, () => Math.round((source.next() * 2 - 1) * 4) / 4 + 0.125)

const metadataOf = (source: Random): string =>
  source.below(4) === 0 ? "" : `{"color":"${source.pick(colors)}","n":${source.below(10)}}`
const colors = ["red", "green", "blue"]
const filters = [
  "",
  "",
  '{"color":"red"}',
  '{"n":{"lt":3}}',
  '{"or":[{"color":"blue"},{"n":{"gte":8}}]}',
  '{"not":{"color":"green"}}'
]

/** A query that listens, and what it was told. */
class Listening {
  readonly query: StandingQuery
  opened!: OpenStandingQuery
  told = 0
  last: StandingState | undefined
  lost: string | undefined

  constructor(query: StandingQuery) {
    this.query = query
  }

  async open(node: RunningActors): Promise<this> {
    this.opened = await run(
      Context.get(node.context, StandingQueries).open(this.query, {
        onChange: (state) => {
          this.told += 1
          if (this.last !== undefined) assert.notStrictEqual(state.members, this.last.members)
          this.last = state
        },
        onLost: (error) => {
          this.lost = error._tag
        }
      })
    )
    this.last ??= this.opened.state()
    return this
  }
}

const queryOf = (source: Random, metric: Metric): StandingQuery => {
  const vector = vectorOf(source)
  const threshold = source.below(3) === 0
  return {
    collection: "c",
    vector,
    k: source.pick([1, 3, 5, 20]),
    minScore: threshold ? scoreOf(metric, vector, vectorOf(source)) : Number.NEGATIVE_INFINITY,
    filter: source.pick(filters),
    includeMetadata: source.below(2) === 0,
    includeVector: source.below(4) === 0
  }
}

/** What is wrong with an answer, or nothing. */
const faultOf = (
  { query }: Listening,
  members: ReadonlyArray<StandingMember>,
  model: ReadonlyMap<string, Stored>,
  metric: Metric
): string | undefined => {
  const condition = query.filter === "" ? undefined : parseFilter(JSON.parse(query.filter))
  const vector = query.vector as Float32Array
  const expected = [...model]
    .filter(([, { metadata }]) => condition === undefined || meets(condition, parseMetadata(metadata)))
    .map(([id, record]) => ({ id, score: Math.fround(scoreOf(metric, vector, record.vector)) }))
    .filter(({ score }) => score >= query.minScore - tolerance)
    .sort((a, b) => b.score - a.score)
  const certain = expected.filter(({ score }) => score >= query.minScore + tolerance).length
  if (members.length < Math.min(query.k, certain) || members.length > Math.min(query.k, expected.length)) {
    return `${members.length} members of ${Math.min(query.k, expected.length)}`
  }
  const scores = new Map(expected.map(({ id, score }) => [id, score]))
  for (const [i, member] of members.entries()) {
    const { id, score } = member
    const truth = scores.get(id)
    if (truth === undefined || Math.abs(truth - score) > tolerance) return `${id} scores ${truth}, not ${score}`
    // Of equal scores any may be there.
    if (Math.abs(score - (expected[i]?.score ?? Number.NaN)) > tolerance) return `${id} in place ${i}`
    const record = model.get(id) as Stored
    if (query.includeMetadata && member.metadata !== record.metadata) return `${id} with metadata ${member.metadata}`
    if (query.includeVector && member.vector?.join() !== record.vector.join()) return `${id} with another vector`
  }
  return undefined
}

const tolerance = 1e-5

const settled = async (all: ReadonlyArray<Listening>, model: ReadonlyMap<string, Stored>, metric: Metric) => {
  let fault: string | undefined
  for (let i = 0; i < 400; i++) {
    fault = undefined
    for (const one of all) {
      const found = faultOf(one, one.opened.state().members, model, metric)
      if (found !== undefined) fault = `${JSON.stringify({ ...one.query, vector: undefined })}: ${found}`
      if (fault !== undefined) break
      assert.strictEqual(one.last?.members, one.opened.state().members, "what was told last is the answer")
    }
    if (fault === undefined) return
    await new Promise((resolve) => setTimeout(resolve, 20))
  }
  assert.fail(fault as string)
}

const change = async (node: RunningActors, model: Map<string, Stored>, source: Random, names: number) => {
  const kind = source.below(10)
  const ids = Array.from({ length: 1 + source.below(6) }, () => `r${source.below(names)}`)
  if (kind < 5) {
    const records = [...new Set(ids)].map((id) => ({ id, vector: vectorOf(source), metadata: metadataOf(source) }))
    await run(node.router.upsert("c", records, source.pick(["cold", "memory"] as const)))
    for (const { id, ...record } of records) model.set(id, record)
  } else if (kind < 7) {
    const id = ids[0] as string
    const patch = { color: source.pick([...colors, null]), n: source.below(10) }
    const patched = await run(Effect.option(node.router.updateMetadata("c", id, JSON.stringify(patch))))
    const record = model.get(id)
    if (record !== undefined && patched._tag === "Some") model.set(id, { ...record, metadata: patched.value.metadata })
  } else {
    await run(node.router.remove("c", ids))
    for (const id of ids) model.delete(id)
  }
}

const create = async (node: RunningActors, metric: Metric, partitions: number): Promise<Collection> =>
  (await run(node.router.createCollection("c", { dimensions, metric, partitions }))).collection

const newStore = () => run(Effect.scoped(Layer.build(ObjectStore.layerMemory)))

describe("standing queries", () => {
  for (const metric of ["cosine", "ip", "l2"] as const) {
    it(`are what looking at all records gives (${metric})`, { timeout: 60_000 }, () =>
      seeded(seedOf(51), async (source) => {
        const node = await startActors(await newStore())
        const model = new Map<string, Stored>()
        try {
          await create(node, metric, 3)
          for (let i = 0; i < 30; i++) await change(node, model, source, 60)
          const all: Array<Listening> = []
          for (let round = 0; round < 12; round++) {
            for (let i = 0; i < 4; i++) all.push(await new Listening(queryOf(source, metric)).open(node))
            for (let i = 0; i < 25; i++) await change(node, model, source, 60)
            await settled(all, model, metric)
            for (let i = 0; i < 2; i++) all.splice(source.below(all.length), 1)[0]?.opened.close()
          }
          // All goes, all comes back.
          await run(node.router.remove("c", [...model.keys()]))
          model.clear()
          await settled(all, model, metric)
          for (const one of all) assert.deepStrictEqual(one.opened.state().members, [])
          for (let i = 0; i < 30; i++) await change(node, model, source, 60)
          await settled(all, model, metric)
          for (const one of all) one.opened.close()
          assert.strictEqual(Context.get(node.context, StandingQueries).size(), 0)
        } finally {
          await node.stop()
        }
      })
    )
  }
})
