/**
 * Followers of a collection's changes: the feeds of its partitions merged, every change once, in log order per partition.
 * A follower holds its positions and reads by them; nothing is queued for one that does not read, and an idle one holds
 * no fiber.
 *
 * A partition resident here is read directly. One that is passivated here has no changes until it is resident again. The
 * changes of one that another node owns are mirrored: one stream for all who follow it.
 */
import { Context, Effect, Exit, type Fiber, Layer, Option, Semaphore, Stream } from "effect"
import type { EntityId } from "effect/cluster"
import * as Sharding from "effect/cluster/Sharding"
import { Settings } from "../config.ts"
import { Catalog, catalogId } from "../protocol/Catalog.ts"
import type { Collection } from "../protocol/Collection.ts"
import { type ApiError, CollectionNotFound, PartitionUnavailable } from "../protocol/Errors.ts"
import {
  type Change,
  type ChangePage,
  type ChangePosition,
  Compacted,
  endOfObject,
  IndexPartition,
  isBefore,
  partitionId,
  partitionsGroup
} from "../protocol/IndexPartition.ts"
import { Calls } from "./Calls.ts"
import { ChangeFeed } from "./ChangeFeed.ts"
import { isDelivery } from "./Delivery.ts"
import { LocalActors, type LocalChanges } from "./LocalActors.ts"

/** How far a follower is. The same object for all who are equally far and follow closely. */
export interface FeedState {
  /** By partition. */
  readonly positions: ReadonlyArray<ChangePosition>
}

export type Followed =
  | { readonly kind: "change"; readonly change: Change; readonly state: FeedState }
  /** Changes after where the follower was are gone; it goes on with the oldest that are kept. */
  | { readonly kind: "resync"; readonly state: FeedState }

export interface ChangeFollower {
  readonly state: () => FeedState
  /** What comes next, where it is at hand. `undefined`: there is none now, and `onReady` is called when there may be. */
  readonly next: () => Followed | undefined
  readonly close: () => void
}

/** Called synchronously; must not throw. */
export interface FollowListener {
  readonly onReady: () => void
  /** The collection is gone. */
  readonly onLost: (error: ApiError) => void
}

/** Where to begin: after the newest change, with the oldest that is kept, or after positions. */
export type FollowFrom = "newest" | "oldest" | ReadonlyArray<ChangePosition>

/** Changes that a follower looks at together. */
const pageMax = 64

/** Between two looks at where partitions are that are not resident here, and after a read that failed. */
const lookMillis = 2_000

/** An owner that is behind a position is given this long to catch up. */
const behindMillis = 3_000

export class ChangeFeeds extends Context.Service<
  ChangeFeeds,
  {
    readonly open: (
      of: Collection,
      from: FollowFrom,
      listener: FollowListener
    ) => Effect.Effect<ChangeFollower, ApiError>
    /** Followers of this node. */
    readonly count: () => number
  }
>()("ruvector/shards/ChangeFeeds") {
  static readonly layer = Layer.effect(
    ChangeFeeds,
    Effect.gen(function* () {
      const sharding = yield* Sharding.Sharding
      return yield* make((entityId) =>
        sharding.hasShardId(
          sharding.getShardId(
            entityId as EntityId.EntityId,
            IndexPartition.getShardGroup(entityId as EntityId.EntityId)
          )
        )
      )
    })
  )

  /** `isOurs`: whether this node is to hold the partition. */
  static readonly layerWith = (isOurs: (entityId: string) => boolean) => Layer.effect(ChangeFeeds, make(isOurs))
}

