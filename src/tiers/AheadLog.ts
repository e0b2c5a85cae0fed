/**
 * Writes that are acknowledged as `warm`: in Redis before they are acknowledged, until the log of the partition has them. One
 * stream a partition, `<prefix>:<uid>:<partition>:w`; an entry is a log segment (without position) under the id
 * `<epoch>-<n>`. Redis refuses ids that do not increase, so that an owner's entries end with the marker of the next one, which
 * then reads what there is: an entry is either read by the next owner or was never acknowledged.
 *
 * What a failure of Redis can lose: entries that were acknowledged and not yet in the log, if Redis loses its memory and the
 * node ends, both within the time that a commit takes.
 */
import { Context, Effect, Layer, type Scope } from "effect"
import { Settings } from "../config.ts"
import { RedisConnection } from "./RedisConnection.ts"
import { partitionKey } from "./RedisWarmStore.ts"

export interface AheadHandle {
  /** Whether `recover` is to be called (again) before anything can be appended. */
  readonly ready: () => boolean
  /**
   * Ends what earlier owners append, and reads all there is, oldest first. Trimming `upTo` deletes it, once it is in the log.
   * `undefined` where Redis is not there or a newer owner is: to be tried again.
   */
  readonly recover: Effect.Effect<{ readonly segments: ReadonlyArray<Uint8Array>; readonly upTo: number } | undefined>
  /** The entry's position; `undefined` where it is not known to be in Redis. */
  readonly append: (segment: Uint8Array) => Effect.Effect<number | undefined>
  /** Everything up to a position is in the log. */
  readonly trim: (upTo: number) => Effect.Effect<void>
}

export class AheadLog extends Context.Service<
  AheadLog,
  { readonly open: (partition: string, epoch: number) => Effect.Effect<AheadHandle | undefined, never, Scope.Scope> }
>()("ruvector/tiers/AheadLog") {
  /** Without Redis `warm` is `cold`. */
  static readonly layerNone: Layer.Layer<AheadLog> = Layer.succeed(AheadLog, {
    open: () => Effect.succeed(undefined)
  })

  static readonly layerWith = (options: {
    readonly prefix: string
    readonly bytesMax: number
    readonly keepMillis: number
  }): Layer.Layer<AheadLog, never, RedisConnection> =>
    Layer.effect(
      AheadLog,
      Effect.map(RedisConnection, (redis) => ({
        open: (partition: string, epoch: number) => open(redis, options, partition, epoch)
      }))
    )

  static readonly layer: Layer.Layer<AheadLog, never, RedisConnection | Settings> = Layer.unwrap(
    Effect.map(Settings, ({ redisPrefix, warmWriteBytesMax, warmWriteMillis }) =>
      AheadLog.layerWith({ prefix: redisPrefix, bytesMax: warmWriteBytesMax, keepMillis: warmWriteMillis })
    )
  )
}

const open = Effect.fnUntraced(function* (
  redis: RedisConnection["Service"],
  options: { readonly prefix: string; readonly bytesMax: number; readonly keepMillis: number },
  partition: string,
  epoch: number
) {
  const key = `${partitionKey(options.prefix, partition)}:w`
  let ready = false
  let position = 0
  /** Nothing below this is trimmed: what was recovered there may not be in the log yet. */
  let floor = 0
  /** Bytes by position of what may be in Redis, oldest first. */
  const held = new Map<number, number>()
  let heldBytes = 0

  yield* redis.listen({
    onLost: () => {
      ready = false
    },
    onUp: () => undefined
  })

  const recover = Effect.gen(function* () {
    const marker = ++position
    yield* redis.run((client) =>
      Promise.all([client.xadd(key, `${epoch}-${marker}`, "m", "1"), client.pexpire(key, options.keepMillis)])
    )
    const segments: Array<Uint8Array> = []
    let from = "-"
    for (;;) {
      const page = yield* redis.run((client) =>
        client.xrangeBuffer(key, from, `(${epoch}-${marker}`, "COUNT", entriesAtOnce)
      )
      for (const [, fields] of page) {
        // A copy: a view of the socket's buffer is not aligned.
        if (fields[0]?.toString() === "s" && fields[1] !== undefined) segments.push(new Uint8Array(fields[1]))
      }
      const last = page.at(-1)
      if (last === undefined || page.length < entriesAtOnce) break
      from = `(${last[0].toString()}`
    }
    floor = marker
    ready = redis.up()
    return { segments, upTo: marker }
  }).pipe(Effect.orElseSucceed(() => undefined))

  const handle: AheadHandle = {
    ready: () => ready,
    recover,
    append: (segment) =>
      Effect.suspend(() => {
        if (!ready || heldBytes + segment.length > options.bytesMax) return Effect.succeed(undefined)
        const at = ++position
        held.set(at, segment.length)
        heldBytes += segment.length
        const bytes = Buffer.from(segment.buffer, segment.byteOffset, segment.byteLength)
        return redis
          .run((client) =>
            Promise.all([client.xadd(key, `${epoch}-${at}`, "s", bytes), client.pexpire(key, options.keepMillis)])
          )
          .pipe(
            Effect.map(() => at),
            Effect.catch((failure) =>
              Effect.sync(() => {
                // Another owner's marker is there; or Redis is full, which the next recovery finds out.
                if (failure.kind === "refused") ready = false
                return undefined
              })
            )
          )
      }),
    trim: (upTo) =>
      Effect.suspend(() => {
        for (const [at, bytes] of held) {
          if (at > upTo) break
          held.delete(at)
          heldBytes -= bytes
        }
        if (!ready || upTo < floor) return Effect.void
        return Effect.ignore(redis.run((client) => client.xtrim(key, "MINID", `${epoch}-${upTo + 1}`)))
      })
  }
  return handle
})

/** Entries read in one round trip. */
const entriesAtOnce = 32
