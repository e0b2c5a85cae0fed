/**
 * Measures a server that is asked for more than it can do: real word vectors, a server process of its own, and a client
 * process that sends on a schedule whether it is answered or not. The peak is what the server answers to a closed loop,
 * before the overload and after it: what else the machine does then counts for both. A search takes about a millisecond of a
 * vector thread: few vectors and many candidates do as well for that as many vectors and few candidates, and are loaded
 * in seconds. Exits with 1 where something that is asked is missed.
 *
 *   npm run bench:overload -- [--seconds 20] [--count 20000] [--ef 400] [--sockets 32] [--factor 3] [--seed 1]
 *                             [--only model,overload,refusals] [--json FILE]
 */
import { type ChildProcess, fork } from "node:child_process"
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs"
import { fileURLToPath } from "node:url"
import { parseArgs } from "node:util"
import { cacheDirectory } from "./cacheFile.ts"
import { modelDoor } from "./doorModel.ts"
import { HttpConnection, postJson } from "./HttpConnection.ts"
import { LoadClient } from "./LoadClient.ts"
import type { Outcome, Round } from "./overloadClient.ts"
import { cpuMicros } from "./processTree.ts"
import { type Server, startOurs } from "./servers.ts"
import { openWebSocket, searchFields } from "./wires.ts"
import { type DataOptions, loadWords } from "./words.ts"

interface Row {
  readonly figure: string
  readonly value: number
  readonly unit: string
  readonly asked: string
  readonly reached: boolean | undefined
}

const rows: Array<Row> = []
const row = (figure: string, value: number, unit: string, asked?: Asked): void => {
  const reached =
    asked === undefined ? undefined : asked.least === undefined ? value <= asked.most : value >= asked.least
  rows.push({ figure, value: Number(value.toPrecision(4)), unit, asked: askedText(asked), reached })
  process.stderr.write(`  ${figure} ${value.toPrecision(4)} ${unit} ${verdict(rows.at(-1) as Row)}\n`)
}

type Asked = { readonly least: number } | { readonly least?: undefined; readonly most: number }

const askedText = (asked: Asked | undefined): string =>
  asked === undefined ? "" : asked.least === undefined ? `<= ${asked.most}` : `>= ${asked.least}`

const verdict = ({ asked, reached }: Row): string =>
  reached === undefined ? "" : `asked ${asked}: ${reached ? "reached" : "MISSED"}`

const main = async (): Promise<void> => {
  const { values } = parseArgs({
    options: {
      seconds: { type: "string", default: "20" },
      count: { type: "string", default: "20000" },
      ef: { type: "string", default: "400" },
      sockets: { type: "string", default: "32" },
      factor: { type: "string", default: "3" },
      seed: { type: "string", default: "1" },
      only: { type: "string", default: "model,overload,refusals" },
      json: { type: "string" }
    }
  })
  const seconds = Number(values.seconds)
  const ef = Number(values.ef)
  const options: DataOptions = { count: Number(values.count), queries: 2_000, seed: Number(values.seed) }
  mkdirSync(cacheDirectory, { recursive: true })
  const directory = mkdtempSync(`${cacheDirectory}overload-`)
  process.on("exit", () => rmSync(directory, { recursive: true, force: true, maxRetries: 3 }))
  for (const signal of ["SIGINT", "SIGTERM"] as const) process.on(signal, () => process.exit(1))

  const only = values.only.split(",")
  if (only.includes("model")) await model(Number(values.factor), options.seed)
  if (only.includes("overload"))
    await overload(options, `${directory}/data`, {
      seconds,
      ef,
      sockets: Number(values.sockets),
      factor: Number(values.factor)
    })
  if (only.includes("refusals")) await refusals(options, directory)

  const width = Math.max(...rows.map(({ figure }) => figure.length))
  for (const one of rows) {
    console.log(`${one.figure.padEnd(width)} ${String(one.value).padStart(9)} ${one.unit.padEnd(10)} ${verdict(one)}`)
  }
  if (values.json !== undefined) writeFileSync(values.json, `${JSON.stringify(rows, null, 2)}\n`)
  if (rows.some(({ reached }) => reached === false)) process.exitCode = 1
}

