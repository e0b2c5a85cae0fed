/**
 * What the client costs, on the words of the other benches, the result cache off. In one run, alternating: the embedded engine's search beside
 * bare hnswlib-node's on the same vectors; searches over a WebSocket by `VectorDB` beside those of the bench's own frames,
 * 64 in flight; and the time of a fresh process from `import` to its first embedded search: from source, and of the built
 * package where it is there (`npm run build`), each as the launcher runs it and as plain Node does. Beside each figure what is
 * asked.
 *
 *   npm run bench:client [-- --count 50000 --rounds 5 --json FILE]
 */
import { spawnSync } from "node:child_process"
import { existsSync, mkdtempSync, rmSync, writeFileSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { parseArgs } from "node:util"
import { WebSocket } from "ws"
import { nodeFlags } from "../scripts/nodeOptions.mjs"
import { nodeEnvironment } from "../scripts/run.mjs"
import type { WebSocketLike } from "../src/client/index.ts"
import { VectorDB } from "../src/index.ts"
import { indexSettings, loadHnswlib } from "./bareIndex.ts"
import { startOurs } from "./servers.ts"
import { openWire } from "./wires.ts"
import { dimensions, loadWords, vectorOf } from "./words.ts"

const { values } = parseArgs({
  options: {
    count: { type: "string", default: "50000" },
    rounds: { type: "string", default: "5" },
    json: { type: "string" }
  }
})
const queries = 1_000
const data = loadWords({ count: Number(values.count), queries, seed: 1 })
const rounds = Number(values.rounds)
const k = 10
const ef = 128
const inFlight = 64

const percentile = (sorted: ReadonlyArray<number>, share: number): number =>
  sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))] as number
const median = (numbers: ReadonlyArray<number>): number =>
  percentile(
    numbers.toSorted((a, b) => a - b),
    0.5
  )

const items = function* () {
  for (let row = 0; row < data.base.words.length; row++) {
    yield { id: data.base.words[row] as string, vector: vectorOf(data.base, row) }
  }
}

const searchEach = async (search: (query: Float32Array) => unknown): Promise<{ p50: number; p99: number }> => {
  const times: Array<number> = []
  for (let query = 0; query < queries; query++) {
    const started = performance.now()
    await search(vectorOf(data.queries, query))
    times.push(performance.now() - started)
  }
  times.sort((a, b) => a - b)
  return { p50: percentile(times, 0.5) * 1_000, p99: percentile(times, 0.99) * 1_000 }
}

const embedded = async (directory: string) => {
  const { HierarchicalNSW } = loadHnswlib("bare-simd")
  const bare = new HierarchicalNSW("cosine", dimensions)
  bare.initIndex({ maxElements: data.base.words.length, ...indexSettings, randomSeed: indexSettings.seed })
  for (let row = 0; row < data.base.words.length; row++) bare.addPoint([...vectorOf(data.base, row)], row)
  bare.setEf(ef)
  await using db = await VectorDB.open({ path: directory, settings: { resultCacheBytes: 0 } })
  // Insertion is not what is measured: on a busy machine a batch may take longer than a call has by default.
  await db.insertMany(items(), { batchSize: 1_000, deadlineMillis: 60_000 })
  const pairs: Array<{ readonly bare: number; readonly ours: number; readonly oursP99: number }> = []
  for (let round = 0; round <= rounds; round++) {
    const raw = await searchEach((query) => bare.searchKnn([...query], k))
    const ours = await searchEach((query) => db.search(query, { k, ef }))
    // The first round warms up.
    if (round > 0) pairs.push({ bare: raw.p50, ours: ours.p50, oursP99: ours.p99 })
  }
  return {
    bareP50Micros: median(pairs.map(({ bare }) => bare)),
    oursP50Micros: median(pairs.map(({ ours }) => ours)),
    oursP99Micros: median(pairs.map(({ oursP99 }) => oursP99)),
    ratio: median(pairs.map(({ bare, ours }) => ours / bare))
  }
}

