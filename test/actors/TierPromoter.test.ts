/** The promoter over real partitions: what is read is promoted, what trends is made hot, partitions change their form, records are warmed. */

import { mkdtemp, rm } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { afterAll, assert, beforeAll, describe, it } from "@effect/vitest"
import { Context, Effect, Exit, Fiber, Layer, Logger, References, Scope, Stream } from "effect"
import type { Sharding } from "effect/cluster"
import * as CatalogActor from "../../src/actors/Catalog.ts"
import { EventLog } from "../../src/actors/EventLog.ts"
import * as IndexPartitionActor from "../../src/actors/IndexPartition.ts"
import { PartitionOpener } from "../../src/actors/OpenPartition.ts"
import { PartitionReads } from "../../src/actors/PartitionReads.ts"
import * as TierPromoterActor from "../../src/actors/TierPromoter.ts"
import { warm } from "../../src/actors/Warming.ts"
import { defaultSettings, Settings } from "../../src/config.ts"
import type { Collection } from "../../src/protocol/Collection.ts"
import { type ApiError, Overloaded, PartitionUnavailable } from "../../src/protocol/Errors.ts"
import { partitionId } from "../../src/protocol/IndexPartition.ts"
import { localPromoterId, type TierEvent, TierPromoter } from "../../src/protocol/TierPromoter.ts"
import type { WarmReport, WarmRequest } from "../../src/protocol/Warming.ts"
import { Admission } from "../../src/shards/Admission.ts"
import { CacheEvents } from "../../src/shards/CacheEvents.ts"
import { CellDirectory } from "../../src/shards/CellDirectory.ts"
import * as Cluster from "../../src/shards/Cluster.ts"
import { LocalActors } from "../../src/shards/LocalActors.ts"
import { groupByPartition } from "../../src/shards/PartitionMap.ts"
import { ResultCache } from "../../src/shards/ResultCache.ts"
import { Router } from "../../src/shards/Router.ts"
import { Shedding } from "../../src/shards/Shedding.ts"
import { AccessLog } from "../../src/tiers/AccessLog.ts"
import { AheadLog } from "../../src/tiers/AheadLog.ts"
import { DataDirectory } from "../../src/tiers/DataDirectory.ts"
import { MemoryBudget } from "../../src/tiers/MemoryBudget.ts"
import { ObjectStore } from "../../src/tiers/ObjectStore.ts"
import { type PartitionForm, PartitionForms } from "../../src/tiers/PartitionForms.ts"
import { RecordCache } from "../../src/tiers/RecordCache.ts"
import { VectorIndex } from "../../src/tiers/VectorIndex.ts"
import { WarmStore } from "../../src/tiers/WarmStore.ts"

type Services = PartitionReads | Router | Sharding.Sharding | AccessLog | RecordCache | WarmStore | LocalActors

/** Partitions as this test would have them, and what was asked to be done with them. */
const forms = {
  partitions: [] as Array<PartitionForm>,
  budgetBytes: 0,
  asked: [] as Array<string>,
  fails: new Set<string>()
}
const move = (partition: string, form: "mapped" | "full") =>
  Effect.sync(() => {
    forms.asked.push(`${form} ${partition}`)
    if (forms.fails.has(partition)) return false
    forms.partitions = forms.partitions.map((one) =>
      one.partition === partition ? { ...one, form, bytes: one.fullBytesEstimate / (form === "full" ? 1 : 10) } : one
    )
    return true
  })

let context: Context.Context<Services>
let stop: () => Promise<void>

