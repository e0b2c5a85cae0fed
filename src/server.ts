/**
 * A whole node as one layer: the engine and its wires. `main.ts` serves it; a test or an application builds it in a scope of
 * its own. Who wants no port imports `index.ts`, which loads nothing of this.
 */
import { Effect, Layer, Schedule } from "effect"
import { Settings, type SettingValues } from "./config.ts"
import { actors, localDirectory, store } from "./embedded/layers.ts"
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
import { Topics } from "./gateway/Topics.ts"
import * as WebSocketSubscriptions from "./gateway/WebSocketSubscriptions.ts"
import { toProblem } from "./protocol/Errors.ts"
import * as BackupDuty from "./shards/BackupDuty.ts"
import { Router } from "./shards/Router.ts"
import { isBucketUrl } from "./tiers/Bucket.ts"
import { DataDirectory } from "./tiers/DataDirectory.ts"
import { ServerBackup } from "./tiers/ServerBackup.ts"

export { defaultSettings, Settings, type SettingValues } from "./config.ts"
export { actors, localDirectory } from "./embedded/layers.ts"
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
  Layer.provideMerge(Layer.merge(Subscriptions.layer, Topics.layer)),
  Layer.provideMerge(TenantRouter.layer),
  Layer.provideMerge(access),
  Layer.provideMerge(Cursors.layer),
  Layer.provideMerge(Sessions.layer),
  Layer.provideMerge(Promoter.layer),
  Layer.provideMerge(Load.layer),
  Layer.provideMerge(Readiness.layer)
)

/** A node: on a data directory and no other service, or on a bucket. */
export const node = (settings: SettingValues) =>
  wires.pipe(
    Layer.provideMerge(BackupDuty.layer),
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
  const isShared = settings.databaseUrl !== "" && !isBucketUrl(settings.data)
  return DataDirectory.layer({ path: localDirectory(settings), ...(isShared ? { sharedBy: settings.cell } : {}) })
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
