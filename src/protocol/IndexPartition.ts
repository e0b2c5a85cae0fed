/**
 * Messages of the `IndexPartition` entity: one slice of a collection. Its id is `<collection name>/<uid>/<partition>`, so
 * that a collection made anew under an old name has other partitions.
 *
 * Calls are at least once: a mutation that carries a request's id is done once, whoever delivers it again (`RequestId.ts`).
 */
import { Schema } from "effect"
import * as ClusterSchema from "effect/cluster/ClusterSchema"
import * as Entity from "effect/cluster/Entity"
import * as Rpc from "effect/rpc/Rpc"
import { Collection } from "./Collection.ts"
import {
  CollectionNotFound,
  InvalidInput,
  Overloaded,
  PartitionCorrupt,
  PartitionUnavailable,
  StorageUnavailable,
  VectorNotFound
} from "./Errors.ts"
import { Ack, Float32FromBytes, VectorFromBytes } from "./Fields.ts"
import { RequestId } from "./RequestId.ts"
import { PartitionWatch, WatchChange } from "./StandingQuery.ts"
import { VersionText } from "./Version.ts"

export interface PartitionAddress {
  readonly collection: string
  readonly uid: string
  readonly partition: number
}

export const partitionId = (address: PartitionAddress): string =>
  `${address.collection}/${address.uid}/${address.partition}`

export const partitionAddressOf = (entityId: string): PartitionAddress => {
  const [collection, uid, partition] = entityId.split("/") as [string, string, string]
  return { collection, uid, partition: Number(partition) }
}

/** What a partition answers when it cannot do what it is asked, whatever it is. */
export const PartitionError = Schema.Union([
  InvalidInput,
  CollectionNotFound,
  Overloaded,
  StorageUnavailable,
  PartitionUnavailable,
  PartitionCorrupt
])
export type PartitionError = typeof PartitionError.Type

/** One record to be written. `metadata` is JSON text of an object, empty for none. */
export const UpsertRecord = Schema.Struct({ id: Schema.String, vector: VectorFromBytes, metadata: Schema.String })
export type UpsertRecord = typeof UpsertRecord.Type

export const PartitionQuery = Schema.Struct({
  vector: VectorFromBytes,
  k: Schema.Int,
  /** 0: the collection's. */
  ef: Schema.Int,
  /** JSON text of a filter, empty for none. */
  filter: Schema.String,
  includeMetadata: Schema.Boolean,
  includeVector: Schema.Boolean
})
export type PartitionQuery = typeof PartitionQuery.Type

/** Nearest first. */
export const PartitionHits = Schema.Struct({
  ids: Schema.Array(Schema.String),
  scores: Float32FromBytes,
  /** JSON texts beside the ids, where asked for. */
  metadata: Schema.optionalKey(Schema.Array(Schema.String)),
  /** `ids.length * dimensions` components, where asked for. */
  vectors: Schema.optionalKey(Float32FromBytes)
})
export type PartitionHits = typeof PartitionHits.Type

export const PartitionRecord = Schema.Struct({
  id: Schema.String,
  vector: Float32FromBytes,
  metadata: Schema.String,
  version: VersionText
})
export type PartitionRecord = typeof PartitionRecord.Type

export const PartitionStats = Schema.Struct({
  count: Schema.Int,
  tombstones: Schema.Int,
  bytes: Schema.Int,
  /** How it is resident: all in memory, or quantised with the rest in a file. */
  form: Schema.Literals(["full", "mapped"]),
  epoch: Schema.Int,
  last_seq: Schema.Int,
  snapshot_seq: Schema.Int,
  /** Log objects that were cut off as damaged at activation, and snapshots passed over. */
  log_objects_cut: Schema.Int,
  snapshots_refused: Schema.Int
})
export type PartitionStats = typeof PartitionStats.Type

/** One change of one record, in log order. */
export const Change = Schema.Struct({
  /** Position of the change: log object, and operation within it. */
  seq: Schema.Int,
  index: Schema.Int,
  kind: Schema.Literals(["upsert", "metadata", "delete"]),
  id: Schema.String,
  version: VersionText,
  /** The log object has no more: who has had it has had all of that. */
  last: Schema.optionalKey(Schema.Literal(true))
})
export type Change = typeof Change.Type