beforeAll(async () => {
  const path = await mkdtemp(join(tmpdir(), "ruvector-"))
  const scope = await Effect.runPromise(Scope.make())
  const settings = {
    ...defaultSettings,
    drainMillis: 1_000,
    // Reports are sent by the tests.
    tierTickMillis: 600_000,
    tierResidenceMillis: 0,
    tierSubscribersMax: 4,
    warmsMax: 1
  }
  const layer = Layer.mergeAll(IndexPartitionActor.layer, CatalogActor.layer, TierPromoterActor.layer).pipe(
    Layer.provide(PartitionOpener.layer),
    Layer.provideMerge(PartitionReads.layer),
    Layer.provideMerge(Router.layer({ createOnInsert: "default" })),
    Layer.provideMerge(Admission.layer),
    Layer.provideMerge(Layer.mergeAll(LocalActors.layer, Shedding.layer)),
    Layer.provideMerge(Layer.merge(Cluster.layerAlone, CellDirectory.layerNone)),
    Layer.provideMerge(
      Layer.mergeAll(
        VectorIndex.layer,
        AccessLog.layer,
        AheadLog.layerNone,
        RecordCache.layer,
        WarmStore.layerMemory({ bytesMax: 64 * 1_048_576, ttlMillis: 3_600_000 }),
        Layer.succeed(PartitionForms, {
          list: Effect.sync(() => forms.partitions),
          budgetBytes: Effect.sync(() => forms.budgetBytes),
          promote: (partition) => move(partition, "full"),
          demote: (partition) => move(partition, "mapped")
        })
      )
    ),
    Layer.provideMerge(Layer.mergeAll(CacheEvents.layer, ResultCache.layer, MemoryBudget.layer)),
    Layer.provideMerge(Layer.mergeAll(ObjectStore.layerMemory, DataDirectory.layer({ path }))),
    Layer.provideMerge(
      Layer.mergeAll(
        Layer.succeed(Settings, settings),
        Logger.layer([Logger.consoleJson]),
        Layer.succeed(References.MinimumLogLevel, "Fatal")
      )
    )
  )
  context = await Effect.runPromise(Layer.buildWithScope(layer, scope))
  stop = async () => {
    await Effect.runPromise(Scope.close(scope, Exit.void))
    await rm(path, { recursive: true, force: true })
  }
})
afterAll(() => stop())

const run = <A, E>(effect: Effect.Effect<A, E, Services>): Promise<A> =>
  Effect.runPromise(Effect.provideContext(effect, context))

const promoter = Effect.map(TierPromoter.client, (client) => client(localPromoterId))
const router = () => Context.get(context, Router)
const access = () => Context.get(context, AccessLog)
const recordCache = () => Context.get(context, RecordCache)
const warmStore = () => Context.get(context, WarmStore)

const partitionsOf = (of: Collection) =>
  Array.from({ length: of.partitions }, (_, partition) => partitionId({ collection: of.name, uid: of.uid, partition }))

/** A collection of `count` records `r0`..., its partitions resident and known to the warm tier. */
const collectionOf = async (name: string, count: number, partitions = 2): Promise<Collection> => {
  const { collection } = await run(router().createCollection(name, { dimensions: 8, partitions, metric: "l2" }))
  const records = Array.from({ length: count }, (_, i) => ({
    id: `r${i}`,
    vector: Float32Array.from({ length: 8 }, (_, d) => Math.sin(i * 8 + d)),
    metadata: `{"i":${i}}`
  }))
  for (let at = 0; at < count; at += 5_000) await run(router().upsert(name, records.slice(at, at + 5_000)))
  for (const partition of partitionsOf(collection)) await run(warmStore().fence(partition))
  return collection
}

const partitionIn = (of: Collection, id: string): string => {
  const [partition] = groupByPartition([id], (one) => one, of.partitions).keys()
  return partitionId({ collection: of.name, uid: of.uid, partition: partition as number })
}

/** Sends what the log has to report, or what is given. */
const report = (given?: Parameters<Effect.Success<typeof promoter>["Report"]>[0]) =>
  run(Effect.flatMap(promoter, (client) => client.Report(given ?? access().takeReport())))

const warmAll = (request: WarmRequest): Promise<WarmReport> =>
  run(Effect.flatMap(promoter, (client) => client.Warm(request)))

