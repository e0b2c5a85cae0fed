/**
 * Copies what is new of a node's objects into a backup: another object store, with a layout of its own (`docs/format.md`).
 * Of each partition the log is copied without a gap, many segments to an object, and now and then a snapshot, so that the
 * state at any time within the retention is a snapshot and the log after it. Nothing of a run counts until its last object
 * is there, which names the attempts that count; runs are numbered, and of two at one time the second to end is none.
 *
 * The source may be written to meanwhile. Of what is acknowledged before a run begins everything is copied.
 */
import { randomBytes } from "node:crypto"
import { copyFile, constants as fileConstants, mkdtemp, open as openFile, rm } from "node:fs/promises"
import { join } from "node:path"
import { Clock, Data, Effect, Result, Schema } from "effect"
import type { Collection } from "../protocol/Collection.ts"
import type { Topic } from "../protocol/Topic.ts"
import { listKeys } from "./ApiKeys.ts"
import {
  type BackupCollection,
  BackupDamaged,
  type BackupRun,
  type BackupSnapshot,
  type BackupTopic,
  type Chain,
  encodeRun,
  encodeSnapshot
} from "./BackupManifest.ts"
import {
  attemptOf,
  chainPrefix,
  hex16,
  listAll,
  newestRun,
  packKey,
  runKey,
  runsPrefix,
  snapshotPrefix,
  snapshotsOf
} from "./BackupReader.ts"
import { type Catalogue, CatalogueText, catalogueKey, partitionPrefix } from "./CatalogueObject.ts"
import { decodeSegment, SegmentFault, type SegmentHeader, verifySegment } from "./LogSegment.ts"
import { type ObjectBody, type ObjectStore, StoreFailure } from "./ObjectStore.ts"
import { checksumFile } from "./PartitionLog.ts"
import { decodeManifest, type PartitionManifest, type Snapshot, type SnapshotObject } from "./PartitionManifest.ts"
import { type TopicList, TopicListText, topicPrefixes, topicsKey } from "./TopicsObject.ts"

type Store = ObjectStore["Service"]

export interface BackupOptions {
  /** The node's objects. */
  readonly source: Store
  readonly destination: Store
  /** A directory for files under way. */
  readonly scratch: string
  /** Any time of so many days can be restored; what only older times need is removed. */
  readonly keepDays?: number
  /** Time between two looks for what can be removed. */
  readonly pruneEveryMillis?: number
}

export const keepDaysDefault = 30
export const pruneEveryMillisDefault = 6 * 60 * 60 * 1_000

export interface BackupReport {
  readonly run: BackupRun
  readonly segments: number
  readonly snapshots: number
  /** Copied, of log and snapshots. */
  readonly bytes: number
  /** Objects removed, since no restorable time needs them. */
  readonly removed: number
  /** What of the source could not be copied; the partitions it belongs to are no newer in this backup than before. */
  readonly damaged: ReadonlyArray<BackupDamaged>
}

/** Another backup into the same place ended while this one was under way; nothing of this one counts. */
export class BackupRaced extends Data.TaggedError("BackupRaced")<{ readonly run: number }> {
  override get message(): string {
    return `another backup into the same place ended first (run ${this.run}): one data directory backs up into one place`
  }
}

/** The backup is one of other data. */
export class BackupForeign extends Data.TaggedError("BackupForeign")<{ readonly collections: number }> {
  override get message(): string {
    return `the backup holds ${this.collections} collection(s) that this data never had: restore them first, or back up into another place`
  }
}

export type BackupError = BackupDamaged | BackupForeign | BackupRaced | StoreFailure

