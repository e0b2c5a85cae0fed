/**
 * Frames `subscribe`, `resume`, `follow`, `listen` and `unsubscribe` of WebSockets: what each session of a connection is subscribed
 * to, by the ids that its frames gave. Events go to the session's sink when that has room, and are not made before.
 */
import { Effect, Exit, type Fiber, Layer, Result } from "effect"
import { Settings } from "../config.ts"
import { type ApiError, InternalError, InvalidInput, Overloaded, toProblem } from "../protocol/Errors.ts"
import { decoderOf } from "../protocol/Fields.ts"
import { closeCodes } from "../protocol/Frames.ts"
import type { Principal } from "../protocol/Principal.ts"
import { FollowFrame, ResumeFrame, SubscribeFrame, UnsubscribeFrame } from "../protocol/Subscription.ts"
import { ListenFrame } from "../protocol/Topic.ts"
import { countDefect, countRequest } from "./Instruments.ts"
import { Pusher } from "./Pusher.ts"
import { instance } from "./Queries.ts"
import { type ConnectionSubscriptions, type SessionSink, SubscriptionFrames } from "./SessionSink.ts"
import { type Delivery, type DeliveryListener, Subscriptions } from "./Subscriptions.ts"
import { Topics } from "./Topics.ts"
import type { Frame } from "./WebSocketFrames.ts"

export const layer = Layer.effect(
  SubscriptionFrames,
  Effect.gen(function* () {
    const { region, subscriptionsPerSession } = yield* Settings
    const subscriptions = yield* Subscriptions
    const topics = yield* Topics
    const run = Effect.runForkWith(yield* Effect.context<never>())
    const hub: Hub = { region, perSessionMax: subscriptionsPerSession, subscriptions, topics, run }
    return SubscriptionFrames.of({ connect: (caller) => new Connection(hub, caller) })
  })
)

interface Hub {
  readonly region: string
  readonly perSessionMax: number
  readonly subscriptions: Subscriptions["Service"]
  readonly topics: Topics["Service"]
  readonly run: <A, E>(effect: Effect.Effect<A, E>) => Fiber.Fiber<A, E>
}

const decodeSubscribe = decoderOf(SubscribeFrame)
const decodeResume = decoderOf(ResumeFrame)
const decodeFollow = decoderOf(FollowFrame)
const decodeListen = decoderOf(ListenFrame)
const decodeUnsubscribe = decoderOf(UnsubscribeFrame)

type Begin = (listener: DeliveryListener) => Effect.Effect<Delivery, ApiError>

class Connection implements ConnectionSubscriptions {
  readonly #hub: Hub
  readonly #whose: Principal
  readonly #sessions = new Map<SessionSink, Session>()

  constructor(hub: Hub, whose: Principal) {
    this.#hub = hub
    this.#whose = whose
  }

  get size(): number {
    let size = 0
    for (const { pushers } of this.#sessions.values()) size += pushers.size
    return size
  }

  frame(frame: Frame, sink: SessionSink, envelope: string): void {
    const session = this.#sessions.get(sink) ?? new Session(sink)
    this.#sessions.set(sink, session)
    const tail = sink.label === "" ? envelope : `,"session":${JSON.stringify(sink.label)}${envelope}`
    const { subscriptions } = this.#hub
    switch (frame["type"]) {
      case "subscribe":
      case "resume": {
        const decoded: Result.Result<typeof SubscribeFrame.Type | typeof ResumeFrame.Type, InvalidInput> =
          frame["type"] === "subscribe" ? decodeSubscribe(frame) : decodeResume(frame)
        if (Result.isFailure(decoded)) return session.fail(decoded.failure, tail)
        const { type, id, session: _, ...request } = decoded.success
        return this.#begin(session, type, id, tail, (listener) =>
          subscriptions.subscribe(this.#whose, request, listener)
        )
      }
      case "follow": {
        const decoded = decodeFollow(frame)
        if (Result.isFailure(decoded)) return session.fail(decoded.failure, tail)
        const { type, id, session: _, ...request } = decoded.success
        return this.#begin(session, type, id, tail, (listener) => subscriptions.follow(this.#whose, request, listener))
      }
      case "listen": {
        const decoded = decodeListen(frame)
        if (Result.isFailure(decoded)) return session.fail(decoded.failure, tail)
        const { type, id, session: _, ...request } = decoded.success
        return this.#begin(session, type, id, tail, (listener) =>
          this.#hub.topics.listen(this.#whose, request, listener)
        )
      }
      default: {
        const decoded = decodeUnsubscribe(frame)
        if (Result.isFailure(decoded)) return session.fail(decoded.failure, tail)
        session.pushers.get(decoded.success.id)?.end()
        session.pushers.delete(decoded.success.id)
        session.answer(`{"event":"unsubscribed"${tail}}`)
      }
    }
  }

