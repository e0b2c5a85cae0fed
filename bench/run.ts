/**
 * Measures our server against the baselines on real word vectors, and prints one table.
 *
 *   npm run bench -- [--count 100000] [--queries 1000] [--rounds 3] [--seconds 5] [--streams 5000] [--seed 1]
 *                    [--only http,ws,rpc,grpc,filter,idle,restart,inserts] [--servers ours,bare,bare-simd]
 *                    [--json FILE] [--svg FILE]
 *
 * Every server is loaded once. Then the rounds alternate between the servers, the others idle meanwhile, and medians of
 * the rounds are shown. Searches during inserts come last, since they change what is in the servers.
 */
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs"
import { cpus, loadavg } from "node:os"
import { parseArgs } from "node:util"
import { builds, simdOf } from "./bareIndex.ts"
import { cacheDirectory } from "./cacheFile.ts"
import { LoadClient } from "./LoadClient.ts"
import type { Latencies, Outcomes } from "./load.ts"
import { type Curve, latencyPlot } from "./plot.ts"
import { cpuMicros, settledBytes } from "./processTree.ts"
import { type Measure, Report, type RowWire, rowName, shown, type Unit } from "./report.ts"
import { type Server, type ServerName, serverNames, startBare, startOurs } from "./servers.ts"
import { metricNames, scenarioNames } from "./targets.ts"
import { exactTruth, shares } from "./truth.ts"
import type { WireName } from "./wires.ts"
import { type DataOptions, loadWords } from "./words.ts"

const scenarios = ["http", "ws", "rpc", "grpc", "filter", "idle", "restart", "inserts"] as const

type Scenario = (typeof scenarios)[number]

interface Options {
  readonly data: DataOptions
  readonly rounds: number
  readonly seconds: number
  readonly streams: number
  readonly only: ReadonlyArray<Scenario>
  readonly servers: ReadonlyArray<ServerName>
  readonly json: string | undefined
  readonly svg: string | undefined
}

const main = async (): Promise<void> => {
  const options = readOptions()
  const [busy = 0] = loadavg()
  if (busy > 0.5)
    say(`Warning: other programs keep this machine busy (load ${busy.toFixed(1)}): figures will be too low`)
  // What is missing is told before anything is started; the clients then read what is cached here.
  for (const build of builds) if (options.servers.includes(build)) simdOf(build)
  exactTruth(loadWords(options.data))

  // Not in the system's folder for temporary files, which may be memory: what is acknowledged has to reach a disk.
  mkdirSync(cacheDirectory, { recursive: true })
  const dataDirectory = mkdtempSync(`${cacheDirectory}data-`)
  process.on("exit", () => rmSync(dataDirectory, { recursive: true, force: true, maxRetries: 3 }))
  for (const signal of ["SIGINT", "SIGTERM"] as const) process.on(signal, () => process.exit(1))

  const bench = new Bench(options, dataDirectory)
  try {
    await bench.run()
  } finally {
    await bench.close()
  }
  console.log(bench.summary())
  if (options.json !== undefined) writeFileSync(options.json, `${JSON.stringify(bench.report.rows(), null, 2)}\n`)
  if (options.svg !== undefined) writeFileSync(options.svg, bench.plot())
}

