/**
 * Queries that stand: their answers are kept as records change, and whoever listens is told. Equal queries are registered
 * once, at each partition of their collection; the partitions' shares are merged into one answer here.
 *
 * **A partition that is gone.** Until it is back, its share stays as it was. One that was let go to make room sleeps: it
 * cannot change, so nothing is asked of it; whoever wakes it, a writer mostly, brings its queries back with it. One that was
 * lost (its thread died) is opened again, at growing intervals while that fails. Either way the queries are registered anew
 * and the difference is told.
 */
import { createHash } from "node:crypto"
import { Context, Deferred, Effect, Exit, Fiber, Layer, Option, Stream } from "effect"
import { Settings } from "../config.ts"
import type { Collection } from "../protocol/Collection.ts"
import {
  type ApiError,
  CollectionNotFound,
  InvalidInput,
  Overloaded,
  PartitionUnavailable
} from "../protocol/Errors.ts"
import {
  IndexPartition,
  type PartitionError,
  partitionAddressOf,
  partitionId,
  partitionsGroup
} from "../protocol/IndexPartition.ts"
import { standingMembersMax } from "../protocol/Limits.ts"
import type { PartitionWatch, StandingMember, WatchChange } from "../protocol/StandingQuery.ts"
import { Calls } from "./Calls.ts"
import { type DeliveryError, isDelivery } from "./Delivery.ts"
import { LocalActors, type LocalPartition } from "./LocalActors.ts"
import { Router } from "./Router.ts"
import { mergeMembers, StandingShare } from "./StandingShare.ts"

export type { StandingMember } from "../protocol/StandingQuery.ts"

export interface StandingQuery {
  readonly collection: string
  /** One of the two; a record's vector is the one that it has when the query is opened. */
  readonly vector?: Float32Array
  readonly vectorId?: string
  readonly k: number
  /** -Infinity: none. */
  readonly minScore: number
  /** JSON text of a filter that `checkFilter` has passed; empty for none. */
  readonly filter: string
  readonly includeMetadata: boolean
  readonly includeVector: boolean
}

export interface StandingState {
  /** Nearest first, at most k. A new array each time the answer changes; members that did not change are the same objects. */
  readonly members: ReadonlyArray<StandingMember>
  /** By partition the log position that this answer is exact to. */
  readonly positions: ReadonlyArray<number>
  readonly collection: Collection
}

export interface StandingListener {
  /** Called in the turn in which the answer changes, at most once for what a partition commits at once. */
  readonly onChange: (state: StandingState) => void
  /** The query stands no longer: its collection is deleted. */
  readonly onLost: (error: ApiError) => void
}

export interface OpenStandingQuery {
  readonly state: () => StandingState
  /** Nothing is told afterwards. */
  readonly close: () => void
}

export class StandingQueries extends Context.Service<
  StandingQueries,
  {
    /** Opens a standing query or joins an equal one; the first answer is there when this succeeds. */
    readonly open: (query: StandingQuery, listener: StandingListener) => Effect.Effect<OpenStandingQuery, ApiError>
    /** Different queries that stand. */
    readonly size: () => number
  }
