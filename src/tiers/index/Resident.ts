/**
 * A partition in a vector thread, in whichever form it has. In the full form all is in a {@link Partition}. In the mapped one
 * that holds only what was written since a snapshot, over the snapshot's {@link MappedBase}: an operation on a record of the
 * snapshot first brings that record over, so that operations mean the same in both forms.
 */
import { mkdir, writeFile } from "node:fs/promises"
import { join } from "node:path"
import { decodeSegmentHeader } from "../LogSegment.ts"
import type { IndexForm, IndexSpec, IndexStats, SnapshotFiles } from "../VectorIndex.ts"
import type { BlockCache } from "./BlockCache.ts"
import { Graph } from "./Graph.ts"
import { checkGraphFile, noGraph } from "./GraphFile.ts"
import { MappedBase } from "./MappedBase.ts"
import { Partition, type PartitionTuning } from "./Partition.ts"
import type { Quantiser, RowSource } from "./Quantiser.ts"
import {
  partsOf,
  type RecordsOutline,
  type RecordsParts,
  readRecords,
  recordBytesMax,
  writeRecordsOf
} from "./RecordsFile.ts"
import { RecordsView } from "./RecordsView.ts"
import { isNewer } from "./RecordTable.ts"
import type { SegmentCursor } from "./SegmentCursor.ts"
import { offsetsOf, sketchRecordsMin, writeSketch } from "./SketchFile.ts"
import { StandingRegistry } from "./StandingRegistry.ts"
import type { OpenFiles, RecordsAnswer, WatchCommand } from "./ThreadMessages.ts"
import { settled, type Work } from "./Work.ts"

/** Results of a search, best first. */
export interface Hits {
  readonly ids: ReadonlyArray<string>
  readonly scores: Float32Array
  readonly metadata: ReadonlyArray<string> | undefined
  /** One after another. */
  readonly vectors: Float32Array | undefined
}

export interface ResidentOptions extends PartitionTuning {
  readonly cache: BlockCache
  /** Records from which a snapshot has a sketch. */
  readonly sketchFrom?: number | undefined
}

export class Resident {
  readonly spec: IndexSpec
  readonly #options: ResidentOptions
  readonly #sketchFrom: number
  #recent: Partition
  #base: MappedBase | undefined
  /** Of the newest sketch written: the next may do with it. */
  #quantiser: Quantiser | undefined
  /** Queries that stand at the partition; made with the first of them. */
  #standing: StandingRegistry | undefined
  /** Log position of the last segment applied. */
  #seq = 0
  #leftBytes = 0

  constructor(spec: IndexSpec, options: ResidentOptions) {
    this.spec = spec
    this.#options = options
    this.#sketchFrom = options.sketchFrom ?? sketchRecordsMin
    this.#recent = new Partition(spec, options)
  }

  get form(): IndexForm {
    return this.#base === undefined ? "full" : "mapped"
  }

  /** Fills an empty one from a snapshot. Throws where its files are not whole, or of another index. */
  *open(files: OpenFiles): Work<void> {
    const { records, graph, sketch } = files
    const isQuantised = (this.spec.quantization ?? "none") !== "none"
    if (sketch !== undefined && (isQuantised || graph === undefined)) return yield* this.#openMapped(records, sketch)
    if (graph === undefined) throw new Error("a snapshot without a graph and without a sketch")
    yield* this.#openFull(records, graph)
  }

  /**
   * Applies a segment, an operation or a piece of a graph a step, then looks which standing queries it has changed. Returns
   * what each operation did.
   */
  *apply(segment: Uint8Array): Work<Uint8Array<ArrayBuffer>> {
    const base = this.#base
    const standing = this.#standing
    const changed = standing === undefined || standing.size === 0 ? undefined : new Set<string>()
    const effects = yield* this.#recent.apply(
      segment,
      base && ((op) => this.#isStale(base, op)),
      changed && ((id) => changed.add(id))
    )
    this.#seq = Math.max(this.#seq, decodeSegmentHeader(segment).seq)
    if (standing !== undefined && changed !== undefined) {
      standing.seq = this.#seq
      yield* standing.match(changed)
    }
    return effects
  }

