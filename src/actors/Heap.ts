/** A binary heap: the item that is `before` all others is on top. */
export class Heap<A> {
  readonly #before: (a: A, b: A) => boolean
  #items: Array<A> = []

  constructor(before: (a: A, b: A) => boolean) {
    this.#before = before
  }

  get size(): number {
    return this.#items.length
  }

  peek(): A | undefined {
    return this.#items[0]
  }

  push(item: A): void {
    const items = this.#items
    let at = items.push(item) - 1
    while (at > 0) {
      const parent = (at - 1) >> 1
      if (!this.#before(item, items[parent] as A)) break
      items[at] = items[parent] as A
      at = parent
    }
    items[at] = item
  }

  pop(): A | undefined {
    const items = this.#items
    const top = items[0]
    const last = items.pop()
    if (items.length === 0 || last === undefined) return top
    let at = 0
    for (;;) {
      let child = 2 * at + 1
      if (child >= items.length) break
      if (child + 1 < items.length && this.#before(items[child + 1] as A, items[child] as A)) child += 1
      if (!this.#before(items[child] as A, last)) break
      items[at] = items[child] as A
      at = child
    }
    items[at] = last
    return top
  }

  /** Drops all other items. */
  keep(wanted: (item: A) => boolean): void {
    const kept = this.#items.filter(wanted)
    this.#items = []
    for (const item of kept) this.push(item)
  }
}
