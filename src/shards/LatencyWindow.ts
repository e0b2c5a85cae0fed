/**
 * Latencies of the last seconds, for their high percentiles: a ring of histograms, eight buckets to the octave (a percentile
 * is within a tenth). One addition a search, and no memory that grows.
 */
const perOctave = 8
const leastMillis = 1 / 16
/** Up to two minutes: more than any deadline. */
const octaves = 21
const buckets = perOctave * octaves

export class LatencyWindow {
  readonly #slots: ReadonlyArray<Uint32Array>
  #now = 0

  /** `slots` periods of {@link turn} are remembered. */
  constructor(slots: number) {
    this.#slots = Array.from({ length: slots }, () => new Uint32Array(buckets))
  }

  add(millis: number): void {
    const bucket = millis <= leastMillis ? 0 : Math.floor(Math.log2(millis / leastMillis) * perOctave)
    const slot = this.#slots[this.#now] as Uint32Array
    const at = Math.min(bucket, buckets - 1)
    slot[at] = (slot[at] as number) + 1
  }

  /** A period is over: the oldest is forgotten. */
  turn(): void {
    this.#now = (this.#now + 1) % this.#slots.length
    this.#slots[this.#now]?.fill(0)
  }

  /** The upper edge of the percentile's bucket; 0 where there are fewer than `least` latencies. */
  percentile(share: number, least = 1): number {
    let total = 0
    for (const slot of this.#slots) for (let i = 0; i < buckets; i++) total += slot[i] as number
    if (total < least || total === 0) return 0
    let left = Math.max(1, Math.ceil(total * share))
    for (let i = 0; i < buckets; i++) {
      for (const slot of this.#slots) left -= slot[i] as number
      if (left <= 0) return leastMillis * 2 ** ((i + 1) / perOctave)
    }
    return leastMillis * 2 ** octaves
  }
}
