/**
 * What is delivered of standing queries and change feeds, whatever the wire. A delivery is asked for its next event when
 * there is room for one, and makes it then: of a standing query the difference between what was sent last and what is
 * current, of a change feed the change after the last one sent. Nothing is queued for who does not ask; all that is kept
 * is the answer that was sent last, or a position.
 *
 * Equal deliveries of one principal that are equally far share each event, its text and its cursor with it.
 */
import { createHash } from "node:crypto"
import { Context, Effect, Layer, Result } from "effect"
import { Settings } from "../config.ts"
import type { Collection } from "../protocol/Collection.ts"
import { type ApiError, InvalidCursor, InvalidInput, Overloaded, PartitionUnavailable } from "../protocol/Errors.ts"
import { defaultCollection } from "../protocol/Fields.ts"
import type { Change } from "../protocol/IndexPartition.ts"
import { answerComponentsMax } from "../protocol/Limits.ts"
import type { Principal } from "../protocol/Principal.ts"
import { defaultK } from "../protocol/Search.ts"
import type { FollowRequest, SlowPolicy, SubscribeRequest } from "../protocol/Subscription.ts"
import { shownError, shownName, storedName } from "../protocol/Tenant.ts"
import { ChangeFeeds, type ChangeFollower, type FeedState } from "../shards/ChangeFeeds.ts"
import { Router } from "../shards/Router.ts"
import {
  type StandingMember,
  StandingQueries,
  type StandingQuery,
  type StandingState
} from "../shards/StandingQueries.ts"
import { Access } from "./Access.ts"
import { type AnswerDifference, differenceFromKnown, differenceOf, isEmpty } from "./AnswerChanges.ts"
import { type Binding, Cursors, type KnownMembers } from "./Cursors.ts"
import type { StreamEvent } from "./StreamEvents.ts"
import * as StreamEvents from "./StreamEvents.ts"

export interface Delivery {
  readonly policy: SlowPolicy
  /** The next event; what it answers counts as sent. `undefined`: there is none now, and `onReady` is called when there is. */
  readonly next: () => StreamEvent | undefined
  readonly close: () => void
}

/** Called synchronously; must not throw. Not called before the delivery is there, nor after it was closed. */
export interface DeliveryListener {
  readonly onReady: () => void
  /** It can be gone on with no longer, and is closed. */
  readonly onLost: (error: ApiError) => void
}

/** An owner that is behind a cursor is given this long to catch up. */
const behindMillis = 3_000
const behindLookMillis = 50

export class Subscriptions extends Context.Service<
  Subscriptions,
  {
    readonly subscribe: (
      whose: Principal,
      request: SubscribeRequest,
      listener: DeliveryListener
    ) => Effect.Effect<Delivery, ApiError>
    readonly follow: (
      whose: Principal,
      request: FollowRequest,
      listener: DeliveryListener
    ) => Effect.Effect<Delivery, ApiError>
    readonly count: () => number
  }
