/**
 * One resident partition whose form can change while it is used: from the mapped form to the full one and back. Whoever
 * searches or writes sees one {@link PartitionIndex}.
 *
 * **Change of form.** The next form is opened from a snapshot, is given the log after it, and from then on every segment
 * that the one in use is given; a write is then acknowledged when both have it. Once the next one has caught up it takes
 * over, and the one before is closed when nothing waits for it any more. Applying is idempotent and commutative, so it
 * does not matter that segments near the seam reach the next form twice.
 *
 * **Standing queries** are registered at the next form once it has taken over, a few at a time, and told its answers: they
 * may differ where searches of the two do. What they were told before stays until then.
 */
import { Effect, Exit, Fiber, Scope, Semaphore, Stream } from "effect"
import type { LogEntry } from "./PartitionLog.ts"
import {
  type Applied,
  IndexLost,
  type PartitionIndex,
  type StandingHandle,
  type StandingListener,
  type StandingSpec
} from "./VectorIndex.ts"

/** How the next form comes about: opened from a snapshot, with the log after that. */
export interface NextForm<E> {
  readonly open: Effect.Effect<PartitionIndex, E, Scope.Scope>
  readonly log: Stream.Stream<LogEntry, E>
}

export interface ResidentIndex extends PartitionIndex {
  /**
   * Changes the form, one change at a time and never beside a snapshot. Where it fails, the form in use stays. The one
   * before is closed before this ends.
   */
  readonly change: <E>(next: NextForm<E>) => Effect.Effect<void, E | IndexLost>
  /** Whether a change is under way. */
  readonly changing: () => boolean
  /** Searches, reads and writes that wait for an answer. */
  readonly inFlight: () => number
}

/** Segments given to the next form ahead of what it has applied. */
const replayAhead = 8

/** Bytes of new segments kept for the next form until it can take them; beyond, writes wait for it. */
const backlogBytesMax = 64 * 1_048_576

/** Standing queries on their way to the next form at once; writes go in between. */
const watchesMovedAtOnce = 8

/** Rounds in which the next form catches up before writes are slowed down to its pace. */
const roundsMax = 3

/** Between two looks at whether the next form can take what has gathered. */
const waitMillis = 5

/** A form, what it is open in, and what waits for it. */
interface Seat {
  readonly index: PartitionIndex
  readonly scope: Scope.Closeable
  waiting: number
  idle: (() => void) | undefined
}

/** A standing query, and where it is registered. */
interface Watch {
  readonly spec: StandingSpec
  readonly listener: StandingListener
  /** Records of its answer, for the next form to begin with. */
  readonly members: Set<string>
  /** The form that it is told by, and which registration of it: what earlier ones are told counts no more. */
  index: PartitionIndex
  turn: number
  handle: StandingHandle | undefined
  closed: boolean
}

/** What the next form has yet to be given. */
interface Backlog {
  segments: Array<Uint8Array>
  bytes: number
  /** Where segments go at once, when all before have gone there. */
  to: PartitionIndex | undefined
}

