/**
 * One warming: reads records from their partitions in bounded batches, puts them into the warm tier and, as far as they
 * fit, into the record cache, and then reads all of them back from there. What is not found in a fast tier is looked for
 * in its partition, to tell what was missed from what does not exist, or no longer does.
 */
import { Effect, Result } from "effect"
import { toProblem } from "../protocol/Errors.ts"
import type { PartitionRecord } from "../protocol/IndexPartition.ts"
import type { WarmReport } from "../protocol/Warming.ts"
import { type RecordCache, recordBytes } from "../tiers/RecordCache.ts"
import type { WarmStore } from "../tiers/WarmStore.ts"
import type { PartitionReads } from "./PartitionReads.ts"

export interface WarmTiers {
  readonly reads: PartitionReads["Service"]
  readonly warmStore: WarmStore["Service"]
  readonly recordCache: RecordCache["Service"]
  /** Bytes of the record cache that one warming may fill; it gives up older records for that. */
  readonly cacheBytesMax: number
  readonly batchRecords: number
}

/** Records of one partition, by its entity id, most wanted first. */
export interface WarmGroup {
  readonly partition: string
  readonly ids: ReadonlyArray<string>
}

export type WarmPhase = "load" | "verify"

/** Batches under way at once. */
const batchesUnderWay = 4

const missingSampleMax = 20

/** `unresolved`: ids asked for that belong to no collection that is there. */
export const warm = Effect.fnUntraced(function* (
  tiers: WarmTiers,
  groups: ReadonlyArray<WarmGroup>,
  unresolved: ReadonlyArray<string>,
  onProgress: (phase: WarmPhase, done: number) => void
) {
  const batches = groups.flatMap(({ partition, ids }) =>
    Array.from({ length: Math.ceil(ids.length / tiers.batchRecords) }, (_, n) => ({
      partition,
      ids: ids.slice(n * tiers.batchRecords, (n + 1) * tiers.batchRecords)
    }))
  )
  const requested = unresolved.length + groups.reduce((sum, { ids }) => sum + ids.length, 0)
  const tally = { bytes: 0, cached: 0, hot: 0, warm: 0, hits: 0, cold: 0, unavailable: 0 }
  const missing: Array<string> = unresolved.slice(0, missingSampleMax)
  let gone = unresolved.length
  let unavailableDetail: string | undefined

  const each = (phase: WarmPhase, run: (batch: WarmGroup) => Effect.Effect<void>) => {
    let done = 0
    return Effect.forEach(
      batches,
      (batch) =>
        Effect.tap(run(batch), () =>
          Effect.sync(() => {
            done += batch.ids.length
            onProgress(phase, done)
          })
        ),
      { concurrency: batchesUnderWay, discard: true }
    )
  }

  /** Batches of a partition that could not be asked: they are not asked a second time. */
  const unasked = new Set<WarmGroup>()

  const load = (batch: WarmGroup) =>
    Effect.gen(function* () {
      const { partition, ids } = batch
      const warmTicket = tiers.warmStore.ticket()
      const cacheTicket = tiers.recordCache.ticket()
      const read = yield* Effect.result(tiers.reads.get(partition, ids))
      if (Result.isFailure(read)) {
        // Its collection was deleted meanwhile: its records are not there. Anything else is the partition's trouble.
        if (read.failure._tag === "CollectionNotFound") return
        unasked.add(batch)
        tally.unavailable += ids.length
        unavailableDetail ??= toProblem(read.failure).detail
        return
      }
      const records = read.success.filter((record): record is PartitionRecord => record !== null)
      tally.bytes += records.reduce((sum, record) => sum + contentBytes(record), 0)
      yield* tiers.warmStore.putRecords(partition, records, warmTicket)
      if (!tiers.reads.isResident(partition)) return
      for (const record of records) {
        const size = recordBytes(record)
        if (tally.cached + size > tiers.cacheBytesMax) return
        tally.cached += size
        tiers.recordCache.put(partition, record, cacheTicket)
      }
    })

  const verify = (batch: WarmGroup) =>
    Effect.gen(function* () {
      if (unasked.has(batch)) return
      const { partition, ids } = batch
      const isHot = ids.map((id) => tiers.recordCache.get(partition, id) !== undefined)
      const warmed = yield* tiers.warmStore.getRecords(partition, ids)
      const missed = ids.filter((_, i) => !isHot[i] && warmed[i] === null)
      tally.hot += isHot.filter(Boolean).length
      tally.warm += warmed.filter((record) => record !== null).length
      tally.hits += ids.length - missed.length
      if (missed.length === 0) return
      const read = yield* Effect.result(tiers.reads.get(partition, missed))
      if (Result.isFailure(read) && read.failure._tag !== "CollectionNotFound") {
        tally.unavailable += missed.length
        unavailableDetail ??= toProblem(read.failure).detail
        return
      }
      const cold = Result.isSuccess(read) ? read.success : missed.map(() => null)
      missed.forEach((id, i) => {
        if (cold[i] !== null) {
          tally.cold += 1
          return
        }
        gone += 1
        if (missing.length < missingSampleMax) missing.push(id)
      })
    })

  const started = performance.now()
  yield* each("load", load)
  const loaded = performance.now()
  yield* each("verify", verify)
  const { hot, warm: inWarm, hits, cold } = tally
  const found = hits + cold
  return {
    requested,
    found,
    missing: gone,
    missing_sample: missing,
    unavailable: tally.unavailable,
    ...(unavailableDetail === undefined ? {} : { unavailable_detail: unavailableDetail }),
    bytes: tally.bytes,
    hot,
    warm: inWarm,
    cold,
    hit_rate: found === 0 ? 0 : hits / found,
    load_ms: Math.round(loaded - started),
    verify_ms: Math.round(performance.now() - loaded)
  } satisfies WarmReport
})

const contentBytes = (record: PartitionRecord): number =>
  record.vector.byteLength + Buffer.byteLength(record.metadata) + Buffer.byteLength(record.id)
