/** The REST contract, call by call, against a whole node. */
import { afterAll, assert, beforeAll, describe, it } from "@effect/vitest"
import { type RunningNode, startNode } from "../support/Node.ts"

let node: RunningNode

beforeAll(async () => {
  node = await startNode()
})
afterAll(() => node.stop())

const call = async (method: string, path: string, body?: unknown, headers: Record<string, string> = {}) => {
  const response = await fetch(`${node.base}${path}`, {
    method,
    headers: { ...(body === undefined ? {} : { "content-type": "application/json" }), ...headers },
    ...(body === undefined ? {} : { body: typeof body === "string" ? body : JSON.stringify(body) })
  })
  const text = await response.text()
  return { status: response.status, headers: response.headers, body: text === "" ? undefined : JSON.parse(text) }
}

describe("collections", () => {
  it("are created once, and found again with the same parameters", async () => {
    const made = await call("PUT", "/api/v1/collections/c1", {
      dimensions: 3,
      metric: "l2",
      partitions: 2,
      index: { m: 8 }
    })
    assert.strictEqual(made.status, 201)
    assert.deepInclude(made.body, { name: "c1", dimensions: 3, metric: "l2", partitions: 2 })
    assert.deepStrictEqual(made.body.index, { m: 8, ef_construction: 200, ef_search: 128 })
    const again = await call("PUT", "/api/v1/collections/c1", { dimensions: 3 })
    assert.strictEqual(again.status, 200)
    assert.strictEqual(again.body.uid, made.body.uid)
    const read = await call("GET", "/api/v1/collections/c1")
    assert.strictEqual(read.body.count, 0)
    const list = await call("GET", "/api/v1/collections")
    assert.include(
      list.body.collections.map((collection: { name: string }) => collection.name),
      "c1"
    )
  })

  it("of the same name with other parameters conflict", async () => {
    await call("PUT", "/api/v1/collections/c2", { dimensions: 3 })
    const conflict = await call("PUT", "/api/v1/collections/c2", { dimensions: 4 })
    assert.strictEqual(conflict.status, 409)
    assert.deepInclude(conflict.body, { code: "collection_conflict", field: "dimensions", expected: "3", got: "4" })
  })

  it("are gone when deleted, and begin empty when made again", async () => {
    await call("PUT", "/api/v1/collections/c3", { dimensions: 2 })
    await call("POST", "/api/v1/insert", { collection: "c3", vectors: [{ id: "a", vector: [1, 2] }] })
    assert.strictEqual((await call("DELETE", "/api/v1/collections/c3")).status, 204)
    assert.strictEqual((await call("GET", "/api/v1/embed/a?collection=c3")).body.code, "collection_not_found")
    assert.strictEqual((await call("DELETE", "/api/v1/collections/c3")).status, 404)
    assert.strictEqual((await call("PUT", "/api/v1/collections/c3", { dimensions: 5 })).status, 201)
    assert.strictEqual((await call("GET", "/api/v1/embed/a?collection=c3")).body.code, "vector_not_found")
  })
})

describe("vectors", () => {
  it("the first insert makes the default collection", async () => {
    const inserted = await call("POST", "/api/v1/insert", {
      vectors: [
        { id: "north", vector: [0, 1], metadata: { side: "n", tags: ["x", "y"] } },
        { id: "east", vector: [1, 0] },
        { id: "north-east", vector: [0.5, 0.5], metadata: { side: "ne" } }
      ]
    })
    assert.deepStrictEqual(inserted.body, { inserted: 3 })
    const collection = await call("GET", "/api/v1/collections/default")
    assert.deepInclude(collection.body, { dimensions: 2, metric: "cosine", count: 3 })
  })

  it("are given back exactly, with their metadata and version", async () => {
    const vector = [Math.fround(0.1), Math.fround(-2.5e-7)]
    await call("POST", "/api/v1/insert", { vectors: [{ id: "exact/ü", vector, metadata: { a: { b: [1, null] } } }] })
    const read = await call("GET", `/api/v1/embed/${encodeURIComponent("exact/ü")}`)
    assert.strictEqual(read.status, 200)
    assert.deepStrictEqual(read.body.vector, vector)
    assert.deepStrictEqual(read.body.metadata, { a: { b: [1, null] } })
    assert.match(read.body.version, /^[0-9a-f]{16}-[0-9a-z]+-local$/)
    assert.match(read.headers.get("x-request-id") ?? "", /^req_[0-9a-z]+_local_[0-9a-f]+$/)
  })

  it("metadata is patched field by field; null removes", async () => {
    await call("POST", "/api/v1/insert", {
      vectors: [{ id: "p", vector: [1, 1], metadata: { keep: 1, change: 1, drop: 1 } }]
    })
    const before = await call("GET", "/api/v1/embed/p")
    const patched = await call("PATCH", "/api/v1/vectors/p", {
      metadata: { change: 2, drop: null, add: { deep: true } }
    })
    assert.deepStrictEqual(patched.body.metadata, { keep: 1, change: 2, add: { deep: true } })
    const after = await call("GET", "/api/v1/embed/p")
    assert.deepStrictEqual(after.body.metadata, { keep: 1, change: 2, add: { deep: true } })
    assert.deepStrictEqual(after.body.vector, before.body.vector)
    assert.isAbove(Number(`0x${after.body.version.slice(0, 16)}`), Number(`0x${before.body.version.slice(0, 16)}`))
    const missing = await call("PATCH", "/api/v1/vectors/nobody", { metadata: { a: 1 } })
    assert.deepInclude(missing.body, { status: 404, code: "vector_not_found" })
  })

  it("deleted ones are gone from reads and searches; deletions count what was there", async () => {
    await call("PUT", "/api/v1/collections/d", { dimensions: 2 })
    await call("POST", "/api/v1/insert", {
      collection: "d",
      vectors: ["a", "b", "c"].map((id, i) => ({ id, vector: [1, i] }))
    })
    assert.strictEqual((await call("DELETE", "/api/v1/vectors/a?collection=d")).status, 204)
    assert.deepStrictEqual((await call("POST", "/api/v1/delete", { collection: "d", ids: ["a", "b", "never"] })).body, {
      deleted: 1
    })
    const search = await call("POST", "/api/v1/search", { collection: "d", query: [1, 0], k: 10 })
    assert.deepStrictEqual(
      search.body.results.map((result: { vector_id: string }) => result.vector_id),
      ["c"]
    )
    assert.strictEqual((await call("GET", "/api/v1/embed/a?collection=d")).status, 404)
  })

  it("a batch applies in its order: the last of one id wins", async () => {
    await call("POST", "/api/v1/insert", {
      vectors: [
        { id: "twice", vector: [1, 0] },
        { id: "twice", vector: [0, 1], metadata: { n: 2 } }
      ]
    })
    assert.deepStrictEqual((await call("GET", "/api/v1/embed/twice")).body.vector, [0, 1])
  })
})

