/**
 * Product quantisation of what is left of a vector once the nearest of some hundred centroids is taken away (Jégou, Douze
 * and Schmid, "Product Quantization for Nearest Neighbor Search", 2011): a subspace is two components, a code four bits,
 * so codes are a sixteenth of float32. The centroids are also the beginnings of inverted lists.
 *
 * Vectors are prepared first: of length one for the cosine, and else scaled by a power of two so that none is out of
 * float32's reach when squared; neither changes which of them are nearest. Training looks at a bounded sample, is seeded,
 * and gives the same quantiser for the same vectors.
 */
import type { Metric } from "../../protocol/Fields.ts"
import { memoryOf, pageBytes } from "./Assembler.ts"
import {
  codebookBytes,
  type SketchKernel,
  sketchKernelOf,
  subspaceCentroids,
  subspaceComponents
} from "./SketchKernel.ts"
import { inverseNorm } from "./VectorArena.ts"
import type { Work } from "./Work.ts"

/** Vectors by number. */
export interface RowSource {
  readonly count: number
  /** Copies the rows from `from` on, one after another, until `into` is full. */
  readonly rows: (from: number, into: Float32Array) => void
}

export interface Quantiser {
  readonly dimensions: number
  readonly metric: Metric
  /** What components are multiplied by before anything else, but for the cosine. */
  readonly unit: number
  /** `lists` rows of {@link strideOf} the dimensions, of prepared vectors. */
  readonly centroids: Float32Array
  /** {@link codebookBytes} of each subspace. */
  readonly codebook: Float32Array
  /** Vectors that there were when it was trained. */
  readonly trainedOn: number
  /** Mean squared distance of the sample's prepared vectors from what their codes say. */
  readonly error: number
}

/** Components of a prepared vector: what one vector instruction takes at a time divides it, the rest are zeros. */
export const strideOf = (dimensions: number): number => Math.ceil(dimensions / 4) * 4

export const subspacesOf = (dimensions: number): number => Math.ceil(dimensions / subspaceComponents)

/** Inverted lists for so many vectors; a single one is looked at whole. */
export const listsFor = (count: number): number =>
  count < flatMax ? 1 : Math.min(listsMax, Math.round((Math.sqrt(count) * listsPerRoot) / 4) * 4)

export const prepare = (
  { metric, unit, dimensions }: Pick<Quantiser, "metric" | "unit" | "dimensions">,
  vector: Float32Array,
  from: number,
  into: Float32Array,
  at: number
): void => {
  const factor = metric === "cosine" ? inverseNorm(vector, from, dimensions) : unit
  for (let i = 0; i < dimensions; i++) into[at + i] = vector[from + i]! * factor
}

/** Trains on a sample of the source's vectors. */
export function* trainQuantiser(
  spec: { readonly dimensions: number; readonly metric: Metric },
  source: RowSource,
  lists = listsFor(source.count)
): Work<Quantiser> {
  const { dimensions, metric } = spec
  const stride = strideOf(dimensions)
  const size = Math.min(
    source.count,
    Math.max(sampleMin, lists * samplePerList),
    Math.max(sampleLeast, Math.floor(sampleBytesMax / (stride * 4)))
  )
  const random = mulberry32(seed)
  const trainer = new Trainer(stride, Math.max(1, size), lists)
  const raw = new Float32Array(Math.max(1, size) * dimensions)
  for (let i = 0; i < size; i++) {
    const row = Math.min(source.count - 1, Math.floor(((i + random()) * source.count) / size))
    source.rows(row, raw.subarray(i * dimensions, (i + 1) * dimensions))
    if (i % sampleRowsInStep === 0) yield
  }
  const unit = metric === "cosine" ? 1 : unitOf(raw)
  const rows = trainer.rows
  for (let i = 0; i < size; i++) prepare({ metric, unit, dimensions }, raw, i * dimensions, rows, i * stride)
  yield
  yield* trainer.findCentroids(size, random)
  yield* trainer.toResiduals(size)
  const codebook = new Float32Array((subspacesOf(dimensions) * codebookBytes) / 4)
  const error = yield* trainer.findCodebook(size, codebook, random)
  return { dimensions, metric, unit, centroids: trainer.centroids.slice(), codebook, trainedOn: source.count, error }
}

