/**
 * The vectors of a partition as they were inserted, by slot, and the scores of a query against them.
 *
 * Rows lie in WebAssembly memories, which grow in place and whose untouched pages cost nothing, so that `RowKernel.ts` can
 * scan them. A scan's sums are float32; what it finds is scored again in double precision. For the cosine the inverse
 * norm is kept beside each row.
 */
import type { Metric } from "../../protocol/Fields.ts"
import { type Memory, memoryOf, pageBytes } from "./Assembler.ts"
import type { Bitset } from "./Bitset.ts"
import { type RowKernel, rowKernelOf } from "./RowKernel.ts"
import type { TopK } from "./TopK.ts"

export class VectorArena {
  readonly dimensions: number
  readonly metric: Metric
  /** Components from a row to the next: what one vector instruction takes at a time divides it, the rest are zeros. */
  readonly #stride: number
  /** Rows of a bank, a power of two. */
  readonly #bankShift: number
  readonly #banks: Array<Bank> = []
  #rows = 0
  #inverseNorms = new Float64Array(0)

  constructor(dimensions: number, metric: Metric, bankBytes = bankBytesMax) {
    this.dimensions = dimensions
    this.metric = metric
    this.#stride = Math.ceil(dimensions / lanes) * lanes
    this.#bankShift = 31 - Math.clz32(Math.floor(bankBytes / (this.#stride * 4)))
  }

  set(slot: number, vector: Float32Array): void {
    this.reserve(slot + 1)
    this.#bankOf(slot).floats.set(vector, this.#offset(slot))
    this.#normed(slot)
  }

