// @ts-nocheck: typed by packages of this folder, which a check of the project may not find installed.
/**
 * A client of the Effect 3 package `@effect/rpc`, as one writes it: the calls as schemas of Effect 3, over NDJSON. Makes
 * every call over HTTP and over WebSocket, and prints what came as one JSON text.
 *
 *   node client.mjs http://127.0.0.1:8080 [causes]     `causes`: JSON of encoded causes to read, or nothing
 */
import { FetchHttpClient } from "@effect/platform"
import * as Socket from "@effect/platform/Socket"
import { Rpc, RpcClient, RpcGroup, RpcSerialization } from "@effect/rpc"
import { Cause, Chunk, Effect, Exit, Fiber, HashSet, Layer, Option, Schema, Stream } from "effect"

class InvalidInput extends Schema.TaggedError()("InvalidInput", {
  field: Schema.String,
  expected: Schema.String,
  got: Schema.String
}) {}
class CollectionNotFound extends Schema.TaggedError()("CollectionNotFound", { collection: Schema.String }) {}
class VectorNotFound extends Schema.TaggedError()("VectorNotFound", { collection: Schema.String, id: Schema.String }) {}
class CollectionConflict extends Schema.TaggedError()("CollectionConflict", {
  collection: Schema.String,
  field: Schema.String,
  expected: Schema.String,
  got: Schema.String
}) {}
class InternalError extends Schema.TaggedError()("InternalError", { requestId: Schema.String }) {}

const ApiError = Schema.Union(InvalidInput, CollectionNotFound, VectorNotFound, CollectionConflict, InternalError)

/** Little-endian float32 bytes. */
const Vector = Schema.transform(Schema.Uint8ArrayFromBase64, Schema.instanceOf(Float32Array), {
  decode: (bytes) => new Float32Array(Uint8Array.from(bytes).buffer),
  encode: (vector) => new Uint8Array(vector.buffer, vector.byteOffset, vector.byteLength)
})

const Collection = Schema.Struct({
  name: Schema.String,
  dimensions: Schema.Int,
  metric: Schema.Literal("cosine", "l2", "ip"),
  partitions: Schema.Int,
  count: Schema.optional(Schema.Int)
})

const collection = { collection: Schema.optional(Schema.String) }

const search = {
  ...collection,
  query: Schema.optional(Vector),
  query_vector_id: Schema.optional(Schema.String),
  k: Schema.optional(Schema.Number),
  filter: Schema.optional(Schema.String),
  include_metadata: Schema.optional(Schema.Boolean),
  include_vector: Schema.optional(Schema.Boolean)
}

const result = {
  vector_id: Schema.String,
  score: Schema.Number,
  metadata: Schema.optional(Schema.String),
  vector: Schema.optional(Vector)
}

const completion = {
  total_results: Schema.Int,
  partial: Schema.Boolean,
  missing_partitions: Schema.Array(Schema.Int)
}

const SearchEvent = Schema.Union(
  Schema.Struct({ event: Schema.Literal("search_start"), query_id: Schema.String }),
  Schema.Struct({ event: Schema.Literal("result"), ...result }),
  Schema.Struct({ event: Schema.Literal("search_complete"), ...completion })
)

const Rpcs = RpcGroup.make(
  Rpc.make("CreateCollection", {
    payload: { name: Schema.String, dimensions: Schema.Number, metric: Schema.optional(Schema.String) },
    success: Schema.Struct({ collection: Collection, created: Schema.Boolean }),
    error: ApiError
  }),
  Rpc.make("ListCollections", { success: Schema.Array(Collection), error: ApiError }),
  Rpc.make("GetCollection", { payload: { name: Schema.String }, success: Collection, error: ApiError }),
  Rpc.make("DeleteCollection", { payload: { name: Schema.String }, success: Schema.Void, error: ApiError }),
  Rpc.make("Insert", {
    payload: {
      ...collection,
      vectors: Schema.Array(
        Schema.Struct({ id: Schema.String, vector: Vector, metadata: Schema.optional(Schema.String) })
      )
    },
    success: Schema.Struct({ inserted: Schema.Int }),
    error: ApiError
  }),
  Rpc.make("Search", {
    payload: search,
    success: Schema.Struct({
      query_id: Schema.String,
      results: Schema.Array(Schema.Struct(result)),
      ...completion,
      took_ms: Schema.Number
    }),
    error: ApiError
  }),
  Rpc.make("SearchStream", { payload: search, success: SearchEvent, error: ApiError, stream: true }),
  Rpc.make("Get", {
    payload: { ...collection, id: Schema.String },
    success: Schema.Struct({
      vector_id: Schema.String,
      vector: Vector,
      metadata: Schema.String,
      version: Schema.String
    }),
    error: ApiError
  }),
  Rpc.make("UpdateMetadata", {
    payload: { ...collection, id: Schema.String, metadata: Schema.String },
    success: Schema.Struct({ vector_id: Schema.String, metadata: Schema.String, version: Schema.String }),
    error: ApiError
  }),
  Rpc.make("Delete", {
    payload: { ...collection, ids: Schema.Array(Schema.String) },
    success: Schema.Struct({ deleted: Schema.Int }),
    error: ApiError
  }),
  // The server has no such call.
  Rpc.make("NoSuchCall", { success: Schema.Void, error: ApiError })
)

const floats = (...components) => Float32Array.from(components)

/** What a call came to, so that kinds of failure can be told apart in JSON. */
const outcome = (effect) => Effect.map(Effect.exit(Effect.timeout(effect, "10 seconds")), outcomeOf)

