/**
 * The codes of many vectors in inverted lists, and the search over them: the lists nearest to a query are scanned, and the
 * vectors whose codes are nearest are the candidates, to be scored again by who has the vectors themselves.
 */
import type { Memory } from "./Assembler.ts"
import type { Bitset } from "./Bitset.ts"
import { Layout, prepare, type Quantiser, setHalfNorms, strideOf, subspacesOf } from "./Quantiser.ts"
import { type RowKernel, rowKernelOf } from "./RowKernel.ts"
import { blockStride, blockVectors, codebookBytes, type SketchKernel, sketchKernelOf } from "./SketchKernel.ts"
import { TopK } from "./TopK.ts"

/** What a sketch file holds of the lists. */
export interface Lists {
  /** Vectors of each list. */
  readonly sizes: Uint32Array
  /** Root mean squared distance of each list's vectors from its centroid. */
  readonly spreads: Float32Array
  /** Of each place in the lists' blocks the slot of the vector there, -1 where there is none. */
  readonly slots: Int32Array
}

/** Bytes of all codes, by the lists' sizes. */
export const codesBytesOf = (sizes: Uint32Array, dimensions: number): number => {
  let blocks = 0
  for (const size of sizes) blocks += Math.ceil(size / blockVectors)
  return blocks * blockStride * subspacesOf(dimensions)
}

/** Where in a sketch's memory is what a search works with, and from where on there is room for what it is searched in. */
export const workingLayout = (dimensions: number, lists: number) => {
  const stride = strideOf(dimensions)
  const subspaces = subspacesOf(dimensions)
  const layout = new Layout()
  const at = {
    query: layout.take(stride * 4),
    residual: layout.take(stride * 4),
    halfNorms: layout.take(lists * 4),
    list: layout.take(lists * 4),
    listScores: layout.take(lists * 4),
    entries: layout.take(subspaces * 64),
    leasts: layout.take(subspaces * 16),
    tables: layout.take(subspaces * 16),
    sums: layout.take(64),
    out: layout.take(outVectors * 8)
  }
  return { at, bytes: layout.bytes }
}

/** What a sketch is of that lies in one memory, by its addresses there. */
export interface SketchMemory {
  readonly memory: Memory
  /** See {@link workingLayout}. */
  readonly working: ReturnType<typeof workingLayout>["at"]
  readonly centroids: number
  readonly codebook: number
  readonly codes: number
  /** Bytes of the memory that are somebody else's. */
  readonly otherBytes: number
}

export class Sketch {
  readonly quantiser: Quantiser
  readonly lists: Lists
  readonly #memory
  readonly #otherBytes: number
  readonly #kernel: SketchKernel
  readonly #rows: RowKernel
  readonly #floats: Float32Array
  readonly #ints: Int32Array
  readonly #listCount: number
  readonly #stride: number
  readonly #subspaces: number
  /** Where each list's blocks begin, in blocks. */
  readonly #firstBlock: Uint32Array
  readonly #cap: number
  readonly #at: SketchMemory["working"] & Pick<SketchMemory, "centroids" | "codebook" | "codes">
  readonly #nearest = new TopK()
  #nearestLists = new Int32Array(0)
  #nearestScores = new Float32Array(0)
  /** Candidates gathered: those from 0 to `#gathered`. */
  #values = new Int32Array(0)
  #slots = new Int32Array(0)
  #gathered = 0
  /**
   * How many of them there are by their values, in buckets: so it is known at any time below which value there are enough.
   * `#below` are in the buckets up to `#last`.
   */
  readonly #counts = new Int32Array(bucketsBelow + bucketsAbove)
  readonly #shift: number
  #below = 0
  #last = 0

