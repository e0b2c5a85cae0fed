/**
 * The engine of a service whose region has several cells: a collection that lives in another cell than the one asked is asked
 * for there from then on. The credential goes along, as the service says where that is.
 */
import { Effect, Stream } from "effect"
import type { VectorDBError } from "./ClientError.ts"
import type { ResolvedOptions } from "./ClientOptions.ts"
import type { Engine } from "./Engine.ts"
import { makeRemoteEngine, type RemoteEngine } from "./RemoteEngine.ts"

export const makeCellEngine = (options: ResolvedOptions): RemoteEngine => {
  const home = makeRemoteEngine(options)
  /** By address. */
  const others = new Map<string, RemoteEngine>()
  /** By collection. */
  const places = new Map<string, RemoteEngine>()

  const move = (collection: string, location: string): void => {
    if (places.size >= placesMax) places.clear()
    let there = others.get(location)
    if (there === undefined) {
      there = makeRemoteEngine({ ...options, endpoints: [location], auto: false })
      others.set(location, there)
    }
    places.set(collection, there)
  }

  /** Where to ask instead; `undefined` where the error says nothing of it, or of one cell too many. */
  const elsewhere = (error: VectorDBError): string | undefined =>
    error.code !== "collection_elsewhere" || (others.size >= cellsMax && !others.has(error.location ?? ""))
      ? undefined
      : error.location

  const ask = <A>(
    collection: string,
    call: (engine: Engine) => Effect.Effect<A, VectorDBError>,
    hops = hopsMax
  ): Effect.Effect<A, VectorDBError> =>
    Effect.catch(call(places.get(collection) ?? home), (error) => {
      const location = elsewhere(error)
      if (location === undefined || hops === 0) return Effect.fail(error)
      move(collection, location)
      return ask(collection, call, hops - 1)
    })

  const stream = <A>(
    collection: string,
    call: (engine: Engine) => Stream.Stream<A, VectorDBError>,
    hops = hopsMax
  ): Stream.Stream<A, VectorDBError> =>
    Stream.catch(
      Stream.suspend(() => call(places.get(collection) ?? home)),
      (error) => {
        const location = elsewhere(error)
        if (location === undefined || hops === 0) return Stream.fail(error)
        move(collection, location)
        return stream(collection, call, hops - 1)
      }
    )

  return {
    insert: (items, given) => ask(given.collection, (engine) => engine.insert(items, given)),
    patch: (id, metadata, given) => ask(given.collection, (engine) => engine.patch(id, metadata, given)),
    remove: (ids, given) => ask(given.collection, (engine) => engine.remove(ids, given)),
    get: (id, given) => ask(given.collection, (engine) => engine.get(id, given)),
    search: (query, given) => ask(given.collection, (engine) => engine.search(query, given)),
    searchStream: (query, given) => stream(given.collection, (engine) => engine.searchStream(query, given)),
    subscribe: (query, given) => stream(given.collection, (engine) => engine.subscribe(query, given)),
    follow: (given) => stream(given.collection, (engine) => engine.follow(given)),
    createCollection: (name, parameters, millis) =>
      ask(name, (engine) => engine.createCollection(name, parameters, millis)),
    collection: (name, millis) => ask(name, (engine) => engine.collection(name, millis)),
    collections: home.collections,
    deleteCollection: (name, millis) => ask(name, (engine) => engine.deleteCollection(name, millis)),
    // Topics are of the cell that is asked.
    topic: home.topic,
    listen: home.listen,
    close: () => {
      home.close()
      for (const other of others.values()) other.close()
    }
  }
}

/** Cells that say of each other that the other has it. */
const hopsMax = 3
const cellsMax = 64
/** Collections of other cells that are remembered. */
const placesMax = 10_000
