/**
 * The change feed of a resident partition: every change after a position, from the buffer of the newest ones
 * (`ChangeFeed.ts`), else from the log.
 */
import { Effect, Option, Stream } from "effect"
import { StorageUnavailable } from "../protocol/Errors.ts"
import { type Change, Compacted, type PartitionError } from "../protocol/IndexPartition.ts"
import { formatVersion } from "../protocol/Version.ts"
import { decodeSegment, type LogOp } from "../tiers/LogSegment.ts"
import type { PartitionLogHandle } from "../tiers/PartitionLog.ts"
import type { Applied } from "../tiers/VectorIndex.ts"
import type { ChangeFeed, Position } from "./ChangeFeed.ts"

/** What follows a position, without end. */
export const changesAfter = (
  log: PartitionLogHandle,
  feed: ChangeFeed,
  from: Position
): Stream.Stream<Change, PartitionError | Compacted> =>
  Stream.paginate(from, (position) =>
    Effect.gen(function* () {
      while (true) {
        // Taken before looking, so that what is published between the look and the wait is not missed.
        const news = feed.news
        const buffered = feed.after(position, feedBatch)
        if (buffered !== undefined && buffered.length > 0) {
          return [buffered, Option.some(buffered[buffered.length - 1] as Position)] as const
        }
        if (buffered === undefined) {
          const logged = yield* readChanges(log, position)
          const last = logged[logged.length - 1]
          if (last !== undefined) return [logged, Option.some(last as Position)] as const
          // Nothing of the log is left to read, and the buffer begins after it: follow the buffer.
          return [[], Option.some(feed.floor)] as const
        }
        yield* news
      }
    })
  )

/** The changes of a group, without operations that had no effect where that is known. */
export const changesOf = (
  seq: number,
  ops: ReadonlyArray<LogOp>,
  applied: Applied | undefined
): ReadonlyArray<Change> =>
  ops.flatMap(({ kind, id, version }, index) =>
    applied?.effects[index] === 0 ? [] : [{ seq, index, kind, id, version: formatVersion(version) }]
  )

const readChanges = (
  log: PartitionLogHandle,
  position: Position
): Effect.Effect<ReadonlyArray<Change>, PartitionError | Compacted> =>
  log.read(position.index === Number.MAX_SAFE_INTEGER ? position.seq + 1 : Math.max(position.seq, 1)).pipe(
    Stream.flatMap(({ seq, bytes }) => Stream.fromIterable(changesOf(seq, decodeSegment(bytes).ops, undefined))),
    Stream.filter((change) => change.seq > position.seq || change.index > position.index),
    Stream.take(feedBatch),
    Stream.runCollect,
    Effect.mapError((error) =>
      error._tag === "Compacted"
        ? new Compacted({ oldestSeq: error.oldestSeq })
        : new StorageUnavailable({ detail: "The log cannot be read now.", retryAfterMillis: 1_000 })
    )
  )

/** Changes read at once for one follower. */
const feedBatch = 256
