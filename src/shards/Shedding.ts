/**
 * What is shed at the level that `actors/LoadShedder.ts` has decided on, asked by every wire with every request: a plain call
 * that costs nothing at level 0.
 *
 * | level | what |
 * |---|---|
 * | 85 | a user may ask `shedUserRate` times a second |
 * | 90 | and the shedder closes connections that were idle for `shedIdleMillis`, `shedIdleBatch` at a time |
 * | 95 | and new connections are rejected, and `shedPercent` of what is not premium |
 *
 * Premium users are limited last: from level 95 on.
 */
import { Context, Effect, Layer, Metric, type Scope } from "effect"
import { Settings } from "../config.ts"
import { Overloaded } from "../protocol/Errors.ts"
import type { LoadLevel } from "../protocol/LoadShedder.ts"
import type { Tier } from "../protocol/Principal.ts"

export type { Tier }

/** The level from which on new connections are rejected. */
export const shedsConnectionsFrom: LoadLevel = 95

/** Who asks, as far as shedding is concerned. `user` is missing where users cannot be told apart. */
export interface Asker {
  readonly user?: string
  readonly tier: Tier
}

/** Why something is refused: less than an error, since it is made for every request refused. */
export interface Refusal {
  readonly bound: string
  readonly retryAfterMillis: number
}

/** Without a stack, which would cost more than all else of a refusal and says nothing of it. */
export const overloadedBy = ({ bound, retryAfterMillis }: Refusal): Overloaded => {
  const { stackTraceLimit } = Error
  Error.stackTraceLimit = 0
  const error = new Overloaded({ bound, retryAfterMillis }, { disableChecks: true })
  Error.stackTraceLimit = stackTraceLimit
  return error
}

/** A wire's connections, as the shedder sees them. */
export interface WireConnections {
  readonly count: () => number
  /** Closes, gracefully, up to `max` connections idle for longer; answers how many. */
  readonly closeIdle: (olderThanMillis: number, max: number, retryAfterMillis: number) => number
}

export class Shedding extends Context.Service<
  Shedding,
  {
    readonly level: () => LoadLevel
    readonly setLevel: (level: LoadLevel) => void
    /** Whether this request is shed. */
    readonly refusal: (asker: Asker) => Refusal | undefined
    /** Whether a connection that opens now is rejected. */
    readonly connectionRefusal: () => Refusal | undefined
    /** Something was refused; counted by its bound. */
    readonly count: (bound: string) => void
    /** Refused since the process started, by bound. */
    readonly refused: () => ReadonlyMap<string, number>
    /** A time to come back, spread so that not all come at once: from half of it to half more. */
    readonly spread: (millis: number) => number
    readonly joinConnections: (wire: WireConnections) => Effect.Effect<void, never, Scope.Scope>
    readonly connections: () => number
    readonly closeIdle: (olderThanMillis: number, max: number) => number
  }
>()("ruvector/shards/Shedding") {
  static readonly layer = Layer.effect(
    Shedding,
    Effect.map(Settings, (settings) => make(settings, Math.random, () => performance.now()))
  )

  /** With another clock and other chances. */
  static readonly layerWith = (options: { readonly random: () => number; readonly now: () => number }) =>
    Layer.effect(
      Shedding,
      Effect.map(Settings, (settings) => make(settings, options.random, options.now))
    )
}

interface Bucket {
  tokens: number
  at: number
}

/** Base of the time after which somebody rejected or shed at level 95 comes back. */
const shedRetryFactor = 8

const make = (settings: Settings["Service"], random: () => number, now: () => number): Shedding["Service"] => {
  const { shedUserRate, shedUsersMax, shedPercent, shedRetryMillis } = settings
  let level: LoadLevel = 0
  const buckets = new Map<string, Bucket>()
  const refused = new Map<string, number>()
  const counters = new Map<string, Metric.Metric<number, unknown>>()
  const wires = new Set<WireConnections>()

  const spread = (millis: number): number => Math.round(millis * (0.5 + random()))

  const count = (bound: string): void => {
    refused.set(bound, (refused.get(bound) ?? 0) + 1)
    let counter = counters.get(bound)
    if (counter === undefined) {
      counter = refusalsOf(bound)
      counters.set(bound, counter)
    }
    counter.updateUnsafe(1, metricContext)
  }

  const refuse = (bound: string, retryAfterMillis: number): Refusal => {
    count(bound)
    return { bound, retryAfterMillis }
  }

  /** A bucket of one second's requests for each user. */
  const rateRefusal = (user: string): Refusal | undefined => {
    const at = now()
    let bucket = buckets.get(user)
    if (bucket === undefined) {
      // Who asked longest ago has a full bucket again, mostly; so he is the one to forget.
      if (buckets.size >= shedUsersMax) buckets.delete(buckets.keys().next().value as string)
      bucket = { tokens: shedUserRate, at }
    } else {
      bucket.tokens = Math.min(shedUserRate, bucket.tokens + ((at - bucket.at) * shedUserRate) / 1_000)
      bucket.at = at
      buckets.delete(user)
    }
    buckets.set(user, bucket)
    if (bucket.tokens >= 1) {
      bucket.tokens -= 1
      return undefined
    }
    const untilNext = ((1 - bucket.tokens) * 1_000) / shedUserRate
    return refuse("shedUserRate", Math.ceil(untilNext + random() * shedRetryMillis))
  }

  return {
    level: () => level,
    setLevel: (next) => {
      level = next
      if (next < 85) buckets.clear()
    },
    refusal: ({ user, tier }) => {
      if (level < 85) return undefined
      const isLast = tier === "premium" && level < 95
      if (isLast) return undefined
      if (level >= 95 && tier !== "premium" && random() * 100 < shedPercent) {
        return refuse("shedPercent", spread(shedRetryMillis * shedRetryFactor))
      }
      return user === undefined ? undefined : rateRefusal(user)
    },
    connectionRefusal: () =>
      level < shedsConnectionsFrom ? undefined : refuse("connections", spread(shedRetryMillis * shedRetryFactor)),
    count,
    refused: () => refused,
    spread,
    joinConnections: (wire) =>
      Effect.acquireRelease(
        Effect.sync(() => {
          wires.add(wire)
        }),
        () => Effect.sync(() => wires.delete(wire))
      ),
    connections: () => {
      let open = 0
      for (const wire of wires) open += wire.count()
      return open
    },
    closeIdle: (olderThanMillis, max) => {
      let closed = 0
      for (const wire of wires) {
        if (closed >= max) break
        closed += wire.closeIdle(olderThanMillis, max - closed, shedRetryMillis * shedRetryFactor)
      }
      return closed
    }
  }
}

const metricContext = Context.empty()

/** Each a metric of its own: one with its labels in the context would make a key anew for each other series. */
const refusalsOf = (bound: string) =>
  Metric.counter("ruvector_shed_refusals", {
    description: "Requests and connections refused under load, by the bound that was reached",
    incremental: true,
    attributes: { bound }
  })
