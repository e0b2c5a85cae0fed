/** `cluster` as a user meets it: one command, processes that come back, and none that is left. */
import { type ChildProcess, spawn } from "node:child_process"
import { once } from "node:events"
import { chmod } from "node:fs/promises"
import { assert, describe, it } from "@effect/vitest"
import { skipPostgres } from "../support/Postgres.ts"
import { withDirectory } from "../support/ServerProcess.ts"

const main = new URL("../../src/main.ts", import.meta.url).pathname

interface Running {
  readonly child: ChildProcess
  readonly output: () => string
  readonly gateways: ReadonlyArray<string>
  readonly pids: ReadonlyMap<string, number>
}

const started = new Set<number>()
process.on("exit", () => {
  for (const pid of started) if (isAlive(pid)) process.kill(pid, "SIGKILL")
})

const isAlive = (pid: number): boolean => {
  try {
    return process.kill(pid, 0)
  } catch {
    return false
  }
}

const until = async (holds: () => Promise<boolean> | boolean, what: string, millis = 60_000): Promise<void> => {
  const end = Date.now() + millis
  while (!(await holds())) {
    if (Date.now() > end) throw new Error(`not within ${millis} ms: ${what}`)
    await new Promise((resolve) => setTimeout(resolve, 50))
  }
}

const start = (data: string): Promise<Running> =>
  new Promise((resolve, reject) => {
    const { PORT: _, ...env } = process.env
    const words = ["cluster", "--data", data, "--gateways", "1", "--runners", "2", "--port", "0"]
    const child = spawn(process.execPath, [main, ...words], { stdio: ["ignore", "pipe", "pipe"], env })
    if (child.pid !== undefined) started.add(child.pid)
    let output = ""
    const read = (chunk: Buffer) => {
      output += chunk.toString()
      if (!output.includes("Ctrl-C ends all of it")) return
      const named = /processes: (.*)/.exec(output)?.[1] ?? ""
      const pids = new Map(
        [...named.matchAll(/([a-z0-9-]+) (\d+)/g)].map(([, name, pid]) => [name as string, Number(pid)])
      )
      for (const pid of pids.values()) started.add(pid)
      const gateways = [...output.matchAll(/gateway-\d: (http:\S+)/g)].map(([, base]) => base as string)
      resolve({ child, output: () => output, gateways, pids })
    }
    child.stdout.on("data", read)
    child.stderr.on("data", read)
    child.once("exit", (code) => reject(new Error(`cluster ended with ${code}: ${output}`)))
  })

const found = async (base: string): Promise<boolean> => {
  const answer = await fetch(`${base}/api/v1/stream/search?query_vector_id=a&k=2`).catch(() => undefined)
  return answer?.status === 200 && (await answer.text()).includes('"vector_id":"b"')
}

describe.skipIf(skipPostgres)("ruvector cluster", () => {
  it(
    "serves by one command, starts what dies again, keeps the data, and leaves no process behind",
    { timeout: 240_000 },
    () =>
      withDirectory(async (directory) => {
        // Postgres runs as another user where this is root.
        await chmod(directory, 0o711)
        const first = await start(directory)
        const [base = ""] = first.gateways
        const inserted = await fetch(`${base}/api/v1/insert`, {
          method: "POST",
          headers: { "content-type": "application/json" },
          body: JSON.stringify({
            vectors: [
              { id: "a", vector: [1, 0] },
              { id: "b", vector: [0.8, 0.6] }
            ]
          })
        })
        assert.strictEqual(inserted.status, 200, await inserted.text())
        assert.isTrue(await found(base))

        process.kill(first.pids.get("runner-1") as number, "SIGKILL")
        await until(() => first.output().includes("runner-1   | cluster: it serves again"), first.output())
        await until(() => found(base), "found after a runner was killed")

        // With no chance to end anything: each of them sees by itself that it is gone.
        const ended = once(first.child, "exit")
        first.child.kill("SIGKILL")
        await ended
        for (const [name, pid] of first.pids) await until(() => !isAlive(pid), `${name} ends: ${first.output()}`)

        const second = await start(directory)
        assert.isTrue(await found(second.gateways[0] as string))
        const stopped = once(second.child, "exit")
        second.child.kill("SIGTERM")
        assert.deepStrictEqual(await stopped, [0, null], second.output())
        for (const [name, pid] of second.pids) assert.isFalse(isAlive(pid), name)
      })
  )
})
