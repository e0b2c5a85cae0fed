/**
 * The engine of a client in the client's own process: the same actors, tiers and data format as a server's, and no port.
 * Calls are checked by the same schemas as those of the wires, and fail with the same codes.
 */
import { type Context, Deferred, Effect, Result, Stream } from "effect"
import { errorOfProblem, ownError, type VectorDBError } from "../client/ClientError.ts"
import type {
  CollectionChange,
  Engine,
  Heard,
  Item,
  MemberChange,
  Metadata,
  Query,
  SearchAnswer,
  SearchHit,
  SearchOptions
} from "../client/Engine.ts"
import { nextQueryId, toQuery } from "../gateway/Queries.ts"
import type { StreamEvent } from "../gateway/StreamEvents.ts"
import type { Delivery, DeliveryListener, Subscriptions } from "../gateway/Subscriptions.ts"
import type { Topics } from "../gateway/Topics.ts"
import { CollectionRequest } from "../protocol/Collection.ts"
import { type ApiError, type InvalidInput, toProblem } from "../protocol/Errors.ts"
import { CollectionName, decoderOf, MetadataObject, VectorId } from "../protocol/Fields.ts"
import * as Limits from "../protocol/Limits.ts"
import { anonymous } from "../protocol/Principal.ts"
import { IdempotencyKey } from "../protocol/RequestId.ts"
import { SearchRequest } from "../protocol/Search.ts"
import type { SearchAnswer as RouterAnswer, SessionQuery } from "../protocol/StreamSession.ts"
import { FollowRequest, SubscribeRequest } from "../protocol/Subscription.ts"
import { ListenRequest, requests, type TopicOperation } from "../protocol/Topic.ts"
import { DeleteRequest, InsertRequest } from "../protocol/Writes.ts"
import { requestIdOf } from "../shards/RequestIds.ts"
import type { Router } from "../shards/Router.ts"
import type { StandingMember } from "../shards/StandingQueries.ts"

