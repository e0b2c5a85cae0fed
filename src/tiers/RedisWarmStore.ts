/**
 * `WarmStore` on Redis; what it promises and why that holds is written there.
 *
 * | key | value |
 * |---|---|
 * | `<prefix>:<uid>:<partition>:g` | `<epoch, 16 digits>:<generation, 16 hex digits>` of the last fence |
 * | `<prefix>:<uid>:<partition>:r:<id>` | a record, see `encodeRecord` |
 * | `<prefix>:q:<key>` | CRC-32 and bytes of a result |
 *
 * A full Redis (`OOM`) refuses puts and fences and still deletes: puts pause for a while, reads and invalidations go on.
 */
import { randomBytes } from "node:crypto"
import { crc32 } from "node:zlib"
import { Effect, Fiber, Layer, Schedule } from "effect"
import { Settings } from "../config.ts"
import { type PartitionRecord, partitionAddressOf } from "../protocol/IndexPartition.ts"
import { InvalidationLedger } from "./InvalidationLedger.ts"
import { RedisConnection, type RedisFailure } from "./RedisConnection.ts"
import { type Claim, continues, uidOfResult, WarmStore } from "./WarmStore.ts"

export interface RedisWarmStoreOptions {
  readonly prefix: string
  readonly ttlMillis: number
}

export const layerWith = (options: RedisWarmStoreOptions): Layer.Layer<WarmStore, never, RedisConnection> =>
  Layer.effect(WarmStore, make(options))

export const layer: Layer.Layer<WarmStore, never, RedisConnection | Settings> = Layer.unwrap(
  Effect.map(Settings, ({ redisPrefix, warmTtlMillis }) => layerWith({ prefix: redisPrefix, ttlMillis: warmTtlMillis }))
)

/** What all keys of a partition begin with. */
export const partitionKey = (prefix: string, partition: string): string => {
  const { uid, partition: number } = partitionAddressOf(partition)
  return `${prefix}:${uid}:${number}`
}

/** A partition that this process has activated. */
interface Held {
  readonly partition: string
  readonly key: string
  /** What `<key>:g` has where the partition is trusted; `undefined` where it is not. */
  fence: { readonly text: string; readonly generation: Buffer } | undefined
  /** Between `fence` and `release`: only then a lost fence is made anew. */
  active: boolean
  epoch: number | undefined
  released: Claim | undefined
  /** Fences under way; the one in the background keeps out of their way. */
  fencing: number
  /** Records put under this generation; while there are none nothing needs to be invalidated. */
  put: number
}

