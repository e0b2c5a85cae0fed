/**
 * What every object store must hold to. Each test gets a store of its own from `layer`, which must be empty at first.
 */
import { mkdtemp, readFile, rm, stat, writeFile } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { assert, describe, it } from "@effect/vitest"
import { Effect, Exit, type Layer, Scope } from "effect"
import { type ListedObject, ObjectStore } from "../../src/tiers/ObjectStore.ts"

export const objectStoreSuite = <E>(name: string, layer: Layer.Layer<ObjectStore, E>): void => {
  const test = (title: string, body: () => Effect.Effect<void, unknown, ObjectStore | Scope.Scope>, timeout?: number) =>
    it.effect(title, () => body().pipe(Effect.provide(layer)), timeout)

  describe(`object store: ${name}`, () => {
    test("gives back what was created, and a changed copy changes nothing", () =>
      Effect.gen(function* () {
        const store = yield* ObjectStore
        const body = bytesOf("hello")
        const etag = yield* store.create("a/b/c", body)
        body.fill(0)
        const first = yield* store.get("a/b/c")
        assert.strictEqual(textOf(first.body), "hello")
        assert.strictEqual(first.etag, etag)
        assert.strictEqual(first.sizeBytes, 5)
        first.body.fill(0)
        assert.strictEqual(textOf((yield* store.get("a/b/c")).body), "hello")
      }))

    test("gives bodies whose memory is their own", () =>
      Effect.gen(function* () {
        const store = yield* ObjectStore
        yield* store.create("a", bytesOf("0123456789"))
        for (const { body } of [yield* store.get("a"), yield* store.get("a", { offset: 3, length: 4 })]) {
          assert.strictEqual(body.byteOffset, 0)
          assert.strictEqual(body.buffer.byteLength, body.length)
        }
      }))

    test("refuses to create what exists, and leaves it as it is", () =>
      Effect.gen(function* () {
        const store = yield* ObjectStore
        yield* store.create("a", bytesOf("one"))
        const error = yield* Effect.flip(store.create("a", bytesOf("two")))
        assert.strictEqual(error._tag, "ObjectExists")
        assert.strictEqual(textOf((yield* store.get("a")).body), "one")
      }))

    test("lets one of many concurrent creators win", () =>
      Effect.gen(function* () {
        const store = yield* ObjectStore
        for (let round = 0; round < 5; round++) {
          const exits = yield* Effect.forEach(
            range(16),
            (i) => Effect.exit(store.create(`race/${round}`, bytesOf(String(i)))),
            { concurrency: "unbounded" }
          )
          const winners = range(16).filter((i) => Exit.isSuccess(exits[i] as Exit.Exit<string, unknown>))
          assert.strictEqual(winners.length, 1)
          assert.strictEqual(textOf((yield* store.get(`race/${round}`)).body), String(winners[0]))
        }
      }))

    test("replaces what the caller had read, and nothing else", () =>
      Effect.gen(function* () {
        const store = yield* ObjectStore
        const first = yield* store.create("a/m", bytesOf("1"))
        const second = yield* store.replace("a/m", bytesOf("22"), first)
        assert.notStrictEqual(second, first)
        assert.strictEqual((yield* Effect.flip(store.replace("a/m", bytesOf("x"), first)))._tag, "ObjectChanged")
        assert.strictEqual((yield* Effect.flip(store.replace("a/m", bytesOf("x"), "nonsense")))._tag, "ObjectChanged")
        assert.strictEqual((yield* Effect.flip(store.replace("a/n", bytesOf("x"), first)))._tag, "ObjectMissing")
        assert.strictEqual((yield* Effect.flip(store.create("a/m", bytesOf("x"))))._tag, "ObjectExists")
        const got = yield* store.get("a/m")
        assert.deepStrictEqual([textOf(got.body), got.etag, got.sizeBytes], ["22", second, 2])
        assert.deepStrictEqual(yield* store.list("a/"), [{ key: "a/m", sizeBytes: 2 }])
      }))

    test("keeps up over many replacements", () =>
      Effect.gen(function* () {
        const store = yield* ObjectStore
        let etag = yield* store.create("m", bytesOf("0"))
        for (let i = 1; i <= 25; i++) {
          etag = yield* store.replace("m", bytesOf(String(i)), etag)
          const got = yield* store.get("m")
          assert.deepStrictEqual([textOf(got.body), got.etag], [String(i), etag])
        }
      }))

    test("lets one of many concurrent replacers win each time, while readers always see a whole object", () =>
      Effect.gen(function* () {
        const store = yield* ObjectStore
        yield* replaceRace([store, store, store, store], 10)
      }))

    test("reads ranges, cut at the end", () =>
      Effect.gen(function* () {
        const store = yield* ObjectStore
        yield* store.create("a", bytesOf("0123456789"))
        const read = (offset: number, length: number) =>
          Effect.map(store.get("a", { offset, length }), ({ body, sizeBytes }) => {
            assert.strictEqual(sizeBytes, 10)
            return textOf(body)
          })
        assert.strictEqual(yield* read(0, 10), "0123456789")
        assert.strictEqual(yield* read(3, 4), "3456")
        assert.strictEqual(yield* read(8, 100), "89")
        assert.strictEqual(yield* read(10, 1), "")
        assert.strictEqual(yield* read(50, 1), "")
        assert.strictEqual(yield* read(5, 0), "")
      }))

    test("stores empty and large bodies", () =>
      Effect.gen(function* () {
        const store = yield* ObjectStore
        const large = new Uint8Array(12 * 1024 * 1024 + 7)
        for (let i = 0; i < large.length; i += 997) large[i] = i % 251
        yield* store.create("large", large)
        yield* store.create("empty", new Uint8Array(0))
        assert.isTrue(Buffer.from((yield* store.get("large")).body).equals(large))
        assert.strictEqual((yield* store.get("empty")).body.length, 0)
        const part = yield* store.get("large", { offset: large.length - 5, length: 5 })
        assert.deepStrictEqual([...part.body], [...large.subarray(large.length - 5)])
      }))

    test("misses what is not there", () =>
      Effect.gen(function* () {
        const store = yield* ObjectStore
        yield* store.create("folder/a", bytesOf("1"))
        for (const key of ["a", "folder", "folder/b", "folder/a/b", "other/a"]) {
          assert.strictEqual((yield* Effect.flip(store.get(key)))._tag, "ObjectMissing")
          assert.strictEqual((yield* Effect.flip(store.withFile(key, () => Effect.void)))._tag, "ObjectMissing")
          assert.strictEqual((yield* Effect.flip(Effect.scoped(store.localPath(key))))._tag, "ObjectMissing")
          yield* store.delete(key)
        }
        assert.strictEqual(textOf((yield* store.get("folder/a")).body), "1")
      }))

    test("deletes, and creates again as another object", () =>
      Effect.gen(function* () {
        const store = yield* ObjectStore
        for (const replacements of [0, 1, 3]) {
          const first = yield* store.create("d/a", bytesOf("1"))
          let etag = first
          for (let i = 0; i < replacements; i++) etag = yield* store.replace("d/a", bytesOf(`1.${i}`), etag)
          yield* store.delete("d/a")
          assert.strictEqual((yield* Effect.flip(store.get("d/a")))._tag, "ObjectMissing")
          assert.strictEqual((yield* Effect.flip(store.replace("d/a", bytesOf("x"), etag)))._tag, "ObjectMissing")
          assert.deepStrictEqual(yield* store.list(""), [])
          yield* store.delete("d/a")
          const again = yield* store.create("d/a", bytesOf("2"))
          for (const old of [first, etag]) {
            assert.strictEqual((yield* Effect.flip(store.replace("d/a", bytesOf("x"), old)))._tag, "ObjectChanged")
          }
          assert.strictEqual(textOf((yield* store.get("d/a")).body), "2")
          const later = yield* store.replace("d/a", bytesOf("3"), again)
          assert.strictEqual((yield* store.get("d/a")).etag, later)
          yield* store.delete("d/a")
        }
      }))

    test("never mistakes an object for an earlier one of the same key", () =>
      Effect.gen(function* () {
        const store = yield* ObjectStore
        const etags = new Set<string>()
        for (let i = 0; i < 40; i++) {
          etags.add(yield* store.create("again", bytesOf("same")))
          yield* store.delete("again")
        }
        assert.strictEqual(etags.size, 40)
      }))

    test("lists by prefix, in order, page by page", () =>
      Effect.gen(function* () {
        const store = yield* ObjectStore
        const keys = [
          "a", "a-b/x", "a.b", "a0", "ab/c", "b/1", "b/10", "b/2", "b/2-x/y", "b/2.z", "b/3/deep/er", "b0/1", "c"
        ] // biome-ignore format: one look
        for (const key of keys) yield* store.create(key, bytesOf(key))
        const etag = (yield* store.get("b/2")).etag
        yield* store.replace("b/2", bytesOf("replaced"), etag)
        const sorted = [...keys].sort()
        const sizes = (listed: ReadonlyArray<ListedObject>) => listed.map(({ key }) => key)
        assert.deepStrictEqual(sizes(yield* store.list("")), sorted)
        for (const prefix of [
          "a",
          "ab",
          "ab/",
          "b",
          "b/",
          "b/1",
          "b/2",
          "b/3/",
          "b/3/d",
          "c",
          "nothing",
          "nothing/at"
        ]) {
          assert.deepStrictEqual(
            sizes(yield* store.list(prefix)),
            sorted.filter((key) => key.startsWith(prefix))
          )
        }
        for (const limit of [1, 2, 3, 5, 100]) {
          const all: Array<string> = []
          let startAfter = ""
          for (;;) {
            const page = yield* store.list("", { startAfter, limit })
            assert.isAtMost(page.length, limit)
            all.push(...sizes(page))
            const last = page.at(-1)
            if (last === undefined) break
            startAfter = last.key
          }
          assert.deepStrictEqual(all, sorted)
        }
        const between = yield* store.list("b/", { startAfter: "b/2-", limit: 2 })
        assert.deepStrictEqual(sizes(between), ["b/2-x/y", "b/2.z"])
        const replaced = (yield* store.list("b/2")).find(({ key }) => key === "b/2")
        assert.strictEqual(replaced?.sizeBytes, "replaced".length)
      }))

    test("takes bodies from files", () =>
      Effect.gen(function* () {
        const store = yield* ObjectStore
        const folder = yield* tempFolder
        const file = join(folder, "body")
        yield* Effect.promise(() => writeFile(file, "from a file"))
        const etag = yield* store.create("f/a", { file })
        const got = yield* store.get("f/a")
        assert.deepStrictEqual([textOf(got.body), got.etag], ["from a file", etag])
        // Writing a new file of that name does not reach the object.
        yield* Effect.promise(() => writeFile(file, "other"))
        assert.strictEqual(textOf((yield* store.get("f/a")).body), "from a file")
        assert.strictEqual((yield* Effect.flip(store.create("f/a", { file })))._tag, "ObjectExists")
        const missing = yield* Effect.flip(store.create("f/b", { file: join(folder, "none") }))
        assert.strictEqual(missing._tag, "StoreFailure")
        assert.strictEqual(missing._tag === "StoreFailure" && missing.uncertain, false)
      }))

    test("lends a file that stays while it is used, whatever becomes of the object", () =>
      Effect.gen(function* () {
        const store = yield* ObjectStore
        const etag = yield* store.create("f/a", bytesOf("lent"))
        const path = yield* store.withFile("f/a", (path) =>
          Effect.gen(function* () {
            const second = yield* store.replace("f/a", bytesOf("newer"), etag)
            assert.strictEqual(yield* Effect.promise(() => readFile(path, "utf8")), "lent")
            yield* store.withFile("f/a", (newer) =>
              Effect.gen(function* () {
                assert.strictEqual((yield* store.get("f/a")).etag, second)
                yield* store.delete("f/a")
                assert.strictEqual(yield* Effect.promise(() => readFile(newer, "utf8")), "newer")
              })
            )
            return path
          })
        )
        const left = yield* Effect.promise(() =>
          stat(path).then(
            () => "there",
            () => "gone"
          )
        )
        assert.strictEqual(left, "gone")
        const failed = yield* Effect.flip(
          Effect.andThen(
            store.create("f/b", bytesOf("1")),
            store.withFile("f/b", () => Effect.fail("mine" as const))
          )
        )
        assert.strictEqual(failed, "mine")
      }))

    test("lends paths until the scope closes, each to whoever asked", () =>
      Effect.gen(function* () {
        const store = yield* ObjectStore
        yield* store.create("f/a", bytesOf("lent"))
        const outer = yield* Scope.make()
        const longer = yield* Scope.provide(store.localPath("f/a"), outer)
        yield* Effect.scoped(
          Effect.gen(function* () {
            const shorter = yield* store.localPath("f/a")
            assert.strictEqual(yield* Effect.promise(() => readFile(shorter, "utf8")), "lent")
          })
        )
        yield* store.delete("f/a")
        yield* store.create("f/a", bytesOf("another"))
        assert.strictEqual(yield* Effect.promise(() => readFile(longer, "utf8")), "lent")
        yield* Scope.close(outer, Exit.void)
        const left = yield* Effect.promise(() => readFile(longer, "utf8").catch(() => "gone"))
        assert.notStrictEqual(left, "lent")
        const missing = yield* Effect.flip(Effect.scoped(store.localPath("f/b")))
        assert.strictEqual(missing._tag, "ObjectMissing")
      }))

    test("takes any key of the alphabet", () =>
      Effect.gen(function* () {
        const store = yield* ObjectStore
        const keys = [
          ".hidden", "..a", "a..", "-", "_", ".tmp/x", "A/B.c/D_e-F", "0".repeat(200), `${"k/".repeat(200)}k`, "...",
          "manifest", "log/0000000000000001"
        ] // biome-ignore format: one look
        for (const key of keys) yield* store.create(key, bytesOf(key))
        for (const key of keys) assert.strictEqual(textOf((yield* store.get(key)).body), key)
        assert.deepStrictEqual(
          (yield* store.list("")).map(({ key }) => key),
          [...keys].sort()
        )
        for (const key of keys) yield* store.delete(key)
        assert.deepStrictEqual(yield* store.list(""), [])
      }))

    test("refuses what is no key as a defect, before anything happens", () =>
      Effect.gen(function* () {
        const store = yield* ObjectStore
        const bad = [
          "", "/", "/a", "a/", "a//b", ".", "..", "../a", "a/../b", "a/./b", "a b", "a~", "~tmp/x", "a~/1", "ä", "a\0b",
          "a\\b", "a\n", "x".repeat(201), "y/".repeat(300), "a:b", "%2e%2e/a"
        ] // biome-ignore format: one look
        for (const key of bad) {
          const calls = [
            store.create(key, bytesOf("1")), store.replace(key, bytesOf("1"), "e"), store.get(key), store.delete(key),
            store.withFile(key, () => Effect.void), Effect.scoped(store.localPath(key))
          ] // biome-ignore format: one look
          for (const call of calls) {
            const exit = yield* Effect.exit(call as Effect.Effect<unknown, unknown>)
            assert.isTrue(Exit.hasDies(exit), JSON.stringify(key))
          }
        }
        for (const prefix of ["../", "/", "a//", "./", "~", "a/../b"]) {
          assert.isTrue(Exit.hasDies(yield* Effect.exit(store.list(prefix))), prefix)
        }
        assert.deepStrictEqual(yield* store.list(""), [])
      }))

    test("serves many operations at once", () =>
      Effect.gen(function* () {
        const store = yield* ObjectStore
        yield* Effect.forEach(range(150), (i) => store.create(`many/${i % 7}/${i}`, bytesOf(String(i))), {
          concurrency: "unbounded"
        })
        const bodies = yield* Effect.forEach(range(150), (i) => store.get(`many/${i % 7}/${i}`), {
          concurrency: "unbounded"
        })
        assert.deepStrictEqual(
          bodies.map(({ body }) => textOf(body)),
          range(150).map(String)
        )
        yield* Effect.forEach(range(150), (i) => store.delete(`many/${i % 7}/${i}`), { concurrency: "unbounded" })
        assert.deepStrictEqual(yield* store.list(""), [])
      }))
  })
}

