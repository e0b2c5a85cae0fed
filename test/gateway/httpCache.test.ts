/** What the REST wire tells caches, over a whole node: headers, validators, invalidation, and that nothing stale is given. */
import { createHash } from "node:crypto"
import { mkdtemp, rm } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { setTimeout as sleep } from "node:timers/promises"
import { afterAll, assert, beforeAll, describe, it } from "@effect/vitest"
import { type RunningNode, startNode } from "../support/Node.ts"
import { type Random, random, seeded, seedOf } from "../support/Seeded.ts"

let node: RunningNode

beforeAll(async () => {
  node = await startNode()
})
afterAll(() => node.stop())

const call = async (method: string, path: string, body?: unknown, headers: Record<string, string> = {}, at = node) => {
  const response = await fetch(`${at.base}${path}`, {
    method,
    headers: { ...(body === undefined ? {} : { "content-type": "application/json" }), ...headers },
    ...(body === undefined ? {} : { body: JSON.stringify(body) })
  })
  const text = await response.text()
  return {
    status: response.status,
    header: (name: string) => response.headers.get(name),
    text,
    body: text === "" ? undefined : JSON.parse(text)
  }
}
type Answer = Awaited<ReturnType<typeof call>>

const get = (path: string, headers: Record<string, string> = {}) => call("GET", path, undefined, headers)

/** A collection of `n` vectors on a circle, `v0` to `v<n-1>`; gives its uid. */
const circle = async (name: string, n: number, partitions = 1): Promise<string> => {
  const made = await call("PUT", `/api/v1/collections/${name}`, { dimensions: 2, metric: "l2", partitions })
  await insert(
    name,
    Array.from({ length: n }, (_, i) => ({ id: `v${i}`, vector: [Math.cos(i / n), Math.sin(i / n)] }))
  )
  return made.body.uid
}

const insert = async (collection: string, vectors: ReadonlyArray<{ id: string; vector: Array<number> }>) => {
  const inserted = await call("POST", "/api/v1/insert", { collection, vectors })
  assert.strictEqual(inserted.status, 200)
  return inserted
}

const idsOf = (answer: Answer): Array<string> =>
  answer.body.results.map((result: { vector_id: string }) => result.vector_id)

const tagsOf = (answer: Answer): Array<string> => (answer.header("cache-tag") ?? "").split(",")

const vectorTagOf = (uid: string, id: string) =>
  `v-${createHash("sha256").update(`${uid}/${id}`).digest("hex").slice(0, 32)}`

const metricOf = async (name: string): Promise<number> => {
  const text = await (await fetch(`${node.base}/metrics`)).text()
  const lines = text.split("\n").filter((line) => line.startsWith(name) && !line.startsWith(`${name}_`))
  return lines.reduce((sum, line) => sum + Number(line.slice(line.lastIndexOf(" "))), 0)
}

