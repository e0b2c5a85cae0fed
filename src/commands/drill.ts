/**
 * `drill`: what a disaster would cost, found out by having one. Restores into a directory of its own, starts a node on it,
 * and compares what that node answers with what the backup says.
 */
import { mkdtemp, rm } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { Console, Effect } from "effect"
import { Command, Flag } from "effect/cli"
import { defaultSettings } from "../config.ts"
import type { Collection } from "../protocol/Collection.ts"
import { openBackup } from "../tiers/BackupReader.ts"
import { openToRead } from "../tiers/BackupStore.ts"
import { type TrueRecord, truthOf } from "../tiers/BackupTruth.ts"
import type { ObjectStore } from "../tiers/ObjectStore.ts"
import { restore } from "../tiers/Restore.ts"
import { iso } from "../tiers/RestoredObjects.ts"
import { openTarget } from "./DataPlace.ts"
import { startDrillServer } from "./DrillServer.ts"
import { ProgressLine } from "./ProgressLine.ts"
import { Refused, refusing } from "./Refused.ts"
import { timeOf } from "./restore.ts"

export const drill = Command.make(
  "drill",
  {
    from: Flag.String("from").pipe(Flag.withDescription("directory of the backup, or gs://bucket/prefix")),
    at: Flag.String("at").pipe(
      Flag.withDescription("time to restore to: 2026-11-25T04:00:00Z, milliseconds since 1970, -15m, or latest"),
      Flag.withDefault("latest")
    )
  },
  ({ from, at }) =>
    Effect.gen(function* () {
      const atMillis = yield* timeOf(at)
      const backup = yield* openToRead(from, defaultSettings)
      const run = yield* openBackup(backup)
      const rpoSeconds = (Date.now() - run.horizonMillis) / 1_000
      const path = yield* Effect.acquireRelease(
        Effect.promise(() => mkdtemp(join(tmpdir(), "ruvector-drill-"))),
        (directory) => Effect.promise(() => rm(directory, { recursive: true, force: true }))
      )
      const data = join(path, "data")
      const started = performance.now()
      const report = yield* restoreInto(data, backup, atMillis)
      const restoredSeconds = (performance.now() - started) / 1_000
      const server = yield* Effect.acquireRelease(
        Effect.tryPromise({
          try: () => startDrillServer(process.argv[1] as string, data),
          catch: (error) => new Refused({ message: (error as Error).message })
        }),
        ({ stop }) => Effect.promise(stop)
      )
      const rtoSeconds = (performance.now() - started) / 1_000
      const checks: Array<Check> = []
      for (const { from: was, collection } of report.collections) {
        const truth = yield* truthOf(backup, run, was.uid, atMillis)
        checks.push(
          yield* Effect.tryPromise({
            try: () => check(server.base, collection, truth),
            catch: (error) => new Refused({ message: `${collection.name}: ${(error as Error).message}` })
          })
        )
      }
      const wrong = checks.filter(({ faults }) => faults.length > 0)
      for (const { name, faults } of wrong) {
        for (const fault of faults.slice(0, faultsShown)) yield* Console.log(`wrong: ${name}: ${fault}`)
      }
      if (wrong.length > 0) process.exitCode = 1
      yield* Console.log(
        [
          `Drill of ${from} to ${iso(atMillis ?? run.horizonMillis)}: ${wrong.length === 0 ? "good" : "FAILED"}`,
          ...checks.map(
            ({ name, count, records, searches, recall }) =>
              `  ${name}: ${count} vectors, ${records} compared, ${searches} searches, recall@10 ${recall.toFixed(3)}`
          ),
          `  RPO ${rpoSeconds.toFixed(1)} s: what was acknowledged since ${iso(run.horizonMillis)} would be lost now`,
          `  RTO ${rtoSeconds.toFixed(1)} s: ${restoredSeconds.toFixed(1)} s to restore, the rest until the node was ready`
        ].join("\n")
      )
    }).pipe(Effect.scoped, refusing)
).pipe(Command.withDescription("Restore into a temporary node, compare it with the backup, and print RPO and RTO"))

/** The directory is free again when this ends. */
const restoreInto = Effect.fnUntraced(function* (
  data: string,
  backup: ObjectStore["Service"],
  atMillis: number | undefined
) {
  const { store: target, scratch } = yield* openTarget(data)
  const progress = new ProgressLine("Restoring")
  return yield* restore({
    backup,
    target,
    scratch,
    atMillis,
    onProgress: progress.show
  }).pipe(Effect.ensuring(Effect.sync(() => progress.end())))
}, Effect.scoped)

