/**
 * The connection to Redis: one for everything that does not block, whose commands are sent and executed in the order in which they
 * are given (ioredis gathers those of a turn into one write), and the means to open further ones for what blocks.
 *
 * Redis is optional at all times, so nothing waits for it longer than `redisTimeoutMillis`, once: a command that is late
 * opens the circuit, and while it is open every call fails at once. A ping in the background, not a user's call, finds out
 * when Redis answers again. There is no queue for a connection that is down. Why not `CircuitBreaker` of `effect/persistence`: it
 * lets a user's call be the probe, and costs every call a scope.
 */
import { Context, Data, Effect, Layer, type Scope } from "effect"
import type { Redis } from "ioredis"
import { Settings } from "../config.ts"

/** Redis is not there, did not answer in time, or refused (`refused`: its words begin the detail, `OOM` for one). */
export class RedisFailure extends Data.TaggedError("RedisFailure")<{
  readonly kind: "down" | "timeout" | "refused"
  readonly detail: string
}> {}

export interface RedisOptions {
  /** `redis://[user:password@]host:port[/db]`, `rediss://` for TLS. Its credentials appear in no log line or error. */
  readonly url: string
  readonly timeoutMillis: number
}

export class RedisConnection extends Context.Service<
  RedisConnection,
  {
    /** Gives the client commands, without delay and in the order of the calls. Fails at once while Redis is not up. */
    readonly run: <A>(use: (redis: Redis) => Promise<A>) => Effect.Effect<A, RedisFailure>
    /** Connected, and the circuit closed. */
    readonly up: () => boolean
    /** Since the start. */
    readonly statistics: () => RedisStatistics
    /** Called when the connection is lost (commands under way may or may not be executed, even later), and when Redis is up. */
    readonly listen: (listener: {
      readonly onLost: () => void
      readonly onUp: () => void
    }) => Effect.Effect<void, never, Scope.Scope>
    /** A connection of its own, that neither reconnects nor times out: for what blocks or subscribes. The caller's to close. */
    readonly dedicated: Effect.Effect<Redis, RedisFailure>
  }
>()("ruvector/tiers/RedisConnection") {
  static readonly layerWith = (options: RedisOptions): Layer.Layer<RedisConnection> =>
    Layer.effect(RedisConnection, make(options))

  static readonly layer: Layer.Layer<RedisConnection, never, Settings> = Layer.unwrap(
    Effect.map(Settings, ({ redisUrl, redisTimeoutMillis }) =>
      RedisConnection.layerWith({ url: redisUrl, timeoutMillis: redisTimeoutMillis })
    )
  )
}

export interface RedisStatistics {
  readonly calls: number
  readonly failures: number
  readonly totalMillis: number
}

/** Without user, password and query. */
export const redactUrl = (url: string): string => {
  const parsed = URL.parse(url)
  return parsed === null
    ? "redis"
    : `${parsed.protocol}//${parsed.host}${parsed.pathname === "/" ? "" : parsed.pathname}`
}