/** Runs one backup. */
export const backup: (options: BackupOptions) => Effect.Effect<BackupReport, BackupError> = Effect.fn("Backup.backup")(
  function* (options: BackupOptions) {
    const before = yield* newestRun(options.destination)
    for (const { message } of before.damaged) yield* Effect.logError("A run of the backup is damaged", message)
    const number = before.newest + 1
    const attempt = `${number}-${randomBytes(4).toString("hex")}`
    // What happens in this very millisecond may come after the look at the log.
    const horizonMillis = (yield* Clock.currentTimeMillis) - 1
    const catalogue = yield* readCatalogue(options.source)
    const known = before.run?.collections ?? []
    yield* refuseForeign(known, catalogue)

    const copies = new Copies(options, attempt, horizonMillis)
    const collections: Array<BackupCollection> = []
    for (const collection of catalogue?.collections ?? []) {
      const old = known.find((one) => one.collection.uid === collection.uid)
      collections.push({ collection, partitions: yield* copies.collection(collection, old) })
    }
    for (const old of known) {
      if (collections.some(({ collection }) => collection.uid === old.collection.uid)) continue
      const noted = catalogue?.removed?.find(({ uid }) => uid === old.collection.uid)?.removed_ms
      collections.push({ ...old, removedMillis: old.removedMillis ?? noted ?? horizonMillis })
    }

    const topics = yield* copyTopics(copies, options.source, before.run?.topics ?? [], horizonMillis)
    const keys = yield* listKeys(options.source)

    const now = yield* Clock.currentTimeMillis
    const mayPrune = now - (before.run?.prunedMillis ?? 0) >= (options.pruneEveryMillis ?? pruneEveryMillisDefault)
    const draft: BackupRun = {
      run: number,
      attempt,
      horizonMillis,
      endedMillis: now,
      prunedMillis: mayPrune ? now : (before.run?.prunedMillis ?? 0),
      attempts: [...(before.run?.attempts ?? []), attempt],
      collections,
      ...(topics.length === 0 ? {} : { topics }),
      ...(keys.length === 0 ? {} : { keys })
    }
    const cutoffMillis = now - (options.keepDays ?? keepDaysDefault) * dayMillis
    const plan = mayPrune
      ? yield* planRemovals(options.destination, draft, cutoffMillis)
      : { run: draft, superfluous: [] }
    yield* putRun(options.destination, plan.run)
    const removed = yield* removeAll(options.destination, plan.superfluous)
    const { segments, snapshots, bytes } = copies
    const damaged = yield* stillListed(options.source, copies.damaged)
    return { run: plan.run, segments, snapshots, bytes, removed, damaged }
  }
)

/** Brings what the backup holds of topics up to date. */
const copyTopics = Effect.fnUntraced(function* (
  copies: Copies,
  source: Store,
  known: ReadonlyArray<BackupTopic>,
  horizonMillis: number
): Effect.fn.Return<ReadonlyArray<BackupTopic>, BackupDamaged | StoreFailure> {
  const topics: Array<BackupTopic> = []
  for (const topic of (yield* readTopics(source))?.topics ?? []) {
    const old = known.find((one) => one.topic.uid === topic.uid)
    topics.push({ topic, logs: yield* copies.topic(topic, old) })
  }
  for (const old of known) {
    if (topics.some(({ topic }) => topic.uid === old.topic.uid)) continue
    topics.push({ ...old, removedMillis: old.removedMillis ?? horizonMillis })
  }
  return topics
})

/** The objects of a snapshot by name, whatever there are. */
export const snapshotObjects = (snapshot: Snapshot): ReadonlyArray<readonly [string, SnapshotObject]> =>
  Object.entries(snapshot).flatMap(
    ([name, value]): Array<readonly [string, SnapshotObject]> =>
      typeof value === "object" && value !== null && "crc32" in value ? [[name, value as SnapshotObject]] : []
  )

/** `undefined` where there is none yet. */
export const readCatalogue = (source: Store): Effect.Effect<Catalogue | undefined, BackupDamaged | StoreFailure> =>
  readText(source, catalogueKey, CatalogueText)

/** The same of topics. */
export const readTopics = (source: Store): Effect.Effect<TopicList | undefined, BackupDamaged | StoreFailure> =>
  readText(source, topicsKey, TopicListText)

const readText = <A>(
  source: Store,
  key: string,
  codec: Schema.Codec<A, string>
): Effect.Effect<A | undefined, BackupDamaged | StoreFailure> =>
  source.get(key).pipe(
    Effect.flatMap(({ body }) =>
      Effect.mapError(
        Schema.decodeUnknownEffect(codec)(Buffer.from(body).toString("utf8")),
        (error) => new BackupDamaged({ object: key, detail: error.message.replaceAll("\n", " ") })
      )
    ),
    Effect.catchTag("ObjectMissing", () => Effect.undefined)
  )

