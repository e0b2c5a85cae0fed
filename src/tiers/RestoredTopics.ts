/**
 * Restores topics as they were at a time: of each log the newest snapshot that is no newer, and the log objects up to that
 * time as they are, byte by byte, so that positions mean what they meant. Messages are in the log alone, so theirs goes back
 * as far as the topic keeps them.
 *
 * Log objects have one time each. Restored is what comes before the first that is of later. Topics have a uid of their own, as
 * restored collections do: no cursor of the old one says anything of it.
 */
import { randomBytes } from "node:crypto"
import { Effect, Result, Schema, Stream } from "effect"
import type { Topic } from "../protocol/Topic.ts"
import type { BackupDamaged, BackupRun, BackupTopic, Chain } from "./BackupManifest.ts"
import {
  chainPrefix,
  coveringPacks,
  hex16,
  type Pack,
  packsOf,
  type StoredSnapshot,
  segmentsOf,
  snapshotsOf
} from "./BackupReader.ts"
import { decodeSegment } from "./LogSegment.ts"
import type { ObjectStore, StoreFailure } from "./ObjectStore.ts"
import { encodeManifest } from "./PartitionManifest.ts"
import { iso, NotRestorable, putNew, restoredEpoch, restoreSnapshot, snapshotFault } from "./RestoredObjects.ts"
import { TopicListText, topicPrefixes, topicsFormat, topicsKey } from "./TopicsObject.ts"

type Store = ObjectStore["Service"]

export interface RestoredTopic {
  readonly topic: Topic
  /** Log objects. */
  readonly objects: number
  readonly bytes: number
}

/** What has to be read of a topic. */
export interface TopicPlan {
  readonly topic: Topic
  readonly parts: ReadonlyArray<LogPlan>
}

interface LogPlan {
  /** Which of the topic's logs. */
  readonly index: number
  readonly base: StoredSnapshot | undefined
  readonly packs: ReadonlyArray<Pack>
  readonly bytes: number
}

/** The topics that there were at a time; of a name the newest. */
export const planTopics = Effect.fnUntraced(function* (
  backup: Store,
  run: BackupRun,
  atMillis: number | undefined
): Effect.fn.Return<ReadonlyArray<TopicPlan>, BackupDamaged | NotRestorable | StoreFailure> {
  const byName = new Map<string, BackupTopic>()
  for (const one of run.topics ?? []) {
    const { name, created_ms } = one.topic
    const there =
      atMillis === undefined
        ? one.removedMillis === undefined
        : created_ms <= atMillis && (one.removedMillis === undefined || atMillis < one.removedMillis)
    if (there && (byName.get(name)?.topic.created_ms ?? -1) <= created_ms) byName.set(name, one)
  }
  const plans: Array<TopicPlan> = []
  for (const { topic, logs } of byName.values()) {
    const parts: Array<LogPlan> = []
    for (const [index, prefix] of topicPrefixes(topic).entries()) {
      const chains = logs[index] ?? []
      if (chains.length === 0) continue
      const plan = yield* planLog(backup, run, prefix, index, chains, index < topic.channels, atMillis)
      if (plan === undefined) {
        const when = iso(atMillis ?? run.horizonMillis)
        const message = `topic ${topic.name} cannot be restored to ${when}: of ${prefix} the backup begins later`
        return yield* new NotRestorable({ message })
      }
      parts.push(plan)
    }
    plans.push({ topic, parts })
  }
  return plans
})

export interface RestoringTopics {
  readonly backup: Store
  readonly target: Store
  readonly scratch: string
  readonly progress: (bytes: number) => void
}

/** Their list is written last. */
export const restoreTopics = Effect.fnUntraced(function* (
  into: RestoringTopics,
  plans: ReadonlyArray<TopicPlan>,
  atMillis: number | undefined
): Effect.fn.Return<ReadonlyArray<RestoredTopic>, BackupDamaged | StoreFailure> {
  const restored: Array<RestoredTopic> = []
  for (const { topic: from, parts } of plans) {
    const topic = { ...from, uid: randomBytes(8).toString("hex") }
    const prefixes = topicPrefixes(topic)
    let objects = 0
    let bytes = 0
    for (const part of parts) {
      const retainMillis = part.index < topic.channels ? topic.retention_ms : 0
      objects += yield* restoreLog(into, prefixes[part.index] as string, part, retainMillis, atMillis)
      bytes += part.bytes
    }
    restored.push({ topic, objects, bytes })
  }
  if (restored.length === 0) return restored
  const list = { format: topicsFormat, topics: restored.map(({ topic }) => topic), removing: [] } as const
  const body = Buffer.from(yield* Effect.orDie(Schema.encodeEffect(TopicListText)(list)))
  yield* putNew(into.target, topicsKey, body)
  return restored
})

