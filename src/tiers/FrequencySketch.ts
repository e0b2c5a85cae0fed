/**
 * How often keys were seen, in bounded memory: a count-min sketch (Cormode and Muthukrishnan, 2005) with conservative
 * update (Estan and Varghese, 2002) that ages by halving, as TinyLFU does (Einziger, Friedman and Manes, 2017); here
 * halved by time, so that its counts belong to a past of known length, and not by sample size.
 *
 * An estimate is never below the (aged) truth, and exceeds it by more than `2 total / width` with probability below 1/16.
 */
export class FrequencySketch {
  readonly #mask: number
  readonly #width: number
  /** Row after row. */
  readonly #counters: Float32Array
  #total = 0

  /** `width`: counters of each of the four rows, rounded up to a power of two; 16 bytes each in all. */
  constructor(width: number) {
    this.#width = 2 ** Math.ceil(Math.log2(Math.max(2, width)))
    this.#mask = this.#width - 1
    this.#counters = new Float32Array(rows * this.#width)
  }

  /** Weight of everything added, aged. */
  get total(): number {
    return this.#total
  }

  get bytes(): number {
    return this.#counters.byteLength
  }

  /** Adds to a key, given by two independent 32 bit hashes (Kirsch and Mitzenmacher, 2006). */
  add(h1: number, h2: number, weight: number): void {
    const counters = this.#counters
    const next = this.estimate(h1, h2) + weight
    for (let row = 0; row < rows; row++) {
      const at = row * this.#width + ((h1 + Math.imul(row, h2 | 1)) & this.#mask)
      if ((counters[at] as number) < next) counters[at] = next
    }
    this.#total += weight
  }

  estimate(h1: number, h2: number): number {
    let least = Number.POSITIVE_INFINITY
    for (let row = 0; row < rows; row++) {
      const count = this.#counters[row * this.#width + ((h1 + Math.imul(row, h2 | 1)) & this.#mask)] as number
      if (count < least) least = count
    }
    return least
  }

  halve(): void {
    for (let i = 0; i < this.#counters.length; i++) this.#counters[i] = (this.#counters[i] as number) / 2
    this.#total /= 2
  }
}

const rows = 4
