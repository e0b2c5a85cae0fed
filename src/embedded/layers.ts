/** The engine of a node as layers: its actors and what they rest on, without the wires. */
import { join } from "node:path"
import { Effect, Layer, Option } from "effect"
import * as AgentChannelActor from "../actors/AgentChannel.ts"
import * as CatalogActor from "../actors/Catalog.ts"
import * as Handover from "../actors/Handover.ts"
import * as IndexPartitionActor from "../actors/IndexPartition.ts"
import * as LoadShedderActor from "../actors/LoadShedder.ts"
import { PartitionOpener } from "../actors/OpenPartition.ts"
import { PartitionReads } from "../actors/PartitionReads.ts"
import * as StreamSessionActor from "../actors/StreamSession.ts"
import * as TaskQueueActor from "../actors/TaskQueue.ts"
import * as TierPromoterActor from "../actors/TierPromoter.ts"
import * as TopicCatalogActor from "../actors/TopicCatalog.ts"
import { Settings, type SettingValues } from "../config.ts"
import * as Access from "../gateway/Access.ts"
import { Cursors } from "../gateway/Cursors.ts"
import { Subscriptions } from "../gateway/Subscriptions.ts"
import { Topics } from "../gateway/Topics.ts"
import { defaultCollection } from "../protocol/Fields.ts"
import { Admission } from "../shards/Admission.ts"
import { CacheEvents } from "../shards/CacheEvents.ts"
import { CellDirectory } from "../shards/CellDirectory.ts"
import { ChangeFeeds } from "../shards/ChangeFeeds.ts"
import * as Cluster from "../shards/Cluster.ts"
import { LoadMeter } from "../shards/LoadMeter.ts"
import { LocalActors } from "../shards/LocalActors.ts"
import { ResultCache } from "../shards/ResultCache.ts"
import { ResultStore } from "../shards/ResultStore.ts"
import { Router } from "../shards/Router.ts"
import { Shedding } from "../shards/Shedding.ts"
import { StandingQueries } from "../shards/StandingQueries.ts"
import { TopicFeeds } from "../shards/TopicFeeds.ts"
import { TopicRouter } from "../shards/TopicRouter.ts"
import { AccessLog } from "../tiers/AccessLog.ts"
import * as Bucket from "../tiers/Bucket.ts"
import * as Caches from "../tiers/Caches.ts"
import { DataDirectory } from "../tiers/DataDirectory.ts"
import * as FileObjectStore from "../tiers/FileObjectStore.ts"
import { MemoryBudget } from "../tiers/MemoryBudget.ts"
import { PartitionForms } from "../tiers/PartitionForms.ts"
import { RecordCache } from "../tiers/RecordCache.ts"
import { ServerBackup } from "../tiers/ServerBackup.ts"
import * as SnapshotCache from "../tiers/SnapshotCache.ts"
import { VectorIndex } from "../tiers/VectorIndex.ts"
import { WarmStore } from "../tiers/WarmStore.ts"

/** Results of searches by id are kept in the warm tier too, unless the program brings a store of its own for them. */
const resultStore = Layer.effect(
  ResultStore,
  Effect.gen(function* () {
    const own = yield* Effect.serviceOption(ResultStore)
    if (Option.isSome(own)) return own.value
    const warm = yield* WarmStore
    return ResultStore.of({ get: warm.getResult, put: warm.putResult })
  })
)

/** The caches give way before any partition does. */
const budgetedCaches = Layer.effectDiscard(
  Effect.gen(function* () {
    const budget = yield* MemoryBudget
    yield* budget.joinCache(yield* ResultCache)
    yield* budget.joinCache(yield* RecordCache)
    yield* budget.joinCache(yield* WarmStore)
    yield* budget.joinCollector((yield* VectorIndex).collect)
  })
)

