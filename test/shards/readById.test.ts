/** Reads by id from the nearest tier: what is read without the partition being opened, and that it is never out of date. */
import { afterAll, assert, beforeAll, describe, it } from "@effect/vitest"
import { Context, Effect, Layer } from "effect"
import { LocalActors } from "../../src/shards/LocalActors.ts"
import { ObjectStore } from "../../src/tiers/ObjectStore.ts"
import { RecordCache } from "../../src/tiers/RecordCache.ts"
import { WarmStore } from "../../src/tiers/WarmStore.ts"
import { type RunningActors, startActors } from "../support/Actors.ts"
import { type RedisServer, skipRedis, startRedis } from "../support/RedisServer.ts"

const suite = (redisUrl: () => string) => {
  const start = async (recordCacheBytes: number) => {
    const store = await Effect.runPromise(Effect.scoped(Layer.build(ObjectStore.layerMemory)))
    const node = await startActors(store, { partitionIdleMillis: 150, recordCacheBytes, redisUrl: redisUrl() })
    const all = node.context as Context.Context<unknown> as Context.Context<LocalActors | RecordCache | WarmStore>
    await Effect.runPromise(node.router.createCollection("c", { dimensions: 2 }))
    return {
      node,
      local: Context.get(all, LocalActors),
      cache: Context.get(all, RecordCache),
      warm: Context.get(all, WarmStore)
    }
  }

  it("the warm tier answers for a partition that is not resident, also after it was opened for a write", async () => {
    const { node, local, warm } = await start(0)
    for (const id of ["a", "b"]) await put(node, id, 1)
    assert.deepStrictEqual([await get(node, "a"), await get(node, "b")], [1, 1])
    await passivated(local)
    assert.strictEqual(await get(node, "a"), 1)
    assert.strictEqual(local.partitions.size, 0, "it was not opened for that")
    // A write opens it. What it did not touch is still there when it is gone again, what it did is not.
    await put(node, "a", 2)
    assert.strictEqual(local.partitions.size, 1)
    await passivated(local)
    const { hits } = await Effect.runPromise(warm.state)
    assert.strictEqual(await get(node, "b"), 1)
    assert.strictEqual(local.partitions.size, 0, "nor for that")
    assert.strictEqual((await Effect.runPromise(warm.state)).hits, hits + 1)
    assert.strictEqual(await get(node, "a"), 2)
    assert.strictEqual(local.partitions.size, 1, "the warm tier had it no more")
    await node.stop()
  })

  it("every write is seen by the next read, of all that there is", async () => {
    const { node, cache } = await start(1_000_000)
    for (let n = 1; n < 60; n++) {
      await Promise.all([put(node, "a", n, n % 2 === 0 ? "memory" : "cold"), get(node, "a"), get(node, "a")])
      assert.strictEqual(await get(node, "a"), n)
      assert.strictEqual(await get(node, "a"), n)
    }
    assert.isAbove(cache.hits(), 50)
    await Effect.runPromise(node.router.remove("c", ["a"]))
    assert.isUndefined(await get(node, "a"))
    await put(node, "a", 7)
    assert.strictEqual(await get(node, "a"), 7)
    await Effect.runPromise(node.router.deleteCollection("c"))
    assert.strictEqual(cache.count(), 0)
    await Effect.runPromise(node.router.createCollection("c", { dimensions: 2 }))
    assert.isUndefined(await get(node, "a"))
    await node.stop()
  })
}

const put = (node: RunningActors, id: string, value: number, ack?: "memory" | "cold") =>
  Effect.runPromise(node.router.upsert("c", [{ id, vector: Float32Array.of(1, value), metadata: "" }], ack))

const get = (node: RunningActors, id: string) =>
  Effect.runPromise(
    node.router.get("c", id).pipe(
      Effect.map((record) => record.vector[1]),
      Effect.catchTag("VectorNotFound", () => Effect.succeed(undefined))
    )
  )

const passivated = async (local: LocalActors["Service"]) => {
  for (let n = 0; local.partitions.size > 0; n++) {
    assert.isBelow(n, 400, "it is passivated")
    await new Promise((resolve) => setTimeout(resolve, 25))
  }
  // Registered no more is not yet closed: its snapshot may still be under way.
  await new Promise((resolve) => setTimeout(resolve, 1_500))
}

// Side by side: the cluster looks for idle entities every five seconds.
describe.concurrent("reads by id, warm tier in memory", { timeout: 30_000 }, () => suite(() => ""))

describe.skipIf(skipRedis).concurrent("reads by id, warm tier on Redis", { timeout: 30_000 }, () => {
  let server: RedisServer
  beforeAll(async () => {
    server = await startRedis()
  })
  afterAll(() => server.stop())
  suite(() => server.url)
})