const make = Effect.fnUntraced(function* (isOurs: (entityId: string) => boolean) {
  const settings = yield* Settings
  const local = yield* LocalActors
  const calls = yield* Calls
  const client = yield* IndexPartition.client
  const catalog = (yield* Catalog.client)(catalogId)
  const run = Effect.runForkWith(yield* Effect.context<never>())
  const feeds = new Map<string, CollectionFeed>()
  const reads = yield* Semaphore.make(settings.changeReadsMax)

  const hub: Hub = {
    local,
    isOurs,
    run,
    mirrorMax: settings.changeBufferMax,
    read: (of, partition, entityId, { seq, index }, limit) =>
      Effect.mapError(
        calls.to({ group: partitionsGroup, id: entityId }, client(entityId).ReadChanges({ seq, index, limit }), () =>
          unreachable(of, partition)
        ),
        (error) => (isDelivery(error) ? unreachable(of, partition) : error)
      ),
    follow: (entityId, { seq, index }) => client(entityId).Changes({ seq, index }),
    reading: (read) => reads.withPermit(read),
    stillThere: (of) =>
      Effect.map(
        Effect.result(
          calls.to({ group: "default", id: catalogId }, catalog.Read({ name: of.name }), () => unreachable(of, 0))
        ),
        (found) =>
          found._tag === "Success" ? found.success.uid === of.uid : found.failure._tag !== "CollectionNotFound"
      )
  }

  const timer = setInterval(() => {
    for (const feed of feeds.values()) feed.look()
  }, lookMillis)
  timer.unref()
  yield* Effect.addFinalizer(() =>
    Effect.sync(() => {
      clearInterval(timer)
      for (const feed of feeds.values()) feed.close()
      feeds.clear()
    })
  )

  const feedOf = (of: Collection): CollectionFeed => {
    const found = feeds.get(of.uid)
    if (found !== undefined) return found
    const made = new CollectionFeed(hub, of, () => feeds.delete(of.uid))
    feeds.set(of.uid, made)
    return made
  }

  return ChangeFeeds.of({
    open: Effect.fnUntraced(function* (of: Collection, from: FollowFrom, listener: FollowListener) {
      const feed = feedOf(of)
      const follower = new Follower(feed, hub, listener)
      feed.followers.add(follower)
      // Whatever keeps it from opening, it is no follower then.
      yield* Effect.onExit(follower.open(from), (exit) =>
        Effect.sync(() => {
          if (exit._tag === "Failure") follower.close()
        })
      )
      return follower
    }),
    count: () => {
      let sum = 0
      for (const feed of feeds.values()) sum += feed.followers.size
      return sum
    }
  })
})

interface Hub {
  readonly local: LocalActors["Service"]
  readonly isOurs: (entityId: string) => boolean
  readonly run: <A, E>(effect: Effect.Effect<A, E>) => Fiber.Fiber<A, E>
  readonly mirrorMax: number
  readonly read: (
    of: Collection,
    partition: number,
    entityId: string,
    position: ChangePosition,
    limit: number
  ) => Effect.Effect<ChangePage, ApiError | Compacted>
  readonly follow: (entityId: string, position: ChangePosition) => Stream.Stream<Change, unknown>
  /** Bounds how many read at once. */
  readonly reading: <A, E>(read: Effect.Effect<A, E>) => Effect.Effect<A, E>
  readonly stillThere: (of: Collection) => Effect.Effect<boolean>
}

/** The partitions of a collection that is followed, for all who follow it. */
class CollectionFeed {
  readonly collection: Collection
  readonly followers = new Set<Follower>()
  readonly sources: ReadonlyArray<Source>
  readonly #onIdle: () => void
  readonly #hub: Hub
  /** States by the change that led to them. */
  readonly #states = new WeakMap<Change, Array<WeakRef<FeedState>>>()
  #newest: WeakRef<FeedState> | undefined

