/**
 * Writes without keys through a gateway while the runner that owns their partition is killed: the cluster delivers what was
 * under way again, to the next runner, and each is in the log once all the same.
 */
import { mkdir } from "node:fs/promises"
import { join } from "node:path"
import { assert, describe, it } from "@effect/vitest"
import { Effect } from "effect"
import * as FileObjectStore from "../../src/tiers/FileObjectStore.ts"
import { decodeRequests, decodeSegment } from "../../src/tiers/LogSegment.ts"
import { ObjectStore } from "../../src/tiers/ObjectStore.ts"
import { skipPostgres, startPostgres } from "../support/Postgres.ts"
import { ready, type ServerProcess, startServer, withDirectory } from "../support/ServerProcess.ts"

const writers = 24

describe.skipIf(skipPostgres)("a runner that is killed", () => {
  it("has what was under way delivered again, and done once", { timeout: 180_000 }, () =>
    withDirectory(async (directory) => {
      const postgres = await startPostgres()
      const data = join(directory, "data")
      await mkdir(data)
      const start = (role: "gateway" | "runner") =>
        startServer(data, ["--role", role, "--database-url", postgres.url, "--cluster-port", "0"])
      const servers: Array<ServerProcess> = []
      try {
        const runners = [await start("runner"), await start("runner")]
        const gateway = await start("gateway")
        servers.push(...runners, gateway)
        await ready(gateway.base, 60_000).catch((e) => { console.log(servers.map((s) => s.output()).join("\n----\n")); throw e })
        await insert(gateway, "first")

        let acknowledged = 0
        const done = new Set<string>(["first"])
        const stop = { stopped: false }
        const load = Array.from({ length: writers }, async (_, writer) => {
          for (let n = 0; !stop.stopped; n++) {
            const id = `${writer}-${n}`
            if (!(await insert(gateway, id))) continue
            acknowledged += 1
            done.add(id)
          }
        })
        while (acknowledged < writers * 5) await pause(20)
        const owner = await ownerOf(runners)
        await owner.stop("SIGKILL")
        const before = acknowledged
        const until = Date.now() + 60_000
        while (acknowledged < before + writers * 3 && Date.now() < until) await pause(20)
        assert.isAtLeast(acknowledged, before + writers * 3, "writes go on at the other runner")
        stop.stopped = true
        await Promise.all(load)
        for (const server of servers) if (server !== owner) await server.stop("SIGTERM")

        const { ids, requests } = await logOf(join(data, "objects"))
        assert.strictEqual(new Set(ids).size, ids.length, "a write is in the log twice")
        assert.strictEqual(new Set(requests).size, ids.length, "each has a request's id of its own")
        const there = new Set(ids)
        for (const id of done) assert.isTrue(there.has(id), `${id} was acknowledged`)
      } finally {
        for (const server of servers) server.process.kill("SIGKILL")
        await postgres.stop()
      }
    })
  )
})

/** Whether it was acknowledged. */
const insert = async ({ base }: ServerProcess, id: string): Promise<boolean> => {
  const response = await fetch(`${base}/api/v1/insert`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ vectors: [{ id, vector: [1, 2] }] })
  })
  await response.arrayBuffer()
  return response.ok
}

const ownerOf = async (runners: ReadonlyArray<ServerProcess>): Promise<ServerProcess> => {
  for (const runner of runners) {
    const metrics = await (await fetch(`${runner.base}/metrics`)).text()
    if (/^ruvector_partitions_resident(?:\{[^}]*\})? 1$/m.test(metrics)) return runner
  }
  return assert.fail("no runner has the partition")
}

/** The ids of all upserts in the log of the only partition, in its order, and the requests that they were for. */
const logOf = (directory: string) =>
  Effect.gen(function* () {
    const store = yield* ObjectStore
    const ids: Array<string> = []
    const requests: Array<string> = []
    for (const { key } of yield* store.list("collections/", { limit: 100_000 })) {
      if (!key.includes("/log/")) continue
      const { body } = yield* store.get(key)
      ids.push(...decodeSegment(body).ops.map(({ id }) => id))
      requests.push(...(decodeRequests(body)?.requests ?? []).map(({ id }) => id))
    }
    return { ids, requests }
  }).pipe(Effect.provide(FileObjectStore.layer({ directory })), Effect.runPromise)

const pause = (millis: number) => new Promise((resolve) => setTimeout(resolve, millis))
