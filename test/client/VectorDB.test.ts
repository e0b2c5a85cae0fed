/** The client against a real node: what each call does, and what it does in trouble. */
import { mkdtemp, rm } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { afterAll, assert, beforeAll, describe, it } from "@effect/vitest"
import { Schema } from "effect"
import { VectorDB, VectorDBError, type VectorDBOptions, type WebSocketLike } from "../../src/client/index.ts"
import { VectorDB as EmbeddedDB } from "../../src/index.ts"
import { type RunningNode, startNode } from "../support/Node.ts"
import { startTcpProxy } from "../support/TcpProxy.ts"

const failure = async (promise: Promise<unknown>): Promise<VectorDBError> => {
  try {
    await promise
  } catch (error) {
    assert.instanceOf(error, VectorDBError)
    return error
  }
  return assert.fail("it did not reject")
}

const collect = async <A>(items: AsyncIterable<A>): Promise<Array<A>> => {
  const all: Array<A> = []
  for await (const item of items) all.push(item)
  return all
}

describe.each(["over a WebSocket", "over HTTP", "embedded"] as const)("VectorDB, %s", (how) => {
  let node: RunningNode | undefined
  let directory = ""
  let db: VectorDB
  /** Another client of the same data. */
  const another = <M>(options: Pick<VectorDBOptions<M>, "collection" | "metadata">): Promise<VectorDB<M>> =>
    node === undefined
      ? EmbeddedDB.open({ path: directory, ...options })
      : Promise.resolve(new VectorDB({ endpoint: node.base, streaming: how === "over a WebSocket", ...options }))
  beforeAll(async () => {
    if (how === "embedded") directory = await mkdtemp(join(tmpdir(), "ruvector-embedded-"))
    else node = await startNode()
    db = await another({})
  })
  afterAll(async () => {
    await db.close()
    await node?.stop()
    if (directory !== "") await rm(directory, { recursive: true })
  })

  it("inserts, gets, updates, searches and deletes", async () => {
    await db.insert("a", [1, 0, 0], { metadata: { type: "task", status: "pending" } })
    await db.insert("b", Float32Array.of(0.8, 0.6, 0), { metadata: { type: "task" } })
    await db.insert("c", [0, 0, 1], { metadata: { type: "note" } })
    const stored = await db.get("a")
    assert.deepStrictEqual(
      { ...stored, version: "" },
      { id: "a", vector: Float32Array.of(1, 0, 0), metadata: { type: "task", status: "pending" }, version: "" }
    )
    assert.isUndefined(await db.get("none"))

    await db.update("a", { metadata: { status: "completed", result: { n: 1 } } })
    const hits = await db.search([1, 0, 0], { k: 10, filter: { type: "task" } })
    assert.deepStrictEqual(
      hits.map(({ id, metadata }) => ({ id, metadata })),
      [
        { id: "a", metadata: { type: "task", status: "completed", result: { n: 1 } } },
        { id: "b", metadata: { type: "task" } }
      ]
    )
    assert.deepStrictEqual(hits.missingPartitions, [])
    assert.closeTo(hits[1]?.score ?? 0, 0.8, 1e-6)

    const streamed = await collect(db.searchStream({ id: "b" }, { k: 2, includeVector: true }))
    assert.deepStrictEqual(
      streamed.map(({ id }) => id),
      ["b", "a"]
    )
    assert.deepStrictEqual(streamed[1]?.vector, Float32Array.of(1, 0, 0))

    await db.update("c", { vector: [0, 1, 0], metadata: { type: "moved" } })
    assert.deepStrictEqual((await db.get("c"))?.vector, Float32Array.of(0, 1, 0))
    assert.strictEqual(await db.delete(["a", "none"]), 1)
    assert.strictEqual(await db.delete("b"), 1)
    assert.deepStrictEqual(
      (await db.search([1, 0, 0])).map(({ id }) => id),
      ["c"]
    )
  })

  it("makes, lists and deletes collections", async () => {
    const made = await db.collections.create("books", { dimensions: 2, metric: "l2", partitions: 3 })
    assert.deepStrictEqual([made.name, made.metric, made.partitions], ["books", "l2", 3])
    await db.insert("x", [1, 2], { collection: "books" })
    assert.strictEqual((await db.collections.get("books"))?.count, 1)
    assert.include(
      (await db.collections.list()).map(({ name }) => name),
      "books"
    )
    assert.strictEqual(await db.collections.delete("books"), true)
    assert.strictEqual(await db.collections.delete("books"), false)
    assert.isUndefined(await db.collections.get("books"))
  })

  it("inserts many from a source of any kind, taking no more of it than is under way", async () => {
    await db.collections.create("many", { dimensions: 4 })
    let taken = 0
    let most = 0
    let done = 0
    const source = async function* () {
      for (let i = 0; i < 2_000; i++) {
        taken += 1
        most = Math.max(most, taken - done)
        yield { id: `m${i}`, vector: [i + 1, 1, 2, 3] }
      }
    }
    const counting = {
      [Symbol.asyncIterator]: () => {
        const inner = source()
        return { next: () => inner.next(), return: () => inner.return() }
      }
    }
    const poll = setInterval(() => {
      void db.collections.get("many").then((info) => (done = info?.count ?? done))
    }, 5)
    assert.strictEqual(await db.insertMany(counting, { collection: "many", batchSize: 100, concurrency: 2 }), 2_000)
    clearInterval(poll)
    assert.strictEqual((await db.collections.get("many"))?.count, 2_000)
    assert.isBelow(most, 2_000)
    const array = Array.from({ length: 30 }, (_, i) => ({ id: `m${i}`, vector: [1, 1, 1, i + 1] }))
    assert.strictEqual(await db.insertMany(array, { collection: "many" }), 30)
  })

  it("rejects with typed errors that name what was wrong", async () => {
    await db.collections.create("typed", { dimensions: 3 })
    const wrong = await failure(db.search([1, 2], { collection: "typed" }))
    assert.deepStrictEqual([wrong.code, wrong.status, wrong.field], ["invalid_input", 400, "query"])
    const missing = await failure(db.search([1, 2, 3], { collection: "nowhere" }))
    assert.deepStrictEqual([missing.code, missing.status], ["collection_not_found", 404])
    const ragged = await failure(
      db.insertMany(
        [
          { id: "1", vector: [1, 2, 3] },
          { id: "2", vector: [1, 2] }
        ],
        { collection: "typed" }
      )
    )
    assert.deepStrictEqual([ragged.code, ragged.field], ["invalid_input", "vectors[1].vector"])
    assert.strictEqual(
      (await failure(db.update("none", { metadata: {} }, { collection: "typed" }))).code,
      "vector_not_found"
    )
    assert.strictEqual((await failure(collect(db.searchStream([1], { collection: "typed" })))).code, "invalid_input")
  })

  it("checks metadata by the schema given, in and out", async () => {
    await db.collections.create("schema", { dimensions: 2 })
    await db.insert("old", [1, 0], { collection: "schema", metadata: { kind: "other" } })
    // A directory is one engine's.
    if (how === "embedded") await db.close()
    const typed = await another({
      collection: "schema",
      metadata: Schema.toStandardSchemaV1(Schema.Struct({ type: Schema.String, n: Schema.optionalKey(Schema.Int) }))
    })
    await typed.insert("a", [1, 0], { metadata: { type: "task", n: 3 } })
    const found = await typed.get("a")
    const n: number | undefined = found?.metadata.n
    assert.strictEqual(n, 3)
    const refused = await failure(typed.insert("b", [1, 0], { metadata: { type: "task", n: 1.5 } }))
    assert.deepStrictEqual([refused.code, refused.field], ["invalid_metadata", "metadata.n"])
    assert.isUndefined(await typed.get("b"))
    assert.strictEqual((await failure(typed.get("old"))).code, "invalid_metadata")
    assert.strictEqual((await failure(collect(typed.searchStream([1, 0])))).code, "invalid_metadata")
    await typed.close()
    if (how === "embedded") db = await another({})
  })

  it("ends a call by its signal, and a loop by leaving it", async () => {
    const before = new AbortController()
    before.abort(new Error("not wanted"))
    await db.insert("s1", [1, 0, 0]).catch(() => {})
    const rejected = await db.search([1, 0, 0], { signal: before.signal }).then(
      () => undefined,
      (error: unknown) => error
    )
    assert.strictEqual((rejected as Error).message, "not wanted")
    const during = new AbortController()
    const searching = db.search([1, 0, 0], { signal: during.signal })
    during.abort(new Error("changed my mind"))
    const ended = await searching.then(
      () => "answered",
      (error: Error) => error.message
    )
    // An engine that does nothing else answers within the call, before anybody can change his mind.
    if (how !== "embedded" || ended !== "answered") assert.strictEqual(ended, "changed my mind")
    await db.insert("s2", [0.2, 0.7, 0.7])
    for await (const { id } of db.searchStream([0.2, 0.7, 0.7], { k: 3 })) {
      assert.strictEqual(id, "s2")
      break
    }
    assert.isNotEmpty(await db.search([0, 1, 0]))
  })

  it("is closed for good", async () => {
    if (how === "embedded") await db.close()
    const other = await another({})
    await other.search([1, 0, 0]).catch(() => {})
    const late = how === "over HTTP" ? undefined : other.search([1, 0, 0]).catch((error: VectorDBError) => error)
    await other.close()
    await late
    assert.strictEqual((await failure(other.search([1, 0, 0]))).code, "closed")
    assert.strictEqual((await failure(other.get("a"))).code, "closed")
    assert.strictEqual((await failure(collect(other.searchStream([1, 0, 0])))).code, "closed")
    if (how === "embedded") db = await another({})
  })
})

