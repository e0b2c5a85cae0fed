/**
 * Damage to what a server keeps, while no server uses it, as failing disks and careless people do it, with what has to be
 * said of it and how the object is put back from its copy.
 */
import { createHash } from "node:crypto"
import { mkdir, readdir, readFile, unlink, writeFile } from "node:fs/promises"
import { join } from "node:path"
import { Effect, type Layer, Result } from "effect"
import { ObjectStore } from "../../src/tiers/ObjectStore.ts"
import { decodeManifest } from "../../src/tiers/PartitionManifest.ts"
import type { Random } from "../support/Seeded.ts"

export interface Damage {
  readonly kind: DamageKind
  /** What the log has to name. */
  readonly object: string
  readonly uid: string
  readonly partition: number
  /**
   * `passed over`: the server goes on without loss; `refused`: the partition answers `partition_corrupt`; `cut`: what was at
   * the log's end is put aside.
   */
  readonly outcome: "passed over" | "refused" | "cut"
  readonly restore: () => Promise<void>
}

/** Where a server keeps what. */
export interface Place {
  /** The server's `--data`. */
  readonly data: string
  /** Its directory on this machine. */
  readonly local: string
  readonly store: Layer.Layer<ObjectStore, unknown>
  /** Whether objects are files of `local`, and not in a bucket behind a cache in `local`. */
  readonly inFiles: boolean
}

export const damageKinds = [
  "byte of a snapshot",
  "cut snapshot",
  "missing snapshot",
  "byte of a log object",
  "missing log object",
  "byte of the manifest",
  "byte of the last log object"
] as const
/** Where objects are in a bucket. */
export const cacheDamageKinds = ["byte of a cached file", "cut cached file"] as const
export type DamageKind = (typeof damageKinds)[number] | (typeof cacheDamageKinds)[number]

/** Files that a process left when it died, or that are somebody else's. */
export const leaveGarbage = async ({ local }: Place, source: Random): Promise<void> => {
  await mkdir(join(local, "scratch", `snapshot-${source.below(1_000)}`), { recursive: true })
  await writeFile(join(local, "scratch", `garbage-${source.below(1_000)}`), Buffer.from(source.vector(64)))
}

/** A lock whose holder is gone, of the form that a dead process leaves. */
export const leaveLock = async ({ local }: Place): Promise<void> => {
  const path = join(local, "LOCK")
  const left = await readFile(path, "utf8").catch(() => undefined)
  // Left by the killed server already; its number may be another process's by now, which its start time tells.
  if (left !== undefined) await writeFile(path, left.replace(/"pid":\d+/, `"pid":${process.pid}`))
}

interface PartitionFiles {
  readonly prefix: string
  readonly snapshots: ReadonlyArray<{ readonly seq: number; readonly keys: ReadonlyArray<string> }>
  readonly prunedSeq: number
  /** Keys of the log after the newest snapshot. */
  readonly tail: ReadonlyArray<string>
}

/** Damages an object of a partition that nothing was done to yet; `undefined` where none is in the right state. */
export const damage = (
  place: Place,
  kind: DamageKind,
  untouched: (uid: string, partition: number) => boolean,
  source: Random
): Promise<Damage | undefined> =>
  run(
    place,
    Effect.gen(function* () {
      const store = yield* ObjectStore
      const partitions = (yield* partitionsOf(store)).filter(({ prefix }) => {
        const { uid, partition } = addressOf(prefix)
        return untouched(uid, partition)
      })
      const cached = kind.includes("cached") ? yield* Effect.promise(() => cachedFiles(place)) : undefined
      const candidates = partitions
        .flatMap((partition) => targetsOf(partition, kind).map((key) => ({ partition, key })))
        .filter(({ key }) => cached === undefined || cached.has(cacheIdOf(key)))
      if (candidates.length === 0) return undefined
      const { partition, key } = source.pick(candidates)
      const original = (yield* store.get(key)).body
      const file =
        cached?.get(cacheIdOf(key)) ?? (place.inFiles ? yield* Effect.promise(() => fileOf(place, key)) : undefined)
      const changed = damaged(original, kind, source)
      if (file !== undefined) yield* Effect.promise(() => (changed ? writeFile(file, changed) : unlink(file)))
      else yield* put(key, changed)
      // A machine that has a copy of the object would not meet the damage.
      const copy =
        cached === undefined ? (yield* Effect.promise(() => cachedFiles(place))).get(cacheIdOf(key)) : undefined
      if (copy !== undefined) yield* Effect.promise(() => unlink(copy))
      const outcome = /snapshot|cached/.test(kind) ? "passed over" : kind.includes("last") ? "cut" : "refused"
      return {
        kind,
        object: key.slice(partition.prefix.length + 1),
        ...addressOf(partition.prefix),
        outcome,
        // What was cut off has a segment of the opener's in its place by now; anything else lies where it lay.
        restore: () =>
          outcome === "cut" || file === undefined ? run(place, put(key, original)) : writeFile(file, original)
      } satisfies Damage
    })
  )

