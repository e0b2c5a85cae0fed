/**
 * The door in front of searches. So many are under way at once as `ConcurrencyLimit.ts` finds good; the others wait in a short
 * queue, and what would wait too long is refused at once, so that what is admitted keeps its latency and the threads do no
 * work that nobody waits for any more.
 *
 * **The queue** is of controlled delay (CoDel, as in Facebook's "Fail at Scale"). A burst may wait up to
 * `searchQueueBurstMillis`, first come first served. When in all of that time nobody waited less than
 * `searchQueueStandingMillis`, it is no burst but more than can be done: then the queue holds no more than what is answered in
 * `searchQueueMillis` (but `searchQueueMin`), so that nearly all who are refused are refused at the door. That ends when
 * hardly anybody had to be refused for a second. Clients that wait for their answers before they ask again, some dozens of
 * them, are a queue that stands and does not grow: they are all served.
 *
 * Newest first, which that paper adds, is not done: of a queue this short it would leave the oldest to run out of time in it,
 * and a refusal would cost what a search costs before it begins.
 *
 * **Premium** searches are taken first, and where the queue is full one takes the place of the newest that is not.
 *
 * **Deadlines**: a search that cannot be answered within its deadline, by what the queue holds, is refused at once.
 *
 * A wire asks {@link Admission.refusal} before it reads a request's body. `Router` runs every search that asks partitions
 * through {@link Admission.run}; what a cache answers takes no place.
 */
import { Context, Effect, Exit, Layer } from "effect"
import { Settings, type SettingValues } from "../config.ts"
import type { Overloaded } from "../protocol/Errors.ts"
import { VectorIndex } from "../tiers/VectorIndex.ts"
import { ConcurrencyLimit, type Kind } from "./ConcurrencyLimit.ts"
import { LatencyWindow } from "./LatencyWindow.ts"
import { type Asker, overloadedBy, type Refusal, Shedding, type Tier } from "./Shedding.ts"

export interface AdmissionState {
  readonly limit: number
  readonly underWay: number
  readonly waiting: number
  readonly slowdown: number
}

export class Admission extends Context.Service<
  Admission,
  {
    /**
     * Whether a search that comes now is refused, by the level of load or because the queue is full: asked by a wire before it
     * reads the search.
     */
    readonly refusal: (asker: Asker) => Refusal | undefined
    /** Whether anything may be refused now: while not, a wire need not ask. */
    readonly isPressed: () => boolean
    /** Runs a search when its turn comes. `deadlineMillis`: what is left of its deadline. */
    readonly run: <A, E>(
      options: { readonly kind: Kind; readonly tier: Tier; readonly deadlineMillis: number },
      search: Effect.Effect<A, E>
    ) => Effect.Effect<A, E | Overloaded>
    /** Of searches answered in the last seconds, waiting included. */
    readonly latencies: LatencyWindow
    readonly state: () => AdmissionState
  }
>()("ruvector/shards/Admission") {
  static readonly layer = Layer.effect(
    Admission,
    Effect.gen(function* () {
      const settings = yield* Settings
      const shedding = yield* Shedding
      const threads = yield* (yield* VectorIndex).threads
      const door = new Door(settings, shedding, threads.length, () => performance.now())
      yield* Effect.addFinalizer(() => Effect.sync(() => door.close()))
      return Admission.of(door)
    })
  )

  /** With another clock, for so many searches at once. */
  static readonly layerWith = (options: { readonly parallel: number; readonly now: () => number }) =>
    Layer.effect(
      Admission,
      Effect.gen(function* () {
        const door = new Door(yield* Settings, yield* Shedding, options.parallel, options.now)
        yield* Effect.addFinalizer(() => Effect.sync(() => door.close()))
        return Admission.of(door)
      })
    )
}

/** Periods of `loadSampleMillis` whose latencies are remembered. */
const latencyPeriods = 10

/** Longest time to come back that is computed. */
const retryMillisMax = 30_000

/** Over so long it is found out how many are refused for each that is answered. */
const stockMillis = 1_000

/** Fewer refused than one in twenty answered: what is asked can be done. */
const relaxedPressure = 1.05

class Door {
  readonly latencies = new LatencyWindow(latencyPeriods)
  readonly #settings: SettingValues
  readonly #shedding: Shedding["Service"]
  readonly #now: () => number
  readonly #limit: ConcurrencyLimit
  readonly #premium = new Line()
  readonly #standard = new Line()
  /** Whether more is asked than can be done, so that the queue is kept short. */
  #isTight = false
  #leastWait = Number.POSITIVE_INFINITY
  #leastWaitFrom = 0
  #timer: ReturnType<typeof setTimeout> | undefined
  #pressure = 1
  #stockFrom = 0
  #answered = 0
  #refused = 0

