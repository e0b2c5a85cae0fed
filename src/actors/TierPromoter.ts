/**
 * The `TierPromoter` entity: what is promoted and demoted on this node. It is told what is read every `tierTickMillis`, and
 *
 * - puts records read at least `promoteAccesses` times in five minutes into the warm tier, where they are not in it yet;
 * - puts records that trend into the warm tier and the record cache, before more ask for them;
 * - moves partitions between their mapped and their full form as `tiers/TierPolicy.ts` decides, one round at a time;
 * - warms records on request, `actors/Warming.ts`.
 *
 * Each of these is an event, counted in metrics and kept for followers. All of it is about caches: nothing here can fail a
 * read or a write, and what is lost with the process is found out again from what is read.
 */
import { Clock, Context, Duration, Effect, Layer, Metric, Stream } from "effect"
import { Settings } from "../config.ts"
import { type ApiError, Overloaded } from "../protocol/Errors.ts"
import { defaultCollection } from "../protocol/Fields.ts"
import { type PartitionRecord, partitionAddressOf, partitionId } from "../protocol/IndexPartition.ts"
import {
  type AccessReport,
  localPromoterId,
  type TierEvent,
  TierPromoter,
  type TierState
} from "../protocol/TierPromoter.ts"
import {
  type WarmReport,
  type WarmRequest,
  type WarmSelection,
  warmLimitDefault,
  warmSelectionOf
} from "../protocol/Warming.ts"
import { layerNode } from "../shards/Cluster.ts"
import { groupByPartition } from "../shards/PartitionMap.ts"
import { Router } from "../shards/Router.ts"
import { type AccessedRecord, AccessLog } from "../tiers/AccessLog.ts"
import { PartitionForms } from "../tiers/PartitionForms.ts"
import { RecordCache } from "../tiers/RecordCache.ts"
import { decide } from "../tiers/TierPolicy.ts"
import { WarmStore } from "../tiers/WarmStore.ts"
import { EventLog, type NewEvent } from "./EventLog.ts"
import { PartitionReads } from "./PartitionReads.ts"
import { type WarmGroup, warm } from "./Warming.ts"

/** Share of the record cache that one warming may fill. */
const warmCacheShare = 1 / 2

/** Events of progress of one warming, in each of its phases. */
const progressEvents = 10

/** Trends of one report that are told one by one. */
const trendEventsMax = 100

const idsShown = 16
const partitionsShown = 1_000
const recordsShown = 100

