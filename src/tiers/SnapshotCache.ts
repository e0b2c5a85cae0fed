/**
 * A bounded cache on the local disk of whole objects that are read as files, between an object store far away and its
 * users. It serves `localPath` and `withFile`; everything else passes through. What this process stores from a file is
 * cached as it goes out, so that no node downloads what it just wrote.
 *
 * It is for objects that are never replaced by another process (snapshots: their keys hold a nonce). What this process
 * deletes or replaces is forgotten.
 *
 * A cached object is one file, `<first 32 hexadecimal digits of the key's SHA-256>.<bytes>.<CRC-32>`, put there whole by
 * `rename`, so the folder's names are the whole index. What an earlier process left is checked against its name before
 * its first use, and what was written to since it was checked, before its next. Each user gets a link of its own to the file, so that neither eviction nor deletion takes it away.
 */
import { createHash, randomUUID } from "node:crypto"
import { copyFile, link, mkdir, open, readdir, rename, rm, stat, utimes } from "node:fs/promises"
import { join } from "node:path"
import { crc32 } from "node:zlib"
import { Deferred, Effect, Layer, Metric, type Scope } from "effect"
import { checkObjectKey, type ObjectMissing, ObjectStore, StoreFailure, withFileOf } from "./ObjectStore.ts"

export interface SnapshotCacheOptions {
  /** The cache's own; made where it is missing, and on the file system that downloads come to, so that they are moved. */
  readonly directory: string
  /**
   * Bytes of cached files. Downloads that have just come and what is in use may be beyond it for as long as they are: a
   * file in use is never evicted.
   */
  readonly bytesMax: number
}

/** Puts the cache before the object store that is provided. One process at a time uses a directory. */
export const layer = (options: SnapshotCacheOptions): Layer.Layer<ObjectStore, StoreFailure, ObjectStore> =>
  Layer.effect(
    ObjectStore,
    Effect.flatMap(ObjectStore, (inner) => make(options, inner))
  )

const hits = Metric.counter("ruvector_disk_cache_hits", { description: "Snapshot files served from the local disk" })
const misses = Metric.counter("ruvector_disk_cache_misses", { description: "Snapshot files fetched from the store" })
/** Cached files that were not what they should be. */
export const damagedFiles = Metric.counter("ruvector_disk_cache_damaged", {
  description: "Cached files whose length or checksum was not theirs; fetched anew"
})
const evictions = Metric.counter("ruvector_disk_cache_evictions", { description: "Cached files evicted for room" })
const bytesHeld = Metric.gauge("ruvector_disk_cache_bytes", { description: "Bytes of cached snapshot files" })

/** Times a path is looked for anew because the file went away between the look and the link. */
const attemptsMax = 4

/** Bytes of a file that are summed at one time. */
const sumBytes = 1_048_576

interface Entry {
  readonly id: string
  readonly path: string
  readonly sizeBytes: number
  readonly crc: number
  users: number
  /**
   * The file's modification time as this process set it when it had written or checked the file: a whole second, which a
   * write by anybody does not leave. `undefined` where it was not checked yet.
   */
  checkedSeconds: number | undefined
}

/** A download under way, which all who want it wait for. */
interface Flight {
  readonly done: Deferred.Deferred<void, ObjectMissing | StoreFailure>
  /** The object was deleted or replaced meanwhile: what comes is not kept. */
  stale: boolean
}