const readOptions = (): Options => {
  const { values } = parseArgs({
    options: {
      count: { type: "string", default: "100000" },
      queries: { type: "string", default: "1000" },
      rounds: { type: "string", default: "3" },
      seconds: { type: "string", default: "5" },
      streams: { type: "string", default: "5000" },
      seed: { type: "string", default: "1" },
      only: { type: "string", default: scenarios.join(",") },
      servers: { type: "string", default: serverNames.join(",") },
      json: { type: "string" },
      svg: { type: "string" }
    }
  })
  const positive = (name: "count" | "queries" | "rounds" | "seconds" | "streams" | "seed"): number => {
    const value = Number(values[name])
    if (!(value > 0) || (name !== "seconds" && !Number.isInteger(value))) {
      throw new Error(`--${name} is a number above 0, not ${values[name]}`)
    }
    return value
  }
  const chosen = <Name extends string>(flag: string, text: string, names: ReadonlyArray<Name>): Array<Name> => {
    const asked = text.split(",")
    for (const name of asked) {
      if (!names.some((known) => known === name)) throw new Error(`${flag} knows ${names.join(", ")}, not ${name}`)
    }
    return names.filter((name) => asked.includes(name))
  }
  return {
    data: { count: positive("count"), queries: positive("queries"), seed: positive("seed") },
    rounds: positive("rounds"),
    seconds: positive("seconds"),
    streams: positive("streams"),
    only: chosen("--only", values.only, scenarios),
    servers: chosen("--servers", values.servers, serverNames),
    json: values.json,
    svg: values.svg
  }
}

const say = (line: string): void => {
  process.stderr.write(`${line}\n`)
}

/** Sent to the baselines with every search, which have no default of their own: the one of our index. */
const efOfBare = 128
const warmUpSeconds = 1
const batchesInFlight = 2
const lanesWithFilter = 8
const lanesDuringInserts = 8

class Bench {
  readonly report = new Report()
  readonly #options: Options
  readonly #dataDirectory: string
  readonly #searcher: LoadClient
  readonly #inserter: LoadClient
  readonly #servers = new Map<ServerName, Server>()
  /** How many words of the reserve each server has been given. */
  readonly #reserveUsed = new Map<ServerName, number>()

  constructor(options: Options, dataDirectory: string) {
    this.#options = options
    this.#dataDirectory = dataDirectory
    this.#searcher = new LoadClient(options.data)
    this.#inserter = new LoadClient(options.data)
  }

  async run(): Promise<void> {
    const { rounds, servers, only, svg } = this.#options
    for (const name of servers) await this.#load(name)
    for (const name of servers) await this.#recall(name, scenarioNames.defaults)

    const httpLanes = svg === undefined ? [1, 8, 32] : [1, 2, 4, 8, 16, 32, 64]
    for (let round = 1; round <= rounds; round++) {
      for (const name of servers) {
        say(`round ${round} of ${rounds}: ${name}`)
        if (only.includes("http")) for (const lanes of httpLanes) await this.#search(name, "http", lanes)
        if (name !== "ours") continue
        if (only.includes("ws")) for (const wire of ["ws", "ws-binary"] as const) await this.#search(name, wire, 32)
        if (only.includes("grpc")) {
          for (const wire of ["ws-stream", "grpc", "grpc-session"] as const) await this.#search(name, wire, 32)
        }
        if (only.includes("rpc")) await this.#search(name, "rpc", 32)
        if (only.includes("filter")) await this.#filtered(name)
      }
    }
    if (servers.includes("ours") && only.includes("idle"))
      for (const wire of ["ws", "sse"] as const) await this.#idle(wire)
    if (servers.includes("ours") && only.includes("restart")) {
      await this.#restart(scenarioNames.restart, "SIGTERM")
      await this.#restart(scenarioNames.restartAfterKill, "SIGKILL")
    }
    if (only.includes("inserts")) {
      for (let round = 1; round <= rounds; round++) {
        for (const name of servers) {
          say(`round ${round} of ${rounds}: ${name}`)
          await this.#duringInserts(name)
        }
      }
    }
  }

