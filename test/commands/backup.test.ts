/** The whole chain through processes: a node that backs itself up is killed, its data are lost, and are restored. */
import { spawn } from "node:child_process"
import { readdir, readFile, rm, writeFile } from "node:fs/promises"
import { join } from "node:path"
import { assert, describe, it } from "@effect/vitest"
import { startFakeGcs, withoutFakeGcs } from "../support/FakeGcs.ts"
import { ready, type ServerProcess, startServer, withDirectory } from "../support/ServerProcess.ts"

const main = new URL("../../src/main.ts", import.meta.url).pathname

describe("backup, restore, verify and drill", () => {
  it("a node killed, its directory deleted: all that was backed up is back", { timeout: 120_000 }, () =>
    withDirectory(async (directory) => {
      const data = join(directory, "data")
      const place = join(directory, "backup")
      const flags = ["--backup-to", place, "--backup-interval-millis", "200"]
      const server = await startServer(data, flags)
      await ready(server.base)
      await insert(server, 0, 60)
      await insert(server, 60, 120)
      const atMillis = await laterThan(Date.now())
      assert.strictEqual((await post(server, "/api/v1/delete", { collection: "c", ids: ["id-3"] })).status, 200)
      await insert(server, 200, 205)
      const wantedMillis = Date.now()
      await backedUp(server, wantedMillis)

      const busy = await run(["backup", "--data", data, "--to", place])
      assert.strictEqual(busy.code, 1)
      assert.match(busy.stderr, new RegExp(`^ruvector: a node uses .* \\(process ${server.pid}\\)[^\\n]*\\n$`))
      await server.stop("SIGKILL")
      await rm(data, { recursive: true })

      const verified = await run(["verify", "--from", place, "--deep"])
      assert.strictEqual(verified.code, 0, verified.stdout + verified.stderr)
      assert.match(verified.stdout, /: 0 damaged\nCan be restored:\n {2}c \([0-9a-f]{16}\): 20\S+ to 20\S+\n/)

      // A node on an empty directory does not take the backup for its own.
      const empty = await startServer(join(directory, "empty"), flags)
      await ready(empty.base)
      await until(() => /The backup failed/.test(empty.output()))
      await empty.stop("SIGKILL")

      const latest = await run(["restore", "--from", place, "--data", data])
      assert.strictEqual(latest.code, 0, latest.stderr)
      const then = await run([
        "restore",
        "--from",
        place,
        "--data",
        data,
        "--at",
        String(atMillis),
        "--collection",
        "c",
        "--as",
        "then"
      ])
      assert.strictEqual(then.code, 0, then.stderr)
      assert.match(then.stdout, /^Restored 1 collection\(s\) into .*\n {2}then \(was c\): /)
      assert.strictEqual((await run(["verify", "--data", data, "--deep"])).code, 0)

      const restored = await startServer(data)
      await ready(restored.base)
      assert.strictEqual(await count(restored, "c"), 124)
      assert.strictEqual(await count(restored, "then"), 120)
      assert.strictEqual((await get(restored, "c", "id-3")).status, 404)
      for (let i = 0; i < 120; i++) {
        const { vector, metadata } = (await (await get(restored, "then", `id-${i}`)).json()) as Stored
        assert.deepStrictEqual({ vector, metadata }, { vector: vectorOf(i), metadata: { i } })
      }
      assert.strictEqual(await restored.stop("SIGTERM"), 0)

      // Into the same place again: the restored collections have taken the place of the lost ones.
      const again = await run(["backup", "--data", data, "--to", place])
      assert.strictEqual(again.code, 0, again.stderr)
      const drilled = await run(["drill", "--from", place])
      assert.strictEqual(drilled.code, 0, drilled.stdout + drilled.stderr)
      assert.match(drilled.stdout, /^Drill of .*: good\n/)
      assert.match(drilled.stdout, /\n {2}c: 124 vectors, 124 compared, 20 searches, recall@10 1\.000\n/)
      assert.match(drilled.stdout, /\n {2}RPO [\d.]+ s: .*\n {2}RTO [\d.]+ s: /)

      for (const [words, pattern] of [
        [["--data", data], /^ruvector: the target holds collections already[^\n]*\n$/],
        [
          ["--data", join(directory, "new"), "--at", "2000-01-01T00:00:00Z"],
          /^ruvector: [^\n]* is before what the backup holds: [^\n]*\n$/
        ],
        [["--data", join(directory, "new"), "--at", "yesterday"], /^ruvector: --at: expected a time [^\n]*\n$/]
      ] as const) {
        const refused = await run(["restore", "--from", place, ...words])
        assert.strictEqual(refused.code, 1)
        assert.match(refused.stderr, pattern)
      }

      // One flipped bit in a pack of log is found, and named.
      const log = (await readdir(place, { recursive: true })).find((name) => /\/log\/[^/]+$/.test(name)) as string
      const bytes = await readFile(join(place, log))
      bytes.writeUInt8(bytes.readUInt8(bytes.length >> 1) ^ 1, bytes.length >> 1)
      await writeFile(join(place, log), bytes)
      const damaged = await run(["verify", "--from", place])
      assert.strictEqual(damaged.code, 1)
      assert.include(damaged.stdout, `damaged: ${log}: position `)
    })
  )
})

