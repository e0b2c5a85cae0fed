import type { IncomingMessage } from "node:http"
import * as NodeHttpServerRequest from "@effect/platform-node/NodeHttpServerRequest"
import { Effect, Layer, Result, Scope } from "effect"
import { HttpRouter, type HttpServerRequest, HttpServerResponse } from "effect/http"
import { HttpApiBuilder, HttpApiScalar, OpenApi } from "effect/http-api"
import { Settings } from "../config.ts"
import { type Collection, CollectionRequest, InvalidateRequest } from "../protocol/Collection.ts"
import { type ApiError, InvalidInput } from "../protocol/Errors.ts"
import { CollectionName, decoderOf, defaultCollection, VectorId } from "../protocol/Fields.ts"
import { RoutedApi, RuvectorApi } from "../protocol/HttpApi.ts"
import { IdempotencyKey } from "../protocol/RequestId.ts"
import { shownCollection } from "../protocol/Tenant.ts"
import { DeleteRequest, InsertRequest, PatchRequest } from "../protocol/Writes.ts"
import { searchTag, vectorTag } from "../shards/CacheTags.ts"
import { Access } from "./Access.ts"
import * as Answers from "./Answers.ts"
import * as Bodies from "./Bodies.ts"
import { callerOf } from "./Callers.ts"
import {
  cacheHeaders,
  cachePolicy,
  namesTag,
  notFoundResponse,
  notModified,
  searchETag,
  vectorETag
} from "./HttpCache.ts"
import * as KeysApi from "./KeysApi.ts"
import { problemResponse } from "./Problems.ts"
import { queryOfParameters } from "./Queries.ts"
import { askedBy, sourceOfRequest } from "./Sources.ts"
import { TenantRouter, type TenantView } from "./TenantRouter.ts"
import * as TiersApi from "./TiersApi.ts"
import * as TopicsApi from "./TopicsApi.ts"

const decodeInsert = decoderOf(InsertRequest)
const decodeDelete = decoderOf(DeleteRequest)
const decodePatch = decoderOf(PatchRequest)
const decodeCollection = decoderOf(CollectionRequest)
const decodeInvalidate = decoderOf(InvalidateRequest)
const decodeName = decoderOf(CollectionName, "name")
const decodeCollectionParameter = decoderOf(CollectionName, "collection")
const decodeId = decoderOf(VectorId, "id")
const decodeKey = decoderOf(IdempotencyKey, "idempotency_key")

const json = (text: string, status = 200) =>
  HttpServerResponse.text(text, { status, contentType: "application/json", headers: noStore })
const kept = (text: string, headers: Record<string, string>) =>
  HttpServerResponse.text(text, { contentType: "application/json", headers })
const noStore = { "cache-control": "no-store" }
const noContent = HttpServerResponse.empty({ status: 204, headers: noStore })

const failed = Effect.catch((error: ApiError) => Effect.succeed(problemResponse(error)))

/** The router as the request's caller may use it. */
const routed = Effect.map(
  TenantRouter,
  (tenants) =>
    (request: HttpServerRequest.HttpServerRequest): TenantView =>
      tenants.of(callerOf(messageOf(request)))
)

const messageOf = (request: HttpServerRequest.HttpServerRequest): IncomingMessage =>
  NodeHttpServerRequest.toIncomingMessage(request) as IncomingMessage

const Collections = HttpApiBuilder.group(
  RoutedApi,
  "collections",
  Effect.fnUntraced(function* (handlers) {
    const routerOf = yield* routed
    const settings = yield* Settings
    return handlers
      .handleRaw("putCollection", ({ params, request }) =>
        Effect.gen(function* () {
          const name = yield* Effect.fromResult(decodeName(params.name))
          const body = yield* Bodies.json(request, settings)
          const { collection, created } = yield* routerOf(request).createCollection(
            name,
            yield* Effect.fromResult(decodeCollection(body))
          )
          return json(JSON.stringify(shownCollection(collection)), created ? 201 : 200)
        }).pipe(failed)
      )
      .handleRaw("listCollections", ({ request }) =>
        routerOf(request).collections.pipe(
          Effect.map((collections) => json(JSON.stringify({ collections: collections.map(shownCollection) }))),
          failed
        )
      )
      .handleRaw("getCollection", ({ params, request }) =>
        Effect.gen(function* () {
          const router = routerOf(request)
          const collection = yield* router.collection(yield* Effect.fromResult(decodeName(params.name)))
          return json(JSON.stringify({ ...shownCollection(collection), count: yield* router.count(collection) }))
        }).pipe(failed)
      )
      .handleRaw("invalidate", ({ params, request }) =>
        Effect.gen(function* () {
          const name = yield* Effect.fromResult(decodeName(params.name))
          const body = yield* Effect.fromResult(decodeInvalidate(yield* Bodies.json(request, settings)))
          const fault = invalidateFault(body)
          if (fault !== undefined) return yield* fault
          return json(JSON.stringify(yield* routerOf(request).invalidate(name, body)))
        }).pipe(failed)
      )
      .handleRaw("deleteCollection", ({ params, request }) =>
        Effect.fromResult(decodeName(params.name)).pipe(
          Effect.flatMap(routerOf(request).deleteCollection),
          Effect.as(noContent),
          failed
        )
      )
  })
)

