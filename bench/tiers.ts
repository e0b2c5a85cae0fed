/**
 * Measures the tiers: memory held under pressure, cold starts, filters, durable inserts on the object store, warming.
 * Real word vectors, a server process of its own, answers checked. One row a figure, beside what is asked of it.
 *
 *   npm run bench:tiers -- [--only cold,filters,inserts,warming,pressure] [--count 100000] [--minutes 10]
 *                          [--budget 268435456] [--seed 1] [--json FILE]
 */
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs"
import { join } from "node:path"
import { parseArgs } from "node:util"
import { partitionOf } from "../src/shards/PartitionMap.ts"
import { startFakeGcs } from "../test/support/FakeGcs.ts"
import { cacheDirectory } from "./cacheFile.ts"
import { HttpConnection, postJson } from "./HttpConnection.ts"
import { residentBytes } from "./processTree.ts"
import { type Server, startOurs } from "./servers.ts"
import { exactTruth, filterOf, metadataOf, shares, type Truth, truthK } from "./truth.ts"
import { type Data, loadWords, vectorText, type WordVectors } from "./words.ts"

const scenarios = ["cold", "filters", "inserts", "warming", "pressure"] as const
type Scenario = (typeof scenarios)[number]

interface Row {
  readonly scenario: Scenario
  readonly figure: string
  readonly value: number
  readonly unit: string
  readonly asked: string
}

const rows: Array<Row> = []
const row = (scenario: Scenario, figure: string, value: number, unit: string, asked = ""): void => {
  rows.push({ scenario, figure, value: Number(value.toPrecision(4)), unit, asked })
  process.stderr.write(
    `  ${scenario}: ${figure} ${value.toPrecision(4)} ${unit}${asked === "" ? "" : ` (asked ${asked})`}\n`
  )
}

const main = async (): Promise<void> => {
  const { values } = parseArgs({
    options: {
      only: { type: "string", default: scenarios.join(",") },
      count: { type: "string", default: "100000" },
      minutes: { type: "string", default: "10" },
      budget: { type: "string", default: String(256 * 1_048_576) },
      seed: { type: "string", default: "1" },
      json: { type: "string" }
    }
  })
  const only = values.only.split(",")
  for (const name of only)
    if (!scenarios.some((known) => known === name)) throw new Error(`--only knows ${scenarios.join(", ")}`)
  const data = loadWords({ count: Number(values.count), queries: 1_000, seed: Number(values.seed) })
  const truth = exactTruth(data)
  mkdirSync(cacheDirectory, { recursive: true })
  const directory = mkdtempSync(`${cacheDirectory}tiers-`)
  process.on("exit", () => rmSync(directory, { recursive: true, force: true, maxRetries: 3 }))
  for (const signal of ["SIGINT", "SIGTERM"] as const) process.on(signal, () => process.exit(1))

  if (only.includes("cold") || only.includes("filters")) await coldAndFilters(only, data, truth, directory)
  if (only.includes("inserts")) await inserts(data, directory)
  if (only.includes("warming")) await warming(data, directory)
  if (only.includes("pressure")) await pressure(data, directory, Number(values.budget), Number(values.minutes))

  const width = Math.max(...rows.map(({ figure }) => figure.length))
  for (const { scenario, figure, value, unit, asked } of rows) {
    console.log(
      `${scenario.padEnd(9)} ${figure.padEnd(width)} ${String(value).padStart(9)} ${unit.padEnd(10)} ${asked}`
    )
  }
  if (values.json !== undefined) writeFileSync(values.json, `${JSON.stringify(rows, null, 2)}\n`)
}

// --- Requests ------------------------------------------------------------------------------------------------------------

/** One connection, one request at a time. */
class Client {
  readonly url: URL
  #connection: HttpConnection | undefined
  #fail: (error: Error) => void = () => {}

  constructor(url: string) {
    this.url = new URL(url)
  }

