import { assert, describe, it } from "@effect/vitest"
import { Context, Effect, Layer } from "effect"
import * as Bucket from "../../src/tiers/Bucket.ts"
import * as GcsObjectStore from "../../src/tiers/GcsObjectStore.ts"
import { ObjectStore } from "../../src/tiers/ObjectStore.ts"
import { withoutFakeGcs } from "../support/FakeGcs.ts"
import { startFlakyProxy } from "../support/FlakyProxy.ts"
import { bucket, cachedGcsLayer, freshUrl, gcsLayer, gcsOptions, useFakeGcs } from "./gcsStores.ts"
import { bytesOf, objectStoreSuite, range, tempFolder } from "./objectStoreSuite.ts"

describe.skipIf(withoutFakeGcs())("Google Cloud Storage", () => {
  const server = useFakeGcs()
  objectStoreSuite("bucket", Layer.fresh(gcsLayer(server)))
  objectStoreSuite("bucket with a cache on disk", Layer.fresh(cachedGcsLayer(server)))

  it.effect("spreads partitions over shards, and lists them in order all the same", () =>
    Effect.gen(function* () {
      const url = freshUrl()
      const scratch = yield* tempFolder
      const proxy = yield* Effect.acquireRelease(
        Effect.promise(() => startFlakyProxy(server().url, Math.random)),
        (started) => Effect.promise(() => started.stop())
      )
      const layer = GcsObjectStore.layer({ url, endpoint: proxy.url, scratch, ...gcsOptions })
      const store = Context.get(yield* Layer.build(Layer.fresh(layer)), ObjectStore)
      const keys = [
        ...range(24).flatMap((i) => {
          const partition = `collections/c${i % 3}/p${String(i >> 1).padStart(3, "0")}`
          return [`${partition}/log/${i}`, `${partition}/manifest-${i}`]
        }),
        "catalog/a", "collections-of/b", "collections/c0", "collections/c0/odd", "collections/c1/p001", "d"
      ] // biome-ignore format: one look
      const sorted = [...keys].sort()
      yield* Effect.forEach(keys, (key) => store.create(key, bytesOf(key)), { concurrency: 8 })

      for (const prefix of [
        "",
        "c",
        "collections",
        "collections/",
        "collections/c",
        "collections/c1/",
        "collections/c1/p00",
        "collections/c1/p002/",
        "collections/c1/p002/l",
        "catalog/",
        "d"
      ]) {
        const expected = sorted.filter((key) => key.startsWith(prefix))
        const listed = yield* store.list(prefix)
        assert.deepStrictEqual(
          listed.map(({ key }) => key),
          expected
        )
        for (const { key, sizeBytes } of listed) assert.strictEqual(sizeBytes, key.length)
        for (const limit of prefix.endsWith("/") ? [2, 9] : [9]) {
          const all: Array<string> = []
          for (;;) {
            const page = yield* store.list(prefix, { startAfter: all.at(-1) ?? "", limit })
            assert.isAtMost(page.length, limit)
            if (page.length === 0) break
            all.push(...page.map(({ key }) => key))
          }
          assert.deepStrictEqual(all, expected, `${prefix} by ${limit}`)
        }
      }

      // What is asked for all the time is one request.
      proxy.seen.length = 0
      yield* store.list("collections/c1/p002/log/", { startAfter: "collections/c1/p002/log/0" })
      assert.strictEqual(proxy.seen.length, 1)

      const answer = yield* Effect.promise(() =>
        fetch(`${server().url}/storage/v1/b/${bucket}/o?prefix=${url.split("/").slice(3).join("/")}/`)
      )
      const { items } = (yield* Effect.promise(() => answer.json())) as { items: ReadonlyArray<{ name: string }> }
      const below = items.map(({ name }) => name.slice(url.split("/").slice(3).join("/").length + 1))
      for (const name of below) assert.match(name, /^(?:[0-3][0-9a-f]\/collections\/c\d\/p\d{3}\/.|-\/[cd])/)
      const shards = new Set(below.map((name) => name.split("/")[0]))
      // 16 partitions and what is in none, over 65 places.
      assert.isAtLeast(shards.size, 10)
    }).pipe(Effect.scoped)
  )

  it.effect("goes on over pages of the store's", () =>
    Effect.gen(function* () {
      const store = yield* ObjectStore
      yield* Effect.forEach(range(1_100), (i) => store.create(`p/${1_000 + i}`, new Uint8Array(1)), { concurrency: 16 })
      const listed = yield* store.list("p/", { limit: 5_000 })
      assert.deepStrictEqual(
        listed.map(({ key }) => key),
        range(1_100).map((i) => `p/${1_000 + i}`)
      )
      assert.strictEqual((yield* store.list("p/")).length, 1_000)
    }).pipe(Effect.provide(Layer.fresh(gcsLayer(server))))
  )
})

describe("address of a bucket", () => {
  it("is taken apart, or refused", () => {
    assert.deepStrictEqual(Bucket.bucketOf("gs://my-bucket"), { bucket: "my-bucket", prefix: "" })
    assert.deepStrictEqual(Bucket.bucketOf("gs://my-bucket/"), { bucket: "my-bucket", prefix: "" })
    assert.deepStrictEqual(Bucket.bucketOf("gs://b.c_d/a/b-C.1/"), { bucket: "b.c_d", prefix: "a/b-C.1/" })
    for (const bad of [
      "gs://",
      "gs://ab",
      "gs://Upper",
      "gs://abc/a//b",
      "gs://abc/../x",
      "gs://abc/a b",
      "gs://abc?x",
      "s3://abc"
    ]) {
      assert.isUndefined(Bucket.bucketOf(bad), bad)
    }
    assert.isTrue(Bucket.isBucketUrl("gs://abc/x"))
    assert.isFalse(Bucket.isBucketUrl("./gs"))
  })
})
