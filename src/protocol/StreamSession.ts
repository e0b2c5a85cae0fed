/**
 * Messages of the `StreamSession` entity: a logical stream whose answers can be resumed, as those of event streams can; others
 * are the gateway's own (`gateway/Sessions.ts`). It bounds what the client has in flight, runs its searches over all partitions, and
 * keeps the newest answers for a while, so that a stream cut in the middle goes on where it was (`Resume`).
 */
import { Schema } from "effect"
import * as Entity from "effect/cluster/Entity"
import * as Rpc from "effect/rpc/Rpc"
import { ApiError } from "./Errors.ts"
import { Float32FromBytes, Metric, StoredCollectionName, VectorFromBytes } from "./Fields.ts"

/** A search with its vector in the form our own processes use. Exactly one of `vector` and `vectorId` is set. */
export const SessionQuery = Schema.Struct({
  queryId: Schema.String,
  collection: StoredCollectionName,
  vector: Schema.optionalKey(VectorFromBytes),
  vectorId: Schema.optionalKey(Schema.String),
  k: Schema.Int,
  /** 0: the collection's. */
  ef: Schema.Int,
  /** The metric the caller believes the collection has. */
  metric: Schema.optionalKey(Metric),
  /** JSON text, empty for none. */
  filter: Schema.String,
  includeMetadata: Schema.Boolean,
  includeVector: Schema.Boolean,
  /** 0: the server's. */
  deadlineMillis: Schema.Int,
  /** Of who asks; `standard` where it does not say. */
  tier: Schema.optionalKey(Schema.Literals(["premium", "standard"])),
  /** What it waits its turn with: a name of the connection it came on, or of who asks. */
  source: Schema.optionalKey(Schema.String)
})
export type SessionQuery = typeof SessionQuery.Type

/** The merged answer of all partitions, nearest first. */
export const SearchAnswer = Schema.Struct({
  queryId: Schema.String,
  ids: Schema.Array(Schema.String),
  scores: Float32FromBytes,
  /** JSON texts beside the ids, where asked for. */
  metadata: Schema.optionalKey(Schema.Array(Schema.String)),
  /** Components one after the other, where asked for. */
  vectors: Schema.optionalKey(Float32FromBytes),
  dimensions: Schema.Int,
  /** Partitions that had not answered at the deadline. */
  missing: Schema.Array(Schema.Int),
  tookMillis: Schema.Number
})
export type SearchAnswer = typeof SearchAnswer.Type

export const StreamSession = Entity.make("StreamSession", [
  Rpc.make("Search", { payload: SessionQuery.fields, success: SearchAnswer, error: ApiError }),
  /** An answer given before; `null` where it is no longer kept. */
  Rpc.make("Resume", { payload: { queryId: Schema.String }, success: Schema.NullOr(SearchAnswer), error: ApiError }),
  /** Ends the session and everything it has under way. */
  Rpc.make("Close", { success: Schema.Void })
])