/** What the door does with an overload when nothing else on the machine is in its way. */
const model = async (factor: number, seed: number): Promise<void> => {
  for (const sources of [32, 500]) {
    const what = `door alone, ${sources} sources`
    const usual = await modelDoor({ sources, load: 0.8, seed })
    const over = await modelDoor({ sources, load: factor, seed })
    row(`${what}: p99 at 80 %`, usual.p99, "ms")
    row(`${what}: p99 at ${factor} x`, over.p99, "ms")
    row(
      `${what}: refused at the door, of all refused`,
      (100 * over.refusedAtTheDoor) / (over.refusedAtTheDoor + over.refusedLater),
      "%"
    )
    row(`${what}: goodput`, over.goodput, "", { least: 0.9 })
    row(`${what}: p99 over that at 80 %`, over.p99 / usual.p99, "x", { most: 2 })
  }
}

interface Overload {
  readonly seconds: number
  readonly ef: number
  readonly sockets: number
  readonly factor: number
}

const overload = async (
  options: DataOptions,
  directory: string,
  { ef, factor, seconds, sockets }: Overload
): Promise<void> => {
  // Every search asks the index: what a cache answers is no load.
  const server = await startOurs(directory, ["--result-cache-bytes", "0"])
  const client = new LoadClient(options)
  await client.run({ type: "insert", url: server.url, part: "base", from: 0, inFlight: 2 })
  await settled(server)
  const closed = (lanes: number, time: number) =>
    client.run({
      type: "search",
      url: server.url,
      wire: "ws",
      lanes,
      ef,
      until: { seconds: time, warmUpSeconds: 2 }
    })
  await closed(16, 2)
  const peakSeconds = Math.min(6, seconds)
  const peakBefore = (await closed(16, peakSeconds)).rate
  row("peak, closed loop of 16, before", peakBefore, "searches/s")

  const open = new OpenClient(options)
  const round = { url: server.url, seconds, warmUpSeconds: 2, sockets, ef }
  const usual = await measured(server, () => open.run({ ...round, perSecond: peakBefore * 0.8 }))
  report("at 80 %", usual)
  const over = await measured(server, () => open.run({ ...round, perSecond: peakBefore * factor }))
  report(`at ${factor} x`, over)
  const peakAfter = (await closed(16, peakSeconds)).rate
  row("peak, closed loop of 16, after", peakAfter, "searches/s")
  await client.close()
  row("goodput over peak (mean of both)", over.perSecond / ((peakBefore + peakAfter) / 2), "", { least: 0.9 })
  row("p99 of admitted over that at 80 %", over.p99 / usual.p99, "x", { most: 2 })
  row("refusals that are not typed", over.untyped, "", { most: 0 })
  row("never answered", over.unanswered + over.wrong, "", { most: 0 })
  open.close()
  await server.stop()
}

const report = (what: string, outcome: Outcome & { readonly micros: number }): void => {
  row(`${what}: offered`, outcome.offered, "searches")
  row(`${what}: answered`, outcome.perSecond, "searches/s")
  row(`${what}: refused`, (100 * outcome.refused) / outcome.offered, "%")
  row(`${what}: p50 of answers`, outcome.p50, "ms")
  row(`${what}: p99 of answers`, outcome.p99, "ms")
  if (outcome.refused > 0) row(`${what}: p99 of refusals`, outcome.refusedP99, "ms")
  row(`${what}: searches sent late by, p99`, outcome.lagP99, "ms")
  row(`${what}: CPU of the server`, outcome.micros, "us a search offered")
}

