/**
 * What a program imports: a whole node as one layer. `main.ts` serves it; a test or an application builds it in a scope
 * of its own.
 */
import { join } from "node:path"
import { Effect, Layer, Schedule } from "effect"
import * as CatalogActor from "./actors/Catalog.ts"
import * as IndexPartitionActor from "./actors/IndexPartition.ts"
import * as StreamSessionActor from "./actors/StreamSession.ts"
import * as TierPromoterActor from "./actors/TierPromoter.ts"
import { Settings, type SettingValues } from "./config.ts"
import { HttpGateway } from "./gateway/HttpGateway.ts"
import { Promoter } from "./gateway/Promoter.ts"
import { Readiness } from "./gateway/Readiness.ts"
import { Sessions } from "./gateway/Sessions.ts"
import { toProblem } from "./protocol/Errors.ts"
import { defaultCollection } from "./protocol/Fields.ts"
import * as Cluster from "./shards/Cluster.ts"
import { LocalActors } from "./shards/LocalActors.ts"
import { Router } from "./shards/Router.ts"
import { AccessLog } from "./tiers/AccessLog.ts"
import * as Caches from "./tiers/Caches.ts"
import { DataDirectory } from "./tiers/DataDirectory.ts"
import * as FileObjectStore from "./tiers/FileObjectStore.ts"
import { PartitionForms } from "./tiers/PartitionForms.ts"
import { VectorIndex } from "./tiers/VectorIndex.ts"

export { defaultSettings, Settings, type SettingValues } from "./config.ts"
export { HttpGateway } from "./gateway/HttpGateway.ts"
export { Readiness } from "./gateway/Readiness.ts"
export { RuvectorRpcs } from "./protocol/Rpcs.ts"
export { Router } from "./shards/Router.ts"

/** The wires over the actors, on one port. Closed first: it drains before the actors below it stop. */
const wires = HttpGateway.layer.pipe(
  Layer.provideMerge(Sessions.layer),
  Layer.provideMerge(Promoter.layer),
  Layer.provideMerge(Readiness.layer)
)

/** The actors of one process. They stop, and snapshot what they hold, before the threads and the store they rest on. */
export const actors = Layer.mergeAll(
  IndexPartitionActor.layer,
  CatalogActor.layer,
  StreamSessionActor.layer,
  TierPromoterActor.layer
).pipe(
  Layer.provideMerge(Router.layer({ createOnInsert: defaultCollection })),
  Layer.provideMerge(LocalActors.layer),
  Layer.provideMerge(Cluster.layerSingle),
  Layer.provideMerge(Layer.mergeAll(AccessLog.layer, Caches.layer, PartitionForms.layerOneForm)),
  Layer.provideMerge(VectorIndex.layer)
)

/** Objects in the data directory. */
const store = Layer.unwrap(
  Effect.map(DataDirectory, ({ path }) => FileObjectStore.layer({ directory: join(path, "objects") }))
)

/** A node on embedded defaults: a data directory, and no other service. */
export const node = (settings: SettingValues) =>
  wires.pipe(
    Layer.provideMerge(actors),
    Layer.provideMerge(store),
    Layer.provideMerge(DataDirectory.layer({ path: settings.data })),
    Layer.provideMerge(Layer.succeed(Settings, settings))
  )

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