/**
 * All stores, which share their objects, replace one object again and again, each what it has just read. Every success
 * must be one step from the state it was based on, no two from the same.
 */
export const replaceRace = Effect.fnUntraced(function* (
  stores: ReadonlyArray<ObjectStore["Service"]>,
  replacementsEach: number
) {
  const first = stores[0] as ObjectStore["Service"]
  yield* first.create("race/m", bytesOf("start"))
  const steps = new Map<string, string>()
  const doubtful: Array<string> = []
  yield* Effect.forEach(
    stores,
    (store, owner) =>
      Effect.gen(function* () {
        for (let done = 0; done < replacementsEach; ) {
          const seen = yield* store.get("race/m")
          const from = textOf(seen.body)
          const to = `${owner}.${done}`
          const exit = yield* Effect.exit(store.replace("race/m", bytesOf(to), seen.etag))
          if (Exit.isSuccess(exit)) {
            assert.isFalse(steps.has(from), `two successors of ${from}: ${steps.get(from)} and ${to}`)
            steps.set(from, to)
            done += 1
            continue
          }
          const error = yield* Effect.flip(exit)
          if (error._tag === "ObjectChanged") continue
          assert.isTrue(error._tag === "StoreFailure" && error.uncertain, String(error))
          doubtful.push(to)
          done += 1
        }
      }),
    { concurrency: "unbounded" }
  )
  // One chain from the start to what is there now; a link of it may be missing only where a store was not sure.
  const last = textOf((yield* first.get("race/m")).body)
  let at = "start"
  let length = 0
  for (let next = steps.get(at); next !== undefined; next = steps.get(at)) {
    at = next
    length += 1
  }
  if (doubtful.length === 0) {
    assert.strictEqual(at, last)
    assert.strictEqual(length, steps.size)
  }
  assert.strictEqual(steps.size + doubtful.length, stores.length * replacementsEach)
  return { doubtful: doubtful.length }
})

/** A folder that is removed with the scope. */
export const tempFolder = Effect.acquireRelease(
  Effect.promise(() => mkdtemp(join(tmpdir(), "ruvector-test-"))),
  (folder) => Effect.promise(() => rm(folder, { recursive: true, force: true }))
)

export const bytesOf = (text: string): Uint8Array => new TextEncoder().encode(text)
export const textOf = (bytes: Uint8Array): string => new TextDecoder().decode(bytes)
export const range = (count: number): Array<number> => Array.from({ length: count }, (_, i) => i)
