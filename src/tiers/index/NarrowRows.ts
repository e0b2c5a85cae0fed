/**
 * Vectors in half or a quarter of float32's bytes, to put a query's candidates into order before the last few are scored
 * exactly: bfloat16 (float32's upper half, rounded), or eight bits with a scale for each row. What is kept is a vector's
 * distance from the middle of all, which is where the precision is needed; the order of scores is the same.
 */
import {
  add,
  addFloat,
  addInts,
  addLanes,
  advance,
  andLanes,
  assemble,
  type Code,
  constant,
  constantInts,
  define,
  dotShorts,
  extendHighBytes,
  extendLowBytes,
  type FunctionCode,
  floatOfInt,
  get,
  i32,
  Kernel,
  lane,
  laneInt,
  lessThan,
  loadInt,
  loadLanes,
  loop,
  memoryOf,
  multiply,
  multiplyLanes,
  repeatIf,
  set,
  shiftLeft,
  shiftLeftInts,
  storeFloat,
  tee,
  until,
  v128,
  zeroLanes
} from "./Assembler.ts"
import { Layout, prepare, type Quantiser, strideOf } from "./Quantiser.ts"

export type Narrow = "bf16" | "i8"

export class NarrowRows {
  readonly kind: Narrow
  readonly #quantiser: Quantiser
  readonly #rowBytes: number
  readonly #rowsAt: number
  readonly #listAt: number
  readonly #outAt: number
  readonly #queryEnd: number
  readonly #memory
  readonly #kernel: NarrowKernel
  readonly #list: Int32Array
  readonly #out: Float32Array
  readonly #queryShorts: Int16Array
  readonly #queryFloats: Float32Array
  readonly #middle: Float32Array
  readonly #prepared: Float32Array
  readonly #scales: Float32Array
  /** Squared norms of what is kept, for the Euclidean distance. */
  readonly #norms: Float32Array | undefined

  /** Rows for `count` vectors; `sizes` are those of the quantiser's lists. */
  constructor(kind: Narrow, quantiser: Quantiser, sizes: Uint32Array, count: number) {
    this.kind = kind
    this.#quantiser = quantiser
    const components = Math.ceil(quantiser.dimensions / 16) * 16
    this.#rowBytes = kind === "bf16" ? Math.ceil(quantiser.dimensions / 8) * 16 : components
    const layout = new Layout()
    this.#queryEnd = layout.take(components * 4) + (kind === "bf16" ? this.#rowBytes * 2 : components * 2)
    this.#listAt = layout.take(listRows * 4)
    this.#outAt = layout.take(listRows * 4)
    this.#rowsAt = layout.take(count * this.#rowBytes)
    this.#memory = memoryOf(layout.pages)
    this.#kernel = kernel.on(this.#memory)
    const { buffer } = this.#memory
    this.#list = new Int32Array(buffer, this.#listAt, listRows)
    this.#out = new Float32Array(buffer, this.#outAt, listRows)
    this.#queryShorts = new Int16Array(buffer, 0, this.#queryEnd / 2)
    this.#queryFloats = new Float32Array(buffer, 0, this.#queryEnd / 4)
    this.#middle = middleOf(quantiser, sizes)
    this.#prepared = new Float32Array(Math.max(components, strideOf(quantiser.dimensions)))
    this.#scales = new Float32Array(kind === "i8" ? count : 0)
    this.#norms = quantiser.metric === "l2" ? new Float32Array(count) : undefined
  }

  /** Whether so many rows fit into one memory. */
  static fits(kind: Narrow, dimensions: number, count: number): boolean {
    return count * Math.ceil(dimensions / 16) * 16 * (kind === "bf16" ? 2 : 1) < memoryBytesMax
  }

  /** Sets rows from `slot` on from vectors that follow one another. */
  set(slot: number, vectors: Float32Array): void {
    const { dimensions } = this.#quantiser
    for (let at = 0; at < vectors.length; at += dimensions, slot++) {
      const row = this.#centred(vectors, at)
      const place = this.#rowsAt + slot * this.#rowBytes
      if (this.kind === "i8") this.#setBytes(slot, row, place)
      else this.#setHalves(slot, row, place)
    }
  }

