/**
 * The newest events of an actor, kept for those who follow them. A follower holds nothing here but its position, so that a
 * slow one costs no memory: one that falls behind what is kept is told how many events it missed, and goes on from there.
 */
import { Deferred, Effect, Option, Stream } from "effect"

/** An event with its place and time. */
interface Placed {
  readonly event: string
  readonly seq: number
  readonly at_ms: number
}

type Unplaced<E> = E extends unknown ? Omit<E, "seq" | "at_ms"> : never
/** What every log says itself. */
type Own = { readonly event: "following" | "events_missed" }
/** An event before it has its place and time. */
export type NewEvent<E> = Unplaced<Exclude<E, Own>>

// Casts below: that an event of `E` and its place are an `E` again is more than the compiler follows through `Omit` of a union.

/** Events handed to a follower at once. */
const batch = 64

/** `E` has the events `following` and `events_missed`, with a `count`, beside those of the actor. */
export class EventLog<E extends Placed> {
  readonly #capacity: number
  /** Event `seq` is at `seq` modulo capacity. */
  readonly #ring: Array<E> = []
  #last = 0
  #news = Deferred.makeUnsafe<void>()

  constructor(capacity: number) {
    this.#capacity = capacity
  }

  /** Position of the newest event. */
  get last(): number {
    return this.#last
  }

  publish(event: NewEvent<E>, atMillis: number): void {
    this.#last += 1
    this.#ring[this.#last % this.#capacity] = { ...event, seq: this.#last, at_ms: atMillis } as unknown as E
    const news = this.#news
    this.#news = Deferred.makeUnsafe()
    Deferred.doneUnsafe(news, Effect.void)
  }

  /** Everything after a position, and what is to come. A position from another life of the actor begins anew. */
  follow(after: number, nowMillis: number): Stream.Stream<E> {
    const start = after > this.#last ? 0 : Math.max(0, after)
    const rest = Stream.paginate(start, (position) =>
      Effect.suspend(() => {
        if (position < this.#last) return Effect.succeed(this.#page(position))
        return Effect.map(Deferred.await(this.#news), () => this.#page(position))
      })
    )
    return Stream.concat(Stream.make({ event: "following", seq: start, at_ms: nowMillis } as unknown as E), rest)
  }

  #page(position: number): readonly [ReadonlyArray<E>, Option.Option<number>] {
    const oldest = Math.max(1, this.#last - this.#capacity + 1)
    const from = Math.max(position + 1, oldest)
    const to = Math.min(this.#last, from + batch - 1)
    const events: Array<E> = []
    if (from > position + 1) {
      const next = this.#ring[from % this.#capacity] as E
      const missed = { event: "events_missed", seq: from - 1, at_ms: next.at_ms, count: from - 1 - position }
      events.push(missed as unknown as E)
    }
    for (let seq = from; seq <= to; seq++) events.push(this.#ring[seq % this.#capacity] as E)
    return [events, Option.some(to)]
  }
}
