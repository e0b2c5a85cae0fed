/**
 * The warm tier: records of partitions that are not resident, and search results, in Redis or in this process. It is a
 * cache: trouble is an empty answer and a metric, never an error.
 *
 * **Reads see writes.** Three things see to it, and each has a test.
 *
 * 1. *Generations.* An owner that activates a partition fences it: a random generation is set, under its epoch, and every entry
 *    carries the generation it was put under. A read takes the entries and then, last in the same round trip, the generation:
 *    if that is still this process's, none of the entries had been invalidated by another. An older epoch cannot fence after a
 *    newer one. A fence that follows this process's own clean {@link WarmStore} `release`, with nothing in the log between
 *    the two, keeps the generation, so that activating a partition does not empty its cache.
 * 2. *Trust.* A partition is read and filled only by the process that has fenced it. An invalidation that failed or timed out, a
 *    lost connection (an old connection's commands may still be executed after a new one's; a restarted Redis may have
 *    gone back in time), or a generation that is not ours ends that; a fence in the background, under a new generation,
 *    brings it back while the partition is active here.
 * 3. *Tickets.* A record that was read before a write and is put after it would bring the old version back. A ticket is
 *    taken before the read, and what was invalidated since is not put (`InvalidationLedger.ts`). From there on order is kept: all
 *    commands go through one connection in the order in which they are given.
 */
import { Clock, Context, Effect, Layer, Metric } from "effect"
import { Settings } from "../config.ts"
import { type PartitionRecord, partitionAddressOf } from "../protocol/IndexPartition.ts"
import { InvalidationLedger } from "./InvalidationLedger.ts"

/** Where an owner's claim of a partition's log stands. */
export interface Claim {
  readonly epoch: number
  /** Position of the log's last segment. */
  readonly seq: number
}

export interface WarmState {
  readonly kind: "memory" | "redis"
  /** `degraded`: Redis does not answer, is full, or is not trusted for some partition. */
  readonly level: "off" | "up" | "degraded"
  /** Partitions that are fenced and trusted by this process. */
  readonly partitions: number
  readonly hits: number
  readonly misses: number
  /** Calls that failed or timed out, and entries that were damaged. */
  readonly errors: number
  /** Bytes held, where they are in this process. */
  readonly bytes: number
  /** Calls of Redis since the start, and the milliseconds that all of them took. */
  readonly calls: number
  readonly callMillis: number
}

export class WarmStore extends Context.Service<
  WarmStore,
  {
    /** `null` where it is not known here. One round trip; what is found lives `warmTtlMillis` from now. */
    readonly getRecords: (
      partition: string,
      ids: ReadonlyArray<string>
    ) => Effect.Effect<ReadonlyArray<PartitionRecord | null>>
    /** To be taken before the records are read that are to be put. */
    readonly ticket: () => number
    /** How many were stored: none that was invalidated since the ticket was taken. */
    readonly putRecords: (
      partition: string,
      records: ReadonlyArray<PartitionRecord>,
      ticket: number
    ) => Effect.Effect<number>
    /** Before a write of them is acknowledged. */
    readonly invalidate: (partition: string, ids: ReadonlyArray<string>) => Effect.Effect<void>
    /** At activation, before the partition is served: what another owner may have missed is not given any more. */
    readonly fence: (partition: string, claim?: Claim) => Effect.Effect<void>
    /** The owner has stopped in good order: everything up to `claim.seq` was applied and invalidated. */
    readonly release: (partition: string, claim: Claim) => Effect.Effect<void>
    /** The owner was lost, or something was committed that it has not applied: nothing of it is given any more. */
    readonly distrust: (partition: string) => Effect.Effect<void>
    /** Of a search. The key begins with its collection's uid and a slash. */
    readonly getResult: (key: string) => Effect.Effect<Uint8Array | undefined>
    readonly putResult: (key: string, bytes: Uint8Array, ttlMillis: number) => Effect.Effect<void>
    /** A deleted collection is gone from here. */
    readonly drop: (collectionUid: string) => Effect.Effect<void>
    /** Bytes held in this process, and how to have fewer of them. */
    readonly bytes: () => number
    readonly shrink: (bytes: number) => void
    readonly state: Effect.Effect<WarmState>
  }