const make = Effect.fnUntraced(function* (options: RedisWarmStoreOptions) {
  const redis = yield* RedisConnection
  const scope = yield* Effect.scope
  const ledger = new InvalidationLedger()
  /** Bounded by the partitions of this node. */
  const held = new Map<string, Held>()
  /** Collections deleted while Redis was not there. */
  const drops = new Set<string>()
  let hits = 0
  let misses = 0
  let errors = 0
  let putsPausedUntil = 0
  let putBytes = 0

  const failed = (failure: RedisFailure) => {
    errors += 1
    if (failure.detail.startsWith("OOM")) putsPausedUntil = Date.now() + fullPauseMillis
  }

  const lose = (of: Held) => {
    of.fence = undefined
    of.released = undefined
  }

  yield* redis.listen({
    onLost: () => {
      for (const of of held.values()) lose(of)
    },
    onUp: () => undefined
  })

  /** Sets a new generation, unless a newer epoch has set one. The partition is trusted from then on. */
  const fenceAnew = Effect.fnUntraced(function* (of: Held) {
    lose(of)
    const generation = randomBytes(8)
    const epoch = of.epoch
    of.fencing += 1
    const set = yield* Effect.result(
      redis.run((client) =>
        client.eval(
          fenceScript,
          1,
          `${of.key}:g`,
          epoch === undefined ? "" : epochText(epoch),
          generation.toString("hex"),
          String(fenceMillis)
        )
      )
    ).pipe(
      Effect.ensuring(
        Effect.sync(() => {
          of.fencing -= 1
        })
      )
    )
    if (set._tag === "Failure") return failed(set.failure)
    // Lost or fenced again meanwhile: this one is out of date.
    if (typeof set.success !== "string" || held.get(of.partition) !== of || of.epoch !== epoch || !redis.up()) return
    of.fence = { text: set.success, generation }
    of.put = 0
  })

  /** Raises the epoch of a generation that goes on. */
  const fenceOn = Effect.fnUntraced(function* (of: Held, epoch: number) {
    const fence = of.fence
    if (fence === undefined) return false
    const text = `${epochText(epoch)}:${fence.generation.toString("hex")}`
    const set = yield* Effect.result(
      redis.run((client) => client.eval(raiseScript, 1, `${of.key}:g`, fence.text, text, String(fenceMillis)))
    )
    if (set._tag === "Failure" || set.success !== 1 || of.fence !== fence) return false
    of.fence = { text, generation: fence.generation }
    return true
  })

  const fence = (partition: string, claim: Claim | undefined) =>
    Effect.suspend(() => {
      const before = held.get(partition)
      const of: Held = before ?? {
        partition,
        key: partitionKey(options.prefix, partition),
        fence: undefined,
        active: true,
        epoch: undefined,
        released: undefined,
        fencing: 0,
        put: 0
      }
      held.set(partition, of)
      const goesOn = continues(of.released, claim)
      of.active = true
      of.released = undefined
      of.epoch = claim?.epoch
      if (!goesOn || claim === undefined) return fenceAnew(of)
      return Effect.flatMap(fenceOn(of, claim.epoch), (on) => (on ? Effect.void : fenceAnew(of)))
    })

  // Brings back what lost its fence, and deletes what could not be deleted, whenever Redis is there.
  yield* Effect.suspend(() => {
    if (!redis.up()) return Effect.void
    const lost = [...held.values()]
      .filter((of) => of.active && of.fence === undefined && of.fencing === 0)
      .slice(0, fencesAtOnce)
    return Effect.andThen(
      Effect.forEach(lost, fenceAnew, { concurrency: fencesAtOnce, discard: true }),
      Effect.forEach([...drops], erase, { discard: true })
    )
  }).pipe(Effect.repeat(Schedule.spaced(refenceMillis)), Effect.forkIn(scope))

  const getRecords = Effect.fnUntraced(function* (partition: string, ids: ReadonlyArray<string>) {
    const none = (): ReadonlyArray<null> => {
      misses += ids.length
      return ids.map(() => null)
    }
    const of = held.get(partition)
    const fence = of?.fence
    if (of === undefined || fence === undefined || ids.length === 0) return none()
    const read = yield* Effect.result(
      redis.run((client) =>
        Promise.all([
          Promise.all(ids.map((id) => client.getexBuffer(`${of.key}:r:${id}`, "PX", options.ttlMillis))),
          client.get(`${of.key}:g`)
        ])
      )
    )
    if (read._tag === "Failure") {
      failed(read.failure)
      return none()
    }
    const [values, text] = read.success
    if (of.fence !== fence) return none()
    if (text !== fence.text) {
      lose(of)
      return none()
    }
    return ids.map((id, i) => {
      const value = values[i]
      if (value === null || value === undefined) {
        misses += 1
        return null
      }
      const record = decodeRecord(value, fence.generation, id)
      if (record === undefined) misses += 1
      else if (record === "damaged") {
        misses += 1
        errors += 1
      } else {
        hits += 1
        return record
      }
      return null
    })
  })

  const putRecords = (partition: string, records: ReadonlyArray<PartitionRecord>, ticket: number) =>
    Effect.suspend(() => {
      const of = held.get(partition)
      const fence = of?.fence
      if (of === undefined || fence === undefined || !redis.up() || Date.now() < putsPausedUntil)
        return Effect.succeed(0)
      const values: Array<readonly [string, Buffer]> = []
      let bytes = 0
      for (const record of records) {
        if (!ledger.admits(partition, record.id, ticket)) continue
        const value = encodeRecord(record, fence.generation)
        if (putBytes + bytes + value.length > putBytesMax) break
        bytes += value.length
        values.push([`${of.key}:r:${record.id}`, value])
      }
      if (values.length === 0) return Effect.succeed(0)
      of.put += values.length
      putBytes += bytes
      // Given to the client in this turn: what is invalidated from here on comes after it.
      return redis
        .run((client) => Promise.all(values.map(([key, value]) => client.set(key, value, "PX", options.ttlMillis))))
        .pipe(
          Effect.map(() => values.length),
          Effect.catch((failure) => {
            failed(failure)
            return Effect.succeed(0)
          }),
          Effect.ensuring(
            Effect.sync(() => {
              putBytes -= bytes
            })
          )
        )
    })

  const invalidate = (partition: string, ids: ReadonlyArray<string>) =>
    Effect.suspend(() => {
      ledger.invalidate(partition, ids)
      const of = held.get(partition)
      const fence = of?.fence
      if (of === undefined || fence === undefined || of.put === 0 || ids.length === 0) return Effect.void
      return redis
        .run((client) => {
          const unlinked: Array<Promise<number>> = []
          for (let at = 0; at < ids.length; at += keysAtOnce) {
            unlinked.push(client.unlink(ids.slice(at, at + keysAtOnce).map((id) => `${of.key}:r:${id}`)))
          }
          return Promise.all(unlinked)
        })
        .pipe(
          Effect.catch((failure) => {
            failed(failure)
            if (of.fence === fence) lose(of)
            return Effect.void
          }),
          Effect.asVoid
        )
    })

  /** Deletes every key of a collection; what fails is done again later. */
  const erase = Effect.fnUntraced(function* (uid: string) {
    let cursor = "0"
    do {
      const found = yield* Effect.result(
        redis.run((client) => client.scan(cursor, "MATCH", `${options.prefix}:${uid}:*`, "COUNT", keysAtOnce))
      )
      if (found._tag === "Failure") return
      const keys = found.success[1]
      if (keys.length > 0) {
        const gone = yield* Effect.result(redis.run((client) => client.unlink(keys)))
        if (gone._tag === "Failure") return
      }
      cursor = found.success[0]
    } while (cursor !== "0")
    drops.delete(uid)
  })

  const resultKey = (key: string) => `${options.prefix}:${uidOfResult(key)}:q:${key}`

  return WarmStore.of({
    getRecords,
    ticket: () => ledger.ticket(),
    putRecords,
    invalidate,
    fence,
    release: (partition, claim) =>
      Effect.sync(() => {
        const of = held.get(partition)
        if (of === undefined) return
        of.active = false
        if (of.fence !== undefined) of.released = claim
      }),
    distrust: (partition) =>
      Effect.sync(() => {
        const of = held.get(partition)
        if (of === undefined) return
        of.active = false
        lose(of)
      }),
    getResult: (key) =>
      redis
        .run((client) => client.getBuffer(resultKey(key)))
        .pipe(
          Effect.map((value) => {
            if (value === null) return undefined
            if (value.length >= 4 && value.readUInt32LE(0) === crc32(value.subarray(4))) return value.subarray(4)
            errors += 1
            return undefined
          }),
          Effect.catch((failure) => {
            failed(failure)
            return Effect.succeed(undefined)
          })
        ),
    putResult: (key, bytes, ttlMillis) =>
      Effect.suspend(() => {
        if (!redis.up() || Date.now() < putsPausedUntil || putBytes + bytes.length > putBytesMax) return Effect.void
        const value = Buffer.allocUnsafe(bytes.length + 4)
        value.writeUInt32LE(crc32(bytes), 0)
        value.set(bytes, 4)
        putBytes += value.length
        return redis
          .run((client) => client.set(resultKey(key), value, "PX", Math.max(1, Math.round(ttlMillis))))
          .pipe(
            Effect.catch((failure) => Effect.sync(() => failed(failure))),
            Effect.ensuring(
              Effect.sync(() => {
                putBytes -= value.length
              })
            ),
            Effect.asVoid
          )
      }),
    drop: (uid) =>
      Effect.suspend(() => {
        ledger.invalidateAll()
        for (const of of [...held.values()]) {
          if (partitionAddressOf(of.partition).uid !== uid) continue
          lose(of)
          of.active = false
          held.delete(of.partition)
        }
        if (drops.size < dropsMax) drops.add(uid)
        // Of a large collection this takes a while; it goes on behind the caller, which waits for what is soon done.
        return Effect.flatMap(Effect.forkIn(erase(uid), scope), (erasing) =>
          Effect.asVoid(Effect.timeoutOption(Fiber.await(erasing), dropMillis))
        )
      }),
    bytes: () => 0,
    shrink: () => {},
    state: Effect.sync(() => {
      let trusted = 0
      let waiting = 0
      for (const of of held.values()) {
        if (of.fence !== undefined) trusted += 1
        else if (of.active) waiting += 1
      }
      const sound = redis.up() && Date.now() >= putsPausedUntil && waiting === 0
      return {
        kind: "redis",
        level: sound ? "up" : "degraded",
        partitions: trusted,
        hits,
        misses,
        errors,
        bytes: 0,
        calls: redis.statistics().calls,
        callMillis: redis.statistics().totalMillis
      }
    })
  })
})

