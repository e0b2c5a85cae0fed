/**
 * What clients asked and were answered, with the times of one monotonic clock: all that the checkers are given. Every write has
 * a value that no other has, so that a value that is read says which write it is of.
 */

/** Milliseconds of one clock that never goes back. */
export type Millis = number

export interface WriteOperation {
  readonly kind: "upsert" | "patch" | "delete"
  readonly client: number
  readonly key: string
  /** No other write has it. */
  readonly value: number
  readonly invoked: Millis
  /** When it was acknowledged; `undefined`: nobody knows whether it was done, or will be. */
  readonly completed: Millis | undefined
}

export interface ReadOperation {
  readonly kind: "get" | "search" | "final"
  readonly client: number
  readonly key: string
  /** `undefined`: there was no record. */
  readonly value: number | undefined
  readonly invoked: Millis
  readonly completed: Millis
}

/** A call as its caller saw it; what availability is counted by. */
export interface Call {
  readonly client: number
  readonly kind: string
  readonly invoked: Millis
  readonly completed: Millis
  /** Code of the error it failed with. */
  readonly failed: string | undefined
}

export interface FeedEvent {
  readonly kind: "upsert" | "metadata" | "delete" | "resync"
  readonly id: string
  readonly version: string
  readonly at: Millis
}

export interface MemberEvent {
  readonly type: "enter" | "update" | "leave"
  readonly id: string
  readonly version: string
  readonly score: number
  readonly at: Millis
}

/** A promise that was not kept. */
export interface Violation {
  readonly kind:
    | "lost write"
    | "stale read"
    | "value from nowhere"
    | "torn record"
    | "repeated effect"
    | "feed gap"
    | "feed repeat"
    | "feed order"
    | "standing query"
    | "ownership"
    | "stop"
  readonly what: string
}

export class History {
  readonly writes: Array<WriteOperation> = []
  readonly reads: Array<ReadOperation> = []
  readonly calls: Array<Call> = []
  readonly violations: Array<Violation> = []
  #values = 0

  /** A value for the next write. */
  value(): number {
    this.#values += 1
    return this.#values
  }
}

export const millisOf = (at: Millis | undefined): string => (at === undefined ? "never" : `${at.toFixed(1)} ms`)
