/**
 * What it costs that writes are done once: inserts without an id, with ids that the system gives (as in a cluster) and with
 * ids out of clients' keys, in turn, into partitions of their own in one process.
 *
 *   npm run bench:requests -- [--rounds 5] [--seconds 2] [--in-flight 64] [--dimensions 128] [--batch 1]
 *                             [--store memory]
 *
 * In files (the default) the disk sets the pace; in memory the main thread does, and what is left is its work.
 */
import { mkdirSync, mkdtempSync, rmSync } from "node:fs"
import { join } from "node:path"
import { parseArgs } from "node:util"
import { Context, Effect, Exit, Layer, Logger, References, Scope } from "effect"
import { defaultSettings, Settings } from "../src/config.ts"
import { actors, Router } from "../src/server.ts"
import { giveRequestId, requestIdOf } from "../src/shards/RequestIds.ts"
import { DataDirectory } from "../src/tiers/DataDirectory.ts"
import * as FileObjectStore from "../src/tiers/FileObjectStore.ts"
import { ObjectStore } from "../src/tiers/ObjectStore.ts"
import { RequestWindow } from "../src/tiers/RequestWindow.ts"
import { cacheDirectory } from "./cacheFile.ts"

const { values } = parseArgs({
  options: {
    rounds: { type: "string", default: "5" },
    seconds: { type: "string", default: "2" },
    "in-flight": { type: "string", default: "64" },
    dimensions: { type: "string", default: "128" },
    batch: { type: "string", default: "1" },
    store: { type: "string", default: "files" }
  }
})
const rounds = Number(values.rounds)
const inFlight = Number(values["in-flight"])
const dimensions = Number(values.dimensions)
const batch = Number(values.batch)

let keys = 0
const kinds = {
  none: () => undefined,
  given: giveRequestId,
  keyed: () => requestIdOf("default/key:1", `order-${keys++}`)
}
type Kind = keyof typeof kinds
const names = Object.keys(kinds) as Array<Kind>

interface Round {
  readonly inserts: number
  readonly seconds: number
  readonly cpuMicros: number
}

const median = (numbers: ReadonlyArray<number>): number =>
  [...numbers].sort((a, b) => a - b)[Math.floor(numbers.length / 2)] as number

