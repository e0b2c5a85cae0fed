/**
 * What the calls of the RPC group do. Unary calls go straight to the router; a streamed search runs in a session of its
 * own, open for as long as the stream is.
 */
import { Cause, Effect, Exit, Result, Schema, type Scope, Stream } from "effect"
import type { Rpc } from "effect/rpc"
import { Settings } from "../config.ts"
import { type ApiError, InternalError, InvalidInput, Overloaded, toProblem } from "../protocol/Errors.ts"
import {
  decoderOf,
  defaultCollection,
  describe,
  FilterObject,
  invalidInputOf,
  type Metadata,
  MetadataObject
} from "../protocol/Fields.ts"
import * as Limits from "../protocol/Limits.ts"
import { anonymous } from "../protocol/Principal.ts"
import {
  type RpcAnswerChange,
  type RpcFollowEvent,
  type RpcMember,
  type RpcResult,
  type RpcSearchEvent,
  type RpcSearchResponse,
  type RpcSubscriptionEvent,
  RuvectorRpcs,
  type SearchPayload,
  type SubscribePayload
} from "../protocol/Rpcs.ts"
import type { SearchAnswer, SessionQuery } from "../protocol/StreamSession.ts"
import type { SubscribeRequest } from "../protocol/Subscription.ts"
import type { TierEvent } from "../protocol/TierPromoter.ts"
import { Router } from "../shards/Router.ts"
import { overloadedBy, Shedding } from "../shards/Shedding.ts"
import type { StandingMember } from "../shards/StandingQueries.ts"
import type { AnswerDifference } from "./AnswerChanges.ts"
import { countDefect, countRequest } from "./Instruments.ts"
import { Promoter } from "./Promoter.ts"
import { instance, toQuery } from "./Queries.ts"
import { nobody } from "./Refusals.ts"
import { Sessions } from "./Sessions.ts"
import type { StreamEvent } from "./StreamEvents.ts"
import { type Delivery, type DeliveryListener, Subscriptions } from "./Subscriptions.ts"

