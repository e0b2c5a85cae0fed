/** `verify`: every object of a backup or of a node's data; code 1 where one is damaged. */
import { Console, Effect, Option } from "effect"
import { Command, Flag } from "effect/cli"
import { defaultSettings } from "../config.ts"
import { openToRead } from "../tiers/BackupStore.ts"
import { verifyBackup, verifyData } from "../tiers/BackupVerify.ts"
import { describeRange } from "../tiers/Restore.ts"
import { openData } from "./DataPlace.ts"
import { ProgressLine } from "./ProgressLine.ts"
import { Refused, refusing } from "./Refused.ts"

export const verify = Command.make(
  "verify",
  {
    from: Flag.String("from").pipe(Flag.withDescription("directory of a backup, or gs://bucket/prefix"), Flag.optional),
    data: Flag.String("data").pipe(
      Flag.withDescription("a data directory that no node uses or a cluster's, or gs://bucket/prefix"),
      Flag.optional
    ),
    deep: Flag.Boolean("deep").pipe(
      Flag.withDescription("also decode every operation and record"),
      Flag.withDefault(false)
    )
  },
  ({ from, data, deep }) =>
    Effect.gen(function* () {
      if (Option.isSome(from) === Option.isSome(data)) {
        return yield* new Refused({ message: "verify: expected one of --from and --data" })
      }
      const progress = new ProgressLine("Verifying")
      const options = { deep, onProgress: progress.show }
      const verdict = yield* Effect.gen(function* () {
        if (Option.isSome(data)) {
          const { store } = yield* openData(data.value)
          const { collections, partitions, topics, ...found } = yield* verifyData(store, options)
          return { ...found, lines: [`${collections} collection(s), ${partitions} partition(s), ${topics} topic(s)`] }
        }
        const found = yield* verifyBackup(
          yield* openToRead(
            Option.getOrElse(from, () => ""),
            defaultSettings
          ),
          options
        )
        return { ...found, lines: ["Can be restored:", ...found.ranges.map((range) => `  ${describeRange(range)}`)] }
      }).pipe(Effect.ensuring(Effect.sync(() => progress.end())))
      const { damaged, objects, bytes, lines } = verdict
      for (const { object, detail } of damaged) yield* Console.log(`damaged: ${object}: ${detail}`)
      yield* Console.log(
        [`Looked at ${objects} objects, ${bytes} bytes: ${damaged.length} damaged`, ...lines].join("\n")
      )
      if (damaged.length > 0) process.exitCode = 1
    }).pipe(Effect.scoped, refusing)
).pipe(Command.withDescription("Check every object of a backup or of a node's data, and name what is damaged"))