  get standing(): StandingRegistry | undefined {
    return this.#standing
  }

  /** Registers a standing query, and tells its answer. */
  *watch(command: WatchCommand): Work<void> {
    if (command.filter !== "") {
      while (!this.filtersReady()) {
        this.#filterStep()
        yield
      }
    }
    this.#standing ??= new StandingRegistry(this)
    this.#standing.seq = this.#seq
    this.#standing.add(command)
  }

  /** What can be seen of a record; its vector may be a view. */
  visible(id: string): { readonly vector: Float32Array; readonly metadata: string } | undefined {
    const { table, arena } = this.#recent
    const slot = table.slots.get(id)
    if (slot !== undefined) return { vector: arena.row(slot), metadata: table.metadata[slot]! }
    const base = this.#base
    if (base === undefined || table.hidden.has(id)) return undefined
    const entry = base.find(id)
    if (entry === -1 || entry >= base.view.count) return undefined
    const vector = new Float32Array(this.spec.dimensions)
    base.view.vector(entry, vector)
    return { vector, metadata: base.view.metadata(entry) }
  }

  /** Whether a search may name a filter; if not yet, background work brings it about from now on. */
  filtersReady(): boolean {
    this.#base?.wantFilters()
    return this.#recent.filtersReady && (this.#base?.filtersReady ?? true)
  }

  get hasBackgroundWork(): boolean {
    return (
      this.#recent.hasBackgroundWork || (this.#base?.hasBackgroundWork ?? false) || this.#standing?.hasWork === true
    )
  }

