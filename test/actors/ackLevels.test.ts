/** When a write is acknowledged, and what of it survives: at once, once Redis has it, or once the log has it. */
import { afterAll, assert, beforeAll, describe, it } from "@effect/vitest"
import { Context, Effect, Fiber, Layer, Logger, Stream } from "effect"
import { Redis } from "ioredis"
import { type Change, IndexPartition, partitionId } from "../../src/protocol/IndexPartition.ts"
import { requestIdOf } from "../../src/shards/RequestIds.ts"
import { AheadLog } from "../../src/tiers/AheadLog.ts"
import { encodeSegment } from "../../src/tiers/LogSegment.ts"
import { ObjectStore } from "../../src/tiers/ObjectStore.ts"
import { RedisConnection } from "../../src/tiers/RedisConnection.ts"
import { type RunningActors, startActors } from "../support/Actors.ts"
import { type RedisServer, skipRedis, startRedis } from "../support/RedisServer.ts"
import { seeded, seedOf } from "../support/Seeded.ts"
import { Faults, withFaults } from "../tiers/FaultyObjectStore.ts"

/** A store whose new log objects wait while it is held. */
const heldStore = async () => {
  const inner = Context.get(await Effect.runPromise(Effect.scoped(Layer.build(ObjectStore.layerMemory))), ObjectStore)
  let opened = Promise.resolve()
  let open = () => {}
  const create: ObjectStore["Service"]["create"] = (key, body) =>
    key.includes("/log/")
      ? Effect.andThen(
          Effect.promise(() => opened),
          inner.create(key, body)
        )
      : inner.create(key, body)
  return {
    inner: Context.make(ObjectStore, inner),
    store: Context.make(ObjectStore, ObjectStore.of({ ...inner, create })),
    hold: () => {
      opened = new Promise((resolve) => {
        open = resolve
      })
    },
    release: () => open()
  }
}

const insert = (node: RunningActors, id: string, ack: "memory" | "warm" | "cold", value = 1) =>
  node.router.upsert("c", [{ id, vector: Float32Array.of(1, value), metadata: "" }], ack)

const read = (node: RunningActors, id: string) =>
  Effect.runPromise(
    node.router.get("c", id).pipe(
      Effect.map((record) => record.vector[1]),
      Effect.catchTag("VectorNotFound", () => Effect.succeed(undefined))
    )
  )

const follow = (node: RunningActors, uid: string, count: number): Promise<ReadonlyArray<Change>> =>
  Effect.runPromise(
    Effect.flatMap(IndexPartition.client, (client) =>
      client(partitionId({ collection: "c", uid, partition: 0 }))
        .Changes({ seq: 0, index: 0 })
        .pipe(Stream.take(count), Stream.runCollect)
    ).pipe(Effect.provideContext(node.context))
  )

describe("acknowledged as memory", { timeout: 30_000 }, () => {
  it("is visible and acknowledged while the log cannot be written, cold is not; then both are in the log, once", async () => {
    const { store, hold, release } = await heldStore()
    let node = await startActors(store)
    const { collection } = await Effect.runPromise(node.router.createCollection("c", { dimensions: 2 }))
    await Effect.runPromise(insert(node, "first", "cold"))
    hold()
    await Effect.runPromise(insert(node, "m0", "memory", 5))
    const cold = Effect.runFork(insert(node, "cold", "cold"))
    for (let n = 1; n < 4; n++) {
      await Effect.runPromise(insert(node, `m${n}`, "memory", n))
      assert.strictEqual(await read(node, `m${n}`), n)
    }
    await Effect.runPromise(insert(node, "m0", "memory", 6))
    assert.strictEqual(await read(node, "m0"), 6)
    assert.isUndefined(cold.pollUnsafe())
    assert.isUndefined(await read(node, "cold"))
    release()
    await Effect.runPromise(Fiber.join(cold))
    const ids = (await follow(node, collection.uid, 7)).map(({ id }) => id)
    assert.deepStrictEqual(ids.slice(0, 2), ["first", "m0"])
    assert.deepStrictEqual([...ids].sort(), ["cold", "first", "m0", "m0", "m1", "m2", "m3"])
    await node.stop()
    node = await startActors(store)
    assert.deepStrictEqual(
      await Promise.all(["m0", "m1", "m2", "m3", "cold"].map((id) => read(node, id))),
      [6, 1, 2, 3, 1]
    )
    await node.stop()
  })

  it("and an update of metadata at the same time: one comes after the other", async () => {
    const store = await Effect.runPromise(Effect.scoped(Layer.build(ObjectStore.layerMemory)))
    const node = await startActors(store)
    await Effect.runPromise(node.router.createCollection("c", { dimensions: 2 }))
    const write = (n: number) =>
      node.router.upsert("c", [{ id: "a", vector: Float32Array.of(1, n), metadata: `{"a":${n}}` }], "memory")
    await Effect.runPromise(write(0))
    for (let n = 1; n <= 150; n++) {
      const turns = Effect.forEach(Array.from({ length: n % 7 }), () => Effect.yieldNow, { discard: true })
      await Effect.runPromise(
        Effect.all([Effect.andThen(turns, write(n)), node.router.updateMetadata("c", "a", `{"b":${n}}`)], {
          concurrency: "unbounded"
        })
      )
      const { metadata } = await Effect.runPromise(node.router.get("c", "a"))
      assert.include([`{"a":${n}}`, `{"a":${n},"b":${n}}`], metadata)
    }
    await node.stop()
  })

  it("is in the log after commits that failed or were in doubt, and after a clean stop", () =>
    seeded(seedOf(21), async (source) => {
      const faults = new Faults(source.seed)
      const inner = Context.get(
        await Effect.runPromise(Effect.scoped(Layer.build(ObjectStore.layerMemory))),
        ObjectStore
      )
      const store = Context.make(ObjectStore, withFaults(inner, faults))
      let node = await startActors(store)
      await Effect.runPromise(node.router.createCollection("c", { dimensions: 2 }))
      Object.assign(faults, { dropShare: 0.3, doubtShare: 0.3, lateShare: 0.2 })
      const known = new Map<string, number>()
      for (let n = 0; n < 40; n++) {
        const id = `id-${source.below(15)}`
        await Effect.runPromise(insert(node, id, "memory", n))
        known.set(id, n)
        assert.strictEqual(await read(node, id), n)
        if (n % 10 === 9) await Effect.runPromise(Effect.ignore(insert(node, `cold-${n}`, "cold", n)))
      }
      await Effect.runPromise(faults.heal)
      await node.stop()
      node = await startActors(store)
      for (const [id, n] of known) assert.strictEqual(await read(node, id), n)
      await node.stop()
    }))
})

