/**
 * From a collection's name to answers of its partitions: finds the collection, sends every record to the partition that
 * holds its id, asks all partitions at once for a search and merges their sorted lists.
 *
 * A partition resident in this process is asked directly; any other through its entity. A search waits no longer than its
 * deadline: partitions that are late or gone are named in the answer, and only if none answered does it fail.
 */
import { Cause, Context, Effect, Exit, type Fiber, Layer, Option, Result } from "effect"
import { Settings } from "../config.ts"
import * as Catalog from "../protocol/Catalog.ts"
import {
  type Collection,
  type CollectionRequest,
  cacheStateAt,
  type InvalidateRequest,
  type Invalidation,
  invalidationsOf
} from "../protocol/Collection.ts"
import {
  type ApiError,
  type CollectionConflict,
  CollectionNotFound,
  DeadlineExceeded,
  InvalidInput,
  Overloaded,
  PartitionUnavailable,
  StorageUnavailable,
  VectorNotFound
} from "../protocol/Errors.ts"
import type { Ack } from "../protocol/Fields.ts"
import {
  IndexPartition,
  type PartitionError,
  type PartitionHits,
  type PartitionQuery,
  type PartitionRecord,
  type PartitionStats,
  partitionId,
  partitionsGroup,
  type UpsertRecord
} from "../protocol/IndexPartition.ts"
import { answerComponentsMax } from "../protocol/Limits.ts"
import type { SearchAnswer, SessionQuery } from "../protocol/StreamSession.ts"
import { shownName } from "../protocol/Tenant.ts"
import { AccessLog } from "../tiers/AccessLog.ts"
import { RecordCache } from "../tiers/RecordCache.ts"
import { WarmStore } from "../tiers/WarmStore.ts"
import { Admission } from "./Admission.ts"
import { CacheEvents } from "./CacheEvents.ts"
import { generationTag, searchTag, vectorTag } from "./CacheTags.ts"
import { Calls } from "./Calls.ts"
import type { Kind } from "./ConcurrencyLimit.ts"
import { type DeliveryError, isDelivery } from "./Delivery.ts"
import { hedged } from "./hedged.ts"
import { Lateness } from "./Lateness.ts"
import { LocalActors } from "./LocalActors.ts"
import { groupByPartition, partitionOf } from "./PartitionMap.ts"
import { Peers } from "./Peers.ts"
import { Placement } from "./Placement.ts"
import { giveRequestId } from "./RequestIds.ts"
import { type KeptResult, ResultCache, type ResultKey, resultKey, sameQuery } from "./ResultCache.ts"
import { decodeResult, encodeResult, ResultStore, storeKey } from "./ResultStore.ts"

/** An answer to a search that a URL names. */
export interface UrlAnswer {
  readonly answer: SearchAnswer
  readonly collection: Collection
  /** The collection's revision that the answer is of, where there is one. */
  readonly revision: string | undefined
  readonly cached: boolean
}

/**
 * The three nearest results of a search count as read, a quarter each. Each search touches one of them, in turn, with
 * the weight of all: about a microsecond a search, where touching all took up to six.
 */
const touchedResults = 3
const touchedResultWeight = 0.25 * touchedResults

