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
import { Context, Effect, Layer, Scope } from "effect"
import { HttpRouter, HttpServerRequest, HttpServerResponse } from "effect/http"
import { OpenApi } from "effect/http-api"
import { Settings } from "../config.ts"
import { StorageUnavailable } from "../protocol/Errors.ts"
import { RuvectorApi } from "../protocol/HttpApi.ts"
import { overloadedBy, Shedding } from "../shards/Shedding.ts"
import { addressOf, Callers, callerOf } from "./Callers.ts"
import { ClientAddresses } from "./ClientAddresses.ts"
import * as ClusterApi from "./ClusterApi.ts"
import { GrpcHandler } from "./GrpcHandler.ts"
import { countRefusal, countRequest } from "./Instruments.ts"
import * as OnePort from "./OnePort.ts"
import * as Operations from "./Operations.ts"
import { Origins, refusePage } from "./Origins.ts"
import { responseOfCause } from "./Problems.ts"
import { instance } from "./Queries.ts"
import { type RawProblem, rawProblems } from "./RawProblems.ts"
import { Readiness } from "./Readiness.ts"
import { askerOf, refuseRequest, refuseUpgrade } from "./Refusals.ts"
import { RejectedConnections } from "./RejectedConnections.ts"
import * as RestApi from "./RestApi.ts"
import * as RpcGateway from "./RpcGateway.ts"
import * as SearchEndpoint from "./SearchEndpoint.ts"
import * as Sse from "./Sse.ts"
import * as TiersApi from "./TiersApi.ts"
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
      const shedding = yield* Shedding
      const sse = yield* Sse.Sse
      const search = yield* SearchEndpoint.SearchEndpoint
      const webSockets = yield* WebSocketGateway.WebSocketGateway
      const grpc = yield* GrpcHandler
      const callers = yield* Callers
      // Requests under way live in a scope of their own, which is closed after the drain below has waited for them.
      const handlers = yield* Scope.fork(yield* Effect.scope, "parallel")

      const app = yield* HttpRouter.toHttpEffect(
        Layer.mergeAll(RestApi.layer, Operations.layer, ClusterApi.layer, RpcGateway.layer)
      )
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

      let requests = 0
      const nextRequestId = () => `req_${instance}${(requests++).toString(36)}_${settings.region}_${instance}`
      const origins = new Origins(settings.corsOrigins, settings.host)
      const rejected = new RejectedConnections(shedding)
      const addresses = yield* ClientAddresses
      const servesClients = settings.role !== "runner"
      let draining = false
      const port = yield* OnePort.make(settings, addresses, {
        onConnection: (socket) => rejected.opened(socket),
        onRequest: (request, response) => {
          const id = nextRequestId()
          if (origins.answered(request, response, id)) return countRequest("http", "origin", response.statusCode, 0)
          const path = pathOf(request.url as string)
          if (draining && path.startsWith(streamPaths)) {
            return refuseRaw(response, id, rawProblems.shuttingDown, "draining")
          }
          const isOperators = operatorPaths.has(path)
          if (!isOperators && !servesClients) return refuseRaw(response, id, rawProblems.notGateway, "role")
          const refusal = isOperators ? undefined : rejected.refusal(request.socket)
          if (refusal !== undefined) {
            countRequest("http", "connection", 503, 0)
            return refuseRequest(request, response, id, refusal, 503)
          }
          callers.request(request, response, id, path, () => {
            if (Sse.paths.has(path)) return sse.handle(request, response, id)
            if (path === SearchEndpoint.path && request.method === "POST") return search.handle(request, response, id)
            // Calls of RPC are refused one by one.
            const shed =
              isOperators || rpcPaths.has(path)
                ? undefined
                : shedding.refusal(askerOf(addressOf(request), callerOf(request)))
            if (shed !== undefined) {
              countRequest("http", routeOf(path), 429, 0)
              return refuseRequest(request, response, id, shed)
            }
            // Handed on in the request, where the Effect side reads it; a client's own is not taken over.
            request.headers[requestIdHeader] = id
            handler(request, response)
          })
        },
        onUpgrade: (request, socket, head) => {
          socket.on("error", () => {})
          const refused = origins.refusal(request)
          if (refused !== undefined) return refusePage(socket, refused)
          if (draining) return socket.end(rawProblems.shuttingDown.text)
          if (!servesClients) return socket.end(rawProblems.notGateway.text)
          const refusal = rejected.refusal(request.socket)
          if (refusal !== undefined) {
            countRequest("http", "connection", 503, 0)
            return refuseUpgrade(socket, refusal)
          }
          const path = pathOf(request.url as string)
          callers.upgrade(request, socket, path, () => {
            if (path === WebSocketGateway.path) return webSockets.handleUpgrade(request, socket, head)
            request.headers[requestIdHeader] = nextRequestId()
            upgrade(request, socket, head)
          })
        },
        onGrpc: (stream, headers, onBytes) => {
          const { socket } = stream.session ?? {}
          const isHealth = headers[":path"]?.startsWith("/grpc.health.v1.Health/") ?? false
          const refusal = isHealth
            ? undefined
            : (rejected.refusal(socket ?? {}) ?? shedding.refusal(askerOf(addresses.streamAddress(stream, headers))))
          if (refusal !== undefined) return grpc.refuse(stream, overloadedBy(refusal))
          if (!isHealth && !servesClients) return grpc.refuse(stream, notGateway)
          grpc.handleStream(stream, headers, onBytes)
        },
        onRefused: countRefusal
      })
      yield* shedding.joinConnections({
        count: port.connections,
        closeIdle: webSockets.closeIdle
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
          yield* grpc.drain
          while (port.connections() > 0 && Date.now() < until) {
            port.closeIdle()
            yield* Effect.sleep(20)
          }
        })
      )
      const shown = settings.host.includes(":") ? `[${settings.host}]` : settings.host
      yield* ClusterApi.reporting(`${settings.tlsCert === "" ? "http" : "https"}://${shown}:${port.address.port}`)
      return HttpGateway.of({ host: settings.host, port: port.address.port })
    })
  ).pipe(
    Layer.provide([
      Sse.Sse.layer,
      SearchEndpoint.SearchEndpoint.layer,
      WebSocketGateway.WebSocketGateway.layer,
      GrpcHandler.layer
    ]),
    Layer.provide(
      Callers.layer({
        // Where browsers can send no header.
        urlCredentials: (path) =>
          path.startsWith(streamPaths) ||
          path === TiersApi.eventsPath ||
          path === Operations.loadEventsPath ||
          path === WebSocketGateway.path ||
          RpcGateway.webSockets.includes(path),
        ownRefusals: (path) => RpcGateway.calls.includes(path),
        operators: new Set(["/metrics", Operations.loadPath, Operations.loadEventsPath, ClusterApi.clusterPath])
      })
    ),
    Layer.provide(ClientAddresses.layer),
    Layer.provide(NodeHttpServer.layerHttpServices)
  )
}

