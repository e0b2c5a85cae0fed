/**
 * From the bytes of a gRPC call to its messages: frames may be cut anywhere, and may be compressed. What is kept of a
 * message that has not come whole grows with what has come, never by what its length promises.
 */
import { gunzip, inflate } from "node:zlib"
import { type ApiError, InvalidInput, Overloaded, TooLarge } from "../protocol/Errors.ts"
import { frameHeadBytes } from "./GrpcMessages.ts"

/** Names of compressions that are read and written, as `grpc-encoding` has them. */
export type Encoding = "identity" | "gzip" | "deflate"

export const encodingOf = (name: string): Encoding | undefined =>
  name === "identity" || name === "gzip" || name === "deflate" ? name : undefined

export const acceptedEncodings = "identity,gzip,deflate"

/** Bytes of messages that have not come whole, over all calls of this node. */
export class PartialBytes {
  readonly #max: number
  #held = 0

  constructor(max: number) {
    this.#max = max
  }

  /** Whether so many more may be held; if so, they are. */
  take(bytes: number): boolean {
    if (this.#held + bytes > this.#max) return false
    this.#held += bytes
    return true
  }

  give(bytes: number): void {
    this.#held -= bytes
  }
}

export interface FrameLimits {
  readonly messageBytesMax: number
  readonly partial: PartialBytes
}

export interface FrameReceiver {
  /** A whole message, inflated. Its bytes are the receiver's only until it returns. */
  readonly onMessage: (message: Buffer) => void
  /** A message that was inflated is done with: more may come. */
  readonly onReading: () => void
  /** Nothing more can be read. */
  readonly onFault: (error: ApiError) => void
}

/** Kept at first of a message that comes in pieces. */
const firstBytes = 4_096

export class FrameReader {
  readonly #limits: FrameLimits
  readonly #encoding: Encoding
  readonly #receiver: FrameReceiver
  /** A frame that has not come whole, from its first byte on: as much of it as `#filled`. */
  #kept: Buffer | undefined
  #filled = 0
  /** Bytes that came while a message was inflated, or while the call did not want another. */
  #later: Buffer | undefined
  #inflating = false
  #paused = false
  #closed = false
  /** When the frame that has not come whole began to come; 0: there is none. */
  waitingSince = 0

  constructor(limits: FrameLimits, encoding: Encoding, receiver: FrameReceiver) {
    this.#limits = limits
    this.#encoding = encoding
    this.#receiver = receiver
  }

  /** Whether what has come is read: if not, no more should be let in. */
  get reading(): boolean {
    return !this.#paused && !this.#inflating
  }

  /** Whether nothing of what came is left. */
  get empty(): boolean {
    return this.#kept === undefined && this.#later === undefined && !this.#inflating
  }

