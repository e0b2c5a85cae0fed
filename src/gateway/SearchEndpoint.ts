/**
 * `POST /api/v1/search`, the call made most, answered on Node's request and response directly: half the main thread's work
 * of one that passes through a router and an effect for each request. `protocol/HttpApi.ts` describes it with the others.
 */
import type { IncomingMessage, ServerResponse } from "node:http"
import { Context, Effect, Exit, Layer, Result } from "effect"
import { Settings } from "../config.ts"
import { type ApiError, InternalError, toProblem } from "../protocol/Errors.ts"
import { Admission } from "../shards/Admission.ts"
import * as Answers from "./Answers.ts"
import { readJson } from "./Bodies.ts"
import { addressOf, callerOf } from "./Callers.ts"
import { countDefect, countRequest } from "./Instruments.ts"
import { problemContentType, problemHeaders } from "./Problems.ts"
import { queryOfBody } from "./Queries.ts"
import { askerOf, refuseRequest } from "./Refusals.ts"
import { askedBy, sourceOfRequest } from "./Sources.ts"
import { TenantRouter } from "./TenantRouter.ts"

export const path = "/api/v1/search"

export class SearchEndpoint extends Context.Service<
  SearchEndpoint,
  { readonly handle: (request: IncomingMessage, response: ServerResponse, requestId: string) => void }
>()("ruvector/gateway/SearchEndpoint") {
  static readonly layer = Layer.effect(
    SearchEndpoint,
    Effect.gen(function* () {
      const settings = yield* Settings
      const tenants = yield* TenantRouter
      const admission = yield* Admission
      const run = Effect.runForkWith(yield* Effect.context<never>())

      const handle = (request: IncomingMessage, response: ServerResponse, requestId: string): void => {
        const caller = callerOf(request)
        const router = tenants.of(caller)
        // Before the body is read: what is refused costs little more than its headers.
        const source = sourceOfRequest(request, caller)
        const refusal = admission.refusal(askerOf(addressOf(request), caller), source)
        if (refusal !== undefined) {
          countRequest("http", "search", 429, 0)
          return refuseRequest(request, response, requestId, refusal)
        }
        const started = performance.now()
        const answer = (status: number, headers: Record<string, string>, text: string) => {
          countRequest("http", "search", status, performance.now() - started)
          // The peer is gone, or was told already that its body came too slowly.
          if (response.destroyed || response.writableEnded) return
          // A length given beforehand lets head and body go out in one write.
          response.writeHead(status, {
            ...headers,
            "content-length": Buffer.byteLength(text),
            "x-request-id": requestId
          })
          response.end(text)
        }
        const refuse = (error: ApiError) => {
          const problem = toProblem(error)
          const headers = {
            "content-type": problemContentType,
            ...problemHeaders(error, problem, request.httpVersionMajor)
          }
          answer(problem.status, headers, JSON.stringify(problem))
        }
        readJson(request, settings, (body) => {
          const query = Result.flatMap(body, queryOfBody)
          if (Result.isFailure(query)) return refuse(query.failure)
          const fiber = run(router.search(askedBy(query.success, caller, source)))
          const onGone = () => fiber.interruptUnsafe()
          response.once("close", onGone)
          fiber.addObserver((exit) => {
            response.off("close", onGone)
            if (Exit.isSuccess(exit)) return answer(200, found, Answers.searchResponse(exit.value))
            const error = Exit.findErrorOption(exit)
            if (error._tag === "Some") return refuse(error.value)
            if (Exit.hasInterrupts(exit)) return countRequest("http", "search", 499, performance.now() - started)
            countDefect()
            run(Effect.annotateLogs(Effect.logError("Search met a defect", exit.cause), { request_id: requestId }))
            refuse(new InternalError({ requestId }))
          })
        })
      }
      return SearchEndpoint.of({ handle })
    })
  )
}

const found = { "content-type": "application/json", "cache-control": "no-store" }
