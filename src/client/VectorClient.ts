/**
 * The client for programs on Effect: the calls of `VectorDB` as effects and streams with typed errors. `VectorDB` is these
 * with promises.
 */
import { Context, Effect, Layer, type Scope, Stream } from "effect"
import { makeCellEngine } from "./CellEngine.ts"
import { ownError, type VectorDBError } from "./ClientError.ts"
import { type ClientOptions, resolveOptions } from "./ClientOptions.ts"
import type {
  Ack,
  CollectionChange,
  CollectionInfo,
  CollectionParameters,
  Engine,
  Filter,
  Item,
  MemberChange,
  Metadata,
  Query,
  SearchHit,
  StoredVector,
  Vector
} from "./Engine.ts"
import { pathOf, type StandardSchema } from "./StandardSchema.ts"
import { type TopicClient, topicClientOf } from "./Topics.ts"

/** Which collection, and for how long to try; what is left out is the client's. */
export interface Call {
  readonly collection?: string
  readonly deadlineMillis?: number
}

/** A vector that was found. */
export interface Hit<M> extends Omit<SearchHit, "metadata"> {
  readonly metadata: M
}

/** Hits, nearest first; and the partitions that did not answer in time, whose vectors may be missing among them. */
export interface Hits<M> extends ReadonlyArray<Hit<M>> {
  readonly missingPartitions: ReadonlyArray<number>
}

/** A vector as it is stored. */
export interface Stored<M> extends Omit<StoredVector, "metadata"> {
  readonly metadata: M
}

/** A vector to be stored. */
export interface NewItem<M> extends Omit<Item, "metadata"> {
  readonly metadata?: M
}

/** How a search is made. */
export interface SearchCall extends Call {
  /** 1 to 10,000; 10 where left out. */
  readonly k?: number
  /** Width of the search, at least k; the collection's where left out. */
  readonly ef?: number
  /** Only vectors whose metadata is so. */
  readonly filter?: Filter
  /** Whether hits come with their vectors. */
  readonly includeVector?: boolean
}

/** What a standing query is to tell. */
export interface SubscribeCall {
  readonly collection?: string
  /** 1 to 256; 10 where left out. */
  readonly k?: number
  /** Records that score lower are not among them. */
  readonly minScore?: number
  /** Only vectors whose metadata is so; one whose metadata ceases to be so leaves. */
  readonly filter?: Filter
  /** Whether changes come with the vectors. */
  readonly includeVector?: boolean
}

/** Which changes are to be followed. */
export interface FollowCall {
  readonly collection?: string
  /** `newest` (the default): changes from now on. */
  readonly from?: "newest" | "oldest"
}

/** The k nearest change: one enters, one leaves, one is another than before. */
export type Standing<M> =
  | (Omit<Extract<MemberChange, { readonly type: "enter" | "update" }>, "metadata"> & { readonly metadata: M })
  | Extract<MemberChange, { readonly type: "leave" }>

/** How a write is made. */
export interface WriteCall extends Call {
  /**
   * The write is done once under this key, however often it is called, within the server's window. The client's own attempts
   * at one call are one write without it; with it a call after a restart can be too. 1 to 200 printable ASCII characters.
   */
  readonly idempotencyKey?: string
}

/** How vectors are written. */
export interface InsertCall extends WriteCall {
  /** How durable it is when it is done; `cold` where left out. */
  readonly ack?: Ack
}

/** How many are written. */
export interface InsertManyCall extends Omit<InsertCall, "idempotencyKey"> {
  /** Vectors in one request, 1 to 10,000; 500 where left out. */
  readonly batchSize?: number
  /** Requests under way at one time; 4 where left out. */
  readonly concurrency?: number
}

/** What becomes of a stored vector. */
export interface Change<M> {
  /** The new vector: the record is replaced. */
  readonly vector?: Vector
  /** Fields that are set; `null` removes one. With `vector`: the whole metadata. */
  readonly metadata?: Partial<{ readonly [Field in keyof M]: M[Field] | null }>
}

