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

const PeerAsk = Schema.Struct({ partition: Schema.String, ...PartitionQuery.fields })
export type PeerAsk = typeof PeerAsk.Type

const PeerError = Schema.Union([PartitionError, NotHere])

/** One of both. Not a union: of two structures the binary encoding could not tell which it is. */
const PeerAnswer = Schema.Struct({ hits: Schema.optionalKey(PartitionHits), error: Schema.optionalKey(PeerError) })
export type PeerAnswer = typeof PeerAnswer.Type

export class PeerRpcs extends RpcGroup.make(
  Rpc.make("PeerSearch", { payload: PeerAsk.fields, success: PartitionHits, error: PeerError }),
  /** Several at once, answered together and in their order. */
  Rpc.make("PeerSearches", { payload: { asks: Schema.Array(PeerAsk) }, success: Schema.Array(PeerAnswer) }),
  /** Answered when a snapshot of each has what is in it, as it is about to be another's; what is not here is passed over. */
  Rpc.make("PeerHandOver", { payload: { partitions: Schema.Array(Schema.String) }, success: Schema.Void }),
  /** Answered when what can be prepared is, for the partitions that this process is to own next. */
  Rpc.make("PeerPrepare", { payload: { partitions: Schema.Array(Moving) }, success: Schema.Void })
) {}