  async send(bytes: Buffer): Promise<{ readonly status: number; readonly body: Buffer; readonly millis: number }> {
    this.#connection ??= await HttpConnection.open(this.url, (error) => this.#fail(error))
    const connection = this.#connection
    return new Promise((resolve, reject) => {
      this.#fail = reject
      const at = performance.now()
      connection.send(bytes, ({ status, body }) => resolve({ status, body, millis: performance.now() - at }))
    })
  }

  get(path: string): Promise<{ readonly status: number; readonly body: Buffer; readonly millis: number }> {
    return this.send(Buffer.from(`GET ${path} HTTP/1.1\r\nhost: ${this.url.host}\r\n\r\n`))
  }

  put(
    path: string,
    body: string
  ): Promise<{ readonly status: number; readonly body: Buffer; readonly millis: number }> {
    const head = `PUT ${path} HTTP/1.1\r\nhost: ${this.url.host}\r\ncontent-type: application/json\r\n`
    return this.send(Buffer.from(`${head}content-length: ${Buffer.byteLength(body)}\r\n\r\n${body}`))
  }

  post(
    path: string,
    body: string
  ): Promise<{ readonly status: number; readonly body: Buffer; readonly millis: number }> {
    return this.send(postJson(this.url, path, body))
  }

  close(): void {
    this.#connection?.close()
    this.#connection = undefined
  }
}

const ok = async (
  answer: Promise<{ readonly status: number; readonly body: Buffer; readonly millis: number }>
): Promise<{ readonly body: Buffer; readonly millis: number }> => {
  const { status, body, millis } = await answer
  if (status !== 200) throw new Error(`answered ${status}: ${body}`)
  return { body, millis }
}

const createCollection = async (server: Server, name: string, request: object): Promise<void> => {
  const client = new Client(server.url)
  const { status, body } = await client.put(
    `/api/v1/collections/${name}`,
    JSON.stringify({ dimensions: 100, ...request })
  )
  if (status !== 200 && status !== 201) throw new Error(`creating ${name} answered ${status}: ${body}`)
  client.close()
}

const batchSize = 100

/** Loads words, several batches under way; answers vectors a second. */
const load = async (
  server: Server,
  words: WordVectors,
  options: { readonly collection: string; readonly prefix?: string; readonly lanes?: number; readonly to?: number }
): Promise<number> => {
  const to = options.to ?? words.words.length
  const started = performance.now()
  let next = 0
  const lane = async () => {
    const client = new Client(server.url)
    while (next < to) {
      const from = next
      next = Math.min(to, next + batchSize)
      const vectors: Array<string> = []
      for (let i = from; i < Math.min(to, from + batchSize); i++) {
        const id = JSON.stringify(`${options.prefix ?? ""}${words.words[i]}`)
        vectors.push(`{"id":${id},"vector":${vectorText(words, i)},"metadata":${JSON.stringify(metadataOf(i))}}`)
      }
      const body = `{"collection":"${options.collection}","vectors":[${vectors.join(",")}]}`
      for (;;) {
        const { status, body: answer } = await client.post("/api/v1/insert", body)
        if (status === 200) break
        // What a client does that follows the protocol.
        if (status !== 429 && status !== 503) throw new Error(`insert answered ${status}: ${answer}`)
        await sleep((JSON.parse(answer.toString()) as { retry_after_ms?: number }).retry_after_ms ?? 500)
      }
    }
    client.close()
  }
  await Promise.all(Array.from({ length: options.lanes ?? 2 }, lane))
  return to / ((performance.now() - started) / 1_000)
}

const sleep = (millis: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, millis))

const searchBody = (data: Data, query: number, collection: string, filter?: object): string =>
  `{"collection":"${collection}","query":${vectorText(data.queries, query)},"k":${truthK}${
    filter === undefined ? "" : `,"filter":${JSON.stringify(filter)}`
  }}`

const idsOf = (body: Buffer): Array<string> =>
  (JSON.parse(body.toString()) as { results: Array<{ vector_id: string }> }).results.map(({ vector_id }) => vector_id)

const quantile = (values: Array<number>, share: number): number =>
  values.sort((a, b) => a - b)[Math.min(values.length - 1, Math.floor(values.length * share))] as number

