/** The caches of a node and what acknowledges `warm`: on Redis where the settings name one, else in this process. */
import { Effect, Layer } from "effect"
import { Settings } from "../config.ts"
import { AheadLog } from "./AheadLog.ts"
import { RecordCache } from "./RecordCache.ts"
import { RedisConnection } from "./RedisConnection.ts"
import * as RedisWarmStore from "./RedisWarmStore.ts"
import { WarmStore } from "./WarmStore.ts"

export const layer: Layer.Layer<AheadLog | RecordCache | WarmStore, never, Settings> = Layer.unwrap(
  Effect.map(Settings, ({ redisUrl }) => {
    const warm =
      redisUrl === ""
        ? Layer.mergeAll(WarmStore.layerInProcess, AheadLog.layerNone)
        : Layer.mergeAll(RedisWarmStore.layer, AheadLog.layer).pipe(Layer.provide(RedisConnection.layer))
    return Layer.mergeAll(RecordCache.layer, warm)
  })
)
