/**
 * One gRPC call on its HTTP/2 stream: messages in, frames out, and one end. Written on Node's stream directly: a call that
 * waits holds no fiber.
 *
 * What goes out is made piece by piece as the client reads, so that an answer of any size costs one piece beside itself. What
 * waits is counted for the whole connection (`Outbound`): there is one bound for a client that does not read, over however
 * many calls.
 */
import {
  constants,
  type OutgoingHttpHeaders,
  type ServerHttp2Stream,
  type ServerStreamResponseOptions
} from "node:http2"
import { deflateSync, gzipSync } from "node:zlib"
import { type ApiError, DeadlineExceeded, InvalidInput } from "../protocol/Errors.ts"
import { type Encoding, type FrameLimits, FrameReader, type FrameReceiver } from "./GrpcFrames.ts"
import { frameHeadBytes } from "./GrpcMessages.ts"
import { okTrailers, type Trailers, trailersOf } from "./GrpcStatus.ts"

/** What a method does with a call. */
export interface CallHandler {
  /** A whole message; its bytes are the handler's only until it returns. */
  readonly onMessage: (message: Buffer) => void
  /** The client sends no more messages. */
  readonly onEnd: () => void
  /** The call is over; whatever is under way for it is to be ended. */
  readonly onClose: () => void
  /** The connection, for which the call was held, has room again. Without it the call is read on. */
  readonly onRoom?: () => void
}

/** Frames to be sent, made as there is room for them. */
export interface Source {
  /** The next piece; called until `done`. */
  readonly next: () => Buffer
  readonly done: () => boolean
  /** What it holds while it waits; 0: always taken. */
  readonly bytes: number
  /** Its last piece is given to the stream, or it is dropped. */
  readonly onSent?: () => void
}

/** What waits for one connection, and its calls that are not read meanwhile. */
export class Outbound {
  bytes = 0
  readonly held = new Set<GrpcCall>()

  release(bytes: number, readAgainBelow: number): void {
    this.bytes -= bytes
    if (this.held.size === 0 || this.bytes > readAgainBelow) return
    const calls = [...this.held]
    this.held.clear()
    for (const call of calls) call.roomAgain()
  }
}

/** What holds for every call of this node. */
export interface CallLimits extends FrameLimits {
  readonly outboundBytesMax: number
  readonly compressBytesMin: number
  readonly requestTimeoutMillis: number
  readonly idleTimeoutMillis: number
}

export interface CallOptions {
  readonly outbound: Outbound
  /** Of the client's messages. */
  readonly encoding: Encoding
  /** Of ours, where it pays. */
  readonly replyEncoding: Encoding
  /** Until which the call has to end; 0: it names none. */
  readonly timeoutMillis: number
  /** So much of its messages has come. */
  readonly onBytes: (bytes: number) => void
  /** The call is over: `grpc-status`, or `gone` where the client has left. Its stream may be open for a while yet. */
  readonly onOver: (call: GrpcCall, status: string, bytes: number) => void
  readonly onClosed: (call: GrpcCall) => void
}

export const grpcContentType = "application/grpc+proto"

// Node's types do not know that the date can be left out.
const withTrailers: ServerStreamResponseOptions = Object.assign({ waitForTrailers: true }, { sendDate: false })
export const withoutBody: ServerStreamResponseOptions = Object.assign({ endStream: true }, { sendDate: false })

/** Bytes of one piece of what is sent. */
export const pieceBytes = 65_536

/** Longest time a timer of Node's can have. */
const timerMillisMax = 2_147_483_647

export class GrpcCall implements FrameReceiver {
  readonly stream: ServerHttp2Stream
  readonly #limits: CallLimits
  readonly #options: CallOptions
  readonly #reader: FrameReader
  readonly #startedAt = Date.now()
  #handler: CallHandler | undefined
  #deadline: NodeJS.Timeout | undefined
  readonly #sources: Array<Source> = []
  #trailers: Trailers | undefined
  #headSent = false
  /** The stream is full until the client reads. */
  #full = false
  /** When bytes last went out, or began to wait. */
  #progressAt = 0
  #messages = 0
  #held = false
  #inputEnded = false
  #ending = false
  #finished = false
  #over = false
  #sentBytes = 0
  #unflushed = 0

  constructor(stream: ServerHttp2Stream, limits: CallLimits, options: CallOptions) {
    this.stream = stream
    this.#limits = limits
    this.#options = options
    this.#reader = new FrameReader(limits, options.encoding, this)
  }