  async close(): Promise<void> {
    await Promise.all([this.#searcher.close(), this.#inserter.close()])
    await Promise.all([...this.#servers.values()].map((server) => server.stop()))
  }

  summary(): string {
    const { data, rounds, seconds, streams } = this.#options
    const [cpu] = cpus()
    return [
      "",
      `${data.count.toLocaleString("en-US")} word vectors of 100 dimensions, ${data.queries} held-out queries, k 10; ` +
        `medians of ${rounds} rounds of ${seconds} s; ${streams} idle streams`,
      `Node ${process.versions.node}, ${cpus().length} x ${cpu?.model.trim() ?? "unknown processor"}` +
        "; ours runs with what `npm start` sets, the baselines as plain Node",
      `hnswlib-node is compiled for ${builds.map((build) => `${simdOf(build)} (${build})`).join(" and ")}`,
      "",
      this.report.table(),
      ""
    ].join("\n")
  }

  plot(): string {
    const curves = (["ours", "bare"] as const).flatMap((server) =>
      (["p50", "p99"] as const).map((metric): Curve => {
        const points = [1, 2, 4, 8, 16, 32, 64].flatMap((lanes) => {
          const scenario = scenarioNames.search(lanes)
          const rate = this.report.medianOf(server, "http", scenario, metricNames.rate)
          const millis = this.report.medianOf(server, "http", scenario, metric)
          return rate === undefined || millis === undefined ? [] : [{ lanes, rate, millis }]
        })
        return { server, metric, points }
      })
    )
    const count = this.#options.data.count.toLocaleString("en-US")
    return latencyPlot(
      curves.filter((curve) => curve.points.length > 0),
      `HTTP search of ${count} word vectors, k 10; ${cpus().length} cores, shared with the client`
    )
  }

  #record(server: ServerName, wire: RowWire, scenario: string, metric: string, unit: Unit, value: number): void {
    const measure: Measure = { wire, scenario, metric, unit }
    this.report.add(server, measure, value)
    say(`  ${rowName(measure)} ${metric} ${shown(value, unit)}${unit === "share" ? "" : ` ${unit}`}`)
  }

  #recordSearches(server: ServerName, wire: RowWire, scenario: string, { rate, p50, p95, p99 }: Latencies): void {
    const add = (metric: string, unit: Unit, value: number): void =>
      this.report.add(server, { wire, scenario, metric, unit }, value)
    add(metricNames.rate, "searches/s", rate)
    add(metricNames.p50, "ms", p50)
    add(metricNames.p95, "ms", p95)
    add(metricNames.p99, "ms", p99)
    const name = rowName({ wire, scenario })
    say(`  ${name} ${shown(rate, "searches/s")}/s, p50 ${shown(p50, "ms")} ms, p99 ${shown(p99, "ms")} ms`)
  }

  #server(name: ServerName): Server {
    const server = this.#servers.get(name)
    if (server === undefined) throw new Error(`${name} was not started`)
    return server
  }

  async #load(name: ServerName): Promise<void> {
    const build = builds.find((build) => build === name)
    const server = await (build === undefined
      ? startOurs(this.#dataDirectory)
      : // A little more than is loaded, grown when more is inserted: what is reserved but unused should not count.
        startBare(build, Math.ceil(this.#options.data.count * 1.05)))
    this.#servers.set(name, server)
    say(`loading ${name}`)
    const { url, pid } = server
    const words = { url, part: "base", from: 0 } as const
    await this.#inserter.run({ type: "prepareInserts", ...words })
    const { vectorsPerSecond, inserted } = await this.#inserter.run({
      type: "insert",
      ...words,
      inFlight: batchesInFlight
    })
    if (inserted !== this.#options.data.count) throw new Error(`${name} took only ${inserted} vectors`)
    this.#record(name, "http", scenarioNames.load, metricNames.rate, "vectors/s", vectorsPerSecond)
    const bytes = await settledBytes(pid)
    this.#record(name, "-", scenarioNames.afterLoad, metricNames.memory, "MB", bytes / 1e6)
  }

  async #recall(name: ServerName, scenario: string): Promise<void> {
    const { recall } = await this.#askAll(name)
    this.#record(name, "http", scenario, metricNames.recall, "share", recall)
  }

  /** Every query once. */
  #askAll(name: ServerName): Promise<Outcomes["search"]> {
    return this.#searcher.run({
      type: "search",
      url: this.#server(name).url,
      wire: "http",
      lanes: 4,
      until: { searches: this.#options.data.queries },
      ...efFor(name)
    })
  }