/** Events that come while something is done, without their place and time; `count` of them. */
const eventsOf = async (count: number, act: () => Promise<unknown>): Promise<ReadonlyArray<TierEvent>> => {
  const opened = Promise.withResolvers<void>()
  const following = Effect.runFork(
    Effect.provideContext(
      Effect.flatMap(promoter, (client) =>
        client.Events({}).pipe(
          Stream.tap((event) => Effect.sync(() => event.event === "following" && opened.resolve())),
          Stream.drop(1),
          Stream.take(count),
          Stream.runCollect
        )
      ),
      context
    )
  )
  await opened.promise
  await act()
  return Effect.runPromise(Fiber.join(following))
}

describe("records", () => {
  it("read often enough are put into the warm tier, once; others are not", async () => {
    const of = await collectionOf("often", 20)
    const touch = (id: string, times: number) => {
      for (let n = 0; n < times; n++) access().touchRecord(partitionIn(of, id), id)
    }
    const events = await eventsOf(2, async () => {
      touch("r1", 3)
      touch("r2", 4)
      touch("r3", 1)
      await report()
      await report()
      // What follows shows that the second report promoted nothing.
      touch("r4", 3)
      await report()
    })
    const promoted = events.flatMap((event) => (event.event === "records_promoted" ? event.ids : []))
    assert.include(promoted, "r1")
    const stored = async (id: string) => (await run(warmStore().getRecords(partitionIn(of, id), [id])))[0]
    assert.strictEqual((await stored("r1"))?.metadata, '{"i":1}')
    assert.strictEqual((await stored("r2"))?.metadata, '{"i":2}')
    assert.strictEqual((await stored("r4"))?.metadata, '{"i":4}')
    assert.isNull(await stored("r3"))
    assert.strictEqual(promoted.length, new Set(promoted).size)
  })

  it("count once for each read by id, wherever it came from, and a quarter among a search's nearest", async () => {
    const of = await collectionOf("searched", 30)
    for (let n = 0; n < 3; n++) await run(router().get("searched", "r9"))
    assert.approximately(access().recordFrequency(partitionIn(of, "r9"), "r9"), 3, 1e-6)
    const before = access().recordFrequency(partitionIn(of, "r7"), "r7")
    const vector = Float32Array.from({ length: 8 }, (_, d) => Math.sin(56 + d))
    const query = { queryId: "q", collection: "searched", vector, k: 10, ef: 0, filter: "" }
    for (let n = 0; n < 12; n++) {
      await run(router().search({ ...query, includeMetadata: false, includeVector: false, deadlineMillis: 0 }))
    }
    assert.approximately(access().recordFrequency(partitionIn(of, "r7"), "r7") - before, 12 / 4, 1e-6)
    for (const partition of partitionsOf(of)) assert.isAbove(access().partitionHeat(partition), 0)
  })

  it("that trend are in the record cache before they are asked for again, and told by name", async () => {
    const of = await collectionOf("trends", 10)
    const partition = partitionIn(of, "r5")
    const trend = { partition, id: "r5", accesses: 60, ratio: 12, score: 9 }
    const events = await eventsOf(2, () => report({ hot: [], trending: [trend] }))
    assert.deepInclude(events[0], { event: "trending", collection: "trends", id: "r5", ratio: 12 })
    assert.deepInclude(events[1], { event: "records_promoted", to: "hot", reason: "trending", ids: ["r5"] })
    assert.strictEqual(recordCache().get(partition, "r5")?.metadata, '{"i":5}')
    // One that is not there is promoted nowhere, and hurts nothing.
    await report({ hot: [], trending: [{ ...trend, id: "never" }] })
    assert.isUndefined(recordCache().get(partition, "never"))
  })

  it("of a collection that is deleted are forgotten", async () => {
    const of = await collectionOf("deleted", 5, 1)
    for (let n = 0; n < 5; n++) await run(router().get("deleted", "r1"))
    await run(router().deleteCollection("deleted"))
    assert.isFalse(
      access()
        .hottest(1_000)
        .some(({ partition }) => partition.includes(of.uid))
    )
    await report({ hot: [{ partition: partitionIn(of, "r1"), id: "r1", accesses: 5 }], trending: [] })
  })
})

