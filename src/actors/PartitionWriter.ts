/**
 * Group commit of one partition. Writers queue; one loop takes what has gathered, stamps versions, commits it as one log
 * object, and hands the same bytes to the index. While one group is being applied the next is being committed. A writer
 * is answered when its group is both durable and visible.
 *
 * A metadata update reads before it writes, so a group ends before a second operation on an id that an update in it reads.
 *
 * **Early writes** (`ack` of `memory` and `warm`) are applied and acknowledged first and committed right after, in groups of their
 * own: nothing is published before it is committed, and what is committed was applied already and is not applied again. A
 * `warm` write is in Redis (`AheadLog.ts`) before it is acknowledged; where that cannot be had it is a `cold` one. An early
 * group whose commit fails is committed again until it is in the log or another owner is: it is visible, so it must not be
 * given up. `appliedSeq` counts only what is committed; a snapshot may hold early writes beyond it, which does no harm, since
 * applying is idempotent.
 *
 * **Requests** that have an id are done once: who makes one again is answered with what was done, or waits for it. The ids are
 * in the log with their operations (`RequestWindow.ts`). Where a failed commit may be in the log all the same, that is found
 * out before anything is committed that may be the same again.
 */
import { Context, Deferred, Effect, Fiber, Metric, Option, Result, type Scope, Semaphore, Stream } from "effect"
import { InvalidInput, Overloaded, StorageUnavailable } from "../protocol/Errors.ts"
import { metadataBytesMax } from "../protocol/Limits.ts"
import { formatVersion, type Version, type VersionClock } from "../protocol/Version.ts"
import type { AheadHandle } from "../tiers/AheadLog.ts"
import {
  decodeRequests,
  decodeSegment,
  decodeSegmentHeader,
  encodeSegment,
  type LogOp,
  opBytes,
  type SegmentRequest,
  type SegmentRequests
} from "../tiers/LogSegment.ts"
import type { StoreFailure } from "../tiers/ObjectStore.ts"
import type { LogEntry, NotOwner, PartitionLogHandle } from "../tiers/PartitionLog.ts"
import { type DoneRequest, deletedIn, type RequestWindow } from "../tiers/RequestWindow.ts"
import { type Applied, type IndexLost, type PartitionIndex, SnapshotUnreadable } from "../tiers/VectorIndex.ts"

export type Draft =
  | { readonly kind: "upsert"; readonly id: string; readonly vector: Float32Array; readonly metadata: string }
  | { readonly kind: "delete"; readonly id: string }

/** What a write is made for. */
export interface WriteRequest {
  readonly id: string
  /** Of what is asked for; 0 where that is not compared. */
  readonly digest: number
}

/** When a write is acknowledged: visible; visible and in Redis; visible and in the log. */
export type AckLevel = "memory" | "warm" | "cold"

export interface WriterOptions {
  readonly commitBytesMax: number
  readonly writeQueueBytesMax: number
  readonly applyBacklogBytesMax: number
}

/** The partition can go on no longer: another owner, or its thread died. */
export type Fatal = NotOwner | IndexLost

export type WriteError = StorageUnavailable | Overloaded | InvalidInput | Fatal

/** What is told of writes besides the index. */
export interface WriterCaches {
  /** Awaited before a group that changed these ids is acknowledged, and before it is published. */
  readonly onChanged?: (ids: ReadonlyArray<string>) => Effect.Effect<void>
  /** Where writes acknowledged as `warm` are kept; without it they are `cold`. Recovered before the writer is there. */
  readonly ahead?: AheadHandle | undefined
  /** Called when the writer closes; `clean` where the index has all that is in the log, and nothing more is under way. */
  readonly onClosed?: (clean: boolean) => Effect.Effect<void>
}

export interface PartitionWriter {
  /** All or nothing, upserts or deletes; answers how many there were, or how many visible records the deletes found. */
  readonly write: (
    drafts: ReadonlyArray<Draft>,
    ack?: AckLevel,
    request?: WriteRequest
  ) => Effect.Effect<number, WriteError>
  /** Sets fields of a record's metadata (`null` removes one); `undefined` where there is no visible record. */
  readonly patch: (
    id: string,
    fields: Readonly<Record<string, unknown>>,
    request?: WriteRequest
  ) => Effect.Effect<{ readonly metadata: string; readonly version: string } | undefined, WriteError>
  /** A copy of the window of requests, once it has all that were handed to the index. */
  readonly requests: Effect.Effect<Uint8Array | undefined, SnapshotUnreadable>
  /** Sequence number of the last log object handed to the index. */
  readonly appliedSeq: () => number
  /** Operations that are visible and not yet in the log. */
  readonly uncommitted: () => number
  /**
   * Changes with whatever a search can see, before the writer of the change is answered: the epoch, and what has been applied
   * in it. `undefined` while something is being applied, when a search sees some state in between.
   */
  readonly revision: () => string | undefined
}

