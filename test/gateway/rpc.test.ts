import { NodeHttpClient, NodeWS } from "@effect/platform-node"
import { assert, describe, it } from "@effect/vitest"
import { Cause, Context, Effect, Exit, Fiber, Layer, Schedule, type Scope, Stream } from "effect"
import { RpcClient, RpcSerialization } from "effect/rpc"
import { Socket } from "effect/socket"
import {
  CollectionConflict,
  CollectionNotFound,
  InternalError,
  InvalidInput,
  Overloaded,
  VectorNotFound
} from "../../src/protocol/Errors.ts"
import { type RpcSearchEvent, RuvectorRpcs } from "../../src/protocol/Rpcs.ts"
import { broken, bulky, endless, startRpcServer } from "./rpcServer.ts"

const overHttp = (port: number) =>
  RpcClient.layerProtocolHttp({ url: `http://127.0.0.1:${port}/api/v1/rpc` }).pipe(
    Layer.provide(NodeHttpClient.layerNodeHttp)
  )

const overWebSocket = (port: number, path: string) =>
  RpcClient.layerProtocolSocket().pipe(
    Layer.provide(Layer.effect(Socket.Socket, Socket.makeWebSocket(`ws://127.0.0.1:${port}${path}`))),
    Layer.provide(NodeWS.layerWebSocketConstructor)
  )

const schemaBinary = RpcSerialization.layerSchemaBinary()
const ndjson = RpcSerialization.layerNdjson

const wires = {
  "HTTP and SchemaBinary": (port: number) => overHttp(port).pipe(Layer.provide(schemaBinary)),
  "HTTP and NDJSON": (port: number) => overHttp(port).pipe(Layer.provide(ndjson)),
  "WebSocket and SchemaBinary": (port: number) =>
    overWebSocket(port, "/api/v1/rpc/ws").pipe(Layer.provide(schemaBinary)),
  "WebSocket and NDJSON": (port: number) => overWebSocket(port, "/api/v1/rpc/ws/ndjson").pipe(Layer.provide(ndjson))
}

type Wire = (typeof wires)[keyof typeof wires]

const clientOver = Effect.fnUntraced(function* (wire: Wire, port: number) {
  const context = yield* Layer.build(wire(port))
  return yield* Effect.provideContext(
    RpcClient.make(RuvectorRpcs),
    Context.merge(context, yield* Effect.context<Scope.Scope>())
  )
})

const floats = (...components: ReadonlyArray<number>) => Float32Array.from(components)

const until = (condition: () => boolean) =>
  Effect.gen(function* () {
    while (!condition()) yield* Effect.sleep(5)
  }).pipe(Effect.timeout(15_000))

const threeVectors = [
  { id: "a", vector: floats(1, 0), metadata: '{ "kind": "first",  "n": 1 }' },
  { id: "b", vector: floats(0.5, 0.5), metadata: '{"kind":"second"}' },
  { id: "ü\u{1f600}", vector: floats(0, 1) }
]

