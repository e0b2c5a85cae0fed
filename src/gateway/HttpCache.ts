/**
 * HTTP caching of answers to GET and HEAD (RFC 9111, RFC 9110 section 13): what a vector and a search by URL say to caches,
 * and 304 for a client whose copy is still right. Every other answer is `no-store`.
 */
import { HttpServerResponse } from "effect/http"
import type { SettingValues } from "../config.ts"
import { type Collection, cacheStateAt } from "../protocol/Collection.ts"
import type { ApiError } from "../protocol/Errors.ts"
import { anonymous, type Principal } from "../protocol/Principal.ts"
import type { SessionQuery } from "../protocol/StreamSession.ts"
import { cacheTags } from "../shards/CacheTags.ts"
import { resultKey } from "../shards/ResultCache.ts"
import { fingerprint } from "../shards/ResultStore.ts"
import { countNotModified } from "./Instruments.ts"
import { problemResponse } from "./Problems.ts"

/** What answers to one caller say to caches. */
export interface CachePolicy {
  readonly httpCache: SettingValues["httpCache"]
  /** Whether another caller may be answered otherwise. */
  readonly varies: boolean
}

/** Answers to whoever showed a credential are that one's own, whatever the settings say. */
export const cachePolicy = (
  { httpCache }: Pick<SettingValues, "httpCache">,
  caller: Principal,
  varies: boolean
): CachePolicy => ({ httpCache: httpCache === "public" && caller !== anonymous ? "private" : httpCache, varies })

/**
 * The headers of an answer about a collection that may be kept for `seconds`; less while an invalidation that was announced
 * draws near, so that caches are empty when it takes effect. `own` is the tag of this kind of answer.
 */
export const cacheHeaders = (
  policy: CachePolicy,
  of: Collection,
  seconds: number,
  own: string
): Record<string, string> => {
  if (policy.httpCache === "off") return { "cache-control": "no-store" }
  const now = Date.now()
  const { pending_ms } = cacheStateAt(of, now)
  const age = Math.min(seconds, ...pending_ms.map((at) => Math.floor((at - now) / 1_000)))
  return { ...keptFor(policy, age), "cache-tag": cacheTags(of, own, now) }
}

/** The answer 404 of a GET; `own`: of a vector in a collection that exists. */
export const notFoundResponse = (
  policy: CachePolicy,
  seconds: number,
  error: ApiError,
  own: { readonly of: Collection; readonly tag: string } | undefined
): HttpServerResponse.HttpServerResponse => {
  const response = problemResponse(error)
  // Where a collection lives may change, and is told with another status.
  if (policy.httpCache === "off" || response.status !== 404) return response
  return HttpServerResponse.setHeaders(
    response,
    own === undefined ? keptFor(policy, seconds) : cacheHeaders(policy, own.of, seconds, own.tag)
  )
}

/**
 * Answers differ by who asks, so caches are told what says that. Not where nobody has a credential: then what is public is
 * the same for everybody, and caches that keep nothing which varies (CDNs) keep it.
 */
const keptFor = ({ httpCache, varies }: CachePolicy, seconds: number): Record<string, string> => ({
  "cache-control": `${httpCache}, max-age=${seconds}`,
  ...(varies || httpCache === "private" ? { vary: "origin, authorization, x-api-key" } : {})
})

/** Strong: the body is a function of the record's version. */
export const vectorETag = (of: Collection, version: string): string =>
  `"${of.uid}.${cacheStateAt(of, Date.now()).generation}.${version}"`

/** Weak: two answers to one query at one revision differ in `query_id` and `took_ms`. */
export const searchETag = (of: Collection, revision: string, query: SessionQuery): string =>
  `W/"${fingerprint(resultKey(of, `${cacheStateAt(of, Date.now()).generation}/${revision}`, query))}"`

/** Whether `If-None-Match` names the tag, by weak comparison; `*` is any answer. */
export const namesTag = (header: string | undefined, etag: string): boolean => {
  if (header === undefined) return false
  if (header.trim() === "*") return true
  const opaque = opaqueOf(etag)
  for (const [tag] of header.matchAll(entityTag)) if (opaqueOf(tag) === opaque) return true
  return false
}

const entityTag = /(?:W\/)?"[\x21\x23-\x7e\x80-\xff]*"/g

const opaqueOf = (tag: string): string => (tag.startsWith("W/") ? tag.slice(2) : tag)

/** 304, with the headers that the 200 would have had. */
export const notModified = (route: string, headers: Record<string, string>): HttpServerResponse.HttpServerResponse => {
  countNotModified(route)
  return HttpServerResponse.empty({ status: 304, headers })
}
