/**
 * The HTTP/2 half of the port. Requests become the request and response of Node's compatibility API, so that every handler
 * answers them as it does those of HTTP/1.1; streams of gRPC go to the gRPC handler as they are.
 *
 * What Node leaves to others is bounded here, by one timer for all sessions: bodies that do not come to their end, sessions
 * without a stream, peers that are gone, bytes that belong to no request, and headers over their bound.
 */
import type { IncomingMessage, ServerResponse } from "node:http"
import * as Http2 from "node:http2"
import type { Socket } from "node:net"
import type { SettingValues } from "../config.ts"
import { type GrpcHandler, isGrpc } from "./GrpcHandler.ts"
import { type RawProblem, rawProblems } from "./RawProblems.ts"

export interface Http2Handlers {
  readonly onRequest: (request: IncomingMessage, response: ServerResponse) => void
  readonly onGrpc: GrpcHandler["Service"]["handleStream"]
  /** A request or session was refused or cut, and why. */
  readonly onRefused: (reason: string) => void
}

export class Http2Wire {
  readonly #settings: SettingValues
  readonly #handlers: Http2Handlers
  readonly #server: Http2.Http2Server
  readonly #sessions = new Map<Http2.ServerHttp2Session, Session>()
  readonly #timer: NodeJS.Timeout
  /** The socket that a session is being made on. */
  #accepting: Socket | undefined
  #draining = false

