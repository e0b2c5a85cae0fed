/**
 * The `Catalog` entity: the one writer of the object that lists the collections. Every change is a conditional replace
 * of that object, so that a second catalogue (another node on the same store) cannot overwrite what it has not read.
 *
 * A deletion is first recorded (`removing`), then the partitions are told to remove themselves, then it is forgotten: a
 * crash in between is made good when the catalogue is next opened.
 */
import { randomBytes } from "node:crypto"
import { Duration, Effect, Schedule, Semaphore } from "effect"
import { Settings } from "../config.ts"
import { Catalog } from "../protocol/Catalog.ts"
import { type Collection, type CollectionRequest, cacheStateAt } from "../protocol/Collection.ts"
import {
  CollectionConflict,
  CollectionNotFound,
  InvalidInput,
  Overloaded,
  StorageUnavailable
} from "../protocol/Errors.ts"
import { IndexPartition, partitionId, partitionsGroup } from "../protocol/IndexPartition.ts"
import { collectionsMax, invalidationsPendingMax } from "../protocol/Limits.ts"
import { Calls } from "../shards/Calls.ts"
import { CellDirectory } from "../shards/CellDirectory.ts"
import { Placement } from "../shards/Placement.ts"
import { type Catalogue, CatalogueText, catalogueFormat, catalogueKey, removedKept } from "../tiers/CatalogueObject.ts"
import { ObjectStore } from "../tiers/ObjectStore.ts"
import * as SharedObject from "../tiers/SharedObject.ts"

