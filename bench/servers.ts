/**
 * The servers that are measured, each a process of its own on a free port of 127.0.0.1. With `BENCH_CPU_PROFILE=DIR` ours
 * writes a CPU profile of each of its threads into that directory when it ends.
 */
import { type ChildProcess, spawn } from "node:child_process"
import { once } from "node:events"
import { fileURLToPath } from "node:url"
import { nodeFlags } from "../scripts/nodeOptions.mjs"
import { nodeEnvironment } from "../scripts/run.mjs"
import type { Build } from "./bareIndex.ts"

export const serverNames = ["ours", "bare", "bare-simd"] as const

export type ServerName = (typeof serverNames)[number]

export interface Server {
  readonly name: ServerName
  readonly url: string
  readonly pid: number
  /** From the start of the process until it said that it is ready. */
  readonly readyMillis: number
  /** Ends it (SIGTERM unless told otherwise) and waits for that. */
  readonly stop: (signal?: NodeJS.Signals) => Promise<void>
}

/** `flags` and `environment` beside what is said here. */
export const startOurs = async (
  dataDirectory: string,
  flags: ReadonlyArray<string> = [],
  environment: Readonly<Record<string, string>> = {}
): Promise<Server> => {
  const started = performance.now()
  const child = start(
    // As `npm start` runs it; ends with this process also when that is killed.
    [...nodeFlags, ...profileFlags(), "--import", new URL("../scripts/tether.mjs", import.meta.url).href],
    "../src/main.ts",
    ["serve", "--port", "0", "--host", "127.0.0.1", "--data", dataDirectory, ...flags],
    { ...nodeEnvironment(), RUVECTOR_LAUNCHER: String(process.pid), ...environment }
  )
  const url = await firstMatch(child, /http:\/\/127\.0\.0\.1:\d+/)
  await untilReady(child, url)
  return serverOf("ours", child, url, started)
}

const profileFlags = (): ReadonlyArray<string> => {
  const directory = process.env["BENCH_CPU_PROFILE"]
  return directory === undefined ? [] : ["--cpu-prof", `--cpu-prof-dir=${directory}`]
}

export const startBare = async (build: Build, capacity: number): Promise<Server> => {
  const started = performance.now()
  const child = start([], "bare.ts", ["--build", build, "--capacity", String(capacity)], {})
  const line = await firstMatch(child, /\{"port":\d+\}/)
  const { port } = JSON.parse(line) as { port: number }
  return serverOf(build, child, `http://127.0.0.1:${port}`, started)
}

/** `ws` and no more, with the flags that ours has. */
export const startBareWebSockets = async (): Promise<Omit<Server, "name">> => {
  const started = performance.now()
  const child = start([...nodeFlags], "bareWs.ts", [], nodeEnvironment())
  const { port } = JSON.parse(await firstMatch(child, /\{"port":\d+\}/)) as { port: number }
  return serverOf("bare", child, `http://127.0.0.1:${port}`, started)
}

/** Without what the launcher sets for this program itself: each server runs as its own users start it. */
const { GLIBC_TUNABLES: _, NODE_COMPILE_CACHE: __, ...plainEnvironment } = process.env

const running = new Set<ChildProcess>()

// Also after an error or Ctrl-C nothing is left behind.
process.on("exit", () => {
  for (const child of running) child.kill("SIGKILL")
})

const start = (
  nodeArguments: ReadonlyArray<string>,
  program: string,
  args: ReadonlyArray<string>,
  environment: NodeJS.ProcessEnv
): ChildProcess => {
  const path = fileURLToPath(new URL(program, import.meta.url))
  const child = spawn(process.execPath, [...nodeArguments, path, ...args], {
    env: { ...plainEnvironment, ...environment },
    stdio: ["pipe", "pipe", "pipe"]
  })
  running.add(child)
  return child
}

const startTimeoutMillis = 120_000
const keptOutput = 4_000

/** The first match in what the process prints; an error with its last output if it ends or is silent instead. */
const firstMatch = (child: ChildProcess, pattern: RegExp): Promise<string> =>
  new Promise((resolve, reject) => {
    let output = ""
    let found = false
    const fail = (what: string): void => {
      clearTimeout(timer)
      child.kill("SIGKILL")
      const message = `${child.spawnargs.slice(1).join(" ")} ${what}:\n${output.trim()}`
      if (found) process.stderr.write(`${message}\n`)
      else reject(new Error(message))
    }
    const timer = setTimeout(
      () => fail(`did not say in ${startTimeoutMillis / 1_000} s where it listens`),
      startTimeoutMillis
    )
    child.on("error", (error) => fail(`could not be started (${error.message})`))
    child.on("exit", (code, signal) => {
      if (running.has(child)) fail(`ended with ${signal ?? code}`)
      running.delete(child)
    })
    // Read to the end: a server must never wait for a reader of its log.
    for (const stream of [child.stdout, child.stderr]) {
      stream?.on("data", (chunk: Buffer) => {
        output = (output + chunk.toString()).slice(-keptOutput)
        const match = found ? null : pattern.exec(output)
        if (match === null) return
        found = true
        clearTimeout(timer)
        resolve(match[0])
      })
    }
  })

const untilReady = async (child: ChildProcess, url: string): Promise<void> => {
  const deadline = performance.now() + startTimeoutMillis
  while (performance.now() < deadline) {
    if (child.exitCode !== null || child.signalCode !== null) throw new Error("the server ended before it was ready")
    const response = await fetch(`${url}/health/ready`).catch(() => undefined)
    await response?.arrayBuffer()
    if (response?.status === 200) return
    await new Promise((resolve) => setTimeout(resolve, 5))
  }
  throw new Error(`the server was not ready in ${startTimeoutMillis / 1_000} s`)
}

const serverOf = (name: ServerName, child: ChildProcess, url: string, started: number): Server => ({
  name,
  url,
  pid: child.pid as number,
  readyMillis: performance.now() - started,
  stop: async (signal = "SIGTERM") => {
    if (child.exitCode !== null || child.signalCode !== null) return
    // No longer one that should run: that it ends is no error.
    running.delete(child)
    child.kill(signal)
    const late = setTimeout(() => child.kill("SIGKILL"), stopTimeoutMillis)
    await once(child, "exit")
    clearTimeout(late)
  }
})

const stopTimeoutMillis = 30_000
