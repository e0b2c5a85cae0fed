/**
 * What the calls of the RPC group do. Unary calls go straight to the router; a streamed search runs in a session of its
 * own, open for as long as the stream is.
 */
import { Cause, Effect, Exit, Result, Schema, type Scope, Stream } from "effect"
import type { Headers } from "effect/http"
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
import type { Principal } from "../protocol/Principal.ts"
import {
  type RpcAnswerChange,
  type RpcFollowEvent,
  type RpcListenEvent,
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
import { shownCollection, shownError } from "../protocol/Tenant.ts"
import type { TierEvent } from "../protocol/TierPromoter.ts"
import type { TopicAnswers, TopicOperation } from "../protocol/Topic.ts"
import { overloadedBy, Shedding } from "../shards/Shedding.ts"
import type { StandingMember } from "../shards/StandingQueries.ts"
import { Access } from "./Access.ts"
import type { AnswerDifference } from "./AnswerChanges.ts"
import { countDefect, countRequest } from "./Instruments.ts"
import { Promoter, promoterOf } from "./Promoter.ts"
import { instance, toQuery } from "./Queries.ts"
import { askerOf } from "./Refusals.ts"
import { type Caller, callerOfCall } from "./RpcCallers.ts"
import { Sessions } from "./Sessions.ts"
import { askedBy } from "./Sources.ts"
import type { StreamEvent } from "./StreamEvents.ts"
import { type Delivery, type DeliveryListener, Subscriptions } from "./Subscriptions.ts"
import { storedQuery, TenantRouter, type TenantView } from "./TenantRouter.ts"
import { Topics } from "./Topics.ts"

export const layer = RuvectorRpcs.toLayer(
  Effect.gen(function* () {
    const settings = yield* Settings
    const tenants = yield* TenantRouter
    const access = yield* Access
    const sessions = yield* Sessions
    const promoter = yield* Promoter
    const shedding = yield* Shedding
    const subscriptions = yield* Subscriptions
    const topics = yield* Topics

    /** A call, counted; what goes wrong in us is logged under an id and answered with it. */
    const call = <A, R>(tag: string, effect: Effect.Effect<A, ApiError, R>): Effect.Effect<A, ApiError, R> =>
      Effect.suspend(() => {
        const started = performance.now()
        return effect.pipe(
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

    /** Who calls, if it may call at all and not too often. */
    const admitted = (headers: Headers.Headers): Effect.Effect<Caller, ApiError> =>
      Effect.flatMap(callerOfCall(access, headers), (caller): Effect.Effect<Caller, ApiError> => {
        const shed = shedding.refusal(askerOf(caller.address, caller.principal))
        if (shed !== undefined) return Effect.fail(overloadedBy(shed))
        const limited = access.admit(caller.principal, caller.address)
        return limited === undefined ? Effect.succeed(caller) : Effect.fail(limited)
      })

    const unary =
      <P, A>(tag: string, run: (payload: P, router: TenantView, caller: Caller) => Effect.Effect<A, ApiError>) =>
      (payload: P, { client, headers }: CallOptions): Effect.Effect<A, ApiError, Scope.Scope> =>
        call(
          tag,
          Effect.flatMap(admitted(headers), (caller) =>
            payload instanceof InvalidInput
              ? Effect.fail(payload)
              : Effect.andThen(calls.one(client), run(payload, tenants.of(caller.principal), caller))
          )
        )

    const searchInSession = Effect.fnUntraced(function* (
      query: SessionQuery,
      client: Rpc.ServerClient,
      { principal, source }: Caller
    ) {
      const refusal = access.allow(principal, "read", query.collection)
      if (refusal !== undefined) return yield* refusal
      yield* streams.one(client)
      const session = yield* Effect.acquireRelease(sessions.open, (link) => link.close)
      return yield* Effect.mapError(
        session.search(askedBy(storedQuery(principal, query), principal, source)),
        shownError
      )
    })

    /** A delivery's events as they are asked for: what the client does not take is not made. */
    const delivered = <A>(
      tag: string,
      { client, headers }: CallOptions,
      payload: unknown,
      begin: (whose: Principal, listener: DeliveryListener) => Effect.Effect<Delivery, ApiError>,
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
      const open = Effect.flatMap(
        admitted(headers),
        ({ principal }): Effect.Effect<Delivery, ApiError, Scope.Scope> => {
          if (payload instanceof InvalidInput) return Effect.fail(payload)
          let delivery: Delivery | undefined
          return Effect.gen(function* () {
            yield* streams.one(client)
            yield* Effect.addFinalizer(() => Effect.sync(() => delivery?.close()))
            delivery = yield* begin(principal, listener)
            return delivery
          })
        }
      )
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

    /** A call about a topic, as it is on the other wires: there, messages and tasks are JSON and not texts of it. */
    const onTopic = <P extends object, O extends TopicOperation, A>(
      tag: string,
      operation: O,
      answerOf: (answer: TopicAnswers[O]) => A,
      requestOf: (payload: P) => Effect.Effect<object, ApiError> = Effect.succeed
    ) =>
      unary(tag, (payload: P, _, { principal }) =>
        Effect.map(
          Effect.flatMap(requestOf(payload), (request) => topics.call(principal, operation, request)),
          answerOf
        )
      )

    return RuvectorRpcs.of({
      CreateTopic: onTopic("CreateTopic", "create", same),
      ListTopics: unary("ListTopics", (_, __, { principal }) => topics.call(principal, "list", {})),
      GetTopic: onTopic("GetTopic", "describe", same),
      DeleteTopic: onTopic("DeleteTopic", "delete", nothing),
      Publish: onTopic(
        "Publish",
        "publish",
        same,
        (payload: { readonly messages: ReadonlyArray<WithJson<"message">> }) =>
          Effect.map(jsonItems(payload.messages, "messages", "message"), (messages) => ({ ...payload, messages }))
      ),
      Listen: (payload, options) =>
        delivered(
          "Listen",
          options,
          payload,
          (whose, listener) => topics.listen(whose, payload, listener),
          listenEvent
        ),
      Acknowledge: onTopic("Acknowledge", "acknowledge", nothing),
      Forget: onTopic("Forget", "forget", nothing),
      Enqueue: onTopic("Enqueue", "enqueue", same, (payload: { readonly tasks: ReadonlyArray<WithJson<"task">> }) =>
        Effect.map(jsonItems(payload.tasks, "tasks", "task"), (tasks) => ({ ...payload, tasks }))
      ),
      Take: onTopic("Take", "take", ({ tasks }) => ({
        tasks: tasks.map((task) => ({ ...task, task: JSON.stringify(task.task) }))
      })),
      Extend: onTopic("Extend", "extend", same),
      Complete: onTopic("Complete", "complete", nothing, (payload: { readonly result?: string }) =>
        payload.result === undefined
          ? Effect.succeed(payload)
          : Effect.map(jsonValue(payload.result, "result"), (result) => ({ ...payload, result }))
      ),
      Fail: onTopic("Fail", "fail", same),
      Redrive: onTopic("Redrive", "redrive", same),
      Cancel: onTopic("Cancel", "cancel", same),
      GetTask: onTopic("GetTask", "task", rpcTask),
      ListTasks: onTopic("ListTasks", "tasks", ({ tasks }) => ({ tasks: tasks.map(rpcTask) })),
      CreateCollection: unary("CreateCollection", ({ name, ...request }, router) =>
        Effect.map(router.createCollection(name, request), ({ collection, created }) => ({
          collection: shownCollection(collection),
          created
        }))
      ),
      ListCollections: unary("ListCollections", (_, router) =>
        Effect.map(router.collections, (all) => all.map(shownCollection))
      ),
      GetCollection: unary(
        "GetCollection",
        Effect.fnUntraced(function* ({ name }, router) {
          const collection = yield* router.collection(name)
          return { ...shownCollection(collection), count: yield* router.count(collection) }
        })
      ),
      DeleteCollection: unary("DeleteCollection", ({ name }, router) => router.deleteCollection(name)),
      Insert: unary(
        "Insert",
        Effect.fnUntraced(function* ({ ack, collection = defaultCollection, idempotency_key, vectors }, router) {
          yield* checkBatch("vectors", vectors)
          const records: Array<{ id: string; vector: Float32Array; metadata: string }> = []
          for (const { id, vector, metadata } of vectors) {
            const field = `vectors[${records.length}].metadata`
            records.push({ id, vector, metadata: metadata === undefined ? "" : yield* metadataText(metadata, field) })
          }
          return { inserted: yield* router.upsert(collection, records, ack, idempotency_key) }
        })
      ),
      Search: unary("Search", (payload, router, { principal, source }) =>
        Effect.fromResult(queryOf(payload)).pipe(
          Effect.flatMap((query) => router.search(askedBy(query, principal, source))),
          Effect.map(responseOf)
        )
      ),
      SearchStream: (payload, { client, headers }) =>
        Stream.unwrap(
          call(
            "SearchStream",
            Effect.flatMap(admitted(headers), (caller) =>
              payload instanceof InvalidInput
                ? Effect.fail(payload)
                : Effect.flatMap(Effect.fromResult(queryOf(payload)), (query) => searchInSession(query, client, caller))
            )
          ).pipe(Effect.map((answer) => Stream.flattenArray(Stream.fromIterable(eventsOf(answer), { chunkSize: 1 }))))
        ),
      Subscribe: (payload, options) =>
        delivered(
          "Subscribe",
          options,
          payload,
          (whose, listener) =>
            Effect.flatMap(Effect.fromResult(subscriptionOf(payload)), (request) =>
              subscriptions.subscribe(whose, request, listener)
            ),
          subscriptionEvent
        ),
      Changes: (payload, options) =>
        delivered(
          "Changes",
          options,
          payload,
          (whose, listener) => subscriptions.follow(whose, payload, listener),
          followEvent
        ),
      Get: unary("Get", ({ collection = defaultCollection, id }, router) =>
        Effect.map(router.get(collection, id), ({ vector, metadata, version }) => ({
          vector_id: id,
          vector,
          metadata: metadata || "{}",
          version
        }))
      ),
      UpdateMetadata: unary(
        "UpdateMetadata",
        Effect.fnUntraced(function* ({ collection = defaultCollection, id, idempotency_key, metadata }, router) {
          const patch = yield* metadataText(metadata, "metadata")
          const updated = yield* router.updateMetadata(collection, id, patch, idempotency_key)
          return { vector_id: id, metadata: updated.metadata || "{}", version: updated.version }
        })
      ),
      Delete: unary(
        "Delete",
        Effect.fnUntraced(function* ({ collection = defaultCollection, idempotency_key, ids }, router) {
          yield* checkBatch("ids", ids)
          return { deleted: yield* router.remove(collection, ids, idempotency_key) }
        })
      ),
      Warm: unary("Warm", (request, _, { principal }) => {
        const warmed = promoterOf(promoter, access, principal).warm(request)
        return request.ids === undefined
          ? warmed
          : Effect.andThen(checkBatch("ids", request.ids, Limits.warmRecordsMax), warmed)
      }),
      TierEvents: (payload, { client, headers }) =>
        Stream.unwrap(
          call(
            "TierEvents",
            Effect.flatMap(
              admitted(headers),
              ({ principal }): Effect.Effect<Stream.Stream<TierEvent, ApiError>, ApiError, Scope.Scope> =>
                payload instanceof InvalidInput
                  ? Effect.fail(payload)
                  : Effect.as(streams.one(client), promoterOf(promoter, access, principal).events(payload.after))
            )
          )
        )
    })
  })
)

interface CallOptions {
  readonly client: Rpc.ServerClient
  readonly headers: Headers.Headers
}

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

type WithJson<Name extends string> = { readonly [Key in Name]: string }

const nothing = (): void => {}
const same = <A>(answer: A): A => answer

const jsonValue = (text: string, field: string): Effect.Effect<unknown, InvalidInput> =>
  Effect.suspend(() => {
    const value = parseJson(text)
    return value === undefined
      ? Effect.fail(new InvalidInput({ field, expected: "a JSON text", got: describe(text) }))
      : Effect.succeed(value)
  })

/** Items with the JSON text of one of their members as the value that it stands for. */
const jsonItems = <Name extends string>(
  items: ReadonlyArray<WithJson<Name>>,
  field: string,
  name: Name
): Effect.Effect<ReadonlyArray<object>, InvalidInput> =>
  Effect.forEach(items, (item, i) =>
    Effect.map(jsonValue(item[name], `${field}[${i}].${name}`), (value) => ({ ...item, [name]: value }))
  )

const rpcTask = ({ result, task, ...info }: TopicAnswers["task"]) => ({
  ...info,
  ...(task === undefined ? {} : { task: JSON.stringify(task) }),
  ...(result === undefined ? {} : { result: JSON.stringify(result) })
})

const listenEvent = (event: StreamEvent): RpcListenEvent => {
  const { cursor } = event
  switch (event.event) {
    case "listening":
    case "gap":
      return { event: event.event, cursor }
    case "message": {
      const { atMillis, body, id, key } = event.message
      return { event: "message", key, message_id: id, message: body, at_ms: Math.trunc(atMillis), cursor }
    }
    default:
      throw new Error(`${event.event} is no event of a topic`)
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
