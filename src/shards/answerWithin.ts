/**
 * An effect's answer, or a failure where that takes too long: then it goes on by itself, as what hangs in a connection that is
 * gone cannot be waited for, not even to be interrupted.
 */
import { Effect, Fiber } from "effect"

export const answerWithin = <A, E>(millis: number, effect: Effect.Effect<A, E>): Effect.Effect<A, E | NotInTime> =>
  Effect.flatMap(Effect.forkDetach(effect, { startImmediately: true }), (fiber) =>
    Effect.timeoutOrElse(Fiber.join(fiber), {
      duration: millis,
      orElse: () => {
        fiber.interruptUnsafe()
        return Effect.fail(new NotInTime(millis))
      }
    }).pipe(Effect.onInterrupt(() => Effect.sync(() => fiber.interruptUnsafe())))
  )

/** There was no answer in time. */
export class NotInTime extends Error {
  readonly _tag = "NotInTime"

  constructor(millis: number) {
    super(`It has not answered within ${millis} ms.`)
  }
}