describe("acknowledged as warm, without Redis", { timeout: 30_000 }, () => {
  it("waits for the log, as cold does", async () => {
    const { store, hold, release } = await heldStore()
    const node = await startActors(store)
    await Effect.runPromise(node.router.createCollection("c", { dimensions: 2 }))
    await Effect.runPromise(insert(node, "first", "warm"))
    hold()
    const warm = Effect.runFork(insert(node, "w", "warm"))
    await Effect.runPromise(insert(node, "m", "memory"))
    assert.isUndefined(warm.pollUnsafe())
    assert.isUndefined(await read(node, "w"))
    release()
    await Effect.runPromise(Fiber.join(warm))
    assert.strictEqual(await read(node, "w"), 1)
    await node.stop()
  })
})

describe.skipIf(skipRedis)("acknowledged as warm, with Redis", { timeout: 30_000 }, () => {
  let server: RedisServer
  let client: Redis
  beforeAll(async () => {
    server = await startRedis()
    client = new Redis(server.url).on("error", () => undefined)
  })
  afterAll(async () => {
    client.disconnect()
    await server.stop()
  })

  it("what was acknowledged and never came into the log is brought back by the next owner", async () => {
    const { inner, store, hold, release } = await heldStore()
    const settings = { redisUrl: server.url, redisPrefix: "owners" }
    const first = await startActors(store, settings)
    const { collection } = await Effect.runPromise(first.router.createCollection("c", { dimensions: 2 }))
    await Effect.runPromise(insert(first, "a", "cold", 1))
    hold()
    for (let n = 0; n < 20; n++) await Effect.runPromise(insert(first, `w${n % 10}`, "warm", n))
    await Effect.runPromise(insert(first, "a", "warm", 2))
    assert.strictEqual(await read(first, "a"), 2)
    // The first owner is as good as dead: its commits never come. Another process takes over.
    let second = await startActors(inner, settings)
    assert.strictEqual(await read(second, "a"), 2)
    for (let n = 0; n < 10; n++) assert.strictEqual(await read(second, `w${n}`), n + 10)
    // Brought into the log: there without Redis as well.
    const key = `owners:${collection.uid}:0:w`
    await eventually(async () => assert.strictEqual(await client.xlen(key), 0))
    await second.stop()
    second = await startActors(inner)
    assert.strictEqual(await read(second, "a"), 2)
    for (let n = 0; n < 10; n++) assert.strictEqual(await read(second, `w${n}`), n + 10)
    release()
    await first.stop()
    await second.stop()
  })

  it("what is brought back is known by its request, and not done again", async () => {
    const { inner, store, hold, release } = await heldStore()
    const settings = { redisUrl: server.url, redisPrefix: "requests" }
    const first = await startActors(store, settings)
    await Effect.runPromise(first.router.createCollection("c", { dimensions: 2 }))
    await Effect.runPromise(insert(first, "a", "cold", 1))
    hold()
    const request = { memory: requestIdOf("c", "memory"), warm: requestIdOf("c", "warm") }
    const made = (node: RunningActors, ack: "memory" | "warm", value: number) =>
      node.router.upsert("c", [{ id: ack, vector: Float32Array.of(1, value), metadata: "" }], ack, request[ack])
    await Effect.runPromise(made(first, "warm", 2))
    await Effect.runPromise(made(first, "memory", 2))
    // Known at the owner that acknowledged them, though not in the log.
    await Effect.runPromise(insert(first, "warm", "memory", 3))
    assert.strictEqual(await Effect.runPromise(made(first, "warm", 2)), 1)
    assert.strictEqual(await read(first, "warm"), 3)
    let second = await startActors(inner, settings)
    assert.strictEqual(await read(second, "warm"), 2)
    assert.isUndefined(await read(second, "memory"))
    await Effect.runPromise(insert(second, "warm", "cold", 4))
    await Effect.runPromise(made(second, "warm", 2))
    assert.strictEqual(await read(second, "warm"), 4, "brought back, so done")
    await Effect.runPromise(made(second, "memory", 2))
    assert.strictEqual(await read(second, "memory"), 2, "lost, so done now")
    await second.stop()
    second = await startActors(inner)
    await Effect.runPromise(made(second, "warm", 2))
    assert.strictEqual(await read(second, "warm"), 4)
    release()
    await first.stop()
    await second.stop()
  })

  it("Redis stops: warm writes are cold ones, without an error, and come back to be warm", async () => {
    const { store, hold, release } = await heldStore()
    const node = await startActors(store, { redisUrl: server.url, redisPrefix: "stops", redisTimeoutMillis: 200 })
    await Effect.runPromise(node.router.createCollection("c", { dimensions: 2 }))
    await Effect.runPromise(insert(node, "a", "warm", 1))
    server.suspend()
    hold()
    const waiting = Effect.runFork(insert(node, "a", "warm", 2))
    await new Promise((resolve) => setTimeout(resolve, 400))
    assert.isUndefined(waiting.pollUnsafe())
    release()
    await Effect.runPromise(Fiber.join(waiting))
    assert.strictEqual(await read(node, "a"), 2)
    for (let n = 3; n < 20; n++) await Effect.runPromise(insert(node, "a", "warm", n))
    server.resume()
    await eventually(async () => {
      hold()
      const fiber = Effect.runFork(insert(node, "b", "warm", 7))
      await new Promise((resolve) => setTimeout(resolve, 50))
      const done = fiber.pollUnsafe() !== undefined
      release()
      await Effect.runPromise(Fiber.join(fiber))
      assert.isTrue(done)
    })
    assert.strictEqual(await read(node, "a"), 19)
    await node.stop()
  })

  it("an owner's entries end with the next one's marker; damage and bounds are answers, not errors", () => {
    const segment = (id: string) =>
      encodeSegment({ epoch: 1, seq: 0, nonce: 0n, dimensions: 1 }, [
        { kind: "delete", id, version: { time: 1n, region: "local", counter: 1 } }
      ])
    const layer = AheadLog.layerWith({ prefix: "ends", bytesMax: 1_000, keepMillis: 60_000 }).pipe(
      Layer.provide(RedisConnection.layerWith({ url: server.url, timeoutMillis: 500 })),
      Layer.provide(Logger.layer([]))
    )
    return Effect.gen(function* () {
      const ahead = yield* AheadLog
      const partition = "c/aa/0"
      const old = (yield* ahead.open(partition, 1)) ?? assert.fail()
      assert.isUndefined(yield* old.append(segment("before it was recovered")))
      assert.deepStrictEqual((yield* old.recover)?.segments, [])
      const first = (yield* old.append(segment("a"))) ?? assert.fail()
      yield* old.append(segment("b"))
      yield* old.trim(first)
      const next = (yield* ahead.open(partition, 2)) ?? assert.fail()
      assert.deepStrictEqual((yield* next.recover)?.segments, [segment("b")])
      assert.isUndefined(yield* old.append(segment("c")))
      assert.isFalse(old.ready())
      assert.isUndefined(yield* old.recover)
      // What was recovered stays until it is said to be in the log.
      const third = (yield* ahead.open(partition, 3)) ?? assert.fail()
      const found = (yield* third.recover) ?? assert.fail()
      assert.deepStrictEqual(found.segments, [segment("b")])
      yield* third.trim(found.upTo)
      assert.strictEqual(yield* Effect.promise(() => client.xlen("ends:aa:0:w")), 0)
      assert.isUndefined(yield* third.append(new Uint8Array(1_001)))
    }).pipe(Effect.scoped, Effect.provide(layer), Effect.runPromise)
  })
})

const eventually = async (check: () => Promise<void>): Promise<void> => {
  for (let n = 0; ; n++) {
    try {
      return await check()
    } catch (error) {
      if (n === 100) throw error
      await new Promise((resolve) => setTimeout(resolve, 50))
    }
  }
}
