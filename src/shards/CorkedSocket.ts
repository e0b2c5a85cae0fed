/**
 * Connections between nodes that send what is written in one turn of the event loop with one call of the operating system:
 * that call is the greatest part of what a search through a gateway costs.
 */
import { connect, type Socket as NetSocket } from "node:net"
import * as NodeSocket from "@effect/platform-node/NodeSocket"
import { Effect } from "effect"
import * as Socket from "effect/socket/Socket"

/** Without Nagle's delay, which holds small messages back for 40 ms and more. */
export const make = ({ host, port, openMillis }: Target): Effect.Effect<Socket.Socket> =>
  NodeSocket.fromDuplex(
    Effect.flatMap(
      Effect.acquireRelease(
        Effect.sync(() => corked(connect({ host, port, noDelay: true }))),
        (connection) => Effect.sync(() => connection.destroySoon())
      ),
      (connection) =>
        Effect.callback<NetSocket, Socket.SocketError>((resume) => {
          connection.once("connect", () => resume(Effect.succeed(connection)))
          connection.on("error", (cause) => {
            const reason = new Socket.SocketOpenError({ kind: "Unknown", cause })
            resume(Effect.fail(new Socket.SocketError({ reason })))
          })
        })
    ),
    { openTimeout: openMillis }
  )

interface Target {
  readonly host: string
  readonly port: number
  readonly openMillis: number
}

/**
 * What is written to it once it is gone is lost, as what is under way to the other side is; else the writer would wait for ever
 * until it takes more. That it is gone is told to those who wait for answers, by its end.
 */
export const corked = (connection: NetSocket): NetSocket => {
  let isHeld = false
  const release = () => {
    isHeld = false
    connection.uncork()
  }
  const write = connection.write
  connection.write = function (this: NetSocket, ...given: Parameters<NetSocket["write"]>) {
    if (connection.destroyed) return true
    if (!isHeld) {
      isHeld = true
      connection.cork()
      setImmediate(release)
    }
    return write.apply(connection, given)
  } as NetSocket["write"]
  return connection
}
