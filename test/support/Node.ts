/** A whole node in the test's own process, on a directory of its own. */
import { mkdtemp, rm } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { Context, Effect, Exit, Layer, Logger, References, Scope } from "effect"
import { activate, defaultSettings, HttpGateway, node, type SettingValues } from "../../src/server.ts"

export interface RunningNode {
  readonly base: string
  readonly port: number
  readonly data: string
  readonly stop: () => Promise<void>
}

/**
 * Starts a node and waits until it is ready. Log lines below `error` are dropped, unless `logged` takes those from `info` on.
 */
export const startNode = async (
  settings: Partial<SettingValues> = {},
  logged?: Array<string>
): Promise<RunningNode> => {
  const data = settings.data ?? (await mkdtemp(join(tmpdir(), "ruvector-")))
  const scope = await Effect.runPromise(Scope.make())
  const quiet =
    logged === undefined
      ? Layer.mergeAll(Logger.layer([Logger.consoleJson]), Layer.succeed(References.MinimumLogLevel, "Error"))
      : Logger.layer([Logger.map(Logger.formatJson, (line) => void logged.push(line))])
  const layer = node({ ...defaultSettings, port: 0, data, drainMillis: 500, ...settings }).pipe(
    Layer.provideMerge(quiet)
  )
  const context = await Effect.runPromise(Layer.buildWithScope(layer, scope))
  await Effect.runPromise(Effect.provideContext(activate, context))
  const { port } = Context.get(context, HttpGateway)
  return {
    base: `http://127.0.0.1:${port}`,
    port,
    data,
    stop: async () => {
      await Effect.runPromise(Scope.close(scope, Exit.void))
      if (settings.data === undefined) await rm(data, { recursive: true, force: true })
    }
  }
}
