/**
 * The vector threads: worker threads that own whole partitions (records, graph, metadata index) and do all vector work.
 * The main thread sends them log segments and queries; it never touches a graph.
 *
 * A thread that dies takes its partitions along, and nothing else: whatever is asked of them fails with {@link IndexLost},
 * and another thread takes its place.
 */
import { availableParallelism } from "node:os"
import { Context, Data, Effect, Layer, type Scope } from "effect"
import { defaultSettings, Settings } from "../config.ts"
import type { Metric, Quantization } from "../protocol/Fields.ts"
import type { WatchChange } from "../protocol/StandingQuery.ts"
import type { Version } from "../protocol/Version.ts"
import { Patience } from "./index/Patience.ts"
import { ThreadClient } from "./index/ThreadClient.ts"

export interface IndexSpec {
  readonly dimensions: number
  readonly metric: Metric
  readonly m: number
  readonly efConstruction: number
  /** How a partition keeps its vectors once a snapshot has them; `none`, as they are, where it is left out. */
  readonly quantization?: Quantization | undefined
}

/**
 * The form of a partition in its thread. `full`: records, vectors and graph are in memory. `mapped`: the newest snapshot's
 * sketch is, and what was written since; all else is read from the snapshot's records file when it is needed.
 */
export type IndexForm = "full" | "mapped"

/** Files of a snapshot that the index is opened from; the thread only reads them. */
export interface SnapshotFiles {
  readonly records: string
  readonly graph: string
  /** Where there is one: only of partitions with some records. */
  readonly sketch?: string | undefined
}

export interface IndexQuery {
  readonly vector: Float32Array
  readonly k: number
  /** Width of the search beam; at least `k` is used. */
  readonly ef: number
  /** JSON text of a filter that `checkFilter` has passed. */
  readonly filter: string | undefined
  readonly includeMetadata: boolean
  readonly includeVector: boolean
}

/**
 * Nearest first: as many as match, at most k. `scores`: higher is nearer (cosine; inner product; negative Euclidean
 * distance), the same whether a graph was walked or all was looked at.
 */
export interface IndexHits {
  readonly ids: ReadonlyArray<string>
  readonly scores: Float32Array
  /** JSON text (empty for none), beside each id, where asked for. */
  readonly metadata: ReadonlyArray<string> | undefined
  /** `ids.length * dimensions` components as they were inserted, where asked for. */
  readonly vectors: Float32Array | undefined
}

export interface IndexRecord {
  readonly id: string
  readonly vector: Float32Array
  /** JSON text of an object; empty for none. */
  readonly metadata: string
  /** The greatest of the versions of its vector and its metadata. */
  readonly version: Version
}

/** What applying one segment did, operation by operation. */
export interface Applied {
  /** Per operation: 0 older than what is there (no effect), 1 set a record that was not visible, 2 changed a visible one, 3 deleted a visible one, 4 tombstone or orphan only. */
  readonly effects: Uint8Array
}

export interface IndexStats {
  /** Visible records. */
  readonly count: number
  readonly tombstones: number
  /** Vectors that live in the graph's memory, replaced and deleted ones included; 0 while there is no graph. */
  readonly graphSlots: number
  /** Bytes held for the partition, counted by the thread. */
  readonly bytes: number
  /** Greatest version applied, and the greatest counter by region. */
  readonly maxTime: bigint
  readonly counters: ReadonlyMap<string, number>
  readonly form: IndexForm
  /** Visible records that are in memory with their vectors: all in the full form, those written since the snapshot in the mapped one. */
  readonly inMemory: number
  /** Of {@link bytes} what was written since the snapshot takes in the mapped form: a snapshot gives them back. */
  readonly recentBytes: number
  /** Of {@link bytes} what these take; the rest is ids, metadata and versions. */
  readonly bytesOf: {
    /** Vectors as they were inserted. */
    readonly vectors: number
    readonly graph: number
    /** What filters are answered from. */
    readonly filters: number
    /** Codes and centroids. */
    readonly sketch: number
    /** Vectors as bf16 or i8. */
    readonly narrow: number
  }
}

/** A query that stands: its answer is told as it changes. */
export interface StandingSpec {
  readonly vector: Float32Array
  readonly k: number
  /** Width of the beam of its searches. */
  readonly ef: number
  /** Of the records that answer it; -Infinity where any may. */
  readonly minScore: number
  /** JSON text of a filter that `checkFilter` has passed; empty for none. */
  readonly filter: string
  readonly includeMetadata: boolean
  readonly includeVector: boolean
  /** Records that were in its answer: they are in it again where they belong, whatever a search finds. */
  readonly seeds: ReadonlyArray<string>
}

