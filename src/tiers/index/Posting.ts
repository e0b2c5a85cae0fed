/** A set of slots that is small where it holds few: a sorted array, or one bit for each slot once that is smaller. */
import { Bitset } from "./Bitset.ts"

export class Posting {
  #sorted: Uint32Array | undefined = new Uint32Array(2)
  #size = 0
  #bits: Bitset | undefined

  get size(): number {
    return this.#bits === undefined ? this.#size : this.#bits.count
  }

  add(slot: number): void {
    if (this.#bits !== undefined) {
      this.#bits.add(slot)
      return
    }
    let sorted = this.#sorted!
    const at = this.#size > 0 && sorted[this.#size - 1]! < slot ? this.#size : position(sorted, this.#size, slot)
    if (at < this.#size && sorted[at] === slot) return
    const greatest = Math.max(slot, this.#size > 0 ? sorted[this.#size - 1]! : 0)
    if (this.#size >= sortedMin && this.#size * 32 > greatest) {
      this.#toBits()
      this.#bits!.add(slot)
      return
    }
    if (this.#size === sorted.length) {
      const grown = new Uint32Array(Math.ceil(sorted.length * 1.5) + 1)
      grown.set(sorted)
      this.#sorted = sorted = grown
    }
    sorted.copyWithin(at + 1, at, this.#size)
    sorted[at] = slot
    this.#size += 1
  }

  remove(slot: number): void {
    if (this.#bits !== undefined) {
      this.#bits.delete(slot)
      // Half of where it turns into bits, so that it does not turn back and forth.
      if (this.#bits.count * 64 < this.#bits.words.length * 32) this.#toSorted()
      return
    }
    const sorted = this.#sorted!
    const at = position(sorted, this.#size, slot)
    if (at >= this.#size || sorted[at] !== slot) return
    sorted.copyWithin(at, at + 1, this.#size)
    this.#size -= 1
  }

  addTo(found: Bitset): void {
    if (this.#bits !== undefined) found.union(this.#bits)
    else for (let i = 0; i < this.#size; i++) found.add(this.#sorted![i]!)
  }

  forEach(use: (slot: number) => void): void {
    if (this.#bits !== undefined) this.#bits.forEach(use)
    else for (let i = 0; i < this.#size; i++) use(this.#sorted![i]!)
  }

  #toBits(): void {
    const bits = new Bitset(this.#sorted![this.#size - 1]! + 1)
    for (let i = 0; i < this.#size; i++) bits.add(this.#sorted![i]!)
    this.#bits = bits
    this.#sorted = undefined
  }

  #toSorted(): void {
    const sorted = new Uint32Array(this.#bits!.count + 1)
    let size = 0
    this.#bits!.forEach((slot) => {
      sorted[size++] = slot
    })
    this.#bits = undefined
    this.#sorted = sorted
    this.#size = size
  }
}

/** Slots up to which a posting stays an array. */
const sortedMin = 64

/** Where the slot is or would be. */
const position = (sorted: Uint32Array, size: number, slot: number): number => {
  let low = 0
  let high = size
  while (low < high) {
    const middle = (low + high) >>> 1
    if (sorted[middle]! < slot) low = middle + 1
    else high = middle
  }
  return low
}
