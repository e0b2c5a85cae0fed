/**
 * What is deleted is gone from everywhere: the object store, the local disk, Redis, the caches of the process. Looked for
 * by a word that only the deleted records hold, in every file and in every value of Redis.
 */
import { readdir, readFile } from "node:fs/promises"
import { join } from "node:path"
import { assert, describe, it } from "@effect/vitest"
import { Redis } from "ioredis"
import { type RedisServer, skipRedis, startRedis } from "../support/RedisServer.ts"
import { ready, type ServerProcess, withDirectory } from "../support/ServerProcess.ts"
import { startFailingServer, tell } from "./failingServer.ts"

// The log goes with the snapshots that need it: nothing more is kept of it for followers of changes.
const flags = [
  "--snapshot-ops",
  "100",
  "--snapshot-share-percent",
  "1",
  "--snapshot-idle-millis",
  "100",
  "--change-retention-millis",
  "0"
]
const dimensions = 8
const records = 30

describe("deletion", () => {
  it("of a collection: it and its objects are gone from all tiers, also after a kill", { timeout: 120_000 }, () =>
    withTiers(async ({ data, redis, start }) => {
      let server = await start()
      await put(server, "gone", 2)
      await put(server, "kept", 1)
      const { uid } = (await ask(server, "GET", "/api/v1/collections/gone")).body as { uid: string }
      await insert(server, "gone", "word-of-the-gone")
      await insert(server, "kept", "word-of-the-kept")
      await readAll(server, "gone")
      await eventually(async () => {
        const files = await filesHolding(data, "word-of-the-gone")
        assert.isTrue(
          files.some((file) => file.includes("/snapshot/")),
          "it is in a snapshot"
        )
        assert.isTrue(
          files.some((file) => file.includes("/log/")),
          "and in the log"
        )
      })
      if (redis !== undefined) {
        await eventually(async () => {
          // Records go there where they are read for the first time after they were written.
          await readAll(server, "gone")
          assert.isNotEmpty(await valuesHolding(redis, "word-of-the-gone"))
        })
      }
      assert.strictEqual((await ask(server, "DELETE", "/api/v1/collections/gone")).status, 204)
      const nothing = async () => {
        assert.deepStrictEqual(await filesHolding(data, "word-of-the-gone"), [])
        assert.deepStrictEqual(
          (await allFiles(data)).filter((file) => file.includes(uid)),
          [],
          "files under the name of the deleted collection"
        )
        if (redis !== undefined) {
          assert.deepStrictEqual(await valuesHolding(redis, "word-of-the-gone"), [])
          assert.deepStrictEqual(await keysNaming(redis, uid), [])
        }
        for (const [method, path, body] of [
          ["GET", "/api/v1/collections/gone", undefined],
          ["GET", "/api/v1/embed/gone-0?collection=gone", undefined],
          ["GET", "/api/v1/search?collection=gone&query_vector_id=gone-0", undefined],
          ["POST", "/api/v1/search", { collection: "gone", query: vector(0) }]
        ] as const) {
          assert.strictEqual((await ask(server, method, path, body)).status, 404, `${method} ${path}`)
        }
      }
      await nothing()
      await server.stop("SIGKILL")
      server = await start()
      await nothing()
      // One of the same name is another one.
      await put(server, "gone", 2)
      for (let i = 0; i < records; i++) {
        assert.strictEqual((await ask(server, "GET", `/api/v1/embed/gone-${i}?collection=gone`)).status, 404)
      }
      assert.lengthOf(await search(server, "gone"), 0)
      assert.lengthOf(await search(server, "kept"), records)
      assert.strictEqual(await server.stop("SIGTERM"), 0)
    })
  )

  it("of a vector: what it held is gone from all tiers once snapshots have passed", { timeout: 120_000 }, () =>
    withTiers(async ({ data, redis, start }) => {
      const server = await start()
      await put(server, "c", 1)
      await insert(server, "c", "word-of-the-others")
      const body = { id: "c-0", vector: vector(0), metadata: { word: "word-of-the-deleted" } }
      await ask(server, "POST", "/api/v1/insert", { collection: "c", vectors: [body] })
      await readAll(server, "c")
      await eventually(async () => {
        const files = await filesHolding(data, "word-of-the-deleted")
        assert.isTrue(files.some((file) => file.includes("/snapshot/")))
      })
      assert.strictEqual((await ask(server, "DELETE", "/api/v1/vectors/c-0?collection=c")).status, 204)
      assert.strictEqual((await ask(server, "GET", "/api/v1/embed/c-0?collection=c")).status, 404)
      assert.isFalse((await search(server, "c")).includes("c-0"))
      // No warm copy outlives the acknowledgement.
      if (redis !== undefined) assert.deepStrictEqual(await valuesHolding(redis, "word-of-the-deleted"), [])
      // Pruning waits for the leases of earlier owners, by the clock that is put forward here.
      await tell(server, { monotonicMillis: 60_000 })
      await eventually(async () => {
        await insert(server, "c", "word-of-the-others", 1)
        await pause(300)
        assert.deepStrictEqual(await filesHolding(data, "word-of-the-deleted"), [])
      })
      if (redis !== undefined) assert.deepStrictEqual(await valuesHolding(redis, "word-of-the-deleted"), [])
      assert.strictEqual((await ask(server, "GET", "/api/v1/embed/c-0?collection=c")).status, 404)
      assert.lengthOf(await search(server, "c"), records - 1)
      assert.strictEqual(await server.stop("SIGTERM"), 0)
    })
  )
})

