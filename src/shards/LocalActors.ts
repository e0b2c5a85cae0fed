/**
 * The actors resident in this process. A read needs no mailbox: who finds the partition or session here calls it
 * directly; who does not sends a message through the entity's client. An actor registers itself for as long as its scope
 * lives, so that nothing is found here after it has stopped.
 */
import { Context, Effect, Layer, type Scope } from "effect"
import type { ApiError } from "../protocol/Errors.ts"
import type { PartitionError, PartitionHits, PartitionQuery, PartitionRecord } from "../protocol/IndexPartition.ts"
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

export interface LocalSession {
  readonly search: (query: SessionQuery) => Effect.Effect<SearchAnswer, ApiError>
  readonly answer: (queryId: string) => SearchAnswer | undefined
}

export class LocalActors extends Context.Service<
  LocalActors,
  {
    readonly partitions: ReadonlyMap<string, LocalPartition>
    readonly sessions: ReadonlyMap<string, LocalSession>
    readonly registerPartition: (entityId: string, partition: LocalPartition) => Effect.Effect<void, never, Scope.Scope>
    readonly registerSession: (entityId: string, session: LocalSession) => Effect.Effect<void, never, Scope.Scope>
  }
>()("ruvector/shards/LocalActors") {
  static readonly layer = Layer.sync(LocalActors, () => {
    const partitions = new Map<string, LocalPartition>()
    const sessions = new Map<string, LocalSession>()
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
      registerSession: register(sessions)
    })
  })
}