/** `release` ends what the engine rests on, after what it holds is safe; it is called once no call is under way. */
export const makeEmbeddedEngine = (
  router: Context.Service.Shape<typeof Router>,
  subscriptions: Context.Service.Shape<typeof Subscriptions>,
  topics: Context.Service.Shape<typeof Topics>,
  release: () => Promise<void>
): Engine & { readonly close: () => Promise<void> } => {
  let underWay = 0
  let closed: Promise<void> | undefined
  let onQuiet: (() => void) | undefined
  /** Wakes what waits for news. */
  const enders = new Set<() => void>()

  /** A call: counted, so that closing waits for it, and failing as those of a service do. */
  const call = <A>(effect: Effect.Effect<A, ApiError>): Effect.Effect<A, VectorDBError> =>
    Effect.suspend(() => {
      if (closed !== undefined) return Effect.fail(isClosed())
      underWay += 1
      return Effect.onExit(
        Effect.mapError(effect, (error) => errorOfProblem(toProblem(error))),
        () =>
          Effect.sync(() => {
            underWay -= 1
            if (underWay === 0) onQuiet?.()
          })
      )
    })

  const close = (): Promise<void> => {
    const first = closed === undefined
    closed ??= (underWay === 0 ? Promise.resolve() : new Promise<void>((resolve) => (onQuiet = resolve))).then(release)
    if (first) for (const end of enders) end()
    return closed
  }

  const search = (query: Query, options: SearchOptions) =>
    call(Effect.map(Effect.flatMap(queryOf(query, options), router.search), answerOf))

  /** Events of a delivery, each made when it is read: nothing waits for a reader that lags. */
  const delivered = <A>(
    begin: (listener: DeliveryListener) => Effect.Effect<Delivery, ApiError>,
    read: (event: StreamEvent) => ReadonlyArray<A>
  ): Stream.Stream<A, VectorDBError> =>
    Stream.unwrap(
      Effect.gen(function* () {
        let news = Deferred.makeUnsafe<void>()
        let lost: ApiError | undefined
        const ready = () => Deferred.doneUnsafe(news, Effect.void)
        const delivery = yield* Effect.acquireRelease(
          call(
            begin({
              onReady: ready,
              onLost: (error) => {
                lost = error
                ready()
              }
            })
          ),
          (opened) => Effect.sync(opened.close)
        )
        enders.add(ready)
        yield* Effect.addFinalizer(() => Effect.sync(() => enders.delete(ready)))
        const next = Effect.gen(function* () {
          while (true) {
            if (closed !== undefined) return yield* isClosed()
            if (lost !== undefined) return yield* errorOfProblem(toProblem(lost))
            const waited = news
            const event = delivery.next()
            if (event !== undefined) return read(event)
            yield* Deferred.await(waited)
            if (news === waited) news = Deferred.makeUnsafe()
          }
        })
        return Stream.flattenIterable(Stream.fromEffectRepeat(next))
      })
    )

  const info = (name: string) =>
    Effect.flatMap(decoded(decodeName(name)), (name) =>
      Effect.flatMap(router.collection(name), (collection) =>
        Effect.map(router.count(collection), (count) => ({ ...collection, count }))
      )
    )

  return {
    insert: (items, { collection, ack, deadlineMillis, idempotencyKey }) =>
      items.length === 0
        ? Effect.succeed(0)
        : Effect.suspend(() => {
            const request = { collection, vectors: items.map(plain), ...(ack === undefined ? {} : { ack }) }
            const both = Effect.all([decoded(decodeInsert(request)), requestIdOfKey(idempotencyKey)])
            return Effect.flatMap(both, ([{ vectors }, requestId]) =>
              router.upsert(
                collection,
                vectors.map(({ id, vector, metadata }) => ({
                  id,
                  vector,
                  metadata: metadata === undefined ? "" : JSON.stringify(metadata)
                })),
                ack,
                requestId
              )
            )
          }).pipe(call, within(deadlineMillis)),
    patch: (id, metadata, { collection, deadlineMillis, idempotencyKey }) =>
      Effect.gen(function* () {
        const checked = yield* decoded(decodeMetadata(metadata))
        const name = yield* decoded(decodeName(collection))
        const requestId = yield* requestIdOfKey(idempotencyKey)
        const vectorId = yield* decoded(decodeId(id))
        const updated = yield* router.updateMetadata(name, vectorId, JSON.stringify(checked), requestId)
        return { metadata: parsed(updated.metadata), version: updated.version }
      }).pipe(call, within(deadlineMillis)),
    remove: (ids, { collection, deadlineMillis, idempotencyKey }) =>
      decoded(decodeDelete({ collection, ids })).pipe(
        Effect.andThen(requestIdOfKey(idempotencyKey)),
        Effect.flatMap((requestId) => router.remove(collection, ids, requestId)),
        call,
        within(deadlineMillis)
      ),
    get: (id, { collection, deadlineMillis }) =>
      Effect.gen(function* () {
        const name = yield* decoded(decodeName(collection))
        const { vector, metadata, version } = yield* router.get(name, yield* decoded(decodeId(id)))
        // The cache's own must not be changed from outside.
        return { id, vector: vector.slice(), metadata: parsed(metadata), version }
      }).pipe(
        Effect.catchTag("VectorNotFound", () => Effect.undefined),
        call,
        within(deadlineMillis)
      ),
    search,
    searchStream: (query, options) => Stream.fromIterableEffect(Effect.map(search(query, options), ({ hits }) => hits)),
    subscribe: (query, { collection, k, minScore, filter, includeVector }) =>
      delivered(
        (listener) =>
          Effect.flatMap(
            decoded(
              decodeSubscribe({
                collection,
                k,
                ...("id" in query ? { query_vector_id: query.id } : { query: kept(query) }),
                ...(minScore === undefined ? {} : { min_score: minScore }),
                ...(filter === undefined ? {} : { filter }),
                include: includeVector ? ["metadata", "vector"] : ["metadata"]
              })
            ),
            (request) => subscriptions.subscribe(anonymous, request, listener)
          ),
        (event): ReadonlyArray<MemberChange> => {
          if (event.event === "subscribed") return event.members.map((member) => entering("enter", member))
          if (event.event !== "changes") return []
          const { leaves, enters, updates } = event.difference
          return [
            ...leaves.map((id) => ({ type: "leave" as const, id })),
            ...enters.map((member) => entering("enter", member)),
            ...updates.map((member) => entering("update", member))
          ]
        }
      ),
    follow: ({ collection, from }) =>
      delivered(
        (listener) =>
          Effect.flatMap(decoded(decodeFollow({ collection, from })), (request) =>
            subscriptions.follow(anonymous, request, listener)
          ),
        (event): ReadonlyArray<CollectionChange> => {
          if (event.event === "resync") return [{ kind: "resync" }]
          if (event.event !== "change") return []
          const { kind, id, version } = event.change
          return [{ kind, id, version }]
        }
      ),
    topic: (operation, request, deadlineMillis) =>
      Object.hasOwn(requests, operation)
        ? topics.call(anonymous, operation as TopicOperation, request).pipe(call, within(deadlineMillis))
        : Effect.die(new RangeError(`Topics know no ${operation}.`)),
    listen: (topic, { cursor, from, subscriber }) =>
      delivered(
        (listener) =>
          Effect.flatMap(
            decoded(
              decodeListen({
                topic,
                ...(cursor === undefined ? {} : { cursor }),
                ...(from === undefined ? {} : { from }),
                ...(subscriber === undefined ? {} : { subscriber })
              })
            ),
            (request) => topics.listen(anonymous, request, listener)
          ),
        (event): ReadonlyArray<Heard> => {
          if (event.event === "gap") return [{ gap: true }]
          if (event.event !== "message") return []
          const { atMillis, body, id, key } = event.message
          return [{ id, key, message: JSON.parse(body), atMillis: Math.trunc(atMillis), cursor: event.cursor }]
        }
      ),
    createCollection: (name, parameters, deadlineMillis) =>
      Effect.gen(function* () {
        const request = yield* decoded(decodeCollection(parameters))
        return (yield* router.createCollection(yield* decoded(decodeName(name)), request)).collection
      }).pipe(call, within(deadlineMillis)),
    collection: (name, deadlineMillis) => info(name).pipe(call, within(deadlineMillis)),
    collections: (deadlineMillis) => router.collections.pipe(call, within(deadlineMillis)),
    deleteCollection: (name, deadlineMillis) =>
      Effect.flatMap(decoded(decodeName(name)), router.deleteCollection).pipe(call, within(deadlineMillis)),
    close
  }
}

