/**
 * What a program imports: a whole node as one layer. `main.ts` serves it; a test or an application builds it in a scope
 * of its own.
 */
import { join } from "node:path"
import { Effect, Layer, Option, Schedule } from "effect"
import * as CatalogActor from "./actors/Catalog.ts"
import * as IndexPartitionActor from "./actors/IndexPartition.ts"
import * as LoadShedderActor from "./actors/LoadShedder.ts"
import { PartitionReads } from "./actors/PartitionReads.ts"
import * as StreamSessionActor from "./actors/StreamSession.ts"
import * as TierPromoterActor from "./actors/TierPromoter.ts"
import type { Metadata } from "./client/index.ts"
import * as Client from "./client/VectorDB.ts"
import { Settings, type SettingValues } from "./config.ts"
import { type OpenOptions, openEngine } from "./embedded/VectorDB.ts"
import * as Access from "./gateway/Access.ts"
import { ApiKeyring } from "./gateway/ApiKeyring.ts"
import { Cursors } from "./gateway/Cursors.ts"
import { HttpGateway } from "./gateway/HttpGateway.ts"
import { Load } from "./gateway/Load.ts"
import { Promoter } from "./gateway/Promoter.ts"
import { RateLimits } from "./gateway/RateLimits.ts"
import { Readiness } from "./gateway/Readiness.ts"
import { Sessions } from "./gateway/Sessions.ts"
import { Subscriptions } from "./gateway/Subscriptions.ts"
import { TenantRouter } from "./gateway/TenantRouter.ts"
import { TokenVerifier } from "./gateway/TokenVerifier.ts"
import * as WebSocketSubscriptions from "./gateway/WebSocketSubscriptions.ts"
import { toProblem } from "./protocol/Errors.ts"
import { defaultCollection } from "./protocol/Fields.ts"
import { Admission } from "./shards/Admission.ts"
import { CacheEvents } from "./shards/CacheEvents.ts"
import { ChangeFeeds } from "./shards/ChangeFeeds.ts"
import * as Cluster from "./shards/Cluster.ts"
import { LoadMeter } from "./shards/LoadMeter.ts"
import { LocalActors } from "./shards/LocalActors.ts"
import { ResultCache } from "./shards/ResultCache.ts"
import { ResultStore } from "./shards/ResultStore.ts"
import { Router } from "./shards/Router.ts"
import { Shedding } from "./shards/Shedding.ts"
import { StandingQueries } from "./shards/StandingQueries.ts"
import { AccessLog } from "./tiers/AccessLog.ts"
import * as Bucket from "./tiers/Bucket.ts"
import * as Caches from "./tiers/Caches.ts"
import { DataDirectory } from "./tiers/DataDirectory.ts"
import * as FileObjectStore from "./tiers/FileObjectStore.ts"
import * as GcsObjectStore from "./tiers/GcsObjectStore.ts"
import { MemoryBudget } from "./tiers/MemoryBudget.ts"
import { PartitionForms } from "./tiers/PartitionForms.ts"
import { RecordCache } from "./tiers/RecordCache.ts"
import { ServerBackup } from "./tiers/ServerBackup.ts"
import * as SnapshotCache from "./tiers/SnapshotCache.ts"
import { VectorIndex } from "./tiers/VectorIndex.ts"
import { WarmStore } from "./tiers/WarmStore.ts"

export * from "./client/index.ts"
export { defaultSettings, Settings, type SettingValues } from "./config.ts"
export type { OpenOptions } from "./embedded/VectorDB.ts"
export { HttpGateway } from "./gateway/HttpGateway.ts"
export { Readiness } from "./gateway/Readiness.ts"
export { RuvectorRpcs } from "./protocol/Rpcs.ts"
export { CacheEvents, type CacheInvalidated } from "./shards/CacheEvents.ts"
export { ResultStore } from "./shards/ResultStore.ts"
export { Router } from "./shards/Router.ts"
export { StandingQueries } from "./shards/StandingQueries.ts"

/** Who may do what. */
const access = Access.Access.layer.pipe(
  Layer.provideMerge(Layer.mergeAll(ApiKeyring.layer, TokenVerifier.layer, RateLimits.layer))
)

/** The wires over the actors, on one port. Closed first: it drains before the actors below it stop. */
const wires = HttpGateway.layer.pipe(
  Layer.provideMerge(WebSocketSubscriptions.layer),
  Layer.provideMerge(Subscriptions.layer),
  Layer.provideMerge(TenantRouter.layer),
  Layer.provideMerge(access),
  Layer.provideMerge(Cursors.layer),
  Layer.provideMerge(Sessions.layer),
  Layer.provideMerge(Promoter.layer),
  Layer.provideMerge(Load.layer),
  Layer.provideMerge(Readiness.layer)
)

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

