/**
 * Makes one partition resident: claims its log, opens the newest good snapshot in a vector thread, replays what follows,
 * and sets up what serves it. Everything lives in the caller's scope and ends with it.
 *
 * A snapshot with a sketch is opened in its mapped form, which takes milliseconds; the full form is loaded behind it where
 * the memory budget has room (`ResidentIndex`). Without one the full form is opened at once: the records are few.
 */
import { availableParallelism } from "node:os"
import { crc32 } from "node:zlib"
import { Context, Effect, Exit, Fiber, Layer, Result, Scope, Semaphore, Stream } from "effect"
import { Settings } from "../config.ts"
import type { Collection } from "../protocol/Collection.ts"
import {
  InvalidInput,
  Overloaded,
  PartitionCorrupt,
  PartitionUnavailable,
  StorageUnavailable
} from "../protocol/Errors.ts"
import {
  endOfObject,
  type PartitionAddress,
  type PartitionError,
  type PartitionHits,
  type PartitionQuery,
  type PartitionRecord,
  type PartitionStats,
  partitionId
} from "../protocol/IndexPartition.ts"
import { standingMembersMax } from "../protocol/Limits.ts"
import type { PartitionWatch } from "../protocol/StandingQuery.ts"
import { formatVersion, VersionClock } from "../protocol/Version.ts"
import { ChangeFeed } from "../shards/ChangeFeed.ts"
import { LocalActors, type LocalChanges, type WatchHandle, type WatchListener } from "../shards/LocalActors.ts"
import { AheadLog } from "../tiers/AheadLog.ts"
import { partitionPrefix } from "../tiers/CatalogueObject.ts"
import { DataDirectory } from "../tiers/DataDirectory.ts"
import { sketchRecordsMin } from "../tiers/index/SketchFile.ts"
import { decodeRequests } from "../tiers/LogSegment.ts"
import { MemoryBudget } from "../tiers/MemoryBudget.ts"
import { type ObjectMissing, ObjectStore, type StoreFailure } from "../tiers/ObjectStore.ts"
import * as PartitionLog from "../tiers/PartitionLog.ts"
import type { Snapshot } from "../tiers/PartitionManifest.ts"
import { RecordCache } from "../tiers/RecordCache.ts"
import { RequestWindow } from "../tiers/RequestWindow.ts"
import * as ResidentIndex from "../tiers/ResidentIndex.ts"
import {
  type IndexForm,
  type IndexHits,
  type IndexLost,
  type IndexRecord,
  type IndexSpec,
  type OpeningOptions,
  type PartitionIndex,
  SnapshotUnreadable,
  type StandingSpec,
  VectorIndex
} from "../tiers/VectorIndex.ts"
import { WarmStore } from "../tiers/WarmStore.ts"
import * as PartitionCaches from "./PartitionCaches.ts"
import * as PartitionChanges from "./PartitionChanges.ts"
import * as PartitionWriter from "./PartitionWriter.ts"
import * as SnapshotPolicy from "./SnapshotPolicy.ts"
import * as Standby from "./Standby.ts"

/** How much wider a standing query's searches are than others: what one of them misses is missed until it changes. */
const standingBeamFactor = 2

/** What is asked of a partition while it is resident. `IndexLost`: it no longer is. */
export interface OpenPartition {
  readonly collection: Collection
  readonly search: (query: PartitionQuery) => Effect.Effect<PartitionHits, PartitionError | IndexLost>
  readonly get: (ids: ReadonlyArray<string>) => Effect.Effect<ReadonlyArray<PartitionRecord | null>, IndexLost>
  readonly stats: Effect.Effect<PartitionStats, IndexLost>
  readonly form: () => IndexForm
  readonly watch: (
    query: PartitionWatch,
    listener: WatchListener
  ) => Effect.Effect<WatchHandle, PartitionError | IndexLost>
  readonly position: () => number
  /** Whether nobody else owns it by now. */
  readonly confirm: Effect.Effect<boolean, StoreFailure>
  /** Before another process takes it over. */
  readonly handOver: Effect.Effect<void>
  readonly writer: PartitionWriter.PartitionWriter
  readonly changes: LocalChanges
}

