/**
 * The public RPC group: everything the HTTP contract offers, typed, with vectors as little-endian float32 bytes. Served
 * over HTTP and WebSocket, as SchemaBinary and as NDJSON.
 */
import { Schema } from "effect"
import { Rpc, RpcGroup } from "effect/rpc"
import { CollectionInfo, CollectionRequest } from "./Collection.ts"
import { ApiError } from "./Errors.ts"
import * as Fields from "./Fields.ts"

const collection = { collection: Schema.optionalKey(Fields.CollectionName) }

const search = {
  ...collection,
  /** Float32 bytes; or name a vector of the collection by `query_vector_id`. */
  query: Schema.optionalKey(Schema.Uint8Array),
  query_vector_id: Schema.optionalKey(Fields.VectorId),
  k: Schema.optionalKey(Fields.K),
  ef: Schema.optionalKey(Fields.Ef),
  /** JSON text of a filter. */
  filter: Schema.optionalKey(Schema.String),
  include_metadata: Schema.optionalKey(Schema.Boolean),
  include_vector: Schema.optionalKey(Schema.Boolean),
  deadline_ms: Schema.optionalKey(Fields.DeadlineMillis),
}

export const RpcResult = Schema.Struct({
  vector_id: Schema.String,
  score: Schema.Number,
  /** JSON text, where asked for. */
  metadata: Schema.optionalKey(Schema.String),
  vector: Schema.optionalKey(Schema.Uint8Array),
})
export type RpcResult = typeof RpcResult.Type

export const RpcRecord = Schema.Struct({
  vector_id: Schema.String,
  vector: Schema.Uint8Array,
  metadata: Schema.String,
  version: Schema.String,
})

/** Events of a streamed search; the same as on the other wires. */
export const RpcSearchEvent = Schema.Union([
  Schema.Struct({ event: Schema.Literal("search_start"), query_id: Schema.String }),
  Schema.Struct({ event: Schema.Literal("result"), ...RpcResult.fields }),
  Schema.Struct({
    event: Schema.Literal("search_complete"),
    total_results: Schema.Int,
    partial: Schema.Boolean,
    missing_partitions: Schema.Array(Schema.Int),
  }),
])
export type RpcSearchEvent = typeof RpcSearchEvent.Type

export const RuvectorRpcs = RpcGroup.make(
  Rpc.make("CreateCollection", {
    payload: { name: Fields.CollectionName, request: CollectionRequest },
    success: Schema.Struct({ collection: CollectionInfo, created: Schema.Boolean }),
    error: ApiError,
  }),
  Rpc.make("ListCollections", { success: Schema.Array(CollectionInfo), error: ApiError }),
  Rpc.make("GetCollection", { payload: { name: Fields.CollectionName }, success: CollectionInfo, error: ApiError }),
  Rpc.make("DeleteCollection", { payload: { name: Fields.CollectionName }, success: Schema.Void, error: ApiError }),
  Rpc.make("Insert", {
    payload: {
      ...collection,
      vectors: Schema.Array(
        Schema.Struct({ id: Fields.VectorId, vector: Schema.Uint8Array, metadata: Schema.optionalKey(Schema.String) }),
      ),
      ack: Schema.optionalKey(Fields.Ack),
    },
    success: Schema.Struct({ inserted: Schema.Int }),
    error: ApiError,
  }),
  Rpc.make("Search", {
    payload: search,
    success: Schema.Struct({
      query_id: Schema.String,
      results: Schema.Array(RpcResult),
      total_results: Schema.Int,
      partial: Schema.Boolean,
      missing_partitions: Schema.Array(Schema.Int),
      took_ms: Schema.Number,
    }),
    error: ApiError,
  }),
  Rpc.make("SearchStream", { payload: search, success: RpcSearchEvent, error: ApiError, stream: true }),
  Rpc.make("Get", { payload: { ...collection, id: Fields.VectorId }, success: RpcRecord, error: ApiError }),
  Rpc.make("UpdateMetadata", {
    /** JSON text of an object: its fields are set, `null` removes one. */
    payload: { ...collection, id: Fields.VectorId, metadata: Schema.String },
    success: Schema.Struct({ vector_id: Schema.String, metadata: Schema.String, version: Schema.String }),
    error: ApiError,
  }),
  Rpc.make("Delete", {
    payload: { ...collection, ids: Schema.Array(Fields.VectorId) },
    success: Schema.Struct({ deleted: Schema.Int }),
    error: ApiError,
  }),
)
