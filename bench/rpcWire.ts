/** Searches as typed calls of Effect RPC: SchemaBinary over one WebSocket, vectors as float32 bytes. */
import { NodeWS } from "@effect/platform-node"
import { Cause, Context, Effect, Exit, Layer, Scope } from "effect"
import { RpcClient, RpcSerialization } from "effect/rpc"
import { Socket } from "effect/socket"
import { RuvectorRpcs } from "../src/protocol/Rpcs.ts"
import { filterOf, truthK } from "./truth.ts"
import type { SearchOptions, Wire } from "./wires.ts"
import { vectorOf } from "./words.ts"

const path = "/api/v1/rpc/ws"

export const openRpc = async ({ url, queries, ef, filter, onFailure }: SearchOptions): Promise<Wire> => {
  const socket = Layer.effect(Socket.Socket, Socket.makeWebSocket(new URL(path, url.href.replace("http", "ws")).href))
  const protocol = RpcClient.layerProtocolSocket().pipe(
    Layer.provide([Layer.provide(socket, NodeWS.layerWebSocketConstructor), RpcSerialization.layerSchemaBinary()])
  )
  const scope = await Effect.runPromise(Scope.make())
  const client = await Layer.buildWithScope(protocol, scope).pipe(
    Effect.flatMap((context) =>
      Effect.provideContext(
        RpcClient.make(RuvectorRpcs, { disableTracing: true }),
        Context.add(context, Scope.Scope, scope)
      )
    ),
    Effect.runPromise
  )
  const calls = queries.words.map((_, query) =>
    client.Search({
      query: vectorOf(queries, query),
      k: truthK,
      ...(ef === undefined ? {} : { ef }),
      ...(filter === undefined ? {} : { filter: JSON.stringify(filterOf(filter, query)) })
    })
  )
  const answers = new Array<ReadonlyArray<string> | undefined>(calls.length)
  return {
    ask: (_, query, onAnswer) => {
      Effect.runFork(calls[query] as (typeof calls)[number]).addObserver((exit) => {
        if (Exit.isFailure(exit)) {
          onFailure(new Error(`a call failed: ${Cause.pretty(exit.cause)}`))
          return
        }
        answers[query] = exit.value.results.map((result) => result.vector_id)
        onAnswer()
      })
    },
    answers: () => answers,
    close: () => Effect.runFork(Scope.close(scope, Exit.void))
  }
}