const makePromoter = Effect.gen(function* () {
  const settings = yield* Settings
  const router = yield* Router
  const access = yield* AccessLog
  const forms = yield* PartitionForms
  const warmStore = yield* WarmStore
  const recordCache = yield* RecordCache
  const reads = yield* PartitionReads
  const scope = yield* Effect.scope
  const events = new EventLog<TierEvent>(settings.tierEventsMax)
  const publish = (event: NewEvent<TierEvent>, now: number) => events.publish(event, now)
  const readAndPut = promoteRecords({ reads, warmStore, recordCache })

  const promote = Effect.fnUntraced(function* (
    records: ReadonlyArray<AccessedRecord>,
    to: "warm" | "hot",
    reason: "accessed" | "trending"
  ) {
    for (const [partition, ids] of idsByPartition(records)) {
      const promoted = yield* readAndPut(partition, ids, to)
      if (promoted.length === 0) continue
      const now = yield* Clock.currentTimeMillis
      count(promotions, { to }, promoted.length)
      publish(
        {
          event: "records_promoted",
          ...addressOf(partition),
          to,
          reason,
          count: promoted.length,
          ids: promoted.slice(0, idsShown)
        },
        now
      )
    }
  })

  /** When each listed partition was first seen in the form it has. */
  const formSince = new Map<string, { readonly form: string; readonly since: number }>()
  /** Times of the moves of the last minute. */
  const moved: Array<number> = []
  let moving = false

  const movePartitions = Effect.gen(function* () {
    const partitions = yield* forms.list
    const now = yield* Clock.currentTimeMillis
    const listed = new Set(partitions.map(({ partition }) => partition))
    for (const partition of formSince.keys()) if (!listed.has(partition)) formSince.delete(partition)
    for (const { partition, form } of partitions) {
      if (formSince.get(partition)?.form !== form) formSince.set(partition, { form, since: now })
    }
    while (moved[0] !== undefined && moved[0] <= now - 60_000) moved.shift()
    const moves = decide({
      partitions,
      budgetBytes: yield* forms.budgetBytes,
      nowMillis: now,
      formSince: new Map(Array.from(formSince, ([partition, { since }]) => [partition, since])),
      movesMax: settings.tierMovesPerMinute - moved.length,
      residenceMillis: settings.tierResidenceMillis,
      hysteresis: settings.tierHysteresisPercent / 100,
      heatMin: settings.tierHeatMin
    })
    for (const { partition, from, to, reason, heat } of moves) {
      // Moves that fail count too: what cannot be loaded is not tried without end.
      moved.push(yield* Clock.currentTimeMillis)
      const done = yield* to === "full" ? forms.promote(partition) : forms.demote(partition)
      // What follows was to have the place this one did not give or take.
      if (!done) return
      const at = yield* Clock.currentTimeMillis
      formSince.set(partition, { form: to, since: at })
      const common = { ...addressOf(partition), from, to, heat }
      if (reason === "hot" || reason === "hotter") {
        count(promotions, { to: "full" }, 1)
        publish({ event: "partition_promoted", ...common, reason }, at)
      } else {
        count(demotions, { to: "mapped" }, 1)
        publish({ event: "partition_demoted", ...common, reason }, at)
      }
    }
  })

  /** One round of moves in the background; loading a partition may take seconds. */
  const startMoves = Effect.suspend(() => {
    if (moving) return Effect.void
    moving = true
    const round = Effect.catchCause(movePartitions, (cause) => Effect.logWarning("Partitions were not moved", cause))
    return Effect.forkIn(
      Effect.ensuring(
        round,
        Effect.sync(() => (moving = false))
      ),
      scope
    )
  })

  const report = Effect.fnUntraced(function* ({ hot, trending }: AccessReport) {
    yield* startMoves
    const now = yield* Clock.currentTimeMillis
    count(trends, {}, trending.length)
    for (const { partition, ...trend } of trending.slice(0, trendEventsMax)) {
      publish({ event: "trending", ...addressOf(partition), ...trend }, now)
    }
    yield* promote(trending, "hot", "trending")
    yield* promote(hot, "warm", "accessed")
  })

  let warmings = 0
  let warmingsUnderWay = 0

  const warmNow = Effect.fnUntraced(function* (request: WarmRequest) {
    const selection = yield* Effect.fromResult(warmSelectionOf(request, yield* Clock.currentTimeMillis))
    const limit = request.limit ?? ("ids" in selection ? selection.ids.length : warmLimitDefault)
    const { groups, unresolved } = yield* "ids" in selection
      ? groupsOfIds(selection.ids, limit, request.collection ?? defaultCollection)
      : groupsOfWindow(selection, limit, request.collection)
    const warming = ++warmings
    const requested = unresolved.length + groups.reduce((sum, { ids }) => sum + ids.length, 0)
    publish({ event: "warming_started", warming, requested }, yield* Clock.currentTimeMillis)
    const clock = yield* Clock.Clock
    let told = { phase: "load", tenths: 0 }
    const result = yield* warm(
      {
        reads,
        warmStore,
        recordCache,
        cacheBytesMax: settings.recordCacheBytes * warmCacheShare,
        batchRecords: settings.warmBatchRecords
      },
      groups,
      unresolved,
      (phase, done) => {
        const tenths = Math.floor((done * progressEvents) / Math.max(1, requested))
        if (phase === told.phase && tenths === told.tenths) return
        told = { phase, tenths }
        publish({ event: "warming_progress", warming, phase, done, requested }, clock.currentTimeMillisUnsafe())
      }
    )
    count(warmingsDone, {}, 1)
    count(promotions, { to: "warm" }, result.warm)
    count(promotions, { to: "hot" }, result.hot)
    publish(
      { event: "warming_finished", warming, requested, found: result.found, hit_rate: result.hit_rate },
      yield* Clock.currentTimeMillis
    )
    return result
  })

  const groupsOfIds = Effect.fnUntraced(function* (ids: ReadonlyArray<string>, limit: number, name: string) {
    const collection = yield* router.collection(name)
    const different = Array.from(new Set(ids)).slice(0, limit)
    const groups: Array<WarmGroup> = []
    for (const [partition, of] of groupByPartition(different, (id) => id, collection.partitions)) {
      groups.push({ partition: partitionId({ collection: name, uid: collection.uid, partition }), ids: of })
    }
    return { groups, unresolved: [] as ReadonlyArray<string> }
  })

  /** What was read most in a window, of the collections that are still there. */
  const groupsOfWindow = Effect.fnUntraced(function* (
    window: Extract<WarmSelection, { readonly fromMillis: number }>,
    limit: number,
    name: string | undefined
  ) {
    const collections = name === undefined ? yield* router.collections : [yield* router.collection(name)]
    const uids = new Set(collections.map(({ uid }) => uid))
    const collectionUid = name === undefined ? undefined : collections[0]?.uid
    const past = yield* access.past({ ...window, limit, ...(collectionUid === undefined ? {} : { collectionUid }) })
    const groups: Array<WarmGroup> = []
    const unresolved: Array<string> = []
    for (const [partition, ids] of idsByPartition(past)) {
      if (uids.has(partitionAddressOf(partition).uid)) groups.push({ partition, ids })
      else unresolved.push(...ids)
    }
    return { groups, unresolved }
  })

  const state = Effect.gen(function* () {
    const partitions = yield* forms.list
    const { kind, level, hits, misses, errors, bytes } = yield* warmStore.state
    return {
      budget_bytes: yield* forms.budgetBytes,
      resident_bytes: partitions.reduce((sum, one) => sum + one.bytes, 0),
      partitions_total: partitions.length,
      partitions: [...partitions]
        .sort((a, b) => b.heat - a.heat)
        .slice(0, partitionsShown)
        .map((one) => ({
          ...addressOf(one.partition),
          form: one.form,
          bytes: one.bytes,
          full_bytes_estimate: one.fullBytesEstimate,
          heat: one.heat,
          busy: one.busy
        })),
      hottest: access
        .hottest(recordsShown)
        .map(({ partition, id, accesses }) => ({ ...addressOf(partition), id, accesses })),
      record_cache: {
        bytes: recordCache.bytes(),
        records: recordCache.count(),
        hits: recordCache.hits(),
        misses: recordCache.misses()
      },
      warm: { kind, level, hits, misses, errors, bytes }
    } satisfies TierState
  })

  let subscribers = 0

  return TierPromoter.of({
    Report: ({ payload }) => report(payload),
    State: () => state,
    Events: ({ payload }) =>
      Stream.unwrap(
        Effect.gen(function* () {
          if (subscribers >= settings.tierSubscribersMax) {
            return yield* new Overloaded({ bound: "tierSubscribersMax", retryAfterMillis: 5_000 })
          }
          yield* Effect.acquireRelease(
            Effect.sync(() => (subscribers += 1)),
            () => Effect.sync(() => (subscribers -= 1))
          )
          return events.follow(payload.after ?? events.last, yield* Clock.currentTimeMillis)
        })
      ),
    Warm: ({ payload }) =>
      Effect.suspend((): Effect.Effect<WarmReport, ApiError> => {
        if (warmingsUnderWay >= settings.warmsMax) {
          return Effect.fail(new Overloaded({ bound: "warmsMax", retryAfterMillis: 5_000 }))
        }
        warmingsUnderWay += 1
        return Effect.ensuring(
          warmNow(payload),
          Effect.sync(() => (warmingsUnderWay -= 1))
        )
      })
  })
})