describe("partitions", () => {
  const one = (n: number, form: "mapped" | "full", heat: number): PartitionForm => ({
    partition: `forms/u/${n}`,
    form,
    bytes: form === "full" ? 1_000 : 100,
    fullBytesEstimate: 1_000,
    heat,
    busy: false
  })

  it("take the full form where it fits or they are hotter, and say so; what fails ends the round", async () => {
    forms.partitions = [one(0, "full", 10), one(1, "mapped", 1_000), one(2, "mapped", 900)]
    forms.budgetBytes = 2_400
    const events = await eventsOf(3, () => report({ hot: [], trending: [] }))
    assert.deepStrictEqual(
      events.map((event) =>
        "reason" in event && "from" in event ? `${event.event} ${event.partition} ${event.reason}` : ""
      ),
      ["partition_promoted 1 hot", "partition_demoted 0 displaced", "partition_promoted 2 hotter"]
    )
    assert.deepStrictEqual(forms.asked, ["full forms/u/1", "mapped forms/u/0", "full forms/u/2"])

    // A demotion that fails: nothing is loaded in its place.
    forms.asked = []
    forms.partitions = [one(3, "full", 10), one(4, "mapped", 1_000)]
    forms.budgetBytes = 1_500
    forms.fails.add("forms/u/3")
    await report({ hot: [], trending: [] })
    await until(() => forms.asked.length > 0)
    await report({ hot: [], trending: [] })
    await until(() => forms.asked.length > 1)
    assert.deepStrictEqual([...new Set(forms.asked)], ["mapped forms/u/3"])
    forms.partitions = []
    forms.fails.clear()
  })
})

const until = async (holds: () => boolean): Promise<void> => {
  for (let n = 0; n < 500 && !holds(); n++) await new Promise((resolve) => setTimeout(resolve, 5))
  assert.isTrue(holds())
}

