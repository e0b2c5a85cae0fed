/** The gRPC wire on a port of its own, over a router that keeps vectors in a map, so that a test sees what reaches it. */
import { createServer, type Http2Session } from "node:http2"
import type { AddressInfo } from "node:net"
import { Context, Effect, Exit, Layer, Logger, Scope } from "effect"
import { defaultSettings, Settings, type SettingValues } from "../../src/config.ts"
import { Access } from "../../src/gateway/Access.ts"
import { ClientAddresses } from "../../src/gateway/ClientAddresses.ts"
import { GrpcHandler } from "../../src/gateway/GrpcHandler.ts"
import { Readiness } from "../../src/gateway/Readiness.ts"
import { Sessions } from "../../src/gateway/Sessions.ts"
import { Router } from "../../src/shards/Router.ts"
import { accessLayer } from "../support/AccessLayer.ts"
import { countedSessions, mapRouter, nothingSeen, type Seen } from "./rpcServer.ts"

export interface GrpcTestServer {
  readonly port: number
  readonly seen: Seen
  readonly router: Router["Service"]
  readonly readiness: Readiness["Service"]
  readonly handler: GrpcHandler["Service"]
  /** Lines of its log. */
  readonly logged: ReadonlyArray<string>
  readonly close: () => Promise<void>
}

export const openGrpcServer = async (
  given: Partial<SettingValues> = {},
  access?: Access["Service"]
): Promise<GrpcTestServer> => {
  const seen = nothingSeen()
  const router = mapRouter(seen)
  const logged: Array<string> = []
  const scope = await Effect.runPromise(Scope.make())
  const layer = GrpcHandler.layer.pipe(
    Layer.provideMerge(Readiness.layer),
    Layer.provide([
      Layer.succeed(Router, router),
      Layer.succeed(Sessions, countedSessions(router, seen)),
      access === undefined ? accessLayer : Layer.succeed(Access, access),
      ClientAddresses.layer
    ]),
    Layer.provide(Layer.succeed(Settings, { ...defaultSettings, ...given })),
    Layer.provideMerge(Logger.layer([Logger.map(Logger.formatJson, (line) => void logged.push(line))]))
  )
  const context = await Effect.runPromise(Layer.buildWithScope(layer, scope))
  const handler = Context.get(context, GrpcHandler)
  const server = createServer({ settings: { maxConcurrentStreams: 2_000 } })
  const sessions = new Set<Http2Session>()
  server.on("session", (session) => {
    sessions.add(session)
    session.on("close", () => sessions.delete(session))
  })
  server.on("stream", (stream, headers) => handler.handleStream(stream, headers, () => {}))
  await new Promise<void>((resolve) => {
    server.listen(0, "127.0.0.1", resolve)
  })
  return {
    port: (server.address() as AddressInfo).port,
    seen,
    router,
    readiness: Context.get(context, Readiness),
    handler,
    logged,
    close: async () => {
      await Effect.runPromise(Scope.close(scope, Exit.void))
      for (const session of sessions) session.destroy()
      await new Promise((resolve) => server.close(resolve))
    }
  }
}
