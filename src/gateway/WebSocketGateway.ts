/**
 * `/api/v1/ws`: many searches and inserts on one connection, each with its own id. Taken from the HTTP server before Effect
 * sees the upgrade: an idle connection is a `ws` socket and one small object, with no fiber and no timer of its own; one
 * timer looks after all of them.
 *
 * A connection carries sessions: one of its own, opened with it, and those its frames name. Outbound data is bounded: from
 * half of `outboundBytesMax` on, no more frames are read; at the bound the connection is closed with 4008.
 */
import type { IncomingMessage } from "node:http"
import type { Duplex } from "node:stream"
import { Context, Effect, Exit, type Fiber, Layer, Result } from "effect"
import { type RawData, WebSocket, WebSocketServer } from "ws"
import { Settings, type SettingValues } from "../config.ts"
import { type ApiError, InternalError, InvalidInput, Overloaded, toProblem } from "../protocol/Errors.ts"
import { decoderOf, defaultCollection, describe } from "../protocol/Fields.ts"
import {
  CancelFrame,
  CloseFrame,
  closeCodes,
  type FrameType,
  frameTypes,
  InsertFrame,
  PingFrame,
  SearchFrame
} from "../protocol/Frames.ts"
import type { SessionQuery } from "../protocol/StreamSession.ts"
import { Admission } from "../shards/Admission.ts"
import { Router } from "../shards/Router.ts"
import type { Asker } from "../shards/Shedding.ts"
import * as Answers from "./Answers.ts"
import { connectionClosed, connectionOpened, countDefect, countRequest } from "./Instruments.ts"
import { instance, toQuery } from "./Queries.ts"
import { askerOf, refusalProblem, searchEnvelope } from "./Refusals.ts"
import { type SessionLink, Sessions } from "./Sessions.ts"

export const path = "/api/v1/ws"

export class WebSocketGateway extends Context.Service<
  WebSocketGateway,
  {
    readonly handleUpgrade: (request: IncomingMessage, socket: Duplex, head: Buffer) => void
    /** Tells every connection to come back elsewhere (1012), and closes it. */
    readonly drain: Effect.Effect<void>
    /** Closes up to `max` connections that were idle for longer, telling when to come back; answers how many. */
    readonly closeIdle?: (olderThanMillis: number, max: number, retryAfterMillis: number) => number
    readonly count: () => number
  }
>()("ruvector/gateway/WebSocketGateway") {
  static readonly layer = Layer.effect(
    WebSocketGateway,
    Effect.gen(function* () {
      const settings = yield* Settings
      const server = new WebSocketServer({
        noServer: true,
        maxPayload: settings.maxFrameBytes,
        perMessageDeflate: false,
        // `ws` waits this long for the peer's close frame before it destroys the socket.
        closeTimeout: 2_000,
        WebSocket: WebSocket
      } as ConstructorParameters<typeof WebSocketServer>[0])
      const connections = new Set<Connection>()
      const hub: Hub = {
        settings,
        router: yield* Router,
        admission: yield* Admission,
        sessions: yield* Sessions,
        run: Effect.runForkWith(yield* Effect.context<never>()),
        connections
      }
      const timer = setInterval(
        () => {
          const now = Date.now()
          for (const connection of connections) connection.lookAfter(now)
        },
        Math.max(50, Math.min(5_000, settings.pingIntervalMillis / 4))
      )
      timer.unref()

      const drain = Effect.sync(() => {
        for (const connection of connections) connection.close(closeCodes.restart, "restarting")
      })
      yield* Effect.addFinalizer(() =>
        Effect.andThen(
          drain,
          Effect.sync(() => {
            clearInterval(timer)
            server.close()
          })
        )
      )
      return WebSocketGateway.of({
        handleUpgrade: (request, socket, head) => {
          server.handleUpgrade(request, socket, head, (ws) => {
            connections.add(new Connection(hub, ws, socket, askerOf(request.socket.remoteAddress)))
          })
        },
        drain,
        count: () => connections.size
      })
    })
  )
}

interface Hub {
  readonly settings: SettingValues
  readonly router: Router["Service"]
  readonly admission: Admission["Service"]
  readonly sessions: Sessions["Service"]
  readonly run: <A, E>(effect: Effect.Effect<A, E>) => Fiber.Fiber<A, E>
  readonly connections: Set<Connection>
}

const decoders = {
  search: decoderOf(SearchFrame),
  insert: decoderOf(InsertFrame),
  cancel: decoderOf(CancelFrame),
  ping: decoderOf(PingFrame),
  close: decoderOf(CloseFrame)
}

/** The label of the session that a connection is opened with. */
const ownSession = ""

