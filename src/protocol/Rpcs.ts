/**
 * The public RPC group: everything the HTTP contract offers, typed. A vector is a `Float32Array`, on the wire its
 * little-endian bytes (base64 in NDJSON). Metadata and filters are JSON texts. Served over HTTP and WebSocket, as
 * SchemaBinary and as NDJSON.
 *
 * What a value may be is checked where a request is decoded, so by the server: a client that sends one out of its bound
 * is answered with the typed `InvalidInput` that every wire gives.
 */
import { Effect, Schema, SchemaParser, SchemaTransformation } from "effect"
import { Rpc, RpcGroup } from "effect/rpc"
import { CollectionInfo } from "./Collection.ts"
import { ApiError } from "./Errors.ts"
import * as Fields from "./Fields.ts"
import { IdempotencyKey } from "./RequestId.ts"
import { Cursor, FollowFrom } from "./Subscription.ts"
import { TierEvent } from "./TierPromoter.ts"
import * as Topic from "./Topic.ts"
import { LastMinutes, TimeMillis, WarmLimit, WarmReport } from "./Warming.ts"

/** The same values unchecked for who makes a request, and checked for who is given it. */
const checkedOnArrival = <A, W extends A>(plain: Schema.Codec<A>, checked: Schema.Codec<W, A>) => {
  const check = SchemaParser.decodeEffect(checked)
  return plain.pipe(
    Schema.decodeTo(
      Schema.toType(plain),
      SchemaTransformation.transformEffect({
        decode: (value: A, options) => check(value, options),
        encode: (value: A) => Effect.succeed(value)
      })
    )
  )
}

const text = (checked: Schema.Codec<string>) => checkedOnArrival(Schema.String, checked)
const number = (checked: Schema.Codec<number>) => checkedOnArrival(Schema.Finite, checked)

const CollectionName = text(Fields.CollectionName)
const VectorId = text(Fields.VectorId)

const collection = { collection: Schema.optionalKey(CollectionName) }

/** A key under which a write is done once. */
const keyed = { idempotency_key: Schema.optionalKey(text(IdempotencyKey)) }

const search = {
  ...collection,
  /** Exactly one of `query` and `query_vector_id`, the id of a vector of the collection. */
  query: Schema.optionalKey(Fields.VectorFromBytes),
  query_vector_id: Schema.optionalKey(VectorId),
  k: Schema.optionalKey(number(Fields.K)),
  ef: Schema.optionalKey(number(Fields.Ef)),
  metric: Schema.optionalKey(Fields.Metric),
  /** JSON text of a filter. */
  filter: Schema.optionalKey(Schema.String),
  include_metadata: Schema.optionalKey(Schema.Boolean),
  include_vector: Schema.optionalKey(Schema.Boolean),
  deadline_ms: Schema.optionalKey(number(Fields.DeadlineMillis))
}

const SearchPayload = Schema.Struct(search)
/** What is searched for, and how. */
export type SearchPayload = typeof SearchPayload.Type

export const RpcResult = Schema.Struct({
  vector_id: Schema.String,
  score: Schema.Number,
  /** JSON text of an object, where asked for. */
  metadata: Schema.optionalKey(Schema.String),
  vector: Schema.optionalKey(Fields.VectorFromBytes)
})
export type RpcResult = typeof RpcResult.Type

export const RpcSearchResponse = Schema.Struct({
  query_id: Schema.String,
  results: Schema.Array(RpcResult),
  total_results: Schema.Int,
  partial: Schema.Boolean,
  missing_partitions: Schema.Array(Schema.Int),
  took_ms: Schema.Number
})
export type RpcSearchResponse = typeof RpcSearchResponse.Type

export const RpcRecord = Schema.Struct({
  vector_id: Schema.String,
  vector: Fields.VectorFromBytes,
  metadata: Schema.String,
  version: Schema.String
})
export type RpcRecord = typeof RpcRecord.Type

/** Events of a streamed search; the same as on the other wires. */
export const RpcSearchEvent = Schema.Union([
  Schema.Struct({ event: Schema.Literal("search_start"), query_id: Schema.String }),
  Schema.Struct({ event: Schema.Literal("result"), ...RpcResult.fields }),
  Schema.Struct({
    event: Schema.Literal("search_complete"),
    total_results: Schema.Int,
    partial: Schema.Boolean,
    missing_partitions: Schema.Array(Schema.Int)
  })
])
export type RpcSearchEvent = typeof RpcSearchEvent.Type

