/**
 * `GET /api/v1/stream/subscribe`, `/stream/changes` and `/stream/topic`: a standing query, a collection's changes and a topic's
 * messages as Server-Sent Events. Every event's id is its cursor; `Last-Event-ID`, or the parameter `cursor`, goes on after it. A
 * client's parameters have to be those that the cursor was given for.
 */
import { Result } from "effect"
import { type ApiError, type InvalidInput, toProblem } from "../protocol/Errors.ts"
import { decoderOf } from "../protocol/Fields.ts"
import { FollowRequest, SubscribeRequest } from "../protocol/Subscription.ts"
import { ListenRequest } from "../protocol/Topic.ts"
import { Pusher } from "./Pusher.ts"
import { objectOfParameters, type ParameterForms } from "./Queries.ts"
import type { SseConnection } from "./SseConnection.ts"
import type { StreamEvent } from "./StreamEvents.ts"

const standingParameters: ParameterForms = {
  collection: "text",
  query_b64: "text",
  query_vector_id: "text",
  k: "integer",
  min_score: "number",
  filter: "json",
  include: "list",
  policy: "text",
  cursor: "text"
}

const followParameters: ParameterForms = { collection: "text", from: "text", policy: "text", cursor: "text" }

const listenParameters: ParameterForms = {
  topic: "text",
  from: "text",
  subscriber: "text",
  policy: "text",
  cursor: "text"
}

const decodeSubscribe = decoderOf(SubscribeRequest)
const decodeFollow = decoderOf(FollowRequest)
const decodeListen = decoderOf(ListenRequest)

export const subscribeRequestOf = (parameters: URLSearchParams, lastEventId: string | undefined) =>
  Result.flatMap(withCursor(parameters, standingParameters, lastEventId), decodeSubscribe)

export const followRequestOf = (parameters: URLSearchParams, lastEventId: string | undefined) =>
  Result.flatMap(withCursor(parameters, followParameters, lastEventId), decodeFollow)

export const listenRequestOf = (parameters: URLSearchParams, lastEventId: string | undefined) =>
  Result.flatMap(withCursor(parameters, listenParameters, lastEventId), decodeListen)

/** A client that comes back by itself has the cursor it began with in the URL, and its newest in the header. */
const withCursor = (
  parameters: URLSearchParams,
  known: ParameterForms,
  lastEventId: string | undefined
): Result.Result<unknown, InvalidInput> =>
  Result.map(objectOfParameters(parameters, known), (request) =>
    lastEventId === undefined || lastEventId === "" ? request : { ...request, cursor: lastEventId }
  )

/** Sends a delivery's events on a stream. `bye`: the last event of one that reads too slowly, and is to come back. */
export const pusherOf = (stream: () => SseConnection, bye: () => string): Pusher =>
  new Pusher({
    hasRoom: () => stream().hasRoom(),
    send: (event) => stream().write(eventText(event)),
    onDrain: (callback) => stream().onDrain(callback),
    tooSlow: () => stream().end("slow", bye())
  })

const eventText = ({ cursor, open }: StreamEvent): string => `id: ${cursor}\ndata: ${open}}\n\n`

/** Without an id: a client that comes back does so after the last event it was given. */
export const errorText = (error: ApiError): string =>
  `data: {"event":"error","problem":${JSON.stringify(toProblem(error))}}\n\n`