/** Called in order, in the turn in which it is known. */
export interface StandingListener {
  /** The first time with the whole answer. */
  readonly onChange: (change: WatchChange) => void
  /** The partition is gone, and the query with it. */
  readonly onLost: (error: IndexLost) => void
}

export interface StandingHandle {
  readonly close: () => void
}

/** The thread died, or the partition was closed or could not be kept in step; it has to be opened again. */
export class IndexLost extends Data.TaggedError("IndexLost")<{ readonly detail: string }> {}

/** As many searches as may wait for the thread do; this one was not begun. */
export class IndexBusy extends Data.TaggedError("IndexBusy")<{ readonly bound: string }> {}

/** A snapshot's files could not be read, are not whole, or are not of this index; or could not be written. */
export class SnapshotUnreadable extends Data.TaggedError("SnapshotUnreadable")<{ readonly detail: string }> {}

/** One partition, resident in a thread. */
export interface PartitionIndex {
  /**
   * Applies a log segment's bytes (checked by the caller), after all segments given before. Sliced: searches go in
   * between. The bytes may be used otherwise once this has begun. A segment that cannot be applied leaves a gap, so the
   * partition is lost by it. How much is under way at once is the caller's to bound.
   */
  readonly apply: (segment: Uint8Array) => Effect.Effect<Applied, IndexLost>
  /** An interrupted search is not begun where it has not been yet. */
  readonly search: (query: IndexQuery) => Effect.Effect<IndexHits, IndexLost | IndexBusy>
  /** Records by id, `undefined` where there is none. Not ordered with applies under way. */
  readonly get: (ids: ReadonlyArray<string>) => Effect.Effect<ReadonlyArray<IndexRecord | undefined>, IndexLost>
  readonly stats: Effect.Effect<IndexStats, IndexLost>
  /**
   * Writes the state after all applies given before into files of `directory`; searches go on meanwhile, applies wait. In the
   * mapped form, and in a quantised collection from a number of records on, the partition goes on from these files: it
   * holds the records file open, which may be moved, linked or removed, but not be changed.
   */
  readonly snapshot: (directory: string) => Effect.Effect<SnapshotFiles, IndexLost | SnapshotUnreadable>
  /**
   * Registers a standing query after all applies given before. The listener has the first answer when this succeeds; what a
   * segment changes it is told right before that segment's writer. Nothing is told after `close`.
   */
  readonly watch: (spec: StandingSpec, listener: StandingListener) => Effect.Effect<StandingHandle, IndexLost>
  /** The form it has; a snapshot may change it. */
  readonly form: () => IndexForm
  /** Whether all that is asked fails by now. */
  readonly lost: () => boolean
}

export interface VectorThreadState {
  readonly partitions: number
  readonly bytes: number
  readonly restarts: number
}

export interface VectorIndexOptions {
  /** Threads; 0 or none: one for each core beyond the first, at least one. */
  readonly threads?: number
  /** Milliseconds of insertion work between two looks at waiting searches. */
  readonly insertSliceMillis?: number
  /** Records from which a partition has a graph, fewer are always looked at one by one; chosen by their dimensions where there is none. */
  readonly graphFrom?: number
  /** Searches waiting for one thread, at most. */
  readonly threadPendingMax?: number
  /** Milliseconds that a search which is alone may keep the main thread waiting, in a turn of its event loop; 0 or none: never. */
  readonly searchWaitMillis?: number
  /** Bytes of records files that one thread keeps in memory for the mapped forms in it. */
  readonly blockCacheBytes?: number
  /** Records from which a snapshot has a sketch. */
  readonly sketchFrom?: number
  /** Megabytes of V8's heap in one thread (ids, metadata and its index; vectors and graphs are not in it); V8 chooses where there is none. */
  readonly threadHeapMegabytes?: number
  /** The module that a thread runs, where it is another one. */
  readonly entry?: URL
}

/** How a partition is opened that is not like others. */
export interface OpeningOptions {
  /** In a thread of its own, unless there are {@link isolatedThreadsMax} such: so that it takes no other partition along. */
  readonly isolated?: boolean
  /** Told once, where its thread dies, or has to give it up, at work on it. */
  readonly onFault?: (detail: string) => void
}

/** Threads with one partition each that failed lately. */
export const isolatedThreadsMax = 2

