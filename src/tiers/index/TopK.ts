/** The best `k` of what it is offered: higher scores first, the lower slot first among equals. A heap whose root is the worst. */
export class TopK {
  k = 0
  size = 0
  #scores = new Float64Array(64)
  #slots = new Int32Array(64)

  reset(k: number): void {
    this.k = k
    this.size = 0
    if (this.#scores.length < k) {
      this.#scores = new Float64Array(k)
      this.#slots = new Int32Array(k)
    }
  }

  /** A score below this one is not taken. */
  get least(): number {
    return this.size < this.k ? Number.NEGATIVE_INFINITY : this.#scores[0]!
  }

  offer(score: number, slot: number): void {
    if (this.size < this.k) {
      this.#up(this.size, score, slot)
      this.size += 1
    } else if (this.k > 0 && better(score, slot, this.#scores[0]!, this.#slots[0]!)) {
      this.#down(score, slot, this.size)
    }
  }

  /** Sorts what is held, best first, into the given arrays; the heap is empty then. */
  drain(scores: Float32Array, slots: Int32Array): void {
    while (this.size > 0) {
      this.size -= 1
      scores[this.size] = this.#scores[0]!
      slots[this.size] = this.#slots[0]!
      this.#down(this.#scores[this.size]!, this.#slots[this.size]!, this.size)
    }
  }

  /** The slots that are held, in no order. */
  take(): Int32Array {
    return this.#slots.slice(0, this.size)
  }

  #up(from: number, score: number, slot: number): void {
    const scores = this.#scores
    const slots = this.#slots
    let at = from
    while (at > 0) {
      const parent = (at - 1) >> 1
      if (better(score, slot, scores[parent]!, slots[parent]!)) break
      scores[at] = scores[parent]!
      slots[at] = slots[parent]!
      at = parent
    }
    scores[at] = score
    slots[at] = slot
  }

  #down(score: number, slot: number, size: number): void {
    const scores = this.#scores
    const slots = this.#slots
    let at = 0
    for (;;) {
      let child = 2 * at + 1
      if (child >= size) break
      if (child + 1 < size && better(scores[child]!, slots[child]!, scores[child + 1]!, slots[child + 1]!)) child += 1
      if (better(scores[child]!, slots[child]!, score, slot)) break
      scores[at] = scores[child]!
      slots[at] = slots[child]!
      at = child
    }
    scores[at] = score
    slots[at] = slot
  }
}

const better = (score: number, slot: number, otherScore: number, otherSlot: number): boolean =>
  score > otherScore || (score === otherScore && slot < otherSlot)