const make = Effect.fnUntraced(function* (options: SnapshotCacheOptions, inner: ObjectStore["Service"]) {
  const scope = yield* Effect.scope
  const files = join(options.directory, "files")
  const aside = join(options.directory, "aside")
  /** By id, least recently used first. */
  const entries = new Map<string, Entry>()
  const flights = new Map<string, Flight>()
  let bytes = 0

  const attempt = <A>(operation: string, key: string, act: () => Promise<A>): Effect.Effect<A, StoreFailure> =>
    Effect.tryPromise({
      try: act,
      catch: (cause) =>
        new StoreFailure({ operation, key, detail: `disk cache: ${(cause as Error).message}`, uncertain: false })
    })
  const removeFile = (path: string): Effect.Effect<void> =>
    Effect.promise(() => rm(path, { force: true }).catch(() => undefined))
  const asidePath = (): string => join(aside, randomUUID())

  const found = yield* attempt("open", options.directory, () => takeOver(files, aside))
  for (const entry of found) {
    entries.set(entry.id, entry)
    bytes += entry.sizeBytes
  }

  const forget = (entry: Entry): void => {
    if (entries.get(entry.id) !== entry) return
    entries.delete(entry.id)
    bytes -= entry.sizeBytes
  }

  /** Removes what was used least recently and is not in use, until no more than `bytesMax` bytes are left. */
  const shrink = (bytesMax: number): Effect.Effect<void> =>
    Effect.gen(function* () {
      for (const entry of entries.values()) {
        if (bytes <= bytesMax) break
        if (entry.users > 0) continue
        forget(entry)
        yield* removeFile(entry.path)
        yield* Metric.update(evictions, 1)
      }
      yield* Metric.update(bytesHeld, bytes)
    })

  /** Takes a whole file, which is moved in, as the cached form of an object. */
  const keep = (key: string, path: string): Effect.Effect<void, StoreFailure> =>
    Effect.gen(function* () {
      const id = idOf(key)
      const { sizeBytes, crc } = yield* attempt("localPath", key, () => sumOf(path))
      if (sizeBytes > options.bytesMax) return yield* removeFile(path)
      const kept = join(files, `${id}.${sizeBytes}.${crc.toString(16).padStart(8, "0")}`)
      const checkedSeconds = yield* attempt("localPath", key, async () => {
        const seconds = await markChecked(path)
        await rename(path, kept)
        return seconds
      })
      const before = entries.get(id)
      if (before !== undefined) {
        forget(before)
        if (before.path !== kept) yield* removeFile(before.path)
      }
      entries.set(id, { id, path: kept, sizeBytes, crc, users: 0, checkedSeconds })
      bytes += sizeBytes
    })

  /** The object is another one from now on, or none. */
  const drop = (key: string): Effect.Effect<void> =>
    Effect.suspend(() => {
      const id = idOf(key)
      const flight = flights.get(id)
      if (flight !== undefined) flight.stale = true
      flights.delete(id)
      const entry = entries.get(id)
      if (entry === undefined) return Effect.void
      forget(entry)
      return Effect.andThen(removeFile(entry.path), Metric.update(bytesHeld, bytes))
    })

  const fetch = (key: string, flight: Flight): Effect.Effect<void, ObjectMissing | StoreFailure> =>
    Effect.scoped(
      Effect.gen(function* () {
        yield* Metric.update(misses, 1)
        const path = yield* inner.localPath(key).pipe(
          // A full disk: what is only a copy makes room.
          Effect.catchIf(
            (error) => error._tag === "StoreFailure" && /ENOSPC|EDQUOT/.test(error.detail),
            () => Effect.andThen(shrink(0), inner.localPath(key))
          )
        )
        const copy = asidePath()
        yield* Effect.gen(function* () {
          yield* attempt("localPath", key, () => linkOrCopy(path, copy))
          if (!flight.stale) yield* keep(key, copy)
        }).pipe(
          Effect.tapError((error) => Effect.logWarning("Not cached on disk", key, error.detail)),
          Effect.ignore,
          Effect.ensuring(removeFile(copy))
        )
      })
    )

  /** Fetches an object, or waits for who does. Afterwards it is in the cache, or cannot be. */
  const fetched = (key: string): Effect.Effect<void, ObjectMissing | StoreFailure> =>
    Effect.uninterruptibleMask((restore) =>
      Effect.suspend(() => {
        const id = idOf(key)
        const under = flights.get(id)
        if (under !== undefined) return restore(Deferred.await(under.done))
        const flight: Flight = { done: Deferred.makeUnsafe(), stale: false }
        flights.set(id, flight)
        // Of the cache's own, so that it comes to its end, for the others, where the first who asked gives up.
        return fetch(key, flight).pipe(
          Effect.onExit((exit) => {
            if (flights.get(id) === flight) flights.delete(id)
            return Deferred.done(flight.done, exit)
          }),
          Effect.interruptible,
          Effect.forkIn(scope),
          Effect.andThen(restore(Deferred.await(flight.done)))
        )
      })
    )

  /** Checks a file that an earlier process left, or that was written to. */
  const verify = (key: string, entry: Entry): Effect.Effect<boolean> =>
    Effect.gen(function* () {
      const checked = entry.checkedSeconds
      if (checked !== undefined) {
        const stats = yield* Effect.promise(() => stat(entry.path).catch(() => undefined))
        if (stats?.size === entry.sizeBytes && stats.mtimeMs === checked * 1_000) return true
      }
      const sum = yield* Effect.promise(() => sumOf(entry.path).catch(() => undefined))
      if (sum?.sizeBytes === entry.sizeBytes && sum.crc === entry.crc) {
        entry.checkedSeconds = yield* Effect.promise(() => markChecked(entry.path).catch(() => undefined))
        return true
      }
      if (entries.get(entry.id) !== entry) return false
      forget(entry)
      const fault = sum === undefined ? "it cannot be read" : `it has ${sum.sizeBytes} bytes with another checksum`
      yield* Effect.logWarning("Damaged file in the disk cache; fetched anew", { key, file: entry.path, fault })
      yield* Metric.update(damagedFiles, 1)
      yield* removeFile(entry.path)
      return false
    })

  /** A link to the cached file, which the user's scope removes; `undefined` where there is none to be had. */
  const lend = (key: string): Effect.Effect<string | undefined, never, Scope.Scope> =>
    Effect.gen(function* () {
      const entry = entries.get(idOf(key))
      if (entry === undefined || !(yield* verify(key, entry))) return undefined
      return yield* Effect.acquireRelease(
        Effect.suspend(() => {
          entry.users += 1
          const path = asidePath()
          const now = new Date()
          return Effect.promise(() =>
            link(entry.path, path)
              // The order of use is known to the next process by the files' access times.
              .then(() => utimes(entry.path, now, entry.checkedSeconds ?? now))
              .then(
                () => path,
                () => undefined
              )
          )
        }),
        (path) =>
          Effect.suspend(() => {
            entry.users -= 1
            const tidy = path === undefined ? Effect.void : removeFile(path)
            return Effect.andThen(tidy, shrink(options.bytesMax))
          })
      ).pipe(
        Effect.tap((path) => {
          if (path === undefined) forget(entry)
          else if (entries.get(entry.id) === entry) {
            entries.delete(entry.id)
            entries.set(entry.id, entry)
          }
          return shrink(options.bytesMax)
        })
      )
    })

  const localPath: ObjectStore["Service"]["localPath"] = (key) =>
    Effect.gen(function* () {
      checkObjectKey(key)
      for (let tries = 0; tries < attemptsMax; tries++) {
        const path = yield* lend(key)
        if (path !== undefined) {
          if (tries === 0) yield* Metric.update(hits, 1)
          return path
        }
        yield* fetched(key)
        if (!entries.has(idOf(key))) break
      }
      // Larger than the cache, deleted at once, or the disk does not take it: a file of the user's own.
      return yield* inner.localPath(key)
    })

  return ObjectStore.of({
    create: (key, body, createOptions) => {
      if (body instanceof Uint8Array) return Effect.tap(inner.create(key, body, createOptions), () => drop(key))
      const copy = asidePath()
      return Effect.uninterruptibleMask((restore) =>
        Effect.gen(function* () {
          const linked = yield* Effect.promise(() =>
            link(body.file, copy).then(
              () => true,
              () => false
            )
          )
          const etag = yield* restore(inner.create(key, body))
          yield* drop(key)
          if (linked) yield* Effect.andThen(Effect.ignore(keep(key, copy)), shrink(options.bytesMax))
          return etag
        }).pipe(Effect.ensuring(removeFile(copy)))
      )
    },
    replace: (key, body, expected) => Effect.ensuring(inner.replace(key, body, expected), drop(key)),
    get: inner.get,
    list: inner.list,
    delete: (key) => Effect.ensuring(inner.delete(key), drop(key)),
    localPath,
    withFile: withFileOf(localPath)
  })
})

