/** The server as a process of its own, started as a user starts it, ended by its pid. */
import { type ChildProcess, spawn } from "node:child_process"
import { mkdtemp, rm } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"

export interface ServerProcess {
  readonly base: string
  readonly port: number
  readonly pid: number
  readonly process: ChildProcess
  /** What it has written so far. */
  readonly output: () => string
  /** Ends it and waits for it; answers its exit code, or the signal that ended it. */
  readonly stop: (signal: NodeJS.Signals) => Promise<number | NodeJS.Signals>
}

const main = new URL("../../src/main.ts", import.meta.url).pathname

/**
 * Starts `serve` on a free port of 127.0.0.1 and waits until it says where. Rejects with its output if it ends before.
 * `entry` is another program than `main.ts`, which can be sent messages.
 */
export const startServer = (
  data: string,
  flags: ReadonlyArray<string> = [],
  environment: Record<string, string> = {},
  entry?: string
): Promise<ServerProcess> =>
  new Promise((resolve, reject) => {
    const child = spawnServe(["--port", "0", "--data", data, ...flags], environment, entry)
    const exited = new Promise<number | NodeJS.Signals>((done) => {
      child.once("exit", (code, signal) => done(code ?? signal ?? 1))
    })
    let output = ""
    const read = (chunk: Buffer) => {
      output += chunk.toString()
      const match = /listens on (http:\/\/127\.0\.0\.1:(\d+))/.exec(output)
      if (match === null || child.pid === undefined) return
      resolve({
        base: match[1] as string,
        port: Number(match[2]),
        pid: child.pid,
        process: child,
        output: () => output,
        stop: (signal) => {
          child.kill(signal)
          return exited
        }
      })
    }
    child.stdout?.on("data", read)
    child.stderr?.on("data", read)
    void exited.then((code) => reject(new Error(`serve ended with ${code}: ${output}`)))
  })

/** Runs `serve` with these words and waits for its end. */
export const runServe = (
  words: ReadonlyArray<string>,
  environment: Record<string, string> = {}
): Promise<{ readonly code: number | null; readonly stdout: string; readonly stderr: string }> =>
  new Promise((resolve) => {
    const child = spawnServe(words, environment)
    let stdout = ""
    let stderr = ""
    child.stdout?.on("data", (chunk: Buffer) => (stdout += chunk.toString()))
    child.stderr?.on("data", (chunk: Buffer) => (stderr += chunk.toString()))
    // One that neither serves nor ends must not outlive the test.
    const late = setTimeout(() => child.kill("SIGKILL"), 30_000)
    child.once("exit", (code) => {
      clearTimeout(late)
      resolve({ code, stdout, stderr })
    })
  })

const children = new Set<ChildProcess>()
process.on("exit", () => {
  for (const child of children) child.kill("SIGKILL")
})

const spawnServe = (words: ReadonlyArray<string>, environment: Record<string, string> = {}, entry?: string) => {
  const { PORT: _, ...inherited } = process.env
  const child = spawn(process.execPath, [entry ?? main, "serve", ...words], {
    stdio: entry === undefined ? ["ignore", "pipe", "pipe"] : ["ignore", "pipe", "pipe", "ipc"],
    env: { ...inherited, ...environment }
  })
  children.add(child)
  child.once("exit", () => children.delete(child))
  return child
}

/** A directory of the test's own, removed when `use` is done. */
export const withDirectory = async <A>(use: (directory: string) => Promise<A>): Promise<A> => {
  const directory = await mkdtemp(join(tmpdir(), "ruvector-"))
  try {
    return await use(directory)
  } finally {
    await rm(directory, { recursive: true, force: true })
  }
}

/** Waits until `/health/ready` says so. */
export const ready = async (base: string, withinMillis = 20_000): Promise<void> => {
  const until = Date.now() + withinMillis
  for (;;) {
    const status = await fetch(`${base}/health/ready`).then(
      (response) => response.status,
      () => 0
    )
    if (status === 200) return
    if (Date.now() > until) throw new Error(`not ready within ${withinMillis} ms (${status})`)
    await new Promise((resolve) => setTimeout(resolve, 20))
  }
}