export interface OpenOptions {
  /** Reads the snapshot's files whole and compares their checksums before anything is opened. */
  readonly verify: boolean
  /** In a vector thread of its own, where there is room for one. */
  readonly isolated: boolean
  /** Told where a vector thread dies, or has to give the partition up, at work on it. */
  readonly onFault: (detail: string) => void
  /** Called when the partition cannot go on, or has to make room; closes the scope. `verify`: the next opening should. */
  readonly letGo: (why: { readonly verify: boolean }) => Effect.Effect<void>
}

export class PartitionOpener extends Context.Service<
  PartitionOpener,
  {
    readonly open: (
      address: PartitionAddress,
      collection: Collection,
      options: OpenOptions
    ) => Effect.Effect<OpenPartition, PartitionError, Scope.Scope>
    /**
     * Opens the newest snapshot, in the form that there is memory for, without a claim: whoever owns the partition goes on. It is
     * there for the next `open`, or gone after `standbyMillis`. Nothing where it cannot be.
     */
    readonly prepare: (address: PartitionAddress, collection: Collection) => Effect.Effect<void>
  }
>()("ruvector/actors/PartitionOpener") {
  static readonly layer = Layer.effect(
    PartitionOpener,
    Effect.gen(function* () {
      // Just these: the scope has to be the caller's.
      const services = Context.pick(
        ObjectStore,
        VectorIndex,
        DataDirectory,
        MemoryBudget,
        AheadLog,
        RecordCache,
        WarmStore,
        LocalActors,
        Settings
      )(
        yield* Effect.context<
          | ObjectStore
          | VectorIndex
          | DataDirectory
          | MemoryBudget
          | AheadLog
          | RecordCache
          | WarmStore
          | LocalActors
          | Settings
        >()
      )
      // One at a time: each takes a vector thread's time from searches.
      const promotions = yield* Semaphore.make(1)
      // As many snapshots are made at once as there are threads to make them: each takes memory meanwhile.
      const { threads } = yield* Settings
      const snapshots = yield* Semaphore.make(threads || Math.max(1, availableParallelism() - 1))
      const standby = yield* Standby.make((yield* Settings).standbyMillis)
      return PartitionOpener.of({
        prepare: (address, collection) => Effect.provideContext(prepare(address, collection, standby), services),
        open: (address, collection, options) =>
          open(address, collection, options, { promotions, snapshots, standby }).pipe(
            Effect.annotateLogs({ collection: address.collection, partition: address.partition }),
            Effect.provideContext(services)
          )
      })
    })
  )
}

/** Log objects given to the thread ahead of what it has applied, while replaying. */
const replayAhead = 8

/** Between a partition's being resident in the mapped form and the loading of the full one. */
const promotionDelayMillis = 200

/** What a partition without a snapshot is counted as until it is measured. */
const emptyBytes = 3 * 1_048_576

/** What a snapshot's files become in memory, maps, strings and indexes of metadata included. */
const fullFactor = 1.35
const mappedFactor = 1.25

const fullBytesOf = ({ records, graph }: Snapshot): number => (records.bytes + graph.bytes) * fullFactor
/** Of the graph that the full form builds where the snapshot has none: links, points, labels, locks. */
const graphBytesOf = (spec: IndexSpec, { graph }: Snapshot, count: number): number =>
  graph.bytes > graphFileMin ? 0 : graphLocksBytes + count * (spec.m * 8 + spec.dimensions * 4 + 160)
const graphLocksBytes = 65_536 * 40
/** A graph file that is smaller has no nodes. */
const graphFileMin = 1_024
const mappedBytesOf = (sketch: { readonly bytes: number }): number => sketch.bytes * mappedFactor + 1_048_576

interface Opening {
  readonly log: PartitionLog.PartitionLogHandle
  readonly index: ResidentIndex.ResidentIndex
  /** The requests of the snapshot. */
  readonly window: RequestWindow
  /** The log after what the index was opened from, that is being read already. */
  readonly tail: PartitionLog.PartitionLogHandle["tail"]
}

/** The log after a snapshot that is not the newest. */
const tailAfter = (log: PartitionLog.PartitionLogHandle, seq: number): PartitionLog.PartitionLogHandle["tail"] =>
  Stream.mapError(log.read(seq + 1), (error) =>
    error._tag === "Compacted"
      ? new PartitionLog.LogCorrupt({
          object: log.prefix,
          fault: "missing",
          detail: `the log begins at ${error.oldestSeq}, after ${seq} of what was prepared`
        })
      : error
  )

