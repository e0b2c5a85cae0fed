/**
 * The records file of a snapshot: everything of a partition but the links of its graph. The layout is written down in
 * `docs/format.md`; little-endian. The header is written last, so a file that was not finished is not one.
 */
import type { FileHandle } from "node:fs/promises"
import { crc32 } from "node:zlib"
import type { Version } from "../../protocol/Version.ts"
import type { IndexSpec } from "../VectorIndex.ts"
import { blockBytes } from "./BlockCache.ts"
import type { Graph } from "./Graph.ts"
import { hashOf } from "./IdTable.ts"
import type { RecordTable } from "./RecordTable.ts"
import type { VectorArena } from "./VectorArena.ts"
import { settled, type Work, withFile } from "./Work.ts"

/** Version of the layout; a reader refuses any other. */
export const recordsFormat = 1

/** A file that is not what was asked for. */
export class FileFault extends Error {}

/** What a records file is written from, part by part; `docs/format-snapshot.md` says what each part is. */
export interface RecordsParts {
  readonly regions: ReadonlyMap<string, number>
  readonly count: number
  readonly hiddenCount: number
  readonly graphNodes: number
  readonly maxTime: bigint
  readonly records: (writer: RecordsWriter) => Work<void>
  readonly hidden: (writer: RecordsWriter) => Work<void>
  readonly vectors: (writer: RecordsWriter) => Work<void>
}

/** Writes a new file, a block a step. Nothing may change meanwhile. */
export function* writeRecords(
  file: string,
  spec: IndexSpec,
  table: RecordTable,
  arena: VectorArena,
  graph: Graph | undefined
): Work<RecordsOutline> {
  return yield* writeRecordsOf(file, spec, partsOf(spec, table, arena, graph))
}

/** The same of parts that may come from elsewhere. */
export const writeRecordsOf = (file: string, spec: IndexSpec, parts: RecordsParts): Work<RecordsOutline> =>
  withFile(file, "wx", (handle) => writeAllTo(handle, spec, parts))

/** The parts of what a table and an arena hold. */
export const partsOf = (
  spec: IndexSpec,
  table: RecordTable,
  arena: VectorArena,
  graph: Graph | undefined
): RecordsParts => ({
  regions: table.counters,
  count: table.count,
  hiddenCount: table.hidden.size,
  graphNodes: graph === undefined ? 0 : graph.nodes,
  maxTime: table.maxTime,
  *records(writer) {
    const regionOf = new Map(table.regions.map((region, i) => [region, i]))
    let written = 0
    for (let slot = table.live.next(0); slot !== -1; slot = table.live.next(slot + 1)) {
      const id = table.ids[slot]!
      const metadata = table.metadata[slot]!
      const metadataVersion = table.metadataVersions.get(slot)
      if (writer.isFull(recordBytesMax + 3 * (id.length + metadata.length))) yield* writer.flush()
      writer.entry()
      writer.version(table.vectorVersion(slot), regionOf)
      writer.u16(metadataVersion === undefined ? 0 : hasMetadataVersion)
      writer.u32(graph === undefined ? 0 : graph.nodeOf(slot))
      writer.u16(Buffer.byteLength(id))
      writer.u32(Buffer.byteLength(metadata))
      if (metadataVersion !== undefined) writer.version(metadataVersion, regionOf)
      writer.id(id)
      writer.text(metadata)
      if (++written % recordsInStep === 0) yield
    }
  },
  *hidden(writer) {
    const regionOf = new Map(table.regions.map((region, i) => [region, i]))
    let written = 0
    for (const [id, { deleted, orphan }] of table.hidden) {
      if (writer.isFull(recordBytesMax + 3 * (id.length + (orphan?.metadata.length ?? 0)))) yield* writer.flush()
      writer.entry()
      writer.u16((deleted === undefined ? 0 : hasDeletion) | (orphan === undefined ? 0 : hasOrphan))
      writer.u16(Buffer.byteLength(id))
      writer.u32(orphan === undefined ? 0 : Buffer.byteLength(orphan.metadata))
      if (deleted !== undefined) writer.version(deleted, regionOf)
      if (orphan !== undefined) writer.version(orphan.version, regionOf)
      writer.id(id)
      if (orphan !== undefined) writer.text(orphan.metadata)
      if (++written % recordsInStep === 0) yield
    }
  },
  *vectors(writer) {
    for (let slot = table.live.next(0); slot !== -1; slot = table.live.next(slot + 1)) {
      if (writer.isFull(spec.dimensions * 4)) yield* writer.flush()
      writer.vector(arena.row(slot))
    }
  }
})