/** A gauge or counter of `/metrics`; 0 where it is not there. */
const metric = async (server: Server, name: string): Promise<number> => {
  const text = await (await fetch(`${server.url}/metrics`)).text()
  return [...text.matchAll(new RegExp(`^${name}(?:\\{[^}]*\\})? ([0-9.e+]+)$`, "gm"))].reduce(
    (sum, m) => sum + Number(m[1]),
    0
  )
}

const untilForm = async (server: Server, form: "full" | "mapped", count: number): Promise<void> => {
  for (let i = 0; i < 1_200; i++) {
    if ((await metric(server, `ruvector_partitions_${form}`)) >= count) return
    await sleep(50)
  }
  throw new Error(`not ${count} partitions ${form} in a minute`)
}

// --- Cold partitions and filters -----------------------------------------------------------------------------------------

const coldAndFilters = async (
  only: ReadonlyArray<string>,
  data: Data,
  truth: Truth,
  directory: string
): Promise<void> => {
  const gcs = await startFakeGcs()
  try {
    await gcs.createBucket("tiers")
    const places = [
      {
        name: "local snapshot",
        data: join(directory, "local"),
        cache: undefined,
        environment: {},
        asked: "< 150 ms",
        askedLater: "< 50 ms"
      },
      {
        name: "object store",
        data: "gs://tiers/cold",
        cache: join(directory, "cache"),
        environment: { STORAGE_EMULATOR_HOST: gcs.url },
        asked: "< 1000 ms",
        askedLater: ""
      }
    ]
    for (const place of places) {
      // Equal searches are to be searched for again, not answered from the cache of results.
      const flags = ["--result-cache-bytes", "0", ...(place.cache === undefined ? [] : ["--cache-dir", place.cache])]
      const server = await startOurs(place.data, flags, place.environment)
      await load(server, data.base, { collection: "default" })
      await createCollection(server, "other", {})
      await load(server, data.base, { collection: "other", to: otherCount })
      if (place.cache === undefined && only.includes("filters")) await filters(server, data, truth)
      await server.stop()
      if (!only.includes("cold")) return
      const firsts: Array<number> = []
      const later: Array<number> = []
      const seconds: Array<number> = []
      const reads: Array<number> = []
      for (let run = 0; run < 14; run++) {
        const round = run >>> 1
        // Every other node has opened another partition before: what it does is not all done for the first time then.
        const isLater = run % 2 === 1
        if (place.cache !== undefined) rmSync(place.cache, { recursive: true, force: true })
        const again = await startOurs(place.data, ["--activate", "none", ...flags], place.environment)
        const client = new Client(again.url)
        await client.get("/health/live")
        if (isLater) {
          await ok(client.post("/api/v1/search", searchBody(data, round, "other")))
          await untilForm(again, "full", 1)
        }
        const { body, millis } = await ok(client.post("/api/v1/search", searchBody(data, round, "default")))
        if (isLater) later.push(millis)
        else firsts.push(millis)
        checkAnswer(idsOf(body), truth.nearest(round))
        seconds.push((await ok(client.post("/api/v1/search", searchBody(data, round + 100, "default")))).millis)
        // Of records that nobody has read: from the snapshot's file, as long as the full form is not there.
        for (let read = 0; read < coldReads; read++) {
          const word = data.base.words[(round * coldReads + read) * 97] as string
          const { millis } = await ok(client.get(`/api/v1/embed/${encodeURIComponent(word)}`))
          if ((await metric(again, "ruvector_partitions_mapped")) === 1) reads.push(millis)
        }
        client.close()
        await again.stop()
      }
      row("cold", `first answer, ${place.name}, p50 of 7`, quantile(firsts, 0.5), "ms", place.asked)
      row("cold", `first answer, ${place.name}, worst of 7`, quantile(firsts, 1), "ms")
      row(
        "cold",
        `first answer of a node that opened another, ${place.name}, p50 of 7`,
        quantile(later, 0.5),
        "ms",
        place.askedLater
      )
      row("cold", `first answer of a node that opened another, ${place.name}, worst of 7`, quantile(later, 1), "ms")
      row("cold", `second answer, ${place.name}, p50 of 14`, quantile(seconds, 0.5), "ms")
      if (reads.length === 0) throw new Error("no record was read in the mapped form")
      row(
        "cold",
        `read by id, in no cache, ${place.name}, p50 of ${reads.length}`,
        quantile(reads, 0.5),
        "ms",
        "< 30 ms"
      )
      row("cold", `read by id, in no cache, ${place.name}, worst`, quantile(reads, 1), "ms")
    }
  } finally {
    await gcs.stop()
  }
}

