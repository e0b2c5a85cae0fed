/**
 * Work that a vector thread does in short steps, so that searches go in between: it yields after each step, or yields a
 * promise to be resumed when that settles (the value is then the yield's, the rejection is thrown there).
 */
export type Work<A> = Generator<Promise<unknown> | undefined, A, unknown>

/** Waits for a promise inside of work. */
export function* settled<A>(promise: Promise<A>): Work<A> {
  return (yield promise) as A
}
