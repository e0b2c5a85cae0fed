/**
 * Gateways and runners on one machine over one data directory, with a Postgres and a Redis that were named, or of their own below
 * that directory. Each is a process that is started again when it dies; they are ended in the order in which nothing is lost:
 * gateways, then runners, then what they rest on.
 */
import { spawnSync } from "node:child_process"
import { randomBytes } from "node:crypto"
import { mkdir, writeFile } from "node:fs/promises"
import { totalmem } from "node:os"
import { join } from "node:path"
import { type SettingName, type SettingValues, variableOf } from "../config.ts"
import { freePort } from "../shards/freePort.ts"
import { preparePostgres } from "./LocalPostgres.ts"
import { Supervised, supervisedVariable, tethered } from "./Supervised.ts"

export interface LocalClusterOptions {
  readonly gateways: number
  readonly runners: number
  /** Of the first gateway; the others have the ones after it. 0: free ones. */
  readonly port: number
  /** Settings of all nodes, from the environment. */
  readonly settings: SettingValues
  /** Absolute. */
  readonly data: string
  /** One line of one of them; `note` where the supervisor says it. */
  readonly onLine: (name: string, line: string, note: boolean) => void
}

export interface Started {
  readonly gateways: ReadonlyArray<string>
  /** What was started, with its process. */
  readonly processes: ReadonlyArray<{ readonly name: string; readonly pid: number | undefined }>
  /** Of a service: a port of its own, or where one was named. */
  readonly postgres: string
  readonly redis: string | undefined
}

