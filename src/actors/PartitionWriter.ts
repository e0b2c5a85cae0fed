/**
 * Group commit of one partition. Writers queue; one loop takes what has gathered, stamps versions, commits it as one log
 * object, and hands the same bytes to the index. While one group is being applied the next is being committed. A writer
 * is answered when its group is both durable and visible.
 *
 * A metadata update reads before it writes, so a group ends before a second operation on an id that an update in it reads.
 */
import { Deferred, Effect, Fiber, Option, Result, type Scope } from "effect"
import { InvalidInput, Overloaded, StorageUnavailable } from "../protocol/Errors.ts"
import { metadataBytesMax } from "../protocol/Limits.ts"
import { formatVersion, type Version, type VersionClock } from "../protocol/Version.ts"
import { decodeSegment, encodeSegment, type LogOp, opBytes } from "../tiers/LogSegment.ts"
import type { NotOwner, PartitionLogHandle } from "../tiers/PartitionLog.ts"
import type { Applied, IndexLost, PartitionIndex } from "../tiers/VectorIndex.ts"

export type Draft =
  | { readonly kind: "upsert"; readonly id: string; readonly vector: Float32Array; readonly metadata: string }
  | { readonly kind: "delete"; readonly id: string }

export interface WriterOptions {
  readonly commitBytesMax: number
  readonly writeQueueBytesMax: number
  readonly applyBacklogBytesMax: number
}

/** The partition can go on no longer: another owner, or its thread died. */
export type Fatal = NotOwner | IndexLost

export type WriteError = StorageUnavailable | Overloaded | InvalidInput | Fatal

export interface PartitionWriter {
  /** All or nothing; answers what each operation did. */
  readonly write: (drafts: ReadonlyArray<Draft>) => Effect.Effect<Applied, WriteError>
  /** Sets fields of a record's metadata (`null` removes one); `undefined` where there is no visible record. */
  readonly patch: (
    id: string,
    fields: Readonly<Record<string, unknown>>
  ) => Effect.Effect<{ readonly metadata: string; readonly version: string } | undefined, WriteError>
  /** Sequence number of the last log object handed to the index. */
  readonly appliedSeq: () => number
  /**
   * Changes with whatever a search can see, before the writer of the change is answered: the epoch and the last log object.
   * `undefined` while one is being applied, when a search sees some state in between.
   */
  readonly revision: () => string | undefined
}

interface Pending {
  readonly drafts: ReadonlyArray<Draft>
  readonly patch: { readonly id: string; readonly fields: Readonly<Record<string, unknown>> } | undefined
  readonly bytes: number
  /** The operations' effects and, of a patch, its outcome. */
  readonly done: Deferred.Deferred<Outcome, WriteError>
}

interface Outcome {
  readonly effects: Uint8Array
  readonly patched: { readonly metadata: string; readonly version: string } | undefined
}

/** Where a pending's operations are in its group; `metadata` is a patch's merged text. */
interface Span {
  readonly pending: Pending
  readonly first: number
  readonly count: number
  readonly metadata: string | undefined
}

/** After a failed commit, quiet time until it is looked what became of it. */
const settleMillis = 1_000

/** What a patch is counted as in the bounds on bytes, before it is merged. */
const patchBytes = 1_024

