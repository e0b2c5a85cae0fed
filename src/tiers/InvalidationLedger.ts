/**
 * Keeps a cache from taking a record that was read before a write and arrives after it. A reader takes a ticket before it
 * reads; what it read is admitted only if none of its ids was invalidated since. Versions cannot tell that: of a record
 * that is read and put once more after a write was undone by eviction, the cache would have nothing left to compare with.
 *
 * Bounded: the newest {@link invalidationsMax} invalidations are known one by one (those of large writes as one); a ticket
 * older than the oldest of them admits nothing. Main thread, synchronous, O(1).
 */
export class InvalidationLedger {
  readonly #max: number
  /** When each key was last invalidated, oldest first. */
  readonly #last = new Map<string, number>()
  #now = 0
  /** No ticket up to this admits anything: an invalidation that it may have missed is forgotten, or was of everything. */
  #floor = -1
  /** Ids noted since the last ticket was taken; `undefined` where none was taken since all were voided. */
  #noted: number | undefined

  constructor(max = invalidationsMax) {
    this.#max = max
  }

  /** To be taken before a record is read that is to be put. */
  ticket(): number {
    this.#noted = 0
    return this.#now
  }

  invalidate(partition: string, ids: ReadonlyArray<string>): void {
    // Where nobody reads, writes need not be noted.
    if (this.#noted === undefined || this.#noted + ids.length > batchMax) return this.invalidateAll()
    this.#noted += ids.length
    this.#now += 1
    for (const id of ids) {
      const key = keyOf(partition, id)
      this.#last.delete(key)
      this.#last.set(key, this.#now)
    }
    while (this.#last.size > this.#max) {
      const [key, at] = this.#last.entries().next().value as [string, number]
      this.#last.delete(key)
      this.#floor = Math.max(this.#floor, at - 1)
    }
  }

  /** Every ticket given so far is void. */
  invalidateAll(): void {
    this.#floor = this.#now
    this.#now += 1
    this.#noted = undefined
    if (this.#last.size > 0) this.#last.clear()
  }

  admits(partition: string, id: string, ticket: number): boolean {
    if (ticket <= this.#floor) return false
    const at = this.#last.get(keyOf(partition, id))
    return at === undefined || at <= ticket
  }
}

/** Invalidations known one by one; some 100 bytes each. */
export const invalidationsMax = 65_536

/** More ids than this written since the last ticket void every ticket: cheaper than noting them, and the next one is good. */
const batchMax = 512

const keyOf = (partition: string, id: string): string => `${partition}\n${id}`