/** The collections of a service or an engine. */
export interface Collections {
  /** Makes a collection; the same again does nothing. */
  readonly create: (
    name: string,
    parameters: CollectionParameters,
    call?: Pick<Call, "deadlineMillis">
  ) => Effect.Effect<CollectionInfo, VectorDBError>
  /** What is known of one, and how many vectors are in it; `undefined` where there is none. */
  readonly get: (
    name: string,
    call?: Pick<Call, "deadlineMillis">
  ) => Effect.Effect<CollectionInfo | undefined, VectorDBError>
  /** All of them. */
  readonly list: (call?: Pick<Call, "deadlineMillis">) => Effect.Effect<ReadonlyArray<CollectionInfo>, VectorDBError>
  /** Whether there was one. */
  readonly delete: (name: string, call?: Pick<Call, "deadlineMillis">) => Effect.Effect<boolean, VectorDBError>
}

/** The calls of a client, as effects and streams. `M`: the type of metadata, of the schema given. */
export interface TypedClient<M> {
  /** Inserts or replaces one vector; done when it is as durable as `ack` says, and seen by the next search. */
  readonly insert: (item: NewItem<M>, call?: InsertCall) => Effect.Effect<void, VectorDBError>
  /** In batches, in the order given; no more is taken from the stream than is under way. How many were inserted. */
  readonly insertMany: <E, R>(
    items: Iterable<NewItem<M>> | Stream.Stream<NewItem<M>, E, R>,
    call?: InsertManyCall
  ) => Effect.Effect<number, VectorDBError | E, R>
  /** Sets fields of the metadata (`null` removes one), or replaces the record where a vector is given. */
  readonly update: (id: string, change: Change<M>, call?: InsertCall) => Effect.Effect<void, VectorDBError>
  /** How many there were. */
  readonly delete: (ids: string | ReadonlyArray<string>, call?: WriteCall) => Effect.Effect<number, VectorDBError>
  /** One by its id; `undefined` where there is none. */
  readonly get: (id: string, call?: Call) => Effect.Effect<Stored<M> | undefined, VectorDBError>
  /** The k nearest, to a vector or to a stored one (`{ id }`). */
  readonly search: (query: Query, call?: SearchCall) => Effect.Effect<Hits<M>, VectorDBError>
  /** The same, one by one as they arrive; interrupting the stream ends the search on the server too. */
  readonly searchStream: (query: Query, call?: SearchCall) => Stream.Stream<Hit<M>, VectorDBError>
  /**
   * A standing query: first the k nearest enter, then whatever changes among them, for as long as it is read. Applied one
   * after the other the changes give what is nearest now. Goes on by itself after cuts, without a gap or a repeat; a reader
   * that lags is given what changed in between as one difference.
   */
  readonly subscribe: (query: Query, call?: SubscribeCall) => Stream.Stream<Standing<M>, VectorDBError>
  /** Every change of a collection, each once, in order for each id; goes on by itself after cuts. */
  readonly follow: (call?: FollowCall) => Stream.Stream<CollectionChange, VectorDBError>
  readonly collections: Collections
  readonly topics: TopicClient
}

/** What the calls that name none of their own are made with. */
export interface Defaults<M> {
  readonly collection: string
  readonly deadlineMillis: number
  readonly metadata: StandardSchema<M> | undefined
}

/** How a client on a service is made, and what its metadata is. */
export interface VectorDBOptions<M = Metadata> extends ClientOptions {
  /** Checks metadata on its way in and out, and gives it its type. Standard Schema: zod, valibot, Effect's Schema... */
  readonly metadata?: StandardSchema<M>
}

/**
 * The client as a service: the calls of `VectorDB` as effects and streams, failing with `VectorDBError`.
 *
 *     const program = Effect.gen(function* () {
 *       const client = yield* VectorClient
 *       yield* client.insert({ id: "a", vector: [1, 0, 0] })
 *       return yield* Stream.runCollect(client.searchStream([1, 0, 0], { k: 10 }))
 *     })
 *     Effect.provide(program, VectorClient.layer({ endpoint: "https://vectors.example.com" }))
 */
