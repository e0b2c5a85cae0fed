/** What `VectorDB.open` opens: the engine in the process itself. */
import { Context, Effect, Exit, Layer, Logger, References, Scope } from "effect"
import type { Metadata } from "../client/Engine.ts"
import type { StandardSchema } from "../client/StandardSchema.ts"
import type { EngineOptions } from "../client/VectorDB.ts"
import { defaultSettings, type SettingValues } from "../config.ts"
import { Subscriptions } from "../gateway/Subscriptions.ts"
import { Router } from "../shards/Router.ts"
import { makeEmbeddedEngine } from "./EmbeddedEngine.ts"
import { engine } from "./layers.ts"

export interface OpenOptions<M = Metadata> {
  /** Data directory, made where it is missing, or `gs://bucket/prefix`; a server can open it afterwards, or has before. */
  readonly path: string
  readonly collection?: string
  readonly deadlineMillis?: number
  readonly metadata?: StandardSchema<M>
  /** Settings of the engine, as of a server (`docs/operating.md`). */
  readonly settings?: Partial<SettingValues>
}

/**
 * The engine of a `VectorDB` in this process. Rejects with one line for people where it cannot be opened. Log lines of
 * severity error go to stderr.
 */
export const openEngine = async <M>(options: OpenOptions<M>): Promise<EngineOptions<M>> => {
  const settings = { ...defaultSettings, searchWaitMillis, ...options.settings, data: options.path }
  const logging = Layer.mergeAll(
    Logger.layer([errorsToStderr]),
    Layer.succeed(References.MinimumLogLevel, "Error" as const)
  )
  const scope = await Effect.runPromise(Scope.make())
  const context = await Effect.runPromise(
    Layer.buildWithScope(Layer.provideMerge(engine(settings), logging), scope).pipe(
      Effect.onError((cause) => Scope.close(scope, Exit.failCause(cause))),
      Effect.mapError(({ message }) => new Error(message))
    )
  )
  let closed: Promise<void> | undefined
  const close = () => {
    closed ??= Effect.runPromise(Scope.close(scope, Exit.void))
    return closed
  }
  const { collection, deadlineMillis, metadata } = options
  return {
    engine: makeEmbeddedEngine(Context.get(context, Router), Context.get(context, Subscriptions), close),
    ...(collection === undefined ? {} : { collection }),
    ...(deadlineMillis === undefined ? {} : { deadlineMillis }),
    ...(metadata === undefined ? {} : { metadata })
  }
}

/**
 * A program that waits for a search is answered twice as fast where its thread waits for the vector thread, asleep. It is kept
 * so for no longer than a slice of an insertion takes, then its event loop has a turn.
 */
const searchWaitMillis = 4

const errorsToStderr = Logger.make<unknown, void>((options) => {
  process.stderr.write(`${Logger.formatJson.log(options)}\n`)
})
