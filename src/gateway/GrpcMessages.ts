/**
 * The messages of `proto/` in Protocol Buffers' binary form, read and written by hand for the reasons that `Answers.ts`
 * writes JSON by hand: a query is one copy of its bytes, and the results of an answer are one buffer, ready to be sent.
 * A test holds every field against the .proto.
 */
import { isUtf8 } from "node:buffer"
import type { ApiError } from "../protocol/Errors.ts"
import { toProblem } from "../protocol/Errors.ts"
import type { SearchAnswer } from "../protocol/StreamSession.ts"
import { statusOf } from "./GrpcStatus.ts"

/** `ruvector.v1.SearchRequest`. */
export interface SearchMessage {
  query: Float32Array | undefined
  k: number
  metric: string
  collection: string
  queryVectorId: string
  ef: number
  filter: string
  includeMetadata: boolean
  includeVector: boolean
  deadlineMillis: number
  requestId: string
  cancel: boolean
}

/** Bytes that are no message of their kind. */
export class MalformedMessage extends Error {}

export const readSearchRequest = (bytes: Buffer): SearchMessage => {
  const message: SearchMessage = {
    query: undefined,
    k: 0,
    metric: "",
    collection: "",
    queryVectorId: "",
    ef: 0,
    filter: "",
    includeMetadata: false,
    includeVector: false,
    deadlineMillis: 0,
    requestId: "",
    cancel: false
  }
  const reader = new Reader(bytes)
  while (reader.more()) {
    const tag = reader.tag()
    switch (tag) {
      case field(1, wire.bytes):
        message.query = joined(message.query, reader.packedFloats())
        break
      case field(1, wire.fixed32):
        message.query = joined(message.query, reader.floats(1))
        break
      case field(2, wire.varint):
        message.k = reader.int32()
        break
      case field(3, wire.bytes):
        message.metric = reader.string()
        break
      case field(4, wire.bytes):
        message.collection = reader.string()
        break
      case field(5, wire.bytes):
        message.queryVectorId = reader.string()
        break
      case field(6, wire.varint):
        message.ef = reader.int32()
        break
      case field(7, wire.bytes):
        message.filter = reader.string()
        break
      case field(8, wire.varint):
        message.includeMetadata = reader.bool()
        break
      case field(9, wire.varint):
        message.includeVector = reader.bool()
        break
      case field(10, wire.varint):
        message.deadlineMillis = reader.int32()
        break
      case field(11, wire.bytes):
        message.requestId = reader.string()
        break
      case field(12, wire.varint):
        message.cancel = reader.bool()
        break
      default:
        reader.skip(tag)
    }
  }
  return message
}

/** `grpc.health.v1.HealthCheckRequest`: the service asked for. */
export const readHealthCheckRequest = (bytes: Buffer): string => {
  let service = ""
  const reader = new Reader(bytes)
  while (reader.more()) {
    const tag = reader.tag()
    if (tag === field(1, wire.bytes)) service = reader.string()
    else reader.skip(tag)
  }
  return service
}

export const servingStatus = { serving: 1, notServing: 2, serviceUnknown: 3 } as const
export type ServingStatus = (typeof servingStatus)[keyof typeof servingStatus]

/** `grpc.health.v1.HealthCheckResponse` as a frame. */
export const healthFrame = (status: ServingStatus): Buffer => {
  const writer = new Writer(frameHeadBytes + 2)
  writer.frameHead(2)
  writer.byte(field(1, wire.varint))
  writer.byte(status)
  return writer.buffer
}

/** Bytes before each message: whether it is compressed, and its length. */
export const frameHeadBytes = 5

/**
 * The results of an answer from `from` on as frames, one after the other, each a `ruvector.v1.SearchResult`; as many as are in
 * `bytesMax`, and at least one. `next` is the first that is not in it.
 */
