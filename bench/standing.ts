/**
 * Standing queries on word vectors. First what one change costs in a vector thread, by the number of queries that stand
 * there, beside searching each of them again and beside looking at all of them in float32. Then a node: changes a second,
 * and the time from the write of a change to its event.
 *
 *   npm run bench:standing -- [--count 100000] [--queries 100,1000,10000] [--standing 10000] [--rate 500] [--seconds 10] [--seed 1]
 *
 * The loaded collection is kept in the benchmark's cache; building its graph takes a minute or two the first time.
 */
import { mkdirSync } from "node:fs"
import { join } from "node:path"
import { monitorEventLoopDelay } from "node:perf_hooks"
import { parseArgs } from "node:util"
import { Context, Effect, Exit, Layer, Scope } from "effect"
import { defaultSettings, Settings } from "../src/config.ts"
import { actors, Router, StandingQueries } from "../src/server.ts"
import { partitionPrefix } from "../src/tiers/CatalogueObject.ts"
import { collectGarbage } from "../src/tiers/collectGarbage.ts"
import { DataDirectory } from "../src/tiers/DataDirectory.ts"
import * as FileObjectStore from "../src/tiers/FileObjectStore.ts"
import { Bitset } from "../src/tiers/index/Bitset.ts"
import { BlockCache } from "../src/tiers/index/BlockCache.ts"
import { Resident } from "../src/tiers/index/Resident.ts"
import type { WatchCommand } from "../src/tiers/index/ThreadMessages.ts"
import { TopK } from "../src/tiers/index/TopK.ts"
import { VectorArena } from "../src/tiers/index/VectorArena.ts"
import type { Work } from "../src/tiers/index/Work.ts"
import { encodeSegment } from "../src/tiers/LogSegment.ts"
import { MemoryBudget } from "../src/tiers/MemoryBudget.ts"
import { ObjectStore } from "../src/tiers/ObjectStore.ts"
import * as PartitionLog from "../src/tiers/PartitionLog.ts"
import { cacheDirectory } from "./cacheFile.ts"
import { type Data, dimensions, loadWords, vectorOf } from "./words.ts"

const k = 10
const ef = 256
const changesMeasured = 400
const collection = "words"
/** Writes under way at once, where as many are made as go. */
const atOnce = 64
/** Queries opened at once. */
const openedAtOnce = 64

const main = async (): Promise<void> => {
  const { values } = parseArgs({
    options: {
      count: { type: "string", default: "100000" },
      queries: { type: "string", default: "100,1000,10000" },
      standing: { type: "string", default: "10000" },
      rate: { type: "string", default: "500" },
      seconds: { type: "string", default: "10" },
      seed: { type: "string", default: "1" }
    }
  })
  const numbers = values.queries === "" ? [] : values.queries.split(",").map(Number)
  const standing = Number(values.standing)
  const count = Number(values.count)
  const data = loadWords({ count, queries: Math.max(standing, ...numbers), seed: Number(values.seed) })
  const directory = join(cacheDirectory, `standing-${count}-${values.seed}`)
  mkdirSync(directory, { recursive: true })
  const node = await start(directory)
  try {
    const snapshot = await load(node, data)
    if (numbers.length > 0) await costs(data, snapshot, numbers)
    if (standing > 0) await events(node, data, standing, Number(values.rate), Number(values.seconds))
  } finally {
    await node.stop()
  }
}

interface Node {
  readonly router: Router["Service"]
  readonly queries: StandingQueries["Service"]
  readonly store: ObjectStore["Service"]
  readonly budget: MemoryBudget["Service"]
  readonly scope: Scope.Closeable
  readonly stop: () => Promise<void>
}

const run = <A, E>(effect: Effect.Effect<A, E>): Promise<A> => Effect.runPromise(effect)

