/**
 * The `IndexPartition` entity: owner of one slice of a collection. It claims the partition's log (raising the epoch),
 * opens the newest good snapshot in a vector thread, replays what follows, and then serves. When its thread dies or
 * another owner appears it lets go, and the next message makes it resident again.
 */
import { mkdtemp, rm } from "node:fs/promises"
import { join } from "node:path"
import { Deferred, Duration, Effect, Exit, Layer, Metric, Option, Result, Scope, Stream } from "effect"
import { Entity } from "effect/cluster"
import { Settings } from "../config.ts"
import { Catalog, catalogId } from "../protocol/Catalog.ts"
import type { Collection } from "../protocol/Collection.ts"
import {
  CollectionNotFound,
  InvalidInput,
  Overloaded,
  PartitionCorrupt,
  PartitionUnavailable,
  StorageUnavailable,
  VectorNotFound
} from "../protocol/Errors.ts"
import {
  type Change,
  Compacted,
  IndexPartition,
  type PartitionError,
  type PartitionHits,
  type PartitionQuery,
  type PartitionRecord,
  type PartitionStats,
  partitionAddressOf
} from "../protocol/IndexPartition.ts"
import { formatVersion, VersionClock } from "../protocol/Version.ts"
import { LocalActors } from "../shards/LocalActors.ts"
import type { AheadLog } from "../tiers/AheadLog.ts"
import { DataDirectory } from "../tiers/DataDirectory.ts"
import { decodeSegment, type LogOp } from "../tiers/LogSegment.ts"
import { ObjectStore } from "../tiers/ObjectStore.ts"
import * as PartitionLog from "../tiers/PartitionLog.ts"
import type { RecordCache } from "../tiers/RecordCache.ts"
import {
  type Applied,
  type IndexHits,
  IndexLost,
  type IndexRecord,
  type IndexSpec,
  type PartitionIndex,
  VectorIndex
} from "../tiers/VectorIndex.ts"
import type { WarmStore } from "../tiers/WarmStore.ts"
import { ChangeFeed, type Position } from "./ChangeFeed.ts"
import * as PartitionCaches from "./PartitionCaches.ts"
import * as PartitionWriter from "./PartitionWriter.ts"

/** Key prefix of a partition's objects. */
export const partitionPrefix = (uid: string, partition: number): string =>
  `collections/${uid}/p${String(partition).padStart(3, "0")}`

const activations = Metric.counter("ruvector_partition_activations", { description: "Partitions made resident" })
const activationFailures = Metric.counter("ruvector_partition_activation_failures", {
  description: "Attempts to make a partition resident that failed"
})
const snapshotsTaken = Metric.counter("ruvector_snapshots_taken", { description: "Snapshots committed" })
const snapshotFailures = Metric.counter("ruvector_snapshot_failures", { description: "Snapshots that failed" })

/** After an activation failed, further messages are answered with its error for this long before it is tried again. */
const retryActivationMillis = 2_000

/** Changes read at once for one follower. */
const feedBatch = 256

/** What is asked of a partition while it is resident. `IndexLost`: it no longer is. */
interface Resident {
  readonly collection: Collection
  readonly scope: Scope.Closeable
  readonly search: (query: PartitionQuery) => Effect.Effect<PartitionHits, PartitionError | IndexLost>
  readonly get: (ids: ReadonlyArray<string>) => Effect.Effect<ReadonlyArray<PartitionRecord | null>, IndexLost>
  readonly stats: Effect.Effect<PartitionStats, IndexLost>
  readonly writer: PartitionWriter.PartitionWriter
  readonly changes: (from: Position) => Stream.Stream<Change, PartitionError | Compacted>
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
  const { collection: name, uid, partition } = partitionAddressOf(entityId)
  const settings = yield* Settings
  const store = yield* ObjectStore
  const vectors = yield* VectorIndex
  const { scratch } = yield* DataDirectory
  const local = yield* LocalActors
  const tiers = yield* Effect.context<AheadLog | RecordCache | WarmStore>()
  const catalog = (yield* Catalog.client)(catalogId)
  const entityScope = yield* Effect.scope
  const prefix = partitionPrefix(uid, partition)
  const annotate = Effect.annotateLogs({ collection: name, partition })
  const services = yield* Effect.context<never>()

  let resident: Resident | undefined
  let activating: Deferred.Deferred<Resident, PartitionError> | undefined
  let failure: { readonly error: PartitionError; readonly until: number } | undefined
  let removed = false