export const layer = RuvectorRpcs.toLayer(
  Effect.gen(function* () {
    const settings = yield* Settings
    const router = yield* Router
    const sessions = yield* Sessions
    const promoter = yield* Promoter
    const shedding = yield* Shedding
    const subscriptions = yield* Subscriptions

    /** A call, counted; what goes wrong in us is logged under an id and answered with it. */
    const call = <A, R>(tag: string, effect: Effect.Effect<A, ApiError, R>): Effect.Effect<A, ApiError, R> =>
      Effect.suspend(() => {
        const started = performance.now()
        const refusal = shedding.refusal(nobody)
        const admitted = refusal === undefined ? effect : Effect.fail(overloadedBy(refusal))
        return admitted.pipe(
          Effect.catchCause((cause) => answered(tag, cause)),
          Effect.onExit((exit) =>
            Effect.sync(() => countRequest("rpc", tag, statusOf(exit), performance.now() - started))
          )
        )
      })

    const answered = (tag: string, cause: Cause.Cause<ApiError>): Effect.Effect<never, ApiError> => {
      if (!Cause.hasDies(cause)) return Effect.failCause(cause)
      countDefect()
      const requestId = `req_rpc${(defects++).toString(36)}_${settings.region}_${instance}`
      return Effect.andThen(
        Effect.annotateLogs(Effect.logError("RPC met a defect", cause), { request_id: requestId, rpc: tag }),
        Effect.fail(new InternalError({ requestId }))
      )
    }

    // A call's scope lasts until its answer is sent, so that those count that wait for a slow reader.
    const calls = new Bound("sessionSearchesMax", settings.sessionSearchesMax)
    const streams = new Bound("sessionsPerConnection", settings.sessionsPerConnection)

    const unary =
      <P, A>(tag: string, run: (payload: P) => Effect.Effect<A, ApiError>) =>
      (payload: P, { client }: { readonly client: Rpc.ServerClient }): Effect.Effect<A, ApiError, Scope.Scope> =>
        call(
          tag,
          Effect.suspend(() =>
            payload instanceof InvalidInput ? Effect.fail(payload) : Effect.andThen(calls.one(client), run(payload))
          )
        )

    const searchInSession = Effect.fnUntraced(function* (query: SessionQuery, client: Rpc.ServerClient) {
      yield* streams.one(client)
      const session = yield* Effect.acquireRelease(sessions.open, (link) => link.close)
      return yield* session.search(query)
    })

    /** A delivery's events as they are asked for: what the client does not take is not made. */
    const delivered = <A>(
      tag: string,
      client: Rpc.ServerClient,
      payload: unknown,
      begin: (listener: DeliveryListener) => Effect.Effect<Delivery, ApiError>,
      toRpc: (event: StreamEvent) => A
    ): Stream.Stream<A, ApiError> => {
      let wake: (() => void) | undefined
      let lost: ApiError | undefined
      const listener: DeliveryListener = {
        onReady: () => wake?.(),
        onLost: (error) => {
          lost = error
          wake?.()
        }
      }
      const open = Effect.suspend((): Effect.Effect<Delivery, ApiError, Scope.Scope> => {
        if (payload instanceof InvalidInput) return Effect.fail(payload)
        let delivery: Delivery | undefined
        return Effect.gen(function* () {
          yield* streams.one(client)
          yield* Effect.addFinalizer(() => Effect.sync(() => delivery?.close()))
          delivery = yield* begin(listener)
          return delivery
        })
      })
      const next = (delivery: Delivery): Effect.Effect<readonly [readonly [A, ...Array<A>], undefined], ApiError> =>
        Effect.callback((resume) => {
          const look = () => {
            const first = delivery.next()
            if (first !== undefined) {
              wake = undefined
              const events: [A, ...Array<A>] = [toRpc(first)]
              let size = first.open.length
              while (size < messageSizeMax) {
                const more = delivery.next()
                if (more === undefined) break
                events.push(toRpc(more))
                size += more.open.length
              }
              resume(Effect.succeed([events, undefined]))
            } else if (lost !== undefined) {
              wake = undefined
              resume(Effect.fail(lost))
            }
          }
          wake = look
          look()
          return Effect.sync(() => (wake = undefined))
        })
      return Stream.unwrap(
        Effect.map(call(tag, open), (delivery) => Stream.flattenArray(Stream.unfold(undefined, () => next(delivery))))
      )
    }

    return RuvectorRpcs.of({
      CreateCollection: unary("CreateCollection", ({ name, ...request }) => router.createCollection(name, request)),
      ListCollections: unary("ListCollections", () => router.collections),
      GetCollection: unary(
        "GetCollection",
        Effect.fnUntraced(function* ({ name }) {
          const collection = yield* router.collection(name)
          return { ...collection, count: yield* router.count(collection) }
        })
      ),
      DeleteCollection: unary("DeleteCollection", ({ name }) => router.deleteCollection(name)),
      Insert: unary(
        "Insert",
        Effect.fnUntraced(function* ({ ack, collection = defaultCollection, vectors }) {
          yield* checkBatch("vectors", vectors)
          const records: Array<{ id: string; vector: Float32Array; metadata: string }> = []
          for (const { id, vector, metadata } of vectors) {
            const field = `vectors[${records.length}].metadata`
            records.push({ id, vector, metadata: metadata === undefined ? "" : yield* metadataText(metadata, field) })
          }
          return { inserted: yield* router.upsert(collection, records, ack) }
        })
      ),
      Search: unary("Search", (payload) =>
        Effect.fromResult(queryOf(payload)).pipe(Effect.flatMap(router.search), Effect.map(responseOf))
      ),
      SearchStream: (payload, { client }) =>
        Stream.unwrap(
          call(
            "SearchStream",
            Effect.suspend(() =>
              payload instanceof InvalidInput
                ? Effect.fail(payload)
                : Effect.flatMap(Effect.fromResult(queryOf(payload)), (query) => searchInSession(query, client))
            )
          ).pipe(Effect.map((answer) => Stream.flattenArray(Stream.fromIterable(eventsOf(answer), { chunkSize: 1 }))))
        ),
      Subscribe: (payload, { client }) =>
        delivered(
          "Subscribe",
          client,
          payload,
          (listener) =>
            Effect.flatMap(Effect.fromResult(subscriptionOf(payload)), (request) =>
              subscriptions.subscribe(anonymous, request, listener)
            ),
          subscriptionEvent
        ),
      Changes: (payload, { client }) =>
        delivered(
          "Changes",
          client,
          payload,
          (listener) => subscriptions.follow(anonymous, payload, listener),
          followEvent
        ),
      Get: unary("Get", ({ collection = defaultCollection, id }) =>
        Effect.map(router.get(collection, id), ({ vector, metadata, version }) => ({
          vector_id: id,
          vector,
          metadata: metadata || "{}",
          version
        }))
      ),
      UpdateMetadata: unary(
        "UpdateMetadata",
        Effect.fnUntraced(function* ({ collection = defaultCollection, id, metadata }) {
          const updated = yield* router.updateMetadata(collection, id, yield* metadataText(metadata, "metadata"))
          return { vector_id: id, metadata: updated.metadata || "{}", version: updated.version }
        })
      ),
      Delete: unary(
        "Delete",
        Effect.fnUntraced(function* ({ collection = defaultCollection, ids }) {
          yield* checkBatch("ids", ids)
          return { deleted: yield* router.remove(collection, ids) }
        })
      ),
      Warm: unary("Warm", (request) =>
        request.ids === undefined
          ? promoter.warm(request)
          : Effect.andThen(checkBatch("ids", request.ids, Limits.warmRecordsMax), promoter.warm(request))
      ),
      TierEvents: (payload, { client }) =>
        Stream.unwrap(
          call(
            "TierEvents",
            Effect.suspend(
              (): Effect.Effect<Stream.Stream<TierEvent, ApiError>, ApiError, Scope.Scope> =>
                payload instanceof InvalidInput
                  ? Effect.fail(payload)
                  : Effect.as(streams.one(client), promoter.events(payload.after))
            )
          )
        )
    })
  })
)

