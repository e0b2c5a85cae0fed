/**
 * Restores collections from a backup as they were at a time: of each partition the newest snapshot that is no newer, as it
 * is, and after it what the log has up to that time, gathered into few segments. A node opens the result as any other.
 *
 * Every operation acknowledged up to the time is in it, and none whose version is of later than it (its millisecond
 * included). Restored collections have a uid of their own: caches of the old one say nothing of them, and their logs go on
 * differently.
 */
import { randomBytes } from "node:crypto"
import { Clock, Data, Effect, Result, Schema, Stream } from "effect"
import type { Collection } from "../protocol/Collection.ts"
import { putKeys } from "./ApiKeys.ts"
import { type BackupCollection, BackupDamaged, type BackupRun, type Chain } from "./BackupManifest.ts"
import {
  chainPrefix,
  coveringPacks,
  hex16,
  openBackup,
  type Pack,
  packsOf,
  type StoredSnapshot,
  segmentsOf,
  snapshotsOf
} from "./BackupReader.ts"
import {
  type Catalogue,
  CatalogueText,
  catalogueFormat,
  catalogueKey,
  partitionPrefix,
  removedKept
} from "./CatalogueObject.ts"
import { decodeSegment, encodeSegment, type LogOp, opBytes } from "./LogSegment.ts"
import type { ObjectChanged, ObjectExists, ObjectMissing, ObjectStore, StoreFailure } from "./ObjectStore.ts"
import { encodeManifest } from "./PartitionManifest.ts"
import {
  changedBeneath,
  iso,
  NotRestorable,
  putNew,
  restoredEpoch,
  restoreSnapshot,
  snapshotFault
} from "./RestoredObjects.ts"
import { planTopics, type RestoredTopic, restoreTopics } from "./RestoredTopics.ts"

type Store = ObjectStore["Service"]

export interface RestoreOptions {
  readonly backup: Store
  /** Empty, unless one collection is restored into it. */
  readonly target: Store
  /** A directory for files under way, best on the target's file system. */
  readonly scratch: string
  /** Milliseconds since 1970; `undefined`: all that is in the backup. */
  readonly atMillis: number | undefined
  /** One collection alone, under another name, beside what the target has. */
  readonly only?: { readonly collection: string; readonly as: string } | undefined
  /** Called with the bytes done so far, and all of them. */
  readonly onProgress?: (done: number, total: number) => void
}

export interface RestoreReport {
  readonly collections: ReadonlyArray<RestoredCollection>
  readonly topics: ReadonlyArray<RestoredTopic>
  /** Greatest version time restored, nanoseconds since 1970; 0 for none. */
  readonly newest: bigint
  /** What the backup is good for, up to: every operation acknowledged by then is in it. */
  readonly horizonMillis: number
}

export interface RestoredCollection {
  readonly from: Collection
  readonly collection: Collection
  /** Operations replayed after the snapshots. */
  readonly operations: number
  readonly bytes: number
  /** Where the backup holds this collection only up to a time before the one asked for: that time. */
  readonly onlyToMillis: number | undefined
}

/** The target holds something already. */
export class TargetNotEmpty extends Data.TaggedError("TargetNotEmpty")<{ readonly object: string }> {
  override get message(): string {
    return this.object === catalogueKey
      ? "the target holds collections already: choose an empty directory, or one collection with --collection and --as"
      : `the target is not empty (${this.object}), maybe a restore that did not end: remove it, or choose another directory`
  }
}

export type RestoreError = BackupDamaged | NotRestorable | StoreFailure | TargetNotEmpty

