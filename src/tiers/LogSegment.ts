/**
 * The bytes of one log object: a group of operations committed together. Written by the partition's owner, read on
 * activation, by the vector threads and by the change feed. The layout is written down in `docs/format.md`; little-endian.
 *
 * An operation holds the whole new state of what it sets (vector and metadata, metadata alone, or a tombstone) with its
 * version, so that applying is idempotent and order-independent: the greatest version wins.
 *
 * A segment of format 2 also says which requests its operations were made for, so that a request that is made again after
 * a failure is known (`RequestWindow.ts`). One without any is of format 1.
 */
import { crc32 } from "node:zlib"
import type { Version } from "../protocol/Version.ts"

export type LogOp =
  | {
      readonly kind: "upsert"
      readonly id: string
      readonly version: Version
      readonly vector: Float32Array
      /** JSON text of an object; empty for none. */
      readonly metadata: string
    }
  | { readonly kind: "metadata"; readonly id: string; readonly version: Version; readonly metadata: string }
  | { readonly kind: "delete"; readonly id: string; readonly version: Version }

export interface SegmentHeader {
  /** The owner's epoch. */
  readonly epoch: number
  /** Position in the log, from 1. */
  readonly seq: number
  /** Random, so that an owner can tell its own write from another's. */
  readonly nonce: bigint
  readonly dimensions: number
  readonly count: number
}

export interface Segment extends SegmentHeader {
  readonly ops: ReadonlyArray<LogOp>
}

/** A request that operations of a segment were made for: `count` of them from `first` on. */
export interface SegmentRequest {
  /** The request's id: 22 digits of base64url, which are 16 bytes. */
  readonly id: string
  /** CRC-32 of what was asked for; 0 where nobody can ask for something else under the same id. */
  readonly digest: number
  readonly kind: LogOp["kind"]
  readonly first: number
  readonly count: number
}

/** The requests of a segment, and when it was made, in milliseconds since 1970. */
export interface SegmentRequests {
  readonly millis: number
  readonly requests: ReadonlyArray<SegmentRequest>
}

/** The bytes are no whole segment. `kind` says how. */
export class SegmentFault extends Error {
  readonly kind: "short" | "magic" | "format" | "checksum"
  /** The layout version found, where `kind` is `format` and the header's checksum holds. */
  readonly format: number | undefined
  constructor(kind: SegmentFault["kind"], detail: string, format?: number) {
    super(detail)
    this.name = "SegmentFault"
    this.kind = kind
    this.format = format
  }
}

/** Newest version of the layout; a reader refuses any newer. */
export const segmentFormat = 2

/** What has no requests is written as before there were any. */
const formatWithout = 1

const magic = 0x4c535652 // "RVSL"
const headerBytes = 64
const opHeaderBytes = 24
const requestBytes = 32
const requestIdBytes = 16
const kinds = ["upsert", "metadata", "delete"] as const
const encoder = new TextEncoder()
const decoder = new TextDecoder("utf-8", { fatal: true })
const align4 = (n: number): number => (n + 3) & ~3

/** Bytes an operation takes in a segment, for bounds on batches; exact but for multi-byte ids and metadata. */
export const opBytes = (op: LogOp): number =>
  opHeaderBytes +
  op.id.length +
  (op.kind === "delete" ? 0 : op.metadata.length) +
  (op.kind === "upsert" ? op.vector.byteLength : 0) +
  6

/**
 * Encodes a segment. All vectors have `dimensions` components. One without operations marks a change of owner, or closes
 * a position whose earlier writes may still be under way. `made`: the requests that it was made for, if it was for any.
 */
