/** `VectorDB`: the calls of `TypedClient` with promises. Works in Node and in a browser. */
import { Stream } from "effect"
import { makeCellEngine } from "./CellEngine.ts"
import { Channel, Tasks } from "./Channel.ts"
import type { ClientOptions } from "./ClientOptions.ts"
import { resolveOptions } from "./ClientOptions.ts"
import type {
  CollectionChange,
  CollectionInfo,
  CollectionParameters,
  Engine,
  Metadata,
  Query,
  Vector
} from "./Engine.ts"
import { type Aborts, iterate, run } from "./Promises.ts"
import type { StandardSchema } from "./StandardSchema.ts"
import type { TopicCall, TopicInfo, TopicParameters } from "./Topics.ts"
import {
  type Call,
  type Change,
  clientOf,
  type FollowCall,
  type Hit,
  type Hits,
  type InsertCall,
  type InsertManyCall,
  type NewItem,
  type SearchCall,
  type Standing,
  type Stored,
  type SubscribeCall,
  type TypedClient,
  type VectorDBOptions,
  type WriteCall
} from "./VectorClient.ts"

/** On an engine that is there already, in place of a service. */
export interface EngineOptions<M = Metadata> extends Pick<ClientOptions, "collection" | "deadlineMillis"> {
  /** What its calls go to; `close` ends it. */
  readonly engine: Engine & {
    /** Ends the engine, after what it holds is safe. */
    readonly close: () => void | Promise<void>
  }
  readonly metadata?: StandardSchema<M>
}

/**
 * The client: promises and async iterables. `M`: the metadata's type, of the schema given.
 *
 *     const db = new VectorDB({ endpoint: "https://vectors.example.com" })
 *     await db.insert("a", [1, 0, 0], { metadata: { type: "task" } })
 *     for await (const hit of db.searchStream([1, 0, 0], { k: 10, filter: { type: "task" } })) console.log(hit.id, hit.score)
 */
export class VectorDB<M = Metadata> {
  readonly #client: TypedClient<M>
  readonly #close: () => void | Promise<void>

  /** Throws where an option is out of its bound. Connects with the first call. */
  constructor(options: VectorDBOptions<M> | EngineOptions<M>) {
    const resolved = resolveOptions("engine" in options ? { ...options, endpoint: "http://embedded" } : options)
    const engine = "engine" in options ? options.engine : makeCellEngine(resolved)
    this.#client = clientOf(engine, { ...resolved, metadata: options.metadata })
    this.#close = engine.close
  }