  backgroundStep(): void {
    if (this.#standing?.hasWork === true) this.#standing.workStep()
    else this.#filterStep()
  }

  #filterStep(): void {
    if (this.#base?.hasBackgroundWork === true) this.#base.backgroundStep()
    else this.#recent.backgroundStep()
  }

  /** The nearest records. A filter's text must have been checked, and {@link filtersReady}. */
  search(
    vector: Float32Array,
    k: number,
    ef: number,
    filter: string | undefined,
    withMetadata: boolean,
    withVectors: boolean
  ): Hits {
    const recent = this.#recent.find(vector, k, ef, filter)
    const base = this.#base?.nearest(vector, k, ef, filter)
    const count = Math.min(k, recent.slots.length + (base?.slots.length ?? 0))
    const ids = new Array<string>(count)
    const scores = new Float32Array(count)
    const metadata = withMetadata ? new Array<string>(count) : undefined
    const { dimensions } = this.spec
    const vectors = withVectors ? new Float32Array(count * dimensions) : undefined
    const { table, arena } = this.#recent
    let fromRecent = 0
    let fromBase = 0
    for (let i = 0; i < count; i++) {
      const isRecent =
        base === undefined ||
        fromBase === base.slots.length ||
        (fromRecent < recent.slots.length && recent.scores[fromRecent]! > base.scores[fromBase]!)
      if (isRecent) {
        const slot = recent.slots[fromRecent]!
        scores[i] = recent.scores[fromRecent++]!
        ids[i] = table.ids[slot]!
        if (metadata !== undefined) metadata[i] = table.metadata[slot]!
        vectors?.set(arena.row(slot), i * dimensions)
      } else {
        const { view } = this.#base!
        const slot = base.slots[fromBase]!
        scores[i] = base.scores[fromBase++]!
        ids[i] = view.id(slot)
        if (metadata !== undefined) metadata[i] = view.metadata(slot)
        if (vectors !== undefined) view.vector(slot, vectors.subarray(i * dimensions, (i + 1) * dimensions))
      }
    }
    return { ids, scores, metadata, vectors }
  }

  /** Records by id. */
  read(request: number, ids: ReadonlyArray<string>): RecordsAnswer {
    const { table, arena } = this.#recent
    /** Slots here; below -1 what is at slot -2 - n of the snapshot. */
    const places: Array<number> = []
    const there = ids.map((id) => {
      const slot = table.slots.get(id)
      if (slot !== undefined) places.push(slot)
      else if (this.#base !== undefined && !table.hidden.has(id)) {
        const entry = this.#base.find(id)
        if (entry === -1 || entry >= this.#base.view.count) return false
        places.push(-2 - entry)
      } else return false
      return true
    })
    const { dimensions } = this.spec
    const times = new BigUint64Array(places.length)
    const counters = new Float64Array(places.length)
    const regions: Array<string> = []
    const metadata: Array<string> = []
    const vectors = new Float32Array(places.length * dimensions)
    for (let i = 0; i < places.length; i++) {
      const place = places[i]!
      const into = vectors.subarray(i * dimensions, (i + 1) * dimensions)
      // A visible record's metadata is never older than its vector.
      let version = place >= 0 ? table.metadataVersion(place) : undefined
      if (place >= 0) {
        metadata.push(table.metadata[place]!)
        into.set(arena.row(place))
      } else {
        const { view } = this.#base!
        const record = view.record(-2 - place)
        version = record.metadataVersion ?? record.vectorVersion
        metadata.push(record.metadata)
        view.vector(-2 - place, into)
      }
      times[i] = version!.time
      counters[i] = version!.counter
      regions.push(version!.region)
    }
    return { kind: "records", request, there, times, counters, regions, metadata, vectors }
  }

  get stats(): IndexStats {
    const { table, arena, graph } = this.#recent
    const base = this.#base
    return {
      count: table.count + (base?.count ?? 0),
      tombstones: table.tombstones + (base?.tombstones ?? 0),
      graphSlots: graph?.nodes ?? 0,
      bytes: this.bytes,
      maxTime: table.maxTime,
      counters: table.counters,
      form: this.form,
      inMemory: table.count,
      recentBytes: this.recentBytes,
      bytesOf: {
        vectors: arena.bytes,
        graph: this.#recent.graphBytes,
        filters: this.#recent.filterBytes + (base?.filterBytes ?? 0),
        sketch: base?.sketchBytes ?? 0,
        narrow: base?.narrowBytes ?? 0
      }
    }
  }

  /** Bytes held, V8's own estimated; those of the thread's block cache are not in it. */
  get bytes(): number {
    return this.#recent.bytes + (this.#base?.bytes ?? 0) + (this.#standing?.bytes ?? 0)
  }

  /** Bytes of what was written since the snapshot, in the mapped form: a new snapshot takes them in. 0 in the full form. */
  get recentBytes(): number {
    return this.#base === undefined ? 0 : this.#recent.bytes
  }

  /** Bytes that were let go of since last asked, and are there until garbage is collected: V8 does not see those of WebAssembly. */
  takeLeftBytes(): number {
    const bytes = this.#leftBytes
    this.#leftBytes = 0
    return bytes
  }

  /** Writes the state into files of `directory`, and goes on from them where that is the form to have. Nothing else changes it meanwhile. */
  *snapshot(directory: string): Work<SnapshotFiles> {
    const records = join(directory, "records.bin")
    const graph = join(directory, "graph.bin")
    const sketch = join(directory, "sketch.bin")
    yield* settled(mkdir(directory, { recursive: true }))
    const isQuantised = (this.spec.quantization ?? "none") !== "none"
    // A sketch is made from about this: the sample that it is trained on, twice, and codes and places of all.
    const count = this.#recent.table.count + (this.#base?.count ?? 0)
    this.#leftBytes += Math.min(count, sampleRows) * this.spec.dimensions * 8 + count * (this.spec.dimensions / 4 + 48)
    if (this.#base !== undefined) {
      const base = this.#base
      const outline = yield* writeRecordsOf(records, this.spec, this.#merged(base))
      yield* settled(writeFile(graph, noGraph, { flag: "wx" }))
      yield* this.#writeSketchOf(records, sketch, outline, base)
      yield* this.#goOnFrom(records, sketch)
      return { records, graph, sketch }
    }
    const { table, arena } = this.#recent
    const written = isQuantised ? undefined : this.#recent.graph
    const outline = yield* writeRecordsOf(records, this.spec, partsOf(this.spec, table, arena, written))
    if (written === undefined) yield* settled(writeFile(graph, noGraph, { flag: "wx" }))
    else yield* writeGraph(graph, this.spec, written)
    if (table.count < this.#sketchFrom) return { records, graph }
    this.#quantiser = yield* writeSketch(sketch, this.spec, outline, table.tombstones, this.#rows(), this.#quantiser)
    if (isQuantised) yield* this.#goOnFrom(records, sketch)
    return { records, graph, sketch }
  }

  /** Gives memory that is not V8's back. */
  dispose(): void {
    this.#recent.dispose()
    this.#base?.close()
    this.#base = undefined
  }

  *#openFull(records: string, graphFile: string): Work<void> {
    const { spec, table, arena } = this.#recent
    const nodes = yield* checkGraphFile(graphFile, spec)
    // The graph is read in another thread of the process, while this one reads the records.
    const loading = nodes === 0 ? undefined : Graph.load(spec, graphFile)
    loading?.catch(() => {})
    let graph: Graph | undefined
    try {
      const { graphNodes, nodeOfSlot } = yield* readRecords(records, spec, table, arena)
      if (graphNodes !== nodes) throw new Error(`a graph of ${nodes} nodes, the records name ${graphNodes}`)
      graph = loading && (yield* settled(loading))
      graph?.assign(nodeOfSlot)
    } catch (error) {
      loading?.then(
        (loaded) => loaded.dispose(),
        () => {}
      )
      throw error
    }
    this.#recent.restored(graph)
  }

  *#openMapped(records: string, sketch: string): Work<void> {
    const base = yield* MappedBase.open(this.spec, { records, sketch }, this.#options.cache)
    this.#base = base
    this.#recent = new Partition(this.spec, { ...this.#options, graphFactor: recentGraphFactor })
    this.#observe(base)
  }

  /** Puts a snapshot just written in the place of all that is here. */
  *#goOnFrom(records: string, sketch: string): Work<void> {
    const base = yield* MappedBase.open(this.spec, { records, sketch }, this.#options.cache)
    const before = this.#recent
    this.#leftBytes += before.arena.bytes + (this.#base?.bytes ?? 0)
    if (this.#base?.wantsFilters === true) base.wantFilters()
    this.#base?.close()
    this.#base = base
    this.#quantiser = undefined
    this.#recent = new Partition(this.spec, { ...this.#options, graphFactor: recentGraphFactor })
    before.dispose()
    this.#observe(base)
  }

  /** Versions seen until the snapshot, its regions in its order: a record of it can then be copied as it is. */
  #observe(base: MappedBase): void {
    const { regions, header } = base.view
    let isFirst = true
    for (const [region, counter] of regions) {
      this.#recent.table.observe({ time: isFirst ? header.maxTime : 0n, region, counter })
      isFirst = false
    }
  }

  /** Whether an operation is too old to do anything to a record of the snapshot; where not, that record is brought over. */
  #isStale(base: MappedBase, op: SegmentCursor): boolean {
    const { table } = this.#recent
    const { id, version } = op
    if (table.slots.has(id) || table.hidden.has(id)) return false
    const entry = base.find(id)
    if (entry === -1) return false
    if (entry >= base.view.count) {
      const hidden = base.view.hidden(entry)
      base.take(entry)
      table.hide(id, hidden)
      return false
    }
    const record = base.view.record(entry)
    if (op.kind === "upsert" && !isNewer(version, record.vectorVersion)) return true
    if (op.kind === "metadata" && !isNewer(version, record.metadataVersion ?? record.vectorVersion)) return true
    if (op.kind === "delete" && isNewer(record.vectorVersion, version)) return true
    const vector = new Float32Array(this.spec.dimensions)
    base.view.vector(entry, vector)
    base.take(entry)
    this.#recent.adopt(id, record, vector)
    return false
  }

  /** The vectors of all records, in the order in which they are written. */
  #rows(): RowSource {
    const { table, arena } = this.#recent
    const { dimensions } = this.spec
    const slots = new Int32Array(table.count)
    let at = 0
    table.live.forEach((slot) => {
      slots[at++] = slot
    })
    return {
      count: slots.length,
      rows: (from, into) => {
        for (let i = 0; i * dimensions < into.length; i++) into.set(arena.row(slots[from + i]!), i * dimensions)
      }
    }
  }

  /** What is left of the snapshot, then what was written since. */
  #merged(base: MappedBase): RecordsParts {
    const { table, arena } = this.#recent
    const recent = partsOf(this.spec, table, arena, undefined)
    const { view } = base
    const { dimensions } = this.spec
    const copied = function* (from: number, to: number, writer: Parameters<RecordsParts["records"]>[0]): Work<void> {
      for (let entry = from; entry < to; ) {
        for (const { bytes, id } of view.entries(entry, Math.min(to, entry + entriesInStep))) {
          const current = entry++
          if (!base.has(current)) continue
          // The node in a graph that this snapshot is without.
          if (current < view.count) bytes.writeUInt32LE(0, nodeAt)
          if (writer.isFull(bytes.length + recordBytesMax)) {
            // What is read is there until the next read, and searches go on while this is written.
            const kept = Buffer.from(bytes)
            const keptId = Buffer.from(id)
            yield* writer.flush()
            writer.copied(kept, keptId)
            break
          }
          writer.copied(bytes, id)
        }
        yield
      }
    }
    return {
      regions: table.counters,
      count: base.count + table.count,
      hiddenCount: base.hiddenCount + table.hidden.size,
      graphNodes: 0,
      maxTime: table.maxTime,
      *records(writer) {
        yield* copied(0, view.count, writer)
        yield* recent.records(writer)
      },
      *hidden(writer) {
        yield* copied(view.count, view.count + view.header.hiddenCount, writer)
        yield* recent.hidden(writer)
      },
      *vectors(writer) {
        const rows = Math.max(1, Math.floor(vectorBytesInStep / (dimensions * 4)))
        const block = new Float32Array(rows * dimensions)
        for (let from = 0; from < view.count; from += rows) {
          const count = Math.min(rows, view.count - from)
          const vectors = block.subarray(0, count * dimensions)
          view.vectors(from, vectors)
          for (let i = 0; i < count; i++) {
            if (!base.live.has(from + i)) continue
            if (writer.isFull(dimensions * 4)) yield* writer.flush()
            writer.vector(vectors.subarray(i * dimensions, (i + 1) * dimensions))
          }
          yield
        }
        yield* recent.vectors(writer)
      }
    }
  }

