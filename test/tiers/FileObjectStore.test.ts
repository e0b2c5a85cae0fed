import { cp, mkdir, readdir, readFile, rm, stat, utimes, writeFile } from "node:fs/promises"
import { join } from "node:path"
import { assert, describe, it } from "@effect/vitest"
import { Context, Effect, Exit, Layer } from "effect"
import * as FileObjectStore from "../../src/tiers/FileObjectStore.ts"
import {
  type ObjectChanged,
  type ObjectExists,
  type ObjectMissing,
  ObjectStore,
  type StoreFailure
} from "../../src/tiers/ObjectStore.ts"
import { formatIdentity, ownIdentity } from "../../src/tiers/ProcessIdentity.ts"
import { seeded, seedOf } from "../support/Seeded.ts"
import { bytesOf, objectStoreSuite, range, replaceRace, tempFolder, textOf } from "./objectStoreSuite.ts"
import { losingFiles } from "./PowerLoss.ts"

objectStoreSuite(
  "directory",
  Layer.unwrap(Effect.map(tempFolder, (folder) => FileObjectStore.layer({ directory: join(folder, "new", "store") })))
)

/** Of a store whose objects are all such as their readers check. */
const checked = (store: ObjectStore["Service"]): ObjectStore["Service"] => ({
  ...store,
  create: (key, body) => store.create(key, body, { checked: true })
})

objectStoreSuite(
  "directory, of checked objects",
  Layer.unwrap(
    Effect.map(tempFolder, (directory) =>
      Layer.effect(ObjectStore, Effect.map(ObjectStore, checked)).pipe(
        Layer.provide(FileObjectStore.layer({ directory }))
      )
    )
  )
)

type StoreError = ObjectChanged | ObjectExists | ObjectMissing | StoreFailure

const openStore = (directory: string, files?: FileObjectStore.FileCalls) =>
  Effect.map(
    Layer.build(Layer.fresh(FileObjectStore.layer(files === undefined ? { directory } : { directory, files }))),
    (context) => Context.get(context, ObjectStore)
  )

/** The machine's file system, with calls that fail while `fails` says so. */
const failing = (fails: (call: string, path: string) => string | undefined): FileObjectStore.FileCalls => {
  const paths = new Map<number, string>()
  const check = (call: string, path: string) => {
    const code = fails(call, path)
    if (code !== undefined) throw Object.assign(new Error(`${code}: injected, ${call} '${path}'`), { code })
  }
  const calls = FileObjectStore.nodeFiles
  return {
    ...calls,
    open: async (path, flags) => {
      check("open", path)
      const fd = await calls.open(path, flags)
      paths.set(fd, path)
      return fd
    },
    read: async (fd, ...rest) => {
      check("read", paths.get(fd) ?? "")
      return await calls.read(fd, ...rest)
    },
    write: async (fd, from, offset, length, position) => {
      check("write", paths.get(fd) ?? "")
      // Short, as the kernel may.
      return await calls.write(fd, from, offset, Math.min(length, 1_000), position)
    },
    fsync: async (fd) => {
      check("fsync", paths.get(fd) ?? "")
      await calls.fsync(fd)
    },
    link: async (from, to) => {
      check("link", to)
      await calls.link(from, to)
      check("linked", to)
    },
    unlink: async (path) => {
      check("unlink", path)
      await calls.unlink(path)
    },
    mkdir: async (path) => {
      check("mkdir", path)
      await calls.mkdir(path)
    }
  }
}