  /** Inserts or replaces one vector; resolves when it is as durable as `ack` says. */
  insert(id: string, vector: Vector, options: InsertCall & Aborts & { readonly metadata?: M } = {}): Promise<void> {
    const { metadata } = options
    const item = { id, vector, ...(metadata === undefined ? {} : { metadata }) }
    return run(this.#client.insert(item, options), options.signal)
  }

  /**
   * Inserts or replaces many, in batches. Takes no more from `items` than is under way, so that a source of any length can
   * be given. Resolves with how many there were; where it rejects, those of batches before may have been inserted.
   */
  insertMany(
    items: Iterable<NewItem<M>> | AsyncIterable<NewItem<M>>,
    options: InsertManyCall & Aborts = {}
  ): Promise<number> {
    const source: Iterable<NewItem<M>> | Stream.Stream<NewItem<M>> =
      Symbol.asyncIterator in items ? Stream.orDie(Stream.fromAsyncIterable(items, (error) => error)) : items
    return run(this.#client.insertMany(source, options), options.signal)
  }

  /** Sets fields of the metadata (`null` removes one), or replaces the record where a vector is given. */
  update(id: string, change: Change<M>, options: InsertCall & Aborts = {}): Promise<void> {
    return run(this.#client.update(id, change, options), options.signal)
  }

  /** Resolves with how many there were. */
  delete(ids: string | ReadonlyArray<string>, options: WriteCall & Aborts = {}): Promise<number> {
    return run(this.#client.delete(ids, options), options.signal)
  }

  /** One by its id; `undefined` where there is none. */
  get(id: string, options: Call & Aborts = {}): Promise<Stored<M> | undefined> {
    return run(this.#client.get(id, options), options.signal)
  }

  /** The k nearest, to a vector or to a stored one (`{ id }`). */
  search(query: Query, options: SearchCall & Aborts = {}): Promise<Hits<M>> {
    return run(this.#client.search(query, options), options.signal)
  }

  /** The same, one by one as they arrive. Leaving the loop ends the search on the server too. */
  searchStream(query: Query, options: SearchCall & Aborts = {}): AsyncIterable<Hit<M>> {
    return iterate(this.#client.searchStream(query, options), options.signal)
  }

  /**
   * A standing query: first the k nearest enter, then whatever changes among them, until the loop is left. It goes on by
   * itself after cuts, without a gap or a repeat.
   *
   *     for await (const change of db.subscribe(vector, { k: 5, minScore: 0.8 })) {
   *       if (change.type === "leave") nearest.delete(change.id)
   *       else nearest.set(change.id, change)
   *     }
   */
  subscribe(query: Query, options: SubscribeCall & Aborts = {}): AsyncIterable<Standing<M>> {
    return iterate(this.#client.subscribe(query, options), options.signal)
  }

  /** Every change of a collection, each once, in order for each id; goes on by itself after cuts. */
  follow(options: FollowCall & Aborts = {}): AsyncIterable<CollectionChange> {
    return iterate(this.#client.follow(options), options.signal)
  }

  /** Makes collections, lists them, deletes them. */
  readonly collections = {
    /** Makes a collection; the same again does nothing. */
    create: (
      name: string,
      parameters: CollectionParameters,
      options: Pick<Call, "deadlineMillis"> & Aborts = {}
    ): Promise<CollectionInfo> => run(this.#client.collections.create(name, parameters, options), options.signal),
    /** What is known of one, and how many vectors are in it; `undefined` where there is none. */
    get: (name: string, options: Pick<Call, "deadlineMillis"> & Aborts = {}): Promise<CollectionInfo | undefined> =>
      run(this.#client.collections.get(name, options), options.signal),
    /** All of them. */
    list: (options: Pick<Call, "deadlineMillis"> & Aborts = {}): Promise<ReadonlyArray<CollectionInfo>> =>
      run(this.#client.collections.list(options), options.signal),
    /** Whether there was one. */
    delete: (name: string, options: Pick<Call, "deadlineMillis"> & Aborts = {}): Promise<boolean> =>
      run(this.#client.collections.delete(name, options), options.signal)
  }

  /** Makes topics, lists them, deletes them. */
  readonly topics = {
    /** Creates a topic, or finds the one that is there with the same parameters. */
    create: (topic: string, parameters: TopicParameters = {}, options: TopicCall & Aborts = {}): Promise<TopicInfo> =>
      run(this.#client.topics.create(topic, parameters, options), options.signal),
    /** A topic, and how many tasks of it are in which state; `undefined` where there is none. */
    get: (topic: string, options: TopicCall & Aborts = {}): Promise<TopicInfo | undefined> =>
      run(this.#client.topics.get(topic, options), options.signal),
    /** All of them. */
    list: (options: TopicCall & Aborts = {}): Promise<ReadonlyArray<TopicInfo>> =>
      run(this.#client.topics.list(options), options.signal),
    /** Whether there was one. */
    delete: (topic: string, options: TopicCall & Aborts = {}): Promise<boolean> =>
      run(this.#client.topics.delete(topic, options), options.signal)
  }

  /** Messages of a topic: `agent-coordination`, `task-distribution`, `vector-updates`, or one that was created. */
  channel<T = unknown>(topic: string): Channel<T> {
    return new Channel<T>(this.#client.topics, topic)
  }

  /** Tasks of a topic, for agents that compete for them. */
  tasks<T = unknown>(topic = "task-distribution"): Tasks<T> {
    return new Tasks<T>(this.#client.topics, topic)
  }

  /** Ends the connection, or the embedded engine after what it holds is safe. Calls under way reject with `closed`. */
  async close(): Promise<void> {
    await this.#close()
  }

  /** The same as `close`, for `await using`. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close()
  }
}
