/**
 * Finds of many standing queries those whose bar a vector reaches: all of them, and with their exact scores.
 *
 * **How.** Each query is kept as eight bits a component with a scale. Of the vector's product with that, it is known how far it
 * can be from the true one (Cauchy-Schwarz: the length of what rounding took from the query, times the vector's). Queries
 * whose bar is out of reach even so are passed over, four at a time, in a quarter of the bytes of float32; the few that are
 * left are scored as a search scores. As in FEXIPRO (Li, Chan, Yiu, Mamoulis, "FEXIPRO: Fast and Exact Inner Product Retrieval in
 * Recommender Systems", 2017), but for the loop.
 *
 * **Why not less.** Clusters of queries with the weakest bar of each (as of the RdNN-tree, Yang and Lin, 2001) leave 95 of 100
 * queries of word vectors to be looked at, since in 100 dimensions the tenth neighbour is nearly as far as anything else; the first
 * 32 principal components with the length of the rest leave 54, 48 leave 21. Both cost more than they spare.
 *
 * The Euclidean distance is a product too: it is at most r where x·q >= (x² + q² - r²) / 2.
 */
import type { Metric } from "../../protocol/Fields.ts"
import { type Memory, memoryOf, pageBytes } from "./Assembler.ts"
import { blockRows, factorBytes, type StandingKernel, standingKernelOf } from "./StandingKernel.ts"
import { inverseNorm, scoreOf } from "./VectorArena.ts"

export class StandingIndex {
  readonly #dimensions: number
  readonly #metric: Metric
  readonly #rowBytes: number
  /** Blocks of a bank, a power of two. */
  readonly #bankShift: number
  readonly #banks: Array<Bank> = []
  readonly #free: Array<number> = []
  readonly #queries: Array<Entry | undefined> = []
  /** How far a vector of length one is from what is kept of it, at most. */
  readonly #roundedOff: number

  constructor(dimensions: number, metric: Metric, bankBytes = bankBytesMax) {
    this.#dimensions = dimensions
    this.#metric = metric
    this.#rowBytes = Math.ceil(dimensions / 16) * 16
    this.#bankShift = 31 - Math.clz32(Math.floor(bankBytes / this.#blockBytes))
    this.#roundedOff = (Math.sqrt(dimensions) * 0.5) / vectorMax
  }

  /** Takes a query in, at a slot that is returned; nothing reaches it yet. The vector must not change. */
  add(vector: Float32Array): number {
    const slot = this.#free.pop() ?? this.#queries.length
    const factor = this.#metric === "cosine" ? inverseNorm(vector, 0, vector.length) : 1
    const query = { vector, factor, norm: 0, bar: Number.NaN }
    this.#queries[slot] = query
    this.#setRow(slot, query)
    this.setBar(slot, Number.NaN)
    return slot
  }

  remove(slot: number): void {
    this.setBar(slot, Number.NaN)
    this.#queries[slot] = undefined
    this.#free.push(slot)
  }

  /** The least score that reaches the query; NaN where none does. */
  setBar(slot: number, bar: number): void {
    const query = this.#queries[slot]!
    query.bar = bar
    const { norm } = query
    let least = bar
    let inexact = Math.abs(bar)
    if (this.#metric === "l2") {
      least = (norm * norm - bar * bar) / 2
      inexact = (norm * norm + bar * bar) / 2
    }
    const kept = least - inexact * slop
    const { floats, at } = this.#factors(slot)
    if (Number.isNaN(bar)) floats[at + 2 * blockRows] = Number.POSITIVE_INFINITY
    // What float32 may not hold is looked at always.
    else
      floats[at + 2 * blockRows] = Math.abs(kept) < beyondFloat && norm < beyondFloat ? kept : Number.NEGATIVE_INFINITY
  }

