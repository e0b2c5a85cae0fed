/**
 * The door in front of searches. So many are under way at once as `ConcurrencyLimit.ts` finds good; the others wait in a short
 * queue, and what would wait too long is refused at once, so that what is admitted keeps its latency and the threads do no
 * work that nobody waits for any more.
 *
 * **Sources** (a connection, or a principal with all of its) have turns, as `FairLine.ts` says: one that sends thousands at
 * once waits for itself. Where the queue is full, the newest of the source that has most waiting makes room for one that has
 * less, so that nobody is refused for another's backlog. A search counts as one, whatever it costs: what it will is not known.
 * As CoDel never drops the last packet of a queue, the only search that a source has waiting is not refused for having waited:
 * it waits for a turn of each other source, unless those alone are more than the queue is to hold.
 *
 * **The queue** is of controlled delay (CoDel, as in Facebook's "Fail at Scale"). A burst may wait up to
 * `searchQueueBurstMillis`, of a source first come first served. When in all of that time never less waited than is answered
 * in `searchQueueStandingMillis`, it is no burst but more than can be done (how long one waited does not say it: a source
 * that has little waits little, however much the others have): then the queue holds no more than what is answered in
 * `searchQueueMillis` (but `searchQueueMin`), so that nearly all who are refused are refused at the door. That ends when
 * hardly anybody had to be refused for a second. Clients that wait for their answers before they ask again, some dozens of
 * them, are a queue that stands and does not grow: they are all served.
 *
 * Newest first, which that paper adds, is not done: of a queue this short it would leave the oldest to run out of time in it,
 * and a refusal would cost what a search costs before it begins.
 *
 * **Premium** searches are taken first, and where the queue is full one takes the place of one that is not.
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
import { FairLine, type Waiter } from "./FairLine.ts"
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
     * reads the search. All that name no source are one.
     */
    readonly refusal: (asker: Asker, source?: string) => Refusal | undefined
    /** Whether anything may be refused now: while not, a wire need not ask. */
    readonly isPressed: () => boolean
    /** Runs a search when its turn comes. `deadlineMillis`: what is left of its deadline. */
    readonly run: <A, E>(
      options: {
        readonly kind: Kind
        readonly tier: Tier
        readonly source?: string | undefined
        readonly deadlineMillis: number
      },
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
      const parallel = threads.length === 0 ? parallelElsewhere : threads.length
      const door = new Door(settings, shedding, parallel, () => performance.now())
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

/** A process without threads of its own sends its searches to others': so many may be under way as if each were alone. */
const parallelElsewhere = 8

/** Periods of `loadSampleMillis` whose latencies are remembered. */
const latencyPeriods = 10

/** Longest time to come back that is computed. */
const retryMillisMax = 30_000

/** Over so long it is found out how many are refused for each that is answered. */
const stockMillis = 1_000

/** And at most over so long: searches that were not asked for a while are none that could have been answered since. */
const stockMillisMax = 2_000

/** Fewer refused than one in twenty answered: what is asked can be done. */
const relaxedShare = 0.05

class Door {
  readonly latencies = new LatencyWindow(latencyPeriods)
  readonly #settings: SettingValues
  readonly #shedding: Shedding["Service"]
  readonly #now: () => number
  readonly #limit: ConcurrencyLimit
  readonly #premium = new FairLine<Ticket>()
  readonly #standard = new FairLine<Ticket>()
  /** Whether more is asked than can be done, so that the queue is kept short. */
  #isTight = false
  /** The fewest that waited since. */
  #leastWaiting = Number.POSITIVE_INFINITY
  #leastWaitingFrom = 0
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

  readonly refusal = (asker: Asker, source = noSource): Refusal | undefined => {
    const shed = this.#shedding.refusal(asker)
    if (shed !== undefined) return shed
    if (this.#waiting === 0) return undefined
    return this.#hasPlace(asker.tier, source) ? undefined : this.#refuse("searchQueue")
  }

  readonly isPressed = (): boolean => this.#shedding.level() > 0 || (this.#waiting > 0 && this.#isFull("standard"))

  readonly run = <A, E>(
    {
      kind,
      tier,
      source = noSource,
      deadlineMillis
    }: {
      readonly kind: Kind
      readonly tier: Tier
      readonly source?: string | undefined
      readonly deadlineMillis: number
    },
    search: Effect.Effect<A, E>
  ): Effect.Effect<A, E | Overloaded> =>
    Effect.suspend(() => {
      const ticket = new Ticket(kind, tier, source, this.#now(), deadlineMillis)
      // What it takes it gives back, whenever it is interrupted: so that is set up first.
      return Effect.onExitPrimitive(
        Effect.suspend((): Effect.Effect<A, E | Overloaded> => {
          if (this.#waiting === 0 && this.#limit.hasRoom) {
            this.#admit(ticket, ticket.arrivedAt)
            this.#look(ticket.arrivedAt)
            return search
          }
          const refusal = this.#waitRefusal(ticket)
          if (refusal !== undefined) return Effect.fail(overloadedBy(refusal))
          return Effect.flatMap(this.#wait(ticket), () => search)
        }),
        (exit) => this.#leave(ticket, exit)
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
    // Who would be under way, were it not for a look at what searches take alone, waits instead.
    return Math.min(searchQueueMax, Math.max(searchQueueMin, inTime) + this.#limit.withheld)
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

  /** Whether the queue is kept short: as long as it is not known how much is answered, it cannot be said how short. */
  get #isShort(): boolean {
    return this.#isTight && this.#limit.perSecond > 0
  }

  #isFull(tier: Tier): boolean {
    const room = this.#isShort ? this.#room : this.#settings.searchQueueMax
    return (tier === "premium" ? this.#premium.size : this.#waiting) >= room
  }

  /** Whether there is room, or another source has to make some. */
  #hasPlace(tier: Tier, source: string): boolean {
    return !this.#isFull(tier) || this.#lineOf(tier).yieldsTo(source)
  }

  /** Why this search may not wait; where it may, it has a place. */
  #waitRefusal(ticket: Ticket): Refusal | undefined {
    const { source, tier } = ticket
    if (!this.#hasPlace(tier, source)) return this.#refuse("searchQueue")
    const ahead = this.#lineOf(tier).ahead(source) + (tier === "premium" ? 0 : this.#premium.size)
    const rate = this.#limit.perSecond
    const wait = rate === 0 ? 0 : ((ahead + 1) * 1_000) / rate
    if (this.#limit.isSettled && wait + ticket.kind.aloneMillis > ticket.deadlineMillis)
      return this.#refuse("deadline_ms")
    return undefined
  }

  #wait(ticket: Ticket): Effect.Effect<void, Overloaded> {
    return Effect.callback((resume) => {
      ticket.resume = resume
      const displaced = this.#displaced(ticket.tier)
      if (displaced !== undefined) this.#turnAway(displaced)
      ticket.state = "waiting"
      this.#lineOf(ticket.tier).push(ticket)
      this.#watch()
    })
  }

  /** Who goes, so that there is room for one more of this tier. */
  #displaced(tier: Tier): Ticket | undefined {
    if (this.#isFull(tier)) return this.#lineOf(tier).takeOfLongest()
    return this.#isFull("standard") ? this.#standard.takeOfLongest() : undefined
  }

  #lineOf(tier: Tier): FairLine<Ticket> {
    return tier === "premium" ? this.#premium : this.#standard
  }

  #admit(ticket: Ticket, now: number): void {
    ticket.state = "underWay"
    ticket.beganAt = now
    ticket.wasAlone = this.#limit.begin()
  }

  /** Looks at how many wait, with each that begins. */
  #look(now: number): void {
    if (this.#waiting < this.#leastWaiting) this.#leastWaiting = this.#waiting
    if (now - this.#leastWaitingFrom < this.#burstMillis) return
    const { perSecond } = this.#limit
    if (perSecond > 0 && (this.#leastWaiting * 1_000) / perSecond > this.#standingMillis) this.#isTight = true
    this.#leastWaiting = Number.POSITIVE_INFINITY
    this.#leastWaitingFrom = now
    this.#takeStock(now)
  }

  #takeStock(now: number): void {
    const millis = now - this.#stockFrom
    if (millis < stockMillis) return
    if (this.#refused < relaxedShare * Math.max(1, this.#answered)) this.#isTight = false
    // Where many come at once little is answered while they are refused: that says nothing of how much will be.
    const canBe = (this.#limit.perSecond * Math.min(millis, stockMillisMax)) / 1_000
    this.#pressure = 1 + this.#refused / Math.max(1, this.#answered, canBe)
    this.#stockFrom = now
    this.#answered = 0
    this.#refused = 0
  }

  #leave(ticket: Ticket, exit: Exit.Exit<unknown, unknown>): undefined {
    const { state } = ticket
    ticket.state = "gone"
    if (state === "waiting") this.#lineOf(ticket.tier).remove(ticket)
    if (state !== "underWay") return
    const now = this.#now()
    if (Exit.isSuccess(exit)) {
      this.#answered += 1
      this.#limit.end(ticket.kind, ticket.wasAlone, now - ticket.beganAt, now)
      this.latencies.add(now - ticket.arrivedAt)
    } else this.#limit.drop()
    if (this.#waiting > 0) this.#callNext(now)
  }

  /** Those whose turn it is begin; those who waited too long are refused, which does not use up their source's turn. */
  #callNext(now: number): void {
    while (this.#waiting > 0 && this.#limit.hasRoom) {
      const patience = this.#isShort ? this.#patienceMillis : this.#burstMillis
      const line = this.#premium.size > 0 ? this.#premium : this.#standard
      const ticket = line.take()
      if (ticket === undefined) return
      const waited = now - ticket.arrivedAt
      this.#look(now)
      if (waited > patience && !this.#isSpared(line, line.sizeOf(ticket.source))) this.#turnAway(ticket)
      else if (waited + ticket.kind.aloneMillis > ticket.deadlineMillis) this.#turnAway(ticket, "deadline_ms")
      else {
        line.turnIsOver(ticket.source)
        this.#admit(ticket, now)
        ticket.resume?.(Effect.void)
      }
    }
  }

  /** Whether one is not refused for how long it waited, of a source that has so many others waiting. */
  #isSpared(line: FairLine<Ticket>, others: number): boolean {
    return others === 0 && line.sources <= this.#room
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
        for (const ticket of line.over(({ arrivedAt }) => now - arrivedAt > this.#burstMillis)) {
          // What one's refusal led to may have ended another.
          if (ticket.state !== "waiting") continue
          const isInTime = now - ticket.arrivedAt <= ticket.deadlineMillis
          if (isInTime && this.#isSpared(line, line.sizeOf(ticket.source) - 1)) continue
          line.remove(ticket)
          this.#turnAway(ticket, isInTime ? "searchQueue" : "deadline_ms")
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

/** Of searches that nobody says where they come from. */
const noSource = ""

class Ticket implements Waiter<Ticket> {
  readonly kind: Kind
  readonly tier: Tier
  readonly source: string
  readonly arrivedAt: number
  readonly deadlineMillis: number
  older: Ticket | undefined = undefined
  newer: Ticket | undefined = undefined
  state: "new" | "waiting" | "underWay" | "gone" = "new"
  beganAt = 0
  wasAlone = false
  resume: ((effect: Effect.Effect<void, Overloaded>) => void) | undefined = undefined

  constructor(kind: Kind, tier: Tier, source: string, arrivedAt: number, deadlineMillis: number) {
    this.kind = kind
    this.tier = tier
    this.source = source
    this.arrivedAt = arrivedAt
    this.deadlineMillis = deadlineMillis
  }
}
