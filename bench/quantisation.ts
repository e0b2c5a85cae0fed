/**
 * What the forms of a partition cost and give on real word vectors: float32 in memory with a graph, the quantised
 * collections, and a float32 snapshot served in the mapped form. One thread, no server and no messages in between. The forms
 * take turns in every round; medians of the rounds are shown.
 *
 *   npm run bench:quantisation -- [--count 100000] [--queries 1000] [--rounds 5] [--ef 128] [--seed 1]
 */
import { mkdirSync, mkdtempSync, rmSync, statSync } from "node:fs"
import { join } from "node:path"
import { parseArgs } from "node:util"
import { defaultSettings } from "../src/config.ts"
import type { Quantization } from "../src/protocol/Fields.ts"
import { BlockCache } from "../src/tiers/index/BlockCache.ts"
import { Resident } from "../src/tiers/index/Resident.ts"
import type { Work } from "../src/tiers/index/Work.ts"
import { encodeSegment, type LogOp } from "../src/tiers/LogSegment.ts"
import type { SnapshotFiles } from "../src/tiers/VectorIndex.ts"
import { cacheDirectory } from "./cacheFile.ts"
import { median } from "./report.ts"
import { exactTruth, recallOf, truthK } from "./truth.ts"
import { type Data, dimensions, loadWords, vectorOf } from "./words.ts"

const specOf = (quantization: Quantization) =>
  ({ dimensions, metric: "cosine", m: 16, efConstruction: 200, quantization }) as const

const cacheBytes = defaultSettings.blockCacheBytes

interface Form {
  readonly name: string
  readonly resident: Resident
  readonly cache: BlockCache
  readonly buildMillis: number | undefined
  readonly openMillis: number
  readonly micros: Array<number>
}

const main = async (): Promise<void> => {
  const { values } = parseArgs({
    options: {
      count: { type: "string", default: "100000" },
      queries: { type: "string", default: "1000" },
      rounds: { type: "string", default: "5" },
      ef: { type: "string", default: "128" },
      seed: { type: "string", default: "1" }
    }
  })
  const ef = Number(values.ef)
  const data = loadWords({ count: Number(values.count), queries: Number(values.queries), seed: Number(values.seed) })
  const truth = exactTruth(data)
  const queries = data.queries.words.map((_, i) => vectorOf(data.queries, i))
  mkdirSync(cacheDirectory, { recursive: true })
  const directory = mkdtempSync(`${cacheDirectory}quantisation-`)
  process.on("exit", () => rmSync(directory, { recursive: true, force: true }))

  const forms: Array<Form> = []
  const stored = new Map<Quantization, SnapshotFiles>()
  for (const quantization of ["none", "bf16", "i8", "pq"] as const) {
    process.stderr.write(`Building ${quantization} ...\n`)
    const { files, buildMillis } = await built(quantization, data, join(directory, quantization))
    stored.set(quantization, files)
    forms.push(
      await opened(
        quantization === "none" ? "float32" : quantization,
        quantization,
        files,
        true,
        queries[0]!,
        buildMillis
      )
    )
  }
  forms.push(await opened("float32, mapped", "none", stored.get("none")!, false, queries[0]!, undefined))

  const answers = new Map<Form, Array<ReadonlyArray<string>>>()
  for (let round = 0; round < Number(values.rounds); round++) {
    for (const form of forms) {
      const given: Array<ReadonlyArray<string>> = []
      const began = performance.now()
      for (const query of queries) given.push(form.resident.search(query, truthK, ef, undefined, false, false).ids)
      form.micros.push(((performance.now() - began) * 1_000) / queries.length)
      answers.set(form, given)
    }
  }

  const full = forms[0]!
  const bytes = ({ resident, cache }: Form) =>
    (resident.bytes + (resident.form === "mapped" ? cache.bytes : 0)) / data.options.count
  const ofVectors = ({ resident }: Form) => {
    const { vectors, graph, sketch, narrow } = resident.stats.bytesOf
    return (vectors + graph + sketch + narrow) / data.options.count
  }
  console.log(`${data.options.count} vectors of ${dimensions} dimensions, cosine, k ${truthK}, ef ${ef}, one thread`)
  console.log("bytes a vector: vectors, codes and graph; and in all, with the block cache")
  const rows = forms.map((form) => [
    form.name,
    recallOf(truth, answers.get(form)!).toFixed(4),
    median(form.micros).toFixed(0),
    `${(median(full.micros) / median(form.micros)).toFixed(2)} x`,
    ofVectors(form).toFixed(0),
    bytes(form).toFixed(0),
    (bytes(form) / bytes(full)).toFixed(2),
    form.buildMillis === undefined ? "" : (form.buildMillis / 1_000).toFixed(1),
    form.openMillis.toFixed(0)
  ])
  const head = ["form", "recall@10", "us a search", "searches/s", "bytes", "in all", "share", "build s", "open ms"]
  for (const row of [head, ...rows])
    console.log(row.map((cell, i) => (i === 0 ? cell.padEnd(16) : cell.padStart(12))).join(""))
  const sketch = stored.get("none")?.sketch
  if (sketch !== undefined)
    console.log(`sketch file: ${(statSync(sketch).size / data.options.count).toFixed(1)} bytes a vector`)
  for (const { resident } of forms) resident.dispose()
}

/** Inserts everything, with snapshots as a server takes them (10,000 operations, half of the records), and a last one. */
const built = async (
  quantization: Quantization,
  data: Data,
  directory: string
): Promise<{ readonly files: SnapshotFiles; readonly buildMillis: number }> => {
  const resident = new Resident(specOf(quantization), { cache: new BlockCache(cacheBytes) })
  const began = performance.now()
  let since = 0
  let snapshots = 0
  const snapshot = () => finished(resident.snapshot(join(directory, String(snapshots++))))
  for (let from = 0; from < data.base.words.length; from += insertBatch) {
    const ops = data.base.words.slice(from, from + insertBatch).map((id, i): LogOp => {
      const version = { time: BigInt(from + i + 1), region: "bench", counter: from + i + 1 }
      return { kind: "upsert", id, version, vector: vectorOf(data.base, from + i), metadata: "" }
    })
    await finished(resident.apply(encodeSegment({ epoch: 1, seq: 1, nonce: 1n, dimensions }, ops)))
    since += ops.length
    if (since < Math.max(10_000, (from + ops.length) / 2)) continue
    since = 0
    await snapshot()
  }
  while (resident.hasBackgroundWork) resident.backgroundStep()
  const buildMillis = performance.now() - began
  const files = await snapshot()
  resident.dispose()
  return { files, buildMillis }
}

const insertBatch = 1_000

const opened = async (
  name: string,
  quantization: Quantization,
  { records, graph, sketch }: SnapshotFiles,
  isFull: boolean,
  query: Float32Array,
  buildMillis: number | undefined
): Promise<Form> => {
  const cache = new BlockCache(cacheBytes)
  const resident = new Resident(specOf(quantization), { cache })
  const began = performance.now()
  await finished(resident.open({ records, graph: isFull ? graph : undefined, sketch }))
  resident.search(query, truthK, 128, undefined, false, false)
  const openMillis = performance.now() - began
  while (resident.hasBackgroundWork) resident.backgroundStep()
  return { name, resident, cache, buildMillis, openMillis, micros: [] }
}

const finished = async <A>(work: Work<A>): Promise<A> => {
  let step = work.next()
  while (step.done !== true) step = work.next(step.value === undefined ? undefined : await step.value)
  return step.value
}

await main()