describe.each(Object.entries(wires))("%s", (_, wire) => {
  const start = Effect.fnUntraced(function* () {
    const server = yield* startRpcServer()
    return { ...server, client: yield* clientOver(wire, server.port) }
  })

  it.live("answers every call", () =>
    Effect.gen(function* () {
      const { client, seen } = yield* start()

      const created = yield* client.CreateCollection({ name: "words", dimensions: 2, metric: "ip", index: { m: 8 } })
      assert.isTrue(created.created)
      assert.deepInclude(created.collection, { name: "words", dimensions: 2, metric: "ip", partitions: 1 })
      assert.strictEqual(created.collection.index.m, 8)
      assert.isFalse((yield* client.CreateCollection({ name: "words", dimensions: 2 })).created)

      assert.deepStrictEqual(yield* client.Insert({ collection: "words", vectors: threeVectors }), { inserted: 3 })
      assert.deepStrictEqual(
        (yield* client.ListCollections()).map(({ name, count }) => [name, count]),
        [["words", undefined]]
      )
      assert.strictEqual((yield* client.GetCollection({ name: "words" })).count, 3)

      const found = yield* client.Search({ collection: "words", query: floats(1, 0), k: 2, include_metadata: true })
      assert.match(found.query_id, /^q_/)
      assert.deepStrictEqual(
        { ...found, query_id: "" },
        {
          query_id: "",
          results: [
            { vector_id: "a", score: 1, metadata: '{"kind":"first","n":1}' },
            { vector_id: "b", score: 0.5, metadata: '{"kind":"second"}' }
          ],
          total_results: 2,
          partial: false,
          missing_partitions: [],
          took_ms: 0.25
        }
      )
      const options = {
        collection: "words",
        k: 3,
        ef: 9,
        metric: "ip",
        filter: '{"kind": {"in": ["first"]}}',
        deadline_ms: 250,
        include_vector: true
      } as const
      const byId = yield* client.Search({ query_vector_id: "ü\u{1f600}", ...options })
      assert.deepStrictEqual(byId.results[0], { vector_id: "ü\u{1f600}", score: 1, vector: floats(0, 1) })
      assert.deepInclude(seen.queries.at(-1), {
        collection: "words",
        vectorId: "ü\u{1f600}",
        k: 3,
        ef: 9,
        metric: "ip",
        filter: '{"kind":{"in":["first"]}}',
        includeMetadata: false,
        includeVector: true,
        deadlineMillis: 250
      })

      const record = yield* client.Get({ collection: "words", id: "ü\u{1f600}" })
      assert.deepStrictEqual(record, { vector_id: "ü\u{1f600}", vector: floats(0, 1), metadata: "{}", version: "v2" })
      const updated = yield* client.UpdateMetadata({ collection: "words", id: "a", metadata: '{"n":null,"more":[1]}' })
      assert.deepStrictEqual(updated, { vector_id: "a", metadata: '{"kind":"first","more":[1]}', version: "v3" })
      assert.deepStrictEqual(yield* client.Delete({ collection: "words", ids: ["a", "none"] }), { deleted: 1 })

      assert.deepStrictEqual(yield* client.Insert({ vectors: [{ id: "x", vector: floats(1, 2, 3) }] }), { inserted: 1 })
      assert.strictEqual((yield* client.Get({ id: "x" })).vector.length, 3)

      assert.isUndefined(yield* client.DeleteCollection({ name: "words" }))
      assert.deepStrictEqual(
        (yield* client.ListCollections()).map(({ name }) => name),
        ["default"]
      )
      assert.strictEqual(seen.sessionsOpened, 0)
    })
  )

  it.live("streams the events of a search, each stream in a session of its own", () =>
    Effect.gen(function* () {
      const { client, seen } = yield* start()
      yield* client.Insert({ vectors: threeVectors })
      const events = yield* Stream.runCollect(client.SearchStream({ query: floats(1, 0), k: 2, include_vector: true }))
      assert.deepStrictEqual(withoutQueryId(events), [
        { event: "search_start", query_id: "" },
        { event: "result", vector_id: "a", score: 1, vector: floats(1, 0) },
        { event: "result", vector_id: "b", score: 0.5, vector: floats(0.5, 0.5) },
        { event: "search_complete", total_results: 2, partial: false, missing_partitions: [] }
      ])
      yield* until(() => seen.sessionsOpen === 0)
      assert.strictEqual(seen.sessionsOpened, 1)
    })
  )

  it.live("brings a stream that is too large for one message whole and in order", () =>
    Effect.gen(function* () {
      const { client } = yield* start()
      const events = yield* Stream.runCollect(client.SearchStream({ collection: bulky, query_vector_id: "any" }))
      assert.deepStrictEqual(
        events.map((event) => (event.event === "result" ? event.vector_id : event.event)),
        ["search_start", ...Array.from({ length: 10 }, (_, i) => `b${i}`), "search_complete"]
      )
    })
  )

  it.live("fails with the errors of the contract", () =>
    Effect.gen(function* () {
      const { client } = yield* start()
      yield* client.CreateCollection({ name: "words", dimensions: 2 })

      const missing = new CollectionNotFound({ collection: "nothing" })
      const query = floats(1, 0)
      assert.deepStrictEqual(yield* Effect.flip(client.Search({ collection: "nothing", query })), missing)
      assert.deepStrictEqual(
        yield* Effect.flip(Stream.runDrain(client.SearchStream({ collection: "nothing", query }))),
        missing
      )
      assert.deepStrictEqual(yield* Effect.flip(client.GetCollection({ name: "nothing" })), missing)
      assert.deepStrictEqual(yield* Effect.flip(client.DeleteCollection({ name: "nothing" })), missing)
      assert.deepStrictEqual(
        yield* Effect.flip(client.Get({ collection: "words", id: "x" })),
        new VectorNotFound({ collection: "words", id: "x" })
      )
      assert.deepStrictEqual(
        yield* Effect.flip(client.CreateCollection({ name: "words", dimensions: 3 })),
        new CollectionConflict({ collection: "words", field: "dimensions", expected: "2", got: "3" })
      )
    })
  )

  it.live("refuses bad input with the field, what was expected there, and what came", () =>
    Effect.gen(function* () {
      const { client } = yield* start()
      const query = floats(1, 0)
      const vector = floats(1)
      const vectorBytes = "little-endian float32 bytes of 1 to 4096 finite numbers"
      const idText = "a string of 1 to 512 bytes of UTF-8 without control characters"
      const nested = JSON.stringify(Array.from({ length: 17 }).reduce((inner) => ({ inner }), 1))
      const refusals: ReadonlyArray<[Effect.Effect<unknown, unknown>, field: string, expected: string, got: string]> = [
        [client.Search({ query, k: 0 }), "k", "an integer from 1 to 10000", "0"],
        [client.Search({ query, k: 1.5 }), "k", "an integer from 1 to 10000", "1.5"],
        [client.Search({ query, k: 10, ef: 9 }), "ef", "at least k (10)", "9"],
        [client.Search({ query, deadline_ms: 60_001 }), "deadline_ms", "an integer from 1 to 60000", "60001"],
        [client.Search({}), "query", "exactly one of query and query_vector_id", "none"],
        [client.Search({ query, query_vector_id: "a" }), "query", "exactly one of query and query_vector_id", "2"],
        [client.Search({ query: floats() }), "query", vectorBytes, "0 bytes"],
        [client.Search({ query: floats(1, Number.NaN) }), "query", vectorBytes, "8 bytes"],
        [client.Search({ query: new Float32Array(4_097) }), "query", vectorBytes, "16388 bytes"],
        [client.Search({ query, filter: "{" }), "filter", "JSON text of a filter", "{"],
        [client.Search({ query, filter: "[]" }), "filter", "a filter object", "an array of 0"],
        [
          client.Search({ query, filter: '{"and":[{"n":{"near":1}}]}' }),
          "filter.and[0].n.near",
          "one of in, gt, gte, lt, lte, exists",
          "near"
        ],
        [Stream.runDrain(client.SearchStream({ query, k: -1 })), "k", "an integer from 1 to 10000", "-1"],
        [Stream.runDrain(client.SearchStream({})), "query", "exactly one of query and query_vector_id", "none"],
        [client.Get({ id: "" }), "id", idText, ""],
        [client.Get({ id: "a\u0000" }), "id", idText, "a\u0000"],
        [client.Insert({ vectors: [] }), "vectors", "1 to 10000 vectors", "an array of 0"],
        [
          client.Insert({
            vectors: [
              { id: "a", vector },
              { id: "b", vector: floats(Number.POSITIVE_INFINITY) }
            ]
          }),
          "vectors[1].vector",
          vectorBytes,
          "4 bytes"
        ],
        [
          client.Insert({ vectors: [{ id: "x".repeat(513), vector }] }),
          "vectors[0].id",
          idText,
          `"${"x".repeat(80)}"...`
        ],
        [
          client.Insert({ vectors: [{ id: "a", vector, metadata: "[1]" }] }),
          "vectors[0].metadata",
          "a JSON object",
          "an array of 1"
        ],
        [
          client.Insert({ vectors: [{ id: "a", vector, metadata: "nope" }] }),
          "vectors[0].metadata",
          "JSON text of an object",
          "nope"
        ],
        [client.UpdateMetadata({ id: "a", metadata: nested }), "metadata", "at most 16 levels of nesting", "an object"],
        [
          client.UpdateMetadata({ id: "a", metadata: JSON.stringify({ text: "x".repeat(65_536) }) }),
          "metadata",
          "at most 65536 bytes of JSON",
          "an object"
        ],
        [client.Delete({ ids: [] }), "ids", "1 to 10000 ids", "an array of 0"],
        [client.Delete({ ids: Array.from({ length: 10_001 }, String) }), "ids", "1 to 10000 ids", "an array of 10001"],
        [client.CreateCollection({ name: "a", dimensions: 4_097 }), "dimensions", "an integer from 1 to 4096", "4097"],
        [
          client.CreateCollection({ name: "a", dimensions: 2, index: { m: 1 } }),
          "index.m",
          "an integer from 2 to 128",
          "1"
        ],
        [
          client.GetCollection({ name: "../up" }),
          "name",
          "a name of 1 to 128 characters of A-Z a-z 0-9 _ . - beginning with a letter or digit",
          "../up"
        ]
      ]
      for (const [call, field, expected, got] of refusals) {
        assert.deepStrictEqual(yield* Effect.flip(call), new InvalidInput({ field, expected, got }))
      }
    })
  )

  it.live("answers a defect with an internal error, and goes on", () =>
    Effect.gen(function* () {
      const { client, seen, logged } = yield* start()
      const calls = [
        client.Search({ collection: broken, query_vector_id: "a" }),
        Stream.runDrain(client.SearchStream({ collection: broken, query_vector_id: "a" }))
      ]
      for (const call of calls) {
        const error = yield* Effect.flip(call)
        assert.instanceOf(error, InternalError)
        assert.match((error as InternalError).requestId, /^req_rpc/)
        const line = logged.find((entry) => entry.includes((error as InternalError).requestId))
        assert.include(line, "a defect of the router")
      }
      assert.deepStrictEqual(yield* client.ListCollections(), [])
      yield* until(() => seen.sessionsOpen === 0)
    })
  )

  it.live("carries many calls and streams at once", () =>
    Effect.gen(function* () {
      const { client, seen } = yield* start()
      const vectors = Array.from({ length: 280 }, (_, i) => ({ id: `v${i}`, vector: floats(i, 1) }))
      yield* client.Insert({ vectors })
      const results = yield* Effect.forEach(
        vectors,
        ({ id }, i) =>
          i % 8 === 0
            ? Effect.map(Stream.runCollect(client.SearchStream({ query: floats(0, i), k: 280 })), (all) => all.length)
            : Effect.map(client.Get({ id }), ({ vector }) => vector[0]),
        { concurrency: "unbounded" }
      )
      assert.deepStrictEqual(
        results,
        vectors.map((_, i) => (i % 8 === 0 ? 282 : i))
      )
      yield* until(() => seen.sessionsOpen === 0)
    })
  )

  it.live("ends what is under way when the client stops waiting for it", () =>
    Effect.gen(function* () {
      const { client, seen } = yield* start()
      const stream = yield* Effect.forkChild(
        Stream.runDrain(client.SearchStream({ collection: endless, query_vector_id: "a" }))
      )
      const call = yield* Effect.forkChild(client.Search({ collection: endless, query_vector_id: "a" }))
      yield* until(() => seen.searchesUnderWay === 2 && seen.sessionsOpen === 1)
      yield* Fiber.interrupt(stream)
      yield* until(() => seen.searchesUnderWay === 1 && seen.sessionsOpen === 0)
      yield* Fiber.interrupt(call)
      yield* until(() => seen.searchesUnderWay === 0)
      assert.strictEqual(seen.searchesInterrupted, 2)
      assert.deepStrictEqual(yield* client.ListCollections(), [])
    })
  )

  it.live("ends what is under way when the client is gone", () =>
    Effect.gen(function* () {
      const { port, seen } = yield* start()
      yield* Effect.scoped(
        Effect.gen(function* () {
          const client = yield* clientOver(wire, port)
          for (let i = 0; i < 3; i++) {
            yield* Effect.forkScoped(
              Stream.runDrain(client.SearchStream({ collection: endless, query_vector_id: "a" }))
            )
          }
          yield* until(() => seen.sessionsOpen === 3)
        })
      )
      yield* until(() => seen.searchesUnderWay === 0 && seen.sessionsOpen === 0)
    })
  )
})

