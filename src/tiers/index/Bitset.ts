/** A growable set of slots, one bit each, that knows how many it holds. Reads beyond its words are reads of absent slots. */
export class Bitset {
  words: Uint32Array
  count = 0

  constructor(slots = 0) {
    this.words = new Uint32Array((slots + 31) >>> 5)
  }

  /** The slots before `slots`. */
  static full(slots: number): Bitset {
    const full = new Bitset(slots)
    full.words.fill(0xffffffff)
    if ((slots & 31) !== 0) full.words[full.words.length - 1] = 2 ** (slots & 31) - 1
    full.count = slots
    return full
  }

  has(slot: number): boolean {
    const at = slot >>> 5
    return at < this.words.length && ((this.words[at]! >>> (slot & 31)) & 1) === 1
  }

  /** Whether the slot was not there before. */
  add(slot: number): boolean {
    const at = slot >>> 5
    if (at >= this.words.length) this.#grow(at + 1)
    const word = this.words[at]!
    const bit = 1 << (slot & 31)
    if ((word & bit) !== 0) return false
    this.words[at] = word | bit
    this.count += 1
    return true
  }

  /** Whether the slot was there before. */
  delete(slot: number): boolean {
    const at = slot >>> 5
    if (at >= this.words.length) return false
    const word = this.words[at]!
    const bit = 1 << (slot & 31)
    if ((word & bit) === 0) return false
    this.words[at] = word & ~bit
    this.count -= 1
    return true
  }

  /** Makes this the union of both. */
  union(other: Bitset): void {
    if (other.words.length > this.words.length) this.#grow(other.words.length)
    const { words } = this
    for (let i = 0; i < other.words.length; i++) words[i] = words[i]! | other.words[i]!
    this.#recount()
  }

  /** Makes this the intersection of both. */
  intersect(other: Bitset): void {
    const { words } = this
    const shared = Math.min(words.length, other.words.length)
    for (let i = 0; i < shared; i++) words[i] = words[i]! & other.words[i]!
    words.fill(0, shared)
    this.#recount()
  }

  /** Takes away what the other holds. */
  subtract(other: Bitset): void {
    const { words } = this
    const shared = Math.min(words.length, other.words.length)
    for (let i = 0; i < shared; i++) words[i] = words[i]! & ~other.words[i]!
    this.#recount()
  }

  copy(): Bitset {
    const copy = new Bitset()
    copy.words = this.words.slice()
    copy.count = this.count
    return copy
  }

  /** The slots, ascending. */
  forEach(use: (slot: number) => void): void {
    const { words } = this
    for (let i = 0; i < words.length; i++) {
      let word = words[i]!
      while (word !== 0) {
        use((i << 5) + (31 - Math.clz32(word & -word)))
        word &= word - 1
      }
    }
  }

  /** The first slot from `from` on, or -1. */
  next(from: number): number {
    const { words } = this
    let i = from >>> 5
    if (i >= words.length) return -1
    let word = words[i]! & (-1 << (from & 31))
    while (word === 0) {
      i += 1
      if (i >= words.length) return -1
      word = words[i]!
    }
    return (i << 5) + (31 - Math.clz32(word & -word))
  }

  get bytes(): number {
    return this.words.byteLength
  }

  #grow(length: number): void {
    const words = new Uint32Array(Math.max(length, this.words.length * 2))
    words.set(this.words)
    this.words = words
  }

  #recount(): void {
    let count = 0
    for (let i = 0; i < this.words.length; i++) {
      let word = this.words[i]!
      if (word === 0) continue
      word -= (word >>> 1) & 0x55555555
      word = (word & 0x33333333) + ((word >>> 2) & 0x33333333)
      count += Math.imul((word + (word >>> 4)) & 0x0f0f0f0f, 0x01010101) >>> 24
    }
    this.count = count
  }
}