export const layer = Catalog.toLayer(
  Effect.gen(function* () {
    const settings = yield* Settings
    const store = yield* ObjectStore
    const partitions = yield* IndexPartition.client
    const placement = yield* Placement
    const directory = yield* CellDirectory
    const calls = yield* Calls
    const scope = yield* Effect.scope
    const gate = yield* Semaphore.make(1)
    const { read, write } = SharedObject.make<Catalogue>(store, {
      key: catalogueKey,
      codec: CatalogueText,
      empty: { format: catalogueFormat, collections: [], removing: [] },
      name: "The catalogue",
      onRead: ({ collections, removing }) =>
        Effect.gen(function* () {
          // Those that were here before there was a directory, or were restored.
          yield* Effect.forkIn(claimNames(collections.map(({ name }) => name)), scope)
          if (removing.length > 0) yield* Effect.forkIn(gate.withPermit(finishRemovals), scope)
        })
    })

    /** Not waited for: what is here is served without the directory. */
    const claimNames = (names: ReadonlyArray<string>) =>
      directory.claimAll(names).pipe(
        Effect.retry(Schedule.spaced(claimPauseMillis)),
        Effect.flatMap((lost) =>
          lost.length === 0
            ? Effect.void
            : Effect.logWarning("Collections of this cell are another's by the directory of cells", lost.slice(0, 10))
        )
      )

    const finishRemovals: Effect.Effect<void, StorageUnavailable> = Effect.gen(function* () {
      const { value: catalogue } = yield* read
      for (const collection of catalogue.removing) {
        yield* Effect.forEach(
          Array.from({ length: collection.partitions }, (_, partition) => partition),
          (partition) => {
            const id = partitionId({ collection: collection.name, uid: collection.uid, partition })
            return calls.to({ group: partitionsGroup, id }, partitions(id).Remove({ collection }), notRemoved)
          },
          { concurrency: 4, discard: true }
        ).pipe(Effect.mapError(notRemoved))
        const now = yield* read
        const removing = now.value.removing.filter((one) => one.uid !== collection.uid)
        yield* write({ ...now.value, removing }, now.etag)
      }
    })

    const create = Effect.fn("Catalog.create")(function* (name: string, request: CollectionRequest) {
      const { value: catalogue, etag } = yield* read
      const there = catalogue.collections.find((collection) => collection.name === name)
      if (there !== undefined) {
        const conflict = conflictOf(there, request)
        if (conflict !== undefined) return yield* conflict
        return { collection: there, created: false }
      }
      const elsewhere = yield* directory.claim(name)
      if (elsewhere !== undefined) return yield* new CollectionNotFound({ collection: name, elsewhere })
      if (catalogue.collections.length >= collectionsMax) {
        return yield* new Overloaded({ bound: "collectionsMax", retryAfterMillis: 60_000 })
      }
      const index = {
        m: request.index?.m ?? settings.defaultM,
        ef_construction: request.index?.ef_construction ?? settings.defaultEfConstruction,
        ef_search: request.index?.ef_search ?? settings.defaultEfSearch,
        ...(request.index?.quantization === undefined ? {} : { quantization: request.index.quantization })
      }
      if (index.ef_construction < index.m) {
        return yield* new InvalidInput({
          field: "index.ef_construction",
          expected: `at least m (${index.m})`,
          got: String(index.ef_construction)
        })
      }
      const collection: Collection = {
        name,
        uid: uidOf(name, request.partitions ?? settings.defaultPartitions),
        dimensions: request.dimensions,
        metric: request.metric ?? "cosine",
        partitions: request.partitions ?? settings.defaultPartitions,
        index,
        created_ms: Date.now()
      }
      yield* write({ ...catalogue, collections: [...catalogue.collections, collection] }, etag)
      return { collection, created: true }
    })

    /** The shards of its partitions follow from it, so it is chosen such that they are spread over the runners. */
    const uidOf = (name: string, count: number): string =>
      placement.mostEven(partitionsGroup, mintUids(Math.max(uidsMin, Math.floor(partitionsLookedAt / count))), (uid) =>
        Array.from({ length: count }, (_, partition) => partitionId({ collection: name, uid, partition }))
      )

    const find = (name: string) =>
      Effect.flatMap(
        read,
        ({ value: catalogue }): Effect.Effect<Collection, CollectionNotFound | StorageUnavailable> => {
          const collection = catalogue.collections.find((candidate) => candidate.name === name)
          if (collection !== undefined) return Effect.succeed(collection)
          return Effect.flatMap(directory.find(name), (elsewhere) =>
            Effect.fail(
              new CollectionNotFound(elsewhere === undefined ? { collection: name } : { collection: name, elsewhere })
            )
          )
        }
      )

    const invalidate = Effect.fn("Catalog.invalidate")(function* (name: string, noticeMillis: number) {
      const there = yield* find(name)
      const { value: catalogue, etag } = yield* read
      const now = Date.now()
      const { generation, pending_ms } = cacheStateAt(there, now)
      if (noticeMillis > 0 && pending_ms.length >= invalidationsPendingMax) {
        const retryAfterMillis = Math.min(...pending_ms) - now
        return yield* new Overloaded({ bound: "invalidationsPendingMax", retryAfterMillis })
      }
      const collection: Collection = {
        ...there,
        cache:
          noticeMillis === 0
            ? { generation: generation + 1, pending_ms }
            : { generation, pending_ms: [...pending_ms, now + noticeMillis] }
      }
      const collections = catalogue.collections.map((one) => (one.uid === collection.uid ? collection : one))
      yield* write({ ...catalogue, collections }, etag)
      return { collection, effective_ms: now + noticeMillis }
    })

    const remove = Effect.fn("Catalog.remove")(function* (name: string) {
      const collection = yield* find(name)
      const { value: catalogue, etag } = yield* read
      yield* write(
        {
          ...catalogue,
          collections: catalogue.collections.filter((one) => one.name !== name),
          removing: [...catalogue.removing, collection],
          removed: [...(catalogue.removed ?? []), { name, uid: collection.uid, removed_ms: Date.now() }].slice(
            -removedKept
          )
        },
        etag
      )
      yield* directory.release(name)
      yield* finishRemovals
    })

    // Writes go one after another; reads do not wait for a long removal.
    return Catalog.of({
      Create: ({ payload }) => gate.withPermit(create(payload.name, payload.request)),
      Read: ({ payload }) => find(payload.name),
      List: () => Effect.map(read, ({ value: catalogue }) => catalogue.collections),
      ListChanged: ({ payload }) =>
        Effect.map(read, ({ value: catalogue, etag: state = "none" }) =>
          payload.state === state ? null : { state, collections: catalogue.collections }
        ),
      Invalidate: ({ payload }) => gate.withPermit(invalidate(payload.name, payload.notice_ms)),
      Delete: ({ payload }) => gate.withPermit(remove(payload.name))
    })
  }),
  { concurrency: "unbounded", disableFatalDefects: true, maxIdleTime: Duration.infinity }
)

const notRemoved = () =>
  new StorageUnavailable({ detail: "A partition could not be removed; it will be.", retryAfterMillis: 1_000 })

/** Between two tries to tell the directory of cells what is here. */
const claimPauseMillis = 5_000

/** Partitions of uids that are looked at to choose one, all together; and uids at the least. */
const partitionsLookedAt = 2_000
const uidsMin = 16

function* mintUids(count: number) {
  for (let n = 0; n < count; n++) yield randomBytes(8).toString("hex")
}

/** What of a request contradicts the collection that is there; what it leaves out contradicts nothing. */
const conflictOf = (there: Collection, request: CollectionRequest): CollectionConflict | undefined => {
  const asked: ReadonlyArray<readonly [string, number | string, number | string | undefined]> = [
    ["dimensions", there.dimensions, request.dimensions],
    ["metric", there.metric, request.metric],
    ["partitions", there.partitions, request.partitions],
    ["index.m", there.index.m, request.index?.m],
    ["index.ef_construction", there.index.ef_construction, request.index?.ef_construction],
    ["index.ef_search", there.index.ef_search, request.index?.ef_search],
    ["index.quantization", there.index.quantization ?? "none", request.index?.quantization]
  ]
  for (const [field, expected, got] of asked) {
    if (got !== undefined && got !== expected) {
      return new CollectionConflict({ collection: there.name, field, expected: String(expected), got: String(got) })
    }
  }
  return undefined
}