/** `undefined` where there is none. A damaged one is read twice before it is believed. */
export const readPartitionManifest = Effect.fnUntraced(function* (
  source: Store,
  prefix: string
): Effect.fn.Return<PartitionManifest | undefined, BackupDamaged | StoreFailure> {
  const key = `${prefix}/manifest`
  for (let attempt = 1; ; attempt++) {
    const found = yield* Effect.result(source.get(key))
    if (Result.isFailure(found)) {
      if (found.failure._tag === "ObjectMissing") return undefined
      return yield* found.failure
    }
    const decoded = decodeManifest(found.success.body)
    if (Result.isSuccess(decoded)) return decoded.success
    if (attempt === 2) return yield* new BackupDamaged({ object: key, detail: decoded.failure.detail })
  }
})

/** Copies an object into a file of ours, checks it against what the manifest says, and hands it on. */
export const withCopy = <A, E>(
  store: Store,
  key: string,
  expected: { readonly bytes: number; readonly crc32: number },
  scratch: string,
  use: (file: string) => Effect.Effect<A, E>
): Effect.Effect<A, E | BackupDamaged | StoreFailure> =>
  Effect.acquireUseRelease(
    attemptFile(key, () => mkdtemp(join(scratch, "copy-"))),
    (directory) =>
      Effect.gen(function* () {
        const file = join(directory, "object")
        yield* store
          .withFile(key, (path) => attemptFile(key, () => copyFile(path, file, fileConstants.COPYFILE_FICLONE)))
          .pipe(Effect.catchTag("ObjectMissing", () => new BackupDamaged({ object: key, detail: "it is missing" })))
        const fault = digestFault(expected, yield* checksumFile(file, key))
        if (fault !== undefined) return yield* new BackupDamaged({ object: key, detail: fault })
        return yield* use(file)
      }),
    (directory) => Effect.promise(() => rm(directory, { recursive: true, force: true }))
  )

/** What is wrong with a stored object; `undefined` where it is as expected. */
export const storedFault = (
  store: Store,
  key: string,
  expected: { readonly bytes: number; readonly crc32: number }
): Effect.Effect<string | undefined, StoreFailure> =>
  store
    .withFile(key, (path) => Effect.map(checksumFile(path, key), (found) => digestFault(expected, found)))
    .pipe(Effect.catchTag("ObjectMissing", () => Effect.succeed("it is missing")))

interface Digest {
  readonly bytes: number
  readonly crc32: number
}

const digestFault = (expected: Digest, found: Digest): string | undefined => {
  if (found.bytes !== expected.bytes) return `it has ${found.bytes} bytes, not ${expected.bytes}`
  return found.crc32 === expected.crc32 ? undefined : "its checksum differs"
}

const attemptFile = <A>(key: string, act: () => Promise<A>): Effect.Effect<A, StoreFailure> =>
  Effect.tryPromise({
    try: act,
    catch: (cause) => new StoreFailure({ operation: "copy", key, detail: String(cause), uncertain: false })
  })

const dayMillis = 24 * 60 * 60 * 1_000
/** Bytes of log in one object, unless one segment is larger. */
const packBytesMax = 16 * 1_048_576
/** Segments in one object. */
const packSegmentsMax = 65_536
/** Segments read at one time. */
const readsAtOnce = 8
/** Objects deleted at one time. */
const deletesAtOnce = 16
/** Age of the newest snapshot in the backup from which the next is copied, however little log there is since. */
const snapshotAgeMillis = dayMillis
/** Runs that stay beside the newest, for a reader that finds that one damaged. */
const runsKept = 100
/** Looks at a partition whose owner removes a snapshot while it is copied. */
const looksMax = 3

/** Refuses where nothing explains that all collections of a backup are gone: an empty data directory, or a wrong one. */
const refuseForeign = (known: ReadonlyArray<BackupCollection>, catalogue: Catalogue | undefined) => {
  const here = new Set(
    [catalogue?.collections, catalogue?.removing, catalogue?.removed].flatMap(
      (some) => some?.map(({ uid }) => uid) ?? []
    )
  )
  const live = known.filter(({ removedMillis }) => removedMillis === undefined)
  return live.length > 0 && live.every(({ collection }) => !here.has(collection.uid))
    ? new BackupForeign({ collections: live.length })
    : Effect.void
}

