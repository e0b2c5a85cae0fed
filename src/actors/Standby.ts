/**
 * Partitions that are open without being owned, for as long as it takes until they are: a runner that is about to take over opens
 * their snapshots while the one before still serves.
 */
import { Effect, Exit, Scope } from "effect"
import type { PartitionIndex } from "../tiers/VectorIndex.ts"

export interface Standby {
  /** Opens a form, and keeps it for a while in place of an earlier one of the partition. */
  readonly put: <E>(
    partition: string,
    seq: number,
    open: Effect.Effect<PartitionIndex, E, Scope.Scope>
  ) => Effect.Effect<void, E>
  readonly has: (partition: string) => boolean
  /** What there is of the partition; whoever takes it closes it. */
  readonly take: (partition: string) => Prepared | undefined
}

/** A form with everything up to a log position. */
export interface Prepared {
  readonly form: PartitionIndex
  readonly seq: number
  readonly scope: Scope.Closeable
}

/** They close with the scope that this is made in. */
export const make = Effect.fnUntraced(function* (standbyMillis: number) {
  const scope = yield* Effect.scope
  const all = new Map<string, Prepared & { readonly timer: ReturnType<typeof setTimeout> }>()
  const runFork = Effect.runForkWith(yield* Effect.context<never>())
  const take = (partition: string): Prepared | undefined => {
    const found = all.get(partition)
    if (found === undefined) return undefined
    clearTimeout(found.timer)
    all.delete(partition)
    return found
  }
  const drop = (partition: string) => {
    const found = take(partition)
    return found === undefined ? Effect.void : Scope.close(found.scope, Exit.void)
  }
  yield* Effect.addFinalizer(() =>
    Effect.sync(() => {
      for (const { timer } of all.values()) clearTimeout(timer)
      all.clear()
    })
  )
  const standby: Standby = {
    has: (partition) => all.has(partition),
    take,
    put: (partition, seq, open) =>
      Effect.gen(function* () {
        yield* drop(partition)
        const own = yield* Scope.fork(scope)
        const form = yield* Scope.provide(open, own).pipe(
          Effect.onError((cause) => Scope.close(own, Exit.failCause(cause)))
        )
        // Of two that open it at once, one is enough.
        yield* drop(partition)
        const timer = setTimeout(() => runFork(drop(partition)), standbyMillis)
        timer.unref()
        all.set(partition, { form, seq, scope: own, timer })
      })
  }
  return standby
})