export class Router extends Context.Service<
  Router,
  {
    readonly createCollection: (
      name: string,
      request: CollectionRequest
    ) => Effect.Effect<
      { readonly collection: Collection; readonly created: boolean },
      CollectionConflict | CollectionNotFound | StorageUnavailable | Overloaded | InvalidInput
    >
    readonly collection: (name: string) => Effect.Effect<Collection, CollectionNotFound | StorageUnavailable>
    /** The same, past what is remembered of it. */
    readonly refresh: (name: string) => Effect.Effect<Collection, CollectionNotFound | StorageUnavailable>
    readonly collections: Effect.Effect<ReadonlyArray<Collection>, StorageUnavailable>
    readonly deleteCollection: (name: string) => Effect.Effect<void, CollectionNotFound | StorageUnavailable>
    /** Visible vectors over all partitions. */
    readonly count: (collection: Collection) => Effect.Effect<number, ApiError>
    readonly stats: (collection: Collection) => Effect.Effect<ReadonlyArray<PartitionStats>, ApiError>
    /** Makes all partitions of a collection resident. */
    readonly activate: (collection: Collection) => Effect.Effect<void, ApiError>
    /** Writes records, all or nothing a partition. The default collection comes into being with its first insert. */
    readonly upsert: (
      name: string,
      records: ReadonlyArray<UpsertRecord>,
      ack?: Ack,
      requestId?: string
    ) => Effect.Effect<number, ApiError>
    readonly get: (name: string, id: string) => Effect.Effect<PartitionRecord, ApiError>
    /** `patch` is JSON text of an object. */
    readonly updateMetadata: (
      name: string,
      id: string,
      patch: string,
      requestId?: string
    ) => Effect.Effect<{ readonly metadata: string; readonly version: string }, ApiError>
    readonly remove: (name: string, ids: ReadonlyArray<string>, requestId?: string) => Effect.Effect<number, ApiError>
    /** Ends the quarantine of a partition; answers whether it was in one. */
    readonly release: (name: string, partition: number) => Effect.Effect<boolean, ApiError>
    readonly search: (query: SessionQuery) => Effect.Effect<SearchAnswer, ApiError>
    /** The same for a query that a URL names: kept from its first time on, and with what its cache headers need. */
    readonly searchByUrl: (query: SessionQuery) => Effect.Effect<UrlAnswer, ApiError>
    /**
     * Equal twice: nothing visible in the collection has changed in between. `undefined` where it is not known: a partition
     * is not resident in this process, or a write is being applied.
     */
    readonly revision: (collection: Collection) => string | undefined
    /** Tells caches of the collection's answers to forget: all of them, after a notice, or those about some ids. */
    readonly invalidate: (
      name: string,
      request: InvalidateRequest
    ) => Effect.Effect<Invalidation, CollectionNotFound | StorageUnavailable | Overloaded>
  }