  constructor(hub: Hub, collection: Collection, onIdle: () => void) {
    this.#hub = hub
    this.collection = collection
    this.#onIdle = onIdle
    this.sources = Array.from({ length: collection.partitions }, (_, partition) => {
      const onNews = () => {
        for (const follower of this.followers) follower.news(partition)
      }
      return new Source(hub, collection, partition, onNews, () => this.#check())
    })
  }

  look(): void {
    for (const source of this.sources) source.look()
  }

  leave(follower: Follower): void {
    if (!this.followers.delete(follower) || this.followers.size > 0) return
    this.close()
    this.#onIdle()
  }

  close(): void {
    for (const source of this.sources) source.close()
  }

  lost(): void {
    const error = new CollectionNotFound({ collection: this.collection.name })
    for (const follower of [...this.followers]) follower.lost(error)
  }

  /** The state after the newest changes. */
  newest(): FeedState {
    const positions = this.sources.map((source) => source.newest())
    const last = this.#newest?.deref()
    if (last !== undefined && samePositions(last.positions, positions)) return last
    const state = { positions }
    this.#newest = new WeakRef(state)
    return state
  }

  /** The state after one more change. */
  after(state: FeedState, partition: number, change: Change): FeedState {
    const candidates = this.#states.get(change)
    for (const candidate of candidates ?? []) {
      const known = candidate.deref()
      if (known !== undefined && followsOn(known.positions, state.positions, partition)) return known
    }
    const next = moved(state, partition, change.last === true ? { seq: change.seq, index: endOfObject } : change)
    if (candidates === undefined) this.#states.set(change, [new WeakRef(next)])
    else {
      if (candidates.length >= sharedStatesMax) candidates.shift()
      candidates.push(new WeakRef(next))
    }
    return next
  }

  /** A partition has gone: perhaps its collection was deleted. */
  #check(): void {
    if (this.followers.size === 0) return
    this.#hub.run(this.#hub.stillThere(this.collection)).addObserver((exit) => {
      if (exit._tag === "Success" && !exit.value) this.lost()
    })
  }
}

/** States known after one change: followers may be at different places in other partitions. */
const sharedStatesMax = 4

/** Where one partition's changes are had from. */
class Source {
  readonly #hub: Hub
  readonly #of: Collection
  readonly #partition: number
  readonly #entityId: string
  readonly #onNews: () => void
  readonly #onGone: () => void
  readonly #stop: () => void
  #changes: LocalChanges | undefined
  #unlisten: (() => void) | undefined
  /** Of a partition that another node owns. */
  #mirror: ChangeFeed | undefined
  #mirroring: Fiber.Fiber<unknown, unknown> | undefined
  /** What is known of its newest change while nothing can be asked. */
  #known: ChangePosition = { seq: 0, index: 0 }

  constructor(hub: Hub, of: Collection, partition: number, onNews: () => void, onGone: () => void) {
    this.#hub = hub
    this.#of = of
    this.#partition = partition
    this.#entityId = partitionId({ collection: of.name, uid: of.uid, partition })
    this.#onNews = onNews
    this.#onGone = onGone
    this.#stop = hub.local.onChanges(this.#entityId, () => this.#attach())
    this.#attach()
  }

  get resident(): boolean {
    return this.#changes !== undefined || this.#mirror !== undefined
  }

  newest(): ChangePosition {
    return this.#changes?.newest() ?? this.#mirror?.newest ?? this.#known
  }