describe("a connection", () => {
  it.live("carries no more streams than it may", () =>
    Effect.gen(function* () {
      const { port, seen } = yield* startRpcServer({ sessionsPerConnection: 2 })
      const client = yield* clientOver(wires["WebSocket and SchemaBinary"], port)
      const stream = Stream.runDrain(client.SearchStream({ collection: endless, query_vector_id: "a" }))
      const streams = [yield* Effect.forkChild(stream), yield* Effect.forkChild(stream)]
      yield* until(() => seen.sessionsOpen === 2)
      const refused = new Overloaded({ bound: "sessionsPerConnection", retryAfterMillis: 1_000 })
      assert.deepStrictEqual(yield* Effect.flip(stream), refused)
      const other = yield* clientOver(wires["WebSocket and SchemaBinary"], port)
      assert.deepStrictEqual(yield* other.ListCollections(), [])
      yield* Fiber.interruptAll(streams)
      yield* until(() => seen.sessionsOpen === 0)
      yield* client.Insert({ vectors: threeVectors })
      const events = yield* Stream.runCollect(client.SearchStream({ query_vector_id: "a" }))
      assert.lengthOf(events, 5)
    })
  )

  it.live("carries no more calls at once than it may, and more when those have ended", () =>
    Effect.gen(function* () {
      const { port, seen } = yield* startRpcServer({ sessionSearchesMax: 3 })
      const client = yield* clientOver(wires["WebSocket and NDJSON"], port)
      const search = client.Search({ collection: endless, query_vector_id: "a" })
      const fibers = yield* Effect.forEach([1, 2, 3], () => Effect.forkChild(search))
      yield* until(() => seen.searchesUnderWay === 3)
      const refused = new Overloaded({ bound: "sessionSearchesMax", retryAfterMillis: 100 })
      assert.deepStrictEqual(yield* Effect.flip(client.ListCollections()), refused)
      yield* Fiber.interruptAll(fibers)
      yield* until(() => seen.searchesUnderWay === 0)
      for (let i = 0; i < 10; i++) assert.deepStrictEqual(yield* client.ListCollections(), [])
    })
  )

  it.live("tells a client whose frame is too large, and takes its next connection", () =>
    Effect.gen(function* () {
      const { port } = yield* startRpcServer({ maxFrameBytes: 4_096 })
      const client = yield* clientOver(wires["WebSocket and SchemaBinary"], port)
      yield* client.Insert({ vectors: [{ id: "a", vector: floats(1, 0) }] })
      const exit = yield* Effect.exit(client.Insert({ vectors: [{ id: "a", vector: new Float32Array(2_000) }] }))
      assert.isTrue(Exit.isFailure(exit) && Cause.pretty(exit.cause).includes("RpcClientError"), String(exit))
      assert.strictEqual(
        (yield* client.Get({ id: "a" }).pipe(Effect.retry(Schedule.spaced(20)), Effect.timeout(15_000))).vector.length,
        2
      )
    })
  )
})

const withoutQueryId = (events: ReadonlyArray<RpcSearchEvent>): ReadonlyArray<RpcSearchEvent> =>
  events.map((event) => (event.event === "search_start" ? { ...event, query_id: "" } : event))
