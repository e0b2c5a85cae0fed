/**
 * The newest changes of one partition, kept for followers. A follower holds nothing here but its position: it asks for
 * what follows that, so a slow one costs no memory. What has left the buffer is read from the log.
 */
import { Deferred, Effect } from "effect"
import type { Change } from "../protocol/IndexPartition.ts"

export interface Position {
  readonly seq: number
  readonly index: number
}

export class ChangeFeed {
  readonly #capacity: number
  /** Ring: change number n is at n modulo capacity. */
  readonly #ring: Array<Change> = []
  #published = 0
  /** The position just before the oldest change in the ring. */
  #floor: Position
  #news = Deferred.makeUnsafe<void>()

  /** `floor` is the last position before any change that will be published. */
  constructor(capacity: number, floor: Position) {
    this.#capacity = capacity
    this.#floor = floor
  }

  /** The position just before the oldest change that is kept. */
  get floor(): Position {
    return this.#floor
  }

  publish(changes: ReadonlyArray<Change>): void {
    if (changes.length === 0) return
    for (const change of changes) {
      const at = this.#published % this.#capacity
      const evicted = this.#ring[at]
      if (evicted !== undefined) this.#floor = evicted
      this.#ring[at] = change
      this.#published += 1
    }
    const news = this.#news
    this.#news = Deferred.makeUnsafe()
    Deferred.doneUnsafe(news, Effect.void)
  }

  /** At most `limit` changes after a position, oldest first; `undefined` where the buffer does not reach back to it. */
  after(position: Position, limit: number): ReadonlyArray<Change> | undefined {
    if (before(position, this.#floor)) return undefined
    const oldest = Math.max(0, this.#published - this.#capacity)
    // Binary search for the first change after the position: the ring is in log order.
    let low = oldest
    let high = this.#published
    while (low < high) {
      const middle = (low + high) >>> 1
      if (before(position, this.#ring[middle % this.#capacity] as Change)) high = middle
      else low = middle + 1
    }
    const found: Array<Change> = []
    for (let n = low; n < this.#published && found.length < limit; n++)
      found.push(this.#ring[n % this.#capacity] as Change)
    return found
  }

  /** Completes with the next publication after this was read. */
  get news(): Effect.Effect<void> {
    return Deferred.await(this.#news)
  }
}

const before = (a: Position, b: Position): boolean => a.seq < b.seq || (a.seq === b.seq && a.index < b.index)
