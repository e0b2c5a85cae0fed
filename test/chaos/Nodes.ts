/** A cluster of real processes: gateways and runners, and the Postgres and Redis they meet in. Each writes a log of its own. */
import { type ChildProcess, spawn } from "node:child_process"
import { closeSync, mkdirSync, openSync, readFileSync, writeFileSync } from "node:fs"
import { join } from "node:path"
import { nodeFlags } from "../../scripts/nodeOptions.mjs"
import { nodeEnvironment } from "../../scripts/run.mjs"
import { freePort } from "../../src/shards/freePort.ts"
import { type Postgres, startPostgres } from "../support/Postgres.ts"
import { type RedisServer, startRedis } from "../support/RedisServer.ts"
import { type Network, openNetwork } from "./Network.ts"

export type Role = "gateway" | "runner"

export interface Weather {
  /** That the wall clock is ahead. */
  readonly skewMillis: number
  /** That an operation of the file system waits, in the mean. */
  readonly diskMillis: number
}

export interface ClusterNode {
  readonly name: string
  readonly role: Role
  /** `http://address:port`, the same after each start. */
  readonly base: string
  /** Starts the process, and waits until it is ready. */
  readonly start: () => Promise<void>
  /** Ends it; its exit code, or the signal that ended it: SIGKILL too where it does not end by SIGTERM. */
  readonly end: (signal: "SIGKILL" | "SIGTERM") => Promise<number | string>
  readonly freeze: () => void
  readonly thaw: () => void
  readonly weather: (weather: Partial<Weather>) => void
  readonly isRunning: () => boolean
  readonly isReady: () => Promise<boolean>
  readonly pid: () => number | undefined
}

export interface Nodes {
  readonly directory: string
  readonly data: string
  readonly network: Network
  readonly postgres: Postgres
  readonly redis: RedisServer
  readonly gateways: ReadonlyArray<ClusterNode>
  readonly runners: ReadonlyArray<ClusterNode>
  readonly all: ReadonlyArray<ClusterNode>
  readonly stop: () => Promise<void>
}

export interface NodesOptions {
  /** For data and logs; made where it is missing. */
  readonly directory: string
  readonly gateways: number
  readonly runners: number
  /** Further words of `serve`, for all nodes. */
  readonly flags?: ReadonlyArray<string>
  /** `false`: all on the loopback device, also where namespaces could be had. */
  readonly namespaces?: boolean
}

/** That a node may take to start, and to end when it is told to. */
const startMillis = 120_000
const endMillis = 60_000

const main = new URL("../../src/main.ts", import.meta.url).pathname
const weatherModule = new URL("./weather.mjs", import.meta.url).pathname

export const startNodes = async (options: NodesOptions): Promise<Nodes> => {
  const { directory } = options
  const data = join(directory, "data")
  mkdirSync(join(directory, "logs"), { recursive: true })
  const named = (role: Role, count: number) =>
    Array.from({ length: count }, (_, n) => ({ role, name: `${role}-${n + 1}` }))
  const planned = [...named("gateway", options.gateways), ...named("runner", options.runners)]
  const network = openNetwork(options.namespaces === false ? [] : planned.map(({ name }) => name))

  const postgres = await startPostgres({ host: network.addressOf("postgres") })
  const redis = await startRedis([], network.addressOf("redis"))
  const all: Array<ClusterNode> = []
  // Where this process is told to end, what it started ends with it.
  const abandon = () => {
    void postgres.kill()
    void redis.kill()
  }
  process.once("exit", abandon)
  const stop = async () => {
    process.removeListener("exit", abandon)
    for (const node of all) node.thaw()
    await Promise.all(all.map((node) => node.end("SIGKILL")))
    await redis.stop()
    await postgres.stop()
    network.close()
  }
  try {
    for (const { name, role } of planned) {
      const host = network.addressOf(name)
      const isAlone = network.kind === "namespaces"
      const port = isAlone ? 8080 : await freePort("127.0.0.1")
      const clusterPort = isAlone ? 7000 : await freePort("127.0.0.1")
      const words = [
        ...["--role", role, "--data", data, "--database-url", postgres.url, "--redis-url", redis.url],
        ...["--host", host, "--port", `${port}`, "--anonymous-access", "everyone", "--log-format", "json"],
        ...(role === "runner" ? ["--cluster-host", host, "--cluster-port", `${clusterPort}`] : []),
        // Clients of a test are many and at one address.
        ...["--address-rate", "0", "--key-rate", "0"],
        ...(options.flags ?? [])
      ]
      all.push(nodeOf({ name, role, base: `http://${host}:${port}`, words, directory, network }))
    }
    await Promise.all(all.map((node) => node.start()))
  } catch (error) {
    await stop()
    throw error
  }
  return {
    directory,
    data,
    network,
    postgres,
    redis,
    gateways: all.filter(({ role }) => role === "gateway"),
    runners: all.filter(({ role }) => role === "runner"),
    all,
    stop
  }
}