  sessionEnded(sink: SessionSink): void {
    const session = this.#sessions.get(sink)
    this.#sessions.delete(sink)
    session?.end()
  }

  close(): void {
    for (const session of this.#sessions.values()) session.end()
    this.#sessions.clear()
  }

  #begin(session: Session, route: string, id: string, tail: string, begin: Begin): void {
    const { pushers, sink } = session
    if (pushers.has(id)) {
      return session.fail(new InvalidInput({ field: "id", expected: "an id that is not subscribed", got: id }), tail)
    }
    if (pushers.size >= this.#hub.perSessionMax) {
      return session.fail(new Overloaded({ bound: "subscriptionsPerSession", retryAfterMillis: 1_000 }), tail)
    }
    const started = performance.now()
    const pusher = new Pusher({
      hasRoom: () => sink.hasRoom(),
      send: ({ open, cursor }) => void sink.send(`${open},"cursor":"${cursor}"${tail}}`),
      onDrain: (callback) => sink.onDrain(callback),
      tooSlow: () => sink.close(closeCodes.resume, "reads too slowly for a subscription")
    })
    pushers.set(id, pusher)
    const ended = (error: ApiError) => {
      if (pushers.get(id) !== pusher) return
      pushers.delete(id)
      pusher.end()
      session.fail(error, tail)
    }
    // Not interrupted where the client goes away meanwhile: what has been opened by then has to be closed.
    this.#hub.run(begin({ onReady: pusher.ready, onLost: ended })).addObserver((exit) => {
      if (Exit.isSuccess(exit)) {
        countRequest("ws", route, 200, performance.now() - started)
        return pusher.start(exit.value)
      }
      const error = Exit.findErrorOption(exit)
      if (error._tag === "Some") return ended(error.value)
      if (Exit.hasInterrupts(exit)) return
      const requestId = `req_s${(defects++).toString(36)}_${this.#hub.region}_${instance}`
      countDefect()
      this.#hub.run(
        Effect.annotateLogs(Effect.logError("A subscription met a defect", exit.cause), { request_id: requestId })
      )
      ended(new InternalError({ requestId }))
    })
  }
}

let defects = 0

/** What one session is subscribed to, by id: there, or being made. */
class Session {
  readonly sink: SessionSink
  readonly pushers = new Map<string, Pusher>()
  /** Answers that wait for room. */
  #waiting = 0

  constructor(sink: SessionSink) {
    this.sink = sink
  }

  fail(error: ApiError, tail: string): void {
    const problem = toProblem(error)
    countRequest("ws", "error", problem.status, 0)
    this.answer(`{"event":"error","problem":${JSON.stringify(problem)}${tail}}`)
  }

  /** An answer is not made anew, so it waits. */
  answer(text: string): void {
    if (this.#waiting === 0 && this.sink.send(text)) return
    if (this.#waiting >= waitingAnswersMax) return this.sink.close(closeCodes.slowReader, "reads too slowly")
    this.#waiting += 1
    this.sink.onDrain(() => {
      this.#waiting -= 1
      this.sink.send(text)
    })
  }

  end(): void {
    for (const pusher of this.pushers.values()) pusher.end()
    this.pushers.clear()
  }
}

/** Answers to frames that wait for a client that reads nothing; then its session is closed. */
const waitingAnswersMax = 64
