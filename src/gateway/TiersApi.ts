/**
 * `POST /warm`, `GET /tiers` and `GET /tiers/events`: what the tiers hold, what moves between them, and warming.
 */
import type { IncomingMessage } from "node:http"
import * as NodeHttpServerRequest from "@effect/platform-node/NodeHttpServerRequest"
import { Effect } from "effect"
import { type HttpServerRequest, HttpServerResponse } from "effect/http"
import { HttpApiBuilder } from "effect/http-api"
import { Settings } from "../config.ts"
import type { ApiError } from "../protocol/Errors.ts"
import { decoderOf } from "../protocol/Fields.ts"
import { RoutedApi } from "../protocol/HttpApi.ts"
import { WarmRequest } from "../protocol/Warming.ts"
import { Access } from "./Access.ts"
import * as Bodies from "./Bodies.ts"
import { callerOf } from "./Callers.ts"
import * as NodeEvents from "./NodeEvents.ts"
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

    return handlers
      .handleRaw("warm", ({ request }) =>
        Effect.gen(function* () {
          const body = yield* Bodies.json(request, settings)
          return json(yield* viewOf(request).warm(yield* Effect.fromResult(decodeWarm(body))))
        }).pipe(failed)
      )
      .handleRaw("tiers", ({ request }) => viewOf(request).state.pipe(Effect.map(json), failed))
      .handleRaw("tierEvents", ({ request }) =>
        NodeEvents.follow("tiers", request, viewOf(request).events, readiness, settings).pipe(failed)
      )
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