/** Restores; the catalogue is written last, so that what was not restored whole is not served. */
export const restore: (options: RestoreOptions) => Effect.Effect<RestoreReport, RestoreError> = Effect.fn(
  "Restore.restore"
)(function* (options: RestoreOptions) {
  const { backup, target, atMillis } = options
  const run = yield* openBackup(backup)
  const existing = yield* readTarget(target, options.only)
  const wanted = yield* chosenCollections(run, atMillis, options.only)
  const atNanos = atMillis === undefined ? everything : BigInt(atMillis) * 1_000_000n + 999_999n
  const plans = yield* Effect.forEach(wanted, (one) => planCollection(backup, run, one, atMillis))
  const topicPlans = options.only === undefined ? yield* planTopics(backup, run, atMillis) : []

  const bytesOf = ({ parts }: { readonly parts: ReadonlyArray<{ readonly bytes: number }> }) =>
    parts.reduce((sum, { bytes }) => sum + bytes, 0)
  const total = [...plans, ...topicPlans].reduce((sum, plan) => sum + bytesOf(plan), 0)
  let done = 0
  const progress = (bytes: number) => {
    done += bytes
    options.onProgress?.(Math.min(done, total), total)
  }
  progress(0)
  const nowMillis = yield* Clock.currentTimeMillis
  let newest = 0n
  const restored: Array<RestoredCollection> = []
  for (const { from, parts, onlyToMillis } of plans) {
    const collection: Collection = {
      ...from,
      name: options.only?.as ?? from.name,
      uid: randomBytes(8).toString("hex"),
      // Of this incarnation of it: up to here a backup knows the collection that it was restored from.
      created_ms: nowMillis
    }
    let operations = 0
    let bytes = 0
    for (const part of parts) {
      const prefix = partitionPrefix(collection.uid, part.partition)
      const done = yield* restorePartition(options, prefix, collection.dimensions, part, atNanos, progress)
      operations += done.operations
      bytes += part.bytes
      if (done.newest > newest) newest = done.newest
    }
    restored.push({ from, collection, operations, bytes, onlyToMillis })
  }

  const topics = yield* restoreTopics({ backup, target, scratch: options.scratch, progress }, topicPlans, atMillis)

  // The newest, whatever the time that is restored: a key that was revoked since stays so.
  if (options.only === undefined) {
    yield* Effect.catchTag(putKeys(target, run.keys ?? []), "ObjectExists", ({ key }) =>
      Effect.fail(new TargetNotEmpty({ object: key }))
    )
  }
  const gone =
    options.only === undefined ? run.collections.filter(({ removedMillis }) => removedMillis === undefined) : []
  const catalogue: Catalogue = {
    format: catalogueFormat,
    collections: [...(existing?.catalogue.collections ?? []), ...restored.map(({ collection }) => collection)],
    removing: existing?.catalogue.removing ?? [],
    // So that a backup of the restored data knows what became of those it was restored from.
    removed: [
      ...(existing?.catalogue.removed ?? []),
      ...gone.map(({ collection: { name, uid } }) => ({ name, uid, removed_ms: nowMillis }))
    ].slice(-removedKept)
  }
  const body = Buffer.from(yield* Effect.orDie(Schema.encodeEffect(CatalogueText)(catalogue)))
  const written: Effect.Effect<string, ObjectChanged | ObjectExists | ObjectMissing | StoreFailure> =
    existing === undefined ? target.create(catalogueKey, body) : target.replace(catalogueKey, body, existing.etag)
  yield* Effect.mapError(written, (error) => (error._tag === "StoreFailure" ? error : changedBeneath(catalogueKey)))
  return { collections: restored, topics, newest, horizonMillis: run.horizonMillis }
})

/** What a backup can restore of one incarnation of a collection. */
export interface RestorableRange {
  readonly collection: Collection
  readonly fromMillis: number
  readonly toMillis: number
  readonly removedMillis: number | undefined
}

/** The times to which each collection can be restored, oldest collection first. */
export const restorableRanges = Effect.fnUntraced(function* (
  store: Store,
  run: BackupRun
): Effect.fn.Return<ReadonlyArray<RestorableRange>, StoreFailure> {
  const ranges: Array<RestorableRange> = []
  for (const one of run.collections) {
    let fromMillis = one.collection.created_ms
    let toMillis = one.removedMillis === undefined ? run.horizonMillis : one.removedMillis - 1
    for (const [partition, chains] of one.partitions.entries()) {
      const [first] = chains
      if (first === undefined) continue
      toMillis = Math.min(toMillis, chains.at(-1)?.horizonMillis ?? toMillis)
      if (first.fromSeq === 1) continue
      const { snapshots } = yield* snapshotsOf(store, run, prefixOf(one, partition, first))
      const base = snapshots.find(({ seq }) => seq >= first.fromSeq - 1)
      if (base !== undefined) fromMillis = Math.max(fromMillis, millisAfter(BigInt(base.maxTime)))
    }
    ranges.push({ collection: one.collection, fromMillis, toMillis, removedMillis: one.removedMillis })
  }
  return ranges
})

/** One line for each collection. */
export const describeRange = ({ collection, fromMillis, toMillis, removedMillis }: RestorableRange): string => {
  const deleted = removedMillis === undefined ? "" : `, deleted ${iso(removedMillis)}`
  return toMillis < fromMillis
    ? `${collection.name} (${collection.uid}): nothing${deleted}`
    : `${collection.name} (${collection.uid}): ${iso(fromMillis)} to ${iso(toMillis)}${deleted}`
}