class Connection {
  readonly #hub: Hub
  readonly #ws: WebSocket
  readonly #socket: Duplex
  readonly #asker: Asker
  /** Sessions by label: open ones, and those being opened. */
  readonly #sessions = new Map<string, SessionLink | Promise<SessionLink | ApiError>>()
  /** Requests under way by id (by a number where they have none): to cancel them, and to refuse a second of one id. */
  #underWay: Map<string | number, Fiber.Fiber<unknown, unknown>> | undefined
  #unnamed = 0
  #lastHeardAt = Date.now()
  #sentBytes = 0
  #paused = false
  #corked = false
  #closed = false

  constructor(hub: Hub, ws: WebSocket, socket: Duplex, asker: Asker) {
    this.#hub = hub
    this.#ws = ws
    this.#socket = socket
    this.#asker = asker
    ws.on("message", (data, binary) => this.#message(data, binary))
    ws.on("pong", () => this.#heard())
    ws.on("ping", () => this.#heard())
    ws.on("error", () => {})
    ws.on("close", (code) => this.#ended(code))
    connectionOpened("ws")
    void this.#session(ownSession).then((session) => {
      if ("_tag" in session) this.close(closeCodes.tryAgainLater, "no session to be had now")
    })
  }

  /** Called now and then: pings a quiet peer, gives up one that answers nothing, reads on when there is room again. */
  lookAfter(now: number): void {
    const { pingIntervalMillis, idleTimeoutMillis } = this.#hub.settings
    const quiet = now - this.#lastHeardAt
    if (this.#paused && this.#ws.bufferedAmount < this.#hub.settings.outboundBytesMax / 4) this.#resume()
    if (quiet >= idleTimeoutMillis) {
      this.close(this.#paused ? closeCodes.slowReader : closeCodes.idle, this.#paused ? "reads too slowly" : "idle")
    } else if (quiet >= pingIntervalMillis && !this.#paused) this.#ws.ping()
  }

  close(code: number, reason: string): void {
    if (this.#closed) return
    // A paused socket would never hand on the peer's close frame.
    this.#resume()
    this.#ws.close(code, reason)
  }

  #heard(): void {
    this.#lastHeardAt = Date.now()
  }

  #message(data: RawData, binary: boolean): void {
    this.#heard()
    if (this.#hub.admission.isPressed() && this.#isRefused(data as Buffer, binary)) return
    const frame = binary ? decodeBinary(data as Buffer) : decodeText(data as Buffer)
    if (Result.isFailure(frame)) return this.#fail(frame.failure, "")
    const envelope = envelopeOf(frame.success)
    const type = frame.success["type"]
    if (!(frameTypes as ReadonlyArray<unknown>).includes(type)) {
      const got = type === undefined ? "nothing" : describe(type)
      return this.#fail(new InvalidInput({ field: "type", expected: `one of ${frameTypes.join(", ")}`, got }), envelope)
    }
    switch (type as FrameType) {
      case "search": {
        const decoded = decoders.search(frame.success)
        if (Result.isFailure(decoded)) return this.#fail(decoded.failure, envelope)
        const query = toQuery(decoded.success)
        if (Result.isFailure(query)) return this.#fail(query.failure, envelope)
        return this.#search(
          query.success,
          decoded.success.id,
          decoded.success.session,
          decoded.success.stream === true,
          envelope
        )
      }
      case "insert": {
        const decoded = decoders.insert(frame.success)
        if (Result.isFailure(decoded)) return this.#fail(decoded.failure, envelope)
        return this.#insert(decoded.success, envelope)
      }
      case "cancel": {
        const decoded = decoders.cancel(frame.success)
        if (Result.isFailure(decoded)) return this.#fail(decoded.failure, envelope)
        this.#underWay?.get(decoded.success.id)?.interruptUnsafe()
        return this.#send(`{"event":"cancelled"${envelope}}`)
      }
      case "ping": {
        const decoded = decoders.ping(frame.success)
        if (Result.isFailure(decoded)) return this.#fail(decoded.failure, envelope)
        return this.#send(`{"event":"pong"${envelope}}`)
      }
      case "close": {
        const decoded = decoders.close(frame.success)
        if (Result.isFailure(decoded)) return this.#fail(decoded.failure, envelope)
        const { session } = decoded.success
        const link = this.#sessions.get(session)
        this.#sessions.delete(session)
        if (link !== undefined) void Promise.resolve(link).then((open) => "_tag" in open || this.#hub.run(open.close))
        return this.#send(`{"event":"closed","session":${JSON.stringify(session)}${envelope}}`)
      }
    }
  }

  /** Refuses a search before its vector is read, where it shows at once that it is one. */
  #isRefused(data: Buffer, binary: boolean): boolean {
    const envelope = searchEnvelope(data, binary)
    if (envelope === undefined) return false
    const refusal = this.#hub.admission.refusal(this.#asker)
    if (refusal === undefined) return false
    countRequest("ws", "search", 429, 0)
    this.#send(`{"event":"error","problem":${refusalProblem(refusal)}${envelope}}`)
    return true
  }

  #search(
    query: SessionQuery,
    id: string | undefined,
    session: string | undefined,
    stream: boolean,
    envelope: string
  ): void {
    const program = (link: SessionLink) => {
      if (stream) this.#send(Answers.searchStart(query.queryId, envelope))
      return link.search(query)
    }
    const open = this.#sessions.get(session ?? ownSession)
    // Nearly always the session is open: then no promise is made for it.
    const search =
      open !== undefined && !(open instanceof Promise)
        ? Effect.suspend(() => program(open))
        : Effect.flatMap(
            Effect.promise(() => this.#session(session ?? ownSession)),
            (link) => ("_tag" in link ? Effect.fail(link) : program(link))
          )
    const withQuery = `,"query_id":${JSON.stringify(query.queryId)}${envelope}`
    this.#start("search", id, search, withQuery, (answer) => {
      if (!stream) return this.#send(Answers.searchResults(answer, withQuery))
      for (let i = 0; i < answer.ids.length; i++) this.#send(Answers.searchResult(answer, i, withQuery))
      this.#send(Answers.searchComplete(answer, withQuery))
    })
  }

  #insert(frame: InsertFrame, envelope: string): void {
    const records = frame.vectors.map(({ id, vector, metadata }) => ({
      id,
      vector,
      metadata: metadata === undefined ? "" : JSON.stringify(metadata)
    }))
    const insert = this.#hub.router.upsert(frame.collection ?? defaultCollection, records, frame.ack)
    this.#start("insert", frame.id, insert, envelope, (inserted) =>
      this.#send(`{"event":"inserted","inserted":${inserted}${envelope}}`)
    )
  }