  start(handler: CallHandler): void {
    this.#handler = handler
    const { stream } = this
    if (this.outboundIsHigh) this.holdForOutbound()
    stream.on("data", (chunk: Buffer) => {
      this.#options.onBytes(chunk.length)
      this.#reader.push(chunk)
      if (!this.#reader.reading) stream.pause()
    })
    stream.on("end", () => {
      this.#inputEnded = true
      this.#inputDone()
    })
    stream.on("close", () => this.#closed())
    const { timeoutMillis } = this.#options
    if (timeoutMillis > 0) {
      this.#deadline = setTimeout(
        () => this.fail(new DeadlineExceeded({ deadlineMillis: Math.round(timeoutMillis) })),
        Math.min(timeoutMillis, timerMillisMax)
      )
    }
  }

  onMessage(message: Buffer): void {
    this.#messages += 1
    this.#handler?.onMessage(message)
  }

  onReading(): void {
    this.#letIn()
  }

  onFault(error: ApiError): void {
    this.fail(error)
  }

  /** Whether nothing more is to be done for it: it has ended, or is ending with what was sent. */
  get ended(): boolean {
    return this.#ending || this.#over
  }

  /**
   * Sends what a source gives, after what was sent before. `false`, and nothing of it, where the connection has too much
   * waiting already.
   */
  send(source: Source): boolean {
    if (this.ended) {
      source.onSent?.()
      return true
    }
    if (!this.#queue(source)) return false
    this.#pump()
    return true
  }

  /** The same, and ends the call well after it: all in one piece where it is small. */
  sendLast(source: Source, trailers: Trailers): boolean {
    if (this.ended) return this.send(source)
    if (!this.#queue(source)) return false
    this.end(trailers)
    return true
  }

  /** Ends the call well, after what was sent. */
  end(trailers: Trailers = okTrailers): void {
    if (this.ended) return
    this.#ending = true
    this.#trailers = trailers
    this.#stopInput()
    this.#pump()
  }

  /** Ends the call at once; what waits is dropped. */
  fail(error: ApiError): void {
    this.failWith(trailersOf(error))
  }

  failWith(trailers: Trailers): void {
    if (this.#over || (this.#ending && this.#sources.length === 0)) return
    this.#ending = true
    this.#trailers = trailers
    this.#dropSources()
    this.#stopInput()
    this.#leave()
    if (!this.#full) return this.#pump()
    // Trailers would wait behind what the client does not read.
    this.#isOver(trailers["grpc-status"] as string)
    this.stream.close(constants.NGHTTP2_CANCEL)
  }

  /** The client's messages are not read until `readOn`. */
  hold(): void {
    if (this.#held || this.ended) return
    this.#held = true
    this.#reader.pause()
    this.stream.pause()
  }

  readOn(): void {
    if (!this.#held || this.ended) return
    this.#held = false
    this.#reader.resume()
    this.#letIn()
  }

  /** Reads no more until the connection has less waiting. */
  holdForOutbound(): void {
    const { outbound } = this.#options
    outbound.held.add(this)
    this.hold()
  }

  roomAgain(): void {
    const handler = this.#handler
    if (handler?.onRoom === undefined) this.readOn()
    else handler.onRoom()
  }

  get outboundIsHigh(): boolean {
    return this.#options.outbound.bytes > this.#limits.outboundBytesMax / 2
  }

  /** Called now and then: gives up a client that does not read, and one that does not finish its message. */
  lookAfter(now: number): void {
    const { idleTimeoutMillis, requestTimeoutMillis } = this.#limits
    if (this.#unflushed > 0 && now - this.#progressAt >= idleTimeoutMillis) {
      return this.stream.close(constants.NGHTTP2_ENHANCE_YOUR_CALM)
    }
    if (this.ended) return
    const since =
      this.#reader.waitingSince !== 0 ? this.#reader.waitingSince : this.#messages === 0 ? this.#startedAt : 0
    if (since !== 0 && !this.#held && now - since >= requestTimeoutMillis) {
      this.fail(new DeadlineExceeded({ deadlineMillis: requestTimeoutMillis }))
    }
  }

  #queue(source: Source): boolean {
    const { outbound } = this.#options
    const { outboundBytesMax } = this.#limits
    if (source.bytes > 0 && outbound.bytes > 0 && outbound.bytes + source.bytes > outboundBytesMax) return false
    outbound.bytes += source.bytes
    this.#sources.push(source)
    return true
  }

  #letIn(): void {
    if (this.#reader.reading) this.stream.resume()
    this.#inputDone()
  }

  /** The client is done, and all it sent is read. */
  #inputDone(): void {
    if (!this.#inputEnded || this.ended || this.#held || !this.#reader.reading) return
    if (this.#reader.empty) return this.#handler?.onEnd()
    this.fail(new InvalidInput({ field: "", expected: "whole messages", got: "the end in the middle of one" }))
  }

  #stopInput(): void {
    clearTimeout(this.#deadline)
    this.#reader.close()
    this.#options.outbound.held.delete(this)
    // What still comes is let in and dropped, until the stream is closed.
    this.stream.resume()
  }

  #head(): OutgoingHttpHeaders {
    const encoding = this.#options.replyEncoding
    return encoding === "identity"
      ? { ":status": 200, "content-type": grpcContentType }
      : { ":status": 200, "content-type": grpcContentType, "grpc-encoding": encoding }
  }

  /** Writes until all is written or the stream is full; goes on when it has drained. */
  #pump(): void {
    const { stream } = this
    // Closed by the client, a stream answers no more; that it is closed may be told only later.
    while (!this.#over && !this.#finished && !this.#full && !stream.destroyed && !stream.closed) {
      const source = this.#sources[0]
      if (source === undefined) {
        if (this.#trailers !== undefined) this.#finish(undefined)
        return
      }
      const piece = this.#compressed(source.next())
      const done = source.done()
      if (done) {
        this.#sources.shift()
        this.#options.outbound.bytes -= source.bytes
      }
      if (done && this.#sources.length === 0 && this.#trailers !== undefined) this.#finish(piece)
      else if (!this.#write(piece)) {
        this.#full = true
        stream.once("drain", () => {
          this.#full = false
          this.#pump()
        })
      }
      // May send more, or end the call.
      if (done) source.onSent?.()
    }
  }

  #write(piece: Buffer): boolean {
    if (!this.#headSent) {
      this.#headSent = true
      this.stream.respond(this.#head(), withTrailers)
      this.stream.once("wantTrailers", () => {
        if (this.stream.destroyed || this.stream.closed) return
        this.stream.sendTrailers(this.#trailers as Trailers)
        this.#stopClient()
      })
    }
    this.#sentBytes += piece.length
    if (this.#unflushed === 0) this.#progressAt = Date.now()
    this.#unflushed += piece.length
    this.#options.outbound.bytes += piece.length
    return this.stream.write(piece, () => this.#flushed(piece.length))
  }

  #flushed(bytes: number): void {
    if (this.#unflushed < bytes) return
    this.#unflushed -= bytes
    this.#progressAt = Date.now()
    this.#options.outbound.release(bytes, this.#limits.outboundBytesMax / 4)
  }

  #finish(last: Buffer | undefined): void {
    const { stream } = this
    this.#finished = true
    if (!this.#headSent && (last === undefined || last.length === 0)) {
      // Without a message the status comes with the head.
      this.#headSent = true
      stream.respond({ ...this.#head(), ...this.#trailers }, withoutBody)
      this.#stopClient()
    } else {
      if (last !== undefined) this.#write(last)
      stream.end()
    }
  }

  /** Once all is sent: a client that sends more is told that it is not read. Sooner, and what is not sent yet is lost. */
  #stopClient(): void {
    const { stream } = this
    if (stream.readableEnded) return
    setImmediate(() => {
      if (!stream.readableEnded && !stream.closed) stream.close(constants.NGHTTP2_NO_ERROR)
    })
  }

  #closed(): void {
    const complete = this.#ending && this.stream.rstCode === constants.NGHTTP2_NO_ERROR
    this.#isOver(complete ? (this.#trailers?.["grpc-status"] ?? "gone") : "gone")
    clearTimeout(this.#deadline)
    this.#reader.close()
    this.#dropSources()
    const { outbound } = this.#options
    const { outboundBytesMax } = this.#limits
    outbound.held.delete(this)
    outbound.release(this.#unflushed, outboundBytesMax / 4)
    this.#unflushed = 0
    this.#leave()
    this.#options.onClosed(this)
  }

  #isOver(status: string): void {
    if (this.#over) return
    this.#over = true
    this.#options.onOver(this, status, this.#sentBytes)
  }

  #leave(): void {
    const handler = this.#handler
    this.#handler = undefined
    handler?.onClose()
  }

  #dropSources(): void {
    for (const source of this.#sources.splice(0)) {
      this.#options.outbound.bytes -= source.bytes
      source.onSent?.()
    }
  }

  /** Messages that are worth it compressed, where the client compresses its own. */
  #compressed(frames: Buffer): Buffer {
    const encoding = this.#options.replyEncoding
    const { compressBytesMin } = this.#limits
    if (encoding === "identity") return frames
    const parts: Array<Buffer> = []
    for (let at = 0; at < frames.length; ) {
      const end = at + frameHeadBytes + frames.readUInt32BE(at + 1)
      const message = frames.subarray(at + frameHeadBytes, end)
      const packed = message.length < compressBytesMin ? message : compress(message, encoding)
      if (packed.length < message.length) {
        const head = Buffer.allocUnsafe(frameHeadBytes)
        head[0] = 1
        head.writeUInt32BE(packed.length, 1)
        parts.push(head, packed)
      } else {
        parts.push(frames.subarray(at, end))
      }
      at = end
    }
    return Buffer.concat(parts)
  }
}

/** The quickest level: what it saves over none is most of what can be saved. */
const compress = (message: Buffer, encoding: "gzip" | "deflate"): Buffer =>
  encoding === "gzip" ? gzipSync(message, { level: 1 }) : deflateSync(message, { level: 1 })
