/**
 * Reads single records and vectors of a records file by position. Nothing is believed before its block's checksum has been
 * looked at. Reads are synchronous: a vector thread has no better use of the microsecond that one takes, and waiting for
 * libuv's pool would be dearer.
 */
import { closeSync, fstatSync, openSync, readSync } from "node:fs"
import { crc32 } from "node:zlib"
import type { Version } from "../../protocol/Version.ts"
import type { IndexSpec } from "../VectorIndex.ts"
import { type BlockCache, blockBytes, type CachedFile, type Frame } from "./BlockCache.ts"
import {
  decodeRecordsHeader,
  FileFault,
  hasDeletion,
  hasMetadataVersion,
  hasOrphan,
  headerBytes,
  type RecordsHeader
} from "./RecordsFile.ts"
import type { Hidden } from "./RecordTable.ts"

/** Where the parts of a records file are, and the checksums of its blocks: what a sketch file says of it. */
export interface RecordsMap {
  readonly recordsBytes: number
  /** Of every {@link offsetGroup}th record or hidden id, in their order, where it begins; then of each how much further. */
  readonly groups: Float64Array
  readonly offsets: Uint32Array
  /** CRC-32 of each {@link blockBytes}. */
  readonly blocks: Uint32Array
}

export const offsetGroup = 64

export interface StoredRecord {
  readonly vectorVersion: Version
  readonly metadataVersion: Version | undefined
  readonly metadata: string
}

/** An entry's bytes, and what of them is its id and its metadata. */
export interface StoredEntry {
  readonly bytes: Buffer
  readonly id: Buffer
  readonly metadata: Buffer
}

export class RecordsView {
  readonly header: RecordsHeader
  /** CRC-32 of the header's bytes. */
  readonly headerCrc: number
  /** Names of regions, and the greatest counter of each, in the file's order. */
  readonly regions: ReadonlyMap<string, number>
  readonly #regionNames: ReadonlyArray<string>
  readonly #path: string
  readonly #map: RecordsMap
  readonly #cache: BlockCache
  readonly #file: CachedFile
  readonly #dimensions: number
  readonly #fd: number
  #scratch = Buffer.allocUnsafeSlow(blockBytes)
  #scratchFloats = new Float32Array(this.#scratch.buffer)
  /** Where the last read put what it read: the bytes from `#at` on. */
  #bytes: Buffer = this.#scratch
  #at = 0
  /** Of the entry looked at last where it begins and ends, and its id, among `#bytes`. */
  #entryAt = 0
  #entryEnd = 0
  #idAt = 0
  #idEnd = 0
  /** Where the vector is that was looked at last. */
  floats: Float32Array = this.#scratchFloats
  #isClosed = false