/** A record of a standing query's answer. */
export const RpcMember = Schema.Struct({ ...RpcResult.fields, version: Schema.String })
export type RpcMember = typeof RpcMember.Type

export const RpcAnswerChange = Schema.Union([
  Schema.Struct({ type: Schema.Literal("leave"), vector_id: Schema.String }),
  Schema.Struct({ type: Schema.Literals(["enter", "update"]), ...RpcMember.fields })
])
export type RpcAnswerChange = typeof RpcAnswerChange.Type

/** Events of a standing query; the same as on the other wires (`Subscription.ts`). */
export const RpcSubscriptionEvent = Schema.Union([
  Schema.Struct({ event: Schema.Literal("subscribed"), results: Schema.Array(RpcMember), cursor: Schema.String }),
  Schema.Struct({
    event: Schema.Literal("resumed"),
    keep: Schema.optionalKey(Schema.Array(Schema.String)),
    changes: Schema.Array(RpcAnswerChange),
    cursor: Schema.String
  }),
  Schema.Struct({ event: Schema.Literal("changes"), changes: Schema.Array(RpcAnswerChange), cursor: Schema.String })
])
export type RpcSubscriptionEvent = typeof RpcSubscriptionEvent.Type

/** Events of a change feed. */
export const RpcFollowEvent = Schema.Union([
  Schema.Struct({ event: Schema.Literals(["following", "resync"]), cursor: Schema.String }),
  Schema.Struct({
    event: Schema.Literal("change"),
    kind: Schema.Literals(["upsert", "metadata", "delete"]),
    vector_id: Schema.String,
    version: Schema.String,
    cursor: Schema.String
  })
])
export type RpcFollowEvent = typeof RpcFollowEvent.Type

const SubscribePayload = Schema.Struct({
  ...collection,
  /** Exactly one of `query` and `query_vector_id`, the id of a vector of the collection. */
  query: Schema.optionalKey(Fields.VectorFromBytes),
  query_vector_id: Schema.optionalKey(VectorId),
  k: Schema.optionalKey(number(Fields.StandingK)),
  min_score: Schema.optionalKey(Schema.Finite),
  /** JSON text of a filter. */
  filter: Schema.optionalKey(Schema.String),
  include_metadata: Schema.optionalKey(Schema.Boolean),
  include_vector: Schema.optionalKey(Schema.Boolean),
  /** Of the last event that was had: what followed that. The rest has to be what it was. */
  cursor: Schema.optionalKey(text(Cursor))
})
/** What is subscribed to. */
export type SubscribePayload = typeof SubscribePayload.Type

const topic = { topic: CollectionName }
const ClientId = text(Fields.ClientId)
const lease = { ...topic, task_id: ClientId, token: number(Topic.Token) }

/** A task with its lease, as `TakenTask` of the other wires. */
export const RpcTakenTask = Schema.Struct({
  task_id: Schema.String,
  token: Schema.Int,
  /** JSON text. */
  task: Schema.String,
  priority: Schema.Int,
  attempt: Schema.Int,
  lease_ms: Schema.Int,
  enqueued_ms: Schema.Int
})

export const RpcTaskInfo = Schema.Struct({
  task_id: Schema.String,
  state: Topic.TaskState,
  /** JSON text. */
  task: Schema.optionalKey(Schema.String),
  priority: Schema.Int,
  attempts: Schema.Int,
  enqueued_ms: Schema.Int,
  agent: Schema.optionalKey(Schema.String),
  error: Schema.optionalKey(Schema.String),
  /** JSON text. */
  result: Schema.optionalKey(Schema.String)
})

/** Events of a topic that is listened to. */
export const RpcListenEvent = Schema.Union([
  Schema.Struct({ event: Schema.Literals(["listening", "gap"]), cursor: Schema.String }),
  Schema.Struct({
    event: Schema.Literal("message"),
    key: Schema.String,
    message_id: Schema.String,
    /** JSON text. */
    message: Schema.String,
    at_ms: Schema.Int,
    cursor: Schema.String
  })
])
export type RpcListenEvent = typeof RpcListenEvent.Type