  after(position: ChangePosition, limit: number): ReadonlyArray<Change> | undefined {
    if (this.#changes !== undefined) return this.#changes.after(position, limit)
    if (this.#mirror !== undefined) return this.#mirror.after(position, limit)
    return isBefore(position, this.#known) ? undefined : []
  }

  read(position: ChangePosition, limit: number): Effect.Effect<ChangePage, ApiError | Compacted> {
    return Effect.suspend(() =>
      this.#changes !== undefined
        ? this.#changes.read(position, limit)
        : this.#hub.read(this.#of, this.#partition, this.#entityId, position, limit)
    )
  }

  /** Makes the partition resident where it is not, so that it is known how far it is. */
  get activate(): Effect.Effect<void, ApiError> {
    return Effect.suspend(() => {
      if (this.resident) return Effect.void
      return this.#hub.read(this.#of, this.#partition, this.#entityId, { seq: 0, index: 0 }, 0).pipe(
        Effect.tap(({ newest }) =>
          Effect.sync(() => {
            if (isBefore(this.#known, newest)) this.#known = newest
            this.look()
          })
        ),
        Effect.catchTag("Compacted", () => Effect.void),
        Effect.asVoid
      )
    })
  }

  /** Mirrors a partition that is another node's. */
  look(): void {
    if (this.resident || this.#mirroring !== undefined || this.#hub.isOurs(this.#entityId)) return
    const follow = this.#hub.read(this.#of, this.#partition, this.#entityId, { seq: 0, index: 0 }, 0).pipe(
      Effect.flatMap(({ newest }) => {
        const mirror = new ChangeFeed(this.#hub.mirrorMax, newest)
        mirror.onNews(this.#onNews)
        this.#mirror = mirror
        this.#onNews()
        return Stream.runForEachArray(this.#hub.follow(this.#entityId, newest), (changes) =>
          Effect.sync(() => mirror.publish(changes))
        )
      })
    )
    const fiber = this.#hub.run(follow)
    this.#mirroring = fiber
    fiber.addObserver((exit) => {
      if (this.#mirroring !== fiber) return
      this.#unmirror()
      const error = Option.getOrUndefined(Exit.findErrorOption(exit))
      if (error instanceof CollectionNotFound) this.#onGone()
    })
  }

  close(): void {
    this.#stop()
    this.#unlisten?.()
    this.#unlisten = undefined
    this.#unmirror()
  }

  #attach(): void {
    const changes = this.#hub.local.changes.get(this.#entityId)
    if (changes === this.#changes) return
    if (this.#changes !== undefined) this.#known = this.#changes.newest()
    this.#unlisten?.()
    this.#unlisten = changes?.onNews(this.#onNews)
    this.#changes = changes
    if (changes === undefined) {
      this.#onGone()
      return this.look()
    }
    this.#unmirror()
    // It may have been written to while it was not looked at.
    if (isBefore(this.#known, changes.newest())) this.#onNews()
  }

  #unmirror(): void {
    const fiber = this.#mirroring
    this.#mirroring = undefined
    if (this.#mirror !== undefined && isBefore(this.#known, this.#mirror.newest)) this.#known = this.#mirror.newest
    this.#mirror = undefined
    fiber?.interruptUnsafe()
  }
}

class Follower implements ChangeFollower {
  readonly #feed: CollectionFeed
  readonly #hub: Hub
  readonly #listener: FollowListener
  #state: FeedState = { positions: [] }
  /** Partitions with something to look at, each once, in turn. */
  #waiting: Array<number> = []
  readonly #isWaiting: Uint8Array
  /** Partitions that begin with their oldest change, whichever that is. */
  readonly #fromOldest: Uint8Array
  /** What is looked at, and where in it. */
  #page: ReadonlyArray<Change> = []
  #pageOf = 0
  #at = 0
  #reading: Fiber.Fiber<unknown, unknown> | undefined
  #retry: NodeJS.Timeout | undefined
  #resync = false
  #opened = false
  #closed = false

  constructor(feed: CollectionFeed, hub: Hub, listener: FollowListener) {
    this.#feed = feed
    this.#hub = hub
    this.#listener = listener
    this.#isWaiting = new Uint8Array(feed.collection.partitions)
    this.#fromOldest = new Uint8Array(feed.collection.partitions)
  }

  open(from: FollowFrom): Effect.Effect<void, ApiError> {
    const { collection, sources } = this.#feed
    const started = performance.now()
    const begin = Effect.suspend((): Effect.Effect<void, ApiError> => {
      if (from === "newest") this.#state = this.#feed.newest()
      else if (from === "oldest") {
        this.#state = { positions: sources.map(() => ({ seq: 0, index: 0 })) }
        this.#fromOldest.fill(1)
      } else {
        const behind = sources.findIndex((source, partition) => {
          const position = from[partition] as ChangePosition
          const newest = source.newest()
          return position.index === endOfObject ? newest.seq < position.seq : isBefore(newest, position)
        })
        if (behind !== -1) {
          // Its owner has not seen what was given out already: not one to be answered from.
          const detail = "What answers for it is behind the cursor."
          return Effect.fail(
            new PartitionUnavailable({
              collection: collection.name,
              partition: behind,
              detail,
              retryAfterMillis: 1_000
            })
          )
        }
        this.#state = { positions: from }
      }
      this.#opened = true
      for (let partition = 0; partition < sources.length; partition++) this.#look(partition)
      return Effect.void
    })
    const activated = Effect.forEach(sources, (source) => source.activate, { concurrency: "unbounded", discard: true })
    const attempt: Effect.Effect<void, ApiError> = Effect.andThen(activated, begin).pipe(
      Effect.catchIf(
        (error) => error._tag === "PartitionUnavailable" && performance.now() - started < behindMillis,
        () =>
          Effect.andThen(
            Effect.sleep(100),
            Effect.suspend(() => attempt)
          )
      )
    )
    return attempt
  }

  state(): FeedState {
    return this.#state
  }

  news(partition: number): void {
    if (!this.#opened) return
    this.#look(partition)
    this.#listener.onReady()
  }

  lost(error: ApiError): void {
    if (this.#closed) return
    this.close()
    this.#listener.onLost(error)
  }

  next(): Followed | undefined {
    if (this.#closed) return undefined
    if (this.#resync) {
      this.#resync = false
      return { kind: "resync", state: this.#state }
    }
    for (;;) {
      const change = this.#page[this.#at]
      if (change !== undefined) {
        this.#at += 1
        this.#fromOldest[this.#pageOf] = 0
        this.#state = this.#feed.after(this.#state, this.#pageOf, change)
        return { kind: "change", change, state: this.#state }
      }
      if (this.#reading !== undefined || this.#retry !== undefined) return undefined
      const partition = this.#waiting.shift()
      if (partition === undefined) {
        this.#page = []
        this.#at = 0
        return undefined
      }
      this.#isWaiting[partition] = 0
      const position = this.#state.positions[partition] as ChangePosition
      const found = (this.#feed.sources[partition] as Source).after(position, pageMax)
      if (found === undefined) {
        this.#read(partition, position)
        return undefined
      }
      this.#turn(partition, found)
    }
  }

  close(): void {
    if (this.#closed) return
    this.#closed = true
    clearTimeout(this.#retry)
    this.#reading?.interruptUnsafe()
    this.#feed.leave(this)
  }

  #look(partition: number): void {
    if (this.#isWaiting[partition] === 1) return
    this.#isWaiting[partition] = 1
    this.#waiting.push(partition)
  }

  /** Takes up a page; its partition is looked at again after it, when others have had their turn. */
  #turn(partition: number, page: ReadonlyArray<Change>): void {
    this.#page = page
    this.#pageOf = partition
    this.#at = 0
    if (page.length > 0) this.#look(partition)
  }

  #read(partition: number, position: ChangePosition): void {
    const source = this.#feed.sources[partition] as Source
    const fiber = this.#hub.run(this.#hub.reading(source.read(position, pageMax)))
    this.#reading = fiber
    fiber.addObserver((exit) => {
      if (this.#closed) return
      this.#reading = undefined
      if (exit._tag === "Success") {
        const { changes, skippedTo } = exit.value
        if (changes.length > 0) this.#turn(partition, changes)
        else if (skippedTo !== undefined) {
          this.#state = moved(this.#state, partition, skippedTo)
          this.#look(partition)
        }
      } else {
        const error = Option.getOrUndefined(Exit.findErrorOption(exit))
        if (error instanceof CollectionNotFound) return this.lost(error)
        this.#look(partition)
        if (error instanceof Compacted) {
          this.#state = moved(this.#state, partition, { seq: error.oldestSeq, index: -1 })
          if (this.#fromOldest[partition] === 0) this.#resync = true
        } else {
          this.#retry = setTimeout(() => {
            this.#retry = undefined
            this.#listener.onReady()
          }, lookMillis)
          this.#retry.unref()
          return
        }
      }
      this.#listener.onReady()
    })
  }
}

const moved = (state: FeedState, partition: number, { seq, index }: ChangePosition): FeedState => {
  const positions = [...state.positions]
  positions[partition] = { seq, index }
  return { positions }
}

const samePositions = (a: ReadonlyArray<ChangePosition>, b: ReadonlyArray<ChangePosition>): boolean =>
  a.every((position, i) => position.seq === b[i]?.seq && position.index === b[i]?.index)

/** Whether two are equal in all partitions but one. */
const followsOn = (
  known: ReadonlyArray<ChangePosition>,
  before: ReadonlyArray<ChangePosition>,
  except: number
): boolean => {
  for (let i = 0; i < known.length; i++) {
    if (i === except) continue
    const a = known[i] as ChangePosition
    const b = before[i] as ChangePosition
    if (a !== b && (a.seq !== b.seq || a.index !== b.index)) return false
  }
  return true
}

const unreachable = (of: Collection, partition: number) =>
  new PartitionUnavailable({
    collection: of.name,
    partition,
    detail: "It cannot be reached now.",
    retryAfterMillis: 1_000
  })
