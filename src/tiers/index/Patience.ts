/** How long the main thread may still be kept waiting for vector threads in this turn of its event loop. */
export class Patience {
  readonly #turnMillis: number
  #spentMillis = 0
  /** What a wait takes, of late. */
  #usualMillis = 0
  #ends = false

  constructor(turnMillis: number) {
    this.#turnMillis = turnMillis
  }

  /** Milliseconds that may be waited; 0 where what a wait usually takes does not fit in any more. */
  get left(): number {
    const left = this.#turnMillis - this.#spentMillis
    if (left > this.#usualMillis) return left
    // One long wait must not be the last that is tried.
    this.#usualMillis *= usualKept
    return 0
  }

  spent(millis: number): void {
    this.#spentMillis += millis
    this.#usualMillis += (millis - this.#usualMillis) * (1 - usualKept)
    if (this.#ends) return
    this.#ends = true
    setImmediate(() => {
      this.#ends = false
      this.#spentMillis = 0
    })
  }
}

/** Share of the average that a new wait leaves of it. */
const usualKept = 0.9