/** What seemed damaged because its collection or topic was deleted meanwhile is not. */
const stillListed = Effect.fnUntraced(function* (source: Store, damaged: ReadonlyArray<BackupDamaged>) {
  if (damaged.length === 0) return damaged
  const collections = (yield* readCatalogue(source))?.collections.map(({ uid }) => `collections/${uid}/`) ?? []
  const topics = (yield* readTopics(source))?.topics.map(({ uid }) => `channels/${uid}/`) ?? []
  return damaged.filter(({ object }) => [...collections, ...topics].some((folder) => object.startsWith(folder)))
})

/** The source's side of one run. */
class Copies {
  readonly #source: Store
  readonly #destination: Store
  readonly #scratch: string
  readonly #attempt: string
  readonly #horizonMillis: number
  segments = 0
  snapshots = 0
  bytes = 0
  readonly damaged: Array<BackupDamaged> = []

  constructor(options: BackupOptions, attempt: string, horizonMillis: number) {
    this.#source = options.source
    this.#destination = options.destination
    this.#scratch = options.scratch
    this.#attempt = attempt
    this.#horizonMillis = horizonMillis
  }

  collection(
    collection: Collection,
    old: BackupCollection | undefined
  ): Effect.Effect<ReadonlyArray<ReadonlyArray<Chain>>, StoreFailure> {
    return Effect.forEach(
      Array.from({ length: collection.partitions }, (_, partition) => partition),
      (partition) =>
        this.#partition(partitionPrefix(collection.uid, partition), old?.partitions[partition] ?? [], ofPartitions)
    )
  }

