/** `backup`: copies what is new of a data directory that no node uses. */
import { existsSync } from "node:fs"
import { join, resolve } from "node:path"
import { Console, Context, Effect, Layer } from "effect"
import { Command, Flag } from "effect/cli"
import { backup as runBackup } from "../tiers/Backup.ts"
import { openToWrite } from "../tiers/BackupStore.ts"
import * as DataDirectory from "../tiers/DataDirectory.ts"
import * as FileObjectStore from "../tiers/FileObjectStore.ts"
import { ObjectStore } from "../tiers/ObjectStore.ts"
import { iso } from "../tiers/Restore.ts"
import { Refused, refusing } from "./Refused.ts"

export const backup = Command.make(
  "backup",
  {
    data: Flag.String("data").pipe(Flag.withDescription("data directory"), Flag.withDefault("./data")),
    to: Flag.String("to").pipe(Flag.withDescription("directory of the backup; made where it is missing")),
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
      const { source, scratch } = yield* openData(data)
      const destination = yield* openToWrite(to, data)
      const report = yield* runBackup({ source, destination, scratch, keepDays })
      for (const { message } of report.damaged) process.stderr.write(`not backed up: ${message}\n`)
      if (report.damaged.length > 0) process.exitCode = 1
      const seconds = ((performance.now() - started) / 1_000).toFixed(1)
      yield* Console.log(
        [
          `Backup ${report.run.run} of ${resolve(data)} in ${resolve(to)}: ${seconds} s`,
          `  new: ${report.segments} log segments, ${report.snapshots} snapshots, ${report.bytes} bytes; removed: ${report.removed} objects`,
          `  restores up to ${iso(report.run.horizonMillis)}`
        ].join("\n")
      )
    }).pipe(Effect.scoped, refusing)
).pipe(
  Command.withDescription(
    "Back up a data directory that no node uses (a running node backs itself up: serve --backup-to)"
  )
)

/** Opens the objects of a data directory that is there, while no node uses it. */
export const openData = Effect.fnUntraced(function* (data: string) {
  if (!existsSync(join(data, "FORMAT"))) {
    return yield* new Refused({ message: `there is no data directory ${resolve(data)}` })
  }
  const directory = yield* DataDirectory.open({ path: data }).pipe(
    Effect.mapError((error) =>
      error._tag === "DataDirectoryLocked"
        ? new Refused({
            message: `a node uses ${resolve(data)} (process ${error.pid}): stop it, or let it back itself up with serve --backup-to`
          })
        : error
    )
  )
  const context = yield* Layer.build(FileObjectStore.layer({ directory: directory.objects }))
  return { source: Context.get(context, ObjectStore), scratch: directory.scratch }
})