/** A gateway owns no partition, and so has no thread for one. A program may bring threads of its own. */
const vectorThreads = Layer.unwrap(
  Effect.gen(function* () {
    const own = yield* Effect.serviceOption(VectorIndex)
    if (Option.isSome(own)) return Layer.succeed(VectorIndex, own.value)
    const { role } = yield* Settings
    return role === "gateway" ? VectorIndex.layerNone : VectorIndex.layer
  })
)

/** The actors of every process, whatever it does besides. */
const ownActors = Layer.mergeAll(TierPromoterActor.layer, LoadShedderActor.layer)

/** Those of a process that owns shards. */
const shardActors = Layer.mergeAll(
  IndexPartitionActor.layer,
  CatalogActor.layer,
  StreamSessionActor.layer,
  TopicCatalogActor.layer,
  AgentChannelActor.layer,
  TaskQueueActor.layer
)

/** What is handed over is handed over before any of them stops: not beside them, since they all stop at once. */
const runnerActors = Handover.layer.pipe(
  Layer.provideMerge(Layer.mergeAll(shardActors, ownActors)),
  Layer.provide(PartitionOpener.layer)
)

/** The actors of one process. They stop, and snapshot what they hold, before the threads and the store they rest on. */
export const actors = Layer.unwrap(
  Effect.map(Settings, ({ role }) => (role === "gateway" ? ownActors : runnerActors))
).pipe(
  Layer.provideMerge(Layer.mergeAll(StandingQueries.layer, PartitionReads.layer)),
  Layer.provideMerge(Layer.mergeAll(ChangeFeeds.layer, TopicFeeds.layer)),
  Layer.provideMerge(TopicRouter.layer),
  Layer.provideMerge(Router.layer({ createOnInsert: defaultCollection })),
  Layer.provideMerge(LoadMeter.layer),
  Layer.provideMerge(Admission.layer),
  Layer.provideMerge(Layer.mergeAll(CacheEvents.layer, Shedding.layer)),
  Layer.provideMerge(Layer.merge(Cluster.layer, CellDirectory.layer)),
  Layer.provideMerge(LocalActors.layer),
  Layer.provideMerge(PartitionForms.layer),
  Layer.provideMerge(resultStore),
  Layer.provideMerge(budgetedCaches),
  Layer.provideMerge(Layer.mergeAll(AccessLog.layer, Caches.layer, MemoryBudget.layer, ResultCache.layer)),
  Layer.provideMerge(vectorThreads)
)

/** Objects in the data directory. */
const directoryStore = Layer.unwrap(
  Effect.map(DataDirectory, ({ path }) => FileObjectStore.layer({ directory: join(path, "objects") }))
)

/** Objects in a bucket, and a cache of snapshots in the local directory. */
const bucketStore = (settings: SettingValues) =>
  Layer.unwrap(
    Effect.map(DataDirectory, ({ path, scratch }) =>
      SnapshotCache.layer({ directory: join(path, "cache"), bytesMax: settings.diskCacheBytes }).pipe(
        Layer.provide(Bucket.layer(settings.data, scratch, settings))
      )
    )
  )

/** Where all objects are. */
export const store = (settings: SettingValues) =>
  Bucket.isBucketUrl(settings.data) ? bucketStore(settings) : directoryStore

/** The local directory: all data, or, where that is in a bucket, cache and scratch. */
export const localDirectory = (settings: SettingValues): string =>
  Bucket.isBucketUrl(settings.data) ? settings.cacheDir : settings.data

/** The engine of a node, without its wires: what `VectorDB.open` opens. */
export const engine = (settings: SettingValues) =>
  Layer.merge(Subscriptions.layer, Topics.layer).pipe(
    Layer.provide(Access.layerEmbedded),
    Layer.provideMerge(Cursors.layer),
    Layer.provide(Access.layerEmbedded),
    Layer.provideMerge(actors),
    Layer.provideMerge(ServerBackup.layer),
    Layer.provideMerge(store(settings)),
    Layer.provideMerge(DataDirectory.layer({ path: localDirectory(settings) })),
    Layer.provideMerge(Layer.succeed(Settings, settings))
  )