export class LocalCluster {
  readonly #options: LocalClusterOptions
  /** In the order in which they are ended, those of one entry together. */
  readonly #groups: {
    readonly gateways: Array<Supervised>
    readonly runners: Array<Supervised>
    readonly services: Array<Supervised>
  } = { gateways: [], runners: [], services: [] }
  #stopping = false

  constructor(options: LocalClusterOptions) {
    this.#options = options
  }

  /** Until every gateway is ready. */
  async start(): Promise<Started> {
    const { settings, data } = this.#options
    const services = join(data, "services")
    await mkdir(services, { recursive: true, mode: 0o711 })
    const environment: NodeJS.ProcessEnv = {}
    let postgres = "named"
    if (settings.databaseUrl === "") {
      const port = await freePort("127.0.0.1")
      const own = await preparePostgres(join(services, "postgres"), port)
      environment[variableOf("databaseUrl")] = own.url
      postgres = `its own, on port ${port}`
      await this.#service("postgres", "INT", [own.file, ...own.args], {
        user: own.user,
        isReady: (line) => line.includes("ready to accept connections"),
        isShown: (line) => !/\sLOG: {2}/.test(line)
      })
    }
    let redis: string | undefined = "named"
    if (settings.redisUrl === "") {
      redis = undefined
      if (spawnSync("redis-server", ["--version"]).status === 0) {
        const port = await freePort("127.0.0.1")
        environment[variableOf("redisUrl")] = await this.#redis(join(services, "redis"), port)
        redis = `its own, on port ${port}`
      }
    }
    await this.#together(this.#options.runners, (n) => this.#node("runner", n, 0, environment))
    const bases = await this.#together(this.#options.gateways, (n) =>
      this.#node("gateway", n, this.#options.port === 0 ? 0 : this.#options.port + n - 1, environment)
    )
    await Promise.all(bases.map((base) => this.#ready(base)))
    const { services: own, runners, gateways } = this.#groups
    const processes = [...own, ...runners, ...gateways].map(({ name, pid }) => ({ name, pid }))
    return { gateways: bases, processes, postgres, redis }
  }

  /** Gateways first, so that what they were asked is answered; what the others rest on last. */
  async stop(): Promise<void> {
    this.#stopping = true
    const { gateways, runners, services } = this.#groups
    const grace = this.#options.settings.drainMillis + drainSlackMillis
    for (const group of [gateways, runners]) await Promise.all(group.map((one) => one.stop(grace)))
    // The newest was started last: Redis, then Postgres.
    for (const service of [...services].reverse()) await service.stop(serviceStopMillis)
  }

  /** All at once. */
  kill(): void {
    this.#stopping = true
    for (const one of Object.values(this.#groups).flat()) one.kill()
  }

  async #together<A>(count: number, make: (n: number) => Promise<A>): Promise<ReadonlyArray<A>> {
    if (this.#stopping) return []
    return Promise.all(Array.from({ length: count }, (_, i) => make(i + 1)))
  }

  async #node(role: "gateway" | "runner", n: number, port: number, environment: NodeJS.ProcessEnv): Promise<string> {
    const { settings, data, runners, onLine } = this.#options
    const name = `${role}-${n}`
    let base = ""
    // Each would take three quarters of the machine for itself.
    const share = Math.floor((totalmem() * 0.75) / (runners + 1))
    const budget = settings.budgetBytes === 0 && role === "runner" ? ["--budget-bytes", `${share}`] : []
    const node = new Supervised({
      name,
      file: process.execPath,
      args: [
        ...process.execArgv,
        process.argv[1] as string,
        "serve",
        ...["--role", role, "--port", `${port}`, "--data", data],
        ...budget
      ],
      env: {
        ...without(process.env, ["port", "role", "data", "clusterPort"]),
        [variableOf("logFormat")]: process.env[variableOf("logFormat")] ?? "pretty",
        ...environment,
        [supervisedVariable]: "1"
      },
      isReady: (line) => {
        const found = /listens on (https?:\/\/\S+?),? /.exec(line)
        if (found !== null) base = found[1] as string
        return found !== null
      },
      // What a node says to who started it alone is said for all of them, once.
      onLine: (line) => (greeting.test(line) ? undefined : onLine(name, line, false)),
      onNote: (text) => onLine(name, text, true),
      end: (child) => void child.kill("SIGTERM")
    })
    this.#groups[role === "gateway" ? "gateways" : "runners"].push(node)
    await node.start()
    return base
  }

  async #service(
    name: string,
    signal: "INT" | "TERM",
    words: ReadonlyArray<string>,
    {
      user,
      isReady,
      isShown
    }: {
      readonly user?: { readonly uid: number; readonly gid: number } | undefined
      readonly isReady: (line: string) => boolean
      readonly isShown: (line: string) => boolean
    }
  ): Promise<void> {
    const { onLine } = this.#options
    let isUp = false
    const service = new Supervised({
      name,
      file: "/bin/sh",
      args: tethered(signal, words),
      user,
      isReady: (line) => {
        isUp ||= isReady(line)
        return isUp
      },
      // What is said at a start that succeeds is of no interest.
      onLine: (line) => (isUp && isShown(line) ? onLine(name, line, false) : undefined),
      onNote: (text) => onLine(name, text, true),
      end: (child) => void child.stdin?.end(),
      killSignal: "SIGQUIT"
    })
    this.#groups.services.push(service)
    await service.start()
  }

  async #redis(directory: string, port: number): Promise<string> {
    await mkdir(directory, { recursive: true, mode: 0o700 })
    const password = randomBytes(24).toString("hex")
    const file = join(directory, "redis.conf")
    // In a file: words of a command can be read by everybody on the machine.
    const lines = [`port ${port}`, "bind 127.0.0.1", `dir "${directory}"`, "appendonly yes", `requirepass ${password}`]
    await writeFile(file, `${lines.join("\n")}\n`, { mode: 0o600 })
    await this.#service("redis", "TERM", ["redis-server", file], {
      isReady: (line) => line.includes("Ready to accept connections"),
      isShown: (line) => / # /.test(line)
    })
    return `redis://:${password}@127.0.0.1:${port}`
  }

  /** A gateway is ready once it finds the collections, and so the runners. */
  async #ready(base: string): Promise<void> {
    const until = performance.now() + readyMillisMax
    while (!this.#stopping) {
      const answer = await fetch(`${base}/health/ready`).catch(() => undefined)
      if (answer?.status === 200) return
      const detail = await answer?.text().catch(() => "")
      if (performance.now() > until)
        throw new Error(`${base} is not ready after ${readyMillisMax / 1_000} s: ${detail}`)
      await new Promise((resolve) => setTimeout(resolve, readyPauseMillis))
    }
  }
}

/** Beyond the drain time: snapshots of what is resident. */
const drainSlackMillis = 10_000
const serviceStopMillis = 10_000
const readyMillisMax = 120_000
const readyPauseMillis = 100

const greeting =
  /^(?:ruvector-streaming \S+ listens on |First vectors and |Try it in a browser|Whoever is on this machine| {2}curl )/

const without = (environment: NodeJS.ProcessEnv, names: ReadonlyArray<SettingName>): NodeJS.ProcessEnv => {
  const dropped = new Set(["PORT", ...names.map(variableOf)])
  return Object.fromEntries(Object.entries(environment).filter(([name]) => !dropped.has(name)))
}
