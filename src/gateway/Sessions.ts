/**
 * The gateway's view of stream sessions. A session of a wire that does not take up answers again where they were cut (all
 * but event streams) is a small object: its searches go to the partitions directly, and there is nothing to wake or to
 * rebuild. One whose answers can be resumed is an entity, which comes into being with its first search.
 */
import { Context, Effect, Layer } from "effect"
import { Settings, type SettingValues } from "../config.ts"
import { type ApiError, Overloaded } from "../protocol/Errors.ts"
import { type SearchAnswer, type SessionQuery, StreamSession } from "../protocol/StreamSession.ts"
import { LocalActors } from "../shards/LocalActors.ts"
import { Router } from "../shards/Router.ts"
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
    /** One that keeps its newest answers, so that another connection can go on with them. */
    readonly openResumable: Effect.Effect<SessionLink, Overloaded>
    /** An answer a session gave before, if it still keeps it. */
    readonly answer: (sessionId: string, queryId: string) => Effect.Effect<SearchAnswer | undefined>
    readonly count: () => number
  }
>()("ruvector/gateway/Sessions") {
  static readonly layer = Layer.effect(
    Sessions,
    Effect.gen(function* () {
      const room = new Room(yield* Settings, yield* Router, yield* LocalActors, yield* StreamSession.client)
      const opened = (link: SessionLink | Overloaded) =>
        link instanceof Overloaded ? Effect.fail(link) : Effect.succeed(link)

      return Sessions.of({
        open: Effect.suspend(() => opened(room.open())),
        openUnsafe: () => room.open(),
        openResumable: Effect.suspend(() => opened(room.openResumable())),
        answer: (sessionId, queryId) => Effect.sync(() => room.local.sessions.get(sessionId)?.answer(queryId)),
        count: () => room.count
      })
    })
  )
}

type Client = Effect.Success<typeof StreamSession.client>

/** What all sessions of this node share. */
class Room {
  readonly settings: Pick<SettingValues, "sessionsMax" | "sessionSearchesMax">
  readonly router: Router["Service"]
  readonly local: LocalActors["Service"]
  readonly client: Client
  count = 0
  #minted = 0

  constructor(settings: Room["settings"], router: Room["router"], local: Room["local"], client: Client) {
    this.settings = settings
    this.router = router
    this.local = local
    this.client = client
  }

  open(): SessionLink | Overloaded {
    return this.#admit() ?? new Link(this, this.#mint())
  }

  openResumable(): SessionLink | Overloaded {
    return this.#admit() ?? new ResumableLink(this, this.#mint())
  }

  #admit(): Overloaded | undefined {
    if (this.count >= this.settings.sessionsMax)
      return new Overloaded({ bound: "sessionsMax", retryAfterMillis: 5_000 })
    this.count += 1
    return undefined
  }

  #mint(): string {
    return `s_${instance}${(this.#minted++).toString(36)}`
  }
}

class Link implements SessionLink {
  readonly id: string
  protected readonly room: Room
  #isOpen = true
  #underWay = 0

  constructor(room: Room, id: string) {
    this.room = room
    this.id = id
  }

  search(query: SessionQuery): Effect.Effect<SearchAnswer, ApiError> {
    return Effect.suspend(() => {
      if (this.#underWay >= this.room.settings.sessionSearchesMax) {
        return Effect.fail(new Overloaded({ bound: "sessionSearchesMax", retryAfterMillis: 100 }))
      }
      this.#underWay += 1
      return Effect.onExitPrimitive(this.room.router.search(query), () => {
        this.#underWay -= 1
        return undefined
      })
    })
  }

  get close(): Effect.Effect<void> {
    return Effect.sync(() => this.end())
  }

  get abandon(): Effect.Effect<void> {
    return Effect.sync(() => this.end())
  }

  /** Whether it was open. */
  protected end(): boolean {
    const wasOpen = this.#isOpen
    if (wasOpen) this.room.count -= 1
    this.#isOpen = false
    return wasOpen
  }
}

class ResumableLink extends Link {
  override search(query: SessionQuery): Effect.Effect<SearchAnswer, ApiError> {
    const resident = this.room.local.sessions.get(this.id)
    if (resident !== undefined) return resident.search(query)
    return Effect.mapError(this.room.client(this.id).Search(query), (error) =>
      isApiError(error) ? error : new Overloaded({ bound: "residentEntitiesMax", retryAfterMillis: 1_000 })
    )
  }

  override get close(): Effect.Effect<void> {
    return Effect.suspend(() => {
      if (!this.end() || !this.room.local.sessions.has(this.id)) return Effect.void
      return Effect.ignore(this.room.client(this.id).Close())
    })
  }
}

const isApiError = (error: { readonly _tag: string }): error is ApiError =>
  error._tag !== "MailboxFull" &&
  error._tag !== "AlreadyProcessingMessage" &&
  error._tag !== "PersistenceError" &&
  error._tag !== "EntityNotAssignedToRunner"