export interface RecordsRead {
  /** 0: there is no graph. */
  readonly graphNodes: number
  readonly nodeOfSlot: Uint32Array
}

/** Reads a file into an empty table and arena, a block a step. Throws {@link FileFault} where it is not whole or not of `spec`. */
export const readRecords = (file: string, spec: IndexSpec, table: RecordTable, arena: VectorArena): Work<RecordsRead> =>
  withFile(file, "r", (handle) => readAllOf(handle, spec, table, arena))

function* writeAllTo(handle: FileHandle, spec: IndexSpec, parts: RecordsParts): Work<RecordsOutline> {
  // Of what is written last the time is not foreseen by whoever chooses ids.
  const hashSeed = Number(BigInt.asUintN(32, parts.maxTime ^ (parts.maxTime >> 32n)))
  const writer = new RecordsWriter(handle, headerBytes, parts.count + parts.hiddenCount, hashSeed)
  for (const [region, counter] of parts.regions) {
    if (writer.isFull(9 + region.length)) yield* writer.flush()
    writer.u8(region.length)
    writer.f64(counter)
    writer.text(region)
  }
  yield* parts.records(writer)
  yield* parts.hidden(writer)
  const textEnd = writer.position
  if (writer.isFull(vectorsAlign)) yield* writer.flush()
  writer.zeros(align(textEnd) - textEnd)
  yield* parts.vectors(writer)
  yield* writer.flush()
  const header = Buffer.alloc(headerBytes)
  header.writeUInt32LE(magic, 0)
  header.writeUInt16LE(recordsFormat, 4)
  header.writeUInt8(metrics.indexOf(spec.metric), 6)
  header.writeUInt32LE(spec.dimensions, 8)
  header.writeUInt32LE(spec.m, 12)
  header.writeUInt32LE(spec.efConstruction, 16)
  header.writeUInt32LE(parts.regions.size, 20)
  header.writeUInt32LE(parts.count, 24)
  header.writeUInt32LE(parts.hiddenCount, 28)
  header.writeUInt32LE(parts.graphNodes, 32)
  header.writeBigUInt64LE(parts.maxTime, 40)
  header.writeDoubleLE(textEnd, 48)
  header.writeDoubleLE(writer.position, 56)
  header.writeUInt32LE(crc32(header.subarray(0, 64)), 64)
  yield* settled(writeAll(handle, header, 0))
  return { ...writer.outline(header), count: parts.count, textEnd, vectorsAt: align(textEnd), hashSeed }
}

