/**
 * The gateway's view of stream sessions: mints an id, opens the entity, asks the one resident here directly, and closes
 * it. A session that was passivated comes back with the next search.
 */
import { Context, Effect, Layer } from "effect"
import { Settings } from "../config.ts"
import { type ApiError, Overloaded } from "../protocol/Errors.ts"
import { type SearchAnswer, type SessionQuery, StreamSession } from "../protocol/StreamSession.ts"
import { LocalActors } from "../shards/LocalActors.ts"
import { instance } from "./Queries.ts"

/** One client's logical stream, as the wire that carries it holds it. */
export interface SessionLink {
  readonly id: string
  readonly search: (query: SessionQuery) => Effect.Effect<SearchAnswer, ApiError>
  /** Ends the session. */
  readonly close: Effect.Effect<void>
  /** Leaves the session to be passivated; until then what it keeps can be resumed. */
  readonly abandon: Effect.Effect<void>
}

export class Sessions extends Context.Service<
  Sessions,
  {
    readonly open: Effect.Effect<SessionLink, ApiError>
    /** An answer a session gave before, if it still keeps it. */
    readonly answer: (sessionId: string, queryId: string) => Effect.Effect<SearchAnswer | undefined>
    readonly count: () => number
  }
>()("ruvector/gateway/Sessions") {
  static readonly layer = Layer.effect(
    Sessions,
    Effect.gen(function* () {
      const settings = yield* Settings
      const local = yield* LocalActors
      const client = yield* StreamSession.client
      let minted = 0
      let open = 0

      const undelivered = () => new Overloaded({ bound: "residentEntitiesMax", retryAfterMillis: 1_000 })

      const link = (id: string): SessionLink => {
        let closed = false
        return {
          id,
          search: (query) =>
            Effect.suspend(() => {
              const resident = local.sessions.get(id)
              if (resident !== undefined) return resident.search(query)
              return Effect.mapError(client(id).Search(query), (error) => (isApiError(error) ? error : undelivered()))
            }),
          close: Effect.suspend(() => {
            if (closed) return Effect.void
            closed = true
            open -= 1
            return local.sessions.has(id) ? Effect.ignore(client(id).Close()) : Effect.void
          }),
          abandon: Effect.sync(() => {
            if (!closed) open -= 1
            closed = true
          })
        }
      }

      return Sessions.of({
        open: Effect.suspend(() => {
          if (open >= settings.sessionsMax) {
            return Effect.fail(new Overloaded({ bound: "sessionsMax", retryAfterMillis: 5_000 }))
          }
          const id = `s_${instance}${(minted++).toString(36)}`
          open += 1
          return client(id)
            .Open()
            .pipe(
              Effect.as(link(id)),
              Effect.mapError((error) => (isApiError(error) ? error : undelivered())),
              Effect.tapCause(() => Effect.sync(() => (open -= 1)))
            )
        }),
        answer: (sessionId, queryId) => Effect.sync(() => local.sessions.get(sessionId)?.answer(queryId)),
        count: () => open
      })
    })
  )
}

const isApiError = (error: { readonly _tag: string }): error is ApiError =>
  error._tag !== "MailboxFull" &&
  error._tag !== "AlreadyProcessingMessage" &&
  error._tag !== "PersistenceError" &&
  error._tag !== "EntityNotAssignedToRunner"
