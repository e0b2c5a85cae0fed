/**
 * When a resident partition is snapshotted: when enough operations have gathered, when it has been quiet for a while with
 * news, and when it closes.
 */
import { mkdtemp, rm, writeFile } from "node:fs/promises"
import { join } from "node:path"
import { Effect, Exit, Metric, Option, Scope, Semaphore } from "effect"
import type { SettingValues } from "../config.ts"
import type { PartitionLogHandle } from "../tiers/PartitionLog.ts"
import { type PartitionIndex, SnapshotUnreadable } from "../tiers/VectorIndex.ts"

export interface SnapshotPolicy {
  /** Takes note of operations that have become visible. */
  readonly applied: (operations: number) => void
  /** Operations since the newest snapshot. */
  readonly pending: () => number
  /** Takes a snapshot where there is news. Answers whether the newest snapshot has all by then; failures are logged and counted. */
  readonly snapshot: Effect.Effect<boolean>
  /** Takes one for whoever opens the partition next, who waits when it closes: then none is taken but for much that is new. */
  readonly handOver: Effect.Effect<boolean>
}

/** Takes snapshots until the scope closes; then, unless it closes with an error, a last one, for which `drainMillis` are given. */
export const make = Effect.fnUntraced(function* (options: {
  readonly log: PartitionLogHandle
  readonly index: PartitionIndex
  /** Position of the last log object handed to the index. */
  readonly appliedSeq: () => number
  /** A copy of the window of requests once it has all that were handed to the index. */
  readonly requests: Effect.Effect<Uint8Array | undefined, SnapshotUnreadable>
  /** Operations replayed from the log when it was opened. */
  readonly replayed: number
  /** Where files are made. */
  readonly scratch: string
  readonly settings: SettingValues
  /** Held while the files of a snapshot are made. */
  readonly making: Semaphore.Semaphore
}) {
  const { log, index, settings, scratch } = options
  const scope = yield* Effect.scope
  const gate = yield* Semaphore.make(1)
  let pending = options.replayed
  let lastWriteAt = Date.now()
  let handedOver = false

  const take = Effect.gen(function* () {
    const seq = options.appliedSeq()
    const covered = pending
    const directory = yield* Effect.promise(() => mkdtemp(join(scratch, "snapshot-")))
    yield* Effect.gen(function* () {
      const files = yield* options.making.withPermit(index.snapshot(directory))
      // After the index: what that has, the window has too.
      const window = yield* options.requests
      const requests = window === undefined ? undefined : join(directory, "requests")
      if (window !== undefined && requests !== undefined) {
        yield* Effect.tryPromise({
          try: () => writeFile(requests, window),
          catch: (cause) => new SnapshotUnreadable({ detail: String(cause) })
        })
      }
      yield* log.commitSnapshot(seq, { ...files, requests })
    }).pipe(Effect.ensuring(Effect.promise(() => rm(directory, { recursive: true, force: true }))))
    pending -= covered
    yield* Metric.update(snapshotsTaken, 1)
  })

  const snapshot = gate.withPermit(
    Effect.suspend(() =>
      pending === 0
        ? Effect.succeed(true)
        : Effect.as(take, true).pipe(
            Effect.catch((error) =>
              Metric.update(snapshotFailures, 1).pipe(
                Effect.andThen(
                  Effect.logWarning(`Snapshot failed: ${error._tag}`, "detail" in error ? error.detail : "")
                ),
                Effect.as(false)
              )
            )
          )
    )
  )

  const isDue = Effect.gen(function* () {
    if (pending === 0) return false
    if (Date.now() - lastWriteAt >= settings.snapshotIdleMillis) return true
    if (pending < settings.snapshotOps) return false
    const { count } = yield* index.stats
    return pending >= (count * settings.snapshotSharePercent) / 100
  })

  const loop = Effect.gen(function* () {
    let failures = 0
    while (true) {
      yield* Effect.sleep(Math.min(checkMillis * 2 ** failures, retryMillisMax))
      if (!(yield* isDue)) continue
      failures = (yield* snapshot) ? 0 : Math.min(failures + 1, failuresMax)
    }
  }).pipe(Effect.ignore)
  yield* Effect.forkIn(loop, scope)

  // Closing with a snapshot makes the next opening short. Bounded: what is not snapshotted is in the log.
  yield* Scope.addFinalizerExit(scope, (exit) =>
    // A node that is told to stop closes by interruption; only what is removed closes with an error.
    Option.isSome(Exit.findErrorOption(exit)) || index.lost() || (handedOver && pending < settings.snapshotOps)
      ? Effect.void
      : Effect.asVoid(Effect.timeoutOption(snapshot, settings.drainMillis))
  )

  const policy: SnapshotPolicy = {
    applied: (operations) => {
      pending += operations
      lastWriteAt = Date.now()
    },
    pending: () => pending,
    snapshot,
    handOver: Effect.tap(snapshot, (isWhole) => Effect.sync(() => (handedOver = isWhole)))
  }
  return policy
})

/** Between two looks at whether a snapshot is due; doubled after each failure. */
const checkMillis = 500
const retryMillisMax = 60_000
const failuresMax = 8

const snapshotsTaken = Metric.counter("ruvector_snapshots_taken", { description: "Snapshots committed" })
const snapshotFailures = Metric.counter("ruvector_snapshot_failures", { description: "Snapshots that failed" })