describe("VectorDB in trouble", () => {
  it.each(["over a WebSocket", "over HTTP"])(
    "does once what it repeats because the answer was lost, %s",
    async (how) => {
      const node = await startNode()
      const other = new VectorDB({ endpoint: node.base })
      let lose = false
      /** What somebody else does before the client tries again. */
      const between = () => other.insert("a", [0, 1], { metadata: { by: "other" } })
      const lost = async (): Promise<boolean> => {
        if (!lose) return false
        lose = false
        await between()
        return true
      }
      const db = new VectorDB({
        endpoint: node.base,
        streaming: how === "over a WebSocket",
        reconnectBaseMillis: 5,
        fetch: async (input, init) => {
          const response = await fetch(input, init)
          if (init?.method !== "GET" && (await lost())) throw new TypeError("the answer is lost")
          return response
        },
        webSocket: (url, protocols) => {
          const socket = new WebSocket(url, [...protocols]) as unknown as WebSocketLike
          return new Proxy(socket, {
            get: (target, name) => {
              const value: unknown = Reflect.get(target, name)
              return typeof value === "function" ? value.bind(target) : value
            },
            set: (target, name, value: (message: { data: unknown }) => void) => {
              if (name !== "onmessage") return Reflect.set(target, name, value)
              target.onmessage = async (message) => {
                if (String(message.data).includes("inserted") && (await lost())) socket.close()
                else value(message)
              }
              return true
            }
          })
        }
      })
      const metadataOf = async (id: string) => (await other.get(id))?.metadata
      lose = true
      await db.insert("a", [1, 0], { metadata: { by: "client" } })
      assert.isFalse(lose)
      assert.deepStrictEqual(await metadataOf("a"), { by: "other" })
      lose = true
      await db.update("a", { metadata: { by: "client" } })
      assert.deepStrictEqual(await metadataOf("a"), { by: "other" })
      lose = true
      assert.strictEqual(await db.delete("a"), 1)
      assert.deepStrictEqual(await metadataOf("a"), { by: "other" })
      // Two calls are two writes, unless they have one key.
      await db.delete("a")
      assert.isUndefined(await metadataOf("a"))
      for (let call = 0; call < 2; call++) {
        await db.insert("a", [1, 0], { idempotencyKey: "order 7" })
        await other.delete("a")
      }
      assert.isUndefined(await metadataOf("a"))
      await db.insert("a", [1, 0])
      assert.deepStrictEqual(await metadataOf("a"), {})
      await db.close()
      await other.close()
      await node.stop()
    }
  )

  it("repeats what a cut connection left unanswered: no insert lost, every call answered", {
    timeout: 30_000
  }, async () => {
    const node = await startNode()
    const proxy = await startTcpProxy(node.port)
    const db = new VectorDB({
      endpoint: `http://127.0.0.1:${proxy.port}`,
      reconnectBaseMillis: 5,
      deadlineMillis: 20_000
    })
    await db.collections.create("cut", { dimensions: 3, partitions: 2 })
    // As often as that, so that a slow machine comes to an end as well.
    const cuts = setInterval(() => (proxy.cuts() < 12 ? proxy.cut() : clearInterval(cuts)), 150)
    const calls: Array<Promise<unknown>> = []
    for (let i = 0; i < 400; i++) {
      calls.push(db.insert(`i${i}`, [i + 1, 1, 0], { collection: "cut", metadata: { i } }))
      calls.push(collect(db.searchStream([1, 1, 0], { collection: "cut", k: 5 })))
      if (i % 10 === 0) await new Promise((resolve) => setTimeout(resolve, 30))
    }
    await Promise.all(calls)
    clearInterval(cuts)
    assert.isAbove(proxy.cuts(), 5)
    assert.strictEqual((await db.collections.get("cut"))?.count, 400)
    for (let i = 0; i < 400; i += 37)
      assert.deepStrictEqual((await db.get(`i${i}`, { collection: "cut" }))?.metadata, { i })
    await db.close()
    await proxy.close()
    await node.stop()
  })

  it("waits for a node that is not there yet, and says so at its deadline", async () => {
    const node = await startNode()
    const { port, base } = node
    await node.stop()
    const db = new VectorDB({ endpoint: base, deadlineMillis: 300, waitingMax: 2, reconnectBaseMillis: 10 })
    const calls = [db.search([1]), db.search([1]), db.search([1])].map(failure)
    assert.deepStrictEqual(
      (await Promise.all(calls)).map(({ code }) => code),
      ["disconnected", "disconnected", "queue_full"]
    )
    assert.strictEqual((await failure(db.get("a"))).code, "disconnected")
    const waiting = db.search([1, 0], { collection: "none", deadlineMillis: 10_000 })
    const again = await startNode({ port })
    assert.strictEqual((await failure(waiting)).code, "collection_not_found")
    await db.close()
    await again.stop()
  })

  it("goes to the nearest endpoint, elsewhere when that is gone, and back when it is well again", {
    timeout: 30_000
  }, async () => {
    const near = await startNode({ region: "near" })
    const far = await startNode({ region: "far" })
    const slow = await startTcpProxy(far.port, { delayMillis: 30 })
    const asked: Array<string> = []
    const db = new VectorDB({
      endpoint: [`http://127.0.0.1:${slow.port}`, near.base],
      region: "auto",
      probeIntervalMillis: 100,
      reconnectBaseMillis: 10,
      fetch: (input, init) => {
        asked.push(String(input))
        return fetch(input, init)
      }
    })
    await Promise.all([near, far].map(({ base }) => new VectorDB({ endpoint: base }).insert("x", [1, 0])))
    const where = async () => {
      await db.search([1, 0])
      await db.get("x")
      return asked.findLast((url) => url.includes("/embed/"))?.startsWith(near.base) === true ? "near" : "far"
    }
    assert.strictEqual(await where(), "near")
    await near.stop()
    assert.strictEqual(await where(), "far")
    const back = await startNode({ region: "near", port: near.port })
    await new VectorDB({ endpoint: back.base }).insert("x", [1, 0])
    let place = ""
    for (let n = 0; n < 100 && place !== "near"; n++) {
      await new Promise((resolve) => setTimeout(resolve, 50))
      place = await where()
    }
    assert.strictEqual(place, "near")
    await db.close()
    await slow.close()
    await back.stop()
    await far.stop()
  })

  it("refuses options out of their bound, by name", () => {
    for (const [options, says] of [
      [{ endpoint: [] }, /^endpoint: /],
      [{ endpoint: "ftp://x" }, /^endpoint: .*"ftp:\/\/x"/],
      [{ endpoint: "http://x", deadlineMillis: 0 }, /^deadlineMillis: /],
      [{ endpoint: "http://x", inFlightMax: Number.NaN }, /^inFlightMax: /]
    ] as const) {
      assert.throws(() => new VectorDB(options), says)
    }
  })
})