  topic(topic: Topic, old: BackupTopic | undefined): Effect.Effect<ReadonlyArray<ReadonlyArray<Chain>>, StoreFailure> {
    return Effect.forEach(topicPrefixes(topic), (prefix, i) => this.#partition(prefix, old?.logs[i] ?? [], ofChannels))
  }

  /** Brings a partition's chains up to date. What is damaged is noted, and leaves them where they are. */
  #partition = Effect.fnUntraced(function* (this: Copies, prefix: string, chains: ReadonlyArray<Chain>, times: Times) {
    for (let look = 1; ; look++) {
      const chain: { current: Chain | undefined } = { current: chains.at(-1) }
      const copied = yield* Effect.result(this.#follow(prefix, chain, times))
      const whole = Result.isSuccess(copied)
      if (!whole && copied.failure._tag === "StoreFailure") return yield* copied.failure
      if (!whole && look < looksMax) continue
      if (!whole && copied.failure._tag === "BackupDamaged") this.damaged.push(copied.failure)
      const { current } = chain
      if (current === undefined) return chains
      // A chain that was begun anew and is not whole is none yet: that before it says what it held.
      if (!whole && current.horizonMillis === 0 && chains.length > 0) return chains
      const others = chains.filter(({ id }) => id !== current.id)
      return [...others, whole ? { ...current, horizonMillis: this.#horizonMillis } : current]
    }
  })

  /** Copies what is new. `chain` is what is copied so far, also where it fails. */
  #follow = Effect.fnUntraced(function* (
    this: Copies,
    prefix: string,
    chain: { current: Chain | undefined },
    times: Times
  ) {
    const manifest = yield* readPartitionManifest(this.#source, prefix)
    if (manifest === undefined) {
      if (chain.current === undefined) return
      return yield* manifestMissing(prefix)
    }
    if (chain.current === undefined || !(yield* this.#continues(prefix, manifest, chain.current))) {
      if (chain.current !== undefined) {
        yield* Effect.logWarning(
          `The log of ${prefix} does not continue what was backed up of it; a new chain is begun`
        )
      }
      chain.current = yield* this.#newChain(prefix, manifest, times)
    }
    yield* this.#copyLog(prefix, chain as { current: Chain }, times)
    const [newest] = manifest.snapshots
    if (newest !== undefined && this.#isDue(newest, chain.current)) {
      chain.current = yield* this.#copySnapshot(prefix, newest, chain.current, times)
    }
    // Of a partition that is being removed the manifest goes first: while it is there, what was missing was not removed.
    if ((yield* readPartitionManifest(this.#source, prefix)) === undefined) return yield* manifestMissing(prefix)
  })

  /** Whether the log still is the one that the chain was copied from. */
  #continues = Effect.fnUntraced(function* (this: Copies, prefix: string, manifest: PartitionManifest, chain: Chain) {
    if (manifest.prunedSeq > chain.lastSeq) return false
    if (manifest.prunedSeq === chain.lastSeq || chain.lastNonce === "") return true
    const last = yield* this.#readSegment(prefix, chain.lastSeq)
    return last !== undefined && hex16(last.header.nonce) === chain.lastNonce
  })

  #newChain = Effect.fnUntraced(function* (this: Copies, prefix: string, manifest: PartitionManifest, times: Times) {
    const empty: Chain = {
      id: randomBytes(4).toString("hex"),
      fromSeq: 1,
      lastSeq: 0,
      lastNonce: "",
      lastTime: "0",
      horizonMillis: 0,
      snapshotSeq: 0,
      snapshotMillis: 0,
      snapshotBytes: 0,
      logBytes: 0
    }
    if (manifest.prunedSeq === 0) return empty
    // The older one, since the log reaches back to it.
    let first: BackupDamaged | undefined
    for (const snapshot of manifest.snapshots.toReversed()) {
      const after = { ...empty, fromSeq: snapshot.seq + 1, lastSeq: snapshot.seq }
      const copied = yield* Effect.result(this.#copySnapshot(prefix, snapshot, after, times))
      if (Result.isSuccess(copied)) return copied.success
      if (copied.failure._tag === "StoreFailure") return yield* copied.failure
      first ??= copied.failure
    }
    return yield* first ?? new BackupDamaged({ object: `${prefix}/manifest`, detail: "it names no snapshot" })
  })

  #copyLog = Effect.fnUntraced(function* (this: Copies, prefix: string, chain: { current: Chain }, times: Times) {
    const log = `${prefix}/log/`
    let pack: Array<Source> = []
    let packBytes = 0
    let startAfter = `${log}${hex16(chain.current.lastSeq)}`
    let next = chain.current.lastSeq + 1
    const flush = Effect.fnUntraced(function* (this: Copies) {
      if (pack.length === 0) return
      chain.current = yield* this.#putPack(prefix, pack, chain.current, times)
      pack = []
      packBytes = 0
    }).bind(this)
    for (;;) {
      const page = (yield* this.#source.list(log, { startAfter })).filter(({ key }) => logKeyPattern.test(key))
      const last = page.at(-1)
      if (last === undefined) return yield* flush()
      startAfter = last.key
      for (let at = 0; at < page.length; at += readsAtOnce) {
        const keys = page.slice(at, at + readsAtOnce).map(({ key }) => key)
        const expected = next
        const read = yield* Effect.forEach(
          keys,
          (key, i) =>
            key === `${log}${hex16(expected + i)}`
              ? Effect.result(this.#readSegment(prefix, expected + i))
              : Effect.succeed(Result.succeed(undefined)),
          { concurrency: readsAtOnce }
        )
        for (const one of read) {
          const found = yield* Effect.result(Effect.fromResult(one))
          if (Result.isFailure(found) || found.success === undefined) {
            yield* flush()
            if (Result.isFailure(found)) return yield* found.failure
            return yield* new BackupDamaged({
              object: `${log}${hex16(next)}`,
              detail: "it is missing from the middle of the log"
            })
          }
          const { success } = found
          if (pack.length > 0 && (packBytes + success.bytes.length > packBytesMax || pack.length >= packSegmentsMax)) {
            yield* flush()
          }
          pack.push(success)
          packBytes += success.bytes.length
          next += 1
        }
      }
    }
  })

  /** A segment of the source, checked; `undefined` where there is none. A damaged one is read twice before it is believed. */
  #readSegment = Effect.fnUntraced(function* (
    this: Copies,
    prefix: string,
    seq: number
  ): Effect.fn.Return<Source | undefined, BackupDamaged | StoreFailure> {
    const key = `${prefix}/log/${hex16(seq)}`
    for (let attempt = 1; ; attempt++) {
      const found = yield* Effect.result(this.#source.get(key))
      if (Result.isFailure(found)) {
        if (found.failure._tag === "ObjectMissing") return undefined
        return yield* found.failure
      }
      const bytes = found.success.body
      try {
        const header = verifySegment(bytes)
        if (header.seq === seq) return { header, bytes }
        return yield* new BackupDamaged({ object: key, detail: `it holds the segment of position ${header.seq}` })
      } catch (fault) {
        if (!(fault instanceof SegmentFault)) throw fault
        if (attempt === 2) return yield* new BackupDamaged({ object: key, detail: fault.message })
      }
    }
  })

  #putPack = Effect.fnUntraced(function* (
    this: Copies,
    prefix: string,
    pack: ReadonlyArray<Source>,
    chain: Chain,
    times: Times
  ) {
    const last = (pack.at(-1) as Source).header
    const first = (pack[0] as Source).header.seq
    const body = Buffer.concat(pack.map(({ bytes }) => bytes))
    yield* put(this.#destination, packKey(chainPrefix(prefix, chain.id), first, last.seq, this.#attempt), body)
    this.segments += pack.length
    this.bytes += body.length
    return {
      ...chain,
      lastSeq: last.seq,
      lastNonce: hex16(last.nonce),
      lastTime: greatestTime(pack, BigInt(chain.lastTime), times).toString(),
      logBytes: chain.logBytes + body.length
    }
  })

