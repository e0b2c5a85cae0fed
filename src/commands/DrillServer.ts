/** A node as a process of its own, as `serve` starts it, on a free port of 127.0.0.1. */
import { type ChildProcess, spawn } from "node:child_process"
import { once } from "node:events"

export interface DrillServer {
  readonly base: string
  readonly stop: () => Promise<void>
}

/** `program` is the file of the command line, as this process was started with. Rejects with what it wrote last where it does not become ready in time. */
export const startDrillServer = async (program: string, data: string): Promise<DrillServer> => {
  // Not this process's own settings: a drill's node must not back itself up, nor take the port of another.
  const environment = Object.fromEntries(
    Object.entries(process.env).filter(([name]) => name !== "PORT" && !name.startsWith("RUVECTOR_"))
  )
  const child = spawn(
    process.execPath,
    [...process.execArgv, program, "serve", "--host", "127.0.0.1", "--port", "0", "--data", data],
    { stdio: ["ignore", "pipe", "pipe"], env: { ...environment, RUVECTOR_LAUNCHER: String(process.pid) } }
  )
  const kill = () => child.kill("SIGKILL")
  process.once("exit", kill)
  const stop = async () => {
    process.removeListener("exit", kill)
    await end(child)
  }
  try {
    return { base: await ready(child), stop }
  } catch (error) {
    await stop()
    throw error
  }
}

const startMillisMax = 600_000
const stopMillisMax = 30_000
const pollMillis = 50
const outputKept = 2_000

const ready = async (child: ChildProcess): Promise<string> => {
  let output = ""
  let base: string | undefined
  for (const stream of [child.stdout, child.stderr]) {
    stream?.on("data", (chunk: Buffer) => {
      output = (output + chunk.toString()).slice(-outputKept)
      base ??= /listens on (http:\/\/127\.0\.0\.1:\d+)/.exec(output)?.[1]
    })
  }
  const deadline = performance.now() + startMillisMax
  while (child.exitCode === null && child.signalCode === null && performance.now() < deadline) {
    if (base !== undefined) {
      const status = await fetch(`${base}/health/ready`).then(
        ({ status }) => status,
        () => 0
      )
      if (status === 200) return base
    }
    await new Promise((resolve) => setTimeout(resolve, pollMillis))
  }
  throw new Error(`the restored node did not become ready: ${output.trim().split("\n").at(-1) ?? "it said nothing"}`)
}

const end = async (child: ChildProcess): Promise<void> => {
  if (child.exitCode !== null || child.signalCode !== null) return
  const late = setTimeout(() => child.kill("SIGKILL"), stopMillisMax)
  child.kill("SIGTERM")
  await once(child, "exit")
  clearTimeout(late)
}