  constructor(settings: SettingValues, handlers: Http2Handlers) {
    this.#settings = settings
    this.#handlers = handlers
    this.#server = Http2.createServer({
      maxSessionMemory: Math.max(1, Math.round(settings.h2SessionMemoryBytes / 1e6)),
      streamResetBurst: settings.h2ResetsBurst,
      streamResetRate: settings.h2ResetsPerSecond,
      settings: {
        maxConcurrentStreams: settings.h2StreamsMax,
        initialWindowSize: settings.h2WindowBytes,
        // Larger than the bound, so that what is over it is answered with 431; beyond this the session is ended.
        maxHeaderListSize: Math.max(settings.maxHeaderBytes, refusableHeaderBytes)
      }
    })
    this.#server.on("session", (session) => this.#opened(session))
    this.#server.on("sessionError", () => {})
    this.#server.on("request", (request, response) =>
      // The compatibility API mirrors the members that handlers use.
      // Node's compatibility API has the same shape, which its types do not say.
      handlers.onRequest(request as unknown as IncomingMessage, response as unknown as ServerResponse)
    )
    // Node's own listener makes the request and response of the compatibility API.
    const compatibility = this.#server.listeners("stream")[0] as (...stream: StreamEvent) => void
    this.#server.removeAllListeners("stream")
    this.#server.on("stream", (...stream: StreamEvent) => this.#stream(compatibility, stream))
    this.#timer = setInterval(() => this.#lookAfterAll(), lookAfterMillis)
    this.#timer.unref()
  }

  /** Speaks HTTP/2 on a connection, of which nothing has been read or what was read has been put back. */
  accept(socket: Socket): void {
    this.#accepting = socket
    this.#server.emit("connection", socket)
    this.#accepting = undefined
  }

  /** Tells every peer to open no more streams here (GOAWAY). Sessions end with their last stream. */
  drain(): void {
    this.#draining = true
    for (const session of this.#sessions.keys()) session.close()
  }

  close(): void {
    clearInterval(this.#timer)
    for (const session of this.#sessions.keys()) session.destroy()
  }

  #opened(session: Http2.ServerHttp2Session): void {
    const socket = this.#accepting
    if (socket === undefined) return session.destroy()
    session.setLocalWindowSize(Math.min(2 ** 31 - 1, 4 * this.#settings.h2WindowBytes))
    this.#sessions.set(session, new Session(session, socket))
    session.on("error", () => {})
    session.once("close", () => this.#sessions.delete(session))
    if (this.#draining) session.close()
  }

  #stream(compatibility: (...stream: StreamEvent) => void, event: StreamEvent): void {
    const [stream, headers, flags, rawHeaders] = event
    stream.on("error", () => {})
    const session = this.#sessions.get(stream.session as Http2.ServerHttp2Session)
    if (session === undefined) return stream.close(Http2.constants.NGHTTP2_REFUSED_STREAM)
    if (session.waitingBytes() > this.#settings.outboundBytesMax) {
      this.#handlers.onRefused("outboundBytesMax")
      return stream.close(Http2.constants.NGHTTP2_REFUSED_STREAM)
    }
    session.opened(stream)
    if (session.streams === this.#settings.requestsPerConnectionMax) session.session.close()
    if (headerBytes(rawHeaders) > this.#settings.maxHeaderBytes) {
      this.#handlers.onRefused("maxHeaderBytes")
      return refuseStream(stream, rawProblems.headersTooLarge)
    }
    if (isGrpc(headers)) return this.#handlers.onGrpc(stream, headers, session.calls(stream))
    // Bytes of a body are on their way: they are to come to an end.
    if ((flags & Http2.constants.NGHTTP2_FLAG_END_STREAM) === 0) session.receives(stream)
    compatibility(...event)
  }

  #lookAfterAll(): void {
    const now = Date.now()
    for (const session of this.#sessions.values()) {
      const fault = session.lookAfter(now, this.#settings)
      if (fault !== undefined) this.#handlers.onRefused(fault)
      for (const stream of session.late(now - this.#settings.requestTimeoutMillis)) {
        this.#handlers.onRefused("requestTimeoutMillis")
        refuseStream(stream, rawProblems.requestTimeout)
      }
    }
  }
}

type StreamEvent = [
  stream: Http2.ServerHttp2Stream,
  headers: Http2.IncomingHttpHeaders,
  flags: number,
  rawHeaders: Array<string>
]

/** Milliseconds between two looks at all sessions. */
const lookAfterMillis = 1_000

/** Bytes of headers that are still read, to be refused with an answer. */
const refusableHeaderBytes = 131_072

/** As they would be counted in HTTP/1.1. */
const headerBytes = (raw: ReadonlyArray<string>): number => {
  let bytes = 2 * raw.length
  for (const text of raw) bytes += text.length
  return bytes
}

class Session {
  readonly session: Http2.ServerHttp2Session
  /** Opened so far. */
  streams = 0
  readonly #socket: Socket
  readonly #openedAt = Date.now()
  readonly #open = new Set<Http2.ServerHttp2Stream>()
  #quietSince = Date.now()
  /** Streams whose body is not whole yet, and since when, oldest first. */
  #receiving: Map<Http2.ServerHttp2Stream, number> | undefined
  #received = false
  #calls = 0
  #hadCalls = false
  #messageBytes = 0
  #unexplained = 0
  readonly #onMessages = (bytes: number): void => {
    this.#messageBytes += bytes
  }
  #heardAt = Date.now()
  #pingedAt = 0
  #seenRead = 0
  #seenWritten = 0
  #seenStreams = 0
  /** When the peer last took something of what waits for it, and what had been written until then. */
  #readSince = Date.now()
  #writtenThen = 0

  constructor(session: Http2.ServerHttp2Session, socket: Socket) {
    this.session = session
    this.#socket = socket
  }

  opened(stream: Http2.ServerHttp2Stream): void {
    this.streams += 1
    this.#open.add(stream)
    stream.once("close", () => {
      this.#open.delete(stream)
      if (this.#open.size === 0) this.#quietSince = Date.now()
    })
  }

  /** Bytes of answers that the peer has not taken. */
  waitingBytes(): number {
    let bytes = 0
    for (const stream of this.#open) bytes += stream.writableLength
    return bytes
  }

  receives(stream: Http2.ServerHttp2Stream): void {
    this.#receiving ??= new Map()
    const receiving = this.#receiving
    receiving.set(stream, Date.now())
    this.#received = true
    const done = () => receiving.delete(stream)
    stream.once("end", done)
    stream.once("close", done)
    // Answered before it was whole: the rest is not wanted.
    stream.once("finish", () => {
      if (receiving.has(stream)) stream.close()
    })
  }

  /** A call has no end by which its receiving could be told: it tells here how much of its messages has come. */
  calls(stream: Http2.ServerHttp2Stream): (bytes: number) => void {
    this.#calls += 1
    stream.once("close", () => {
      this.#calls -= 1
    })
    return this.#onMessages
  }

  /** Streams whose body began before `time` and is not whole. */
  *late(time: number): Generator<Http2.ServerHttp2Stream> {
    if (this.#receiving === undefined) return
    for (const [stream, since] of this.#receiving) {
      if (since >= time) return
      this.#receiving.delete(stream)
      yield stream
    }
  }

  /** Ends a session that is idle, gone or noisy, and says which. */
  lookAfter(now: number, settings: SettingValues): string | undefined {
    const { session } = this
    const read = this.#socket.bytesRead - this.#seenRead
    const written = this.#socket.bytesWritten - this.#seenWritten
    const streams = this.streams - this.#seenStreams
    this.#seenRead += read
    this.#seenWritten += written
    this.#seenStreams += streams
    const receiving = this.#received || (this.#receiving?.size ?? 0) > 0
    this.#received = false
    const messages = this.#messageBytes
    this.#messageBytes = 0

    // Pings, settings, priorities, empty frames: a peer that reads causes some, in a measure to what it is sent.
    // A short message has as much again around it.
    const allowed = settings.h2OverheadBytesPerSecond + streams * settings.maxHeaderBytes + written / 2 + 2 * messages
    // What a call does not read yet is told later; by the windows it is no more than this.
    const later = this.#calls === 0 && !this.#hadCalls ? 0 : 4 * settings.h2WindowBytes
    this.#hadCalls = this.#calls > 0
    this.#unexplained = Math.max(0, (later === 0 ? 0 : this.#unexplained) + read - allowed)
    if (!receiving && this.#unexplained > later) {
      this.#cut(Http2.constants.NGHTTP2_ENHANCE_YOUR_CALM)
      return "h2OverheadBytesPerSecond"
    }
    if (this.#open.size === 0) {
      const bound = this.streams === 0 ? settings.headersTimeoutMillis : settings.keepAliveTimeoutMillis
      const since = this.streams === 0 ? this.#openedAt : this.#quietSince
      if (now - since < bound) return undefined
      // What is on its way to us may still be refused by its number; a peer that does not hang up is cut a while after.
      if (!session.closed) session.close()
      if (now - since >= bound + goodbyeMillis) this.#cut(Http2.constants.NGHTTP2_NO_ERROR)
      return this.streams === 0 ? "headersTimeoutMillis" : undefined
    }
    if (this.waitingBytes() === 0 || this.#seenWritten - this.#writtenThen >= readBytesMin) {
      this.#readSince = now
      this.#writtenThen = this.#seenWritten
    } else if (now - this.#readSince >= slowReaderMillis(settings)) {
      this.#cut(Http2.constants.NGHTTP2_ENHANCE_YOUR_CALM)
      return "slow_reader"
    }
    if (read > 0) {
      this.#heardAt = now
      return undefined
    }
    const unanswered = this.#pingedAt > this.#heardAt ? now - this.#pingedAt : 0
    if (unanswered >= settings.idleTimeoutMillis - settings.pingIntervalMillis) {
      this.#cut(Http2.constants.NGHTTP2_CANCEL)
      return "peer_gone"
    }
    if (now - Math.max(this.#heardAt, this.#pingedAt) >= settings.pingIntervalMillis) {
      this.#pingedAt = now
      session.ping(() => {})
    }
    return undefined
  }

  #cut(code: number): void {
    if (!this.session.destroyed) this.session.goaway(code)
    this.session.destroy()
    // Closed gracefully before, the session would wait for a peer that may be gone.
    setImmediate(() => this.#socket.destroy())
  }
}

/** Bytes that a peer takes at the least in the time for it, or it is not reading: answers to its pings are some too. */
const readBytesMin = 16_384

/** Milliseconds for a peer to read something: more than the streams wait that close a slow reader in their own words. */
export const slowReaderMillis = ({ idleTimeoutMillis }: SettingValues): number =>
  idleTimeoutMillis + Math.min(5_000, idleTimeoutMillis / 2)

/** Milliseconds that a session which was told to go has for it. */
const goodbyeMillis = 2_000

const refuseStream = (stream: Http2.ServerHttp2Stream, problem: RawProblem): void => {
  if (stream.destroyed) return
  if (stream.headersSent) return stream.close(Http2.constants.NGHTTP2_CANCEL)
  stream.respond({ ":status": problem.status, "content-type": problem.contentType, "cache-control": "no-store" })
  stream.end(problem.body)
  stream.close()
}