/** What is asked of topics. Messages, tasks and results are JSON texts. */
const topicRpcs = [
  /** What is left out takes the server's defaults. Found as it is where it is there with the same parameters. */
  Rpc.make("CreateTopic", {
    payload: {
      ...topic,
      retention_ms: Schema.optionalKey(number(Topic.RetentionMillis)),
      channels: Schema.optionalKey(number(Topic.Channels)),
      lease_ms: Schema.optionalKey(number(Topic.LeaseMillis)),
      attempts_max: Schema.optionalKey(number(Topic.AttemptsMax))
    },
    success: Schema.Struct({ ...Topic.Topic.fields, created: Schema.Boolean }),
    error: ApiError
  }),
  Rpc.make("ListTopics", { success: Topic.answers.list, error: ApiError }),
  Rpc.make("GetTopic", { payload: topic, success: Topic.answers.describe, error: ApiError }),
  Rpc.make("DeleteTopic", { payload: topic, success: Schema.Void, error: ApiError }),
  /** Acknowledged when durable. Messages of one key stay in order; one of an id that was published is not published again. */
  Rpc.make("Publish", {
    payload: {
      ...topic,
      messages: Schema.Array(
        Schema.Struct({
          key: Schema.optionalKey(ClientId),
          id: Schema.optionalKey(ClientId),
          message: Schema.String
        })
      )
    },
    success: Topic.answers.publish,
    error: ApiError
  }),
  Rpc.make("Listen", {
    payload: {
      ...topic,
      from: Schema.optionalKey(Topic.ListenFrom),
      subscriber: Schema.optionalKey(ClientId),
      cursor: Schema.optionalKey(text(Cursor))
    },
    success: RpcListenEvent,
    error: ApiError,
    stream: true
  }),
  Rpc.make("Acknowledge", {
    payload: { ...topic, subscriber: ClientId, cursor: text(Cursor) },
    success: Schema.Void,
    error: ApiError
  }),
  Rpc.make("Forget", { payload: { ...topic, subscriber: ClientId }, success: Schema.Void, error: ApiError }),
  Rpc.make("Enqueue", {
    payload: {
      ...topic,
      tasks: Schema.Array(
        Schema.Struct({
          id: Schema.optionalKey(ClientId),
          task: Schema.String,
          priority: Schema.optionalKey(number(Topic.Priority)),
          delay_ms: Schema.optionalKey(number(Topic.DelayMillis))
        })
      )
    },
    success: Topic.answers.enqueue,
    error: ApiError
  }),
  Rpc.make("Take", {
    payload: {
      ...topic,
      agent: Schema.optionalKey(ClientId),
      take_id: Schema.optionalKey(ClientId),
      max: Schema.optionalKey(number(Topic.TakeMax)),
      lease_ms: Schema.optionalKey(number(Topic.LeaseMillis)),
      wait_ms: Schema.optionalKey(number(Topic.WaitMillis))
    },
    success: Schema.Struct({ tasks: Schema.Array(RpcTakenTask) }),
    error: ApiError
  }),
  Rpc.make("Extend", {
    payload: { ...lease, lease_ms: Schema.optionalKey(number(Topic.LeaseMillis)) },
    success: Topic.answers.extend,
    error: ApiError
  }),
  Rpc.make("Complete", {
    payload: { ...lease, result: Schema.optionalKey(Schema.String) },
    success: Schema.Void,
    error: ApiError
  }),
  Rpc.make("Fail", {
    payload: {
      ...lease,
      error: Schema.optionalKey(Schema.String),
      delay_ms: Schema.optionalKey(number(Topic.DelayMillis)),
      release: Schema.optionalKey(Schema.Boolean)
    },
    success: Topic.answers.fail,
    error: ApiError
  }),
  Rpc.make("Redrive", {
    payload: { ...topic, task_ids: Schema.optionalKey(Schema.Array(ClientId)) },
    success: Topic.answers.redrive,
    error: ApiError
  }),
  Rpc.make("Cancel", {
    payload: { ...topic, task_ids: Schema.Array(ClientId) },
    success: Topic.answers.cancel,
    error: ApiError
  }),
  Rpc.make("GetTask", { payload: { ...topic, task_id: ClientId }, success: RpcTaskInfo, error: ApiError }),
  Rpc.make("ListTasks", {
    payload: {
      ...topic,
      state: Schema.optionalKey(Topic.TaskState),
      after: Schema.optionalKey(ClientId),
      limit: Schema.optionalKey(Schema.Finite)
    },
    success: Schema.Struct({ tasks: Schema.Array(RpcTaskInfo) }),
    error: ApiError
  })
] as const