/** The base of a partition at a time, and the log after it. */
export interface PartitionPlan {
  readonly partition: number
  /** `undefined`: the log from its beginning. */
  readonly base: StoredSnapshot | undefined
  readonly packs: ReadonlyArray<Pack>
  /** To be read. */
  readonly bytes: number
}

/** What has to be read for a collection at a time. Partitions that were never written by then are left out. */
export const planCollection = Effect.fnUntraced(function* (
  store: Store,
  run: BackupRun,
  one: BackupCollection,
  atMillis: number | undefined
): Effect.fn.Return<
  {
    readonly from: Collection
    readonly parts: ReadonlyArray<PartitionPlan>
    readonly onlyToMillis: number | undefined
  },
  BackupDamaged | NotRestorable | StoreFailure
> {
  const parts: Array<PartitionPlan> = []
  let onlyToMillis: number | undefined
  for (const [partition, chains] of one.partitions.entries()) {
    const newest = chains.at(-1)
    if (newest === undefined) continue
    if ((atMillis ?? run.horizonMillis) > newest.horizonMillis) {
      onlyToMillis = Math.min(onlyToMillis ?? newest.horizonMillis, newest.horizonMillis)
    }
    const plan = yield* planPartition(store, run, one, partition, chains, atMillis)
    if (plan === undefined) {
      const range = (yield* restorableRanges(store, run)).find(
        ({ collection }) => collection.uid === one.collection.uid
      )
      const can = range === undefined ? "" : `: ${describeRange(range)}`
      return yield* new NotRestorable({
        message: `${one.collection.name} cannot be restored to ${iso(atMillis ?? run.horizonMillis)}${can}`
      })
    }
    parts.push(plan)
  }
  return { from: one.collection, parts, onlyToMillis }
})

const prefixOf = (one: BackupCollection, partition: number, chain: Chain): string =>
  chainPrefix(partitionPrefix(one.collection.uid, partition), chain.id)

const everything = 2n ** 64n

const millisAfter = (nanos: bigint): number => Number((nanos + 999_999n) / 1_000_000n)

/** The target's catalogue, where one collection is restored beside others; else it has to be empty. */
const readTarget = Effect.fnUntraced(function* (target: Store, only: RestoreOptions["only"]) {
  const found = yield* target.get(catalogueKey).pipe(Effect.catchTag("ObjectMissing", () => Effect.undefined))
  if (only === undefined || found === undefined) {
    const [first] = yield* target.list("", { limit: 1 })
    if (first === undefined) return undefined
    return yield* new TargetNotEmpty({ object: found === undefined ? first.key : catalogueKey })
  }
  const catalogue = yield* Effect.mapError(
    Schema.decodeUnknownEffect(CatalogueText)(Buffer.from(found.body).toString("utf8")),
    (error) => new BackupDamaged({ object: catalogueKey, detail: error.message.replaceAll("\n", " ") })
  )
  if (catalogue.collections.some(({ name }) => name === only.as)) {
    return yield* new NotRestorable({ message: `the target has a collection ${only.as} already: choose another name` })
  }
  return { catalogue, etag: found.etag }
})

/** The collections that there were at a time; of a name the newest. */
const chosenCollections = Effect.fnUntraced(function* (
  run: BackupRun,
  atMillis: number | undefined,
  only: RestoreOptions["only"]
) {
  if (atMillis !== undefined && atMillis > run.horizonMillis) {
    const message = `${iso(atMillis)} is after what the backup holds: it reaches to ${iso(run.horizonMillis)}`
    return yield* new NotRestorable({ message })
  }
  const byName = new Map<string, BackupCollection>()
  for (const one of run.collections) {
    const { name, created_ms } = one.collection
    const there =
      atMillis === undefined
        ? one.removedMillis === undefined
        : created_ms <= atMillis && (one.removedMillis === undefined || atMillis < one.removedMillis)
    if (!there || (only !== undefined && only.collection !== name)) continue
    if ((byName.get(name)?.collection.created_ms ?? -1) <= created_ms) byName.set(name, one)
  }
  if (byName.size > 0) return [...byName.values()]
  const first = Math.min(...run.collections.map(({ collection }) => collection.created_ms))
  const when = atMillis === undefined ? "now" : `at ${iso(atMillis)}`
  if (only !== undefined) {
    return yield* new NotRestorable({ message: `there is no collection ${only.collection} ${when} in the backup` })
  }
  if (atMillis === undefined || atMillis >= first || run.collections.length === 0) return []
  const range = `${iso(first)} to ${iso(run.horizonMillis)}`
  return yield* new NotRestorable({ message: `${iso(atMillis)} is before what the backup holds: ${range}` })
})