>()("ruvector/gateway/Subscriptions") {
  static readonly layer = Layer.effect(
    Subscriptions,
    Effect.gen(function* () {
      const settings = yield* Settings
      const router = yield* Router
      const access = yield* Access
      const cursors = yield* Cursors
      const feeds = yield* ChangeFeeds
      const standing = yield* StandingQueries
      const answerTexts = new Shared<AnswerTexts>()
      const feedTexts = new Shared<FeedTexts>()
      let open = 0

      /** One more of those that `subscriptionsMax` counts, unless it fails; `end` is called when it has ended. */
      const counted = <A>(make: (end: () => void) => Effect.Effect<A, ApiError>): Effect.Effect<A, ApiError> =>
        Effect.suspend(() => {
          if (open >= settings.subscriptionsMax) {
            return Effect.fail(new Overloaded({ bound: "subscriptionsMax", retryAfterMillis: 5_000 }))
          }
          open += 1
          let ended = false
          const end = () => {
            if (!ended) open -= 1
            ended = true
          }
          return Effect.onExit(make(end), (exit) =>
            Effect.sync(() => {
              if (exit._tag === "Failure") end()
            })
          )
        })

      /** What only who may read the collection is given, and no longer than the credential is good. */
      const allowed = (
        whose: Principal,
        name: string,
        listener: DeliveryListener,
        open: (stored: string, listener: DeliveryListener) => Effect.Effect<Delivery, ApiError>
      ): Effect.Effect<Delivery, ApiError> =>
        Effect.suspend(() => {
          const refusal = access.allow(whose, "read", name)
          if (refusal !== undefined) return Effect.fail(refusal)
          let stopWatch = () => {}
          const lost = (error: ApiError) => {
            stopWatch()
            listener.onLost(shownError(error))
          }
          const opened = open(storedName(whose.tenant, name), { onReady: listener.onReady, onLost: lost })
          return Effect.map(Effect.mapError(opened, shownError), ({ policy, next, close }) => {
            const end = () => {
              stopWatch()
              close()
            }
            stopWatch = access.watch(whose, (error) => {
              end()
              listener.onLost(error)
            })
            return { policy, next, close: end }
          })
        })

      const subscribe = (whose: Principal, request: SubscribeRequest, listener: DeliveryListener) =>
        allowed(whose, request.collection ?? defaultCollection, listener, (name, shown) =>
          answers(whose, name, request, shown)
        )

      const answers = (whose: Principal, name: string, request: SubscribeRequest, listener: DeliveryListener) =>
        counted((end) =>
          Effect.gen(function* () {
            const query = yield* Effect.fromResult(queryOf(name, request))
            const of = yield* router.collection(query.collection)
            const fault = faultOf(of, query)
            if (fault !== undefined) return yield* fault
            const parts = ["standing", whose.tenant, whose.id, of.uid, digestOf(query)]
            const binding = cursors.binding(parts)
            const known = request.cursor === undefined ? undefined : cursors.readAnswer(binding, request.cursor)
            if (request.cursor !== undefined && known === undefined) return yield* new InvalidCursor()
            let delivery: AnswerDelivery | undefined
            const handle = yield* standing.open(query, {
              onChange: () => delivery?.changed(),
              onLost: (error) => delivery?.lost(error)
            })
            const texts = answerTexts.join(parts.join("\n"), () => new AnswerTexts(cursors, binding))
            delivery = new AnswerDelivery(texts.shared, handle.state, known?.members, request.policy, listener, () => {
              handle.close()
              texts.leave()
              end()
            })
            // Its owner has not seen what was given out already: not one to be answered from.
            const { close } = delivery
            if (known !== undefined && known.positions.length === of.partitions) {
              yield* Effect.onExit(caughtUp(of, known.positions, handle.state), (exit) =>
                Effect.sync(() => {
                  if (exit._tag === "Failure") close()
                })
              )
            }
            return delivery satisfies Delivery
          })
        )

      const follow = (whose: Principal, request: FollowRequest, listener: DeliveryListener) =>
        allowed(whose, request.collection ?? defaultCollection, listener, (name, shown) =>
          changes(whose, name, request, shown)
        )

      const changes = (whose: Principal, name: string, request: FollowRequest, listener: DeliveryListener) =>
        counted((end) =>
          Effect.gen(function* () {
            const of = yield* router.collection(name)
            const parts = ["feed", whose.tenant, whose.id, of.uid]
            const binding = cursors.binding(parts)
            const from =
              request.cursor === undefined ? (request.from ?? "newest") : cursors.readFeed(binding, request.cursor)
            if (from === undefined) return yield* new InvalidCursor()
            if (typeof from !== "string" && from.length !== of.partitions) return yield* new InvalidCursor()
            let delivery: FeedDelivery | undefined
            const follower = yield* feeds.open(of, from, {
              onReady: () => delivery?.changed(),
              onLost: (error) => delivery?.lost(error)
            })
            const texts = feedTexts.join(parts.join("\n"), () => new FeedTexts(cursors, binding))
            delivery = new FeedDelivery(texts.shared, follower, request.policy, listener, () => {
              follower.close()
              texts.leave()
              end()
            })
            return delivery satisfies Delivery
          })
        )

      return Subscriptions.of({ subscribe, follow, count: () => open })
    })
  )
}