>()("ruvector/shards/StandingQueries") {
  static readonly layer = Layer.effect(
    StandingQueries,
    Effect.gen(function* () {
      const { standingQueriesMax, standingRetryMillis, activationDeadlineMillis } = yield* Settings
      const calls = yield* Calls
      const local = yield* LocalActors
      const router = yield* Router
      const clientOf = yield* IndexPartition.client
      const runFork = Effect.runForkWith(yield* Effect.context<never>())
      const scope = yield* Effect.scope
      const standing = new Map<string, Standing>()
      const hubs = new Map<string, Hub>()
      yield* Effect.addFinalizer(() =>
        Effect.sync(() => {
          for (const one of standing.values()) end(one)
        })
      )

      /** Makes the partition resident, also where it only seems to be. */
      const wake = (hub: Hub): Effect.Effect<unknown, PartitionError> =>
        Effect.mapError(
          calls.to(
            { group: partitionsGroup, id: hub.entityId },
            clientOf(hub.entityId).Activate(),
            () => unreachable(hub.entityId),
            activationDeadlineMillis
          ),
          (error) => delivered(hub.entityId, error)
        )

      const hubOf = (entityId: string): Hub => {
        let hub = hubs.get(entityId)
        if (hub === undefined) {
          const made: Hub = {
            entityId,
            sides: new Set(),
            failures: 0,
            retrying: undefined,
            registering: false,
            again: false,
            leave: () => {}
          }
          made.leave = local.followPartition(entityId, {
            onResident: () => runFork(Effect.forkIn(registerAll(made), scope)),
            onRemoved: () => lost(made, new CollectionNotFound({ collection: partitionAddressOf(entityId).collection }))
          })
          hubs.set(entityId, made)
          hub = made
        }
        return hub
      }

      /** Registers the query at the partition, here or where it is; its share is there when this succeeds. */
      const register = (side: Side): Effect.Effect<void, PartitionError> =>
        Effect.suspend(() => {
          const turn = ++side.turn
          const isCurrent = () => side.turn === turn && !side.standing.ended
          const { hub } = side
          const onChange = (change: WatchChange) => {
            if (isCurrent()) changed(side, change)
          }
          const onLost = () => {
            if (!isCurrent()) return
            side.close = undefined
            side.resident = undefined
            // Where it is let go of, it is gone from the list before its queries are told.
            if (local.partitions.has(hub.entityId)) retry(hub)
          }
          const kept = (close: () => void, resident: LocalPartition | undefined) => {
            if (!isCurrent()) return close()
            side.close = close
            side.resident = resident
          }
          const query = side.standing.watch(side)
          const resident = local.partitions.get(hub.entityId)
          if (resident !== undefined) {
            return Effect.map(resident.watch(query, { onChange, onLost }), ({ close }) => kept(close, resident))
          }
          return Effect.andThen(
            wake(hub),
            Effect.suspend(() => {
              const woken = local.partitions.get(hub.entityId)
              if (woken === undefined) return registerRemote(side, query, onChange, kept)
              // As the one who follows the partition was told.
              if (!isCurrent()) return Effect.void
              return Effect.map(woken.watch(query, { onChange, onLost }), ({ close }) => kept(close, woken))
            })
          )
        })

      const registerRemote = (
        side: Side,
        query: PartitionWatch,
        onChange: (change: WatchChange) => void,
        kept: (close: () => void, resident: undefined) => void
      ): Effect.Effect<void, PartitionError> =>
        Effect.gen(function* () {
          const { hub } = side
          const first = Deferred.makeUnsafe<void, PartitionError>()
          const stream = clientOf(hub.entityId)
            .Watch(query)
            .pipe(
              Stream.mapError((error) => delivered(hub.entityId, error)),
              Stream.runForEach((change) =>
                Effect.sync(() => {
                  onChange(change)
                  Deferred.doneUnsafe(first, Effect.void)
                })
              )
            )
          const fiber = yield* Effect.forkIn(stream, scope)
          fiber.addObserver((exit): void => {
            const error = Option.getOrElse(Exit.findErrorOption(exit), () => unreachable(hub.entityId))
            side.close = undefined
            if (Deferred.doneUnsafe(first, Effect.fail(error))) return
            if (!side.standing.ended) failed(hub, error)
          })
          kept(() => runFork(Fiber.interrupt(fiber)), undefined)
          yield* Deferred.await(first)
        })

      /** Registers anew what has lost its registration. */
      const registerAll = (hub: Hub): Effect.Effect<void> =>
        Effect.suspend(() => {
          hub.again = true
          if (hub.registering) return Effect.void
          hub.registering = true
          return Effect.ensuring(
            registerLost(hub),
            Effect.sync(() => (hub.registering = false))
          )
        })

      const registerLost = (hub: Hub): Effect.Effect<void> =>
        Effect.suspend(() => {
          if (!hub.again) return Effect.void
          hub.again = false
          const sides = [...hub.sides].filter(({ standing, close }) => standing.opened && close === undefined)
          return Effect.andThen(
            Effect.forEach(
              sides,
              (side) => Effect.catch(register(side), (error) => Effect.sync(() => failed(hub, error))),
              {
                concurrency: registeredAtOnce,
                discard: true
              }
            ),
            registerLost(hub)
          )
        })

      const failed = (hub: Hub, error: PartitionError): void => {
        if (error._tag === "CollectionNotFound") lost(hub, error)
        else retry(hub)
      }

      /** Opens the partition again, after a while that grows with each failure. */
      const retry = (hub: Hub): void => {
        if (hub.retrying !== undefined || hub.sides.size === 0) return
        const longest = Math.min(standingRetryMillis, retryMillisMin * 2 ** hub.failures)
        hub.failures += 1
        hub.retrying = runFork(
          Effect.sleep(longest * (0.5 + Math.random() / 2)).pipe(
            Effect.andThen(wake(hub)),
            Effect.matchEffect({
              onFailure: (error) =>
                Effect.sync(() => {
                  hub.retrying = undefined
                  failed(hub, error)
                }),
              onSuccess: () =>
                Effect.suspend(() => {
                  hub.retrying = undefined
                  hub.failures = 0
                  return registerAll(hub)
                })
            }),
            Effect.forkIn(scope)
          )
        )
      }

      const lost = (hub: Hub, error: ApiError): void => {
        for (const { standing: one } of [...hub.sides]) {
          const listeners = [...one.listeners]
          end(one)
          for (const { onLost } of listeners) onLost(error)
        }
      }

      const changed = (side: Side, change: WatchChange): void => {
        const { standing: one } = side
        side.share.apply(change)
        side.isHeld = change.held
        if (!change.held) side.seq = Math.max(side.seq, change.seq)
        if (!one.opened) return
        const before = one.state.members
        const members = mergeMembers(
          one.sides.map(({ share }) => share.members),
          one.query.k
        )
        if (members.length === before.length && members.every((member, i) => member === before[i])) return
        one.state = { members, positions: one.sides.map(positionOf), collection: one.collection }
        for (const { onChange } of [...one.listeners]) onChange(one.state)
      }

      const end = (one: Standing): void => {
        if (one.ended) return
        one.ended = true
        one.listeners.clear()
        if (standing.get(one.key) === one) standing.delete(one.key)
        for (const side of one.sides) {
          const { hub } = side
          side.close?.()
          side.close = undefined
          hub.sides.delete(side)
          if (hub.sides.size > 0) continue
          hub.leave()
          if (hubs.get(hub.entityId) === hub) hubs.delete(hub.entityId)
        }
      }

      const begin = (key: string, collection: Collection, query: StandingQuery, vector: Float32Array): Standing => {
        const one = new Standing(key, collection, query, vector)
        for (let partition = 0; partition < collection.partitions; partition++) {
          const hub = hubOf(partitionId({ collection: collection.name, uid: collection.uid, partition }))
          const side = new Side(one, hub)
          hub.sides.add(side)
          one.sides.push(side)
        }
        standing.set(key, one)
        const opening = Effect.forEach(one.sides, register, { concurrency: "unbounded", discard: true })
        const fiber = runFork(Effect.forkIn(opening, scope).pipe(Effect.flatMap(Fiber.join)))
        fiber.addObserver((exit) => {
          if (Exit.isSuccess(exit) && !one.ended) {
            one.opened = true
            const members = mergeMembers(
              one.sides.map(({ share }) => share.members),
              query.k
            )
            one.state = { members, positions: one.sides.map(positionOf), collection }
            // What was lost meanwhile.
            for (const side of one.sides) if (side.close === undefined) retry(side.hub)
          } else end(one)
          const error = Option.getOrElse(Exit.findErrorOption(exit), () => unreachable(one.sides[0]!.hub.entityId))
          Deferred.doneUnsafe(one.ready, Exit.isSuccess(exit) ? Effect.void : Effect.fail(error))
        })
        return one
      }

      const openIn = Effect.fnUntraced(function* (
        collection: Collection,
        query: StandingQuery,
        listener: StandingListener
      ) {
        const vector = query.vector ?? (yield* router.get(collection.name, query.vectorId ?? "")).vector
        const fault = faultOf(collection, query, vector)
        if (fault !== undefined) return yield* fault
        const key = keyOf(collection, query, vector)
        let one = standing.get(key)
        if (one === undefined) {
          if (standing.size >= standingQueriesMax) {
            return yield* new Overloaded({ bound: "standingQueriesMax", retryAfterMillis: 1_000 })
          }
          one = begin(key, collection, query, vector)
        }
        const joined = one
        const mine: StandingListener = { ...listener }
        joined.listeners.add(mine)
        const close = () => {
          joined.listeners.delete(mine)
          if (joined.listeners.size === 0) end(joined)
        }
        yield* Effect.onError(Deferred.await(joined.ready), () => Effect.sync(close))
        return {
          state: () => {
            if (!joined.sides.every((side, i) => positionOf(side) === joined.state.positions[i])) {
              joined.state = { ...joined.state, positions: joined.sides.map(positionOf) }
            }
            return joined.state
          },
          close
        }
      })

      const open = (query: StandingQuery, listener: StandingListener): Effect.Effect<OpenStandingQuery, ApiError> =>
        Effect.flatMap(router.collection(query.collection), (collection) =>
          Effect.catchTag(openIn(collection, query, listener), "CollectionNotFound", (error) =>
            // The collection at hand may be one that is deleted, under the name of another by now.
            Effect.flatMap(router.refresh(query.collection), (fresh) =>
              fresh.uid === collection.uid ? Effect.fail(error) : openIn(fresh, query, listener)
            )
          )
        )

      return StandingQueries.of({ open, size: () => standing.size })
    })
  )
}

