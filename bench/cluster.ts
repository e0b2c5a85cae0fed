/**
 * What a cluster costs and how soon it is whole again, each part with processes of its own and a Postgres of its own:
 *
 *   search    through a gateway, beside one process alone: median at one under way, CPU a search over all processes
 *   scale     three runners with three partitions beside one process with three: searches and CPU at 64 under way
 *   drain     SIGTERM of a runner under searches and writes: what fails, what is partial, and for how long
 *   join      a runner joins: the same
 *   kill      kill -9 of a runner: until every partition answers again
 *   outage    the database is gone for a while: what fails
 *
 *   node scripts/run.mjs --with bench bench/cluster.ts [part]... [--vectors N] [--seconds N] [--rounds N]
 */
import { mkdtempSync, rmSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { parseArgs } from "node:util"
import { type Postgres, startPostgres } from "../test/support/Postgres.ts"
import { MultiplexedSocket } from "./MultiplexedSocket.ts"
import { cpuMicros } from "./processTree.ts"
import { type Server, startOurs } from "./servers.ts"
import { loadWords, vectorText } from "./words.ts"

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    vectors: { type: "string", default: "6000" },
    seconds: { type: "string", default: "8" },
    rounds: { type: "string", default: "3" },
    profile: { type: "string" }
  }
})
const vectors = Number(values.vectors)
const seconds = Number(values.seconds)
const rounds = Number(values.rounds)
const { base, queries } = loadWords({ count: vectors, queries: 500, seed: 1 })
const queryTexts = queries.words.map((_, row) => vectorText(queries, row))
const queryText = (n: number): string => queryTexts[n % queryTexts.length] as string
const say = (line: string) => process.stdout.write(`${line}\n`)

// --- Processes

interface Cluster {
  readonly runners: Array<Server>
  readonly gateway: Server
  readonly pids: () => ReadonlyArray<number>
  readonly addRunner: () => Promise<Server>
  readonly stop: () => Promise<void>
}

const directories: Array<string> = []
const directory = (): string => {
  const made = mkdtempSync(join(tmpdir(), "ruvector-bench-"))
  directories.push(made)
  return made
}
process.on("exit", () => {
  for (const made of directories) rmSync(made, { recursive: true, force: true })
})

/** Nothing is shed or refused here: what is measured is the way. */
const flags = [
  "--address-rate",
  "0",
  "--key-rate",
  "0",
  "--result-cache-bytes",
  "0",
  "--threads",
  "1",
  "--activate",
  "none"
]
const profiled = (name: string): Record<string, string> =>
  values.profile === undefined ? {} : { NODE_OPTIONS: `--cpu-prof --cpu-prof-dir=${join(values.profile, name)}` }

let cells = 0
const startCluster = async (postgres: Postgres, count: number, more: ReadonlyArray<string> = []): Promise<Cluster> => {
  const data = directory()
  const cell = `bench-${cells++}`
  const shared = [...flags, "--database-url", postgres.url, "--cell", cell, ...more]
  const addRunner = () => startOurs(data, ["--role", "runner", ...shared], profiled("runner"))
  const runners = await Promise.all(Array.from({ length: count }, addRunner))
  const gateway = await startOurs(data, ["--role", "gateway", ...shared], profiled("gateway"))
  return {
    runners,
    gateway,
    pids: () => [gateway, ...runners].map(({ pid }) => pid),
    addRunner: async () => {
      const added = await addRunner()
      runners.push(added)
      return added
    },
    stop: async () => {
      await gateway.stop()
      await Promise.all(runners.map((runner) => runner.stop()))
    }
  }
}

// biome-ignore lint/suspicious/noExplicitAny: what it answers is JSON that is looked at in one place
const call = async (server: Server, method: string, path: string, body?: unknown): Promise<any> => {
  const response = await fetch(`${server.url}${path}`, {
    method,
    ...(body === undefined
      ? {}
      : {
          headers: { "content-type": "application/json" },
          body: typeof body === "string" ? body : JSON.stringify(body)
        })
  })
  const answer = await response.json()
  if (!response.ok) throw new Error(`${method} ${path}: ${response.status} ${JSON.stringify(answer)}`)
  return answer
}

const fill = async (server: Server, name: string, partitions: number): Promise<void> => {
  await call(server, "PUT", `/api/v1/collections/${name}`, { dimensions: 100, partitions })
  for (let from = 0; from < vectors; from += 500) {
    const rows = Array.from({ length: Math.min(500, vectors - from) }, (_, n) => from + n)
    const records = rows.map((row) => `{"id":"${row}","vector":${vectorText(base, row)}}`)
    await call(server, "POST", "/api/v1/insert", `{"collection":"${name}","vectors":[${records.join()}]}`)
  }
}