describe("warming", () => {
  it("10,000 of a list: loaded, read back, told", { timeout: 60_000 }, async () => {
    const of = await collectionOf("list", 10_000)
    const ids = Array.from({ length: 10_000 }, (_, i) => `r${i}`)
    const asked = [...ids, "r0", "r1", "nobody", "nothing"]
    let result: WarmReport | undefined
    const events = await eventsOf(2, async () => {
      result = await warmAll({ collection: "list", ids: asked })
    })
    assert.deepInclude(result, { requested: 10_002, found: 10_000, missing: 2, unavailable: 0, cold: 0 })
    assert.sameMembers([...(result?.missing_sample ?? [])], ["nobody", "nothing"])
    assert.isAtLeast(result?.hit_rate ?? 0, 0.95)
    // The warm tier of this test holds all of them; the cache, what fits into its half.
    assert.deepInclude(result, { hot: 10_000, warm: 10_000 })
    assert.isAtLeast(result?.bytes ?? 0, 10_000 * 32)
    assert.deepInclude(events[0], { event: "warming_started", requested: 10_002 })
    assert.deepInclude(events[1], { event: "warming_progress", phase: "load" })
    // They are where it says they are.
    for (const id of ["r0", "r5000", "r9999"]) {
      const partition = partitionIn(of, id)
      const [stored] = await run(warmStore().getRecords(partition, [id]))
      assert.strictEqual(stored?.id, id)
      assert.strictEqual(recordCache().get(partition, id)?.id, id)
    }
  })

  it("of a past window takes what was read most, of the collections that are there", async () => {
    await collectionOf("window", 50)
    await collectionOf("window2", 5)
    for (let n = 0; n < 4; n++) for (const id of ["r10", "r11", "r12"]) await run(router().get("window", id))
    await run(router().get("window", "r13"))
    await run(router().get("window2", "r1"))
    const three = await warmAll({ collection: "window", window: { last_minutes: 5 }, limit: 3 })
    assert.deepInclude(three, { requested: 3, found: 3, missing: 0, hit_rate: 1 })
    const four = await warmAll({ collection: "window", window: { from_ms: Date.now() - 1_000, to_ms: Date.now() + 1 } })
    assert.deepInclude(four, { requested: 4, found: 4, hit_rate: 1 })
    const all = await warmAll({ window: { last_minutes: 5 } })
    assert.isAbove(all.requested, 4)
    const none = await warmAll({ collection: "window", window: { from_ms: 0, to_ms: 1 } })
    assert.deepInclude(none, { requested: 0, found: 0, hit_rate: 0 })
    await run(router().deleteCollection("window"))
    const gone = await Effect.runPromise(
      Effect.flip(
        Effect.provideContext(
          Effect.flatMap(promoter, (client) => client.Warm({ collection: "window", window: { last_minutes: 5 } })),
          context
        )
      )
    )
    assert.strictEqual(gone._tag, "CollectionNotFound")
  })

  it("is refused while as many are under way as may be", async () => {
    await collectionOf("busy", 2_000)
    const ids = Array.from({ length: 2_000 }, (_, i) => `r${i}`)
    const both = await run(
      Effect.flatMap(promoter, (client) =>
        Effect.all(
          [
            Effect.exit(client.Warm({ collection: "busy", ids })),
            Effect.exit(client.Warm({ collection: "busy", ids }))
          ],
          {
            concurrency: 2
          }
        )
      )
    )
    const refused = both.filter(Exit.isFailure)
    assert.lengthOf(refused, 1)
    assert.deepInclude(Exit.findErrorOption(refused[0] as (typeof both)[number]), {
      value: new Overloaded({ bound: "warmsMax", retryAfterMillis: 5_000 })
    })
    assert.strictEqual((await warmAll({ collection: "busy", ids })).hit_rate, 1)
  })

  /** One warming by itself, its partitions read as `reads` says. */
  const warmWith = async (
    of: Collection,
    ids: ReadonlyArray<string>,
    change: (tiers: { reads: PartitionReads["Service"]; warmStore: WarmStore["Service"] }) => Partial<{
      reads: PartitionReads["Service"]
      warmStore: WarmStore["Service"]
    }>
  ): Promise<WarmReport> => {
    const real = { reads: await run(PartitionReads), warmStore: warmStore() }
    const groups = Array.from(
      groupByPartition(ids, (id) => id, of.partitions),
      ([partition, group]) => ({
        partition: partitionId({ collection: of.name, uid: of.uid, partition }),
        ids: group
      })
    )
    const tiers = { ...real, ...change(real), recordCache: recordCache(), cacheBytesMax: 0, batchRecords: 16 }
    return run(warm(tiers, groups, [], () => {}))
  }

  it("counts what was deleted between loading and reading back as missing, not as a miss", async () => {
    const of = await collectionOf("meanwhile", 100)
    const ids = Array.from({ length: 100 }, (_, i) => `r${i}`)
    const gone = ["r3", "r50", "r99"]
    // Every batch that is read back waits until they are deleted, as a writer would delete them.
    const deleting = await Effect.runPromise(
      Effect.cached(
        Effect.gen(function* () {
          yield* Effect.orDie(router().remove("meanwhile", gone))
          for (const id of gone) yield* warmStore().invalidate(partitionIn(of, id), [id])
        })
      )
    )
    const result = await warmWith(of, ids, ({ warmStore }) => ({
      warmStore: {
        ...warmStore,
        getRecords: (partition, wanted) => Effect.andThen(deleting, warmStore.getRecords(partition, wanted))
      }
    }))
    assert.deepInclude(result, { requested: 100, found: 97, missing: 3, warm: 97, cold: 0, hit_rate: 1 })
    assert.sameMembers([...result.missing_sample], gone)
  })

  it("tells what no fast tier kept, and which partitions could not be asked", async () => {
    const of = await collectionOf("trouble", 100)
    const ids = Array.from({ length: 100 }, (_, i) => `r${i}`)
    const forgetful = await warmWith(of, ids, ({ warmStore }) => ({
      warmStore: { ...warmStore, putRecords: () => Effect.succeed(0) }
    }))
    assert.deepInclude(forgetful, { requested: 100, found: 100, hot: 0, warm: 0, cold: 100, hit_rate: 0 })

    const [first, second] = partitionsOf(of) as [string, string]
    const detail = "It is down."
    const error = new PartitionUnavailable({ collection: "trouble", partition: 0, detail, retryAfterMillis: 1 })
    const partial = await warmWith(of, ids, ({ reads }) => ({
      reads: {
        ...reads,
        get: (partition, of_) => (partition === first ? Effect.fail(error) : reads.get(partition, of_))
      }
    }))
    const ofSecond = ids.filter((id) => partitionIn(of, id) === second).length
    assert.deepInclude(partial, {
      requested: 100,
      found: ofSecond,
      unavailable: 100 - ofSecond,
      missing: 0,
      hit_rate: 1
    })
    assert.include(partial.unavailable_detail, detail)
  })
})