  const unavailable = (detail: string, retryAfterMillis = 500) =>
    new PartitionUnavailable({ collection: name, partition, detail, retryAfterMillis })

  const lostError = (error: IndexLost) =>
    unavailable(`Its vector thread was lost (${error.detail}); it is being reopened.`)

  /** Lets go of the partition; the next message activates it again. */
  const letGo = (of: Resident | undefined) =>
    Effect.suspend(() => {
      if (of === undefined || resident !== of) return Effect.void
      resident = undefined
      return Scope.close(of.scope, Exit.void)
    })

  const readCollection = Effect.gen(function* () {
    const collection = yield* catalog
      .Read({ name })
      .pipe(
        Effect.mapError((error) =>
          error._tag === "CollectionNotFound" || error._tag === "StorageUnavailable"
            ? error
            : unavailable("The catalogue cannot be reached.")
        )
      )
    if (collection.uid !== uid) return yield* new CollectionNotFound({ collection: name })
    return collection
  })

  /**
   * Claims the log and opens the newest snapshot that can be opened: one whose checksums hold and that is of no use all the
   * same is given up for the one before it, once; the log reaches back to that.
   */
  const openNewest = (
    scope: Scope.Closeable,
    spec: IndexSpec,
    snapshotsBefore: number | undefined
  ): Effect.Effect<{ readonly log: PartitionLog.PartitionLogHandle; readonly index: PartitionIndex }, PartitionError> =>
    Effect.gen(function* () {
      const log = yield* PartitionLog.open(prefix, snapshotsBefore === undefined ? {} : { snapshotsBefore }).pipe(
        Effect.provideService(ObjectStore, store),
        Scope.provide(scope),
        Effect.mapError((error): PartitionError => {
          switch (error._tag) {
            case "LogCorrupt":
              return new PartitionCorrupt({ collection: name, partition, object: error.object, detail: error.detail })
            case "StoreFailure":
              return new StorageUnavailable({ detail: error.detail, retryAfterMillis: 1_000 })
            default:
              return unavailable(error.message, 5_000)
          }
        })
      )
      const { snapshot } = log
      const opening =
        snapshot === undefined
          ? vectors.open(spec, undefined)
          : store.withFile(snapshot.records.key, (records) =>
              store.withFile(snapshot.graph.key, (graph) => vectors.open(spec, { records, graph }))
            )
      const opened = yield* Effect.result(Scope.provide(opening, scope))
      if (Result.isSuccess(opened)) return { log, index: opened.success }
      const error = opened.failure
      switch (error._tag) {
        case "IndexLost":
          return yield* lostError(error)
        case "StoreFailure":
          return yield* new StorageUnavailable({ detail: error.detail, retryAfterMillis: 1_000 })
        case "ObjectMissing":
          // Pruned by an owner that came after this one.
          return yield* unavailable("Another node owns it now.")
        case "SnapshotUnreadable": {
          if (snapshot === undefined || snapshotsBefore !== undefined) {
            const object = snapshot?.records.key ?? prefix
            return yield* new PartitionCorrupt({ collection: name, partition, object, detail: error.detail })
          }
          yield* annotate(Effect.logWarning("A snapshot cannot be opened; the one before is", error.detail))
          return yield* openNewest(scope, spec, snapshot.seq)
        }
      }
    })

