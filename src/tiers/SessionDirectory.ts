/**
 * Which node holds a logical stream, and how far it has come: `session id -> node, cursor`, so that a client that comes back
 * elsewhere can be led to its session, or have it made anew from its cursor. Entries end `ttlMillis` after they were put
 * last. It is a hint: where Redis is not there it knows nothing, and nothing fails.
 */
import { Clock, Context, Effect, Layer } from "effect"
import { RedisConnection } from "./RedisConnection.ts"

export interface SessionEntry {
  /** Name of the node; no control characters. */
  readonly node: string
  /** Where the stream has come to, in its owner's words. */
  readonly cursor: string
}

export class SessionDirectory extends Context.Service<
  SessionDirectory,
  {
    readonly put: (session: string, entry: SessionEntry) => Effect.Effect<void>
    readonly get: (session: string) => Effect.Effect<SessionEntry | undefined>
    readonly delete: (session: string) => Effect.Effect<void>
    /** Sessions of a node, those put longest ago first, at most `limit`. */
    readonly list: (node: string, limit: number) => Effect.Effect<ReadonlyArray<string>>
  }
>()("ruvector/tiers/SessionDirectory") {
  /** Bounded: the sessions put longest ago are forgotten beyond `sessionsMax`. */
  static readonly layerMemory = (options: {
    readonly ttlMillis: number
    readonly sessionsMax: number
  }): Layer.Layer<SessionDirectory> =>
    Layer.sync(SessionDirectory, () => {
      /** Put longest ago first, which is also the order in which they end. */
      const sessions = new Map<string, SessionEntry & { readonly expiresAt: number }>()
      const live = Effect.map(Clock.currentTimeMillis, (now) => {
        for (const [session, { expiresAt }] of sessions) {
          if (expiresAt > now && sessions.size <= options.sessionsMax) break
          sessions.delete(session)
        }
        return now
      })
      return SessionDirectory.of({
        put: (session, { node, cursor }) =>
          Effect.andThen(
            Effect.map(Clock.currentTimeMillis, (now) => {
              sessions.delete(session)
              sessions.set(session, { node, cursor, expiresAt: now + options.ttlMillis })
            }),
            Effect.asVoid(live)
          ),
        get: (session) =>
          Effect.map(live, () => {
            const entry = sessions.get(session)
            return entry === undefined ? undefined : { node: entry.node, cursor: entry.cursor }
          }),
        delete: (session) => Effect.sync(() => void sessions.delete(session)),
        list: (node, limit) =>
          Effect.map(live, () => {
            const found: Array<string> = []
            for (const [session, entry] of sessions) {
              if (found.length >= limit) break
              if (entry.node === node) found.push(session)
            }
            return found
          })
      })
    })

  /** `<prefix>:s:<session>` is `node`, newline, `cursor`; `<prefix>:n:<node>` is a sorted set of sessions by when they end. */
  static readonly layerRedis = (options: {
    readonly prefix: string
    readonly ttlMillis: number
  }): Layer.Layer<SessionDirectory, never, RedisConnection> =>
    Layer.effect(
      SessionDirectory,
      Effect.map(RedisConnection, (redis) => {
        const sessionKey = (session: string) => `${options.prefix}:s:${session}`
        const nodeKey = (node: string) => `${options.prefix}:n:${node}`
        const parse = (value: string): SessionEntry => {
          const end = value.indexOf("\n")
          return { node: value.slice(0, end), cursor: value.slice(end + 1) }
        }
        const get = (session: string) =>
          redis
            .run((client) => client.get(sessionKey(session)))
            .pipe(
              Effect.map((value) => (value === null ? undefined : parse(value))),
              Effect.orElseSucceed(() => undefined)
            )
        return SessionDirectory.of({
          put: (session, { node, cursor }) =>
            Effect.flatMap(Clock.currentTimeMillis, (now) =>
              redis.run((client) =>
                Promise.all([
                  client.set(sessionKey(session), `${node}\n${cursor}`, "PX", options.ttlMillis),
                  client.zadd(nodeKey(node), now + options.ttlMillis, session),
                  client.zremrangebyscore(nodeKey(node), "-inf", now),
                  client.pexpire(nodeKey(node), options.ttlMillis)
                ])
              )
            ).pipe(Effect.ignore),
          get,
          delete: (session) =>
            Effect.flatMap(get(session), (entry) =>
              redis.run((client) =>
                Promise.all([
                  client.unlink(sessionKey(session)),
                  ...(entry === undefined ? [] : [client.zrem(nodeKey(entry.node), session)])
                ])
              )
            ).pipe(Effect.ignore),
          list: (node, limit) =>
            Effect.gen(function* () {
              const now = yield* Clock.currentTimeMillis
              const sessions = yield* redis.run((client) =>
                client.zrangebyscore(nodeKey(node), `(${now}`, "+inf", "LIMIT", 0, limit)
              )
              if (sessions.length === 0) return []
              // One that has moved to another node is still in this one's set.
              const values = yield* redis.run((client) => client.mget(sessions.map(sessionKey)))
              return sessions.filter((_, i) => values[i]?.startsWith(`${node}\n`))
            }).pipe(Effect.orElseSucceed(() => []))
        })
      })
    )
}
