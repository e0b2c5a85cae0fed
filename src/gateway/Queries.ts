/** From what arrives on a wire to the query our actors understand; the same rules on every wire. */
import { randomBytes } from "node:crypto"
import { Result } from "effect"
import { InvalidInput } from "../protocol/Errors.ts"
import { decoderOf, defaultCollection } from "../protocol/Fields.ts"
import { defaultK, type SearchFrame, SearchRequest } from "../protocol/Search.ts"
import type { SessionQuery } from "../protocol/StreamSession.ts"

/** Names of this process in ids: of requests, queries and sessions. */
export const instance: string = randomBytes(4).toString("hex")

let queries = 0

/** Unique over processes and restarts. */
export const nextQueryId = (): string => `q_${instance}${(queries++).toString(36)}`

/** A decoded search request, as a query with an id of its own. */
export const toQuery = (request: SearchRequest | SearchFrame): Result.Result<SessionQuery, InvalidInput> => {
  const { query, query_b64, query_vector_id } = request
  const given = Number(query !== undefined) + Number(query_b64 !== undefined) + Number(query_vector_id !== undefined)
  if (given !== 1) {
    return Result.fail(
      new InvalidInput({
        field: "query",
        expected: "exactly one of query, query_b64 and query_vector_id",
        got: given === 0 ? "none" : String(given)
      })
    )
  }
  const k = request.k ?? defaultK
  if (request.ef !== undefined && request.ef < k) {
    return Result.fail(new InvalidInput({ field: "ef", expected: `at least k (${k})`, got: String(request.ef) }))
  }
  const vector = query ?? query_b64
  return Result.succeed({
    queryId: nextQueryId(),
    collection: request.collection ?? defaultCollection,
    ...(vector === undefined ? { vectorId: query_vector_id as string } : { vector }),
    k,
    ef: request.ef ?? 0,
    ...(request.metric === undefined ? {} : { metric: request.metric }),
    filter: request.filter === undefined ? "" : JSON.stringify(request.filter),
    includeMetadata: request.include?.includes("metadata") ?? false,
    includeVector: request.include?.includes("vector") ?? false,
    deadlineMillis: request.deadline_ms ?? 0
  })
}

const decodeSearch = decoderOf(SearchRequest)

const searchParameters: ParameterForms = {
  collection: "text",
  query_b64: "text",
  query_vector_id: "text",
  metric: "text",
  k: "integer",
  ef: "integer",
  deadline_ms: "integer",
  filter: "json",
  include: "list"
}

/** The query of a URL's search parameters; `also` names parameters that the caller reads itself. */
export const queryOfParameters = (
  parameters: URLSearchParams,
  also: ReadonlyArray<string> = []
): Result.Result<SessionQuery, InvalidInput> =>
  objectOfParameters(parameters, searchParameters, also).pipe(Result.flatMap(decodeSearch), Result.flatMap(toQuery))

/** What each parameter is written as. */
export type ParameterForms = Readonly<Record<string, "text" | "integer" | "number" | "json" | "list">>

const forms = {
  integer: /^-?\d{1,15}$/,
  number: /^-?\d{1,15}(?:\.\d{1,20})?(?:[eE][+-]?\d{1,3})?$/
}

/** The object that a URL's parameters stand for, still to be decoded. What is no number stays a text, to be refused there. */
export const objectOfParameters = (
  parameters: URLSearchParams,
  known: ParameterForms,
  also: ReadonlyArray<string> = []
): Result.Result<Readonly<Record<string, unknown>>, InvalidInput> => {
  const request: Record<string, unknown> = {}
  for (const [key, value] of parameters) {
    if (also.includes(key)) continue
    const form = Object.hasOwn(known, key) ? known[key] : undefined
    if (form === undefined) {
      return Result.fail(new InvalidInput({ field: key, expected: "no such parameter", got: value }))
    }
    if (Object.hasOwn(request, key)) {
      return Result.fail(new InvalidInput({ field: key, expected: "one value", got: "several" }))
    }
    if (form === "integer" || form === "number") request[key] = forms[form].test(value) ? Number(value) : value
    else if (form === "list") request[key] = value.split(",")
    else if (form === "json") {
      try {
        request[key] = JSON.parse(value)
      } catch {
        return Result.fail(new InvalidInput({ field: key, expected: "JSON", got: value.slice(0, 80) }))
      }
    } else request[key] = value
  }
  return Result.succeed(request)
}

/** The query of a JSON body. */
export const queryOfBody = (body: unknown): Result.Result<SessionQuery, InvalidInput> =>
  Result.flatMap(decodeSearch(body), toQuery)
