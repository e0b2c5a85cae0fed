/**
 * The door before searches alone, in simulated time: what it makes of an overload does not depend on what else the machine
 * does. One server that takes a millisecond a search, give or take half of it; Poisson arrivals from many sources.
 */
import { Context, Effect, Exit, Layer, Scope } from "effect"
import { defaultSettings, Settings } from "../src/config.ts"
import { Admission } from "../src/shards/Admission.ts"
import { Shedding } from "../src/shards/Shedding.ts"
import { random } from "../test/support/Seeded.ts"

export interface Modelled {
  /** Answered, of what the server can. */
  readonly goodput: number
  /** Of those answered, in simulated milliseconds. */
  readonly p50: number
  readonly p99: number
  /** Shares of what was offered. */
  readonly refusedAtTheDoor: number
  readonly refusedLater: number
}

export interface ModelOptions {
  readonly sources: number
  /** Of what the server can. */
  readonly load: number
  readonly seed: number
}

/** The first seconds, in which it shows how much can be done, are not counted. */
const warmUpMillis = 5_000
const millis = 25_000
const serviceMillis = 1

export const modelDoor = async ({ load, seed, sources }: ModelOptions): Promise<Modelled> => {
  const source = random(seed)
  let now = 1_000
  const clock = { random: source.next, now: () => now }
  const scope = await Effect.runPromise(Scope.make())
  const services = await Effect.runPromise(
    Layer.buildWithScope(
      Admission.layerWith({ parallel: 1, now: clock.now }).pipe(
        Layer.provideMerge(Shedding.layerWith(clock)),
        Layer.provide(Layer.succeed(Settings, defaultSettings))
      ),
      scope
    )
  )
  const admission = Context.get(services, Admission)
  const kind = { aloneMillis: 0 }
  const line: Array<() => void> = []
  let busyUntil = Number.POSITIVE_INFINITY
  const waits: Array<number> = []
  let offered = 0
  let atTheDoor = 0
  let later = 0
  let next = now
  const from = now + warmUpMillis
  const end = now + millis
  while (Math.min(busyUntil, next) < end) {
    if (busyUntil <= next) {
      now = busyUntil
      busyUntil = Number.POSITIVE_INFINITY
      line.shift()?.()
    } else {
      now = next
      next += (-Math.log(1 - source.next()) * serviceMillis) / load
      const whose = `s${source.below(sources)}`
      const arrivedAt = now
      const isCounted = now >= from
      if (isCounted) offered += 1
      if (admission.isPressed() && admission.refusal({ tier: "standard" }, whose) !== undefined) {
        if (isCounted) atTheDoor += 1
      } else {
        const search = Effect.callback<void>((resume) => {
          line.push(() => resume(Effect.void))
        })
        const options = { kind, tier: "standard", source: whose, deadlineMillis: 10_000 } as const
        Effect.runFork(admission.run(options, search)).addObserver((exit) => {
          if (!isCounted) return
          if (Exit.isSuccess(exit)) waits.push(now - arrivedAt)
          else later += 1
        })
      }
    }
    if (line.length > 0 && busyUntil === Number.POSITIVE_INFINITY) {
      busyUntil = now + serviceMillis * (0.5 + source.next())
    }
  }
  await Effect.runPromise(Scope.close(scope, Exit.void))
  waits.sort((a, b) => a - b)
  const at = (share: number): number => waits[Math.floor(waits.length * share)] ?? Number.NaN
  return {
    goodput: (waits.length * serviceMillis) / (end - from),
    p50: at(0.5),
    p99: at(0.99),
    refusedAtTheDoor: atTheDoor / offered,
    refusedLater: later / offered
  }
}