const Vectors = HttpApiBuilder.group(
  RoutedApi,
  "vectors",
  Effect.fnUntraced(function* (handlers) {
    const access = yield* Access
    const routerOf = yield* routed
    const settings = yield* Settings
    return handlers
      .handleRaw("insert", ({ request }) =>
        Effect.gen(function* () {
          const { ack, collection, vectors } = yield* Effect.fromResult(
            decodeInsert(yield* Bodies.json(request, settings))
          )
          const records = vectors.map(({ id, vector, metadata }) => ({
            id,
            vector,
            metadata: metadata === undefined ? "" : JSON.stringify(metadata)
          }))
          const key = yield* idempotencyKey(request)
          const inserted = yield* routerOf(request).upsert(collection ?? defaultCollection, records, ack, key)
          return json(`{"inserted":${inserted}}`)
        }).pipe(failed)
      )
      .handleRaw("embed", ({ params, request }) =>
        Effect.gen(function* () {
          const id = yield* Effect.fromResult(decodeId(params.id))
          const name = yield* collectionParameter(request)
          const router = routerOf(request)
          const policy = cachePolicy(settings, callerOf(messageOf(request)), access.varies())
          const found = yield* Effect.result(router.get(name, id))
          if (Result.isFailure(found)) {
            const error = found.failure
            if (error._tag === "CollectionNotFound")
              return notFoundResponse(policy, settings.notFoundCacheSeconds, error, undefined)
            if (error._tag !== "VectorNotFound") return problemResponse(error)
            const of = yield* router.collection(name)
            return notFoundResponse(policy, settings.notFoundCacheSeconds, error, { of, tag: vectorTag(of, id) })
          }
          const of = yield* router.collection(name)
          const etag = vectorETag(of, found.success.version)
          const headers = { ...cacheHeaders(policy, of, settings.embedCacheSeconds, vectorTag(of, id)), etag }
          if (namesTag(request.headers["if-none-match"], etag)) return notModified("embed", headers)
          return kept(Answers.storedVector(found.success), headers)
        }).pipe(failed)
      )
      .handleRaw("updateMetadata", ({ params, request }) =>
        Effect.gen(function* () {
          const id = yield* Effect.fromResult(decodeId(params.id))
          const collection = yield* collectionParameter(request)
          const { metadata } = yield* Effect.fromResult(decodePatch(yield* Bodies.json(request, settings)))
          const key = yield* idempotencyKey(request)
          const updated = yield* routerOf(request).updateMetadata(collection, id, JSON.stringify(metadata), key)
          return json(
            `{"vector_id":${JSON.stringify(id)},"metadata":${updated.metadata || "{}"},"version":"${updated.version}"}`
          )
        }).pipe(failed)
      )
      .handleRaw("deleteVector", ({ params, request }) =>
        Effect.gen(function* () {
          const id = yield* Effect.fromResult(decodeId(params.id))
          const key = yield* idempotencyKey(request)
          yield* routerOf(request).remove(yield* collectionParameter(request), [id], key)
          return noContent
        }).pipe(failed)
      )
      .handleRaw("deleteVectors", ({ request }) =>
        Effect.gen(function* () {
          const { collection, ids } = yield* Effect.fromResult(decodeDelete(yield* Bodies.json(request, settings)))
          const key = yield* idempotencyKey(request)
          const deleted = yield* routerOf(request).remove(collection ?? defaultCollection, ids, key)
          return json(`{"deleted":${deleted}}`)
        }).pipe(failed)
      )
  })
)

