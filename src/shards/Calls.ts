/**
 * Calls to actors that may be in another process. Effect Cluster tries one whose runner is gone again for ever, ends one
 * whose runner stops with an interruption, and waits for one that is stuck in a connection that is dead. Here a call has a deadline,
 * and is sent again, within it, where the process it went to has stopped or no longer owns the actor. So calls are done at least
 * once; what must not be done twice carries a request id.
 */
import { Cause, Context, Effect, Exit, Layer } from "effect"
import { Settings } from "../config.ts"
import { Membership } from "./Membership.ts"
import { Placement } from "./Placement.ts"

export class Calls extends Context.Service<
  Calls,
  {
    /** `late` is what it fails with after `deadlineMillis`, by default `clusterCallMillis`. */
    readonly to: <A, E, L>(
      actor: { readonly group: string; readonly id: string },
      call: Effect.Effect<A, E>,
      late: () => L,
      deadlineMillis?: number
    ) => Effect.Effect<A, E | L>
  }
>()("ruvector/shards/Calls") {
  /** A process that is alone: there is no other for a call to be stuck in. */
  static readonly layerAlone = Layer.succeed(Calls, Calls.of({ to: (_, call) => call }))

  static readonly layer = Layer.effect(
    Calls,
    Effect.gen(function* () {
      const { clusterCallMillis } = yield* Settings
      const membership = yield* Membership
      const placement = yield* Placement

      return Calls.of({
        to: (actor, call, late, deadlineMillis = clusterCallMillis) =>
          Effect.withFiber((parent) =>
            Effect.callback((resume) => {
              const runFork = Effect.runForkWith(parent.context as Context.Context<never>)
              const ownerName = () => {
                const owner = placement.ownerOf(actor.group, actor.id)
                return owner === undefined ? "" : `${owner.host}:${owner.port}`
              }
              let sentTo = ""
              let again: ReturnType<typeof setTimeout> | undefined
              let ended = false
              let interrupt = () => {}
              const send = () => {
                again = undefined
                interrupt()
                sentTo = ownerName()
                const fiber = runFork(call)
                let isCurrent = true
                interrupt = () => {
                  isCurrent = false
                  fiber.interruptUnsafe()
                }
                fiber.addObserver((exit) => {
                  if (!isCurrent || ended) return
                  // Not by who waits for it: the process that did it has stopped.
                  if (Exit.isFailure(exit) && Cause.hasInterruptsOnly(exit.cause)) later(stoppedMillis)
                  else end(() => resume(exit))
                })
              }
              const later = (millis: number) => {
                if (!ended && again === undefined) again = setTimeout(send, millis)
              }
              const leave = membership.onChange(() => {
                if (ownerName() !== sentTo) later(movedMillis)
              })
              const timer = setTimeout(() => end(() => resume(Effect.fail(late()))), deadlineMillis)
              const end = (tell: () => void) => {
                if (ended) return
                ended = true
                leave()
                clearTimeout(timer)
                clearTimeout(again)
                tell()
                interrupt()
              }
              send()
              return Effect.sync(() => end(() => {}))
            })
          )
      })
    })
  )
}

/** After the process that was asked stopped, until it is asked again. */
const stoppedMillis = 50

/** After the actor was given to another process, for an answer of the one before. */
const movedMillis = 500
