/**
 * Effect's `Redis` service on this node's connection, so that what `effect/persistence` has (rate limiter, queues, caches)
 * runs on it too. (`NodeRedis` of `@effect/platform-node` is on another client, and waits for Redis to start.)
 */
import { Deferred, Effect, Layer } from "effect"
import * as Redis from "effect/persistence/Redis"
import type { Redis as Client } from "ioredis"
import { Settings } from "../config.ts"
import { RedisConnection } from "./RedisConnection.ts"

/** `connectionsMax` bounds the connections that are reserved for commands that block. */
export const layerWith = (options: {
  readonly connectionsMax: number
  readonly acquireMillis: number
}): Layer.Layer<Redis.Redis, never, RedisConnection> =>
  Layer.effect(
    Redis.Redis,
    Effect.gen(function* () {
      const connection = yield* RedisConnection

      const send =
        (use: <A>(command: (client: Client) => Promise<A>) => Effect.Effect<A, Redis.RedisError>) =>
        <A = unknown>(command: string, ...args: ReadonlyArray<string>) =>
          use((client) => client.call(command, ...args) as Promise<A>)

      const on =
        (client: Client) =>
        <A>(use: (client: Client) => Promise<A>): Effect.Effect<A, Redis.RedisError> =>
          Effect.tryPromise({ try: () => use(client), catch: (cause) => new Redis.RedisError({ cause }) })

      const dedicated = Effect.mapError(connection.dedicated, (cause) => new Redis.RedisError({ cause }))

      return yield* Redis.make({
        send: send((use) => Effect.mapError(connection.run(use), (cause) => new Redis.RedisError({ cause }))),
        connect: Effect.map(dedicated, (client) => ({
          send: send(on(client)),
          close: Effect.sync(() => client.disconnect())
        })),
        pool: { maxConnections: options.connectionsMax, acquireTimeout: options.acquireMillis },
        subscribe: Effect.fnUntraced(function* (channel, onMessage) {
          const client = yield* Effect.acquireRelease(dedicated, (own) => Effect.sync(() => own.disconnect()))
          client.on("message", (from, message) => {
            if (from === channel) onMessage({ channel: from, message })
          })
          const ended = yield* Deferred.make<void, Redis.RedisError>()
          client.on("end", () => {
            const cause = new Error("The connection of a subscription was lost.")
            Deferred.doneUnsafe(ended, Effect.fail(new Redis.RedisError({ cause })))
          })
          yield* on(client)((subscriber) => subscriber.subscribe(channel))
          return Deferred.await(ended)
        })
      })
    })
  )

export const layer: Layer.Layer<Redis.Redis, never, RedisConnection | Settings> = Layer.unwrap(
  Effect.map(Settings, ({ redisPoolMax, redisTimeoutMillis }) =>
    layerWith({ connectionsMax: redisPoolMax, acquireMillis: redisTimeoutMillis })
  )
)
