/**
 * `GET /api/v1/stream/search`: a search as Server-Sent Events. Written on Node's response directly: an open stream holds no
 * fiber, and what waits for a slow reader is bounded by the answer it is reading.
 *
 * Every event has an id, `<session>.<query>.<n>`, the last one `<session>.<query>.end`. A client that comes back with one
 * (`Last-Event-ID`) is given what follows, as long as the session keeps the answer; else the search is run anew and begins
 * with another `search_start`. After the last event the answer is 204, which tells an `EventSource` to stop.
 */
import type { IncomingMessage, ServerResponse } from "node:http"
import { Context, Effect, Exit, Layer, Result } from "effect"
import { Settings } from "../config.ts"
import { type ApiError, InternalError, InvalidInput, MethodNotAllowed, toProblem } from "../protocol/Errors.ts"
import type { SearchAnswer } from "../protocol/StreamSession.ts"
import { Admission } from "../shards/Admission.ts"
import * as Answers from "./Answers.ts"
import { connectionClosed, connectionOpened, countDefect, countRequest } from "./Instruments.ts"
import { problemContentType, problemHeaders } from "./Problems.ts"
import { queryOfParameters } from "./Queries.ts"
import { askerOf, refuseRequest } from "./Refusals.ts"
import { type SessionLink, Sessions } from "./Sessions.ts"

export const path = "/api/v1/stream/search"

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
      const sessions = yield* Sessions
      const admission = yield* Admission
      const context = yield* Effect.context<never>()
      const run = Effect.runForkWith(context)
      const open = new Set<SseStream>()

      const keepAlive = setInterval(
        () => {
          const now = Date.now()
          for (const stream of open) stream.keepAlive(now, settings.pingIntervalMillis, settings.idleTimeoutMillis)
        },
        Math.min(settings.pingIntervalMillis, 5_000)
      )
      keepAlive.unref()

      const drain = Effect.sync(() => {
        for (const stream of open) stream.end("drain", 'retry: 1000\nevent: bye\ndata: {"event":"bye"}\n\n')
      })
      yield* Effect.addFinalizer(() =>
        Effect.andThen(
          drain,
          Effect.sync(() => clearInterval(keepAlive))
        )
      )

      const handle = (request: IncomingMessage, response: ServerResponse, requestId: string): void => {
        if (request.method !== "GET") {
          return refuse(response, new MethodNotAllowed({ method: request.method ?? "", allowed: ["GET"] }), requestId)
        }
        const refusal = admission.refusal(askerOf(request.socket.remoteAddress))
        if (refusal !== undefined) {
          countRequest("sse", "stream/search", 429, 0)
          return refuseRequest(request, response, requestId, refusal)
        }
        const url = request.url as string
        const parameters = new URLSearchParams(url.includes("?") ? url.slice(url.indexOf("?") + 1) : "")
        const keepOpen = parameters.get("keep_open")
        if (keepOpen !== null && keepOpen !== "true" && keepOpen !== "false") {
          return refuse(
            response,
            new InvalidInput({ field: "keep_open", expected: "true or false", got: keepOpen }),
            requestId
          )
        }
        const query = queryOfParameters(parameters, ["keep_open"])
        if (Result.isFailure(query)) return refuse(response, query.failure, requestId)

        const started = performance.now()
        const position = positionOf(request.headers["last-event-id"])
        if (position?.event === "end" && keepOpen !== "true") {
          response.writeHead(204, { "x-request-id": requestId, "cache-control": "no-store" })
          response.end()
          return
        }
        let link: SessionLink | undefined
        const program = Effect.gen(function* () {
          link = yield* sessions.open
          if (position !== undefined && position.event !== "end") {
            const kept = yield* sessions.answer(position.session, position.query)
            if (kept !== undefined) return { answer: kept, session: position.session, after: position.event }
          }
          return { answer: yield* link.search(query.success), session: link.id, after: -1 }
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
          if (gone) return close()
          if (Exit.isFailure(exit)) {
            close()
            const error = Exit.findErrorOption(exit)
            if (error._tag === "Some") return refuse(response, error.value, requestId)
            countDefect()
            run(
              Effect.annotateLogs(Effect.logError("Streamed search met a defect", exit.cause), {
                request_id: requestId
              })
            )
            return refuse(response, new InternalError({ requestId }), requestId)
          }
          const { answer, session, after } = exit.value
          countRequest("sse", "stream/search", 200, performance.now() - started)
          const stream = new SseStream(response, (code, bytes) => {
            open.delete(stream)
            connectionClosed("sse", code, bytes)
            // A stream that was cut may be taken up again, so its session keeps the answer until it is passivated.
            if (link !== undefined) run(code === "end" ? link.close : link.abandon)
          })
          open.add(stream)
          connectionOpened("sse")
          response.writeHead(200, {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",
            "x-request-id": requestId
          })
          stream.start(answer, session, after + 1, keepOpen === "true")
        })
      }

      return Sse.of({ handle, drain })
    })
  )
}