/** The oldest chain that was the partition's history at the time, and its newest snapshot that is no newer. */
const planPartition = Effect.fnUntraced(function* (
  store: Store,
  run: BackupRun,
  one: BackupCollection,
  partition: number,
  chains: ReadonlyArray<Chain>,
  atMillis: number | undefined
): Effect.fn.Return<PartitionPlan | undefined, BackupDamaged | StoreFailure> {
  const at = atMillis === undefined ? everything : BigInt(atMillis) * 1_000_000n + 999_999n
  for (const [i, chain] of chains.entries()) {
    const isLast = i === chains.length - 1
    if (!isLast && (atMillis === undefined || chain.horizonMillis < atMillis)) continue
    const prefix = prefixOf(one, partition, chain)
    const { snapshots, damaged } = yield* snapshotsOf(store, run, prefix)
    for (const { message } of damaged) yield* Effect.logWarning("A snapshot of the backup is passed over", message)
    const bases: Array<StoredSnapshot | undefined> = snapshots.filter(({ maxTime }) => BigInt(maxTime) <= at).reverse()
    if (chain.fromSeq === 1) bases.push(undefined)
    const packs = yield* packsOf(store, run, prefix)
    let first: BackupDamaged | undefined
    for (const base of bases) {
      const fault = base === undefined ? undefined : yield* snapshotFault(store, base)
      if (fault !== undefined) {
        yield* Effect.logWarning("A snapshot of the backup is passed over", fault.message)
        first ??= fault
        continue
      }
      const covering = coveringPacks(packs, prefix, base?.seq ?? 0, chain.lastSeq)
      if (Result.isFailure(covering)) {
        first ??= covering.failure
        continue
      }
      const snapshotBytes = Object.values(base?.objects ?? {}).reduce((sum, { bytes }) => sum + bytes, 0)
      const logBytes = covering.success.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0)
      return { partition, base, packs: covering.success, bytes: snapshotBytes + logBytes }
    }
    if (first !== undefined) return yield* first
  }
  return undefined
})

/** Bytes of operations gathered into one segment. */
const segmentBytesMax = 8 * 1_048_576

const restorePartition = Effect.fnUntraced(function* (
  options: RestoreOptions,
  prefix: string,
  dimensions: number,
  plan: PartitionPlan,
  atNanos: bigint,
  progress: (bytes: number) => void
): Effect.fn.Return<{ readonly operations: number; readonly newest: bigint }, BackupDamaged | StoreFailure> {
  const { backup, target, scratch } = options
  const { base } = plan
  const snapshots = base === undefined ? [] : [yield* restoreSnapshot(backup, target, prefix, base, scratch, progress)]
  let newest = BigInt(base?.maxTime ?? "0")
  let seq = base?.seq ?? 0
  let operations = 0
  let ops: Array<LogOp> = []
  let bytes = 0
  const flush = Effect.suspend(() => {
    if (ops.length === 0) return Effect.void
    seq += 1
    operations += ops.length
    const nonce = randomBytes(8).readBigUInt64LE(0)
    const segment = encodeSegment({ epoch: restoredEpoch, seq, nonce, dimensions }, ops)
    ops = []
    bytes = 0
    return putNew(target, `${prefix}/log/${hex16(seq)}`, segment)
  })
  let packsDone = 0
  let pack: Pack | undefined
  yield* segmentsOf(backup, plan.packs).pipe(
    Stream.filter(({ header }) => header.seq > (base?.seq ?? 0)),
    Stream.map((segment) => {
      if (segment.pack !== pack) {
        if (pack !== undefined) {
          progress(pack.sizeBytes)
          packsDone += pack.sizeBytes
        }
        pack = segment.pack
      }
      return decodeSegment(segment.bytes).ops
    }),
    // Version times increase along a log: what comes after a segment that is all too new is too new as well.
    Stream.takeWhile(([first]) => first === undefined || first.version.time <= atNanos),
    Stream.runForEach((some) =>
      Effect.suspend(() => {
        for (const op of some) {
          const { time } = op.version
          if (time > atNanos) continue
          if (time > newest) newest = time
          ops.push(op)
          bytes += opBytes(op)
        }
        return bytes >= segmentBytesMax ? flush : Effect.void
      })
    )
  )
  yield* flush
  progress(plan.packs.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0) - packsDone)
  if (seq > 0) {
    const owner = randomBytes(8).toString("hex")
    const manifest = { epoch: restoredEpoch, owner, prunedSeq: base?.seq ?? 0, snapshots }
    yield* putNew(target, `${prefix}/manifest`, encodeManifest(manifest))
  }
  return { operations, newest }
})
