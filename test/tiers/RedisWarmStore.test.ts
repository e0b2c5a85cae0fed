/** The warm tier on a real Redis: the shared suite, and Redis slow, down, restarted, full, and with damaged values. */
import { afterAll, assert, beforeAll, describe, it } from "@effect/vitest"
import { Context, Effect, Layer, Logger } from "effect"
import { Redis } from "ioredis"
import { RedisConnection } from "../../src/tiers/RedisConnection.ts"
import * as RedisWarmStore from "../../src/tiers/RedisWarmStore.ts"
import { WarmStore } from "../../src/tiers/WarmStore.ts"
import { type RedisServer, skipRedis, startRedis } from "../support/RedisServer.ts"
import { random, seedOf } from "../support/Seeded.ts"
import { partition, record, warmStoreSuite } from "./warmStoreSuite.ts"

const quiet = Logger.layer([])
let prefixes = 0

const layerOf = (url: string, options: { ttlMillis?: number; prefix?: string; timeoutMillis?: number } = {}) =>
  RedisWarmStore.layerWith({ prefix: options.prefix ?? `t${++prefixes}`, ttlMillis: options.ttlMillis ?? 60_000 }).pipe(
    Layer.provideMerge(RedisConnection.layerWith({ url, timeoutMillis: options.timeoutMillis ?? 300 })),
    Layer.provide(quiet)
  )

/** Runs with a store, and with a client of the test's own beside it. */
const withStore = <A>(
  server: RedisServer,
  use: (warm: WarmStore["Service"], client: Redis, connection: RedisConnection["Service"]) => Effect.Effect<A>,
  options: Parameters<typeof layerOf>[1] = {}
) =>
  Effect.runPromise(
    Effect.scoped(
      Effect.gen(function* () {
        const context = yield* Layer.build(layerOf(server.url, options))
        const client = yield* Effect.acquireRelease(
          Effect.sync(() => new Redis(server.url).on("error", () => undefined)),
          (own) => Effect.sync(() => own.disconnect())
        )
        return yield* use(Context.get(context, WarmStore), client, Context.get(context, RedisConnection))
      })
    )
  )

/** Until it holds; a bound on the test, not a measure of it. */
const until = (holds: Effect.Effect<boolean>) =>
  Effect.gen(function* () {
    for (let n = 0; n < 400; n++) {
      if (yield* holds) return
      yield* Effect.sleep(25)
    }
    assert.fail("it did not come to pass within 10 s")
  })

const trusted = (warm: WarmStore["Service"]) => Effect.map(warm.state, ({ partitions }) => partitions === 1)