describe("a vector by GET", () => {
  it("says how long, to whom, and under which tags it may be kept", async () => {
    const uid = await circle("e1", 3)
    const read = await get("/api/v1/embed/v1?collection=e1")
    assert.strictEqual(read.status, 200)
    assert.strictEqual(read.header("cache-control"), "public, max-age=300")
    assert.strictEqual(read.header("etag"), `"${uid}.0.${read.body.version}"`)
    assert.strictEqual(read.header("cache-tag"), `c-${uid},g-${uid}-0,${vectorTagOf(uid, "v1")}`)
    assert.isNull(read.header("vary"))
  })

  it("is 304 for whoever names its tag, in any of the ways to do so, and for nobody else", async () => {
    await circle("e2", 3)
    const path = "/api/v1/embed/v1?collection=e2"
    const first = await get(path)
    const etag = first.header("etag") as string
    const before = await metricOf("ruvector_http_not_modified")
    const naming = [etag, `W/${etag}`, `"other", ${etag}`, `"a,b" , W/${etag},"c"`, "*", " * "]
    for (const named of naming) {
      const again = await get(path, { "if-none-match": named })
      assert.strictEqual(again.status, 304, named)
      assert.strictEqual(again.text, "")
      for (const name of ["etag", "cache-control", "cache-tag"]) {
        assert.strictEqual(again.header(name), first.header(name), `${name} with ${named}`)
      }
    }
    assert.strictEqual(await metricOf("ruvector_http_not_modified"), before + naming.length)
    for (const named of ['"other"', etag.slice(1, -1), '""', "", `"*"`, `"${etag.slice(1, -2)}"`]) {
      assert.strictEqual((await get(path, { "if-none-match": named })).status, 200, named)
    }
  })

  it("HEAD has GET's headers and no body, and is conditional too", async () => {
    await circle("e3", 3)
    const path = "/api/v1/embed/v0?collection=e3"
    const [head, full] = [await call("HEAD", path), await get(path)]
    assert.strictEqual(head.status, 200)
    assert.strictEqual(head.text, "")
    for (const name of ["etag", "cache-control", "cache-tag", "content-type", "content-length"]) {
      assert.strictEqual(head.header(name), full.header(name), name)
    }
    const again = await call("HEAD", path, undefined, { "if-none-match": full.header("etag") as string })
    assert.strictEqual(again.status, 304)
  })

  it("has another tag after every change of it, and the same one after changes of others", async () => {
    await circle("e4", 3)
    const path = "/api/v1/embed/v0?collection=e4"
    const tags = new Set<string>()
    const tag = async () => (await get(path)).header("etag") as string
    tags.add(await tag())
    await insert("e4", [{ id: "v1", vector: [9, 9] }])
    tags.add(await tag())
    assert.strictEqual(tags.size, 1)
    await insert("e4", [{ id: "v0", vector: [1, 0] }])
    tags.add(await tag())
    await call("PATCH", "/api/v1/vectors/v0?collection=e4", { metadata: { a: 1 } })
    tags.add(await tag())
    assert.strictEqual(tags.size, 3)
  })

  it("that is not there may be remembered as such for a while, and purged by its tag", async () => {
    const uid = await circle("e5", 1)
    const missing = await get("/api/v1/embed/none?collection=e5")
    assert.strictEqual(missing.status, 404)
    assert.strictEqual(missing.header("cache-control"), "public, max-age=60")
    assert.include(missing.header("cache-tag") ?? "", vectorTagOf(uid, "none"))
    const noCollection = await get("/api/v1/embed/none?collection=nowhere")
    assert.strictEqual(noCollection.status, 404)
    assert.strictEqual(noCollection.header("cache-control"), "public, max-age=60")
  })
})

describe("a search by GET", () => {
  it("says how long it may be kept; the same question in other words is the same answer, from the cache", async () => {
    const uid = await circle("s1", 20)
    const first = await get("/api/v1/search?query_vector_id=v3&k=10&collection=s1")
    assert.strictEqual(first.status, 200)
    assert.strictEqual(first.header("cache-control"), "public, max-age=30")
    assert.strictEqual(first.header("cache-tag"), `c-${uid},g-${uid}-0,s-${uid}`)
    assert.strictEqual(first.header("x-cache"), "miss")
    assert.match(first.header("etag") ?? "", /^W\/"[\w-]{43}"$/)
    for (const words of [
      "collection=s1&k=10&query_vector_id=v3",
      "query_vector_id=v3&collection=s1",
      "collection=s1&metric=l2&ef=128&query_vector_id=v3",
      "query_vector_id=v3&collection=s1&deadline_ms=5000"
    ]) {
      const same = await get(`/api/v1/search?${words}`)
      assert.strictEqual(same.header("x-cache"), "hit", words)
      assert.strictEqual(same.header("etag"), first.header("etag"), words)
      assert.deepStrictEqual(same.body.results, first.body.results)
      assert.notStrictEqual(same.body.query_id, first.body.query_id)
    }
    for (const words of [
      "k=9",
      "ef=64",
      "include=metadata",
      "include=vector",
      `filter=${encodeURIComponent('{"a":1}')}`
    ]) {
      const other = await get(`/api/v1/search?query_vector_id=v3&collection=s1&${words}`)
      assert.strictEqual(other.status, 200)
      assert.strictEqual(other.header("x-cache"), "miss", words)
      assert.notStrictEqual(other.header("etag"), first.header("etag"), words)
    }
  })

  it("is 304 without a search while nothing has changed, and fresh after a write", async () => {
    await circle("s2", 20, 2)
    const path = "/api/v1/search?query_vector_id=v3&k=3&collection=s2"
    const first = await get(path)
    const etag = first.header("etag") as string
    const lookups = async () =>
      (await metricOf("ruvector_result_cache_hits")) + (await metricOf("ruvector_result_cache_misses"))
    const before = await lookups()
    const again = await get(path, { "if-none-match": etag })
    assert.strictEqual(again.status, 304)
    assert.strictEqual(again.header("etag"), etag)
    assert.strictEqual(again.header("cache-control"), "public, max-age=30")
    assert.strictEqual(await lookups(), before)
    assert.strictEqual((await get(path, { "if-none-match": "*" })).status, 304)
    assert.strictEqual((await call("HEAD", path, undefined, { "if-none-match": etag })).status, 304)
    // The tag does not stand for a question that is wrong.
    assert.strictEqual((await get(`${path}&metric=cosine`, { "if-none-match": etag })).status, 400)

    await insert("s2", [{ id: "nearest", vector: [Math.cos(3 / 20), Math.sin(3 / 20)] }])
    const fresh = await get(path, { "if-none-match": etag })
    assert.strictEqual(fresh.status, 200)
    assert.strictEqual(fresh.header("x-cache"), "miss")
    assert.include(idsOf(fresh), "nearest")
    assert.notStrictEqual(fresh.header("etag"), etag)
  })

  it("of a vector that is not there is a 404 that may be kept; what is wrong is not kept", async () => {
    await circle("s3", 2)
    const missing = await get("/api/v1/search?query_vector_id=none&collection=s3")
    assert.strictEqual(missing.status, 404)
    assert.strictEqual(missing.header("cache-control"), "public, max-age=60")
    const wrong = await get("/api/v1/search?query_vector_id=v0&collection=s3&k=0")
    assert.strictEqual(wrong.status, 400)
    assert.strictEqual(wrong.header("cache-control"), "no-store")
  })

  it("counts hits, misses and bytes", async () => {
    await circle("s4", 5)
    const read = async () => ({
      hits: await metricOf("ruvector_result_cache_hits"),
      misses: await metricOf("ruvector_result_cache_misses"),
      bytes: await metricOf("ruvector_result_cache_bytes")
    })
    const before = await read()
    for (let i = 0; i < 3; i++) await get("/api/v1/search?query_vector_id=v0&collection=s4")
    const after = await read()
    assert.strictEqual(after.hits - before.hits, 2)
    assert.strictEqual(after.misses - before.misses, 1)
    assert.isAbove(after.bytes, before.bytes)
  })
})

