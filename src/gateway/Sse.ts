/**
 * Server-Sent Events: `GET /api/v1/stream/search`, and the subscriptions of `SseSubscriptions.ts`. An open stream holds no
 * fiber, and what waits for a slow reader is bounded: of a search by the answer it is reading, of a subscription by what
 * the socket's buffer takes.
 *
 * Every event of a search has an id, `<session>.<query>.<n>.<signature>`, the last one with `end` for its number. A client
 * that comes back with one (`Last-Event-ID`) is given what follows, as long as the session keeps the answer; else, and with
 * an id that is not one of ours, the search is run anew and begins with another `search_start`. After the last event the
 * answer is 204, which tells an `EventSource` to stop.
 */
import type { IncomingMessage, ServerResponse } from "node:http"
import { Context, Effect, Exit, Layer, Result } from "effect"
import { Settings } from "../config.ts"
import { type ApiError, InternalError, InvalidInput, MethodNotAllowed, toProblem } from "../protocol/Errors.ts"
import type { Principal } from "../protocol/Principal.ts"
import type { SearchAnswer } from "../protocol/StreamSession.ts"
import { shownError } from "../protocol/Tenant.ts"
import { Admission } from "../shards/Admission.ts"
import { Access } from "./Access.ts"
import * as Answers from "./Answers.ts"
import { addressOf, callerOf } from "./Callers.ts"
import { Cursors } from "./Cursors.ts"
import { connectionClosed, connectionOpened, countDefect, countRequest } from "./Instruments.ts"
import { problemContentType, problemHeaders } from "./Problems.ts"
import { queryOfParameters } from "./Queries.ts"
import { byeEvent, reconnectMillis } from "./Reconnects.ts"
import { askerOf, refuseRequest } from "./Refusals.ts"
import { type SessionLink, Sessions } from "./Sessions.ts"
import { askedBy, sourceOfRequest } from "./Sources.ts"
import { SseConnection } from "./SseConnection.ts"
import { errorText, followRequestOf, listenRequestOf, pusherOf, subscribeRequestOf } from "./SseSubscriptions.ts"
import { type Delivery, type DeliveryListener, Subscriptions } from "./Subscriptions.ts"
import { storedQuery } from "./TenantRouter.ts"
import { Topics } from "./Topics.ts"

export const path = "/api/v1/stream/search"
export const subscribePath = "/api/v1/stream/subscribe"
export const changesPath = "/api/v1/stream/changes"
export const topicPath = "/api/v1/stream/topic"

/** Whatever is served here. */
export const paths: ReadonlySet<string> = new Set([path, subscribePath, changesPath, topicPath])

export class Sse extends Context.Service<
  Sse,
  {
    readonly handle: (request: IncomingMessage, response: ServerResponse, requestId: string) => void
    /** Tells every open stream to come back later, and ends it. */
    readonly drain: Effect.Effect<void>
  }
