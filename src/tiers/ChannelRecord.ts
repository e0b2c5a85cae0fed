/**
 * What a channel's log is made of, in the segments that every partition's log is made of (`LogSegment.ts`): a record is an
 * operation `metadata` whose id is the record's key, whose version's time is the record's, and whose metadata is a head (JSON of
 * one line) and, after a line feed, a body.
 */
import { decodeSegment, encodeSegment, type LogOp, opBytes } from "./LogSegment.ts"
import type { LogPosition } from "./PartitionLog.ts"

export interface ChannelRecord {
  readonly key: string
  readonly atMillis: number
  /** JSON without a line feed. */
  readonly head: string
  readonly body: string
}

export const encodeRecords = (position: LogPosition, records: ReadonlyArray<ChannelRecord>): Uint8Array =>
  encodeSegment({ ...position, dimensions: 0 }, records.map(opOf))

/** Throws `SegmentFault`. */
export const decodeRecords = (bytes: Uint8Array): ReadonlyArray<ChannelRecord> => decodeSegment(bytes).ops.map(recordOf)

/** Bytes that a record takes in a segment, nearly. */
export const recordBytes = (record: ChannelRecord): number => opBytes(opOf(record))

/** As a line of a snapshot, without its end. */
export const lineOf = ({ key, atMillis, head, body }: ChannelRecord): string =>
  `[${JSON.stringify(key)},${atMillis},${head},${JSON.stringify(body)}]`

export const recordOfLine = (line: string): ChannelRecord => {
  const [key, atMillis, head, body] = JSON.parse(line) as [string, number, unknown, string]
  return { key, atMillis, head: JSON.stringify(head), body }
}

const region = "channel"

const opOf = ({ key, atMillis, head, body }: ChannelRecord): LogOp => ({
  kind: "metadata",
  id: key,
  version: { time: BigInt(Math.trunc(atMillis)), region, counter: 0 },
  metadata: `${head}\n${body}`
})

const recordOf = (op: LogOp): ChannelRecord => {
  const text = op.kind === "delete" ? "\n" : op.metadata
  const at = text.indexOf("\n")
  return { key: op.id, atMillis: Number(op.version.time), head: text.slice(0, at), body: text.slice(at + 1) }
}
