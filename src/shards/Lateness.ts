/**
 * From when on an answer is late: by what the 99th percentile has been, which an estimate follows that costs a comparison an
 * answer. How often it may be asked again for that is bounded, so that where all is slow nothing is asked twice.
 */
export class Lateness {
  /** An estimate of the 99th percentile, in milliseconds; none before some answers are known. */
  #high = 0
  #answers = 0
  #credit = 1

  /** How long to wait before it is asked again. */
  get millis(): number {
    return this.#answers < answersMin ? unknownMillis : Math.max(leastMillis, factor * this.#high)
  }

  /** It was answered after so long. */
  took(millis: number): void {
    this.#answers += 1
    this.#credit = Math.min(creditMax, this.#credit + share)
    if (this.#answers === 1) this.#high = millis
    else if (millis > this.#high) this.#high += Math.min(millis - this.#high, 0.99 * step * this.#high)
    else this.#high -= 0.01 * step * this.#high
  }

  /** Whether it may be asked again now; takes note that it is. */
  mayAskAgain(): boolean {
    if (this.#credit < 1) return false
    this.#credit -= 1
    return true
  }
}

const answersMin = 32
const unknownMillis = 250
/** Shorter waits are noise of schedulers. */
const leastMillis = 20
/** Of the 99th percentile, above which an answer is late. */
const factor = 2
/** How quickly the estimate moves. */
const step = 0.1
/** Of the answers, as many may have been asked twice; and at once. */
const share = 0.02
const creditMax = 8
