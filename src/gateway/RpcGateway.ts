/**
 * The RPC wire: the calls of `protocol/Rpcs.ts` over HTTP and WebSocket. Over HTTP one path takes both encodings and
 * answers in the one that the request's content type names; a WebSocket has no content type, so each encoding has a path.
 * Clients of `@effect/rpc` (Effect 3) have paths of their own.
 *
 * Every path is an RPC server of Effect over the same handlers.
 */
import { isUtf8 } from "node:buffer"
import { Cause, Effect, Layer, Schema } from "effect"
import { HttpRouter, HttpServerRequest, HttpServerResponse } from "effect/http"
import { RpcSerialization, RpcServer } from "effect/rpc"
import { Socket } from "effect/socket"
import { Settings } from "../config.ts"
import { type ApiError, InvalidInput, toProblem, UnsupportedMediaType } from "../protocol/Errors.ts"
import { RuvectorRpcs } from "../protocol/Rpcs.ts"
import * as Bodies from "./Bodies.ts"
import { problemHeaders, problemResponse } from "./Problems.ts"
import * as RpcCallers from "./RpcCallers.ts"
import * as RpcHandlers from "./RpcHandlers.ts"
import * as RpcSerializations from "./RpcSerializations.ts"
import * as RpcSockets from "./RpcSockets.ts"

/** The `ws` server that upgrades the wire's connections; HTTP's upgrade handler has to be made with it. */
export const webSocketServer = RpcSockets.webSocketServer
export type { RpcWebSocketServer } from "./RpcSockets.ts"

const root = "/api/v1/rpc"

const httpPaths = { current: root, effect3: `${root}/effect3` } as const

const webSocketPaths = {
  schemaBinary: `${root}/ws`,
  ndjson: `${root}/ws/ndjson`,
  effect3: `${root}/effect3/ws`
} as const

/** Paths that take `POST`, and those that are upgraded from `GET`. */
export const calls: ReadonlyArray<string> = Object.values(httpPaths)
export const webSockets: ReadonlyArray<string> = Object.values(webSocketPaths)
export const paths: ReadonlyArray<string> = [...calls, ...webSockets]

/** Routes of the RPC wire. */
export const layer = HttpRouter.use(
  Effect.fnUntraced(function* (router) {
    const settings = yield* Settings

    const body = { messageBytesMax: settings.maxBodyBytes, whole: true }
    const schemaBinary = yield* httpServer(yield* RpcSerializations.schemaBinary(body))
    const ndjson = yield* httpServer(yield* RpcSerializations.ndjson(body))
    const effect3 = yield* httpServer(yield* RpcSerializations.ndjsonEffect3(body))
    yield* router.add("POST", httpPaths.current, (request) => {
      const type = mediaTypeOf(request)
      if (type === RpcSerializations.schemaBinaryContentType) return answer(schemaBinary, request, settings)
      if (RpcSerializations.ndjsonContentTypes.includes(type)) return answer(ndjson, request, settings)
      return Effect.succeed(problemResponse(unsupported([RpcSerializations.schemaBinaryContentType, ndjsonType], type)))
    })
    yield* router.add("POST", httpPaths.effect3, (request) => {
      const type = mediaTypeOf(request)
      return RpcSerializations.ndjsonContentTypes.includes(type)
        ? answer(effect3, request, settings)
        : Effect.succeed(refusal(effect3.serialization, unsupported([ndjsonType], type)))
    })

    const message = { messageBytesMax: settings.maxFrameBytes, whole: false }
    const sockets = [
      [webSocketPaths.schemaBinary, yield* RpcSerializations.schemaBinary(message)],
      [webSocketPaths.ndjson, yield* RpcSerializations.ndjson(message)],
      [webSocketPaths.effect3, yield* RpcSerializations.ndjsonEffect3(message)]
    ] as const
    for (const [path, serialization] of sockets) {
      yield* router.add("GET", path, connection(yield* webSocketRpcServer(serialization)))
    }
  })
).pipe(Layer.provide(RpcHandlers.layer))

const ndjsonType = RpcSerializations.ndjsonContentTypes[0] as string

/** Searches are too many for a span each; the wire's counts and times are in its metrics. */
const serverOptions = { disableFatalDefects: true, disableTracing: true }

interface HttpRpcServer {
  readonly serialization: RpcSerializations.Serialization
  readonly respond: HttpEffect
}

type HttpEffect = Effect.Success<ReturnType<typeof RpcServer.makeProtocolWithHttpEffect>>["httpEffect"]

const httpServer = Effect.fnUntraced(function* (serialization: RpcSerializations.Serialization) {
  const { protocol, httpEffect } = yield* RpcServer.makeProtocolWithHttpEffect().pipe(
    Effect.provideService(RpcSerialization.RpcSerialization, serialization)
  )
  yield* serve(protocol)
  return { serialization, respond: httpEffect } satisfies HttpRpcServer
})

