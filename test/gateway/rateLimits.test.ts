/** Rates over several processes, by a Redis of the test's own; without Redis each process keeps to the limit by itself. */
import { Context, Effect, Exit, Layer, Logger, Scope } from "effect"
import { afterAll, assert, beforeAll, describe, it } from "vitest"
import { defaultSettings, Settings } from "../../src/config.ts"
import { RateLimits } from "../../src/gateway/RateLimits.ts"
import { type RedisServer, skipRedis, startRedis } from "../support/RedisServer.ts"

let redis: RedisServer
const scopes: Array<Scope.Closeable> = []

beforeAll(async () => {
  if (!skipRedis) redis = await startRedis()
})
afterAll(async () => {
  for (const scope of scopes) await Effect.runPromise(Scope.close(scope, Exit.void))
  await redis?.stop()
})

const burst = 40

/** The limits of a process of its own. */
const limits = async (redisUrl: string): Promise<RateLimits["Service"]> => {
  const scope = await Effect.runPromise(Scope.make())
  scopes.push(scope)
  const settings = { ...defaultSettings, redisUrl, keyRate: 1, keyBurst: burst, addressRate: 1, addressBurst: burst }
  const layer = RateLimits.layer.pipe(Layer.provide(Layer.succeed(Settings, settings)), Layer.provide(Logger.layer([])))
  return Context.get(await Effect.runPromise(Layer.buildWithScope(layer, scope)), RateLimits)
}

const pause = (millis: number) => new Promise((resolve) => setTimeout(resolve, millis))

/** How many of so many are let through, with time for Redis to be told in between. */
const letThrough = async (of: RateLimits["Service"], key: string, count: number): Promise<number> => {
  let passed = 0
  for (let i = 0; i < count; i++) {
    if (of.byKey(key) === undefined) passed += 1
    await pause(5)
  }
  return passed
}

describe.skipIf(skipRedis)("with Redis", () => {
  it("what one process let through is missing in the other, but for a lot", async () => {
    const [one, other] = [await limits(redis.url), await limits(redis.url)]
    // Until it is connected nothing is reported.
    let tries = 0
    for (let shared = false; !shared; tries++) {
      assert.isBelow(tries, 20, "the processes never shared a limit")
      const key = `k${tries}`
      const first = await letThrough(one, key, burst)
      const second = await letThrough(other, key, burst)
      assert.isAtLeast(first, burst - 2)
      shared = second <= burst / 4
    }
    assert.strictEqual(await letThrough(other, "another", 10), 10)
  })

  it("that hangs holds up nobody: each process lets through what its own buckets have", async () => {
    const [one, other] = [await limits(redis.url), await limits(redis.url)]
    redis.suspend()
    try {
      for (const of of [one, other]) {
        let passed = 0
        for (let i = 0; i < 2 * burst; i++) if (of.byKey("hanging") === undefined) passed += 1
        assert.isAtLeast(passed, burst)
        assert.isAtMost(passed, burst + 2)
      }
    } finally {
      redis.resume()
    }
  })
})

describe("a process by itself", () => {
  it("limits each key and each address, a client of IPv6 by its network, and says when to come again", async () => {
    const of = await limits("")
    for (let i = 0; i < burst; i++) assert.isUndefined(of.byAddress(`2001:db8::${i.toString(16)}`))
    const refused = of.byAddress("2001:db8::ffff")
    assert.strictEqual(refused?._tag, "RateLimited")
    assert.isAbove(refused?.retryAfterMillis ?? 0, 0)
    assert.isAtMost(refused?.retryAfterMillis ?? 0, 1_000)
    assert.isUndefined(of.byAddress("2001:db8:0:1::1"))
    assert.isUndefined(of.byAddress("192.0.2.1"))
    assert.isUndefined(of.byKey("2001:db8::1"))
  })
})
