/**
 * Waits before another attempt, random between nothing and a bound that doubles ("full jitter": Brooker, "Exponential
 * Backoff And Jitter", 2015), so that clients cut at one moment do not come back at one moment.
 */
export class Backoff {
  readonly #baseMillis: number
  readonly #capMillis: number
  readonly #random: () => number
  #attempts = 0

  constructor(baseMillis: number, capMillis: number, random: () => number = Math.random) {
    this.#baseMillis = baseMillis
    this.#capMillis = capMillis
    this.#random = random
  }

  get attempts(): number {
    return this.#attempts
  }

  /** Milliseconds to wait. `spreadMillis`: what the server asked its clients to spread over; the wait is within it too. */
  next(spreadMillis = 0): number {
    const bound = Math.min(this.#capMillis, this.#baseMillis * 2 ** Math.min(this.#attempts, 30))
    this.#attempts += 1
    return this.#random() * Math.max(bound, spreadMillis)
  }

  reset(): void {
    this.#attempts = 0
  }
}