/** A query that stands, for all who listen to it. */
class Standing {
  readonly key: string
  readonly collection: Collection
  readonly query: StandingQuery
  readonly vector: Float32Array
  readonly listeners = new Set<StandingListener>()
  readonly sides: Array<Side> = []
  readonly ready = Deferred.makeUnsafe<void, ApiError>()
  state: StandingState
  /** All shares are there. */
  opened = false
  ended = false

  constructor(key: string, collection: Collection, query: StandingQuery, vector: Float32Array) {
    this.key = key
    this.collection = collection
    this.query = query
    this.vector = vector
    this.state = { members: [], positions: [], collection }
  }

  /** What one partition is asked. */
  watch({ share }: Side): PartitionWatch {
    const { k, minScore, filter, includeMetadata, includeVector } = this.query
    return {
      vector: this.vector,
      k,
      ...(minScore === Number.NEGATIVE_INFINITY ? {} : { minScore }),
      filter,
      includeMetadata,
      includeVector,
      seeds: share.members.map(({ id }) => id)
    }
  }
}

/** A standing query at one partition. */
class Side {
  readonly standing: Standing
  readonly hub: Hub
  readonly share = new StandingShare()
  seq = 0
  isHeld = false
  /** Which registration counts. */
  turn = 0
  close: (() => void) | undefined
  /** Where it is in this process. */
  resident: LocalPartition | undefined

