/**
 * The `IndexPartition` entity: owner of one slice of a collection. It claims the partition's log (raising the epoch),
 * opens the newest good snapshot in a vector thread, replays what follows, and then serves. When its thread dies or
 * another owner appears it lets go, and the next message makes it resident again.
 */
import { crc32 } from "node:zlib"
import { Cause, Context, Deferred, Duration, Effect, Exit, Fiber, Layer, Metric, Option, Scope, Stream } from "effect"
import * as Entity from "effect/cluster/Entity"
import { Settings } from "../config.ts"
import { Catalog, catalogId } from "../protocol/Catalog.ts"
import {
  CollectionNotFound,
  InvalidInput,
  PartitionUnavailable,
  StorageUnavailable,
  toProblem,
  VectorNotFound
} from "../protocol/Errors.ts"
import { vectorToBytes } from "../protocol/Fields.ts"
import {
  type ChangePage,
  type Compacted,
  IndexPartition,
  type PartitionError,
  type PartitionQuery,
  partitionAddressOf
} from "../protocol/IndexPartition.ts"
import type { PartitionWatch } from "../protocol/StandingQuery.ts"
import { Calls } from "../shards/Calls.ts"
import { LocalActors, type WatchListener } from "../shards/LocalActors.ts"
import { Membership } from "../shards/Membership.ts"
import { partitionPrefix } from "../tiers/CatalogueObject.ts"
import { ObjectStore } from "../tiers/ObjectStore.ts"
import * as PartitionLog from "../tiers/PartitionLog.ts"
import { isGiven } from "../tiers/RequestWindow.ts"
import { IndexLost } from "../tiers/VectorIndex.ts"
import { type OpenPartition, PartitionOpener } from "./OpenPartition.ts"
import { changesAfter } from "./PartitionChanges.ts"
import { watchStream } from "./PartitionWatches.ts"
import type * as PartitionWriter from "./PartitionWriter.ts"
import { Quarantine } from "./Quarantine.ts"

const activations = Metric.counter("ruvector_partition_activations", { description: "Partitions made resident" })
const activationFailures = Metric.counter("ruvector_partition_activation_failures", {
  description: "Attempts to make a partition resident that failed"
})

const faults = Metric.counter("ruvector_partition_faults", {
  description: "Failures of a partition by its own fault: damage, a defect, its vector thread dead at work on it"
})

const yields = Metric.counter("ruvector_partitions_yielded", {
  description: "Partitions let go of because another node had claimed them"
})

/** After an activation failed, further messages are answered with its error for this long before it is tried again. */
const retryActivationMillis = 2_000

/** Where memory was needed and none could be had, it is looked sooner whether there is some. */
const retryMemoryMillis = 250

/** A partition that is resident, and what closes it. */
interface Resident extends OpenPartition {
  readonly scope: Scope.Closeable
}

export const layer = Layer.unwrap(
  Effect.map(Settings, (settings) =>
    IndexPartition.toLayer(makePartition, {
      concurrency: "unbounded",
      disableFatalDefects: true,
      mailboxCapacity: 65_536,
      maxIdleTime:
        settings.partitionIdleMillis === 0 ? Duration.infinity : Duration.millis(settings.partitionIdleMillis)
    })
  )
)

