/** Backups that are broken off, damaged, overtaken, or of other data; what is kept of them, and for how long. */
import { mkdtemp, rm } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { afterAll, assert, beforeAll, describe, it } from "@effect/vitest"
import { Context, Effect, Exit, Layer, Schema } from "effect"
import type { Collection } from "../../src/protocol/Collection.ts"
import { createKey, listKeys, revokeKey } from "../../src/tiers/ApiKeys.ts"
import { backup } from "../../src/tiers/Backup.ts"
import { listAll, newestRun, openBackup } from "../../src/tiers/BackupReader.ts"
import { truthOf } from "../../src/tiers/BackupTruth.ts"
import { verifyBackup, verifyData } from "../../src/tiers/BackupVerify.ts"
import { type Catalogue, CatalogueText, catalogueKey, partitionPrefix } from "../../src/tiers/CatalogueObject.ts"
import { encodeSegment } from "../../src/tiers/LogSegment.ts"
import { ObjectStore } from "../../src/tiers/ObjectStore.ts"
import * as PartitionLog from "../../src/tiers/PartitionLog.ts"
import { encodeManifest } from "../../src/tiers/PartitionManifest.ts"
import { restore } from "../../src/tiers/Restore.ts"
import { startActors } from "../support/Actors.ts"
import { Faults, forEachSeed, withFaults } from "./FaultyObjectStore.ts"

type Store = ObjectStore["Service"]

const collection: Collection = {
  name: "c",
  uid: "0123456789abcdef",
  dimensions: 2,
  metric: "l2",
  partitions: 1,
  index: { m: 16, ef_construction: 200, ef_search: 128 },
  created_ms: 0
}
const prefix = partitionPrefix(collection.uid, 0)
const everMillis = 1_000

let scratch: string
beforeAll(async () => {
  scratch = await mkdtemp(join(tmpdir(), "ruvector-"))
})
afterAll(() => rm(scratch, { recursive: true, force: true }))

const memory = Effect.map(Effect.scoped(Layer.build(ObjectStore.layerMemory)), (context) =>
  Context.get(context, ObjectStore)
)

/** A store with the collection, its log up to a position: at each one record, named by it, at that millisecond. */
const sourceUpTo = Effect.fnUntraced(function* (last: number) {
  const store = yield* memory
  const catalogue: Catalogue = { format: 1, collections: [collection], removing: [] }
  yield* store.create(catalogueKey, Buffer.from(yield* Schema.encodeEffect(CatalogueText)(catalogue)))
  const manifest = { epoch: 1, owner: "00000000000000aa", prunedSeq: 0, snapshots: [] }
  yield* store.create(`${prefix}/manifest`, encodeManifest(manifest))
  yield* writeLog(store, 1, last)
  return store
})

const logKey = (seq: number): string => `${prefix}/log/${seq.toString(16).padStart(16, "0")}`

const writeLog = (store: Store, first: number, last: number, x = 0) =>
  Effect.forEach(
    Array.from({ length: last - first + 1 }, (_, i) => first + i),
    (seq) =>
      store.create(
        logKey(seq),
        encodeSegment({ epoch: 1, seq, nonce: BigInt(seq * 1_000 + x), dimensions: 2 }, [
          {
            kind: "upsert",
            id: `id-${seq}`,
            version: { time: BigInt(everMillis + seq) * 1_000_000n, region: "local", counter: seq },
            vector: new Float32Array([seq, x]),
            metadata: ""
          }
        ])
      ),
    { discard: true }
  )

/** As the catalogue does it: first out of the list, then its objects, the manifest first. */
const deleteCollection = Effect.fnUntraced(function* (store: Store) {
  const { etag } = yield* store.get(catalogueKey)
  const removed = [{ name: collection.name, uid: collection.uid, removed_ms: Date.now() }]
  const catalogue: Catalogue = { format: 1, collections: [], removing: [], removed }
  yield* store.replace(catalogueKey, Buffer.from(yield* Schema.encodeEffect(CatalogueText)(catalogue)), etag)
  yield* Effect.provideService(PartitionLog.remove(prefix), ObjectStore, store)
})

const idsIn = (store: Store, atMillis?: number) =>
  Effect.gen(function* () {
    const run = yield* openBackup(store)
    return [...(yield* truthOf(store, run, collection.uid, atMillis)).keys()].length
  })