/** Bytes written before it is looked at whether the client reads. */
const writeBatchBytes = 65_536

class SseStream {
  readonly #response: ServerResponse
  readonly #onEnd: (code: string, bytes: number) => void
  #events: Generator<string> | undefined
  #bytes = 0
  #lastSentAt = Date.now()
  #waitingSince = 0
  #keepOpen = false
  #ended = false

  constructor(response: ServerResponse, onEnd: (code: string, bytes: number) => void) {
    this.#response = response
    this.#onEnd = onEnd
    response.on("close", () => this.#finish("gone"))
    response.on("error", () => this.#finish("gone"))
  }

  start(answer: SearchAnswer, session: string, from: number, keepOpen: boolean): void {
    this.#keepOpen = keepOpen
    this.#events = eventTexts(answer, session, from)
    this.#pump()
  }

  /** Writes until all is written or the socket is full; goes on when it has drained. */
  #pump(): void {
    while (this.#events !== undefined && !this.#ended) {
      let text = ""
      while (text.length < writeBatchBytes) {
        const next = this.#events.next()
        if (next.done === true) {
          this.#events = undefined
          break
        }
        text += next.value
      }
      if (text !== "" && !this.#write(text) && this.#events !== undefined) {
        this.#waitingSince = Date.now()
        this.#response.once("drain", () => {
          this.#waitingSince = 0
          this.#pump()
        })
        return
      }
    }
    if (!this.#keepOpen && !this.#ended) this.end("end", "")
  }

  keepAlive(now: number, pingIntervalMillis: number, idleTimeoutMillis: number): void {
    if (this.#ended) return
    const unread =
      this.#waitingSince !== 0 ? this.#waitingSince : this.#response.writableNeedDrain ? this.#lastSentAt : 0
    if (unread !== 0 && now - unread >= idleTimeoutMillis) {
      this.#finish("slow")
      this.#response.destroy()
      return
    }
    if (unread === 0 && now - this.#lastSentAt >= pingIntervalMillis) this.#write(": keep-alive\n\n")
  }

  end(code: string, last: string): void {
    if (this.#ended) return
    this.#response.end(last)
    this.#finish(code)
  }

  #write(text: string): boolean {
    this.#bytes += text.length
    this.#lastSentAt = Date.now()
    return this.#response.write(text)
  }

  #finish(code: string): void {
    if (this.#ended) return
    this.#ended = true
    this.#events = undefined
    this.#onEnd(code, this.#bytes)
  }
}

const eventTexts = function* (answer: SearchAnswer, session: string, from: number): Generator<string> {
  let n = 0
  const last = answer.ids.length + 1
  for (const event of Answers.searchEvents(answer, "")) {
    if (n >= from) yield `id: ${session}.${answer.queryId}.${n === last ? "end" : n}\ndata: ${event}\n\n`
    n += 1
  }
}

const eventId = /^(s_[0-9a-z]{1,64})\.(q_[0-9a-z]{1,64})\.(\d{1,9}|end)$/

const positionOf = (header: string | Array<string> | undefined) => {
  const match = typeof header === "string" ? eventId.exec(header) : null
  if (match === null) return undefined
  const event = match[3] === "end" ? ("end" as const) : Number(match[3])
  return { session: match[1] as string, query: match[2] as string, event }
}

const refuse = (response: ServerResponse, error: ApiError, requestId: string): void => {
  const problem = toProblem(error)
  countRequest("sse", "stream/search", problem.status, 0)
  response.writeHead(problem.status, {
    "content-type": problemContentType,
    "x-request-id": requestId,
    ...problemHeaders(error, problem)
  })
  response.end(JSON.stringify(problem))
}
