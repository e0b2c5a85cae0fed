/**
 * The state of a channel over its partition log: what it decides is in the log before anybody is told. A machine holds the
 * state and decides; here its records are committed in groups, and it is rebuilt from its snapshot and the records after it.
 *
 * One group is under way at a time. Its commands have changed the machine already, so that each sees those before it, and are
 * answered when it is durable. A commit that fails leaves it open what is in the log: the channel is let go with what it
 * holds, and opened again from what there is. So a machine is never ahead of its log for whoever is answered.
 */
import { createReadStream } from "node:fs"
import { mkdtemp, open as openFile, rm, writeFile } from "node:fs/promises"
import { join } from "node:path"
import { createInterface } from "node:readline"
import { Clock, Context, Deferred, Effect, Exit, Metric, Result, type Scope, Stream } from "effect"
import type { SettingValues } from "../config.ts"
import { Overloaded, StorageUnavailable } from "../protocol/Errors.ts"
import {
  type ChannelRecord,
  decodeRecords,
  encodeRecords,
  lineOf,
  recordBytes,
  recordOfLine
} from "../tiers/ChannelRecord.ts"
import { DataDirectory } from "../tiers/DataDirectory.ts"
import { ObjectStore, type StoreFailure } from "../tiers/ObjectStore.ts"
import * as PartitionLog from "../tiers/PartitionLog.ts"

/** The state that a channel's records make. Deterministic: it changes by `apply` alone. */
export interface ChannelMachine {
  readonly apply: (record: ChannelRecord, seq: number, index: number) => void
  /** Records that make the same state, in a copy that later changes leave alone. */
  readonly capture: () => Iterable<ChannelRecord>
  /** Takes what `capture` gave. */
  readonly restore: (record: ChannelRecord) => void
  /** Everything up to a position is durable. */
  readonly committed: (seq: number) => void
}

/** What a command comes to, in the state that it finds. */
export interface Decision<A, E> {
  readonly records: ReadonlyArray<ChannelRecord>
  readonly answer: Result.Result<A, E>
}

export interface ChannelLog {
  readonly log: PartitionLog.PartitionLogHandle
  /** Answers when the records of the decision are durable. `bytes`: what it counts in the queue. */
  readonly submit: <A, E>(
    bytes: number,
    decide: (nowMillis: number) => Decision<A, E>
  ) => Effect.Effect<A, E | Overloaded | StorageUnavailable>
}

export interface ChannelLogOptions {
  readonly prefix: string
  readonly settings: SettingValues
  readonly machine: ChannelMachine
  /** The log is kept so long, beyond what its snapshots need; 0 for a state that is all in its snapshot. */
  readonly retainMillis: number
  /** Called once, when it can be gone on with no longer. */
  readonly onLost: (detail: string) => void
}

interface Pending {
  readonly bytes: number
  readonly decide: (nowMillis: number) => Decision<unknown, unknown>
  readonly done: (exit: Exit.Exit<never, unknown> | Exit.Exit<unknown, unknown>) => void
}

const records = Metric.counter("ruvector_channel_records", { description: "Records committed to the logs of channels" })
const objects = Metric.counter("ruvector_channel_objects", { description: "Log objects of channels" })
const snapshots = Metric.counter("ruvector_channel_snapshots", { description: "Snapshots of channels" })
const metricContext = Context.empty()

/** A snapshot is made at least so many times in the time that a log is kept, so that what is older goes. */
const snapshotsInRetention = 32
/** Between two looks at whether it is time for one. */
const lookMillis = 1_000
/** Bytes of a snapshot written at once. */
const chunkBytes = 1_048_576

export const open: (
  options: ChannelLogOptions
) => Effect.Effect<
  ChannelLog,
  PartitionLog.LogCorrupt | PartitionLog.NewerFormat | PartitionLog.NotOwner | StoreFailure,
  ObjectStore | DataDirectory | Scope.Scope