const specOf = ({ dimensions, metric, index }: Collection): IndexSpec => ({
  dimensions,
  metric,
  m: index.m,
  efConstruction: index.ef_construction,
  quantization: index.quantization
})

/** The form is open in the scope that this runs in; the files are needed only while it is opened. */
const formOf = (
  {
    vectors,
    store,
    verify,
    options
  }: {
    readonly vectors: VectorIndex["Service"]
    readonly store: ObjectStore["Service"]
    /** What is wrong with the snapshot's files. */
    readonly verify: Effect.Effect<string | undefined, StoreFailure>
    readonly options?: OpeningOptions
  },
  spec: IndexSpec,
  snapshot: Snapshot | undefined,
  form: IndexForm
): Effect.Effect<PartitionIndex, OpenFault, Scope.Scope> =>
  Effect.gen(function* () {
    if (snapshot === undefined) return yield* vectors.open(spec, undefined, options)
    const { sketch } = snapshot
    const formScope = yield* Effect.scope
    if (form === "mapped" && sketch !== undefined) {
      return yield* Effect.scoped(
        Effect.flatMap(
          Effect.all([store.localPath(snapshot.records.key), store.localPath(sketch.key)], { concurrency: 2 }),
          ([records, file]) => Scope.provide(vectors.openMapped(spec, { records, sketch: file }, options), formScope)
        )
      )
    }
    const fault = yield* verify
    if (fault !== undefined) return yield* new SnapshotUnreadable({ detail: fault })
    return yield* Effect.scoped(
      Effect.flatMap(
        Effect.all([store.localPath(snapshot.records.key), store.localPath(snapshot.graph.key)], { concurrency: 2 }),
        ([records, graph]) => Scope.provide(vectors.open(spec, { records, graph }, options), formScope)
      )
    )
  })

/** See {@link PartitionOpener}. */
const prepare = Effect.fnUntraced(
  function* (address: PartitionAddress, collection: Collection, standby: Standby.Standby) {
    const store = yield* ObjectStore
    const vectors = yield* VectorIndex
    const budget = yield* MemoryBudget
    const prefix = partitionPrefix(address.uid, address.partition)
    const found = yield* PartitionLog.peekFiles(prefix)
    // Without a snapshot there is nothing to open: what there is is in the log.
    if (found === undefined) return
    const { snapshot, verify } = found
    // In the mapped form where there is one: it is there in milliseconds, and its blocks are read as they are needed.
    const form: IndexForm = snapshot.sketch === undefined ? "full" : "mapped"
    const bytes = snapshot.sketch === undefined ? fullBytesOf(snapshot) : mappedBytesOf(snapshot.sketch)
    if (!budget.fits(bytes)) return
    yield* standby.put(
      partitionId(address),
      snapshot.seq,
      formOf({ vectors, store, verify }, specOf(collection), snapshot, form)
    )
  },
  Effect.catchCause((cause) => Effect.logDebug("A partition could not be prepared", cause))
)

