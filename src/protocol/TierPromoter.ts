/**
 * Messages of the `TierPromoter` entity, one for each node. It is told what is read (`Report`), decides what is promoted and
 * demoted, and says so in events that anyone can follow.
 *
 * It acts on the caches and partitions of the process it runs in, so a node's promoter belongs on that node.
 */
import { Schema } from "effect"
import * as Entity from "effect/cluster/Entity"
import * as Rpc from "effect/rpc/Rpc"
import { ApiError } from "./Errors.ts"
import { StoredCollectionName } from "./Fields.ts"
import { WarmReport, WarmRequest } from "./Warming.ts"

/** The id of the promoter of the node that asks. */
export const localPromoterId = "local"

/** A record of a partition, given by the partition's entity id, and how often it was read. */
const AccessedRecord = Schema.Struct({ partition: Schema.String, id: Schema.String, accesses: Schema.Finite })

/** What was read much since the last report. */
export const AccessReport = Schema.Struct({
  hot: Schema.Array(AccessedRecord),
  trending: Schema.Array(Schema.Struct({ ...AccessedRecord.fields, ratio: Schema.Finite, score: Schema.Finite }))
})
export type AccessReport = typeof AccessReport.Type

const at = {
  /** Position: one more with each event of this promoter, from 1 when it starts. */
  seq: Schema.Int,
  at_ms: Schema.Int
}
const ofPartition = { collection: Schema.String, partition: Schema.Int }
const Form = Schema.Literals(["mapped", "full"])
const move = { ...ofPartition, from: Form, to: Form, heat: Schema.Finite }

export const TierEvent = Schema.Union([
  /** The first that a follower is given: what comes now follows `seq`. */
  Schema.Struct({ event: Schema.Literal("following"), ...at }),
  /** The full form serves. `hot`: it fits; `hotter`: it took the place of colder ones. */
  Schema.Struct({
    event: Schema.Literal("partition_promoted"),
    ...at,
    ...move,
    reason: Schema.Literals(["hot", "hotter"])
  }),
  /** `displaced`: by a hotter one; `over_budget`: more was resident than the budget allows. */
  Schema.Struct({
    event: Schema.Literal("partition_demoted"),
    ...at,
    ...move,
    reason: Schema.Literals(["displaced", "over_budget"])
  }),
  /** Records of one partition were put into the warm tier or the record cache. */
  Schema.Struct({
    event: Schema.Literal("records_promoted"),
    ...at,
    ...ofPartition,
    to: Schema.Literals(["warm", "hot"]),
    reason: Schema.Literals(["accessed", "trending"]),
    count: Schema.Int,
    /** At most 16 of them. */
    ids: Schema.Array(Schema.String)
  }),
  /** A record's share of the reads has risen to `ratio` times what it was. */
  Schema.Struct({
    event: Schema.Literal("trending"),
    ...at,
    ...ofPartition,
    id: Schema.String,
    accesses: Schema.Finite,
    ratio: Schema.Finite,
    score: Schema.Finite
  }),
  Schema.Struct({
    event: Schema.Literal("warming_started"),
    ...at,
    warming: Schema.Int,
    requested: Schema.Int
  }),
  Schema.Struct({
    event: Schema.Literal("warming_progress"),
    ...at,
    warming: Schema.Int,
    phase: Schema.Literals(["load", "verify"]),
    done: Schema.Int,
    requested: Schema.Int
  }),
  Schema.Struct({
    event: Schema.Literal("warming_finished"),
    ...at,
    warming: Schema.Int,
    requested: Schema.Int,
    found: Schema.Int,
    hit_rate: Schema.Finite
  }),
  /** The follower was too slow: this many events before this position are gone. */
  Schema.Struct({ event: Schema.Literal("events_missed"), ...at, count: Schema.Int })
]).annotate({ identifier: "TierEvent" })
export type TierEvent = typeof TierEvent.Type

export const TierState = Schema.Struct({
  budget_bytes: Schema.Finite,
  resident_bytes: Schema.Finite,
  partitions_total: Schema.Int,
  /** The hottest first, at most 1,000. `heat`: reads a minute, decayed. */
  partitions: Schema.Array(
    Schema.Struct({
      ...ofPartition,
      form: Form,
      bytes: Schema.Finite,
      full_bytes_estimate: Schema.Finite,
      heat: Schema.Finite,
      busy: Schema.Boolean
    })
  ),
  /** Records read most in the five minutes under way, at most 100. */
  hottest: Schema.Array(Schema.Struct({ ...ofPartition, id: Schema.String, accesses: Schema.Finite })),
  record_cache: Schema.Struct({
    bytes: Schema.Finite,
    records: Schema.Int,
    hits: Schema.Int,
    misses: Schema.Int
  }),
  warm: Schema.Struct({
    kind: Schema.Literals(["memory", "redis"]),
    level: Schema.Literals(["off", "up", "degraded"]),
    hits: Schema.Int,
    misses: Schema.Int,
    errors: Schema.Int,
    bytes: Schema.Finite
  })
}).annotate({ identifier: "TierState" })
export type TierState = typeof TierState.Type

export const TierPromoter = Entity.make("TierPromoter", [
  /** What was read; answered when the promotions of records that follow from it are made. */
  Rpc.make("Report", { payload: AccessReport.fields, success: Schema.Void }),
  Rpc.make("State", { success: TierState }),
  /** Events after a position, then those to come; without one, those to come. */
  Rpc.make("Events", {
    payload: { after: Schema.optionalKey(Schema.Int) },
    success: TierEvent,
    error: ApiError,
    stream: true
  }),
  /** Answered when all is loaded and read back. */
  Rpc.make("Warm", {
    payload: { ...WarmRequest.fields, collection: Schema.optionalKey(StoredCollectionName) },
    success: WarmReport,
    error: ApiError
  })
])
