/**
 * What the SIMD build of hnswlib-node gains: the same index, built and searched in one thread without any server, with
 * the default build and with the project's. The builds take turns, each time in a fresh process; medians are shown.
 *
 *   npm --prefix bench run simd -- [--count 20000] [--rounds 3]
 */
import { spawnSync } from "node:child_process"
import { fileURLToPath } from "node:url"
import { parseArgs } from "node:util"
import { type Build, builds, indexSettings, loadHnswlib, simdOf } from "./bareIndex.ts"
import { median } from "./report.ts"
import { truthK } from "./truth.ts"
import { dimensions, loadWords, vectorOf, type WordVectors } from "./words.ts"

interface Measured {
  readonly microsPerInsert: number
  readonly microsPerSearch: number
}

const queryCount = 1_000
const ef = 128

const main = (): void => {
  const { values } = parseArgs({
    options: {
      count: { type: "string", default: "20000" },
      rounds: { type: "string", default: "3" },
      build: { type: "string" }
    }
  })
  const count = Number(values.count)
  const build = builds.find((name) => name === values.build)
  if (build !== undefined) {
    console.log(JSON.stringify(measure(build, count)))
    return
  }
  loadWords({ count, queries: queryCount, seed: 1 })

  const measured: Record<Build, Array<Measured>> = { bare: [], "bare-simd": [] }
  for (let round = 0; round < Number(values.rounds); round++) {
    for (const name of builds) measured[name].push(measureInChild(name, count))
  }
  console.log(`${count} vectors of ${dimensions} dimensions, m ${indexSettings.m}, ef ${ef}, one thread`)
  console.log(`default build: ${simdOf("bare")} instructions; SIMD build: ${simdOf("bare-simd")}`)
  for (const [what, pick] of [
    ["insert", (one: Measured) => one.microsPerInsert],
    ["search", (one: Measured) => one.microsPerSearch]
  ] as const) {
    const [plain, simd] = builds.map((name) => median(measured[name].map(pick))) as [number, number]
    const gain = (plain / simd).toFixed(2)
    console.log(
      `${what}: default build ${plain.toFixed(1)} us, SIMD build ${simd.toFixed(1)} us: ${gain} times as fast`
    )
  }
}

const measureInChild = (build: Build, count: number): Measured => {
  const program = fileURLToPath(import.meta.url)
  const { status, stdout } = spawnSync(process.execPath, [program, "--build", build, "--count", String(count)], {
    encoding: "utf8",
    stdio: ["ignore", "pipe", "inherit"]
  })
  if (status !== 0) throw new Error(`measuring ${build} failed`)
  return JSON.parse(stdout) as Measured
}

const measure = (build: Build, count: number): Measured => {
  const { HierarchicalNSW } = loadHnswlib(build)
  const { base, queries } = loadWords({ count, queries: queryCount, seed: 1 })
  const { m, efConstruction, seed } = indexSettings
  const index = new HierarchicalNSW("cosine", dimensions)
  index.initIndex(count, m, efConstruction, seed)
  index.setEf(ef)
  const points = arrays(base)
  const asked = arrays(queries)
  const microsPerInsert = microsEach(points, (point, label) => index.addPoint(point, label))
  for (const query of asked) index.searchKnn(query, truthK)
  const microsPerSearch = microsEach(asked, (query) => index.searchKnn(query, truthK))
  return { microsPerInsert, microsPerSearch }
}

const microsEach = (
  vectors: ReadonlyArray<Array<number>>,
  act: (vector: Array<number>, row: number) => void
): number => {
  const started = performance.now()
  for (const [row, vector] of vectors.entries()) act(vector, row)
  return ((performance.now() - started) * 1_000) / vectors.length
}

/** hnswlib-node takes plain arrays only. */
const arrays = (from: WordVectors): Array<Array<number>> => from.words.map((_, row) => [...vectorOf(from, row)])

main()