describe("writes and POST", () => {
  it("are never to be stored", async () => {
    await circle("w1", 3)
    const answers = [
      await call("POST", "/api/v1/search", { collection: "w1", query: [1, 0] }),
      await insert("w1", [{ id: "a", vector: [1, 0] }]),
      await call("PATCH", "/api/v1/vectors/a?collection=w1", { metadata: { a: 1 } }),
      await call("PATCH", "/api/v1/vectors/none?collection=w1", { metadata: { a: 1 } }),
      await call("POST", "/api/v1/search", { collection: "w1", query_vector_id: "none" }),
      await call("DELETE", "/api/v1/vectors/a?collection=w1"),
      await call("POST", "/api/v1/delete", { collection: "w1", ids: ["v0"] }),
      await get("/api/v1/collections/w1"),
      await get("/api/v1/nowhere"),
      await call("DELETE", "/api/v1/collections/w1")
    ]
    for (const answer of answers) {
      assert.strictEqual(answer.header("cache-control"), "no-store", answer.text)
      assert.isNull(answer.header("cache-tag"))
      assert.isNull(answer.header("etag"))
    }
  })
})

describe("invalidation", () => {
  it("of everything changes every tag, and names what to purge", async () => {
    const uid = await circle("i1", 5)
    const paths = ["/api/v1/embed/v1?collection=i1", "/api/v1/search?query_vector_id=v1&collection=i1"]
    const before = [await get(paths[0] as string), await get(paths[1] as string)]
    const done = await call("POST", "/api/v1/collections/i1/invalidate", { scope: "all" })
    assert.strictEqual(done.status, 200)
    assert.strictEqual(done.header("cache-control"), "no-store")
    assert.deepInclude(done.body, { collection: "i1", scope: "all", generation: 1, tags: [`g-${uid}-0`] })
    for (const [i, path] of paths.entries()) {
      const old = before[i] as Answer
      const now = await get(path, { "if-none-match": old.header("etag") as string })
      assert.strictEqual(now.status, 200)
      assert.notStrictEqual(now.header("etag"), old.header("etag"))
      assert.include(tagsOf(now), `g-${uid}-1`)
      assert.include(tagsOf(old), `g-${uid}-0`)
    }
  })

  it("with notice shortens what is given until then, and takes effect at its time", async () => {
    const uid = await circle("i2", 5)
    const path = "/api/v1/embed/v1?collection=i2"
    const etag = (await get(path)).header("etag") as string
    const long = await call("POST", "/api/v1/collections/i2/invalidate", { scope: "all", notice_ms: 120_000 })
    assert.strictEqual(long.body.generation, 1)
    const ageOf = (answer: Answer) => Number(/max-age=(\d+)$/.exec(answer.header("cache-control") ?? "")?.[1])
    const meanwhile = await get(path, { "if-none-match": etag })
    assert.strictEqual(meanwhile.status, 304)
    assert.isAtMost(ageOf(meanwhile), 120)
    // One that is asked for later and comes sooner does not take the first one's place.
    const soon = await call("POST", "/api/v1/collections/i2/invalidate", { scope: "all", notice_ms: 1_500 })
    assert.deepInclude(soon.body, { generation: 1, tags: [`g-${uid}-0`] })
    assert.isAtMost(ageOf(await get("/api/v1/search?query_vector_id=v1&collection=i2")), 1)
    while (Date.now() < soon.body.effective_ms) await sleep(soon.body.effective_ms - Date.now() + 1)
    const after = await get(path, { "if-none-match": etag })
    assert.strictEqual(after.status, 200)
    assert.include(tagsOf(after), `g-${uid}-1`)
    assert.isAtMost(ageOf(after), 120)
    assert.isAbove(ageOf(after), 1)
  })

  it("of ids names their tags and the searches', and leaves the rest", async () => {
    const uid = await circle("i3", 5)
    const path = "/api/v1/embed/v1?collection=i3"
    const etag = (await get(path)).header("etag") as string
    const done = await call("POST", "/api/v1/collections/i3/invalidate", { scope: "ids", ids: ["v1", "v2"] })
    assert.deepStrictEqual(done.body.tags, [vectorTagOf(uid, "v1"), vectorTagOf(uid, "v2"), `s-${uid}`])
    assert.strictEqual((await get(path, { "if-none-match": etag })).status, 304)
  })

  it("that is not one is refused with the field's name", async () => {
    await circle("i4", 1)
    const refused: ReadonlyArray<readonly [unknown, string]> = [
      [{}, "scope"],
      [{ scope: "some" }, "scope"],
      [{ scope: "ids" }, "ids"],
      [{ scope: "ids", ids: [] }, "ids"],
      [{ scope: "all", ids: ["a"] }, "ids"],
      [{ scope: "ids", ids: ["a"], notice_ms: 5 }, "notice_ms"],
      [{ scope: "all", notice_ms: 300_001 }, "notice_ms"],
      [{ scope: "all", notice_ms: -1 }, "notice_ms"]
    ]
    for (const [body, field] of refused) {
      const answer = await call("POST", "/api/v1/collections/i4/invalidate", body)
      assert.deepInclude(answer.body, { status: 400, field }, JSON.stringify(body))
    }
    const nowhere = await call("POST", "/api/v1/collections/nowhere/invalidate", { scope: "all" })
    assert.strictEqual(nowhere.body.code, "collection_not_found")
    for (let i = 0; i < 16; i++) {
      const taken = await call("POST", "/api/v1/collections/i4/invalidate", { scope: "all", notice_ms: 300_000 })
      assert.strictEqual(taken.status, 200)
    }
    const tooMany = await call("POST", "/api/v1/collections/i4/invalidate", { scope: "all", notice_ms: 300_000 })
    assert.strictEqual(tooMany.status, 429)
    assert.strictEqual(tooMany.header("cache-control"), "no-store")
    assert.isAbove(Number(tooMany.header("retry-after")), 0)
  })
})