  const open = Effect.fnUntraced(function* (scope: Scope.Closeable) {
    const started = performance.now()
    const collection = yield* readCollection
    const spec = {
      dimensions: collection.dimensions,
      metric: collection.metric,
      m: collection.index.m,
      efConstruction: collection.index.ef_construction
    }
    const { log, index } = yield* openNewest(scope, spec, undefined)

    // Replay: handed to the thread as they are read, a bounded number ahead of what it has applied.
    let replayed = 0
    yield* log.tail.pipe(
      Stream.mapEffect(
        ({ bytes }) => Effect.tap(index.apply(bytes), ({ effects }) => Effect.sync(() => (replayed += effects.length))),
        {
          concurrency: replayAhead
        }
      ),
      Stream.runDrain,
      Effect.mapError((error) =>
        error._tag === "IndexLost"
          ? lostError(error)
          : error._tag === "StoreFailure"
            ? new StorageUnavailable({ detail: error.detail, retryAfterMillis: 1_000 })
            : new PartitionCorrupt({ collection: name, partition, object: error.object, detail: error.detail })
      )
    )
    const replayedStats = yield* Effect.mapError(index.stats, lostError)
    const clock = new VersionClock(
      settings.region,
      replayedStats.maxTime,
      replayedStats.counters.get(settings.region) ?? 0
    )
    const feed = new ChangeFeed(settings.changeBufferMax, { seq: log.lastSeq(), index: Number.MAX_SAFE_INTEGER })
    let opsSinceSnapshot = replayed
    let lastWriteAt = Date.now()

    const caches = yield* PartitionCaches.open(entityId, log).pipe(Effect.provideContext(tiers), Scope.provide(scope))
    const self: { resident?: Resident } = {}
    const writer = yield* PartitionWriter.make({
      log,
      index,
      clock,
      dimensions: collection.dimensions,
      bounds: settings,
      ...caches,
      onApplied: (seq, ops, applied) => {
        opsSinceSnapshot += ops.length
        lastWriteAt = Date.now()
        feed.publish(changesOf(seq, ops, applied))
      },
      onFatal: (error) =>
        Effect.logWarning(`Partition lets go: ${error._tag}`, error.detail).pipe(
          Effect.andThen(Effect.suspend(() => letGo(self.resident))),
          // Not from inside the scope that it closes.
          Effect.forkIn(entityScope),
          Effect.asVoid,
          annotate
        )
    }).pipe(Scope.provide(scope))

    const snapshotNow = Effect.gen(function* () {
      const seq = writer.appliedSeq()
      const covered = opsSinceSnapshot
      const directory = yield* Effect.promise(() => mkdtemp(join(scratch, "snapshot-")))
      yield* Effect.gen(function* () {
        const files = yield* index.snapshot(directory)
        yield* log.commitSnapshot(seq, files)
      }).pipe(Effect.ensuring(Effect.promise(() => rm(directory, { recursive: true, force: true }))))
      opsSinceSnapshot -= covered
      yield* Metric.update(snapshotsTaken, 1)
    }).pipe(
      Effect.catch((error) =>
        Effect.andThen(
          Metric.update(snapshotFailures, 1),
          annotate(Effect.logWarning(`Snapshot failed: ${error._tag}`, "detail" in error ? error.detail : ""))
        )
      )
    )

    const snapshotPolicy = Effect.gen(function* () {
      let failures = 0
      while (true) {
        yield* Effect.sleep(Math.min(snapshotCheckMillis * 2 ** failures, 60_000))
        if (opsSinceSnapshot === 0) continue
        const quiet = Date.now() - lastWriteAt >= settings.snapshotIdleMillis
        if (!quiet) {
          if (opsSinceSnapshot < settings.snapshotOps) continue
          const { count } = yield* index.stats
          if (opsSinceSnapshot < (count * settings.snapshotSharePercent) / 100) continue
        }
        const before = opsSinceSnapshot
        yield* snapshotNow
        failures = opsSinceSnapshot < before ? 0 : Math.min(failures + 1, 8)
      }
    }).pipe(Effect.ignore)
    yield* Effect.forkIn(snapshotPolicy, scope)
    // Closing with a snapshot makes the next opening short. Bounded: what is not snapshotted is in the log.
    yield* Scope.addFinalizer(
      scope,
      Effect.suspend(() => (opsSinceSnapshot === 0 || index.lost() ? Effect.void : snapshotNow)).pipe(
        Effect.timeoutOption(settings.drainMillis),
        Effect.asVoid
      )
    )

    const search = (query: PartitionQuery): Effect.Effect<PartitionHits, PartitionError | IndexLost> => {
      if (query.vector.length !== collection.dimensions) {
        return Effect.fail(
          new InvalidInput({
            field: "query",
            expected: `${collection.dimensions} numbers`,
            got: `${query.vector.length}`
          })
        )
      }
      return Effect.mapBoth(
        index.search({
          vector: query.vector,
          k: query.k,
          ef: Math.max(query.ef === 0 ? collection.index.ef_search : query.ef, query.k),
          filter: query.filter === "" ? undefined : query.filter,
          includeMetadata: query.includeMetadata,
          includeVector: query.includeVector
        }),
        {
          onSuccess: toHits,
          onFailure: (error) =>
            error._tag === "IndexBusy" ? new Overloaded({ bound: "threadPendingMax", retryAfterMillis: 100 }) : error
        }
      )
    }

    const get = (ids: ReadonlyArray<string>) =>
      Effect.map(index.get(ids), (records) => records.map((record) => (record === undefined ? null : toRecord(record))))

    const stats = Effect.map(
      index.stats,
      (now): PartitionStats => ({
        count: now.count,
        tombstones: now.tombstones,
        bytes: now.bytes,
        epoch: log.epoch,
        last_seq: log.lastSeq(),
        snapshot_seq: log.snapshotSeq(),
        log_objects_cut: log.cut,
        snapshots_refused: log.snapshotsRefused
      })
    )

    /** What follows a position: from the buffer, else from the log. */
    const changes = (from: Position): Stream.Stream<Change, PartitionError | Compacted> =>
      Stream.paginate(from, (position) =>
        Effect.gen(function* () {
          while (true) {
            // Taken before looking, so that what is published between the look and the wait is not missed.
            const news = feed.news
            const buffered = feed.after(position, feedBatch)
            if (buffered !== undefined && buffered.length > 0) {
              return [buffered, Option.some(buffered[buffered.length - 1] as Position)] as const
            }
            if (buffered === undefined) {
              const logged = yield* readChanges(position)
              const last = logged[logged.length - 1]
              if (last !== undefined) return [logged, Option.some(last as Position)] as const
              // Nothing of the log is left to read, and the buffer begins after it: follow the buffer.
              return [[], Option.some(feed.floor)] as const
            }
            yield* news
          }
        })
      )

    const readChanges = (position: Position): Effect.Effect<ReadonlyArray<Change>, PartitionError | Compacted> =>
      log.read(position.index === Number.MAX_SAFE_INTEGER ? position.seq + 1 : Math.max(position.seq, 1)).pipe(
        Stream.flatMap(({ seq, bytes }) => Stream.fromIterable(changesOf(seq, decodeSegment(bytes).ops, undefined))),
        Stream.filter((change) => change.seq > position.seq || change.index > position.index),
        Stream.take(feedBatch),
        Stream.runCollect,
        Effect.mapError((error) =>
          error._tag === "Compacted"
            ? new Compacted({ oldestSeq: error.oldestSeq })
            : new StorageUnavailable({ detail: "The log cannot be read now.", retryAfterMillis: 1_000 })
        )
      )

    const opened: Resident = { collection, scope, search, get, stats, writer, changes }
    self.resident = opened
    yield* Metric.update(activations, 1)
    yield* annotate(
      Effect.logInfo("Partition is resident", {
        records: replayedStats.count,
        replayed,
        epoch: log.epoch,
        millis: Math.round(performance.now() - started)
      })
    )
    return opened
  })