describe.skipIf(skipRedis)("WarmStore on Redis", { timeout: 20_000 }, () => {
  let server: RedisServer
  beforeAll(async () => {
    server = await startRedis()
  })
  afterAll(() => server.stop())

  warmStoreSuite(({ ttlMillis }) => Layer.suspend(() => layerOf(server.url, { ttlMillis })) as Layer.Layer<WarmStore>)

  it("reads many ids at once, and their time begins anew", () =>
    withStore(
      server,
      (warm, client) =>
        Effect.gen(function* () {
          yield* warm.fence(partition)
          const ids = Array.from({ length: 200 }, (_, i) => `id-${i}`)
          yield* warm.putRecords(
            partition,
            ids.map((id) => record(id)),
            warm.ticket()
          )
          const key = "trip:0123456789abcdef:0:r:id-7"
          yield* Effect.promise(() => client.pexpire(key, 5_000))
          const found = yield* warm.getRecords(partition, ids)
          assert.isTrue(found.every((one, i) => one?.id === ids[i]))
          assert.isAbove(yield* Effect.promise(() => client.pttl(key)), 30_000)
        }),
      { prefix: "trip" }
    ))

  it("a flipped byte anywhere in a value is a miss and is counted", () =>
    withStore(
      server,
      (warm, client) =>
        Effect.gen(function* () {
          const source = random(seedOf(3))
          yield* warm.fence(partition)
          yield* warm.putRecords(partition, [record("a", 1, `{"k":1}`), record("b")], warm.ticket())
          const key = "flip:0123456789abcdef:0:r:a"
          const good = (yield* Effect.promise(() => client.getBuffer(key))) as Buffer
          for (let n = 0; n < 40; n++) {
            const bad = Buffer.from(good)
            const at = source.below(bad.length)
            bad[at] = (bad[at] as number) ^ (1 << source.below(8))
            yield* Effect.promise(() => client.set(key, n % 8 === 7 ? bad.subarray(0, at) : bad))
            assert.deepStrictEqual(yield* warm.getRecords(partition, ["a"]), [null])
          }
          // Another record's value under this key is not this record.
          const other = (yield* Effect.promise(() => client.getBuffer("flip:0123456789abcdef:0:r:b"))) as Buffer
          yield* Effect.promise(() => client.set(key, other))
          assert.deepStrictEqual(yield* warm.getRecords(partition, ["a"]), [null])
          assert.strictEqual((yield* warm.state).errors, 41)
          yield* Effect.promise(() => client.set(key, good))
          assert.isNotNull((yield* warm.getRecords(partition, ["a"]))[0])
        }),
      { prefix: "flip" }
    ))

  it("another process's fence ends this one's, and an older epoch cannot fence after a newer one", () =>
    withStore(
      server,
      (first) =>
        withStoreEffect(server.url, "two", (second) =>
          Effect.gen(function* () {
            yield* first.fence(partition, { epoch: 1, seq: 1 })
            yield* first.putRecords(partition, [record("a")], first.ticket())
            yield* second.fence(partition, { epoch: 2, seq: 2 })
            assert.deepStrictEqual(yield* second.getRecords(partition, ["a"]), [null])
            yield* second.putRecords(partition, [record("a", 2)], second.ticket())
            assert.deepStrictEqual(yield* first.getRecords(partition, ["a"]), [null])
            yield* first.fence(partition, { epoch: 1, seq: 1 })
            assert.strictEqual(yield* first.putRecords(partition, [record("a")], first.ticket()), 0)
            assert.deepStrictEqual(yield* second.getRecords(partition, ["a"]), [record("a", 2)])
          })
        ),
      { prefix: "two" }
    ))

  it("deletes a collection's keys", () =>
    withStore(
      server,
      (warm, client) =>
        Effect.gen(function* () {
          yield* warm.fence(partition)
          const records = Array.from({ length: 2_500 }, (_, i) => record(`id-${i}`))
          assert.strictEqual(yield* warm.putRecords(partition, records, warm.ticket()), 2_500)
          yield* warm.drop("0123456789abcdef")
          yield* until(Effect.promise(async () => (await client.keys("gone:*")).length === 0))
        }),
      { prefix: "gone" }
    ))

  it("silent: calls go on at once, a missed invalidation ends the trust, and it comes back", () =>
    withStore(server, (warm, _, connection) =>
      Effect.gen(function* () {
        yield* warm.fence(partition, { epoch: 1, seq: 1 })
        yield* warm.putRecords(partition, [record("a"), record("b")], warm.ticket())
        server.suspend()
        yield* warm.invalidate(partition, ["a"])
        assert.isFalse(connection.up())
        // With the circuit open nothing waits: far more calls than would fit in a test if each took its time-out.
        for (let n = 0; n < 200; n++) {
          assert.deepStrictEqual(yield* warm.getRecords(partition, ["a"]), [null])
          assert.strictEqual(yield* warm.putRecords(partition, [record("a")], warm.ticket()), 0)
          yield* warm.invalidate(partition, ["b"])
        }
        assert.strictEqual((yield* warm.state).level, "degraded")
        server.resume()
        yield* until(trusted(warm))
        assert.deepStrictEqual(yield* warm.getRecords(partition, ["a", "b"]), [null, null])
        yield* warm.putRecords(partition, [record("a", 2)], warm.ticket())
        assert.deepStrictEqual(yield* warm.getRecords(partition, ["a"]), [record("a", 2)])
        assert.strictEqual((yield* warm.state).level, "up")
      }).pipe(Effect.ensuring(Effect.sync(server.resume)))
    ))

  it("killed and started again: no error, and it is used again", () =>
    withStore(server, (warm, _, connection) =>
      Effect.gen(function* () {
        yield* warm.fence(partition, { epoch: 1, seq: 1 })
        yield* warm.putRecords(partition, [record("a")], warm.ticket())
        yield* Effect.promise(server.kill)
        yield* until(Effect.sync(() => !connection.up()))
        assert.deepStrictEqual(yield* warm.getRecords(partition, ["a"]), [null])
        yield* warm.invalidate(partition, ["a"])
        assert.isUndefined(yield* warm.getResult("x"))
        assert.strictEqual((yield* warm.state).level, "degraded")
        yield* Effect.promise(server.start)
        yield* until(trusted(warm))
        yield* warm.putRecords(partition, [record("a", 2)], warm.ticket())
        assert.deepStrictEqual(yield* warm.getRecords(partition, ["a"]), [record("a", 2)])
      })
    ))

  it("emptied: a fence that is gone is not taken for good", () =>
    withStore(server, (warm, client) =>
      Effect.gen(function* () {
        yield* warm.fence(partition, { epoch: 1, seq: 1 })
        yield* warm.putRecords(partition, [record("a")], warm.ticket())
        yield* Effect.promise(() => client.flushall())
        assert.deepStrictEqual(yield* warm.getRecords(partition, ["a"]), [null])
        yield* until(trusted(warm))
      })
    ))

  it("not there at the start: the layer builds, and it is used once it is there", async () => {
    await server.kill()
    await withStore(server, (warm) =>
      Effect.gen(function* () {
        yield* warm.fence(partition, { epoch: 1, seq: 1 })
        assert.deepStrictEqual(yield* warm.getRecords(partition, ["a"]), [null])
        yield* Effect.promise(server.start)
        yield* until(trusted(warm))
      })
    )
  })
})