describe("directory store", () => {
  it.effect("lets one of two instances win each generation", () =>
    Effect.gen(function* () {
      const directory = yield* tempFolder
      const one = yield* openStore(directory)
      const two = yield* openStore(directory)
      yield* replaceRace([one, two, one, two], 15)
      assert.deepStrictEqual(yield* two.list(""), yield* one.list(""))
      // Old states do not pile up.
      assert.isAtMost((yield* Effect.promise(() => readdir(join(directory, "race", "m~")))).length, 8)
    })
  )

  it.effect("lets one of two instances create", () =>
    Effect.gen(function* () {
      const directory = yield* tempFolder
      const stores = [yield* openStore(directory), yield* openStore(directory)]
      for (let round = 0; round < 10; round++) {
        const exits = yield* Effect.forEach(
          range(8),
          (i) => Effect.exit((stores[i % 2] as ObjectStore["Service"]).create(`r/${round}`, bytesOf(String(i)))),
          { concurrency: "unbounded" }
        )
        assert.strictEqual(exits.filter(Exit.isSuccess).length, 1)
      }
    })
  )

  it.effect("stays one object through races of create, replace and delete", () =>
    Effect.gen(function* () {
      const directory = yield* tempFolder
      const stores = [yield* openStore(directory), yield* openStore(directory)]
      yield* Effect.forEach(
        range(6),
        (i) =>
          Effect.gen(function* () {
            const store = stores[i % 2] as ObjectStore["Service"]
            for (let round = 0; round < 30; round++) {
              if ((i + round) % 3 === 0) yield* Effect.exit(store.create("x/k", bytesOf("c")))
              else if ((i + round) % 3 === 1) yield* store.delete("x/k")
              else {
                const seen = yield* Effect.exit(store.get("x/k"))
                if (Exit.isSuccess(seen)) yield* Effect.exit(store.replace("x/k", bytesOf("r"), seen.value.etag))
              }
            }
          }),
        { concurrency: "unbounded" }
      )
      const store = stores[0] as ObjectStore["Service"]
      yield* store.delete("x/k")
      assert.deepStrictEqual(yield* store.list(""), [])
      const etag = yield* store.create("x/k", bytesOf("1"))
      yield* store.replace("x/k", bytesOf("2"), etag)
      assert.strictEqual(textOf((yield* store.get("x/k")).body), "2")
    })
  )

  it.effect("is still the same store after a plain copy of the directory", () =>
    Effect.gen(function* () {
      const folder = yield* tempFolder
      const one = yield* openStore(join(folder, "one"))
      let etag = yield* one.create("a/m", bytesOf("0"))
      for (let i = 1; i <= 4; i++) etag = yield* one.replace("a/m", bytesOf(String(i)), etag)
      yield* one.create("a/n", bytesOf("n"))
      yield* Effect.promise(() => cp(join(folder, "one"), join(folder, "two"), { recursive: true }))
      const two = yield* openStore(join(folder, "two"))
      const copy = yield* two.get("a/m")
      assert.strictEqual(textOf(copy.body), "4")
      assert.deepStrictEqual(yield* two.list(""), yield* one.list(""))
      yield* two.replace("a/m", bytesOf("5"), copy.etag)
      assert.strictEqual(textOf((yield* two.get("a/m")).body), "5")
      assert.strictEqual(textOf((yield* one.get("a/m")).body), "4")
    })
  )

  it.effect("removes what a dead process left, and nothing of a living one", () =>
    Effect.gen(function* () {
      const directory = yield* tempFolder
      const temps = join(directory, "~tmp")
      const own = ownIdentity()
      const dead = formatIdentity({ ...own, start: "1" })
      const foreign = formatIdentity({ pid: 1, start: "1", scope: "0".repeat(16) })
      const old = `${foreign}-old`
      const living = yield* openStore(directory)
      yield* Effect.promise(async () => {
        for (const name of [dead, foreign, old]) {
          await mkdir(join(temps, name), { recursive: true })
          await writeFile(join(temps, name, "1"), "half an obj")
        }
        await utimes(join(temps, old), new Date(0), new Date(0))
      })
      const before = yield* Effect.promise(() => readdir(temps))
      const second = yield* openStore(directory)
      const after = yield* Effect.promise(() => readdir(temps))
      assert.isFalse(after.includes(dead))
      assert.isFalse(after.includes(old))
      assert.isTrue(after.includes(foreign))
      assert.isTrue(before.filter((name) => name !== dead && name !== old).every((name) => after.includes(name)))
      yield* living.create("a", bytesOf("1"))
      assert.strictEqual(textOf((yield* second.get("a")).body), "1")
      assert.deepStrictEqual(
        (yield* second.list("")).map(({ key }) => key),
        ["a"]
      )
    })
  )

  it.effect("goes on where its temporary folder was taken away", () =>
    Effect.gen(function* () {
      const directory = yield* tempFolder
      const store = yield* openStore(directory)
      const names = yield* Effect.promise(() => readdir(join(directory, "~tmp")))
      yield* Effect.promise(() => rm(join(directory, "~tmp", names[0] as string), { recursive: true }))
      yield* store.create("a", bytesOf("1"))
      assert.strictEqual(textOf((yield* store.get("a")).body), "1")
    })
  )

  it.effect("leaves no temporary file, and no folder without objects", () =>
    Effect.gen(function* () {
      const directory = yield* tempFolder
      const store = yield* openStore(directory)
      const etag = yield* store.create("a/b/m", bytesOf("1"))
      yield* store.replace("a/b/m", bytesOf("2"), etag)
      yield* Effect.flip(store.replace("a/b/m", bytesOf("2"), etag))
      yield* Effect.flip(store.create("a/b/m", bytesOf("2")))
      const [own] = yield* Effect.promise(() => readdir(join(directory, "~tmp")))
      assert.deepStrictEqual(yield* Effect.promise(() => readdir(join(directory, "~tmp", own as string))), [])
      yield* store.delete("a/b/m")
      assert.deepStrictEqual(yield* Effect.promise(() => readdir(directory)), ["~tmp"])
    })
  )

  it.effect("moves a file in without copying it", () =>
    Effect.gen(function* () {
      const directory = yield* tempFolder
      const store = yield* openStore(join(directory, "store"))
      const file = join(directory, "body")
      yield* Effect.promise(() => writeFile(file, "body"))
      const { ino } = yield* Effect.promise(() => stat(file))
      yield* store.create("a", { file })
      assert.strictEqual((yield* Effect.promise(() => stat(join(directory, "store", "a")))).ino, ino)
      assert.isFalse((yield* Effect.promise(() => readdir(directory))).includes("body"))
      const lent = yield* store.withFile("a", (path) => Effect.promise(() => stat(path)))
      assert.strictEqual(lent.ino, ino)
    })
  )

  it.effect("refuses a key that is the folder of others, and the other way round", () =>
    Effect.gen(function* () {
      const store = yield* openStore(yield* tempFolder)
      yield* store.create("a/b", bytesOf("1"))
      yield* store.create("c", bytesOf("1"))
      for (const key of ["a", "c/d", "c/d/e"]) {
        const error = yield* Effect.flip(store.create(key, bytesOf("2")))
        assert.isTrue(error._tag === "StoreFailure" && !error.uncertain, `${key}: ${error}`)
      }
    })
  )

  it.effect("lists a part of a large folder without a look at the rest", () =>
    Effect.gen(function* () {
      const directory = yield* tempFolder
      let stats = 0
      const calls = FileObjectStore.nodeFiles
      const store = yield* openStore(directory, {
        ...calls,
        stat: async (path) => {
          stats += 1
          return await calls.stat(path)
        }
      })
      yield* Effect.promise(async () => {
        await mkdir(join(directory, "log"))
        for (let i = 0; i < 3_000; i++) await writeFile(join(directory, "log", String(i).padStart(16, "0")), "x")
      })
      stats = 0
      const page = yield* store.list("log/", { startAfter: `log/${"1234".padStart(16, "0")}`, limit: 50 })
      assert.deepStrictEqual(
        page.map(({ key }) => Number(key.slice(4))),
        range(50).map((i) => 1_235 + i)
      )
      assert.isAtMost(stats, 50)
    })
  )

  it.effect("says why a write failed, and that nothing was written", () =>
    Effect.gen(function* () {
      let code: string | undefined
      let at = ""
      const directory = yield* tempFolder
      const store = yield* openStore(
        directory,
        failing((call) => (call === at ? code : undefined))
      )
      const first = yield* store.create("m", bytesOf("0"))
      for (const call of ["open", "write", "fsync", "link"]) {
        for (const errno of ["ENOSPC", "EDQUOT", "EIO", "EMFILE", "EACCES"]) {
          at = call
          code = errno
          const writes: ReadonlyArray<Effect.Effect<string, StoreError>> = [
            store.create("a", new Uint8Array(5_000)),
            store.create("a", new Uint8Array(5_000), { checked: true }),
            store.replace("m", bytesOf("1"), first)
          ]
          for (const write of writes) {
            const error = yield* Effect.flip(write)
            assert.isTrue(
              error._tag === "StoreFailure" && !error.uncertain && error.detail.includes(errno),
              `${call} ${errno}: ${error}`
            )
          }
          code = undefined
          assert.strictEqual((yield* Effect.flip(store.get("a")))._tag, "ObjectMissing")
          assert.strictEqual(textOf((yield* store.get("m")).body), "0")
        }
      }
      yield* store.create("a", new Uint8Array(5_000))
      yield* store.replace("m", bytesOf("1"), (yield* store.get("m")).etag)
      assert.strictEqual(textOf((yield* store.get("m")).body), "1")
    })
  )

  it.effect("takes an object back whose name could not be put on disk", () =>
    Effect.gen(function* () {
      const directory = yield* tempFolder
      let broken = false
      let stuck = false
      const store = yield* openStore(
        directory,
        failing((call, path) => {
          if (!broken) return undefined
          if (call === "fsync" && !path.includes("~tmp")) return "EIO"
          return stuck && call === "unlink" && !path.includes("~tmp") ? "EIO" : undefined
        })
      )
      const first = yield* store.create("d/m", bytesOf("0"))
      broken = true
      const create = yield* Effect.flip(store.create("d/a", bytesOf("1")))
      assert.isTrue(create._tag === "StoreFailure" && !create.uncertain)
      const replace = yield* Effect.flip(store.replace("d/m", bytesOf("1"), first))
      assert.isTrue(replace._tag === "StoreFailure" && !replace.uncertain)
      assert.strictEqual((yield* Effect.flip(store.get("d/a")))._tag, "ObjectMissing")
      assert.strictEqual(textOf((yield* store.get("d/m")).body), "0")
      // Where it cannot be taken back nobody knows, and nobody is shown what may not be on disk.
      stuck = true
      const doubtful = yield* Effect.flip(store.create("d/a", bytesOf("1")))
      assert.isTrue(doubtful._tag === "StoreFailure" && doubtful.uncertain)
      assert.strictEqual((yield* Effect.flip(store.get("d/a")))._tag, "StoreFailure")
      const likewise = yield* Effect.flip(store.create("d/b", bytesOf("1"), { checked: true }))
      assert.isTrue(likewise._tag === "StoreFailure" && likewise.uncertain)
      broken = false
      assert.strictEqual(textOf((yield* store.get("d/a")).body), "1")
      assert.strictEqual(textOf((yield* store.get("d/b")).body), "1")
    })
  )

  it.effect("shows nobody a checked object whose bytes could not be put on disk", () =>
    Effect.gen(function* () {
      const directory = yield* tempFolder
      let broken = false
      let stuck = false
      const store = yield* openStore(
        directory,
        failing((call, path) => {
          if (broken && call === "fsync" && path.includes("~tmp")) return "EIO"
          return stuck && call === "unlink" && !path.includes("~tmp") ? "EIO" : undefined
        })
      )
      broken = true
      const create = yield* Effect.flip(store.create("d/a", bytesOf("1"), { checked: true }))
      assert.isTrue(create._tag === "StoreFailure" && !create.uncertain)
      assert.strictEqual((yield* Effect.flip(store.get("d/a")))._tag, "ObjectMissing")
      stuck = true
      const doubtful = yield* Effect.flip(store.create("d/a", bytesOf("1"), { checked: true }))
      assert.isTrue(doubtful._tag === "StoreFailure" && doubtful.uncertain)
      broken = false
      stuck = false
      // A second fsync of a file says nothing of what the first one lost.
      assert.strictEqual((yield* Effect.flip(store.get("d/a")))._tag, "StoreFailure")
      yield* store.delete("d/a")
      yield* store.create("d/a", bytesOf("2"), { checked: true })
      assert.strictEqual(textOf((yield* store.get("d/a")).body), "2")
    })
  )

  it("keeps through a power loss what it has acknowledged, and what a reader was shown", { timeout: 20_000 }, () =>
    seeded(seedOf(1), async (source) => {
      const outcomes = { whole: 0, torn: 0, missing: 0 }
      for (let round = 0; round < 300; round++) {
        const isChecked = round % 4 > 0
        await Effect.runPromise(
          Effect.gen(function* () {
            const folder = yield* tempFolder
            const directory = join(folder, "live")
            const machine = losingFiles(directory, source)
            const other = yield* openStore(directory, machine.calls)
            const bodyOf = (n: number) => bytesOf(`object ${n} `.repeat(20))
            const kept = new Set<number>()
            const written = yield* Effect.exit(
              Effect.gen(function* () {
                const store = yield* openStore(directory, machine.mortal(8 + source.below(28)))
                for (let n = 0; n < 2; n++) {
                  yield* store.create(`log/${n}`, bodyOf(n), { checked: isChecked })
                  kept.add(n)
                }
              })
            )
            // Another process goes on with what it finds.
            if (source.next() < 0.4) {
              for (let n = 0; n < 2; n++) {
                const seen = yield* Effect.exit(other.get(`log/${n}`))
                if (Exit.isFailure(seen)) continue
                assert.deepStrictEqual(seen.value.body, Buffer.from(bodyOf(n)))
                kept.add(n)
              }
              yield* other.create("log/2", bodyOf(2), { checked: true })
              kept.add(2)
            }
            machine.lose(join(folder, "after"))
            const after = yield* openStore(join(folder, "after"))
            for (let n = 0; n < 3; n++) {
              const found = yield* Effect.exit(after.get(`log/${n}`))
              const isThere = Exit.isSuccess(found)
              const isWhole = isThere && textOf(found.value.body) === textOf(bodyOf(n))
              const at = `round ${round}, object ${n}, ${written._tag}`
              if (kept.has(n)) assert.isTrue(isWhole, `${at}: it was to be relied on`)
              else if (isThere && !isChecked) assert.isTrue(isWhole, `${at}: it is torn`)
              outcomes[isWhole ? "whole" : isThere ? "torn" : "missing"] += 1
            }
          }).pipe(Effect.scoped)
        )
      }
      // What is told apart above has all been there.
      for (const [outcome, count] of Object.entries(outcomes)) assert.isAbove(count, 0, outcome)
    })
  )

  it.effect("tells a link that took effect from one that did not", () =>
    Effect.gen(function* () {
      const directory = yield* tempFolder
      let broken = ""
      const store = yield* openStore(
        directory,
        failing((call, path) => (call === broken && !path.includes("~tmp") ? "EIO" : undefined))
      )
      broken = "linked"
      const etag = yield* store.create("a", bytesOf("1"))
      assert.strictEqual((yield* store.get("a")).etag, etag)
      broken = "link"
      const error = yield* Effect.flip(store.create("b", bytesOf("1")))
      assert.isTrue(error._tag === "StoreFailure" && !error.uncertain)
    })
  )

  it.effect("fails at the start where it cannot write", () =>
    Effect.gen(function* () {
      const directory = yield* tempFolder
      yield* Effect.promise(() => writeFile(join(directory, "file"), "x"))
      const error = yield* Effect.flip(openStore(join(directory, "file", "store")))
      assert.strictEqual(error._tag, "StoreFailure")
      const other = yield* Effect.flip(openStore(join(directory, "file")))
      assert.strictEqual(other._tag, "StoreFailure")
      assert.strictEqual(yield* Effect.promise(() => readFile(join(directory, "file"), "utf8")), "x")
    })
  )

  it.effect("says that an object exists while a reader holds a state that is long replaced", () =>
    Effect.gen(function* () {
      const directory = yield* tempFolder
      const store = yield* openStore(directory)
      let etag = yield* store.create("m", bytesOf("0"))
      const reading = Effect.forEach(range(200), () => store.get("m"), { concurrency: 8, discard: true })
      const replacing = Effect.gen(function* () {
        for (let i = 1; i <= 40; i++) etag = yield* store.replace("m", bytesOf(String(i)), etag)
      })
      yield* Effect.all([reading, replacing, reading], { concurrency: "unbounded" })
      assert.strictEqual(textOf((yield* store.get("m")).body), "40")
    })
  )
})
