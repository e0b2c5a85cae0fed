/**
 * The vectors of a partition as they were inserted, by slot, and the exact scores of a query against them. Rows lie in
 * chunks, so that growing copies little; for the cosine the inverse norm is kept beside each row.
 */
import type { Metric } from "../../protocol/Fields.ts"
import type { Bitset } from "./Bitset.ts"
import type { TopK } from "./TopK.ts"

export class VectorArena {
  readonly dimensions: number
  readonly metric: Metric
  /** Rows of a chunk, a power of two; the first chunk grows up to it. */
  readonly chunkRows: number
  readonly #shift: number
  readonly #chunks: Array<Float32Array<ArrayBuffer>> = []
  #inverseNorms = new Float64Array(0)

  constructor(dimensions: number, metric: Metric) {
    this.dimensions = dimensions
    this.metric = metric
    this.#shift = Math.max(chunkShiftMin, 31 - Math.clz32(Math.floor(chunkBytes / (dimensions * 4))))
    this.chunkRows = 1 << this.#shift
  }

  set(slot: number, vector: Float32Array): void {
    this.reserve(slot + 1)
    this.#chunks[slot >>> this.#shift]!.set(vector, (slot & (this.chunkRows - 1)) * this.dimensions)
    this.normed(slot)
  }

  /** Makes room for so many slots. */
  reserve(slots: number): void {
    const { chunkRows, dimensions } = this
    while (this.#rows < slots) {
      const first = this.#chunks[0]
      if (first !== undefined && first.length < chunkRows * dimensions) {
        const rows = Math.min(chunkRows, Math.max(slots, (first.length / dimensions) * 2))
        const grown = new Float32Array(rows * dimensions)
        grown.set(first)
        this.#chunks[0] = grown
      } else {
        const rows = first === undefined ? Math.min(chunkRows, Math.max(slots, firstRows)) : chunkRows
        this.#chunks.push(new Float32Array(rows * dimensions))
      }
    }
    if (this.metric === "cosine" && this.#inverseNorms.length < slots) {
      const grown = new Float64Array(Math.max(slots, firstRows, Math.ceil(this.#inverseNorms.length * 1.5)))
      grown.set(this.#inverseNorms)
      this.#inverseNorms = grown
    }
  }

  /** Takes note of the norm of a row that was written through {@link chunk}. */
  normed(slot: number): void {
    if (this.metric === "cosine")
      this.#inverseNorms[slot] = inverseNorm(this.#chunkOf(slot), this.#offset(slot), this.dimensions)
  }

  /** The memory of rows `index * chunkRows` and on. */
  chunk(index: number): Float32Array<ArrayBuffer> | undefined {
    return this.#chunks[index]
  }

  /** A view of the row; valid until the arena next grows. */
  row(slot: number): Float32Array {
    const offset = this.#offset(slot)
    return this.#chunkOf(slot).subarray(offset, offset + this.dimensions)
  }

  equals(slot: number, vector: Float32Array): boolean {
    const chunk = this.#chunkOf(slot)
    const offset = this.#offset(slot)
    for (let i = 0; i < vector.length; i++) if (chunk[offset + i] !== vector[i]) return false
    return true
  }

  /** Writes the row into `point` as the graph takes it: of length one for the cosine. */
  toPoint(slot: number, point: Array<number>): void {
    const chunk = this.#chunkOf(slot)
    const offset = this.#offset(slot)
    const factor = this.metric === "cosine" ? this.#inverseNorms[slot]! : 1
    for (let i = 0; i < this.dimensions; i++) point[i] = chunk[offset + i]! * factor
  }

  /** The score of a query against a row: higher is nearer. `queryFactor` is {@link factorOf} the query. */
  score(query: Float32Array, queryFactor: number, slot: number): number {
    const chunk = this.#chunkOf(slot)
    const offset = this.#offset(slot)
    switch (this.metric) {
      case "cosine":
        return dot(chunk, offset, query, this.dimensions) * this.#inverseNorms[slot]! * queryFactor
      case "ip":
        return dot(chunk, offset, query, this.dimensions)
      case "l2":
        return -Math.sqrt(squaredDistance(chunk, offset, query, this.dimensions))
    }
  }

  /** What the scores of a query are multiplied by. */
  factorOf(query: Float32Array): number {
    return this.metric === "cosine" ? inverseNorm(query, 0, this.dimensions) : 1
  }

  /** Offers every slot of `slots` to `top`. */
  scan(query: Float32Array, slots: Bitset, top: TopK): void {
    const factor = this.factorOf(query)
    const wordsInChunk = this.chunkRows >>> 5
    for (let i = 0; i < this.#chunks.length; i++) {
      const from = i * wordsInChunk
      const to = Math.min(slots.words.length, from + wordsInChunk)
      // A loop of its own for each metric: what is inlined into it decides how fast this is.
      if (this.metric === "l2") this.#scanDistances(this.#chunks[i]!, query, slots.words, from, to, top)
      else this.#scanProducts(this.#chunks[i]!, query, factor, slots.words, from, to, top)
    }
  }

  #scanProducts(
    chunk: Float32Array,
    query: Float32Array,
    factor: number,
    words: Uint32Array,
    from: number,
    to: number,
    top: TopK
  ): void {
    const { dimensions } = this
    const mask = this.chunkRows - 1
    const norms = this.metric === "cosine" ? this.#inverseNorms : undefined
    for (let i = from; i < to; i++) {
      let word = words[i]!
      while (word !== 0) {
        const slot = (i << 5) + (31 - Math.clz32(word & -word))
        word &= word - 1
        const product = dot(chunk, (slot & mask) * dimensions, query, dimensions)
        const score = norms === undefined ? product : product * norms[slot]! * factor
        if (score >= top.least) top.offer(score, slot)
      }
    }
  }

  #scanDistances(
    chunk: Float32Array,
    query: Float32Array,
    words: Uint32Array,
    from: number,
    to: number,
    top: TopK
  ): void {
    const { dimensions } = this
    const mask = this.chunkRows - 1
    for (let i = from; i < to; i++) {
      let word = words[i]!
      while (word !== 0) {
        const slot = (i << 5) + (31 - Math.clz32(word & -word))
        word &= word - 1
        const score = -Math.sqrt(squaredDistance(chunk, (slot & mask) * dimensions, query, dimensions))
        if (score >= top.least) top.offer(score, slot)
      }
    }
  }

  get bytes(): number {
    return this.#rows * this.dimensions * 4 + this.#inverseNorms.byteLength
  }

  get #rows(): number {
    const chunks = this.#chunks.length
    if (chunks === 0) return 0
    return (chunks - 1) * this.chunkRows + this.#chunks[chunks - 1]!.length / this.dimensions
  }

  #chunkOf(slot: number): Float32Array {
    return this.#chunks[slot >>> this.#shift]!
  }