  /** At first at once; then when there is as much log as the last one had bytes, so that a restore has little to replay. */
  #isDue(newest: Snapshot, chain: Chain): boolean {
    if (newest.seq <= chain.snapshotSeq || newest.seq < chain.fromSeq || newest.seq > chain.lastSeq) return false
    if (chain.snapshotSeq === 0 || chain.logBytes >= chain.snapshotBytes) return true
    return this.#horizonMillis - chain.snapshotMillis >= snapshotAgeMillis
  }

  #copySnapshot = Effect.fnUntraced(function* (
    this: Copies,
    prefix: string,
    snapshot: Snapshot,
    chain: Chain,
    times: Times
  ) {
    const folder = snapshotPrefix(chainPrefix(prefix, chain.id), snapshot.seq, this.#attempt)
    const objects: Record<string, Digest> = {}
    let maxTime = 0n
    let bytes = 0
    for (const [name, { key, ...digest }] of snapshotObjects(snapshot)) {
      const to = `${folder}/${name}`
      yield* withCopy(this.#source, `${prefix}/${key}`, digest, this.#scratch, (file) =>
        Effect.gen({ self: this }, function* () {
          if (name === "records") maxTime = yield* attemptFile(key, () => times.ofSnapshot(snapshot, file))
          yield* created(this.#destination, to, { file })
        })
      )
      const fault = yield* storedFault(this.#destination, to, digest)
      if (fault !== undefined) return yield* readsBackOtherwise(to, fault)
      objects[name] = digest
      bytes += digest.bytes
    }
    const about: BackupSnapshot = {
      seq: snapshot.seq,
      createdMillis: snapshot.createdMillis,
      maxTime: maxTime.toString(),
      objects
    }
    yield* put(this.#destination, `${folder}/about`, encodeSnapshot(about))
    this.snapshots += 1
    this.bytes += bytes
    const lastTime = BigInt(chain.lastTime) > maxTime ? chain.lastTime : maxTime.toString()
    return {
      ...chain,
      lastTime,
      snapshotSeq: snapshot.seq,
      snapshotMillis: this.#horizonMillis,
      snapshotBytes: bytes,
      logBytes: 0
    }
  })
}

/** A segment of the source. */
interface Source {
  readonly header: SegmentHeader
  readonly bytes: Uint8Array
}

const manifestMissing = (prefix: string) => new BackupDamaged({ object: `${prefix}/manifest`, detail: "it is missing" })

const logKeyPattern = /\/log\/[0-9a-f]{16}$/

/** Of the last segment with operations: times increase along a log. */
const greatestTime = (pack: ReadonlyArray<Source>, before: bigint, { unit }: Times): bigint => {
  const last = pack.findLast(({ header }) => header.count > 0)
  if (last === undefined) return before
  const time = (decodeSegment(last.bytes).ops.at(-1)?.version.time ?? 0n) * unit
  return time > before ? time : before
}

/** What times mean in a log and its snapshots. */
interface Times {
  /** Nanoseconds in one of a version. */
  readonly unit: bigint
  /** The greatest in a snapshot, in nanoseconds; `file` is its records. */
  readonly ofSnapshot: (snapshot: Snapshot, file: string) => Promise<bigint>
}

const ofPartitions: Times = { unit: 1n, ofSnapshot: (_, file) => maxTimeOf(file) }

/** A channel's snapshot has only what was in its log when it was taken. */
const ofChannels: Times = {
  unit: 1_000_000n,
  ofSnapshot: ({ createdMillis }) => Promise.resolve(BigInt(createdMillis) * 1_000_000n)
}

/** The greatest version time in a records file (`docs/format-snapshot.md`). */
const maxTimeOf = async (file: string): Promise<bigint> => {
  const handle = await openFile(file, "r")
  try {
    const header = Buffer.alloc(48)
    await handle.read(header, 0, header.length, 0)
    return header.readBigUInt64LE(40)
  } finally {
    await handle.close()
  }
}

/** Creates an object that nobody else can have created; where nobody can say whether it did, reading it back does. */
const created = (store: Store, key: string, body: ObjectBody): Effect.Effect<void, StoreFailure> =>
  Effect.asVoid(store.create(key, body)).pipe(
    Effect.catch((error) => (error._tag === "StoreFailure" && !error.uncertain ? Effect.fail(error) : Effect.void))
  )

const readsBackOtherwise = (key: string, fault: string) =>
  new StoreFailure({ operation: "backup", key, detail: `it reads back otherwise: ${fault}`, uncertain: false })

/** Creates an object and reads it back. */
const put = Effect.fnUntraced(function* (
  store: Store,
  key: string,
  body: Uint8Array
): Effect.fn.Return<void, StoreFailure> {
  yield* created(store, key, body)
  const stored = yield* store
    .get(key)
    .pipe(Effect.catchTag("ObjectMissing", () => readsBackOtherwise(key, "it is missing")))
  if (!Buffer.from(stored.body).equals(body)) return yield* readsBackOtherwise(key, "its bytes differ")
})

/** Writes a run's last object; then the run counts. */
const putRun = Effect.fnUntraced(function* (
  store: Store,
  run: BackupRun
): Effect.fn.Return<void, BackupRaced | StoreFailure> {
  const key = runKey(run.run)
  const body = encodeRun(run)
  const written = yield* Effect.result(store.create(key, body))
  if (Result.isFailure(written) && written.failure._tag === "StoreFailure" && !written.failure.uncertain) {
    return yield* written.failure
  }
  const stored = yield* store
    .get(key)
    .pipe(Effect.catchTag("ObjectMissing", () => readsBackOtherwise(key, "it is missing")))
  if (Buffer.from(stored.body).equals(body)) return
  if (Result.isFailure(written)) return yield* new BackupRaced({ run: run.run })
  return yield* readsBackOtherwise(key, "its bytes differ")
})

/**
 * What no time from the cutoff on needs: of each chain what is before the newest snapshot that is no newer than the cutoff
 * and whose objects are whole; chains that ended before it; collections deleted before it; what was left by runs that did
 * not come to their end.
 */
const planRemovals = Effect.fnUntraced(function* (
  store: Store,
  draft: BackupRun,
  cutoffMillis: number
): Effect.fn.Return<{ readonly run: BackupRun; readonly superfluous: ReadonlyArray<string> }, StoreFailure> {
  /** By chain prefix the position up to which its log is no longer needed. */
  const baseSeqs = new Map<string, number>()
  const trimmed = Effect.fnUntraced(function* (prefix: string, chains: ReadonlyArray<Chain>, fromMillis: number) {
    const kept: Array<Chain> = []
    for (const [i, chain] of chains.entries()) {
      if (i < chains.length - 1 && chain.horizonMillis < cutoffMillis) continue
      const own = chainPrefix(prefix, chain.id)
      const baseSeq = yield* oldestNeeded(store, draft, own, fromMillis)
      baseSeqs.set(own, baseSeq)
      kept.push(baseSeq === 0 ? chain : { ...chain, fromSeq: Math.max(chain.fromSeq, baseSeq + 1) })
    }
    return kept
  })
  const isWanted = ({ removedMillis }: { readonly removedMillis?: number }) =>
    removedMillis === undefined || removedMillis >= cutoffMillis
  const collections: Array<BackupCollection> = []
  for (const one of draft.collections.filter(isWanted)) {
    const partitions = yield* Effect.forEach(one.partitions, (chains, partition) =>
      trimmed(partitionPrefix(one.collection.uid, partition), chains, cutoffMillis)
    )
    collections.push({ ...one, partitions })
  }
  const topics: Array<BackupTopic> = []
  for (const one of draft.topics?.filter(isWanted) ?? []) {
    const prefixes = topicPrefixes(one.topic)
    // Messages are in the log alone: what is restored of a time has those of the retention before it.
    const logs = yield* Effect.forEach(one.logs, (chains, i) =>
      trimmed(prefixes[i] as string, chains, cutoffMillis - one.topic.retention_ms)
    )
    topics.push({ ...one, logs })
  }
  const counted = new Set(draft.attempts)
  const referenced = new Set<string>([draft.attempt])
  const superfluous: Array<string> = []
  const objects = [...(yield* listAll(store, "collections/")), ...(yield* listAll(store, "channels/"))]
  for (const { key } of objects) {
    const attempt = attemptOf(key)
    const match =
      /^((?:collections|channels)\/[^/]+\/(?:p\d+|m\d+|tasks)\/[^/]+)\/(?:log\/[0-9a-f]{16}|snapshot\/)-?([0-9a-f]{16})/.exec(
        key
      )
    // Something that is not ours.
    if (attempt === undefined || match === null) continue
    // A run that began after this one's number was given out may still be under way.
    if (!counted.has(attempt) && Number.parseInt(attempt, 10) > draft.run) continue
    const baseSeq = baseSeqs.get(match[1] as string)
    const seq = Number.parseInt(match[2] as string, 16)
    const needed =
      counted.has(attempt) && baseSeq !== undefined && (key.includes("/log/") ? seq > baseSeq : seq >= baseSeq)
    if (needed) referenced.add(attempt)
    else superfluous.push(key)
  }
  for (const { key } of yield* listAll(store, runsPrefix)) if (key < runKey(draft.run - runsKept)) superfluous.push(key)
  return {
    run: {
      ...draft,
      collections,
      ...(topics.length === 0 ? {} : { topics }),
      attempts: draft.attempts.filter((attempt) => referenced.has(attempt))
    },
    superfluous
  }
})

/** Position of the newest whole snapshot that is no newer than the cutoff; 0 for none. */
const oldestNeeded = Effect.fnUntraced(function* (store: Store, run: BackupRun, prefix: string, cutoffMillis: number) {
  const cutoff = BigInt(cutoffMillis) * 1_000_000n
  const { snapshots } = yield* snapshotsOf(store, run, prefix)
  for (const snapshot of snapshots.toReversed()) {
    if (BigInt(snapshot.maxTime) > cutoff) continue
    let fault: string | undefined
    for (const [name, digest] of Object.entries(snapshot.objects)) {
      fault ??= yield* storedFault(store, `${snapshot.prefix}/${name}`, digest)
    }
    if (fault === undefined) return snapshot.seq
    yield* Effect.logError("A snapshot of the backup is damaged", `${snapshot.prefix}: ${fault}`)
  }
  return 0
})

/** What cannot be removed now is removed after a later run. */
const removeAll = (store: Store, keys: ReadonlyArray<string>): Effect.Effect<number> =>
  Effect.forEach(
    keys,
    (key) =>
      store.delete(key).pipe(
        Effect.as(1),
        Effect.catch((error) => Effect.as(Effect.logWarning("A superfluous object stays", error.key), 0))
      ),
    { concurrency: deletesAtOnce }
  ).pipe(Effect.map((counts) => counts.reduce((sum: number, n) => sum + n, 0)))