interface Tiers {
  readonly data: string
  /** Without Redis installed, the warm tier is in the server's memory. */
  readonly redis: Redis | undefined
  readonly start: () => Promise<ServerProcess>
}

const withTiers = (use: (tiers: Tiers) => Promise<void>): Promise<void> =>
  withDirectory(async (data) => {
    const server: RedisServer | undefined = skipRedis ? undefined : await startRedis()
    const redis = server === undefined ? undefined : new Redis(server.url)
    let running: ServerProcess | undefined
    const start = async () => {
      const warm = server === undefined ? [] : ["--redis-url", server.url]
      running = await startFailingServer(data, [...flags, ...warm])
      await ready(running.base)
      return running
    }
    try {
      await use({ data, redis, start })
    } finally {
      if (running?.process.exitCode === null && running.process.signalCode === null) await running.stop("SIGKILL")
      redis?.disconnect()
      await server?.stop()
    }
  })

const vector = (i: number): ReadonlyArray<number> => Array.from({ length: dimensions }, (_, d) => Math.sin(i * 7 + d))

const put = async (server: ServerProcess, name: string, partitions: number) => {
  assert.strictEqual((await ask(server, "PUT", `/api/v1/collections/${name}`, { dimensions, partitions })).status, 201)
}

const insert = async (server: ServerProcess, collection: string, word: string, from = 0) => {
  const vectors = Array.from({ length: records - from }, (_, i) => ({
    id: `${collection}-${from + i}`,
    vector: vector(from + i),
    metadata: { word }
  }))
  assert.strictEqual((await ask(server, "POST", "/api/v1/insert", { collection, vectors })).status, 200)
}

/** By id and by search, so that every cache has seen it. */
const readAll = async (server: ServerProcess, collection: string) => {
  for (let i = 0; i < records; i++) {
    assert.strictEqual(
      (await ask(server, "GET", `/api/v1/embed/${collection}-${i}?collection=${collection}`)).status,
      200
    )
  }
  const path = `/api/v1/search?collection=${collection}&query_vector_id=${collection}-0&include=metadata`
  assert.strictEqual((await ask(server, "GET", path)).status, 200)
}

const search = async (server: ServerProcess, collection: string): Promise<ReadonlyArray<string>> => {
  const { body } = await ask(server, "POST", "/api/v1/search", { collection, query: vector(0), k: records })
  return (body as { results: ReadonlyArray<{ vector_id: string }> }).results.map(({ vector_id }) => vector_id)
}

const ask = async (server: ServerProcess, method: string, path: string, body?: unknown) => {
  const sent = body === undefined ? {} : { headers: { "content-type": "application/json" }, body: JSON.stringify(body) }
  const response = await fetch(`${server.base}${path}`, { method, ...sent })
  const text = await response.text()
  return { status: response.status, body: text === "" ? undefined : (JSON.parse(text) as unknown) }
}

const allFiles = async (folder: string): Promise<ReadonlyArray<string>> => {
  for (let tries = 1; ; tries++) {
    try {
      return (await readdir(folder, { recursive: true, withFileTypes: true }))
        .filter((file) => file.isFile())
        .map((file) => join(file.parentPath, file.name))
    } catch (error) {
      // A folder may be removed while it is looked at: then it is looked at anew.
      if ((error as NodeJS.ErrnoException).code !== "ENOENT" || tries === 20) throw error
    }
  }
}

const filesHolding = async (folder: string, word: string): Promise<ReadonlyArray<string>> => {
  const found: Array<string> = []
  for (const file of await allFiles(folder)) {
    // A file may be removed while it is looked at.
    const content = await readFile(file).catch(() => undefined)
    if (content?.includes(word)) found.push(file)
  }
  return found
}

const keysNaming = async (redis: Redis, word: string): Promise<ReadonlyArray<string>> =>
  (await redis.keys("*")).filter((key) => key.includes(word))

const valuesHolding = async (redis: Redis, word: string): Promise<ReadonlyArray<string>> => {
  const found: Array<string> = []
  for (const key of await redis.keys("*")) {
    const value = await redis.dumpBuffer(key)
    if (value?.includes(word)) found.push(key)
  }
  return found
}

const eventually = async (check: () => Promise<void>) => {
  for (let attempt = 0; ; attempt++) {
    try {
      return await check()
    } catch (error) {
      if (attempt === 100) throw error
      await pause(100)
    }
  }
}

const pause = (millis: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, millis))