  push(chunk: Buffer): void {
    if (this.#closed || chunk.length === 0) return
    if (!this.reading) return this.#hold(chunk)
    if (this.#kept === undefined) return this.#read(chunk)
    const used = this.#fill(chunk)
    if (used !== undefined) this.push(chunk.subarray(used))
  }

  /** No further message is given until `resume`. */
  pause(): void {
    this.#paused = true
  }

  resume(): void {
    if (!this.#paused) return
    this.#paused = false
    this.#readLater()
  }

  close(): void {
    if (this.#closed) return
    this.#closed = true
    this.#limits.partial.give((this.#kept?.length ?? 0) + (this.#later?.length ?? 0))
    this.#kept = undefined
    this.#later = undefined
  }

  #hold(chunk: Buffer): void {
    if (!this.#limits.partial.take(chunk.length)) return void this.#fault(tooManyHeld())
    this.#later = this.#later === undefined ? chunk : Buffer.concat([this.#later, chunk])
  }

  #readLater(): void {
    const later = this.#later
    if (later === undefined || this.#closed || !this.reading) return
    this.#later = undefined
    this.#limits.partial.give(later.length)
    this.push(later)
  }

  /** Reads the frames that are whole in `bytes`, and keeps what is left. */
  #read(bytes: Buffer): void {
    let at = 0
    while (bytes.length - at >= frameHeadBytes) {
      const length = this.#lengthAt(bytes, at)
      if (length === undefined) return
      const end = at + frameHeadBytes + length
      if (end > bytes.length) break
      this.#frame(bytes[at] as number, bytes.subarray(at + frameHeadBytes, end))
      at = end
      if (this.#closed) return
      if (!this.reading) return this.push(bytes.subarray(at))
    }
    if (at === bytes.length) return
    this.waitingSince = Date.now()
    if (this.#keep(Math.max(firstBytes, bytes.length - at))) this.#fill(bytes.subarray(at))
  }

  /** The length of the message whose frame begins there; `undefined` where it is refused. */
  #lengthAt(bytes: Buffer, at: number): number | undefined {
    const flag = bytes[at] as number
    const length = bytes.readUInt32BE(at + 1)
    const { messageBytesMax } = this.#limits
    if (flag > 1) return this.#fault(malformed("a frame that begins with 0 or 1", String(flag)))
    if (flag === 1 && this.#encoding === "identity") {
      return this.#fault(malformed("grpc-encoding, where messages are compressed", "none"))
    }
    if (length > messageBytesMax) return this.#fault(new TooLarge({ what: "message", limitBytes: messageBytesMax }))
    return length
  }

  /** Adds to the frame that is kept; the bytes taken, or `undefined` once the call is refused. */
  #fill(bytes: Buffer): number | undefined {
    let used = 0
    let need = frameHeadBytes
    for (;;) {
      const kept = this.#kept as Buffer
      if (this.#filled >= frameHeadBytes) {
        const length = this.#lengthAt(kept, 0)
        if (length === undefined) return undefined
        need = frameHeadBytes + length
        if (this.#filled === need) {
          const frame = kept.subarray(0, need)
          this.#kept = undefined
          this.#filled = 0
          this.waitingSince = 0
          this.#limits.partial.give(kept.length)
          this.#frame(frame[0] as number, frame.subarray(frameHeadBytes))
          return used
        }
      }
      if (used === bytes.length) return used
      const more = Math.min(need - this.#filled, bytes.length - used)
      if (
        this.#filled + more > kept.length &&
        !this.#keep(Math.min(need, Math.max(kept.length * 2, this.#filled + more)))
      )
        return undefined
      bytes.copy(this.#kept as Buffer, this.#filled, used, used + more)
      this.#filled += more
      used += more
    }
  }

  /** Room for so many bytes of the frame. */
  #keep(bytes: number): boolean {
    const { partial } = this.#limits
    const before = this.#kept
    if (!partial.take(bytes - (before?.length ?? 0))) {
      this.#fault(tooManyHeld())
      return false
    }
    this.#kept = Buffer.allocUnsafe(bytes)
    before?.copy(this.#kept, 0, 0, this.#filled)
    return true
  }

  #frame(flag: number, message: Buffer): void {
    if (this.#closed) return
    if (flag === 0) return this.#receiver.onMessage(message)
    this.#inflating = true
    const { messageBytesMax } = this.#limits
    const encoding = this.#encoding
    const open = encoding === "gzip" ? gunzip : inflate
    // On a thread of Node's, one message of a call at a time.
    open(message, { maxOutputLength: messageBytesMax }, (error, inflated) => {
      this.#inflating = false
      if (this.#closed) return
      if (error !== null) {
        const large = (error as NodeJS.ErrnoException).code === "ERR_BUFFER_TOO_LARGE"
        const what = { what: "inflated message", limitBytes: messageBytesMax }
        this.#fault(large ? new TooLarge(what) : malformed(`a message compressed with ${encoding}`, error.message))
        return
      }
      this.#receiver.onMessage(inflated)
      this.#readLater()
      if (this.reading) this.#receiver.onReading()
    })
  }

  #fault(error: ApiError): undefined {
    this.close()
    this.#receiver.onFault(error)
    return undefined
  }
}

const malformed = (expected: string, got: string): InvalidInput => new InvalidInput({ field: "", expected, got })

const tooManyHeld = () => new Overloaded({ bound: "grpcPartialBytesMax", retryAfterMillis: 1_000 })