/** Flips one bit of an object. */
const damage = Effect.fnUntraced(function* (store: Store, key: string) {
  const { body, etag } = yield* store.get(key)
  const damaged = new Uint8Array(body)
  const at = damaged.length >> 1
  damaged[at] = (damaged[at] as number) ^ 4
  yield* store.replace(key, damaged, etag)
})

describe("a backup", () => {
  it.live("has the API keys; those of the newest are restored, to whatever time", () =>
    Effect.gen(function* () {
      const source = yield* sourceUpTo(5)
      const destination = yield* memory
      const wanted = { name: "ci", tenant: "default", scopes: ["read"], tier: "standard" } as const
      const first = yield* createKey(source, wanted)
      const second = yield* createKey(source, { ...wanted, name: "other" })
      yield* backup({ source, destination, scratch })
      yield* revokeKey(source, first.record.id)
      yield* backup({ source, destination, scratch })

      const target = yield* memory
      yield* restore({ backup: destination, target, scratch, atMillis: everMillis + 3 })
      const restored = yield* listKeys(target)
      assert.deepStrictEqual(restored, yield* listKeys(source))
      assert.isDefined(restored.find(({ id }) => id === first.record.id)?.revoked_ms)
      assert.isUndefined(restored.find(({ id }) => id === second.record.id)?.revoked_ms)

      // One collection beside others brings no keys along.
      const other = yield* sourceUpTo(1)
      yield* restore({
        backup: destination,
        target: other,
        scratch,
        atMillis: undefined,
        only: { collection: "c", as: "d" }
      })
      assert.deepStrictEqual(yield* listKeys(other), [])
    })
  )

  it.live("that dies at any call counts for nothing until it is whole, and is made good by the next", () =>
    Effect.gen(function* () {
      const source = yield* sourceUpTo(5)
      const plain = yield* memory
      yield* backup({ source, destination: plain, scratch })
      yield* writeLog(source, 6, 9)
      yield* forEachSeed(40, (seed) =>
        Effect.gen(function* () {
          const inner = yield* memory
          yield* backup({ source: yield* sourceUpTo(5), destination: inner, scratch })
          const faults = new Faults(seed)
          faults.callsLeft = 1 + (seed % 20)
          faults.crashAfterEffect = seed % 2 === 0
          const died = yield* Effect.exit(backup({ source, destination: withFaults(inner, faults), scratch }))
          const { run } = yield* newestRun(inner)
          // Either not a word of it, or all: a death after the last object has been written is a backup.
          assert.strictEqual(yield* idsIn(inner), run?.run === 2 ? 9 : 5)
          if (Exit.isSuccess(died)) assert.strictEqual(run?.run, 2)
          const again = yield* backup({ source, destination: inner, scratch, pruneEveryMillis: 0 })
          assert.strictEqual(yield* idsIn(inner), 9)
          assert.deepStrictEqual((yield* verifyBackup(inner, { deep: true })).damaged, [])
          // What the dead one left is gone.
          const left = (yield* listAll(inner, "collections/")).map(({ key }) => key)
          assert.isTrue(left.every((key) => again.run.attempts.some((attempt) => key.includes(attempt))))
        })
      )
    })
  )

  it.live("under a store that fails, is uncertain or late, ends whole or fails, and a whole one is exact", () =>
    forEachSeed(30, (seed) =>
      Effect.gen(function* () {
        const source = yield* sourceUpTo(8)
        const inner = yield* memory
        const faults = new Faults(seed)
        Object.assign(faults, { failShare: 0.03, dropShare: 0.05, doubtShare: 0.1, lateShare: 0.05, turnsMax: 3 })
        let last = 8
        let whole = 0
        for (let n = 0; n < 6; n++) {
          const done = yield* Effect.exit(backup({ source, destination: withFaults(inner, faults), scratch }))
          if (Exit.isSuccess(done)) whole = last
          if (whole > 0) assert.isAtLeast(yield* idsIn(inner), whole)
          yield* writeLog(source, last + 1, last + 3)
          last += 3
        }
        yield* faults.heal
        yield* backup({ source, destination: inner, scratch })
        assert.strictEqual(yield* idsIn(inner), last)
        assert.strictEqual(yield* idsIn(inner, everMillis + 4), 4)
      })
    )
  )

  it.live("copies only what is new", () =>
    Effect.gen(function* () {
      const source = yield* sourceUpTo(5)
      const destination = yield* memory
      assert.strictEqual((yield* backup({ source, destination, scratch })).segments, 5)
      assert.strictEqual((yield* backup({ source, destination, scratch })).segments, 0)
      yield* writeLog(source, 6, 7)
      assert.strictEqual((yield* backup({ source, destination, scratch })).segments, 2)
      assert.strictEqual(yield* idsIn(destination), 7)
    })
  )

  it.live("of two at one time counts as the one that ends first; the other says so", () =>
    Effect.gen(function* () {
      const source = yield* sourceUpTo(5)
      const destination = yield* memory
      // The second begins and ends inside of the first, just before that one's last object.
      const interrupted: Store = {
        ...destination,
        create: (key, body) =>
          key.startsWith("runs/")
            ? Effect.andThen(
                Effect.orDie(backup({ source, destination, scratch, pruneEveryMillis: 0 })),
                destination.create(key, body)
              )
            : destination.create(key, body)
      }
      const error = yield* Effect.flip(backup({ source, destination: interrupted, scratch }))
      assert.strictEqual(error._tag, "BackupRaced")
      assert.strictEqual(yield* idsIn(destination), 5)
      assert.deepStrictEqual((yield* verifyBackup(destination)).damaged, [])
    })
  )

  it.live("begins anew where the log is another than it was, and keeps the history before", () =>
    Effect.gen(function* () {
      const source = yield* sourceUpTo(5)
      const destination = yield* memory
      const first = yield* backup({ source, destination, scratch })
      // The last object was cut off and other writes followed, as of a directory put back from an older copy.
      yield* source.delete(logKey(5))
      yield* writeLog(source, 5, 6, 7)
      const { run } = yield* backup({ source, destination, scratch })
      assert.strictEqual(run.collections[0]?.partitions[0]?.length, 2)
      const now = yield* truthOf(destination, run, collection.uid, undefined)
      assert.deepStrictEqual(Array.from(now.get("id-5")?.vector ?? []), [5, 7])
      const then = yield* truthOf(destination, run, collection.uid, first.run.horizonMillis)
      assert.deepStrictEqual(Array.from(then.get("id-5")?.vector ?? []), [5, 0])
      assert.deepStrictEqual((yield* verifyBackup(destination, { deep: true })).damaged, [])
    })
  )

  it.live("is not misled by a collection that is deleted under its eyes", () =>
    forEachSeed(12, (seed) =>
      Effect.gen(function* () {
        const source = yield* sourceUpTo(5)
        const destination = yield* memory
        const first = yield* backup({ source, destination, scratch })
        yield* writeLog(source, 6, 6)
        let calls = 0
        const vanishing: Store = {
          ...source,
          get: (key, range) =>
            Effect.suspend(() =>
              ++calls === seed
                ? Effect.andThen(Effect.orDie(deleteCollection(source)), source.get(key, range))
                : source.get(key, range)
            )
        }
        const { damaged, run } = yield* backup({ source: vanishing, destination, scratch })
        assert.deepStrictEqual(damaged, [])
        assert.strictEqual(run.collections[0]?.partitions[0]?.length, 1)
        assert.isAtLeast((yield* truthOf(destination, run, collection.uid, first.run.horizonMillis)).size, 5)
        assert.isAtLeast((yield* truthOf(destination, run, collection.uid, undefined)).size, 5)
      })
    )
  )

  it.live("refuses data that never had what it holds, such as an empty directory", () =>
    Effect.gen(function* () {
      const destination = yield* memory
      yield* backup({ source: yield* sourceUpTo(5), destination, scratch })
      const error = yield* Effect.flip(backup({ source: yield* memory, destination, scratch }))
      assert.strictEqual(error._tag, "BackupForeign")
      assert.strictEqual(yield* idsIn(destination), 5)
    })
  )

  it.live("goes on after a restore into the same place", () =>
    Effect.gen(function* () {
      const destination = yield* memory
      yield* backup({ source: yield* sourceUpTo(5), destination, scratch })
      const target = yield* memory
      const atMillis = everMillis + 3
      const restored = yield* restore({ backup: destination, target, scratch, atMillis })
      const { run } = yield* backup({ source: target, destination, scratch })
      const uid = restored.collections[0]?.collection.uid as string
      assert.notStrictEqual(uid, collection.uid)
      assert.strictEqual((yield* truthOf(destination, run, uid, undefined)).size, 3)
      assert.strictEqual((yield* truthOf(destination, run, collection.uid, undefined)).size, 5)
      assert.isDefined(run.collections.find((one) => one.collection.uid === collection.uid)?.removedMillis)
    })
  )

  it.live("divides a group whose operations are of before and after the time", () =>
    Effect.gen(function* () {
      const source = yield* sourceUpTo(5)
      const ops = [6, 7].map((seq) => ({
        kind: "delete" as const,
        id: `id-${seq - 5}`,
        version: { time: BigInt(everMillis + seq) * 1_000_000n, region: "local", counter: seq }
      }))
      yield* source.create(logKey(6), encodeSegment({ epoch: 1, seq: 6, nonce: 6n, dimensions: 2 }, ops))
      const destination = yield* memory
      yield* backup({ source, destination, scratch })
      for (const [atMillis, count] of [
        [everMillis + 5, 5],
        [everMillis + 6, 4],
        [everMillis + 7, 3]
      ] as const) {
        const target = yield* memory
        const { newest } = yield* restore({ backup: destination, target, scratch, atMillis })
        assert.strictEqual(newest, BigInt(atMillis) * 1_000_000n)
        const actors = yield* Effect.promise(() => startActors(Context.make(ObjectStore, target)))
        const restored = yield* Effect.orDie(actors.router.collection("c"))
        assert.strictEqual(yield* Effect.orDie(actors.router.count(restored)), count)
        yield* Effect.promise(() => actors.stop())
      }
    })
  )

  it.live("says of a damaged source what it is, and copies the rest later", () =>
    Effect.gen(function* () {
      const source = yield* sourceUpTo(5)
      const destination = yield* memory
      const good = yield* source.get(logKey(4))
      yield* damage(source, logKey(4))
      const { damaged } = yield* backup({ source, destination, scratch })
      assert.deepStrictEqual(
        damaged.map(({ object }) => object),
        [logKey(4)]
      )
      assert.deepStrictEqual(
        (yield* verifyData(source)).damaged.map(({ object }) => object),
        [logKey(4)]
      )
      assert.strictEqual(yield* idsIn(destination), 3)
      const { etag } = yield* source.get(logKey(4))
      yield* source.replace(logKey(4), good.body, etag)
      assert.deepStrictEqual((yield* backup({ source, destination, scratch })).damaged, [])
      assert.strictEqual(yield* idsIn(destination), 5)
    })
  )

  it("of which any object is damaged or missing is verified to be so, by name", { timeout: 60_000 }, async () => {
    const run = Effect.runPromise
    const { destination } = await withSnapshots()
    const keys = (await run(listAll(destination, ""))).map(({ key }) => key)
    assert.isTrue(["/records", "/graph", "/about"].every((end) => keys.some((key) => key.endsWith(end))))
    for (const key of keys) {
      const { body } = await run(destination.get(key))
      // An older run than the newest is only looked at where that one is damaged.
      if (key.startsWith("runs/") && key !== keys.at(-1)) continue
      await run(damage(destination, key))
      assert.include(
        (await run(verifyBackup(destination))).damaged.map(({ object }) => object),
        key
      )
      await run(destination.delete(key))
      const named = (await run(verifyBackup(destination))).damaged.map(({ object }) => object)
      // A run that is missing is none; the one before it holds.
      if (!key.startsWith("runs/"))
        assert.isTrue(
          named.some((object) => key.startsWith(object)),
          `${key}: ${named}`
        )
      await run(destination.create(key, body))
      assert.deepStrictEqual((await run(verifyBackup(destination))).damaged, [])
    }
    // A damaged snapshot gives way to what is before it.
    const records = keys.findLast((key) => key.endsWith("/records")) as string
    await run(damage(destination, records))
    const target = await run(memory)
    const restored = await run(restore({ backup: destination, target, scratch, atMillis: undefined }))
    assert.strictEqual(restored.collections.length, 1)
    assert.deepStrictEqual((await run(verifyData(target, { deep: true }))).damaged, [])
  })

  it("keeps what the retention needs and removes the rest", { timeout: 60_000 }, async () => {
    const run = Effect.runPromise
    const { source, destination, times, sizes } = await withSnapshots()
    const before = (await run(listAll(destination, "collections/"))).length
    const oldMillis = times[0] as number
    const middle = Math.floor(times.length / 2)
    // So that the cutoff lies in the middle of the history.
    const keepDays = (Date.now() - (times[middle] as number)) / 86_400_000
    const report = await run(backup({ source, destination, scratch, keepDays, pruneEveryMillis: 0 }))
    assert.isAbove(report.removed, 0)
    assert.isBelow((await run(listAll(destination, "collections/"))).length, before)
    assert.deepStrictEqual((await run(verifyBackup(destination, { deep: true }))).damaged, [])
    const uid = report.run.collections[0]?.collection.uid as string
    for (let i = middle; i < times.length; i++) {
      assert.strictEqual((await run(truthOf(destination, report.run, uid, times[i]))).size, sizes[i])
    }
    const error = await run(
      Effect.flip(restore({ backup: destination, target: await run(memory), scratch, atMillis: oldMillis }))
    )
    assert.strictEqual(error._tag, "NotRestorable")
    assert.match(error._tag === "NotRestorable" ? error.message : "", /^[^\n]+ to 20[^\n]+$/)
  })

  it.live("is not restored to a time after it, over something, or of a collection that was not", () =>
    Effect.gen(function* () {
      const source = yield* sourceUpTo(5)
      const destination = yield* memory
      const { run } = yield* backup({ source, destination, scratch })
      const into = (target: Store, atMillis: number | undefined, only?: { collection: string; as: string }) =>
        Effect.flip(restore({ backup: destination, target, scratch, atMillis, only }))
      assert.strictEqual((yield* into(yield* memory, run.horizonMillis + 1))._tag, "NotRestorable")
      assert.strictEqual((yield* into(yield* memory, -1))._tag, "NotRestorable")
      assert.strictEqual((yield* into(source, undefined))._tag, "TargetNotEmpty")
      assert.strictEqual((yield* into(source, undefined, { collection: "c", as: "c" }))._tag, "NotRestorable")
      assert.strictEqual((yield* into(source, undefined, { collection: "x", as: "y" }))._tag, "NotRestorable")
      yield* restore({
        backup: destination,
        target: source,
        scratch,
        atMillis: everMillis + 2,
        only: { collection: "c", as: "d" }
      })
      const actors = yield* Effect.promise(() => startActors(Context.make(ObjectStore, source)))
      const counts = yield* Effect.forEach(yield* Effect.orDie(actors.router.collections), (one) =>
        Effect.map(Effect.orDie(actors.router.count(one)), (count) => [one.name, count])
      )
      yield* Effect.promise(() => actors.stop())
      assert.deepStrictEqual(counts, [
        ["c", 5],
        ["d", 2]
      ])
    })
  )
})

/** A collection written in rounds, each followed by a snapshot and a backup; times between rounds, and sizes then. */
const withSnapshots = async () => {
  const run = Effect.runPromise
  const source = await run(memory)
  const destination = await run(memory)
  const times: Array<number> = []
  const sizes: Array<number> = []
  for (let round = 0; round < 6; round++) {
    // Stopping takes a snapshot.
    const actors = await startActors(Context.make(ObjectStore, source))
    if (round === 0) await run(actors.router.createCollection("c", { dimensions: 64 }))
    const records = Array.from({ length: 50 }, (_, i) => ({
      id: `${round}-${i}`,
      vector: new Float32Array(64).fill(round + i + 1),
      metadata: ""
    }))
    await run(actors.router.upsert("c", records))
    await new Promise((resolve) => setTimeout(resolve, 3))
    times.push(Date.now() - 1)
    sizes.push((round + 1) * 50)
    await new Promise((resolve) => setTimeout(resolve, 3))
    await actors.stop()
    const { damaged } = await run(backup({ source, destination, scratch }))
    assert.deepStrictEqual(damaged, [])
  }
  return { source, destination, times, sizes }
}