/** Between two looks at what lost its fence. */
const refenceMillis = 250
/** Fences made anew at one time. */
const fencesAtOnce = 64
/** Keys of one command. */
const keysAtOnce = 1_000
/** Bytes of records and results on their way to Redis; what comes on top is not put. */
const putBytesMax = 16 * 1_048_576
/** No puts for this long after Redis was full. */
const fullPauseMillis = 1_000
/** A deletion waits this long for its keys to be gone. */
const dropMillis = 1_000
/** Collections whose deletion is still to be done in Redis; their entries expire in any case. */
const dropsMax = 1_000
/** Time Redis remembers a fence of which nothing is heard any more. */
const fenceMillis = 7 * 86_400_000

const epochText = (epoch: number): string => String(epoch).padStart(16, "0")

/** ARGV: epoch (empty: as it is), generation, lifetime. Answers the value set; nothing where a newer epoch holds. */
const fenceScript = `
local now = redis.call("GET", KEYS[1])
local epoch = ARGV[1]
if epoch == "" then epoch = now and string.sub(now, 1, 16) or "0000000000000000" end
if now and string.sub(now, 1, 16) > epoch then return false end
local value = epoch .. ":" .. ARGV[2]
redis.call("SET", KEYS[1], value, "PX", ARGV[3])
return value`

