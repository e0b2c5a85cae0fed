/** Connections of other nodes, when these are gone. */
import { once } from "node:events"
import { connect } from "node:net"
import { NodeSocket } from "@effect/platform-node"
import { assert, it } from "@effect/vitest"
import { Deferred, Effect, Exit, Option } from "effect"
import { SocketServer } from "effect/socket"
import * as ClusterListener from "../../src/shards/ClusterListener.ts"

it("fails what is written to a connection that is gone, and does not wait for it", () =>
  Effect.runPromise(
    Effect.gen(function* () {
      const server = yield* SocketServer.SocketServer
      const written = Deferred.makeUnsafe<Exit.Exit<void, unknown>>()
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
              yield* Deferred.succeed(written, yield* Effect.exit(writer.write("gone")))
            })
          )
        )
      )
      assert.isTrue("port" in server.address)
      const client = connect((server.address as { readonly port: number }).port, "127.0.0.1")
      yield* Effect.promise(() => once(client, "data"))
      client.resetAndDestroy()
      const exit = yield* Deferred.await(written)
      assert.isTrue(Exit.isFailure(exit), String(exit))
    }).pipe(Effect.scoped, Effect.provide(ClusterListener.layer({ host: "127.0.0.1", port: 0 })))
  ))