  constructor(standing: Standing, hub: Hub) {
    this.standing = standing
    this.hub = hub
  }
}

/** A partition and the standing queries at it. */
interface Hub {
  readonly entityId: string
  readonly sides: Set<Side>
  /** Attempts to open it again that failed in a row. */
  failures: number
  retrying: Fiber.Fiber<unknown, unknown> | undefined
  /** Whether queries are being registered anew, and whether it is to be looked for more once they are. */
  registering: boolean
  again: boolean
  leave: () => void
}

/** Queries of one partition on their way to it at once; writes go in between. */
const registeredAtOnce = 8

/** Wait before a lost partition is asked again for the first time. */
const retryMillisMin = 50

const positionOf = ({ seq, isHeld, resident }: Side): number =>
  isHeld || resident === undefined ? seq : Math.max(seq, resident.position())

const keyOf = (collection: Collection, query: StandingQuery, vector: Float32Array): string => {
  const { k, minScore, filter, includeMetadata, includeVector } = query
  const bytes = new Uint8Array(vector.buffer, vector.byteOffset, vector.byteLength)
  const digest = createHash("sha256").update(bytes).digest("base64url")
  return JSON.stringify([collection.uid, digest, k, String(minScore), filter, includeMetadata, includeVector])
}

const faultOf = (
  collection: Collection,
  { k, minScore }: StandingQuery,
  vector: Float32Array
): InvalidInput | undefined => {
  if (vector.length !== collection.dimensions) {
    const expected = `${collection.dimensions} numbers, the dimensions of collection ${collection.name}`
    return new InvalidInput({ field: "query", expected, got: `${vector.length}` })
  }
  if (collection.metric === "cosine" && vector.every((component) => component === 0)) {
    const expected = "a vector that is not zero (metric cosine)"
    return new InvalidInput({ field: "query", expected, got: "all zeros" })
  }
  if (!(Number.isSafeInteger(k) && k >= 1 && k <= standingMembersMax)) {
    return new InvalidInput({ field: "k", expected: `an integer from 1 to ${standingMembersMax}`, got: String(k) })
  }
  if (Number.isNaN(minScore) || minScore === Number.POSITIVE_INFINITY) {
    return new InvalidInput({ field: "min_score", expected: "a finite number", got: String(minScore) })
  }
  return undefined
}

const unreachable = (entityId: string): PartitionUnavailable => {
  const { collection, partition } = partitionAddressOf(entityId)
  return new PartitionUnavailable({
    collection,
    partition,
    detail: "It cannot be reached now.",
    retryAfterMillis: 1_000
  })
}

const delivered = (entityId: string, error: PartitionError | DeliveryError): PartitionError => {
  if (!isDelivery(error)) return error
  return error._tag === "MailboxFull"
    ? new Overloaded({ bound: "mailbox", retryAfterMillis: 250 })
    : unreachable(entityId)
}
