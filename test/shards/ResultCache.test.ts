/** The result cache by itself: what is the same question, what is kept, and within what bound. */
import { assert, describe, it } from "@effect/vitest"
import type { Collection } from "../../src/protocol/Collection.ts"
import type { SearchAnswer, SessionQuery } from "../../src/protocol/StreamSession.ts"
import { make, resultKey } from "../../src/shards/ResultCache.ts"
import { decodeResult, encodeResult, fingerprint } from "../../src/shards/ResultStore.ts"
import { random, seeded, seedOf } from "../support/Seeded.ts"

const collection: Collection = {
  name: "c",
  uid: "u",
  dimensions: 3,
  metric: "l2",
  partitions: 1,
  index: { m: 16, ef_construction: 200, ef_search: 128 },
  created_ms: 0
}

const query = (change: Partial<SessionQuery> = {}): SessionQuery => ({
  queryId: "q",
  collection: "c",
  vector: Float32Array.of(1, 2, 3),
  k: 10,
  ef: 0,
  filter: "",
  includeMetadata: false,
  includeVector: false,
  deadlineMillis: 0,
  ...change
})

const byId = (id: string): SessionQuery => {
  const { vector: _, ...rest } = query()
  return { ...rest, vectorId: id }
}

const answer = (ids: ReadonlyArray<string>): SearchAnswer => ({
  queryId: "q",
  ids,
  scores: Float32Array.from(ids, (_, i) => -i),
  dimensions: 3,
  missing: [],
  tookMillis: 1
})

describe("a key", () => {
  it("is the same for the same question, with defaults left out or given", () => {
    const cache = make(1 << 20)
    cache.put(resultKey(collection, "r", query()), answer(["a"]))
    const same = [query(), query({ ef: 128 }), query({ queryId: "other", deadlineMillis: 5 }), query({ metric: "l2" })]
    for (const one of same) {
      assert.deepStrictEqual(cache.get(resultKey(collection, "r", one))?.ids, ["a"])
      assert.strictEqual(fingerprint(resultKey(collection, "r", one)), fingerprint(resultKey(collection, "r", query())))
    }
  })

  it("differs in everything an answer depends on", () => {
    const cache = make(1 << 20)
    const key = resultKey(collection, "r", query())
    cache.put(key, answer(["a"]))
    const others = [
      resultKey(collection, "r2", query()),
      resultKey({ ...collection, uid: "u2" }, "r", query()),
      ...[
        query({ k: 11 }),
        query({ ef: 200 }),
        query({ filter: '{"a":1}' }),
        query({ includeMetadata: true }),
        query({ includeVector: true }),
        query({ vector: Float32Array.of(1, 2, 3.000001) }),
        query({ vector: Float32Array.of(1, 2) }),
        byId("a")
      ].map((one) => resultKey(collection, "r", one))
    ]
    for (const other of others) {
      assert.isUndefined(cache.get(other))
      assert.notStrictEqual(fingerprint(other), fingerprint(key))
      // Nor where the hashes are made to collide.
      assert.isUndefined(cache.get({ ...other, hash: key.hash }))
    }
    assert.isDefined(cache.get(key))
  })

  it("tells vectors apart that the hash does not, because it looks at some components only", () => {
    const cache = make(1 << 20)
    const long = new Float32Array(4_096).fill(1)
    const other = Float32Array.from(long)
    other[4_095] = 2
    const [a, b] = [
      resultKey(collection, "r", query({ vector: long })),
      resultKey(collection, "r", query({ vector: other }))
    ]
    assert.strictEqual(a.hash, b.hash)
    cache.put(a, answer(["a"]))
    assert.isUndefined(cache.get(b))
  })

  it("hashes vectors of signs, which differ in one bit of a component, apart", () => {
    const hashes = new Set<number>()
    for (let n = 0; n < 4_096; n++) {
      const vector = Float32Array.from({ length: 12 }, (_, bit) => ((n >> bit) & 1 ? 1 : -1))
      hashes.add(resultKey(collection, "r", query({ vector })).hash)
    }
    assert.isAbove(hashes.size, 4_090)
  })
})

