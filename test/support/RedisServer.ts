/** A Redis server of the test's own on a free port of 127.0.0.1, ended by its pid. */
import { type ChildProcess, spawn, spawnSync } from "node:child_process"
import { mkdtemp, rm } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { freePort } from "../../src/shards/freePort.ts"

export interface RedisServer {
  readonly url: string
  readonly port: number
  /** Ends it at once, as a crash does; what is in memory is gone. */
  readonly kill: () => Promise<void>
  /** Starts it again on the same port. */
  readonly start: () => Promise<void>
  /** Answers nothing until `resume`; connections stay open. */
  readonly suspend: () => void
  readonly resume: () => void
  /** Ends it for good. */
  readonly stop: () => Promise<void>
}

export const redisInstalled = spawnSync("redis-server", ["--version"]).status === 0

/** Whether tests with Redis are to be skipped; in CI they are not, and fail where it is not installed. */
export const skipRedis = !redisInstalled && process.env["RUVECTOR_CI"] === undefined
if (skipRedis) console.warn("Tests with Redis are skipped: install it with `apt-get install redis-server`.")

/** `host`: the address to listen on; whoever reaches it may do everything. */
export const startRedis = async (flags: ReadonlyArray<string> = [], host = "127.0.0.1"): Promise<RedisServer> => {
  const directory = await mkdtemp(join(tmpdir(), "ruvector-redis-"))
  const port = await freePort(host)
  let child: ChildProcess | undefined
  const kill = async () => {
    const running = child
    child = undefined
    if (running === undefined || running.exitCode !== null) return
    const exited = new Promise((resolve) => running.once("exit", resolve))
    running.kill("SIGKILL")
    await exited
  }
  const start = async () => {
    child = await launch(host, port, directory, flags)
  }
  await start()
  return {
    url: `redis://${host}:${port}`,
    port,
    kill,
    start,
    suspend: () => child?.kill("SIGSTOP"),
    resume: () => child?.kill("SIGCONT"),
    stop: async () => {
      await kill()
      await rm(directory, { recursive: true, force: true })
    }
  }
}

const launch = (host: string, port: number, directory: string, flags: ReadonlyArray<string>): Promise<ChildProcess> =>
  new Promise((resolve, reject) => {
    const place = ["--port", `${port}`, "--bind", host, "--protected-mode", "no", "--dir", directory]
    const child = spawn("redis-server", [...place, "--save", "", "--appendonly", "no", ...flags], {
      stdio: ["ignore", "pipe", "pipe"]
    })
    let output = ""
    child.stdout.on("data", (chunk: Buffer) => {
      output += chunk.toString()
      if (output.includes("Ready to accept connections")) resolve(child)
    })
    child.once("error", reject)
    child.once("exit", (code) => reject(new Error(`redis-server ended with ${code}: ${output}`)))
  })
