/**
 * A node's own backup: every `backupIntervalMillis`, and once when it stops cleanly. While it is on, logs are not pruned
 * beyond what it has copied, for at most `backupLagMillisMax` without a backup that succeeds.
 *
 * In a cell one node makes them, of all (`shards/BackupDuty.ts` says which); the others learn from the backup what is in it. A
 * node of a cell makes none when it stops: another goes on.
 */
import { Context, Effect, Layer, Metric, Semaphore } from "effect"
import { Settings } from "../config.ts"
import { type BackupError, type BackupReport, backup } from "./Backup.ts"
import type { BackupRun, Chain } from "./BackupManifest.ts"
import { newestRun } from "./BackupReader.ts"
import { type BackupPlaceError, openToWrite } from "./BackupStore.ts"
import { isBucketUrl } from "./Bucket.ts"
import { partitionPrefix } from "./CatalogueObject.ts"
import { DataDirectory } from "./DataDirectory.ts"
import { ObjectStore } from "./ObjectStore.ts"
import { PruneLimit } from "./PartitionLog.ts"
import { topicPrefixes } from "./TopicsObject.ts"

const runs = Metric.counter("ruvector_backups", { description: "Backups that ended well" })
const failures = Metric.counter("ruvector_backup_failures", {
  description: "Backups that failed, or could not copy all of what they should"
})
const horizon = Metric.gauge("ruvector_backup_horizon_seconds", {
  description: "Everything acknowledged by this time (seconds since 1970) is in the backup"
})
const unheld = Metric.counter("ruvector_backup_prunings_unheld", {
  description: "Prunings of a log that did not wait for the backup, which had failed for too long"
})

export class ServerBackup extends Context.Service<
  ServerBackup,
  {
    /** Runs one now, or after the one under way; `undefined` where backups are off. */
    readonly now: Effect.Effect<BackupReport | undefined, BackupError>
    /** Makes them for ever, one after another; nothing where they are off. */
    readonly duty: Effect.Effect<void>
  }
>()("ruvector/tiers/ServerBackup") {
  static readonly layer: Layer.Layer<ServerBackup, BackupPlaceError, Settings | ObjectStore | DataDirectory> =
    Layer.effectContext(
      Effect.gen(function* () {
        const settings = yield* Settings
        if (settings.backupTo === "") return Context.make(ServerBackup, { now: Effect.undefined, duty: Effect.void })
        const source = yield* ObjectStore
        const { path, scratch } = yield* DataDirectory
        const data = isBucketUrl(settings.data) ? settings.data : path
        const destination = yield* openToWrite(settings.backupTo, data, settings)
        const gate = yield* Semaphore.make(1)
        const copied = new CopiedLogs(settings.backupLagMillisMax)

        const now = gate.withPermit(
          Effect.gen(function* () {
            if (copied.unknown) {
              const { run } = yield* newestRun(destination)
              if (run !== undefined) copied.note(run)
            }
            const report = yield* backup({ source, destination, scratch, keepDays: settings.backupKeepDays })
            copied.note(report.run)
            yield* Metric.update(report.damaged.length === 0 ? runs : failures, 1)
            yield* Metric.update(horizon, report.run.horizonMillis / 1_000)
            for (const { message } of report.damaged) yield* Effect.logError("A partition is not backed up", message)
            return report
          }).pipe(
            Effect.tapError((error) =>
              Effect.andThen(
                Metric.update(failures, 1),
                Effect.logError(
                  "The backup failed",
                  error._tag === "StoreFailure" ? `${error.key}: ${error.detail}` : error.message
                )
              )
            )
          )
        )
        const duty = Effect.gen(function* () {
          while (true) {
            yield* Effect.ignore(now)
            yield* Effect.sleep(settings.backupIntervalMillis)
          }
        })
        if (settings.databaseUrl === "") {
          // The actors have stopped by then, and what they wrote last is copied too.
          yield* Effect.addFinalizer(() => Effect.ignore(Effect.timeoutOption(now, settings.drainMillis)))
          yield* Effect.forkScoped(duty)
        } else {
          yield* gate.withPermit(newestRun(destination)).pipe(
            Effect.map(({ run }) => run === undefined || copied.note(run)),
            Effect.catchCause((cause) => Effect.logWarning("The backup cannot be looked at", cause)),
            Effect.andThen(Effect.sleep(settings.backupIntervalMillis)),
            Effect.forever,
            Effect.forkScoped
          )
        }
        return Context.make(ServerBackup, { now, duty }).pipe(
          Context.add(PruneLimit, (prefix: string) => copied.limit(prefix))
        )
      })
    )
}

/** How far each log is in the backup, and as of when. */
class CopiedLogs {
  readonly #lagMillisMax: number
  readonly #logs = new Map<string, { readonly seq: number; readonly horizonMillis: number }>()
  /** When each partition was first asked for, for those that no run has copied whole yet. */
  readonly #asked = new Map<string, number>()
  readonly #startedMillis = Date.now()
  unknown = true

  constructor(lagMillisMax: number) {
    this.#lagMillisMax = lagMillisMax
  }

  note(run: BackupRun): void {
    this.unknown = false
    this.#logs.clear()
    const copied = (prefix: string, chains: ReadonlyArray<Chain>, removedMillis: number | undefined) => {
      const newest = chains.at(-1)
      if (removedMillis !== undefined) this.#asked.delete(prefix)
      else if (newest !== undefined) {
        this.#logs.set(prefix, { seq: newest.lastSeq, horizonMillis: newest.horizonMillis })
      }
    }
    for (const { collection, partitions, removedMillis } of run.collections) {
      for (const [partition, chains] of partitions.entries())
        copied(partitionPrefix(collection.uid, partition), chains, removedMillis)
    }
    for (const { topic, logs, removedMillis } of run.topics ?? []) {
      for (const [i, prefix] of topicPrefixes(topic).entries()) copied(prefix, logs[i] ?? [], removedMillis)
    }
  }

  limit(prefix: string): number {
    const now = Date.now()
    const asked = this.#asked.get(prefix) ?? now
    this.#asked.set(prefix, asked)
    const log = this.#logs.get(prefix)
    const since = log === undefined ? asked : Math.max(log.horizonMillis, this.#startedMillis)
    if (now - since <= this.#lagMillisMax) return log?.seq ?? 0
    unheld.updateUnsafe(1, Context.empty())
    return Number.MAX_SAFE_INTEGER
  }
}
