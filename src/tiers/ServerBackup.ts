/**
 * A node's own backup: every `backupIntervalMillis`, and once when it stops cleanly. While it is on, logs are not pruned
 * beyond what it has copied, for at most `backupLagMillisMax` without a backup that succeeds.
 */
import { Clock, Context, Effect, Layer, Metric, Semaphore } from "effect"
import { Settings } from "../config.ts"
import { type BackupError, type BackupReport, backup } from "./Backup.ts"
import type { BackupRun } from "./BackupManifest.ts"
import { newestRun } from "./BackupReader.ts"
import { type BackupPlaceError, openToWrite } from "./BackupStore.ts"
import { partitionPrefix } from "./CatalogueObject.ts"
import { DataDirectory } from "./DataDirectory.ts"
import { ObjectStore } from "./ObjectStore.ts"
import { PruneLimit } from "./PartitionLog.ts"

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
  }
>()("ruvector/tiers/ServerBackup") {
  static readonly layer: Layer.Layer<ServerBackup, BackupPlaceError, Settings | ObjectStore | DataDirectory> =
    Layer.effectContext(
      Effect.gen(function* () {
        const settings = yield* Settings
        if (settings.backupTo === "") return Context.make(ServerBackup, { now: Effect.undefined })
        const source = yield* ObjectStore
        const { path, scratch } = yield* DataDirectory
        const destination = yield* openToWrite(settings.backupTo, path)
        const gate = yield* Semaphore.make(1)
        const startedMillis = yield* Clock.currentTimeMillis
        const copied = new CopiedLogs(startedMillis, settings.backupLagMillisMax)

        const now = gate.withPermit(
          Effect.gen(function* () {
            if (copied.unknown) {
              const { run } = yield* newestRun(destination)
              if (run !== undefined) copied.note(run, startedMillis)
            }
            const report = yield* backup({ source, destination, scratch, keepDays: settings.backupKeepDays })
            copied.note(report.run, yield* Clock.currentTimeMillis)
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
        const loop = Effect.gen(function* () {
          while (true) {
            yield* Effect.ignore(now)
            yield* Effect.sleep(settings.backupIntervalMillis)
          }
        })
        // The actors have stopped by then, and what they wrote last is copied too.
        yield* Effect.addFinalizer(() => Effect.ignore(Effect.timeoutOption(now, settings.drainMillis)))
        yield* Effect.forkScoped(loop)
        return Context.make(ServerBackup, { now }).pipe(
          Context.add(PruneLimit, (prefix: string) => copied.limit(prefix))
        )
      })
    )
}

/** How far each partition's log is in the backup. */
class CopiedLogs {
  readonly #lagMillisMax: number
  readonly #seqs = new Map<string, number>()
  #succeededMillis: number
  unknown = true

  constructor(startedMillis: number, lagMillisMax: number) {
    this.#succeededMillis = startedMillis
    this.#lagMillisMax = lagMillisMax
  }

  note(run: BackupRun, nowMillis: number): void {
    this.unknown = false
    this.#succeededMillis = nowMillis
    this.#seqs.clear()
    for (const { collection, partitions, removedMillis } of run.collections) {
      if (removedMillis !== undefined) continue
      for (const [partition, chains] of partitions.entries()) {
        this.#seqs.set(partitionPrefix(collection.uid, partition), chains.at(-1)?.lastSeq ?? 0)
      }
    }
  }

  limit(prefix: string): number {
    if (Date.now() - this.#succeededMillis <= this.#lagMillisMax) return this.#seqs.get(prefix) ?? 0
    unheld.updateUnsafe(1, Context.empty())
    return Number.MAX_SAFE_INTEGER
  }
}
