/**
 * How many searches are under way at once, found out from how long they take.
 *
 * **The gradient** is Envoy's (adaptive concurrency filter, gradient controller), which is a child of Netflix's
 * `Gradient`: at the end of each window `limit = limit x gradient + sqrt(limit)`, where `gradient` is what a search takes when
 * it has the threads to itself, times a tolerance, over what it took in the window. The square root is a queue that keeps the
 * threads busy. With few searches under way the limit stays as it is: nothing was learnt about more.
 *
 * **The measure** differs from theirs, because searches differ: one of many candidates behind a filter takes a hundred times
 * what another does. So what counts is not a latency but a {@link slowdown}: each search is compared with searches of its own
 * {@link Kind}, and a change in what is asked does not look like congestion.
 *
 * **What it takes alone** is learnt from searches that began while no more were under way than there are threads. Where there
 * are none for a while because the limit is always reached, the limit is lowered to that number for a moment (Envoy's minRTT
 * window), some ten searches long.
 */

/** What searches of one kind take alone, in milliseconds; 0: not known. */
export interface Kind {
  aloneMillis: number
}

export interface ConcurrencyOptions {
  readonly min: number
  readonly max: number
  readonly initial: number
  /** Searches that can be carried out at once. */
  readonly parallel: number
  /** How many times longer than alone a search may take before the limit is lowered. */
  readonly tolerance: number
  /** Between two times that it is found out what searches take alone, where it does not show by itself. */
  readonly probeMillis: number
}

/** A window ends after so long and so many searches, or when nothing ended for a while. */
const windowMillis = 100
const windowSamples = 16
const windowsToSettle = 2

/** The limit is at most halved in one window. */
const gradientMin = 0.5
/** And moves this share of the way. */
const smoothing = 0.5

/** What searches take alone falls quickly and rises slowly: about the tenth percentile, since noise only adds. */
const fallShare = 1 / 8
const riseShare = 1 / 64

const probeSamples = 10

/** No search is taken to be quicker. */
const meanMillisMin = 0.01
/** Searches that never end do not keep the limit low. */
const probeMillisMax = 1_000

export class ConcurrencyLimit {
  readonly #options: ConcurrencyOptions
  #limit: number
  #inFlight = 0
  #windowFrom: number
  #peak = 0
  #samples = 0
  #slowdowns = 0
  #millis = 0
  #slowdown = 1
  #meanMillis = 0
  #perSecond = 0
  #windows = 0
  #aloneAt: number
  #probeFrom = 0
  #probed = 0

  constructor(options: ConcurrencyOptions, nowMillis: number) {
    this.#options = options
    this.#limit = options.initial
    this.#windowFrom = nowMillis
    this.#aloneAt = nowMillis
  }

  get limit(): number {
    return this.#probeFrom === 0 ? Math.floor(this.#limit) : Math.min(this.#options.parallel, Math.floor(this.#limit))
  }

  /** How many would be under way besides, were it not being found out what they take alone. */
  get withheld(): number {
    return Math.max(0, Math.floor(this.#limit) - Math.max(this.limit, this.#inFlight))
  }

  get inFlight(): number {
    return this.#inFlight
  }

  /** How many times longer searches took in the last window than alone. */
  get slowdown(): number {
    return this.#slowdown
  }

  /** Mean time under way in the last window. */
  get meanMillis(): number {
    return this.#meanMillis
  }

  /** Searches that can be answered each second, by the last window: as were, or as would be one by one; 0 before it. */
  get perSecond(): number {
    return this.#perSecond
  }

  /** Whether it is known by now how quick searches are: the first ones of a thread that has just begun are not. */
  get isSettled(): boolean {
    return this.#windows >= windowsToSettle
  }

  get hasRoom(): boolean {
    return this.#inFlight < this.limit
  }

  /** One more is under way. Answers whether it began with the threads to itself. */
  begin(): boolean {
    this.#inFlight += 1
    if (this.#inFlight > this.#peak) this.#peak = this.#inFlight
    return this.#inFlight <= this.#options.parallel
  }

  /** It ended without having been answered. */
  drop(): void {
    this.#inFlight -= 1
  }

  /** It was answered. */
  end(kind: Kind, wasAlone: boolean, millis: number, nowMillis: number): void {
    this.#inFlight -= 1
    const alone = kind.aloneMillis
    // A clock may not have moved meanwhile: 0 would be not known, and nothing can be compared with it.
    if (alone === 0) kind.aloneMillis = Math.max(millis, meanMillisMin)
    else if (wasAlone || millis < alone) {
      kind.aloneMillis = alone + (millis - alone) * (millis < alone ? fallShare : riseShare)
    }
    if (wasAlone) this.#alone(nowMillis)
    this.#samples += 1
    this.#slowdowns += millis / kind.aloneMillis
    this.#millis += millis
    if (nowMillis - this.#windowFrom >= windowMillis && this.#samples >= windowSamples) this.#next(nowMillis)
  }

  #alone(nowMillis: number): void {
    if (this.#probeFrom === 0) {
      this.#aloneAt = nowMillis
      return
    }
    this.#probed += 1
    if (this.#probed >= probeSamples) this.#endProbe(nowMillis)
  }

  #endProbe(nowMillis: number): void {
    this.#probeFrom = 0
    this.#aloneAt = nowMillis
    this.#open(nowMillis)
  }

  #open(nowMillis: number): void {
    this.#windowFrom = nowMillis
    this.#samples = 0
    this.#slowdowns = 0
    this.#millis = 0
    this.#peak = this.#inFlight
  }

  #next(nowMillis: number): void {
    const { min, max, tolerance, probeMillis } = this.#options
    this.#windows += 1
    this.#meanMillis = this.#millis / this.#samples
    // Where little was asked little was answered: that says nothing of how much can be.
    const ended = (this.#samples * 1_000) / (nowMillis - this.#windowFrom)
    this.#perSecond = Math.max(ended, (this.#options.parallel * 1_000) / Math.max(this.#meanMillis, meanMillisMin))
    if (this.#probeFrom !== 0) {
      if (nowMillis - this.#probeFrom > probeMillisMax) this.#endProbe(nowMillis)
      return this.#open(nowMillis)
    }
    this.#slowdown = Math.max(1, this.#slowdowns / this.#samples)
    const gradient = Math.max(gradientMin, Math.min(1, tolerance / this.#slowdown))
    // Below half of the limit nothing is learnt about more; that less would be better is.
    if (gradient < 1 || this.#peak >= this.#limit / 2) {
      const next = this.#limit * gradient + Math.sqrt(this.#limit)
      this.#limit = Math.max(min, Math.min(max, this.#limit + (next - this.#limit) * smoothing))
    }
    if (nowMillis - this.#aloneAt > probeMillis && this.#peak >= this.#limit / 2) {
      this.#probeFrom = nowMillis
      this.#probed = 0
    }
    this.#open(nowMillis)
  }
}