const outcomeOf = Exit.match({
  onSuccess: (value) => ({ success: value === undefined ? "void" : value }),
  onFailure: (cause) => causeOf(cause)
})

const causeOf = (cause) => ({
  failures: Chunk.toArray(Cause.failures(cause)),
  defects: Chunk.toArray(Cause.defects(cause)).map((defect) => defect?.message ?? defect),
  interruptors: HashSet.size(Cause.interruptors(cause)),
  interrupted: Cause.isInterrupted(cause)
})

const collected = (stream) => Effect.map(Stream.runCollect(stream), Chunk.toArray)

const everyCall = Effect.gen(function* () {
  const client = yield* RpcClient.make(Rpcs)
  const words = { collection: "words" }
  const vectors = [
    { id: "a", vector: floats(1, 0), metadata: '{"n":1}' },
    { id: "ü\u{1f600}", vector: floats(0.5, 0.5) }
  ]
  const results = {
    create: yield* outcome(client.CreateCollection({ name: "words", dimensions: 2, metric: "ip" })),
    conflict: yield* outcome(client.CreateCollection({ name: "words", dimensions: 3 })),
    insert: yield* outcome(client.Insert({ ...words, vectors })),
    list: yield* outcome(client.ListCollections()),
    collection: yield* outcome(client.GetCollection({ name: "words" })),
    search: yield* outcome(client.Search({ ...words, query: floats(1, 0), include_metadata: true })),
    stream: yield* outcome(collected(client.SearchStream({ ...words, query_vector_id: "a", include_vector: true }))),
    get: yield* outcome(client.Get({ ...words, id: "ü\u{1f600}" })),
    update: yield* outcome(client.UpdateMetadata({ ...words, id: "a", metadata: '{"m":"ü"}' })),
    delete: yield* outcome(client.Delete({ ...words, ids: ["a", "b"] })),
    vectorNotFound: yield* outcome(client.Get({ ...words, id: "a" })),
    collectionNotFound: yield* outcome(client.Search({ collection: "none", query: floats(1) })),
    streamNotFound: yield* outcome(collected(client.SearchStream({ collection: "none", query: floats(1) }))),
    badK: yield* outcome(client.Search({ query: floats(1), k: 0 })),
    badVector: yield* outcome(client.Insert({ vectors: [vectors[0], { id: "b", vector: floats(Number.NaN) }] })),
    badFilter: yield* outcome(collected(client.SearchStream({ query: floats(1), filter: '{"a":{"near":1}}' }))),
    internal: yield* outcome(client.Search({ collection: "broken", query_vector_id: "a" })),
    noSuchCall: yield* outcome(client.NoSuchCall()),
    large: yield* outcome(
      Effect.map(
        collected(client.SearchStream({ collection: "bulky", query_vector_id: "a", include_metadata: true })),
        (events) => events.map((event) => [event.event, event.metadata?.length ?? 0])
      )
    ),
    interrupted: yield* Effect.gen(function* () {
      const call = yield* Effect.fork(collected(client.SearchStream({ collection: "endless", query_vector_id: "a" })))
      yield* Effect.sleep(200)
      return outcomeOf(yield* Fiber.interrupt(call))
    }),
    many: yield* outcome(
      Effect.map(
        Effect.forEach(
          Array.from({ length: 100 }, (_, i) => i),
          (i) =>
            i % 2 === 0
              ? Effect.as(client.Get({ ...words, id: "ü\u{1f600}" }), i)
              : Effect.as(collected(client.SearchStream({ ...words, query: floats(1, 0) })), i),
          { concurrency: "unbounded" }
        ),
        (answers) => answers.length
      )
    ),
    deleteCollection: yield* outcome(client.DeleteCollection({ name: "words" }))
  }
  return results
}).pipe(Effect.scoped)

/** A body over the server's bound, on a connection of its own: a socket would be closed by it. */
const tooLarge = Effect.gen(function* () {
  const client = yield* RpcClient.make(Rpcs)
  return yield* outcome(client.Get({ id: "x".repeat(100_000) }))
}).pipe(Effect.scoped)

const [base, causes = "[]"] = process.argv.slice(2)
const path = "/api/v1/rpc/effect3"

const http = RpcClient.layerProtocolHttp({ url: `${base}${path}` }).pipe(
  Layer.provide([FetchHttpClient.layer, RpcSerialization.layerNdjson])
)
const webSocket = RpcClient.layerProtocolSocket().pipe(
  Layer.provide([
    Layer.provide(
      Socket.layerWebSocket(`${base.replace("http", "ws")}${path}/ws`),
      Socket.layerWebSocketConstructorGlobal
    ),
    RpcSerialization.layerNdjson
  ])
)
const decodeCause = Schema.decodeUnknownSync(Schema.Cause({ error: Schema.String, defect: Schema.Defect }))

const program = Effect.gen(function* () {
  return {
    http: yield* Effect.provide(everyCall, http),
    webSocket: yield* Effect.provide(everyCall, webSocket),
    tooLarge: yield* Effect.provide(tooLarge, http),
    causes: JSON.parse(causes).map((cause) => causeOf(decodeCause(cause)))
  }
})

const printable = (_, value) =>
  value instanceof Float32Array ? Array.from(value) : Option.isOption(value) ? Option.getOrNull(value) : value

process.stdout.write(`${JSON.stringify(await Effect.runPromise(program), printable)}\n`)
process.exit(0)