/** ARGV: the value there must be, the new one, lifetime. */
const raiseScript = `
if redis.call("GET", KEYS[1]) ~= ARGV[1] then return 0 end
redis.call("SET", KEYS[1], ARGV[2], "PX", ARGV[3])
return 1`

const headerBytes = 24
const generationAt = 4
const encoder = new TextEncoder()

/**
 * CRC-32 of what follows, generation (8 bytes), components, bytes of id, of version and of metadata (u32, u16, u16, u32), the
 * vector as float32, id, version, metadata. Little-endian.
 */
export const encodeRecord = (record: PartitionRecord, generation: Uint8Array): Buffer => {
  const id = encoder.encode(record.id)
  const metadata = encoder.encode(record.metadata)
  const version = encoder.encode(record.version)
  const vector = new Uint8Array(record.vector.buffer, record.vector.byteOffset, record.vector.byteLength)
  const bytes = Buffer.allocUnsafe(headerBytes + vector.length + id.length + version.length + metadata.length)
  bytes.set(generation, generationAt)
  bytes.writeUInt32LE(record.vector.length, 12)
  bytes.writeUInt16LE(id.length, 16)
  bytes.writeUInt16LE(version.length, 18)
  bytes.writeUInt32LE(metadata.length, 20)
  let at = headerBytes
  for (const part of [vector, id, version, metadata]) {
    bytes.set(part, at)
    at += part.length
  }
  bytes.writeUInt32LE(crc32(bytes.subarray(generationAt)), 0)
  return bytes
}

/** `undefined`: of another generation. `damaged`: not what was put there for this id. */
export const decodeRecord = (
  bytes: Buffer,
  generation: Buffer,
  id: string
): PartitionRecord | undefined | "damaged" => {
  if (bytes.length < headerBytes || bytes.readUInt32LE(0) !== crc32(bytes.subarray(generationAt))) return "damaged"
  if (bytes.compare(generation, 0, 8, generationAt, generationAt + 8) !== 0) return undefined
  const components = bytes.readUInt32LE(12)
  const idAt = headerBytes + 4 * components
  const versionAt = idAt + bytes.readUInt16LE(16)
  const metadataAt = versionAt + bytes.readUInt16LE(18)
  if (metadataAt + bytes.readUInt32LE(20) !== bytes.length) return "damaged"
  if (bytes.toString("utf8", idAt, versionAt) !== id) return "damaged"
  // A copy: the bytes are a view of the socket's buffer, and not aligned.
  const vector = new Float32Array(new Uint8Array(bytes.subarray(headerBytes, idAt)).buffer)
  return {
    id,
    vector,
    metadata: bytes.toString("utf8", metadataAt),
    version: bytes.toString("utf8", versionAt, metadataAt)
  }
}
