/** What `effect/persistence` has, on this node's connection to a real Redis. */
import { afterAll, assert, beforeAll, describe, it } from "@effect/vitest"
import { Effect, Fiber, Layer, Logger, Queue, Schema } from "effect"
import { Persistable, PersistedCache, PersistedQueue, Persistence, RateLimiter, Redis } from "effect/persistence"
import * as EffectRedis from "../../src/tiers/EffectRedis.ts"
import { RedisConnection, redactUrl } from "../../src/tiers/RedisConnection.ts"
import { type RedisServer, skipRedis, startRedis } from "../support/RedisServer.ts"

describe.skipIf(skipRedis)("effect/persistence on the connection", { timeout: 20_000 }, () => {
  let server: RedisServer
  beforeAll(async () => {
    server = await startRedis()
  })
  afterAll(() => server.stop())

  const run = <A, E>(program: Effect.Effect<A, E, Redis.Redis | RedisConnection>) =>
    Effect.runPromise(
      program.pipe(
        Effect.provide(
          EffectRedis.layerWith({ connectionsMax: 2, acquireMillis: 200 }).pipe(
            Layer.provideMerge(RedisConnection.layerWith({ url: server.url, timeoutMillis: 500 })),
            Layer.provide(Logger.layer([]))
          )
        )
      )
    )

  it("limits a rate", () =>
    run(
      Effect.gen(function* () {
        const limiter = yield* RateLimiter.RateLimiter
        const consume = limiter.consume({ key: "k", limit: 3, window: "1 minute" })
        for (const left of [2, 1, 0]) assert.strictEqual((yield* consume).remaining, left)
        const error = yield* Effect.flip(consume)
        assert.strictEqual(error.reason._tag, "RateLimitExceeded")
      }).pipe(Effect.provide(RateLimiter.layer.pipe(Layer.provide(RateLimiter.layerStoreRedis()))))
    ))

  it("keeps a queue, whose elements come once and in order", () =>
    run(
      Effect.gen(function* () {
        const queue = yield* PersistedQueue.make({ name: "jobs", schema: Schema.Struct({ n: Schema.Int }) })
        for (let n = 0; n < 5; n++) yield* queue.offer({ n })
        const taken: Array<number> = []
        for (let n = 0; n < 5; n++) yield* queue.take((job) => Effect.sync(() => taken.push(job.n)))
        assert.deepStrictEqual(taken, [0, 1, 2, 3, 4])
      }).pipe(
        Effect.provide(
          PersistedQueue.layer.pipe(Layer.provide(PersistedQueue.layerStoreRedis({ pollInterval: "20 millis" })))
        )
      )
    ))

  it("keeps a cache that outlives its process", async () => {
    class Square extends Persistable.Class<{ payload: { n: number } }>()("Square", {
      primaryKey: ({ n }) => `${n}`,
      success: Schema.Number
    }) {}
    let lookups = 0
    const ask = run(
      Effect.gen(function* () {
        const cache = yield* PersistedCache.make(
          (key: Square) =>
            Effect.sync(() => {
              lookups += 1
              return key.n ** 2
            }),
          { storeId: "squares", timeToLive: () => "1 minute" }
        )
        return yield* cache.get(new Square({ n: 7 }))
      }).pipe(Effect.scoped, Effect.provide(Persistence.layerRedis))
    )
    assert.strictEqual(await ask, 49)
    assert.strictEqual(lookups, 1)
    const again = run(
      Effect.gen(function* () {
        const cache = yield* PersistedCache.make((_: Square) => Effect.succeed(-1), {
          storeId: "squares",
          timeToLive: () => "1 minute"
        })
        return yield* cache.get(new Square({ n: 7 }))
      }).pipe(Effect.scoped, Effect.provide(Persistence.layerRedis))
    )
    assert.strictEqual(await again, 49)
  })

  it("blocks on connections of its own, bounded, while the shared one goes on", () =>
    run(
      Effect.gen(function* () {
        const redis = yield* Redis.Redis
        const pop = (list: string) =>
          Effect.scoped(Effect.flatMap(redis.reserve, (own) => own.send<[string, string]>("BLPOP", list, "0")))
        const first = yield* Effect.forkChild(pop("first"), { startImmediately: true })
        const second = yield* Effect.forkChild(pop("second"), { startImmediately: true })
        yield* Effect.sleep(100)
        assert.instanceOf(yield* Effect.flip(pop("third")), Redis.RedisError)
        yield* redis.send("RPUSH", "second", "2")
        yield* redis.send("RPUSH", "first", "1")
        assert.deepStrictEqual(yield* Fiber.join(first), ["first", "1"])
        assert.deepStrictEqual(yield* Fiber.join(second), ["second", "2"])
      })
    ))

  it("subscribes", () =>
    run(
      Effect.scoped(
        Effect.gen(function* () {
          const redis = yield* Redis.Redis
          const messages = yield* redis.subscribe("news")
          yield* redis.send("PUBLISH", "news", "hello")
          assert.deepStrictEqual(yield* Queue.take(messages), { channel: "news", message: "hello" })
        })
      )
    ))
})

describe("a URL in a log line", () => {
  it("has no credentials", () => {
    assert.strictEqual(redactUrl("redis://user:secret@host:6379/2?x=secret"), "redis://host:6379/2")
    assert.strictEqual(redactUrl("rediss://:secret@host"), "rediss://host")
    assert.strictEqual(redactUrl("not a url with secret"), "redis")
  })
})
