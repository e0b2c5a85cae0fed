import { readdir, readFile, stat, truncate, writeFile } from "node:fs/promises"
import { join } from "node:path"
import { assert, describe, it } from "@effect/vitest"
import { Context, Deferred, Effect, Exit, Fiber, Layer, Logger, Metric, Scope } from "effect"
import { ObjectStore, StoreFailure, withFileOf } from "../../src/tiers/ObjectStore.ts"
import * as SnapshotCache from "../../src/tiers/SnapshotCache.ts"
import { seededRandom } from "./FaultyObjectStore.ts"
import { bytesOf, objectStoreSuite, range, tempFolder, textOf } from "./objectStoreSuite.ts"

const cached = (directory: string, bytesMax: number) => SnapshotCache.layer({ directory, bytesMax })

objectStoreSuite(
  "memory behind a cache on disk",
  Layer.unwrap(
    Effect.map(tempFolder, (folder) =>
      cached(join(folder, "new", "cache"), 1_000_000).pipe(Layer.provide(Layer.fresh(ObjectStore.layerMemory)))
    )
  )
)

/** A store in memory that counts what is read as a file, and the caches before it. */
const setUp = Effect.gen(function* () {
  const directory = yield* tempFolder
  const memory = Context.get(yield* Layer.build(Layer.fresh(ObjectStore.layerMemory)), ObjectStore)
  const downloads: Array<string> = []
  let before: Effect.Effect<void, StoreFailure> = Effect.void
  let after: Effect.Effect<void> = Effect.void
  const localPath: ObjectStore["Service"]["localPath"] = (key) =>
    Effect.andThen(
      Effect.suspend(() => {
        downloads.push(key)
        return before
      }),
      Effect.tap(memory.localPath(key), () => after)
    )
  const far = ObjectStore.of({ ...memory, localPath, withFile: withFileOf(localPath) })
  /** A cache as a process has it, until the scope closes. */
  const open = (bytesMax = 1_000) =>
    Effect.map(
      Layer.build(Layer.fresh(cached(directory, bytesMax)).pipe(Layer.provide(Layer.succeed(ObjectStore, far)))),
      (context) => Context.get(context, ObjectStore)
    )
  const files = Effect.promise(async () => {
    const names = await readdir(join(directory, "files"))
    return names.map((name) => join(directory, "files", name))
  })
  const aside = Effect.promise(() => readdir(join(directory, "aside")))
  const beforeDownload = (effect: Effect.Effect<void, StoreFailure>) => {
    before = effect
  }
  const afterDownload = (effect: Effect.Effect<void>) => {
    after = effect
  }
  return { memory, downloads, open, files, aside, beforeDownload, afterDownload }
})

const contentOf = (store: ObjectStore["Service"], key: string) =>
  store.withFile(key, (path) => Effect.promise(() => readFile(path, "utf8")))

const named = (key: string, bytes: number) => key.padEnd(bytes, ".")

