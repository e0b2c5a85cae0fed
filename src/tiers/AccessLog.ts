/**
 * What is read, and how often: the evidence on which the tiers promote. Synchronous, on the main thread, below a
 * microsecond a touch, in memory bounded by the settings `access*`.
 *
 * - **Partitions**: an exactly decayed count each, its heat, in accesses a minute.
 * - **Records**: how often each was read over the past half-lives (`FrequencySketch`), and by name those read most in the
 *   window under way (`SpaceSaving`). Windows are five minutes, aligned to the clock.
 * - **Trends**: records whose share of the accesses of the newest 30 to 60 seconds is out of proportion to their share of
 *   the past, see {@link AccessLog.takeReport}.
 * - **Past windows**: the records read most in each five minutes of the last two hours, and in each hour of the last
 *   `accessPastHours`, so that what an event was like can be warmed before the next one.
 */
import { Context, Effect, Layer } from "effect"
import { Settings } from "../config.ts"
import { partitionAddressOf } from "../protocol/IndexPartition.ts"
import { FrequencySketch } from "./FrequencySketch.ts"
import { type Counted, SpaceSaving } from "./SpaceSaving.ts"

export interface AccessSettings {
  readonly accessSketchWidth: number
  readonly accessTopRecords: number
  readonly accessPastHours: number
  readonly accessHalfLifeMillis: number
  readonly accessPartitionsMax: number
  readonly heatHalfLifeMillis: number
  readonly promoteAccesses: number
  readonly trendAccesses: number
  readonly trendRatio: number
}

/** A record read much. */
export interface AccessedRecord {
  readonly partition: string
  readonly id: string
  readonly accesses: number
}

/** A record whose share of the accesses has risen. */
export interface Trend extends AccessedRecord {
  /** Its share of the newest accesses over its share of the past's. */
  readonly ratio: number
  /** Standard deviations above what its past share lets expect. */
  readonly score: number
}

/** What is new since the last report. */
export interface AccessReport {
  /** Read at least `promoteAccesses` times in this window; each once a window. */
  readonly hot: ReadonlyArray<AccessedRecord>
  /** Each at most once in five minutes. */
  readonly trending: ReadonlyArray<Trend>
}

export interface PastQuery {
  /** Milliseconds since 1970. Summaries that overlap [fromMillis, toMillis) count whole. */
  readonly fromMillis: number
  readonly toMillis: number
  readonly limit: number
  /** Only of this collection. */
  readonly collectionUid?: string
}

/** A stretch of the newest accesses by name, and what it weighs in the sketch, which may have been halved since. */
interface Slot {
  records: SpaceSaving
  scale: number
}

interface PartitionHeat {
  readonly seed: number
  count: number
  at: number
}

interface Summary {
  readonly fromMillis: number
  readonly toMillis: number
  readonly groups: ReadonlyArray<SummaryGroup>
}

/** One text of many ids takes a third of what as many texts take. */
interface SummaryGroup {
  readonly partition: string
  /** Joined by line feeds, which no id has in it. */
  readonly ids: string
  readonly counts: Float32Array
}

export const slotMillis = 30_000
export const windowMillis = 300_000
const hourMillis = 3_600_000

/** Records named of one slot; the newest two are kept. */
const slotRecords = 2_048

/** Five-minute windows kept. */
const windowsKept = 24

/** Records of one report, of each kind. */
export const reportRecordsMax = 1_000

/** Records that are known to have begun to trend in the last five minutes; beyond it none begins. */
const trendedMax = 10_000

/** Standard deviations from which on a rise is no chance: among millions of looks, less than one in a thousand. */
const trendScoreMin = 6

export class AccessLog extends Context.Service<AccessLog, AccessCounts>()("ruvector/tiers/AccessLog") {
  static readonly layer = Layer.effect(
    AccessLog,
    Effect.map(Settings, (settings) => new AccessCounts(settings, Date.now))
  )
}

export class AccessCounts {
  readonly #settings: AccessSettings
  readonly #clock: () => number
  readonly #partitions = new Map<string, PartitionHeat>()
  readonly #sketch: FrequencySketch
  #newest: Slot = { records: new SpaceSaving(slotRecords), scale: 1 }
  #before: Slot = { records: new SpaceSaving(slotRecords), scale: 1 }
  readonly #window: SpaceSaving
  readonly #hour: SpaceSaving
  readonly #windows: Array<Summary> = []
  readonly #hours: Array<Summary> = []
  readonly #trended = new Map<number, number>()
  readonly #since: number
  #slotEnd: number
  #windowEnd: number
  #hourEnd: number
  #halvedAt: number
  /** Of the record hashed last. */
  #h1 = 0
  #h2 = 0