interface NodeOptions extends Pick<ClusterNode, "name" | "role" | "base"> {
  readonly words: ReadonlyArray<string>
  readonly directory: string
  readonly network: Network
}

const running = new Set<ChildProcess>()
process.on("exit", () => {
  for (const child of running) child.kill("SIGKILL")
})

const nodeOf = ({ name, role, base, words, directory, network }: NodeOptions): ClusterNode => {
  const weatherFile = join(directory, `${name}.weather`)
  let now: Weather = { skewMillis: 0, diskMillis: 0 }
  writeFileSync(weatherFile, JSON.stringify(now))
  let child: ChildProcess | undefined
  let exited: Promise<number | string> = Promise.resolve(0)
  const isRunning = () => child !== undefined && child.exitCode === null && child.signalCode === null
  const isReady = () =>
    fetch(`${base}/health/ready`, { signal: AbortSignal.timeout(2_000) }).then(
      async (response) => {
        await response.arrayBuffer()
        return response.status === 200
      },
      () => false
    )
  return {
    name,
    role,
    base,
    isRunning,
    isReady,
    pid: () => child?.pid,
    start: async () => {
      const logFile = join(directory, "logs", `${name}.log`)
      const log = openSync(logFile, "a")
      const command = [process.execPath, ...nodeFlags, main, "serve", ...words]
      const [program, ...rest] = network.command(name, command)
      const { PORT: _, NODE_OPTIONS: __, ...inherited } = process.env
      const started = spawn(program as string, rest, {
        stdio: ["ignore", log, log],
        // By the options, which threads have too.
        env: {
          ...inherited,
          ...nodeEnvironment(),
          NODE_OPTIONS: `--import ${weatherModule}`,
          RUVECTOR_WEATHER: weatherFile
        }
      })
      closeSync(log)
      child = started
      running.add(started)
      exited = new Promise((resolve) => {
        started.once("exit", (code, signal) => {
          running.delete(started)
          resolve(code ?? signal ?? 1)
        })
      })
      const until = performance.now() + startMillis
      while (!(await isReady())) {
        if (child !== started) return
        if (!isRunning()) {
          const last = readFileSync(logFile, "utf8").trimEnd().split("\n").slice(-3).join("\n")
          throw new Error(`${name} ended with ${await exited} before it was ready: ${last}`)
        }
        if (performance.now() > until) throw new Error(`${name} was not ready within ${startMillis} ms`)
        await new Promise((resolve) => setTimeout(resolve, 100))
      }
    },
    end: async (signal) => {
      if (!isRunning()) return "SIGKILL"
      const ending = child
      ending?.kill(signal)
      const late = setTimeout(() => ending?.kill("SIGKILL"), endMillis)
      const code = await exited
      clearTimeout(late)
      return code
    },
    freeze: () => void child?.kill("SIGSTOP"),
    thaw: () => void child?.kill("SIGCONT"),
    weather: (weather) => {
      now = { ...now, ...weather }
      writeFileSync(weatherFile, JSON.stringify(now))
    }
  }
}
