/**
 * What a snapshot holds, for a partition in the mapped form: its sketch is in memory, its records are read from their file. A
 * search takes candidates by their codes, then scores them by their vectors: first by narrow ones, where a quantised
 * collection keeps them, then exactly. The snapshot does not change; records written since are taken out of it here.
 */
import { parseFilter } from "../../protocol/Filter.ts"
import type { IndexSpec } from "../VectorIndex.ts"
import { Bitset } from "./Bitset.ts"
import type { BlockCache } from "./BlockCache.ts"
import { FilterCache } from "./FilterCache.ts"
import { hashOf, type IdTable } from "./IdTable.ts"
import { MetadataIndex, parseMetadata } from "./MetadataIndex.ts"
import { type Narrow, NarrowRows } from "./NarrowRows.ts"
import type { Found } from "./Partition.ts"
import { type Quantiser, subspacesOf } from "./Quantiser.ts"
import { FileFault } from "./RecordsFile.ts"
import { RecordsView } from "./RecordsView.ts"
import type { Sketch } from "./Sketch.ts"
import { readSketch, type SketchRead } from "./SketchFile.ts"
import { TopK } from "./TopK.ts"
import { inverseNorm, scoreOf } from "./VectorArena.ts"
import type { Work } from "./Work.ts"

export class MappedBase {
  readonly spec: IndexSpec
  readonly view: RecordsView
  /** Records that are not taken out, by slot: their place in the file. */
  readonly live: Bitset
  /** Hidden ids that are taken out. */
  readonly #takenHidden = new Bitset()
  readonly #sketch: Sketch
  readonly #ids: IdTable
  readonly #hashSeed: number
  #tombstones: number
  #rows: NarrowRows | undefined
  /** Slots before this one have narrow rows. */
  #filled = 0
  #index: MetadataIndex | undefined
  /** Slots before this one are in the metadata index. */
  #indexed = 0
  readonly #filters = new FilterCache()
  readonly #top = new TopK()
  #values = new Float32Array(0)
  readonly #nearest = new TopK()

  /** Opens a snapshot's files. Throws {@link FileFault} where they are not whole, not of `spec` or not of one snapshot. */
  static *open(
    spec: IndexSpec,
    files: { readonly records: string; readonly sketch: string },
    cache: BlockCache
  ): Work<MappedBase> {
    const read = yield* readSketch(files.sketch, spec)
    const view = new RecordsView(files.records, spec, read.map, cache)
    try {
      if (view.headerCrc !== read.recordsHeaderCrc || view.count !== read.count) {
        throw new FileFault(`${files.sketch} is not of ${files.records}`)
      }
      return new MappedBase(spec, view, read)
    } catch (error) {
      view.close()
      throw error
    }
  }

  private constructor(spec: IndexSpec, view: RecordsView, read: SketchRead) {
    this.spec = spec
    this.view = view
    this.#sketch = read.sketch
    this.#ids = read.ids
    this.#hashSeed = read.hashSeed
    this.#tombstones = read.tombstones
    this.live = Bitset.full(read.count)
    const { quantization } = spec
    if (
      (quantization === "bf16" || quantization === "i8") &&
      NarrowRows.fits(quantization, spec.dimensions, read.count)
    ) {
      this.#rows = this.#emptyRows(quantization)
    }
  }

  get quantiser(): Quantiser {
    return this.#sketch.quantiser
  }

  /** Visible records that are not taken out. */
  get count(): number {
    return this.live.count
  }

  get hiddenCount(): number {
    return this.view.header.hiddenCount - this.#takenHidden.count
  }

  /** Deletions among the hidden ids that are not taken out. */
  get tombstones(): number {
    return this.#tombstones
  }

  /** The entry of an id that is not taken out, or -1: a slot, or a hidden id from `view.count` on. */
  find(id: string): number {
    const bytes = Buffer.from(id)
    return this.#ids.find(hashOf(bytes, this.#hashSeed), (entry) => this.has(entry) && this.view.hasId(entry, bytes))
  }

  has(entry: number): boolean {
    const { count } = this.view
    return entry < count ? this.live.has(entry) : !this.#takenHidden.has(entry - count)
  }

  /** Takes an entry out: what it says is elsewhere from now on. */
  take(entry: number): void {
    const { count } = this.view
    if (entry < count) {
      this.live.delete(entry)
      this.#filters.removed(entry)
    } else if (this.#takenHidden.add(entry - count) && this.view.hidden(entry).deleted !== undefined) {
      this.#tombstones -= 1
    }
  }

