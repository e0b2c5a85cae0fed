/**
 * The REST contract as an `HttpApi`, from which the OpenAPI document is made. Request bodies are decoded by the schemas
 * named `*Request` (they turn number arrays into float32 in one pass); what stands here describes the same for people
 * and generators.
 */
import { Schema } from "effect"
import { HttpApi, HttpApiEndpoint, HttpApiGroup, HttpApiSchema, OpenApi } from "effect/http-api"
import { KeyInfo, KeyRequest, NewKeyInfo } from "./ApiKey.ts"
import { CollectionInfo, CollectionRequest, InvalidateRequest, Invalidation } from "./Collection.ts"
import { Problem } from "./Errors.ts"
import * as Fields from "./Fields.ts"
import * as Limits from "./Limits.ts"
import { FollowEvent, SubscriptionEvent } from "./Subscription.ts"
import { TierEvent, TierState } from "./TierPromoter.ts"
import { answers, ListenEvent, requests, Topic, TopicRequest } from "./Topic.ts"
import { WarmReport, WarmRequest } from "./Warming.ts"
import { DeleteRequest } from "./Writes.ts"

const collection = { collection: Schema.optionalKey(Fields.CollectionName) }
const Numbers = Schema.Array(Schema.Finite).annotate({
  description: `1 to ${Limits.dimensionsMax} numbers, kept as float32`
})
const JsonObject = Schema.Record(Schema.String, Schema.Json)

const documented = {
  insert: Schema.Struct({
    ...collection,
    vectors: Schema.Array(
      Schema.Struct({ id: Fields.VectorId, vector: Numbers, metadata: Schema.optionalKey(JsonObject) })
    ),
    ack: Schema.optionalKey(Fields.Ack)
  }).annotate({ identifier: "InsertRequest" }),
  search: Schema.Struct({
    ...collection,
    query: Schema.optionalKey(Numbers),
    query_b64: Schema.optionalKey(Schema.String.annotate({ description: "base64url of little-endian float32" })),
    query_vector_id: Schema.optionalKey(Fields.VectorId),
    k: Schema.optionalKey(Fields.K),
    ef: Schema.optionalKey(Fields.Ef),
    metric: Schema.optionalKey(Fields.Metric),
    filter: Schema.optionalKey(JsonObject),
    include: Schema.optionalKey(Fields.Include),
    deadline_ms: Schema.optionalKey(Fields.DeadlineMillis)
  }).annotate({ identifier: "SearchRequest", description: "Exactly one of query, query_b64 and query_vector_id." }),
  patch: Schema.Struct({ metadata: JsonObject }).annotate({ identifier: "PatchRequest" }),
  query: {
    ...collection,
    query_vector_id: Schema.optionalKey(Schema.String),
    query_b64: Schema.optionalKey(Schema.String),
    k: Schema.optionalKey(Schema.String),
    ef: Schema.optionalKey(Schema.String),
    metric: Schema.optionalKey(Schema.String),
    filter: Schema.optionalKey(Schema.String),
    include: Schema.optionalKey(Schema.String),
    deadline_ms: Schema.optionalKey(Schema.String)
  }
}

const SearchResult = Schema.Struct({
  vector_id: Schema.String,
  score: Schema.Number,
  metadata: Schema.optionalKey(JsonObject),
  vector: Schema.optionalKey(Numbers)
}).annotate({ identifier: "SearchResult" })

const SearchResponse = Schema.Struct({
  query_id: Schema.String,
  results: Schema.Array(SearchResult),
  total_results: Schema.Int,
  partial: Schema.Boolean,
  missing_partitions: Schema.optionalKey(Schema.Array(Schema.Int)),
  took_ms: Schema.Number
}).annotate({ identifier: "SearchResponse" })

const SearchStreamEvent = Schema.Union([
  Schema.Struct({ event: Schema.Literal("search_start"), query_id: Schema.String }),
  Schema.Struct({ event: Schema.Literal("result"), ...SearchResult.fields }),
  Schema.Struct({
    event: Schema.Literal("search_complete"),
    total_results: Schema.Int,
    partial: Schema.optionalKey(Schema.Boolean),
    missing_partitions: Schema.optionalKey(Schema.Array(Schema.Int))
  })
]).annotate({ identifier: "SearchStreamEvent" })

const problem = (status: number) => Problem.pipe(HttpApiSchema.status(status))
const badInput = [
  problem(400),
  problem(401),
  problem(403),
  problem(413),
  problem(415),
  problem(429),
  problem(503)
] as const
const notFound = [...badInput, problem(404)] as const
const searching = [...notFound, problem(504)] as const

/** The copy named by `If-None-Match` is still right. */
const notModified = HttpApiSchema.Empty(304)

const name = { name: Fields.CollectionName }
const id = { id: Schema.String }

