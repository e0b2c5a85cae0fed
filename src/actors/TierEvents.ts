/**
 * The newest tier events, kept for those who follow them. A follower holds nothing here but its position, so that a slow
 * one costs no memory: one that falls behind what is kept is told how many events it missed, and goes on from there.
 */
import { Deferred, Effect, Option, Stream } from "effect"
import type { TierEvent } from "../protocol/TierPromoter.ts"

type Unplaced<E> = E extends unknown ? Omit<E, "seq" | "at_ms"> : never
/** An event before it has its place and time. */
export type NewTierEvent = Unplaced<Exclude<TierEvent, { readonly event: "following" | "events_missed" }>>

/** Events handed to a follower at once. */
const batch = 64

export class TierEvents {
  readonly #capacity: number
  /** Event `seq` is at `seq` modulo capacity. */
  readonly #ring: Array<TierEvent> = []
  #last = 0
  #news = Deferred.makeUnsafe<void>()

  constructor(capacity: number) {
    this.#capacity = capacity
  }

  /** Position of the newest event. */
  get last(): number {
    return this.#last
  }

  publish(event: NewTierEvent, atMillis: number): void {
    this.#last += 1
    this.#ring[this.#last % this.#capacity] = { ...event, seq: this.#last, at_ms: atMillis } as TierEvent
    const news = this.#news
    this.#news = Deferred.makeUnsafe()
    Deferred.doneUnsafe(news, Effect.void)
  }

  /** Everything after a position, and what is to come. A position from another life of the promoter begins anew. */
  follow(after: number, nowMillis: number): Stream.Stream<TierEvent> {
    const start = after > this.#last ? 0 : Math.max(0, after)
    const rest = Stream.paginate(start, (position) =>
      Effect.suspend(() => {
        if (position < this.#last) return Effect.succeed(this.#page(position))
        return Effect.map(Deferred.await(this.#news), () => this.#page(position))
      })
    )
    return Stream.concat(Stream.make<[TierEvent]>({ event: "following", seq: start, at_ms: nowMillis }), rest)
  }

  #page(position: number): readonly [ReadonlyArray<TierEvent>, Option.Option<number>] {
    const oldest = Math.max(1, this.#last - this.#capacity + 1)
    const from = Math.max(position + 1, oldest)
    const to = Math.min(this.#last, from + batch - 1)
    const events: Array<TierEvent> = []
    if (from > position + 1) {
      const next = this.#ring[from % this.#capacity] as TierEvent
      events.push({ event: "events_missed", seq: from - 1, at_ms: next.at_ms, count: from - 1 - position })
    }
    for (let seq = from; seq <= to; seq++) events.push(this.#ring[seq % this.#capacity] as TierEvent)
    return [events, Option.some(to)]
  }
}
