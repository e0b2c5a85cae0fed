/** The bucket store over a network that fails: what it promises of its writes holds by every attempt's every end. */
import { readdir, readFile, stat, writeFile } from "node:fs/promises"
import { join } from "node:path"
import { assert, describe, it } from "@effect/vitest"
import { Context, Effect, Exit, Fiber, Layer } from "effect"
import * as GcsObjectStore from "../../src/tiers/GcsObjectStore.ts"
import { ObjectStore, type StoreFailure } from "../../src/tiers/ObjectStore.ts"
import { withoutFakeGcs } from "../support/FakeGcs.ts"
import { type Fault, startFlakyProxy } from "../support/FlakyProxy.ts"
import { forEachSeed, seededRandom } from "./FaultyObjectStore.ts"
import { freshUrl, gcsOptions, useFakeGcs } from "./gcsStores.ts"
import { bytesOf, range, replaceRace, tempFolder, textOf } from "./objectStoreSuite.ts"

const isWrite = (request: { readonly method: string; readonly path: string }) =>
  request.path.startsWith("/upload/") || request.path.startsWith("/resumable/") || request.method === "DELETE"

describe.skipIf(withoutFakeGcs())("Google Cloud Storage over a failing network", () => {
  const server = useFakeGcs()

  const proxyTo = (seed: number) =>
    Effect.acquireRelease(
      Effect.promise(() => startFlakyProxy(server().url, seededRandom(seed))),
      (proxy) => Effect.promise(() => proxy.stop())
    )

  const storeAt = (endpoint: string, url: string, options: Partial<GcsObjectStore.GcsObjectStoreOptions> = {}) =>
    Effect.gen(function* () {
      const scratch = yield* tempFolder
      const layer = GcsObjectStore.layer({ url, endpoint, scratch, ...gcsOptions, ...options })
      return Context.get(yield* Layer.build(Layer.fresh(layer)), ObjectStore)
    })

  /** A store, a proxy before it that passes all at first, and a store beside the proxy on the same objects. */
  const through = (seed = 1, options: Partial<GcsObjectStore.GcsObjectStoreOptions> = {}) =>
    Effect.gen(function* () {
      const url = freshUrl()
      const proxy = yield* proxyTo(seed)
      const store = yield* storeAt(proxy.url, url, options)
      const beside = yield* storeAt(server().url, url)
      proxy.seen.length = 0
      return { proxy, store, beside }
    })

  /** The faults of the first requests that write (or of all, with `reads`), one after the other; then none. */
  const first = (faults: ReadonlyArray<Fault>, reads = false) => {
    const left = [...faults]
    return (request: { readonly method: string; readonly path: string }): Fault =>
      reads || isWrite(request) ? (left.shift() ?? "pass") : "pass"
  }

  const failureOf = (effect: Effect.Effect<unknown, { readonly _tag: string }>) =>
    Effect.map(Effect.flip(effect), (error) => {
      assert.strictEqual(error._tag, "StoreFailure")
      return error as StoreFailure
    })

  it.effect("counts a write whose answer was lost as won when it finds it there", () =>
    Effect.gen(function* () {
      const { proxy, store, beside } = yield* through()
      for (const [i, fault] of (["dropAfter", "refuseAfter", "truncate", "late"] as const).entries()) {
        proxy.decide = first([fault])
        const etag = yield* store.create(`a/${i}`, bytesOf("mine"))
        assert.strictEqual((yield* beside.get(`a/${i}`)).etag, etag, fault)
        proxy.decide = first([fault, fault])
        const next = yield* store.replace(`a/${i}`, bytesOf("mine too"), etag)
        yield* Effect.promise(() => proxy.settled())
        const there = yield* beside.get(`a/${i}`)
        assert.deepStrictEqual([there.etag, textOf(there.body)], [next, "mine too"], fault)
      }
    }).pipe(Effect.scoped)
  )

  it.effect("sends a write once more where it did not arrive", () =>
    Effect.gen(function* () {
      const { proxy, store } = yield* through()
      proxy.decide = first(["dropBefore", "refuse"])
      yield* store.create("a", bytesOf("1"))
      assert.strictEqual(proxy.seen.filter(isWrite).length, 3)
      assert.strictEqual(textOf((yield* store.get("a")).body), "1")
      proxy.decide = first(["dropAfter", "refuse"])
      yield* store.delete("a")
      assert.strictEqual((yield* Effect.flip(store.get("a")))._tag, "ObjectMissing")
    }).pipe(Effect.scoped)
  )

  it.effect("does not take another's object for its own", () =>
    Effect.gen(function* () {
      const { proxy, store, beside } = yield* through()
      yield* beside.create("a", bytesOf("same"))
      proxy.decide = first(["dropBefore"])
      assert.strictEqual((yield* Effect.flip(store.create("a", bytesOf("same"))))._tag, "ObjectExists")
      const { etag } = yield* beside.get("a")
      yield* beside.replace("a", bytesOf("newer"), etag)
      assert.strictEqual((yield* Effect.flip(store.replace("a", bytesOf("newer"), etag)))._tag, "ObjectChanged")
      proxy.decide = first(["dropBefore"])
      // The first attempt may have been what the newer one was made from.
      assert.isTrue((yield* failureOf(store.replace("a", bytesOf("newer"), etag))).uncertain)
    }).pipe(Effect.scoped)
  )

  it.effect("says whether a write that failed may have taken effect", () =>
    Effect.gen(function* () {
      const { proxy, store } = yield* through(1, { attemptsMax: 2, requestMillis: 150 })
      const always = (fault: Fault) => () => fault
      for (const fault of ["dropBefore", "dropAfter", "refuse", "stall"] as const) {
        proxy.decide = always(fault)
        const failure = yield* failureOf(store.create(`b/${fault}`, bytesOf("1")))
        assert.isTrue(failure.uncertain, fault)
        assert.match(failure.detail, /after 2 attempts$/)
        assert.isTrue((yield* failureOf(store.replace(`b/${fault}`, bytesOf("1"), "17"))).uncertain, fault)
        assert.isTrue((yield* failureOf(store.delete(`b/${fault}`))).uncertain, fault)
        assert.isFalse((yield* failureOf(store.get(`b/${fault}`))).uncertain, fault)
        assert.isFalse((yield* failureOf(store.list("b/"))).uncertain, fault)
      }
      proxy.decide = always("pass")
      // Nothing listens there: nothing was sent.
      yield* Effect.promise(() => proxy.stop())
      const refused = yield* failureOf(store.create("b/refused", bytesOf("1")))
      assert.isFalse(refused.uncertain)
      assert.match(refused.detail, /ECONNREFUSED/)
    }).pipe(Effect.scoped)
  )

  it.effect("ends within its attempts and its time", () =>
    Effect.gen(function* () {
      const { proxy, store } = yield* through(1, { attemptsMax: 4 })
      proxy.decide = () => "refuse"
      yield* failureOf(store.get("a"))
      assert.strictEqual(proxy.seen.length, 4)
      const hasty = yield* through(1, { attemptsMax: 100, retryMillis: 0 })
      hasty.proxy.decide = () => "refuse"
      yield* failureOf(hasty.store.get("a"))
      assert.strictEqual(hasty.proxy.seen.length, 1)
    }).pipe(Effect.scoped)
  )

  it.effect("creates what is not large with one request", () =>
    Effect.gen(function* () {
      const { proxy, store } = yield* through(1, { resumableBytes: 16 * 1_048_576 })
      for (const bytes of [0, 100_000, 1_048_576, 8 * 1_048_576 + 4_096]) {
        proxy.seen.length = 0
        yield* store.create(`one/${bytes}`, new Uint8Array(bytes).fill(bytes % 251))
        assert.deepStrictEqual(
          proxy.seen.map(({ method, path }) => `${method} ${path.split("?")[0]}`),
          ["POST /upload/storage/v1/b/ruvector-test/o"]
        )
      }
    }).pipe(Effect.scoped)
  )

  it.effect("lets one of many creators win, whatever becomes of their requests", () =>
    forEachSeed(8, (seed) =>
      Effect.gen(function* () {
        const url = freshUrl()
        const random = seededRandom(seed)
        const proxy = yield* proxyTo(seed)
        const stores = yield* Effect.forEach(range(3), () => storeAt(proxy.url, url, { attemptsMax: 4 }))
        const beside = yield* storeAt(server().url, url)
        const faults: ReadonlyArray<Fault> = ["dropBefore", "dropAfter", "late", "refuse", "refuseAfter", "truncate"]
        proxy.decide = () => (random() < 0.5 ? (faults[Math.floor(random() * faults.length)] as Fault) : "pass")
        for (const round of range(6)) {
          const key = `collections/c/p000/log/${round}`
          const exits = yield* Effect.forEach(stores, (store, i) => Effect.exit(store.create(key, bytesOf(`${i}`))), {
            concurrency: "unbounded"
          })
          yield* Effect.promise(() => proxy.settled())
          const there = yield* Effect.exit(beside.get(key))
          const owner = Exit.isSuccess(there) ? Number(textOf(there.value.body)) : undefined
          for (const [i, exit] of exits.entries()) {
            if (Exit.isSuccess(exit)) {
              assert.strictEqual(owner, i, `seed ${seed}, round ${round}: ${i} was told it won`)
              assert.strictEqual(exit.value, Exit.isSuccess(there) ? there.value.etag : "")
              continue
            }
            const error = yield* Effect.flip(exit)
            if (error._tag === "StoreFailure" && error.uncertain) continue
            assert.notStrictEqual(owner, i, `seed ${seed}, round ${round}: ${i} was told that it did not`)
          }
        }
      }).pipe(Effect.scoped)
    )
  )

  it.effect("makes one chain of many replacements", () =>
    forEachSeed(4, (seed) =>
      Effect.gen(function* () {
        const url = freshUrl()
        const random = seededRandom(seed)
        const proxy = yield* proxyTo(seed)
        const stores = yield* Effect.forEach(range(3), () => storeAt(proxy.url, url, { attemptsMax: 12 }))
        const faults: ReadonlyArray<Fault> = ["dropBefore", "dropAfter", "late", "refuseAfter"]
        proxy.decide = (request) =>
          isWrite(request) && random() < 0.3 ? (faults[Math.floor(random() * faults.length)] as Fault) : "pass"
        yield* replaceRace(stores, 5)
      }).pipe(Effect.scoped)
    )
  )

  it.effect("never gives what is not the object's", () =>
    forEachSeed(2, (seed) =>
      Effect.gen(function* () {
        const { proxy, store, beside } = yield* through(seed, { attemptsMax: 20 })
        const random = seededRandom(seed)
        const body = Uint8Array.from({ length: 3_000_000 }, () => Math.floor(random() * 256))
        yield* beside.create("large", body)
        const faults: ReadonlyArray<Fault> = ["truncate", "dropAfter", "refuse"]
        proxy.decide = () => (random() < 0.4 ? (faults[Math.floor(random() * faults.length)] as Fault) : "pass")
        const whole = yield* store.withFile("large", (path) => Effect.promise(() => readFile(path)))
        assert.isTrue(Buffer.from(whole).equals(body))
        assert.isTrue(Buffer.from((yield* store.get("large")).body).equals(body))
        // A flipped bit is found by the checksum, and fetched again; where all are flipped, it is said.
        proxy.decide = first(["flip"], true)
        assert.isTrue(Buffer.from((yield* store.get("large")).body).equals(body))
        proxy.decide = first(["pass", "flip"], true)
        const again = yield* store.withFile("large", (path) => Effect.promise(() => readFile(path)))
        assert.isTrue(Buffer.from(again).equals(body))
        // A store that gives no checksum with a part is asked for it; of a whole object it has to say one.
        proxy.decide = () => "unsummed"
        const unsummed = yield* store.withFile("large", (path) => Effect.promise(() => readFile(path)))
        assert.isTrue(Buffer.from(unsummed).equals(body))
        assert.match((yield* failureOf(store.get("large"))).detail, /no checksum/)
        let media = 0
        proxy.decide = (request) => (request.path.includes("alt=media") && ++media === 3 ? "flip" : "unsummed")
        const mended = yield* store.withFile("large", (path) => Effect.promise(() => readFile(path)))
        assert.isTrue(Buffer.from(mended).equals(body))
        assert.isAbove(media, 6)
        proxy.decide = (request) => (request.path.includes("alt=media") ? "flip" : "pass")
        assert.match((yield* failureOf(store.withFile("large", () => Effect.void))).detail, /checksum/)
      }).pipe(Effect.scoped)
    )
  )

  it.effect("downloads many pieces at once, and not more than it says", () =>
    Effect.gen(function* () {
      const { proxy, store, beside } = yield* through(1, { downloadBytes: 65_536 })
      const body = Uint8Array.from({ length: 1_000_000 }, (_, i) => (i * 31) >>> 3)
      for (const i of range(6)) yield* beside.create(`large/${i}`, body)
      const one = yield* store.withFile("large/0", (path) => Effect.promise(() => readFile(path)))
      assert.isTrue(one.equals(body))
      assert.isAbove(proxy.mostAtOnce(), 1)
      assert.isAtMost(proxy.mostAtOnce(), GcsObjectStore.downloadsAtOnce)
      yield* Effect.forEach(range(6), (i) => store.withFile(`large/${i}`, () => Effect.void), {
        concurrency: "unbounded"
      })
      assert.isAbove(proxy.mostAtOnce(), GcsObjectStore.downloadsAtOnce)
      assert.isAtMost(proxy.mostAtOnce(), GcsObjectStore.piecesAtOnce)
    }).pipe(Effect.scoped)
  )

  it.effect("leaves nothing of a download that is interrupted", () =>
    Effect.gen(function* () {
      const scratch = yield* tempFolder
      const { proxy, store, beside } = yield* through(1, { scratch })
      yield* beside.create("large", new Uint8Array(3_000_000))
      let requests = 0
      // The first piece comes, the others never.
      proxy.decide = () => (++requests > 1 ? "stall" : "pass")
      const fiber = yield* Effect.forkChild(store.withFile("large", () => Effect.void))
      yield* Effect.promise(async () => {
        while (requests < 3) await new Promise((resolve) => setTimeout(resolve, 5))
      })
      assert.strictEqual((yield* Effect.promise(() => readdir(scratch))).length, 1)
      yield* Fiber.interrupt(fiber)
      yield* Effect.promise(async () => {
        while ((await readdir(scratch)).length > 0) await new Promise((resolve) => setTimeout(resolve, 5))
      })
    }).pipe(Effect.scoped)
  )

  it.effect("keeps a download to one generation", () =>
    Effect.gen(function* () {
      const { proxy, store, beside } = yield* through()
      const etag = yield* beside.create("m", new Uint8Array(3_000_000).fill(1))
      let replaced = false
      let replacing: Promise<unknown> | undefined
      proxy.decide = () => {
        // After the first piece, and before the others.
        if (replaced) replacing ??= Effect.runPromise(beside.replace("m", new Uint8Array(2_500_000).fill(2), etag))
        replaced = true
        return "pass"
      }
      const got = yield* store.withFile("m", (path) => Effect.promise(() => readFile(path)))
      yield* Effect.promise(async () => replacing)
      assert.isTrue(got.every((byte) => byte === got[0]))
      assert.strictEqual(got.length, got[0] === 1 ? 3_000_000 : 2_500_000)
    }).pipe(Effect.scoped)
  )

  it.effect("goes on with a cut upload where it was", () =>
    Effect.gen(function* () {
      const { proxy, store, beside } = yield* through(1, { resumes: true })
      const folder = yield* tempFolder
      const body = Uint8Array.from({ length: 5_500_000 }, (_, i) => (i * 7_919) >>> 5)
      for (const source of ["file", "bytes"] as const) {
        const file = join(folder, source)
        yield* Effect.promise(() => writeFile(file, body))
        proxy.seen.length = 0
        // The session; pieces of 1 MiB, with the questions between them.
        proxy.decide = first(["pass", "pass", "half", "pass", "dropAfter", "refuse", "pass", "dropBefore"])
        const etag = yield* store.create(`big/${source}`, source === "file" ? { file } : body)
        const there = yield* beside.get(`big/${source}`)
        assert.strictEqual(there.etag, etag)
        assert.isTrue(Buffer.from(there.body).equals(body))
        const sent = proxy.seen.reduce((sum, request) => sum + request.bodyBytes, 0)
        assert.isBelow(sent, body.length + 3 * 1_048_576 + 10_000)
        assert.strictEqual(proxy.seen.filter(({ path }) => path.includes("uploadType=resumable")).length, 1)
        const left = yield* Effect.promise(() =>
          stat(file).then(
            () => true,
            () => false
          )
        )
        assert.strictEqual(left, source === "bytes")
      }
    }).pipe(Effect.scoped)
  )

  it.effect("counts an upload as won whose last answer was lost, and begins one anew whose session is gone", () =>
    Effect.gen(function* () {
      for (const resumes of [true, false]) {
        const { proxy, store, beside } = yield* through(1, { resumes })
        const body = new Uint8Array(1_500_000).fill(3)
        proxy.decide = first(["pass", "pass", "dropAfter"])
        const etag = yield* store.create("big", body)
        assert.strictEqual((yield* beside.get("big")).etag, etag)
        proxy.decide = first(["pass", "dropBefore", "dropBefore", "dropBefore"])
        const next = yield* store.replace("big", new Uint8Array(1_500_000).fill(4), etag)
        const there = yield* beside.get("big")
        assert.deepStrictEqual([there.etag, there.body[7]], [next, 4])
        assert.strictEqual((yield* Effect.flip(store.create("big", body)))._tag, "ObjectExists")
      }
    }).pipe(Effect.scoped)
  )
})
