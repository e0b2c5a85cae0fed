/**
 * Standing queries against a model: whatever is written, deleted, passivated, killed or opened again, once things have
 * settled each answer is what looking at every record gives, and the changes told fold to it.
 */

import type { Worker } from "node:worker_threads"
import { assert, describe, it } from "@effect/vitest"
import { Context, Effect, Exit, Fiber, Layer, Stream } from "effect"
import type { Collection } from "../../src/protocol/Collection.ts"
import type { Metric } from "../../src/protocol/Fields.ts"
import { parseFilter } from "../../src/protocol/Filter.ts"
import { IndexPartition, partitionId } from "../../src/protocol/IndexPartition.ts"
import { StandingQueries } from "../../src/server.ts"
import type {
  OpenStandingQuery,
  StandingMember,
  StandingQuery,
  StandingState
} from "../../src/shards/StandingQueries.ts"
import { StandingShare } from "../../src/shards/StandingShare.ts"
import { meets, parseMetadata } from "../../src/tiers/index/MetadataIndex.ts"
import { MemoryBudget } from "../../src/tiers/MemoryBudget.ts"
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
          // The nearest go until what is held beyond the answers is used up, and more has to be searched for.
          for (let i = 0; i < 10; i++) {
            const records = Array.from({ length: 20 }, (_, n) => ({
              id: `far${i}-${n}`,
              vector: vectorOf(source),
              metadata: ""
            }))
            await run(node.router.upsert("c", records))
            for (const { id, ...record } of records) model.set(id, record)
          }
          for (let round = 0; round < 8; round++) {
            for (const one of all.slice(0, 6)) {
              const ids = one.opened.state().members.map(({ id }) => id)
              await run(node.router.remove("c", ids))
              for (const id of ids) model.delete(id)
            }
            await settled(all, model, metric)
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

  it("go on through changes of form, passivation, death of the thread and a restart", { timeout: 60_000 }, () =>
    seeded(seedOf(52), async (source) => {
      const store = await newStore()
      const model = new Map<string, Stored>()
      const seen = new Set<Worker>()
      const watching = (worker: Worker) => seen.add(worker)
      process.on("worker", watching)
      let node = await startActors(store, { ...settings, threads: 1 })
      try {
        const of = await create(node, "cosine", 1)
        const records = Array.from({ length: many }, (_, i) => ({
          id: `r${i}`,
          vector: vectorOf(source),
          metadata: metadataOf(source)
        }))
        await run(node.router.upsert("c", records))
        for (const { id, ...record } of records) model.set(id, record)
        let all: Array<Listening> = []
        for (let i = 0; i < 12; i++) all.push(await new Listening(queryOf(source, "cosine")).open(node))
        await settled(all, model, "cosine")
        const residents = () => Context.get(node.context, MemoryBudget).residents()
        const changes = async (count: number) => {
          for (let i = 0; i < count; i++) await change(node, model, source, many + 50)
        }
        for (const disturbance of [
          "demote",
          "promote",
          "passivate",
          "kill",
          "restart",
          "demote",
          "passivate",
          "kill"
        ]) {
          await changes(8)
          switch (disturbance) {
            case "demote":
            case "promote": {
              const moving = residents().map((one) => run(disturbance === "demote" ? one.demote : one.promote))
              await changes(8)
              assert.include(await Promise.all(moving), true, disturbance)
              break
            }
            case "passivate":
              for (const one of residents()) await run(one.passivate)
              assert.lengthOf(residents(), 0)
              break
            case "kill":
              for (const worker of seen) await worker.terminate()
              seen.clear()
              break
            case "restart":
              await node.stop()
              node = await startActors(store, { ...settings, threads: 1 })
              all = await Promise.all(all.map(({ query }) => new Listening(query).open(node)))
          }
          // What is approximate in the mapped form is right once the form is full.
          if (disturbance !== "demote") {
            if (disturbance === "passivate" || disturbance === "kill" || disturbance === "restart")
              await wakeFull(node, of)
            await settled(all, model, "cosine")
          }
          await changes(8)
        }
      } finally {
        process.off("worker", watching)
        await node.stop()
      }
    })
  )

  it(
    "of a partition that sleeps are told nothing, do not wake it, and are there when a writer does",
    { timeout: 30_000 },
    () =>
      seeded(seedOf(53), async (source) => {
        const node = await startActors(await newStore())
        const model = new Map<string, Stored>()
        try {
          await create(node, "cosine", 1)
          for (let i = 0; i < 30; i++) await change(node, model, source, 60)
          const one = await new Listening({ ...queryOf(source, "cosine"), k: 3, minScore: -1, filter: "" }).open(node)
          await settled([one], model, "cosine")
          const { told } = one
          const residents = () => Context.get(node.context, MemoryBudget).residents()
          for (const resident of residents()) await run(resident.passivate)
          await new Promise((resolve) => setTimeout(resolve, 500))
          assert.lengthOf(residents(), 0)
          assert.strictEqual(one.told, told)
          const vector = one.query.vector as Float32Array
          await run(node.router.upsert("c", [{ id: "nearest", vector, metadata: "" }]))
          model.set("nearest", { vector, metadata: "" })
          await settled([one], model, "cosine")
          assert.strictEqual(one.opened.state().members[0]?.id, "nearest")
        } finally {
          await node.stop()
        }
      })
  )

  it("share what is equal, refuse what is too much, and end with their collection", () =>
    seeded(seedOf(54), async (source) => {
      const node = await startActors(await newStore(), { standingQueriesMax: 2 })
      const model = new Map<string, Stored>()
      try {
        await create(node, "cosine", 2)
        for (let i = 0; i < 30; i++) await change(node, model, source, 60)
        const id = [...model.keys()][0] as string
        const first = queryOf(source, "cosine")
        const [vector, vectorless] = [(model.get(id) as Stored).vector, { ...first, vectorId: id }]
        const { vector: _, ...byId } = vectorless
        const service = Context.get(node.context, StandingQueries)
        const a = await new Listening(first).open(node)
        const b = await new Listening({ ...first, vector: (first.vector as Float32Array).slice() }).open(node)
        assert.strictEqual(service.size(), 1)
        assert.strictEqual(a.opened.state(), b.opened.state())
        const c = await new Listening(byId).open(node)
        const d = await new Listening({ ...first, vector }).open(node)
        assert.strictEqual(service.size(), 2)
        assert.strictEqual(c.opened.state().members, d.opened.state().members)

        const refused = (query: StandingQuery) => run(Effect.flip(service.open(query, { onChange() {}, onLost() {} })))
        const third = await refused({ ...first, k: first.k + 1 })
        assert.strictEqual(third._tag === "Overloaded" && third.bound, "standingQueriesMax")
        for (const k of [0, 257, 1.5]) assert.strictEqual((await refused({ ...first, k }))._tag, "InvalidInput")
        assert.strictEqual((await refused({ ...first, vector: Float32Array.of(1) }))._tag, "InvalidInput")
        assert.strictEqual((await refused({ ...first, vector: new Float32Array(dimensions) }))._tag, "InvalidInput")
        assert.strictEqual((await refused({ ...first, minScore: Number.NaN }))._tag, "InvalidInput")
        assert.strictEqual((await refused({ ...byId, vectorId: "none" }))._tag, "VectorNotFound")
        assert.strictEqual((await refused({ ...first, collection: "none" }))._tag, "CollectionNotFound")
        c.opened.close()
        d.opened.close()
        assert.strictEqual(service.size(), 1)
        const { told } = b
        b.opened.close()
        await run(node.router.upsert("c", [{ id: "nearest", vector: first.vector as Float32Array, metadata: "" }]))
        assert.strictEqual(b.told, told, "nothing is told after it is closed")

        await run(node.router.deleteCollection("c"))
        assert.strictEqual(a.lost, "CollectionNotFound")
        assert.strictEqual(service.size(), 0)
        // Another of that name is another.
        await create(node, "cosine", 1)
        const e = await new Listening({ ...first, filter: "", minScore: Number.NEGATIVE_INFINITY }).open(node)
        assert.deepStrictEqual(e.opened.state().members, [])
        await run(node.router.upsert("c", [{ id: "only", vector: first.vector as Float32Array, metadata: "" }]))
        assert.deepStrictEqual(
          e.last?.members.map(({ id }) => id),
          ["only"]
        )
      } finally {
        await node.stop()
      }
    }))

  it(
    "are streamed by a partition's entity: the whole share, then its changes, for as long as it is there",
    { timeout: 30_000 },
    () =>
      seeded(seedOf(55), async (source) => {
        const node = await startActors(await newStore())
        const model = new Map<string, Stored>()
        try {
          const { uid } = await create(node, "l2", 1)
          for (let i = 0; i < 40; i++) await change(node, model, source, 60)
          const query = { ...queryOf(source, "l2"), k: 5, minScore: Number.NEGATIVE_INFINITY, filter: "" }
          const { vector, k, filter, includeMetadata, includeVector } = query as typeof query & { vector: Float32Array }
          const share = new StandingShare()
          const firsts: Array<boolean> = []
          const watching = Effect.gen(function* () {
            const client = (yield* IndexPartition.client)(partitionId({ collection: "c", uid, partition: 0 }))
            const payload = { vector, k, filter, includeMetadata, includeVector, seeds: [] }
            yield* Stream.runForEach(client.Watch(payload), (change) =>
              Effect.sync(() => {
                firsts.push(change.first)
                share.apply(change)
              })
            )
          })
          const fiber = Effect.runForkWith(node.context)(watching)
          const holds = async () => {
            for (let i = 0; i < 200; i++) {
              if (firsts.length > 0 && faultOf(new Listening(query), share.members, model, "l2") === undefined) return
              await new Promise((resolve) => setTimeout(resolve, 20))
            }
            assert.fail(faultOf(new Listening(query), share.members, model, "l2") as string)
          }
          await holds()
          for (let i = 0; i < 60; i++) await change(node, model, source, 60)
          await holds()
          for (const resident of Context.get(node.context, MemoryBudget).residents()) await run(resident.passivate)
          for (let i = 0; i < 20; i++) await change(node, model, source, 60)
          await holds()
          assert.isTrue(firsts[0])
          assert.isAbove(firsts.filter((first) => first).length, 1, "whole again after the partition was let go")
          assert.isAbove(firsts.filter((first) => !first).length, 5)
          await run(node.router.deleteCollection("c"))
          const exit = await run(Fiber.await(fiber))
          assert.isTrue(Exit.isFailure(exit) && JSON.stringify(exit.cause).includes("CollectionNotFound"), String(exit))
        } finally {
          await node.stop()
        }
      })
  )
})

/** Records enough for a snapshot to have a sketch, so that there is a mapped form. */
const many = 3_000
const settings = { snapshotOps: 1_000, snapshotSharePercent: 10, snapshotIdleMillis: 100 }

/** Makes the partitions resident, in the full form. */
const wakeFull = async (node: RunningActors, of: Collection) => {
  for (let i = 0; i < 400; i++) {
    const stats = await run(Effect.result(node.router.stats(of)))
    if (stats._tag === "Success" && stats.success.every(({ form }) => form === "full")) return
    await new Promise((resolve) => setTimeout(resolve, 25))
  }
  assert.fail("the form is not full within ten seconds")
}