describe("the cache", () => {
  it("gives an answer at its revision only; a newer one takes its place", () => {
    const cache = make(1 << 20)
    const at = (revision: string) => resultKey(collection, revision, query())
    cache.put(at("1.1"), answer(["old"]))
    assert.isUndefined(cache.get(at("1.2")))
    cache.put(at("1.2"), answer(["new"]))
    assert.strictEqual(cache.entries(), 1)
    assert.isUndefined(cache.get(at("1.1")))
    assert.deepStrictEqual(cache.get(at("1.2"))?.ids, ["new"])
  })

  it("stays within its bytes, and keeps what was used last", () =>
    seeded(seedOf(7), async (seed) => {
      const source = random(seed.seed)
      const budget = 64_000
      const cache = make(budget)
      const hot = resultKey(collection, "r", byId("hot"))
      cache.put(hot, answer(["hot"]))
      for (let n = 0; n < 2_000; n++) {
        cache.put(
          resultKey(collection, "r", byId(`v${n}`)),
          answer(Array.from({ length: source.below(20) }, (_, i) => `${n}-${i}`))
        )
        assert.isAtMost(cache.bytes(), budget)
        assert.deepStrictEqual(cache.get(hot)?.ids, ["hot"])
      }
      assert.isAbove(cache.bytes(), budget / 2)
      assert.isUndefined(cache.get(resultKey(collection, "r", byId("v0"))))
      assert.isDefined(cache.get(resultKey(collection, "r", byId("v1999"))))
      const before = cache.bytes()
      cache.shrink(10_000)
      assert.isAtMost(cache.bytes(), before - 10_000)
      assert.isAbove(cache.bytes(), before - 12_000)
      assert.isDefined(cache.get(resultKey(collection, "r", byId("v1999"))))
      cache.dropCollection("u")
      assert.deepStrictEqual([cache.bytes(), cache.entries()], [0, 0])
    }))

  it("keeps no answer over a sixteenth of it, and nothing where it has no bytes", () => {
    const cache = make(16_000)
    const key = resultKey(collection, "r", query())
    cache.put(key, answer(Array.from({ length: 100 }, (_, i) => `vector-${i}`)))
    assert.isUndefined(cache.get(key))
    const none = make(0)
    assert.isFalse(none.enabled)
    none.put(key, answer([]))
    assert.strictEqual(none.entries(), 0)
  })

  it("does not keep alive the buffers that answers and queries are windows on", () => {
    const cache = make(1 << 20)
    const large = new Float32Array(100_000)
    const key = resultKey(collection, "r", query({ vector: large.subarray(0, 3) }))
    cache.put(key, { ...answer(["a"]), scores: large.subarray(9, 10), vectors: large.subarray(20, 23) })
    const kept = cache.get(key)
    assert.strictEqual(kept?.scores.buffer.byteLength, 4)
    assert.strictEqual(kept?.vectors?.buffer.byteLength, 12)
  })

  it("remembers which questions were asked lately, and forgets them", () => {
    const cache = make(1 << 20)
    const key = resultKey(collection, "r", query())
    assert.isFalse(cache.seen(key))
    assert.isTrue(cache.seen(resultKey(collection, "r2", query())))
    for (let n = 0; n < 70_000; n++) cache.seen(resultKey(collection, "r", query({ vector: Float32Array.of(n, 0, 0) })))
    assert.isFalse(cache.seen(key))
  })
})

describe("a stored result", () => {
  it("comes back exactly", () => {
    const result = {
      ids: ["a", "ü\u0000"],
      scores: Float32Array.of(Math.fround(0.1), -1e-30),
      metadata: ['{"a":1}', ""],
      vectors: Float32Array.of(0.1, -0, 3, 4, 5, 6),
      dimensions: 3
    }
    assert.deepStrictEqual(decodeResult(encodeResult(result)), result)
    const plain = { ids: [], scores: new Float32Array(0), dimensions: 3 }
    assert.deepStrictEqual(decodeResult(encodeResult(plain)), plain)
  })

  it("is none where the bytes are another's or cut", () => {
    const bytes = encodeResult({
      ids: ["a"],
      scores: Float32Array.of(1),
      vectors: Float32Array.of(1, 2, 3),
      dimensions: 3
    })
    for (let end = 0; end < bytes.length; end++) assert.isUndefined(decodeResult(bytes.subarray(0, end)))
    for (const text of [
      "null",
      "[]",
      "{}",
      '{"ids":["a"],"scores":[],"dimensions":3}',
      '{"ids":["a"],"scores":[1],"vectors":"AAAA","dimensions":3}'
    ]) {
      assert.isUndefined(decodeResult(Buffer.from(text)), text)
    }
  })
})
