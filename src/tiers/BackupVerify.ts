/** Looks at every object of a backup, or of a node's own store, and names what is damaged. */
import { Effect, Result, Stream } from "effect"
import { readCatalogue, readPartitionManifest, readTopics, snapshotObjects, storedFault } from "./Backup.ts"
import { BackupDamaged, type BackupRun, type Chain } from "./BackupManifest.ts"
import {
  chainPrefix,
  coveringPacks,
  hex16,
  listAll,
  newestRun,
  packsOf,
  readPack,
  runsPrefix,
  segmentsOf,
  snapshotsOf
} from "./BackupReader.ts"
import { readRecordsObject } from "./BackupTruth.ts"
import { partitionPrefix } from "./CatalogueObject.ts"
import { decodeSegment, SegmentFault, verifySegment } from "./LogSegment.ts"
import type { ObjectStore, StoreFailure } from "./ObjectStore.ts"
import { type RestorableRange, restorableRanges } from "./Restore.ts"
import { snapshotFault } from "./RestoredObjects.ts"
import { topicPrefixes } from "./TopicsObject.ts"

type Store = ObjectStore["Service"]

export interface VerifyOptions {
  /** Also decodes every operation and record, and looks whether times increase along each log. */
  readonly deep?: boolean
  /** Called with the objects looked at so far, and how many there are. */
  readonly onProgress?: (done: number, total: number) => void
}

export interface BackupVerdict {
  /** `undefined`: no run is whole. */
  readonly run: BackupRun | undefined
  readonly damaged: ReadonlyArray<BackupDamaged>
  readonly objects: number
  readonly bytes: number
  readonly ranges: ReadonlyArray<RestorableRange>
}

/** Checks a backup: every checksum, and that each chain is whole from its base to its end. */
export const verifyBackup = Effect.fn("BackupVerify.verifyBackup")(function* (
  store: Store,
  options: VerifyOptions = {}
): Effect.fn.Return<BackupVerdict, StoreFailure> {
  const { run, damaged: damagedRuns } = yield* newestRun(store)
  const tally = new Tally(options.onProgress, yield* countObjects(store))
  tally.damaged.push(...damagedRuns)
  if (run === undefined) {
    if (damagedRuns.length === 0) tally.add(runsPrefix, "there is no backup here")
    return { run, damaged: tally.damaged, objects: 0, bytes: 0, ranges: [] }
  }
  for (const one of run.collections) {
    for (const [partition, chains] of one.partitions.entries()) {
      for (const chain of chains) {
        const prefix = chainPrefix(partitionPrefix(one.collection.uid, partition), chain.id)
        yield* verifyChain(store, run, prefix, chain, options.deep === true, tally)
      }
    }
  }
  for (const { topic, logs } of run.topics ?? []) {
    for (const [i, prefix] of topicPrefixes(topic).entries()) {
      for (const chain of logs[i] ?? [])
        yield* verifyChain(store, run, chainPrefix(prefix, chain.id), chain, false, tally)
    }
  }
  const { damaged, objects, bytes } = tally
  return { run, damaged, objects, bytes, ranges: yield* restorableRanges(store, run) }
})

export interface DataVerdict {
  readonly damaged: ReadonlyArray<BackupDamaged>
  readonly objects: number
  readonly bytes: number
  readonly collections: number
  readonly partitions: number
  readonly topics: number
}

const countObjects = (store: Store): Effect.Effect<number, StoreFailure> =>
  Effect.map(
    Effect.forEach(["collections/", "channels/"], (folder) => listAll(store, folder)),
    (lists) => lists.reduce((sum, { length }) => sum + length, 0)
  )

/** Checks a node's own objects: catalogue, manifests, snapshots, and each log from its beginning to its end. */
export const verifyData = Effect.fn("BackupVerify.verifyData")(function* (
  store: Store,
  options: VerifyOptions = {}
): Effect.fn.Return<DataVerdict, StoreFailure> {
  const tally = new Tally(options.onProgress, yield* countObjects(store))
  const read = yield* Effect.result(readCatalogue(store))
  if (Result.isFailure(read)) yield* note(tally, read.failure)
  const collections = Result.isSuccess(read) ? (read.success?.collections ?? []) : []
  let partitions = 0
  for (const collection of collections) {
    for (let partition = 0; partition < collection.partitions; partition++) {
      yield* verifyPartition(store, partitionPrefix(collection.uid, partition), options.deep === true, tally)
      partitions += 1
    }
  }
  const readList = yield* Effect.result(readTopics(store))
  if (Result.isFailure(readList)) yield* note(tally, readList.failure)
  const topics = Result.isSuccess(readList) ? (readList.success?.topics ?? []) : []
  for (const topic of topics) {
    // Records of channels are no vectors: of them there is no more to look at than checksums and positions.
    for (const prefix of topicPrefixes(topic)) yield* verifyPartition(store, prefix, false, tally)
  }
  const { damaged, objects, bytes } = tally
  return { damaged, objects, bytes, collections: collections.length, partitions, topics: topics.length }
})

class Tally {
  readonly damaged: Array<BackupDamaged> = []
  objects = 0
  bytes = 0
  readonly #onProgress: VerifyOptions["onProgress"]
  readonly #total: number

  constructor(onProgress: VerifyOptions["onProgress"], total: number) {
    this.#onProgress = onProgress
    this.#total = total
  }

  seen(bytes: number): void {
    this.objects += 1
    this.bytes += bytes
    this.#onProgress?.(Math.min(this.objects, this.#total), this.#total)
  }

  add(object: string, detail: string): void {
    this.damaged.push(new BackupDamaged({ object, detail }))
  }
}

/** Segments of a node's log read at one time. */
const readsAtOnce = 8

