/**
 * The wires behind the port. Four are taken before Effect sees them: streams of events and WebSockets, because they are held
 * open by the thousand, searches, because they are most of what comes, and gRPC, which has streams of its own. Everything
 * else is an `HttpRouter` of Effect.
 *
 * Shutting down: no new connections, readiness off, streams told to come back elsewhere, open requests given
 * `drainMillis`, then the rest is cut.
 */
import type { ServerResponse } from "node:http"
import * as NodeHttpServer from "@effect/platform-node/NodeHttpServer"
import * as NodeHttpServerRequest from "@effect/platform-node/NodeHttpServerRequest"
import { Context, Effect, Layer, Option, Scope } from "effect"
import { HttpRouter, HttpServerRequest, HttpServerResponse } from "effect/http"
import { OpenApi } from "effect/http-api"
import { Settings } from "../config.ts"
import { RuvectorApi } from "../protocol/HttpApi.ts"
import { ClientAddresses } from "./ClientAddresses.ts"
import { GrpcHandler, grpcStatus, refuseGrpc } from "./GrpcHandler.ts"
import { countRefusal, countRequest } from "./Instruments.ts"
import * as OnePort from "./OnePort.ts"
import * as Operations from "./Operations.ts"
import { Origins, refuseUpgrade } from "./Origins.ts"
import { responseOfCause } from "./Problems.ts"
import { instance } from "./Queries.ts"
import { rawProblems } from "./RawProblems.ts"
import { Readiness } from "./Readiness.ts"
import * as RestApi from "./RestApi.ts"
import * as RpcGateway from "./RpcGateway.ts"
import * as SearchEndpoint from "./SearchEndpoint.ts"
import * as Sse from "./Sse.ts"
import * as WebSocketGateway from "./WebSocketGateway.ts"

export class HttpGateway extends Context.Service<
  HttpGateway,
  {
    readonly host: string
    /** The port listened on, also where a free one was asked for. */
    readonly port: number
  }
>()("ruvector/gateway/HttpGateway") {
  static readonly layer = Layer.effect(
    HttpGateway,
    Effect.gen(function* () {
      const settings = yield* Settings
      const readiness = yield* Readiness
      const sse = yield* Sse.Sse
      const search = yield* SearchEndpoint.SearchEndpoint
      const webSockets = yield* WebSocketGateway.WebSocketGateway
      // Requests under way live in a scope of their own, which is closed after the drain below has waited for them.
      const handlers = yield* Scope.fork(yield* Effect.scope, "parallel")

      const app = yield* HttpRouter.toHttpEffect(Layer.mergeAll(RestApi.layer, Operations.layer, RpcGateway.layer))
      const answered = Effect.gen(function* () {
        const request = yield* HttpServerRequest.HttpServerRequest
        const started = performance.now()
        const id = NodeHttpServerRequest.toIncomingMessage(request).headers[requestIdHeader] as string
        const path = pathOf(request.url)
        const response = yield* Effect.catchCause(app, (cause) =>
          responseOfCause(cause, { id, method: request.method, path }, methodsOf)
        )
        countRequest("http", routeOf(path), response.status, performance.now() - started)
        return HttpServerResponse.setHeader(response, "x-request-id", id)
      })
      const handler = yield* NodeHttpServer.makeHandler(answered, { scope: handlers })
      const rpcSockets = yield* RpcGateway.webSocketServer
      const upgrade = yield* NodeHttpServer.makeUpgradeHandler(Effect.succeed(rpcSockets), answered, {
        scope: handlers
      })

      const grpc = yield* Effect.serviceOption(GrpcHandler)

      let requests = 0
      const nextRequestId = () => `req_${instance}${(requests++).toString(36)}_${settings.region}_${instance}`
      const origins = new Origins(settings.corsOrigins, settings.host)
      let draining = false
      const port = yield* OnePort.make(settings, yield* ClientAddresses, {
        onRequest: (request, response) => {
          const id = nextRequestId()
          if (origins.answered(request, response, id)) return countRequest("http", "origin", response.statusCode, 0)
          const path = pathOf(request.url as string)
          if (draining && path.startsWith(streamPaths)) return refuseDraining(response, id)
          if (Sse.paths.has(path)) return sse.handle(request, response, id)
          if (path === SearchEndpoint.path && request.method === "POST") return search.handle(request, response, id)
          // Handed on in the request, where the Effect side reads it; a client's own is not taken over.
          request.headers[requestIdHeader] = id
          handler(request, response)
        },
        onUpgrade: (request, socket, head) => {
          socket.on("error", () => {})
          const refused = origins.refusal(request)
          if (refused !== undefined) return refuseUpgrade(socket, refused)
          if (draining) return socket.end(rawProblems.shuttingDown.text)
          if (pathOf(request.url as string) === WebSocketGateway.path) {
            return webSockets.handleUpgrade(request, socket, head)
          }
          request.headers[requestIdHeader] = nextRequestId()
          upgrade(request, socket, head)
        },
        onGrpc: (stream, headers) => {
          if (draining) return refuseGrpc(stream, grpcStatus.unavailable, "This node is shutting down.")
          if (Option.isSome(grpc)) return grpc.value.handleStream(stream, headers)
          refuseGrpc(stream, grpcStatus.unimplemented, "This server has no gRPC.")
        },
        onRefused: countRefusal
      })

      yield* Effect.addFinalizer(() =>
        Effect.gen(function* () {
          const until = Date.now() + settings.drainMillis
          readiness.set({ state: "draining" })
          yield* Effect.sleep(Math.min(settings.drainNoticeMillis, settings.drainMillis))
          draining = true
          port.drain()
          yield* sse.drain
          yield* webSockets.drain
          yield* Effect.sync(() => rpcSockets.drain())
          if (Option.isSome(grpc)) yield* grpc.value.drain
          while (port.connections() > 0 && Date.now() < until) {
            port.closeIdle()
            yield* Effect.sleep(20)
          }
        })
      )
      return HttpGateway.of({ host: settings.host, port: port.address.port })
    })
  ).pipe(
    Layer.provide([
      ClientAddresses.layer,
      Sse.Sse.layer,
      SearchEndpoint.SearchEndpoint.layer,
      WebSocketGateway.WebSocketGateway.layer
    ]),
    Layer.provide(NodeHttpServer.layerHttpServices)
  )
}