const start = async (directory: string): Promise<Node> => {
  const scope = await run(Scope.make())
  const layer = actors.pipe(
    Layer.provideMerge(FileObjectStore.layer({ directory: join(directory, "objects") })),
    Layer.provideMerge(DataDirectory.layer({ path: directory })),
    Layer.provideMerge(Layer.succeed(Settings, { ...defaultSettings }))
  )
  const context = await run(Layer.buildWithScope(layer, scope))
  return {
    router: Context.get(context, Router),
    queries: Context.get(context, StandingQueries),
    store: Context.get(context, ObjectStore),
    budget: Context.get(context, MemoryBudget),
    scope,
    stop: () => run(Scope.close(scope, Exit.void))
  }
}

/** Loads what is not there yet; answers with the files of a snapshot of it. */
const load = async ({ router, store, budget, scope }: Node, { base }: Data) => {
  const { collection: of } = await run(
    router.createCollection(collection, {
      dimensions,
      metric: "cosine",
      partitions: 1,
      index: { ef_construction: 100 }
    })
  )
  const has = await run(router.count(of))
  const isFresh = has < base.words.length
  if (isFresh) {
    process.stderr.write(`Loading ${base.words.length} words (once) ...\n`)
    for (let at = 0; at < base.words.length; at += 1_000) {
      const records = base.words.slice(at, at + 1_000).map((_, i) => ({
        id: `w${at + i}`,
        vector: vectorOf(base, at + i).slice(),
        metadata: ""
      }))
      await run(router.upsert(collection, records))
    }
  }
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, 200))
    const [stats] = await run(router.stats(of))
    for (const resident of budget.residents()) if (resident.form() === "mapped") await run(resident.promote)
    if (stats === undefined || stats.form !== "full" || stats.snapshot_seq === 0) continue
    // What is loaded in this run is in the snapshot once that reaches to the end; of an earlier one it does.
    if (!isFresh || stats.snapshot_seq === stats.last_seq) break
  }
  const prefix = partitionPrefix(of.uid, 0)
  const snapshot = (await run(Effect.provideService(PartitionLog.peek(prefix), ObjectStore, store)))?.snapshot
  if (snapshot === undefined) throw new Error("there is no snapshot")
  const paths = Effect.all({
    records: store.localPath(snapshot.records.key),
    graph: store.localPath(snapshot.graph.key)
  })
  return run(Scope.provide(paths, scope))
}

// --- In the thread -----------------------------------------------------------------------------------------------------