/** Records of the collection that a node has opened before: as many as make a mapped form. */
const otherCount = 3_000

/** Records read by id in a round. */
const coldReads = 10

const checkAnswer = (got: ReadonlyArray<string>, truth: ReadonlyArray<string>): void => {
  const found = got.filter((id) => truth.includes(id)).length
  if (found < truth.length / 2) throw new Error(`${found} of ${truth.length} true neighbours`)
}

/** All filters in turn with each query, so that what else the machine does falls on them alike. */
const filters = async (server: Server, data: Data, truth: Truth): Promise<void> => {
  await untilForm(server, "full", 1)
  const client = new Client(server.url)
  const variants = [undefined, ...shares.map(({ field }) => field), "nothing"] as const
  const results = variants.map(() => ({ wanted: 0, found: 0, millis: [] as number[] }))
  for (let round = 0; round < 4; round++) {
    for (let query = 0; query < 1_000; query++) {
      for (const [i, variant] of variants.entries()) {
        const filter =
          variant === undefined ? undefined : variant === "nothing" ? { half: -1 - query } : filterOf(variant, query)
        const answer = await ok(client.post("/api/v1/search", searchBody(data, query, "default", filter)))
        // The first round warms up.
        if (round === 0) continue
        const result = results[i] as (typeof results)[number]
        result.millis.push(answer.millis)
        const ids = idsOf(answer.body)
        if (variant === "nothing" && ids.length > 0) throw new Error("a filter that nothing matches found something")
        const nearest = variant === "nothing" ? [] : truth.nearest(query, variant)
        result.wanted += nearest.length
        result.found += nearest.filter((id) => ids.includes(id)).length
      }
    }
  }
  const plain = quantile((results[0] as (typeof results)[number]).millis, 0.99)
  for (const [i, variant] of variants.entries()) {
    const { wanted, found, millis } = results[i] as (typeof results)[number]
    const percent = shares.find(({ field }) => field === variant)?.percent
    const name = variant === undefined ? "no filter" : variant === "nothing" ? "0 match" : `${percent} % match`
    if (variant !== "nothing") row("filters", `recall@10, ${name}`, found / wanted, "", ">= 0.95")
    row("filters", `p50, ${name}`, quantile(millis, 0.5), "ms")
    row("filters", `p99, ${name}`, quantile(millis, 0.99), "ms")
    if (variant !== undefined)
      row("filters", `p99 beside no filter, ${name}`, quantile(millis, 0.99) / plain, "x", "<= 3")
  }
  client.close()
}

// --- Durable inserts -----------------------------------------------------------------------------------------------------

