/**
 * The stream of a partition's share of a standing query, for those who are not in its process. What a slow reader has not
 * taken is folded into one change, so nothing is queued for it.
 *
 * A partition that is let go to make room does not change while it sleeps: the stream waits until somebody else, a writer
 * mostly, makes it resident again, and goes on with the whole share.
 */
import { Deferred, Effect, Stream } from "effect"
import { CollectionNotFound } from "../protocol/Errors.ts"
import { type PartitionError, partitionAddressOf } from "../protocol/IndexPartition.ts"
import type { PartitionWatch, WatchChange } from "../protocol/StandingQuery.ts"
import type { LocalActors, LocalPartition, WatchHandle, WatchListener } from "../shards/LocalActors.ts"
import { StandingShare } from "../shards/StandingShare.ts"

/** `wake` makes the partition resident, also where it only seems to be. */
export const watchStream = (
  local: LocalActors["Service"],
  entityId: string,
  query: PartitionWatch,
  wake: Effect.Effect<unknown, PartitionError>
): Stream.Stream<WatchChange, PartitionError> =>
  Stream.unwrap(
    Effect.gen(function* () {
      const run = Effect.runForkWith(yield* Effect.context<never>())
      const share = new StandingShare()
      let pending: WatchChange | undefined
      let failure: PartitionError | undefined
      let news = Deferred.makeUnsafe<void>()
      let handle: WatchHandle | undefined
      let closed = false

      const tell = () => Deferred.doneUnsafe(news, Effect.void)
      const fail = (error: PartitionError) => {
        failure = error
        tell()
      }
      const listener: WatchListener = {
        onChange: (change) => {
          share.apply(change)
          pending = folded(pending, change, share)
          tell()
        },
        onLost: () => {
          handle = undefined
          if (!closed && local.partitions.has(entityId))
            run(Effect.catch(wake, (error) => Effect.sync(() => fail(error))))
        }
      }
      const register = (partition: LocalPartition) =>
        Effect.tap(
          partition.watch({ ...query, seeds: [...query.seeds, ...share.members.map(({ id }) => id)] }, listener),
          (opened) =>
            Effect.sync(() => {
              if (closed) opened.close()
              else handle = opened
            })
        )
      yield* wake
      yield* Effect.acquireRelease(
        Effect.sync(() =>
          local.followPartition(entityId, {
            onResident: (partition) =>
              run(Effect.catch(register(partition), (error) => Effect.sync(() => fail(error)))),
            onRemoved: () => fail(new CollectionNotFound({ collection: partitionAddressOf(entityId).collection }))
          })
        ),
        (leave) =>
          Effect.sync(() => {
            closed = true
            leave()
            handle?.close()
          })
      )
      const partition = local.partitions.get(entityId)
      if (partition !== undefined) yield* register(partition)
      const next = Effect.gen(function* () {
        for (;;) {
          if (failure !== undefined) return yield* Effect.fail(failure)
          const change = pending
          pending = undefined
          if (change !== undefined) return change
          if (Deferred.isDoneUnsafe(news)) news = Deferred.makeUnsafe()
          yield* Deferred.await(news)
        }
      })
      return Stream.fromEffectRepeat(next)
    })
  )

/** Ids that have left and are kept for a reader that is slow; beyond, it is given the whole share. */
const leftMax = 1_024

const folded = (before: WatchChange | undefined, change: WatchChange, share: StandingShare): WatchChange => {
  if (before === undefined || change.first) return change
  const { seq, held } = change
  const left = new Set(before.left)
  const entered = new Map(before.entered.map((member) => [member.id, member]))
  for (const id of change.left) {
    left.add(id)
    entered.delete(id)
  }
  for (const member of change.entered) entered.set(member.id, member)
  if (before.first || left.size > leftMax) return { first: true, seq, held, left: [], entered: share.members }
  return { first: false, seq, held, left: [...left], entered: [...entered.values()] }
}
