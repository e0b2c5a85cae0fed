/**
 * The main thread's side of one vector thread: numbers what is asked, gathers what is asked in one turn of the event loop
 * into one message, and hands the answers to those who wait. Starts another thread when this one dies.
 */
import { Worker } from "node:worker_threads"
import { Effect, type Scope } from "effect"
import {
  IndexBusy,
  type IndexForm,
  type IndexHits,
  IndexLost,
  type IndexQuery,
  type IndexRecord,
  type IndexSpec,
  type PartitionIndex,
  type SnapshotFiles,
  SnapshotUnreadable,
  type StandingHandle,
  type StandingListener,
  type StandingSpec
} from "../VectorIndex.ts"
import type { Patience } from "./Patience.ts"
import { SearchDesk } from "./SearchDesk.ts"
import { forEachChange } from "./StandingMatches.ts"
import {
  type Answer,
  atWork,
  type Command,
  type FromThread,
  type Hits,
  hitWords,
  isBusy,
  type Matches,
  mustStop,
  type OpenFiles,
  sharedWords,
  type ThreadOptions,
  type ToThread,
  withMetadata,
  withVector
} from "./ThreadMessages.ts"

export interface ThreadClientOptions {
  readonly name: string
  readonly entry: URL
  readonly thread: Omit<ThreadOptions, "shared" | "desk">
  /** Where a search that is alone is waited for: how long that may be, over all threads. */
  readonly patience: Patience | undefined
  /** Searches waiting, at most. */
  readonly pendingMax: number
  readonly heapMegabytes: number | undefined
  /** Called when the thread died of itself; another one is started after the delay. */
  readonly onDeath: (detail: string, delayMillis: number) => void
}

/** One that waits for an answer. */
interface Waiting {
  readonly seat: Seat
  readonly isSearch: boolean
  /** Only of a search. */
  readonly hits: ((hits: IndexHits) => void) | undefined
  readonly answer: (answer: Answer) => void
  readonly lost: (error: IndexLost) => void
}

/** A partition, and why it is there no longer. */
interface Seat {
  readonly number: number
  readonly spec: IndexSpec
  form: IndexForm
  lost: IndexLost | undefined
  /** Told once where the thread dies, or gives the partition up, at work on it. */
  onFault: ((detail: string) => void) | undefined
  /** Standing queries by their number. */
  readonly watches: Map<number, StandingListener>
}

/** All of this process; each is halted before the process ends. */
const clients = new Set<ThreadClient>()
process.on("exit", () => {
  for (const client of clients) client.halt()
})

export class ThreadClient {
  readonly #options: ThreadClientOptions
  readonly #waiting = new Map<number, Waiting>()
  readonly #seats = new Map<number, Seat>()
  #worker: Worker | undefined
  #shared = newShared()
  #desk: SearchDesk | undefined
  #stopped = false
  #restartTimer: NodeJS.Timeout | undefined
  #startedAt = 0
  #deathsInARow = 0
  #lastError: string | undefined
  #nextRequest = 1
  #nextSeat = 1
  #nextWatch = 1
  #searchesWaiting = 0
  #bytes = 0
  #restarts = 0

  // What is asked in this turn.
  #flushing = false
  #searches: Array<{ readonly request: number; readonly seat: Seat; readonly query: IndexQuery }> = []
  #commands: Array<Command> = []
  #cancelled: Array<number> = []

  constructor(options: ThreadClientOptions) {
    this.#options = options
    clients.add(this)
    this.#start()
  }

  get partitions(): number {
    return this.#seats.size
  }

  get bytes(): number {
    return this.#bytes
  }

  /** Times that the thread died and was replaced. */
  get restarts(): number {
    return this.#restarts
  }

  /** How much the thread has, to compare threads by. */
  get load(): number {
    return (
      this.#bytes + this.#seats.size * partitionBytesAssumed + (this.#worker === undefined ? Number.MAX_VALUE / 2 : 0)
    )
  }