function* readAllOf(handle: FileHandle, spec: IndexSpec, table: RecordTable, arena: VectorArena): Work<RecordsRead> {
  const { size } = yield* settled(handle.stat())
  const bytes = Buffer.alloc(headerBytes)
  if (size < headerBytes) throw new FileFault(`${size} bytes, a header has ${headerBytes}`)
  yield* settled(readAll(handle, bytes, 0))
  const header = decodeRecordsHeader(bytes, size, spec)
  const { count, graphNodes, textEnd, vectorsAt } = header

  const reader = new Reader(handle, headerBytes, textEnd)
  const regions: Array<string> = []
  for (let i = 0; i < header.regions; i++) {
    if (!reader.has(9)) yield* reader.need(9)
    const length = reader.u8()
    const counter = reader.f64()
    if (!reader.has(length)) yield* reader.need(length)
    const region = reader.text(length)
    regions.push(region)
    table.observe({ time: 0n, region, counter })
  }
  const version = (): Version => {
    const time = reader.u64()
    const counter = reader.f64()
    const region = regions[reader.u16()]
    if (region === undefined) throw new FileFault("a version of no known region")
    return { time, region, counter }
  }
  if (regions.length > 0) table.observe({ time: header.maxTime, region: regions[0]!, counter: 0 })
  const nodeOfSlot = new Uint32Array(graphNodes === 0 ? 0 : count)
  for (let slot = 0; slot < count; slot++) {
    if (!reader.has(recordBytesMax)) yield* reader.need(recordBytesMax)
    const vectorVersion = version()
    const flags = reader.u16()
    const node = reader.u32()
    const idBytes = reader.u16()
    const metadataBytes = reader.u32()
    const metadataVersion = (flags & hasMetadataVersion) === 0 ? undefined : version()
    if (!reader.has(idBytes + metadataBytes)) yield* reader.need(idBytes + metadataBytes)
    table.place(slot, reader.text(idBytes), vectorVersion)
    if (metadataBytes > 0 || metadataVersion !== undefined) {
      table.restoreMetadata(slot, reader.text(metadataBytes), metadataVersion)
    }
    if (graphNodes > 0) nodeOfSlot[slot] = node
    if (slot % recordsInStep === 0) yield
  }
  for (let i = 0; i < header.hiddenCount; i++) {
    if (i % recordsInStep === 0) yield
    if (!reader.has(recordBytesMax)) yield* reader.need(recordBytesMax)
    const flags = reader.u16()
    const idBytes = reader.u16()
    const metadataBytes = reader.u32()
    const deleted = (flags & hasDeletion) === 0 ? undefined : version()
    const orphanVersion = (flags & hasOrphan) === 0 ? undefined : version()
    if (!reader.has(idBytes + metadataBytes)) yield* reader.need(idBytes + metadataBytes)
    const id = reader.text(idBytes)
    const metadata = reader.text(metadataBytes)
    table.hide(id, {
      deleted,
      orphan: orphanVersion === undefined ? undefined : { version: orphanVersion, metadata }
    })
  }
  if (reader.left !== 0) throw new FileFault(`${reader.left} bytes after the last record`)
  if (table.slots.size !== count) throw new FileFault("an id that is there twice")

  arena.reserve(count)
  const rowsInBlock = Math.ceil(bufferBytes / (spec.dimensions * 4))
  const block = new Uint8Array(Math.min(rowsInBlock, count) * spec.dimensions * 4)
  for (let slot = 0; slot < count; slot += rowsInBlock) {
    const bytes = block.subarray(0, Math.min(rowsInBlock, count - slot) * spec.dimensions * 4)
    yield* settled(readAll(handle, bytes, vectorsAt + slot * spec.dimensions * 4))
    arena.setBytes(slot, bytes)
    yield
  }
  return { graphNodes, nodeOfSlot }
}

/** What the header says, checked against the file's size and what it should be of. */
export interface RecordsHeader {
  readonly regions: number
  readonly count: number
  readonly hiddenCount: number
  readonly graphNodes: number
  readonly maxTime: bigint
  readonly textEnd: number
  readonly vectorsAt: number
}

/** Throws {@link FileFault} where it is none, or not of `spec`. */
export const decodeRecordsHeader = (header: Buffer, size: number, spec: IndexSpec): RecordsHeader => {
  if (header.readUInt32LE(0) !== magic) throw new FileFault("not a records file")
  if (header.readUInt32LE(64) !== crc32(header.subarray(0, 64))) throw new FileFault("header checksum differs")
  const format = header.readUInt16LE(4)
  if (format !== recordsFormat) throw new FileFault(`format ${format}, this version reads ${recordsFormat}`)
  expectSame("metric", metrics[header.readUInt8(6)], spec.metric)
  expectSame("dimensions", header.readUInt32LE(8), spec.dimensions)
  expectSame("m", header.readUInt32LE(12), spec.m)
  expectSame("efConstruction", header.readUInt32LE(16), spec.efConstruction)
  const count = header.readUInt32LE(24)
  const textEnd = header.readDoubleLE(48)
  const vectorsAt = align(textEnd)
  expectSame("size", size, header.readDoubleLE(56))
  expectSame("size by its counts", size, vectorsAt + count * spec.dimensions * 4)
  return {
    regions: header.readUInt32LE(20),
    count,
    hiddenCount: header.readUInt32LE(28),
    graphNodes: header.readUInt32LE(32),
    maxTime: header.readBigUInt64LE(40),
    textEnd,
    vectorsAt
  }
}

const magic = 0x54525652 // "RVRT"
export const headerBytes = 96
const vectorsAlign = 64
/** By the number that a file says. */
export const metrics = ["cosine", "l2", "ip"] as const
const align = (n: number): number => Math.ceil(n / vectorsAlign) * vectorsAlign

