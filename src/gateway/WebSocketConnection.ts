/**
 * One WebSocket of clients, from its registration to its end: a small state machine with no fiber, promise or timer of its
 * own.
 *
 *     serving --close, bound reached, credential expired--> draining --peer's close, or its time is up--> closed
 *        `----------------------- peer gone, or it closes ------------------------------------------------^
 *
 * In `draining` nothing more is taken and what is under way is given up; the last events and the close frame go out. What
 * throws while a frame is handled is answered as a defect of that frame.
 *
 * It carries sessions: one of its own, and those its frames name, each made by the first frame that names it. Events of
 * one turn of the event loop go out in one write. While more than half of `outboundBytesMax` waits for the client to read,
 * no frames are read from it, and events wait in their sessions; at the bound it is closed with 4008.
 */
import type { Socket } from "node:net"
import type { Duplex } from "node:stream"
import { Effect, Exit, type Fiber, Result } from "effect"
import { type RawData, WebSocket } from "ws"
import type { SettingValues } from "../config.ts"
import { type ApiError, InternalError, InvalidInput, Overloaded, toProblem } from "../protocol/Errors.ts"
import { defaultCollection, describe } from "../protocol/Fields.ts"
import {
  closeCodes,
  type FrameType,
  frameTypes,
  type InsertFrame,
  retryReason,
  type SearchFrame,
  topicFrameTypes
} from "../protocol/Frames.ts"
import type { Principal } from "../protocol/Principal.ts"
import { shownError } from "../protocol/Tenant.ts"
import type { TopicOperation } from "../protocol/Topic.ts"
import type { Admission } from "../shards/Admission.ts"
import type { Asker } from "../shards/Shedding.ts"
import type { Access } from "./Access.ts"
import * as Answers from "./Answers.ts"
import type { FrameSource, FrameTurns } from "./FrameTurns.ts"
import {
  connectionClosed,
  connectionLived,
  connectionOpened,
  countDefect,
  countRequest,
  sessionClosed
} from "./Instruments.ts"
import { LogicalSession, ownSession, type SessionOwner } from "./LogicalSession.ts"
import { instance, toQuery } from "./Queries.ts"
import { askerOf, refusalProblem, searchEnvelope } from "./Refusals.ts"
import type { ConnectionSubscriptions, SubscriptionFrames } from "./SessionSink.ts"
import type { Sessions } from "./Sessions.ts"
import { askedBy, sourceOf } from "./Sources.ts"
import { storedQuery, type TenantRouter } from "./TenantRouter.ts"
import type { Topics } from "./Topics.ts"
import * as Frames from "./WebSocketFrames.ts"

/** What all connections share. */
export interface Hub {
  readonly settings: SettingValues
  readonly access: Access["Service"]
  readonly tenants: TenantRouter["Service"]
  readonly admission: Admission["Service"]
  readonly sessions: Sessions["Service"]
  readonly topics: Topics["Service"]
  readonly subscriptions: SubscriptionFrames["Service"]
  readonly turns: FrameTurns
  readonly run: <A, E>(effect: Effect.Effect<A, E>) => Fiber.Fiber<A, E>
  /** Milliseconds this process has run for, without those it was held up: a peer is not to blame for our own silence. */
  readonly clock: () => number
  /** Calls the connection's `flush` when this turn of the event loop is over. */
  readonly flushLater: (connection: WebSocketConnection) => void
  readonly ended: (connection: WebSocketConnection) => void
}

/** A `ws` socket that knows its connection, so that its listeners are shared by all. */
export class ClientSocket extends WebSocket {
  connection: WebSocketConnection | undefined = undefined
}

type Phase = "serving" | "draining" | "closed"

interface WaitingFrame {
  readonly data: Buffer
  readonly isBinary: boolean
}

interface Request {
  readonly fiber: Fiber.Fiber<unknown, unknown>
  readonly session: LogicalSession
}