  #offset(slot: number): number {
    return (slot & (this.chunkRows - 1)) * this.dimensions
  }
}

/** Bytes that a chunk is at most; it has at least the rows of one word of a set of slots. */
const chunkBytes = 1 << 20
const chunkShiftMin = 5
/** Rows of a partition that has just begun: many partitions stay small. */
const firstRows = 16

const dot = (rows: Float32Array, offset: number, query: Float32Array, dimensions: number): number => {
  let a = 0
  let b = 0
  let c = 0
  let d = 0
  const whole = dimensions & ~3
  let i = 0
  for (; i < whole; i += 4) {
    a += rows[offset + i]! * query[i]!
    b += rows[offset + i + 1]! * query[i + 1]!
    c += rows[offset + i + 2]! * query[i + 2]!
    d += rows[offset + i + 3]! * query[i + 3]!
  }
  for (; i < dimensions; i++) a += rows[offset + i]! * query[i]!
  return a + b + c + d
}

const squaredDistance = (rows: Float32Array, offset: number, query: Float32Array, dimensions: number): number => {
  let a = 0
  let b = 0
  let c = 0
  let d = 0
  const whole = dimensions & ~3
  let i = 0
  for (; i < whole; i += 4) {
    const p = rows[offset + i]! - query[i]!
    const q = rows[offset + i + 1]! - query[i + 1]!
    const r = rows[offset + i + 2]! - query[i + 2]!
    const s = rows[offset + i + 3]! - query[i + 3]!
    a += p * p
    b += q * q
    c += r * r
    d += s * s
  }
  for (; i < dimensions; i++) {
    const p = rows[offset + i]! - query[i]!
    a += p * p
  }
  return a + b + c + d
}

const inverseNorm = (rows: Float32Array, offset: number, dimensions: number): number => {
  let sum = 0
  for (let i = 0; i < dimensions; i++) sum += rows[offset + i]! * rows[offset + i]!
  return sum > 0 ? 1 / Math.sqrt(sum) : 0
}