/** A setting's bound on what a client has under way on one connection, or in one body. */
class Bound {
  readonly #name: string
  readonly #max: number
  readonly #underWay = new WeakMap<Rpc.ServerClient, number>()

  constructor(name: string, max: number) {
    this.#name = name
    this.#max = max
  }

  /** One more, until the scope closes. */
  one(client: Rpc.ServerClient): Effect.Effect<void, Overloaded, Scope.Scope> {
    return Effect.suspend(() => {
      const underWay = this.#underWay.get(client) ?? 0
      if (underWay >= this.#max) return Effect.fail(new Overloaded({ bound: this.#name, retryAfterMillis: 100 }))
      this.#underWay.set(client, underWay + 1)
      return Effect.addFinalizer(() =>
        Effect.sync(() => this.#underWay.set(client, (this.#underWay.get(client) ?? 1) - 1))
      )
    })
  }
}

let defects = 0

const statusOf = (exit: Exit.Exit<unknown, ApiError>): number => {
  if (Exit.isSuccess(exit)) return 200
  const error = Exit.findErrorOption(exit)
  return error._tag === "Some" ? toProblem(error.value).status : 499
}

const checkBatch = (
  field: string,
  items: ReadonlyArray<unknown>,
  max = Limits.batchItemsMax
): Effect.Effect<void, InvalidInput> =>
  items.length > 0 && items.length <= max
    ? Effect.void
    : Effect.fail(new InvalidInput({ field, expected: `1 to ${max} ${field}`, got: describe(items) }))

const decodeMetadata = Schema.decodeUnknownResult(MetadataObject, { reportInput: true })

/** Metadata in the form it is stored in. What came may have spaces, repeated keys or numbers that JSON has no other form of. */
const metadataText = (text: string, field: string): Effect.Effect<string, InvalidInput> =>
  Effect.suspend(() => {
    const value = parseJson(text)
    if (value === undefined) {
      return Effect.fail(new InvalidInput({ field, expected: "JSON text of an object", got: describe(text) }))
    }
    const metadata = decodeMetadata(value)
    return Result.isSuccess(metadata)
      ? Effect.succeed(JSON.stringify(metadata.success))
      : Effect.fail(invalidInputOf(metadata.failure.issue, field))
  })

/** The value of a JSON text, or `undefined`, which no JSON text is. */
const parseJson = (text: string): unknown => {
  try {
    return JSON.parse(text)
  } catch {
    return undefined
  }
}

const decodeFilter = decoderOf(FilterObject, "filter")

const queryOf = (payload: SearchPayload): Result.Result<SessionQuery, InvalidInput> => {
  const { filter, include_metadata, include_vector, ...request } = payload
  if ((request.query === undefined) === (request.query_vector_id === undefined)) {
    return Result.fail(
      new InvalidInput({
        field: "query",
        expected: "exactly one of query and query_vector_id",
        got: request.query === undefined ? "none" : "2"
      })
    )
  }
  const include = [...(include_metadata ? ["metadata" as const] : []), ...(include_vector ? ["vector" as const] : [])]
  return Result.flatMap(filterOf(filter), (checked) =>
    toQuery({ ...request, include, ...(checked === undefined ? {} : { filter: checked }) })
  )
}

const filterOf = (text: string | undefined): Result.Result<Metadata | undefined, InvalidInput> => {
  if (text === undefined) return Result.succeed(undefined)
  const value = parseJson(text)
  return value === undefined
    ? Result.fail(new InvalidInput({ field: "filter", expected: "JSON text of a filter", got: describe(text) }))
    : decodeFilter(value)
}

const subscriptionOf = (payload: SubscribePayload): Result.Result<SubscribeRequest, InvalidInput> => {
  const { filter, include_metadata, include_vector, ...request } = payload
  const include = [...(include_metadata ? ["metadata" as const] : []), ...(include_vector ? ["vector" as const] : [])]
  return Result.map(filterOf(filter), (checked) => ({
    ...request,
    include,
    ...(checked === undefined ? {} : { filter: checked })
  }))
}

const subscriptionEvent = (event: StreamEvent): RpcSubscriptionEvent => {
  const { cursor } = event
  switch (event.event) {
    case "subscribed":
      return { event: "subscribed", results: event.members.map(memberOf), cursor }
    case "resumed": {
      const keep = event.keep === undefined ? {} : { keep: event.keep }
      return { event: "resumed", ...keep, changes: changesOf(event.difference), cursor }
    }
    case "changes":
      return { event: "changes", changes: changesOf(event.difference), cursor }
    default:
      throw new Error(`${event.event} is no event of a standing query`)
  }
}

const followEvent = (event: StreamEvent): RpcFollowEvent => {
  const { cursor } = event
  switch (event.event) {
    case "following":
    case "resync":
      return { event: event.event, cursor }
    case "change": {
      const { kind, id, version } = event.change
      return { event: "change", kind, vector_id: id, version, cursor }
    }
    default:
      throw new Error(`${event.event} is no event of a change feed`)
  }
}

const memberOf = ({ id, score, version, metadata, vector }: StandingMember): RpcMember => ({
  vector_id: id,
  score,
  version,
  ...(metadata === undefined ? {} : { metadata: metadata || "{}" }),
  ...(vector === undefined ? {} : { vector })
})

const changesOf = ({ leaves, enters, updates }: AnswerDifference): ReadonlyArray<RpcAnswerChange> => [
  ...leaves.map((vector_id) => ({ type: "leave" as const, vector_id })),
  ...enters.map((member) => ({ type: "enter" as const, ...memberOf(member) })),
  ...updates.map((member) => ({ type: "update" as const, ...memberOf(member) }))
]

const responseOf = (answer: SearchAnswer): RpcSearchResponse => ({
  query_id: answer.queryId,
  results: answer.ids.map((_, i) => resultOf(answer, i)),
  ...completionOf(answer),
  took_ms: Math.round(answer.tookMillis * 1_000) / 1_000
})

const completionOf = (answer: SearchAnswer) => ({
  total_results: answer.ids.length,
  partial: answer.missing.length > 0,
  missing_partitions: answer.missing
})

const resultOf = (answer: SearchAnswer, i: number): RpcResult => ({
  vector_id: answer.ids[i] as string,
  score: answer.scores[i] as number,
  ...(answer.metadata === undefined ? {} : { metadata: answer.metadata[i] || "{}" }),
  ...(answer.vectors === undefined
    ? {}
    : { vector: answer.vectors.subarray(i * answer.dimensions, (i + 1) * answer.dimensions) })
})

/** Characters and bytes of the results of one message, from which on the next one begins. */
const messageSizeMax = 65_536

/** The events of a streamed search, in the messages they are sent in. */
const eventsOf = function* (answer: SearchAnswer): Generator<[RpcSearchEvent, ...Array<RpcSearchEvent>]> {
  let events: [RpcSearchEvent, ...Array<RpcSearchEvent>] = [{ event: "search_start", query_id: answer.queryId }]
  let size = 0
  for (let i = 0; i < answer.ids.length; i++) {
    const result: RpcSearchEvent = { event: "result", ...resultOf(answer, i) }
    const more = 16 + result.vector_id.length + (result.metadata?.length ?? 0) + (result.vector?.byteLength ?? 0)
    if (size + more > messageSizeMax) {
      yield events
      events = [result]
      size = more
    } else {
      events.push(result)
      size += more
    }
  }
  events.push({ event: "search_complete", ...completionOf(answer) })
  yield events
}
