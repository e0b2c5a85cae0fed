/**
 * The REST wire but for `POST /search` (`SearchEndpoint.ts`): handlers of the `HttpApi` of `protocol/HttpApi.ts`, its OpenAPI document and a page to try it. Bodies
 * are read and decoded here, with a bound on their size and errors that name the field; answers are written as text.
 */
import type { IncomingMessage } from "node:http"
import * as NodeHttpServerRequest from "@effect/platform-node/NodeHttpServerRequest"
import { Effect, Layer, Scope } from "effect"
import { HttpRouter, type HttpServerRequest, HttpServerResponse } from "effect/http"
import { HttpApiBuilder, HttpApiScalar, OpenApi } from "effect/http-api"
import { Settings } from "../config.ts"
import { CollectionRequest } from "../protocol/Collection.ts"
import { type ApiError, InvalidInput, type TooLarge, type UnsupportedMediaType } from "../protocol/Errors.ts"
import { CollectionName, decoderOf, defaultCollection, VectorId } from "../protocol/Fields.ts"
import { DeleteRequest, InsertRequest, PatchRequest, RoutedApi, RuvectorApi } from "../protocol/HttpApi.ts"
import { Router } from "../shards/Router.ts"
import * as Answers from "./Answers.ts"
import * as Bodies from "./Bodies.ts"
import { problemResponse } from "./Problems.ts"
import { queryOfParameters } from "./Queries.ts"
import * as TiersApi from "./TiersApi.ts"

const decodeInsert = decoderOf(InsertRequest)
const decodeDelete = decoderOf(DeleteRequest)
const decodePatch = decoderOf(PatchRequest)
const decodeCollection = decoderOf(CollectionRequest)
const decodeName = decoderOf(CollectionName, "name")
const decodeCollectionParameter = decoderOf(CollectionName, "collection")
const decodeId = decoderOf(VectorId, "id")

const json = (text: string, status = 200) =>
  HttpServerResponse.text(text, { status, contentType: "application/json", headers: noStore })
const noStore = { "cache-control": "no-store" }
const noContent = HttpServerResponse.empty({ status: 204 })

const failed = Effect.catch((error: ApiError) => Effect.succeed(problemResponse(error)))

const Collections = HttpApiBuilder.group(
  RoutedApi,
  "collections",
  Effect.fnUntraced(function* (handlers) {
    const router = yield* Router
    const { maxBodyBytes } = yield* Settings
    return handlers
      .handleRaw("putCollection", ({ params, request }) =>
        Effect.gen(function* () {
          const name = yield* Effect.fromResult(decodeName(params.name))
          const body = yield* readJson(request, maxBodyBytes)
          const { collection, created } = yield* router.createCollection(
            name,
            yield* Effect.fromResult(decodeCollection(body))
          )
          return json(JSON.stringify(collection), created ? 201 : 200)
        }).pipe(failed)
      )
      .handleRaw("listCollections", () =>
        router.collections.pipe(
          Effect.map((collections) => json(JSON.stringify({ collections }))),
          failed
        )
      )
      .handleRaw("getCollection", ({ params }) =>
        Effect.gen(function* () {
          const collection = yield* router.collection(yield* Effect.fromResult(decodeName(params.name)))
          return json(JSON.stringify({ ...collection, count: yield* router.count(collection) }))
        }).pipe(failed)
      )
      .handleRaw("deleteCollection", ({ params }) =>
        Effect.fromResult(decodeName(params.name)).pipe(
          Effect.flatMap(router.deleteCollection),
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
    const router = yield* Router
    const { maxBodyBytes } = yield* Settings
    return handlers
      .handleRaw("insert", ({ request }) =>
        Effect.gen(function* () {
          const { ack, collection, vectors } = yield* Effect.fromResult(
            decodeInsert(yield* readJson(request, maxBodyBytes))
          )
          const records = vectors.map(({ id, vector, metadata }) => ({
            id,
            vector,
            metadata: metadata === undefined ? "" : JSON.stringify(metadata)
          }))
          const inserted = yield* router.upsert(collection ?? defaultCollection, records, ack)
          return json(`{"inserted":${inserted}}`)
        }).pipe(failed)
      )
      .handleRaw("embed", ({ params, request }) =>
        Effect.gen(function* () {
          const id = yield* Effect.fromResult(decodeId(params.id))
          const record = yield* router.get(yield* collectionParameter(request), id)
          return json(Answers.storedVector(record))
        }).pipe(failed)
      )
      .handleRaw("updateMetadata", ({ params, request }) =>
        Effect.gen(function* () {
          const id = yield* Effect.fromResult(decodeId(params.id))
          const collection = yield* collectionParameter(request)
          const { metadata } = yield* Effect.fromResult(decodePatch(yield* readJson(request, maxBodyBytes)))
          const updated = yield* router.updateMetadata(collection, id, JSON.stringify(metadata))
          return json(
            `{"vector_id":${JSON.stringify(id)},"metadata":${updated.metadata || "{}"},"version":"${updated.version}"}`
          )
        }).pipe(failed)
      )
      .handleRaw("deleteVector", ({ params, request }) =>
        Effect.gen(function* () {
          const id = yield* Effect.fromResult(decodeId(params.id))
          yield* router.remove(yield* collectionParameter(request), [id])
          return noContent
        }).pipe(failed)
      )
      .handleRaw("deleteVectors", ({ request }) =>
        Effect.gen(function* () {
          const { collection, ids } = yield* Effect.fromResult(decodeDelete(yield* readJson(request, maxBodyBytes)))
          const deleted = yield* router.remove(collection ?? defaultCollection, ids)
          return json(`{"deleted":${deleted}}`)
        }).pipe(failed)
      )
  })
)

const CachedSearch = HttpApiBuilder.group(
  RoutedApi,
  "cached search",
  Effect.fnUntraced(function* (handlers) {
    const router = yield* Router
    return handlers.handleRaw("searchById", ({ request }) =>
      Effect.fromResult(queryOfParameters(parametersOf(request))).pipe(
        Effect.flatMap(router.search),
        Effect.map((answer) => json(Answers.searchResponse(answer))),
        failed
      )
    )
  })
)

/** Routes of the REST wire, `/openapi.json` and `/docs`. */
export const layer = Layer.mergeAll(
  HttpApiBuilder.layer(RoutedApi).pipe(Layer.provide([Collections, Vectors, CachedSearch, TiersApi.group])),
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

/** The JSON body of a request, of at most `maxBytes`. */
const readJson = (
  request: HttpServerRequest.HttpServerRequest,
  maxBytes: number
): Effect.Effect<unknown, TooLarge | UnsupportedMediaType | InvalidInput> =>
  Effect.callback((resume) =>
    Bodies.readJson(NodeHttpServerRequest.toIncomingMessage(request) as IncomingMessage, maxBytes, (body) =>
      resume(Effect.fromResult(body))
    )
  )
