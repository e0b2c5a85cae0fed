/**
 * Events that an actor of this node keeps, as Server-Sent Events with their position as id, so that `Last-Event-ID` goes on
 * after it. They are pulled one by one as the client reads: what waits for a slow one is one event, what it misses is told
 * (`events_missed`), and one that reads nothing for `idleTimeoutMillis` is cut.
 */
import type { IncomingMessage } from "node:http"
import * as NodeHttpServerRequest from "@effect/platform-node/NodeHttpServerRequest"
import { Cause, Effect, Option, Queue, Stream } from "effect"
import { type HttpServerRequest, HttpServerResponse } from "effect/http"
import type { SettingValues } from "../config.ts"
import { type ApiError, InvalidInput } from "../protocol/Errors.ts"
import { connectionClosed, connectionOpened } from "./Instruments.ts"
import type { Readiness } from "./Readiness.ts"

/** Answers a request for the events that come after a position, or from now on. */
export const follow = Effect.fnUntraced(function* (
  wire: string,
  request: HttpServerRequest.HttpServerRequest,
  eventsAfter: (position: number | undefined) => Stream.Stream<NodeEvent, ApiError>,
  readiness: Readiness["Service"],
  settings: Pick<SettingValues, "pingIntervalMillis" | "idleTimeoutMillis">
) {
  const after = yield* positionOf(request)
  // The first event is what says whether one may follow at all: asked for before the answer begins.
  const frames = yield* framesOf(wire, eventsAfter(after), () => readiness.get().state === "draining", {
    pingMillis: settings.pingIntervalMillis,
    idleMillis: settings.idleTimeoutMillis,
    cut: () => (NodeHttpServerRequest.toIncomingMessage(request) as IncomingMessage).socket.destroy()
  })
  return HttpServerResponse.stream(Stream.encodeText(frames), {
    contentType: "text/event-stream; charset=utf-8",
    headers: { "cache-control": "no-cache", "x-accel-buffering": "no" }
  })
})

export interface FollowOptions {
  readonly pingMillis: number
  readonly idleMillis: number
  /** Ends the connection of a client that does not read. */
  readonly cut: () => void
}

/** Between two looks at whether the client reads and the node goes on. */
const lookMillis = 250

/** An event of an actor of this node. */
interface NodeEvent {
  /** Its position. */
  readonly seq: number
}

/** The frames of a followed stream of events, with comments where it is quiet; ends when the node drains. `wire`: its name in metrics. */
export const framesOf = Effect.fnUntraced(function* (
  wire: string,
  events: Stream.Stream<NodeEvent, ApiError>,
  isDraining: () => boolean,
  { pingMillis, idleMillis, cut }: FollowOptions
) {
  const queue = yield* Queue.bounded<NodeEvent, ApiError | Cause.Done>(1)
  yield* Effect.forkScoped(Effect.exit(Stream.runIntoQueue(events, queue)))
  const first = frameOf(yield* Effect.catchIf(Queue.take(queue), Cause.isDone, () => Effect.never))

  let sentAt = Date.now()
  let reads = false
  let bytes = 0
  connectionOpened(wire)
  let code = "gone"
  yield* Effect.addFinalizer(() => Effect.sync(() => connectionClosed(wire, code, bytes)))
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

const frameOf = (event: NodeEvent): string => `id: ${event.seq}\ndata: ${JSON.stringify(event)}\n\n`

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
