/** `restore`: a new data directory, or one collection under another name, as it was at a time. */
import { Console, Effect, Option } from "effect"
import { Command, Flag } from "effect/cli"
import { defaultSettings } from "../config.ts"
import { CollectionName, decoderOf } from "../protocol/Fields.ts"
import { openToRead, shownPlace } from "../tiers/BackupStore.ts"
import { type RestoreReport, restore as runRestore } from "../tiers/Restore.ts"
import { iso } from "../tiers/RestoredObjects.ts"
import { openTarget } from "./DataPlace.ts"
import { ProgressLine } from "./ProgressLine.ts"
import { Refused, refusing } from "./Refused.ts"
import { parseTime } from "./times.ts"

export const restore = Command.make(
  "restore",
  {
    from: Flag.String("from").pipe(Flag.withDescription("directory of the backup, or gs://bucket/prefix")),
    at: Flag.String("at").pipe(
      Flag.withDescription("time to restore to: 2026-11-25T04:00:00Z, milliseconds since 1970, -15m, or latest"),
      Flag.withDefault("latest")
    ),
    data: Flag.String("data").pipe(
      Flag.withDescription("a new data directory or gs://bucket/prefix; with --collection one that no node uses")
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
      const backup = yield* openToRead(from, defaultSettings)
      const { store: target, scratch } = yield* openTarget(data)
      const progress = new ProgressLine("Restoring")
      const report = yield* runRestore({
        backup,
        target,
        scratch,
        atMillis,
        only: Option.getOrUndefined(only),
        onProgress: progress.show
      }).pipe(Effect.ensuring(Effect.sync(() => progress.end())))
      yield* Console.log(summary(report, atMillis, shownPlace(data), (performance.now() - started) / 1_000))
    }).pipe(Effect.scoped, refusing)
).pipe(Command.withDescription("Restore collections and topics from a backup as they were at a time"))

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
    ...report.topics.map(
      ({ topic, objects, bytes }) => `  topic ${topic.name}: ${bytes} bytes read, ${objects} log objects`
    ),
    `  time: ${atMillis === undefined ? `all there is, whole up to ${iso(asked)}` : iso(asked)}; newest operation: ${newest}`,
    `  RTO so far ${seconds.toFixed(1)} s; the backup reaches to ${iso(report.horizonMillis)}, ${age(report.horizonMillis)} ago`
  ].join("\n")
}

const age = (millis: number): string => `${Math.round((Date.now() - millis) / 1_000)} s`