  /** The partition, resident; activates it first where it is not. All callers share one activation. */
  const activate: Effect.Effect<Resident, PartitionError> = Effect.suspend(() => {
    if (removed) return Effect.fail(new CollectionNotFound({ collection: name }))
    if (resident !== undefined) return Effect.succeed(resident)
    if (failure !== undefined && Date.now() < failure.until) return Effect.fail(failure.error)
    if (activating === undefined) {
      const started = Deferred.makeUnsafe<Resident, PartitionError>()
      activating = started
      const attempt = Effect.gen(function* () {
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
          const of = exit.value
          const here = {
            search: (query: PartitionQuery) => again(of, of.search(query), (next) => next.search(query)),
            get: (ids: ReadonlyArray<string>) => again(of, of.get(ids), (next) => next.get(ids))
          }
          yield* Scope.provide(local.registerPartition(entityId, here), scope)
        } else {
          yield* Scope.close(scope, Exit.void)
          const found = Exit.findErrorOption(exit)
          const error = Option.isSome(found)
            ? found.value
            : unavailable("It could not be opened; the logs say why.", 5_000)
          failure = { error, until: Date.now() + retryActivationMillis }
          if (error._tag !== "CollectionNotFound") {
            yield* Metric.update(activationFailures, 1)
            yield* annotate(Effect.logError("Partition could not be opened", exit.cause))
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

  /** A read that found the partition gone waits until it is resident again, and reads once more. */
  const again = <A>(
    of: Resident,
    read: Effect.Effect<A, PartitionError | IndexLost>,
    retry: (next: Resident) => Effect.Effect<A, PartitionError | IndexLost>
  ): Effect.Effect<A, PartitionError> =>
    Effect.catch(read, (error): Effect.Effect<A, PartitionError> => {
      if (!(error instanceof IndexLost)) return Effect.fail(error)
      return Effect.andThen(letGo(of), activate).pipe(
        Effect.flatMap(retry),
        Effect.mapError((second) => (second instanceof IndexLost ? lostError(second) : second))
      )
    })

  const read = <A>(
    use: (of: Resident) => Effect.Effect<A, PartitionError | IndexLost>
  ): Effect.Effect<A, PartitionError> => Effect.flatMap(activate, (of) => again(of, use(of), use))

  const write = (drafts: ReadonlyArray<PartitionWriter.Draft>, ack: PartitionWriter.AckLevel = "cold") =>
    Effect.flatMap(activate, (of) => {
      const { dimensions } = of.collection
      // Looked at before anything of the batch is queued: a batch is written whole or not at all.
      for (const draft of drafts) {
        if (draft.kind === "upsert" && draft.vector.length !== dimensions) {
          const got = `${draft.vector.length} of ${JSON.stringify(draft.id)}`
          return Effect.fail(new InvalidInput({ field: "vector", expected: `${dimensions} numbers`, got }))
        }
      }
      return Effect.mapError(of.writer.write(drafts, ack), writeError)
    })

  const writeError = (error: PartitionWriter.WriteError): PartitionError => {
    if (error._tag === "IndexLost") return lostError(error)
    if (error._tag === "NotOwner") return unavailable("Another node owns it now.")
    return error
  }

  const remove = Effect.gen(function* () {
    removed = true
    // An activation under way ends by itself, seeing that; its objects must not be deleted beneath it.
    if (activating !== undefined) yield* Effect.exit(Deferred.await(activating))
    yield* letGo(resident)
    yield* PartitionLog.remove(prefix).pipe(
      Effect.provideService(ObjectStore, store),
      Effect.mapError((error) => new StorageUnavailable({ detail: error.detail, retryAfterMillis: 1_000 }))
    )
  })

  return IndexPartition.of({
    Activate: () => read((of) => of.stats),
    Upsert: ({ payload }) =>
      Effect.as(
        write(
          payload.records.map((record) => ({ kind: "upsert" as const, ...record })),
          payload.ack
        ),
        { inserted: payload.records.length }
      ),
    UpdateMetadata: ({ payload }) =>
      Effect.gen(function* () {
        const of = yield* activate
        const fields = JSON.parse(payload.patch) as Record<string, unknown>
        const patched = yield* Effect.mapError(of.writer.patch(payload.id, fields), writeError)
        return patched ?? (yield* new VectorNotFound({ collection: name, id: payload.id }))
      }),
    Delete: ({ payload }) =>
      Effect.map(write(payload.ids.map((id) => ({ kind: "delete" as const, id }))), ({ effects }) => ({
        deleted: effects.reduce((sum, effect) => sum + Number(effect === deletedVisible), 0)
      })),
    Get: ({ payload }) => read((of) => of.get(payload.ids)),
    Search: ({ payload }) => read((of) => of.search(payload)),
    Stats: () => read((of) => of.stats),
    Changes: ({ payload }) => Stream.unwrap(Effect.map(activate, (of) => of.changes(payload))),
    Remove: () => remove
  })
})

/** `Applied.effects` of a delete that found a visible record. */
const deletedVisible = 3

/** Log objects given to the thread ahead of what it has applied, while replaying. */
const replayAhead = 8

/** Between two looks at whether a snapshot is due. */
const snapshotCheckMillis = 500

const toHits = (hits: IndexHits): PartitionHits => ({
  ids: hits.ids,
  scores: hits.scores,
  ...(hits.metadata === undefined ? {} : { metadata: hits.metadata }),
  ...(hits.vectors === undefined ? {} : { vectors: hits.vectors })
})

const toRecord = (record: IndexRecord): PartitionRecord => ({
  id: record.id,
  vector: record.vector,
  metadata: record.metadata,
  version: formatVersion(record.version)
})

/** The changes of a group, without operations that had no effect where that is known. */
const changesOf = (seq: number, ops: ReadonlyArray<LogOp>, applied: Applied | undefined): ReadonlyArray<Change> =>
  ops.flatMap(({ kind, id, version }, index) =>
    applied?.effects[index] === 0 ? [] : [{ seq, index, kind, id, version: formatVersion(version) }]
  )