const sleep = (millis: number) => new Promise((resolve) => setTimeout(resolve, millis))
const percentile = (sorted: ReadonlyArray<number>, p: number): number =>
  sorted[Math.min(sorted.length - 1, Math.floor((sorted.length * p) / 100))] ?? Number.NaN
const median = (list: ReadonlyArray<number>): number =>
  percentile(
    [...list].sort((a, b) => a - b),
    50
  )

interface Measured {
  readonly searches: number
  readonly p50: number
  readonly p99: number
  readonly cpuMicros: number
  readonly perSecond: number
}

/** Searches over one WebSocket, so many at once, for some seconds. */
const measure = async (
  server: Server,
  pids: ReadonlyArray<number>,
  name: string,
  lanes: number,
  forSeconds: number
) => {
  const socket = await MultiplexedSocket.open(server.url)
  const took: Array<number> = []
  const run = (until: number) =>
    Promise.all(
      Array.from({ length: lanes }, async (_, lane) => {
        for (let n = lane; performance.now() < until; n += lanes) {
          const started = performance.now()
          await socket.insist("", queryText(n), name)
          took.push(performance.now() - started)
        }
      })
    )
  await run(performance.now() + 2_000)
  took.length = 0
  const before = pids.map(cpuMicros)
  const started = performance.now()
  await run(started + forSeconds * 1_000)
  const elapsed = (performance.now() - started) / 1_000
  const cpu = pids.map(cpuMicros).reduce((sum, micros, i) => sum + micros - (before[i] as number), 0)
  socket.end()
  took.sort((a, b) => a - b)
  return {
    searches: took.length,
    p50: percentile(took, 50),
    p99: percentile(took, 99),
    cpuMicros: cpu / took.length,
    perSecond: took.length / elapsed
  } satisfies Measured
}

const shown = ({ p50, p99, cpuMicros, perSecond }: Measured) =>
  `p50 ${p50.toFixed(2)} ms, p99 ${p99.toFixed(2)} ms, ${Math.round(perSecond)}/s, ${Math.round(cpuMicros)} us CPU a search`

// --- What fails

interface Watched {
  readonly failures: Array<string>
  readonly partial: number
  readonly late: number
  /** Longest time between two whole answers. */
  readonly gapMillis: number
  readonly asked: number
  readonly lost: number
}

/** Searches and writes all the time, by clients that wait for an answer and do not ask again. */
const watch = async (server: Server, name: string, during: () => Promise<void>): Promise<Watched> => {
  let going = true
  const failures: Array<string> = []
  let partial = 0
  let late = 0
  let asked = 0
  let wholeAt = performance.now()
  let gapMillis = 0
  const search = async (lane: number) => {
    for (let n = lane; going; n += 4) {
      const started = performance.now()
      asked++
      try {
        const body = `{"collection":"${name}","query":${queryText(n)},"k":10,"deadline_ms":5000}`
        const answer = await call(server, "POST", "/api/v1/search", body)
        const now = performance.now()
        if (now - started > 1_000) late++
        if (answer.partial) partial++
        else {
          gapMillis = Math.max(gapMillis, now - Math.max(wholeAt, started))
          wholeAt = now
        }
      } catch (error) {
        failures.push(`search: ${(error as Error).message}`)
      }
      await sleep(5)
    }
  }
  const written: Array<string> = []
  const write = async (lane: number) => {
    for (let n = 0; going; n++) {
      const id = `w${lane}-${n}`
      asked++
      try {
        await call(
          server,
          "POST",
          "/api/v1/insert",
          `{"collection":"${name}","vectors":[{"id":"${id}","vector":${queryText(n)}}]}`
        )
        written.push(id)
      } catch (error) {
        failures.push(`write: ${(error as Error).message}`)
      }
      await sleep(20)
    }
  }
  const all = Promise.all([0, 1, 2, 3].map(search).concat([0, 1].map(write)))
  await sleep(1_500)
  await during()
  going = false
  await all
  let lost = 0
  for (const id of written) {
    const there = await fetch(`${server.url}/api/v1/embed/${id}?collection=${name}`)
    await there.arrayBuffer()
    if (there.status !== 200) lost++
  }
  return { failures, partial, late, gapMillis, asked, lost }
}

const told = (what: string, { failures, partial, late, gapMillis, asked, lost }: Watched) => {
  say(
    `${what}: ${failures.length} of ${asked} calls failed, ${partial} partial, ${late} later than 1 s, ` +
      `longest wait for a whole answer ${Math.round(gapMillis)} ms, ${lost} acknowledged writes lost`
  )
  for (const failure of new Set(failures.slice(0, 5))) say(`    ${failure.slice(0, 300)}`)
}