export const RuvectorRpcs = RpcGroup.make(
  ...topicRpcs,
  /** What is left out takes the server's defaults. Found as it is where it is there with the same parameters. */
  Rpc.make("CreateCollection", {
    payload: {
      name: CollectionName,
      dimensions: number(Fields.Dimensions),
      metric: Schema.optionalKey(Fields.Metric),
      partitions: Schema.optionalKey(number(Fields.Partitions)),
      index: Schema.optionalKey(
        Schema.Struct({
          m: Schema.optionalKey(number(Fields.HnswM)),
          ef_construction: Schema.optionalKey(number(Fields.HnswEfConstruction)),
          ef_search: Schema.optionalKey(number(Fields.Ef)),
          quantization: Schema.optionalKey(Fields.Quantization)
        })
      )
    },
    success: Schema.Struct({ collection: CollectionInfo, created: Schema.Boolean }),
    error: ApiError
  }),
  Rpc.make("ListCollections", { success: Schema.Array(CollectionInfo), error: ApiError }),
  Rpc.make("GetCollection", { payload: { name: CollectionName }, success: CollectionInfo, error: ApiError }),
  Rpc.make("DeleteCollection", { payload: { name: CollectionName }, success: Schema.Void, error: ApiError }),
  Rpc.make("Insert", {
    payload: {
      ...collection,
      vectors: Schema.Array(
        Schema.Struct({
          id: VectorId,
          vector: Fields.VectorFromBytes,
          /** JSON text of an object. */
          metadata: Schema.optionalKey(Schema.String)
        })
      ),
      ack: Schema.optionalKey(Fields.Ack),
      ...keyed
    },
    success: Schema.Struct({ inserted: Schema.Int }),
    error: ApiError
  }),
  Rpc.make("Search", { payload: SearchPayload, success: RpcSearchResponse, error: ApiError }),
  Rpc.make("SearchStream", { payload: SearchPayload, success: RpcSearchEvent, error: ApiError, stream: true }),
  /** The answer as it is, then whatever changes in it. Ends with an error, or with the caller. */
  Rpc.make("Subscribe", { payload: SubscribePayload, success: RpcSubscriptionEvent, error: ApiError, stream: true }),
  /** Every change of a collection, in log order per partition: those to come, those after a cursor, or all that are kept. */
  Rpc.make("Changes", {
    payload: {
      ...collection,
      from: Schema.optionalKey(FollowFrom),
      cursor: Schema.optionalKey(text(Cursor))
    },
    success: RpcFollowEvent,
    error: ApiError,
    stream: true
  }),
  Rpc.make("Get", { payload: { ...collection, id: VectorId }, success: RpcRecord, error: ApiError }),
  Rpc.make("UpdateMetadata", {
    /** JSON text of an object: its fields are set, `null` removes one. */
    payload: { ...collection, id: VectorId, metadata: Schema.String, ...keyed },
    success: Schema.Struct({ vector_id: Schema.String, metadata: Schema.String, version: Schema.String }),
    error: ApiError
  }),
  Rpc.make("Delete", {
    payload: { ...collection, ids: Schema.Array(VectorId), ...keyed },
    success: Schema.Struct({ deleted: Schema.Int }),
    error: ApiError
  }),
  /** Exactly one of `ids` and `window`: either `last_minutes`, or `from_ms` and `to_ms`. Answered when read back. */
  Rpc.make("Warm", {
    payload: {
      ...collection,
      ids: Schema.optionalKey(Schema.Array(VectorId)),
      window: Schema.optionalKey(
        Schema.Struct({
          from_ms: Schema.optionalKey(number(TimeMillis)),
          to_ms: Schema.optionalKey(number(TimeMillis)),
          last_minutes: Schema.optionalKey(number(LastMinutes))
        })
      ),
      limit: Schema.optionalKey(number(WarmLimit))
    },
    success: WarmReport,
    error: ApiError
  }),
  /** What is promoted and demoted, from now on or after the position of an event. */
  Rpc.make("TierEvents", {
    payload: { after: Schema.optionalKey(number(TimeMillis)) },
    success: TierEvent,
    error: ApiError,
    stream: true
  })
)