/** A gateway owns no partition, and so has no thread for one. */
const vectorThreads = Layer.unwrap(
  Effect.map(Settings, ({ role }) => (role === "gateway" ? VectorIndex.layerNone : VectorIndex.layer))
)

/** The actors of every process, whatever it does besides. */
const ownActors = Layer.mergeAll(TierPromoterActor.layer, LoadShedderActor.layer)

/** Those of a process that owns shards. */
const shardActors = Layer.mergeAll(IndexPartitionActor.layer, CatalogActor.layer, StreamSessionActor.layer)

/** The actors of one process. They stop, and snapshot what they hold, before the threads and the store they rest on. */
export const actors = Layer.unwrap(
  Effect.map(Settings, ({ role }) => (role === "gateway" ? ownActors : Layer.mergeAll(shardActors, ownActors)))
).pipe(
  Layer.provideMerge(Layer.mergeAll(StandingQueries.layer, PartitionReads.layer)),
  Layer.provideMerge(ChangeFeeds.layer),
  Layer.provideMerge(Router.layer({ createOnInsert: defaultCollection })),
  Layer.provideMerge(LoadMeter.layer),
  Layer.provideMerge(Admission.layer),
  Layer.provideMerge(Layer.mergeAll(LocalActors.layer, CacheEvents.layer, Shedding.layer)),
  Layer.provideMerge(Cluster.layer),
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

const store = (settings: SettingValues) =>
  GcsObjectStore.isBucketUrl(settings.data) ? bucketStore(settings) : directoryStore

/** The local directory: all data, or, where that is in a bucket, cache and scratch. */
export const localDirectory = (settings: SettingValues): string =>
  GcsObjectStore.isBucketUrl(settings.data) ? settings.cacheDir : settings.data

/** A node: on a data directory and no other service, or on a bucket. */
export const node = (settings: SettingValues) =>
  wires.pipe(
    Layer.provideMerge(actors),
    Layer.provideMerge(ServerBackup.layer),
    Layer.provideMerge(store(settings)),
    Layer.provideMerge(directory(settings)),
    Layer.provideMerge(Layer.succeed(Settings, settings))
  )

/**
 * The local directory of a node that is alone is its own. Members of a cluster share one where all data is in it; where the data
 * is in a bucket, what is local is cache and scratch, and each needs its own.
 */
const directory = (settings: SettingValues) => {
  const isShared = settings.databaseUrl !== "" && !GcsObjectStore.isBucketUrl(settings.data)
  return DataDirectory.layer({ path: localDirectory(settings), ...(isShared ? { sharedBy: settings.cell } : {}) })
}

/** The engine of a node, without its wires: what `VectorDB.open` opens. */
const engine = (settings: SettingValues) =>
  Subscriptions.layer.pipe(
    Layer.provide(Access.layerEmbedded),
    Layer.provideMerge(Cursors.layer),
    Layer.provide(Access.layerEmbedded),
    Layer.provideMerge(actors),
    Layer.provideMerge(ServerBackup.layer),
    Layer.provideMerge(store(settings)),
    Layer.provideMerge(DataDirectory.layer({ path: localDirectory(settings) })),
    Layer.provideMerge(Layer.succeed(Settings, settings))
  )

/** The client, on a service or, by `open`, with the engine in this process. */
export class VectorDB<M = Metadata> extends Client.VectorDB<M> {
  /**
   * Opens the engine in this process: no port, and the data directory is this process's alone until it is closed. Rejects
   * with one line for people where it cannot be opened. Log lines of severity error go to stderr.
   */
  static async open<M = Metadata>(options: OpenOptions<M>): Promise<VectorDB<M>> {
    return new VectorDB<M>(await openEngine(engine, options))
  }
}

/**
 * Makes the partitions resident that were asked for at start, then lets the node be ready. What cannot be opened is
 * tried again; until then the node says which collection it waits for.
 */
export const activate = Effect.gen(function* () {
  const settings = yield* Settings
  const router = yield* Router
  const readiness = yield* Readiness
  if (settings.activate === "all") {
    yield* Effect.gen(function* () {
      for (const collection of yield* router.collections) {
        readiness.set({ state: "starting", detail: `opening collection ${collection.name}` })
        yield* Effect.mapError(router.activate(collection), (error) => ({ collection: collection.name, error }))
      }
    }).pipe(
      Effect.tapError((failure) => {
        const detail =
          "error" in failure ? `${failure.collection}: ${toProblem(failure.error).detail}` : toProblem(failure).detail
        readiness.set({ state: "failed", detail })
        return Effect.logError("Not ready", detail)
      }),
      Effect.retry(Schedule.spaced("5 seconds"))
    )
  }
  readiness.set({ state: "ready" })
  yield* Effect.logInfo("Ready")
})