>()("ruvector/gateway/Sse") {
  static readonly layer = Layer.effect(
    Sse,
    Effect.gen(function* () {
      const settings = yield* Settings
      const access = yield* Access
      const sessions = yield* Sessions
      const admission = yield* Admission
      const subscriptions = yield* Subscriptions
      const topics = yield* Topics
      const cursors = yield* Cursors
      const context = yield* Effect.context<never>()
      const run = Effect.runForkWith(context)
      const open = new Set<SseConnection>()

      const keepAlive = setInterval(
        () => {
          const now = Date.now()
          for (const stream of open) stream.keepAlive(now, settings.pingIntervalMillis, settings.idleTimeoutMillis)
        },
        Math.min(settings.pingIntervalMillis, 5_000)
      )
      keepAlive.unref()

      const drain = Effect.sync(() => {
        for (const stream of open) stream.end("drain", byeEvent(reconnectMillis(settings.reconnectSpreadMillis)))
      })
      yield* Effect.addFinalizer(() =>
        Effect.andThen(
          drain,
          Effect.sync(() => clearInterval(keepAlive))
        )
      )

      const handle = (request: IncomingMessage, response: ServerResponse, requestId: string): void => {
        const url = request.url as string
        const at = url.indexOf("?")
        const route = at === -1 ? url : url.slice(0, at)
        const refused = (error: ApiError) => refuse(response, error, requestId, routeNames.get(route) as string)
        if (request.method !== "GET") {
          return refused(new MethodNotAllowed({ method: request.method ?? "", allowed: ["GET"] }))
        }
        const caller = callerOf(request)
        const source = sourceOfRequest(request, caller)
        const refusal = admission.refusal(askerOf(addressOf(request), caller), source)
        if (refusal !== undefined) {
          countRequest("sse", routeNames.get(route) as string, 429, 0)
          return refuseRequest(request, response, requestId, refusal)
        }
        const parameters = new URLSearchParams(at === -1 ? "" : url.slice(at + 1))
        const lastEventId = request.headers["last-event-id"]
        if (route === path) return search(caller, source, parameters, textOf(lastEventId), response, requestId, refused)
        if (route === subscribePath) {
          const asked = subscribeRequestOf(parameters, textOf(lastEventId))
          if (Result.isFailure(asked)) return refused(asked.failure)
          return deliver(
            (listener) => subscriptions.subscribe(caller, asked.success, listener),
            "stream/subscribe",
            response,
            requestId,
            refused
          )
        }
        if (route === topicPath) {
          const asked = listenRequestOf(parameters, textOf(lastEventId))
          if (Result.isFailure(asked)) return refused(asked.failure)
          return deliver(
            (listener) => topics.listen(caller, asked.success, listener),
            "stream/topic",
            response,
            requestId,
            refused
          )
        }
        const asked = followRequestOf(parameters, textOf(lastEventId))
        if (Result.isFailure(asked)) return refused(asked.failure)
        deliver(
          (listener) => subscriptions.follow(caller, asked.success, listener),
          "stream/changes",
          response,
          requestId,
          refused
        )
      }

      /** The error of an effect that failed, which is logged where it is one of ours. */
      const errorOf = (exit: Exit.Failure<unknown, ApiError>, requestId: string): ApiError => {
        const error = Exit.findErrorOption(exit)
        if (error._tag === "Some") return error.value
        countDefect()
        run(Effect.annotateLogs(Effect.logError("A stream met a defect", exit.cause), { request_id: requestId }))
        return new InternalError({ requestId })
      }

      const deliver = (
        begin: (listener: DeliveryListener) => Effect.Effect<Delivery, ApiError>,
        route: string,
        response: ServerResponse,
        requestId: string,
        refused: (error: ApiError) => void
      ): void => {
        const started = performance.now()
        let stream: SseConnection | undefined
        let lost: ApiError | undefined
        const pusher = pusherOf(
          () => stream as SseConnection,
          () => byeEvent(reconnectMillis(0))
        )
        const listener = {
          onReady: pusher.ready,
          onLost: (error: ApiError) => {
            lost = error
            stream?.end("lost", errorText(error))
          }
        }
        let gone = false
        response.once("close", () => {
          gone = true
        })
        // Not interrupted where the client goes away meanwhile: what has been opened by then has to be closed.
        run(begin(listener)).addObserver((exit) => {
          if (Exit.isFailure(exit)) {
            if (!gone && !response.writableEnded) refused(errorOf(exit, requestId))
            return
          }
          if (gone || response.writableEnded || lost !== undefined) {
            exit.value.close()
            if (lost !== undefined && !gone && !response.writableEnded) refused(lost)
            return
          }
          countRequest("sse", route, 200, performance.now() - started)
          const opened = new SseConnection(response, requestId, (code, bytes) => {
            open.delete(opened)
            connectionClosed("sse", code, bytes)
            pusher.end()
          })
          stream = opened
          open.add(opened)
          connectionOpened("sse")
          pusher.start(exit.value)
        })
      }

      const search = (
        caller: Principal,
        source: string,
        parameters: URLSearchParams,
        lastEventId: string | undefined,
        response: ServerResponse,
        requestId: string,
        refused: (error: ApiError) => void
      ): void => {
        const keepOpen = parameters.get("keep_open")
        if (keepOpen !== null && keepOpen !== "true" && keepOpen !== "false") {
          return refused(new InvalidInput({ field: "keep_open", expected: "true or false", got: keepOpen }))
        }
        const query = queryOfParameters(parameters, ["keep_open"])
        if (Result.isFailure(query)) return refused(query.failure)
        const refusal = access.allow(caller, "read", query.success.collection)
        if (refusal !== undefined) return refused(refusal)

        const started = performance.now()
        const position = positionOf(lastEventId, caller, cursors)
        if (position?.event === "end" && keepOpen !== "true") {
          response.writeHead(204, { "x-request-id": requestId, "cache-control": "no-store" })
          response.end()
          return
        }
        let link: SessionLink | undefined
        const program = Effect.gen(function* () {
          link = yield* sessions.openResumable
          if (position !== undefined && position.event !== "end") {
            const kept = yield* sessions.answer(position.session, position.query)
            if (kept !== undefined) return { answer: kept, session: position.session, after: position.event }
          }
          const found = link.search(askedBy(storedQuery(caller, query.success), caller, source))
          return { answer: yield* Effect.mapError(found, shownError), session: link.id, after: -1 }
        })
        const close = () => {
          if (link !== undefined) run(link.close)
        }
        const fiber = run(program)
        let gone = false
        const onGone = () => {
          gone = true
          fiber.interruptUnsafe()
        }
        response.once("close", onGone)
        fiber.addObserver((exit) => {
          response.off("close", onGone)
          if (gone || response.writableEnded) return close()
          if (Exit.isFailure(exit)) {
            close()
            return refused(errorOf(exit, requestId))
          }
          const { answer, session, after } = exit.value
          countRequest("sse", "stream/search", 200, performance.now() - started)
          const stream = new SseConnection(response, requestId, (code, bytes) => {
            stopWatch()
            open.delete(stream)
            connectionClosed("sse", code, bytes)
            // A stream that was cut may be taken up again, so its session keeps the answer until it is passivated.
            if (link !== undefined) run(code === "end" ? link.close : link.abandon)
          })
          open.add(stream)
          connectionOpened("sse")
          const stopWatch = access.watch(caller, (error) => stream.end("unauthenticated", errorText(error)))
          const events = eventTexts(answer, session, after + 1, caller, cursors)
          pump(stream, events, () => {
            if (keepOpen !== "true") stream.end("end", "")
          })
        })
      }

      return Sse.of({ handle, drain })
    })
  )
}