export class VectorIndex extends Context.Service<
  VectorIndex,
  {
    /**
     * Opens a partition in the thread that holds least; closed, and its memory given back, with the scope. Fails over to
     * no other state: an unreadable snapshot is the caller's to handle. In the full form, but for a quantised collection's
     * snapshot with a sketch, which is opened in the mapped one.
     */
    readonly open: (
      spec: IndexSpec,
      snapshot: SnapshotFiles | undefined,
      options?: OpeningOptions
    ) => Effect.Effect<PartitionIndex, IndexLost | SnapshotUnreadable, Scope.Scope>
    /** Opens a snapshot in the mapped form, within milliseconds. The records file is held open until the scope closes. */
    readonly openMapped: (
      spec: IndexSpec,
      snapshot: { readonly records: string; readonly sketch: string },
      options?: OpeningOptions
    ) => Effect.Effect<PartitionIndex, IndexLost | SnapshotUnreadable, Scope.Scope>
    /** Has every thread collect its garbage, when it has nothing else to do. */
    readonly collect: () => void
    readonly threads: Effect.Effect<ReadonlyArray<VectorThreadState>>
  }
>()("ruvector/tiers/VectorIndex") {
  static readonly layerWith = (options: VectorIndexOptions): Layer.Layer<VectorIndex> =>
    Layer.effect(
      VectorIndex,
      Effect.gen(function* () {
        const count = options.threads || Math.max(1, availableParallelism() - 1)
        const context = yield* Effect.context<never>()
        const patience = options.searchWaitMillis ? new Patience(options.searchWaitMillis) : undefined
        const start = (name: string) =>
          new ThreadClient({
            name,
            entry: options.entry ?? new URL("./vectorThread.ts", import.meta.url),
            thread: {
              insertSliceMillis: options.insertSliceMillis ?? 4,
              graphFrom: options.graphFrom,
              blockCacheBytes: options.blockCacheBytes ?? defaultSettings.blockCacheBytes,
              sketchFrom: options.sketchFrom
            },
            patience,
            pendingMax: options.threadPendingMax ?? 4_096,
            heapMegabytes: options.threadHeapMegabytes,
            onDeath: (detail, delayMillis) => {
              const said = Effect.logError("A vector thread died and is replaced", {
                thread: name,
                detail,
                delayMillis
              })
              Effect.runForkWith(context)(said)
            }
          })
        const threads = yield* Effect.acquireRelease(
          Effect.sync(() => Array.from({ length: count }, (_, i) => start(`vector-${i}`))),
          (threads) => Effect.promise(() => Promise.all(threads.map((thread) => thread.stop())))
        )
        const leastLoaded = () => threads.reduce((least, thread) => (thread.load < least.load ? thread : least))
        /** Of one partition each. */
        const isolated = new Set<ThreadClient>()
        let restartsThere = 0
        const ownThread = Effect.acquireRelease(
          Effect.sync(() => {
            const thread = start("vector-isolated")
            isolated.add(thread)
            return thread
          }),
          (thread) =>
            Effect.promise(() => {
              isolated.delete(thread)
              restartsThere += thread.restarts
              return thread.stop()
            })
        )
        const place = (asked: OpeningOptions | undefined) =>
          Effect.suspend(
            (): Effect.Effect<ThreadClient, never, Scope.Scope> =>
              asked?.isolated === true && isolated.size < isolatedThreadsMax ? ownThread : Effect.succeed(leastLoaded())
          )
        return VectorIndex.of({
          open: (spec, snapshot, asked) =>
            Effect.flatMap(place(asked), (thread) => thread.open(spec, snapshot && { ...snapshot }, asked?.onFault)),
          openMapped: (spec, { records, sketch }, asked) =>
            Effect.flatMap(place(asked), (thread) =>
              thread.open(spec, { records, graph: undefined, sketch }, asked?.onFault)
            ),
          collect: () => {
            for (const thread of threads) thread.collect()
          },
          threads: Effect.sync(() =>
            [...threads, ...isolated].map(({ partitions, bytes, restarts }, i) => ({
              partitions,
              bytes,
              restarts: restarts + (i === 0 ? restartsThere : 0)
            }))
          )
        })
      })
    )

  /** Of a process that owns no partitions. */
  static readonly layerNone: Layer.Layer<VectorIndex> = Layer.sync(VectorIndex, () => {
    const none = Effect.die(new Error("A partition was opened in a process that owns none"))
    return VectorIndex.of({ open: () => none, openMapped: () => none, collect: () => {}, threads: Effect.succeed([]) })
  })

  /** The threads that the settings ask for. */
  static readonly layer: Layer.Layer<VectorIndex, never, Settings> = Layer.unwrap(
    Effect.map(Settings, (settings) => VectorIndex.layerWith(settings))
  )
}