describe("search", () => {
  const expected: Record<string, (a: Array<number>, b: Array<number>) => number> = {
    cosine: (a, b) => dot(a, b) / (Math.hypot(...a) * Math.hypot(...b)),
    ip: dot,
    l2: (a, b) => -Math.hypot(...a.map((x, i) => x - (b[i] as number)))
  }
  for (const metric of ["cosine", "ip", "l2"]) {
    for (const partitions of [1, 3]) {
      it(`${metric}, ${partitions} partition(s): the nearest first, scores as the contract has them`, async () => {
        const name = `m-${metric}-${partitions}`
        await call("PUT", `/api/v1/collections/${name}`, { dimensions: 4, metric, partitions })
        const vectors = Array.from({ length: 60 }, (_, i) => ({
          id: `v${i}`,
          vector: [1, 2, 3, 4].map((d) => Math.fround(Math.sin((i + 1) * d))),
          metadata: { i }
        }))
        await call("POST", "/api/v1/insert", { collection: name, vectors })
        const query = [0.3, -0.2, 0.9, 0.4]
        const truth = vectors
          .map(({ id, vector }) => ({ vector_id: id, score: expected[metric]?.(query, vector) as number }))
          .sort((a, b) => b.score - a.score)
          .slice(0, 5)
        const found = await call("POST", "/api/v1/search", {
          collection: name,
          query,
          k: 5,
          include: ["metadata", "vector"]
        })
        assert.strictEqual(found.status, 200)
        assert.strictEqual(found.body.partial, false)
        assert.strictEqual(found.body.total_results, 5)
        assert.isNumber(found.body.took_ms)
        truth.forEach((one, i) => {
          const result = found.body.results[i]
          assert.strictEqual(result.vector_id, one.vector_id)
          assert.approximately(result.score, one.score, 1e-5)
          const source = vectors.find(({ id }) => id === one.vector_id)
          assert.deepStrictEqual(result.metadata, source?.metadata)
          assert.deepStrictEqual(result.vector, source?.vector)
        })
      })
    }
  }

  it("by an id, by base64url, and by URL for caches", async () => {
    const b64 = Buffer.from(new Float32Array([0, 1]).buffer).toString("base64url")
    const ways = [
      await call("POST", "/api/v1/search", { query: [0, 1], k: 2 }),
      await call("POST", "/api/v1/search", { query_b64: b64, k: 2 }),
      await call("POST", "/api/v1/search", { query_vector_id: "north", k: 2 }),
      await call("GET", "/api/v1/search?query_vector_id=north&k=2&metric=cosine&collection=default")
    ]
    for (const way of ways) {
      assert.strictEqual(way.status, 200)
      assert.include(["north", "twice"], way.body.results[0].vector_id)
      assert.approximately(way.body.results[0].score, 1, 1e-6)
    }
  })

  it("filters inside the search", async () => {
    const only = await call("POST", "/api/v1/search", { query: [1, 0], k: 5, filter: { side: "n" } })
    assert.deepStrictEqual(
      only.body.results.map((result: { vector_id: string }) => result.vector_id),
      ["north"]
    )
    const contains = await call("POST", "/api/v1/search", { query: [1, 0], k: 5, filter: { tags: "y" } })
    assert.strictEqual(contains.body.total_results, 1)
    const none = await call("POST", "/api/v1/search", { query: [1, 0], k: 5, filter: { side: "nowhere" } })
    assert.deepStrictEqual(none.body.results, [])
  })
})

describe("operators", () => {
  it("health, metrics, OpenAPI and the page to try it are served", async () => {
    assert.strictEqual((await call("GET", "/health/live")).status, 200)
    assert.deepStrictEqual((await call("GET", "/health/ready")).body, { status: "ready" })
    const metrics = await (await fetch(`${node.base}/metrics`)).text()
    assert.match(metrics, /^ruvector_requests\{.*route="search".*\} [1-9]/m)
    assert.match(metrics, /^ruvector_partitions_resident [1-9]/m)
    const openapi = await call("GET", "/openapi.json")
    assert.includeMembers(Object.keys(openapi.body.paths), [
      "/api/v1/search",
      "/api/v1/insert",
      "/api/v1/embed/{id}",
      "/api/v1/collections/{name}"
    ])
    const docs = await fetch(`${node.base}/docs`)
    assert.match(docs.headers.get("content-type") ?? "", /text\/html/)
    await docs.arrayBuffer()
  })
})

function dot(a: Array<number>, b: Array<number>): number {
  return a.reduce((sum, x, i) => sum + x * (b[i] as number), 0)
}
