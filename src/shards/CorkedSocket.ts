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

/** What is written to it once it is gone fails, in place of waiting for ever until it takes more. */
const failsOnceGone = (connection: NetSocket): void => {
  const write = connection.write
  connection.write = function (this: NetSocket, ...given: Parameters<NetSocket["write"]>) {
    if (connection.destroyed) throw new Error("The connection is gone.")
    return write.apply(connection, given)
  } as NetSocket["write"]
}

/** Also: what is written to it once it is gone fails. */
export const corked = (connection: NetSocket): NetSocket => {
  failsOnceGone(connection)
  let isHeld = false
  const release = () => {
    isHeld = false
    connection.uncork()
  }
  const write = connection.write
  connection.write = function (this: NetSocket, ...given: Parameters<NetSocket["write"]>) {
    if (!isHeld) {
      isHeld = true
      connection.cork()
      setImmediate(release)
    }
    return write.apply(connection, given)
  } as NetSocket["write"]
  return connection
}