const webSocketRpcServer = Effect.fnUntraced(function* (serialization: RpcSerializations.Serialization) {
  const { protocol, httpEffect } = yield* RpcServer.makeProtocolWithHttpEffectWebsocket.pipe(
    Effect.provideService(RpcSerialization.RpcSerialization, serialization)
  )
  yield* serve(protocol)
  return httpEffect
})

const serve = (protocol: RpcServer.Protocol["Service"]) =>
  RpcServer.make(RuvectorRpcs, serverOptions).pipe(
    Effect.provideService(RpcServer.Protocol, goingOn(protocol)),
    Effect.forkScoped
  )

/**
 * The same protocol, on which a message that the server will not take (a second request of an id that is under way) is
 * answered. Left to the server it would end the connection, and every other call on it.
 */
const goingOn = (protocol: RpcServer.Protocol["Service"]): RpcServer.Protocol["Service"] => {
  const refused = defectIn(
    protocol.codecFor,
    new InvalidInput({
      field: "id",
      expected: "the id of no request under way on the connection",
      got: "one of a request under way"
    })
  )
  return {
    ...protocol,
    run: (write) =>
      protocol.run((clientId, message) =>
        Effect.catchCause(write(clientId, message), (cause) =>
          message._tag === "Request" && Cause.hasInterruptsOnly(cause)
            ? protocol.send(clientId, refused)
            : Effect.failCause(cause)
        )
      )
  }
}

/** An error that is the answer to no call in particular, as the message that ends all of a client's calls. */
const defectIn = (codecFor: RpcSerialization.CodecFor, error: ApiError) => {
  const defect = new Error(toProblem(error).detail)
  defect.name = error._tag
  return { _tag: "Defect", defect: Schema.encodeSync(codecFor(Schema.Defect()))(defect) } as const
}

/** An error as a response that RPC clients read: they look at the messages of a body, and not at its status. */
const refusal = (
  serialization: RpcSerializations.Serialization,
  error: ApiError
): HttpServerResponse.HttpServerResponse => {
  const problem = toProblem(error)
  const options = {
    status: problem.status,
    contentType: serialization.contentType,
    headers: problemHeaders(error, problem)
  }
  const encoded = serialization.makeUnsafe().encode(defectIn(serialization.codecFor, error)) ?? ""
  return typeof encoded === "string"
    ? HttpServerResponse.text(encoded, options)
    : HttpServerResponse.uint8Array(encoded, options)
}

const mediaTypeOf = (request: HttpServerRequest.HttpServerRequest): string =>
  (request.headers["content-type"] ?? "").split(";", 1)[0]?.trim().toLowerCase() ?? ""

const unsupported = (types: ReadonlyArray<string>, got: string) =>
  new UnsupportedMediaType({
    expected: `content-type: ${types.join(" or ")}`,
    got: got === "" ? "none" : got.slice(0, 80)
  })

/** Answers the messages of a body that is read whole, within its bounds. */
const answer = (server: HttpRpcServer, request: HttpServerRequest.HttpServerRequest, bounds: Bodies.BodyBounds) =>
  Effect.matchEffect(Bodies.bytes(request, bounds), {
    onFailure: (error) => Effect.succeed(refusal(server.serialization, error)),
    onSuccess: (bytes) =>
      server.serialization.contentType === RpcSerializations.schemaBinaryContentType || isUtf8(bytes)
        ? RpcCallers.carried(withBody(request, bytes), (carrying) =>
            Effect.provideService(server.respond, HttpServerRequest.HttpServerRequest, carrying)
          )
        : Effect.succeed(refusal(server.serialization, notUtf8))
  })

/** The same request, whose body was read already. */
const withBody = (request: HttpServerRequest.HttpServerRequest, bytes: Buffer): HttpServerRequest.HttpServerRequest =>
  Object.create(request, {
    arrayBuffer: { value: Effect.sync(() => new Uint8Array(bytes).buffer) },
    text: { value: Effect.sync(() => bytes.toString()) }
  })

const notUtf8 = new InvalidInput({ field: "", expected: "UTF-8", got: "bytes that are none" })

/** A connection, from its upgrade to its end. */
const connection = (serve: HttpEffect) => (request: HttpServerRequest.HttpServerRequest) => {
  const upgrade = request.headers["upgrade"] ?? "none"
  if (upgrade.toLowerCase() !== "websocket") {
    return Effect.succeed(
      problemResponse(new InvalidInput({ field: "upgrade", expected: "websocket", got: upgrade.slice(0, 80) }))
    )
  }
  return RpcCallers.carried(RpcSockets.bounded(request), (carrying) =>
    Effect.provideService(serve, HttpServerRequest.HttpServerRequest, carrying)
  ).pipe(
    // A client that breaks off, or breaks the rules of WebSocket and was told so by its close code, is no defect of ours.
    Effect.catchDefect((defect) =>
      Socket.isSocketError(defect) ? Effect.succeed(HttpServerResponse.empty()) : Effect.die(defect)
    )
  )
}