/** `index` must be open in `scope`, which this closes at the latest when the scope that it is made in closes. */
export const make = Effect.fnUntraced(function* (index: PartitionIndex, scope: Scope.Closeable) {
  // One scope for all forms, made now: what is added to the owner's scope later ends before any form does.
  const seats = yield* Scope.fork(yield* Effect.scope)
  yield* Scope.addFinalizer(seats, Scope.close(scope, Exit.void))
  const gate = yield* Semaphore.make(1)
  let current: Seat = { index, scope, waiting: 0, idle: undefined }
  let backlog: Backlog | undefined

  /** Counts what is under way, so that a form is not closed beneath it. */
  const using = <A, E>(use: (index: PartitionIndex) => Effect.Effect<A, E>): Effect.Effect<A, E> =>
    Effect.suspend(() => {
      const seat = current
      seat.waiting += 1
      return Effect.onExitPrimitive(use(seat.index), () => {
        seat.waiting -= 1
        if (seat.waiting === 0) seat.idle?.()
        return undefined
      })
    })

  const whenIdle = (seat: Seat): Effect.Effect<void> =>
    Effect.callback<void>((resume) => {
      if (seat.waiting === 0) return resume(Effect.void)
      seat.idle = () => resume(Effect.void)
    })

  const apply = (segment: Uint8Array): Effect.Effect<Applied, IndexLost> =>
    Effect.suspend(() => {
      const next = backlog
      const applied = using((index) => index.apply(segment))
      if (next === undefined) return applied
      const { to } = next
      if (to !== undefined) {
        // Acknowledged when both have it. The next form's failure is the change's, not the write's.
        return Effect.gen(function* () {
          const effects = yield* Effect.forkChild(applied, { startImmediately: true })
          yield* Effect.exit(to.apply(segment))
          return yield* Fiber.join(effects)
        })
      }
      next.segments.push(segment.slice())
      next.bytes += segment.length
      return next.bytes <= backlogBytesMax ? applied : Effect.tap(applied, () => whenTaken(next))
    })

  const whenTaken = (next: Backlog): Effect.Effect<void> =>
    Effect.suspend(() =>
      backlog === next && next.bytes > backlogBytesMax
        ? Effect.andThen(Effect.sleep(waitMillis), whenTaken(next))
        : Effect.void
    )

  const catchUp = Effect.fnUntraced(function* (next: Backlog, to: PartitionIndex) {
    for (let round = 1; ; round++) {
      const segments = next.segments
      const isLast = round === roundsMax || segments.length === 0
      next.segments = []
      const applies = yield* Effect.forEach(segments, (segment) =>
        Effect.forkChild(to.apply(segment), { startImmediately: true })
      )
      // Set in the same turn, so that what comes next goes after these.
      if (isLast) next.to = to
      yield* Effect.forEach(applies, Fiber.join, { discard: true })
      next.bytes = 0
      if (isLast) return
    }
  })

  const watches = new Set<Watch>()

  /** Registers at the form in use, again where that has changed meanwhile. */
  const register = (watch: Watch): Effect.Effect<void, IndexLost> =>
    Effect.suspend(() => {
      const { index } = current
      watch.index = index
      const turn = ++watch.turn
      const isCurrent = () => watch.turn === turn && !watch.closed
      return using((index) =>
        index.watch(
          { ...watch.spec, seeds: [...watch.members] },
          {
            onChange: (change) => {
              if (!isCurrent()) return
              if (change.first) watch.members.clear()
              for (const id of change.left) watch.members.delete(id)
              for (const { id } of change.entered) watch.members.add(id)
              watch.listener.onChange(change)
            },
            onLost: (error) => {
              if (!isCurrent() || index !== current.index) return
              watches.delete(watch)
              watch.listener.onLost(error)
            }
          }
        )
      ).pipe(
        Effect.flatMap((handle) => {
          if (!isCurrent()) {
            handle.close()
            return Effect.void
          }
          watch.handle = handle
          return index === current.index ? Effect.void : register(watch)
        })
      )
    })

  const watch = (spec: StandingSpec, listener: StandingListener): Effect.Effect<StandingHandle, IndexLost> =>
    Effect.suspend(() => {
      const one: Watch = {
        spec,
        listener,
        members: new Set(spec.seeds),
        index: current.index,
        turn: 0,
        handle: undefined,
        closed: false
      }
      watches.add(one)
      const close = () => {
        one.closed = true
        one.handle?.close()
        watches.delete(one)
      }
      return Effect.as(
        Effect.onError(register(one), () => Effect.sync(close)),
        { close }
      )
    })

  /** Registers all at the form that has taken over. What is lost there has been told so. */
  const moveWatches = Effect.suspend(() =>
    Effect.forEach(
      [...watches].filter((one) => one.index !== current.index),
      (one) =>
        Effect.catch(register(one), (error) =>
          Effect.sync(() => {
            if (watches.delete(one)) one.listener.onLost(error)
          })
        ),
      { concurrency: watchesMovedAtOnce, discard: true }
    )
  )

  const change = <E>(next: NextForm<E>): Effect.Effect<void, E | IndexLost> =>
    gate.withPermit(
      Effect.suspend(() => {
        const mine: Backlog = { segments: [], bytes: 0, to: undefined }
        backlog = mine
        const before = current
        return Effect.gen(function* () {
          const nextScope = yield* Scope.fork(seats)
          yield* Effect.gen(function* () {
            const opened = yield* Scope.provide(next.open, nextScope)
            yield* Stream.runDrain(
              Stream.mapEffect(next.log, ({ bytes }) => opened.apply(bytes), { concurrency: replayAhead })
            )
            yield* catchUp(mine, opened)
            if (opened.lost()) return yield* new IndexLost({ detail: "the next form was lost while it caught up" })
            current = { index: opened, scope: nextScope, waiting: 0, idle: undefined }
          }).pipe(Effect.onError((cause) => Scope.close(nextScope, Exit.failCause(cause))))
        }).pipe(
          Effect.ensuring(Effect.sync(() => (backlog = undefined))),
          Effect.andThen(moveWatches),
          Effect.andThen(whenIdle(before)),
          Effect.andThen(Scope.close(before.scope, Exit.void))
        )
      })
    )

  const resident: ResidentIndex = {
    form: () => current.index.form(),
    lost: () => current.index.lost(),
    apply,
    search: (query) => using((index) => index.search(query)),
    get: (ids) => using((index) => index.get(ids)),
    stats: using((index) => index.stats),
    snapshot: (directory) => gate.withPermit(using((index) => index.snapshot(directory))),
    watch,
    change,
    changing: () => backlog !== undefined,
    inFlight: () => current.waiting
  }
  return resident
})