const CollectionsGroup = HttpApiGroup.make("collections").add(
  HttpApiEndpoint.put("putCollection", "/api/v1/collections/:name", {
    params: name,
    payload: CollectionRequest,
    success: [CollectionInfo, CollectionInfo.pipe(HttpApiSchema.status(201))],
    error: [...badInput, problem(409)]
  }),
  HttpApiEndpoint.get("listCollections", "/api/v1/collections", {
    success: Schema.Struct({ collections: Schema.Array(CollectionInfo) }),
    error: badInput
  }),
  HttpApiEndpoint.get("getCollection", "/api/v1/collections/:name", {
    params: name,
    success: CollectionInfo,
    error: notFound
  }),
  HttpApiEndpoint.post("invalidate", "/api/v1/collections/:name/invalidate", {
    params: name,
    payload: InvalidateRequest,
    success: Invalidation,
    error: notFound
  }),
  HttpApiEndpoint.delete("deleteCollection", "/api/v1/collections/:name", {
    params: name,
    success: HttpApiSchema.NoContent,
    error: notFound
  })
)

/** A key under which a write is done once. */
const keyed = { headers: { "idempotency-key": Schema.optionalKey(Schema.String) } }

const VectorsGroup = HttpApiGroup.make("vectors").add(
  HttpApiEndpoint.post("insert", "/api/v1/insert", {
    ...keyed,
    payload: documented.insert,
    success: Schema.Struct({ inserted: Schema.Int }),
    error: notFound
  }),
  HttpApiEndpoint.get("embed", "/api/v1/embed/:id", {
    params: id,
    query: collection,
    success: [
      Schema.Struct({
        vector_id: Schema.String,
        vector: Numbers,
        metadata: JsonObject,
        version: Schema.String
      }).annotate({ identifier: "StoredVector" }),
      notModified
    ],
    error: notFound
  }),
  HttpApiEndpoint.patch("updateMetadata", "/api/v1/vectors/:id", {
    ...keyed,
    params: id,
    query: collection,
    payload: documented.patch,
    success: Schema.Struct({ vector_id: Schema.String, metadata: JsonObject, version: Schema.String }),
    error: notFound
  }),
  HttpApiEndpoint.delete("deleteVector", "/api/v1/vectors/:id", {
    ...keyed,
    params: id,
    query: collection,
    success: HttpApiSchema.NoContent,
    error: notFound
  }),
  HttpApiEndpoint.post("deleteVectors", "/api/v1/delete", {
    ...keyed,
    payload: DeleteRequest,
    success: Schema.Struct({ deleted: Schema.Int }),
    error: notFound
  })
)

const SearchGroup = HttpApiGroup.make("search").add(
  HttpApiEndpoint.post("search", "/api/v1/search", {
    payload: documented.search,
    success: SearchResponse,
    error: searching
  })
)

const CachedSearchGroup = HttpApiGroup.make("cached search").add(
  HttpApiEndpoint.get("searchById", "/api/v1/search", {
    query: documented.query,
    success: [SearchResponse, notModified],
    error: searching
  })
)

const TiersGroup = HttpApiGroup.make("tiers").add(
  HttpApiEndpoint.post("warm", "/api/v1/warm", {
    payload: WarmRequest,
    success: WarmReport,
    error: notFound
  }),
  HttpApiEndpoint.get("tiers", "/api/v1/tiers", { success: TierState, error: badInput }),
  HttpApiEndpoint.get("tierEvents", "/api/v1/tiers/events", {
    query: { after: Schema.optionalKey(Schema.String) },
    // Server-Sent Events, each with one of these as its data.
    success: TierEvent,
    error: badInput
  })
)

const ofStream = { collection: Schema.optionalKey(Schema.String), policy: Schema.optionalKey(Schema.String) }
const lastEventId = { headers: { "last-event-id": Schema.optionalKey(Schema.String) } }

/** Server-Sent Events, each with one of these as its data. */
const StreamsGroup = HttpApiGroup.make("streams").add(
  HttpApiEndpoint.get("streamSearch", "/api/v1/stream/search", {
    query: { ...documented.query, keep_open: Schema.optionalKey(Schema.String) },
    ...lastEventId,
    success: SearchStreamEvent,
    error: searching
  }).annotate(OpenApi.Description, "A search as Server-Sent Events. `Last-Event-ID` goes on after an event."),
  HttpApiEndpoint.get("streamSubscribe", "/api/v1/stream/subscribe", {
    query: {
      ...ofStream,
      query_vector_id: Schema.optionalKey(Schema.String),
      query_b64: Schema.optionalKey(Schema.String),
      k: Schema.optionalKey(Schema.String),
      min_score: Schema.optionalKey(Schema.String),
      filter: Schema.optionalKey(Schema.String),
      include: Schema.optionalKey(Schema.String),
      cursor: Schema.optionalKey(Schema.String)
    },
    ...lastEventId,
    success: SubscriptionEvent,
    error: notFound
  }).annotate(
    OpenApi.Description,
    "A standing query as Server-Sent Events: its answer, then what changes in it. An event's id is its cursor; `Last-Event-ID`, or `cursor`, goes on after it."
  ),
  HttpApiEndpoint.get("streamChanges", "/api/v1/stream/changes", {
    query: { ...ofStream, from: Schema.optionalKey(Schema.String), cursor: Schema.optionalKey(Schema.String) },
    ...lastEventId,
    success: FollowEvent,
    error: notFound
  }).annotate(
    OpenApi.Description,
    "Every change of a collection as Server-Sent Events, in log order per partition. An event's id is its cursor; `Last-Event-ID`, or `cursor`, goes on after it."
  ),
  HttpApiEndpoint.get("streamTopic", "/api/v1/stream/topic", {
    query: {
      topic: Schema.String,
      from: Schema.optionalKey(Schema.String),
      subscriber: Schema.optionalKey(Schema.String),
      policy: Schema.optionalKey(Schema.String),
      cursor: Schema.optionalKey(Schema.String)
    },
    ...lastEventId,
    success: ListenEvent,
    error: notFound
  }).annotate(
    OpenApi.Description,
    "A topic's messages as Server-Sent Events, in order for each key. An event's id is its cursor; `Last-Event-ID`, or `cursor`, goes on after it; `subscriber` after what that one has acknowledged."
  )
)