/** Makes the folders; gives what an earlier process left whole, in the order of its use. */
const takeOver = async (files: string, aside: string): Promise<Array<Entry>> => {
  await mkdir(files, { recursive: true })
  await rm(aside, { recursive: true, force: true })
  await mkdir(aside)
  const found: Array<readonly [number, Entry]> = []
  for (const name of await readdir(files)) {
    const [, id, size, crc] = /^([0-9a-f]{32})\.(\d{1,15})\.([0-9a-f]{8})$/.exec(name) ?? []
    if (id === undefined) continue
    const path = join(files, name)
    const { atimeMs } = await stat(path)
    const entry = {
      id,
      path,
      sizeBytes: Number(size),
      crc: Number.parseInt(crc as string, 16),
      users: 0,
      checkedSeconds: undefined
    }
    found.push([atimeMs, entry])
  }
  return found.sort(([a], [b]) => a - b).map(([, entry]) => entry)
}

const idOf = (key: string): string => createHash("sha256").update(key).digest("hex").slice(0, 32)

/** Sets a file's modification time to a whole second, which is given. */
const markChecked = async (path: string): Promise<number> => {
  const now = Date.now() / 1_000
  await utimes(path, now, Math.floor(now))
  return Math.floor(now)
}

const linkOrCopy = async (from: string, to: string): Promise<void> => {
  try {
    await link(from, to)
  } catch {
    await copyFile(from, to)
  }
}

/** Length and CRC-32 of a file, read piece by piece. */
const sumOf = async (path: string): Promise<{ readonly sizeBytes: number; readonly crc: number }> => {
  const file = await open(path, "r")
  try {
    const buffer = Buffer.allocUnsafeSlow(sumBytes)
    let crc = 0
    let sizeBytes = 0
    for (;;) {
      const { bytesRead } = await file.read(buffer, 0, buffer.length, sizeBytes)
      if (bytesRead === 0) return { sizeBytes, crc }
      crc = crc32(buffer.subarray(0, bytesRead), crc)
      sizeBytes += bytesRead
    }
  } finally {
    await file.close()
  }
}