describe.skipIf(withoutFakeGcs())("backup, restore, verify and drill with buckets", () => {
  it(
    "a node on a bucket backs itself up into another, from which a bucket and a directory come back",
    {
      timeout: 120_000
    },
    () =>
      withDirectory(async (directory) => {
        const gcs = await startFakeGcs()
        try {
          for (const name of ["data-bucket", "backup-bucket", "new-bucket"]) await gcs.createBucket(name)
          const environment = { STORAGE_EMULATOR_HOST: gcs.url }
          const data = "gs://data-bucket/node"
          const place = "gs://backup-bucket/of/node"
          const cache = (name: string) => ["--cache-dir", join(directory, name)]
          const flags = ["--backup-to", place, "--backup-interval-millis", "200"]
          const server = await startServer(data, [...flags, ...cache("one")], environment)
          await ready(server.base)
          await insert(server, 0, 60)
          await backedUp(server, Date.now())
          const again = await run(["backup", "--data", data, "--to", "gs://backup-bucket/by-hand"], environment)
          assert.strictEqual(again.code, 0, again.stderr)
          await server.stop("SIGKILL")

          for (const from of [place, "gs://backup-bucket/by-hand"]) {
            const verified = await run(["verify", "--from", from, "--deep"], environment)
            assert.strictEqual(verified.code, 0, verified.stdout + verified.stderr)
          }
          const bucket = "gs://new-bucket/restored"
          const target = join(directory, "data")
          for (const into of [bucket, target]) {
            const restored = await run(["restore", "--from", place, "--data", into], environment)
            assert.strictEqual(restored.code, 0, restored.stderr)
            assert.include(restored.stdout, `into ${into} in `)
          }
          assert.strictEqual((await run(["verify", "--data", bucket, "--deep"], environment)).code, 0)
          for (const [into, name] of [
            [bucket, "two"],
            [target, "three"]
          ] as const) {
            const node = await startServer(into, cache(name), environment)
            await ready(node.base)
            assert.strictEqual(await count(node, "c"), 60)
            for (let i = 0; i < 60; i += 7) {
              const { vector, metadata } = (await (await get(node, "c", `id-${i}`)).json()) as Stored
              assert.deepStrictEqual({ vector, metadata }, { vector: vectorOf(i), metadata: { i } })
            }
            assert.strictEqual(await node.stop("SIGTERM"), 0)
          }
          const drilled = await run(["drill", "--from", place], environment)
          assert.strictEqual(drilled.code, 0, drilled.stdout + drilled.stderr)

          for (const [words, pattern] of [
            [["backup", "--data", data, "--to", "gs://data-bucket/node/backup"], /lies in the data bucket's prefix/],
            [["backup", "--data", data, "--to", "gs://data-bucket"], /lies in the data bucket's prefix/],
            [["backup", "--data", "gs://data-bucket/none", "--to", place], /^ruvector: there are no data in gs:/],
            [["verify", "--from", "gs://new-bucket/none"], /^ruvector: there is no backup in gs:/],
            [["verify", "--from", "gs://no-such-bucket"], /^ruvector: the backup gs:[^\n]* cannot be opened: /],
            [["verify", "--from", "s3://bucket"], /expected a directory or gs:/],
            [["restore", "--from", place, "--data", bucket], /^ruvector: the target holds collections already/]
          ] as const) {
            const refused = await run(words, environment)
            assert.strictEqual(refused.code, 1)
            assert.match(refused.stderr, pattern)
            assert.strictEqual(refused.stderr.trim().split("\n").length, 1, refused.stderr)
          }
        } finally {
          await gcs.stop()
        }
      })
  )
})

interface Stored {
  readonly vector: ReadonlyArray<number>
  readonly metadata: unknown
}

const run = (
  words: ReadonlyArray<string>,
  environment: Readonly<Record<string, string>> = {}
): Promise<{ readonly code: number | null; readonly stdout: string; readonly stderr: string }> =>
  new Promise((resolve) => {
    const child = spawn(process.execPath, [main, ...words], {
      stdio: ["ignore", "pipe", "pipe"],
      env: { ...process.env, ...environment }
    })
    let stdout = ""
    let stderr = ""
    child.stdout.on("data", (chunk: Buffer) => (stdout += chunk.toString()))
    child.stderr.on("data", (chunk: Buffer) => (stderr += chunk.toString()))
    // One that does not end must not outlive the test.
    const late = setTimeout(() => child.kill("SIGKILL"), 60_000)
    child.once("close", (code) => {
      clearTimeout(late)
      resolve({ code, stdout, stderr })
    })
  })

const vectorOf = (i: number): ReadonlyArray<number> => [i + 1, 0.5, 3 - i, 2]

const insert = async (server: ServerProcess, from: number, to: number) => {
  const vectors = Array.from({ length: to - from }, (_, n) => ({
    id: `id-${from + n}`,
    vector: vectorOf(from + n),
    metadata: { i: from + n }
  }))
  assert.strictEqual((await post(server, "/api/v1/insert", { collection: "c", vectors })).status, 200)
}

const post = async (server: ServerProcess, path: string, body: unknown): Promise<Response> => {
  if (path.endsWith("insert")) {
    await fetch(`${server.base}/api/v1/collections/c`, {
      method: "PUT",
      body: JSON.stringify({ dimensions: 4, partitions: 2, metric: "l2" }),
      headers: { "content-type": "application/json" }
    })
  }
  return fetch(`${server.base}${path}`, {
    method: "POST",
    body: JSON.stringify(body),
    headers: { "content-type": "application/json" }
  })
}

const get = (server: ServerProcess, collection: string, id: string) =>
  fetch(`${server.base}/api/v1/embed/${id}?collection=${collection}`)

const count = async (server: ServerProcess, collection: string): Promise<unknown> =>
  ((await (await fetch(`${server.base}/api/v1/collections/${collection}`)).json()) as { readonly count?: number }).count

/** Waits until the node says that its backup reaches beyond a time. */
const backedUp = (server: ServerProcess, millis: number) =>
  until(async () => {
    const metrics = await (await fetch(`${server.base}/metrics`)).text()
    return Number(/^ruvector_backup_horizon_seconds(?:\{[^}]*\})? (\S+)$/m.exec(metrics)?.[1] ?? 0) * 1_000 > millis
  })

const until = async (holds: () => boolean | Promise<boolean>): Promise<void> => {
  for (let n = 0; n < 600; n++) {
    if (await holds()) return
    await new Promise((resolve) => setTimeout(resolve, 50))
  }
  assert.fail("it did not come to pass in 30 s")
}

const laterThan = async (millis: number): Promise<number> => {
  while (Date.now() <= millis + 2) await new Promise((resolve) => setTimeout(resolve, 1))
  return millis + 1
}