export const resultFrames = (
  answer: SearchAnswer,
  from: number,
  bytesMax: number,
  requestId: string
): { readonly buffer: Buffer; readonly next: number } => {
  const { ids, scores, metadata, vectors, dimensions } = answer
  const requestIdBytes = requestId === "" ? 0 : utf8Bytes(requestId)
  const fixed = 1 + 4 + (requestIdBytes === 0 ? 0 : lengthDelimited(requestIdBytes))
  const vectorBytes = vectors === undefined ? 0 : dimensions * 4
  const withVector = vectorBytes === 0 ? 0 : lengthDelimited(vectorBytes)
  const lengths: Array<number> = []
  let total = 0
  let next = from
  for (; next < ids.length; next++) {
    const idBytes = utf8Bytes(ids[next] as string)
    const metadataBytes = metadata === undefined ? 0 : utf8Bytes(metadata[next] || "{}")
    const length =
      fixed + lengthDelimited(idBytes) + (metadata === undefined ? 0 : lengthDelimited(metadataBytes)) + withVector
    if (total + frameHeadBytes + length > bytesMax && next > from) break
    total += frameHeadBytes + length
    lengths.push(length, idBytes, metadataBytes)
  }

  const writer = new Writer(total)
  for (let i = from, at = 0; i < next; i++, at += 3) {
    writer.frameHead(lengths[at] as number)
    writer.byte(field(1, wire.bytes))
    writer.text(ids[i] as string, lengths[at + 1] as number)
    writer.byte(field(2, wire.fixed32))
    writer.float(scores[i] as number)
    if (metadata !== undefined) {
      writer.byte(field(3, wire.bytes))
      writer.text(metadata[i] || "{}", lengths[at + 2] as number)
    }
    if (requestIdBytes !== 0) {
      writer.byte(field(4, wire.bytes))
      writer.text(requestId, requestIdBytes)
    }
    if (vectors !== undefined && vectorBytes !== 0) {
      writer.byte(field(5, wire.bytes))
      writer.floats(vectors, i * dimensions, dimensions)
    }
  }
  return { buffer: writer.buffer, next }
}

/** What an answer holds, roughly: its texts' characters, its vectors' bytes, and something for each result. */
export const answerBytes = ({ ids, metadata, vectors }: SearchAnswer): number => {
  let bytes = ids.length * 32 + (vectors?.byteLength ?? 0)
  for (const id of ids) bytes += id.length
  if (metadata !== undefined) for (const text of metadata) bytes += text.length
  return bytes
}

/** The last message of a request on a bidirectional call, as a frame. */
export const summaryFrame = (requestId: string, outcome: SearchAnswer | SearchFault): Buffer => {
  const summary = "code" in outcome ? faultSummary(outcome) : answerSummary(outcome)
  const message = new Message()
  message.text(4, requestId)
  message.message(6, summary)
  return message.frame()
}

/** `ruvector.v1.SearchError`. */
export interface SearchFault {
  readonly code: number
  readonly message: string
  readonly problem: string
  readonly field?: string
  readonly expected?: string
  readonly got?: string
  readonly retryAfterMillis?: number
  readonly serverRequestId?: string
}

export const faultOf = (error: ApiError): SearchFault => {
  const { detail, code, field, expected, got, retry_after_ms, request_id } = toProblem(error)
  return {
    code: statusOf(error),
    message: detail,
    problem: code,
    ...(field === undefined ? {} : { field }),
    ...(expected === undefined ? {} : { expected }),
    ...(got === undefined ? {} : { got }),
    ...(retry_after_ms === undefined ? {} : { retryAfterMillis: retry_after_ms }),
    ...(request_id === undefined ? {} : { serverRequestId: request_id })
  }
}

const answerSummary = ({ queryId, ids, missing, tookMillis }: SearchAnswer): Message => {
  const summary = new Message()
  summary.text(1, queryId)
  summary.number(2, ids.length)
  if (missing.length > 0) {
    summary.number(3, 1)
    summary.packed(4, missing)
  }
  summary.double(5, Math.round(tookMillis * 1_000) / 1_000)
  return summary
}

const faultSummary = (fault: SearchFault): Message => {
  const error = new Message()
  error.number(1, fault.code)
  error.text(2, fault.message)
  error.text(4, fault.problem)
  error.text(5, fault.field ?? "")
  error.text(6, fault.expected ?? "")
  error.text(7, fault.got ?? "")
  error.number(8, fault.retryAfterMillis ?? 0)
  error.text(9, fault.serverRequestId ?? "")
  const summary = new Message()
  summary.message(6, error)
  return summary
}