>()("ruvector/tiers/WarmStore") {
  /** The twin in memory, bounded by bytes, least recently used out first. 0 bytes: nothing is kept. */
  static readonly layerMemory = (options: {
    readonly bytesMax: number
    readonly ttlMillis: number
  }): Layer.Layer<WarmStore> =>
    Layer.sync(WarmStore, () => {
      /** Least recently used first. */
      const entries = new Map<string, MemoryEntry>()
      const fences = new Map<string, MemoryFence>()
      const ledger = new InvalidationLedger()
      let generations = 0
      let bytes = 0
      let hits = 0
      let misses = 0

      const remove = (key: string) => {
        const entry = entries.get(key)
        if (entry === undefined) return
        entries.delete(key)
        bytes -= entry.bytes
      }

      const put = (key: string, entry: MemoryEntry) => {
        remove(key)
        if (entry.bytes > options.bytesMax) return false
        entries.set(key, entry)
        bytes += entry.bytes
        for (const oldest of entries.keys()) {
          if (bytes <= options.bytesMax) break
          remove(oldest)
        }
        return true
      }

      /** The entry, now the most recently used; gone where it is too old or of another generation. */
      const take = (key: string, now: number, generation: number, ttlMillis: number | undefined) => {
        const entry = entries.get(key)
        if (entry === undefined) return undefined
        if (entry.expiresAt <= now || entry.generation !== generation) {
          remove(key)
          return undefined
        }
        entries.delete(key)
        if (ttlMillis !== undefined) entry.expiresAt = now + ttlMillis
        entries.set(key, entry)
        return entry
      }

      return WarmStore.of({
        getRecords: (partition, ids) =>
          Effect.map(Clock.currentTimeMillis, (now) => {
            const fence = fences.get(partition)
            return ids.map((id) => {
              const value =
                fence === undefined
                  ? undefined
                  : take(recordKey(partition, id), now, fence.generation, options.ttlMillis)?.value
              if (value === undefined) misses += 1
              else hits += 1
              return (value as PartitionRecord | undefined) ?? null
            })
          }),
        ticket: () => ledger.ticket(),
        putRecords: (partition, records, ticket) =>
          Effect.map(Clock.currentTimeMillis, (now) => {
            const fence = fences.get(partition)
            if (fence === undefined) return 0
            let stored = 0
            for (const record of records) {
              if (!ledger.admits(partition, record.id, ticket)) continue
              const value = { ...record, vector: record.vector.slice() }
              const size = value.vector.byteLength + 2 * (record.id.length + record.metadata.length) + memoryEntryBytes
              const expiresAt = now + options.ttlMillis
              const entry = { value, bytes: size, generation: fence.generation, expiresAt }
              stored += Number(put(recordKey(partition, record.id), entry))
            }
            return stored
          }),
        invalidate: (partition, ids) =>
          Effect.sync(() => {
            ledger.invalidate(partition, ids)
            if (entries.size === 0) return
            for (const id of ids) remove(recordKey(partition, id))
          }),
        fence: (partition, claim) =>
          Effect.sync(() => {
            const fence = fences.get(partition)
            if (fence !== undefined && continues(fence.released, claim)) {
              fence.released = undefined
              return
            }
            ledger.invalidateAll()
            fences.set(partition, { generation: ++generations, released: undefined })
          }),
        release: (partition, claim) =>
          Effect.sync(() => {
            const fence = fences.get(partition)
            if (fence !== undefined) fence.released = claim
          }),
        distrust: (partition) => Effect.sync(() => void fences.delete(partition)),
        getResult: (key) =>
          Effect.map(
            Clock.currentTimeMillis,
            (now) => take(resultKey(key), now, 0, undefined)?.value as Uint8Array | undefined
          ),
        putResult: (key, value, ttlMillis) =>
          Effect.map(Clock.currentTimeMillis, (now) => {
            const size = value.length + 2 * key.length + memoryEntryBytes
            put(resultKey(key), { value: value.slice(), bytes: size, generation: 0, expiresAt: now + ttlMillis })
          }),
        drop: (uid) =>
          Effect.sync(() => {
            ledger.invalidateAll()
            for (const partition of [...fences.keys()]) {
              if (partitionAddressOf(partition).uid === uid) fences.delete(partition)
            }
            for (const key of [...entries.keys()]) {
              const [kind, of] = key.split("\n") as [string, string]
              if ((kind === "r" ? partitionAddressOf(of).uid : uidOfResult(of)) === uid) remove(key)
            }
          }),
        bytes: () => bytes,
        shrink: (given) => {
          const keep = Math.max(0, bytes - given)
          for (const oldest of entries.keys()) {
            if (bytes <= keep) break
            remove(oldest)
          }
        },
        state: Effect.sync(() => ({
          kind: "memory",
          level: options.bytesMax === 0 ? "off" : "up",
          partitions: fences.size,
          hits,
          misses,
          errors: 0,
          bytes,
          calls: 0,
          callMillis: 0
        }))
      })
    })

  /** The twin in memory, as large as the settings say. */
  static readonly layerInProcess: Layer.Layer<WarmStore, never, Settings> = Layer.unwrap(
    Effect.map(Settings, ({ warmBytesMax, warmTtlMillis }) =>
      WarmStore.layerMemory({ bytesMax: warmBytesMax, ttlMillis: warmTtlMillis })
    )
  )
}