>()("ruvector/shards/Router") {
  /** `createOnInsert` names the collection that the first insert creates, each tenant's own. */
  static readonly layer = (options: { readonly createOnInsert: string }) =>
    Layer.effect(
      Router,
      Effect.gen(function* () {
        const settings = yield* Settings
        const local = yield* LocalActors
        const access = yield* AccessLog
        const admission = yield* Admission
        const cache = yield* RecordCache
        const warm = yield* WarmStore
        const scope = yield* Effect.scope
        const placement = yield* Placement
        const peers = yield* Peers
        const calls = yield* Calls
        const results = yield* ResultCache
        const resultStore = Option.getOrUndefined(yield* Effect.serviceOption(ResultStore))
        const events = yield* CacheEvents
        const runFork = Effect.runForkWith(yield* Effect.context<never>())
        const catalog = (yield* Catalog.Catalog.client)(Catalog.catalogId)
        const partitionClient = yield* IndexPartition.client
        /** In a cluster a call whose runner dies is delivered again, to the next one. */
        const isDeliveredAgain = settings.databaseUrl !== ""
        /** Collections seen; an entry whose uid is out of date is dropped when a partition says so. */
        const known = new Map<string, Collection>()

        const undelivered = (_: DeliveryError) =>
          new StorageUnavailable({ detail: "The catalogue cannot be reached now.", retryAfterMillis: 1_000 })

        const toCatalog = <A, E extends { readonly _tag: string }>(
          call: Effect.Effect<A, E>
        ): Effect.Effect<A, Exclude<E, DeliveryError> | StorageUnavailable> =>
          Effect.mapError(calls.to({ group: "default", id: Catalog.catalogId }, call, catalogLate), (error) =>
            isDelivery(error) ? undelivered(error) : (error as Exclude<E, DeliveryError> | StorageUnavailable)
          )

        const collection = (name: string): Effect.Effect<Collection, CollectionNotFound | StorageUnavailable> => {
          const found = known.get(name)
          if (found !== undefined) return Effect.succeed(found)
          return toCatalog(catalog.Read({ name })).pipe(Effect.tap((read) => Effect.sync(() => remember(read))))
        }

        const remember = (read: Collection) => {
          // Bounded by the catalogue's own bound on collections; entries of deleted ones are dropped when found out.
          known.set(read.name, read)
        }

        const forget = (uid: string) => {
          results.dropCollection(uid)
          access.dropCollection(uid)
          cache.dropCollection(uid)
        }

        /** What other nodes have deleted, made anew or invalidated. */
        const learn = (collections: ReadonlyArray<Collection>) => {
          const now = new Map(collections.map((one) => [one.name, one]))
          for (const [name, before] of known) {
            const after = now.get(name)
            if (after?.uid !== before.uid) {
              known.delete(name)
              forget(before.uid)
            } else if (invalidationsOf(after) > invalidationsOf(before)) {
              known.set(name, after)
              results.dropCollection(after.uid)
            }
          }
        }

        if (settings.databaseUrl !== "") {
          let state = ""
          yield* Effect.suspend(() => catalog.ListChanged({ state })).pipe(
            Effect.timeout(settings.clusterCallMillis),
            Effect.tap((changed) =>
              Effect.sync(() => {
                if (changed === null) return
                state = changed.state
                learn(changed.collections)
              })
            ),
            Effect.catchCause((cause) => Effect.logDebug("The catalogue could not be looked at", cause)),
            Effect.andThen(Effect.sleep(settings.catalogueRefreshMillis)),
            Effect.forever,
            Effect.forkScoped
          )
        }

        const createCollection = Effect.fn("Router.createCollection")(function* (
          name: string,
          request: CollectionRequest
        ) {
          const result = yield* toCatalog(catalog.Create({ name, request }))
          remember(result.collection)
          return result
        })

        const deleteCollection = Effect.fn("Router.deleteCollection")(function* (name: string) {
          known.delete(name)
          const before = yield* Effect.option(toCatalog(catalog.Read({ name })))
          yield* toCatalog(catalog.Delete({ name }))
          known.delete(name)
          if (Option.isSome(before)) {
            forget(before.value.uid)
            yield* warm.drop(before.value.uid)
          }
        })

        const delivered = <A, E extends { readonly _tag: string }>(
          of: Collection,
          partition: number,
          call: Effect.Effect<A, E>,
          deadlineMillis?: number
        ): Effect.Effect<A, Exclude<E, DeliveryError> | PartitionUnavailable | Overloaded> => {
          const unavailable = (detail: string) =>
            new PartitionUnavailable({ collection: of.name, partition, detail, retryAfterMillis: 1_000 })
          const late = () => unavailable("It has not answered in time.")
          const actor = { group: partitionsGroup, id: idOf(of, partition) }
          return Effect.mapError(calls.to(actor, call, late, deadlineMillis), (error) => {
            if (!isDelivery(error)) return error as Exclude<E, DeliveryError> | PartitionUnavailable
            if (error._tag === "MailboxFull") return new Overloaded({ bound: "mailbox", retryAfterMillis: 250 })
            return unavailable("It cannot be reached now.")
          })
        }

        /** Made once: as keys of maps, texts that are made anew have to be hashed anew. */
        const entityIds = new WeakMap<Collection, ReadonlyArray<string>>()
        const idOf = (of: Collection, partition: number): string => {
          let ids = entityIds.get(of)
          if (ids === undefined) {
            ids = Array.from({ length: of.partitions }, (_, n) =>
              partitionId({ collection: of.name, uid: of.uid, partition: n })
            )
            entityIds.set(of, ids)
          }
          return ids[partition] as string
        }

        /** Runs with the collection, and once more with a fresh reading of it where the one at hand was out of date. */
        const withCollection = <A, E>(
          name: string,
          use: (of: Collection) => Effect.Effect<A, E | CollectionNotFound>
        ): Effect.Effect<A, E | CollectionNotFound | StorageUnavailable> => {
          const found = known.get(name)
          if (found === undefined) return Effect.flatMap(collection(name), use)
          return Effect.catchIf(
            use(found),
            (error): error is CollectionNotFound & (E | CollectionNotFound | StorageUnavailable) =>
              error instanceof CollectionNotFound,
            () =>
              Effect.suspend(() => {
                known.delete(name)
                return Effect.flatMap(collection(name), use)
              })
          )
        }

        const eachPartition = <A, E>(of: Collection, call: (partition: number) => Effect.Effect<A, E>) =>
          Effect.forEach(
            Array.from({ length: of.partitions }, (_, partition) => partition),
            call,
            { concurrency: "unbounded" }
          )

        const stats = (of: Collection) =>
          eachPartition(of, (partition) => delivered(of, partition, partitionClient(idOf(of, partition)).Stats()))

        const activate = (of: Collection) =>
          Effect.asVoid(
            eachPartition(of, (partition) =>
              delivered(
                of,
                partition,
                partitionClient(idOf(of, partition)).Activate(),
                settings.activationDeadlineMillis
              )
            )
          )

        const release = (name: string, partition: number): Effect.Effect<boolean, ApiError> =>
          withCollection(name, (of): Effect.Effect<boolean, ApiError> => {
            if (partition < 0 || partition >= of.partitions) {
              const expected = `0 to ${of.partitions - 1}`
              return Effect.fail(new InvalidInput({ field: "partition", expected, got: String(partition) }))
            }
            return delivered(of, partition, partitionClient(idOf(of, partition)).Release())
          })

        const checkVector = (of: Collection, vector: Float32Array, field: string): InvalidInput | undefined => {
          if (vector.length !== of.dimensions) {
            return new InvalidInput({
              field,
              expected: `${of.dimensions} numbers, the dimensions of collection ${shownName(of.name)}`,
              got: `${vector.length}`
            })
          }
          if (of.metric === "cosine" && isZero(vector)) {
            return new InvalidInput({ field, expected: "a vector that is not zero (metric cosine)", got: "all zeros" })
          }
          return undefined
        }

        /** Under which a mutation is done once, also where its delivery is tried again; each partition by itself. */
        const requested = (id: string | undefined): { readonly requestId?: string } =>
          id !== undefined ? { requestId: id } : isDeliveredAgain ? { requestId: giveRequestId() } : {}

        const upsert = Effect.fnUntraced(function* (
          name: string,
          records: ReadonlyArray<UpsertRecord>,
          ack?: Ack,
          requestId?: string
        ) {
          const request = requested(requestId)
          const first = records[0]
          if (first === undefined) return 0
          if (shownName(name) === options.createOnInsert && !known.has(name)) {
            yield* Effect.catchTag(collection(name), "CollectionNotFound", () =>
              createCollection(name, { dimensions: first.vector.length }).pipe(
                // Two first inserts at once: the other's collection is as good, or the check below says what differs.
                Effect.catchTag("CollectionConflict", () => collection(name))
              )
            )
          }
          return yield* withCollection(name, (of): Effect.Effect<number, ApiError> => {
            for (let i = 0; i < records.length; i++) {
              const fault = checkVector(of, (records[i] as UpsertRecord).vector, `vectors[${i}].vector`)
              if (fault !== undefined) return Effect.fail(fault)
            }
            const groups = groupByPartition(records, (record) => record.id, of.partitions)
            return Effect.map(
              Effect.forEach(
                groups,
                ([partition, group]) =>
                  delivered(
                    of,
                    partition,
                    partitionClient(idOf(of, partition)).Upsert({
                      records: group,
                      ...(ack === undefined ? {} : { ack }),
                      ...request
                    })
                  ),
                { concurrency: "unbounded" }
              ),
              (results) => results.reduce((sum, result) => sum + result.inserted, 0)
            )
          })
        })

        /**
         * A record by id, from the nearest place that has it: the cache of this process, the partition where it is resident
         * here, the warm tier, the partition wherever it is. What was found further off is kept nearer, for partitions that are
         * this process's: those that are resident once it has been read.
         */
        const getFrom = (
          of: Collection,
          id: string
        ): Effect.Effect<PartitionRecord | null, PartitionError | CollectionNotFound> => {
          const partition = partitionOf(id, of.partitions)
          const entityId = idOf(of, partition)
          const cached = cache.get(entityId, id)
          if (cached !== undefined) {
            access.touchRecord(entityId, id)
            return Effect.succeed(cached)
          }
          // A partition's heat is of what it was asked itself.
          access.touchPartition(entityId)
          const tickets = { cache: cache.ticket(), warm: warm.ticket() }
          const resident = local.partitions.get(entityId)
          if (resident !== undefined) return Effect.tap(firstOf(resident.get([id])), keep(entityId, tickets))
          return Effect.flatMap(firstOf(warm.getRecords(entityId, [id])), (record) => {
            if (record !== null) {
              access.touchRecord(entityId, id)
              cache.put(entityId, record, tickets.cache)
              return Effect.succeed(record)
            }
            const later = { cache: cache.ticket(), warm: warm.ticket() }
            return Effect.tap(
              firstOf(delivered(of, partition, partitionClient(entityId).Get({ ids: [id] }))),
              keep(entityId, later)
            )
          })
        }

        const keep =
          (entityId: string, tickets: { readonly cache: number; readonly warm: number }) =>
          (record: PartitionRecord | null): Effect.Effect<unknown> => {
            if (record === null) return Effect.void
            access.touchRecord(entityId, record.id)
            if (!local.partitions.has(entityId)) return Effect.void
            cache.put(entityId, record, tickets.cache)
            // Nobody waits for it; how much is on its way at once is the warm tier's to bound.
            return Effect.forkIn(warm.putRecords(entityId, [record], tickets.warm), scope)
          }

        const get = (name: string, id: string) =>
          withCollection(name, (of) =>
            Effect.flatMap(getFrom(of, id), (record) =>
              record === null ? Effect.fail(new VectorNotFound({ collection: name, id })) : Effect.succeed(record)
            )
          )

        const updateMetadata = (name: string, id: string, patch: string, requestId?: string) =>
          Effect.suspend(() => {
            const request = requested(requestId)
            return withCollection(name, (of) => {
              const partition = partitionOf(id, of.partitions)
              const client = partitionClient(idOf(of, partition))
              return delivered(of, partition, client.UpdateMetadata({ id, patch, ...request }))
            })
          })

        const remove = (name: string, ids: ReadonlyArray<string>, requestId?: string) =>
          Effect.suspend(() => {
            const request = requested(requestId)
            return withCollection(name, (of) =>
              Effect.map(
                Effect.forEach(
                  groupByPartition(ids, (id) => id, of.partitions),
                  ([partition, group]) =>
                    delivered(of, partition, partitionClient(idOf(of, partition)).Delete({ ids: group, ...request })),
                  { concurrency: "unbounded" }
                ),
                (results) => results.reduce((sum, result) => sum + result.deleted, 0)
              )
            )
          })

        const ask = (
          of: Collection,
          partition: number,
          query: PartitionQuery,
          deadlineMillis: number
        ): Effect.Effect<PartitionHits, PartitionError | DeadlineExceeded> => {
          const entityId = idOf(of, partition)
          access.touchPartition(entityId)
          const resident = local.partitions.get(entityId)
          if (resident !== undefined) return within(resident.search(query), deadlineMillis)
          const byMessage = Effect.suspend(() => delivered(of, partition, partitionClient(entityId).Search(query)))
          const owner = placement.ownerOf(partitionsGroup, entityId)
          if (owner === undefined) return within(byMessage, deadlineMillis)
          return hedged(
            latenessOf(of, partition),
            deadlineMillis,
            (context, done) => peers.search(context, owner, entityId, query, done),
            byMessage
          )
        }

        /** What is late of each partition's searches elsewhere. */
        const lateness = new WeakMap<Collection, Array<Lateness>>()
        const latenessOf = (of: Collection, partition: number): Lateness => {
          let all = lateness.get(of)
          if (all === undefined) {
            all = Array.from({ length: of.partitions }, () => new Lateness())
            lateness.set(of, all)
          }
          return all[partition] as Lateness
        }

        const partitionQueryOf = (of: Collection, query: SessionQuery, vector: Float32Array): PartitionQuery => ({
          vector,
          k: query.k,
          ef: query.ef === 0 ? of.index.ef_search : query.ef,
          filter: query.filter,
          includeMetadata: query.includeMetadata,
          includeVector: query.includeVector
        })

        const scatter = Effect.fnUntraced(function* (
          of: Collection,
          query: SessionQuery,
          vector: Float32Array,
          deadlineMillis: number
        ) {
          const partitionQuery = partitionQueryOf(of, query, vector)
          const exits = yield* eachPartition(of, (partition) =>
            Effect.exit(ask(of, partition, partitionQuery, deadlineMillis))
          )
          const lists: Array<PartitionHits> = []
          const missing: Array<number> = []
          let failure: PartitionError | undefined
          for (let partition = 0; partition < exits.length; partition++) {
            const exit = exits[partition] as Exit.Exit<PartitionHits, PartitionError | DeadlineExceeded>
            if (Exit.isSuccess(exit)) {
              lists.push(exit.value)
              continue
            }
            const error = Exit.findErrorOption(exit)
            if (Option.isNone(error)) {
              if (!Cause.hasInterruptsOnly(exit.cause)) return yield* Effect.failCause(exit.cause)
              // The process that was asked has stopped.
              missing.push(partition)
              continue
            }
            // What is wrong with the request is wrong everywhere; what is wrong with one partition is that one's.
            if (error.value._tag === "InvalidInput" || error.value._tag === "CollectionNotFound")
              return yield* error.value
            if (error.value._tag !== "DeadlineExceeded") failure ??= error.value
            missing.push(partition)
          }
          if (lists.length === 0) return yield* failure ?? new DeadlineExceeded({ deadlineMillis })
          return { hits: mergeHits(lists, query.k, of.dimensions), missing }
        })

        const revision = (of: Collection): string | undefined => {
          if (of.partitions === 1) return local.partitions.get(idOf(of, 0))?.revision()
          let joined = ""
          for (let partition = 0; partition < of.partitions; partition++) {
            const one = local.partitions.get(idOf(of, partition))?.revision()
            if (one === undefined) return undefined
            joined += `${one},`
          }
          return joined
        }

        const checkQuery = (of: Collection, query: SessionQuery): InvalidInput | undefined => {
          if (query.metric !== undefined && query.metric !== of.metric) {
            return new InvalidInput({
              field: "metric",
              expected: `${of.metric}, the metric of the collection`,
              got: query.metric
            })
          }
          if (query.includeVector && query.k * of.dimensions > answerComponentsMax) {
            return new InvalidInput({
              field: "k",
              expected: `at most ${Math.trunc(answerComponentsMax / of.dimensions)} where vectors are included`,
              got: String(query.k)
            })
          }
          return query.vector === undefined ? undefined : checkVector(of, query.vector, "query")
        }

        const deadlineOf = (query: SessionQuery): number =>
          query.deadlineMillis === 0 ? settings.searchDeadlineMillis : query.deadlineMillis

        /** What searches take alone, of each kind: by collection, and there by how much of it they look at. */
        const kinds = new WeakMap<Collection, Array<Kind>>()
        const kindOf = (of: Collection, query: SessionQuery): Kind => {
          let known = kinds.get(of)
          if (known === undefined) {
            known = []
            kinds.set(of, known)
          }
          const candidates = Math.max(query.k, query.ef === 0 ? of.index.ef_search : query.ef)
          const at =
            (32 - Math.clz32(candidates)) * 4 + (query.filter === "" ? 0 : 2) + (query.vector === undefined ? 1 : 0)
          known[at] ??= { aloneMillis: 0 }
          return known[at]
        }

        /** Of the deadline, what is left. */
        const leftOf = (query: SessionQuery, started: number): number =>
          Math.floor(deadlineOf(query) - (performance.now() - started))

        /** Asks the partitions, when its turn comes. */
        const compute = (of: Collection, query: SessionQuery, started: number) =>
          admission.run(
            {
              kind: kindOf(of, query),
              tier: query.tier ?? "standard",
              source: query.source,
              deadlineMillis: leftOf(query, started)
            },
            askAll(of, query, started)
          )

        const askAll = (
          of: Collection,
          query: SessionQuery,
          started: number
        ): Effect.Effect<SearchAnswer, ApiError> => {
          const { vector } = query
          if (vector !== undefined) return Effect.suspend(() => gather(of, query, vector, started))
          const id = query.vectorId as string
          return Effect.flatMap(
            getFrom(of, id),
            (record): Effect.Effect<SearchAnswer, ApiError> =>
              record === null
                ? Effect.fail(new VectorNotFound({ collection: of.name, id }))
                : gather(of, query, record.vector, started)
          )
        }

        /** No generator where one partition is asked: that is most searches there are. */
        const gather = (
          of: Collection,
          query: SessionQuery,
          vector: Float32Array,
          started: number
        ): Effect.Effect<SearchAnswer, ApiError> => {
          const deadlineMillis = Math.max(1, leftOf(query, started))
          const answered = (hits: PartitionHits, missing: ReadonlyArray<number>): SearchAnswer => ({
            queryId: query.queryId,
            ...hits,
            dimensions: of.dimensions,
            missing,
            tookMillis: performance.now() - started
          })
          return of.partitions === 1
            ? Effect.map(ask(of, 0, partitionQueryOf(of, query, vector), deadlineMillis), (hits) => answered(hits, []))
            : Effect.map(scatter(of, query, vector, deadlineMillis), ({ hits, missing }) => answered(hits, missing))
        }

        const answerOf = (result: KeptResult, query: SessionQuery, started: number): SearchAnswer => ({
          ...result,
          queryId: query.queryId,
          missing: [],
          tookMillis: performance.now() - started
        })

        /** Searches under way that others may wait for, by their keys' hash. */
        const flights = new Map<number, Flight>()

        /**
         * One search for all who ask the same at the same revision at once. It ends when the last of them has gone. Its
         * answer is kept if it is whole and the revision is still the one that it began at.
         */
        const takeOff = (key: ResultKey, of: Collection, query: SessionQuery, started: number): Flight => {
          const flight: Flight = { key, waiting: 0, fiber: runFork(fromStore(key, of, query, started)) }
          flights.set(key.hash, flight)
          flight.fiber.addObserver((exit) => {
            if (flights.get(key.hash) === flight) flights.delete(key.hash)
            if (Exit.isSuccess(exit) && exit.value.missing.length === 0 && revision(of) === key.revision) {
              results.put(key, exit.value)
            }
          })
          return flight
        }

        const fromStore = (key: ResultKey, of: Collection, query: SessionQuery, started: number) => {
          if (resultStore === undefined || query.vector !== undefined) return compute(of, query, started)
          const at = storeKey(key)
          return Effect.gen(function* () {
            const bytes = yield* resultStore.get(at)
            const found = bytes === undefined ? undefined : decodeResult(bytes)
            if (found !== undefined && found.dimensions === of.dimensions) return answerOf(found, query, started)
            const answer = yield* compute(of, query, started)
            if (answer.missing.length === 0 && revision(of) === key.revision) {
              runFork(resultStore.put(at, encodeResult(answer), settings.resultStoreSeconds * 1_000))
            }
            return answer
          })
        }

        const land = (flight: Flight): Effect.Effect<SearchAnswer, ApiError> =>
          Effect.callback((resume) => {
            flight.waiting += 1
            flight.fiber.addObserver(resume)
            return Effect.sync(() => {
              flight.waiting -= 1
              if (flight.waiting > 0) return
              if (flights.get(flight.key.hash) === flight) flights.delete(flight.key.hash)
              flight.fiber.interruptUnsafe()
            })
          })

        /**
         * Waits for another's search. What comes of it that is not a whole answer is that one's, not this one's: then the
         * partitions are asked, for as long as is left.
         */
        const share = Effect.fnUntraced(function* (
          flight: Flight,
          of: Collection,
          query: SessionQuery,
          started: number
        ) {
          const deadlineMillis = deadlineOf(query)
          const shared = yield* Effect.result(within(land(flight), deadlineMillis))
          if (Result.isSuccess(shared) && shared.success.missing.length === 0) {
            return answerOf(shared.success, query, started)
          }
          if (leftOf(query, started) < 1) return yield* new DeadlineExceeded({ deadlineMillis })
          return yield* compute(of, query, started)
        })

        /** From the cache, from a search under way, or from the partitions. */
        const find = (of: Collection, query: SessionQuery, byUrl: boolean): Effect.Effect<UrlAnswer, ApiError> => {
          const started = performance.now()
          const fault = checkQuery(of, query)
          if (fault !== undefined) return Effect.fail(fault)
          const at = results.enabled || byUrl ? revision(of) : undefined
          if (at === undefined || !results.enabled) return exact(of, at, compute(of, query, started))
          const key = resultKey(of, at, query)
          const kept = results.get(key)
          if (kept !== undefined) {
            return Effect.succeed({
              answer: answerOf(kept, query, started),
              collection: of,
              revision: at,
              cached: true
            })
          }
          // Noted for a URL too, so that what was asked there is known elsewhere.
          if (!results.seen(key) && !byUrl) return exact(of, undefined, compute(of, query, started))
          const flight = flights.get(key.hash)
          if (flight !== undefined && sameQuery(flight.key, key) && flight.key.revision === at) {
            return exact(of, at, share(flight, of, query, started))
          }
          // Takes the place of one from before a write: nobody who comes now may wait for that.
          return exact(
            of,
            at,
            Effect.suspend(() => land(takeOff(key, of, query, started)))
          )
        }

        /** An answer is of a revision where that was the same before and after. */
        const exact = (of: Collection, before: string | undefined, answer: Effect.Effect<SearchAnswer, ApiError>) =>
          Effect.map(
            answer,
            (answer): UrlAnswer => ({
              answer,
              collection: of,
              revision: before !== undefined && revision(of) === before ? before : undefined,
              cached: false
            })
          )

        /** Searches so far, for whose turn it is. */
        let searches = 0

        /** Its nearest results are what somebody is interested in, also where the cache had the answer. */
        const touch = (of: Collection, answer: SearchAnswer): void => {
          const touched = answer.ids[searches++ % touchedResults]
          if (touched === undefined) return
          access.touchRecord(idOf(of, partitionOf(touched, of.partitions)), touched, touchedResultWeight)
        }

        const searchByUrl = (query: SessionQuery) =>
          Effect.map(
            withCollection(query.collection, (of) => find(of, query, true)),
            (found) => {
              touch(found.collection, found.answer)
              return found
            }
          )

        const search = (query: SessionQuery) =>
          withCollection(query.collection, (of) =>
            Effect.map(find(of, query, false), ({ answer }) => {
              touch(of, answer)
              return answer
            })
          )

        const invalidate = Effect.fn("Router.invalidate")(function* (name: string, request: InvalidateRequest) {
          const { collection: of, effective_ms } =
            request.scope === "all"
              ? yield* toCatalog(catalog.Invalidate({ name, notice_ms: request.notice_ms ?? 0 }))
              : { collection: yield* collection(name), effective_ms: Date.now() }
          remember(of)
          const { generation } = cacheStateAt(of, effective_ms)
          const ids = request.scope === "all" ? [] : (request.ids ?? [])
          const tags =
            request.scope === "all"
              ? [generationTag(of, generation - 1)]
              : [...ids.map((id) => vectorTag(of, id)), searchTag(of)]
          if (request.scope === "all") results.dropCollection(of.uid)
          const { scope } = request
          events.publish({
            _tag: "CacheInvalidated",
            collection: name,
            uid: of.uid,
            scope,
            ids,
            effectiveMillis: effective_ms,
            tags
          })
          yield* Effect.logInfo("Caches are to forget", { collection: name, scope, effective_ms, ids: ids.length })
          return { collection: name, scope, generation, effective_ms, tags }
        })

        return Router.of({
          createCollection,
          collection,
          refresh: (name) =>
            Effect.suspend(() => {
              known.delete(name)
              return collection(name)
            }),
          collections: toCatalog(catalog.List()),
          deleteCollection,
          count: (of) => Effect.map(stats(of), (all) => all.reduce((sum, one) => sum + one.count, 0)),
          stats,
          activate,
          upsert,
          get,
          updateMetadata,
          remove,
          release,
          search,
          searchByUrl,
          revision,
          invalidate
        })
      })
    )
}

