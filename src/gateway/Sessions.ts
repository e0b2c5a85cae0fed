/**
 * The gateway's view of stream sessions. A session of a wire that does not take up answers again where they were cut (all
 * but event streams) is a small object: its searches go to the partitions directly, and there is nothing to wake or to
 * rebuild. One whose answers can be resumed is an entity, which comes into being with its first search.
 */
import { Context, Effect, Layer } from "effect"
import { Settings, type SettingValues } from "../config.ts"
import { type ApiError, Overloaded } from "../protocol/Errors.ts"
import { type SearchAnswer, type SessionQuery, StreamSession } from "../protocol/StreamSession.ts"
import { Calls } from "../shards/Calls.ts"
import { isDelivery } from "../shards/Delivery.ts"
import { LocalActors } from "../shards/LocalActors.ts"
import { Placement } from "../shards/Placement.ts"
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
      const room = new Room({
        settings: yield* Settings,
        router: yield* Router,
        local: yield* LocalActors,
        client: yield* StreamSession.client,
        calls: yield* Calls,
        placement: yield* Placement
      })
      const opened = (link: SessionLink | Overloaded) =>
        link instanceof Overloaded ? Effect.fail(link) : Effect.succeed(link)

      return Sessions.of({
        open: Effect.suspend(() => opened(room.open())),
        openUnsafe: () => room.open(),
        openResumable: Effect.suspend(() => opened(room.openResumable())),
        answer: (sessionId, queryId) => room.answer(sessionId, queryId),
        count: () => room.count
      })
    })
  )
}

type Client = Effect.Success<typeof StreamSession.client>

/** What sessions rest on. */
interface Services {
  readonly settings: Pick<SettingValues, "sessionsMax" | "sessionSearchesMax">
  readonly router: Router["Service"]
  readonly local: LocalActors["Service"]
  readonly client: Client
  readonly calls: Calls["Service"]
  readonly placement: Placement["Service"]
}

/** The shards that resumable sessions are in. */
const sessionsGroup = "default"

/** Ids tried so that a session's actor is in this process, where this process has shards. */
const mintsMax = 64

/** For the answer of a session elsewhere that is to be resumed: then it is as if that were no more. */
const resumeMillis = 2_000

/** What all sessions of this node share. */
class Room {
  readonly settings: Services["settings"]
  readonly router: Services["router"]
  readonly local: Services["local"]
  readonly #services: Services
  count = 0
  #minted = 0

  constructor(services: Services) {
    this.#services = services
    this.settings = services.settings
    this.router = services.router
    this.local = services.local
  }

  /** A call to a session's actor, wherever it is. */
  call<A, E>(
    id: string,
    call: (session: ReturnType<Client>) => Effect.Effect<A, E>,
    deadlineMillis?: number
  ): Effect.Effect<A, E | Overloaded> {
    const { calls, client } = this.#services
    const late = () => new Overloaded({ bound: "clusterCallMillis", retryAfterMillis: 1_000 })
    return calls.to({ group: sessionsGroup, id }, call(client(id)), late, deadlineMillis)
  }

  answer(id: string, queryId: string): Effect.Effect<SearchAnswer | undefined> {
    const resident = this.local.sessions.get(id)
    if (resident !== undefined) return Effect.succeed(resident.answer(queryId))
    const { placement } = this.#services
    // Alone there is no other process that might have it.
    if (placement.ownerOf(sessionsGroup, id) === undefined) return Effect.undefined
    return this.call(id, (session) => session.Resume({ queryId }), resumeMillis).pipe(
      Effect.map((answer) => answer ?? undefined),
      Effect.catch(() => Effect.undefined)
    )
  }

  open(): SessionLink | Overloaded {
    return this.#admit() ?? new Link(this, this.#mint())
  }

  openResumable(): SessionLink | Overloaded {
    return this.#admit() ?? new ResumableLink(this, this.#mintHere())
  }

  #admit(): Overloaded | undefined {
    if (this.count >= this.settings.sessionsMax)
      return new Overloaded({ bound: "sessionsMax", retryAfterMillis: 5_000 })
    this.count += 1
    return undefined
  }

  /** Of this process's shards, where it has some: what a session is asked then crosses to no other process. */
  #mintHere(): string {
    const { placement } = this.#services
    let id = this.#mint()
    if (!placement.hosts || placement.ownerOf(sessionsGroup, id) === undefined) return id
    for (let n = 1; n < mintsMax && !placement.isHere(sessionsGroup, id); n++) id = this.#mint()
    return id
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
  #isElsewhere = false

  override search(query: SessionQuery): Effect.Effect<SearchAnswer, ApiError> {
    const resident = this.room.local.sessions.get(this.id)
    if (resident !== undefined) return resident.search(query)
    this.#isElsewhere = true
    return Effect.mapError(
      this.room.call(this.id, (session) => session.Search(query)),
      (error) => (isDelivery(error) ? new Overloaded({ bound: "residentEntitiesMax", retryAfterMillis: 1_000 }) : error)
    )
  }

  override get close(): Effect.Effect<void> {
    return Effect.suspend(() => {
      if (!this.end() || !(this.#isElsewhere || this.room.local.sessions.has(this.id))) return Effect.void
      return Effect.ignore(this.room.call(this.id, (session) => session.Close()))
    })
  }
}
