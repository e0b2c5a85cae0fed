/** Standing queries, by searching again after each change. */
import { Context, Effect, Exit, type Fiber, Layer } from "effect"
import type { Collection } from "../protocol/Collection.ts"
import type { ApiError } from "../protocol/Errors.ts"
import { ChangeFeeds } from "./ChangeFeeds.ts"
import { Router } from "./Router.ts"

export interface StandingQuery {
  readonly collection: string
  readonly vector?: Float32Array
  readonly vectorId?: string
  readonly k: number
  /** `-Infinity`: none. */
  readonly minScore: number
  /** JSON text, empty for none. */
  readonly filter: string
  readonly includeMetadata: boolean
  readonly includeVector: boolean
}

export interface StandingMember {
  readonly id: string
  readonly version: string
  readonly score: number
  /** JSON text. */
  readonly metadata?: string
  readonly vector?: Float32Array
}

export interface StandingState {
  /** Nearest first, at most k; a new array each time the answer changes, members that did not change are the same objects. */
  readonly members: ReadonlyArray<StandingMember>
  /** By partition: the log position up to which this answer is exact. */
  readonly positions: ReadonlyArray<number>
  readonly collection: Collection
}

export interface StandingListener {
  onChange(state: StandingState): void
  onLost(error: ApiError): void
}

export class StandingQueries extends Context.Service<
  StandingQueries,
  {
    readonly open: (
      query: StandingQuery,
      listener: StandingListener
    ) => Effect.Effect<{ readonly state: () => StandingState; readonly close: () => void }, ApiError>
  }
>()("ruvector/shards/StandingQueries") {
  static readonly layer = Layer.effect(
    StandingQueries,
    Effect.gen(function* () {
      const router = yield* Router
      const feeds = yield* ChangeFeeds
      const run = Effect.runForkWith(yield* Effect.context<never>())

      const answer = (of: Collection, query: StandingQuery): Effect.Effect<ReadonlyArray<StandingMember>, ApiError> =>
        Effect.gen(function* () {
          const before = router.revision(of)
          const found = yield* router.search({
            queryId: "standing",
            collection: query.collection,
            ...(query.vector === undefined ? {} : { vector: query.vector }),
            ...(query.vectorId === undefined ? {} : { vectorId: query.vectorId }),
            k: query.k,
            ef: 0,
            filter: query.filter,
            includeMetadata: false,
            includeVector: false,
            deadlineMillis: 0
          })
          const members: Array<StandingMember> = []
          for (let i = 0; i < found.ids.length; i++) {
            const id = found.ids[i] as string
            const score = found.scores[i] as number
            if (score < query.minScore) continue
            const record = yield* router.get(query.collection, id)
            members.push({
              id,
              version: record.version,
              score,
              ...(query.includeMetadata ? { metadata: record.metadata } : {}),
              ...(query.includeVector ? { vector: record.vector } : {})
            })
          }
          if (before === undefined || router.revision(of) !== before) return yield* again(of, query)
          return members
        }).pipe(
          Effect.catchTag("VectorNotFound", (error) =>
            query.vectorId === undefined ? again(of, query) : Effect.fail(error)
          )
        )
      const again = (of: Collection, query: StandingQuery) =>
        Effect.andThen(
          Effect.sleep(2),
          Effect.suspend(() => answer(of, query))
        )

      return StandingQueries.of({
        open: Effect.fnUntraced(function* (query: StandingQuery, listener: StandingListener) {
          const of = yield* router.collection(query.collection)
          let dirty = false
          let closed = false
          let opened = false
          let fiber: Fiber.Fiber<unknown, unknown> | undefined
          let state: StandingState = { members: [], positions: [], collection: of }
          const look = () => {
            if (closed || !opened) return
            dirty = true
            if (fiber !== undefined) return
            dirty = false
            while (follower.next() !== undefined) {}
            const positions = follower.state().positions.map(({ seq }) => seq)
            const searching = run(answer(of, query))
            fiber = searching
            searching.addObserver((exit) => {
              fiber = undefined
              if (closed) return
              if (Exit.isSuccess(exit)) {
                const known = new Map(state.members.map((member) => [member.id, member]))
                const members = exit.value.map((member) => {
                  const before = known.get(member.id)
                  return before?.version === member.version && before.score === member.score ? before : member
                })
                const same = members.length === state.members.length && members.every((m, i) => m === state.members[i])
                state = { members: same ? state.members : members, positions, collection: of }
                if (!same) listener.onChange(state)
              } else dirty = true
              if (dirty) setTimeout(look, Exit.isSuccess(exit) ? 0 : 20)
            })
          }
          const follower = yield* feeds.open(of, "newest", {
            onReady: look,
            onLost: (error) => {
              closed = true
              listener.onLost(error)
            }
          })
          const positions = follower.state().positions.map(({ seq }) => seq)
          state = { members: yield* answer(of, query), positions, collection: of }
          opened = true
          look()
          return {
            state: () => state,
            close: () => {
              closed = true
              follower.close()
            }
          }
        })
      })
    })
  )
}