export class WebSocketConnection implements SessionOwner, FrameSource {
  readonly #hub: Hub
  readonly #ws: ClientSocket
  readonly #socket: Socket
  readonly #caller: Principal
  readonly #address: string
  readonly #stopWatch: () => void
  readonly #asker: Asker
  #phase: Phase = "serving"
  #closeCode = 0
  #sessions: Map<string, LogicalSession> | undefined = undefined
  /** By id (by a number where they have none): to cancel them, and to refuse a second of one id. */
  #underWay: Map<string | number, Request> | undefined = undefined
  #unnamed = 0
  #subscriptions: ConnectionSubscriptions | undefined = undefined

  // What goes out
  #gathered: Array<string> | undefined = undefined
  #gatheredChars = 0
  #sentBytes = 0
  /** Bytes that wait in sessions. */
  #waitingBytes = 0
  /** More waits for the client than is to be, and nothing is read from it. */
  #isFull = false
  /** Sessions that have something to send and no room for it, in turn. */
  #queue: Array<LogicalSession> | undefined = undefined
  #isPumping = false
  /** The newest ping not answered yet, where its answer had no room. */
  #owedPong: Buffer | undefined = undefined

  // What comes in
  /** Frames that wait for their turn: what one read of the socket brought, at most. */
  #waitingFrames: Array<WaitingFrame> | undefined = undefined
  readonly #openedAt: number
  #frames = 0
  #framedAt: number
  #heardAt: number
  #pingedAt = 0
  #controlFrames = 0
  #controlFramesSince: number
  /** Bytes read up to the end of the newest message, and in pings and pongs since. */
  #accountedBytes: number
  #unfinishedSince = 0

