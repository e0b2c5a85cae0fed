/**
 * The `StreamSession` entity. What it holds can be rebuilt: a bound on what is under way, and the newest answers, kept
 * so that a stream cut in the middle of an answer goes on after its last event. It comes into being with its first search. A
 * session that is quiet is passivated; the next message brings it back empty.
 */
import { Duration, Effect, Layer } from "effect"
import * as Entity from "effect/cluster/Entity"
import { Settings } from "../config.ts"
import { Overloaded } from "../protocol/Errors.ts"
import { type SearchAnswer, type SessionQuery, StreamSession } from "../protocol/StreamSession.ts"
import { LocalActors } from "../shards/LocalActors.ts"
import { Router } from "../shards/Router.ts"

export const layer = Layer.unwrap(
  Effect.map(Settings, (settings) =>
    StreamSession.toLayer(
      Effect.gen(function* () {
        const { entityId } = yield* Entity.CurrentAddress
        const local = yield* LocalActors
        const router = yield* Router
        const session = new Session(router, settings.sessionSearchesMax, settings.sessionAnswersKept)
        yield* local.registerSession(entityId, session)
        return StreamSession.of({
          Search: ({ payload }) => session.search(payload),
          Resume: ({ payload }) => Effect.sync(() => session.answer(payload.queryId) ?? null),
          Close: () => Effect.sync(() => session.close())
        })
      }),
      {
        concurrency: "unbounded",
        disableFatalDefects: true,
        maxIdleTime: Duration.millis(settings.sessionIdleMillis),
        mailboxCapacity: settings.sessionSearchesMax
      }
    )
  )
)

class Session {
  readonly #router: Router["Service"]
  readonly #searchesMax: number
  readonly #answersKept: number
  readonly #answers: Array<SearchAnswer> = []
  #underWay = 0

  constructor(router: Router["Service"], searchesMax: number, answersKept: number) {
    this.#router = router
    this.#searchesMax = searchesMax
    this.#answersKept = answersKept
  }

  search(query: SessionQuery) {
    return Effect.suspend(() => {
      if (this.#underWay >= this.#searchesMax) {
        return Effect.fail(new Overloaded({ bound: "sessionSearchesMax", retryAfterMillis: 100 }))
      }
      this.#underWay += 1
      return Effect.onExit(this.#router.search(query), (exit) =>
        Effect.sync(() => {
          this.#underWay -= 1
          if (exit._tag === "Success") this.#keep(exit.value)
        })
      )
    })
  }

  answer(queryId: string): SearchAnswer | undefined {
    return this.#answers.find((answer) => answer.queryId === queryId)
  }

  close(): void {
    this.#answers.length = 0
  }

  #keep(answer: SearchAnswer) {
    if (this.#answersKept === 0) return
    if (this.#answers.length === this.#answersKept) this.#answers.shift()
    this.#answers.push(answer)
  }
}