/** Flags of a record, and of a hidden id. */
export const hasMetadataVersion = 1
export const hasDeletion = 1
export const hasOrphan = 2

/** Bytes of a record beside its texts, at most. */
export const recordBytesMax = 64

/** Records read or written in one step. */
export const recordsInStep = 256

/** Bytes read or written at once, at least. */
const bufferBytes = 1 << 20

export const expectSame = (what: string, got: unknown, expected: unknown): void => {
  if (got !== expected) throw new FileFault(`${what} ${String(got)}, expected ${String(expected)}`)
}

export const writeAll = async (handle: FileHandle, bytes: Uint8Array, position: number): Promise<void> => {
  for (let at = 0; at < bytes.length; ) {
    const { bytesWritten } = await handle.write(bytes, at, bytes.length - at, position + at)
    at += bytesWritten
  }
}

/** Bytes asked for in one read: the system gives no more. */
const readBytesMax = 2 ** 30

export const readAll = async (handle: FileHandle, bytes: Uint8Array, position: number): Promise<void> => {
  for (let at = 0; at < bytes.length; ) {
    const { bytesRead } = await handle.read(bytes, at, Math.min(bytes.length - at, readBytesMax), position + at)
    if (bytesRead === 0) throw new FileFault("a file that ends early")
    at += bytesRead
  }
}

/** Where everything is in a file that was written, and the checksums of its blocks. */
export interface RecordsOutline {
  readonly count: number
  /** Where each record, then each hidden id begins. */
  readonly offsets: Float64Array
  /** Of their ids, see {@link hashOf}. */
  readonly hashes: Uint32Array
  readonly hashSeed: number
  readonly textEnd: number
  readonly vectorsAt: number
  readonly bytes: number
  /** CRC-32 of each {@link blockBytes}. */
  readonly blocks: Uint32Array
  readonly headerCrc: number
}

export class RecordsWriter {
  readonly #handle: FileHandle
  readonly #hashSeed: number
  readonly #offsets: Float64Array
  readonly #hashes: Uint32Array
  #entries = 0
  #buffer = Buffer.allocUnsafe(bufferBytes)
  #at = 0
  #flushed: number
  /** The first block as it is before the header is. */
  readonly #first = Buffer.alloc(blockBytes)
  #blocks = new Uint32Array(1)
  #blockCount = 0
  #crc = 0

  constructor(handle: FileHandle, position: number, entries: number, hashSeed: number) {
    this.#handle = handle
    this.#flushed = position
    this.#offsets = new Float64Array(entries)
    this.#hashes = new Uint32Array(entries)
    this.#hashSeed = hashSeed
  }

  get position(): number {
    return this.#flushed + this.#at
  }

