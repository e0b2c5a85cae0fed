/** The actors of one process over a store that outlives them, so that they can be stopped and started again. */
import { mkdtemp, rm } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { Context, Effect, Exit, Layer, Logger, References, Scope } from "effect"
import type { Sharding } from "effect/cluster"
import { defaultSettings, Settings, type SettingValues } from "../../src/config.ts"
import { actors, type CacheEvents, Router, type StandingQueries } from "../../src/server.ts"
import type { ChangeFeeds } from "../../src/shards/ChangeFeeds.ts"
import type { LocalActors } from "../../src/shards/LocalActors.ts"
import type { ResultCache } from "../../src/shards/ResultCache.ts"
import { DataDirectory } from "../../src/tiers/DataDirectory.ts"
import type { MemoryBudget } from "../../src/tiers/MemoryBudget.ts"
import type { ObjectStore } from "../../src/tiers/ObjectStore.ts"

export interface RunningActors {
  readonly router: Router["Service"]
  /** Everything the actors offer, to run other effects with. */
  readonly context: Context.Context<
    Router | StandingQueries | ChangeFeeds | Sharding.Sharding | LocalActors | ResultCache | CacheEvents | MemoryBudget
  >
  /** Stops them as a node is stopped. */
  readonly stop: () => Promise<void>
}

export const startActors = async (
  /** With what else the actors are to use instead of their own. */
  store: Context.Context<ObjectStore>,
  settings: Partial<SettingValues> = {}
): Promise<RunningActors> => {
  const path = await mkdtemp(join(tmpdir(), "ruvector-"))
  const scope = await Effect.runPromise(Scope.make())
  const layer = actors.pipe(
    Layer.provideMerge(DataDirectory.layer({ path })),
    Layer.provideMerge(Layer.succeedContext(store)),
    Layer.provideMerge(Layer.succeed(Settings, { ...defaultSettings, drainMillis: 1_000, ...settings })),
    Layer.provideMerge(
      Layer.mergeAll(Logger.layer([Logger.consoleJson]), Layer.succeed(References.MinimumLogLevel, "Fatal"))
    )
  )
  const context = await Effect.runPromise(Layer.buildWithScope(layer, scope))
  return {
    router: Context.get(context, Router),
    context,
    stop: async () => {
      await Effect.runPromise(Scope.close(scope, Exit.void))
      await rm(path, { recursive: true, force: true })
    }
  }
}