/** Reads records and puts them into the warm tier, and into the record cache where they are to be hot. Gives the ids put. */
const promoteRecords =
  (tiers: {
    readonly reads: PartitionReads["Service"]
    readonly warmStore: WarmStore["Service"]
    readonly recordCache: RecordCache["Service"]
  }) =>
  (partition: string, ids: ReadonlyArray<string>, to: "warm" | "hot"): Effect.Effect<ReadonlyArray<string>> =>
    Effect.gen(function* () {
      const { reads, warmStore, recordCache } = tiers
      const there = to === "warm" ? yield* warmStore.getRecords(partition, ids) : []
      const wanted = to === "warm" ? ids.filter((_, i) => there[i] === null) : ids
      if (wanted.length === 0) return []
      const warmTicket = warmStore.ticket()
      const cacheTicket = recordCache.ticket()
      const read = yield* reads.get(partition, wanted)
      const records = read.filter((record): record is PartitionRecord => record !== null)
      const stored = yield* warmStore.putRecords(partition, records, warmTicket)
      const cached = to === "hot" && reads.isResident(partition)
      if (cached) for (const record of records) recordCache.put(partition, record, cacheTicket)
      return stored === 0 && !cached ? [] : records.map(({ id }) => id)
    }).pipe(
      // A cache that is not filled is no fault of anybody's request.
      Effect.catch((error) => Effect.as(Effect.logDebug("Records were not promoted", partition, error), []))
    )

