/**
 * The gateway's view of stream sessions: mints ids, and asks a session that is resident here directly. What a session
 * costs before its first search is a small object: the entity comes into being with the search. One that was passivated
 * comes back with the next.
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
    readonly open: Effect.Effect<SessionLink, Overloaded>
    /** The same, at once. */
    readonly openUnsafe: () => SessionLink | Overloaded
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

      /** Of a class, so that thousands of idle ones share its methods. */
      class Link implements SessionLink {
        readonly id: string
        #isOpen = true

        constructor(id: string) {
          this.id = id
        }

        search(query: SessionQuery): Effect.Effect<SearchAnswer, ApiError> {
          const resident = local.sessions.get(this.id)
          if (resident !== undefined) return resident.search(query)
          return Effect.mapError(client(this.id).Search(query), (error) => (isApiError(error) ? error : undelivered()))
        }

        get close(): Effect.Effect<void> {
          return Effect.suspend(() => {
            if (!this.#end() || !local.sessions.has(this.id)) return Effect.void
            return Effect.ignore(client(this.id).Close())
          })
        }

        get abandon(): Effect.Effect<void> {
          return Effect.sync(() => this.#end())
        }

        #end(): boolean {
          const wasOpen = this.#isOpen
          if (wasOpen) open -= 1
          this.#isOpen = false
          return wasOpen
        }
      }

      const undelivered = () => new Overloaded({ bound: "residentEntitiesMax", retryAfterMillis: 1_000 })

      const openUnsafe = (): SessionLink | Overloaded => {
        if (open >= settings.sessionsMax) return new Overloaded({ bound: "sessionsMax", retryAfterMillis: 5_000 })
        open += 1
        return new Link(`s_${instance}${(minted++).toString(36)}`)
      }

      return Sessions.of({
        open: Effect.suspend(() => {
          const link = openUnsafe()
          return link instanceof Overloaded ? Effect.fail(link) : Effect.succeed(link)
        }),
        openUnsafe,
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