  open(
    spec: IndexSpec,
    snapshot: OpenFiles | undefined,
    onFault?: (detail: string) => void
  ): Effect.Effect<PartitionIndex, IndexLost | SnapshotUnreadable, Scope.Scope> {
    return Effect.flatMap(
      Effect.acquireRelease(
        Effect.sync(() => this.#takeSeat(spec, onFault)),
        (seat) => Effect.sync(() => this.#leaveSeat(seat))
      ),
      (seat) =>
        Effect.as(
          this.#ask<void, SnapshotUnreadable>(
            seat,
            (request) => ({ kind: "open", request, partition: seat.number, spec, snapshot }),
            (answer) => (answer.kind === "opened" ? Effect.void : unexpected(answer))
          ),
          this.#partitionIndex(seat)
        )
    )
  }

  collect(): void {
    this.#post({ collect: true })
  }

  /** Ends the thread; everything asked of it fails. */
  async stop(): Promise<void> {
    this.#stopped = true
    clearTimeout(this.#restartTimer)
    this.#lose("the vector threads are stopped")
    const worker = this.#worker
    if (worker !== undefined) {
      const ended = new Promise<void>((resolve) => worker.once("exit", () => resolve()))
      this.#post(stopMessage)
      const timer = setTimeout(() => void worker.terminate(), stopMillisMax)
      await ended
      clearTimeout(timer)
    }
    clients.delete(this)
  }

  /**
   * Waits until the thread has left native code for good: the process is ending, and ends by SIGABRT where Node ends a
   * thread in there.
   */
  halt(): void {
    Atomics.store(this.#shared, mustStop, 1)
    Atomics.wait(this.#shared, isBusy, 1, haltMillisMax)
  }

  #partitionIndex(seat: Seat): PartitionIndex {
    const partition = seat.number
    return {
      form: () => seat.form,
      lost: () => seat.lost !== undefined,
      search: (query) => this.#search(seat, query),
      apply: (segment) =>
        Effect.suspend(() => {
          // A copy that can be given away: cloning a view would clone all of the buffer that it looks at.
          const copy = segment.slice()
          return this.#ask(
            seat,
            (request) => ({ kind: "apply", request, partition, segment: copy }),
            (answer) => (answer.kind === "applied" ? Effect.succeed({ effects: answer.effects }) : unexpected(answer))
          )
        }),
      get: (ids) =>
        this.#ask(
          seat,
          (request) => ({ kind: "get", request, partition, ids }),
          (answer) =>
            answer.kind === "records"
              ? Effect.succeed(recordsOf(ids, answer, seat.spec.dimensions))
              : unexpected(answer)
        ),
      stats: this.#ask(
        seat,
        (request) => ({ kind: "stats", request, partition }),
        (answer) => (answer.kind === "stats" ? Effect.succeed(answer.stats) : unexpected(answer))
      ),
      snapshot: (directory) =>
        this.#ask<SnapshotFiles, SnapshotUnreadable>(
          seat,
          (request) => ({ kind: "snapshot", request, partition, directory }),
          (answer) => (answer.kind === "written" ? Effect.succeed(answer.files) : unexpected(answer))
        ),
      watch: (spec, listener) => this.#watch(seat, spec, listener)
    }
  }

  #watch(seat: Seat, spec: StandingSpec, listener: StandingListener): Effect.Effect<StandingHandle, IndexLost> {
    return Effect.suspend(() => {
      const watch = this.#nextWatch++
      const { vector, k, ef, minScore, filter, includeMetadata, includeVector, seeds } = spec
      const flags = (includeMetadata ? withMetadata : 0) | (includeVector ? withVector : 0)
      const partition = seat.number
      const close = () => {
        if (!seat.watches.delete(watch) || seat.lost !== undefined) return
        this.#commands.push({ kind: "unwatch", request: this.#nextRequest++, partition, watch })
        this.#schedule()
      }
      return this.#ask<StandingHandle>(
        seat,
        (request) => ({ kind: "watch", request, partition, watch, vector, k, ef, minScore, filter, flags, seeds }),
        (answer) => {
          if (answer.kind !== "watched") return unexpected(answer)
          seat.watches.set(watch, listener)
          const { matches } = answer
          if (matches === undefined) listener.onChange({ first: true, seq: 0, held: false, left: [], entered: [] })
          else forEachChange(matches, seat.spec.dimensions, true, (_, change) => listener.onChange(change))
          return Effect.succeed({ close })
        }
      ).pipe(
        // Nobody waits for it any more, but it may be there by then.
        Effect.onInterrupt(() =>
          Effect.sync(() => {
            seat.watches.set(watch, listener)
            close()
          })
        )
      )
    })
  }

  #receiveMatches(partition: number, matches: Matches): void {
    const seat = this.#seats.get(partition)
    if (seat === undefined) return
    const { watches, spec } = seat
    forEachChange(matches, spec.dimensions, false, (watch, change) => watches.get(watch)?.onChange(change))
  }

  #search(seat: Seat, query: IndexQuery): Effect.Effect<IndexHits, IndexLost | IndexBusy> {
    return Effect.callback<IndexHits, IndexLost | IndexBusy>((resume) => {
      if (seat.lost !== undefined) return resume(Effect.fail(seat.lost))
      if (this.#searchesWaiting >= this.#options.pendingMax) {
        return resume(Effect.fail(new IndexBusy({ bound: "threadPendingMax" })))
      }
      const request = this.#nextRequest++
      this.#searchesWaiting += 1
      this.#waiting.set(request, {
        seat,
        isSearch: true,
        hits: (hits) => resume(Effect.succeed(hits)),
        answer: (answer) => resume(failureOf(answer) as Effect.Effect<never, IndexLost>),
        lost: (error) => resume(Effect.fail(error))
      })
      if (!this.#waited(request, seat, query)) {
        this.#searches.push({ request, seat, query })
        this.#schedule()
      }
      return Effect.sync(() => this.#forget(request))
    })
  }

  #ask<A, E = never>(
    seat: Seat,
    command: (request: number) => Command,
    answered: (answer: Answer) => Effect.Effect<A, E>
  ): Effect.Effect<A, E | IndexLost> {
    return Effect.callback<A, E | IndexLost>((resume) => {
      if (seat.lost !== undefined) return resume(Effect.fail(seat.lost))
      const request = this.#nextRequest++
      this.#waiting.set(request, {
        seat,
        isSearch: false,
        hits: undefined,
        answer: (answer) =>
          resume(
            answer.kind === "failed" ? (failureOf(answer) as Effect.Effect<never, E | IndexLost>) : answered(answer)
          ),
        lost: (error) => resume(Effect.fail(error))
      })
      this.#commands.push(command(request))
      this.#schedule()
      return Effect.sync(() => void this.#waiting.delete(request))
    })
  }

  /** Nobody waits for this search any more: it is not begun, where it has not been yet. */
  #forget(request: number): void {
    if (!this.#waiting.delete(request)) return
    this.#searchesWaiting -= 1
    this.#cancelled.push(request)
    this.#schedule()
  }

  #takeSeat(spec: IndexSpec, onFault: ((detail: string) => void) | undefined): Seat {
    const seat: Seat = {
      number: this.#nextSeat++,
      spec,
      form: "full",
      lost: this.#stopped ? new IndexLost({ detail: "the vector threads are stopped" }) : undefined,
      onFault,
      watches: new Map()
    }
    if (!this.#stopped) this.#seats.set(seat.number, seat)
    return seat
  }

  #leaveSeat(seat: Seat): void {
    if (!this.#seats.delete(seat.number)) return
    this.#loseSeat(seat, new IndexLost({ detail: "the partition is closed" }))
    this.#commands.push({ kind: "close", partition: seat.number })
    this.#schedule()
  }

  #loseSeat(seat: Seat, error: IndexLost): void {
    seat.lost ??= error
    tellLost(seat)
    for (const [request, waiting] of this.#waiting) {
      if (waiting.seat !== seat) continue
      this.#settle(request, waiting)
      waiting.lost(error)
    }
  }

  #settle(request: number, waiting: Waiting): void {
    this.#waiting.delete(request)
    if (waiting.isSearch) this.#searchesWaiting -= 1
  }

  /** Everything that the thread had is gone. */
  #lose(detail: string): void {
    const error = new IndexLost({ detail })
    const seats = [...this.#seats.values()]
    for (const seat of seats) seat.lost = error
    this.#seats.clear()
    this.#searches = []
    this.#commands = []
    this.#cancelled = []
    this.#searchesWaiting = 0
    this.#bytes = 0
    const waiting = [...this.#waiting.values()]
    this.#waiting.clear()
    for (const one of waiting) one.lost(error)
    for (const seat of seats) tellLost(seat)
  }

  // --- The thread ------------------------------------------------------------------------------------------------------

  #start(): void {
    const { entry, name, thread, heapMegabytes } = this.#options
    // A thread's garbage is messages, gone at once: a small young generation keeps as much, in less memory.
    const resourceLimits = {
      maxYoungGenerationSizeMb: youngGenerationMegabytes,
      ...(heapMegabytes === undefined ? {} : { maxOldGenerationSizeMb: heapMegabytes })
    }
    this.#shared = newShared()
    this.#desk = this.#options.patience === undefined ? undefined : new SearchDesk()
    const workerData: ThreadOptions = { ...thread, shared: this.#shared, desk: this.#desk?.memory }
    // Flags of a program that embeds the engine (`--input-type`, loaders) are not for its threads.
    const worker = new Worker(entry, { name, workerData, resourceLimits, execArgv: [] })
    this.#worker = worker
    this.#startedAt = performance.now()
    this.#lastError = undefined
    worker.on("message", (message: FromThread) => this.#receive(message))
    worker.on("error", (error: unknown) => {
      this.#lastError = error instanceof Error ? error.message : String(error)
    })
    worker.on("messageerror", (error) => {
      this.#lastError = error.message
      worker.postMessage(stopMessage)
    })
    worker.once("exit", (code) => this.#died(this.#lastError ?? `it ended with code ${code}`))
    this.#schedule()
  }

  #died(detail: string): void {
    this.#worker = undefined
    if (this.#stopped) return
    const worked = this.#seats.get(Atomics.load(this.#shared, atWork))
    if (worked !== undefined) blame(worked, `its vector thread died at work on it: ${detail}`)
    if (performance.now() - this.#startedAt > calmMillis) this.#deathsInARow = 0
    this.#deathsInARow += 1
    this.#restarts += 1
    const delayMillis =
      this.#deathsInARow === 1
        ? 0
        : Math.min(restartDelayMillisMin * 2 ** (this.#deathsInARow - 2), restartDelayMillisMax)
    this.#lose(`its vector thread died: ${detail}`)
    this.#options.onDeath(detail, delayMillis)
    if (delayMillis === 0) this.#start()
    else this.#restartTimer = setTimeout(() => this.#start(), delayMillis)
  }

  // --- Messages --------------------------------------------------------------------------------------------------------

  #schedule(): void {
    if (this.#flushing) return
    this.#flushing = true
    setImmediate(() => this.#flush())
  }

  /**
   * Waits for a search at the desk, where nothing else is asked of the thread and it has nothing long to do. False where it has
   * to be sent; else it is answered by now, or will be by a message.
   */
  #waited(request: number, seat: Seat, query: IndexQuery): boolean {
    const { patience } = this.#options
    const desk = this.#desk
    if (desk === undefined || patience === undefined || this.#worker === undefined) return false
    if (this.#flushing || this.#waiting.size > 1 || desk.isEngaged) return false
    const millis = patience.left
    if (millis === 0 || !desk.ask(request, seat.number, query)) return false
    const started = performance.now()
    if (!desk.ring()) this.#worker.postMessage(callMessage)
    const hits = desk.wait(millis)
    patience.spent(performance.now() - started)
    const waiting = this.#waiting.get(request)
    if (hits !== undefined && waiting !== undefined) {
      this.#settle(request, waiting)
      waiting.hits?.(hits)
    }
    return true
  }

  #post(message: ToThread, transfer: ReadonlyArray<ArrayBuffer> = []): void {
    this.#worker?.postMessage(message, transfer)
    this.#desk?.ring()
  }

  #flush(): void {
    this.#flushing = false
    // What is asked while no thread is there waits for the next one.
    if (this.#worker === undefined) return
    const message: { -readonly [Key in keyof ToThread]: ToThread[Key] } = {}
    const transfer: Array<ArrayBuffer> = []
    if (this.#searches.length > 0) {
      const head: Array<number> = []
      const filters: Array<string> = []
      const asked = this.#searches
      this.#searches = []
      let components = 0
      for (const { query } of asked) components += query.vector.length
      const vectors = new Float32Array(components)
      let at = 0
      for (const { request, seat, query } of asked) {
        // Interrupted in the same turn.
        if (!this.#waiting.has(request)) continue
        const flags = (query.includeMetadata ? withMetadata : 0) | (query.includeVector ? withVector : 0)
        const filter = query.filter === undefined ? -1 : filters.push(query.filter) - 1
        head.push(request, seat.number, query.k, query.ef, flags, filter, query.vector.length)
        vectors.set(query.vector, at)
        at += query.vector.length
      }
      message.searches = { head, filters, vectors }
    }
    if (this.#commands.length > 0) {
      message.commands = this.#commands
      for (const command of this.#commands) {
        if (command.kind === "apply") transfer.push(command.segment.buffer as ArrayBuffer)
      }
      this.#commands = []
    }
    if (this.#cancelled.length > 0) {
      message.cancelled = this.#cancelled
      this.#cancelled = []
    }
    if (message.searches === undefined && message.commands === undefined && message.cancelled === undefined) return
    this.#post(message, transfer)
  }

  #receive(message: FromThread): void {
    if (message.bytes !== undefined) this.#bytes = message.bytes
    if (message.hits !== undefined) this.#receiveHits(message.hits)
    if (message.answers !== undefined) for (const answer of message.answers) this.#receiveAnswer(answer)
  }

  #receiveHits({ head, ids, scores, metadata, vectors }: Hits): void {
    let at = 0
    let metadataAt = 0
    let vectorsAt = 0
    for (let i = 0; i < head.length; i += hitWords) {
      const request = head[i]!
      const count = head[i + 1]!
      const flags = head[i + 2]!
      const components = (flags & withVector) === 0 ? 0 : count * head[i + 3]!
      const texts = (flags & withMetadata) === 0 ? 0 : count
      const waiting = this.#waiting.get(request)
      if (waiting !== undefined) {
        this.#settle(request, waiting)
        waiting.hits?.({
          ids: ids.slice(at, at + count),
          scores: scores.subarray(at, at + count),
          metadata: (flags & withMetadata) === 0 ? undefined : metadata.slice(metadataAt, metadataAt + texts),
          vectors: (flags & withVector) === 0 ? undefined : vectors.subarray(vectorsAt, vectorsAt + components)
        })
      }
      at += count
      metadataAt += texts
      vectorsAt += components
    }
  }

  #receiveAnswer(answer: Answer): void {
    if (answer.kind === "matched") return this.#receiveMatches(answer.partition, answer.matches)
    if (answer.kind === "gone") return this.#gone(this.#seats.get(answer.partition), answer.detail)
    const waiting = this.#waiting.get(answer.request)
    if (waiting === undefined) return
    if (answer.kind === "failed" && answer.reason === "lost") this.#gone(waiting.seat, answer.detail)
    if (answer.kind === "opened" || answer.kind === "written") waiting.seat.form = answer.form
    this.#settle(answer.request, waiting)
    waiting.answer(answer)
  }

  #gone(seat: Seat | undefined, detail: string): void {
    if (seat === undefined) return
    if (this.#seats.delete(seat.number)) blame(seat, detail)
    seat.lost ??= new IndexLost({ detail })
    tellLost(seat)
  }
}

/** Tells those who stand at a lost partition. */
const tellLost = ({ watches, lost }: Seat): void => {
  const listeners = [...watches.values()]
  watches.clear()
  if (lost !== undefined) for (const { onLost } of listeners) onLost(lost)
}

const blame = (seat: Seat, detail: string): void => {
  seat.onFault?.(detail)
  seat.onFault = undefined
}

const newShared = () => new Int32Array(new SharedArrayBuffer(sharedWords * Int32Array.BYTES_PER_ELEMENT))

const stopMessage: ToThread = { stop: true }

/** Says that somebody waits at the desk. */
const callMessage: ToThread = {}

/** Memory that a partition is taken to need before the thread has said what it does. */
const partitionBytesAssumed = 16 << 20

/** Wait before a thread that keeps dying is started again; the first time there is none. */
const restartDelayMillisMin = 100
const restartDelayMillisMax = 5_000

/** Of a thread's JavaScript heap; vectors and graphs are outside of it. */
const youngGenerationMegabytes = 8

/** Wait for a thread to end by itself, which it does after its current step and file. */
const stopMillisMax = 10_000

/** Wait for a thread to leave native code when the process ends without stopping it. */
const haltMillisMax = 2_000

/** A thread that lived so long had not been dying. */
const calmMillis = 60_000

const failureOf = (answer: Answer): Effect.Effect<never, IndexLost | SnapshotUnreadable> => {
  if (answer.kind !== "failed") return unexpected(answer)
  const { reason, detail } = answer
  switch (reason) {
    case "lost":
      return Effect.fail(new IndexLost({ detail }))
    case "unreadable":
      return Effect.fail(new SnapshotUnreadable({ detail }))
    case "refused":
      return Effect.die(new Error(`The vector thread refused: ${detail}`))
  }
}

const unexpected = (answer: Answer): Effect.Effect<never> => Effect.die(new Error(`an answer of kind ${answer.kind}`))

const recordsOf = (
  ids: ReadonlyArray<string>,
  answer: Answer & { readonly kind: "records" },
  dimensions: number
): ReadonlyArray<IndexRecord | undefined> => {
  const { there, metadata, times, counters, regions, vectors } = answer
  let at = 0
  return ids.map((id, i) => {
    if (there[i] !== true) return undefined
    const record: IndexRecord = {
      id,
      vector: vectors.slice(at * dimensions, (at + 1) * dimensions),
      metadata: metadata[at]!,
      version: { time: times[at]!, region: regions[at]!, counter: counters[at]! }
    }
    at += 1
    return record
  })
}