const open = Effect.fnUntraced(function* (
  address: PartitionAddress,
  collection: Collection,
  options: OpenOptions,
  {
    promotions,
    snapshots,
    standby
  }: {
    readonly promotions: Semaphore.Semaphore
    readonly snapshots: Semaphore.Semaphore
    readonly standby: Standby.Standby
  }
) {
  const started = performance.now()
  const settings = yield* Settings
  const store = yield* ObjectStore
  const vectors = yield* VectorIndex
  const budget = yield* MemoryBudget
  const { scratch } = yield* DataDirectory
  const scope = yield* Effect.scope
  const prefix = partitionPrefix(address.uid, address.partition)
  const faults = faultsOf(address)
  const spec = specOf(collection)
  const hasFull = (collection.index.quantization ?? "none") === "none"

  const openForm = (
    log: Pick<PartitionLog.PartitionLogHandle, "verifySnapshot">,
    snapshot: Snapshot | undefined,
    form: IndexForm
  ) => formOf({ vectors, store, verify: log.verifySnapshot, options }, spec, snapshot, form)

  /** What a snapshot has of the window of requests. */
  const openWindow = (snapshot: Snapshot | undefined) =>
    Effect.gen(function* () {
      const window = new RequestWindow(settings)
      const object = snapshot?.requests
      if (object === undefined) return window
      const { body } = yield* store.get(object.key)
      yield* Effect.try({
        try: () => {
          if (body.length !== object.bytes || crc32(body) !== object.crc32) throw new Error("its checksum differs")
          window.load(body)
        },
        catch: (cause) => new SnapshotUnreadable({ detail: `${object.key}: ${String(cause)}` })
      })
      return window
    })

  /**
   * Claims the log and opens the newest snapshot that can be opened. One that cannot be is given up for the one before it,
   * for good; the log reaches back to that.
   */
  const openNewest = (
    passedOver: PassedOver | undefined,
    ahead?: Effect.Success<ReturnType<typeof openAhead>>
  ): Effect.Effect<Opening, PartitionError, Scope.Scope> =>
    Effect.gen(function* () {
      const log = yield* PartitionLog.open(prefix, {
        deferVerification: !options.verify,
        retainMillis: settings.changeRetentionMillis,
        ...(passedOver !== undefined
          ? { snapshotsBefore: passedOver.seq }
          : peeked === undefined
            ? {}
            : { seen: peeked.seen })
      }).pipe(
        Effect.provideService(ObjectStore, store),
        Effect.mapError((error) =>
          // The log says no more than that it was passed over.
          error._tag === "LogCorrupt" && error.fault === "snapshot" && passedOver !== undefined
            ? faults.corrupt(passedOver.object, passedOver.detail)
            : faults.ofLog(error)
        )
      )
      const { snapshot } = log
      const attempt = Effect.fnUntraced(function* (form: IndexForm) {
        const formScope = yield* Scope.fork(scope)
        return yield* Scope.provide(openForm(log, snapshot, form), formScope).pipe(
          Effect.onError((cause) => Scope.close(formScope, Exit.failCause(cause))),
          Effect.map((form) => ({ form, formScope })),
          Effect.result
        )
      })
      // One that is suspect is opened anew, in a thread of its own.
      const mayBePrepared = passedOver === undefined && !options.verify && !options.isolated
      const prepared = mayBePrepared ? standby.take(partitionId(address)) : undefined
      if (prepared !== undefined) {
        const isUsable =
          !prepared.form.lost() && prepared.seq <= log.snapshotSeq() && log.oldestSeq() <= prepared.seq + 1
        // Of the newest snapshot also where the form is of an earlier one: what is replayed in between is known to it.
        const window = isUsable ? yield* Effect.result(openWindow(snapshot)) : undefined
        if (window !== undefined && Result.isSuccess(window)) {
          if (ahead !== undefined) yield* ahead.giveUp
          return {
            log,
            index: yield* ResidentIndex.make(prepared.form, prepared.scope),
            window: window.success,
            tail: yield* readAhead(prepared.seq === log.snapshotSeq() ? log.tail : tailAfter(log, prepared.seq))
          }
        }
        yield* Scope.close(prepared.scope, Exit.void)
      }
      const tail = yield* readAhead(log.tail)
      const isAhead = snapshot !== undefined && ahead?.snapshot.records.key === snapshot.records.key
      if (ahead !== undefined && !isAhead) yield* ahead.giveUp
      const windowed = yield* isAhead
        ? Effect.succeed(ahead.windowed)
        : Effect.forkChild(Effect.result(openWindow(snapshot)), { startImmediately: true })
      let opened = yield* isAhead ? ahead.opened : attempt(snapshot?.sketch === undefined ? "full" : "mapped")
      if (snapshot?.sketch !== undefined && Result.isFailure(opened) && opened.failure._tag === "SnapshotUnreadable") {
        yield* Effect.logWarning(`${snapshot.sketch.key} cannot be opened: ${opened.failure.detail}`)
        opened = yield* attempt("full")
      }
      const window = yield* Fiber.join(windowed)
      let error: OpenFault
      if (Result.isFailure(opened)) error = opened.failure
      else if (Result.isFailure(window)) {
        yield* Scope.close(opened.success.formScope, Exit.void)
        error = window.failure
      } else {
        const index = yield* ResidentIndex.make(opened.success.form, opened.success.formScope)
        return { log, index, window: window.success, tail }
      }
      if (error._tag !== "SnapshotUnreadable" || snapshot === undefined) return yield* faults.ofOpening(error, prefix)
      yield* Effect.logWarning("A snapshot cannot be opened; the one before is", error.detail)
      return yield* openNewest({ seq: snapshot.seq, object: snapshot.records.key, detail: error.detail })
    })

  /** The log is read while the form that it is applied to is being opened. */
  const readAhead = (tail: PartitionLog.PartitionLogHandle["tail"]) =>
    Effect.map(Scope.provide(Stream.toQueue(tail, { capacity: replayAhead }), opening), Stream.fromQueue)

  /**
   * Opens a snapshot's mapped form while the log is being claimed: most often it is the one that the log begins with. It only
   * reads files that stay as they are, so nothing depends on who owns the partition meanwhile.
   */
  const openAhead = Effect.fnUntraced(function* (snapshot: Snapshot) {
    const formScope = yield* Scope.fork(scope)
    const unverified = { verifySnapshot: Effect.undefined }
    const fiber = yield* Effect.forkIn(
      Scope.provide(openForm(unverified, snapshot, "mapped"), formScope).pipe(
        Effect.onError((cause) => Scope.close(formScope, Exit.failCause(cause))),
        Effect.map((form) => ({ form, formScope })),
        Effect.result
      ),
      scope,
      { startImmediately: true }
    )
    const windowed = yield* Effect.forkIn(Effect.result(openWindow(snapshot)), scope, { startImmediately: true })
    const giveUp = Effect.andThen(Fiber.interrupt(fiber), Scope.close(formScope, Exit.void))
    return { snapshot, opened: Fiber.join(fiber), windowed, giveUp }
  })

  // Held until what is resident has been measured.
  const opening = yield* Scope.fork(scope)
  const peeked = yield* PartitionLog.peek(prefix).pipe(Effect.catch(() => Effect.undefined))
  const newest = peeked?.snapshot
  const expected =
    newest === undefined ? emptyBytes : newest.sketch === undefined ? fullBytesOf(newest) : mappedBytesOf(newest.sketch)
  yield* Scope.provide(budget.reserve(expected), opening)
  const isPrepared = standby.has(partitionId(address))
  const ahead = newest?.sketch === undefined || options.verify || isPrepared ? undefined : yield* openAhead(newest)
  const { log, index, window, tail } = yield* openNewest(undefined, ahead)

  // Replay: handed to the thread as they are read, a bounded number ahead of what it has applied.
  let replayed = 0
  yield* tail.pipe(
    Stream.mapEffect(
      ({ seq, bytes }) => {
        const made = decodeRequests(bytes)
        return Effect.map(index.apply(bytes), (applied) => {
          window.observe(seq, made, applied)
          replayed += applied.effects.length
        })
      },
      { concurrency: replayAhead }
    ),
    Stream.runDrain,
    Effect.mapError((error) => (error._tag === "IndexLost" ? faults.lost(error) : faults.ofLog(error)))
  )
  const replayedStats = yield* Effect.mapError(index.stats, faults.lost)
  const clock = new VersionClock(
    settings.region,
    replayedStats.maxTime,
    replayedStats.counters.get(settings.region) ?? 0
  )
  const feed = new ChangeFeed(settings.changeBufferMax, { seq: log.lastSeq(), index: endOfObject })
  const changes = PartitionChanges.make(log, feed)
  // Before the writer, so that followers are told also what that commits while it closes.
  yield* (yield* LocalActors).registerChanges(partitionId(address), changes)

  /** The log position up to which everything is visible. */
  let visibleSeq = log.lastSeq()

  const caches = yield* PartitionCaches.open(partitionId(address), log)
  const writer: PartitionWriter.PartitionWriter = yield* PartitionWriter.make({
    log,
    index,
    clock,
    dimensions: collection.dimensions,
    bounds: settings,
    window,
    ...caches,
    onApplied: (seq, ops, applied) => {
      policy.applied(ops.length)
      visibleSeq = seq
      feed.publish(PartitionChanges.changesOf(seq, ops, applied))
    },
    onFatal: (error) =>
      Effect.andThen(
        Effect.logWarning(`Partition lets go: ${error._tag}`, error.detail),
        // Not waited for from inside the scope that it closes.
        Effect.asVoid(
          Effect.forkDetach(options.letGo({ verify: error._tag === "IndexLost" && index.form() === "mapped" }))
        )
      )
  })
  const policy = yield* SnapshotPolicy.make({
    log,
    index,
    appliedSeq: writer.appliedSeq,
    requests: writer.requests,
    replayed,
    scratch,
    settings,
    making: snapshots
  })

  let usedAt = Date.now()
  let changedAt = 0
  let { bytes, count, recentBytes } = replayedStats
  const fullEstimate = () => {
    const snapshot = log.newestSnapshot()
    return snapshot === undefined
      ? Math.max(bytes, emptyBytes)
      : fullBytesOf(snapshot) + graphBytesOf(spec, snapshot, count)
  }
  let fullBytes = index.form() === "full" ? bytes : fullEstimate()

  /** What the full form took when it was last in use, and of how many records. */
  let fullMeasured = 0
  let fullCount = 0

  const measure = Effect.ignore(
    Effect.map(index.stats, (stats) => {
      bytes = stats.bytes
      count = stats.count
      recentBytes = stats.recentBytes
      fullBytes = index.form() === "full" ? bytes : Math.max(fullEstimate(), count < fullCount ? 0 : fullMeasured)
      if (index.form() === "full") {
        fullMeasured = bytes
        fullCount = count
      }
    })
  )

  /** What follows the snapshot that a form is opened from. */
  const logAfter = ({ seq }: Snapshot) =>
    Stream.mapError(log.read(seq + 1), (error) => new SnapshotUnreadable({ detail: `the log after it: ${error._tag}` }))

  const change = (form: IndexForm, snapshot: Snapshot) =>
    index.change({ open: openForm(log, snapshot, form), log: logAfter(snapshot) }).pipe(
      Effect.andThen(measure),
      Effect.as(true),
      Effect.catch((error) =>
        Effect.as(
          Effect.logWarning(`The partition stays ${index.form()}`, "detail" in error ? error.detail : error._tag),
          false
        )
      ),
      Effect.ensuring(Effect.sync(() => (changedAt = Date.now())))
    )

  const promote = Effect.suspend(() => {
    const snapshot = log.newestSnapshot()
    if (!hasFull || index.form() === "full" || index.changing() || snapshot === undefined) return Effect.succeed(false)
    return promotions.withPermit(
      budget.reserve(Math.max(0, fullBytes - bytes)).pipe(
        Effect.andThen(Effect.suspend(() => change("full", snapshot))),
        Effect.catch(() => Effect.succeed(false)),
        Effect.scoped
      )
    )
  })

  const demote = Effect.gen(function* () {
    if (index.form() === "mapped" || index.changing()) return false
    yield* policy.snapshot
    const snapshot = log.newestSnapshot()
    if (snapshot?.sketch !== undefined) return yield* change("mapped", snapshot)
    changedAt = Date.now()
    return false
  })

  const merge = Effect.gen(function* () {
    if (index.form() !== "mapped" || index.changing()) return false
    const done = yield* policy.snapshot
    changedAt = Date.now()
    yield* measure
    return done
  })

  yield* budget.join({
    partition: partitionId(address),
    form: index.form,
    bytes: () => bytes,
    fullBytes: () => fullBytes,
    mappedBytes: () => {
      const sketch = log.newestSnapshot()?.sketch
      if (sketch !== undefined) return mappedBytesOf(sketch)
      return count >= sketchRecordsMin ? bytes / 8 : undefined
    },
    usedAt: () => usedAt,
    changedAt: () => changedAt,
    changing: index.changing,
    hasFull,
    inFlight: index.inFlight,
    measure,
    promote,
    demote,
    recentBytes: () => recentBytes,
    merge,
    passivate: options.letGo({ verify: false })
  })
  yield* Scope.close(opening, Exit.void)
  // After what woke it has been answered: loading takes the thread's time and the disk's.
  if (hasFull && index.form() === "mapped" && budget.fits(fullBytes))
    yield* Effect.forkIn(Effect.delay(promote, promotionDelayMillis), scope)

  const search = (query: PartitionQuery): Effect.Effect<PartitionHits, PartitionError | IndexLost> => {
    usedAt = Date.now()
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

  const get = (ids: ReadonlyArray<string>) => {
    usedAt = Date.now()
    return Effect.map(index.get(ids), (records) =>
      records.map((record) => (record === undefined ? null : toRecord(record)))
    )
  }

  const stats = Effect.map(
    index.stats,
    (now): PartitionStats => ({
      count: now.count,
      tombstones: now.tombstones,
      bytes: now.bytes,
      form: index.form(),
      epoch: log.epoch,
      last_seq: log.lastSeq(),
      snapshot_seq: log.snapshotSeq(),
      log_objects_cut: log.cut,
      snapshots_refused: log.snapshotsRefused
    })
  )

  let watching = 0
  const watch = (query: PartitionWatch, listener: WatchListener) =>
    Effect.suspend((): Effect.Effect<WatchHandle, PartitionError | IndexLost> => {
      if (query.vector.length !== collection.dimensions) {
        const expected = `${collection.dimensions} numbers`
        return Effect.fail(new InvalidInput({ field: "query", expected, got: `${query.vector.length}` }))
      }
      if (!(query.k >= 1 && query.k <= standingMembersMax)) {
        const expected = `an integer from 1 to ${standingMembersMax}`
        return Effect.fail(new InvalidInput({ field: "k", expected, got: `${query.k}` }))
      }
      if (watching >= settings.standingQueriesMax) {
        return Effect.fail(new Overloaded({ bound: "standingQueriesMax", retryAfterMillis: 1_000 }))
      }
      watching += 1
      const spec: StandingSpec = {
        vector: query.vector,
        k: query.k,
        ef: Math.max(collection.index.ef_search, query.k) * standingBeamFactor,
        minScore: query.minScore ?? Number.NEGATIVE_INFINITY,
        filter: query.filter,
        includeMetadata: query.includeMetadata,
        includeVector: query.includeVector,
        seeds: query.seeds
      }
      let open = true
      const end = () => {
        if (open) watching -= 1
        open = false
      }
      return index
        .watch(spec, {
          // What is told comes just before the writer of it knows that it is visible.
          onChange: (change) => listener.onChange(change.seq < visibleSeq ? { ...change, seq: visibleSeq } : change),
          onLost: () => {
            end()
            listener.onLost()
          }
        })
        .pipe(
          Effect.map((handle) => ({
            close: () => {
              end()
              handle.close()
            }
          })),
          Effect.onError(() => Effect.sync(end))
        )
    })

  yield* Effect.logInfo("Partition is resident", {
    form: index.form(),
    records: replayedStats.count,
    replayed,
    epoch: log.epoch,
    millis: Math.round(performance.now() - started)
  })
  const opened: OpenPartition = {
    collection,
    search,
    get,
    stats,
    form: index.form,
    watch,
    position: () => visibleSeq,
    confirm: log.confirm,
    handOver: Effect.asVoid(policy.handOver),
    writer: {
      ...writer,
      // Another form may find others.
      revision: () => {
        const revision = writer.revision()
        return revision === undefined ? undefined : `${revision}.${index.form()}`
      },
      write: (...given) => {
        usedAt = Date.now()
        return budget.exhausted()
          ? Effect.fail(new Overloaded({ bound: "budgetBytes", retryAfterMillis: 1_000 }))
          : writer.write(...given)
      }
    },
    changes
  }
  return opened
})

/** What can be wrong with opening a form. */
type OpenFault = IndexLost | SnapshotUnreadable | StoreFailure | ObjectMissing

/** A snapshot that could not be opened, and why. */
interface PassedOver {
  readonly seq: number
  readonly object: string
  readonly detail: string
}

const faultsOf = ({ collection, partition }: PartitionAddress) => {
  const unavailable = (detail: string, retryAfterMillis = 500) =>
    new PartitionUnavailable({ collection, partition, detail, retryAfterMillis })
  const storage = (error: StoreFailure) => new StorageUnavailable({ detail: error.detail, retryAfterMillis: 1_000 })
  const corrupt = (object: string, detail: string) => new PartitionCorrupt({ collection, partition, object, detail })
  const lost = (error: IndexLost) => unavailable(`Its vector thread was lost (${error.detail}); it is being reopened.`)
  return {
    corrupt,
    lost,
    ofLog: (
      error: PartitionLog.LogCorrupt | PartitionLog.NewerFormat | PartitionLog.NotOwner | StoreFailure
    ): PartitionError => {
      switch (error._tag) {
        case "LogCorrupt":
          return corrupt(error.object, error.detail)
        case "StoreFailure":
          return storage(error)
        case "NewerFormat":
        case "NotOwner":
          return unavailable(error.message, 5_000)
      }
    },
    ofOpening: (error: OpenFault, prefix: string): PartitionError => {
      switch (error._tag) {
        case "IndexLost":
          return lost(error)
        case "StoreFailure":
          return storage(error)
        case "ObjectMissing":
          // Pruned by an owner that came after this one.
          return unavailable("Another node owns it now.")
        case "SnapshotUnreadable":
          return corrupt(prefix, error.detail)
      }
    }
  }
}

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
