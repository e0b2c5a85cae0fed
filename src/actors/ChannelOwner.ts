/**
 * Makes a channel resident when it is first asked for something, and again after it was lost. All callers share one
 * activation; after one that failed, its error is given for a while before it is tried again.
 */
import { Deferred, Effect, Exit, Metric, Option, Scope } from "effect"
import type { ChannelError } from "../protocol/AgentChannel.ts"
import { StorageUnavailable, TopicNotFound, TopicUnavailable, toProblem } from "../protocol/Errors.ts"
import { shownName } from "../protocol/Tenant.ts"
import type { Topic } from "../protocol/Topic.ts"
import { type TopicCatalog, topicCatalogId } from "../protocol/TopicCatalog.ts"
import { Calls } from "../shards/Calls.ts"
import { isDelivery } from "../shards/Delivery.ts"
import type { DataDirectory } from "../tiers/DataDirectory.ts"
import type { ObjectStore } from "../tiers/ObjectStore.ts"
import * as PartitionLog from "../tiers/PartitionLog.ts"

export interface ChannelOwner<R> {
  readonly use: <A, E>(use: (resident: R) => Effect.Effect<A, E>) => Effect.Effect<A, E | ChannelError>
  /** Lets go of it, and deletes its objects for good. */
  readonly remove: Effect.Effect<void, StorageUnavailable>
}

export interface ChannelOwnerOptions<R> {
  readonly prefix: string
  /** As it is stored. */
  readonly topic: string
  readonly uid: string
  readonly activationMillis: number
  readonly topics: Effect.Success<typeof TopicCatalog.client>
  readonly open: (
    topic: Topic,
    onLost: (detail: string) => void
  ) => Effect.Effect<
    R,
    | PartitionLog.LogCorrupt
    | PartitionLog.NewerFormat
    | PartitionLog.NotOwner
    | { readonly _tag: "StoreFailure"; readonly detail: string },
    ObjectStore | DataDirectory | Scope.Scope
  >
}

/** After an activation failed, further messages are answered with its error for this long before it is tried again. */
const retryActivationMillis = 1_000

const activations = Metric.counter("ruvector_channel_activations", { description: "Channels made resident" })
const losses = Metric.counter("ruvector_channel_losses", {
  description: "Channels let go since a commit failed or another owner was there"
})

export const make = Effect.fnUntraced(function* <R>(options: ChannelOwnerOptions<R>) {
  const { prefix, uid } = options
  const name = shownName(options.topic)
  const entityScope = yield* Effect.scope
  const services = yield* Effect.context<ObjectStore | DataDirectory>()
  const catalog = options.topics(topicCatalogId)
  const calls = yield* Calls

  let resident: { readonly of: R; readonly scope: Scope.Closeable } | undefined
  let activating: Deferred.Deferred<R, ChannelError> | undefined
  let closing: Deferred.Deferred<void> | undefined
  let failure: { readonly error: ChannelError; readonly until: number } | undefined
  let removed = false

  const unavailable = (detail: string, retryAfterMillis = 500) =>
    new TopicUnavailable({ topic: name, detail, retryAfterMillis })

  const errorOf = (error: { readonly _tag: string; readonly detail: string }): ChannelError => {
    switch (error._tag) {
      case "StoreFailure":
        return new StorageUnavailable({ detail: `It could not be opened: ${error.detail}`, retryAfterMillis: 1_000 })
      case "NotOwner":
        return unavailable("Another node owns it now.", 200)
      default:
        return unavailable(`It is damaged: ${error.detail}`, 10_000)
    }
  }

  const letGo = (of: { readonly scope: Scope.Closeable } | undefined) =>
    Effect.suspend(() => {
      if (of === undefined || resident !== of) return Effect.void
      resident = undefined
      const closed = Deferred.makeUnsafe<void>()
      closing = closed
      return Effect.ensuring(
        Scope.close(of.scope, Exit.void),
        Effect.sync(() => {
          closing = undefined
          Deferred.doneUnsafe(closed, Effect.void)
        })
      )
    })

  const open = Effect.fnUntraced(function* (scope: Scope.Closeable) {
    const unreachable = () => unavailable("The list of topics cannot be reached.")
    const topic = yield* calls
      .to({ group: "default", id: topicCatalogId }, catalog.Read({ name: options.topic }), unreachable)
      .pipe(Effect.mapError((error): ChannelError => (isDelivery(error) ? unreachable() : error)))
    if (topic.uid !== uid) return yield* new TopicNotFound({ topic: name })
    const self: { of?: { readonly of: R; readonly scope: Scope.Closeable } } = {}
    const onLost = (detail: string) => {
      losses.updateUnsafe(1, services)
      run(
        Effect.andThen(
          Effect.annotateLogs(Effect.logWarning("A channel is let go", detail), { channel: prefix }),
          letGo(self.of)
        )
      )
    }
    const of = yield* Effect.mapError(options.open(topic, onLost), errorOf).pipe(Scope.provide(scope))
    self.of = { of, scope }
    return self.of
  })

  const run = (effect: Effect.Effect<void, never, ObjectStore | DataDirectory>) =>
    Effect.runForkWith(services)(Effect.forkIn(effect, entityScope))

  const activate: Effect.Effect<R, ChannelError> = Effect.suspend(() => {
    if (removed) return Effect.fail(new TopicNotFound({ topic: name }))
    if (resident !== undefined) return Effect.succeed(resident.of)
    if (failure !== undefined && Date.now() < failure.until) return Effect.fail(failure.error)
    if (activating === undefined) {
      const started = Deferred.makeUnsafe<R, ChannelError>()
      activating = started
      run(
        Effect.gen(function* () {
          if (closing !== undefined) yield* Deferred.await(closing)
          const scope = yield* Scope.fork(entityScope)
          const exit = yield* Effect.exit(open(scope))
          activating = undefined
          if (Exit.isSuccess(exit) && !removed) {
            resident = exit.value
            failure = undefined
            yield* Metric.update(activations, 1)
            yield* Deferred.succeed(started, exit.value.of)
            return
          }
          yield* Scope.close(scope, Exit.void)
          if (Exit.isSuccess(exit)) {
            yield* Deferred.fail(started, new TopicNotFound({ topic: name }))
            return
          }
          const found = Exit.findErrorOption(exit)
          const error = Option.isSome(found)
            ? found.value
            : unavailable("It could not be opened; the logs say why.", 5_000)
          failure = { error, until: Date.now() + retryActivationMillis }
          if (error._tag !== "TopicNotFound") {
            yield* Effect.annotateLogs(
              Effect.logError("A channel could not be opened", toProblem(error).detail, exit.cause),
              { channel: prefix }
            )
          }
          yield* Deferred.fail(started, error)
        })
      )
    }
    return Effect.timeoutOrElse(Deferred.await(activating), {
      duration: options.activationMillis,
      orElse: () => Effect.fail(unavailable("It is being opened.", 2_000))
    })
  })

  const remove = Effect.gen(function* () {
    removed = true
    if (activating !== undefined) yield* Effect.exit(Deferred.await(activating))
    yield* letGo(resident)
    yield* PartitionLog.remove(prefix).pipe(
      Effect.mapError((error) => new StorageUnavailable({ detail: error.detail, retryAfterMillis: 1_000 })),
      Effect.provideContext(services)
    )
  })

  return { use: (use) => Effect.flatMap(activate, use), remove } satisfies ChannelOwner<R> as ChannelOwner<R>
})
