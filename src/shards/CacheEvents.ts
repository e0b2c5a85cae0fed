/**
 * What caches in front of the service should forget, as events one can subscribe to: a deployment turns them into purges by
 * tag of its CDN. Bounded and never waited for: a subscriber that falls behind by {@link eventsMax} loses the oldest, and
 * what it would have purged lives out its `max-age`.
 */
import { Context, Effect, Layer, PubSub, type Scope } from "effect"

/** A collection was invalidated on request, as a whole or in some ids. */
export interface CacheInvalidated {
  readonly _tag: "CacheInvalidated"
  readonly collection: string
  readonly uid: string
  readonly scope: "all" | "ids"
  /** Empty with scope `all`. */
  readonly ids: ReadonlyArray<string>
  /** Milliseconds since 1970 at which to purge. */
  readonly effectiveMillis: number
  /** Cache tags of the answers concerned. */
  readonly tags: ReadonlyArray<string>
}

/** Events kept for a subscriber that is behind. */
export const eventsMax = 256

export class CacheEvents extends Context.Service<
  CacheEvents,
  {
    readonly publish: (event: CacheInvalidated) => void
    readonly subscribe: Effect.Effect<PubSub.Subscription<CacheInvalidated>, never, Scope.Scope>
  }
>()("ruvector/shards/CacheEvents") {
  static readonly layer = Layer.effect(
    CacheEvents,
    Effect.gen(function* () {
      const events = yield* Effect.acquireRelease(PubSub.sliding<CacheInvalidated>(eventsMax), PubSub.shutdown)
      const run = Effect.runForkWith(yield* Effect.context<never>())
      return CacheEvents.of({
        publish: (event) => run(PubSub.publish(events, event)),
        subscribe: PubSub.subscribe(events)
      })
    })
  )
}