const main = async (): Promise<void> => {
  mkdirSync(cacheDirectory, { recursive: true })
  const path = mkdtempSync(`${cacheDirectory}data-`)
  process.on("exit", () => rmSync(path, { recursive: true, force: true, maxRetries: 3 }))
  // The log as it is written: nothing is snapshotted or built while it is measured.
  const settings = { ...defaultSettings, snapshotOps: 10_000_000, snapshotIdleMillis: 3_600_000 }
  const start = async () => {
    const scope = await Effect.runPromise(Scope.make())
    const layer = actors.pipe(
      Layer.provideMerge(
        values.store === "memory"
          ? ObjectStore.layerMemory
          : FileObjectStore.layer({ directory: join(path, "objects") })
      ),
      Layer.provideMerge(DataDirectory.layer({ path })),
      Layer.provideMerge(Layer.succeed(Settings, settings)),
      Layer.provideMerge(
        Layer.mergeAll(Logger.layer([Logger.consolePretty()]), Layer.succeed(References.MinimumLogLevel, "Error"))
      )
    )
    return { scope, context: await Effect.runPromise(Layer.buildWithScope(layer, scope)) }
  }
  const { context, scope } = await start()
  const router = Context.get(context, Router)
  const store = Context.get(context, ObjectStore)
  for (const name of names) await Effect.runPromise(router.createCollection(name, { dimensions, metric: "l2" }))

  const round = async (name: Kind, millis: number): Promise<Round> => {
    const vector = new Float32Array(dimensions)
    const until = performance.now() + millis
    const started = performance.now()
    const cpu = process.cpuUsage()
    let inserts = 0
    const one = async (worker: number) => {
      // The same few records over and over: the index has next to nothing to do.
      const records = Array.from({ length: batch }, (_, i) => ({ id: `r${worker}-${i}`, vector, metadata: "" }))
      while (performance.now() < until) {
        await Effect.runPromise(router.upsert(name, records, "cold", kinds[name]()))
        inserts += 1
      }
    }
    await Promise.all(Array.from({ length: inFlight }, (_, worker) => one(worker)))
    const used = process.cpuUsage(cpu)
    return { inserts, seconds: (performance.now() - started) / 1_000, cpuMicros: (used.user + used.system) / inserts }
  }

  const results = new Map<Kind, Array<Round>>(names.map((name) => [name, []]))
  const warmedUp = new Map<Kind, number>()
  for (const name of names) warmedUp.set(name, (await round(name, 500)).inserts)
  for (let n = 0; n < rounds; n++) {
    const turn = n % 2 === 0 ? names : [...names].reverse()
    for (const name of turn) results.get(name)?.push(await round(name, Number(values.seconds) * 1_000))
  }

  console.log(`${inFlight} in flight, ${batch} x ${dimensions} floats a write; medians of ${rounds} rounds`)
  console.log("ids    writes/s   CPU us a write   writes a log object   log bytes a write")
  const base = results.get("none") as Array<Round>
  for (const name of names) {
    const all = results.get(name) as Array<Round>
    const rate = (one: Round) => one.inserts / one.seconds
    const { uid } = await Effect.runPromise(router.collection(name))
    const total = await logOf(store, uid)
    const writes = all.reduce((sum, one) => sum + one.inserts, warmedUp.get(name) as number)
    const share = (of: (one: Round) => number) => median(all.map((one, i) => of(one) / of(base[i] as Round))).toFixed(3)
    console.log(
      `${name.padEnd(6)} ${median(all.map(rate)).toFixed(0).padStart(8)} (x${share(rate)}) ` +
        `${median(all.map((one) => one.cpuMicros))
          .toFixed(1)
          .padStart(8)} (x${share((one) => one.cpuMicros)}) ` +
        `${(writes / total.objects).toFixed(1).padStart(12)} ${(total.bytes / writes).toFixed(0).padStart(18)}`
    )
  }
  await Effect.runPromise(Scope.close(scope, Exit.void))
  windows()
}

const logOf = async (store: ObjectStore["Service"], uid: string) => {
  let objects = 0
  let bytes = 0
  for (let startAfter = ""; ; ) {
    const page = await Effect.runPromise(store.list(`collections/${uid}/p000/log/`, { startAfter, limit: 1_000 }))
    for (const { key, sizeBytes } of page) {
      startAfter = key
      objects += 1
      bytes += sizeBytes
    }
    if (page.length < 1_000) return { objects, bytes }
  }
}

/** The window itself: what a full one takes, and the time of its calls. */
const windows = (): void => {
  const { requestWindowMax } = defaultSettings
  const window = new RequestWindow(defaultSettings)
  const ids = Array.from({ length: 2 * requestWindowMax }, (_, i) => requestIdOf("owner", String(i)))
  const now = Date.now()
  /** CPU time, in nanoseconds: others may keep the machine busy. */
  const timed = (what: () => void): number => {
    const before = process.cpuUsage()
    what()
    const { user, system } = process.cpuUsage(before)
    return (user + system) * 1_000
  }
  const entry = { kind: "upsert", seq: 1, millis: now, digest: 1, result: 1, first: 0 } as const
  const adding = timed(() => {
    for (const id of ids) window.add(id, entry)
  })
  const finding = timed(() => {
    for (const id of ids) window.find(id, now)
  })
  let copy = new Uint8Array(0)
  const copying = timed(() => {
    copy = window.encode(now) as Uint8Array<ArrayBuffer>
  })
  const loading = timed(() => new RequestWindow(defaultSettings).load(copy))
  console.log(
    `\na full window of ${window.size} keyed requests: ${window.bytes} bytes; add ${(adding / ids.length).toFixed(0)} ns, ` +
      `find ${(finding / ids.length).toFixed(0)} ns; copied in ${(copying / 1e6).toFixed(1)} ms, ` +
      `${copy.length} bytes, read in ${(loading / 1e6).toFixed(1)} ms (CPU time)`
  )
}

await main()
