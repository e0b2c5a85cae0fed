/**
 * Reads single records and vectors of a records file by position. Nothing is believed before its block's checksum has been
 * looked at. Reads are synchronous: a vector thread has no better use of the microsecond that one takes, and waiting for
 * libuv's pool would be dearer.
 */
import { closeSync, fstatSync, openSync, readSync } from "node:fs"
import { crc32 } from "node:zlib"
import type { Version } from "../../protocol/Version.ts"
import type { IndexSpec } from "../VectorIndex.ts"
import { type BlockCache, blockBytes } from "./BlockCache.ts"
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
  readonly #file: number
  readonly #dimensions: number
  readonly #fd: number
  #scratch = Buffer.allocUnsafeSlow(blockBytes)
  #isClosed = false

  /** Opens the file; throws {@link FileFault} where it is not what the map says. */
  constructor(path: string, spec: IndexSpec, map: RecordsMap, cache: BlockCache) {
    this.#path = path
    this.#map = map
    this.#cache = cache
    this.#dimensions = spec.dimensions
    this.#file = cache.file()
    this.#fd = openSync(path, "r")
    try {
      const { size } = fstatSync(this.#fd)
      if (size !== map.recordsBytes) throw new FileFault(`${path}: ${size} bytes, expected ${map.recordsBytes}`)
      if (size < headerBytes) throw new FileFault(`${path}: ${size} bytes, a header has ${headerBytes}`)
      const bytes = Buffer.from(this.#read(0, headerBytes))
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
    const { bytes, idAt, idEnd } = this.#entry(entry)
    return idEnd - idAt === id.length && id.compare(bytes, idAt, idEnd) === 0
  }

  id(entry: number): string {
    const { bytes, idAt, idEnd } = this.#entry(entry)
    return bytes.toString("utf8", idAt, idEnd)
  }

  metadata(entry: number): string {
    const { bytes, idEnd } = this.#entry(entry)
    return idEnd === bytes.length ? "" : bytes.toString("utf8", idEnd)
  }

  record(entry: number): StoredRecord {
    const { bytes, idEnd } = this.#entry(entry)
    const hasOwn = (bytes.readUInt16LE(18) & hasMetadataVersion) !== 0
    return {
      vectorVersion: this.#version(bytes, 0),
      metadataVersion: hasOwn ? this.#version(bytes, recordFixedBytes) : undefined,
      metadata: idEnd === bytes.length ? "" : bytes.toString("utf8", idEnd)
    }
  }

  hidden(entry: number): Hidden {
    const { bytes, idEnd } = this.#entry(entry)
    const flags = bytes.readUInt16LE(0)
    const deleted = (flags & hasDeletion) === 0 ? undefined : this.#version(bytes, hiddenFixedBytes)
    if ((flags & hasOrphan) === 0) return { deleted, orphan: undefined }
    const version = this.#version(bytes, hiddenFixedBytes + (deleted === undefined ? 0 : versionBytes))
    return { deleted, orphan: { version, metadata: idEnd === bytes.length ? "" : bytes.toString("utf8", idEnd) } }
  }

  /** Copies a record's vector to the beginning of `into`. */
  vector(entry: number, into: Float32Array): void {
    const bytes = this.#dimensions * 4
    const from = this.#read(this.header.vectorsAt + entry * bytes, bytes)
    new Uint8Array(into.buffer, into.byteOffset, bytes).set(from)
  }

  /** Copies vectors from `entry` on, one after another, until `into` is full; past the cache. */
  vectors(entry: number, into: Float32Array): void {
    const at = this.header.vectorsAt + entry * this.#dimensions * 4
    new Uint8Array(into.buffer, into.byteOffset, into.byteLength).set(this.#readPast(at, into.byteLength))
  }

  /**
   * The bytes of entries from `from` to before `to`, past the cache, valid until the next read, and what of each is its id.
   * As many of them as fit together, one at least.
   */
  entries(
    from: number,
    to: number
  ): ReadonlyArray<{ readonly bytes: Buffer; readonly id: Buffer; readonly metadata: Buffer }> {
    const at = this.#offset(from)
    let last = from
    while (last + 1 < to && this.#end(last + 1) - at <= passBytes) last += 1
    const bytes = this.#readPast(at, this.#end(last) - at)
    const entries: Array<{ readonly bytes: Buffer; readonly id: Buffer; readonly metadata: Buffer }> = []
    for (let entry = from; entry <= last; entry++) {
      const one = bytes.subarray(this.#offset(entry) - at, this.#end(entry) - at)
      const { idAt, idEnd } = this.#parse(entry, one)
      entries.push({ bytes: one, id: one.subarray(idAt, idEnd), metadata: one.subarray(idEnd) })
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

  #entry(entry: number): { readonly bytes: Buffer; readonly idAt: number; readonly idEnd: number } {
    const at = this.#offset(entry)
    const bytes = this.#read(at, this.#end(entry) - at)
    return { bytes, ...this.#parse(entry, bytes) }
  }

  #parse(entry: number, bytes: Buffer): { readonly idAt: number; readonly idEnd: number } {
    const isRecord = entry < this.header.count
    const fixed = isRecord ? recordFixedBytes : hiddenFixedBytes
    if (bytes.length < fixed) throw new FileFault(`${this.#path}: entry ${entry} ends early`)
    let idAt = fixed
    if (isRecord) {
      if ((bytes.readUInt16LE(18) & hasMetadataVersion) !== 0) idAt += versionBytes
    } else {
      const flags = bytes.readUInt16LE(0)
      idAt += ((flags & hasDeletion) === 0 ? 0 : versionBytes) + ((flags & hasOrphan) === 0 ? 0 : versionBytes)
    }
    const idEnd = idAt + bytes.readUInt16LE(fixed - 6)
    if (idEnd + bytes.readUInt32LE(fixed - 4) !== bytes.length) {
      throw new FileFault(`${this.#path}: the lengths of entry ${entry} are not what is there`)
    }
    return { idAt, idEnd }
  }

  #version(bytes: Buffer, at: number): Version {
    const region = this.#regionNames[bytes.readUInt16LE(at + 16)]
    if (region === undefined) throw new FileFault(`${this.#path}: a version of no known region`)
    return { time: bytes.readBigUInt64LE(at), region, counter: bytes.readDoubleLE(at + 8) }
  }

  #readRegions(end: number): Map<string, number> {
    const bytes = this.#readPast(headerBytes, end - headerBytes)
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

  /** Bytes of the file, verified; valid until the next read. */
  #read(position: number, length: number): Buffer {
    const first = Math.floor(position / blockBytes)
    const at = position - first * blockBytes
    if (at + length <= blockBytes) return this.#block(first).subarray(at, at + length)
    if (length > passBytes) return this.#readPast(position, length)
    const bytes = this.#scratchOf(length)
    let done = 0
    for (let block = first; done < length; block++) {
      const from = block === first ? at : 0
      const part = Math.min(length - done, blockBytes - from)
      this.#block(block).copy(bytes, done, from, from + part)
      done += part
    }
    return bytes.subarray(0, length)
  }

  #block(block: number): Buffer {
    return this.#cache.block(this.#file, block, (frame) => {
      const length = Math.min(blockBytes, this.#map.recordsBytes - block * blockBytes)
      this.#fill(frame.subarray(0, Math.max(0, length)), block)
    })
  }

  /** The same in one read that leaves the cache as it is. */
  #readPast(position: number, length: number): Buffer {
    if (length === 0) return nothing
    const first = Math.floor(position / blockBytes)
    const from = first * blockBytes
    const end = Math.min(this.#map.recordsBytes, Math.ceil((position + length) / blockBytes) * blockBytes)
    const bytes = this.#scratchOf(end - from)
    this.#fill(bytes, first)
    return bytes.subarray(position - from, position - from + length)
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
    if (this.#scratch.length < length) this.#scratch = Buffer.allocUnsafeSlow(length)
    return this.#scratch.subarray(0, length)
  }
}

const nothing = Buffer.alloc(0)

const versionBytes = 18

/** Of a record: version, flags, node, lengths of the texts; of a hidden id: flags, lengths. */
const recordFixedBytes = versionBytes + 2 + 4 + 2 + 4
const hiddenFixedBytes = 2 + 2 + 4

/** Bytes read at once past the cache, where entries are read one after another. */
const passBytes = 1 << 18