  constructor(hub: Hub, ws: ClientSocket, socket: Duplex, caller: Principal, address: string) {
    this.#hub = hub
    this.#ws = ws
    // What an HTTP server hands over is the connection's own socket.
    this.#socket = socket as Socket
    this.#caller = caller
    this.#address = address
    this.#asker = askerOf(address, caller)
    const now = hub.clock()
    this.#openedAt = now
    this.#framedAt = now
    this.#heardAt = now
    this.#controlFramesSince = now
    this.#accountedBytes = this.#socket.bytesRead
    ws.connection = this
    ws.on("message", onMessage)
    ws.on("ping", onPing)
    ws.on("pong", onPong)
    ws.on("error", onError)
    ws.on("close", onClose)
    connectionOpened("ws")
    this.#stopWatch = hub.access.watch(caller, (error) =>
      this.close(closeCodes.unauthenticated, toProblem(error).detail)
    )
  }

  /** Sessions it carries. */
  get sessions(): number {
    return this.#sessions?.size ?? 0
  }

  /** Milliseconds for which it has asked for nothing, nothing is under way and nothing waits; 0 where that is not so. */
  idleMillis(): number {
    const isIdle =
      this.#phase === "serving" &&
      (this.#underWay === undefined || this.#underWay.size === 0) &&
      (this.#subscriptions === undefined || this.#subscriptions.size === 0) &&
      this.#waitingBytes === 0 &&
      !this.#isFull
    return isIdle ? this.#hub.clock() - this.#framedAt : 0
  }

  /** Called now and then: pings a quiet peer, and gives up one that is gone, expired or does not keep the rules. */
  lookAfter(): void {
    if (this.#phase !== "serving") return
    const now = this.#hub.clock()
    const { pingIntervalMillis, idleTimeoutMillis, requestTimeoutMillis } = this.#hub.settings
    if (this.#isExpired()) return this.close(closeCodes.unauthenticated, "credential expired")
    if (now - this.#controlFramesSince >= 60_000) {
      this.#controlFrames = 0
      this.#controlFramesSince = now
    }
    const isUnfinished = !this.#isFull && this.#socket.bytesRead > this.#accountedBytes
    if (!isUnfinished) this.#unfinishedSince = 0
    else if (this.#unfinishedSince === 0) this.#unfinishedSince = now
    else if (now - this.#unfinishedSince > requestTimeoutMillis) {
      return this.close(closeCodes.policyViolation, "a frame that does not end")
    }
    const quiet = now - this.#heardAt
    if (quiet >= idleTimeoutMillis) {
      if (this.#isFull) this.close(closeCodes.slowReader, "reads too slowly")
      else this.close(closeCodes.idle, "idle")
    } else if (quiet >= pingIntervalMillis && now - this.#pingedAt >= pingIntervalMillis && !this.#isFull) {
      this.#pingedAt = now
      this.#ws.ping()
    }
  }

  /** Tells the client why, and takes nothing more from it. */
  close(code: number, reason: string): void {
    if (this.#phase !== "serving") return
    this.flush()
    this.#phase = "draining"
    this.#closeCode = code
    this.#giveUp()
    // A paused socket would never hand on the peer's close frame.
    this.#ws.resume()
    this.#ws.close(code, reason)
  }

  message(data: RawData, isBinary: boolean): void {
    if (this.#phase !== "serving") return
    if (this.#isExpired()) return this.close(closeCodes.unauthenticated, "credential expired")
    const now = this.#hub.clock()
    this.#frames += 1
    this.#framedAt = now
    this.#heardAt = now
    this.#accountedBytes = this.#socket.bytesRead
    this.#unfinishedSince = 0
    if (this.#hub.turns.mayRead()) return this.#read(data as Buffer, isBinary)
    if (this.#waitingFrames === undefined) {
      this.#waitingFrames = []
      this.#ws.pause()
      this.#hub.turns.wait(this)
    }
    this.#waitingFrames.push({ data: data as Buffer, isBinary })
  }

  readWaiting(framesMax: number): boolean {
    const frames = this.#waitingFrames
    if (frames === undefined || this.#phase !== "serving") return false
    for (const { data, isBinary } of frames.splice(0, framesMax)) {
      // It may have been closed for the one before.
      if (this.#phase === "serving") this.#read(data, isBinary)
    }
    if (frames.length > 0) return this.#phase === "serving"
    this.#waitingFrames = undefined
    if (!this.#isFull && this.#phase === "serving") this.#ws.resume()
    return false
  }

  #read(data: Buffer, isBinary: boolean): void {
    let envelope = ""
    try {
      if (this.#hub.admission.isPressed() && this.#isRefused(data, isBinary)) return
      const frame = isBinary ? Frames.decodeBinary(data) : Frames.decodeText(data)
      if (Result.isFailure(frame)) return this.#fail(frame.failure, "")
      envelope = Frames.envelopeOf(frame.success)
      this.#handle(frame.success, envelope)
    } catch (defect) {
      this.#failByDefect(defect, envelope)
    }
  }

  ping(data: Buffer): void {
    if (!this.#controlFrame(data)) return
    if (this.hasRoom()) this.#ws.pong(data)
    // Only the newest has to be answered. A copy: what came is part of all that was read with it.
    else this.#owedPong = Buffer.from(data)
  }

  pong(data: Buffer): void {
    this.#controlFrame(data)
  }

  ended(code: number): void {
    if (this.#phase === "closed") return
    this.#phase = "closed"
    this.#giveUp()
    this.#gathered = undefined
    this.#hub.ended(this)
    connectionClosed("ws", this.#closeCode || code, this.#sentBytes)
    connectionLived("ws", this.#hub.clock() - this.#openedAt, this.#frames)
  }

  /** Writes the events of this turn. */
  flush(): void {
    const texts = this.#gathered
    if (texts === undefined) return
    this.#gathered = undefined
    this.#gatheredChars = 0
    if (this.#phase !== "serving" || this.#ws.readyState !== WebSocket.OPEN) return
    const bytes = Frames.encodeTexts(texts)
    this.#sentBytes += bytes.length
    if (this.#socket.write(bytes) || this.#socket.writableLength <= this.#hub.settings.outboundBytesMax / 2) return
    if (this.#isFull) return
    this.#isFull = true
    this.#ws.pause()
    this.#socket.once("drain", () => this.#drained())
  }

  hasRoom(): boolean {
    if (this.#gatheredChars >= gatheredCharsMax) this.flush()
    return !this.#isFull && this.#phase === "serving"
  }

  write(text: string): void {
    if (this.#phase !== "serving") return
    if (this.#gathered === undefined) {
      this.#gathered = []
      this.#hub.flushLater(this)
    }
    this.#gathered.push(text)
    this.#gatheredChars += text.length
    if (this.#isFull) this.#checkBound()
  }

  ready(session: LogicalSession): void {
    if (!session.isQueued) {
      session.isQueued = true
      this.#queue ??= []
      this.#queue.push(session)
    }
    if (!this.#isPumping && this.hasRoom()) this.#pump()
  }

  waits(bytes: number): void {
    this.#waitingBytes += bytes
    if (bytes > 0) this.#checkBound()
  }

  endSession(session: LogicalSession, code: number, reason: string): void {
    const named = session.label === ownSession ? "" : `"session":${JSON.stringify(session.label)},`
    this.write(`{"event":"session_closed",${named}"code":${code},"reason":${JSON.stringify(reason)}}`)
    this.#forget(session, code)
  }

  defect(defect: unknown): string {
    const requestId = `req_${defects++}_${this.#hub.settings.region}_${instance}`
    countDefect()
    this.#hub.run(Effect.annotateLogs(Effect.logError("Frame met a defect", defect), { request_id: requestId }))
    return requestId
  }

  /** Refuses a search before its vector is read, where it shows at once that it is one. */
  #isRefused(data: Buffer, isBinary: boolean): boolean {
    const envelope = searchEnvelope(data, isBinary)
    if (envelope === undefined) return false
    const refusal = this.#hub.admission.refusal(this.#asker, sourceOf(this.#caller, this))
    if (refusal === undefined) return false
    countRequest("ws", "search", 429, 0)
    this.write(`{"event":"error","problem":${refusalProblem(refusal)}${envelope}}`)
    return true
  }

  #isExpired(): boolean {
    const { expiresAtMillis } = this.#caller
    return expiresAtMillis !== Number.POSITIVE_INFINITY && Date.now() >= expiresAtMillis
  }

  /** Whether it is one of those that are borne. */
  #controlFrame(data: Buffer): boolean {
    if (this.#phase !== "serving") return false
    this.#heardAt = this.#hub.clock()
    this.#accountedBytes += controlFrameBytes + data.length
    this.#controlFrames += 1
    if (this.#controlFrames <= this.#hub.settings.controlFramesMax) return true
    this.close(closeCodes.rateLimited, retryReason("too many pings", 60_000))
    return false
  }

  #handle(frame: Frames.Frame, envelope: string): void {
    const type = frame["type"]
    const operation = topicFrameTypes.get(type)
    if (operation !== undefined) return this.#topic(operation, frame, envelope)
    if (!(frameTypes as ReadonlyArray<unknown>).includes(type)) {
      const got = type === undefined ? "nothing" : describe(type)
      return this.#fail(new InvalidInput({ field: "type", expected: `one of ${frameTypes.join(", ")}`, got }), envelope)
    }
    switch (type as FrameType) {
      case "search": {
        const decoded = Frames.decodeSearch(frame)
        return Result.isFailure(decoded)
          ? this.#fail(decoded.failure, envelope)
          : this.#search(decoded.success, envelope)
      }
      case "insert": {
        const decoded = Frames.decodeInsert(frame)
        return Result.isFailure(decoded)
          ? this.#fail(decoded.failure, envelope)
          : this.#insert(decoded.success, envelope)
      }
      case "cancel": {
        const decoded = Frames.decodeCancel(frame)
        if (Result.isFailure(decoded)) return this.#fail(decoded.failure, envelope)
        this.#underWay?.get(decoded.success.id)?.fiber.interruptUnsafe()
        return this.write(`{"event":"cancelled"${envelope}}`)
      }
      case "ping": {
        const decoded = Frames.decodePing(frame)
        if (Result.isFailure(decoded)) return this.#fail(decoded.failure, envelope)
        return this.write(`{"event":"pong"${envelope}}`)
      }
      case "close": {
        const decoded = Frames.decodeClose(frame)
        if (Result.isFailure(decoded)) return this.#fail(decoded.failure, envelope)
        const { session: label } = decoded.success
        const session = this.#sessions?.get(label)
        if (session !== undefined) this.#forget(session, closeCodes.normal)
        return this.write(`{"event":"closed","session":${JSON.stringify(label)}${envelope}}`)
      }
      case "credit": {
        const decoded = Frames.decodeCredit(frame)
        if (Result.isFailure(decoded)) return this.#fail(decoded.failure, envelope)
        const session = this.#session(decoded.success.session)
        return session instanceof Overloaded ? this.#fail(session, envelope) : session.credit(decoded.success.events)
      }
      default:
        return this.#subscription(frame, envelope)
    }
  }

  #subscription(frame: Frames.Frame, envelope: string): void {
    const label = Frames.decodeLabel(frame)
    if (Result.isFailure(label)) return this.#fail(label.failure, envelope)
    const session = this.#session(label.success.session)
    if (session instanceof Overloaded) return this.#fail(session, envelope)
    const limited = this.#tooOften()
    if (limited !== undefined) return this.#fail(limited, envelope)
    this.#subscriptions ??= this.#hub.subscriptions.connect(this.#caller)
    this.#subscriptions.frame(frame, session, envelope)
  }

  #search(frame: SearchFrame, envelope: string): void {
    const decoded = toQuery(frame)
    if (Result.isFailure(decoded)) return this.#fail(decoded.failure, envelope)
    const query = decoded.success
    const refusal = this.#tooOften() ?? this.#hub.access.allow(this.#caller, "read", query.collection)
    if (refusal !== undefined) return this.#fail(refusal, envelope)
    const session = this.#session(frame.session)
    if (session instanceof Overloaded) return this.#fail(session, envelope)
    const link = session.link ?? this.#hub.sessions.openUnsafe()
    if (link instanceof Overloaded) return this.#fail(link, envelope)
    session.link = link
    const isStreamed = frame.stream === true
    // Start and completion are events too.
    const events = isStreamed ? query.k + 2 : 1
    const started = this.#admit(frame.id, session, events)
    if (started !== undefined) return this.#fail(started, envelope)
    if (isStreamed) session.event(Answers.searchStart(query.queryId, envelope))
    const tail = `,"query_id":${JSON.stringify(query.queryId)}${envelope}`
    const asked = askedBy(storedQuery(this.#caller, query), this.#caller, sourceOf(this.#caller, this))
    this.#start("search", frame.id, session, events, link.search(asked), tail, (answer) =>
      session.answer(answer, tail, isStreamed)
    )
  }

  /** Frames that ask for work are counted as requests are. */
  #tooOften(): ApiError | undefined {
    return this.#hub.access.admit(this.#caller, this.#address)
  }

  #insert(frame: InsertFrame, envelope: string): void {
    const limited = this.#tooOften()
    if (limited !== undefined) return this.#fail(limited, envelope)
    const session = this.#session(frame.session)
    if (session instanceof Overloaded) return this.#fail(session, envelope)
    const refused = this.#admit(frame.id, session, 0)
    if (refused !== undefined) return this.#fail(refused, envelope)
    const records = frame.vectors.map(({ id, vector, metadata }) => ({
      id,
      vector,
      metadata: metadata === undefined ? "" : JSON.stringify(metadata)
    }))
    const insert = this.#hub.tenants
      .of(this.#caller)
      .upsert(frame.collection ?? defaultCollection, records, frame.ack, frame.idempotency_key)
    this.#start("insert", frame.id, session, 0, insert, envelope, (inserted) =>
      this.write(`{"event":"inserted","inserted":${inserted}${envelope}}`)
    )
  }

  #topic(operation: TopicOperation, frame: Frames.Frame, envelope: string): void {
    const label = Frames.decodeLabel(frame)
    if (Result.isFailure(label)) return this.#fail(label.failure, envelope)
    const limited = this.#tooOften()
    if (limited !== undefined) return this.#fail(limited, envelope)
    const session = this.#session(label.success.session)
    if (session instanceof Overloaded) return this.#fail(session, envelope)
    const { type, id, session: _, ...request } = frame
    if (id !== undefined && envelope === "") {
      return this.#fail(new InvalidInput({ field: "id", expected: "a short text", got: describe(id) }), envelope)
    }
    const key = id as string | undefined
    const refused = this.#admit(key, session, 0)
    if (refused !== undefined) return this.#fail(refused, envelope)
    const called = this.#hub.topics.call(this.#caller, operation, request)
    this.#start(`topic/${operation}`, key, session, 0, called, envelope, (answer) => {
      const members = JSON.stringify(answer).slice(1, -1)
      this.write(`{"event":"${type}"${members === "" ? "" : ","}${members}${envelope}}`)
    })
  }

  /** Counts a request as under way, or says why it may not be. */
  #admit(id: string | undefined, session: LogicalSession, events: number): ApiError | undefined {
    const { connectionSearchesMax, sessionSearchesMax } = this.#hub.settings
    if (id !== undefined && this.#underWay?.has(id)) {
      return new InvalidInput({ field: "id", expected: "an id that is not under way", got: id })
    }
    if (session.underWay >= sessionSearchesMax) {
      return new Overloaded({ bound: "sessionSearchesMax", retryAfterMillis: 100 })
    }
    if (this.#underWay !== undefined && this.#underWay.size >= connectionSearchesMax) {
      return new Overloaded({ bound: "connectionSearchesMax", retryAfterMillis: 100 })
    }
    return session.promise(events)
  }

  #start<A>(
    route: string,
    id: string | undefined,
    session: LogicalSession,
    events: number,
    effect: Effect.Effect<A, ApiError>,
    envelope: string,
    answer: (value: A) => void
  ): void {
    const started = performance.now()
    const key = id ?? this.#unnamed++
    const fiber = this.#hub.run(effect)
    this.#underWay ??= new Map()
    this.#underWay.set(key, { fiber, session })
    fiber.addObserver((exit) => {
      this.#underWay?.delete(key)
      session.release(events)
      const millis = performance.now() - started
      if (this.#phase !== "serving" || session.isEnded) return countRequest("ws", route, 499, millis)
      try {
        if (Exit.isSuccess(exit)) {
          countRequest("ws", route, 200, millis)
          return answer(exit.value)
        }
        const error = Exit.findErrorOption(exit)
        if (error._tag === "Some") return this.#fail(error.value, envelope)
        if (Exit.hasInterrupts(exit)) return countRequest("ws", route, 499, millis)
        this.#failByDefect(exit.cause, envelope)
      } catch (defect) {
        this.#failByDefect(defect, envelope)
      }
    })
  }

  /** The session of a label, made if it is new. */
  #session(label = ownSession): LogicalSession | Overloaded {
    const found = this.#sessions?.get(label)
    if (found !== undefined) return found
    this.#sessions ??= new Map()
    if (this.#sessions.size >= this.#hub.settings.sessionsPerConnection) {
      return new Overloaded({ bound: "sessionsPerConnection", retryAfterMillis: 1_000 })
    }
    const session = new LogicalSession(label, this, this.#hub.settings)
    this.#sessions.set(label, session)
    return session
  }

  /** Ends a session: what it has under way is given up, and the next frame of its label begins another. */
  #forget(session: LogicalSession, code: number): void {
    this.#sessions?.delete(session.label)
    session.end()
    this.#subscriptions?.sessionEnded(session)
    sessionClosed(code)
    if (session.link !== undefined) this.#hub.run(session.link.close)
    if (session.underWay === 0) return
    for (const request of this.#underWay?.values() ?? []) {
      if (request.session === session) request.fiber.interruptUnsafe()
    }
  }

  /** Everything that is under way or waits ends. */
  #giveUp(): void {
    this.#stopWatch()
    const requests = this.#underWay
    const sessions = this.#sessions
    this.#underWay = undefined
    this.#sessions = undefined
    this.#queue = undefined
    this.#owedPong = undefined
    this.#waitingFrames = undefined
    this.#subscriptions?.close()
    this.#subscriptions = undefined
    for (const { fiber } of requests?.values() ?? []) fiber.interruptUnsafe()
    for (const session of sessions?.values() ?? []) {
      session.end()
      if (session.link !== undefined) this.#hub.run(session.link.close)
    }
  }

  /** The client has read all that was written. */
  #drained(): void {
    this.#isFull = false
    if (this.#phase !== "serving") return
    if (this.#waitingFrames === undefined) this.#ws.resume()
    // It reads, so it is there.
    this.#heardAt = this.#hub.clock()
    this.#unfinishedSince = 0
    if (this.#owedPong !== undefined) this.#ws.pong(this.#owedPong)
    this.#owedPong = undefined
    this.#pump()
  }

  /** Lets sessions send in turn, for as long as there is room. */
  #pump(): void {
    this.#isPumping = true
    for (;;) {
      // Ended by what was sent.
      const queue = this.#queue
      if (queue === undefined || !this.hasRoom()) break
      const session = queue.shift()
      if (session === undefined) {
        this.#queue = undefined
        break
      }
      session.isQueued = false
      if (session.pump(eventsInTurn) && !session.isQueued) {
        session.isQueued = true
        queue.push(session)
      }
    }
    this.#isPumping = false
  }

  /** At `outboundBytesMax`, what is at fault ends: the session that holds most for want of credits, or the connection. */
  #checkBound(): void {
    const { outboundBytesMax } = this.#hub.settings
    while (this.#waitingBytes + this.#gatheredChars + this.#unreadBytes() > outboundBytesMax) {
      let worst: LogicalSession | undefined
      let uncredited = 0
      for (const session of this.#sessions?.values() ?? []) {
        uncredited += session.uncreditedBytes
        if (session.uncreditedBytes > (worst?.uncreditedBytes ?? 0)) worst = session
      }
      // One answer that is larger than the bound goes out if it is alone.
      if (worst !== undefined && uncredited > outboundBytesMax / 2) {
        if (uncredited === worst.uncreditedBytes && worst.waitsForOne) return
        this.endSession(worst, closeCodes.slowReader, "no credits")
      } else if (this.#isFull) {
        return this.close(closeCodes.slowReader, "reads too slowly")
      } else return
    }
  }

  #unreadBytes(): number {
    return this.#isFull ? this.#socket.writableLength : 0
  }

  #fail(error: ApiError, envelope: string): void {
    const problem = toProblem(shownError(error))
    countRequest("ws", "error", problem.status, 0)
    this.write(`{"event":"error","problem":${JSON.stringify(problem)}${envelope}}`)
  }

  #failByDefect(defect: unknown, envelope: string): void {
    this.#fail(new InternalError({ requestId: this.defect(defect) }), envelope)
  }
}

/** Characters gathered in one turn of the event loop from which on they are written before it ends. */
const gatheredCharsMax = 262_144

/** Events that a session sends in its turn, where others wait too. */
const eventsInTurn = 64

/** Bytes of a client's ping or pong beside its data. */
const controlFrameBytes = 6

let defects = 0

function onMessage(this: WebSocket, data: RawData, isBinary: boolean): void {
  ;(this as ClientSocket).connection?.message(data, isBinary)
}

function onPing(this: WebSocket, data: Buffer): void {
  ;(this as ClientSocket).connection?.ping(data)
}

function onPong(this: WebSocket, data: Buffer): void {
  ;(this as ClientSocket).connection?.pong(data)
}

/** Of the rules of WebSocket: `ws` closes with the code that says which. */
function onError(): void {}

function onClose(this: WebSocket, code: number): void {
  ;(this as ClientSocket).connection?.ended(code)
}
