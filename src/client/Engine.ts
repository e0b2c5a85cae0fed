/**
 * What a client works on: a service far away (`RemoteEngine`), or the engine in the same process. The same calls, the same
 * answers, the same errors, so that `VectorDB` is one thin skin over either.
 */
import type { Effect, Stream } from "effect"
import type { VectorDBError } from "./ClientError.ts"
import type { ListenOptions, TopicMessage } from "./Topics.ts"

/** What a vector is stored with: any JSON object. */
export type Metadata = Readonly<Record<string, unknown>>

/** A filter as `docs/protocol.md` has it: `{"type": "task"}`, `{"n": {"gte": 3}}`, `{"or": [...]}`. */
export type Filter = Readonly<Record<string, unknown>>

/** Numbers of either kind, as many as the collection has dimensions. */
export type Vector = Float32Array | ReadonlyArray<number>

/** `memory`, `warm` or `cold` (the default): how durable a write is when its promise resolves. */
export type Ack = "memory" | "warm" | "cold"

export interface Item {
  readonly id: string
  readonly vector: Vector
  readonly metadata?: Metadata
}

export interface StoredVector {
  readonly id: string
  readonly vector: Float32Array
  readonly metadata: Metadata
  /** Opaque: equal versions are the same record unchanged. */
  readonly version: string
}

/** A vector that was found, with metadata of any kind. */
export interface SearchHit {
  readonly id: string
  /** Higher is nearer. */
  readonly score: number
  readonly metadata: Metadata
  readonly vector?: Float32Array
}

export interface SearchOptions {
  readonly collection: string
  readonly k: number
  readonly ef?: number
  readonly filter?: Filter
  readonly includeVector: boolean
  readonly deadlineMillis: number
}

export interface SearchAnswer {
  readonly hits: ReadonlyArray<SearchHit>
  /** Partitions that did not answer in time; their vectors are missing. */
  readonly missingPartitions: ReadonlyArray<number>
}

/** `enter` and `update` have all of the record; an update is of one that was among the nearest before. */
export type MemberChange =
  | ({ readonly type: "enter" | "update"; readonly version: string } & SearchHit)
  | { readonly type: "leave"; readonly id: string }

export interface SubscribeOptions {
  readonly collection: string
  /** 1 to 256. */
  readonly k: number
  readonly minScore?: number
  readonly filter?: Filter
  readonly includeVector: boolean
}

/** One change of a collection, in log order for each id; `resync`: changes are gone that were not handed on. */
export type CollectionChange =
  | { readonly kind: "upsert" | "metadata" | "delete"; readonly id: string; readonly version: string }
  | { readonly kind: "resync" }

export interface FollowOptions {
  readonly collection: string
  readonly from: "newest" | "oldest"
}

/** What a collection is made with; it stays so. Only `dimensions` has to be given. */
export interface CollectionParameters {
  /** Numbers in each vector. */
  readonly dimensions: number
  /** How near two vectors are: by their angle (`cosine`, the default), their distance (`l2`) or their inner product. */
  readonly metric?: "cosine" | "l2" | "ip"
  /** Slices that are searched at once and can lie on different nodes. */
  readonly partitions?: number
  /** The graph that is searched. */
  readonly index?: {
    /** Neighbours of each vector. */
    readonly m?: number
    /** Width of the search for them. */
    readonly ef_construction?: number
    /** Width of a search that names none. */
    readonly ef_search?: number
    /** How vectors are held in memory; answers are rescored with the vectors themselves. */
    readonly quantization?: "none" | "bf16" | "i8" | "pq"
  }
}

/** A collection as it is. */
export interface CollectionInfo {
  readonly name: string
  /** Another for each collection, also of a name that was used before. */
  readonly uid: string
  readonly dimensions: number
  readonly metric: "cosine" | "l2" | "ip"
  readonly partitions: number
  /** Visible vectors; where one collection was asked for. */
  readonly count?: number
}

export interface CallOptions {
  readonly collection: string
  readonly deadlineMillis: number
}

/** A message of a topic; or that messages are past their retention which were not handed on. */
export type Heard = TopicMessage | { readonly gap: true }

export interface WriteOptions extends CallOptions {
  /** The write is done once under it, however often it is asked for; where there is none each call is a write of its own. */
  readonly idempotencyKey?: string
}

/** Vector, or id of a vector of the collection. */
export type Query = Vector | { readonly id: string }

export interface Engine {
  /** Upserts, in the order given. */
  readonly insert: (
    items: ReadonlyArray<Item>,
    options: WriteOptions & { readonly ack?: Ack }
  ) => Effect.Effect<number, VectorDBError>
  /** Sets the metadata's fields; `null` removes one. */
  readonly patch: (
    id: string,
    metadata: Metadata,
    options: WriteOptions
  ) => Effect.Effect<{ readonly metadata: Metadata; readonly version: string }, VectorDBError>
  readonly remove: (ids: ReadonlyArray<string>, options: WriteOptions) => Effect.Effect<number, VectorDBError>
  readonly get: (id: string, options: CallOptions) => Effect.Effect<StoredVector | undefined, VectorDBError>
  readonly search: (query: Query, options: SearchOptions) => Effect.Effect<SearchAnswer, VectorDBError>
  /** Hits as they arrive, nearest first. */
  readonly searchStream: (query: Query, options: SearchOptions) => Stream.Stream<SearchHit, VectorDBError>
  /** What is nearest, and from then on what changes in that. Ends by being interrupted, or fails. */
  readonly subscribe: (query: Query, options: SubscribeOptions) => Stream.Stream<MemberChange, VectorDBError>
  /** The changes of a collection from now on, or from the oldest that is kept. */
  readonly follow: (options: FollowOptions) => Stream.Stream<CollectionChange, VectorDBError>
  readonly createCollection: (
    name: string,
    parameters: CollectionParameters,
    deadlineMillis: number
  ) => Effect.Effect<CollectionInfo, VectorDBError>
  readonly collection: (name: string, deadlineMillis: number) => Effect.Effect<CollectionInfo, VectorDBError>
  readonly collections: (deadlineMillis: number) => Effect.Effect<ReadonlyArray<CollectionInfo>, VectorDBError>
  readonly deleteCollection: (name: string, deadlineMillis: number) => Effect.Effect<void, VectorDBError>
  /** Asks something of topics; what, and what is answered, is in `docs/protocol.md`. */
  readonly topic: (
    operation: string,
    request: Readonly<Record<string, unknown>>,
    deadlineMillis: number
  ) => Effect.Effect<Readonly<Record<string, unknown>>, VectorDBError>
  readonly listen: (topic: string, options: Omit<ListenOptions, "onGap">) => Stream.Stream<Heard, VectorDBError>
}
