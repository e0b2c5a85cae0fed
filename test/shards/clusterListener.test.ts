/** Connections of other nodes, when these are gone. */
import { once } from "node:events"
import { connect } from "node:net"
import { NodeSocket } from "@effect/platform-node"
import { assert, it } from "@effect/vitest"
import { Deferred, Effect, Option } from "effect"
import { SocketServer } from "effect/socket"
import * as ClusterListener from "../../src/shards/ClusterListener.ts"

it("has nobody wait who writes to a connection that is gone", () =>
  Effect.runPromise(
    Effect.gen(function* () {
      const server = yield* SocketServer.SocketServer
      const written = Deferred.makeUnsafe<void>()
      yield* Effect.forkScoped(
        server.run((socket) =>
          Effect.scoped(
            Effect.gen(function* () {
              const connection = Option.getOrThrow(yield* Effect.serviceOption(NodeSocket.NetSocket))
              yield* socket.reader
              const writer = yield* socket.writer
              yield* writer.write("there")
              // Read nowhere, as by a node that has stood still: nobody has been told yet that it is gone.
              yield* Effect.promise(() => new Promise((resolve) => connection.once("close", resolve)))
              yield* Effect.exit(writer.write("gone"))
              yield* Deferred.succeed(written, undefined)
            })
          )
        )
      )
      assert.isTrue("port" in server.address)
      const client = connect((server.address as { readonly port: number }).port, "127.0.0.1")
      yield* Effect.promise(() => once(client, "data"))
      client.resetAndDestroy()
      yield* Deferred.await(written)
    }).pipe(Effect.scoped, Effect.provide(ClusterListener.layer({ host: "127.0.0.1", port: 0 })))
  ))