export const encodeSegment = (
  header: Omit<SegmentHeader, "count">,
  ops: ReadonlyArray<LogOp>,
  made?: SegmentRequests
): Uint8Array => {
  const requests = made?.requests ?? []
  const regions: Array<string> = []
  const texts: Array<Uint8Array> = []
  let payload = 1
  for (const op of ops) {
    if (!regions.includes(op.version.region)) {
      regions.push(op.version.region)
      payload += 1 + op.version.region.length
    }
  }
  payload = align4(payload)
  for (const op of ops) {
    const id = encoder.encode(op.id)
    const metadata = op.kind === "delete" ? empty : encoder.encode(op.metadata)
    texts.push(id, metadata)
    payload += align4(opHeaderBytes + id.length + metadata.length)
    if (op.kind === "upsert") payload += header.dimensions * 4
  }
  payload += requests.length * requestBytes
  const bytes = new Uint8Array(headerBytes + payload)
  const view = new DataView(bytes.buffer)
  let at = headerBytes
  bytes[at++] = regions.length
  for (const region of regions) {
    bytes[at++] = region.length
    at += encoder.encodeInto(region, bytes.subarray(at)).written
  }
  at = align4(at)
  for (let i = 0; i < ops.length; i++) {
    const op = ops[i] as LogOp
    const id = texts[2 * i] as Uint8Array
    const metadata = texts[2 * i + 1] as Uint8Array
    view.setUint8(at, kinds.indexOf(op.kind))
    view.setUint8(at + 1, regions.indexOf(op.version.region))
    view.setUint16(at + 2, id.length, true)
    view.setUint32(at + 4, metadata.length, true)
    view.setBigUint64(at + 8, op.version.time, true)
    view.setFloat64(at + 16, op.version.counter, true)
    bytes.set(id, at + opHeaderBytes)
    bytes.set(metadata, at + opHeaderBytes + id.length)
    at += align4(opHeaderBytes + id.length + metadata.length)
    if (op.kind === "upsert") {
      if (op.vector.length !== header.dimensions)
        throw new RangeError(`vector of ${op.vector.length}, not ${header.dimensions}`)
      new Float32Array(bytes.buffer, at, header.dimensions).set(op.vector)
      at += header.dimensions * 4
    }
  }
  for (const { id, digest, kind, first, count } of requests) {
    Buffer.from(bytes.buffer, at, requestIdBytes).write(id, "base64url")
    view.setUint32(at + 16, digest, true)
    view.setUint32(at + 20, first, true)
    view.setUint32(at + 24, count, true)
    view.setUint8(at + 28, kinds.indexOf(kind))
    at += requestBytes
  }
  view.setUint32(0, magic, true)
  view.setUint16(4, requests.length === 0 ? formatWithout : segmentFormat, true)
  view.setFloat64(8, header.epoch, true)
  view.setFloat64(16, header.seq, true)
  view.setBigUint64(24, header.nonce, true)
  view.setUint32(32, header.dimensions, true)
  view.setUint32(36, ops.length, true)
  view.setUint32(40, payload, true)
  view.setUint32(44, crc32(bytes.subarray(headerBytes)), true)
  if (made !== undefined && requests.length > 0) {
    view.setUint32(48, requests.length, true)
    view.setFloat64(52, made.millis, true)
  }
  view.setUint32(60, crc32(bytes.subarray(0, 60)), true)
  return bytes
}

const empty = new Uint8Array(0)

/** Reads and checks a segment's header alone. Throws {@link SegmentFault}. */
export const decodeSegmentHeader = (bytes: Uint8Array): SegmentHeader => {
  if (bytes.length < headerBytes) throw new SegmentFault("short", `${bytes.length} bytes, a header has ${headerBytes}`)
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  if (view.getUint32(0, true) !== magic) throw new SegmentFault("magic", "not a log segment")
  if (view.getUint32(60, true) !== crc32(bytes.subarray(0, 60)))
    throw new SegmentFault("checksum", "header checksum differs")
  const format = view.getUint16(4, true)
  if (format < formatWithout || format > segmentFormat)
    throw new SegmentFault("format", `format ${format}, this version reads up to ${segmentFormat}`, format)
  const payload = view.getUint32(40, true)
  if (bytes.length !== headerBytes + payload) {
    throw new SegmentFault("short", `${bytes.length} bytes, the header says ${headerBytes + payload}`)
  }
  return {
    epoch: view.getFloat64(8, true),
    seq: view.getFloat64(16, true),
    nonce: view.getBigUint64(24, true),
    dimensions: view.getUint32(32, true),
    count: view.getUint32(36, true)
  }
}