/** Before the first change of a log object: index -1. After all of one: {@link endOfObject}. */
export interface ChangePosition {
  readonly seq: number
  readonly index: number
}

/** The index of a position after all changes of a log object. */
export const endOfObject: number = Number.MAX_SAFE_INTEGER

export const isBefore = (a: ChangePosition, b: ChangePosition): boolean =>
  a.seq < b.seq || (a.seq === b.seq && a.index < b.index)

const ChangePosition = Schema.Struct({ seq: Schema.Int, index: Schema.Int })

/** What follows a position, as far as it was read. */
export const ChangePage = Schema.Struct({
  changes: Schema.Array(Change),
  /** Position of the partition's last change. */
  newest: ChangePosition,
  /** Where to read on, where there was nothing in between. */
  skippedTo: Schema.optionalKey(ChangePosition)
})
export type ChangePage = typeof ChangePage.Type

/** The feed does not reach back that far: read the current state, then follow from `oldestSeq`. */
export class Compacted extends Schema.TaggedError<Compacted>()("Compacted", { oldestSeq: Schema.Int }) {}

/** The shards that partitions are in. */
export const partitionsGroup = "partitions"

const requested = { requestId: Schema.optionalKey(RequestId) }

/** What would never end by itself is ended when the partition moves: it would hold it where it is, and nobody could use it. */
export const IndexPartition = Entity.make("IndexPartition", [
  /** Makes the partition resident and waits until it is. */
  Rpc.make("Activate", { success: PartitionStats, error: PartitionError }),
  /** All or nothing, in the order given. */
  Rpc.make("Upsert", {
    payload: { records: Schema.Array(UpsertRecord), ack: Schema.optionalKey(Ack), ...requested },
    success: Schema.Struct({ inserted: Schema.Int }),
    error: PartitionError
  }),
  /** Sets the fields of `patch` (JSON text of an object); `null` removes one. */
  Rpc.make("UpdateMetadata", {
    payload: { id: Schema.String, patch: Schema.String, ...requested },
    success: Schema.Struct({ metadata: Schema.String, version: VersionText }),
    error: Schema.Union([PartitionError, VectorNotFound])
  }),
  Rpc.make("Delete", {
    payload: { ids: Schema.Array(Schema.String), ...requested },
    success: Schema.Struct({ deleted: Schema.Int }),
    error: PartitionError
  }),
  /** `null` where there is no visible record. */
  Rpc.make("Get", {
    payload: { ids: Schema.Array(Schema.String) },
    success: Schema.Array(Schema.NullOr(PartitionRecord)),
    error: PartitionError
  }),
  Rpc.make("Search", { payload: PartitionQuery.fields, success: PartitionHits, error: PartitionError }),
  Rpc.make("Stats", { success: PartitionStats, error: PartitionError }),
  /** Every change after position (seq, index), then those to come. From (0, 0): all that is retained. */
  Rpc.make("Changes", {
    payload: { seq: Schema.Int, index: Schema.Int },
    success: Change,
    error: Schema.Union([PartitionError, Compacted]),
    stream: true
  }).annotate(ClusterSchema.InterruptOnTermination, true),
  /** At most `limit` changes after a position; none where there are none yet. With a limit of 0, how far it is. */
  Rpc.make("ReadChanges", {
    payload: { seq: Schema.Int, index: Schema.Int, limit: Schema.Int },
    success: ChangePage,
    error: Schema.Union([PartitionError, Compacted])
  }),
  /**
   * The partition's share of a standing query's answer, whole, then its changes. Begins anew with the whole share whenever
   * the partition is opened again, and where the follower is too slow; so also after the stream was.
   */
  Rpc.make("Watch", {
    payload: PartitionWatch.fields,
    success: WatchChange,
    error: PartitionError,
    stream: true
  }).annotate(ClusterSchema.InterruptOnTermination, true),
  /** Ends its quarantine: it is opened when it is next asked for something. Answers whether it was in one. */
  Rpc.make("Release", { success: Schema.Boolean }),
  /** Deactivates the partition and deletes its objects. Only the Catalog asks this. */
  Rpc.make("Remove", { payload: { collection: Collection }, success: Schema.Void, error: PartitionError })
]).annotate(ClusterSchema.ShardGroup, () => partitionsGroup)