const inserts = async (data: Data, directory: string): Promise<void> => {
  const gcs = await startFakeGcs()
  try {
    await gcs.createBucket("tiers")
    const rates: Record<string, Array<number>> = { files: [], objects: [] }
    const grouped: Record<string, Array<number>> = { files: [], objects: [] }
    for (let round = 0; round < 3; round++) {
      for (const place of ["files", "objects"] as const) {
        const isLocal = place === "files"
        const server = await startOurs(
          isLocal ? join(directory, `inserts-${round}`) : `gs://tiers/inserts-${round}`,
          isLocal ? [] : ["--cache-dir", join(directory, `inserts-cache-${round}`)],
          isLocal ? {} : { STORAGE_EMULATOR_HOST: gcs.url }
        )
        const to = Math.min(20_000, data.base.words.length)
        rates[place]!.push(await load(server, data.base, { collection: "default", lanes: 8, to }))
        const objects = await metric(server, "ruvector_log_objects")
        grouped[place]!.push((await metric(server, "ruvector_log_writes")) / objects)
        await server.stop()
      }
    }
    const files = quantile(rates["files"]!, 0.5)
    const objects = quantile(rates["objects"]!, 0.5)
    row("inserts", "directory, 8 in flight, batches of 100", files, "vectors/s")
    row("inserts", "object store, the same", objects, "vectors/s")
    row("inserts", "inserts committed as one log object, directory", quantile(grouped["files"]!, 0.5), "", "> 1")
    row("inserts", "inserts committed as one log object, object store", quantile(grouped["objects"]!, 0.5), "", "> 1")
    row("inserts", "object store beside directory", objects / files, "x", ">= 0.8")
  } finally {
    await gcs.stop()
  }
}

// --- Warming -------------------------------------------------------------------------------------------------------------

const warming = async (data: Data, directory: string): Promise<void> => {
  const server = await startOurs(join(directory, "warming"))
  const to = Math.min(20_000, data.base.words.length)
  await load(server, data.base, { collection: "default", to })
  const client = new Client(server.url)
  const ids = data.base.words.slice(0, 10_000)
  const { body, millis } = await ok(client.post("/api/v1/warm", JSON.stringify({ collection: "default", ids })))
  const report = JSON.parse(body.toString()) as { readonly hit_rate: number }
  row("warming", "10,000 records, verified hit rate", report.hit_rate, "", ">= 0.95")
  row("warming", "10,000 records, took", millis, "ms")
  client.close()
  await server.stop()
}

// --- Pressure ------------------------------------------------------------------------------------------------------------

const partitionsUnderPressure = 32

/**
 * A collection of four times the budget, read by id and searched, partitions in a Zipf distribution; every answer is
 * compared with what was inserted.
 */