  /** The score that a search by the query gives a record of this vector. `factor` is {@link factorOf} the vector. */
  score(slot: number, vector: Float32Array, factor: number): number {
    const query = this.#queries[slot]!
    return Math.fround(scoreOf(this.#metric, query.vector, 0, vector, query.factor * factor))
  }

  factorOf(vector: Float32Array): number {
    return this.#metric === "cosine" ? inverseNorm(vector, 0, vector.length) : 1
  }

  /** Calls `use` with each query that is reached, and with the score. */
  reached(vector: Float32Array, factor: number, use: (slot: number, score: number) => void): void {
    const norm = normOf(vector)
    if (!(norm > 1 / beyondFloat && norm < beyondFloat)) {
      for (let slot = 0; slot < this.#queries.length; slot++) this.#look(slot, vector, factor, use)
      return
    }
    const isEuclidean = this.#metric === "l2"
    const shift = isEuclidean ? ((norm * norm) / 2) * (1 - slop) : 0
    const share = this.#metric === "cosine" ? 1 : 1 / norm
    for (let i = 0; i < this.#banks.length; i++) {
      const bank = this.#banks[i]!
      bank.setVector(vector, vectorMax / norm)
      const firstOf = (i << this.#bankShift) * blockRows
      const blocks = Math.min(1 << this.#bankShift, Math.ceil((this.#queries.length - firstOf) / blockRows))
      for (let block = 0; block < blocks; block += blocksAtOnce) {
        const count = bank.reached(block, Math.min(blocksAtOnce, blocks - block), firstOf, 1 / vectorMax, shift, share)
        for (let n = 0; n < count; n++) this.#look(bank.found[n]!, vector, factor, use)
      }
    }
  }

  get bytes(): number {
    return (
      this.#banks.reduce((sum, bank) => sum + bank.bytes, 0) +
      this.#queries.length * (entryBytes + this.#dimensions * 4)
    )
  }

  #look(slot: number, vector: Float32Array, factor: number, use: (slot: number, score: number) => void): void {
    const query = this.#queries[slot]
    if (query === undefined) return
    const score = this.score(slot, vector, factor)
    if (score >= query.bar) use(slot, score)
  }

  /** Writes the query's row, its scale and its margin. */
  #setRow(slot: number, query: Entry): void {
    const { vector, factor } = query
    const { floats, at } = this.#factors(slot)
    const row = this.#bankOf(slot).row(this.#blockOf(slot), slot % blockRows)
    let greatest = 0
    for (let i = 0; i < vector.length; i++) greatest = Math.max(greatest, Math.abs(vector[i]! * factor))
    const scale = Math.fround(greatest / rowMax)
    let squares = 0
    let lost = 0
    for (let i = 0; i < vector.length; i++) {
      const component = vector[i]! * factor
      const byte = scale === 0 ? 0 : Math.round(component / scale)
      row[i] = byte
      squares += component * component
      lost += (component - byte * scale) ** 2
    }
    query.norm = Math.sqrt(squares)
    const margin = Math.sqrt(lost) + (this.#roundedOff + slop) * (query.norm + Math.sqrt(lost))
    floats[at] = scale
    floats[at + blockRows] = margin < beyondFloat ? margin * (1 + slop) : beyondFloat
  }

  get #blockBytes(): number {
    return blockRows * this.#rowBytes + factorBytes
  }

  #blockOf(slot: number): number {
    return Math.floor(slot / blockRows) & ((1 << this.#bankShift) - 1)
  }

  #bankOf(slot: number): Bank {
    const block = Math.floor(slot / blockRows)
    const number = block >>> this.#bankShift
    if (this.#banks.length === number) this.#banks.push(new Bank(this.#rowBytes))
    const bank = this.#banks[number]!
    bank.reserve((block & ((1 << this.#bankShift) - 1)) + 1)
    return bank
  }

  /** Where a slot's factors are. */
  #factors(slot: number): { readonly floats: Float32Array; readonly at: number } {
    const bank = this.#bankOf(slot)
    return { floats: bank.floats, at: bank.factorsAt(this.#blockOf(slot)) / 4 + (slot % blockRows) }
  }
}

interface Entry {
  readonly vector: Float32Array
  /** What its scores are multiplied by. */
  readonly factor: number
  /** Of the vector as it is kept: one for the cosine. */
  norm: number
  bar: number
}

/** One memory: the vector, what is found, then the blocks. */
class Bank {
  readonly #memory: Memory
  readonly #kernel: StandingKernel
  readonly #rowBytes: number
  readonly #blockBytes: number
  readonly #foundAt: number
  readonly #blocksAt: number
  #blocks = 0
  floats: Float32Array
  found: Int32Array
  #shorts: Int16Array

  constructor(rowBytes: number) {
    this.#rowBytes = rowBytes
    this.#blockBytes = blockRows * rowBytes + factorBytes
    this.#foundAt = rowBytes * 2
    this.#blocksAt = this.#foundAt + blocksAtOnce * blockRows * 4
    this.#memory = memoryOf(Math.ceil(this.#blocksAt / pageBytes))
    this.#kernel = standingKernelOf(this.#memory)
    this.floats = new Float32Array(this.#memory.buffer)
    this.found = new Int32Array(this.#memory.buffer, this.#foundAt, blocksAtOnce * blockRows)
    this.#shorts = new Int16Array(this.#memory.buffer, 0, rowBytes)
  }

  get bytes(): number {
    return this.#memory.buffer.byteLength
  }

  /** Makes room for so many blocks; nothing reaches what is new. */
  reserve(blocks: number): void {
    const has = this.#memory.buffer.byteLength
    const needed = this.#blocksAt + blocks * this.#blockBytes
    if (blocks <= this.#blocks) return
    const wanted = Math.min(Math.max(needed, has * growthFactor), memoryBytesMax)
    this.#memory.grow(Math.ceil(wanted / pageBytes) - has / pageBytes)
    const { buffer } = this.#memory
    this.floats = new Float32Array(buffer)
    this.found = new Int32Array(buffer, this.#foundAt, blocksAtOnce * blockRows)
    this.#shorts = new Int16Array(buffer, 0, this.#rowBytes)
    const after = Math.floor((buffer.byteLength - this.#blocksAt) / this.#blockBytes)
    for (; this.#blocks < after; this.#blocks++) {
      const at = this.factorsAt(this.#blocks) / 4 + 2 * blockRows
      this.floats.fill(Number.POSITIVE_INFINITY, at, at + blockRows)
    }
  }

  row(block: number, place: number): Int8Array {
    return new Int8Array(this.#memory.buffer, this.#blockAt(block) + place * this.#rowBytes, this.#rowBytes)
  }

  factorsAt(block: number): number {
    return this.#blockAt(block) + blockRows * this.#rowBytes
  }

  setVector(vector: Float32Array, scale: number): void {
    const shorts = this.#shorts
    for (let i = 0; i < vector.length; i++) shorts[i] = Math.round(vector[i]! * scale)
  }

  /** Puts the numbers of rows that may be reached into `found`, and returns how many there are. */
  reached(block: number, count: number, first: number, scale: number, shift: number, factor: number): number {
    const from = this.#blockAt(block)
    const to = from + count * this.#blockBytes
    const queryEnd = this.#rowBytes * 2
    const number = first + block * blockRows
    return (
      (this.#kernel.reached(from, to, 0, queryEnd, scale, shift, factor, number, this.#foundAt) - this.#foundAt) / 4
    )
  }

  #blockAt(block: number): number {
    return this.#blocksAt + block * this.#blockBytes
  }
}

/** Greatest component of a row, and of a vector of length one: 4,096 products of both stay below 2^31. */
const rowMax = 127
const vectorMax = 32_767

/** Relative errors of a few operations in float32, with room to spare. */
const slop = 2 ** -20

/** Lengths beyond which float32 may not hold what is computed. */
const beyondFloat = 1e18

/** Blocks looked at in one call. */
const blocksAtOnce = 1_024

const bankBytesMax = 2 ** 30
const memoryBytesMax = bankBytesMax + 2 ** 20

/** By what a memory grows at least. */
const growthFactor = 1.25

/** Estimate of V8's memory: an entry and its vector's header. */
const entryBytes = 200

const normOf = (vector: Float32Array): number => {
  let sum = 0
  for (let i = 0; i < vector.length; i++) sum += vector[i]! * vector[i]!
  return Math.sqrt(sum)
}
