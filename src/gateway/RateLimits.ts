/**
 * How often one key, and one address, may ask. Token buckets in this process decide, at once and without an effect; where
 * there is Redis, what they let through is told to `RateLimiter` of `effect/persistence` in lots of a tenth of the burst, and
 * what that answers (how long until the shared bucket has room again) holds here too. So the limit is one over all processes,
 * give or take a lot of each, a request never waits for Redis, and without Redis the limit of each process remains.
 *
 * Why not the library's limiter for each request: `bench/access.ts` measures both.
 */
import { Context, Duration, Effect, Exit, Layer, Option } from "effect"
import * as RateLimiter from "effect/persistence/RateLimiter"
import { Settings } from "../config.ts"
import { RateLimited } from "../protocol/Errors.ts"
import * as EffectRedis from "../tiers/EffectRedis.ts"
import { RedisConnection } from "../tiers/RedisConnection.ts"
import { networkOf } from "./ClientAddresses.ts"
import { RecentMap } from "./RecentMap.ts"

export class RateLimits extends Context.Service<
  RateLimits,
  {
    /** One request more of a key or token (of any name that is one's own). */
    readonly byKey: (name: string) => RateLimited | undefined
    /** One request more from an address. */
    readonly byAddress: (address: string) => RateLimited | undefined
    /** Whether the address has lately shown too many wrong credentials. */
    readonly tooManyRefusals: (address: string) => RateLimited | undefined
    readonly refused: (address: string) => void
  }
>()("ruvector/gateway/RateLimits") {
  /** On this process alone, or on the `RateLimiter` that there is. */
  static readonly layerWith = Layer.effect(
    RateLimits,
    Effect.gen(function* () {
      const settings = yield* Settings
      const shared = Option.getOrUndefined(yield* Effect.serviceOption(RateLimiter.RateLimiter))
      const run = Effect.runForkWith(yield* Effect.context<never>())
      const { keyRate, keyBurst, addressRate, addressBurst, ratesKnownMax, refusalsPerMinute } = settings

      let reports = 0
      const report =
        (kind: string, rate: number, burst: number): Report =>
        (name, bucket, tokens) => {
          if (shared === undefined || reports >= reportsMax) return
          reports += 1
          const window = Duration.millis((burst / rate) * 1_000)
          run(
            shared.consume({
              algorithm: "token-bucket",
              onExceeded: "delay",
              window,
              limit: burst,
              key: `${kind}:${name}`,
              tokens
            })
          ).addObserver((exit) => {
            reports -= 1
            if (!Exit.isSuccess(exit)) return
            const delay = Duration.toMillis(exit.value.delay)
            if (delay > 0) bucket.closedUntil = performance.now() + delay
          })
        }

      const keys = new Buckets(keyRate, keyBurst, ratesKnownMax, report("key", keyRate, keyBurst))
      const addresses = new Buckets(
        addressRate,
        addressBurst,
        ratesKnownMax,
        report("address", addressRate, addressBurst)
      )
      const refusals = new Buckets(refusalsPerMinute / 60, refusalsPerMinute, ratesKnownMax, () => {})

      const limited = (by: "key" | "address", limit: number, wait: number) =>
        wait === 0 ? undefined : new RateLimited({ by, limit, retryAfterMillis: Math.max(1, Math.ceil(wait)) })

      return RateLimits.of({
        byKey: (name) => (keyRate === 0 ? undefined : limited("key", keyRate, keys.take(name))),
        byAddress: (address) =>
          addressRate === 0 ? undefined : limited("address", addressRate, addresses.take(networkOf(address))),
        tooManyRefusals: (address) =>
          limited("address", Math.ceil(refusalsPerMinute / 60), refusals.wait(networkOf(address))),
        refused: (address) => {
          refusals.take(networkOf(address))
        }
      })
    })
  )

  /** Shared over Redis where the settings name one. */
  static readonly layer: Layer.Layer<RateLimits, never, Settings> = Layer.unwrap(
    Effect.map(Settings, ({ redisUrl, redisPrefix }) => {
      if (redisUrl === "") return RateLimits.layerWith
      const limiter = RateLimiter.layer.pipe(
        Layer.provide(RateLimiter.layerStoreRedis({ prefix: `${redisPrefix}:rate:` })),
        Layer.provide(EffectRedis.layer),
        Layer.provide(RedisConnection.layer)
      )
      return RateLimits.layerWith.pipe(Layer.provide(limiter))
    })
  )
}

/** Reports to Redis under way; what comes beyond is not reported. */
const reportsMax = 1_024

interface Bucket {
  tokens: number
  at: number
  /** Let through and not reported. */
  unreported: number
  /** The shared bucket is empty until then. */
  closedUntil: number
}

type Report = (name: string, bucket: Bucket, tokens: number) => void

class Buckets {
  readonly #perMilli: number
  readonly #burst: number
  readonly #lot: number
  readonly #report: Report
  readonly #buckets: RecentMap<Bucket>

  constructor(perSecond: number, burst: number, max: number, report: Report) {
    this.#perMilli = perSecond / 1_000
    this.#burst = burst
    this.#lot = Math.max(1, Math.trunc(burst / 10))
    this.#report = report
    this.#buckets = new RecentMap(max)
  }

  /** Takes a token: 0, or the milliseconds until there is one. */
  take(name: string): number {
    const bucket = this.#filled(name)
    const now = bucket.at
    if (bucket.closedUntil > now) return bucket.closedUntil - now
    if (bucket.tokens < 1) return (1 - bucket.tokens) / this.#perMilli
    bucket.tokens -= 1
    bucket.unreported += 1
    if (bucket.unreported >= this.#lot) {
      const tokens = bucket.unreported
      bucket.unreported = 0
      this.#report(name, bucket, tokens)
    }
    return 0
  }

  /** Milliseconds until there is a token. */
  wait(name: string): number {
    const { tokens } = this.#filled(name)
    return tokens >= 1 ? 0 : (1 - tokens) / this.#perMilli
  }

  #filled(name: string): Bucket {
    const now = performance.now()
    const bucket = this.#buckets.get(name)
    if (bucket === undefined) {
      const made = { tokens: this.#burst, at: now, unreported: 0, closedUntil: 0 }
      this.#buckets.set(name, made)
      return made
    }
    bucket.tokens = Math.min(this.#burst, bucket.tokens + (now - bucket.at) * this.#perMilli)
    bucket.at = now
    return bucket
  }
}