// --- Parts

const parts: Record<string, (postgres: Postgres) => Promise<void>> = {
  search: async (postgres) => {
    const alone = await startOurs(directory(), flags, profiled("alone"))
    await fill(alone, "one", 1)
    const cluster = await startCluster(postgres, 1)
    await fill(cluster.gateway, "one", 1)
    for (const lanes of [1, 64]) {
      const pairs: Array<readonly [Measured, Measured]> = []
      for (let round = 0; round < rounds; round++) {
        pairs.push([
          await measure(alone, [alone.pid], "one", lanes, seconds / 2),
          await measure(cluster.gateway, cluster.pids(), "one", lanes, seconds / 2)
        ])
      }
      for (const [local, remote] of pairs) say(`  ${lanes} under way: alone ${shown(local)}; gateway ${shown(remote)}`)
      const p50 = median(pairs.map(([local, remote]) => remote.p50 - local.p50))
      const cpu = median(pairs.map(([local, remote]) => remote.cpuMicros - local.cpuMicros))
      say(`search, ${lanes} under way: a gateway adds ${p50.toFixed(2)} ms at the median and ${Math.round(cpu)} us CPU`)
    }
    await alone.stop()
    await cluster.stop()
  },

  scale: async (postgres) => {
    const alone = await startOurs(directory(), flags)
    await fill(alone, "three", 3)
    const cluster = await startCluster(postgres, 3)
    await fill(cluster.gateway, "three", 3)
    // A process that has just started compiles what it runs, and here it is four beside one.
    await measure(alone, [alone.pid], "three", 64, seconds)
    await measure(cluster.gateway, cluster.pids(), "three", 64, seconds)
    const ratios: Array<number> = []
    for (let round = 0; round < rounds; round++) {
      const one = await measure(alone, [alone.pid], "three", 64, seconds / 2)
      const three = await measure(cluster.gateway, cluster.pids(), "three", 64, seconds / 2)
      say(`  alone ${shown(one)}; three runners ${shown(three)}`)
      ratios.push(three.cpuMicros / one.cpuMicros)
    }
    say(`scale: three runners take ${median(ratios).toFixed(2)} times the CPU of one process a search`)
    await alone.stop()
    await cluster.stop()
  },

  drain: async (postgres) => {
    const cluster = await startCluster(postgres, 3)
    await fill(cluster.gateway, "six", 6)
    for (let round = 0; round < rounds; round++) {
      const [first] = cluster.runners.splice(0, 1) as [Server]
      let ended = 0
      const watched = await watch(cluster.gateway, "six", async () => {
        const started = performance.now()
        await first.stop("SIGTERM")
        ended = performance.now() - started
        await sleep(2_000)
      })
      told(`drain (the runner took ${Math.round(ended)} ms)`, watched)
      if (round + 1 < rounds)
        told(
          "join",
          await watch(cluster.gateway, "six", async () => {
            await cluster.addRunner()
            await sleep(3_000)
          })
        )
    }
    await cluster.stop()
  },

  kill: async (postgres) => {
    const cluster = await startCluster(postgres, 3)
    await fill(cluster.gateway, "six", 6)
    for (let round = 0; round < rounds; round++) {
      const [first] = cluster.runners.splice(0, 1) as [Server]
      const watched = await watch(cluster.gateway, "six", async () => {
        await first.stop("SIGKILL")
        await sleep(6_000)
      })
      told("kill -9", watched)
      await cluster.addRunner()
      await sleep(2_000)
    }
    await cluster.stop()
  },

  outage: async (postgres) => {
    const cluster = await startCluster(postgres, 3)
    await fill(cluster.gateway, "six", 6)
    told(
      "the database restarts",
      await watch(cluster.gateway, "six", async () => {
        await postgres.restart()
        await sleep(6_000)
      })
    )
    const millis = seconds * 3_000
    told(
      `the database is gone for ${millis / 1_000} s`,
      await watch(cluster.gateway, "six", async () => {
        await postgres.kill()
        await sleep(millis)
        await postgres.start()
        await sleep(8_000)
      })
    )
    await cluster.stop()
  }
}

const names = positionals.length === 0 ? Object.keys(parts) : positionals
const postgres = await startPostgres()
try {
  for (const name of names) {
    const part = parts[name]
    if (part === undefined) throw new Error(`no part ${name}: there are ${Object.keys(parts).join(", ")}`)
    await part(postgres)
  }
} finally {
  await postgres.stop()
}
process.exit(0)