interface Check {
  readonly name: string
  readonly count: number
  readonly records: number
  readonly searches: number
  readonly recall: number
  readonly faults: ReadonlyArray<string>
}

/** Records and searches compared of each collection, and wrong ones shown. */
const recordsCompared = 500
const searchesCompared = 20
const faultsShown = 20
const k = 10
/** Below it, of a collection's searches together, an index is taken to be wrong and not merely approximate. */
const recallMin = 0.9

const check = async (base: string, collection: Collection, truth: ReadonlyMap<string, TrueRecord>): Promise<Check> => {
  const { name } = collection
  const faults: Array<string> = []
  const info = (await ask(`${base}/api/v1/collections/${name}`)) as { readonly count?: number }
  if (info.count !== truth.size) faults.push(`it has ${info.count} vectors, the backup ${truth.size}`)
  const ids = sample([...truth.keys()], recordsCompared)
  for (const id of ids) {
    const expected = truth.get(id) as TrueRecord
    const fault = await recordFault(`${base}/api/v1/embed/${encodeURIComponent(id)}?collection=${name}`, expected)
    if (fault !== undefined) faults.push(`${JSON.stringify(id)}: ${fault}`)
  }
  let hits = 0
  let wanted = 0
  const queries = sample(ids, searchesCompared)
  for (const id of queries) {
    const { vector } = truth.get(id) as TrueRecord
    const body = JSON.stringify({ collection: name, query: Array.from(vector), k })
    const answer = (await ask(`${base}/api/v1/search`, body)) as {
      readonly results: ReadonlyArray<{ readonly vector_id: string }>
    }
    const nearest = [...truth.values()].map((one) => score(collection.metric, vector, one.vector)).sort((a, b) => b - a)
    const least = nearest[Math.min(k, nearest.length) - 1] ?? 0
    wanted += Math.min(k, nearest.length)
    for (const { vector_id } of answer.results) {
      const found = truth.get(vector_id)
      if (found === undefined)
        faults.push(`a search found ${JSON.stringify(vector_id)}, which the backup does not have`)
      // Ids may change places where scores are equal to float32.
      else if (score(collection.metric, vector, found.vector) >= least - Math.abs(least) * 1e-5 - 1e-6) hits += 1
    }
  }
  const recall = wanted === 0 ? 1 : hits / wanted
  if (recall < recallMin) faults.push(`recall@${k} is ${recall.toFixed(3)}`)
  return { name, count: truth.size, records: ids.length, searches: queries.length, recall, faults }
}

const recordFault = async (url: string, expected: TrueRecord): Promise<string | undefined> => {
  const response = await fetch(url)
  if (response.status !== 200) return `status ${response.status}`
  const { vector, metadata } = (await response.json()) as {
    readonly vector: ReadonlyArray<number>
    readonly metadata: unknown
  }
  const same = vector.length === expected.vector.length && vector.every((x, i) => Math.fround(x) === expected.vector[i])
  if (!same) return "its vector differs"
  const text = expected.metadata === "" ? {} : JSON.parse(expected.metadata)
  return JSON.stringify(metadata) === JSON.stringify(text) ? undefined : "its metadata differ"
}

const ask = async (url: string, body?: string): Promise<unknown> => {
  const response = await fetch(
    url,
    body === undefined ? {} : { method: "POST", body, headers: { "content-type": "application/json" } }
  )
  if (response.status !== 200) throw new Error(`${url}: status ${response.status}`)
  return response.json()
}

/** Evenly spread. */
const sample = <A>(all: ReadonlyArray<A>, count: number): ReadonlyArray<A> =>
  all.length <= count ? all : Array.from({ length: count }, (_, i) => all[Math.floor((i * all.length) / count)] as A)

/** Higher is nearer. */
const score = (metric: Collection["metric"], a: Float32Array, b: Float32Array): number => {
  let dot = 0
  let distance = 0
  let aa = 0
  let bb = 0
  for (let i = 0; i < a.length; i++) {
    const [x, y] = [a[i] as number, b[i] as number]
    dot += x * y
    distance += (x - y) ** 2
    aa += x * x
    bb += y * y
  }
  if (metric === "l2") return -distance
  return metric === "ip" ? dot : dot / (Math.sqrt(aa * bb) || 1)
}
