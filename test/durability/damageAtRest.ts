/**
 * Damage to a data directory while no server uses it, as failing disks and careless people do it, with what has to be said
 * of it and how the object is put back from its copy.
 */
import { mkdir, readdir, readFile, unlink, writeFile } from "node:fs/promises"
import { join } from "node:path"
import { Effect, Result } from "effect"
import * as FileObjectStore from "../../src/tiers/FileObjectStore.ts"
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

export const damageKinds = [
  "byte of a snapshot",
  "cut snapshot",
  "missing snapshot",
  "byte of a log object",
  "missing log object",
  "byte of the manifest",
  "byte of the last log object"
] as const
export type DamageKind = (typeof damageKinds)[number]

/** Files that a process left when it died, or that are somebody else's. */
export const leaveGarbage = async (data: string, source: Random): Promise<void> => {
  await mkdir(join(data, "scratch", `snapshot-${source.below(1_000)}`), { recursive: true })
  await writeFile(join(data, "scratch", `garbage-${source.below(1_000)}`), Buffer.from(source.vector(64)))
}

/** A lock whose holder is gone, of the form that a dead process leaves. */
export const leaveLock = async (data: string): Promise<void> => {
  const path = join(data, "LOCK")
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
  data: string,
  kind: DamageKind,
  untouched: (uid: string, partition: number) => boolean,
  source: Random
): Promise<Damage | undefined> =>
  Effect.runPromise(
    Effect.scoped(
      Effect.gen(function* () {
        const store = yield* ObjectStore
        const partitions = (yield* partitionsOf(store)).filter(({ prefix }) => {
          const { uid, partition } = addressOf(prefix)
          return untouched(uid, partition)
        })
        const candidates = partitions.flatMap((partition) =>
          targetsOf(partition, kind).map((key) => ({ partition, key }))
        )
        if (candidates.length === 0) return undefined
        const { partition, key } = source.pick(candidates)
        const original = (yield* store.get(key)).body
        const path = yield* Effect.promise(() => fileOf(data, key))
        yield* Effect.promise(() => harm(path, original, kind, source))
        const outcome = kind.includes("snapshot") ? "passed over" : kind.includes("last") ? "cut" : "refused"
        return {
          kind,
          object: key.slice(partition.prefix.length + 1),
          ...addressOf(partition.prefix),
          outcome,
          // What was cut off has a segment of the opener's in its place by now; anything else lies where it lay.
          restore: () => (outcome === "cut" ? putBack(data, key, original) : writeFile(path, original))
        } satisfies Damage
      }).pipe(Effect.provide(storeOf(data)))
    )
  )

/** The store's own file of an object: of its newest generation where it was replaced. */
const fileOf = async (data: string, key: string): Promise<string> => {
  const path = join(data, "objects", key)
  const generations = await readdir(`${path}~`).catch(() => [])
  const newest = generations
    .filter((name) => /^[0-9a-f]+$/.test(name))
    .sort((a, b) => a.length - b.length || (a < b ? -1 : 1))
    .at(-1)
  return newest === undefined ? path : join(`${path}~`, newest)
}

const storeOf = (data: string) => FileObjectStore.layer({ directory: join(data, "objects") })

const putBack = (data: string, key: string, original: Uint8Array): Promise<void> =>
  Effect.runPromise(
    Effect.scoped(
      Effect.gen(function* () {
        const store = yield* ObjectStore
        const { etag } = yield* store.get(key)
        yield* store.replace(key, original, etag)
      }).pipe(Effect.provide(storeOf(data)))
    )
  )

const harm = async (path: string, original: Uint8Array, kind: DamageKind, source: Random): Promise<void> => {
  if (kind.startsWith("missing")) return unlink(path)
  if (kind === "cut snapshot") return writeFile(path, original.subarray(0, source.below(original.length)))
  const changed = new Uint8Array(original)
  const at = source.below(changed.length)
  changed[at] = (changed[at] as number) ^ (1 << source.below(8))
  return writeFile(path, changed)
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
