/** A search of a partition elsewhere that may be asked twice. */
import { Context, Effect, Exit, type Fiber, Metric, Option } from "effect"
import { DeadlineExceeded } from "../protocol/Errors.ts"
import type { PartitionError, PartitionHits } from "../protocol/IndexPartition.ts"
import type { NotHere } from "../protocol/Peer.ts"
import type { Lateness } from "./Lateness.ts"
import type { PeerGone } from "./Peers.ts"

/**
 * Asks directly, and by a message where the partition is not there, the connection has broken, or the answer is late by what
 * is usual: a message goes by another connection, to whoever owns the partition by then. The first good answer counts, within the
 * deadline. `direct` begins it and answers how it is given up: a fiber less in every search.
 */
export const hedged = (
  late: Lateness,
  deadlineMillis: number,
  direct: (
    context: Context.Context<never>,
    done: (exit: Exit.Exit<PartitionHits, PartitionError | NotHere | PeerGone>) => void
  ) => () => void,
  byMessage: Effect.Effect<PartitionHits, PartitionError>
): Effect.Effect<PartitionHits, PartitionError | DeadlineExceeded> =>
  Effect.withFiber((parent) =>
    Effect.callback((resume) => {
      const fork = Effect.runForkWith(parent.context as Context.Context<never>)
      const started = performance.now()
      let second: Fiber.Fiber<PartitionHits, PartitionError> | undefined
      let isFirstWaiting = true
      let failure: Exit.Exit<PartitionHits, PartitionError> | undefined
      let isEnded = false
      let giveUp = () => {}
      const stop = () => {
        isEnded = true
        clearTimeout(timer)
        clearTimeout(deadline)
        giveUp()
        second?.interruptUnsafe()
      }
      const end = (exit: Exit.Exit<PartitionHits, PartitionError | DeadlineExceeded>) => {
        if (isEnded) return
        stop()
        resume(exit)
      }
      const askAgain = () => {
        if (second !== undefined) return
        second = fork(byMessage)
        second.addObserver((exit) => {
          if (Exit.isSuccess(exit) || !isFirstWaiting) return end(exit)
          failure = exit
        })
      }
      const timer = setTimeout(() => {
        if (!late.mayAskAgain()) return
        hedges.updateUnsafe(1, Context.empty())
        askAgain()
      }, late.millis)
      const deadline = setTimeout(() => end(Exit.fail(new DeadlineExceeded({ deadlineMillis }))), deadlineMillis)
      giveUp = direct(parent.context as Context.Context<never>, (exit) => {
        if (isEnded) return
        isFirstWaiting = false
        if (Exit.isSuccess(exit)) {
          late.took(performance.now() - started)
          return end(Exit.succeed(exit.value))
        }
        const error = Exit.findErrorOption(exit)
        if (Option.isSome(error) && !isElsewhere(error.value)) return end(Exit.fail(error.value))
        clearTimeout(timer)
        if (failure === undefined) askAgain()
        else end(failure)
      })
      return Effect.sync(stop)
    })
  )

const isElsewhere = (error: PartitionError | NotHere | PeerGone): error is NotHere | PeerGone =>
  error._tag === "NotHere" || error._tag === "PeerGone"

const hedges = Metric.counter("ruvector_searches_hedged", {
  description: "Searches of a partition elsewhere that were asked a second time, being late"
})