const run = <A, E>({ store }: Place, effect: Effect.Effect<A, E, ObjectStore>): Promise<A> =>
  Effect.runPromise(Effect.provide(effect, store))

/** Makes an object be these bytes, or none. */
const put = Effect.fnUntraced(function* (key: string, bytes: Uint8Array | undefined) {
  const store = yield* ObjectStore
  if (bytes === undefined) return yield* store.delete(key)
  const there = yield* Effect.result(store.get(key))
  if (Result.isSuccess(there)) yield* store.replace(key, bytes, there.success.etag)
  else yield* store.create(key, bytes)
})

/** The store's own file of an object: of its newest generation where it was replaced. */
const fileOf = async ({ local }: Place, key: string): Promise<string> => {
  const path = join(local, "objects", key)
  const generations = await readdir(`${path}~`).catch(() => [])
  const newest = Math.max(...generations.map(Number).filter(Number.isInteger))
  return Number.isFinite(newest) ? join(`${path}~`, String(newest)) : path
}

/** Files of the disk cache by the beginning of their names, which tells the object. */
const cachedFiles = async ({ local }: Place): Promise<ReadonlyMap<string, string>> => {
  const folder = join(local, "cache", "files")
  const names = await readdir(folder).catch(() => [])
  return new Map(names.map((name) => [name.split(".")[0] as string, join(folder, name)]))
}

const cacheIdOf = (key: string): string => createHash("sha256").update(key).digest("hex").slice(0, 32)

/** The bytes that are there from now on; `undefined` for none. */
const damaged = (original: Uint8Array, kind: DamageKind, source: Random): Uint8Array | undefined => {
  if (kind.startsWith("missing")) return undefined
  if (kind.startsWith("cut")) return original.slice(0, source.below(original.length))
  const changed = new Uint8Array(original)
  const at = source.below(changed.length)
  changed[at] = (changed[at] as number) ^ (1 << source.below(8))
  return changed
}

const targetsOf = ({ prefix, snapshots, prunedSeq, tail }: PartitionFiles, kind: DamageKind): ReadonlyArray<string> => {
  switch (kind) {
    case "byte of the manifest":
      return [`${prefix}/manifest`]
    case "byte of a log object":
    case "missing log object":
      return tail.slice(0, -1)
    case "byte of the last log object":
      return tail.slice(-1)
    case "byte of a cached file":
    case "cut cached file":
      return snapshots[0]?.keys ?? []
    default: {
      const [newest, older] = snapshots
      // One that there is something else to open instead of.
      if (newest === undefined || (older === undefined && prunedSeq > 0)) return []
      return newest.keys
    }
  }
}

const addressOf = (prefix: string) => {
  const [, uid, partition] = /^collections\/([^/]+)\/p(\d+)$/.exec(prefix) as RegExpExecArray
  return { uid: uid as string, partition: Number(partition) }
}

const partitionsOf = Effect.fnUntraced(function* (store: ObjectStore["Service"]) {
  const keys: Array<string> = []
  for (;;) {
    const page = yield* store.list("collections/", { startAfter: keys.at(-1) ?? "" })
    if (page.length === 0) break
    keys.push(...page.map(({ key }) => key))
  }
  const found: Array<PartitionFiles> = []
  for (const manifestKey of keys.filter((key) => key.endsWith("/manifest"))) {
    const prefix = manifestKey.slice(0, -"/manifest".length)
    const manifest = decodeManifest((yield* store.get(manifestKey)).body)
    // Damaged already.
    if (Result.isFailure(manifest)) continue
    const { snapshots, prunedSeq } = manifest.success
    const newest = snapshots[0]?.seq ?? 0
    found.push({
      prefix,
      prunedSeq,
      snapshots: snapshots.map(({ seq, records, graph }) => ({
        seq,
        keys: [`${prefix}/${records.key}`, `${prefix}/${graph.key}`]
      })),
      tail: keys.filter(
        (key) => key.startsWith(`${prefix}/log/`) && Number.parseInt(key.slice(key.lastIndexOf("/") + 1), 16) > newest
      )
    })
  }
  return found
})