interface Pending {
  readonly drafts: ReadonlyArray<Draft>
  readonly patch: { readonly id: string; readonly fields: Readonly<Record<string, unknown>> } | undefined
  readonly bytes: number
  readonly request: WriteRequest | undefined
  readonly done: Deferred.Deferred<Outcome, WriteError>
}

/** Operations that were handed to the index and are still to be committed. */
interface Early {
  readonly ops: ReadonlyArray<LogOp>
  readonly made: SegmentRequests | undefined
  readonly bytes: number
  /** What may be trimmed of the ahead log once they are in the log. */
  readonly ahead: number | undefined
  readonly applied: Deferred.Deferred<Applied, IndexLost>
}

interface Outcome {
  /** See {@link PartitionWriter.write}. */
  readonly count: number
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

/** Between two looks at whether the ahead log can be had again. */
const recoverMillis = 500

/** A partition that closes waits this long for its early writes to be in the log. */
const flushMillis = 10_000

const writesLost = Metric.counter("ruvector_early_writes_lost", {
  description: "Operations acknowledged as memory or warm that another owner's claim kept out of the log"
})

const logObjects = Metric.counter("ruvector_log_objects", {
  description: "Log objects committed: each is durable at the cost of one"
})
const logWrites = Metric.counter("ruvector_log_writes", { description: "Writes that these took, many in one" })
const requestsRepeated = Metric.counter("ruvector_requests_repeated", {
  description: "Requests that had been made before and were answered with what was done then"
})
const metricContext = Context.empty()

const countCommit = (writes: number): void => {
  logObjects.updateUnsafe(1, metricContext)
  logWrites.updateUnsafe(writes, metricContext)
}

/** What a patch is counted as in the bounds on bytes, before it is merged. */
const patchBytes = 1_024

export const make = (
  options: WriterCaches & {
    readonly log: PartitionLogHandle
    readonly index: PartitionIndex
    readonly clock: VersionClock
    readonly dimensions: number
    readonly bounds: WriterOptions
    /** What was done before this writer, and from now on what it does. */
    readonly window: RequestWindow
    /** Called in log order with every group that has become visible. */
    readonly onApplied: (seq: number, ops: ReadonlyArray<LogOp>, applied: Applied) => void
    /** Called once, with what ended the writer. */
    readonly onFatal: (error: Fatal) => Effect.Effect<void>
  }
): Effect.Effect<PartitionWriter, never, Scope.Scope> =>
  Effect.gen(function* () {
    const { log, index, clock, dimensions, bounds, window } = options
    const onChanged = options.onChanged ?? (() => Effect.void)
    const { ahead } = options
    const queue: Array<Pending | Early> = []
    /** Waiting to become early. */
    const hurried: Array<{ readonly pending: Pending; readonly ack: AckLevel }> = []
    let hurry = Deferred.makeUnsafe<void>()
    /** Operations handed to the index and not committed. */
    let uncommitted = 0
    let committing = false
    let closing: StorageUnavailable | undefined
    /** From stamping early operations to handing them to the index, and from reading for a patch to stamping it. */
    const stamping = Semaphore.makeUnsafe(1)
    /** Everything that somebody may wait for, so that none is left waiting when the partition closes. */
    const open = new Set<Pending>()
    /** Of these, by their request's id: who makes one again waits for it too. */
    const underWay = new Map<string, { readonly request: WriteRequest; readonly done: Pending["done"] }>()
    let queuedBytes = 0
    let backlogBytes = 0
    let appliedSeq = log.lastSeq()
    /** Segments handed to the index, and those that it has applied. */
    let begun = 0
    let visible = 0
    let fatal: Fatal | undefined
    let news = Deferred.makeUnsafe<void>()
    let room = Deferred.makeUnsafe<void>()
    /** A commit failed, and whether it is in the log is not known for good. */
    let inDoubt = false
    /** Segments that turned out to be in the log, and are not applied yet. */
    let recovering = 0
    /** Something with requests was handed to the index, and what came of it was not waited for. */
    let cutShort = false
    let lastApply: Fiber.Fiber<void> | undefined
    let lastEarly: Fiber.Fiber<void> | undefined
    const scope = yield* Effect.scope

    const submit = (pending: Pending, ack: AckLevel): Effect.Effect<Outcome, WriteError> =>
      Effect.suspend((): Effect.Effect<Outcome, WriteError> => {
        if (fatal !== undefined) return Effect.fail(fatal)
        if (closing !== undefined) return Effect.fail(closing)
        const { request } = pending
        const earlier = request === undefined ? undefined : askedBefore(request, pending.patch)
        if (earlier !== undefined) return earlier
        if (queuedBytes + pending.bytes > bounds.writeQueueBytesMax && queuedBytes > 0) {
          return Effect.fail(new Overloaded({ bound: "writeQueueBytesMax", retryAfterMillis: 500 }))
        }
        open.add(pending)
        if (request !== undefined) underWay.set(request.id, { request, done: pending.done })
        queuedBytes += pending.bytes
        // What may be in the log already has to be known before it is visible again.
        const isUnsure = request !== undefined && (inDoubt || recovering > 0)
        if (ack === "cold" || isUnsure || (ack === "warm" && ahead?.ready() !== true)) {
          queue.push(pending)
          Deferred.doneUnsafe(news, Effect.void)
        } else {
          hurried.push({ pending, ack })
          Deferred.doneUnsafe(hurry, Effect.void)
        }
        // A caller that goes away does not undo its write: it is in the queue, and may be in a group already.
        return Deferred.await(pending.done)
      })

    const finish = (pending: Pending, outcome: Effect.Effect<Outcome, WriteError>) => {
      Deferred.doneUnsafe(pending.done, outcome)
      open.delete(pending)
      const { request } = pending
      if (request !== undefined && underWay.get(request.id)?.done === pending.done) underWay.delete(request.id)
    }

    /** What was done for a request, or is being done. */
    const askedBefore = (
      request: WriteRequest,
      patch: Pending["patch"]
    ): Effect.Effect<Outcome, WriteError> | undefined => {
      const done = window.find(request.id, Date.now())
      const now = done === undefined ? underWay.get(request.id) : undefined
      const digest = done?.digest ?? now?.request.digest
      if (digest === undefined) return undefined
      if (digest !== request.digest) return Effect.fail(otherRequest)
      requestsRepeated.updateUnsafe(1, metricContext)
      return now === undefined ? outcomeOf(done as DoneRequest, patch) : Deferred.await(now.done)
    }

    const outcomeOf = ({ kind, seq, result, first }: DoneRequest, patch: Pending["patch"]) => {
      if (kind !== "metadata" || patch === undefined) return Effect.succeed({ count: result, patched: undefined })
      return log.read(seq).pipe(
        Stream.take(1),
        Stream.runHead,
        Effect.map((entry) => {
          const op = Option.isSome(entry) ? decodeSegment(entry.value.bytes).ops[first] : undefined
          return op?.kind === "metadata" ? patchedTo(op.metadata, op.version) : undefined
        }),
        // The log does not go back that far: as the record is now.
        Effect.catchTag("Compacted", () =>
          Effect.map(index.get([patch.id]), ([record]) =>
            record === undefined ? { count: 0, patched: undefined } : patchedTo(record.metadata, record.version)
          )
        ),
        Effect.catch((error) => Effect.as(Effect.logWarning("What a request did cannot be read", error), undefined)),
        Effect.flatMap((outcome) => (outcome === undefined ? Effect.fail(unread) : Effect.succeed(outcome)))
      )
    }

    /** Those that were not done meanwhile; the others are answered. */
    const notDone = (group: ReadonlyArray<Pending>): ReadonlyArray<Pending> =>
      group.filter((pending) => {
        const done = pending.request === undefined ? undefined : window.find(pending.request.id, Date.now())
        if (done === undefined) return true
        finish(
          pending,
          done.digest === pending.request?.digest ? outcomeOf(done, pending.patch) : Effect.fail(otherRequest)
        )
        return false
      })

    /** The early operations that the next group is made of; none where it is made of others. */
    const takeEarly = (): Array<Early> => {
      const group: Array<Early> = []
      let bytes = 0
      while (queue.length > 0) {
        const next = queue[0] as Pending | Early
        if (!("ops" in next) || (group.length > 0 && bytes + next.bytes > bounds.commitBytesMax)) break
        queue.shift()
        bytes += next.bytes
        group.push(next)
      }
      return group
    }

    /** The pendings of the next group. */
    const takeGroup = (): Array<Pending> => {
      const group: Array<Pending> = []
      const written = new Set<string>()
      let bytes = 0
      while (queue.length > 0) {
        const next = queue[0] as Pending | Early
        if ("ops" in next) break
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

    /** Fails whatever of the queue is not visible yet. */
    const failQueued = (error: WriteError) => {
      const early = queue.filter((item): item is Early => "ops" in item)
      const pendings = queue.filter((item): item is Pending => !("ops" in item))
      queue.splice(0, queue.length, ...early)
      queuedBytes = early.reduce((sum, { bytes }) => sum + bytes, 0)
      fail(pendings, error)
    }

    const fail = (group: Iterable<Pending>, error: WriteError) => {
      for (const pending of [...group]) finish(pending, Effect.fail(error))
    }

    const apply = (segment: Uint8Array): Effect.Effect<Applied, IndexLost> =>
      Effect.suspend(() => {
        begun += 1
        return Effect.tap(index.apply(segment), () =>
          Effect.sync(() => {
            visible += 1
          })
        )
      })

    /**
     * Hands a committed group to the index, at once: the index keeps the order in which it is asked. `complete` is called in
     * log order, with what applying did or with why it did not.
     */
    const applyInOrder = Effect.fnUntraced(function* (
      seq: number,
      bytes: Uint8Array,
      ops: ReadonlyArray<LogOp>,
      made: SegmentRequests | undefined,
      complete: (outcome: Result.Result<Applied, IndexLost>) => void
    ) {
      appliedSeq = seq
      backlogBytes += bytes.length
      const previous = lastApply
      lastApply = yield* Effect.result(apply(bytes)).pipe(
        Effect.flatMap((outcome) =>
          Effect.flatMap(previous === undefined ? Effect.void : Fiber.await(previous), () => {
            backlogBytes -= bytes.length
            Deferred.doneUnsafe(room, Effect.void)
            if (Result.isFailure(outcome)) {
              complete(outcome)
              return stop(outcome.failure, [])
            }
            const applied = outcome.success
            return Effect.map(onChanged(idsOf(ops)), () => {
              window.observe(seq, made, applied)
              options.onApplied(seq, ops, applied)
              complete(outcome)
            })
          })
        ),
        Effect.onInterrupt(() => cut(made)),
        Effect.forkIn(scope, { startImmediately: true })
      )
    })

    const cut = (made: SegmentRequests | undefined) =>
      Effect.sync(() => {
        if (made !== undefined) cutShort = true
      })

    /** Hands over what was found to be in the log after its writers were told that it failed: it counts. */
    const applyFound = Effect.fnUntraced(function* ({ seq, bytes }: LogEntry) {
      recovering += 1
      yield* applyInOrder(seq, bytes, decodeSegment(bytes).ops, decodeRequests(bytes), () => {
        recovering -= 1
      })
    })

    /** Hands operations to the index that are not committed yet; they are committed in the order in which this is called. */
    const applyEarly = Effect.fnUntraced(function* (
      ops: ReadonlyArray<LogOp>,
      made: SegmentRequests | undefined,
      segment: Uint8Array,
      position: number | undefined,
      complete: (outcome: Result.Result<Applied, IndexLost>) => void
    ) {
      const bytes = segment.length
      const early: Early = { ops, made, bytes, ahead: position, applied: Deferred.makeUnsafe() }
      uncommitted += ops.length
      backlogBytes += bytes
      queuedBytes += bytes
      queue.push(early)
      const previous = lastEarly
      lastEarly = yield* Effect.result(apply(segment)).pipe(
        Effect.flatMap((outcome) =>
          Effect.flatMap(previous === undefined ? Effect.void : Fiber.await(previous), () => {
            backlogBytes -= bytes
            Deferred.doneUnsafe(room, Effect.void)
            if (Result.isFailure(outcome)) {
              Deferred.doneUnsafe(early.applied, Effect.fail(outcome.failure))
              complete(outcome)
              return stop(outcome.failure, [])
            }
            return Effect.map(onChanged(idsOf(ops)), () => {
              window.observe(0, made, outcome.success)
              Deferred.doneUnsafe(early.applied, Effect.succeed(outcome.success))
              complete(outcome)
            })
          })
        ),
        Effect.onInterrupt(() => cut(made)),
        Effect.forkIn(scope, { startImmediately: true })
      )
      Deferred.doneUnsafe(news, Effect.void)
    })

    const stop = (error: Fatal, group: ReadonlyArray<Pending>) =>
      Effect.suspend(() => {
        if (fatal === undefined) fatal = error
        fail(group, fatal)
        failQueued(fatal)
        fail(
          hurried.splice(0).map(({ pending }) => pending),
          fatal
        )
        let lost = 0
        if (fatal._tag === "NotOwner") {
          for (const early of queue.splice(0)) lost += "ops" in early ? early.ops.length : 0
          queuedBytes = 0
        }
        Deferred.doneUnsafe(news, Effect.void)
        Deferred.doneUnsafe(hurry, Effect.void)
        Deferred.doneUnsafe(room, Effect.void)
        return Effect.andThen(lose(lost), options.onFatal(fatal))
      })

    const lose = (count: number): Effect.Effect<void> =>
      count === 0
        ? Effect.void
        : Effect.andThen(
            Metric.update(writesLost, count),
            Effect.logWarning("Another owner's claim kept early writes out of the log", { operations: count })
          )

    /** Reads the records that patches of the group touch and makes the group's operations. */
    const draftOps = Effect.fnUntraced(function* (group: ReadonlyArray<Pending>) {
      const ops: Array<LogOp> = []
      const spans: Array<Span> = []
      const ids = group.flatMap((pending) => (pending.patch === undefined ? [] : [pending.patch.id]))
      const metadata = new Map<string, string>()
      if (ids.length > 0) {
        if (lastApply !== undefined) yield* Fiber.await(lastApply)
        if (lastEarly !== undefined) yield* Fiber.await(lastEarly)
        for (const record of yield* index.get(ids)) if (record !== undefined) metadata.set(record.id, record.metadata)
      }
      const now = Date.now()
      for (const pending of group) {
        const first = ops.length
        if (pending.patch !== undefined) {
          const { id, fields } = pending.patch
          const before = metadata.get(id)
          if (before === undefined) {
            finish(pending, Effect.succeed({ count: 0, patched: undefined }))
            continue
          }
          const after = merge(before, fields)
          if (Buffer.byteLength(after) > metadataBytesMax) {
            const error = new InvalidInput({
              field: "metadata",
              expected: `at most ${metadataBytesMax} bytes of JSON once merged`,
              got: `${Buffer.byteLength(after)} bytes`
            })
            finish(pending, Effect.fail(error))
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

    /** Finds out what became of a failed commit. Answers why it could not; ends the writer, and the group, where it is over. */
    const settle = Effect.fnUntraced(function* (group: ReadonlyArray<Pending>) {
      const settled = yield* Effect.result(log.settle)
      if (Result.isFailure(settled)) {
        if (settled.failure._tag === "StoreFailure") return settled.failure
        yield* stop(settled.failure, group)
        return undefined
      }
      inDoubt = false
      for (const entry of settled.success) yield* applyFound(entry)
      return undefined
    })

    const commitGroup = Effect.fnUntraced(function* (taken: ReadonlyArray<Pending>) {
      // A patch changes what precedes it in the log, and a request may be what failed before: what a failed commit became has
      // to be known and applied first.
      if (inDoubt && taken.some(({ patch, request }) => patch !== undefined || request !== undefined)) {
        const failure = yield* settle(taken)
        if (fatal !== undefined) return
        if (failure !== undefined) return fail(taken, notCommitted(failure))
      }
      if (recovering > 0 && lastApply !== undefined) yield* Fiber.await(lastApply)
      const group = notDone(taken)
      const patches = group.some((pending) => pending.patch !== undefined)
      const drafted = yield* Effect.result(patches ? stamping.withPermit(draftOps(group)) : draftOps(group))
      if (Result.isFailure(drafted)) return yield* stop(drafted.failure, group)
      const { ops, spans } = drafted.success
      if (ops.length === 0) return
      const made = madeFor(spans, ops)
      let bytes: Uint8Array | undefined
      const appended = yield* Effect.result(
        log.append((position) => {
          bytes = encodeSegment({ ...position, dimensions }, ops, made)
          return bytes
        })
      )
      if (Result.isFailure(appended)) {
        const error = appended.failure
        if (error._tag === "NotOwner") return yield* stop(error, group)
        inDoubt = true
        return fail(group, notCommitted(error))
      }
      const { seq, recovered } = appended.success
      inDoubt = false
      countCommit(group.length)
      // An earlier group whose writers were told that it failed has turned out to be in the log: it counts.
      for (const earlier of recovered) yield* applyFound(earlier)
      yield* applyInOrder(seq, bytes as Uint8Array, ops, made, (outcome) => {
        if (Result.isFailure(outcome)) return fail(group, outcome.failure)
        for (const { pending, first, count, metadata } of spans) {
          const patched =
            metadata === undefined ? undefined : { metadata, version: formatVersion((ops[first] as LogOp).version) }
          finish(pending, Effect.succeed({ count: countOf(pending, outcome.success, first, count), patched }))
        }
      })
    })

    /** Commits early operations; tried again until they are in the log or the partition is another's. */
    const commitEarly = Effect.fnUntraced(function* (group: ReadonlyArray<Early>) {
      const ops = group.flatMap((early) => early.ops)
      const made = madeTogether(group)
      const nonces = new Set<bigint>()
      const mine = (bytes: Uint8Array) => nonces.has(decodeSegmentHeader(bytes).nonce)
      let seq: number | undefined = ops.length === 0 ? appliedSeq : undefined
      while (seq === undefined) {
        const appended = yield* Effect.result(
          log.append((position) => {
            nonces.add(position.nonce)
            return encodeSegment({ ...position, dimensions }, ops, made)
          })
        )
        let found: ReadonlyArray<{ readonly seq: number; readonly bytes: Uint8Array }>
        if (Result.isSuccess(appended)) {
          seq = appended.success.seq
          countCommit(group.length)
          found = appended.success.recovered
        } else {
          if (appended.failure._tag === "NotOwner") return yield* lostTo(appended.failure, ops.length)
          inDoubt = true
          failQueued(
            new StorageUnavailable({ detail: "Earlier writes cannot be committed now.", retryAfterMillis: 1_000 })
          )
          yield* Effect.sleep(settleMillis)
          const settled = yield* Effect.result(log.settle)
          if (Result.isFailure(settled)) {
            if (settled.failure._tag === "NotOwner") return yield* lostTo(settled.failure, ops.length)
            continue
          }
          found = settled.success
        }
        inDoubt = false
        for (const entry of found) {
          if (mine(entry.bytes)) seq = Math.max(seq ?? 0, entry.seq)
          else yield* applyFound(entry)
        }
      }
      yield* publishEarly(Math.max(seq, appliedSeq), group, ops)
    })

    const lostTo = (error: NotOwner, count: number) => Effect.andThen(lose(count), stop(error, []))

    /** Early operations are in the log: they are published in its order, once they are visible. */
    const publishEarly = Effect.fnUntraced(function* (
      seq: number,
      group: ReadonlyArray<Early>,
      ops: ReadonlyArray<LogOp>
    ) {
      appliedSeq = seq
      uncommitted -= ops.length
      for (const early of group) queuedBytes -= early.bytes
      const position = Math.max(...group.map((early) => early.ahead ?? 0))
      if (position > 0 && ahead !== undefined) yield* Effect.forkIn(ahead.trim(position), scope)
      const previous = lastApply
      lastApply = yield* Effect.gen(function* () {
        if (previous !== undefined) yield* Fiber.await(previous)
        const effects = new Uint8Array(ops.length)
        let at = 0
        for (const early of group) {
          const applied = yield* Deferred.await(early.applied)
          effects.set(applied.effects, at)
          at += early.ops.length
        }
        if (ops.length > 0) options.onApplied(seq, ops, { effects })
      }).pipe(Effect.ignore, Effect.forkIn(scope, { startImmediately: true }))
    })

    /** Makes the hurried ones visible, and acknowledges them: all of one level that have gathered. */
    const advance = Effect.gen(function* () {
      while (fatal === undefined) {
        if (hurried.length === 0) {
          hurry = Deferred.makeUnsafe()
          yield* Deferred.await(hurry)
          yield* Effect.yieldNow
          continue
        }
        if (backlogBytes > bounds.applyBacklogBytesMax) {
          yield* awaitRoom
          continue
        }
        const { ack } = hurried[0] as (typeof hurried)[number]
        const group: Array<Pending> = []
        let bytes = 0
        while (hurried[0]?.ack === ack && (group.length === 0 || bytes < bounds.commitBytesMax)) {
          const { pending } = hurried.shift() as (typeof hurried)[number]
          bytes += pending.bytes
          group.push(pending)
        }
        yield* Effect.catchCause(stamping.withPermit(advanceGroup(group, bytes, ack)), (cause) => {
          fail(group, defect)
          return Effect.logError("An early write met a defect", cause)
        })
      }
    })

    const advanceGroup = Effect.fnUntraced(function* (group: ReadonlyArray<Pending>, bytes: number, ack: AckLevel) {
      const now = Date.now()
      const ops = group.flatMap(({ drafts }) => drafts.map((draft): LogOp => ({ ...draft, version: clock.next(now) })))
      let first = 0
      const spans = group.map((pending): Span => {
        const span = { pending, first, count: pending.drafts.length, metadata: undefined }
        first += span.count
        return span
      })
      const made = madeFor(spans, ops)
      const segment = encodeSegment({ epoch: log.epoch, seq: 0, nonce: 0n, dimensions }, ops, made)
      const position = ack === "warm" && ahead !== undefined ? yield* ahead.append(segment) : undefined
      if (fatal !== undefined) return fail(group, fatal)
      if (ack === "warm" && position === undefined) {
        // Whether Redis has it is not known: it is committed as a cold write is, under later versions.
        for (const pending of group) queue.push(pending)
        Deferred.doneUnsafe(news, Effect.void)
        return
      }
      queuedBytes -= bytes
      yield* applyEarly(ops, made, segment, position, (outcome) => {
        if (Result.isFailure(outcome)) return fail(group, outcome.failure)
        for (const { pending, first, count } of spans) {
          const done = countOf(pending, outcome.success, first, count)
          finish(pending, Effect.succeed({ count: done, patched: undefined }))
        }
      })
    })

    /** Brings back what was acknowledged as `warm` and never came into the log. Idempotent: its versions are its own. */
    const recover = Effect.gen(function* () {
      const found = yield* ahead === undefined ? Effect.succeed(undefined) : ahead.recover
      if (found === undefined) return
      for (const bytes of found.segments) {
        const decoded = Result.try({ try: () => decodeSegment(bytes), catch: (error) => String(error) })
        if (Result.isFailure(decoded) || decoded.success.dimensions !== dimensions) {
          const detail = Result.isFailure(decoded) ? decoded.failure : "of other dimensions"
          yield* Effect.logWarning("A write kept in Redis is damaged and left out", detail)
          continue
        }
        const { ops } = decoded.success
        for (const { version } of ops) clock.observe(version)
        const applied = yield* Effect.result(apply(encodeSegment(decoded.success, ops)))
        if (Result.isFailure(applied)) return yield* stop(applied.failure, [])
        // What had no effect is in the log already, or is older than what is. What it was made for may still not be there.
        const made = decodeRequests(bytes)
        const isNews = made?.requests.some(({ id }) => window.find(id, Date.now()) === undefined) === true
        const isFresh = (i: number) => isNews || applied.success.effects[i] !== 0
        window.observe(0, made, applied.success)
        const fresh = ops.filter((_, i) => isFresh(i))
        if (fresh.length === 0) continue
        yield* onChanged(idsOf(fresh))
        const effects = applied.success.effects.filter((_, i) => isFresh(i))
        const early: Early = {
          ops: fresh,
          made: isNews ? made : undefined,
          bytes: bytes.length,
          ahead: undefined,
          applied: Deferred.makeUnsafe()
        }
        Deferred.doneUnsafe(early.applied, Effect.succeed({ effects }))
        uncommitted += fresh.length
        queuedBytes += early.bytes
        queue.push(early)
        yield* Effect.logInfo("Writes acknowledged as warm are brought back", { operations: fresh.length })
      }
      // What was recovered may be trimmed once it, and what was there before it, is in the log.
      queue.push({ ops: [], made: undefined, bytes: 0, ahead: found.upTo, applied: nothingApplied() })
      Deferred.doneUnsafe(news, Effect.void)
    })

    const awaitRoom = Effect.suspend(() => {
      if (Deferred.isDoneUnsafe(room)) room = Deferred.makeUnsafe()
      return Deferred.await(room)
    })

    const loop = Effect.gen(function* () {
      // A thread that died does not keep from the log what has been acknowledged; another owner does.
      while (fatal === undefined || (fatal._tag === "IndexLost" && queue.length > 0)) {
        if (queue.length === 0) {
          news = Deferred.makeUnsafe()
          const arrival = Deferred.await(news)
          const came = yield* inDoubt ? Effect.timeoutOption(arrival, settleMillis) : Effect.asSome(arrival)
          if (Option.isNone(came)) {
            // No other commit follows it, and the index must not lag the log.
            yield* settle([])
            continue
          }
          // One turn of the event loop, so that what arrives together commits together.
          yield* Effect.yieldNow
          continue
        }
        committing = true
        const early = takeEarly()
        if (early.length > 0) {
          yield* Effect.catchCause(commitEarly(early), (cause) => Effect.logError("A commit met a defect", cause))
          committing = false
          continue
        }
        if (backlogBytes > bounds.applyBacklogBytesMax) {
          yield* awaitRoom
          continue
        }
        const group = takeGroup()
        yield* Effect.catchCause(commitGroup(group), (cause) => {
          // A defect of ours in one group must not leave its writers, nor those after them, waiting for ever.
          fail(group, defect)
          return Effect.logError("A commit met a defect", cause)
        })
        committing = false
      }
    })

    yield* recover
    yield* Effect.forkScoped(loop)
    yield* Effect.forkScoped(advance)
    if (ahead !== undefined) {
      const lookAgain = Effect.suspend(() => (ahead.ready() || fatal !== undefined ? Effect.void : recover))
      yield* Effect.forkScoped(Effect.forever(Effect.andThen(Effect.sleep(recoverMillis), lookAgain)))
    }
    yield* Effect.addFinalizer(() =>
      Effect.gen(function* () {
        closing = new StorageUnavailable({ detail: "The partition is closing.", retryAfterMillis: 500 })
        const deadline = Date.now() + flushMillis
        while (uncommitted > 0 && fatal?._tag !== "NotOwner" && Date.now() < deadline) {
          failQueued(closing)
          yield* Effect.sleep(flushLookMillis)
        }
        fail(open, closing)
        const clean = fatal === undefined && !inDoubt && !committing && backlogBytes === 0 && queue.length === 0
        if (options.onClosed !== undefined) yield* options.onClosed(clean && appliedSeq === log.lastSeq())
      })
    )

    return {
      write: (drafts, ack = "cold", request) =>
        Effect.map(
          submit({ drafts, patch: undefined, bytes: draftBytes(drafts), request, done: Deferred.makeUnsafe() }, ack),
          ({ count }) => count
        ),
      patch: (id, fields, request) =>
        Effect.map(
          submit(
            { drafts: [], patch: { id, fields }, bytes: patchBytes, request, done: Deferred.makeUnsafe() },
            "cold"
          ),
          ({ patched }) => patched
        ),
      requests: Effect.gen(function* () {
        for (const fiber of [lastApply, lastEarly]) if (fiber !== undefined) yield* Fiber.await(fiber)
        if (cutShort) return yield* new SnapshotUnreadable({ detail: "not all that is applied was waited for" })
        return window.encode(Date.now())
      }),
      appliedSeq: () => appliedSeq,
      uncommitted: () => uncommitted,
      revision: () => (fatal === undefined && begun === visible ? `${log.epoch}.${visible}` : undefined)
    }
  })

const notCommitted = ({ detail }: StoreFailure): StorageUnavailable =>
  new StorageUnavailable({ detail: `The write was not committed: ${detail}`, retryAfterMillis: 1_000 })
/** Between two looks of a partition that closes at whether its early writes are in the log. */
const flushLookMillis = 5

const defect = new StorageUnavailable({ detail: "The write met a defect of the server.", retryAfterMillis: 1_000 })

const nothingApplied = (): Deferred.Deferred<Applied, IndexLost> => {
  const applied = Deferred.makeUnsafe<Applied, IndexLost>()
  Deferred.doneUnsafe(applied, Effect.succeed({ effects: noEffects }))
  return applied
}

/** The answer to a request under the id of another one. */
const otherRequest = new InvalidInput({
  field: "idempotency_key",
  expected: "a key that no other request had lately",
  got: "that of a request for something else"
})

const patchedTo = (metadata: string, version: Version): Outcome => ({
  count: 1,
  patched: { metadata, version: formatVersion(version) }
})

const unread = new StorageUnavailable({ detail: "The log cannot be read now.", retryAfterMillis: 1_000 })

/** The requests of a group. */
const madeFor = (spans: ReadonlyArray<Span>, ops: ReadonlyArray<LogOp>): SegmentRequests | undefined => {
  const requests: Array<SegmentRequest> = []
  for (const { pending, first, count } of spans) {
    const { request } = pending
    if (request !== undefined) requests.push({ ...request, kind: (ops[first] as LogOp).kind, first, count })
  }
  return requests.length === 0 ? undefined : { millis: Date.now(), requests }
}

/** The requests of early operations that are committed as one. */
const madeTogether = (group: ReadonlyArray<Early>): SegmentRequests | undefined => {
  const requests: Array<SegmentRequest> = []
  let millis = 0
  let before = 0
  for (const { ops, made } of group) {
    for (const request of made?.requests ?? []) requests.push({ ...request, first: request.first + before })
    millis = Math.max(millis, made?.millis ?? 0)
    before += ops.length
  }
  return requests.length === 0 ? undefined : { millis, requests }
}

const countOf = ({ drafts }: Pending, { effects }: Applied, first: number, count: number): number =>
  drafts[0]?.kind === "delete" ? deletedIn(effects, first, count) : count

const idsOf = (ops: ReadonlyArray<LogOp>): ReadonlyArray<string> => ops.map(({ id }) => id)

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
