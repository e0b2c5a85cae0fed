/**
 * One partition inside a vector thread: records, vectors, graph and metadata index, kept in step with each other.
 */
import { parseFilter } from "../../protocol/Filter.ts"
import type { Version } from "../../protocol/Version.ts"
import type { IndexSpec } from "../VectorIndex.ts"
import type { Bitset } from "./Bitset.ts"
import { FilterCache } from "./FilterCache.ts"
import { Graph } from "./Graph.ts"
import { type Metadata, MetadataIndex, parseMetadata } from "./MetadataIndex.ts"
import type { StoredRecord } from "./RecordsView.ts"
import { effect, RecordTable } from "./RecordTable.ts"
import { SegmentCursor } from "./SegmentCursor.ts"
import { TopK } from "./TopK.ts"
import { VectorArena } from "./VectorArena.ts"
import type { Work } from "./Work.ts"

/** Slots and their scores, best first. */
export interface Found {
  readonly slots: Int32Array
  readonly scores: Float32Array
}

export interface PartitionTuning {
  /** Records from which there is a graph; chosen by the dimensions where none is given. */
  readonly graphFrom?: number | undefined
  /** How many times as many it takes, of a partition whose records will soon be in a snapshot: it is worth a graph later. */
  readonly graphFactor?: number
  /** Rows that an exact scan looks at in the time in which a walk's beam widens by one. */
  readonly exactRowsPerBeam?: number
}

export class Partition {
  readonly spec: IndexSpec
  readonly table = new RecordTable()
  readonly arena: VectorArena
  #graph: Graph | undefined
  /** A graph being built beside the one in use: slots before `next` are in it. */
  #build: { readonly graph: Graph; next: number } | undefined
  readonly #index = new MetadataIndex()
  /** Slots before this one are in the metadata index. */
  #indexed = Number.POSITIVE_INFINITY
  readonly #filters = new FilterCache()
  readonly #top = new TopK()
  readonly #point: Array<number>
  /** Searches since the graph was built that its dead nodes sent on to an exact scan. */
  #misses = 0
  readonly #graphFrom: number
  readonly #exactRowsPerBeam: number

  constructor(spec: IndexSpec, tuning: PartitionTuning = {}) {
    this.spec = spec
    this.arena = new VectorArena(spec.dimensions, spec.metric)
    this.#point = new Array<number>(spec.dimensions).fill(0)
    const from =
      tuning.graphFrom ?? Math.min(graphFromMax, Math.max(graphFromMin, Math.round(exactComponents / spec.dimensions)))
    this.#graphFrom = from * (tuning.graphFactor ?? 1)
    this.#exactRowsPerBeam = tuning.exactRowsPerBeam ?? exactRowsPerBeam
  }

  get graph(): Graph | undefined {
    return this.#graph
  }

  /** Takes what was read of a snapshot: `table` and `arena` are filled already. */
  restored(graph: Graph | undefined): void {
    this.#graph = graph
    if (this.table.count > 0) this.#indexed = 0
    this.#considerBuild()
  }

  /**
   * Applies a segment, an operation or a piece of a graph a step. Returns what each operation did. An operation of which
   * `isStale` says so is taken note of and does nothing else. `changed` is told of each visible record that came, went or is
   * another by now.
   */
  *apply(
    segment: Uint8Array,
    isStale?: (op: SegmentCursor) => boolean,
    changed?: (id: string) => void
  ): Work<Uint8Array<ArrayBuffer>> {
    const cursor = new SegmentCursor(segment, this.spec.dimensions)
    const effects = new Uint8Array(cursor.header.count)
    for (let i = 0; cursor.next(); i++) {
      if (isStale?.(cursor) === true) {
        this.table.observe(cursor.version)
        effects[i] = effect.none
      } else {
        const done = this.#apply(cursor)
        effects[i] = done
        if (changed !== undefined && done !== effect.none && done !== effect.hidden) changed(cursor.id)
      }
      yield
      for (let step = 0; step < buildStepsPerOperation && this.#build !== undefined; step++) {
        this.#buildStep()
        yield
      }
    }
    return effects
  }

  /** Takes a record over as it is elsewhere, its id being of none here. */
  adopt(id: string, record: StoredRecord, vector: Float32Array): void {
    const { table, arena } = this
    const slot = table.add(id, record.vectorVersion)
    if (record.metadata !== "" || record.metadataVersion !== undefined) {
      table.restoreMetadata(slot, record.metadata, record.metadataVersion)
    }
    arena.set(slot, vector)
    this.#toGraphs(slot)
    this.#metadataChanged(slot, "", true)
    this.#considerBuild()
  }

  /** Whether there is work to do while nothing is asked. */
  get hasBackgroundWork(): boolean {
    return this.#build !== undefined || !this.filtersReady
  }

  /** Whether a search may name a filter; background work brings it about. */
  get filtersReady(): boolean {
    return this.#indexed >= this.table.slotCount
  }