/** Encodes vectors some at a time. */
export class Encoder {
  readonly #quantiser: Quantiser
  readonly #stride: number
  readonly #subspaces: number
  readonly #kernel: SketchKernel
  readonly #memory
  readonly #raw: Float32Array
  readonly #rowsAt: number
  readonly #centroidsAt: number
  readonly #halfNormsAt: number
  readonly #codebookAt: number
  readonly #nearestAt: number
  readonly #codesAt: number
  readonly #lists: number
  /** Vectors taken at once. */
  readonly chunk: number
  /** Of the vectors encoded last: their list, and their codes, a byte each, `chunk` of each subspace. */
  readonly listOf: Uint32Array
  readonly codes: Uint8Array
  /** Sum of the squared distances from what the codes say, over all vectors encoded. */
  squaredErrors = 0
  /** Of each list the sum of its vectors' squared distances from the centroid. */
  readonly squaredSpreads: Float64Array

  constructor(quantiser: Quantiser) {
    const { dimensions, centroids } = quantiser
    this.#quantiser = quantiser
    const stride = strideOf(dimensions)
    this.#stride = stride
    this.#subspaces = subspacesOf(dimensions)
    this.#lists = centroids.length / stride
    const padded = Math.ceil(this.#lists / 4) * 4
    this.chunk = Math.max(1, Math.min(chunkRowsMax, Math.floor(stepProducts / (padded * stride))))
    const layout = new Layout()
    this.#rowsAt = layout.take(this.chunk * stride * 4)
    this.#centroidsAt = layout.take(padded * stride * 4)
    this.#halfNormsAt = layout.take(padded * 4)
    this.#codebookAt = layout.take(quantiser.codebook.byteLength)
    this.#nearestAt = layout.take(this.chunk * 32)
    this.#codesAt = layout.take(this.chunk * this.#subspaces)
    this.#memory = memoryOf(layout.pages)
    this.#kernel = sketchKernelOf(this.#memory)
    this.#raw = new Float32Array(this.chunk * dimensions)
    this.listOf = new Uint32Array(this.chunk)
    this.squaredSpreads = new Float64Array(this.#lists)
    this.codes = new Uint8Array(this.#memory.buffer, this.#codesAt, this.chunk * this.#subspaces)
    const floats = new Float32Array(this.#memory.buffer)
    floats.set(centroids, this.#centroidsAt / 4)
    floats.set(quantiser.codebook, this.#codebookAt / 4)
    setHalfNorms(floats, this.#centroidsAt / 4, this.#halfNormsAt / 4, this.#lists, padded, stride)
  }

  /** Encodes the source's vectors from `from` on; returns how many. */
  encode(source: RowSource, from: number): number {
    const { dimensions } = this.#quantiser
    const stride = this.#stride
    const count = Math.min(this.chunk, source.count - from)
    source.rows(from, this.#raw.subarray(0, count * dimensions))
    const floats = new Float32Array(this.#memory.buffer)
    const rows = this.#rowsAt / 4
    for (let i = 0; i < count; i++) prepare(this.#quantiser, this.#raw, i * dimensions, floats, rows + i * stride)
    const rowsEnd = this.#rowsAt + count * stride * 4
    const padded = Math.ceil(this.#lists / 4) * 4
    this.#kernel.nearest(
      this.#rowsAt,
      rowsEnd,
      stride * 4,
      this.#centroidsAt,
      this.#halfNormsAt,
      this.#halfNormsAt + padded * 4,
      this.#nearestAt
    )
    const ints = new Int32Array(this.#memory.buffer)
    for (let i = 0; i < count; i++) {
      const list = nearestOf(floats, ints, this.#nearestAt / 4 + i * 8)
      this.listOf[i] = list
      takeAway(floats, rows + i * stride, this.#centroidsAt / 4 + list * stride, stride)
      let squares = 0
      for (let d = 0; d < stride; d++) squares += floats[rows + i * stride + d]! ** 2
      this.squaredSpreads[list]! += squares
    }
    for (let m = 0; m < this.#subspaces; m++) {
      this.#kernel.encode(
        this.#rowsAt + m * subspaceComponents * 4,
        rowsEnd + m * subspaceComponents * 4,
        stride * 4,
        this.#codebookAt + m * codebookBytes,
        this.#codesAt + m * this.chunk
      )
    }
    this.squaredErrors += squaredErrorsOf(floats, rows, stride, count, this.codes, this.chunk, this.#quantiser.codebook)
    return count
  }
}

/** Memory for training: the sample, which becomes residuals, and what is found from it. */
class Trainer {
  readonly rows: Float32Array
  readonly centroids: Float32Array
  readonly #memory
  readonly #kernel: SketchKernel
  readonly #stride: number
  readonly #lists: number
  readonly #rowsAt: number
  readonly #centroidsAt: number
  readonly #halfNormsAt: number
  readonly #nearestAt: number
  readonly #codebookAt: number
  readonly #codesAt: number
  readonly #chunk: number
  readonly #assigned: Uint32Array

  constructor(stride: number, size: number, lists: number) {
    const padded = Math.ceil(lists / 4) * 4
    this.#stride = stride
    this.#lists = lists
    this.#chunk = Math.max(1, Math.min(size, Math.floor(stepProducts / (padded * stride))))
    const layout = new Layout()
    this.#rowsAt = layout.take(size * stride * 4)
    this.#centroidsAt = layout.take(padded * stride * 4)
    this.#halfNormsAt = layout.take(padded * 4)
    this.#nearestAt = layout.take(this.#chunk * 32)
    this.#codebookAt = layout.take(codebookBytes)
    this.#codesAt = layout.take(size)
    this.#memory = memoryOf(layout.pages)
    this.#kernel = sketchKernelOf(this.#memory)
    this.rows = new Float32Array(this.#memory.buffer, this.#rowsAt, size * stride)
    this.centroids = new Float32Array(this.#memory.buffer, this.#centroidsAt, lists * stride)
    this.#assigned = new Uint32Array(size)
  }

  /** Lloyd's k-means, from vectors of the sample. */
  *findCentroids(size: number, random: () => number): Work<void> {
    const lists = this.#lists
    const stride = this.#stride
    const { rows, centroids } = this
    for (let list = 0; list < lists; list++) {
      const row = size === 0 ? 0 : Math.min(size - 1, Math.floor(((list + random()) * size) / lists))
      if (size > 0) centroids.set(rows.subarray(row * stride, (row + 1) * stride), list * stride)
    }
    const sums = new Float64Array(lists * stride)
    const counts = new Uint32Array(lists)
    for (let round = 0; round < (lists === 1 ? 1 : listRounds); round++) {
      yield* this.#assign(size)
      sums.fill(0)
      counts.fill(0)
      for (let i = 0; i < size; i++) {
        const list = this.#assigned[i]!
        counts[list]! += 1
        const at = list * stride
        const from = i * stride
        for (let d = 0; d < stride; d++) sums[at + d] = sums[at + d]! + rows[from + d]!
        if (i % sampleRowsInStep === sampleRowsInStep - 1) yield
      }
      for (let list = 0; list < lists; list++) {
        const count = counts[list]!
        if (count === 0) continue
        for (let d = 0; d < stride; d++) centroids[list * stride + d] = sums[list * stride + d]! / count
      }
      this.#fillEmpty(counts)
      yield
    }
  }

  /** Takes its centroid away from each vector of the sample. */
  *toResiduals(size: number): Work<void> {
    yield* this.#assign(size)
    const floats = new Float32Array(this.#memory.buffer)
    const stride = this.#stride
    for (let i = 0; i < size; i++) {
      takeAway(floats, this.#rowsAt / 4 + i * stride, this.#centroidsAt / 4 + this.#assigned[i]! * stride, stride)
    }
    yield
  }

  /** k-means in each subspace. Returns the mean squared error. */
  *findCodebook(size: number, codebook: Float32Array, random: () => number): Work<number> {
    const stride = this.#stride
    const { rows } = this
    const rowsEnd = this.#rowsAt + size * stride * 4
    const codes = new Uint8Array(this.#memory.buffer, this.#codesAt, Math.max(1, size))
    const centroids = new Float32Array(this.#memory.buffer, this.#codebookAt, codebookBytes / 4)
    const sums = new Float64Array(subspaceCentroids * 2)
    const counts = new Uint32Array(subspaceCentroids)
    const subspaces = codebook.length / centroids.length
    let squaredErrors = 0
    for (let m = 0; m < subspaces && size > 0; m++) {
      for (let j = 0; j < subspaceCentroids; j++) {
        const row = Math.min(size - 1, Math.floor(((j + random()) * size) / subspaceCentroids))
        centroids[j] = rows[row * stride + 2 * m]!
        centroids[subspaceCentroids + j] = rows[row * stride + 2 * m + 1]!
      }
      for (let round = 0; round < codebookRounds; round++) {
        this.#kernel.encode(this.#rowsAt + m * 8, rowsEnd + m * 8, stride * 4, this.#codebookAt, this.#codesAt)
        sums.fill(0)
        counts.fill(0)
        for (let i = 0; i < size; i++) {
          const code = codes[i]!
          counts[code]! += 1
          sums[code] = sums[code]! + rows[i * stride + 2 * m]!
          sums[subspaceCentroids + code] = sums[subspaceCentroids + code]! + rows[i * stride + 2 * m + 1]!
        }
        for (let j = 0; j < subspaceCentroids; j++) {
          if (counts[j] === 0) {
            // One that stands for nothing takes some vector instead.
            const row = Math.floor(random() * size)
            centroids[j] = rows[row * stride + 2 * m]!
            centroids[subspaceCentroids + j] = rows[row * stride + 2 * m + 1]!
          } else {
            centroids[j] = sums[j]! / counts[j]!
            centroids[subspaceCentroids + j] = sums[subspaceCentroids + j]! / counts[j]!
          }
        }
        if (size * (round + 1) > sampleRowsInStep) yield
      }
      this.#kernel.encode(this.#rowsAt + m * 8, rowsEnd + m * 8, stride * 4, this.#codebookAt, this.#codesAt)
      for (let i = 0; i < size; i++) {
        const code = codes[i]!
        const first = rows[i * stride + 2 * m]! - centroids[code]!
        const second = rows[i * stride + 2 * m + 1]! - centroids[subspaceCentroids + code]!
        squaredErrors += first * first + second * second
      }
      codebook.set(centroids, m * centroids.length)
      yield
    }
    return size === 0 ? 0 : squaredErrors / size
  }

  *#assign(size: number): Work<void> {
    const floats = new Float32Array(this.#memory.buffer)
    const ints = new Int32Array(this.#memory.buffer)
    const lists = this.#lists
    const rowBytes = this.#stride * 4
    const padded = Math.ceil(lists / 4) * 4
    setHalfNorms(floats, this.#centroidsAt / 4, this.#halfNormsAt / 4, lists, padded, this.#stride)
    for (let from = 0; from < size; from += this.#chunk) {
      const count = Math.min(this.#chunk, size - from)
      const rows = this.#rowsAt + from * rowBytes
      this.#kernel.nearest(
        rows,
        rows + count * rowBytes,
        rowBytes,
        this.#centroidsAt,
        this.#halfNormsAt,
        this.#halfNormsAt + padded * 4,
        this.#nearestAt
      )
      for (let i = 0; i < count; i++) this.#assigned[from + i] = nearestOf(floats, ints, this.#nearestAt / 4 + i * 8)
      yield
    }
  }

  /** A centroid that no vector is near to goes beside the one with most, so that they share them. */
  #fillEmpty(counts: Uint32Array): void {
    const stride = this.#stride
    for (let list = 0; list < counts.length; list++) {
      if (counts[list] !== 0) continue
      let most = 0
      for (let other = 1; other < counts.length; other++) if (counts[other]! > counts[most]!) most = other
      for (let d = 0; d < stride; d++) {
        const component = this.centroids[most * stride + d]!
        this.centroids[list * stride + d] = component * (d % 2 === 0 ? 1 + splitShare : 1 - splitShare)
      }
      counts[list] = counts[most]! >>> 1
      counts[most] = counts[most]! - counts[list]!
    }
  }
}

/** Places in a memory, at multiples of 16. */
export class Layout {
  bytes = 0

  take(bytes: number): number {
    const at = this.bytes
    this.bytes = Math.ceil((at + bytes) / 16) * 16
    return at
  }

  get pages(): number {
    return Math.ceil(this.bytes / pageBytes)
  }
}

/** Half the squared norm of each centroid; those that only fill up to a multiple of four are infinitely far. */
export const setHalfNorms = (
  floats: Float32Array,
  centroids: number,
  halfNorms: number,
  lists: number,
  padded: number,
  stride: number
): void => {
  for (let list = 0; list < padded; list++) {
    let sum = 0
    for (let d = 0; d < stride; d++) sum += floats[centroids + list * stride + d]! ** 2
    floats[halfNorms + list] = list < lists ? sum / 2 : Number.POSITIVE_INFINITY
  }
}

const nearestOf = (floats: Float32Array, ints: Int32Array, at: number): number => {
  let best = 0
  for (let i = 1; i < 4; i++) if (floats[at + i]! < floats[at + best]!) best = i
  return ints[at + 4 + best]!
}

const takeAway = (floats: Float32Array, row: number, centroid: number, stride: number): void => {
  for (let d = 0; d < stride; d++) floats[row + d] = floats[row + d]! - floats[centroid + d]!
}

const squaredErrorsOf = (
  floats: Float32Array,
  rows: number,
  stride: number,
  count: number,
  codes: Uint8Array,
  chunk: number,
  codebook: Float32Array
): number => {
  let sum = 0
  const subspaceFloats = codebookBytes / 4
  for (let m = 0; m * subspaceFloats < codebook.length; m++) {
    const book = m * subspaceFloats
    for (let i = 0; i < count; i++) {
      const code = codes[m * chunk + i]!
      const first = floats[rows + i * stride + 2 * m]! - codebook[book + code]!
      const second = floats[rows + i * stride + 2 * m + 1]! - codebook[book + subspaceCentroids + code]!
      sum += first * first + second * second
    }
  }
  return sum
}

/** The power of two that brings the greatest component to at most one. */
const unitOf = (components: Float32Array): number => {
  let greatest = 0
  for (let i = 0; i < components.length; i++) greatest = Math.max(greatest, Math.abs(components[i]!))
  if (!(greatest > 0) || !Number.isFinite(greatest)) return 1
  return 2 ** -Math.ceil(Math.log2(greatest))
}

const mulberry32 = (from: number) => {
  let state = from >>> 0
  return (): number => {
    state = (state + 0x6d2b79f5) >>> 0
    let mixed = Math.imul(state ^ (state >>> 15), state | 1)
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61)
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32
  }
}

const seed = 100

/** Vectors below which there is one list. */
const flatMax = 8_192

/** Lists for each root of the number of vectors, and at most. */
const listsPerRoot = 1.2
const listsMax = 4_096

/** Vectors that training looks at: for each list, and in all. */
const samplePerList = 64
const sampleMin = 8_192
const sampleLeast = 1_024
const sampleBytesMax = 1 << 26

/** Rounds of k-means. */
const listRounds = 8
const codebookRounds = 8

/** By what a centroid that is split moves apart. */
const splitShare = 1 / 1_024

/** Multiplications, vectors in one step: some milliseconds at most. */
const stepProducts = 16_000_000
const sampleRowsInStep = 4_096
const chunkRowsMax = 1_024