const CachedSearch = HttpApiBuilder.group(
  RoutedApi,
  "cached search",
  Effect.fnUntraced(function* (handlers) {
    const routerOf = yield* routed
    const settings = yield* Settings
    const access = yield* Access
    return handlers.handleRaw("searchById", ({ request }) => {
      const router = routerOf(request)
      const message = messageOf(request)
      const caller = callerOf(message)
      const policy = cachePolicy(settings, caller, access.varies())
      const headersOf = (of: Collection) => cacheHeaders(policy, of, settings.searchCacheSeconds, searchTag(of))
      return Effect.gen(function* () {
        const named = yield* Effect.fromResult(queryOfParameters(parametersOf(request)))
        const query = askedBy(named, caller, sourceOfRequest(message, caller))
        const asked = request.headers["if-none-match"]
        if (asked?.includes('"')) {
          // A copy of an answer at the collection's present revision is right without searching again.
          const of = yield* router.collection(query.collection)
          const revision = query.metric === undefined || query.metric === of.metric ? router.revision(of) : undefined
          const etag = revision === undefined ? undefined : searchETag(of, revision, query)
          if (etag !== undefined && namesTag(asked, etag)) {
            return notModified("search", { ...headersOf(of), etag, "x-cache": "hit" })
          }
        }
        const { answer, collection, revision, cached } = yield* router.searchByUrl(query)
        const xCache = { "x-cache": cached ? "hit" : "miss" }
        if (answer.missing.length > 0) return kept(Answers.searchResponse(answer), { ...noStore, ...xCache })
        const etag = revision === undefined ? undefined : searchETag(collection, revision, query)
        const headers = { ...headersOf(collection), ...xCache, ...(etag === undefined ? {} : { etag }) }
        if (namesTag(asked, etag ?? "")) return notModified("search", headers)
        return kept(Answers.searchResponse(answer), headers)
      }).pipe(
        Effect.catchTags({
          CollectionNotFound: (error) =>
            Effect.succeed(notFoundResponse(policy, settings.notFoundCacheSeconds, error, undefined)),
          VectorNotFound: (error) =>
            Effect.map(router.collection(error.collection), (of) =>
              notFoundResponse(policy, settings.notFoundCacheSeconds, error, { of, tag: vectorTag(of, error.id) })
            )
        }),
        failed
      )
    })
  })
)

/** Routes of the REST wire, `/openapi.json` and `/docs`. */
export const layer = Layer.mergeAll(
  HttpApiBuilder.layer(RoutedApi).pipe(
    Layer.provide([Collections, Vectors, CachedSearch, TiersApi.group, TopicsApi.group, KeysApi.group])
  ),
  HttpRouter.add("GET", "/openapi.json", Effect.succeed(HttpServerResponse.jsonUnsafe(OpenApi.fromApi(RuvectorApi)))),
  HttpRouter.use(
    Effect.fnUntraced(function* (router) {
      const scope = yield* Effect.scope
      // The page's program is several megabytes: had when it is first asked for.
      const page = yield* HttpRouter.toHttpEffect(HttpApiScalar.layer(RuvectorApi, { path: "/docs" })).pipe(
        Scope.provide(scope),
        Effect.provideService(Layer.CurrentMemoMap, Layer.makeMemoMapUnsafe()),
        Effect.cached
      )
      yield* router.add("GET", "/docs", Effect.flatten(page))
    })
  )
)

const parametersOf = (request: HttpServerRequest.HttpServerRequest): URLSearchParams => {
  const at = request.url.indexOf("?")
  return new URLSearchParams(at === -1 ? "" : request.url.slice(at + 1))
}

/** The client's key of the request. Quotes around it, which a structured header has, are not of it. */
const idempotencyKey = (
  request: HttpServerRequest.HttpServerRequest
): Effect.Effect<string | undefined, InvalidInput> => {
  const given = request.headers["idempotency-key"]
  if (given === undefined) return Effect.undefined
  return Effect.fromResult(decodeKey(/^"(.*)"$/.exec(given)?.[1] ?? given))
}

const collectionParameter = (request: HttpServerRequest.HttpServerRequest): Effect.Effect<string, InvalidInput> => {
  const parameters = parametersOf(request)
  for (const key of parameters.keys()) {
    if (key !== "collection" || parameters.getAll(key).length > 1) {
      return Effect.fail(
        new InvalidInput({ field: key, expected: "collection alone, once", got: parameters.getAll(key).join(", ") })
      )
    }
  }
  const name = parameters.get("collection")
  return name === null ? Effect.succeed(defaultCollection) : Effect.fromResult(decodeCollectionParameter(name))
}

/** What of an invalidation goes with its scope. */
const invalidateFault = ({ scope, ids, notice_ms }: InvalidateRequest): InvalidInput | undefined => {
  if (scope === "ids" && ids === undefined) {
    return new InvalidInput({ field: "ids", expected: "ids with scope ids", got: "none" })
  }
  if (scope === "all" && ids !== undefined) {
    return new InvalidInput({ field: "ids", expected: "none with scope all", got: `${ids.length} ids` })
  }
  if (scope === "ids" && notice_ms !== undefined) {
    return new InvalidInput({ field: "notice_ms", expected: "none with scope ids", got: String(notice_ms) })
  }
  return undefined
}
