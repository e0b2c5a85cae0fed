/** What the main thread and a vector thread say to each other. Everything asked in one turn goes in one message. */
import type { IndexForm, IndexSpec, IndexStats, SnapshotFiles } from "../VectorIndex.ts"

/** What a thread is started with. */
export interface ThreadOptions {
  readonly insertSliceMillis: number
  readonly graphFrom: number | undefined
  readonly blockCacheBytes: number
  readonly sketchFrom: number | undefined
  /** Words shared by both sides, see {@link isBusy}, {@link mustStop} and {@link atWork}. */
  readonly shared: Int32Array<SharedArrayBuffer>
  /** Of a `SearchDesk`, where the main thread waits for searches. */
  readonly desk: SharedArrayBuffer | undefined
}

/**
 * Words of `ThreadOptions.shared`. A thread that is ended inside of native code takes the whole process along, so it says
 * while it may be there, and goes there no more once it must stop.
 */
export const isBusy = 0
export const mustStop = 1
/** The partition that the thread works on, 0 for none: where it dies, of that. */
export const atWork = 2
export const sharedWords = 3

export interface ToThread {
  readonly searches?: Searches
  readonly commands?: ReadonlyArray<Command>
  /** Requests whose answer nobody waits for any more. */
  readonly cancelled?: ReadonlyArray<number>
  /** Memory is short: garbage is collected, soon even where there is much else to do. */
  readonly collect?: true
  /** Ends the thread, once nothing of it is under way in libuv's pool. */
  readonly stop?: true
}

/** Searches, flat: structured cloning takes its time by the object. */
export interface Searches {
  /** Of each search the {@link searchWords} words: request, partition, k, ef, flags, index of its filter or -1, components. */
  readonly head: ReadonlyArray<number>
  readonly filters: ReadonlyArray<string>
  /** The query vectors, one after another. */
  readonly vectors: Float32Array
}

export const searchWords = 7
export const withMetadata = 1
export const withVector = 2

/** A snapshot to open: without a graph in the mapped form. */
export interface OpenFiles {
  readonly records: string
  readonly graph: string | undefined
  readonly sketch?: string | undefined
}

export type Command =
  | {
      readonly kind: "open"
      readonly request: number
      readonly partition: number
      readonly spec: IndexSpec
      readonly snapshot: OpenFiles | undefined
    }
  | { readonly kind: "apply"; readonly request: number; readonly partition: number; readonly segment: Uint8Array }
  | { readonly kind: "get"; readonly request: number; readonly partition: number; readonly ids: ReadonlyArray<string> }
  | { readonly kind: "stats"; readonly request: number; readonly partition: number }
  | { readonly kind: "snapshot"; readonly request: number; readonly partition: number; readonly directory: string }
  | WatchCommand
  | { readonly kind: "unwatch"; readonly request: number; readonly partition: number; readonly watch: number }
  | { readonly kind: "close"; readonly partition: number }

/** Registers a standing query. */
export interface WatchCommand {
  readonly kind: "watch"
  readonly request: number
  readonly partition: number
  /** What matches name it by. */
  readonly watch: number
  readonly vector: Float32Array
  readonly k: number
  readonly ef: number
  readonly minScore: number
  /** Empty: none. */
  readonly filter: string
  /** {@link withMetadata} and {@link withVector}. */
  readonly flags: number
  /** Records that were in the answer. */
  readonly seeds: ReadonlyArray<string>
}

export interface FromThread {
  readonly hits?: Hits
  readonly answers?: ReadonlyArray<Answer>
  /** Bytes that the thread's partitions hold, now and then. */
  readonly bytes?: number
}

/** Answers to searches, flat. */
export interface Hits {
  /** Of each answer the {@link hitWords} words: request, results, flags, components of a vector. */
  readonly head: ReadonlyArray<number>
  readonly ids: ReadonlyArray<string>
  readonly scores: Float32Array
  /** Of the answers with {@link withMetadata}. */
  readonly metadata: ReadonlyArray<string>
  /** Of the answers with {@link withVector}. */
  readonly vectors: Float32Array
}

export const hitWords = 4

export type Answer =
  | { readonly kind: "opened"; readonly request: number; readonly form: IndexForm }
  | { readonly kind: "applied"; readonly request: number; readonly effects: Uint8Array }
  | RecordsAnswer
  | {
      readonly kind: "watched"
      readonly request: number
      readonly watch: number
      readonly matches: Matches | undefined
    }
  | { readonly kind: "unwatched"; readonly request: number }
  /** Unasked: what changes have done to standing queries, right before the answer to the segment that did it. */
  | { readonly kind: "matched"; readonly request: 0; readonly partition: number; readonly matches: Matches }
  /** Unasked: a partition with standing queries is lost. */
  | { readonly kind: "gone"; readonly request: 0; readonly partition: number; readonly detail: string }
  | {
      readonly kind: "stats"
      readonly request: number
      readonly stats: IndexStats
    }
  | {
      readonly kind: "written"
      readonly request: number
      readonly files: SnapshotFiles
      readonly form: IndexForm
    }
  | {
      readonly kind: "failed"
      readonly request: number
      /** `lost`: the partition is gone. `unreadable`: a snapshot's files. `refused`: what was asked makes no sense. */
      readonly reason: "lost" | "unreadable" | "refused"
      readonly detail: string
    }

export interface RecordsAnswer {
  readonly kind: "records"
  readonly request: number
  /** Of each id asked for whether it is there, then of each that is what follows. */
  readonly there: ReadonlyArray<boolean>
  readonly metadata: ReadonlyArray<string>
  readonly times: BigUint64Array
  readonly counters: Float64Array
  readonly regions: ReadonlyArray<string>
  readonly vectors: Float32Array
}

/** Changes of the answers to standing queries, flat. */
export interface Matches {
  /** Position of the last segment applied. */
  readonly seq: number
  /** Of each change {@link entryWords} words: the query, what it is, and which of `ids`. All of one query are together. */
  readonly entries: Int32Array
  /** Of each change the score, of what has entered. */
  readonly scores: Float32Array
  readonly ids: ReadonlyArray<string>
  /** Those of the ids that are there. */
  readonly records: RecordsAnswer
}

export const entryWords = 3

/**
 * What a change is, in the bits beside {@link withMetadata} and {@link withVector}: a record that came, or is another by
 * now; one that left; neither. `held`: more of it is to come, until then what was told stays.
 */
export const entered = 4
export const left = 8
export const held = 16
export const nothing = 32