const costs = async (
  data: Data,
  snapshot: { readonly records: string; readonly graph: string },
  numbers: ReadonlyArray<number>
): Promise<void> => {
  const spec = { dimensions, metric: "cosine", m: 16, efConstruction: 100 } as const
  const resident = new Resident(spec, { cache: new BlockCache(defaultSettings.blockCacheBytes) })
  await finished(resident.open({ ...snapshot, sketch: undefined }))
  const queries = data.queries.words.map((_, i) => vectorOf(data.queries, i).slice())
  const arena = new VectorArena(dimensions, "cosine")
  const top = new TopK()

  const began = performance.now()
  for (const vector of queries.slice(0, 200))
    resident.search(vector, k, defaultSettings.defaultEfSearch, undefined, false, false)
  const searchMicros = ((performance.now() - began) * 1_000) / 200

  let counter = 0
  let seq = 1_000_000
  /** A record that is there gets a vector that is new. */
  const segmentOf = () => {
    counter += 1
    const id = `w${(counter * 7_919) % data.base.words.length}`
    const vector = vectorOf(data.reserve, counter % data.reserve.words.length).slice()
    const version = { time: BigInt(Date.now()) * 1_000_000n + BigInt(counter), region: "local", counter: 1e9 + counter }
    const segment = encodeSegment({ epoch: 1, seq: ++seq, nonce: 1n, dimensions }, [
      { kind: "upsert", id, vector, metadata: "", version }
    ])
    return { id, segment }
  }

  const rows: Array<ReadonlyArray<string>> = [
    [
      "queries",
      "apply us",
      "with matching",
      "matching",
      "told",
      "all float32",
      "all searched",
      "register us",
      "KB each"
    ]
  ]
  const plain = async (): Promise<number> => {
    const times: Array<number> = []
    for (let i = 0; i < changesMeasured; i++) {
      if (i % 64 === 0) await new Promise((resolve) => setImmediate(resolve))
      const { segment } = segmentOf()
      const at = performance.now()
      drained(resident.apply(segment))
      times.push((performance.now() - at) * 1_000)
    }
    return mean(times)
  }
  let registered = 0
  for (const number of [0, ...numbers]) {
    const heapBefore = memory()
    const from = performance.now()
    for (let i = registered; i < number; i++) {
      drained(resident.watch(commandOf(i, queries[i]!)))
      resident.standing?.take()
      arena.set(i, queries[i]!)
      // The node is in this process too, and may not be held up for seconds.
      if (i % 64 === 0) await new Promise((resolve) => setImmediate(resolve))
    }
    const registerMicros = ((performance.now() - from) * 1_000) / Math.max(1, number - registered)
    const bytesEach = (memory() - heapBefore) / Math.max(1, number - registered)
    registered = number
    if (number === 0) {
      rows.push(["0", (await plain()).toFixed(0), "", "", "", "", "", "", ""])
      continue
    }
    const whole: Array<number> = []
    const matching: Array<number> = []
    let told = 0
    for (let i = 0; i < changesMeasured; i++) {
      if (i % 64 === 0) await new Promise((resolve) => setImmediate(resolve))
      const { id, segment } = segmentOf()
      const at = performance.now()
      drained(resident.apply(segment))
      const matches = resident.standing?.take()
      const after = performance.now()
      while (resident.standing?.hasWork === true) resident.standing.workStep()
      resident.standing?.take()
      const refilled = performance.now()
      whole.push((refilled - at) * 1_000)
      told += matches?.scores.length ?? 0
      // The same change met again: what it takes beside the graph.
      const again = performance.now()
      drained(resident.standing!.match([id]))
      resident.standing?.take()
      matching.push((performance.now() - again) * 1_000 + (refilled - after) * 1_000)
    }
    const all = Bitset.full(number)
    const scan = performance.now()
    for (let i = 0; i < 50; i++) {
      top.reset(1)
      arena.scan(queries[i]!, all, top)
    }
    const scanMicros = ((performance.now() - scan) * 1_000) / 50
    rows.push([
      String(number),
      "",
      mean(whole).toFixed(0),
      mean(matching).toFixed(1),
      (told / changesMeasured).toFixed(2),
      scanMicros.toFixed(0),
      (searchMicros * number).toFixed(0),
      registerMicros.toFixed(0),
      (bytesEach / 1_024).toFixed(1)
    ])
  }
  process.stdout.write(
    `\nOne change in the thread, ${data.base.words.length} vectors, k ${k}; microseconds of CPU, means\n`
  )
  table(rows)
  resident.dispose()
}

const commandOf = (watch: number, vector: Float32Array): WatchCommand => ({
  kind: "watch",
  request: 0,
  partition: 0,
  watch,
  vector,
  k,
  ef,
  minScore: Number.NEGATIVE_INFINITY,
  filter: "",
  flags: 0,
  seeds: []
})

// --- A node ------------------------------------------------------------------------------------------------------------