const makePartition = Effect.gen(function* () {
  const { entityId } = yield* Entity.CurrentAddress
  const address = partitionAddressOf(entityId)
  const { collection: name, uid, partition } = address
  const settings = yield* Settings
  const store = yield* ObjectStore
  const opener = yield* PartitionOpener
  const local = yield* LocalActors
  const membership = yield* Membership
  const calls = yield* Calls
  const catalog = (yield* Catalog.client)(catalogId)
  const entityScope = yield* Effect.scope
  const prefix = partitionPrefix(uid, partition)
  const annotate = Effect.annotateLogs({ collection: name, partition })
  const services = yield* Effect.context<never>()

  let resident: Resident | undefined
  /** While one that was let go closes, with a last snapshot perhaps. */
  let closing: Deferred.Deferred<void> | undefined
  let activating: Deferred.Deferred<Resident, PartitionError> | undefined
  let failure: { readonly error: PartitionError; readonly until: number } | undefined
  let removed = false
  /** Another node has claimed it while the cluster's database was gone: until it is back that one is to have it. */
  let yielded = false
  /** What was read of a snapshot was not what it should be: the next opening reads all of it first. */
  let suspect = false

  const quarantine = new Quarantine({ collection: name, partition }, settings)
  yield* local.registerQuarantine(entityId, () => quarantine.state(Date.now()))
  const fault = (detail: string) => {
    quarantine.failed(detail, Date.now())
    faults.updateUnsafe(1, Context.empty())
    if (quarantine.until(Date.now()) === 0) return
    Effect.runForkWith(services)(
      annotate(Effect.logError("The partition is in quarantine", quarantine.state(Date.now())))
    )
  }

  const unavailable = (detail: string, retryAfterMillis = 500) =>
    new PartitionUnavailable({ collection: name, partition, detail, retryAfterMillis })

  const lostError = (error: IndexLost) =>
    unavailable(`Its vector thread was lost (${error.detail}); it is being reopened.`)

  /** Lets go of the partition, with a last snapshot unless `exit` is a failure; the next message activates it again. */
  const letGo = (of: Resident | undefined, exit: Exit.Exit<void, "removed" | "claimed"> = Exit.void) =>
    Effect.suspend(() => {
      if (of === undefined || resident !== of) return Effect.void
      resident = undefined
      const closed = Deferred.makeUnsafe<void>()
      closing = closed
      return Effect.ensuring(
        Scope.close(of.scope, exit),
        Effect.sync(() => {
          closing = undefined
          Deferred.doneUnsafe(closed, Effect.void)
        })
      )
    })

  const readCollection = Effect.gen(function* () {
    const unreachable = () => unavailable("The catalogue cannot be reached.")
    const collection = yield* calls
      .to({ group: "default", id: catalogId }, catalog.Read({ name }), unreachable)
      .pipe(
        Effect.mapError((error) =>
          error._tag === "CollectionNotFound" || error._tag === "StorageUnavailable" ? error : unreachable()
        )
      )
    if (collection.uid !== uid) return yield* new CollectionNotFound({ collection: name })
    return collection
  })

  const open = Effect.fnUntraced(function* (scope: Scope.Closeable) {
    const collection = yield* readCollection
    const verify = suspect
    const self: { resident?: Resident } = {}
    const opened = yield* opener
      .open(address, collection, {
        verify,
        isolated: quarantine.isSuspect(Date.now()),
        onFault: fault,
        letGo: (why) =>
          Effect.suspend(() => {
            suspect ||= why.verify
            return letGo(self.resident)
          }).pipe(
            // Not from inside the scope that it closes.
            Effect.forkIn(entityScope),
            Effect.flatMap(Fiber.await),
            Effect.asVoid
          )
      })
      .pipe(Scope.provide(scope))
    if (verify) suspect = false
    self.resident = { ...opened, scope }
    yield* Metric.update(activations, 1)
    return self.resident
  })

  /** The partition, resident; activates it first where it is not. All callers share one activation. */
  const activate: Effect.Effect<Resident, PartitionError> = Effect.suspend(() => {
    if (removed) return Effect.fail(new CollectionNotFound({ collection: name }))
    if (resident !== undefined) return Effect.succeed(resident)
    if (yielded && membership.outage() !== undefined) return Effect.fail(unavailable("Another node owns it now."))
    yielded = false
    const now = Date.now()
    const quarantinedUntil = quarantine.until(now)
    if (quarantinedUntil > 0) return Effect.fail(quarantined(quarantinedUntil - now))
    if (failure !== undefined && now < failure.until) return Effect.fail(failure.error)
    if (activating === undefined) {
      const started = Deferred.makeUnsafe<Resident, PartitionError>()
      activating = started
      const attempt = Effect.gen(function* () {
        if (closing !== undefined) yield* Deferred.await(closing)
        const scope = yield* Scope.fork(entityScope)
        const exit = yield* Effect.exit(open(scope))
        activating = undefined
        if (Exit.isSuccess(exit) && removed) {
          yield* Scope.close(scope, Exit.void)
          yield* Deferred.fail(started, new CollectionNotFound({ collection: name }))
          return
        }
        if (Exit.isSuccess(exit)) {
          resident = exit.value
          failure = undefined
          quarantine.opened(Date.now())
          const of = exit.value
          const here = {
            collection: of.collection,
            handOver: of.handOver,
            search: (query: PartitionQuery) => again(of, of.search(query), (next) => next.search(query)),
            get: (ids: ReadonlyArray<string>) => again(of, of.get(ids), (next) => next.get(ids)),
            revision: of.writer.revision,
            watch: (query: PartitionWatch, listener: WatchListener) =>
              Effect.mapError(of.watch(query, listener), (error) =>
                error instanceof IndexLost ? lostError(error) : error
              ),
            position: of.position
          }
          yield* Scope.provide(local.registerPartition(entityId, here), scope)
          yield* Scope.provide(membership.confirming(confirm(of)), scope)
        } else {
          yield* Scope.close(scope, Exit.void)
          const found = Exit.findErrorOption(exit)
          const error = Option.isSome(found)
            ? found.value
            : unavailable("It could not be opened; the logs say why.", 5_000)
          const retryMillis = error._tag === "Overloaded" ? retryMemoryMillis : retryActivationMillis
          // What its thread had to say of it has been counted.
          if (Option.isNone(found) && !Cause.hasInterruptsOnly(exit.cause))
            fault(Cause.pretty(exit.cause).slice(0, 500))
          else if (error._tag === "PartitionCorrupt") fault(`${error.object}: ${error.detail}`)
          failure = { error, until: Date.now() + retryMillis }
          if (error._tag !== "CollectionNotFound") {
            yield* Metric.update(activationFailures, 1)
            yield* annotate(Effect.logError("Partition could not be opened", toProblem(error).detail, exit.cause))
          }
          yield* Deferred.fail(started, error)
          return
        }
        yield* Deferred.succeed(started, exit.value)
      })
      Effect.runForkWith(services)(Effect.forkIn(attempt, entityScope))
    }
    return Effect.timeoutOrElse(Deferred.await(activating), {
      duration: settings.activationDeadlineMillis,
      orElse: () => Effect.fail(unavailable("It is being opened.", 2_000))
    })
  })

  const quarantined = (leftMillis: number): PartitionError => {
    if (failure?.error._tag === "PartitionCorrupt") return failure.error
    const state = quarantine.state(Date.now())
    return unavailable(`It is in quarantine after ${state?.failures} failures (${state?.detail}).`, leftMillis)
  }

  /** Lets go of it where it is another's by now. What cannot be asked is asked again. */
  const confirm = (of: Resident): Effect.Effect<void> =>
    of.confirm.pipe(
      Effect.catch(() => Effect.succeed(true)),
      Effect.flatMap((isOurs) => {
        if (isOurs || resident !== of) return Effect.void
        yielded = true
        return Metric.update(yields, 1).pipe(
          Effect.andThen(annotate(Effect.logWarning("Another node has claimed the partition; it is let go of"))),
          Effect.andThen(Effect.forkIn(letGo(of, Exit.fail("claimed")), entityScope)),
          Effect.asVoid
        )
      })
    )

  /** A read that found the partition gone waits until it is resident again, and reads once more. */
  const again = <A>(
    of: Resident,
    read: Effect.Effect<A, PartitionError | IndexLost>,
    retry: (next: Resident) => Effect.Effect<A, PartitionError | IndexLost>
  ): Effect.Effect<A, PartitionError> =>
    Effect.catch(read, (error): Effect.Effect<A, PartitionError> => {
      if (!(error instanceof IndexLost)) return Effect.fail(error)
      // In the mapped form it may be its file that is not what it should be.
      suspect ||= of.form() === "mapped"
      return Effect.andThen(letGo(of), activate).pipe(
        Effect.flatMap(retry),
        Effect.mapError((second) => (second instanceof IndexLost ? lostError(second) : second))
      )
    })

  const read = <A>(
    use: (of: Resident) => Effect.Effect<A, PartitionError | IndexLost>
  ): Effect.Effect<A, PartitionError> => Effect.flatMap(activate, (of) => again(of, use(of), use))

  const write = (
    drafts: ReadonlyArray<PartitionWriter.Draft>,
    requestId: string | undefined,
    ack: PartitionWriter.AckLevel = "cold"
  ) =>
    Effect.flatMap(activate, (of) => {
      const { dimensions } = of.collection
      // Looked at before anything of the batch is queued: a batch is written whole or not at all.
      for (const draft of drafts) {
        if (draft.kind === "upsert" && draft.vector.length !== dimensions) {
          const got = `${draft.vector.length} of ${JSON.stringify(draft.id)}`
          return Effect.fail(new InvalidInput({ field: "vector", expected: `${dimensions} numbers`, got }))
        }
      }
      const request = requestOf(requestId, (hash) => digestOf(drafts, hash))
      return Effect.mapError(of.writer.write(drafts, ack, request), writeError)
    })

  const writeError = (error: PartitionWriter.WriteError): PartitionError => {
    if (error._tag === "IndexLost") return lostError(error)
    if (error._tag === "NotOwner") return unavailable("Another node owns it now.")
    return error
  }

  const remove = Effect.gen(function* () {
    removed = true
    local.partitionRemoved(entityId)
    // An activation under way ends by itself, seeing that; its objects must not be deleted beneath it.
    if (activating !== undefined) yield* Effect.exit(Deferred.await(activating))
    yield* letGo(resident, Exit.fail("removed"))
    yield* PartitionLog.remove(prefix).pipe(
      Effect.provideService(ObjectStore, store),
      Effect.mapError((error) => new StorageUnavailable({ detail: error.detail, retryAfterMillis: 1_000 }))
    )
  })

  return IndexPartition.of({
    Activate: () => read((of) => of.stats),
    Upsert: ({ payload }) =>
      Effect.map(
        write(
          payload.records.map((record) => ({ kind: "upsert" as const, ...record })),
          payload.requestId,
          payload.ack
        ),
        (inserted) => ({ inserted })
      ),
    UpdateMetadata: ({ payload }) =>
      Effect.gen(function* () {
        const of = yield* activate
        const fields = JSON.parse(payload.patch) as Record<string, unknown>
        const request = requestOf(payload.requestId, (hash) => crc32(`${payload.id}\0${payload.patch}`, hash))
        const patched = yield* Effect.mapError(of.writer.patch(payload.id, fields, request), writeError)
        return patched ?? (yield* new VectorNotFound({ collection: name, id: payload.id }))
      }),
    Delete: ({ payload }) =>
      Effect.map(
        write(
          payload.ids.map((id) => ({ kind: "delete" as const, id })),
          payload.requestId
        ),
        (deleted) => ({ deleted })
      ),
    Get: ({ payload }) => read((of) => of.get(payload.ids)),
    Search: ({ payload }) => read((of) => of.search(payload)),
    Stats: () => read((of) => of.stats),
    Watch: ({ payload }) =>
      watchStream(
        local,
        entityId,
        payload,
        read((of) => of.stats)
      ),
    Changes: ({ payload }) => Stream.unwrap(Effect.map(activate, (of) => changesAfter(of.changes, payload))),
    ReadChanges: ({ payload: { limit, ...position } }) =>
      Effect.flatMap(
        activate,
        ({ changes }): Effect.Effect<ChangePage, PartitionError | Compacted> =>
          limit === 0 ? Effect.succeed({ changes: [], newest: changes.newest() }) : changes.read(position, limit)
      ),
    Release: () =>
      Effect.sync(() => {
        const was = quarantine.state(Date.now()) !== undefined
        quarantine.release()
        failure = undefined
        return was
      }),
    Remove: () => remove
  })
})

/** What is compared of requests under one id; ids that were given name one request alone. */
const requestOf = (
  id: string | undefined,
  digest: (hash: number) => number
): PartitionWriter.WriteRequest | undefined =>
  id === undefined ? undefined : { id, digest: isGiven(id) ? 0 : digest(0) }

const digestOf = (drafts: ReadonlyArray<PartitionWriter.Draft>, from: number): number => {
  let hash = from
  for (const draft of drafts) {
    hash = crc32(`${draft.kind}\0${draft.id}\0`, hash)
    if (draft.kind === "delete") continue
    hash = crc32(draft.metadata, crc32(vectorToBytes(draft.vector), hash))
  }
  return hash
}
