/**
 * The REST wire: handlers of the `HttpApi` of `protocol/HttpApi.ts`, its OpenAPI document and a page to try it. Bodies
 * are read and decoded here, with a bound on their size and errors that name the field; answers are written as text.
 */
import type { IncomingMessage } from "node:http"
import * as NodeHttpServerRequest from "@effect/platform-node/NodeHttpServerRequest"
import { Effect, Layer, Result } from "effect"
import { type HttpServerRequest, HttpServerResponse } from "effect/http"
import { HttpApiBuilder, HttpApiScalar } from "effect/http-api"
import { Settings } from "../config.ts"
import { CollectionRequest } from "../protocol/Collection.ts"
import { type ApiError, InvalidInput, TooLarge, UnsupportedMediaType } from "../protocol/Errors.ts"
import { CollectionName, decoderOf, defaultCollection, VectorId } from "../protocol/Fields.ts"
import { DeleteRequest, InsertRequest, PatchRequest, RuvectorApi } from "../protocol/HttpApi.ts"
import { Router } from "../shards/Router.ts"
import * as Answers from "./Answers.ts"
import { problemResponse } from "./Problems.ts"
import { queryOfBody, queryOfParameters } from "./Queries.ts"

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
  RuvectorApi,
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
  RuvectorApi,
  "vectors",
  Effect.fnUntraced(function* (handlers) {
    const router = yield* Router
    const { maxBodyBytes } = yield* Settings
    return handlers
      .handleRaw("insert", ({ request }) =>
        Effect.gen(function* () {
          const { collection, vectors } = yield* Effect.fromResult(decodeInsert(yield* readJson(request, maxBodyBytes)))
          const records = vectors.map(({ id, vector, metadata }) => ({
            id,
            vector,
            metadata: metadata === undefined ? "" : JSON.stringify(metadata)
          }))
          const inserted = yield* router.upsert(collection ?? defaultCollection, records)
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

const Search = HttpApiBuilder.group(
  RuvectorApi,
  "search",
  Effect.fnUntraced(function* (handlers) {
    const router = yield* Router
    const { maxBodyBytes } = yield* Settings
    return handlers
      .handleRaw("search", ({ request }) =>
        readJson(request, maxBodyBytes).pipe(
          Effect.flatMap((body) => Effect.fromResult(queryOfBody(body))),
          Effect.flatMap(router.search),
          Effect.map((answer) => json(Answers.searchResponse(answer))),
          failed
        )
      )
      .handleRaw("searchById", ({ request }) =>
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
  HttpApiBuilder.layer(RuvectorApi, { openapiPath: "/openapi.json" }).pipe(
    Layer.provide([Collections, Vectors, Search])
  ),
  HttpApiScalar.layer(RuvectorApi, { path: "/docs" })
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

/** Reads a JSON body of at most `maxBytes`. A larger one is not read to its end: its connection is closed. */
const readJson = (
  request: HttpServerRequest.HttpServerRequest,
  maxBytes: number
): Effect.Effect<unknown, TooLarge | UnsupportedMediaType | InvalidInput> => {
  const type = request.headers["content-type"]
  if (type !== undefined && !/^application\/(?:[a-z0-9.+-]+\+)?json\s*(?:;|$)/i.test(type)) {
    return Effect.fail(new UnsupportedMediaType({ expected: "content-type: application/json", got: type.slice(0, 80) }))
  }
  const encoding = request.headers["content-encoding"]
  if (encoding !== undefined && encoding !== "identity") {
    return Effect.fail(new UnsupportedMediaType({ expected: "a body that is not encoded", got: encoding.slice(0, 80) }))
  }
  return Effect.flatMap(
    readBody(NodeHttpServerRequest.toIncomingMessage(request) as IncomingMessage, maxBytes),
    (body) => Effect.fromResult(parseJson(body))
  )
}

const readBody = (message: IncomingMessage, maxBytes: number): Effect.Effect<Buffer, TooLarge | InvalidInput> =>
  Effect.callback((resume) => {
    const tooLarge = () => {
      message.pause()
      resume(Effect.fail(new TooLarge({ what: "body", limitBytes: maxBytes })))
    }
    if (Number(message.headers["content-length"] ?? 0) > maxBytes) return tooLarge()
    let first: Buffer | undefined
    let more: Array<Buffer> | undefined
    let bytes = 0
    const onData = (chunk: Buffer) => {
      bytes += chunk.length
      if (bytes > maxBytes) {
        stop()
        return tooLarge()
      }
      if (first === undefined) first = chunk
      else if (more === undefined) more = [first, chunk]
      else more.push(chunk)
    }
    const onEnd = () => {
      stop()
      resume(Effect.succeed(more === undefined ? (first ?? Buffer.alloc(0)) : Buffer.concat(more)))
    }
    const onError = () => {
      stop()
      resume(
        Effect.fail(
          new InvalidInput({ field: "", expected: "a whole body", got: "a connection cut in the middle of it" })
        )
      )
    }
    const stop = () => {
      message.off("data", onData)
      message.off("end", onEnd)
      message.off("error", onError)
      message.off("close", onError)
    }
    message.on("data", onData)
    message.on("end", onEnd)
    message.on("error", onError)
    message.on("close", onError)
  })

const utf8 = new TextDecoder("utf-8", { fatal: true })

const parseJson = (body: Buffer): Result.Result<unknown, InvalidInput> => {
  try {
    // `toString` is fast and lenient; only text it had to mend is looked at by the strict decoder.
    const text = body.toString("utf8")
    return Result.succeed(JSON.parse(text.includes("\ufffd") ? utf8.decode(body) : text))
  } catch (error) {
    const got = body.length === 0 ? "an empty body" : (error as Error).message.slice(0, 120)
    return Result.fail(new InvalidInput({ field: "", expected: "a JSON body in UTF-8", got }))
  }
}