export const make = (options: {
  readonly log: PartitionLogHandle
  readonly index: PartitionIndex
  readonly clock: VersionClock
  readonly dimensions: number
  readonly bounds: WriterOptions
  /** Called in log order with every group that has become visible. */
  readonly onApplied: (seq: number, ops: ReadonlyArray<LogOp>, applied: Applied) => void
  /** Called once, with what ended the writer. */
  readonly onFatal: (error: Fatal) => Effect.Effect<void>
}): Effect.Effect<PartitionWriter, never, Scope.Scope> =>
  Effect.gen(function* () {
    const { log, index, clock, dimensions, bounds } = options
    const queue: Array<Pending> = []
    /** Everything whose writer waits, so that none is left waiting when the partition closes. */
    const open = new Set<Pending>()
    let queuedBytes = 0
    let backlogBytes = 0
    let appliedSeq = log.lastSeq()
    let visibleSeq = appliedSeq
    let revision = `${log.epoch}.${visibleSeq}`
    let fatal: Fatal | undefined
    let news = Deferred.makeUnsafe<void>()
    let room = Deferred.makeUnsafe<void>()
    /** A commit failed, and whether it is in the log is not known for good. */
    let inDoubt = false
    let lastApply: Fiber.Fiber<void> | undefined
    const scope = yield* Effect.scope

    const submit = (pending: Pending): Effect.Effect<Outcome, WriteError> =>
      Effect.suspend((): Effect.Effect<Outcome, WriteError> => {
        if (fatal !== undefined) return Effect.fail(fatal)
        if (queuedBytes + pending.bytes > bounds.writeQueueBytesMax && queue.length > 0) {
          return Effect.fail(new Overloaded({ bound: "writeQueueBytesMax", retryAfterMillis: 500 }))
        }
        queue.push(pending)
        open.add(pending)
        queuedBytes += pending.bytes
        Deferred.doneUnsafe(news, Effect.void)
        // A caller that goes away does not undo its write: it is in the queue, and may be in a group already.
        return Effect.ensuring(
          Deferred.await(pending.done),
          Effect.sync(() => open.delete(pending))
        )
      })

    /** The pendings of the next group. */
    const takeGroup = (): Array<Pending> => {
      const group: Array<Pending> = []
      const written = new Set<string>()
      let bytes = 0
      while (queue.length > 0) {
        const next = queue[0] as Pending
        if (group.length > 0 && bytes + next.bytes > bounds.commitBytesMax) break
        // A patch reads the state before the group, so nothing in the group may have written its id.
        if (next.patch !== undefined && written.has(next.patch.id)) break
        queue.shift()
        for (const draft of next.drafts) written.add(draft.id)
        if (next.patch !== undefined) written.add(next.patch.id)
        bytes += next.bytes
        group.push(next)
      }
      queuedBytes -= bytes
      return group
    }

    const fail = (group: Iterable<Pending>, error: WriteError) => {
      for (const pending of group) Deferred.doneUnsafe(pending.done, Effect.fail(error))
    }

    /**
     * Hands a committed group to the index, at once: the index keeps the order in which it is asked. `complete` is called in
     * log order, with what applying did or with why it did not.
     */
    const applyInOrder = Effect.fnUntraced(function* (
      seq: number,
      bytes: Uint8Array,
      ops: ReadonlyArray<LogOp>,
      complete: (outcome: Result.Result<Applied, IndexLost>) => void
    ) {
      appliedSeq = seq
      backlogBytes += bytes.length
      const previous = lastApply
      lastApply = yield* Effect.result(index.apply(bytes)).pipe(
        Effect.flatMap((outcome) =>
          Effect.flatMap(previous === undefined ? Effect.void : Fiber.await(previous), () => {
            backlogBytes -= bytes.length
            Deferred.doneUnsafe(room, Effect.void)
            if (Result.isSuccess(outcome)) {
              visibleSeq = seq
              revision = `${log.epoch}.${seq}`
              options.onApplied(seq, ops, outcome.success)
            }
            complete(outcome)
            return Result.isSuccess(outcome) ? Effect.void : stop(outcome.failure, [])
          })
        ),
        Effect.forkIn(scope, { startImmediately: true })
      )
    })

    const stop = (error: Fatal, group: ReadonlyArray<Pending>) =>
      Effect.suspend(() => {
        if (fatal === undefined) fatal = error
        fail(group, fatal)
        fail(queue.splice(0), fatal)
        queuedBytes = 0
        Deferred.doneUnsafe(news, Effect.void)
        Deferred.doneUnsafe(room, Effect.void)
        return options.onFatal(fatal)
      })

    /** Reads the records that patches of the group touch and makes the group's operations. */
    const draftOps = Effect.fnUntraced(function* (group: ReadonlyArray<Pending>) {
      const ops: Array<LogOp> = []
      const spans: Array<Span> = []
      const ids = group.flatMap((pending) => (pending.patch === undefined ? [] : [pending.patch.id]))
      const metadata = new Map<string, string>()
      if (ids.length > 0) {
        if (lastApply !== undefined) yield* Fiber.await(lastApply)
        for (const record of yield* index.get(ids)) if (record !== undefined) metadata.set(record.id, record.metadata)
      }
      const now = Date.now()
      for (const pending of group) {
        const first = ops.length
        if (pending.patch !== undefined) {
          const { id, fields } = pending.patch
          const before = metadata.get(id)
          if (before === undefined) {
            Deferred.doneUnsafe(pending.done, Effect.succeed({ effects: noEffects, patched: undefined }))
            continue
          }
          const after = merge(before, fields)
          if (Buffer.byteLength(after) > metadataBytesMax) {
            const error = new InvalidInput({
              field: "metadata",
              expected: `at most ${metadataBytesMax} bytes of JSON once merged`,
              got: `${Buffer.byteLength(after)} bytes`
            })
            Deferred.doneUnsafe(pending.done, Effect.fail(error))
            continue
          }
          ops.push({ kind: "metadata", id, version: clock.next(now), metadata: after })
          spans.push({ pending, first, count: 1, metadata: after })
          continue
        }
        for (const draft of pending.drafts) ops.push({ ...draft, version: clock.next(now) })
        spans.push({ pending, first, count: ops.length - first, metadata: undefined })
      }
      return { ops, spans }
    })

    const commitGroup = Effect.fnUntraced(function* (group: ReadonlyArray<Pending>) {
      const drafted = yield* Effect.result(draftOps(group))
      if (Result.isFailure(drafted)) return yield* stop(drafted.failure, group)
      const { ops, spans } = drafted.success
      if (ops.length === 0) return
      let bytes: Uint8Array | undefined
      const appended = yield* Effect.result(
        log.append((position) => {
          bytes = encodeSegment({ ...position, dimensions }, ops)
          return bytes
        })
      )
      if (Result.isFailure(appended)) {
        const error = appended.failure
        if (error._tag === "NotOwner") return yield* stop(error, group)
        inDoubt = true
        return fail(
          group,
          new StorageUnavailable({ detail: `The write was not committed: ${error.detail}`, retryAfterMillis: 1_000 })
        )
      }
      const { seq, recovered } = appended.success
      inDoubt = false
      // An earlier group whose writers were told that it failed has turned out to be in the log: it counts.
      for (const earlier of recovered)
        yield* applyInOrder(earlier.seq, earlier.bytes, decodeSegment(earlier.bytes).ops, () => {})
      yield* applyInOrder(seq, bytes as Uint8Array, ops, (outcome) => {
        if (Result.isFailure(outcome)) return fail(group, outcome.failure)
        for (const { pending, first, count, metadata } of spans) {
          const patched =
            metadata === undefined ? undefined : { metadata, version: formatVersion((ops[first] as LogOp).version) }
          const effects = outcome.success.effects.subarray(first, first + count)
          Deferred.doneUnsafe(pending.done, Effect.succeed({ effects, patched }))
        }
      })
    })

    /** Finds out what became of a failed commit where no other follows it, so that the index does not lag the log. */
    const settle = Effect.gen(function* () {
      const settled = yield* Effect.result(log.settle)
      if (Result.isFailure(settled)) {
        if (settled.failure._tag === "NotOwner") yield* stop(settled.failure, [])
        return
      }
      inDoubt = false
      for (const { seq, bytes } of settled.success) {
        yield* applyInOrder(seq, bytes, decodeSegment(bytes).ops, () => {})
      }
    })

    const loop = Effect.gen(function* () {
      while (fatal === undefined) {
        if (queue.length === 0) {
          news = Deferred.makeUnsafe()
          const arrival = Deferred.await(news)
          const came = yield* inDoubt ? Effect.timeoutOption(arrival, settleMillis) : Effect.asSome(arrival)
          if (Option.isNone(came)) {
            yield* settle
            continue
          }
          // One turn of the event loop, so that what arrives together commits together.
          yield* Effect.yieldNow
          continue
        }
        if (backlogBytes > bounds.applyBacklogBytesMax) {
          room = Deferred.makeUnsafe()
          yield* Deferred.await(room)
          continue
        }
        const group = takeGroup()
        yield* Effect.catchCause(commitGroup(group), (cause) => {
          // A defect of ours in one group must not leave its writers, nor those after them, waiting for ever.
          fail(
            group,
            new StorageUnavailable({ detail: "The write met a defect of the server.", retryAfterMillis: 1_000 })
          )
          return Effect.logError("A commit met a defect", cause)
        })
      }
    })

    yield* Effect.forkScoped(loop)
    yield* Effect.addFinalizer(() =>
      Effect.sync(() =>
        fail(open, new StorageUnavailable({ detail: "The partition is closing.", retryAfterMillis: 500 }))
      )
    )

    return {
      write: (drafts) =>
        Effect.map(
          submit({ drafts, patch: undefined, bytes: draftBytes(drafts), done: Deferred.makeUnsafe() }),
          ({ effects }) => ({ effects })
        ),
      patch: (id, fields) =>
        Effect.map(
          submit({ drafts: [], patch: { id, fields }, bytes: patchBytes, done: Deferred.makeUnsafe() }),
          ({ patched }) => patched
        ),
      appliedSeq: () => appliedSeq,
      revision: () => (fatal === undefined && visibleSeq === appliedSeq ? revision : undefined)
    }
  })

const noEffects = new Uint8Array(0)

const zeroVersion: Version = { time: 0n, region: "", counter: 0 }

const draftBytes = (drafts: ReadonlyArray<Draft>): number => {
  let bytes = 0
  for (const draft of drafts) bytes += opBytes({ ...draft, version: zeroVersion })
  return bytes
}

const merge = (before: string, fields: Readonly<Record<string, unknown>>): string => {
  const merged = new Map<string, unknown>(Object.entries(before === "" ? {} : (JSON.parse(before) as object)))
  for (const [key, value] of Object.entries(fields)) {
    if (value === null) merged.delete(key)
    else merged.set(key, value)
  }
  // `fromEntries` defines own properties, so a field named `__proto__` stays a field.
  return merged.size === 0 ? "" : JSON.stringify(Object.fromEntries(merged))
}
