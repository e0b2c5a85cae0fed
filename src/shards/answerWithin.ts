/**
 * An effect's answer, or a failure where that takes too long: then it goes on by itself, as what hangs in a connection that is
 * gone cannot be waited for, not even to be interrupted.
 */
import { Effect, Fiber } from "effect"

export const answerWithin = <A, E>(millis: number, effect: Effect.Effect<A, E>): Effect.Effect<A, E | Error> =>
  Effect.flatMap(Effect.forkDetach(effect, { startImmediately: true }), (fiber) =>
    Effect.timeoutOrElse(Fiber.join(fiber), {
      duration: millis,
      orElse: () => {
        fiber.interruptUnsafe()
        return Effect.fail(new Error(`It has not answered within ${millis} ms.`))
      }
    }).pipe(Effect.onInterrupt(() => Effect.sync(() => fiber.interruptUnsafe())))
  )