const wire = { varint: 0, fixed64: 1, bytes: 2, startGroup: 3, endGroup: 4, fixed32: 5 } as const

/** The tag of a field. Those of ours are below 16, so that a tag is one byte. */
const field = (number: number, type: number): number => (number << 3) | type

const varintBytes = (value: number): number => {
  let bytes = 1
  for (let rest = value; rest > 0x7f; rest = Math.floor(rest / 128)) bytes += 1
  return bytes
}

/** Bytes of a field of ours whose content has a length: tag, length, content. */
const lengthDelimited = (bytes: number): number => 1 + varintBytes(bytes) + bytes

/** Characters up to which a loop is quicker than a call into Node. */
const shortText = 32

const utf8Bytes = (text: string): number => {
  if (text.length > shortText) return Buffer.byteLength(text)
  for (let i = 0; i < text.length; i++) if (text.charCodeAt(i) > 0x7f) return Buffer.byteLength(text)
  return text.length
}

const joined = (before: Float32Array | undefined, more: Float32Array): Float32Array => {
  if (before === undefined) return more
  const both = new Float32Array(before.length + more.length)
  both.set(before)
  both.set(more, before.length)
  return both
}

/** Levels of groups, which no message of ours has, that are skipped. */
const groupLevelsMax = 32

class Reader {
  readonly #bytes: Buffer
  #at = 0

  constructor(bytes: Buffer) {
    this.#bytes = bytes
  }

  more(): boolean {
    return this.#at < this.#bytes.length
  }

  tag(): number {
    const tag = this.#uint32()
    if (tag >>> 3 === 0) throw new MalformedMessage("a field numbered 0")
    return tag
  }

  int32(): number {
    return this.#uint32() | 0
  }

  bool(): boolean {
    let any = 0
    for (let i = 0; i < 10; i++) {
      const byte = this.#byte()
      any |= byte & 0x7f
      if (byte < 0x80) return any !== 0
    }
    throw new MalformedMessage("a number longer than 64 bits")
  }

  string(): string {
    const content = this.#content()
    if (!isUtf8(content)) throw new MalformedMessage("a string that is not UTF-8")
    return content.toString("utf8")
  }

  packedFloats(): Float32Array {
    const bytes = this.#uint32()
    if (bytes % 4 !== 0) throw new MalformedMessage("floats that are not whole")
    return this.floats(bytes / 4)
  }

  floats(count: number): Float32Array {
    const from = this.#take(count * 4)
    const start = this.#bytes.byteOffset + from
    // A copy, whatever the alignment; it outlives the bytes it came in.
    return new Float32Array(this.#bytes.buffer.slice(start, start + count * 4))
  }

  skip(tag: number, levels = groupLevelsMax): void {
    switch (tag & 7) {
      case wire.varint:
        this.bool()
        return
      case wire.fixed64:
        this.#take(8)
        return
      case wire.bytes:
        this.#content()
        return
      case wire.fixed32:
        this.#take(4)
        return
      case wire.startGroup: {
        if (levels === 0) throw new MalformedMessage("groups nested too deeply")
        for (;;) {
          const inner = this.tag()
          if (inner === tag + 1) return
          this.skip(inner, levels - 1)
        }
      }
      default:
        throw new MalformedMessage("a field of no known kind")
    }
  }

  #content(): Buffer {
    const length = this.#uint32()
    const from = this.#take(length)
    return this.#bytes.subarray(from, this.#at)
  }

  /** The low 32 bits of a varint; negative ones come in ten bytes. */
  #uint32(): number {
    let value = 0
    for (let i = 0; i < 10; i++) {
      const byte = this.#byte()
      if (i < 5) value |= (byte & 0x7f) << (i * 7)
      if (byte < 0x80) return value >>> 0
    }
    throw new MalformedMessage("a number longer than 64 bits")
  }

  #byte(): number {
    const byte = this.#bytes[this.#at++]
    if (byte === undefined) throw new MalformedMessage("a message that ends in the middle of a field")
    return byte
  }

  #take(bytes: number): number {
    const from = this.#at
    if (bytes > this.#bytes.length - from) throw new MalformedMessage("a message that ends in the middle of a field")
    this.#at = from + bytes
    return from
  }
}

