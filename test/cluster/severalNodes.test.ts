/** What is one thing in a cluster of several processes: keys, invalidations, backups, the list of nodes, commands on its data. */
import { spawn } from "node:child_process"
import { join } from "node:path"
import { afterAll, assert, beforeAll, describe, it } from "@effect/vitest"
import { type Postgres, skipPostgres, startPostgres } from "../support/Postgres.ts"
import { ready, type ServerProcess, startServer, withDirectory } from "../support/ServerProcess.ts"

const main = new URL("../../src/main.ts", import.meta.url).pathname

const run = (words: ReadonlyArray<string>): Promise<{ readonly code: number | null; readonly text: string }> =>
  new Promise((resolve) => {
    let text = ""
    const child = spawn(process.execPath, [main, ...words], { stdio: ["ignore", "pipe", "pipe"] })
    child.stdout.on("data", (chunk: Buffer) => (text += chunk.toString()))
    child.stderr.on("data", (chunk: Buffer) => (text += chunk.toString()))
    child.once("close", (code) => resolve({ code, text }))
  })

const until = async (holds: () => Promise<boolean>, what: string | (() => string), millis = 40_000): Promise<void> => {
  const end = Date.now() + millis
  while (!(await holds())) {
    if (Date.now() > end) throw new Error(`not within ${millis} ms: ${typeof what === "string" ? what : what()}`)
    await new Promise((resolve) => setTimeout(resolve, 100))
  }
}

