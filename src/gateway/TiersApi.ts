/**
 * `POST /warm`, `GET /tiers` and `GET /tiers/events`: what the tiers hold, what moves between them, and warming.
 *
 * The events are Server-Sent Events with their position as id, so that `Last-Event-ID` goes on after it. They are pulled one
 * by one as the client reads: what waits for a slow one is one event, what it misses is told (`events_missed`), and one that
 * reads nothing for `idleTimeoutMillis` is cut.
 */
import type { IncomingMessage } from "node:http"
import * as NodeHttpServerRequest from "@effect/platform-node/NodeHttpServerRequest"
import { Cause, Effect, Option, Queue, Stream } from "effect"
import { type HttpServerRequest, HttpServerResponse } from "effect/http"
import { HttpApiBuilder } from "effect/http-api"
import { Settings } from "../config.ts"
import { type ApiError, InvalidInput } from "../protocol/Errors.ts"
import { decoderOf } from "../protocol/Fields.ts"
import { RoutedApi } from "../protocol/HttpApi.ts"
import type { TierEvent } from "../protocol/TierPromoter.ts"
import { WarmRequest } from "../protocol/Warming.ts"
import { Access } from "./Access.ts"
import * as Bodies from "./Bodies.ts"
import { callerOf } from "./Callers.ts"
import { connectionClosed, connectionOpened } from "./Instruments.ts"
import { problemResponse } from "./Problems.ts"
import { Promoter, promoterOf } from "./Promoter.ts"
import { Readiness } from "./Readiness.ts"

export const eventsPath = "/api/v1/tiers/events"

const decodeWarm = decoderOf(WarmRequest)

/** Handlers of the group `tiers`. */
export const group = HttpApiBuilder.group(
  RoutedApi,
  "tiers",
  Effect.fnUntraced(function* (handlers) {
    const promoter = yield* Promoter
    const access = yield* Access
    const readiness = yield* Readiness
    const settings = yield* Settings

    const viewOf = (request: HttpServerRequest.HttpServerRequest) =>
      promoterOf(promoter, access, callerOf(messageOf(request)))

    const events = Effect.fnUntraced(function* (request: HttpServerRequest.HttpServerRequest) {
      const after = yield* positionOf(request)
      // The first event is what says whether one may follow at all: asked for before the answer begins.
      const frames = yield* framesOf(viewOf(request).events(after), () => readiness.get().state === "draining", {
        pingMillis: settings.pingIntervalMillis,
        idleMillis: settings.idleTimeoutMillis,
        cut: () => messageOf(request).socket.destroy()
      })
      return HttpServerResponse.stream(Stream.encodeText(frames), {
        contentType: "text/event-stream; charset=utf-8",
        headers: { "cache-control": "no-cache", "x-accel-buffering": "no" }
      })
    })

    return handlers
      .handleRaw("warm", ({ request }) =>
        Effect.gen(function* () {
          const body = yield* Bodies.json(request, settings)
          return json(yield* viewOf(request).warm(yield* Effect.fromResult(decodeWarm(body))))
        }).pipe(failed)
      )
      .handleRaw("tiers", ({ request }) => viewOf(request).state.pipe(Effect.map(json), failed))
      .handleRaw("tierEvents", ({ request }) => events(request).pipe(failed))
  })
)

const messageOf = (request: HttpServerRequest.HttpServerRequest): IncomingMessage =>
  NodeHttpServerRequest.toIncomingMessage(request) as IncomingMessage

const json = (value: unknown) =>
  HttpServerResponse.text(JSON.stringify(value), {
    contentType: "application/json",
    headers: { "cache-control": "no-store" }
  })

const failed = Effect.catch((error: ApiError) => Effect.succeed(problemResponse(error)))

export interface FollowOptions {
  readonly pingMillis: number
  readonly idleMillis: number
  /** Ends the connection of a client that does not read. */
  readonly cut: () => void
}

/** Between two looks at whether the client reads and the node goes on. */
const lookMillis = 250

/** The frames of a followed stream of events, with comments where it is quiet; ends when the node drains. */
export const framesOf = Effect.fnUntraced(function* (
  events: Stream.Stream<TierEvent, ApiError>,
  isDraining: () => boolean,
  { pingMillis, idleMillis, cut }: FollowOptions
) {
  const queue = yield* Queue.bounded<TierEvent, ApiError | Cause.Done>(1)
  yield* Effect.forkScoped(Effect.exit(Stream.runIntoQueue(events, queue)))
  const first = frameOf(yield* Effect.catchIf(Queue.take(queue), Cause.isDone, () => Effect.never))

  let sentAt = Date.now()
  let reads = false
  let bytes = 0
  connectionOpened("tiers")
  let code = "gone"
  yield* Effect.addFinalizer(() => Effect.sync(() => connectionClosed("tiers", code, bytes)))
  const look = Effect.sync(() => {
    if (reads || Date.now() - sentAt < idleMillis) return
    code = "slow"
    cut()
  })
  yield* Effect.forkScoped(Effect.forever(Effect.andThen(Effect.sleep(lookMillis), look)))

  const next = Effect.gen(function* () {
    reads = true
    for (;;) {
      if (isDraining()) break
      const taken = yield* Effect.timeoutOption(Queue.take(queue), lookMillis)
      if (Option.isNone(taken) && Date.now() - sentAt < pingMillis) continue
      const frame = Option.isSome(taken) ? frameOf(taken.value) : ": keep-alive\n\n"
      reads = false
      sentAt = Date.now()
      bytes += frame.length
      return [frame, undefined] as const
    }
    code = "drain"
    return undefined
  }).pipe(Effect.catch(() => Effect.undefined))
  return Stream.concat(
    Stream.succeed(first),
    Stream.unfold(undefined, () => next)
  )
})

const frameOf = (event: TierEvent): string => `id: ${event.seq}\ndata: ${JSON.stringify(event)}\n\n`

/** The position of `Last-Event-ID`, or of the parameter `after`. */
const positionOf = (request: HttpServerRequest.HttpServerRequest): Effect.Effect<number | undefined, InvalidInput> => {
  const at = request.url.indexOf("?")
  const parameters = new URLSearchParams(at === -1 ? "" : request.url.slice(at + 1))
  for (const key of parameters.keys()) {
    if (key !== "after" || parameters.getAll(key).length > 1) {
      const got = parameters.getAll(key).join(", ")
      return Effect.fail(new InvalidInput({ field: key, expected: "after alone, once", got }))
    }
  }
  const text = request.headers["last-event-id"] ?? parameters.get("after")
  if (text === null) return Effect.undefined
  if (/^\d{1,15}$/.test(text)) return Effect.succeed(Number(text))
  return Effect.fail(
    new InvalidInput({ field: "after", expected: "the id of an event, an integer", got: text.slice(0, 80) })
  )
}
