/** Errors as HTTP responses: problem details, with the headers that belong to them. */
import { Cause, Effect, Option } from "effect"
import { HttpServerError, HttpServerResponse } from "effect/http"
import { HttpApiError } from "effect/http-api"
import {
  type ApiError,
  type Forbidden,
  InternalError,
  InvalidInput,
  MethodNotAllowed,
  type Problem,
  RouteNotFound,
  toProblem,
  type Unauthenticated
} from "../protocol/Errors.ts"
import { invalidInputOf } from "../protocol/Fields.ts"
import { countDefect } from "./Instruments.ts"

export const problemContentType = "application/problem+json"

export const problemResponse = (error: ApiError): HttpServerResponse.HttpServerResponse => {
  const problem = toProblem(error)
  return HttpServerResponse.text(JSON.stringify(problem), {
    status: problem.status,
    contentType: problemContentType,
    headers: problemHeaders(error, problem)
  })
}

/**
 * Beside the content type: never cached, when to come again, and an end to a connection whose body was not read (in HTTP/2
 * the port ends the stream instead).
 */
export const problemHeaders = (error: ApiError, problem: Problem, httpVersion = 1): Record<string, string> => ({
  "cache-control": "no-store",
  ...(problem.retry_after_ms === undefined ? {} : { "retry-after": String(Math.ceil(problem.retry_after_ms / 1_000)) }),
  ...(error._tag === "Unauthenticated" || error._tag === "Forbidden" ? { "www-authenticate": challengeOf(error) } : {}),
  ...(error._tag === "MethodNotAllowed" ? { allow: error.allowed.join(", ") } : {}),
  ...(httpVersion === 1 && (error._tag === "TooLarge" || error._tag === "UnsupportedMediaType")
    ? { connection: "close" }
    : {})
})

/** What RFC 6750 has a client told. Without a credential: only of what kind it is to be. */
const challengeOf = (error: Unauthenticated | Forbidden): string => {
  if (error._tag === "Forbidden") {
    return `Bearer realm="ruvector", error="insufficient_scope"${error.scope === "" ? "" : `, scope="${error.scope}"`}`
  }
  return error.reason === "missing" ? 'Bearer realm="ruvector"' : `Bearer realm="ruvector", error="${error.reason}"`
}

/** Methods each path of ours answers; `undefined` for a path that is not ours. */
export type MethodsOf = (path: string) => ReadonlyArray<string> | undefined

/**
 * What a request that no handler answered with a response comes to: an unknown path or method, input that the router
 * itself refused, or a defect of ours, which is logged under the request's id and told to nobody else.
 */
export const responseOfCause = (
  cause: Cause.Cause<unknown>,
  request: { readonly id: string; readonly method: string; readonly path: string },
  methodsOf: MethodsOf
): Effect.Effect<HttpServerResponse.HttpServerResponse> => {
  const error = Option.getOrUndefined(Cause.findErrorOption(cause))
  if (error instanceof HttpServerError.HttpServerError) {
    if (error.reason._tag === "RouteNotFound") {
      const allowed = methodsOf(request.path)
      if (allowed === undefined)
        return Effect.succeed(problemResponse(new RouteNotFound({ path: request.path.slice(0, 256) })))
      return Effect.succeed(problemResponse(new MethodNotAllowed({ method: request.method, allowed })))
    }
    if (error.reason._tag === "RequestParseError") {
      return Effect.succeed(problemResponse(badRequest))
    }
  }
  for (const reason of cause.reasons) {
    const defect = reason._tag === "Die" ? reason.defect : undefined
    if (HttpApiError.HttpApiSchemaError.is(defect))
      return Effect.succeed(problemResponse(invalidInputOf(defect.cause.issue)))
    // A percent-encoded path that is no UTF-8.
    if (defect instanceof URIError) return Effect.succeed(problemResponse(badRequest))
  }
  if (Cause.hasInterruptsOnly(cause)) return Effect.succeed(HttpServerResponse.empty({ status: 499 }))
  countDefect()
  return Effect.as(
    Effect.annotateLogs(Effect.logError("Request met a defect", cause), { request_id: request.id }),
    problemResponse(new InternalError({ requestId: request.id }))
  )
}

const badRequest = new InvalidInput({ field: "path", expected: "a well-formed path and query", got: "one that is not" })