/** Checks both checksums of a segment without reading its operations. Throws {@link SegmentFault}. */
export const verifySegment = (bytes: Uint8Array): SegmentHeader => {
  const header = decodeSegmentHeader(bytes)
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  if (view.getUint32(44, true) !== crc32(bytes.subarray(headerBytes))) {
    throw new SegmentFault("checksum", "payload checksum differs")
  }
  return header
}

/** Where the operations of a segment end, whose header is good; what follows are its requests. */
export const operationsEnd = (bytes: Uint8Array): number =>
  bytes.length - requestCount(new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)) * requestBytes

const requestCount = (view: DataView): number =>
  view.getUint16(4, true) === formatWithout ? 0 : view.getUint32(48, true)

/** The requests of a segment that has been checked; `undefined` where it has none. */
export const decodeRequests = (bytes: Uint8Array): SegmentRequests | undefined => {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  if (requestCount(view) === 0) return undefined
  const requests: Array<SegmentRequest> = []
  for (let at = operationsEnd(bytes); at < bytes.length; at += requestBytes) {
    requests.push({
      id: Buffer.from(bytes.buffer, bytes.byteOffset + at, requestIdBytes).toString("base64url"),
      digest: view.getUint32(at + 16, true),
      first: view.getUint32(at + 20, true),
      count: view.getUint32(at + 24, true),
      kind: kinds[view.getUint8(at + 28)] ?? "upsert"
    })
  }
  return { millis: view.getFloat64(52, true), requests }
}

/**
 * Reads and checks a whole segment. Vectors are views of `bytes` where its alignment allows, else copies. Throws
 * {@link SegmentFault}.
 */
export const decodeSegment = (input: Uint8Array): Segment => {
  // Not `slice`, which for a Buffer is a view at the same unaligned place.
  const bytes = input.byteOffset % 4 === 0 ? input : new Uint8Array(input)
  const header = verifySegment(bytes)
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  let at = headerBytes
  const regions: Array<string> = []
  const regionCount = bytes[at++] as number
  for (let i = 0; i < regionCount; i++) {
    const length = bytes[at++] as number
    regions.push(decoder.decode(bytes.subarray(at, at + length)))
    at += length
  }
  at = align4(at)
  const ops: Array<LogOp> = []
  for (let i = 0; i < header.count; i++) {
    const kind = kinds[view.getUint8(at)]
    const region = regions[view.getUint8(at + 1)]
    if (kind === undefined || region === undefined)
      throw new SegmentFault("format", `operation ${i} is of no known kind`)
    const idLength = view.getUint16(at + 2, true)
    const metadataLength = view.getUint32(at + 4, true)
    const version: Version = { time: view.getBigUint64(at + 8, true), region, counter: view.getFloat64(at + 16, true) }
    const id = decoder.decode(bytes.subarray(at + opHeaderBytes, at + opHeaderBytes + idLength))
    const metadataAt = at + opHeaderBytes + idLength
    const metadata = metadataLength === 0 ? "" : decoder.decode(bytes.subarray(metadataAt, metadataAt + metadataLength))
    at += align4(opHeaderBytes + idLength + metadataLength)
    if (kind === "upsert") {
      const vector = new Float32Array(bytes.buffer, bytes.byteOffset + at, header.dimensions)
      at += header.dimensions * 4
      ops.push({ kind, id, version, vector, metadata })
    } else if (kind === "metadata") ops.push({ kind, id, version, metadata })
    else ops.push({ kind, id, version })
  }
  const end = operationsEnd(bytes)
  if (at !== end) throw new SegmentFault("format", `${end - at} bytes after the last operation`)
  return { ...header, ops }
}