  /** Whether so many more bytes need a {@link flush} first. Grows the block where one item is larger than it. */
  isFull(bytes: number): boolean {
    if (this.#at + bytes <= this.#buffer.length) return false
    if (this.#at === 0) this.#buffer = Buffer.allocUnsafe(bytes)
    return this.#at > 0
  }

  *flush(): Work<void> {
    const bytes = this.#buffer.subarray(0, this.#at)
    this.#sum(bytes)
    yield* settled(writeAll(this.#handle, bytes, this.#flushed))
    this.#flushed += this.#at
    this.#at = 0
  }

  /** What was written, the header included, which is written by the caller. */
  outline(header: Buffer): Pick<RecordsOutline, "offsets" | "hashes" | "bytes" | "blocks" | "headerCrc"> {
    const bytes = this.#flushed
    const count = Math.ceil(bytes / blockBytes)
    const blocks = new Uint32Array(count)
    blocks.set(this.#blocks.subarray(0, Math.min(count, this.#blockCount)))
    if (count > this.#blockCount) blocks[count - 1] = this.#crc
    header.copy(this.#first)
    blocks[0] = crc32(this.#first.subarray(0, Math.min(bytes, blockBytes)))
    return { offsets: this.#offsets, hashes: this.#hashes, bytes, blocks, headerCrc: crc32(header) }
  }

  /** A record or a hidden id begins here. */
  entry(): void {
    this.#offsets[this.#entries] = this.position
  }

  /** Its id. */
  id(value: string): void {
    const from = this.#at
    this.text(value)
    this.#hashes[this.#entries++] = hashOf(this.#buffer.subarray(from, this.#at), this.#hashSeed)
  }

  /** A whole record or hidden id as it is in another file; `id` is a part of it. */
  copied(bytes: Uint8Array, id: Uint8Array): void {
    this.entry()
    this.#hashes[this.#entries++] = hashOf(id, this.#hashSeed)
    this.raw(bytes)
  }

  raw(bytes: Uint8Array): void {
    this.#buffer.set(bytes, this.#at)
    this.#at += bytes.length
  }

  version(of: Version, regionOf: ReadonlyMap<string, number>): void {
    this.u64(of.time)
    this.f64(of.counter)
    this.u16(regionOf.get(of.region)!)
  }

  u8(value: number): void {
    this.#at = this.#buffer.writeUInt8(value, this.#at)
  }

  u16(value: number): void {
    this.#at = this.#buffer.writeUInt16LE(value, this.#at)
  }

  u32(value: number): void {
    this.#at = this.#buffer.writeUInt32LE(value, this.#at)
  }

  u64(value: bigint): void {
    this.#at = this.#buffer.writeBigUInt64LE(value, this.#at)
  }

  f64(value: number): void {
    this.#at = this.#buffer.writeDoubleLE(value, this.#at)
  }

  text(value: string): void {
    if (value !== "") this.#at += this.#buffer.write(value, this.#at)
  }

  zeros(count: number): void {
    this.#buffer.fill(0, this.#at, this.#at + count)
    this.#at += count
  }

  vector(value: Float32Array): void {
    this.raw(new Uint8Array(value.buffer, value.byteOffset, value.byteLength))
  }

  /** Sums up what follows, by blocks of the file. */
  #sum(bytes: Buffer): void {
    for (let at = 0; at < bytes.length; ) {
      const position = this.#flushed + at
      const inBlock = position % blockBytes
      const length = Math.min(bytes.length - at, blockBytes - inBlock)
      const part = bytes.subarray(at, at + length)
      if (position < blockBytes) part.copy(this.#first, position)
      this.#crc = crc32(part, inBlock === 0 ? 0 : this.#crc)
      at += length
      if (inBlock + length < blockBytes) continue
      if (this.#blockCount === this.#blocks.length) {
        const grown = new Uint32Array(Math.ceil(this.#blocks.length * 1.5) + 64)
        grown.set(this.#blocks)
        this.#blocks = grown
      }
      this.#blocks[this.#blockCount++] = this.#crc
    }
  }
}

class Reader {
  readonly #handle: FileHandle
  readonly #end: number
  #buffer = Buffer.alloc(0)
  #at = 0
  #position: number

  constructor(handle: FileHandle, position: number, end: number) {
    this.#handle = handle
    this.#position = position
    this.#end = end
  }

  get left(): number {
    return this.#end - this.#position + (this.#buffer.length - this.#at)
  }

  /** Whether so many bytes are ready, or all that there are. */
  has(bytes: number): boolean {
    return this.#buffer.length - this.#at >= bytes || this.#position === this.#end
  }

  /** Makes so many bytes ready, or as many as there are; reading beyond those throws. */
  *need(bytes: number): Work<void> {
    const ready = this.#buffer.length - this.#at
    const more = Math.min(this.#end - this.#position, Math.max(bytes - ready, bufferBytes))
    const buffer = Buffer.allocUnsafe(ready + more)
    this.#buffer.copy(buffer, 0, this.#at)
    yield* settled(readAll(this.#handle, buffer.subarray(ready), this.#position))
    this.#position += more
    this.#buffer = buffer
    this.#at = 0
  }

  u8(): number {
    return this.#buffer.readUInt8(this.#take(1))
  }

  u16(): number {
    return this.#buffer.readUInt16LE(this.#take(2))
  }

  u32(): number {
    return this.#buffer.readUInt32LE(this.#take(4))
  }

  u64(): bigint {
    return this.#buffer.readBigUInt64LE(this.#take(8))
  }

  f64(): number {
    return this.#buffer.readDoubleLE(this.#take(8))
  }

  text(bytes: number): string {
    if (bytes === 0) return ""
    const at = this.#take(bytes)
    return this.#buffer.toString("utf8", at, at + bytes)
  }

  #take(bytes: number): number {
    const at = this.#at
    if (at + bytes > this.#buffer.length) throw new FileFault("a record that ends early")
    this.#at = at + bytes
    return at
  }
}
