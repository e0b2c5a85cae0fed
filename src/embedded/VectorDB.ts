/** What `VectorDB.open` opens: the engine in the process itself. */
import { Context, Effect, Exit, Layer, Logger, References, Scope } from "effect"
import { ownError, type VectorDBError } from "../client/ClientError.ts"
import { resolveOptions } from "../client/ClientOptions.ts"
import { clientOf, type TypedClient } from "../client/VectorClient.ts"
import type { EngineOptions } from "../client/VectorDB.ts"
import { defaultSettings } from "../config.ts"
import { Subscriptions } from "../gateway/Subscriptions.ts"
import { Topics } from "../gateway/Topics.ts"
import { Router } from "../shards/Router.ts"
import { makeEmbeddedEngine } from "./EmbeddedEngine.ts"
import { engine } from "./layers.ts"
import type { OpenOptions } from "./OpenOptions.ts"

/** An engine in this process, and what its client is made with. `close` ends it, after what it holds is safe. */
export const openEngine = <M>(options: OpenOptions<M>): Effect.Effect<EngineOptions<M>, VectorDBError> =>
  Effect.gen(function* () {
    const settings = { ...defaultSettings, searchWaitMillis, ...options.settings, data: options.path }
    for (const name of ofClusters) {
      if (settings[name] !== "") {
        return yield* Effect.fail(ownError("not_opened", `${name}: an engine in a program's own process stands alone`))
      }
    }
    const scope = yield* Scope.make()
    const context = yield* Layer.buildWithScope(engine(settings), scope).pipe(
      Effect.onError((cause) => Scope.close(scope, Exit.failCause(cause))),
      Effect.mapError(({ message }) => ownError("not_opened", message))
    )
    let closed: Promise<void> | undefined
    const close = () => {
      closed ??= Effect.runPromise(Scope.close(scope, Exit.void))
      return closed
    }
    const { collection, deadlineMillis, metadata } = options
    return {
      engine: makeEmbeddedEngine(
        Context.get(context, Router),
        Context.get(context, Subscriptions),
        Context.get(context, Topics),
        close
      ),
      ...(collection === undefined ? {} : { collection }),
      ...(deadlineMillis === undefined ? {} : { deadlineMillis }),
      ...(metadata === undefined ? {} : { metadata })
    }
  })

/** What makes a process one of several. What that takes is not in the package's bundle (`scripts/build.mjs`). */
const ofClusters = ["databaseUrl", "directoryUrl"] as const

/**
 * A program that waits for a search is answered twice as fast where its thread waits for the vector thread, asleep. It is kept
 * so for no longer than a slice of an insertion takes, then its event loop has a turn.
 */
const searchWaitMillis = 4

/** A client of an engine in this process, which is ended with the scope, after what it holds is safe. */
export const makeEmbeddedClient = <M>(
  options: OpenOptions<M>
): Effect.Effect<TypedClient<M>, VectorDBError, Scope.Scope> =>
  Effect.map(
    Effect.acquireRelease(openEngine(options), ({ engine }) => Effect.promise(async () => engine.close()), {
      interruptible: true
    }),
    ({ engine, metadata, ...defaults }) =>
      clientOf<M>(engine, { ...resolveOptions({ ...defaults, endpoint: "http://embedded" }), metadata })
  )

/** For a program that has no loggers of its own: lines of severity error go to stderr. */
export const errorsToStderr = Layer.mergeAll(
  Logger.layer([
    Logger.make<unknown, void>((options) => {
      process.stderr.write(`${Logger.formatJson.log(options)}\n`)
    })
  ]),
  Layer.succeed(References.MinimumLogLevel, "Error" as const)
)