  constructor(settings: SettingValues, shedding: Shedding["Service"], parallel: number, now: () => number) {
    this.#settings = settings
    this.#shedding = shedding
    this.#now = now
    this.#limit = new ConcurrencyLimit(
      {
        min: settings.searchLimitMin,
        max: Math.max(settings.searchLimitMin, settings.searchLimitMax),
        initial: Math.min(settings.searchLimitMax, Math.max(settings.searchLimitMin, initialPerThread * parallel)),
        parallel,
        tolerance: settings.searchSlowdownPercent / 100,
        probeMillis: settings.searchProbeMillis
      },
      now()
    )
  }

  readonly refusal = (asker: Asker): Refusal | undefined => {
    const shed = this.#shedding.refusal(asker)
    if (shed !== undefined) return shed
    if (this.#waiting === 0) return undefined
    return this.#isFull(asker.tier) ? this.#refuse("searchQueue") : undefined
  }

  readonly isPressed = (): boolean => this.#waiting > 0 || this.#shedding.level() > 0

  readonly run = <A, E>(
    { kind, tier, deadlineMillis }: { readonly kind: Kind; readonly tier: Tier; readonly deadlineMillis: number },
    search: Effect.Effect<A, E>
  ): Effect.Effect<A, E | Overloaded> =>
    Effect.suspend(() => {
      const ticket = new Ticket(kind, tier, this.#now(), deadlineMillis)
      return Effect.onExit(
        Effect.suspend((): Effect.Effect<A, E | Overloaded> => {
          if (this.#waiting === 0 && this.#limit.hasRoom) {
            this.#admit(ticket, ticket.arrivedAt)
            return search
          }
          const refusal = this.#waitRefusal(ticket)
          if (refusal !== undefined) return Effect.fail(overloadedBy(refusal))
          return Effect.flatMap(this.#wait(ticket), () => search)
        }),
        (exit) => {
          this.#leave(ticket, exit)
          return Effect.void
        }
      )
    })

  readonly state = (): AdmissionState => ({
    limit: this.#limit.limit,
    underWay: this.#limit.inFlight,
    waiting: this.#waiting,
    slowdown: this.#limit.slowdown
  })

  close(): void {
    clearTimeout(this.#timer)
  }

  get #waiting(): number {
    return this.#premium.size + this.#standard.size
  }

  /** Under overload, so many wait at most: what is answered in `searchQueueMillis`, but some in any case. */
  get #room(): number {
    const { searchQueueMax, searchQueueMillis, searchQueueMin } = this.#settings
    const inTime = Math.ceil((this.#limit.perSecond * searchQueueMillis) / 1_000)
    return Math.min(searchQueueMax, Math.max(searchQueueMin, inTime))
  }

  /** And so long: twice what those take, since some take longer than others. */
  get #patienceMillis(): number {
    const { perSecond } = this.#limit
    return Math.max(this.#settings.searchQueueMillis, perSecond === 0 ? 0 : (2_000 * this.#room) / perSecond)
  }

  get #burstMillis(): number {
    return Math.max(this.#settings.searchQueueBurstMillis, 2 * this.#patienceMillis)
  }

  get #standingMillis(): number {
    return Math.max(this.#settings.searchQueueStandingMillis, this.#patienceMillis)
  }

  #isFull(tier: Tier): boolean {
    const room = this.#isTight && this.#limit.perSecond > 0 ? this.#room : this.#settings.searchQueueMax
    return (tier === "premium" ? this.#premium.size : this.#waiting) >= room
  }

  /** Why this search may not wait; where it may, it has a place. */
  #waitRefusal(ticket: Ticket): Refusal | undefined {
    if (this.#isFull(ticket.tier)) return this.#refuse("searchQueue")
    const ahead = ticket.tier === "premium" ? this.#premium.size : this.#waiting
    const rate = this.#limit.perSecond
    const wait = rate === 0 ? 0 : ((ahead + 1) * 1_000) / rate
    if (wait + ticket.kind.aloneMillis > ticket.deadlineMillis) return this.#refuse("deadline_ms")
    return undefined
  }

  #wait(ticket: Ticket): Effect.Effect<void, Overloaded> {
    return Effect.callback((resume) => {
      ticket.resume = resume
      if (ticket.tier === "premium" && this.#isFull("standard")) {
        const displaced = this.#standard.takeLast()
        if (displaced !== undefined) this.#turnAway(displaced)
      }
      ticket.state = "waiting"
      this.#lineOf(ticket).push(ticket)
      this.#watch()
    })
  }

  #lineOf(ticket: Ticket): Line {
    return ticket.tier === "premium" ? this.#premium : this.#standard
  }

  #admit(ticket: Ticket, now: number): void {
    ticket.state = "underWay"
    ticket.beganAt = now
    ticket.wasAlone = this.#limit.begin()
    this.#waited(now - ticket.arrivedAt, now)
  }

  /** One waited so long, until it began or was refused for it. */
  #waited(millis: number, now: number): void {
    if (millis < this.#leastWait) this.#leastWait = millis
    if (now - this.#leastWaitFrom < this.#burstMillis) return
    if (this.#leastWait > this.#standingMillis) this.#isTight = true
    this.#leastWait = Number.POSITIVE_INFINITY
    this.#leastWaitFrom = now
    this.#takeStock(now)
  }

  #takeStock(now: number): void {
    if (now - this.#stockFrom < stockMillis) return
    this.#pressure = 1 + this.#refused / Math.max(1, this.#answered)
    if (this.#pressure < relaxedPressure) this.#isTight = false
    this.#stockFrom = now
    this.#answered = 0
    this.#refused = 0
  }

  #leave(ticket: Ticket, exit: Exit.Exit<unknown, unknown>): void {
    if (ticket.state === "waiting") {
      ticket.state = "gone"
      this.#lineOf(ticket).forget()
      return
    }
    if (ticket.state !== "underWay") return
    ticket.state = "gone"
    const now = this.#now()
    if (Exit.isSuccess(exit)) {
      this.#answered += 1
      this.#limit.end(ticket.kind, ticket.wasAlone, now - ticket.beganAt, now)
      this.latencies.add(now - ticket.arrivedAt)
    } else this.#limit.drop()
    if (this.#waiting > 0) this.#callNext(now)
  }

  /** Those whose turn it is begin; those who waited too long are refused. */
  #callNext(now: number): void {
    while (this.#waiting > 0 && this.#limit.hasRoom) {
      const patience = this.#isTight ? this.#patienceMillis : this.#burstMillis
      const ticket = this.#premium.take() ?? this.#standard.take()
      if (ticket === undefined) return
      const waited = now - ticket.arrivedAt
      if (waited > patience) {
        this.#waited(waited, now)
        this.#turnAway(ticket)
      } else if (waited + ticket.kind.aloneMillis > ticket.deadlineMillis) this.#turnAway(ticket, "deadline_ms")
      else {
        this.#admit(ticket, now)
        ticket.resume?.(Effect.void)
      }
    }
  }

  #turnAway(ticket: Ticket, bound = "searchQueue"): void {
    ticket.state = "gone"
    ticket.resume?.(Effect.fail(overloadedBy(this.#refuse(bound))))
  }

  /** Nobody waits without end, also where nothing that is under way ends. */
  #watch(): void {
    if (this.#timer !== undefined) return
    this.#timer = setTimeout(() => {
      this.#timer = undefined
      const now = this.#now()
      for (const line of [this.#premium, this.#standard]) {
        for (let first = line.first; first !== undefined; first = line.first) {
          if (now - first.arrivedAt <= this.#burstMillis) break
          line.take()
          this.#turnAway(first)
        }
      }
      if (this.#waiting > 0) this.#watch()
    }, this.#burstMillis)
  }

  #refuse(bound: string): Refusal {
    const now = this.#now()
    this.#shedding.count(bound)
    this.#refused += 1
    this.#takeStock(now)
    // All who are refused come back, so the more they are the later they do.
    const millis = Math.min(retryMillisMax, this.#settings.shedRetryMillis * this.#pressure)
    return { bound, retryAfterMillis: this.#shedding.spread(millis) }
  }
}

/** Under way at once for each thread, until it is known better. */
const initialPerThread = 16

class Ticket {
  readonly kind: Kind
  readonly tier: Tier
  readonly arrivedAt: number
  readonly deadlineMillis: number
  state: "new" | "waiting" | "underWay" | "gone" = "new"
  beganAt = 0
  wasAlone = false
  resume: ((effect: Effect.Effect<void, Overloaded>) => void) | undefined = undefined

  constructor(kind: Kind, tier: Tier, arrivedAt: number, deadlineMillis: number) {
    this.kind = kind
    this.tier = tier
    this.arrivedAt = arrivedAt
    this.deadlineMillis = deadlineMillis
  }
}

/** Those who wait, first come first. Who has gone stays where he is until his turn would have come. */
class Line {
  #tickets: Array<Ticket> = []
  #head = 0
  /** How many wait. */
  size = 0

  push(ticket: Ticket): void {
    this.#tickets.push(ticket)
    this.size += 1
  }

  /** One has gone by himself. */
  forget(): void {
    this.size -= 1
  }

  get first(): Ticket | undefined {
    while (this.#head < this.#tickets.length && this.#tickets[this.#head]?.state !== "waiting") this.#skip()
    return this.#tickets[this.#head]
  }

  take(): Ticket | undefined {
    const ticket = this.first
    if (ticket === undefined) return undefined
    this.#skip()
    this.size -= 1
    return ticket
  }

  takeLast(): Ticket | undefined {
    while (this.#tickets.length > this.#head) {
      const ticket = this.#tickets.pop()
      if (ticket?.state !== "waiting") continue
      this.size -= 1
      return ticket
    }
    return undefined
  }

  #skip(): void {
    this.#head += 1
    if (this.#head === this.#tickets.length) {
      this.#tickets.length = 0
      this.#head = 0
    } else if (this.#head >= 1_024 && this.#head * 2 > this.#tickets.length) {
      this.#tickets = this.#tickets.slice(this.#head)
      this.#head = 0
    }
  }
}