/** The rules that a search's query has, and those of a standing one. */
const queryOf = (collection: string, request: SubscribeRequest): Result.Result<StandingQuery, InvalidInput> => {
  const { query, query_b64, query_vector_id } = request
  const given = Number(query !== undefined) + Number(query_b64 !== undefined) + Number(query_vector_id !== undefined)
  if (given !== 1) {
    return Result.fail(
      new InvalidInput({
        field: "query",
        expected: "exactly one of query, query_b64 and query_vector_id",
        got: given === 0 ? "none" : String(given)
      })
    )
  }
  const vector = query ?? query_b64
  return Result.succeed({
    collection,
    ...(vector === undefined ? { vectorId: query_vector_id as string } : { vector }),
    k: request.k ?? defaultK,
    minScore: request.min_score ?? Number.NEGATIVE_INFINITY,
    filter: request.filter === undefined ? "" : JSON.stringify(request.filter),
    includeMetadata: request.include?.includes("metadata") ?? false,
    includeVector: request.include?.includes("vector") ?? false
  })
}

const faultOf = (of: Collection, query: StandingQuery): InvalidInput | undefined => {
  if (query.includeVector && query.k * of.dimensions > answerComponentsMax) {
    const expected = `at most ${Math.trunc(answerComponentsMax / of.dimensions)} where vectors are included`
    return new InvalidInput({ field: "k", expected, got: String(query.k) })
  }
  if (query.vector === undefined) return undefined
  if (query.vector.length !== of.dimensions) {
    const expected = `${of.dimensions} numbers, the dimensions of collection ${shownName(of.name)}`
    return new InvalidInput({ field: "query", expected, got: String(query.vector.length) })
  }
  if (of.metric === "cosine" && query.vector.every((component) => component === 0)) {
    return new InvalidInput({
      field: "query",
      expected: "a vector that is not zero (metric cosine)",
      got: "all zeros"
    })
  }
  return undefined
}

/** Equal for equal standing queries, and for no others. */
const digestOf = (query: StandingQuery): string => {
  const { vector, vectorId, k, minScore, filter, includeMetadata, includeVector } = query
  const digest = createHash("sha256")
  digest.update(JSON.stringify([vectorId ?? null, k, String(minScore), filter, includeMetadata, includeVector]))
  if (vector !== undefined) digest.update(new Uint8Array(vector.buffer, vector.byteOffset, vector.byteLength))
  return digest.digest("base64url")
}

/** Waits until an answer is at least as new as positions. */
const caughtUp = (
  of: Collection,
  positions: ReadonlyArray<number>,
  state: () => StandingState
): Effect.Effect<void, PartitionUnavailable> => {
  const until = performance.now() + behindMillis
  const look: Effect.Effect<void, PartitionUnavailable> = Effect.suspend(() => {
    const now = state().positions
    const partition = positions.findIndex((position, i) => (now[i] ?? 0) < position)
    if (partition === -1) return Effect.void
    if (performance.now() < until) return Effect.delay(look, behindLookMillis)
    const detail = "What answers for it is behind the cursor."
    return Effect.fail(new PartitionUnavailable({ collection: of.name, partition, detail, retryAfterMillis: 1_000 }))
  })
  return look
}

/** Things shared by those who have joined under one name. */
class Shared<A> {
  readonly #all = new Map<string, { readonly shared: A; joined: number }>()

  join(name: string, make: () => A): { readonly shared: A; readonly leave: () => void } {
    const found = this.#all.get(name) ?? { shared: make(), joined: 0 }
    found.joined += 1
    this.#all.set(name, found)
    return {
      shared: found.shared,
      leave: () => {
        found.joined -= 1
        if (found.joined === 0) this.#all.delete(name)
      }
    }
  }
}

type Members = ReadonlyArray<StandingMember>

/** The events of equal standing queries of one principal, each made once. */
class AnswerTexts {
  readonly cursors: Cursors["Service"]
  readonly #binding: Binding
  /** Of the answer that was asked for last: the event that tells it whole. */
  #whole: { readonly of: Members; readonly event: StreamEvent } | undefined
  /**
   * The answer that was gone to last, and by the answer before the event that says so; `undefined` where nothing is to be
   * said. All who keep up ask for the same one; those behind come from others, one
   * for each listener at most.
   */
  #to: Members | undefined
  readonly #steps = new Map<Members, StreamEvent | undefined>()

  constructor(cursors: Cursors["Service"], binding: Binding) {
    this.cursors = cursors
    this.#binding = binding
  }