/** Whether a claim follows a release with nothing but the claim's own empty segment between the two. */
export const continues = (released: Claim | undefined, claim: Claim | undefined): boolean =>
  released !== undefined && claim !== undefined && claim.epoch === released.epoch + 1 && claim.seq === released.seq + 1

/** Sets the gauges of the warm tier. */
export const warmMetrics = (state: WarmState): void => {
  gauges.state.updateUnsafe(state.level === "off" ? 0 : state.level === "up" ? 1 : 2, context)
  gauges.partitions.updateUnsafe(state.partitions, context)
  gauges.hits.updateUnsafe(state.hits, context)
  gauges.misses.updateUnsafe(state.misses, context)
  gauges.errors.updateUnsafe(state.errors, context)
  gauges.bytes.updateUnsafe(state.bytes, context)
  gauges.calls.updateUnsafe(state.calls, context)
  gauges.callMillis.updateUnsafe(state.callMillis, context)
}

const context = Context.empty()

const gauges = {
  state: Metric.gauge("ruvector_warm_state", { description: "The warm tier: 0 off, 1 up, 2 degraded" }),
  partitions: Metric.gauge("ruvector_warm_partitions", {
    description: "Partitions that the warm tier may be read for"
  }),
  hits: Metric.gauge("ruvector_warm_hits", { description: "Records that the warm tier had" }),
  misses: Metric.gauge("ruvector_warm_misses", { description: "Records that it had not" }),
  errors: Metric.gauge("ruvector_warm_errors", {
    description: "Calls of the warm tier that failed, and damaged entries"
  }),
  bytes: Metric.gauge("ruvector_warm_bytes", { description: "Bytes of the warm tier in this process" }),
  calls: Metric.gauge("ruvector_redis_calls", { description: "Calls of Redis" }),
  callMillis: Metric.gauge("ruvector_redis_call_ms_sum", { description: "Milliseconds that all calls of Redis took" })
}

interface MemoryEntry {
  readonly value: PartitionRecord | Uint8Array
  readonly bytes: number
  readonly generation: number
  expiresAt: number
}

interface MemoryFence {
  readonly generation: number
  released: Claim | undefined
}

/** What the entry, its key and its place in the map take, about. */
const memoryEntryBytes = 500

const recordKey = (partition: string, id: string): string => `r\n${partition}\n${id}`
const resultKey = (key: string): string => `q\n${key}`

/** The collection that a result is of. */
export const uidOfResult = (key: string): string => key.slice(0, Math.max(0, key.indexOf("/")))