const events = async (node: Node, data: Data, standing: number, rate: number, seconds: number): Promise<void> => {
  const { router, queries } = node
  /** By the id of a change that is near a query: when it was written, and what its event took. */
  const written = new Map<string, number>()
  const latencies: Array<number> = []
  let told = 0
  const vectors = Array.from({ length: standing }, (_, i) => vectorOf(data.queries, i).slice())
  let number = 0
  const changed: Array<string> = []
  /** Every other change is right beside a query, so that its event is sure; the rest are words. */
  const recordOf = () => {
    number += 1
    const beside = number % 2 === 0
    const id = `n${number}`
    changed.push(id)
    const vector = beside
      ? vectors[(number * 31) % standing]!.map((component, i) => component * (1 + ((i + number) % 7) * 1e-5))
      : vectorOf(data.reserve, number % data.reserve.words.length).slice()
    if (beside) written.set(id, performance.now())
    return { id, vector, metadata: "" }
  }
  const write = () => run(router.upsert(collection, [recordOf()]))

  /** Changes a second, as many as go, so many at once. */
  const most = async (): Promise<number> => {
    const from = performance.now()
    const until = from + seconds * 500
    let done = 0
    await Promise.all(
      Array.from({ length: atOnce }, async () => {
        while (performance.now() < until) {
          await write()
          done += 1
        }
      })
    )
    return done / ((performance.now() - from) / 1_000)
  }
  const without = await most()
  written.clear()

  const loop = monitorEventLoopDelay({ resolution: 1 })
  loop.enable()
  const opened = performance.now()
  await run(
    Effect.forEach(
      vectors,
      (vector) =>
        queries.open(
          {
            collection,
            vector,
            k,
            minScore: Number.NEGATIVE_INFINITY,
            filter: "",
            includeMetadata: false,
            includeVector: false
          },
          {
            onChange: ({ members }) => {
              told += 1
              const id = members[0]?.id ?? ""
              const at = written.get(id)
              if (at === undefined) return
              written.delete(id)
              latencies.push(performance.now() - at)
            },
            onLost: (error) => {
              throw new Error(error._tag)
            }
          }
        ),
      { concurrency: openedAtOnce, discard: true }
    )
  )
  const openMillis = (performance.now() - opened) / standing
  loop.disable()

  // At a rate.
  const began = performance.now()
  const pending: Array<Promise<unknown>> = []
  const cpuBefore = process.cpuUsage()
  for (let i = 0; i < rate * seconds; i++) {
    const due = began + (i * 1_000) / rate
    const wait = due - performance.now()
    if (wait > 1) await new Promise((resolve) => setTimeout(resolve, wait))
    pending.push(write())
  }
  await Promise.all(pending)
  const took = (performance.now() - began) / 1_000
  const cpu = process.cpuUsage(cpuBefore)
  await new Promise((resolve) => setTimeout(resolve, 200))
  const sorted = latencies.sort((a, b) => a - b)
  const at = (share: number) =>
    (sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))] ?? Number.NaN).toFixed(1)
  process.stdout.write(
    `\nA node with ${standing} standing queries (opened in ${openMillis.toFixed(2)} ms each, ` +
      `the event loop held up for ${(loop.max / 1e6).toFixed(0)} ms at most)\n`
  )
  table([
    ["changes/s asked", "changes/s", "events", "of sure ones", "p50 ms", "p99 ms", "greatest ms", "CPU us a change"],
    [
      String(rate),
      ((rate * seconds) / took).toFixed(0),
      String(told),
      `${latencies.length} of ${latencies.length + written.size}`,
      at(0.5),
      at(0.99),
      at(1),
      ((cpu.user + cpu.system) / (rate * seconds)).toFixed(0)
    ]
  ])

  const withThem = await most()
  process.stdout.write(
    `As many as go, ${atOnce} at once: ${withThem.toFixed(0)} changes/s, ${without.toFixed(0)} without standing queries\n`
  )
  for (let i = 0; i < changed.length; i += 1_000) await run(router.remove(collection, changed.slice(i, i + 1_000)))
}

// --- Small things ------------------------------------------------------------------------------------------------------

const mean = (values: ReadonlyArray<number>): number => values.reduce((sum, one) => sum + one, 0) / values.length

const memory = (): number => {
  collectGarbage()
  const { heapUsed, external } = process.memoryUsage()
  return heapUsed + external
}

const drained = <A>(work: Work<A>): A => {
  for (;;) {
    const step = work.next()
    if (step.done === true) return step.value
  }
}

const finished = async <A>(work: Work<A>): Promise<A> => {
  let step = work.next()
  while (step.done !== true) step = work.next(await step.value)
  return step.value
}

const table = (rows: ReadonlyArray<ReadonlyArray<string>>): void => {
  const widths = rows[0]!.map((_, column) => Math.max(...rows.map((row) => row[column]!.length)))
  for (const row of rows) process.stdout.write(`${row.map((cell, i) => cell.padStart(widths[i]!)).join("  ")}\n`)
}

await main()
