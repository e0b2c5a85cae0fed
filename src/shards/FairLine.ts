/**
 * Those who wait, by where they come from: fair queueing (Nagle, RFC 970; of packets, FQ-CoDel, RFC 8290). Each source has a
 * queue of its own, first come first served, and the sources have turns, one of each. So a source waits for one of each other
 * source, however many those have waiting; and where there is no more room, the newest of the source that has most goes.
 *
 * Everything takes the same time, however many wait. What is held is bounded by who uses it: a source is known for as long
 * as it has something waiting.
 */

/** One that waits, and its neighbours in the queue of its source. */
export interface Waiter<T> {
  readonly source: string
  older: T | undefined
  newer: T | undefined
}

export class FairLine<T extends Waiter<T>> {
  /** In the order of their turns. */
  readonly #backlogs = new Map<string, Backlog<T>>()
  /** Those that have so many waiting. */
  readonly #bySize: Array<Set<Backlog<T>>> = []
  /** What the source that has most waiting has. */
  longest = 0
  /** How many wait. */
  size = 0

  push(waiter: T): void {
    let backlog = this.#backlogs.get(waiter.source)
    if (backlog === undefined) {
      backlog = new Backlog()
      this.#backlogs.set(waiter.source, backlog)
    }
    waiter.older = backlog.newest
    if (backlog.newest === undefined) backlog.oldest = waiter
    else backlog.newest.newer = waiter
    backlog.newest = waiter
    this.size += 1
    this.#resize(backlog, 1)
  }

  /** The oldest of the source whose turn it is. It stays that one's turn, until {@link turnIsOver}. */
  take(): T | undefined {
    const waiter = this.#backlogs.values().next().value?.oldest
    if (waiter !== undefined) this.remove(waiter)
    return waiter
  }

  turnIsOver(source: string): void {
    // One alone has all turns.
    if (this.#backlogs.size < 2) return
    const backlog = this.#backlogs.get(source)
    if (backlog === undefined) return
    this.#backlogs.delete(source)
    this.#backlogs.set(source, backlog)
  }

  /** The newest of a source that has most waiting. */
  takeOfLongest(): T | undefined {
    const waiter = this.#bySize[this.longest]?.values().next().value?.newest
    if (waiter !== undefined) this.remove(waiter)
    return waiter
  }

  /** One that waits goes. */
  remove(waiter: T): void {
    const backlog = this.#backlogs.get(waiter.source) as Backlog<T>
    const { newer, older } = waiter
    if (older === undefined) backlog.oldest = newer
    else older.newer = newer
    if (newer === undefined) backlog.newest = older
    else newer.older = older
    waiter.older = undefined
    waiter.newer = undefined
    this.size -= 1
    this.#resize(backlog, -1)
    if (backlog.size === 0) this.#backlogs.delete(waiter.source)
  }

  /** How many sources have something waiting. */
  get sources(): number {
    return this.#backlogs.size
  }

  /** How many a source has waiting. */
  sizeOf(source: string): number {
    return this.#backlogs.get(source)?.size ?? 0
  }

  /** Whether another has so much more waiting that one of those should give way to one more of this source. */
  yieldsTo(source: string): boolean {
    return this.longest > this.sizeOf(source) + 1
  }

  /** How many have their turn before one more of this source, at most. */
  ahead(source: string): number {
    return Math.min(this.size, this.#backlogs.size * (this.sizeOf(source) + 1))
  }

  /** Of each source the oldest that are over, which stay. */
  over(isOver: (waiter: T) => boolean): Array<T> {
    const found: Array<T> = []
    for (const { oldest } of this.#backlogs.values()) {
      for (let next = oldest; next !== undefined && isOver(next); next = next.newer) found.push(next)
    }
    return found
  }

  #resize(backlog: Backlog<T>, by: 1 | -1): void {
    this.#bySize[backlog.size]?.delete(backlog)
    backlog.size += by
    if (backlog.size > 0) {
      this.#bySize[backlog.size] ??= new Set()
      this.#bySize[backlog.size]?.add(backlog)
    }
    if (backlog.size > this.longest) this.longest = backlog.size
    // The one that had most has one less now.
    else if (this.#bySize[this.longest]?.size === 0) this.longest -= 1
  }
}

/** What a source has waiting. */
class Backlog<T> {
  oldest: T | undefined = undefined
  newest: T | undefined = undefined
  size = 0
}