/** Below it are streams that are held open. */
const streamPaths = "/api/v1/stream/"

const refuseRaw = (response: ServerResponse, requestId: string, problem: RawProblem, route: string): void => {
  const { status, contentType, body } = problem
  countRequest("http", route, status, 0)
  response.writeHead(status, {
    "content-type": contentType,
    "x-request-id": requestId,
    ...(status === 503 ? { "retry-after": "1" } : {})
  })
  response.end(body)
}

const notGateway = new StorageUnavailable({
  detail: "This node serves no clients: ask a gateway.",
  retryAfterMillis: 1_000
})

/** Answered whatever the load: a load balancer, and whoever looks into it, has to know. */
const operatorPaths = new Set([
  "/health/live",
  "/health/ready",
  "/metrics",
  Operations.loadPath,
  Operations.loadEventsPath,
  ClusterApi.clusterPath
])

const rpcPaths = new Set<string>(RpcGateway.paths)

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
    Operations.loadPath,
    Operations.loadEventsPath,
    ClusterApi.clusterPath,
    ...Sse.paths,
    WebSocketGateway.path
  ].map((path) => ({ route: path.replace("/api/v1/", ""), pattern: new RegExp(`^${path}$`), methods: ["GET"] })),
  { route: "cluster/release", pattern: new RegExp(`^${ClusterApi.releasePath}$`), methods: ["POST"] },
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