describe("events", () => {
  it("are given to every follower, in order, and after a position to one that comes back", async () => {
    const act = async () => {
      forms.partitions = []
      await warmAll({ collection: "list", ids: ["r1"] })
    }
    const [one, two] = await Promise.all([eventsOf(4, act), eventsOf(4, async () => {})])
    const seqs = one.map(({ seq }) => seq)
    assert.deepStrictEqual(
      seqs,
      seqs.map((_, i) => (seqs[0] as number) + i)
    )
    assert.deepStrictEqual(two, one)
    const again = await run(
      Effect.flatMap(promoter, (client) =>
        client.Events({ after: seqs[1] as number }).pipe(Stream.drop(1), Stream.take(2), Stream.runCollect)
      )
    )
    assert.deepStrictEqual(again, one.slice(2))
  })

  it("are followed by a bounded number, and a place is free again when one leaves", async () => {
    const follow = Effect.flatMap(promoter, (client) => client.Events({}).pipe(Stream.take(1), Stream.runDrain))
    const stay = Effect.flatMap(promoter, (client) => client.Events({}).pipe(Stream.runDrain))
    const staying = Array.from({ length: 4 }, () => Effect.runFork(Effect.provideContext(stay, context)))
    const refused = async (): Promise<ApiError | undefined> => {
      const exit = await Effect.runPromise(Effect.exit(Effect.provideContext(follow, context)))
      const error = Exit.findErrorOption(exit)
      return error._tag === "Some" ? (error.value as ApiError) : undefined
    }
    let error: ApiError | undefined
    for (let n = 0; n < 500 && error === undefined; n++) error = await refused()
    assert.deepInclude(error, { _tag: "Overloaded", bound: "tierSubscribersMax" })
    for (const fiber of staying) await Effect.runPromise(Fiber.interrupt(fiber))
    for (let n = 0; n < 500 && error !== undefined; n++) error = await refused()
    assert.isUndefined(error)
  })

  it("that a slow follower missed are counted, and it goes on with the oldest that is kept", async () => {
    const events = new EventLog<TierEvent>(16)
    for (let n = 0; n < 100; n++) events.publish({ event: "warming_started", warming: n, requested: 1 }, 1_000 + n)
    const seen = await Effect.runPromise(events.follow(0, 0).pipe(Stream.take(18), Stream.runCollect))
    assert.deepStrictEqual(seen[0], { event: "following", seq: 0, at_ms: 0 })
    assert.deepStrictEqual(seen[1], { event: "events_missed", seq: 84, at_ms: 1_084, count: 84 })
    assert.deepStrictEqual(
      seen.slice(2).map(({ seq }) => seq),
      Array.from({ length: 16 }, (_, i) => 85 + i)
    )
    // A position of another life of the promoter: everything that is kept.
    const other = await Effect.runPromise(events.follow(5_000, 0).pipe(Stream.take(2), Stream.runCollect))
    assert.strictEqual(other[1]?.event, "events_missed")
  })
})