  /** Makes room for so many slots. */
  reserve(slots: number): void {
    if (slots <= this.#rows) return
    const bankRows = 1 << this.#bankShift
    for (let first = 0; first < slots; first += bankRows) {
      const bank = first >>> this.#bankShift
      if (this.#banks.length === bank) this.#banks.push(new Bank(this.#stride))
      this.#banks[bank]!.reserve(Math.min(bankRows, slots - first) * this.#stride)
    }
    if (this.metric === "cosine" && this.#inverseNorms.length < slots) {
      const grown = new Float64Array(Math.max(slots, 16, Math.ceil(this.#inverseNorms.length * growthFactor)))
      grown.set(this.#inverseNorms)
      this.#inverseNorms = grown
    }
    this.#rows = slots
  }

  /** Fills rows from `slot` on with vectors that follow one another in `bytes`. Room must have been made. */
  setBytes(slot: number, bytes: Uint8Array<ArrayBuffer>): void {
    const vectors = new Float32Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 4)
    for (let at = 0; at < vectors.length; at += this.dimensions) {
      this.set(slot + at / this.dimensions, vectors.subarray(at, at + this.dimensions))
    }
  }

  /** A view of the row; valid until the arena next grows. */
  row(slot: number): Float32Array {
    const offset = this.#offset(slot)
    return this.#bankOf(slot).floats.subarray(offset, offset + this.dimensions)
  }

  equals(slot: number, vector: Float32Array): boolean {
    const { floats } = this.#bankOf(slot)
    const offset = this.#offset(slot)
    for (let i = 0; i < vector.length; i++) if (floats[offset + i] !== vector[i]) return false
    return true
  }

  /** Writes the row into `point` as the graph takes it: of length one for the cosine. */
  toPoint(slot: number, point: Array<number>): void {
    const { floats } = this.#bankOf(slot)
    const offset = this.#offset(slot)
    const factor = this.metric === "cosine" ? this.#inverseNorms[slot]! : 1
    for (let i = 0; i < this.dimensions; i++) point[i] = floats[offset + i]! * factor
  }

  /** The score of a query against a row: higher is nearer. `factor` is {@link factorOf} the query. */
  score(query: Float32Array, factor: number, slot: number): number {
    const inverse = this.metric === "cosine" ? this.#inverseNorms[slot]! : 1
    return scoreOf(this.metric, this.#bankOf(slot).floats, this.#offset(slot), query, inverse * factor)
  }

  /** What the scores of a query are multiplied by. */
  factorOf(query: Float32Array): number {
    return this.metric === "cosine" ? inverseNorm(query, 0, query.length) : 1
  }

  /** Offers every slot of `slots` to `top`, scored to float32's precision. */
  scan(query: Float32Array, slots: Bitset, top: TopK): void {
    const factor = this.factorOf(query)
    // Of length one for the cosine, so that the sums stay within float32 whatever the query's length is.
    const scaled = new Float32Array(this.#stride)
    for (let i = 0; i < query.length; i++) scaled[i] = query[i]! * factor
    const { words } = slots
    const wordsInBank = (1 << this.#bankShift) >>> 5
    for (let i = 0; i < this.#banks.length; i++) {
      const bank = this.#banks[i]!
      const first = i << this.#bankShift
      bank.floats.set(scaled, 0)
      let listed = 0
      const to = Math.min(words.length, (i + 1) * wordsInBank)
      for (let at = i * wordsInBank; at < to; at++) {
        let word = words[at]!
        const base = (at << 5) - first
        while (word !== 0) {
          bank.list[listed++] = base + (31 - Math.clz32(word & -word))
          word &= word - 1
        }
        if (listed > listRows - 32) {
          this.#scanList(bank, first, listed, query, factor, top)
          listed = 0
        }
      }
      if (listed > 0) this.#scanList(bank, first, listed, query, factor, top)
    }
  }

  get bytes(): number {
    return (
      this.#rows * this.#stride * 4 + this.#inverseNorms.byteLength + this.#banks.length * scratchBytes(this.#stride)
    )
  }

  #scanList(bank: Bank, first: number, listed: number, query: Float32Array, factor: number, top: TopK): void {
    const { list, sums } = bank
    bank.scan(this.metric === "l2", listed)
    const norms = this.metric === "cosine" ? this.#inverseNorms : undefined
    for (let i = 0; i < listed; i++) {
      const slot = first + list[i]!
      const sum = sums[i]!
      let score: number
      // Beyond float32, or none of its numbers: in double precision it is one.
      if (sum - sum !== 0) score = this.score(query, factor, slot)
      else if (norms !== undefined) score = sum * norms[slot]!
      else score = this.metric === "l2" ? -Math.sqrt(sum) : sum
      if (score >= top.least) top.offer(score, slot)
    }
  }

  #normed(slot: number): void {
    if (this.metric !== "cosine") return
    this.#inverseNorms[slot] = inverseNorm(this.#bankOf(slot).floats, this.#offset(slot), this.dimensions)
  }

  #bankOf(slot: number): Bank {
    return this.#banks[slot >>> this.#bankShift]!
  }

  /** Where the row is among its bank's floats. */
  #offset(slot: number): number {
    return scratchBytes(this.#stride) / 4 + (slot & ((1 << this.#bankShift) - 1)) * this.#stride
  }
}

/** One memory: the query, the list of rows to look at and their sums, then the rows. */
class Bank {
  readonly #memory: Memory
  readonly #kernel: RowKernel
  readonly #stride: number
  floats: Float32Array
  list: Int32Array
  sums: Float32Array

  constructor(stride: number) {
    this.#stride = stride
    this.#memory = memoryOf(pagesOf(scratchBytes(stride)))
    this.#kernel = rowKernelOf(this.#memory)
    this.floats = nothing
    this.list = new Int32Array(0)
    this.sums = nothing
    this.#view()
  }

  /** Makes room for so many floats of rows. */
  reserve(floats: number): void {
    const needed = scratchBytes(this.#stride) + floats * 4
    const has = this.#memory.buffer.byteLength
    if (needed <= has) return
    this.#memory.grow(pagesOf(Math.min(Math.max(needed, has * growthFactor), memoryBytesMax)) - pagesOf(has))
    this.#view()
  }

  scan(distances: boolean, listed: number): void {
    const queryBytes = this.#stride * 4
    const listAt = queryBytes
    const sumsAt = listAt + listRows * 4
    const rowsAt = scratchBytes(this.#stride)
    const scan = distances ? this.#kernel.distances : this.#kernel.products
    scan(listAt, listed, rowsAt, queryBytes, 0, queryBytes, sumsAt)
  }

  #view(): void {
    const { buffer } = this.#memory
    const queryBytes = this.#stride * 4
    this.floats = new Float32Array(buffer)
    this.list = new Int32Array(buffer, queryBytes, listRows)
    this.sums = new Float32Array(buffer, queryBytes + listRows * 4, listRows)
  }
}

const nothing = new Float32Array(0)

/** Float32s that one vector instruction takes. */
const lanes = 4

/** Rows scanned at once. */
const listRows = 1_024

/** Bytes of a memory before its rows. */
const scratchBytes = (stride: number): number => stride * 4 + listRows * 8

const pagesOf = (bytes: number): number => Math.ceil(bytes / pageBytes)

/** Bytes of rows in one memory, at most; the scratch is beside them. Addresses stay within 31 bits. */
const bankBytesMax = 2 ** 30
const memoryBytesMax = bankBytesMax + 2 ** 20

/** By what a memory grows at least; what is not touched of it is not there. */
const growthFactor = 1.25

/** The score of a query against a row that begins at `offset`, times `factor` for the cosine: what normalises both. */
export const scoreOf = (
  metric: Metric,
  rows: Float32Array,
  offset: number,
  query: Float32Array,
  factor: number
): number => {
  switch (metric) {
    case "cosine":
      return product(rows, offset, query) * factor
    case "ip":
      return product(rows, offset, query)
    case "l2":
      return -Math.sqrt(squaredDistance(rows, offset, query))
  }
}

const product = (rows: Float32Array, offset: number, query: Float32Array): number => {
  let a = 0
  let b = 0
  let c = 0
  let d = 0
  const whole = query.length & ~3
  let i = 0
  for (; i < whole; i += 4) {
    a += rows[offset + i]! * query[i]!
    b += rows[offset + i + 1]! * query[i + 1]!
    c += rows[offset + i + 2]! * query[i + 2]!
    d += rows[offset + i + 3]! * query[i + 3]!
  }
  for (; i < query.length; i++) a += rows[offset + i]! * query[i]!
  return a + b + c + d
}

const squaredDistance = (rows: Float32Array, offset: number, query: Float32Array): number => {
  let sum = 0
  for (let i = 0; i < query.length; i++) {
    const difference = rows[offset + i]! - query[i]!
    sum += difference * difference
  }
  return sum
}

export const inverseNorm = (rows: Float32Array, offset: number, dimensions: number): number => {
  let sum = 0
  for (let i = 0; i < dimensions; i++) sum += rows[offset + i]! * rows[offset + i]!
  return sum > 0 ? 1 / Math.sqrt(sum) : 0
}