/** With the server's CPU time for each search offered, warm-up included in both. */
const measured = async (server: Server, run: () => Promise<Outcome>): Promise<Outcome & { micros: number }> => {
  const before = cpuMicros(server.pid)
  const look = setInterval(async () => {
    const { level, searches } = (await (await fetch(`${server.url}/api/v1/load`)).json()) as Record<string, unknown>
    process.stderr.write(`    level ${level} ${JSON.stringify(searches)}\n`)
  }, lookMillis)
  const outcome = await run()
  clearInterval(look)
  return { ...outcome, micros: (cpuMicros(server.pid) - before) / outcome.offered }
}

/** Between two looks at the server's load. */
const lookMillis = 1_000

/** Until the graph is built: nothing is left to be put into it. */
const settled = async (server: Server): Promise<void> => {
  for (let quiet = 0; quiet < 3; ) {
    const before = cpuMicros(server.pid)
    await new Promise((resolve) => setTimeout(resolve, 500))
    quiet = cpuMicros(server.pid) - before < 50_000 ? quiet + 1 : 0
  }
}

/**
 * CPU of a refusal: a server at level 95 by its connections, which sheds every search, on each wire. What is done to have
 * nothing else in it: nothing is ever searched.
 */
const refusals = async (options: DataOptions, directory: string): Promise<void> => {
  const connections = 40
  const flags = ["--connections-max", String(connections), "--load-sample-millis", "50", "--load-raise-millis", "0"]
  const server = await startOurs(`${directory}/refusing`, [...flags, "--shed-percent", "100"])
  const url = new URL(server.url)
  const { queries } = loadWords(options)
  const fields = queries.words.map((_, query) => `${searchFields(queries, query, {})}}`)
  const fail = (error: Error): void => {
    throw error
  }
  const socket = await openWebSocket(url)
  const https = await Promise.all(Array.from({ length: connections - 2 }, () => HttpConnection.open(url, fail)))
  await new Promise((resolve) => setTimeout(resolve, 500))

  const total = 30_000
  const wires = {
    WebSocket: () =>
      new Promise<void>((resolve) => {
        let sent = 0
        let back = 0
        const send = (): void => {
          socket.send(`{"type":"search","id":"${sent}",${fields[sent % fields.length]}`)
          sent += 1
        }
        socket.removeAllListeners("message")
        socket.on("message", (bytes: Buffer) => {
          if (!bytes.includes("shedPercent")) fail(new Error(`not refused: ${bytes}`))
          back += 1
          if (back === total) return resolve()
          if (sent < total) send()
        })
        for (let i = 0; i < 32; i++) send()
      }),
    HTTP: async () => {
      const requests = fields.map((body) => postJson(url, "/api/v1/search", `{${body}`))
      let sent = 0
      await Promise.all(
        https.map(
          (connection) =>
            new Promise<void>((resolve) => {
              const next = (): void => {
                if (sent >= total) return resolve()
                connection.send(requests[sent++ % requests.length] as Buffer, ({ body, status }) => {
                  if (status !== 429) fail(new Error(`not refused: ${status} ${body}`))
                  next()
                })
              }
              next()
            })
        )
      )
    }
  }
  for (const [name, run] of Object.entries(wires)) {
    await run()
    const before = cpuMicros(server.pid)
    await run()
    row(`CPU of a refusal, ${name}`, (cpuMicros(server.pid) - before) / total, "us", { most: 50 })
  }
  socket.terminate()
  for (const one of https) one.close()
  await server.stop()
}

class OpenClient {
  readonly #process: ChildProcess

  constructor(data: DataOptions) {
    this.#process = fork(fileURLToPath(new URL("overloadClient.ts", import.meta.url)), [JSON.stringify(data)])
  }

  run(round: Round): Promise<Outcome> {
    return new Promise((resolve, reject) => {
      const onExit = () => reject(new Error("the client process ended"))
      this.#process.once("exit", onExit)
      this.#process.once("message", ({ failure, outcome }: { outcome?: Outcome; failure?: string }) => {
        this.#process.off("exit", onExit)
        if (outcome === undefined) reject(new Error(failure))
        else resolve(outcome)
      })
      this.#process.send(round)
    })
  }

  close(): void {
    this.#process.disconnect()
  }
}

await main()