describe("a collection deleted and made again", () => {
  it("has none of the old one's answers, nor tags", async () => {
    const uids = new Set<string>()
    const etags = new Set<string | null>()
    for (let round = 0; round < 3; round++) {
      uids.add(await circle("again", 4 + round))
      const path = "/api/v1/search?query_vector_id=v0&k=50&collection=again"
      const found = await get(path)
      assert.strictEqual(found.body.total_results, 4 + round)
      assert.strictEqual((await get(path)).header("x-cache"), "hit")
      etags.add(found.header("etag"))
      etags.add((await get("/api/v1/embed/v0?collection=again")).header("etag"))
      await call("DELETE", "/api/v1/collections/again")
      assert.strictEqual((await get(path)).status, 404)
    }
    assert.strictEqual(uids.size, 3)
    assert.strictEqual(etags.size, 6)
  })
})

describe("nothing stale", () => {
  it("is given after a write was acknowledged, however searches and writes race", async () => {
    await seeded(seedOf(20_261_125), async (source) => {
      for (const partitions of [1, 3]) await race(source, `race-${partitions}`, partitions)
    })
  })

  /**
   * A writer moves one vector at a time between near and far, counting rounds in its id; readers ask the same few questions
   * by both ways all the while. A reader notes what was acknowledged before it asked, and what had been begun when it was
   * answered: every answer must hold the former and may hold nothing beyond the latter.
   */
  const race = async (source: Random, collection: string, partitions: number) => {
    await call("PUT", `/api/v1/collections/${collection}`, { dimensions: 2, metric: "l2", partitions })
    await insert(collection, [{ id: "origin", vector: [0, 0] }])
    let begun = -1
    let acknowledged = -1
    let hits = 0
    const rounds = 60
    const idOf = (round: number) => `r${round}`
    const writer = async (rng: Random) => {
      for (let round = 0; round < rounds; round++) {
        begun = round
        await insert(collection, [{ id: idOf(round), vector: [rng.next() / 100, rng.next() / 100] }])
        acknowledged = round
        if (rng.below(3) === 0) await sleep(rng.below(6))
      }
    }
    const reader = async (rng: Random) => {
      while (acknowledged < rounds - 1) {
        const before = acknowledged
        const byUrl = rng.below(2) === 0
        const answer = byUrl
          ? await get(`/api/v1/search?collection=${collection}&k=200&query_vector_id=origin`)
          : await call("POST", "/api/v1/search", { collection, k: 200, query: [0, 0] })
        const after = begun
        if (answer.header("x-cache") === "hit") hits += 1
        const found = new Set(idsOf(answer))
        for (let round = 0; round <= before; round++) assert.isTrue(found.has(idOf(round)), `${idOf(round)} is missing`)
        for (const id of found) if (id !== "origin") assert.isAtMost(Number(id.slice(1)), after)
      }
    }
    const seeds = Array.from({ length: 5 }, () => random(source.below(2 ** 31)))
    await Promise.all(seeds.map((rng, i) => (i === 0 ? writer(rng) : reader(rng))))
    assert.isAbove(hits, 0, "the cache was used at all")
  }
})

