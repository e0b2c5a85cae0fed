/**
 * The actors resident in this process. A read needs no mailbox: who finds the partition or session here calls it
 * directly; who does not sends a message through the entity's client. An actor registers itself for as long as its scope
 * lives, so that nothing is found here after it has stopped.
 */
import { Context, Effect, Layer, type Scope } from "effect"
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
import type { SearchAnswer, SessionQuery } from "../protocol/StreamSession.ts"

export interface LocalPartition {
  readonly search: (query: PartitionQuery) => Effect.Effect<PartitionHits, PartitionError>
  readonly get: (ids: ReadonlyArray<string>) => Effect.Effect<ReadonlyArray<PartitionRecord | null>, PartitionError>
  /**
   * Equal twice: nothing that a search can see has changed in between. A change has another revision before its writer is
   * answered; `undefined` while one is being applied.
   */
  readonly revision: () => string | undefined
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
    return LocalActors.of({
      partitions,
      sessions,
      registerPartition: register(partitions),
      changes,
      registerSession: register(sessions),
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
      }
    })
  })
}