const pressure = async (data: Data, directory: string, budget: number, minutes: number): Promise<void> => {
  const server = await startOurs(join(directory, "pressure"), ["--budget-bytes", String(budget), "--activate", "none"])
  const client = new Client(server.url)
  await createCollection(server, "big", { partitions: partitionsUnderPressure })
  // As many copies of all words, under other names, as make four times the budget in the full form.
  const bytesOfRecord = 1_250
  const all = { words: [...data.base.words, ...data.reserve.words], vectors: new Float32Array(0) }
  const vectors = new Float32Array((data.base.words.length + data.reserve.words.length) * 100)
  vectors.set(data.base.vectors)
  vectors.set(data.reserve.vectors, data.base.vectors.length)
  const words: WordVectors = { words: all.words, vectors }
  const wanted = Math.ceil((4 * budget) / bytesOfRecord)
  const copies = Math.ceil(wanted / words.words.length)
  const idOf = (record: number) =>
    `${Math.floor(record / words.words.length)}/${words.words[record % words.words.length]}`
  const inPartition = Array.from({ length: partitionsUnderPressure }, () => [] as number[])
  for (let record = 0; record < wanted; record++) {
    inPartition[partitionOf(idOf(record), partitionsUnderPressure)]?.push(record)
  }
  let peak = 0
  let over = 0
  let looks = 0
  const watch = setInterval(() => {
    const bytes = residentBytes(server.pid)
    peak = Math.max(peak, bytes)
    looks += 1
    if (bytes > budget * 1.1) over += 1
  }, 500)
  for (let copy = 0; copy < copies; copy++) {
    const to = Math.min(words.words.length, wanted - copy * words.words.length)
    const rate = await load(server, words, { collection: "big", prefix: `${copy}/`, lanes: 4, to })
    row("pressure", `load of copy ${copy + 1} of ${copies}`, rate, "vectors/s")
  }
  row("pressure", "resident while loading, most, beside the budget", peak / budget, "x")
  peak = 0
  over = 0
  looks = 0
  const random = seeded(1)
  const until = Date.now() + minutes * 60_000
  const reads: Array<number> = []
  const searches: Array<number> = []
  let refused = 0
  let wrong = 0
  const lane = async () => {
    const mine = new Client(server.url)
    while (Date.now() < until) {
      const records = inPartition[zipf(random, partitionsUnderPressure)] as Array<number>
      const record = records[Math.floor(random() * records.length)] as number
      const at = record % words.words.length
      const id = idOf(record)
      if (random() < 0.9) {
        const { status, body, millis } = await mine.get(`/api/v1/embed/${encodeURIComponent(id)}?collection=big`)
        if (status === 429 || status === 503) {
          refused += 1
          await sleep(100)
          continue
        }
        reads.push(millis)
        const got = status === 200 ? (JSON.parse(body.toString()) as { vector: Array<number> }) : undefined
        if (got === undefined || !got.vector.every((x, i) => Math.fround(x) === words.vectors[at * 100 + i])) wrong += 1
      } else {
        const query = Math.floor(random() * 1_000)
        const { status, body, millis } = await mine.post("/api/v1/search", searchBody(data, query, "big"))
        if (status === 429 || status === 503) {
          refused += 1
          await sleep(100)
          continue
        }
        searches.push(millis)
        const answer = JSON.parse(body.toString()) as { results: Array<{ vector_id: string; score: number }> }
        for (const { vector_id, score } of answer.results) {
          const row = rowOf.get(vector_id.slice(vector_id.indexOf("/") + 1)) as number
          if (Math.abs(score - cosine(data.queries.vectors, query, words.vectors, row)) > 1e-4) wrong += 1
        }
      }
    }
    mine.close()
  }
  const rowOf = new Map(words.words.map((word, i) => [word, i]))
  await Promise.all(Array.from({ length: 4 }, lane))
  clearInterval(watch)
  row("pressure", "vectors, beside the budget in full form", (wanted * bytesOfRecord) / budget, "x", "4")
  row("pressure", "resident memory, most, beside the budget", peak / budget, "x", "<= 1.1")
  row("pressure", "looks at which it was over 1.1 x", over / looks, "share", "0")
  row("pressure", "wrong answers", wrong, "", "0")
  row("pressure", "reads", reads.length, "")
  row("pressure", "read by id, p50", quantile(reads, 0.5), "ms")
  row("pressure", "read by id, p99", quantile(reads, 0.99), "ms")
  row("pressure", "searches of all partitions", searches.length, "")
  row("pressure", "search, p50", quantile(searches, 0.5), "ms")
  row("pressure", "search, p99", quantile(searches, 0.99), "ms")
  row("pressure", "refused", refused / (refused + reads.length + searches.length), "share")
  row("pressure", "partitions full at the end", await metric(server, "ruvector_partitions_full"), "")
  row("pressure", "partitions mapped at the end", await metric(server, "ruvector_partitions_mapped"), "")
  client.close()
  await server.stop()
}

const cosine = (a: Float32Array, i: number, b: Float32Array, j: number): number => {
  let ab = 0
  let aa = 0
  let bb = 0
  for (let d = 0; d < 100; d++) {
    const x = a[i * 100 + d] as number
    const y = b[j * 100 + d] as number
    ab += x * y
    aa += x * x
    bb += y * y
  }
  return ab / Math.sqrt(aa * bb)
}

/** mulberry32. */
const seeded = (seed: number): (() => number) => {
  let state = seed >>> 0
  return () => {
    state = (state + 0x6d2b79f5) >>> 0
    let t = Math.imul(state ^ (state >>> 15), state | 1)
    t = (t + Math.imul(t ^ (t >>> 7), t | 61)) ^ t
    return ((t ^ (t >>> 14)) >>> 0) / 4_294_967_296
  }
}

/** A rank from 0 to below n, of probability proportional to 1 / (rank + 1): by the inverse of the continuous distribution. */
const zipf = (random: () => number, n: number): number => Math.min(n - 1, Math.floor((n + 1) ** random()) - 1)

await main()
