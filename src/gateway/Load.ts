/** The gateway's view of this node's `LoadShedder`: its messages, with what delivery can refuse as the contract's errors. */
import { Context, Effect, Layer, Stream } from "effect"
import { type ApiError, Overloaded } from "../protocol/Errors.ts"
import { type LoadEvent, LoadShedder, type LoadState, localShedderId } from "../protocol/LoadShedder.ts"
import { layerNode } from "../shards/Cluster.ts"
import { isDelivery } from "../shards/Delivery.ts"
export class Load extends Context.Service<
  Load,
  {
    readonly state: Effect.Effect<LoadState, ApiError>
    /** Events after a position, or those to come. */
    readonly events: (after: number | undefined) => Stream.Stream<LoadEvent, ApiError>
  }
>()("ruvector/gateway/Load") {
  static readonly layer = Layer.effect(
    Load,
    Effect.gen(function* () {
      const client = (yield* LoadShedder.client)(localShedderId)
      return Load.of({
        state: Effect.mapError(client.State(), () => undelivered()),
        events: (after) =>
          Stream.mapError(client.Events(after === undefined ? {} : { after }), (error) =>
            isDelivery(error) ? undelivered() : error
          )
      })
    })
  ).pipe(Layer.provide(layerNode))
}

const undelivered = () => new Overloaded({ bound: "mailbox", retryAfterMillis: 1_000 })