  /** Writes the sketch of a records file just written, whose vectors are read from there. */
  *#writeSketchOf(records: string, sketch: string, outline: RecordsOutline, base: MappedBase): Work<void> {
    const map = { recordsBytes: outline.bytes, blocks: outline.blocks, ...offsetsOf(outline.offsets) }
    const view = new RecordsView(records, this.spec, map, this.#options.cache)
    try {
      const source: RowSource = { count: view.count, rows: (from, into) => view.vectors(from, into) }
      const tombstones = base.tombstones + this.#recent.table.tombstones
      yield* writeSketch(sketch, this.spec, outline, tombstones, source, base.quantiser)
    } finally {
      view.close()
    }
  }
}

function* writeGraph(file: string, spec: IndexSpec, graph: Graph): Work<void> {
  yield* settled(graph.write(file))
  // hnswlib does not look whether its writes succeed.
  const written = yield* checkGraphFile(file, spec)
  if (written !== graph.nodes) throw new Error(`a graph of ${graph.nodes} nodes was written with ${written}`)
}

/**
 * What was written since a snapshot is looked at one by one up to so many times the records of a partition with a graph: a
 * graph costs most of an insertion and half of its memory, and the next snapshot of a mapped partition has none.
 */
const recentGraphFactor = 4

/** Rows that a sketch is trained on, about. */
const sampleRows = 16_384

/** Where a record in the file names its node. */
const nodeAt = 20

/** Records copied, and bytes of vectors, in one step. */
const entriesInStep = 256
const vectorBytesInStep = 1 << 18