const idsByPartition = (records: ReadonlyArray<AccessedRecord>): ReadonlyMap<string, ReadonlyArray<string>> => {
  const groups = new Map<string, Array<string>>()
  for (const { partition, id } of records) {
    const ids = groups.get(partition)
    if (ids === undefined) groups.set(partition, [id])
    else ids.push(id)
  }
  return groups
}

const addressOf = (entityId: string) => {
  const { collection, partition } = partitionAddressOf(entityId)
  return { collection, partition }
}

const promotions = Metric.counter("ruvector_tier_promotions", {
  description: "Partitions promoted to the full form, and records to the warm tier and the record cache",
  incremental: true
})
const demotions = Metric.counter("ruvector_tier_demotions", {
  description: "Partitions demoted to the mapped form",
  incremental: true
})
const trends = Metric.counter("ruvector_tier_trends", { description: "Records found trending", incremental: true })
const warmingsDone = Metric.counter("ruvector_tier_warmings", {
  description: "Warmings done and verified",
  incremental: true
})

const metricContext = Context.empty()

const count = <S>(metric: Metric.Metric<number, S>, labels: Record<string, string>, by: number): void => {
  if (by > 0) Metric.withAttributes(metric, labels).updateUnsafe(by, metricContext)
}

/** Tells this node's promoter what was read, as long as the scope lives. */
const reporter = Effect.gen(function* () {
  const settings = yield* Settings
  const access = yield* AccessLog
  const promoter = (yield* TierPromoter.client)(localPromoterId)
  const tell = Effect.suspend(() => promoter.Report(access.takeReport())).pipe(
    Effect.catchCause((cause) => Effect.logDebug("A report of what is read was not delivered", cause))
  )
  yield* Effect.forkScoped(Effect.forever(Effect.andThen(Effect.sleep(Duration.millis(settings.tierTickMillis)), tell)))
})

/** The entity of this process, and the reports to it. */
export const layer = Layer.effectDiscard(reporter).pipe(
  Layer.provideMerge(
    TierPromoter.toLayer(makePromoter, {
      concurrency: "unbounded",
      disableFatalDefects: true,
      mailboxCapacity: 1_024,
      maxIdleTime: Duration.infinity
    })
  ),
  Layer.provide(layerNode)
)