  /** A step of what {@link hasBackgroundWork} speaks of. */
  backgroundStep(): void {
    if (!this.filtersReady) this.#indexStep()
    else if (this.#build !== undefined) this.#buildStep()
  }

  /** The nearest records. A filter's text must have been checked, and {@link filtersReady}. */
  find(vector: Float32Array, k: number, ef: number, filter: string | undefined): Found {
    const candidates = filter === undefined ? this.table.live : this.#select(filter)
    const wanted = Math.min(k, candidates.count)
    if (wanted === 0) return { slots: new Int32Array(0), scores: new Float32Array(0) }
    this.#top.reset(wanted)
    if (!this.#walk(vector, wanted, ef, candidates)) this.#scan(vector, wanted, candidates)
    const found = { slots: new Int32Array(wanted), scores: new Float32Array(wanted) }
    this.#top.drain(found.scores, found.slots)
    return found
  }

  /** Bytes of the graph, one under construction included. */
  get graphBytes(): number {
    return (this.#graph?.bytes ?? 0) + (this.#build?.graph.bytes ?? 0)
  }

  /** Bytes of what filters are answered from. */
  get filterBytes(): number {
    return this.#index.bytes + this.#filters.bytes
  }

  /** Bytes held, V8's own estimated. */
  get bytes(): number {
    return this.table.bytes + this.arena.bytes + this.graphBytes + this.filterBytes
  }

  /** Gives the graphs' memory back. */
  dispose(): void {
    this.#graph?.dispose()
    this.#build?.graph.dispose()
    this.#graph = undefined
    this.#build = undefined
  }

  #apply(op: SegmentCursor): number {
    const { table } = this
    table.observe(op.version)
    switch (op.kind) {
      case "upsert":
        return this.#upsert(op.id, op.version, op.vector, op.metadata)
      case "metadata": {
        const slot = table.slots.get(op.id)
        const before = slot === undefined ? "" : table.metadata[slot]!
        const done = table.setMetadata(op.id, op.version, op.metadata)
        if (slot !== undefined && done === effect.changed) this.#metadataChanged(slot, before, false)
        return done
      }
      case "delete": {
        const slot = table.slots.get(op.id)
        const before = slot === undefined ? "" : table.metadata[slot]!
        const done = table.delete(op.id, op.version)
        if (slot !== undefined && done === effect.removed) this.#removed(slot, before)
        return done
      }
    }
  }

  #upsert(id: string, version: Version, vector: Float32Array, metadata: string): number {
    const { table, arena } = this
    if (!table.takesVector(id, version)) return effect.none
    const known = table.slots.get(id)
    const before = known === undefined ? "" : table.metadata[known]!
    const slot = table.upsert(id, version, metadata)
    if (known === undefined || !arena.equals(slot, vector)) {
      arena.set(slot, vector)
      this.#toGraphs(slot)
    }
    this.#metadataChanged(slot, before, known === undefined)
    this.#considerBuild()
    return known === undefined ? effect.added : effect.changed
  }

  #toGraphs(slot: number): void {
    if (this.#graph === undefined && this.#build === undefined) return
    this.arena.toPoint(slot, this.#point)
    this.#graph?.set(slot, this.#point)
    if (this.#build !== undefined && slot < this.#build.next) this.#build.graph.set(slot, this.#point)
  }

  #metadataChanged(slot: number, before: string, isNew: boolean): void {
    const after = this.table.metadata[slot]!
    if (slot >= this.#indexed || (before === after && !isNew)) return
    if (before !== "") {
      const old = parseMetadata(before)
      if (old !== undefined) this.#index.remove(slot, old)
    }
    let metadata: Metadata | undefined
    if (after !== "") {
      metadata = parseMetadata(after)
      if (metadata !== undefined) this.#index.add(slot, metadata)
    }
    if (this.#filters.size > 0) this.#filters.changed(slot, metadata)
  }

  #removed(slot: number, before: string): void {
    this.#graph?.remove(slot)
    this.#build?.graph.remove(slot)
    if (slot < this.#indexed) {
      const old = parseMetadata(before)
      if (old !== undefined) this.#index.remove(slot, old)
      this.#filters.removed(slot)
    }
    this.#considerBuild()
  }

  #select(filter: string): Bitset {
    const known = this.#filters.get(filter)
    if (known !== undefined) return known
    const condition = parseFilter(JSON.parse(filter))
    const slots = this.#index.select(condition, this.table.live)
    this.#filters.put(filter, condition, slots)
    return slots
  }

  /**
   * Offers the nearest `wanted` of `candidates` that a walk of the graph meets. False where an exact scan is cheaper, or
   * where the walk did not meet enough of them to be trusted.
   *
   * The walk knows nothing of the candidates: its beam is made wider by the share of nodes that are none, and what it
   * meets is sifted afterwards. That is as good as a filter inside of the walk, which would meet the same nodes, but for
   * candidates far from the query; those show by coming late or not at all.
   */
  #walk(vector: Float32Array, wanted: number, ef: number, candidates: Bitset): boolean {
    const graph = this.#graph
    if (graph === undefined) return false
    const sifting = graph.nodes > candidates.count
    const depth = sifting ? Math.max(ef * siftingMargin, wanted * siftingDepth) : Math.max(ef, wanted)
    const beam = Math.ceil((depth * graph.nodes) / candidates.count)
    if (beam > beamMax || beam * this.#exactRowsPerBeam >= candidates.count) return false
    // The far end of a beam has holes, so candidates met only there are not the nearest ones for sure.
    const trusted = sifting ? Math.ceil(beam * Math.max(trustedShare, (1 + wanted / depth) / 2)) : wanted
    const { arena } = this
    const factor = arena.factorOf(vector)
    for (let i = 0; i < vector.length; i++) this.#point[i] = vector[i]! * factor
    const all = candidates === this.table.live
    let met = 0
    for (const node of graph.search(this.#point, trusted, beam)) {
      const slot = graph.slotOf(node)
      if (slot === -1 || !(all || candidates.has(slot))) continue
      this.#top.offer(Math.fround(arena.score(vector, factor, slot)), slot)
      met += 1
      if (met === wanted) return true
    }
    if (all) this.#missed()
    return false
  }

  /** Offers the nearest `wanted` of all candidates. */
  #scan(vector: Float32Array, wanted: number, candidates: Bitset): void {
    const { arena } = this
    this.#top.reset(wanted)
    arena.scan(vector, candidates, this.#top)
    // Scored again in double precision, so that a score does not depend on how a record was found; and ordered by what the
    // caller is given, so that what is equal there is in the order of slots.
    const factor = arena.factorOf(vector)
    const slots = this.#top.take()
    this.#top.reset(wanted)
    for (const slot of slots) this.#top.offer(Math.fround(arena.score(vector, factor, slot)), slot)
  }

  #missed(): void {
    this.#misses += 1
    this.#considerBuild()
  }

  #considerBuild(): void {
    const graph = this.#graph
    const { count } = this.table
    if (this.#build !== undefined) return
    if (graph === undefined) {
      if (count > this.#graphFrom) this.#startBuild()
      return
    }
    if (count * graphDropFactor < this.#graphFrom) {
      graph.dispose()
      this.#graph = undefined
    } else if (
      (graph.dead >= deadMin && graph.dead > graph.nodes * deadShareMax) ||
      (this.#misses > missesMax && graph.dead > graph.nodes * deadShareMissed)
    ) {
      this.#startBuild()
    }
  }

  #startBuild(): void {
    this.#misses = 0
    this.#build = { graph: Graph.create(this.spec, Math.ceil(this.table.count * buildRoom)), next: 0 }
  }

  #buildStep(): void {
    const build = this.#build!
    const slot = this.table.live.next(build.next)
    if (slot !== -1) {
      this.arena.toPoint(slot, this.#point)
      build.graph.set(slot, this.#point)
      build.next = slot + 1
      return
    }
    this.#graph?.dispose()
    this.#graph = build.graph
    this.#build = undefined
    this.#considerBuild()
  }

  #indexStep(): void {
    const slot = this.table.live.next(this.#indexed)
    if (slot !== -1) {
      const metadata = parseMetadata(this.table.metadata[slot]!)
      if (metadata !== undefined) this.#index.add(slot, metadata)
    }
    // Never just the number of slots: what comes at the next one would be left to a step that a cached filter misses.
    const isLast = slot === -1 || this.table.live.next(slot + 1) === -1
    this.#indexed = isLast ? Number.POSITIVE_INFINITY : slot + 1
  }
}

/** Components that an exact scan over a partition without a graph may look at; records from which there is a graph follow. */
const exactComponents = 500_000
const graphFromMin = 500
const graphFromMax = 10_000
/** A graph is dropped when so many times fewer records are left. */
const graphDropFactor = 4

/** As measured: {@link PartitionTuning}. */
const exactRowsPerBeam = 20

/** Widest beam of a walk. */
const beamMax = 10_000

/** How much wider the beam is where what is met is sifted, beyond what the share of candidates asks for; makes up for their unevenness. */
const siftingMargin = 1.25

/** Beam for each result wanted, at least, where what is met is sifted. */
const siftingDepth = 1.5

/** Share of a beam, from its near end, whose candidates are trusted to be the nearest; more where all of it is wanted. */
const trustedShare = 0.6

/** A graph is built anew when so many of its nodes, and such a share, are dead. */
const deadMin = 500
const deadShareMax = 0.4

/** Or when so many searches had to scan because of dead nodes, and such a share is dead. */
const missesMax = 50
const deadShareMissed = 0.02

/** Nodes of a graph under construction added for each operation applied, so that it is ready before it is stale. */
const buildStepsPerOperation = 2

/** Room of a new graph, in records that there are. */
const buildRoom = 1.2
