/**
 * The runner that entities live on. In one process: Effect Cluster with its runner set and message storage in memory, so
 * that entities are the same ones as in a cluster and only this layer differs.
 */
import { Duration, Effect, Layer } from "effect"
import { MessageStorage, RunnerHealth, RunnerStorage, Runners, Sharding, ShardingConfig } from "effect/cluster"
import { Settings } from "../config.ts"

/** One process, no services. */
export const layerSingle = Layer.unwrap(
  Effect.map(Settings, (settings) =>
    Sharding.layer.pipe(
      Layer.provideMerge(Runners.layerNoop),
      Layer.provideMerge(MessageStorage.layerMemory),
      Layer.provide([RunnerStorage.layerMemory, RunnerHealth.layerNoop]),
      Layer.provide(
        ShardingConfig.layer({
          // Messages between actors of one process are handed over as they are, not encoded and decoded.
          simulateRemoteSerialization: false,
          maxResidentEntities: settings.residentEntitiesMax,
          entityTerminationTimeout: Duration.millis(settings.drainMillis),
          entityMaxIdleTime: Duration.millis(settings.sessionIdleMillis)
        })
      )
    )
  )
)
