/** The gateway's view of this node's `TierPromoter`: its messages, with what delivery can refuse as the contract's errors. */
import { Context, Effect, Layer, Stream } from "effect"
import { type ApiError, InvalidInput, Overloaded } from "../protocol/Errors.ts"
import { defaultCollection } from "../protocol/Fields.ts"
import { isOperator, type Principal } from "../protocol/Principal.ts"
import { shownError, shownName, storedName, tenantOf } from "../protocol/Tenant.ts"
import { localPromoterId, type TierEvent, TierPromoter, type TierState } from "../protocol/TierPromoter.ts"
import type { WarmReport, WarmRequest } from "../protocol/Warming.ts"
import { layerNode } from "../shards/Cluster.ts"
import { type DeliveryError, isDelivery } from "../shards/Delivery.ts"
import type { Access } from "./Access.ts"

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
  ).pipe(Layer.provide(layerNode))
}

/**
 * The promoter as one caller may use it. Operators see the node; another tenant's admins what of it is about their
 * collections: no others' partitions and records, and no warmings, which are nobody's in particular.
 */
export const promoterOf = (
  promoter: Promoter["Service"],
  access: Access["Service"],
  caller: Principal
): Promoter["Service"] => {
  const isNode = isOperator(caller)
  const isOwn = (stored: string): boolean =>
    tenantOf(stored) === caller.tenant && (caller.collections?.has(shownName(stored)) ?? true)
  const shown = <A extends { readonly collection: string }>(of: A): A => ({
    ...of,
    collection: shownName(of.collection)
  })

  /** What the caller is given of an event, if anything. */
  const eventFor = (event: TierEvent): ReadonlyArray<TierEvent> => {
    if ("collection" in event) return isOwn(event.collection) ? [shown(event)] : []
    return event.event === "following" || event.event === "events_missed" ? [event] : []
  }

  return {
    state: Effect.suspend(() => {
      const refusal = access.allow(caller, "admin")
      if (refusal !== undefined) return Effect.fail(refusal)
      if (isNode) return promoter.state
      return Effect.map(promoter.state, (state) => {
        const partitions = state.partitions.filter((one) => isOwn(one.collection)).map(shown)
        const hottest = state.hottest.filter((one) => isOwn(one.collection)).map(shown)
        return { ...state, partitions_total: partitions.length, partitions, hottest }
      })
    }),
    warm: (request) =>
      Effect.suspend(() => {
        // A window of no collection is one of everybody's.
        const isAll = request.window !== undefined && request.collection === undefined
        if (isAll && isNode) return promoter.warm(request)
        const name = request.collection ?? defaultCollection
        const refusal = access.allow(caller, "write", isAll ? undefined : name)
        if (refusal !== undefined) return Effect.fail(refusal)
        if (isAll) {
          const expected = "the name of a collection (operators alone warm all)"
          return Effect.fail(new InvalidInput({ field: "collection", expected, got: "nothing" }))
        }
        const warmed = promoter.warm({ ...request, collection: storedName(caller.tenant, name) })
        return Effect.mapError(warmed, shownError)
      }),
    events: (after) =>
      Stream.suspend(() => {
        const refusal = access.allow(caller, "admin")
        if (refusal !== undefined) return Stream.fail(refusal)
        const events = promoter.events(after)
        return untilEnded(
          access,
          caller,
          isNode ? events : Stream.flatMap(events, (event) => Stream.fromIterable(eventFor(event)))
        )
      })
  }
}

/** A stream that ends with its caller's credential. */
export const untilEnded = <A>(
  access: Access["Service"],
  caller: Principal,
  stream: Stream.Stream<A, ApiError>
): Stream.Stream<A, ApiError> =>
  Stream.interruptWhen(
    stream,
    Effect.callback<never, ApiError>((resume) => {
      const stop = access.watch(caller, (error) => resume(Effect.fail(error)))
      return Effect.sync(stop)
    })
  )

const toApiError = (error: ApiError | DeliveryError): ApiError =>
  isDelivery(error) ? new Overloaded({ bound: "mailbox", retryAfterMillis: 1_000 }) : error