  /** Writes of each slot a value that is less the nearer it is to the query. */
  values(query: Float32Array, slots: Int32Array, into: Float32Array): void {
    const isEuclidean = this.#norms !== undefined
    const row = isEuclidean ? this.#centred(query, 0) : this.#uncentred(query)
    const scale = this.kind === "i8" ? this.#queryBytes(row) : this.#queryHalves(row)
    const list = this.#list
    const out = this.#out
    const scales = this.kind === "i8" ? this.#scales : undefined
    const norms = this.#norms
    const products = this.kind === "i8" ? this.#kernel.bytes : this.#kernel.halves
    const factor = isEuclidean ? 2 * scale : scale
    for (let from = 0; from < slots.length; from += listRows) {
      const count = Math.min(listRows, slots.length - from)
      list.set(count === slots.length ? slots : slots.subarray(from, from + count))
      products(this.#listAt, count, this.#rowsAt, this.#rowBytes, 0, this.#queryEnd, this.#outAt)
      for (let i = 0; i < count; i++) {
        const slot = list[i]!
        const product = out[i]! * factor * (scales === undefined ? 1 : scales[slot]!)
        into[from + i] = (norms === undefined ? 0 : norms[slot]!) - product
      }
    }
  }

  get bytes(): number {
    return this.#memory.buffer.byteLength + this.#scales.byteLength + (this.#norms?.byteLength ?? 0)
  }

  #centred(vectors: Float32Array, from: number): Float32Array {
    const row = this.#prepared
    prepare(this.#quantiser, vectors, from, row, 0)
    for (let i = 0; i < this.#middle.length; i++) row[i] = row[i]! - this.#middle[i]!
    return row
  }

  #uncentred(query: Float32Array): Float32Array {
    prepare(this.#quantiser, query, 0, this.#prepared, 0)
    return this.#prepared
  }

  #setBytes(slot: number, row: Float32Array, place: number): void {
    const { dimensions } = this.#quantiser
    const bytes = new Int8Array(this.#memory.buffer, place, this.#rowBytes)
    const greatest = greatestOf(row, dimensions)
    const inverse = greatest > 0 && Number.isFinite(greatest) ? byteMax / greatest : 0
    const scale = inverse === 0 ? 0 : greatest / byteMax
    let norm = 0
    for (let i = 0; i < dimensions; i++) {
      const byte = Math.round(row[i]! * inverse)
      bytes[i] = byte
      norm += (byte * scale) ** 2
    }
    this.#scales[slot] = scale
    if (this.#norms !== undefined) this.#norms[slot] = norm
  }

  #setHalves(slot: number, row: Float32Array, place: number): void {
    const { dimensions } = this.#quantiser
    const halves = new Uint16Array(this.#memory.buffer, place, this.#rowBytes / 2)
    const words = new Uint32Array(row.buffer, 0, row.length)
    let norm = 0
    for (let i = 0; i < dimensions; i++) {
      const word = words[i]!
      // To the nearest, to the even one where two are equally near.
      const half = (word + 0x7fff + ((word >>> 16) & 1)) >>> 16
      halves[i] = half
      words[i] = half << 16
      norm += row[i]! * row[i]!
    }
    if (this.#norms !== undefined) this.#norms[slot] = norm
  }

  /** The query as int16s of twelve bits, so that sums of products stay within 32; returns what one of them stands for. */
  #queryBytes(row: Float32Array): number {
    const { dimensions } = this.#quantiser
    const shorts = this.#queryShorts
    const greatest = greatestOf(row, dimensions)
    const inverse = greatest > 0 && Number.isFinite(greatest) ? queryMax / greatest : 0
    for (let i = 0; i < dimensions; i++) shorts[i] = Math.round(row[i]! * inverse)
    return inverse === 0 ? 0 : greatest / queryMax
  }

  /** The query as float32s: of each eight components the even ones, then the odd ones. */
  #queryHalves(row: Float32Array): number {
    const { dimensions } = this.#quantiser
    const floats = this.#queryFloats
    for (let i = 0; i < dimensions; i++) floats[(i & ~7) + ((i & 1) << 2) + ((i & 7) >>> 1)] = row[i]!
    return 1
  }
}

const middleOf = ({ centroids, dimensions }: Quantiser, sizes: Uint32Array): Float32Array => {
  const stride = strideOf(dimensions)
  const sums = new Float64Array(dimensions)
  let count = 0
  for (let list = 0; list < sizes.length; list++) {
    count += sizes[list]!
    for (let d = 0; d < dimensions; d++) sums[d] = sums[d]! + centroids[list * stride + d]! * sizes[list]!
  }
  return Float32Array.from(sums, (sum) => (count === 0 ? 0 : sum / count))
}

const greatestOf = (row: Float32Array, dimensions: number): number => {
  let greatest = 0
  for (let i = 0; i < dimensions; i++) {
    const component = Math.abs(row[i]!)
    if (component > greatest) greatest = component
  }
  return greatest
}

/** Greatest component of a row, and of a query: 4,096 products of both stay below 2^31. */
const byteMax = 127
const queryMax = 2_047

/** Rows looked at in one call. */
const listRows = 1_024

/** Bytes of rows in one memory. */
const memoryBytesMax = 2 ** 31 + 2 ** 30

// --- The loops ---------------------------------------------------------------------------------------------------------

/** As `RowKernel.products`, of rows of bytes and of bfloat16s. */
interface NarrowKernel {
  readonly bytes: Products
  readonly halves: Products
}

type Products = (
  list: number,
  count: number,
  rows: number,
  rowBytes: number,
  query: number,
  queryEnd: number,
  out: number
) => void

const products = (
  name: string,
  stride: number,
  addPart: (local: Locals) => Code,
  result: (sum: number) => Code
): FunctionCode =>
  define(
    name,
    { list: i32, count: i32, rows: i32, rowBytes: i32, query: i32, queryEnd: i32, out: i32 },
    undefined,
    { row: i32, at: i32, listEnd: i32, part: v128, sum: v128, other: v128 },
    (local) => {
      const { list, count, rows, rowBytes, query, queryEnd, out, row, at, listEnd, sum, other } = local
      return [
        ...get(list),
        ...get(count),
        ...constant(2),
        ...shiftLeft,
        ...add,
        ...set(listEnd),
        ...until(
          [...get(list), ...get(listEnd), ...lessThan, ...constant(1), ...lessThan],
          [
            ...get(list),
            ...loadInt,
            ...get(rowBytes),
            ...multiply,
            ...get(rows),
            ...add,
            ...set(row),
            ...get(query),
            ...set(at),
            ...zeroLanes,
            ...tee(sum),
            ...set(other),
            ...loop([
              ...addPart(local),
              ...advance(row, 16),
              ...get(at),
              ...constant(stride),
              ...add,
              ...tee(at),
              ...get(queryEnd),
              ...lessThan,
              ...repeatIf([])
            ]),
            ...get(out),
            ...result(sum),
            ...result(other),
            ...addFloat,
            ...storeFloat,
            ...advance(out, 4),
            ...advance(list, 4)
          ]
        )
      ]
    }
  )

interface Locals {
  readonly row: number
  readonly at: number
  readonly part: number
  readonly sum: number
  readonly other: number
}

/** Sixteen components at a time: bytes become int16s, products of pairs int32s. */
const addBytes = ({ row, at, part, sum, other }: Locals): Code => [
  ...get(row),
  ...loadLanes(0),
  ...tee(part),
  ...extendLowBytes,
  ...get(at),
  ...loadLanes(0),
  ...dotShorts,
  ...get(sum),
  ...addInts,
  ...set(sum),
  ...get(part),
  ...extendHighBytes,
  ...get(at),
  ...loadLanes(16),
  ...dotShorts,
  ...get(other),
  ...addInts,
  ...set(other)
]

/** Eight components at a time: an int32 is the even one in its lower half, the odd one in its upper. */
const addHalves = ({ row, at, part, sum, other }: Locals): Code => [
  ...get(row),
  ...loadLanes(0),
  ...tee(part),
  ...constant(16),
  ...shiftLeftInts,
  ...get(at),
  ...loadLanes(0),
  ...multiplyLanes,
  ...get(sum),
  ...addLanes,
  ...set(sum),
  ...get(part),
  ...constantInts(-65_536),
  ...andLanes,
  ...get(at),
  ...loadLanes(16),
  ...multiplyLanes,
  ...get(other),
  ...addLanes,
  ...set(other)
]

const kernel = new Kernel<NarrowKernel>(() =>
  assemble([
    products("bytes", 32, addBytes, (sum) => [
      ...[0, 1, 2, 3].flatMap((n) => [...get(sum), ...laneInt(n)]),
      ...add,
      ...add,
      ...add,
      ...floatOfInt
    ]),
    products("halves", 32, addHalves, (sum) => [
      ...[0, 1, 2, 3].flatMap((n) => [...get(sum), ...lane(n)]),
      ...addFloat,
      ...addFloat,
      ...addFloat
    ])
  ])
)