export class VectorClient extends Context.Service<VectorClient, TypedClient<Metadata>>()(
  "ruvector/client/VectorClient"
) {
  /**
   * A client on a service; its connection lives as long as the scope. For a service of a program's own, with metadata of
   * its own type:
   *
   *     class Tasks extends Context.Service<Tasks, TypedClient<Task>>()("app/Tasks") {
   *       static readonly layer = Layer.effect(Tasks, VectorClient.make({ endpoint, collection: "tasks", metadata: taskSchema }))
   *     }
   *
   * Dies where an option is out of its bound.
   */
  static readonly make = <M = Metadata>(
    options: VectorDBOptions<M>
  ): Effect.Effect<TypedClient<M>, never, Scope.Scope> =>
    Effect.gen(function* () {
      const resolved = resolveOptions(options)
      const engine = yield* Effect.acquireRelease(
        Effect.sync(() => makeCellEngine(resolved)),
        ({ close }) => Effect.sync(close)
      )
      return clientOf<M>(engine, { ...resolved, metadata: options.metadata })
    })

  /** On a service; the connection lives as long as the layer. Dies where an option is out of its bound. */
  static readonly layer = (options: ClientOptions): Layer.Layer<VectorClient> =>
    Layer.effect(VectorClient, VectorClient.make(options))
}

const defaultK = 10
const defaultBatchSize = 500
const defaultConcurrency = 4

