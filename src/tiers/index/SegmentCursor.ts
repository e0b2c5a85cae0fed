/**
 * Reads the operations of a log segment one at a time, so that a thread can stop between two of them. The whole segment
 * is checked first (checksum, lengths, text), so nothing is applied of one that is damaged. Same layout as
 * `LogSegment.ts`, whose `decodeSegment` builds all operations at once.
 */
import { isUtf8 } from "node:buffer"
import { crc32 } from "node:zlib"
import type { Version } from "../../protocol/Version.ts"
import { decodeSegmentHeader, operationsEnd, type SegmentHeader } from "../LogSegment.ts"

export type OpKind = "upsert" | "metadata" | "delete"

export class SegmentCursor {
  readonly header: SegmentHeader
  readonly #bytes: Buffer
  readonly #view: DataView
  readonly #regions: Array<string> = []
  #at = headerBytes
  /** Where the operations end. */
  readonly #end: number

  /** Throws where the bytes are no whole segment of vectors of so many components. */
  constructor(input: Uint8Array, dimensions: number) {
    // Not `slice`, which for a Buffer is a view at the same unaligned place.
    const aligned = input.byteOffset % 4 === 0 ? input : new Uint8Array(input)
    this.#bytes = Buffer.from(aligned.buffer, aligned.byteOffset, aligned.byteLength)
    this.#view = new DataView(aligned.buffer, aligned.byteOffset, aligned.byteLength)
    this.header = decodeSegmentHeader(aligned)
    this.#end = operationsEnd(aligned)
    if (this.header.count > 0 && this.header.dimensions !== dimensions) {
      throw new Error(`a segment of ${this.header.dimensions} dimensions for an index of ${dimensions}`)
    }
    if (this.#view.getUint32(44, true) !== crc32(this.#bytes.subarray(headerBytes))) {
      throw new Error("payload checksum differs")
    }
    this.#check()
  }

  kind: OpKind = "delete"
  id = ""
  version: Version = { time: 0n, region: "", counter: 0 }
  /** The text of an upsert or of a metadata operation. */
  metadata = ""
  /** The vector of an upsert: a view of the segment. */
  vector: Float32Array = nothing

  /** Reads the next operation into the fields above; false after the last one. */
  next(): boolean {
    const at = this.#at
    if (at >= this.#end) return false
    const view = this.#view
    this.kind = kinds[view.getUint8(at)]!
    const idAt = at + opHeaderBytes
    const metadataAt = idAt + view.getUint16(at + 2, true)
    const end = metadataAt + view.getUint32(at + 4, true)
    this.version = {
      time: view.getBigUint64(at + 8, true),
      region: this.#regions[view.getUint8(at + 1)]!,
      counter: view.getFloat64(at + 16, true)
    }
    this.id = this.#bytes.toString("utf8", idAt, metadataAt)
    this.metadata = end === metadataAt ? "" : this.#bytes.toString("utf8", metadataAt, end)
    this.#at = at + align4(end - at)
    if (this.kind === "upsert") {
      const { dimensions } = this.header
      this.vector = new Float32Array(this.#bytes.buffer, this.#bytes.byteOffset + this.#at, dimensions)
      this.#at += dimensions * 4
    } else {
      this.vector = nothing
    }
    return true
  }

  #check(): void {
    const bytes = this.#bytes
    const view = this.#view
    const end = this.#end
    let at = headerBytes
    const need = (length: number) => {
      if (at + length > end) throw new Error("a segment that ends inside of an operation")
    }
    need(1)
    const regionCount = bytes[at++]!
    for (let i = 0; i < regionCount; i++) {
      need(1)
      const length = bytes[at++]!
      need(length)
      this.#regions.push(bytes.toString("utf8", at, at + length))
      at += length
    }
    at = align4(at)
    const first = at
    for (let i = 0; i < this.header.count; i++) {
      need(opHeaderBytes)
      const kind = kinds[view.getUint8(at)]
      if (kind === undefined || view.getUint8(at + 1) >= regionCount) {
        throw new Error(`operation ${i} is of no known kind or region`)
      }
      const textBytes = view.getUint16(at + 2, true) + view.getUint32(at + 4, true)
      const bodyBytes = align4(opHeaderBytes + textBytes)
      need(bodyBytes)
      if (!isUtf8(bytes.subarray(at + opHeaderBytes, at + opHeaderBytes + textBytes))) {
        throw new Error(`the text of operation ${i} is no UTF-8`)
      }
      at += bodyBytes
      if (kind === "upsert") {
        need(this.header.dimensions * 4)
        at += this.header.dimensions * 4
      }
    }
    if (at !== end) throw new Error(`${end - at} bytes after the last operation`)
    this.#at = first
  }
}

const headerBytes = 64
const opHeaderBytes = 24
const kinds = ["upsert", "metadata", "delete"] as const
const nothing = new Float32Array(0)
const align4 = (n: number): number => (n + 3) & ~3