describe.skipIf(skipRedis)("WarmStore on a full Redis", { timeout: 20_000 }, () => {
  it("puts nothing, fails nothing, invalidates still, and goes on when there is room", async () => {
    const server = await startRedis(["--maxmemory-policy", "noeviction"])
    try {
      await withStore(server, (warm, client) =>
        Effect.gen(function* () {
          yield* warm.fence(partition, { epoch: 1, seq: 1 })
          yield* warm.putRecords(partition, [record("a"), record("b")], warm.ticket())
          yield* Effect.promise(() => client.config("SET", "maxmemory", "1"))
          assert.strictEqual(yield* warm.putRecords(partition, [record("c")], warm.ticket()), 0)
          assert.strictEqual((yield* warm.state).level, "degraded")
          yield* warm.invalidate(partition, ["a"])
          assert.deepStrictEqual(yield* warm.getRecords(partition, ["a", "b"]), [null, record("b")])
          yield* warm.fence(partition, { epoch: 2, seq: 5 })
          assert.deepStrictEqual(yield* warm.getRecords(partition, ["b"]), [null])
          yield* Effect.promise(() => client.config("SET", "maxmemory", "0"))
          yield* until(trusted(warm))
          yield* until(Effect.map(warm.putRecords(partition, [record("b")], warm.ticket()), (n) => n === 1))
          assert.deepStrictEqual(yield* warm.getRecords(partition, ["b"]), [record("b")])
        })
      )
    } finally {
      await server.stop()
    }
  })
})

const withStoreEffect = (url: string, prefix: string, use: (warm: WarmStore["Service"]) => Effect.Effect<void>) =>
  Effect.scoped(
    Effect.flatMap(Layer.build(layerOf(url, { prefix })), (context) => use(Context.get(context, WarmStore)))
  )