  constructor(quantiser: Quantiser, lists: Lists, { memory, working, otherBytes, ...at }: SketchMemory) {
    this.quantiser = quantiser
    this.lists = lists
    this.#memory = memory
    this.#otherBytes = otherBytes
    this.#at = { ...working, ...at }
    const stride = strideOf(quantiser.dimensions)
    const subspaces = subspacesOf(quantiser.dimensions)
    const count = quantiser.centroids.length / stride
    this.#stride = stride
    this.#subspaces = subspaces
    this.#listCount = count
    this.#cap = Math.min(255, Math.floor(sumMax / subspaces))
    this.#shift = Math.max(0, Math.ceil(Math.log2((this.#cap * subspaces) / bucketsAbove)))
    const { buffer } = memory
    this.#kernel = sketchKernelOf(memory)
    this.#rows = rowKernelOf(memory)
    this.#floats = new Float32Array(buffer)
    this.#ints = new Int32Array(buffer)
    if (quantiser.metric === "l2")
      setHalfNorms(this.#floats, this.#at.centroids / 4, this.#at.halfNorms / 4, count, count, stride)
    this.#firstBlock = new Uint32Array(count + 1)
    for (let list = 0; list < count; list++) {
      this.#ints[this.#at.list / 4 + list] = list
      this.#firstBlock[list + 1] = this.#firstBlock[list]! + Math.ceil(lists.sizes[list]! / blockVectors)
    }
  }

  get listCount(): number {
    return this.#listCount
  }

  /**
   * Finds the `depth` slots of `allowed` whose codes are nearest to the query, in no order, among those of the nearest lists
   * that hold `probed` vectors together; of more lists where too few of these are allowed. Returned is a view that the next
   * call overwrites.
   */
  candidates(query: Float32Array, depth: number, probed: number, allowed: Bitset): Int32Array {
    this.#gathered = 0
    this.#counts.fill(0)
    this.#below = 0
    this.#last = this.#counts.length - 1
    const room = roomFactor * depth + outVectors
    if (this.#values.length < room) {
      this.#values = new Int32Array(room)
      this.#slots = new Int32Array(room)
    }
    const at = this.#at
    const queryFloats = this.#floats
    queryFloats.fill(0, at.query / 4, at.query / 4 + this.#stride)
    prepare(this.quantiser, query, 0, queryFloats, at.query / 4)
    const isEuclidean = this.quantiser.metric === "l2"
    if (!isEuclidean) this.#makeTables(at.query)
    const leasts = isEuclidean ? 0 : this.#sumOfLeasts()
    let scale = isEuclidean ? 0 : this.#scaleOf()
    if (!isEuclidean) this.#quantise(scale)
    let begun = false
    let firstBias = 0
    let limit = noLimit
    const wanted = Math.min(depth, allowed.count)
    let ordered = Math.min(
      this.#listCount,
      Math.ceil((probed / this.lists.slots.length) * this.#listCount * orderedShare)
    )
    this.#orderLists(ordered)
    let seen = 0
    for (let i = 0; i < this.#listCount; i++) {
      if (seen >= probed && this.#gathered >= wanted) break
      if (i >= ordered) {
        // The lists were smaller than they are mostly: all are put into order, and the search goes on where it was.
        ordered = this.#listCount
        this.#orderLists(ordered)
      }
      const list = this.#nearestLists[i]!
      const size = this.lists.sizes[list]!
      if (size === 0) continue
      seen += size
      let bias: number
      if (isEuclidean) {
        this.#toResidual(list)
        this.#makeTables(at.residual)
        bias = this.#sumOfLeasts()
        if (!begun) scale = this.#scaleOf()
        this.#quantise(scale)
      } else bias = leasts - this.#floats[at.listScores / 4 + list]!
      if (!begun) firstBias = bias
      begun = true
      const steps = Math.round((bias - firstBias) * scale)
      const above = Number.isNaN(steps) ? 0 : Math.max(-biasMax, Math.min(biasMax, steps))
      limit = this.#scanList(list, above, limit, depth, allowed)
    }
    if (this.#gathered > depth) {
      this.#keepUpTo(limit)
      if (this.#gathered > depth) this.#keepBest(depth)
    }
    return this.#slots.subarray(0, this.#gathered)
  }

  get bytes(): number {
    return (
      this.#memory.buffer.byteLength -
      this.#otherBytes +
      this.lists.sizes.byteLength +
      this.quantiser.centroids.byteLength +
      this.quantiser.codebook.byteLength +
      this.#values.byteLength * 2
    )
  }

  /** Gathers what is below the limit, of one list; returns the limit from then on. */
  #scanList(list: number, bias: number, limit: number, depth: number, allowed: Bitset): number {
    const at = this.#at
    const blockBytes = this.#subspaces * blockStride
    const last = this.#firstBlock[list + 1]!
    const { slots } = this.lists
    const { words } = allowed
    const ints = this.#ints
    const values = this.#values
    const found = this.#slots
    const counts = this.#counts
    const shift = this.#shift
    const tablesEnd = at.tables + this.#subspaces * 16
    for (let block = this.#firstBlock[list]!, blocks = 0; block < last; block += blocks) {
      const threshold = limit - bias
      if (threshold <= 0) break
      // While there is no limit everything is gathered: only as much as makes one.
      blocks = limit === noLimit ? Math.min(outBlocks, Math.ceil((2 * depth) / blockVectors)) : outBlocks
      const codes = at.codes + block * blockBytes
      const codesEnd = at.codes + Math.min(last, block + blocks) * blockBytes
      const below = Math.min(threshold, sumMax + 1)
      const end = this.#kernel.scan(codes, codesEnd, at.tables, tablesEnd, below, block * blockVectors, at.sums, at.out)
      let gathered = this.#gathered
      let enough = this.#below
      let final = this.#last
      for (let i = at.out >>> 2; i < end >>> 2; i += 2) {
        const value = ints[i + 1]! + bias
        if (value >= limit) continue
        const slot = slots[ints[i]!]!
        if (slot < 0 || ((words[slot >>> 5]! >>> (slot & 31)) & 1) === 0) continue
        values[gathered] = value
        found[gathered++] = slot
        const bucket = (value >> shift) + bucketsBelow
        const counted = Math.max(0, Math.min(bucket, final))
        counts[counted] = counts[counted]! + 1
        enough += 1
        // There are enough without those of the last bucket: what is in it is not looked for any more.
        while (enough - counts[final]! >= depth && final > 0) {
          enough -= counts[final--]!
          limit = Math.min(limit, (final + 1 - bucketsBelow) << shift)
        }
      }
      this.#gathered = gathered
      this.#below = enough
      this.#last = final
      if (gathered > values.length - outVectors) limit = this.#makeRoom(depth, limit)
    }
    return limit
  }

  /** Gives up all but the `depth` least values; returns the limit from then on. */
  #makeRoom(depth: number, limit: number): number {
    this.#keepUpTo(limit)
    if (this.#gathered <= depth) return limit
    const greatest = this.#keepBest(depth)
    this.#counts.fill(0)
    for (let i = 0; i < depth; i++) {
      const bucket = Math.max(0, Math.min(this.#last, (this.#values[i]! >> this.#shift) + bucketsBelow))
      this.#counts[bucket]! += 1
    }
    this.#below = depth
    return Math.min(limit, greatest)
  }

  /** Gives up what is above a limit. What is as great stays: it may be among the least of many that are equal. */
  #keepUpTo(limit: number): void {
    const values = this.#values
    const slots = this.#slots
    let kept = 0
    for (let i = 0; i < this.#gathered; i++) {
      const value = values[i]!
      if (value > limit) continue
      values[kept] = value
      slots[kept++] = slots[i]!
    }
    this.#gathered = kept
  }

  /**
   * Puts the lists into order that are likeliest to hold what is nearest to the query, best first. Where scores are inner
   * products a list is as good as its best vector may be, which is the better the further they are spread.
   */
  #orderLists(count: number): void {
    if (this.#nearestLists.length < count) {
      this.#nearestLists = new Int32Array(count)
      this.#nearestScores = new Float32Array(count)
    }
    const { list, centroids, listScores, halfNorms, query } = this.#at
    const rowBytes = this.#stride * 4
    this.#rows.products(list, this.#listCount, centroids, rowBytes, query, query + rowBytes, listScores)
    const isEuclidean = this.quantiser.metric === "l2"
    let squares = 0
    for (let d = 0; d < this.#stride; d++) squares += this.#floats[query / 4 + d]! ** 2
    const reach = spreadReach * Math.sqrt(squares / this.quantiser.dimensions)
    const { spreads } = this.lists
    this.#nearest.reset(count)
    for (let i = 0; i < this.#listCount; i++) {
      const product = this.#floats[listScores / 4 + i]!
      const score = isEuclidean ? product - this.#floats[halfNorms / 4 + i]! : product + reach * spreads[i]!
      if (score >= this.#nearest.least) this.#nearest.offer(score, i)
      else if (Number.isNaN(score)) this.#nearest.offer(Number.NEGATIVE_INFINITY, i)
    }
    this.#nearest.drain(this.#nearestScores, this.#nearestLists)
  }

  #toResidual(list: number): void {
    const { query, residual, centroids } = this.#at
    const floats = this.#floats
    const centroid = centroids / 4 + list * this.#stride
    for (let d = 0; d < this.#stride; d++) {
      floats[residual / 4 + d] = floats[query / 4 + d]! - floats[centroid + d]!
    }
  }

  #makeTables(of: number): void {
    const { codebook, entries } = this.#at
    const make = this.quantiser.metric === "l2" ? this.#kernel.distances : this.#kernel.products
    make(of, codebook, codebook + this.#subspaces * codebookBytes, entries)
  }

  #sumOfLeasts(): number {
    const { entries, leasts } = this.#at
    this.#widest = this.#kernel.range(entries, entries + this.#subspaces * 64, leasts)
    let sum = 0
    for (let m = 0; m < this.#subspaces; m++) sum += this.#floats[leasts / 4 + m * 4]!
    return sum
  }

  /** Greatest difference within a table, of the tables made last. */
  #widest = 0

  #scaleOf(): number {
    const scale = this.#cap / this.#widest
    return Number.isFinite(scale) ? scale : 0
  }

  #quantise(scale: number): void {
    const { entries, leasts, tables } = this.#at
    this.#kernel.quantise(entries, entries + this.#subspaces * 64, leasts, scale, this.#cap, tables)
  }

  /** Keeps the `depth` least values, in no order; returns the greatest of them. */
  #keepBest(depth: number): number {
    const values = this.#values
    const slots = this.#slots
    let from = 0
    let to = this.#gathered - 1
    const at = depth - 1
    // Hoare's selection.
    while (from < to) {
      const pivot = values[(from + to) >>> 1]!
      let i = from
      let j = to
      while (i <= j) {
        while (values[i]! < pivot) i++
        while (values[j]! > pivot) j--
        if (i > j) break
        const value = values[i]!
        values[i] = values[j]!
        values[j] = value
        const slot = slots[i]!
        slots[i] = slots[j]!
        slots[j] = slot
        i++
        j--
      }
      if (at <= j) to = j
      else if (at >= i) from = i
      else break
    }
    this.#gathered = depth
    return values[at]!
  }
}

/** Sums of 16 bits; below the greatest, since a threshold is one above. */
const sumMax = 65_534

/** How far a list may be from the nearest, in steps of sums; beyond that it makes no difference. */
const biasMax = 2 ** 29
const noLimit = 2 ** 30

/** How far the best vector of a list reaches, in standard deviations along one direction; as measured. */
const spreadReach = 5

/** Lists put into order, in those that hold what is looked at on average. */
const orderedShare = 1.5

/** Buckets of values from that of the nearest list's least on, and before it. */
const bucketsAbove = 1_024
const bucketsBelow = 512

/** How many times those wanted are gathered before the others are given up. */
const roomFactor = 4

/** Blocks scanned at once, and so the vectors that may be found in them. */
const outBlocks = 64
const outVectors = outBlocks * blockVectors
