/**
 * The newest changes of one partition, kept for followers. A follower holds nothing here but its position: it asks for
 * what follows that, so a slow one costs no memory. What has left the buffer is read from the log.
 */
import { type Change, type ChangePosition, isBefore } from "../protocol/IndexPartition.ts"

export class ChangeFeed {
  readonly #capacity: number
  /** Ring: change number n is at n modulo capacity. */
  readonly #ring: Array<Change> = []
  readonly #listeners = new Set<() => void>()
  #published = 0
  /** The position just before the oldest change in the ring. */
  #floor: ChangePosition
  #newest: ChangePosition

  /** `floor` is the last position before any change that will be published. */
  constructor(capacity: number, floor: ChangePosition) {
    this.#capacity = capacity
    this.#floor = floor
    this.#newest = floor
  }

  /** The position just before the oldest change that is kept. */
  get floor(): ChangePosition {
    return this.#floor
  }

  /** The position of the last change, or the floor where there was none. */
  get newest(): ChangePosition {
    return this.#newest
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
    this.#newest = changes[changes.length - 1] as Change
    for (const listener of [...this.#listeners]) listener()
  }

  /** At most `limit` changes after a position, oldest first; `undefined` where the buffer does not reach back to it. */
  after(position: ChangePosition, limit: number): ReadonlyArray<Change> | undefined {
    if (isBefore(position, this.#floor)) return undefined
    if (!isBefore(position, this.#newest)) return nothing
    const oldest = Math.max(0, this.#published - this.#capacity)
    // Binary search for the first change after the position: the ring is in log order.
    let low = oldest
    let high = this.#published
    while (low < high) {
      const middle = (low + high) >>> 1
      if (isBefore(position, this.#ring[middle % this.#capacity] as Change)) high = middle
      else low = middle + 1
    }
    const found: Array<Change> = []
    for (let n = low; n < this.#published && found.length < limit; n++)
      found.push(this.#ring[n % this.#capacity] as Change)
    return found
  }

  /** Called after each publication, until what it answers is called. It must not throw. */
  onNews(listener: () => void): () => void {
    this.#listeners.add(listener)
    return () => this.#listeners.delete(listener)
  }
}

const nothing: ReadonlyArray<Change> = []
