import { afterAll, assert, beforeAll, describe, it } from "@effect/vitest"
import { Context, Effect, Layer, Logger } from "effect"
import { RedisConnection } from "../../src/tiers/RedisConnection.ts"
import { SessionDirectory } from "../../src/tiers/SessionDirectory.ts"
import { type RedisServer, skipRedis, startRedis } from "../support/RedisServer.ts"

const suite = (layer: (ttlMillis: number) => Layer.Layer<SessionDirectory>) => {
  const run = (use: (directory: SessionDirectory["Service"]) => Effect.Effect<void>, ttlMillis = 60_000) =>
    Effect.runPromise(
      Effect.scoped(
        Effect.flatMap(Layer.build(layer(ttlMillis)), (context) => use(Context.get(context, SessionDirectory)))
      )
    )

  it("knows where a session is, where it has moved to, and that it is gone", () =>
    run((directory) =>
      Effect.gen(function* () {
        yield* directory.put("s1", { node: "n1", cursor: "7\nwith a newline" })
        yield* directory.put("s2", { node: "n1", cursor: "" })
        assert.deepStrictEqual(yield* directory.get("s1"), { node: "n1", cursor: "7\nwith a newline" })
        assert.deepStrictEqual(yield* directory.list("n1", 10), ["s1", "s2"])
        assert.deepStrictEqual(yield* directory.list("n1", 1), ["s1"])
        yield* directory.put("s1", { node: "n2", cursor: "9" })
        assert.deepStrictEqual(yield* directory.list("n1", 10), ["s2"])
        assert.deepStrictEqual(yield* directory.list("n2", 10), ["s1"])
        yield* directory.delete("s1")
        assert.isUndefined(yield* directory.get("s1"))
        assert.deepStrictEqual(yield* directory.list("n2", 10), [])
      })
    ))

  it("forgets a session after its time", () =>
    run(
      (directory) =>
        Effect.gen(function* () {
          yield* directory.put("s1", { node: "n1", cursor: "1" })
          yield* Effect.sleep(150)
          assert.isUndefined(yield* directory.get("s1"))
          assert.deepStrictEqual(yield* directory.list("n1", 10), [])
        }),
      60
    ))
}

describe("SessionDirectory in memory", () => {
  suite((ttlMillis) => SessionDirectory.layerMemory({ ttlMillis, sessionsMax: 100 }))

  it("is bounded", () =>
    Effect.runPromise(
      Effect.gen(function* () {
        const directory = yield* SessionDirectory
        for (let n = 0; n < 20; n++) yield* directory.put(`s${n}`, { node: "n", cursor: "" })
        assert.deepStrictEqual(yield* directory.list("n", 100), ["s15", "s16", "s17", "s18", "s19"])
      }).pipe(Effect.provide(SessionDirectory.layerMemory({ ttlMillis: 60_000, sessionsMax: 5 })))
    ))
})

describe.skipIf(skipRedis)("SessionDirectory on Redis", () => {
  let server: RedisServer
  let prefixes = 0
  beforeAll(async () => {
    server = await startRedis()
  })
  afterAll(() => server.stop())
  suite((ttlMillis) =>
    Layer.suspend(() =>
      SessionDirectory.layerRedis({ prefix: `t${++prefixes}`, ttlMillis }).pipe(
        Layer.provide(RedisConnection.layerWith({ url: server.url, timeoutMillis: 300 })),
        Layer.provide(Logger.layer([]))
      )
    )
  )
})
