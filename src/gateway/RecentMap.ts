/**
 * A map that forgets what was not used lately, so that what strangers make it hold is bounded: two generations of half the
 * bound each. What is asked for moves to the younger one; when that is full the older one is dropped. Cheaper than a list
 * of all entries by last use, which is kept for an answer that is needed once in so many.
 */
export class RecentMap<A> {
  readonly #half: number
  #young = new Map<string, A>()
  #old = new Map<string, A>()

  constructor(max: number) {
    this.#half = Math.max(1, Math.trunc(max / 2))
  }

  get size(): number {
    return this.#young.size + this.#old.size
  }

  get(key: string): A | undefined {
    const found = this.#young.get(key)
    if (found !== undefined) return found
    const aged = this.#old.get(key)
    if (aged !== undefined) {
      this.#old.delete(key)
      this.set(key, aged)
    }
    return aged
  }

  set(key: string, value: A): void {
    if (this.#young.size >= this.#half && !this.#young.has(key)) {
      this.#old = this.#young
      this.#young = new Map()
    }
    this.#old.delete(key)
    this.#young.set(key, value)
  }

  delete(key: string): void {
    this.#young.delete(key)
    this.#old.delete(key)
  }

  clear(): void {
    this.#young.clear()
    this.#old.clear()
  }
}