const make = Effect.fnUntraced(function* (options: RedisOptions) {
  const context = yield* Effect.context<never>()
  const listeners = new Set<{ readonly onLost: () => void; readonly onUp: () => void }>()
  const where = redactUrl(options.url)
  const say = (line: Effect.Effect<void>) => {
    Effect.runForkWith(context)(Effect.annotateLogs(line, { redis: where }))
  }
  let connected = false
  let circuitOpen = false
  let closed = false
  /** Times the circuit has opened without having stayed closed for long. */
  let openings = 0
  let closedAt = 0
  let probe: NodeJS.Timeout | undefined
  let calls = 0
  let failures = 0
  let totalMillis = 0

  // Loaded only here: a node without Redis needs nothing of it.
  const { Redis: Client } = yield* Effect.promise(() => import("ioredis"))
  const redis = new Client(options.url, {
    lazyConnect: true,
    enableAutoPipelining: true,
    enableOfflineQueue: false,
    autoResendUnfulfilledCommands: false,
    maxRetriesPerRequest: 0,
    connectTimeout: Math.max(connectMillisMin, options.timeoutMillis),
    keepAlive: 10_000,
    noDelay: true,
    retryStrategy: (times) => reconnectMillis(times),
    connectionName: "ruvector"
  })

  const tell = (what: "onLost" | "onUp") => {
    for (const listener of listeners) listener[what]()
  }

  redis.on("ready", () => {
    connected = true
    say(Effect.logInfo("Redis is connected"))
    if (!circuitOpen) tell("onUp")
  })
  redis.on("close", () => {
    if (!connected) return
    connected = false
    if (!closed) say(Effect.logWarning("The connection to Redis is lost; going on without it"))
    tell("onLost")
  })
  // Without a listener it would end the process. ioredis's message has the address, never the password.
  let complained = false
  redis.on("error", (error) => {
    if (!complained) say(Effect.logWarning("Redis cannot be reached", oneLine(error)))
    complained = true
  })
  redis.on("ready", () => {
    complained = false
  })

  const openCircuit = () => {
    if (circuitOpen || closed) return
    circuitOpen = true
    openings = Date.now() - closedAt > steadyMillis ? 1 : openings + 1
    say(Effect.logWarning("Redis does not answer in time; going on without it"))
    let failedProbes = 0
    const wait = () => Math.min(probeMillis * 2 ** Math.min(openings + failedProbes, 10), probeMillisMax)
    const look = () => {
      const started = performance.now()
      const answered = (ok: boolean) => {
        if (closed) return
        if (ok && connected) {
          circuitOpen = false
          closedAt = Date.now()
          say(Effect.logInfo("Redis answers again"))
          tell("onUp")
          return
        }
        failedProbes += 1
        // Commands that wait for an answer pile up on a connection that gives none: begin anew.
        if (connected && failedProbes % probesPerConnection === 0) redis.disconnect(true)
        probe = setTimeout(look, wait())
      }
      withTimeout(redis.ping(), options.timeoutMillis).then(
        () => answered(performance.now() - started < options.timeoutMillis),
        () => answered(false)
      )
    }
    probe = setTimeout(look, wait())
  }

  yield* Effect.addFinalizer(() =>
    Effect.promise(async () => {
      closed = true
      clearTimeout(probe)
      // What has been given is sent before the connection ends, where that does not take long.
      if (connected && !circuitOpen) await withTimeout(redis.quit(), options.timeoutMillis).catch(() => undefined)
      redis.disconnect()
    })
  )

  const run = <A>(use: (client: Redis) => Promise<A>): Effect.Effect<A, RedisFailure> =>
    Effect.callback((resume) => {
      calls += 1
      if (!connected || circuitOpen) {
        failures += 1
        return resume(Effect.fail(new RedisFailure({ kind: "down", detail: "Redis is not up." })))
      }
      const started = performance.now()
      withTimeout(use(redis), options.timeoutMillis).then(
        (answer) => {
          totalMillis += performance.now() - started
          resume(Effect.succeed(answer))
        },
        (error: unknown) => {
          totalMillis += performance.now() - started
          failures += 1
          const kind = error instanceof Late ? "timeout" : isReply(error) ? "refused" : "down"
          if (kind === "timeout") openCircuit()
          resume(Effect.fail(new RedisFailure({ kind, detail: oneLine(error) })))
        }
      )
    })

  // A node starts without Redis as well; but where it is there, the first activations find it.
  yield* Effect.promise(() => withTimeout(redis.connect(), connectMillisMin).catch(() => undefined))

  return RedisConnection.of({
    run,
    up: () => connected && !circuitOpen,
    statistics: () => ({ calls, failures, totalMillis }),
    listen: (listener) =>
      Effect.acquireRelease(
        Effect.sync(() => {
          listeners.add(listener)
        }),
        () => Effect.sync(() => listeners.delete(listener))
      ),
    dedicated: Effect.tryPromise({
      try: async () => {
        const own = redis.duplicate({
          lazyConnect: true,
          enableAutoPipelining: false,
          enableOfflineQueue: false,
          retryStrategy: null
        })
        own.on("error", () => undefined)
        try {
          await own.connect()
        } catch (error) {
          own.disconnect()
          throw error
        }
        return own
      },
      catch: (error) => new RedisFailure({ kind: "down", detail: oneLine(error) })
    })
  })
})

/** For a first connection to be made, also across a continent. */
const connectMillisMin = 1_000

/** First wait of the circuit's probe; doubles with each failure, and with each opening that follows soon after the last. */
const probeMillis = 50
const probeMillisMax = 10_000
/** Probes without an answer after which the connection is made anew. */
const probesPerConnection = 8
/** A circuit that has been closed this long begins again with the shortest wait. */
const steadyMillis = 30_000

/** Exponential, at most 5 s, the upper half of it random, so that many nodes do not come back at one time. */
const reconnectMillis = (times: number): number => {
  const most = Math.min(50 * 2 ** Math.min(times, 10), 5_000)
  return most / 2 + Math.random() * (most / 2)
}

class Late extends Error {}

const withTimeout = <A>(promise: Promise<A>, millis: number): Promise<A> =>
  new Promise((resolve, reject) => {
    const timer = setTimeout(() => reject(new Late(`no answer in ${millis} ms`)), millis)
    promise.then(
      (answer) => {
        clearTimeout(timer)
        resolve(answer)
      },
      (error) => {
        clearTimeout(timer)
        reject(error)
      }
    )
  })

const isReply = (error: unknown): boolean => error instanceof Error && error.name === "ReplyError"

const oneLine = (error: unknown): string => {
  const text = error instanceof Error ? error.message || error.name : String(error)
  return text.split("\n")[0]?.slice(0, 200) ?? ""
}