const overWebSocket = async (directory: string) => {
  const server = await startOurs(directory, ["--result-cache-bytes", "0"])
  try {
    const url = new URL(server.url)
    const clients = {
      platform: new VectorDB({ endpoint: server.url }),
      ws: new VectorDB({
        endpoint: server.url,
        webSocket: (address, protocols) =>
          new WebSocket(address, [...protocols], { perMessageDeflate: false }) as unknown as WebSocketLike
      })
    }
    // A search that is refused is never answered: then nothing is measured.
    const failed = Promise.withResolvers<never>()
    failed.promise.catch(() => {})
    const wire = await openWire["ws-binary"]({
      url,
      lanes: inFlight,
      queries: data.queries,
      onFailure: failed.reject
    })
    const searches = 6_000
    /** Searches a second, and this process's CPU for each. */
    const measure = async (ask: (query: number) => Promise<unknown>) => {
      let asked = 0
      const cpu = process.cpuUsage()
      const started = performance.now()
      const lanes = Array.from({ length: inFlight }, async () => {
        while (asked < searches) await ask(asked++ % queries)
      })
      await Promise.race([Promise.all(lanes), failed.promise])
      const used = process.cpuUsage(cpu)
      return {
        rate: searches / ((performance.now() - started) / 1_000),
        cpuMicros: (used.user + used.system) / searches
      }
    }
    const raw = (query: number) => new Promise<void>((resolve) => wire.ask(0, query, resolve))
    const found: Record<string, Array<{ rate: number; cpuMicros: number }>> = { frames: [], platform: [], ws: [] }
    for (let round = 0; round <= rounds; round++) {
      const frames = await measure(raw)
      const platform = await measure((query) => clients.platform.search(vectorOf(data.queries, query), { k }))
      const ws = await measure((query) => clients.ws.search(vectorOf(data.queries, query), { k }))
      if (round === 0) continue
      found["frames"]?.push(frames)
      found["platform"]?.push(platform)
      found["ws"]?.push(ws)
    }
    wire.close()
    await Promise.all(Object.values(clients).map((client) => client.close()))
    const rates = (name: string) => found[name]?.map(({ rate }) => rate) ?? []
    const ratio = (name: string) => median(rates(name).map((rate, i) => rate / (rates("frames")[i] as number)))
    return Object.fromEntries(
      Object.entries(found).map(([name, rows]) => [
        name,
        {
          rate: median(rows.map(({ rate }) => rate)),
          cpuMicros: median(rows.map((row) => row.cpuMicros)),
          ratio: ratio(name)
        }
      ])
    )
  } finally {
    await server.stop()
  }
}

interface Cold {
  readonly millis: number
  /** Of all threads, the start of Node included: what another load on the machine changes less. */
  readonly cpuMillis: number
}

/** As the launcher starts it, or as a user's own program is: with no flag, no tuning and no compile cache. */
const cold = (directory: string, entry: URL, isPlain: boolean): Cold => {
  const program = `
    const started = performance.now()
    const { VectorDB } = await import(${JSON.stringify(entry.href)})
    const db = await VectorDB.open({ path: process.argv[1] })
    await db.insert("a", [1, 0, 0])
    await db.search([1, 0, 0])
    const { user, system } = process.cpuUsage()
    console.log(JSON.stringify({ millis: performance.now() - started, cpuMillis: (user + system) / 1_000 }))
    await db.close()`
  const { GLIBC_TUNABLES: _, NODE_COMPILE_CACHE: __, ...plainEnvironment } = process.env
  const env = isPlain ? plainEnvironment : { ...plainEnvironment, ...nodeEnvironment() }
  const times = Array.from({ length: rounds + 1 }, () => {
    const path = join(directory, `cold-${Math.random().toString(36).slice(2)}`)
    const flags = isPlain ? [] : nodeFlags
    const { stdout, stderr } = spawnSync(process.execPath, [...flags, "--input-type=module", "-e", program, path], {
      encoding: "utf8",
      env
    })
    if (stdout === "") throw new Error(stderr)
    return JSON.parse(stdout) as Cold
  }).slice(1)
  return { millis: median(times.map(({ millis }) => millis)), cpuMillis: median(times.map((one) => one.cpuMillis)) }
}

const colds = (directory: string): Record<string, Cold> => {
  const source = new URL("../src/index.ts", import.meta.url)
  const built = new URL("../dist/bundle/index.js", import.meta.url)
  return {
    source: cold(directory, source, false),
    sourcePlain: cold(directory, source, true),
    ...(existsSync(built) ? { built: cold(directory, built, false), builtPlain: cold(directory, built, true) } : {})
  }
}

/** What is asked of each figure, and whether it is so. */
const verdicts = ({ cold, embedded, webSocket }: Results): Array<Record<string, string | number>> => {
  const row = (figure: string, asked: string, found: number, met: boolean) => ({
    figure,
    asked,
    found: Math.round(found * 100) / 100,
    "": met ? "met" : "not met"
  })
  return [
    row("embedded search, p50 by bare p50", "<= 1.25", embedded.ratio, embedded.ratio <= 1.25),
    ...Object.entries(webSocket).flatMap(([name, { ratio }]) =>
      name === "frames" ? [] : [row(`WebSocket (${name}), rate by bench's`, ">= 0.9", ratio, ratio >= 0.9)]
    ),
    ...Object.entries(cold).map(([name, { millis }]) =>
      row(`import to first search (${name}), ms`, "< 300", millis, millis < 300)
    )
  ]
}

interface Results {
  readonly embedded: Awaited<ReturnType<typeof embedded>>
  readonly webSocket: Awaited<ReturnType<typeof overWebSocket>>
  readonly cold: Record<string, Cold>
}

const root = mkdtempSync(join(tmpdir(), "ruvector-bench-client-"))
try {
  const first = await embedded(join(root, "data"))
  const results = {
    vectors: data.base.words.length,
    embedded: first,
    webSocket: await overWebSocket(join(root, "data")),
    cold: colds(root)
  }
  console.log(JSON.stringify(results, undefined, 2))
  console.table(verdicts(results))
  if (values.json !== undefined) writeFileSync(values.json, `${JSON.stringify(results)}\n`)
} finally {
  rmSync(root, { recursive: true, force: true })
}