  /** The nearest records. A filter's text must have been checked, and {@link filtersReady}. */
  nearest(query: Float32Array, k: number, ef: number, filter: string | undefined): Found {
    const allowed = filter === undefined ? this.live : this.#select(filter)
    const wanted = Math.min(k, allowed.count)
    if (wanted === 0) return { slots: new Int32Array(0), scores: new Float32Array(0) }
    let candidates = this.#candidates(query, k, ef, allowed)
    if (this.rowsReady && this.#rows !== undefined) candidates = this.#narrowed(query, wanted, candidates)
    const { metric, dimensions } = this.spec
    const factor = metric === "cosine" ? inverseNorm(query, 0, dimensions) : 1
    const { view } = this
    this.#top.reset(wanted)
    for (const slot of candidates) {
      const at = view.locate(slot)
      const inverse = metric === "cosine" ? inverseNorm(view.floats, at, dimensions) : 1
      this.#top.offer(Math.fround(scoreOf(metric, view.floats, at, query, inverse * factor)), slot)
    }
    const found = { slots: new Int32Array(this.#top.size), scores: new Float32Array(this.#top.size) }
    this.#top.drain(found.scores, found.slots)
    return found
  }

  /** Whether there is work to do while nothing is asked. */
  get hasBackgroundWork(): boolean {
    return !this.rowsReady || (this.#index !== undefined && !this.filtersReady)
  }

  /** A step of it; reads what follows in the records file. */
  backgroundStep(): void {
    if (this.#index !== undefined && !this.filtersReady) this.#indexStep(this.#index)
    else this.#fillStep()
  }

  /** Whether the narrow rows are there that the collection asks for; candidates are scored from the file until then. */
  get rowsReady(): boolean {
    return this.#rows === undefined || this.#filled >= this.view.count
  }

  /** Whether a search may name a filter; background work brings it about once {@link wantFilters} was called. */
  get filtersReady(): boolean {
    return this.#index !== undefined && this.#indexed >= this.view.count
  }

  get wantsFilters(): boolean {
    return this.#index !== undefined
  }

  wantFilters(): void {
    this.#index ??= new MetadataIndex()
  }

  get sketchBytes(): number {
    return this.#sketch.bytes
  }

  get narrowBytes(): number {
    return this.#rows?.bytes ?? 0
  }

  get filterBytes(): number {
    return (this.#index?.bytes ?? 0) + this.#filters.bytes
  }

  /** Bytes held, V8's own estimated; those of the thread's block cache are not in it. */
  get bytes(): number {
    return (
      this.sketchBytes +
      this.narrowBytes +
      this.filterBytes +
      this.#ids.bytes +
      this.view.bytes +
      this.live.bytes +
      this.#takenHidden.bytes
    )
  }

  close(): void {
    this.view.close()
  }

  #candidates(query: Float32Array, k: number, ef: number, allowed: Bitset): Int32Array {
    const beam = Math.max(ef, k)
    // A code of few bits puts many vectors in one place, whichever of them is nearest.
    const coarseness = Math.max(1, subspacesFine / subspacesOf(this.spec.dimensions))
    const isNarrow = this.rowsReady && this.#rows !== undefined
    const { depthPerBeam, probedShare } = isNarrow ? narrowShares : plainShares
    const depth = Math.min(allowed.count, Math.ceil((beam * depthPerBeam + k * depthPerResult) * coarseness))
    const direct = isNarrow ? Math.max(depth, narrowDirectMax) : depth
    if (allowed.count <= direct) {
      const all = new Int32Array(allowed.count)
      let at = 0
      allowed.forEach((slot) => {
        all[at++] = slot
      })
      return all
    }
    // A filter's records are thinner in each list, so more lists are looked at.
    const thinness = this.live.count / allowed.count
    const probed = Math.ceil(this.view.count * probedShare * (beam / beamMeasured) * thinness)
    return this.#sketch.candidates(query, depth, probed, allowed)
  }

  /** Of the candidates those that may be among the `wanted` nearest, by their narrow rows. */
  #narrowed(query: Float32Array, wanted: number, candidates: Int32Array): Int32Array {
    const keep = wanted + Math.max(narrowMarginMin, Math.ceil(wanted * narrowMargin))
    if (candidates.length <= keep) return candidates
    if (this.#values.length < candidates.length) this.#values = new Float32Array(candidates.length)
    this.#rows!.values(query, candidates, this.#values)
    this.#nearest.reset(keep)
    for (let i = 0; i < candidates.length; i++) {
      const score = -this.#values[i]!
      if (score >= this.#nearest.least) this.#nearest.offer(score, candidates[i]!)
    }
    return this.#nearest.take()
  }

  #select(filter: string): Bitset {
    const known = this.#filters.get(filter)
    if (known !== undefined) return known
    const condition = parseFilter(JSON.parse(filter))
    const slots = this.#index!.select(condition, this.live)
    slots.intersect(this.live)
    this.#filters.put(filter, condition, slots)
    return slots
  }

  #indexStep(index: MetadataIndex): void {
    const from = this.#indexed
    const to = Math.min(this.view.count, from + recordsInStep)
    let slot = from
    for (const { metadata } of this.view.entries(from, to)) {
      const parsed = parseMetadata(metadata.toString("utf8"))
      if (parsed !== undefined) index.add(slot, parsed)
      slot += 1
    }
    this.#indexed = slot
  }

  #fillStep(): void {
    const { count } = this.view
    const rows = Math.min(count - this.#filled, Math.max(1, Math.floor(fillBytes / (this.spec.dimensions * 4))))
    const vectors = new Float32Array(rows * this.spec.dimensions)
    this.view.vectors(this.#filled, vectors)
    this.#rows!.set(this.#filled, vectors)
    this.#filled += rows
  }

  #emptyRows(kind: Narrow): NarrowRows {
    return new NarrowRows(kind, this.#sketch.quantiser, this.#sketch.lists.sizes, this.view.count)
  }
}

/**
 * As measured on word vectors: with a beam of so many, candidates are taken from this share of the vectors; and so many
 * of them for the beam and for each result wanted. More candidates from fewer vectors are as good, and quicker where a
 * candidate costs little.
 */
const beamMeasured = 128
const plainShares = { probedShare: 0.12, depthPerBeam: 0.5 }
const narrowShares = { probedShare: 0.115, depthPerBeam: 0.75 }
const depthPerResult = 8

/** With fewer subspaces than these, candidates are as many times more. */
const subspacesFine = 16

/** Candidates beyond those wanted that are scored exactly after they were put into order by narrow rows, and their share. */
const narrowMarginMin = 4
const narrowMargin = 0.2

/** Records of a filter up to which all are looked at, where there are narrow rows. */
const narrowDirectMax = 4_096

/** Records put into the metadata index in one step. */
const recordsInStep = 256

/** Bytes of vectors read in one step. */
const fillBytes = 1 << 18
