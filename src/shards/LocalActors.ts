/**
 * The actors resident in this process. A read needs no mailbox: who finds the partition or session here calls it
 * directly; who does not sends a message through the entity's client. An actor registers itself for as long as its scope
 * lives, so that nothing is found here after it has stopped.
 */
import { Context, Effect, Layer, type Scope } from "effect"
import type { QuarantinedPartition } from "../protocol/Cluster.ts"
import type { Collection } from "../protocol/Collection.ts"
import type { ApiError } from "../protocol/Errors.ts"
import type {
  Change,
  ChangePage,
  ChangePosition,
  Compacted,
  PartitionError,
  PartitionHits,
  PartitionQuery,
  PartitionRecord
} from "../protocol/IndexPartition.ts"
import type { PartitionWatch, WatchChange } from "../protocol/StandingQuery.ts"
import type { SearchAnswer, SessionQuery } from "../protocol/StreamSession.ts"

export interface LocalPartition {
  readonly collection: Collection
  /** Before another process takes it over: a snapshot of what is new, so that there is little to replay there. */
  readonly handOver: Effect.Effect<void>
  readonly search: (query: PartitionQuery) => Effect.Effect<PartitionHits, PartitionError>
  readonly get: (ids: ReadonlyArray<string>) => Effect.Effect<ReadonlyArray<PartitionRecord | null>, PartitionError>
  /**
   * Equal twice: nothing that a search can see has changed in between. A change has another revision before its writer is
   * answered; `undefined` while one is being applied.
   */
  readonly revision: () => string | undefined
  /**
   * Registers a standing query; the listener has the partition's share of its answer when this succeeds. It ends with the
   * partition's residence, which the listener is told.
   */
  readonly watch: (query: PartitionWatch, listener: WatchListener) => Effect.Effect<WatchHandle, PartitionError>
  /** The log position that its standing queries are exact to, but for those that hold back. */
  readonly position: () => number
}

/** Called in order, in the turn in which it is known. */
export interface WatchListener {
  readonly onChange: (change: WatchChange) => void
  readonly onLost: () => void
}

export interface WatchHandle {
  readonly close: () => void
}

/** Told what becomes of a partition of this process. */
export interface PartitionFollower {
  /** It is resident from now on; nothing has been asked of it. */
  readonly onResident: (partition: LocalPartition) => void
  /** It is deleted, with its collection. */
  readonly onRemoved: () => void
}

/** The changes of a partition that is resident here, or of one that is being opened or closed. */
export interface LocalChanges {
  /** Position of the last change that was published. */
  readonly newest: () => ChangePosition
  /** At most `limit` changes after a position; `undefined` where they have left memory: then they are to be read. */
  readonly after: (position: ChangePosition, limit: number) => ReadonlyArray<Change> | undefined
  readonly read: (position: ChangePosition, limit: number) => Effect.Effect<ChangePage, PartitionError | Compacted>
  /** Called after each publication, until what it answers is called. */
  readonly onNews: (listener: () => void) => () => void
}

export interface LocalSession {
  readonly search: (query: SessionQuery) => Effect.Effect<SearchAnswer, ApiError>
  readonly answer: (queryId: string) => SearchAnswer | undefined
}

export class LocalActors extends Context.Service<
  LocalActors,
  {
    readonly partitions: ReadonlyMap<string, LocalPartition>
    readonly sessions: ReadonlyMap<string, LocalSession>
    /** By partition. There before the partition first writes, and until it has written for the last time. */
    readonly changes: ReadonlyMap<string, LocalChanges>
    readonly registerPartition: (entityId: string, partition: LocalPartition) => Effect.Effect<void, never, Scope.Scope>
    readonly partitionRemoved: (entityId: string) => void
    /** Follows a partition until the returned function is called. */
    readonly followPartition: (entityId: string, follower: PartitionFollower) => () => void
    /** What partitions of this process are in quarantine, by what each says of itself. */
    readonly quarantined: () => ReadonlyArray<QuarantinedPartition>
    readonly registerQuarantine: (
      entityId: string,
      state: () => QuarantinedPartition | undefined
    ) => Effect.Effect<void, never, Scope.Scope>
    readonly registerSession: (entityId: string, session: LocalSession) => Effect.Effect<void, never, Scope.Scope>
    readonly registerChanges: (entityId: string, changes: LocalChanges) => Effect.Effect<void, never, Scope.Scope>
    /** Calls the listener when a partition's changes come or go, until what it answers is called. */
    readonly onChanges: (entityId: string, listener: () => void) => () => void
  }
>()("ruvector/shards/LocalActors") {
  static readonly layer = Layer.sync(LocalActors, () => {
    const partitions = new Map<string, LocalPartition>()
    const sessions = new Map<string, LocalSession>()
    const changes = new Map<string, LocalChanges>()
    const listeners = new Map<string, Set<() => void>>()
    const told = (entityId: string) => {
      for (const listener of [...(listeners.get(entityId) ?? [])]) listener()
    }
    const register =
      <A>(map: Map<string, A>) =>
      (entityId: string, actor: A) =>
        Effect.acquireRelease(
          Effect.sync(() => {
            map.set(entityId, actor)
          }),
          () => Effect.sync(() => (map.get(entityId) === actor ? map.delete(entityId) : false))
        )
    const followers = new Map<string, Set<PartitionFollower>>()
    const registerPartition = register(partitions)
    const quarantines = new Map<string, () => QuarantinedPartition | undefined>()
    return LocalActors.of({
      partitions,
      sessions,
      changes,
      registerChanges: (entityId, of) =>
        Effect.acquireRelease(
          Effect.sync(() => {
            changes.set(entityId, of)
            told(entityId)
          }),
          () =>
            Effect.sync(() => {
              if (changes.get(entityId) !== of) return
              changes.delete(entityId)
              told(entityId)
            })
        ),
      onChanges: (entityId, listener) => {
        const all = listeners.get(entityId) ?? new Set()
        listeners.set(entityId, all.add(listener))
        return () => {
          all.delete(listener)
          if (all.size === 0 && listeners.get(entityId) === all) listeners.delete(entityId)
        }
      },
      registerPartition: (entityId, partition) =>
        Effect.tap(registerPartition(entityId, partition), () =>
          Effect.sync(() => {
            for (const follower of [...(followers.get(entityId) ?? [])]) follower.onResident(partition)
          })
        ),
      partitionRemoved: (entityId) => {
        for (const follower of [...(followers.get(entityId) ?? [])]) follower.onRemoved()
      },
      followPartition: (entityId, follower) => {
        const all = followers.get(entityId) ?? new Set()
        followers.set(entityId, all.add(follower))
        return () => {
          all.delete(follower)
          if (all.size === 0 && followers.get(entityId) === all) followers.delete(entityId)
        }
      },
      quarantined: () => [...quarantines.values()].flatMap((state) => state() ?? []),
      registerQuarantine: register(quarantines),
      registerSession: register(sessions)
    })
  })
}