  #start<A>(
    route: string,
    id: string | undefined,
    effect: Effect.Effect<A, ApiError>,
    envelope: string,
    answer: (value: A) => void
  ): void {
    if (id !== undefined && this.#underWay?.has(id)) {
      return this.#fail(new InvalidInput({ field: "id", expected: "an id that is not under way", got: id }), envelope)
    }
    if (this.#underWay !== undefined && this.#underWay.size >= this.#hub.settings.sessionSearchesMax) {
      return this.#fail(new Overloaded({ bound: "sessionSearchesMax", retryAfterMillis: 100 }), envelope)
    }
    const started = performance.now()
    const key = id ?? this.#unnamed++
    const fiber = this.#hub.run(effect)
    this.#underWay ??= new Map()
    this.#underWay.set(key, fiber)
    fiber.addObserver((exit) => {
      this.#underWay?.delete(key)
      if (this.#closed) return
      if (Exit.isSuccess(exit)) {
        countRequest("ws", route, 200, performance.now() - started)
        answer(exit.value)
        return
      }
      if (Exit.hasInterrupts(exit)) return countRequest("ws", route, 499, performance.now() - started)
      const error = Exit.findErrorOption(exit)
      if (error._tag === "Some") return this.#fail(error.value, envelope)
      const requestId = `req_${query++}_${this.#hub.settings.region}_${instance}`
      countDefect()
      this.#hub.run(Effect.annotateLogs(Effect.logError("Frame met a defect", exit.cause), { request_id: requestId }))
      this.#fail(new InternalError({ requestId }), envelope)
    })
  }

  /** The session of a label, opened if it is new. */
  #session(label: string): Promise<SessionLink | ApiError> {
    const found = this.#sessions.get(label)
    if (found !== undefined) return Promise.resolve(found)
    if (this.#sessions.size >= this.#hub.settings.sessionsPerConnection) {
      return Promise.resolve(new Overloaded({ bound: "sessionsPerConnection", retryAfterMillis: 1_000 }))
    }
    const { promise: opening, resolve } = Promise.withResolvers<SessionLink | ApiError>()
    this.#sessions.set(label, opening)
    this.#hub.run(this.#hub.sessions.open).addObserver((exit) => {
      const wanted = this.#sessions.get(label) === opening
      if (Exit.isSuccess(exit)) {
        // The connection, or the session, may have been closed meanwhile.
        if (wanted) this.#sessions.set(label, exit.value)
        else this.#hub.run(exit.value.close)
        return resolve(exit.value)
      }
      if (wanted) this.#sessions.delete(label)
      const error = Exit.findErrorOption(exit)
      resolve(error._tag === "Some" ? error.value : new Overloaded({ bound: "sessionsMax", retryAfterMillis: 1_000 }))
    })
    return opening
  }

  #fail(error: ApiError, envelope: string): void {
    const problem = toProblem(error)
    countRequest("ws", "error", problem.status, 0)
    this.#send(`{"event":"error","problem":${JSON.stringify(problem)}${envelope}}`)
  }

  #send(text: string): void {
    if (this.#closed) return
    this.#sentBytes += text.length
    // Events of one turn of the event loop, often answers to several requests, go out in one call to the system.
    if (!this.#corked) {
      this.#corked = true
      this.#socket.cork()
      setImmediate(() => {
        this.#corked = false
        this.#socket.uncork()
      })
    }
    this.#ws.send(text)
    const waiting = this.#ws.bufferedAmount
    const bound = this.#hub.settings.outboundBytesMax
    if (waiting <= bound / 2) return
    if (waiting > bound) {
      this.#ended(closeCodes.slowReader)
      this.#ws.close(closeCodes.slowReader, "reads too slowly")
      return
    }
    if (!this.#paused) {
      this.#paused = true
      this.#ws.pause()
      this.#socket.once("drain", () => this.#resume())
    }
  }

  #resume(): void {
    if (!this.#paused) return
    this.#paused = false
    this.#ws.resume()
  }

  #ended(code: number): void {
    if (this.#closed) return
    this.#closed = true
    this.#resume()
    this.#hub.connections.delete(this)
    connectionClosed("ws", String(code), this.#sentBytes)
    for (const fiber of this.#underWay?.values() ?? []) fiber.interruptUnsafe()
    for (const link of this.#sessions.values()) {
      void Promise.resolve(link).then((open) => "_tag" in open || this.#hub.run(open.close))
    }
    this.#sessions.clear()
  }
}

let query = 0

type Frame = Readonly<Record<string, unknown>>

const notAnObject = (got: unknown) => new InvalidInput({ field: "", expected: "a JSON object", got: describe(got) })

const decodeText = (data: Buffer): Result.Result<Frame, InvalidInput> => {
  try {
    const value: unknown = JSON.parse(data.toString("utf8"))
    if (typeof value !== "object" || value === null || Array.isArray(value)) return Result.fail(notAnObject(value))
    return Result.succeed(value as Frame)
  } catch (error) {
    return Result.fail(
      new InvalidInput({ field: "", expected: "a JSON frame", got: (error as Error).message.slice(0, 120) })
    )
  }
}

/** A binary frame as the text frame it stands for, its vectors as typed arrays. */
const decodeBinary = (data: Buffer): Result.Result<Frame, InvalidInput> => {
  const fault = (expected: string, got: string) => Result.fail(new InvalidInput({ field: "", expected, got }))
  if (data.length < 4) return fault("a binary frame: length, JSON, vectors", `${data.length} bytes`)
  const length = data.readUInt32LE(0)
  if (length > data.length - 4)
    return fault(`${length} bytes of JSON, as the frame's length says`, `${data.length - 4} bytes`)
  return Result.flatMap(decodeText(data.subarray(4, 4 + length)), (frame) => {
    const bytes = data.subarray(4 + ((length + 3) & ~3))
    if (bytes.length % 4 !== 0) return fault("whole float32s after the JSON", `${bytes.length} bytes`)
    const floats = new Float32Array(bytes.length / 4)
    Buffer.from(floats.buffer).set(bytes)
    if (frame["type"] === "search") return Result.succeed({ ...frame, query: floats })
    const vectors = frame["vectors"]
    if (frame["type"] !== "insert" || !Array.isArray(vectors) || vectors.length === 0) {
      return floats.length === 0
        ? Result.succeed(frame)
        : fault("vectors only with a search or an insert", `${floats.length} numbers`)
    }
    if (floats.length % vectors.length !== 0) {
      return fault(`numbers for ${vectors.length} vectors of one length`, `${floats.length} numbers`)
    }
    const dimensions = floats.length / vectors.length
    return Result.succeed({
      ...frame,
      vectors: vectors.map((item: unknown, i) => ({
        ...(typeof item === "object" ? item : {}),
        vector: floats.slice(i * dimensions, (i + 1) * dimensions)
      }))
    })
  })
}

/** What every answer to a frame carries: its id, where it has one that can be given back. */
const envelopeOf = (frame: Frame): string => {
  const { id } = frame
  return typeof id === "string" && id.length <= 128 ? `,"id":${JSON.stringify(id)}` : ""
}