  subscribed(state: StandingState): StreamEvent {
    if (this.#whole?.of === state.members) return this.#whole.event
    const event = StreamEvents.subscribed(state.members, this.#cursor(state))
    this.#whole = { of: state.members, event }
    return event
  }

  resumed(known: KnownMembers, state: StandingState): StreamEvent {
    const { keep, ...difference } = differenceFromKnown(known, state.members, this.cursors)
    return StreamEvents.resumed(keep, difference, this.#cursor(state))
  }

  step(from: Members, state: StandingState): StreamEvent | undefined {
    if (this.#to !== state.members) {
      this.#to = state.members
      this.#steps.clear()
    }
    const found = this.#steps.get(from)
    if (found !== undefined || this.#steps.has(from)) return found
    const difference: AnswerDifference = differenceOf(from, state.members)
    const event = isEmpty(difference) ? undefined : StreamEvents.changes(difference, this.#cursor(state))
    this.#steps.set(from, event)
    return event
  }

  #cursor({ positions, members }: StandingState): string {
    return this.cursors.ofAnswer(this.#binding, positions, members)
  }
}

/** What deliveries have in common: they are told of until they are closed, by their reader or by what was lost. */
abstract class OpenDelivery implements Delivery {
  readonly policy: SlowPolicy
  readonly #listener: DeliveryListener
  readonly #onClose: () => void
  #closed = false

  constructor(policy: SlowPolicy | undefined, listener: DeliveryListener, onClose: () => void) {
    this.policy = policy ?? "coalesce"
    this.#listener = listener
    this.#onClose = onClose
  }

  /** The next event, while it is open. */
  protected abstract event(): StreamEvent | undefined

  readonly next = (): StreamEvent | undefined => (this.#closed ? undefined : this.event())

  readonly close = (): void => {
    if (this.#closed) return
    this.#closed = true
    this.#onClose()
  }

  changed(): void {
    if (!this.#closed) this.#listener.onReady()
  }

  lost(error: ApiError): void {
    if (this.#closed) return
    this.close()
    this.#listener.onLost(error)
  }
}

class AnswerDelivery extends OpenDelivery {
  readonly #texts: AnswerTexts
  readonly #state: () => StandingState
  #known: KnownMembers | undefined
  #sent: Members | undefined

  constructor(
    texts: AnswerTexts,
    state: () => StandingState,
    known: KnownMembers | undefined,
    policy: SlowPolicy | undefined,
    listener: DeliveryListener,
    onClose: () => void
  ) {
    super(policy, listener, onClose)
    this.#texts = texts
    this.#state = state
    this.#known = known
  }

  protected override event(): StreamEvent | undefined {
    const state = this.#state()
    const sent = this.#sent
    if (sent === state.members) return undefined
    this.#sent = state.members
    if (sent !== undefined) return this.#texts.step(sent, state)
    const known = this.#known
    this.#known = undefined
    return known === undefined ? this.#texts.subscribed(state) : this.#texts.resumed(known, state)
  }
}

/** The events of the followers of one principal, each made once for those that are equally far. */
class FeedTexts {
  readonly #cursors: Cursors["Service"]
  readonly #binding: Binding
  readonly #events = new WeakMap<FeedState, { readonly change: Change; readonly event: StreamEvent }>()

  constructor(cursors: Cursors["Service"], binding: Binding) {
    this.#cursors = cursors
    this.#binding = binding
  }

  cursor({ positions }: FeedState): string {
    return this.#cursors.ofFeed(this.#binding, positions)
  }

  change(change: Change, state: FeedState): StreamEvent {
    const found = this.#events.get(state)
    if (found !== undefined && found.change === change) return found.event
    const event = StreamEvents.change(change, this.cursor(state))
    this.#events.set(state, { change, event })
    return event
  }
}

class FeedDelivery extends OpenDelivery {
  readonly #texts: FeedTexts
  readonly #follower: ChangeFollower
  #begun = false

  constructor(
    texts: FeedTexts,
    follower: ChangeFollower,
    policy: SlowPolicy | undefined,
    listener: DeliveryListener,
    onClose: () => void
  ) {
    super(policy, listener, onClose)
    this.#texts = texts
    this.#follower = follower
  }

  protected override event(): StreamEvent | undefined {
    if (!this.#begun) {
      this.#begun = true
      return StreamEvents.feed("following", this.#texts.cursor(this.#follower.state()))
    }
    const followed = this.#follower.next()
    if (followed === undefined) return undefined
    return followed.kind === "change"
      ? this.#texts.change(followed.change, followed.state)
      : StreamEvents.feed("resync", this.#texts.cursor(followed.state))
  }
}