const decodeSearch = decoderOf(SearchRequest)
const decodeSubscribe = decoderOf(SubscribeRequest)
const decodeFollow = decoderOf(FollowRequest)
const decodeListen = decoderOf(ListenRequest)
const decodeInsert = decoderOf(InsertRequest)
const decodeDelete = decoderOf(DeleteRequest)
const decodeCollection = decoderOf(CollectionRequest)
const decodeName = decoderOf(CollectionName, "collection")
const decodeId = decoderOf(VectorId, "id")
const decodeKey = decoderOf(IdempotencyKey, "idempotencyKey")
const decodeMetadata = decoderOf(MetadataObject, "metadata")

const decoded = <A>(result: Result.Result<A, InvalidInput>): Effect.Effect<A, InvalidInput> =>
  Result.isSuccess(result) ? Effect.succeed(result.success) : Effect.fail(result.failure)

const queryOf = (query: Query, options: SearchOptions): Effect.Effect<SessionQuery, InvalidInput> => {
  const { collection, k, ef, filter, includeVector, deadlineMillis } = options
  if (query instanceof Float32Array && filter === undefined && isPlain(query, options)) {
    return Effect.succeed({
      queryId: nextQueryId(),
      collection,
      vector: query.slice(),
      k,
      ef: ef ?? 0,
      filter: "",
      includeMetadata: true,
      includeVector,
      deadlineMillis: deadlineOf(deadlineMillis)
    })
  }
  const request = {
    collection,
    k,
    ...("id" in query ? { query_vector_id: query.id } : { query: kept(query) }),
    ...(ef === undefined ? {} : { ef }),
    ...(filter === undefined ? {} : { filter }),
    include: includeVector ? ["metadata", "vector"] : ["metadata"],
    deadline_ms: deadlineOf(deadlineMillis)
  }
  return decoded(Result.flatMap(decodeSearch(request), toQuery))
}