/** A client on an engine. */
export const clientOf = <M>(engine: Engine, defaults: Defaults<M>): TypedClient<M> => {
  const callOf = (call: Call | undefined) => ({
    collection: call?.collection ?? defaults.collection,
    deadlineMillis: call?.deadlineMillis ?? defaults.deadlineMillis
  })
  const writeOf = (call: WriteCall | undefined) => ({
    ...callOf(call),
    ...(call?.idempotencyKey === undefined ? {} : { idempotencyKey: call.idempotencyKey })
  })
  const insertOf = (call: InsertCall | undefined) => ({
    ...writeOf(call),
    ...(call?.ack === undefined ? {} : { ack: call.ack })
  })
  const searchOf = (call: SearchCall | undefined) => ({
    ...callOf(call),
    k: call?.k ?? defaultK,
    includeVector: call?.includeVector ?? false,
    ...(call?.ef === undefined ? {} : { ef: call.ef }),
    ...(call?.filter === undefined ? {} : { filter: call.filter })
  })

  const { metadata: schema } = defaults

  const checked = (metadata: unknown): Effect.Effect<M, VectorDBError> => {
    if (schema === undefined) return Effect.succeed(metadata as M)
    return Effect.flatMap(
      Effect.promise(async () => schema["~standard"].validate(metadata)),
      (result) => {
        if (result.issues === undefined) return Effect.succeed(result.value)
        const [issue] = result.issues
        const field = issue === undefined ? "" : pathOf(issue)
        const what = issue?.message ?? "not what the schema says"
        return Effect.fail(ownError("invalid_metadata", field === "" ? what : `${field}: ${what}`, `metadata.${field}`))
      }
    )
  }

  const itemsOf = (items: ReadonlyArray<NewItem<M>>): Effect.Effect<ReadonlyArray<Item>, VectorDBError> => {
    if (schema === undefined) return Effect.succeed(items as ReadonlyArray<Item>)
    return Effect.forEach(items, (item) =>
      item.metadata === undefined
        ? Effect.succeed({ id: item.id, vector: item.vector })
        : Effect.as(checked(item.metadata), item as Item)
    )
  }

  const hitOf = (hit: SearchHit): Effect.Effect<Hit<M>, VectorDBError> =>
    schema === undefined
      ? Effect.succeed(hit as Hit<M>)
      : Effect.map(checked(hit.metadata), (metadata) => ({ ...hit, metadata }))

  const insertBatch = (items: ReadonlyArray<NewItem<M>>, call: InsertCall | undefined) =>
    Effect.flatMap(itemsOf(items), (checked) => engine.insert(checked, insertOf(call)))

  const found = <A>(
    effect: Effect.Effect<A, VectorDBError>,
    code: string
  ): Effect.Effect<A | undefined, VectorDBError> =>
    Effect.catchIf(
      effect,
      (error) => error.code === code,
      () => Effect.undefined
    )

  const untilOf = (call: Pick<Call, "deadlineMillis"> | undefined) => call?.deadlineMillis ?? defaults.deadlineMillis

  const client: TypedClient<M> = {
    topics: topicClientOf(engine, defaults.deadlineMillis),
    insert: (item, call) => Effect.asVoid(insertBatch([item], call)),
    insertMany: (items, call) =>
      (Stream.isStream(items) ? items : Stream.fromIterable(items)).pipe(
        Stream.grouped(call?.batchSize ?? defaultBatchSize),
        Stream.mapEffect((batch) => insertBatch(batch, call), { concurrency: call?.concurrency ?? defaultConcurrency }),
        Stream.runFold(
          () => 0,
          (sum, inserted) => sum + inserted
        )
      ),
    update: (id, { vector, metadata }, call) => {
      if (vector !== undefined) {
        return client.insert({ id, vector, ...(metadata === undefined ? {} : { metadata: metadata as M }) }, call)
      }
      return Effect.asVoid(engine.patch(id, (metadata ?? {}) as Metadata, writeOf(call)))
    },
    delete: (ids, call) => engine.remove(typeof ids === "string" ? [ids] : ids, writeOf(call)),
    get: (id, call) =>
      Effect.flatMap(engine.get(id, callOf(call)), (record) =>
        record === undefined
          ? Effect.undefined
          : Effect.map(checked(record.metadata), (metadata): Stored<M> => ({ ...record, metadata }))
      ),
    search: (query, call) =>
      Effect.flatMap(engine.search(query, searchOf(call)), ({ hits, missingPartitions }) =>
        Effect.map(
          schema === undefined ? Effect.succeed(hits as ReadonlyArray<Hit<M>>) : Effect.forEach(hits, hitOf),
          (hits): Hits<M> => Object.assign([...hits], { missingPartitions })
        )
      ),
    searchStream: (query, call) => {
      const hits = engine.searchStream(query, searchOf(call))
      return schema === undefined ? (hits as Stream.Stream<Hit<M>, VectorDBError>) : Stream.mapEffect(hits, hitOf)
    },
    subscribe: (query, call) => {
      const changes = engine.subscribe(query, {
        collection: call?.collection ?? defaults.collection,
        k: call?.k ?? defaultK,
        includeVector: call?.includeVector ?? false,
        ...(call?.minScore === undefined ? {} : { minScore: call.minScore }),
        ...(call?.filter === undefined ? {} : { filter: call.filter })
      })
      if (schema === undefined) return changes as Stream.Stream<Standing<M>, VectorDBError>
      return Stream.mapEffect(
        changes,
        (change): Effect.Effect<Standing<M>, VectorDBError> =>
          change.type === "leave"
            ? Effect.succeed(change)
            : Effect.map(checked(change.metadata), (metadata) => ({ ...change, metadata }))
      )
    },
    follow: (call) =>
      engine.follow({ collection: call?.collection ?? defaults.collection, from: call?.from ?? "newest" }),
    collections: {
      create: (name, parameters, call) => engine.createCollection(name, parameters, untilOf(call)),
      get: (name, call) => found(engine.collection(name, untilOf(call)), "collection_not_found"),
      list: (call) => engine.collections(untilOf(call)),
      delete: (name, call) =>
        Effect.map(
          found(Effect.as(engine.deleteCollection(name, untilOf(call)), true), "collection_not_found"),
          (deleted) => deleted === true
        )
    }
  }
  return client
}