const topic = { topic: Fields.CollectionName }
/** A body: what is asked, without the topic, which is in the path. Only for the document: handlers decode it whole. */
const bodyOf = ({ fields }: { readonly fields: Schema.Struct.Fields }): Schema.Codec<object> => {
  const { topic: _, ...rest } = fields
  return Schema.Struct(rest) as unknown as Schema.Codec<object>
}
const onTopic = <Name extends string, const Operation extends keyof typeof requests>(
  name: Name,
  operation: Operation
) =>
  HttpApiEndpoint.post(name, `/api/v1/topics/:topic/${operation}`, {
    params: topic,
    payload: bodyOf(requests[operation]),
    success: answers[operation],
    error: [...notFound, problem(409)]
  })

/** Operations of `POST /topics/{topic}/...`. */
export const postedTopicOperations = [
  "publish",
  "acknowledge",
  "forget",
  "enqueue",
  "take",
  "extend",
  "complete",
  "fail",
  "redrive",
  "cancel"
] as const

const TopicsGroup = HttpApiGroup.make("topics").add(
  HttpApiEndpoint.put("putTopic", "/api/v1/topics/:topic", {
    params: topic,
    payload: TopicRequest,
    success: [Topic, Topic.pipe(HttpApiSchema.status(201))],
    error: [...badInput, problem(409)]
  }),
  HttpApiEndpoint.get("listTopics", "/api/v1/topics", { success: answers.list, error: badInput }),
  HttpApiEndpoint.get("getTopic", "/api/v1/topics/:topic", {
    params: topic,
    success: answers.describe,
    error: notFound
  }),
  HttpApiEndpoint.delete("deleteTopic", "/api/v1/topics/:topic", {
    params: topic,
    success: HttpApiSchema.NoContent,
    error: notFound
  }),
  HttpApiEndpoint.get("listTasks", "/api/v1/topics/:topic/tasks", {
    params: topic,
    query: {
      state: Schema.optionalKey(Schema.String),
      after: Schema.optionalKey(Schema.String),
      limit: Schema.optionalKey(Schema.String)
    },
    success: answers.tasks,
    error: notFound
  }),
  HttpApiEndpoint.get("getTask", "/api/v1/topics/:topic/tasks/:id", {
    params: { ...topic, id: Schema.String },
    success: answers.task,
    error: notFound
  }),
  onTopic("publish", "publish"),
  onTopic("acknowledge", "acknowledge"),
  onTopic("forget", "forget"),
  onTopic("enqueue", "enqueue"),
  onTopic("take", "take"),
  onTopic("extend", "extend"),
  onTopic("complete", "complete"),
  onTopic("fail", "fail"),
  onTopic("redrive", "redrive"),
  onTopic("cancel", "cancel")
)

const KeysGroup = HttpApiGroup.make("keys").add(
  HttpApiEndpoint.post("createKey", "/api/v1/keys", {
    payload: KeyRequest,
    success: NewKeyInfo.pipe(HttpApiSchema.status(201)),
    error: badInput
  }),
  HttpApiEndpoint.get("listKeys", "/api/v1/keys", {
    success: Schema.Struct({ keys: Schema.Array(KeyInfo) }),
    error: badInput
  }),
  HttpApiEndpoint.delete("revokeKey", "/api/v1/keys/:id", {
    params: id,
    success: HttpApiSchema.NoContent,
    error: notFound
  })
)

/** The calls that the router serves: all but streams and `POST /search`, which the gateway answers before it. */
export const RoutedApi = HttpApi.make("ruvector")
  .add(CollectionsGroup)
  .add(VectorsGroup)
  .add(CachedSearchGroup)
  .add(TiersGroup)
  .add(TopicsGroup)
  .add(KeysGroup)

/** The REST contract. `/api/v1/ws` is described in its text and in `docs/protocol.md`. */
export const RuvectorApi = RoutedApi.add(SearchGroup)
  .add(StreamsGroup)
  .annotateMerge(
    OpenApi.annotations({
      title: "ruvector-streaming",
      version: "1",
      description:
        "Vectors in, searches streamed out. Beside these calls: " +
        "`GET /api/v1/ws` (WebSocket), `/api/v1/rpc` (Effect RPC). Errors are problem details (RFC 9457)."
    })
  )