const routeNames = new Map([...paths].map((one) => [one, one.replace("/api/v1/", "")]))

const textOf = (header: string | Array<string> | undefined): string | undefined =>
  typeof header === "string" ? header : undefined

/** Bytes written before it is looked at whether the client reads. */
const writeBatchBytes = 65_536

/** Writes until all is written or the socket is full; goes on when it has drained. */
const pump = (stream: SseConnection, events: Generator<string>, done: () => void): void => {
  for (;;) {
    if (stream.ended) return
    let text = ""
    let last = false
    while (text.length < writeBatchBytes && !last) {
      const next = events.next()
      if (next.done === true) last = true
      else text += next.value
    }
    const room = text === "" || stream.write(text)
    if (last) return done()
    if (!room) return stream.onDrain(() => pump(stream, events, done))
  }
}

const eventTexts = function* (
  answer: SearchAnswer,
  session: string,
  from: number,
  caller: Principal,
  { sign }: Cursors["Service"]
): Generator<string> {
  let n = 0
  const last = answer.ids.length + 1
  const signature = sign(signedText(caller, session, answer.queryId))
  for (const event of Answers.searchEvents(answer, "")) {
    if (n >= from) {
      yield `id: ${session}.${answer.queryId}.${n === last ? "end" : n}.${signature}\ndata: ${event}\n\n`
    }
    n += 1
  }
}

const signedText = (caller: Principal, session: string, query: string): string =>
  [caller.tenant, caller.id, session, query].join("\n")

const eventId = /^(s_[0-9a-z]{1,64})\.(q_[0-9a-z]{1,64})\.(\d{1,9}|end)\.([A-Za-z0-9_-]{22})$/

/** `undefined` where the id is not one of ours: nobody reads another's answer by guessing its name. */
const positionOf = (id: string | undefined, caller: Principal, { isSigned }: Cursors["Service"]) => {
  const match = id === undefined ? null : eventId.exec(id)
  if (match === null || !isSigned(signedText(caller, match[1] as string, match[2] as string), match[4] as string))
    return undefined
  const event = match[3] === "end" ? ("end" as const) : Number(match[3])
  return { session: match[1] as string, query: match[2] as string, event }
}

const refuse = (response: ServerResponse, error: ApiError, requestId: string, route: string): void => {
  const problem = toProblem(error)
  countRequest("sse", route, problem.status, 0)
  response.writeHead(problem.status, {
    "content-type": problemContentType,
    "x-request-id": requestId,
    ...problemHeaders(error, problem)
  })
  response.end(JSON.stringify(problem))
}
