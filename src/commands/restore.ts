/** `restore`: a new data directory, or one collection under another name, as it was at a time. */
import { resolve } from "node:path"
import { Console, Context, Effect, Layer, Option } from "effect"
import { Command, Flag } from "effect/cli"
import { CollectionName, decoderOf } from "../protocol/Fields.ts"
import { openToRead } from "../tiers/BackupStore.ts"
import * as DataDirectory from "../tiers/DataDirectory.ts"
import * as FileObjectStore from "../tiers/FileObjectStore.ts"
import { ObjectStore } from "../tiers/ObjectStore.ts"
import { iso, type RestoreReport, restore as runRestore } from "../tiers/Restore.ts"
import { ProgressLine } from "./ProgressLine.ts"
import { Refused, refusing } from "./Refused.ts"
import { parseTime } from "./times.ts"

export const restore = Command.make(
  "restore",
  {
    from: Flag.String("from").pipe(Flag.withDescription("directory of the backup")),
    at: Flag.String("at").pipe(
      Flag.withDescription("time to restore to: 2026-11-25T04:00:00Z, milliseconds since 1970, -15m, or latest"),
      Flag.withDefault("latest")
    ),
    data: Flag.String("data").pipe(
      Flag.withDescription("a new data directory; with --collection one that no node uses")
    ),
    collection: Flag.String("collection").pipe(Flag.withDescription("restore this one alone"), Flag.optional),
    as: Flag.String("as").pipe(Flag.withDescription("under this name"), Flag.optional)
  },
  ({ from, at, data, collection, as }) =>
    Effect.gen(function* () {
      const started = performance.now()
      const atMillis = yield* timeOf(at)
      if (Option.isSome(as) && Option.isNone(collection)) {
        return yield* new Refused({ message: "--as: expected --collection with it" })
      }
      const only = Option.map(collection, (name) => ({ collection: name, as: Option.getOrElse(as, () => name) }))
      if (Option.isSome(only)) {
        yield* Effect.fromResult(decodeName(only.value.as)).pipe(
          Effect.mapError(({ expected, got }) => new Refused({ message: `--as: expected ${expected}, got ${got}` }))
        )
      }
      const backup = yield* openToRead(from)
      const directory = yield* DataDirectory.open({ path: data })
      const context = yield* Layer.build(FileObjectStore.layer({ directory: directory.objects }))
      const progress = new ProgressLine("Restoring")
      const report = yield* runRestore({
        backup,
        target: Context.get(context, ObjectStore),
        scratch: directory.scratch,
        atMillis,
        only: Option.getOrUndefined(only),
        onProgress: progress.show
      }).pipe(Effect.ensuring(Effect.sync(() => progress.end())))
      yield* Console.log(summary(report, atMillis, resolve(data), (performance.now() - started) / 1_000))
    }).pipe(Effect.scoped, refusing)
).pipe(Command.withDescription("Restore collections from a backup as they were at a time"))

export const timeOf = (at: string): Effect.Effect<number | undefined, Refused> =>
  Effect.try({
    try: () => parseTime(at, Date.now()),
    catch: (error) => new Refused({ message: (error as Error).message })
  })

const decodeName = decoderOf(CollectionName, "as")

const summary = (report: RestoreReport, atMillis: number | undefined, data: string, seconds: number): string => {
  const newestMillis = Number(report.newest / 1_000_000n)
  const newest = report.newest === 0n ? "no operation" : iso(newestMillis)
  const asked = atMillis ?? report.horizonMillis
  return [
    `Restored ${report.collections.length} collection(s) into ${data} in ${seconds.toFixed(1)} s`,
    ...report.collections.map(
      ({ from, collection, operations, bytes, onlyToMillis }) =>
        `  ${collection.name}${from.name === collection.name ? "" : ` (was ${from.name})`}: ${bytes} bytes read, ${operations} operations after the snapshot` +
        (onlyToMillis === undefined ? "" : `; only up to ${iso(onlyToMillis)}, since no newer backup has it`)
    ),
    `  time: ${atMillis === undefined ? `all there is, whole up to ${iso(asked)}` : iso(asked)}; newest operation: ${newest}`,
    `  RTO so far ${seconds.toFixed(1)} s; the backup reaches to ${iso(report.horizonMillis)}, ${age(report.horizonMillis)} ago`
  ].join("\n")
}

const age = (millis: number): string => `${Math.round((Date.now() - millis) / 1_000)} s`
