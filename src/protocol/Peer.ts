/**
 * What processes of a cluster ask each other directly, past the actors' mailboxes: searches of partitions that are resident,
 * which is what a cluster does most, and to make ready for partitions that are about to move.
 */
import { Schema } from "effect"
import * as Rpc from "effect/rpc/Rpc"
import * as RpcGroup from "effect/rpc/RpcGroup"
import { Collection } from "./Collection.ts"
import { PartitionError, PartitionHits, PartitionQuery } from "./IndexPartition.ts"

/** The partition is not resident in the process that was asked: who asks sends the actor a message instead. */
export class NotHere extends Schema.TaggedError<NotHere>()("NotHere", {}) {}

/** A partition that is about to move. */
export const Moving = Schema.Struct({ collection: Collection, partition: Schema.Int })
export type Moving = typeof Moving.Type

export class PeerRpcs extends RpcGroup.make(
  Rpc.make("PeerSearch", {
    payload: { partition: Schema.String, ...PartitionQuery.fields },
    success: PartitionHits,
    error: Schema.Union([PartitionError, NotHere])
  }),
  /** Answered when a snapshot of each has what is in it, as it is about to be another's; what is not here is passed over. */
  Rpc.make("PeerHandOver", { payload: { partitions: Schema.Array(Schema.String) }, success: Schema.Void }),
  /** Answered when what can be prepared is, for the partitions that this process is to own next. */
  Rpc.make("PeerPrepare", { payload: { partitions: Schema.Array(Moving) }, success: Schema.Void })
) {}