const number = new DataView(new ArrayBuffer(8))
const numberBytes = new Uint8Array(number.buffer)

/** Writes into a buffer whose size was counted before. */
class Writer {
  buffer: Buffer
  at = 0

  constructor(bytes: number) {
    this.buffer = Buffer.allocUnsafe(bytes)
  }

  frameHead(length: number): void {
    const { buffer, at } = this
    buffer[at] = 0
    buffer[at + 1] = length >>> 24
    buffer[at + 2] = length >>> 16
    buffer[at + 3] = length >>> 8
    buffer[at + 4] = length
    this.at += frameHeadBytes
  }

  byte(value: number): void {
    this.buffer[this.at++] = value
  }

  varint(value: number): void {
    let rest = value
    for (; rest > 0x7f; rest = Math.floor(rest / 128)) this.byte((rest & 0x7f) | 0x80)
    this.byte(rest)
  }

  /** Length and content of a text whose UTF-8 is so many bytes. */
  text(text: string, bytes: number): void {
    this.varint(bytes)
    if (bytes === text.length && bytes <= shortText) {
      for (let i = 0; i < bytes; i++) this.buffer[this.at + i] = text.charCodeAt(i)
    } else {
      this.buffer.write(text, this.at, bytes, "utf8")
    }
    this.at += bytes
  }

  float(value: number): void {
    number.setFloat32(0, value, true)
    this.#number(4)
  }

  double(value: number): void {
    number.setFloat64(0, value, true)
    this.#number(8)
  }

  /** Length and content of packed floats. */
  floats(from: Float32Array, start: number, count: number): void {
    this.varint(count * 4)
    this.raw(new Uint8Array(from.buffer, from.byteOffset + start * 4, count * 4))
  }

  raw(bytes: Uint8Array): void {
    this.buffer.set(bytes, this.at)
    this.at += bytes.length
  }

  #number(bytes: number): void {
    for (let i = 0; i < bytes; i++) this.buffer[this.at + i] = numberBytes[i] as number
    this.at += bytes
  }
}

/** Bytes that most messages of this kind are below. */
const usualBytes = 96

/** More than the tag and the number of a field, or its tag and length. */
const fieldBytes = 16

/** A message whose size is not counted beforehand; what is 0 or empty is left out. */
class Message {
  readonly #writer = new Writer(usualBytes)

  number(at: number, value: number): void {
    if (value !== 0) this.#begin(at, wire.varint, 0).varint(value)
  }

  double(at: number, value: number): void {
    if (value !== 0) this.#begin(at, wire.fixed64, 0).double(value)
  }

  text(at: number, text: string): void {
    if (text === "") return
    const bytes = utf8Bytes(text)
    this.#begin(at, wire.bytes, bytes).text(text, bytes)
  }

  message(at: number, message: Message): void {
    const { length } = message
    const writer = this.#begin(at, wire.bytes, length)
    writer.varint(length)
    writer.raw(message.#writer.buffer.subarray(0, length))
  }

  packed(at: number, values: ReadonlyArray<number>): void {
    let length = 0
    for (const value of values) length += varintBytes(value)
    const writer = this.#begin(at, wire.bytes, length)
    writer.varint(length)
    for (const value of values) writer.varint(value)
  }

  get length(): number {
    return this.#writer.at
  }

  frame(): Buffer {
    const frame = new Writer(frameHeadBytes + this.length)
    frame.frameHead(this.length)
    frame.raw(this.#writer.buffer.subarray(0, this.length))
    return frame.buffer
  }

  /** The tag of a field, and room for it and content of so many bytes. */
  #begin(at: number, type: number, content: number): Writer {
    const writer = this.#writer
    const need = writer.at + fieldBytes + content
    if (need > writer.buffer.length) {
      const larger = Buffer.allocUnsafe(Math.max(need, writer.buffer.length * 2))
      writer.buffer.copy(larger, 0, 0, writer.at)
      writer.buffer = larger
    }
    writer.byte(field(at, type))
    return writer
  }
}