const verifyChain = Effect.fnUntraced(function* (
  store: Store,
  run: BackupRun,
  prefix: string,
  chain: Chain,
  deep: boolean,
  tally: Tally
): Effect.fn.Return<void, StoreFailure> {
  const { snapshots, damaged } = yield* snapshotsOf(store, run, prefix)
  tally.damaged.push(...damaged)
  for (const snapshot of snapshots) {
    tally.seen(0)
    for (const [name, digest] of Object.entries(snapshot.objects)) {
      const fault = yield* storedFault(store, `${snapshot.prefix}/${name}`, digest)
      if (fault !== undefined) tally.add(`${snapshot.prefix}/${name}`, fault)
      tally.seen(digest.bytes)
    }
    if (!deep || (yield* snapshotFault(store, snapshot)) !== undefined) continue
    const read = yield* Effect.result(readRecordsObject(store, `${snapshot.prefix}/records`))
    if (Result.isFailure(read)) yield* note(tally, read.failure)
  }
  if (chain.fromSeq > 1 && !snapshots.some(({ seq }) => seq === chain.fromSeq - 1)) {
    tally.add(`${prefix}/snapshot/`, `the snapshot of position ${chain.fromSeq - 1}, with which it begins, is missing`)
  }
  const packs = yield* packsOf(store, run, prefix)
  const covering = coveringPacks(packs, prefix, chain.fromSeq - 1, chain.lastSeq)
  if (Result.isFailure(covering)) tally.damaged.push(covering.failure)
  for (const pack of packs) {
    const read = yield* Effect.result(deep ? Stream.runCollect(segmentsOf(store, [pack])) : readPack(store, pack))
    tally.seen(pack.sizeBytes)
    if (Result.isFailure(read)) yield* note(tally, read.failure)
    else if (deep) operationsFault(tally, pack.key, read.success, 0n)
  }
})

const note = (tally: Tally, error: BackupDamaged | StoreFailure): Effect.Effect<void, StoreFailure> => {
  if (error._tag === "StoreFailure") return Effect.fail(error)
  tally.damaged.push(error)
  return Effect.void
}

/** Decodes operations and looks whether their times increase; answers the last. */
const operationsFault = (
  tally: Tally,
  key: string,
  segments: ReadonlyArray<{ readonly bytes: Uint8Array }>,
  after: bigint
): bigint => {
  let last = after
  try {
    for (const { bytes } of segments) {
      for (const { version, id } of decodeSegment(bytes).ops) {
        if (version.time < last) {
          tally.add(key, `the operation on ${JSON.stringify(id)} is older than the one before it`)
          return version.time
        }
        last = version.time
      }
    }
  } catch (fault) {
    tally.add(key, (fault as Error).message)
  }
  return last
}

const verifyPartition = Effect.fnUntraced(function* (
  store: Store,
  prefix: string,
  deep: boolean,
  tally: Tally
): Effect.fn.Return<void, StoreFailure> {
  const read = yield* Effect.result(readPartitionManifest(store, prefix))
  if (Result.isFailure(read)) return yield* note(tally, read.failure)
  const manifest = read.success
  const keys = (yield* listAll(store, `${prefix}/log/`)).filter(({ key }) => /\/log\/[0-9a-f]{16}$/.test(key))
  if (manifest === undefined) {
    const [left] = keys
    if (left !== undefined) tally.add(`${prefix}/manifest`, `it is missing, but ${left.key} is there`)
    return
  }
  tally.seen(0)
  for (const snapshot of manifest.snapshots) {
    for (const [name, { key, ...digest }] of snapshotObjects(snapshot)) {
      const fault = yield* storedFault(store, `${prefix}/${key}`, digest)
      if (fault !== undefined) tally.add(`${prefix}/${key}`, fault)
      tally.seen(digest.bytes)
      if (!deep || fault !== undefined || name !== "records") continue
      const records = yield* Effect.result(readRecordsObject(store, `${prefix}/${key}`))
      if (Result.isFailure(records)) yield* note(tally, records.failure)
    }
  }
  const first = `${prefix}/log/${hex16(manifest.prunedSeq)}`
  let next = manifest.prunedSeq + 1
  let epoch = 0
  let time = 0n
  yield* Stream.fromIterable(keys.filter(({ key }) => key > first)).pipe(
    Stream.mapEffect(
      ({ key }) =>
        Effect.result(
          Effect.catchTag(
            store.get(key),
            "ObjectMissing",
            () => new BackupDamaged({ object: key, detail: "it is gone" })
          )
        ).pipe(Effect.map((found) => ({ key, found }))),
      { concurrency: readsAtOnce }
    ),
    Stream.runForEach(({ key, found }) =>
      Effect.gen(function* () {
        if (Result.isFailure(found)) return yield* note(tally, found.failure)
        const bytes = found.success.body
        tally.seen(bytes.length)
        const seq = Number.parseInt(key.slice(-16), 16)
        if (seq !== next) {
          tally.add(`${prefix}/log/${hex16(next)}`, `it is missing from the log, but ${key} is there`)
        }
        next = seq + 1
        try {
          const header = verifySegment(bytes)
          if (header.seq !== seq) tally.add(key, `it holds the segment of position ${header.seq}`)
          if (header.epoch < epoch || header.epoch > manifest.epoch) {
            tally.add(key, `it is of epoch ${header.epoch}, after ${epoch} and under ${manifest.epoch}`)
          }
          epoch = header.epoch
          if (deep) time = operationsFault(tally, key, [{ bytes }], time)
        } catch (fault) {
          if (!(fault instanceof SegmentFault)) throw fault
          tally.add(key, fault.message)
        }
      })
    )
  )
})