describe.skipIf(skipPostgres)("a cluster of several processes", () => {
  let postgres: Postgres
  beforeAll(async () => {
    postgres = await startPostgres()
  }, 60_000)
  const started: Array<ServerProcess> = []
  afterAll(() => postgres.stop())

  it("is one: keys, invalidations, deletions, backups, commands", { timeout: 240_000 }, () =>
    withDirectory(async (directory) => {
      try {
        const data = join(directory, "data")
        const backups = join(directory, "backup")
        const flags = (role: string) => [
          ...["--role", role, "--database-url", postgres.url, "--cell", "several", "--node-report-millis", "300"],
          ...["--backup-to", backups, "--backup-interval-millis", "500", "--key-refresh-millis", "1000"],
          ...["--catalogue-refresh-millis", "500"]
        ]
        const runners = await Promise.all([1, 2].map(() => startServer(data, flags("runner"))))
        const gateways = await Promise.all([1, 2].map(() => startServer(data, flags("gateway"))))
        started.push(...runners, ...gateways)
        const [one, two] = gateways as [ServerProcess, ServerProcess]
        await Promise.all(gateways.map(({ base }) => ready(base, 60_000)))

        const call = (node: ServerProcess, method: string, path: string, body?: unknown, key?: string) =>
          fetch(`${node.base}/api/v1${path}`, {
            method,
            headers: {
              ...(body === undefined ? {} : { "content-type": "application/json" }),
              ...(key === undefined ? {} : { authorization: `Bearer ${key}` })
            },
            ...(body === undefined ? {} : { body: JSON.stringify(body) })
          })
        const insert = (node: ServerProcess) =>
          call(node, "POST", "/insert", { collection: "c", vectors: [{ id: "a", vector: [1, 0] }] })

        // Both gateways have seen the collection before it changes.
        const made = { dimensions: 2, partitions: 2 }
        assert.strictEqual((await call(one, "PUT", "/collections/c", made)).status, 201)
        assert.strictEqual((await insert(one)).status, 200)
        const tags = async (node: ServerProcess) =>
          (await call(node, "GET", "/embed/a?collection=c")).headers.get("cache-tag")
        assert.match((await tags(two)) ?? "", /,g-[0-9a-f]+-0,/)

        // Invalidated by one, so for the other.
        assert.strictEqual((await call(one, "POST", "/collections/c/invalidate", { scope: "all" })).status, 200)
        await until(
          async () => /,g-[0-9a-f]+-1,/.test((await tags(two)) ?? ""),
          "the other gateway knows of the invalidation"
        )

        // A key that one makes is known to the other at once, and revoked there soon.
        const wanted = { name: "k", scopes: ["read"], tenant: "default" }
        const { key, id } = (await (await call(one, "POST", "/keys", wanted)).json()) as { key: string; id: string }
        assert.strictEqual((await call(two, "GET", "/collections", undefined, key)).status, 200)
        assert.strictEqual((await call(one, "DELETE", `/keys/${id}`)).status, 204)
        await until(
          async () => (await call(two, "GET", "/collections", undefined, key)).status === 401,
          "the other gateway knows that the key was revoked"
        )

        // Deleted and made anew by one: the other has the new one.
        const uid = async (node: ServerProcess) =>
          ((await (await call(node, "GET", "/collections/c")).json()) as { uid: string }).uid
        const before = await uid(two)
        assert.strictEqual((await call(one, "DELETE", "/collections/c")).status, 204)
        assert.strictEqual((await call(one, "PUT", "/collections/c", { dimensions: 2 })).status, 201)
        await until(async () => (await uid(two)) === (await uid(one)), "the other gateway has the new collection")
        assert.notStrictEqual(await uid(two), before)
        // A 503 says that it may be asked again.
        let refusal = ""
        await until(
          async () => {
            const answer = await insert(two)
            refusal = await answer.text()
            assert.include([200, 503], answer.status, refusal)
            return answer.status === 200
          },
          () => `an insert into the new collection: ${refusal}`
        )

        // One of the runners backs the cell up, and another when that one dies.
        const count = async (node: ServerProcess) => {
          const text = await (await fetch(`${node.base}/metrics`)).text()
          return Number(/^ruvector_backups(?:_total)?(?:\{[^}]*\})? (\d+)/m.exec(text)?.[1] ?? 0)
        }
        let duty: ServerProcess | undefined
        let backedUp = await Promise.all(runners.map(count))
        await until(async () => {
          const now = await Promise.all(runners.map(count))
          const more = now.map((n, i) => n - (backedUp[i] as number))
          if (Math.max(...more) < 2) return false
          // It moves when a runner has joined; of two that do it at once neither is ever the only one.
          backedUp = now
          if (Math.min(...more) === 0) duty = runners[more.indexOf(Math.max(...more))]
          return duty !== undefined
        }, "one runner alone backs the cell up")
        const other = runners.find((runner) => runner !== duty) as ServerProcess

        // Commands on the data while nodes use them.
        const verified = await run(["verify", "--data", data])
        assert.strictEqual(verified.code, 0, verified.text)
        const restored = await run(["restore", "--from", backups, "--data", data, "--collection", "c", "--as", "d"])
        assert.strictEqual(restored.code, 1, restored.text)
        assert.match(restored.text, /nodes of cell several use .*: stop all of them to restore into it/)
        const alone = await run(["serve", "--port", "0", "--data", data])
        assert.strictEqual(alone.code, 1)
        assert.match(alone.text, /belongs to the nodes of cell several/)

        // Seen by either gateway.
        const nodes = async (node: ServerProcess) => {
          const state = (await (await call(node, "GET", "/cluster")).json()) as {
            nodes: Array<{ role: string; health: string; shards: number; url: string; ready: boolean }>
          }
          return state.nodes
        }
        await until(async () => (await nodes(two)).every((node) => node.ready && node.url !== ""), "all have reported")
        const all = await nodes(one)
        assert.deepStrictEqual(
          all.map(({ role, health }) => `${role} ${health}`),
          ["gateway up", "gateway up", "runner up", "runner up"]
        )
        assert.strictEqual(
          all.reduce((sum, { shards }) => sum + shards, 0),
          600
        )

        await (duty as ServerProcess).stop("SIGKILL")
        await until(async () => (await count(other)) > 0, "the other runner backs the cell up")
        await until(
          async () => (await nodes(one)).some(({ role, health }) => role === "runner" && health === "silent"),
          "the dead runner is shown as silent"
        )
        await until(async () => (await insert(one)).status === 200, "an insert after the death of a runner")

        for (const node of [...gateways, other]) assert.strictEqual(await node.stop("SIGTERM"), 0)
      } finally {
        // Also where it has failed before it ended them.
        for (const node of started) if (node.process.exitCode === null) await node.stop("SIGKILL")
      }
    })
  )
})