/** Below it are streams that are held open. */
const streamPaths = "/api/v1/stream/"

const refuseDraining = (response: ServerResponse, requestId: string): void => {
  const { status, contentType, body } = rawProblems.shuttingDown
  countRequest("http", "draining", status, 0)
  response.writeHead(status, { "content-type": contentType, "retry-after": "1", "x-request-id": requestId })
  response.end(body)
}

const requestIdHeader = "x-ruvector-request-id"

const pathOf = (url: string): string => {
  const at = url.indexOf("?")
  return at === -1 ? url : url.slice(0, at)
}

/** Path patterns of ours and their methods, from the OpenAPI document and the routes beside it. */
const patterns: ReadonlyArray<{
  readonly route: string
  readonly pattern: RegExp
  readonly methods: ReadonlyArray<string>
}> = [
  ...Object.entries(OpenApi.fromApi(RuvectorApi).paths).map(([path, operations]) => ({
    route: path.replace("/api/v1/", ""),
    pattern: new RegExp(`^${path.replace(/\{[^}]+\}/g, "[^/]+")}$`),
    methods: Object.keys(operations).map((method) => method.toUpperCase())
  })),
  ...[
    "/",
    "/docs",
    "/openapi.json",
    "/metrics",
    "/health/live",
    "/health/ready",
    ...Sse.paths,
    WebSocketGateway.path
  ].map((path) => ({ route: path.replace("/api/v1/", ""), pattern: new RegExp(`^${path}$`), methods: ["GET"] })),
  ...RpcGateway.paths.map((path) => ({
    route: path.replace("/api/v1/", ""),
    pattern: new RegExp(`^${path}$`),
    methods: path.includes("/ws") ? ["GET"] : ["POST"]
  }))
]

const methodsOf = (path: string): ReadonlyArray<string> | undefined => {
  const methods = patterns.filter(({ pattern }) => pattern.test(path)).flatMap((one) => one.methods)
  return methods.length === 0 ? undefined : methods
}

/** A path's pattern, as a label of metrics: one of a fixed few. */
const routeOf = (path: string): string => {
  const direct = routes.get(path)
  if (direct !== undefined) return direct
  return patterns.find(({ pattern }) => pattern.test(path))?.route ?? "unknown"
}
const routes = new Map(
  patterns.map(({ route, pattern }) => [pattern.source.slice(1, -1).replaceAll("\\/", "/"), route])
)