const catalogLate = () =>
  new StorageUnavailable({ detail: "The catalogue has not answered in time.", retryAfterMillis: 1_000 })

/** A search under way, and how many wait for it. */
interface Flight {
  readonly key: ResultKey
  readonly fiber: Fiber.Fiber<SearchAnswer, ApiError>
  waiting: number
}

/**
 * Fails with {@link DeadlineExceeded} where the effect has not ended in time, and interrupts it. What
 * `Effect.timeoutOrElse` does at a third of its cost, which counts in every search.
 */
const within = <A, E>(effect: Effect.Effect<A, E>, deadlineMillis: number): Effect.Effect<A, E | DeadlineExceeded> =>
  Effect.withFiber((parent) =>
    Effect.callback<A, E | DeadlineExceeded>((resume) => {
      const fiber = Effect.runForkWith(parent.context as Context.Context<never>)(effect)
      const exit = fiber.pollUnsafe()
      if (exit !== undefined) return resume(exit)
      const timer = setTimeout(() => {
        resume(Effect.fail(new DeadlineExceeded({ deadlineMillis })))
        fiber.interruptUnsafe()
      }, deadlineMillis)
      fiber.addObserver((exit) => {
        clearTimeout(timer)
        resume(exit)
      })
      return Effect.sync(() => {
        clearTimeout(timer)
        fiber.interruptUnsafe()
      })
    })
  )

