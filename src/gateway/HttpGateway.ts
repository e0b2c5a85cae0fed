/**
 * The port: one HTTP/1.1 server for all wires. Three are taken before Effect sees them: streams of events and WebSockets,
 * because they are held open by the thousand, and searches, because they are most of what comes. Everything else is an
 * `HttpRouter` of Effect.
 *
 * Shutting down: no new connections, readiness off, streams told to come back elsewhere, open requests given
 * `drainMillis`, then the rest is cut.
 */
import * as Http from "node:http"
import type { AddressInfo, Socket } from "node:net"
import type { Duplex } from "node:stream"
import * as NodeHttpServer from "@effect/platform-node/NodeHttpServer"
import * as NodeHttpServerRequest from "@effect/platform-node/NodeHttpServerRequest"
import { Context, Data, Effect, Layer, Scope } from "effect"
import { HttpRouter, HttpServerRequest, HttpServerResponse } from "effect/http"
import { OpenApi } from "effect/http-api"
import { Settings } from "../config.ts"
import { RuvectorApi } from "../protocol/HttpApi.ts"
import { countRequest } from "./Instruments.ts"
import * as Operations from "./Operations.ts"
import { problemContentType, responseOfCause } from "./Problems.ts"
import { instance } from "./Queries.ts"
import { Readiness } from "./Readiness.ts"
import * as RestApi from "./RestApi.ts"
import * as RpcGateway from "./RpcGateway.ts"
import * as SearchEndpoint from "./SearchEndpoint.ts"
import * as Sse from "./Sse.ts"
import * as WebSocketGateway from "./WebSocketGateway.ts"

/** The port or address could not be listened on. `message` is one line for people. */
export class ListenError extends Data.TaggedError("ListenError")<{ readonly message: string }> {}

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

      const server = Http.createServer({
        maxHeaderSize: settings.maxHeaderBytes,
        headersTimeout: settings.headersTimeoutMillis,
        requestTimeout: settings.requestTimeoutMillis,
        keepAliveTimeout: settings.keepAliveTimeoutMillis,
        connectionsCheckingInterval: 1_000
      })
      server.maxConnections = settings.connectionsMax
      const sockets = new Set<Socket>()
      server.on("connection", (socket) => {
        sockets.add(socket)
        socket.once("close", () => sockets.delete(socket))
        socket.setNoDelay(true)
      })
      let requests = 0
      const nextRequestId = () => `req_${instance}${(requests++).toString(36)}_${settings.region}_${instance}`
      server.on("request", (request, response) => {
        const id = nextRequestId()
        const path = pathOf(request.url as string)
        if (Sse.paths.has(path)) return sse.handle(request, response, id)
        if (path === SearchEndpoint.path && request.method === "POST") return search.handle(request, response, id)
        // Handed on in the request, where the Effect side reads it; a client's own is not taken over.
        request.headers[requestIdHeader] = id
        handler(request, response)
      })
      server.on("upgrade", (request: Http.IncomingMessage, socket: Duplex, head: Buffer) => {
        socket.on("error", () => {})
        if (pathOf(request.url as string) === WebSocketGateway.path)
          return webSockets.handleUpgrade(request, socket, head)
        request.headers[requestIdHeader] = nextRequestId()
        upgrade(request, socket, head)
      })
      server.on("clientError", (error: NodeJS.ErrnoException, socket: Duplex) => refuseRaw(error, socket))
      server.on("drop", () => countRequest("http", "dropped", 503, 0))

      yield* listen(server, settings.port, settings.host)
      const address = server.address() as AddressInfo

      yield* Effect.addFinalizer(() =>
        Effect.gen(function* () {
          readiness.set({ state: "draining" })
          server.close()
          yield* sse.drain
          yield* webSockets.drain
          yield* Effect.sync(() => rpcSockets.drain())
          const until = Date.now() + settings.drainMillis
          while (sockets.size > 0 && Date.now() < until) {
            server.closeIdleConnections()
            yield* Effect.sleep(20)
          }
          for (const socket of sockets) socket.destroy()
        })
      )
      return HttpGateway.of({ host: settings.host, port: address.port })
    })
  ).pipe(
    Layer.provide([Sse.Sse.layer, SearchEndpoint.SearchEndpoint.layer, WebSocketGateway.WebSocketGateway.layer]),
    Layer.provide(NodeHttpServer.layerHttpServices)
  )
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

const listen = (server: Http.Server, port: number, host: string): Effect.Effect<void, ListenError> =>
  Effect.callback((resume) => {
    const onError = (error: NodeJS.ErrnoException) =>
      resume(Effect.fail(new ListenError({ message: listenFault(error, port, host) })))
    server.once("error", onError)
    server.listen({ port, host, backlog: 4_096 }, () => {
      server.off("error", onError)
      resume(Effect.void)
    })
  })

const listenFault = (error: NodeJS.ErrnoException, port: number, host: string): string => {
  switch (error.code) {
    case "EADDRINUSE":
      return `Port ${port} on ${host} is taken by another program; choose one with --port, or --port 0 for any free one.`
    case "EACCES":
      return `Port ${port} on ${host} may not be listened on by this user; choose one above 1023 with --port.`
    case "EADDRNOTAVAIL":
    case "ENOTFOUND":
      return `${host} is no address of this machine; choose one with --host.`
    default:
      return `Cannot listen on ${host}:${port}: ${error.message}.`
  }
}

/** What Node's parser refused is answered by hand: there is no request to answer. */
const refuseRaw = (error: NodeJS.ErrnoException, socket: Duplex): void => {
  if (socket.destroyed || !socket.writable) return
  const [status, code, detail] =
    error.code === "HPE_HEADER_OVERFLOW"
      ? ([431, "headers_too_large", "The request's headers are over the limit."] as const)
      : error.code === "ERR_HTTP_REQUEST_TIMEOUT"
        ? ([408, "request_timeout", "The request did not arrive in time."] as const)
        : ([400, "invalid_input", "The request is not HTTP/1.1."] as const)
  const title = Http.STATUS_CODES[status] ?? ""
  const body = JSON.stringify({
    type: `urn:ruvector:problem:${code}`,
    title,
    status,
    detail,
    code,
    field: "",
    expected: "an HTTP/1.1 request within the limits",
    got: error.code ?? "something else"
  })
  countRequest("http", "unparsed", status, 0)
  socket.end(
    `HTTP/1.1 ${status} ${title}\r\ncontent-type: ${problemContentType}\r\ncontent-length: ${Buffer.byteLength(body)}\r\nconnection: close\r\n\r\n${body}`
  )
}