describe("disk cache", () => {
  it.effect("asks the store once for what is read again, in this process and in the next", () =>
    Effect.gen(function* () {
      const { memory, downloads, open, aside } = yield* setUp
      yield* memory.create("s/a", bytesOf("one"))
      for (const _ of range(3)) {
        yield* Effect.scoped(
          Effect.gen(function* () {
            const store = yield* open()
            for (const __ of range(3)) assert.strictEqual(yield* contentOf(store, "s/a"), "one")
          })
        )
      }
      assert.deepStrictEqual(downloads, ["s/a"])
      assert.deepStrictEqual(yield* aside, [])
    }).pipe(Effect.scoped)
  )

  it.effect("asks once for what many want at one time, also where the first gives up", () =>
    Effect.gen(function* () {
      const { memory, downloads, open, beforeDownload } = yield* setUp
      yield* memory.create("s/a", bytesOf("one"))
      const store = yield* open()
      const gate = yield* Deferred.make<void>()
      beforeDownload(Deferred.await(gate))
      const fibers = yield* Effect.forEach(range(20), () => Effect.forkChild(contentOf(store, "s/a")))
      while (downloads.length === 0) yield* Effect.yieldNow
      yield* Fiber.interrupt(fibers[0] as Fiber.Fiber<string, unknown>)
      yield* Deferred.succeed(gate, undefined)
      for (const fiber of fibers.slice(1)) assert.strictEqual(yield* Fiber.join(fiber), "one")
      assert.deepStrictEqual(downloads, ["s/a"])
    }).pipe(Effect.scoped)
  )

  it.effect("evicts what was used least recently, across processes, and keeps to its bytes", () =>
    Effect.gen(function* () {
      const { memory, downloads, open, files } = yield* setUp
      for (const i of range(12)) yield* memory.create(`s/${i}`, bytesOf(named(`${i}`, 100)))
      yield* Effect.scoped(
        Effect.gen(function* () {
          const store = yield* open()
          for (const i of range(10)) yield* contentOf(store, `s/${i}`)
          yield* contentOf(store, "s/0")
          yield* contentOf(store, "s/10")
        })
      )
      const store = yield* open()
      yield* contentOf(store, "s/11")
      assert.strictEqual((yield* files).length, 10)
      downloads.length = 0
      // 1 and 2 made room for 10 and 11; 0 had been used since.
      for (const i of [0, 3, 4, 9, 10, 11]) yield* contentOf(store, `s/${i}`)
      assert.deepStrictEqual(downloads, [])
      yield* contentOf(store, "s/1")
      yield* contentOf(store, "s/2")
      assert.deepStrictEqual(downloads, ["s/1", "s/2"])
    }).pipe(Effect.scoped)
  )

  it.effect("holds its bound and gives the right bytes, whatever is asked for (seeded)", () =>
    Effect.gen(function* () {
      const seed = 11
      const random = seededRandom(seed)
      const { memory, open, files } = yield* setUp
      for (const i of range(30)) yield* memory.create(`s/${i}`, bytesOf(named(`${i}`, 20 + Math.floor(random() * 400))))
      const store = yield* open()
      const use = Effect.gen(function* () {
        const i = Math.floor(random() * 30)
        const content = yield* contentOf(store, `s/${i}`)
        assert.strictEqual(content, textOf((yield* memory.get(`s/${i}`)).body), `seed ${seed}`)
      })
      for (const _ of range(15))
        yield* Effect.all(
          Array.from({ length: 8 }, () => use),
          { concurrency: "unbounded" }
        )
      const sizes = yield* Effect.forEach(yield* files, (file) => Effect.promise(async () => (await stat(file)).size))
      assert.isAtMost(
        sizes.reduce((sum, size) => sum + size, 0),
        1_000,
        `seed ${seed}`
      )
      assert.isAtLeast(sizes.length, 2)
    }).pipe(Effect.scoped)
  )

  it.effect("evicts nothing that is in use, and what is too large for it passes by", () =>
    Effect.gen(function* () {
      const { memory, downloads, open, files } = yield* setUp
      for (const i of range(4)) yield* memory.create(`s/${i}`, bytesOf(named(`${i}`, 400)))
      yield* memory.create("s/large", bytesOf(named("large", 1_001)))
      const store = yield* open()
      const scope = yield* Scope.make()
      const paths = yield* Effect.forEach(range(4), (i) => Scope.provide(store.localPath(`s/${i}`), scope))
      for (const i of range(4)) {
        assert.strictEqual(yield* Effect.promise(() => readFile(paths[i] as string, "utf8")), named(`${i}`, 400))
        yield* contentOf(store, `s/${i}`)
      }
      assert.strictEqual(downloads.length, 4)
      assert.strictEqual(yield* contentOf(store, "s/large"), named("large", 1_001))
      assert.strictEqual((yield* files).length, 4)
      yield* Scope.close(scope, Exit.void)
      assert.strictEqual((yield* files).length, 2)
    }).pipe(Effect.scoped)
  )

  const damages: ReadonlyArray<readonly [string, (file: string) => Promise<void>]> = [
    ["a truncated file", (file) => truncate(file, 7)],
    ["an empty file", (file) => truncate(file, 0)],
    ["a longer file", async (file) => writeFile(file, Buffer.concat([await readFile(file), Buffer.from("x")]))],
    [
      "a flipped bit",
      async (file) => {
        const bytes = await readFile(file)
        bytes[5] = (bytes[5] as number) ^ 4
        await writeFile(file, bytes)
      }
    ]
  ]
  for (const [title, damage] of damages) {
    it.effect(`finds ${title} of its own before the next use`, () =>
      Effect.gen(function* () {
        const { memory, downloads, open, files } = yield* setUp
        yield* memory.create("s/a", bytesOf("0123456789"))
        const store = yield* open()
        for (let round = 1; round <= 2; round++) {
          for (const _ of range(2)) assert.strictEqual(yield* contentOf(store, "s/a"), "0123456789")
          const [file] = yield* files
          yield* Effect.promise(() => damage(file as string))
          assert.strictEqual(yield* contentOf(store, "s/a"), "0123456789")
          assert.strictEqual(downloads.length, round + 1)
        }
      }).pipe(Effect.provide(Logger.layer([])), Effect.scoped)
    )

    it.effect(`finds ${title} before its first use, says so, and fetches it anew`, () =>
      Effect.gen(function* () {
        const { memory, downloads, open, files } = yield* setUp
        yield* memory.create("s/a", bytesOf("0123456789"))
        yield* Effect.scoped(Effect.andThen(open(), (store) => contentOf(store, "s/a")))
        const [file] = yield* files
        yield* Effect.promise(() => damage(file as string))
        const lines: Array<string> = []
        const logger = Logger.make<unknown, void>(({ message }) => {
          lines.push(JSON.stringify(message))
        })
        const count = Metric.value(SnapshotCache.damagedFiles)
        const before = (yield* count).count
        yield* Effect.gen(function* () {
          const store = yield* open()
          for (const _ of range(2)) assert.strictEqual(yield* contentOf(store, "s/a"), "0123456789")
        }).pipe(Effect.provide(Logger.layer([logger])))
        assert.deepStrictEqual(downloads, ["s/a", "s/a"])
        assert.strictEqual(lines.length, 1)
        assert.include(lines[0] as string, "s/a")
        assert.include(lines[0] as string, file as string)
        assert.strictEqual((yield* count).count, before + 1)
      }).pipe(Effect.scoped)
    )
  }

  it.effect("keeps what this process stores from a file, and nothing of what was not stored", () =>
    Effect.gen(function* () {
      const { downloads, open, files, aside } = yield* setUp
      const folder = yield* tempFolder
      const store = yield* open()
      const file = join(folder, "made")
      yield* Effect.promise(() => writeFile(file, "made here"))
      yield* store.create("s/a", { file })
      assert.strictEqual(yield* contentOf(store, "s/a"), "made here")
      yield* Effect.promise(() => writeFile(file, "another"))
      assert.strictEqual((yield* Effect.flip(store.create("s/a", { file })))._tag, "ObjectExists")
      assert.strictEqual(yield* contentOf(store, "s/a"), "made here")
      assert.deepStrictEqual(downloads, [])
      assert.deepStrictEqual([(yield* files).length, (yield* aside).length], [1, 0])
    }).pipe(Effect.scoped)
  )

  it.effect("forgets what is deleted, also where it is just being fetched", () =>
    Effect.gen(function* () {
      const { memory, open, files, afterDownload } = yield* setUp
      yield* memory.create("s/a", bytesOf("one"))
      yield* memory.create("s/b", bytesOf("two"))
      const store = yield* open()
      yield* contentOf(store, "s/a")
      yield* store.delete("s/a")
      assert.deepStrictEqual(yield* files, [])
      assert.strictEqual((yield* Effect.flip(contentOf(store, "s/a")))._tag, "ObjectMissing")
      const held = yield* Deferred.make<void>()
      const gate = yield* Deferred.make<void>()
      afterDownload(Effect.andThen(Deferred.succeed(held, undefined), Deferred.await(gate)))
      const fiber = yield* Effect.forkChild(Effect.exit(contentOf(store, "s/b")))
      yield* Deferred.await(held)
      yield* store.delete("s/b")
      afterDownload(Effect.void)
      yield* Deferred.succeed(gate, undefined)
      assert.isTrue(Exit.isFailure(yield* Fiber.join(fiber)))
      assert.deepStrictEqual(yield* files, [])
    }).pipe(Effect.scoped)
  )

  it.effect("makes room where the disk is full, and says the store's failure where that is not enough", () =>
    Effect.gen(function* () {
      const { memory, open, files, beforeDownload } = yield* setUp
      for (const key of ["s/a", "s/b"]) yield* memory.create(key, bytesOf(key))
      const store = yield* open()
      yield* contentOf(store, "s/a")
      const full = new StoreFailure({ operation: "localPath", key: "s/b", detail: "full (ENOSPC)", uncertain: false })
      const fullWhile = (isFull: (files: number) => boolean) =>
        Effect.flatMap(files, ({ length }) => (isFull(length) ? Effect.fail(full) : Effect.void))
      beforeDownload(fullWhile((count) => count > 0))
      assert.strictEqual(yield* contentOf(store, "s/b"), "s/b")
      beforeDownload(fullWhile(() => true))
      assert.strictEqual((yield* Effect.flip(contentOf(store, "s/a")))._tag, "StoreFailure")
      beforeDownload(Effect.void)
      assert.strictEqual(yield* contentOf(store, "s/a"), "s/a")
    }).pipe(Effect.scoped)
  )
})
