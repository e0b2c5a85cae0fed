import { Data, Effect } from "effect"

/** Ends the process with code 1 and one line. */
export class Refused extends Data.TaggedError("Refused")<{ readonly message: string }> {}

/** What a command failed with, as its one line. */
export const refusing = <A, E extends Error, R>(effect: Effect.Effect<A, E, R>): Effect.Effect<A, Refused, R> =>
  Effect.mapError(effect, (error) => new Refused({ message: lineOf(error) }))

const lineOf = (error: Error): string => {
  if (error instanceof Refused) return error.message
  const { _tag, key, detail } = error as { readonly _tag?: string; readonly key?: string; readonly detail?: string }
  return _tag === "StoreFailure" ? `${key}: ${detail}` : error.message
}
