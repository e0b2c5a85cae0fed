/** Effects and streams as promises and async iterables, which a signal ends. */
import { Effect, Exit, Stream } from "effect"

/** What ends a call early. */
export interface Aborts {
  /** Ends the call before its deadline: it then rejects with the signal's reason. */
  readonly signal?: AbortSignal
}

export const run = async <A, E>(effect: Effect.Effect<A, E>, signal: AbortSignal | undefined): Promise<A> => {
  if (signal === undefined) return Effect.runPromise(effect)
  signal.throwIfAborted()
  const exit = await Effect.runPromiseExit(effect, { signal })
  if (Exit.isSuccess(exit)) return exit.value
  signal.throwIfAborted()
  return Effect.runPromise(exit)
}

export const iterate = <A, E>(stream: Stream.Stream<A, E>, signal: AbortSignal | undefined): AsyncIterable<A> => {
  if (signal === undefined) return Stream.toAsyncIterable(stream)
  const aborted = Effect.callback<never>((resume) => {
    const abort = () => resume(Effect.die(signal.reason))
    if (signal.aborted) return abort()
    signal.addEventListener("abort", abort, { once: true })
    return Effect.sync(() => signal.removeEventListener("abort", abort))
  })
  return Stream.toAsyncIterable(Stream.interruptWhen(stream, aborted))
}
