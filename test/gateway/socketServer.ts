/** The WebSocket gateway over searches that a test answers itself, with the connections' innards at hand. */
import { createServer } from "node:http"
import type { AddressInfo } from "node:net"
import { Context, Effect, Exit, Layer, Logger, References, Scope } from "effect"
import { WebSocketServer } from "ws"
import { defaultSettings, Settings, type SettingValues } from "../../src/config.ts"
import { Callers } from "../../src/gateway/Callers.ts"
import { ClientAddresses } from "../../src/gateway/ClientAddresses.ts"
import { FrameTurns } from "../../src/gateway/FrameTurns.ts"
import { type ConnectionSubscriptions, SubscriptionFrames } from "../../src/gateway/SessionSink.ts"
import type { SessionLink } from "../../src/gateway/Sessions.ts"
import { Sessions } from "../../src/gateway/Sessions.ts"
import { TenantRouter } from "../../src/gateway/TenantRouter.ts"
import { Topics } from "../../src/gateway/Topics.ts"
import { ClientSocket, type Hub, WebSocketConnection } from "../../src/gateway/WebSocketConnection.ts"
import { WebSocketGateway } from "../../src/gateway/WebSocketGateway.ts"
import type { ApiError } from "../../src/protocol/Errors.ts"
import { anonymous, type Principal } from "../../src/protocol/Principal.ts"
import type { SearchAnswer, SessionQuery } from "../../src/protocol/StreamSession.ts"
import { Admission } from "../../src/shards/Admission.ts"
import { Router } from "../../src/shards/Router.ts"
import { accessLayer } from "../support/AccessLayer.ts"

export type Search = (query: SessionQuery) => Effect.Effect<SearchAnswer, ApiError>

export interface SocketServer {
  readonly base: string
  readonly port: number
  readonly gateway: WebSocketGateway["Service"]
  /** Sessions that have searched and are not closed. */
  readonly opened: () => number
  readonly stop: () => Promise<void>
}

export const answerOf = (queryId: string, results: number, text = ""): SearchAnswer => ({
  queryId,
  ids: Array.from({ length: results }, (_, i) => `v${i}`),
  scores: new Float32Array(results),
  ...(text === "" ? {} : { metadata: Array.from({ length: results }, () => JSON.stringify({ text })) }),
  dimensions: 1,
  missing: [],
  tookMillis: 0
})

const noSubscriptions = (): ConnectionSubscriptions => ({
  size: 0,
  frame: () => {},
  sessionEnded: () => {},
  close: () => {}
})

/** Load is shed in tests of its own. */
const unpressed = { isPressed: () => false, refusal: () => undefined } as unknown as Admission["Service"]

export const startSocketServer = async (
  search: Search,
  settings: Partial<SettingValues> = {},
  subscriptions = noSubscriptions
): Promise<SocketServer> => {
  let opened = 0
  const openUnsafe = (): SessionLink => {
    opened += 1
    const end = Effect.sync(() => {
      opened -= 1
    })
    return { id: `s_${opened}`, search, close: end, abandon: end }
  }
  const sessions = Sessions.of({
    open: Effect.sync(openUnsafe),
    openResumable: Effect.sync(openUnsafe),
    openUnsafe,
    answer: () => Effect.succeed(undefined),
    count: () => opened
  })
  const values = { ...defaultSettings, ...settings }
  const scope = await Effect.runPromise(Scope.make())
  const services = Layer.mergeAll(
    Layer.succeed(Settings, values),
    // No other of its calls is made here.
    Layer.succeed(Router, { search } as unknown as Router["Service"]),
    Layer.succeed(Sessions, sessions),
    Layer.mergeAll(Logger.layer([]), Layer.succeed(References.MinimumLogLevel, "Fatal")),
    // Topics have tests of their own.
    Layer.succeed(Topics, {} as unknown as Topics["Service"]),
    Layer.succeed(SubscriptionFrames, { connect: subscriptions }),
    Layer.succeed(Admission, unpressed)
  )
  const layer = WebSocketGateway.layer.pipe(
    Layer.provideMerge(Callers.layer({ urlCredentials: () => true, ownRefusals: () => false, operators: new Set() })),
    Layer.provide(TenantRouter.layer),
    Layer.provide(Layer.mergeAll(accessLayer, ClientAddresses.layer)),
    Layer.provideMerge(services)
  )
  const context = await Effect.runPromise(Layer.buildWithScope(layer, scope))
  const callers = Context.get(context, Callers)
  const gateway = Context.get(context, WebSocketGateway)
  const server = createServer()
  server.on("upgrade", (request, socket, head) =>
    callers.upgrade(request, socket, "/api/v1/ws", () => gateway.handleUpgrade(request, socket, head))
  )
  const { port } = await new Promise<AddressInfo>((resolve) =>
    server.listen(0, "127.0.0.1", () => resolve(server.address() as AddressInfo))
  )
  return {
    base: `http://127.0.0.1:${port}`,
    port,
    gateway,
    opened: () => opened,
    stop: async () => {
      await Effect.runPromise(Scope.close(scope, Exit.void))
      server.closeAllConnections()
      await new Promise((resolve) => server.close(resolve))
    }
  }
}

/** One connection of a principal after the other, looked after when the test says so. */
export const startConnections = async (principal: Partial<Principal>, settings: Partial<SettingValues> = {}) => {
  const connections: Array<WebSocketConnection> = []
  const all = { ...defaultSettings, ...settings }
  const hub = {
    settings: all,
    turns: new FrameTurns(all.frameTurnMillis),
    admission: unpressed,
    access: { watch: () => () => {}, admit: () => undefined, allow: () => undefined },
    run: Effect.runFork,
    clock: () => performance.now(),
    flushLater: (connection: WebSocketConnection) => setImmediate(() => connection.flush()),
    ended: () => {}
  } as unknown as Hub
  const server = createServer()
  const sockets = new WebSocketServer({ noServer: true, WebSocket: ClientSocket } as never)
  server.on("upgrade", (request, socket, head) =>
    sockets.handleUpgrade(request, socket, head, (ws) => {
      const whose = { ...anonymous, ...principal }
      connections.push(new WebSocketConnection(hub, ws as ClientSocket, socket, whose, ""))
    })
  )
  const { port } = await new Promise<AddressInfo>((resolve) =>
    server.listen(0, "127.0.0.1", () => resolve(server.address() as AddressInfo))
  )
  return {
    base: `http://127.0.0.1:${port}`,
    connections,
    stop: () => new Promise((resolve) => server.close(resolve))
  }
}