/**
 * Whether a search is right for sure: nearly all are, and the schema takes longer to find that than all else on this thread.
 * What is not goes to the schema, which says what is wrong.
 */
const isPlain = (vector: Float32Array, { collection, k, ef }: SearchOptions): boolean => {
  if (collection !== plainName && Result.isFailure(decodeName(collection))) return false
  plainName = collection
  if (!(Number.isInteger(k) && k >= 1 && k <= Limits.kMax)) return false
  if (ef !== undefined && !(Number.isInteger(ef) && ef >= k && ef <= Limits.efMax)) return false
  if (vector.length === 0 || vector.length > Limits.dimensionsMax) return false
  // What is not finite makes a sum of nothings something.
  let sum = 0
  for (let i = 0; i < vector.length; i++) sum += 0 * (vector[i] as number)
  return sum === 0
}

/** The name that was last found right. */
let plainName: string | undefined

const deadlineOf = (millis: number): number => Math.max(1, Math.min(Limits.deadlineMillisMax, Math.trunc(millis)))

/** Vectors are copied: the caller may change its own while they are under way. */
const kept = (vector: Item["vector"]) => (vector instanceof Float32Array ? vector.slice() : vector)

const requestIdOfKey = (key: string | undefined): Effect.Effect<string | undefined, InvalidInput> =>
  key === undefined
    ? Effect.undefined
    : Effect.map(decoded(decodeKey(key)), (checked) => requestIdOf(anonymous.id, checked))

const plain = ({ id, vector, metadata }: Item) => ({
  id,
  vector: kept(vector),
  ...(metadata === undefined ? {} : { metadata })
})

const parsed = (text: string): Metadata => (text === "" ? {} : (JSON.parse(text) as Metadata))

const answerOf = (answer: RouterAnswer): SearchAnswer => {
  const { dimensions, ids, metadata, missing, scores, vectors } = answer
  return {
    hits: ids.map(
      (id, i): SearchHit => ({
        id,
        score: scores[i] as number,
        metadata: parsed(metadata?.[i] ?? ""),
        ...(vectors === undefined ? {} : { vector: vectors.slice(i * dimensions, (i + 1) * dimensions) })
      })
    ),
    missingPartitions: missing
  }
}

const isClosed = () => ownError("closed", "The client is closed.")

const entering = (
  type: "enter" | "update",
  { id, score, version, metadata, vector }: StandingMember
): MemberChange => ({
  type,
  id,
  score,
  version,
  metadata: parsed(metadata ?? ""),
  ...(vector === undefined ? {} : { vector: vector.slice() })
})

const within =
  (deadlineMillis: number) =>
  <A>(effect: Effect.Effect<A, VectorDBError>): Effect.Effect<A, VectorDBError> =>
    Effect.timeoutOrElse(effect, {
      duration: deadlineMillis,
      orElse: () => Effect.fail(ownError("deadline_exceeded", `No answer within ${deadlineMillis} ms.`))
    })
