/** What nodes say of themselves, and what operators are shown of a cell. */
import { Schema } from "effect"
import { StoredCollectionName } from "./Fields.ts"

/** A partition that is not opened for a while, because it kept failing. */
export const QuarantinedPartition = Schema.Struct({
  collection: Schema.String,
  partition: Schema.Int,
  /** Failures in a row, and what the last one was. */
  failures: Schema.Int,
  detail: Schema.String,
  failed_ms: Schema.Int,
  /** When it is tried again; past while it is on trial. */
  retry_ms: Schema.Int
})
export type QuarantinedPartition = typeof QuarantinedPartition.Type

/** What a node says of itself. */
export const NodeReport = Schema.Struct({
  /** Where its own port is; empty until it listens. */
  url: Schema.String,
  ready: Schema.Boolean,
  /** Shards that it owns, partitions that are resident in it, and the level at which it sheds load. */
  shards: Schema.Int,
  partitions: Schema.Int,
  load_level: Schema.Int,
  quarantined: Schema.Array(QuarantinedPartition)
})
export type NodeReport = typeof NodeReport.Type

/** A node as the others know it. */
export interface NodeState extends NodeReport {
  readonly node: string
  readonly role: string
  readonly cell: string
  /** `up`, or `silent` where it has not reported for some time. */
  readonly health: "up" | "silent"
  readonly uptime_ms: number
  readonly silent_ms: number
}

/** Body of `POST /cluster/release`: a partition to be taken out of its quarantine. */
export const ReleaseRequest = Schema.Struct({ collection: StoredCollectionName, partition: Schema.Int })
export type ReleaseRequest = typeof ReleaseRequest.Type