describe("settings", () => {
  it("make answers private, or kept by nobody, and the cache empty", async () => {
    const privately = await startNode({ httpCache: "private", embedCacheSeconds: 7, resultCacheBytes: 0 })
    const off = await startNode({ httpCache: "off" })
    try {
      for (const at of [privately, off]) {
        await call("POST", "/api/v1/insert", { vectors: [{ id: "a", vector: [1, 0] }] }, {}, at)
      }
      const read = await call("GET", "/api/v1/embed/a", undefined, {}, privately)
      assert.strictEqual(read.header("cache-control"), "private, max-age=7")
      assert.strictEqual(read.header("vary"), "origin, authorization, x-api-key")
      const etags = new Set<string | null>()
      for (let i = 0; i < 2; i++) {
        const found = await call("GET", "/api/v1/search?query_vector_id=a", undefined, {}, privately)
        assert.strictEqual(found.header("x-cache"), "miss")
        etags.add(found.header("etag"))
      }
      assert.strictEqual(etags.size, 1)
      assert.notInclude([...etags], null)
      for (const path of ["/api/v1/embed/a", "/api/v1/embed/b", "/api/v1/search?query_vector_id=a"]) {
        const answer = await call("GET", path, undefined, {}, off)
        assert.strictEqual(answer.header("cache-control"), "no-store")
        assert.isNull(answer.header("cache-tag"))
      }
    } finally {
      await Promise.all([privately.stop(), off.stop()])
    }
  })

  it("an invalidation outlives a restart", async () => {
    const data = await mkdtemp(join(tmpdir(), "ruvector-"))
    const one = await startNode({ data })
    await call("POST", "/api/v1/insert", { vectors: [{ id: "a", vector: [1, 0] }] }, {}, one)
    const old = (await call("GET", "/api/v1/embed/a", undefined, {}, one)).header("etag") as string
    await call("POST", "/api/v1/collections/default/invalidate", { scope: "all" }, {}, one)
    await one.stop()
    const two = await startNode({ data })
    try {
      const now = await call("GET", "/api/v1/embed/a", undefined, { "if-none-match": old }, two)
      assert.strictEqual(now.status, 200)
      assert.include(now.header("etag"), ".1.")
    } finally {
      await two.stop()
      await rm(data, { recursive: true, force: true })
    }
  })
})

describe("the OpenAPI document", () => {
  it("has the 304s and the invalidation", async () => {
    const { body } = await get("/openapi.json")
    assert.property(body.paths["/api/v1/embed/{id}"].get.responses, "304")
    assert.property(body.paths["/api/v1/search"].get.responses, "304")
    assert.notProperty(body.paths["/api/v1/search"].post.responses, "304")
    assert.property(body.paths, "/api/v1/collections/{name}/invalidate")
  })
})
