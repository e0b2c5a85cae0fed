/**
 * What a standing query asks of one partition, and what it is told: the partition's share of its answer, and how that
 * changes. The k nearest of the collection are among the k nearest of each of its partitions.
 */
import { Schema } from "effect"
import { VectorFromBytes } from "./Fields.ts"
import { VersionText } from "./Version.ts"

/** One record of an answer. */
export const StandingMember = Schema.Struct({
  id: Schema.String,
  version: VersionText,
  score: Schema.Number,
  /** JSON text (empty for none), where asked for. */
  metadata: Schema.optionalKey(Schema.String),
  /** As it was inserted, where asked for. */
  vector: Schema.optionalKey(VectorFromBytes)
})
export type StandingMember = typeof StandingMember.Type

export const PartitionWatch = Schema.Struct({
  vector: VectorFromBytes,
  k: Schema.Int,
  /** Left out: none. */
  minScore: Schema.optionalKey(Schema.Finite),
  /** JSON text of a filter, empty for none. */
  filter: Schema.String,
  includeMetadata: Schema.Boolean,
  includeVector: Schema.Boolean,
  /** Members that are known: those that still belong are in the answer, whatever a search finds. */
  seeds: Schema.Array(Schema.String)
})
export type PartitionWatch = typeof PartitionWatch.Type

/** One change of a partition's share, whole: what left, and what came or is another by now. */
export const WatchChange = Schema.Struct({
  /** The whole share, in place of what was known. */
  first: Schema.Boolean,
  /** The log position that the share is exact to, with this. */
  seq: Schema.Int,
  /** The share changes, and it is being looked for what takes the place of what left; nothing is exact beyond until more is said. */
  held: Schema.Boolean,
  left: Schema.Array(Schema.String),
  entered: Schema.Array(StandingMember)
})
export type WatchChange = typeof WatchChange.Type

/** The order of answers: nearer first, by id among equals. */
export const isBefore = (a: StandingMember, b: StandingMember): boolean =>
  a.score > b.score || (a.score === b.score && a.id < b.id)