> = Effect.fn("ChannelLog.open")(function* (options: ChannelLogOptions) {
  const { machine, prefix, retainMillis, settings } = options
  const store = yield* ObjectStore
  const { scratch } = yield* DataDirectory
  const log = yield* PartitionLog.open(prefix, { retainMillis })
  if (log.snapshot !== undefined) {
    yield* Effect.catchTag(
      store.withFile(log.snapshot.records.key, (path) => Effect.promise(() => restore(path, machine))),
      "ObjectMissing",
      ({ key }) => Effect.fail(new PartitionLog.LogCorrupt({ object: key, fault: "missing", detail: "it is missing" }))
    )
  }
  machine.committed(log.snapshot?.seq ?? 0)
  yield* Stream.runForEach(log.tail, ({ seq, bytes }) =>
    Effect.sync(() => {
      decodeRecords(bytes).forEach((record, index) => void machine.apply(record, seq, index))
      machine.committed(seq)
    })
  )

  const queue: Array<Pending> = []
  let queuedBytes = 0
  let news = Deferred.makeUnsafe<void>()
  let ended: StorageUnavailable | undefined
  /** Records since the newest snapshot. */
  let sinceSnapshot = log.tailCount() > 1 ? log.tailCount() : 0
  let snapshotAt = yield* Clock.currentTimeMillis
  let snapshotting = false
  let commitAt = 0

  const end = (error: StorageUnavailable, group: ReadonlyArray<Pending>): void => {
    ended ??= error
    for (const { done } of [...group, ...queue.splice(0)]) done(Exit.fail(ended))
    queuedBytes = 0
    Deferred.doneUnsafe(news, Effect.void)
  }

  const lose = (detail: string, group: ReadonlyArray<Pending>): void => {
    if (ended !== undefined) return end(ended, group)
    end(new StorageUnavailable({ detail: `It was not committed: ${detail}`, retryAfterMillis: 200 }), group)
    options.onLost(detail)
  }

  /** Takes what waits, as far as one log object goes. */
  const takeGroup = (nowMillis: number) => {
    const group: Array<Pending> = []
    const outcomes: Array<Result.Result<unknown, unknown>> = []
    const gathered: Array<ChannelRecord> = []
    const seq = log.lastSeq() + 1
    let bytes = 0
    while (queue.length > 0 && (group.length === 0 || bytes < settings.commitBytesMax)) {
      const pending = queue.shift() as Pending
      queuedBytes -= pending.bytes
      const decision = pending.decide(nowMillis)
      for (const record of decision.records) {
        machine.apply(record, seq, gathered.length)
        gathered.push(record)
        bytes += recordBytes(record)
      }
      group.push(pending)
      outcomes.push(decision.answer)
    }
    return { group, outcomes, gathered, seq }
  }

  const answer = (group: ReadonlyArray<Pending>, outcomes: ReadonlyArray<Result.Result<unknown, unknown>>): void => {
    for (let i = 0; i < group.length; i++) {
      const outcome = outcomes[i] as Result.Result<unknown, unknown>
      const { done } = group[i] as Pending
      done(Result.isSuccess(outcome) ? Exit.succeed(outcome.success) : Exit.fail(outcome.failure))
    }
  }

  const commit = Effect.fnUntraced(function* () {
    const { gathered, group, outcomes, seq } = takeGroup(yield* Clock.currentTimeMillis)
    if (gathered.length === 0) return answer(group, outcomes)
    const appended = yield* Effect.result(log.append((position) => encodeRecords(position, gathered)))
    if (Result.isFailure(appended)) return lose(appended.failure.detail, group)
    // An owner that has just opened its log, and is let go with its first failure, has none to recover.
    if (appended.success.seq !== seq) return lose("its place in the log was taken", group)
    objects.updateUnsafe(1, metricContext)
    records.updateUnsafe(gathered.length, metricContext)
    sinceSnapshot += gathered.length
    machine.committed(seq)
    answer(group, outcomes)
  })

  const snapshotDue = (nowMillis: number): boolean => {
    if (snapshotting || sinceSnapshot === 0) return false
    if (log.tailCount() >= settings.topicSnapshotObjects || log.tailBytes() >= settings.topicSnapshotBytes) return true
    return retainMillis > 0 && nowMillis - snapshotAt >= retainMillis / snapshotsInRetention
  }

  /** Between two groups: what is captured is what is in the log. */
  const snapshot = Effect.fnUntraced(function* () {
    const seq = log.lastSeq()
    const captured = machine.capture()
    snapshotting = true
    sinceSnapshot = 0
    snapshotAt = yield* Clock.currentTimeMillis
    return Effect.gen(function* () {
      const directory = yield* Effect.acquireRelease(
        Effect.promise(() => mkdtemp(join(scratch, "channel-"))),
        (path) => Effect.promise(() => rm(path, { recursive: true, force: true }))
      )
      const files = { records: join(directory, "records"), graph: join(directory, "graph") }
      yield* Effect.promise(() => writeRecords(files.records, captured))
      // A partition's snapshot has two files; of a channel the second one says what the first is.
      yield* Effect.promise(() => writeFile(files.graph, snapshotLabel))
      yield* log.commitSnapshot(seq, files)
      yield* Metric.update(snapshots, 1)
    }).pipe(
      Effect.scoped,
      Effect.catch((error) => Effect.logWarning("A channel's snapshot was not taken", error.detail)),
      Effect.ensuring(
        Effect.sync(() => {
          snapshotting = false
        })
      ),
      Effect.annotateLogs({ channel: prefix })
    )
  })

  const loop = Effect.gen(function* () {
    while (ended === undefined) {
      if (queue.length === 0) {
        if (Deferred.isDoneUnsafe(news)) news = Deferred.makeUnsafe()
        yield* Effect.timeoutOption(Deferred.await(news), lookMillis)
        if (queue.length > 0) yield* Effect.yieldNow
      }
      if (queue.length > 0) {
        const wait = commitAt + settings.topicCommitMillis - performance.now()
        if (wait > 0) yield* Effect.sleep(wait)
        commitAt = performance.now()
        yield* Effect.catchCause(commit(), (cause) =>
          Effect.andThen(
            Effect.logError("A channel met a defect", cause),
            Effect.sync(() => lose("a defect of the server", []))
          )
        )
      }
      if (ended === undefined && snapshotDue(yield* Clock.currentTimeMillis))
        yield* Effect.forkScoped(yield* snapshot())
    }
  })
  yield* Effect.forkScoped(loop)
  yield* Effect.addFinalizer(() =>
    Effect.sync(() => {
      end(new StorageUnavailable({ detail: "The channel is closing.", retryAfterMillis: 200 }), [])
    })
  )

  return {
    log,
    submit: <A, E>(bytes: number, decide: (nowMillis: number) => Decision<A, E>) =>
      Effect.callback<A, E | Overloaded | StorageUnavailable>((resume) => {
        if (ended !== undefined) return resume(Effect.fail(ended))
        if (queuedBytes > 0 && queuedBytes + bytes > settings.topicQueueBytesMax) {
          return resume(Effect.fail(new Overloaded({ bound: "topicQueueBytesMax", retryAfterMillis: 200 })))
        }
        queuedBytes += bytes
        // Not taken back where the caller goes away: it may be in a group already.
        queue.push({ bytes, decide, done: (exit) => resume(exit as Exit.Exit<A, E>) })
        Deferred.doneUnsafe(news, Effect.void)
      })
  }
})

const snapshotLabel = '{"format":1,"records":"one a line: key, time, head, body"}\n'

const restore = async (path: string, machine: ChannelMachine): Promise<void> => {
  for await (const line of createInterface({ input: createReadStream(path), crlfDelay: Number.POSITIVE_INFINITY })) {
    if (line !== "") machine.restore(recordOfLine(line))
  }
}

const writeRecords = async (path: string, captured: Iterable<ChannelRecord>): Promise<void> => {
  const file = await openFile(path, "w")
  try {
    let text = ""
    for (const record of captured) {
      text += `${lineOf(record)}\n`
      if (text.length < chunkBytes) continue
      await file.write(text)
      text = ""
    }
    await file.write(text)
  } finally {
    await file.close()
  }
}
