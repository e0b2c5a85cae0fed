/**
 * Where a runner takes the connections of other nodes. As Effect's own, but that what is written in one turn of the event loop
 * is one write (`CorkedSocket.ts`), and that nobody waits to write to a connection that is gone: there it is waited until that
 * takes more, for ever, and so does whoever waits for the writer, a process that is told to stop among them.
 */
import type { ListenOptions, ServerOpts } from "node:net"
import * as NodeSocket from "@effect/platform-node/NodeSocket"
import * as NodeSocketServer from "@effect/platform-node/NodeSocketServer"
import { Effect, Layer } from "effect"
import * as SocketServer from "effect/socket/SocketServer"
import { corked } from "./CorkedSocket.ts"

export const layer = (options: ServerOpts & ListenOptions) =>
  Layer.effect(
    SocketServer.SocketServer,
    Effect.map(NodeSocketServer.make(options), (server) =>
      SocketServer.SocketServer.of({
        address: server.address,
        run: (handler) =>
          server.run((socket) =>
            Effect.flatMap(Effect.serviceOption(NodeSocket.NetSocket), (connection) => {
              if (connection._tag === "Some") corked(connection.value)
              return handler(socket)
            })
          )
      })
    )
  )