  async #search(name: ServerName, wire: WireName, lanes: number): Promise<void> {
    const { url, pid } = this.#server(name)
    const cpuBefore = cpuMicros(pid)
    const result = await this.#searcher.run({
      type: "search",
      url,
      wire,
      lanes,
      until: { seconds: this.#options.seconds, warmUpSeconds },
      ...efFor(name)
    })
    const scenario = scenarioNames.search(lanes)
    this.#recordSearches(name, wire, scenario, result)
    this.#record(name, wire, scenario, metricNames.cpu, "us", (cpuMicros(pid) - cpuBefore) / result.total)
  }

  async #filtered(name: ServerName): Promise<void> {
    const { url } = this.#server(name)
    for (const { field, percent } of shares) {
      const result = await this.#searcher.run({
        type: "search",
        url,
        wire: "http",
        lanes: lanesWithFilter,
        until: { seconds: this.#options.seconds, warmUpSeconds },
        filter: field
      })
      const scenario = scenarioNames.filter(percent)
      this.#record(name, "http", scenario, metricNames.recall, "share", result.recall)
      this.#recordSearches(name, "http", scenario, result)
    }
  }

  async #idle(wire: "ws" | "sse"): Promise<void> {
    const { streams } = this.#options
    // In a fresh process: what an earlier measurement left in the heap would be used again, and streams seem to cost less.
    await this.#restartOurs("SIGTERM")
    const { url, pid } = this.#server("ours")
    await this.#askAll("ours")
    const before = await settledBytes(pid)
    await this.#searcher.run({ type: "openIdle", url, wire, count: streams })
    const after = await settledBytes(pid)
    const { open } = await this.#searcher.run({ type: "closeIdle" })
    if (open !== streams) throw new Error(`the server closed ${streams - open} of ${streams} idle ${wire} streams`)
    this.#record("ours", wire, scenarioNames.idle, metricNames.memoryEach, "KB", (after - before) / streams / 1_000)
  }

  async #restart(scenario: string, signal: "SIGTERM" | "SIGKILL"): Promise<void> {
    const server = await this.#restartOurs(signal)
    this.#record("ours", "-", scenario, metricNames.ready, "ms", server.readyMillis)
    // Ready must mean ready: not that the first search waits for what was put off.
    const first = await this.#searcher.run({
      type: "search",
      url: server.url,
      wire: "http",
      lanes: 1,
      until: { searches: 1 }
    })
    this.#record("ours", "http", scenario, metricNames.firstAnswer, "ms", first.p50)
    await this.#recall("ours", scenario)
  }

  async #restartOurs(signal: "SIGTERM" | "SIGKILL"): Promise<Server> {
    say(`restarting ours (${signal})`)
    await this.#server("ours").stop(signal)
    const server = await startOurs(this.#dataDirectory)
    this.#servers.set("ours", server)
    return server
  }

  async #duringInserts(name: ServerName): Promise<void> {
    const { url } = this.#server(name)
    const { seconds } = this.#options
    const words = { url, part: "reserve", from: this.#reserveUsed.get(name) ?? 0 } as const
    await this.#inserter.run({ type: "prepareInserts", ...words })
    const [searches, inserts] = await Promise.all([
      this.#searcher.run({
        type: "search",
        url,
        wire: "http",
        lanes: lanesDuringInserts,
        until: { seconds, warmUpSeconds },
        ...efFor(name)
      }),
      // One batch after the other, over the search's warm-up and its measured time.
      this.#inserter.run({
        type: "insert",
        ...words,
        seconds: seconds + warmUpSeconds,
        inFlight: 1
      })
    ])
    this.#reserveUsed.set(name, inserts.next)
    this.#recordSearches(name, "http", scenarioNames.duringInserts, searches)
    this.#record(name, "http", scenarioNames.duringInserts, metricNames.inserts, "vectors/s", inserts.vectorsPerSecond)
  }
}

const efFor = (name: ServerName): { readonly ef?: number } => (name === "ours" ? {} : { ef: efOfBare })

try {
  await main()
} catch (error) {
  say(`bench: ${error instanceof Error ? error.message : String(error)}`)
  process.exit(1)
}
