/** `backup`: copies what is new of a data directory that no node uses, of a bucket, or of a cluster's directory. */
import { Console, Effect } from "effect"
import { Command, Flag } from "effect/cli"
import { defaultSettings } from "../config.ts"
import { backup as runBackup } from "../tiers/Backup.ts"
import { openToWrite, shownPlace } from "../tiers/BackupStore.ts"
import { iso } from "../tiers/RestoredObjects.ts"
import { openData } from "./DataPlace.ts"
import { Refused, refusing } from "./Refused.ts"

export const backup = Command.make(
  "backup",
  {
    data: Flag.String("data").pipe(
      Flag.withDescription("data directory, or gs://bucket/prefix"),
      Flag.withDefault("./data")
    ),
    to: Flag.String("to").pipe(
      Flag.withDescription("directory of the backup, made where it is missing, or gs://bucket/prefix")
    ),
    keepDays: Flag.Int("keep-days").pipe(
      Flag.withDescription("days within which any time can be restored"),
      Flag.withDefault(30)
    )
  },
  ({ data, to, keepDays }) =>
    Effect.gen(function* () {
      if (!(keepDays >= 1 && keepDays <= 3_650)) {
        return yield* new Refused({ message: `--keep-days: expected 1 to 3650, got ${keepDays}` })
      }
      const started = performance.now()
      const { store: source, scratch } = yield* openData(data)
      const destination = yield* openToWrite(to, data, defaultSettings)
      const report = yield* runBackup({ source, destination, scratch, keepDays })
      for (const { message } of report.damaged) process.stderr.write(`not backed up: ${message}\n`)
      if (report.damaged.length > 0) process.exitCode = 1
      const seconds = ((performance.now() - started) / 1_000).toFixed(1)
      yield* Console.log(
        [
          `Backup ${report.run.run} of ${shownPlace(data)} in ${shownPlace(to)}: ${seconds} s`,
          `  new: ${report.segments} log segments, ${report.snapshots} snapshots, ${report.bytes} bytes; removed: ${report.removed} objects`,
          `  restores up to ${iso(report.run.horizonMillis)}`
        ].join("\n")
      )
    }).pipe(Effect.scoped, refusing)
).pipe(
  Command.withDescription(
    "Back up a bucket or the directory of a cluster, or one that no node uses (nodes back themselves up: serve --backup-to)"
  )
)