const firstOf = <E>(
  records: Effect.Effect<ReadonlyArray<PartitionRecord | null>, E>
): Effect.Effect<PartitionRecord | null, E> => Effect.map(records, (found) => found[0] ?? null)

const isZero = (vector: Float32Array): boolean => {
  for (let i = 0; i < vector.length; i++) if (vector[i] !== 0) return false
  return true
}

/** Merges lists that are sorted by falling score into the k best; equal scores in the lists' order. */
export const mergeHits = (lists: ReadonlyArray<PartitionHits>, k: number, dimensions: number): PartitionHits => {
  if (lists.length === 1) return lists[0] as PartitionHits
  const total = Math.min(
    k,
    lists.reduce((sum, list) => sum + list.ids.length, 0)
  )
  const ids: Array<string> = []
  const scores = new Float32Array(total)
  const metadata = lists.some((list) => list.metadata !== undefined) ? ([] as Array<string>) : undefined
  const vectors = lists.some((list) => list.vectors !== undefined) ? new Float32Array(total * dimensions) : undefined
  const heads = new Array<number>(lists.length).fill(0)
  for (let n = 0; n < total; n++) {
    let best = -1
    let bestScore = 0
    for (let i = 0; i < lists.length; i++) {
      const head = heads[i] as number
      const list = lists[i] as PartitionHits
      if (head >= list.ids.length) continue
      const score = list.scores[head] as number
      if (best === -1 || score > bestScore) {
        best = i
        bestScore = score
      }
    }
    const list = lists[best] as PartitionHits
    const head = heads[best] as number
    heads[best] = head + 1
    ids.push(list.ids[head] as string)
    scores[n] = bestScore
    if (metadata !== undefined) metadata.push(list.metadata?.[head] ?? "")
    if (vectors !== undefined && list.vectors !== undefined) {
      vectors.set(list.vectors.subarray(head * dimensions, (head + 1) * dimensions), n * dimensions)
    }
  }
  return { ids, scores, ...(metadata === undefined ? {} : { metadata }), ...(vectors === undefined ? {} : { vectors }) }
}