  /** `clock`: milliseconds since 1970. */
  constructor(settings: AccessSettings, clock: () => number) {
    this.#settings = settings
    this.#clock = clock
    this.#sketch = new FrequencySketch(settings.accessSketchWidth)
    const named = Math.ceil(settings.accessTopRecords * 1.5)
    this.#window = new SpaceSaving(named)
    this.#hour = new SpaceSaving(named)
    const now = clock()
    this.#since = now
    this.#halvedAt = now
    this.#slotEnd = endOf(now, slotMillis)
    this.#windowEnd = endOf(now, windowMillis)
    this.#hourEnd = endOf(now, hourMillis)
  }

  /** A partition was asked. */
  touchPartition(partition: string): void {
    const now = this.#clock()
    const heat = this.#heatOf(partition, now)
    heat.count = this.#decayed(heat, now) + 1
    heat.at = now
  }

  /** A record was read. `weight`: 1 for one asked for by its id, less for one that was among a search's results. */
  touchRecord(partition: string, id: string, weight = 1): void {
    const now = this.#clock()
    if (now >= this.#slotEnd || now < this.#slotEnd - slotMillis) this.#turn(now)
    const key = this.#hash(this.#heatOf(partition, now).seed, id)
    this.#sketch.add(this.#h1, this.#h2, weight)
    this.#newest.records.offer(key, partition, id, weight)
    this.#window.offer(key, partition, id, weight)
  }

  /** Accesses a minute, decayed with `heatHalfLifeMillis`. */
  partitionHeat(partition: string): number {
    const heat = this.#partitions.get(partition)
    if (heat === undefined) return 0
    // At a steady rate r the decayed count is r / ln 2 half-lives.
    return (this.#decayed(heat, this.#clock()) * Math.LN2 * 60_000) / this.#settings.heatHalfLifeMillis
  }

  /** How often a record was read over about two `accessHalfLifeMillis`, recent reads counting most; never too low. */
  recordFrequency(partition: string, id: string): number {
    const now = this.#clock()
    if (now >= this.#slotEnd || now < this.#slotEnd - slotMillis) this.#turn(now)
    this.#hash(this.#heatOf(partition, now).seed, id)
    return this.#sketch.estimate(this.#h1, this.#h2)
  }

  /** The records read most in the window under way, most first. */
  hottest(limit: number): ReadonlyArray<AccessedRecord> {
    const now = this.#clock()
    if (now >= this.#slotEnd || now < this.#slotEnd - slotMillis) this.#turn(now)
    return this.#window.top(limit).map(accessed)
  }

  /**
   * What is new since the last report: records that became hot, and records that began to trend.
   *
   * A record trends that has x accesses in the newest slots (the one under way and the one before, N in all) where it had
   * h of H before, if x >= `trendAccesses`, its share is at least `trendRatio` times what it was, and the two-sample
   * Poisson score after the square-root transform (Huffman, 1984) with c = N/H,
   * `2 (sqrt(x + 3/8) - sqrt(c (h + 3/8))) / sqrt(1 + c)`, is at least 6. Shares, not rates: when everything is read ten times
   * as often, nothing trends. x is what was surely counted and h is never too low, so errors only hide trends. Nothing
   * trends in the first window after start: there is no past to compare with.
   */
  takeReport(): AccessReport {
    const now = this.#clock()
    if (now >= this.#slotEnd || now < this.#slotEnd - slotMillis) this.#turn(now)
    const hot = this.#window.take(this.#settings.promoteAccesses, reportRecordsMax).map(accessed)
    return { hot, trending: this.#newTrends(now) }
  }

  /** The records read most between two times, most first. Long merges give way to others between two summaries. */
  past(query: PastQuery): Effect.Effect<ReadonlyArray<AccessedRecord>> {
    const turned = Effect.sync(() => {
      const now = this.#clock()
      if (now >= this.#slotEnd || now < this.#slotEnd - slotMillis) this.#turn(now)
      return this.#overlapping(query, now)
    })
    const ofCollection = (partition: string) =>
      query.collectionUid === undefined || partitionAddressOf(partition).uid === query.collectionUid
    return Effect.flatMap(
      turned,
      Effect.fnUntraced(function* (summaries) {
        const sums = new Map<string, Map<string, number>>()
        for (const { groups } of summaries) {
          for (const { partition, ids, counts } of groups) {
            if (!ofCollection(partition)) continue
            const sum = sums.get(partition) ?? new Map<string, number>()
            sums.set(partition, sum)
            ids.split("\n").forEach((id, i) => {
              sum.set(id, (sum.get(id) ?? 0) + (counts[i] as number))
            })
          }
          yield* Effect.yieldNow
        }
        const all: Array<AccessedRecord> = []
        for (const [partition, sum] of sums) for (const [id, accesses] of sum) all.push({ partition, id, accesses })
        return all.sort((a, b) => b.accesses - a.accesses).slice(0, query.limit)
      })
    )
  }

  /** A deleted collection, by its uid, is in none of this any more. */
  dropCollection(uid: string): void {
    const isDropped = (partition: string) => partitionAddressOf(partition).uid === uid
    for (const partition of this.#partitions.keys()) if (isDropped(partition)) this.#partitions.delete(partition)
    for (const records of [this.#newest.records, this.#before.records, this.#window, this.#hour]) {
      records.drop(isDropped)
    }
    for (const summaries of [this.#windows, this.#hours]) {
      summaries.forEach((summary, i) => {
        summaries[i] = { ...summary, groups: summary.groups.filter(({ partition }) => !isDropped(partition)) }
      })
    }
  }

  #newTrends(now: number): ReadonlyArray<Trend> {
    const newest = this.#newest
    const before = this.#before
    const { trendAccesses, trendRatio } = this.#settings
    const n = newest.records.total + before.records.total
    const past = this.#sketch.total - newest.scale * newest.records.total - before.scale * before.records.total
    if (now - this.#since < windowMillis || past < trendAccesses) return []
    for (const [key, until] of this.#trended) if (until <= now) this.#trended.delete(key)
    const c = n / past
    const found: Array<Trend> = []
    const seen = new Set<number>()
    for (const { records } of [newest, before]) {
      for (const { key, partition, id } of records.atLeast(trendAccesses / 2)) {
        if (seen.has(key)) continue
        seen.add(key)
        const inNewest = newest.records.guaranteed(key)
        const inBefore = before.records.guaranteed(key)
        const x = inNewest + inBefore
        if (x < trendAccesses || this.#trended.has(key) || this.#trended.size >= trendedMax) continue
        this.#hash(this.#heatOf(partition, now).seed, id)
        const sketched = this.#sketch.estimate(this.#h1, this.#h2)
        const h = Math.max(0, sketched - newest.scale * inNewest - before.scale * inBefore)
        const expected = c * (h + 3 / 8)
        const ratio = x / expected
        const score = (2 * (Math.sqrt(x + 3 / 8) - Math.sqrt(expected))) / Math.sqrt(1 + c)
        if (ratio < trendRatio || score < trendScoreMin) continue
        found.push({ partition, id, accesses: x, ratio, score })
        this.#trended.set(key, now + windowMillis)
      }
    }
    return found.sort((a, b) => b.score - a.score).slice(0, reportRecordsMax)
  }

  /** Ends the slot, and the window and the hour where they have ended too. */
  #turn(now: number): void {
    // A clock that was set back: what is under way goes on, measured from now.
    this.#halvedAt = Math.min(this.#halvedAt, now)
    this.#windowEnd = Math.min(this.#windowEnd, endOf(now, windowMillis))
    this.#hourEnd = Math.min(this.#hourEnd, endOf(now, hourMillis))
    const emptied = this.#before.records
    emptied.clear()
    if (now < this.#slotEnd + slotMillis) {
      this.#before = this.#newest
    } else {
      // Nothing was touched for a whole slot: what came before is no longer new.
      this.#newest.records.clear()
      this.#before = { records: this.#newest.records, scale: 1 }
    }
    this.#newest = { records: emptied, scale: 1 }
    this.#slotEnd = endOf(now, slotMillis)

    const { accessHalfLifeMillis } = this.#settings
    const halvings = Math.min(64, Math.floor((now - this.#halvedAt) / accessHalfLifeMillis))
    for (let n = 0; n < halvings; n++) {
      this.#sketch.halve()
      this.#before.scale /= 2
    }
    if (halvings > 0) this.#halvedAt = now
    if (now >= this.#windowEnd) this.#endWindow(now)
  }

  #endWindow(now: number): void {
    const top = this.#window.top(this.#settings.accessTopRecords)
    if (top.length > 0) {
      keep(this.#windows, summaryOf(top, this.#windowEnd - windowMillis, this.#windowEnd), windowsKept)
      for (const { partition, id, count } of top) {
        this.#hour.offer(this.#hash(this.#heatOf(partition, now).seed, id), partition, id, count)
      }
    }
    this.#window.clear()
    this.#windowEnd = endOf(now, windowMillis)
    while (this.#windows[0] !== undefined && this.#windows[0].toMillis <= now - windowsKept * windowMillis) {
      this.#windows.shift()
    }
    if (now < this.#hourEnd) return
    const hottest = this.#hour.top(this.#settings.accessTopRecords)
    if (hottest.length > 0) {
      keep(this.#hours, summaryOf(hottest, this.#hourEnd - hourMillis, this.#hourEnd), this.#settings.accessPastHours)
    }
    this.#hour.clear()
    this.#hourEnd = endOf(now, hourMillis)
    const oldest = now - this.#settings.accessPastHours * hourMillis
    while (this.#hours[0] !== undefined && this.#hours[0].toMillis <= oldest) this.#hours.shift()
  }

  /** Summaries of a stretch of time: by five minutes where they are still there, by the hour before that. */
  #overlapping({ fromMillis, toMillis }: PastQuery, now: number): ReadonlyArray<Summary> {
    const overlaps = (summary: Summary) => summary.fromMillis < toMillis && summary.toMillis > fromMillis
    // Five-minute windows of the last two hours are all there, so an hour that ended before them is told by its own.
    const fineFrom = Math.max(now - windowsKept * windowMillis + hourMillis, 0)
    const underWay = summaryOf(
      this.#window.top(this.#settings.accessTopRecords),
      this.#windowEnd - windowMillis,
      this.#windowEnd
    )
    const hours = this.#hours.filter((hour) => hour.toMillis <= fineFrom)
    const fineSince = hours[hours.length - 1]?.toMillis ?? 0
    const fine = this.#windows.filter((window) => window.fromMillis >= fineSince)
    return [...hours, ...fine, underWay].filter(overlaps)
  }

  #decayed(heat: PartitionHeat, now: number): number {
    return heat.count * 2 ** (-Math.max(0, now - heat.at) / this.#settings.heatHalfLifeMillis)
  }

  #heatOf(partition: string, now: number): PartitionHeat {
    const found = this.#partitions.get(partition)
    if (found !== undefined) return found
    if (this.#partitions.size >= this.#settings.accessPartitionsMax) this.#dropColdest(now)
    const made: PartitionHeat = { seed: seedOf(partition), count: 0, at: now }
    this.#partitions.set(partition, made)
    return made
  }

  /** Drops a quarter at once, so that the search for the coldest is rare. */
  #dropColdest(now: number): void {
    const byHeat = Array.from(this.#partitions).sort(([, a], [, b]) => this.#decayed(a, now) - this.#decayed(b, now))
    for (const [partition] of byHeat.slice(0, Math.ceil(byHeat.length / 4))) this.#partitions.delete(partition)
  }

  /** Two hashes of a record (FNV-1a, and the same with another prime, each finished with MurmurHash3's mixer), and its key. */
  #hash(seed: number, id: string): number {
    let h1 = seed
    let h2 = seed ^ 0x9e3779b9
    for (let i = 0; i < id.length; i++) {
      const code = id.charCodeAt(i)
      h1 = Math.imul(h1 ^ code, 0x01000193)
      h2 = Math.imul(h2 ^ code, 0x85ebca6b)
    }
    this.#h1 = mixed(h1)
    this.#h2 = mixed(h2)
    return (this.#h1 >>> 0) * 0x200000 + (this.#h2 >>> 11)
  }
}

const endOf = (now: number, length: number): number => (Math.floor(now / length) + 1) * length

const accessed = ({ partition, id, count }: Counted): AccessedRecord => ({ partition, id, accesses: count })

const seedOf = (partition: string): number => {
  let hash = 0x811c9dc5
  for (let i = 0; i < partition.length; i++) hash = Math.imul(hash ^ partition.charCodeAt(i), 0x01000193)
  return mixed(hash)
}

const mixed = (hash: number): number => {
  let h = hash
  h = Math.imul(h ^ (h >>> 16), 0x85ebca6b)
  h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35)
  return (h ^ (h >>> 16)) | 0
}

const keep = (summaries: Array<Summary>, summary: Summary, max: number): void => {
  summaries.push(summary)
  if (summaries.length > max) summaries.shift()
}

const summaryOf = (records: ReadonlyArray<Counted>, fromMillis: number, toMillis: number): Summary => {
  const groups = new Map<string, { readonly ids: Array<string>; readonly counts: Array<number> }>()
  for (const { partition, id, count } of records) {
    const group = groups.get(partition) ?? { ids: [], counts: [] }
    groups.set(partition, group)
    group.ids.push(id)
    group.counts.push(count)
  }
  return {
    fromMillis,
    toMillis,
    groups: Array.from(groups, ([partition, { ids, counts }]) => ({
      partition,
      ids: ids.join("\n"),
      counts: Float32Array.from(counts)
    }))
  }
}
