/** `/topics`: topics, their messages and tasks, as requests of HTTP. Listening is a stream (`Sse.ts`). */
import type { IncomingMessage } from "node:http"
import * as NodeHttpServerRequest from "@effect/platform-node/NodeHttpServerRequest"
import { Effect } from "effect"
import { type HttpServerRequest, HttpServerResponse } from "effect/http"
import { HttpApiBuilder } from "effect/http-api"
import { Settings } from "../config.ts"
import { type ApiError, InvalidInput } from "../protocol/Errors.ts"
import { describe } from "../protocol/Fields.ts"
import { type postedTopicOperations, RoutedApi } from "../protocol/HttpApi.ts"
import type { TopicOperation } from "../protocol/Topic.ts"
import * as Bodies from "./Bodies.ts"
import { callerOf } from "./Callers.ts"
import { problemResponse } from "./Problems.ts"
import { objectOfParameters } from "./Queries.ts"
import { Topics } from "./Topics.ts"

/** Handlers of the group `topics`. */
export const group = HttpApiBuilder.group(
  RoutedApi,
  "topics",
  Effect.fnUntraced(function* (handlers) {
    const topics = yield* Topics
    const settings = yield* Settings

    const call = <O extends TopicOperation>(
      request: HttpServerRequest.HttpServerRequest,
      operation: O,
      asked: object
    ) => topics.call(callerOf(messageOf(request)), operation, asked)

    /** The members of a body, which says nothing of the topic: that is in the path. */
    const bodyOf = (request: HttpServerRequest.HttpServerRequest): Effect.Effect<object, ApiError> =>
      Effect.flatMap(Bodies.json(request, settings), (body) => {
        if (typeof body !== "object" || body === null || Array.isArray(body)) {
          return Effect.fail(new InvalidInput({ field: "", expected: "a JSON object", got: describe(body) }))
        }
        return "topic" in body
          ? Effect.fail(new InvalidInput({ field: "topic", expected: "no such field", got: describe(body.topic) }))
          : Effect.succeed(body)
      })

    const posted =
      (operation: (typeof postedTopicOperations)[number]) =>
      ({
        params,
        request
      }: {
        readonly params: { readonly topic: string }
        readonly request: HttpServerRequest.HttpServerRequest
      }) =>
        bodyOf(request).pipe(
          Effect.flatMap((body) => call(request, operation, { ...body, topic: params.topic })),
          Effect.map((answer) => json(answer)),
          failed
        )

    return handlers
      .handleRaw("putTopic", ({ params, request }) =>
        bodyOf(request).pipe(
          Effect.flatMap((body) => call(request, "create", { ...body, topic: params.topic })),
          Effect.map(({ created, ...topic }) => json(topic, created ? 201 : 200)),
          failed
        )
      )
      .handleRaw("listTopics", ({ request }) =>
        call(request, "list", {}).pipe(
          Effect.map((answer) => json(answer)),
          failed
        )
      )
      .handleRaw("getTopic", ({ params, request }) =>
        call(request, "describe", { topic: params.topic }).pipe(
          Effect.map((answer) => json(answer)),
          failed
        )
      )
      .handleRaw("deleteTopic", ({ params, request }) =>
        call(request, "delete", { topic: params.topic }).pipe(
          Effect.as(HttpServerResponse.empty({ status: 204, headers: noStore })),
          failed
        )
      )
      .handleRaw("listTasks", ({ params, request }) =>
        Effect.fromResult(
          objectOfParameters(parametersOf(request), { state: "text", after: "text", limit: "integer" })
        ).pipe(
          Effect.flatMap((asked) => call(request, "tasks", { ...(asked as object), topic: params.topic })),
          Effect.map((answer) => json(answer)),
          failed
        )
      )
      .handleRaw("getTask", ({ params, request }) =>
        call(request, "task", { topic: params.topic, task_id: params.id }).pipe(
          Effect.map((answer) => json(answer)),
          failed
        )
      )
      .handleRaw("publish", posted("publish"))
      .handleRaw("acknowledge", posted("acknowledge"))
      .handleRaw("forget", posted("forget"))
      .handleRaw("enqueue", posted("enqueue"))
      .handleRaw("take", posted("take"))
      .handleRaw("extend", posted("extend"))
      .handleRaw("complete", posted("complete"))
      .handleRaw("fail", posted("fail"))
      .handleRaw("redrive", posted("redrive"))
      .handleRaw("cancel", posted("cancel"))
  })
)

const noStore = { "cache-control": "no-store" }
const json = (value: object, status = 200) =>
  HttpServerResponse.text(JSON.stringify(value), { status, contentType: "application/json", headers: noStore })

const failed = Effect.catch((error: ApiError) => Effect.succeed(problemResponse(error)))

const messageOf = (request: HttpServerRequest.HttpServerRequest): IncomingMessage =>
  NodeHttpServerRequest.toIncomingMessage(request) as IncomingMessage

const parametersOf = (request: HttpServerRequest.HttpServerRequest): URLSearchParams => {
  const at = request.url.indexOf("?")
  return new URLSearchParams(at === -1 ? "" : request.url.slice(at + 1))
}