/** `undefined` where the backup does not go back so far. `wholeLog`: what is before the snapshot is wanted too. */
const planLog = Effect.fnUntraced(function* (
  store: Store,
  run: BackupRun,
  logPrefix: string,
  index: number,
  chains: ReadonlyArray<Chain>,
  wholeLog: boolean,
  atMillis: number | undefined
): Effect.fn.Return<LogPlan | undefined, BackupDamaged | StoreFailure> {
  const at = nanosOf(atMillis)
  let first: BackupDamaged | undefined
  for (const [i, chain] of chains.entries()) {
    if (i < chains.length - 1 && (atMillis === undefined || chain.horizonMillis < atMillis)) continue
    const prefix = chainPrefix(logPrefix, chain.id)
    const { snapshots, damaged } = yield* snapshotsOf(store, run, prefix)
    for (const { message } of damaged) yield* Effect.logWarning("A snapshot of the backup is passed over", message)
    const packs = yield* packsOf(store, run, prefix)
    const bases: Array<StoredSnapshot | undefined> = snapshots.filter(({ maxTime }) => BigInt(maxTime) <= at).reverse()
    if (chain.fromSeq === 1) bases.push(undefined)
    for (const base of bases) {
      const fault = base === undefined ? undefined : yield* snapshotFault(store, base)
      const from = wholeLog ? Math.min(chain.fromSeq - 1, base?.seq ?? 0) : (base?.seq ?? 0)
      const covering = fault === undefined ? coveringPacks(packs, prefix, from, chain.lastSeq) : Result.fail(fault)
      if (Result.isFailure(covering)) {
        yield* Effect.logWarning("A snapshot of the backup is passed over", covering.failure.message)
        first ??= covering.failure
        continue
      }
      const snapshotBytes = Object.values(base?.objects ?? {}).reduce((sum, { bytes }) => sum + bytes, 0)
      const logBytes = covering.success.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0)
      return { index, base, packs: covering.success, bytes: snapshotBytes + logBytes }
    }
  }
  if (first !== undefined) return yield* first
  return undefined
})

/** Answers how many log objects there are. */
const restoreLog = Effect.fnUntraced(function* (
  { backup, target, scratch, progress }: RestoringTopics,
  prefix: string,
  { base, packs }: LogPlan,
  retainMillis: number,
  atMillis: number | undefined
): Effect.fn.Return<number, BackupDamaged | StoreFailure> {
  const snapshots = base === undefined ? [] : [yield* restoreSnapshot(backup, target, prefix, base, scratch, progress)]
  const baseSeq = base?.seq ?? 0
  const at = atMillis ?? Number.POSITIVE_INFINITY
  const oldest = (atMillis ?? Date.now()) - retainMillis
  let epoch = restoredEpoch
  /** Log objects up to this one are left out. */
  let leftOut = base === undefined ? 0 : undefined
  let last = baseSeq
  let objects = 0
  yield* segmentsOf(backup, packs).pipe(
    Stream.map(({ header, bytes }) => {
      const time = header.count === 0 ? undefined : decodeSegment(bytes).ops[0]?.version.time
      return { header, bytes, millis: time === undefined ? undefined : Number(time) }
    }),
    Stream.takeWhile(({ header, millis }) => header.seq <= baseSeq || millis === undefined || millis <= at),
    Stream.runForEach(({ header, bytes, millis }) =>
      Effect.suspend(() => {
        // What is in the snapshot is left out while it is too old to be read.
        const isOld = header.seq <= baseSeq && (millis === undefined || millis <= oldest)
        if (objects === 0 && isOld) {
          leftOut = header.seq
          return Effect.void
        }
        leftOut ??= header.seq - 1
        epoch = Math.max(epoch, header.epoch)
        last = Math.max(last, header.seq)
        objects += 1
        return putNew(target, `${prefix}/log/${hex16(header.seq)}`, bytes)
      })
    )
  )
  progress(packs.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0))
  if (last === 0) return 0
  const owner = randomBytes(8).toString("hex")
  yield* putNew(
    target,
    `${prefix}/manifest`,
    encodeManifest({ epoch, owner, prunedSeq: leftOut ?? baseSeq, snapshots })
  )
  return objects
})

/** The end of a millisecond, in nanoseconds. */
const nanosOf = (millis: number | undefined): bigint =>
  millis === undefined ? 2n ** 64n : BigInt(millis) * 1_000_000n + 999_999n