describe("VectorDB.open", () => {
  it.each(["databaseUrl", "directoryUrl"] as const)("stands alone: %s is refused", async (name) => {
    const path = join(tmpdir(), "ruvector-never-made")
    const refused = await EmbeddedDB.open({ path, settings: { [name]: "postgres://127.0.0.1:1/none" } }).then(
      () => "",
      (error: VectorDBError) => `${error.code}: ${error.message}`
    )
    assert.match(refused, new RegExp(`^not_opened: ${name}: `))
  })

  it("shares its data format with the server, and keeps what was acknowledged", async () => {
    const path = await mkdtemp(join(tmpdir(), "ruvector-embedded-"))
    const db = await EmbeddedDB.open({ path })
    assert.instanceOf(db, EmbeddedDB)
    await db.insert("a", [1, 0], { metadata: { n: 1 } })
    const locked = await EmbeddedDB.open({ path }).then(
      () => "",
      (error: VectorDBError) => `${error.code}: ${error.message}`
    )
    assert.match(locked, /^not_opened: The data directory .* is in use by process /)
    await db.close()
    const node = await startNode({ data: path })
    const remote = new VectorDB({ endpoint: node.base })
    assert.deepStrictEqual((await remote.get("a"))?.metadata, { n: 1 })
    await remote.insert("b", [0, 1])
    await remote.close()
    await node.stop()
    {
      await using again = await EmbeddedDB.open({ path })
      assert.deepStrictEqual(
        (await again.search([0, 1])).map(({ id }) => id),
        ["b", "a"]
      )
      // What is handed out is the caller's own.
      const first = await again.get("b")
      first?.vector.fill(7)
      assert.deepStrictEqual((await again.get("b"))?.vector, Float32Array.of(0, 1))
    }
    await rm(path, { recursive: true })
  })
})