  /** Opens the file; throws {@link FileFault} where it is not what the map says. */
  constructor(path: string, spec: IndexSpec, map: RecordsMap, cache: BlockCache) {
    this.#path = path
    this.#map = map
    this.#cache = cache
    this.#dimensions = spec.dimensions
    this.#file = cache.file(map.blocks.length)
    this.#fd = openSync(path, "r")
    try {
      const { size } = fstatSync(this.#fd)
      if (size !== map.recordsBytes) throw new FileFault(`${path}: ${size} bytes, expected ${map.recordsBytes}`)
      if (size < headerBytes) throw new FileFault(`${path}: ${size} bytes, a header has ${headerBytes}`)
      this.#read(0, headerBytes)
      const bytes = Buffer.from(this.#bytes.subarray(this.#at, this.#at + headerBytes))
      this.header = decodeRecordsHeader(bytes, size, spec)
      this.headerCrc = crc32(bytes)
      const entries = this.header.count + this.header.hiddenCount
      if (map.offsets.length !== entries)
        throw new FileFault(`${path}: ${entries} entries, expected ${map.offsets.length}`)
      const begins = entries === 0 ? this.header.textEnd : this.#offset(0)
      const lastBegins = entries === 0 ? begins : this.#offset(entries - 1)
      if (begins < headerBytes || lastBegins > this.header.textEnd) {
        throw new FileFault(`${path}: its entries are not where they should be`)
      }
      this.regions = this.#readRegions(begins)
      this.#regionNames = [...this.regions.keys()]
    } catch (error) {
      closeSync(this.#fd)
      throw error
    }
  }

  /** Visible records; entries from there on are hidden ids. */
  get count(): number {
    return this.header.count
  }

  /** Whether an entry's id is this one. */
  hasId(entry: number, id: Buffer): boolean {
    this.#lookAt(entry)
    return this.#idEnd - this.#idAt === id.length && id.compare(this.#bytes, this.#idAt, this.#idEnd) === 0
  }

  id(entry: number): string {
    this.#lookAt(entry)
    return this.#bytes.toString("utf8", this.#idAt, this.#idEnd)
  }

  metadata(entry: number): string {
    this.#lookAt(entry)
    return this.#metadata()
  }

  record(entry: number): StoredRecord {
    this.#lookAt(entry)
    const hasOwn = (this.#bytes.readUInt16LE(this.#entryAt + 18) & hasMetadataVersion) !== 0
    return {
      vectorVersion: this.#version(0),
      metadataVersion: hasOwn ? this.#version(recordFixedBytes) : undefined,
      metadata: this.#metadata()
    }
  }

  hidden(entry: number): Hidden {
    this.#lookAt(entry)
    const flags = this.#bytes.readUInt16LE(this.#entryAt)
    const deleted = (flags & hasDeletion) === 0 ? undefined : this.#version(hiddenFixedBytes)
    if ((flags & hasOrphan) === 0) return { deleted, orphan: undefined }
    const version = this.#version(hiddenFixedBytes + (deleted === undefined ? 0 : versionBytes))
    return { deleted, orphan: { version, metadata: this.#metadata() } }
  }

  /** Copies a record's vector to the beginning of `into`. */
  vector(entry: number, into: Float32Array): void {
    const from = this.locate(entry)
    into.set(this.floats.subarray(from, from + this.#dimensions))
  }

  /** Where among {@link floats} a record's vector begins, until the next read. */
  locate(entry: number): number {
    const bytes = this.#dimensions * 4
    const position = this.header.vectorsAt + entry * bytes
    const block = Math.floor(position / blockBytes)
    const at = position - block * blockBytes
    if (at + bytes <= blockBytes) {
      this.floats = this.#block(block).floats
      return at >>> 2
    }
    // Vectors begin at a multiple of four bytes, blocks too.
    this.#read(position, bytes)
    this.floats = this.#scratchFloats
    return this.#at >>> 2
  }

  /** Copies vectors from `entry` on, one after another, until `into` is full; past the cache. */
  vectors(entry: number, into: Float32Array): void {
    const at = this.header.vectorsAt + entry * this.#dimensions * 4
    this.#readPast(at, into.byteLength)
    const bytes = new Uint8Array(into.buffer, into.byteOffset, into.byteLength)
    bytes.set(this.#bytes.subarray(this.#at, this.#at + into.byteLength))
  }

  /**
   * The bytes of entries from `from` to before `to`, past the cache, valid until the next read, and what of each is its id.
   * As many of them as fit together, one at least.
   */
  entries(from: number, to: number): ReadonlyArray<StoredEntry> {
    const at = this.#offset(from)
    let last = from
    while (last + 1 < to && this.#end(last + 1) - at <= passBytes) last += 1
    const length = this.#end(last) - at
    this.#readPast(at, length)
    const bytes = this.#bytes
    const began = this.#at
    const entries: Array<StoredEntry> = []
    for (let entry = from; entry <= last; entry++) {
      this.#parse(entry, began + this.#offset(entry) - at, began + this.#end(entry) - at)
      entries.push({
        bytes: bytes.subarray(this.#entryAt, this.#entryEnd),
        id: bytes.subarray(this.#idAt, this.#idEnd),
        metadata: bytes.subarray(this.#idEnd, this.#entryEnd)
      })
    }
    return entries
  }

  close(): void {
    if (this.#isClosed) return
    this.#isClosed = true
    this.#cache.forget(this.#file)
    closeSync(this.#fd)
  }

  get bytes(): number {
    const { groups, offsets, blocks } = this.#map
    return groups.byteLength + offsets.byteLength + blocks.byteLength + this.#scratch.length
  }

  #offset(entry: number): number {
    return this.#map.groups[Math.floor(entry / offsetGroup)]! + this.#map.offsets[entry]!
  }

  #end(entry: number): number {
    return entry + 1 === this.#map.offsets.length ? this.header.textEnd : this.#offset(entry + 1)
  }

  /** Reads an entry, and finds what is where in it. */
  #lookAt(entry: number): void {
    const at = this.#offset(entry)
    const length = this.#end(entry) - at
    this.#read(at, length)
    this.#parse(entry, this.#at, this.#at + length)
  }

  #parse(entry: number, at: number, end: number): void {
    const bytes = this.#bytes
    const isRecord = entry < this.header.count
    const fixed = isRecord ? recordFixedBytes : hiddenFixedBytes
    if (end - at < fixed) throw new FileFault(`${this.#path}: entry ${entry} ends early`)
    let idAt = at + fixed
    if (isRecord) {
      if ((bytes.readUInt16LE(at + 18) & hasMetadataVersion) !== 0) idAt += versionBytes
    } else {
      const flags = bytes.readUInt16LE(at)
      idAt += ((flags & hasDeletion) === 0 ? 0 : versionBytes) + ((flags & hasOrphan) === 0 ? 0 : versionBytes)
    }
    const idEnd = idAt + bytes.readUInt16LE(at + fixed - 6)
    if (idEnd + bytes.readUInt32LE(at + fixed - 4) !== end) {
      throw new FileFault(`${this.#path}: the lengths of entry ${entry} are not what is there`)
    }
    this.#entryAt = at
    this.#entryEnd = end
    this.#idAt = idAt
    this.#idEnd = idEnd
  }

  #metadata(): string {
    return this.#idEnd === this.#entryEnd ? "" : this.#bytes.toString("utf8", this.#idEnd, this.#entryEnd)
  }

  /** A version of the entry looked at last, so many bytes from its beginning. */
  #version(offset: number): Version {
    const at = this.#entryAt + offset
    const region = this.#regionNames[this.#bytes.readUInt16LE(at + 16)]
    if (region === undefined) throw new FileFault(`${this.#path}: a version of no known region`)
    return { time: this.#bytes.readBigUInt64LE(at), region, counter: this.#bytes.readDoubleLE(at + 8) }
  }

  #readRegions(end: number): Map<string, number> {
    this.#readPast(headerBytes, end - headerBytes)
    const bytes = this.#bytes.subarray(this.#at, this.#at + end - headerBytes)
    const regions = new Map<string, number>()
    let at = 0
    for (let i = 0; i < this.header.regions; i++) {
      if (at + 9 > bytes.length || at + 9 + bytes[at]! > bytes.length) {
        throw new FileFault(`${this.#path}: the regions end early`)
      }
      const name = bytes.toString("utf8", at + 9, at + 9 + bytes[at]!)
      regions.set(name, bytes.readDoubleLE(at + 1))
      at += 9 + bytes[at]!
    }
    if (at !== bytes.length || regions.size !== this.header.regions) {
      throw new FileFault(`${this.#path}: the regions are not what the header says`)
    }
    return regions
  }

  /** Reads and verifies bytes of the file; they are where `#bytes` and `#at` say until the next read. */
  #read(position: number, length: number): void {
    const first = Math.floor(position / blockBytes)
    const at = position - first * blockBytes
    if (at + length <= blockBytes) {
      this.#bytes = this.#block(first).bytes
      this.#at = at
      return
    }
    if (length > passBytes) return this.#readPast(position, length)
    const bytes = this.#scratchOf(length)
    let done = 0
    for (let block = first; done < length; block++) {
      const from = block === first ? at : 0
      const part = Math.min(length - done, blockBytes - from)
      this.#block(block).bytes.copy(bytes, done, from, from + part)
      done += part
    }
    this.#bytes = bytes
    this.#at = 0
  }

  #block(block: number): Frame {
    return this.#cache.block(this.#file, block, (frame) => {
      const length = Math.min(blockBytes, this.#map.recordsBytes - block * blockBytes)
      this.#fill(frame.bytes.subarray(0, Math.max(0, length)), block)
    })
  }

  /** The same in one read that leaves the cache as it is. */
  #readPast(position: number, length: number): void {
    const first = Math.floor(position / blockBytes)
    const from = first * blockBytes
    const end = Math.min(this.#map.recordsBytes, Math.ceil((position + length) / blockBytes) * blockBytes)
    const bytes = this.#scratchOf(Math.max(0, end - from))
    if (length > 0) this.#fill(bytes.subarray(0, end - from), first)
    this.#bytes = bytes
    this.#at = position - from
  }

  /** Reads whole blocks from `first` on and looks at their checksums. */
  #fill(bytes: Buffer, first: number): void {
    if (this.#isClosed) throw new Error("the records file is closed")
    const position = first * blockBytes
    for (let at = 0; at < bytes.length; ) {
      const read = readSync(this.#fd, bytes, at, bytes.length - at, position + at)
      if (read === 0) throw new FileFault(`${this.#path}: it ends at ${position + at}`)
      at += read
    }
    for (let at = 0, block = first; at < bytes.length; at += blockBytes, block++) {
      if (crc32(bytes.subarray(at, at + blockBytes)) !== this.#map.blocks[block]) {
        throw new FileFault(`${this.#path}: the checksum of the block at ${block * blockBytes} differs`)
      }
    }
  }

  #scratchOf(length: number): Buffer {
    if (this.#scratch.length < length) {
      this.#scratch = Buffer.allocUnsafeSlow(Math.ceil(length / blockBytes) * blockBytes)
      this.#scratchFloats = new Float32Array(this.#scratch.buffer)
    }
    return this.#scratch
  }
}

const versionBytes = 18

/** Of a record: version, flags, node, lengths of the texts; of a hidden id: flags, lengths. */
const recordFixedBytes = versionBytes + 2 + 4 + 2 + 4
const hiddenFixedBytes = 2 + 2 + 4

/** Bytes read at once past the cache, where entries are read one after another. */
const passBytes = 1 << 18
