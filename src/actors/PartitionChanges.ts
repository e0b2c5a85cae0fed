/**
 * The change feed of a resident partition: every change after a position, from the buffer of the newest ones
 * (`ChangeFeed.ts`), else from the log.
 */
import { Effect, Option, Semaphore, Stream } from "effect"
import { StorageUnavailable } from "../protocol/Errors.ts"
import {
  type Change,
  type ChangePage,
  type ChangePosition,
  Compacted,
  endOfObject,
  isBefore,
  type PartitionError
} from "../protocol/IndexPartition.ts"
import { formatVersion } from "../protocol/Version.ts"
import type { ChangeFeed } from "../shards/ChangeFeed.ts"
import type { LocalChanges } from "../shards/LocalActors.ts"
import { decodeSegment, type LogOp } from "../tiers/LogSegment.ts"
import type { PartitionLogHandle } from "../tiers/PartitionLog.ts"
import type { Applied } from "../tiers/VectorIndex.ts"

export const make = (log: PartitionLogHandle, feed: ChangeFeed): LocalChanges => {
  /** The log object read last, decoded: who reads on in it, page by page, reads it once. One at a time reads. */
  let last: { readonly seq: number; readonly changes: ReadonlyArray<Change> } | undefined
  const reading = Semaphore.makeUnsafe(1)

  const objectsFrom = (seq: number) =>
    log.read(seq).pipe(
      Stream.map((entry) => {
        last = { seq: entry.seq, changes: changesOf(entry.seq, decodeSegment(entry.bytes).ops, undefined) }
        return last
      })
    )

  const read = (position: ChangePosition, limit: number): Effect.Effect<ChangePage, PartitionError | Compacted> =>
    Effect.suspend(() => {
      const buffered = feed.after(position, limit)
      if (buffered !== undefined) return Effect.succeed({ changes: buffered, newest: feed.newest })
      // What is in the log and not visible yet is not told: the buffer will have it when it is.
      const { floor } = feed
      const from = position.index === endOfObject ? position.seq + 1 : Math.max(position.seq, 1)
      const kept = last?.seq === from ? last : undefined
      const objects =
        kept === undefined ? objectsFrom(from) : Stream.concat(Stream.succeed(kept), objectsFrom(from + 1))
      return objects.pipe(
        Stream.takeWhile(({ seq }) => seq <= floor.seq),
        Stream.flatMap(({ changes }) =>
          Stream.fromIterable(changes.filter((change) => isBefore(position, change) && !isBefore(floor, change)))
        ),
        Stream.take(limit),
        Stream.runCollect,
        Effect.mapBoth({
          onSuccess: (changes): ChangePage => ({
            changes,
            newest: feed.newest,
            // Nothing of the log is left to read before where the buffer begins.
            ...(changes.length === 0 ? { skippedTo: floor } : {})
          }),
          onFailure: (error) =>
            error._tag === "Compacted"
              ? new Compacted({ oldestSeq: error.oldestSeq })
              : new StorageUnavailable({ detail: "The log cannot be read now.", retryAfterMillis: 1_000 })
        })
      )
    }).pipe(reading.withPermit)

  return {
    newest: () => feed.newest,
    after: (position, limit) => feed.after(position, limit),
    read,
    onNews: (listener) => feed.onNews(listener)
  }
}

/** What follows a position, without end. */
export const changesAfter = (
  { after, read, onNews }: LocalChanges,
  from: ChangePosition
): Stream.Stream<Change, PartitionError | Compacted> =>
  Stream.paginate(from, (position) =>
    Effect.gen(function* () {
      while (true) {
        const buffered = after(position, feedBatch)
        if (buffered === undefined) {
          const { changes, skippedTo } = yield* read(position, feedBatch)
          return [changes, Option.some(changes[changes.length - 1] ?? skippedTo ?? position)] as const
        }
        if (buffered.length > 0)
          return [buffered, Option.some(buffered[buffered.length - 1] as ChangePosition)] as const
        yield* Effect.callback<void>((resume) => {
          const stop = onNews(() => {
            stop()
            resume(Effect.void)
          })
          return Effect.sync(stop)
        })
      }
    })
  )

/** The changes of a group, without operations that had no effect where that is known. */
export const changesOf = (
  seq: number,
  ops: ReadonlyArray<LogOp>,
  applied: Applied | undefined
): ReadonlyArray<Change> => {
  const changes: Array<Change> = []
  let last = ops.length - 1
  while (last >= 0 && applied?.effects[last] === 0) last -= 1
  for (let index = 0; index <= last; index++) {
    if (applied?.effects[index] === 0) continue
    const { kind, id, version } = ops[index] as LogOp
    const change = { seq, index, kind, id, version: formatVersion(version) }
    changes.push(index === last ? { ...change, last: true } : change)
  }
  return changes
}

/** Changes read at once for one follower. */
const feedBatch = 256
