/** The gateway's view of this node's `TierPromoter`: its messages, with what delivery can refuse as the contract's errors. */
import { Context, Effect, Layer, Stream } from "effect"
import { type ApiError, Overloaded } from "../protocol/Errors.ts"
import { localPromoterId, type TierEvent, TierPromoter, type TierState } from "../protocol/TierPromoter.ts"
import type { WarmReport, WarmRequest } from "../protocol/Warming.ts"

export class Promoter extends Context.Service<
  Promoter,
  {
    readonly state: Effect.Effect<TierState, ApiError>
    readonly warm: (request: WarmRequest) => Effect.Effect<WarmReport, ApiError>
    /** Events after a position, or those to come. */
    readonly events: (after: number | undefined) => Stream.Stream<TierEvent, ApiError>
  }
>()("ruvector/gateway/Promoter") {
  static readonly layer = Layer.effect(
    Promoter,
    Effect.gen(function* () {
      const client = (yield* TierPromoter.client)(localPromoterId)
      return Promoter.of({
        state: Effect.mapError(client.State(), toApiError),
        warm: (request) => Effect.mapError(client.Warm(request), toApiError),
        events: (after) => Stream.mapError(client.Events(after === undefined ? {} : { after }), toApiError)
      })
    })
  )
}

const toApiError = <E extends { readonly _tag: string }>(error: E): ApiError =>
  isDelivery(error) ? new Overloaded({ bound: "mailbox", retryAfterMillis: 1_000 }) : (error as unknown as ApiError)

const isDelivery = (error: { readonly _tag: string }): boolean =>
  error._tag === "MailboxFull" ||
  error._tag === "AlreadyProcessingMessage" ||
  error._tag === "PersistenceError" ||
  error._tag === "EntityNotAssignedToRunner"
