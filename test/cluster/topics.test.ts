/** Topics in a cluster of processes: their owners are killed, and what was acknowledged is there, in order, done once. */
import { mkdtemp, rm } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { assert, describe, it } from "@effect/vitest"
import { VectorDB } from "../../src/client/index.ts"
import { type Postgres, skipPostgres, startPostgres } from "../support/Postgres.ts"
import { startServer } from "../support/ServerProcess.ts"

const settle = (millis: number) => new Promise((resolve) => setTimeout(resolve, millis))

describe.skipIf(skipPostgres)("a gateway and two runners, one of which is killed", () => {
  it("messages and tasks go on at the other one", { timeout: 240_000 }, async () => {
    const directory = await mkdtemp(join(tmpdir(), "ruvector-cluster-"))
    const postgres: Postgres = await startPostgres()
    const start = (role: string) =>
      startServer(directory, [
        ...["--role", role, "--database-url", postgres.url, "--cluster-port", "0"],
        ...["--key-rate", "0", "--address-rate", "0", "--shed-user-rate", "100000"]
      ])
    const runners = await Promise.all([start("runner"), start("runner")])
    const gateway = await start("gateway")
    const db = new VectorDB({ endpoint: gateway.base, deadlineMillis: 60_000 })
    try {
      await db.topics.create("t", { channels: 4, leaseMillis: 2_000, attemptsMax: 100 })
      const channel = db.channel<number>("t")
      const seen: Array<number> = []
      const total = 60
      const heard = (async () => {
        for await (const { message } of channel.subscribe({ from: "oldest" })) {
          seen.push(message)
          if (new Set(seen).size === total) break
        }
      })()
      const tasks = db.tasks<number>("t")
      await tasks.enqueueMany(Array.from({ length: total }, (_, n) => ({ task: n, id: `t${n}` })))
      const tokens = new Map<string, number>()
      const faults: Array<string> = []
      const enough = new AbortController()
      const working = tasks.work(
        async ({ id, token }) => {
          if (token <= (tokens.get(id) ?? 0)) faults.push(`${id} by ${token} after ${tokens.get(id)}`)
          tokens.set(id, token)
          await settle(20)
        },
        { concurrency: 4, signal: enough.signal }
      )
      for (let n = 0; n < total; n++) {
        await channel.publish(n, { key: `k${n % 5}` })
        // Whoever owns what: one of them is gone, and then what it had is the other's.
        if (n === 20) await runners[0]?.stop("SIGKILL")
      }
      await heard
      // Each once or again; for each key the first sights are in order.
      const first = [...new Set(seen)]
      for (let k = 0; k < 5; k++) {
        const ofKey = first.filter((n) => n % 5 === k)
        assert.deepStrictEqual(
          ofKey,
          ofKey.toSorted((a, b) => a - b)
        )
      }
      for (;;) {
        const stats = (await db.topics.get("t"))?.tasks
        if (stats?.done === total) break
        await settle(200)
      }
      enough.abort()
      await working
      assert.deepStrictEqual(faults, [])
      assert.strictEqual(await channel.publishMany([{ message: 0, id: "x" }]), 0)
      assert.strictEqual(await channel.publishMany([{ message: 0, id: "x" }]), 1)
    } finally {
      await db.close()
      await gateway.stop("SIGKILL")
      for (const runner of runners) await runner.stop("SIGKILL")
      await postgres.stop()
      await rm(directory, { recursive: true, force: true })
    }
  })
})
