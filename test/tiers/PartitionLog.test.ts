import { join } from "node:path"
import { crc32 } from "node:zlib"
import { assert, describe, it } from "@effect/vitest"
import { Deferred, Effect, Exit, Fiber, Layer, Option, Scope, Stream } from "effect"
import { TestClock } from "effect/testing"
import * as FileObjectStore from "../../src/tiers/FileObjectStore.ts"
import { segmentFormat, verifySegment } from "../../src/tiers/LogSegment.ts"
import { ObjectStore, StoreFailure } from "../../src/tiers/ObjectStore.ts"
import * as PartitionLog from "../../src/tiers/PartitionLog.ts"
import { decodeManifest, encodeManifest } from "../../src/tiers/PartitionManifest.ts"
import { withoutFakeGcs } from "../support/FakeGcs.ts"
import { Faults, forEachSeed, seededRandom, withFaults } from "./FaultyObjectStore.ts"
import { cachedGcsLayer, gcsLayer, useFakeGcs } from "./gcsStores.ts"
import { range, tempFolder } from "./objectStoreSuite.ts"
import {
  type Applied,
  damage,
  idOf,
  logKey,
  openOwner,
  prefix,
  segmentOf,
  withSnapshotFiles
} from "./partitionOwner.ts"

const memory = <A, E>(effect: Effect.Effect<A, E, ObjectStore | Scope.Scope>) =>
  Effect.provide(Effect.scoped(effect), Layer.fresh(ObjectStore.layerMemory))

/** Runs with an owner that is closed before the next one opens. */
const session = Effect.scoped

const manifestKey = `${prefix}/manifest`

const ids = (applied: Applied) => applied.map(([, id]) => id)

const keysBelow = (below: string) =>
  Effect.flatMap(ObjectStore, (store) =>
    Effect.map(store.list(`${prefix}/${below}`), (page) => page.map(({ key }) => key.slice(prefix.length + 1)))
  )

const failureOf = <A, E, R>(effect: Effect.Effect<A, E, R>) => Effect.flip(effect)

/** Opens and replays, which together find any damage. */
const openAndReplay = session(Effect.map(openOwner(), ({ applied }) => applied()))

const stores = [
  ["memory", Layer.fresh(ObjectStore.layerMemory)],
  [
    "directory",
    Layer.unwrap(Effect.map(tempFolder, (folder) => FileObjectStore.layer({ directory: join(folder, "objects") })))
  ]
] as const

const suite = (name: string, layer: Layer.Layer<ObjectStore, unknown>) => {
  describe(`partition log, ${name}`, () => {
    it.effect("gives back what was appended, across owners and snapshots", () =>
      Effect.gen(function* () {
        const expected: Array<string> = []
        for (let round = 0; round < 6; round++) {
          yield* session(
            Effect.gen(function* () {
              const owner = yield* openOwner()
              assert.deepStrictEqual(ids(owner.applied()), expected)
              assert.strictEqual(owner.log.epoch, round + 1)
              assert.deepStrictEqual([owner.log.cut, owner.log.snapshotsRefused], [0, 0])
              for (let i = 0; i < 5; i++) {
                const id = `${round}.${i}`
                const before = owner.log.lastSeq()
                assert.strictEqual(yield* owner.append(id), before + 1)
                expected.push(id)
                if (round % 2 === 1 && i === 2) {
                  yield* owner.snapshot
                  assert.strictEqual(owner.log.snapshotSeq(), owner.log.lastSeq())
                  assert.deepStrictEqual([owner.log.tailCount(), owner.log.tailBytes()], [0, 0])
                }
              }
              assert.strictEqual(owner.log.tailCount(), owner.log.lastSeq() - owner.log.snapshotSeq())
              const read = yield* Stream.runCollect(owner.log.read(owner.log.oldestSeq()))
              const readIds = read.map(({ bytes }) => idOf(bytes))
              assert.deepStrictEqual(readIds, expected.slice(-readIds.length))
            })
          )
        }
        // Two snapshots are kept, and the log from the older one on.
        const manifest = yield* Effect.flatMap(ObjectStore, (store) => store.get(manifestKey))
        const { snapshots, prunedSeq } = Option.getOrThrow(
          Option.fromNullishOr(resultOf(decodeManifest(manifest.body)))
        )
        assert.strictEqual(snapshots.length, 2)
        assert.strictEqual(prunedSeq, snapshots[1]?.seq)
        assert.strictEqual((yield* keysBelow("snapshot/")).length, 4)
        assert.strictEqual((yield* keysBelow("log/"))[0], logKey(prunedSeq + 1).slice(prefix.length + 1))
      }).pipe(Effect.provide(layer))
    )

    it.effect("is removed whole, and again without harm", () =>
      Effect.gen(function* () {
        yield* session(
          Effect.gen(function* () {
            const owner = yield* openOwner()
            yield* owner.append("a")
            yield* owner.snapshot
            yield* owner.append("b")
            yield* PartitionLog.remove(prefix)
            assert.strictEqual((yield* failureOf(owner.append("c")))._tag, "NotOwner")
          })
        )
        yield* PartitionLog.remove(prefix)
        const store = yield* ObjectStore
        assert.deepStrictEqual(yield* store.list(""), [])
        assert.deepStrictEqual(yield* openAndReplay, [])
      }).pipe(Effect.provide(layer))
    )
  })
}

for (const [name, layer] of stores) suite(name, layer)

describe.skipIf(withoutFakeGcs())("partition log on Google Cloud Storage", () => {
  const server = useFakeGcs()
  suite("bucket", Layer.fresh(gcsLayer(server)))
  suite("bucket with a cache on disk", Layer.fresh(cachedGcsLayer(server)))
})

const resultOf = <A>(result: { readonly _tag: string; readonly success?: A }): A | undefined => result.success

describe("partition log, damage", () => {
  const written = (count: number) =>
    session(
      Effect.gen(function* () {
        const owner = yield* openOwner()
        for (let i = 1; i <= count; i++) yield* owner.append(`id${i}`)
      })
    )

  it.effect("cuts an end that is torn anywhere, keeps it aside, and goes on", () =>
    Effect.gen(function* () {
      const length = segmentOf({ epoch: 1, seq: 3, nonce: 1n }, "id3").length
      for (const cut of [0, 1, 3, 4, 8, 59, 60, 63, 64, 65, 68, length - 4, length - 1, length + 1, length + 100]) {
        yield* memory(
          Effect.gen(function* () {
            yield* written(3)
            const torn = yield* Effect.flatMap(ObjectStore, (store) => store.get(logKey(3)))
            yield* damage(logKey(3), (bytes) => {
              const changed = new Uint8Array(cut)
              changed.set(bytes.subarray(0, cut))
              return changed
            })
            const owner = yield* openOwner()
            assert.deepStrictEqual([ids(owner.applied()), owner.log.cut], [["id1", "id2"], 1], `${cut} bytes`)
            const [aside] = yield* keysBelow("damaged/")
            assert.match(aside ?? "", /^damaged\/0{15}3-[0-9a-f]{16}$/)
            const kept = yield* Effect.flatMap(ObjectStore, (store) => store.get(`${prefix}/${aside}`))
            assert.strictEqual(kept.sizeBytes, cut)
            assert.isTrue(torn.sizeBytes === length)
            yield* owner.append("id4")
            yield* session(
              Effect.gen(function* () {
                const next = yield* openOwner()
                assert.deepStrictEqual([ids(next.applied()), next.log.cut], [["id1", "id2", "id4"], 0])
              })
            )
          })
        )
      }
    })
  )

  it.effect("cuts an end in which any bit is flipped", () =>
    forEachSeed(60, (seed) =>
      memory(
        Effect.gen(function* () {
          const random = seededRandom(seed)
          const count = 1 + (seed % 3)
          yield* written(count)
          yield* damage(logKey(count), flip(random))
          const owner = yield* openOwner()
          assert.strictEqual(owner.log.cut, 1)
          assert.deepStrictEqual(
            ids(owner.applied()),
            range(count - 1).map((i) => `id${i + 1}`)
          )
        })
      )
    )
  )

  it.effect("refuses damage anywhere before the end, and names the object", () =>
    forEachSeed(60, (seed) =>
      memory(
        Effect.gen(function* () {
          const random = seededRandom(seed)
          yield* written(5)
          const seq = 1 + Math.floor(random() * 4)
          yield* damage(
            logKey(seq),
            random() < 0.3 ? (bytes) => bytes.subarray(0, Math.floor(random() * bytes.length)) : flip(random)
          )
          const error = yield* failureOf(openAndReplay)
          assert.isTrue(error._tag === "LogCorrupt" && error.object === logKey(seq), String(error))
          assert.include(error.message, logKey(seq))
          assert.deepStrictEqual(yield* keysBelow("damaged/"), [])
        })
      )
    )
  )

  it.effect("refuses two damaged segments at the end", () =>
    memory(
      Effect.gen(function* () {
        yield* written(4)
        yield* damage(logKey(3), () => new Uint8Array(10))
        yield* damage(logKey(4), () => new Uint8Array(10))
        const error = yield* failureOf(openAndReplay)
        assert.isTrue(error._tag === "LogCorrupt" && error.object === logKey(3) && error.fault === "short")
        assert.deepStrictEqual(yield* keysBelow("damaged/"), [])
      })
    )
  )

  it.effect("refuses a missing segment, wherever it is missing from", () =>
    Effect.gen(function* () {
      for (const seq of [1, 2, 4]) {
        yield* memory(
          Effect.gen(function* () {
            yield* written(5)
            yield* Effect.flatMap(ObjectStore, (store) => store.delete(logKey(seq)))
            const error = yield* failureOf(openAndReplay)
            assert.isTrue(error._tag === "LogCorrupt" && error.object === logKey(seq) && error.fault === "missing")
          })
        )
      }
    })
  )

  it.effect("refuses a segment that is another's place, and an epoch that goes backwards", () =>
    memory(
      Effect.gen(function* () {
        const store = yield* ObjectStore
        yield* written(3)
        const third = yield* store.get(logKey(3))
        yield* damage(logKey(2), () => third.body)
        const misplaced = yield* failureOf(openAndReplay)
        assert.isTrue(
          misplaced._tag === "LogCorrupt" && misplaced.object === logKey(2) && misplaced.fault === "position"
        )
        for (const [seq, epoch] of [
          [2, 3],
          [1, 2]
        ] as const) {
          yield* damage(logKey(seq), () => segmentOf({ epoch, seq, nonce: 9n }, "x"))
          const error = yield* failureOf(openAndReplay)
          assert.isTrue(error._tag === "LogCorrupt" && error.fault === "epoch", String(error))
        }
      })
    )
  )

  it.effect("refuses a log that is ahead of its manifest", () =>
    memory(
      Effect.gen(function* () {
        yield* written(2)
        const store = yield* ObjectStore
        yield* store.create(logKey(3), segmentOf({ epoch: 9, seq: 3, nonce: 9n }, "x"))
        const error = yield* failureOf(openAndReplay)
        assert.isTrue(error._tag === "LogCorrupt" && error.object === logKey(3) && error.fault === "epoch")
      })
    )
  )

  it.effect("refuses a newer format of segments and manifests as what it is", () =>
    memory(
      Effect.gen(function* () {
        yield* written(3)
        const newer = (bytes: Uint8Array) => {
          const view = new DataView(bytes.buffer)
          view.setUint16(4, segmentFormat + 1, true)
          view.setUint32(60, crc32(bytes.subarray(0, 60)), true)
          return bytes
        }
        for (const seq of [3, 2]) {
          yield* damage(logKey(seq), newer)
          const error = yield* failureOf(openAndReplay)
          assert.isTrue(error._tag === "NewerFormat" && error.object.startsWith(`${prefix}/log/`), String(error))
          assert.include(error.message, `format ${segmentFormat + 1}, this version reads up to ${segmentFormat}`)
        }
        yield* damage(manifestKey, (bytes) => {
          const text = Buffer.from(bytes).toString().replace('"format": 1', '"format": 7')
          const blank = text.replace(/"checksum": "[0-9a-f]{8}"/, '"checksum": "00000000"')
          return Buffer.from(blank.replace("00000000", crc32(blank).toString(16).padStart(8, "0")))
        })
        const error = yield* failureOf(openAndReplay)
        assert.isTrue(error._tag === "NewerFormat" && error.object === manifestKey && error.found === 7)
      })
    )
  )

  it.effect("refuses a manifest in which any bit is flipped, and a missing one", () =>
    forEachSeed(40, (seed) =>
      memory(
        Effect.gen(function* () {
          const store = yield* ObjectStore
          yield* written(2)
          yield* damage(manifestKey, flip(seededRandom(seed)))
          const error = yield* failureOf(openAndReplay)
          assert.isTrue(error._tag === "LogCorrupt" && error.object === manifestKey, String(error))
          yield* store.delete(manifestKey)
          const missing = yield* failureOf(openAndReplay)
          assert.isTrue(missing._tag === "LogCorrupt" && missing.fault === "missing", String(missing))
        })
      )
    )
  )

  it("keeps a manifest's fields", () => {
    const object = (key: string) => ({ key, bytes: 2 ** 40, crc32: 2 ** 32 - 1 })
    const snapshot = { seq: 7, records: object("r"), graph: object("g"), createdMillis: 1 }
    const manifest = { epoch: 3, owner: "00000000".repeat(2), prunedSeq: 5, snapshots: [snapshot] }
    assert.deepStrictEqual(resultOf(decodeManifest(encodeManifest(manifest))), manifest)
  })

  const twoSnapshots = session(
    Effect.gen(function* () {
      const owner = yield* openOwner()
      for (let i = 1; i <= 12; i++) {
        yield* owner.append(`id${i}`)
        if (i % 4 === 0) yield* owner.snapshot
      }
      yield* owner.append("id13")
    })
  )
  const all = range(13).map((i) => `id${i + 1}`)

  it.effect("falls back to the older snapshot where a file of the newest is damaged or missing", () =>
    Effect.gen(function* () {
      for (const [file, harm] of [
        ["records", "flip"],
        ["graph", "flip"],
        ["records", "cut"],
        ["graph", "delete"]
      ] as const) {
        yield* memory(
          Effect.gen(function* () {
            const store = yield* ObjectStore
            yield* twoSnapshots
            const newest = (yield* keysBelow("snapshot/")).filter((key) => key.endsWith(file)).at(-1)
            const key = `${prefix}/${newest}`
            if (harm === "delete") yield* store.delete(key)
            else yield* damage(key, harm === "flip" ? flip(seededRandom(5)) : (bytes) => bytes.subarray(1))
            yield* session(
              Effect.gen(function* () {
                const owner = yield* openOwner()
                assert.deepStrictEqual(ids(owner.applied()), all)
                assert.deepStrictEqual([owner.log.snapshotsRefused, owner.log.snapshot?.seq], [1, 8])
                yield* owner.append("id14")
              })
            )
            yield* session(
              Effect.gen(function* () {
                const owner = yield* openOwner()
                // Given up for good; what is in its place by now is another history.
                assert.deepStrictEqual([owner.log.snapshotsRefused, owner.log.snapshot?.seq], [0, 8])
                assert.deepStrictEqual(ids(owner.applied()), [...all, "id14"])
                yield* owner.snapshot
                assert.strictEqual((yield* keysBelow("snapshot/")).length, 4)
              })
            )
            assert.deepStrictEqual(ids(yield* openAndReplay), [...all, "id14"])
          })
        )
      }
    })
  )

  it.effect("replays the whole log where the first snapshot is damaged, and refuses where none is left", () =>
    memory(
      Effect.gen(function* () {
        yield* session(
          Effect.gen(function* () {
            const owner = yield* openOwner()
            yield* owner.append("a")
            yield* owner.snapshot
            yield* owner.append("b")
          })
        )
        const [first] = yield* keysBelow("snapshot/")
        yield* damage(`${prefix}/${first}`, () => new Uint8Array(3))
        assert.deepStrictEqual(ids(yield* openAndReplay), ["a", "b"])
        yield* session(
          Effect.gen(function* () {
            const owner = yield* openOwner()
            for (const id of ["c", "d"]) {
              yield* owner.append(id)
              yield* owner.snapshot
            }
          })
        )
        for (const key of yield* keysBelow("snapshot/")) yield* damage(`${prefix}/${key}`, () => new Uint8Array(3))
        const error = yield* failureOf(openAndReplay)
        assert.isTrue(error._tag === "LogCorrupt" && error.fault === "snapshot", String(error))
        // Refused without a change: the snapshots are still listed for whoever repairs them.
        const again = yield* failureOf(openAndReplay)
        assert.isTrue(again._tag === "LogCorrupt" && again.fault === "snapshot", String(again))
      })
    )
  )

  it.effect("passes over a snapshot that its caller could not open", () =>
    memory(
      Effect.gen(function* () {
        yield* twoSnapshots
        const owner = yield* openOwner({ leaseMillis: 0, snapshotsBefore: 12 })
        assert.deepStrictEqual([owner.log.snapshotsRefused, owner.log.snapshot?.seq], [1, 8])
        assert.deepStrictEqual(ids(owner.applied()), all)
      })
    )
  )

  it.effect("does not believe in damage that a second look does not find", () =>
    forEachSeed(30, (seed) =>
      memory(
        Effect.gen(function* () {
          yield* written(4)
          const store = yield* ObjectStore
          // Each object is damaged on its first read and whole on the next.
          const seen = new Set<string>()
          const faults = new Faults(seed)
          const flaky = withFaults(store, faults)
          const once: ObjectStore["Service"] = {
            ...flaky,
            get: (key) => {
              faults.corruptShare = seen.has(key) ? 0 : 1
              if (!seen.delete(key)) seen.add(key)
              return flaky.get(key)
            }
          }
          const owner = yield* openOwner().pipe(Effect.provideService(ObjectStore, once))
          assert.deepStrictEqual([ids(owner.applied()), owner.log.cut], [["id1", "id2", "id3", "id4"], 0])
        })
      )
    )
  )
})

/** Flips one bit somewhere. */
const flip = (random: () => number) => (bytes: Uint8Array) => {
  const at = Math.floor(random() * bytes.length)
  bytes[at] = (bytes[at] as number) ^ (1 << Math.floor(random() * 8))
  return bytes
}

describe("partition log, reading", () => {
  it.effect("reads from any position, and says where it begins once it was pruned", () =>
    memory(
      Effect.gen(function* () {
        const owner = yield* openOwner()
        for (let i = 1; i <= 30; i++) yield* owner.append(`id${i}`)
        const from = (seq: number) =>
          Effect.map(Stream.runCollect(owner.log.read(seq)), (entries) => entries.map((entry) => entry.seq))
        assert.deepStrictEqual(
          yield* from(1),
          range(30).map((i) => i + 1)
        )
        assert.deepStrictEqual(yield* from(29), [29, 30])
        assert.deepStrictEqual(yield* from(31), [])
        assert.deepStrictEqual(yield* from(99), [])
        yield* owner.snapshot
        assert.strictEqual((yield* from(1)).length, 30)
        yield* owner.append("id31")
        yield* owner.snapshot
        assert.strictEqual(owner.log.oldestSeq(), 31)
        const error = yield* failureOf(from(30))
        assert.isTrue(error._tag === "Compacted" && error.oldestSeq === 31)
        assert.deepStrictEqual(yield* from(31), [31])
      })
    )
  )

  it.effect("says so as well where it is pruned while it is read", () =>
    memory(
      Effect.gen(function* () {
        const owner = yield* openOwner()
        for (let i = 1; i <= 200; i++) yield* owner.append(`id${i}`)
        let pruned = false
        const error = yield* owner.log.read(1).pipe(
          Stream.mapEffect(({ seq }) =>
            Effect.gen(function* () {
              if (seq !== 3 || pruned) return
              pruned = true
              yield* owner.snapshot
              yield* owner.append("more")
              yield* owner.snapshot
            })
          ),
          Stream.runDrain,
          failureOf
        )
        assert.isTrue("_tag" in error && error._tag === "Compacted" && error.oldestSeq === 201, String(error))
      })
    )
  )

  it.effect("reads ahead a bounded number", () =>
    memory(
      Effect.gen(function* () {
        const store = yield* ObjectStore
        const faults = new Faults(1)
        const owner = yield* openOwner().pipe(Effect.provideService(ObjectStore, withFaults(store, faults)))
        for (let i = 1; i <= 200; i++) yield* owner.append(`id${i}`)
        faults.calls.length = 0
        yield* owner.log.read(1).pipe(Stream.take(1), Stream.runDrain)
        assert.isAtMost(faults.calls.length, 40)
      })
    )
  )
})

describe("partition log, owners", () => {
  it.effect("stops an owner as soon as another has opened, and for good", () =>
    memory(
      Effect.gen(function* () {
        const first = yield* openOwner()
        yield* first.append("a")
        const second = yield* openOwner()
        assert.deepStrictEqual(ids(second.applied()), ["a"])
        const error = yield* failureOf(first.append("b"))
        assert.strictEqual(error._tag, "NotOwner")
        assert.strictEqual((yield* failureOf(first.append("c")))._tag, "NotOwner")
        assert.strictEqual((yield* failureOf(first.snapshot))._tag, "NotOwner")
        assert.strictEqual((yield* failureOf(first.settle))._tag, "NotOwner")
        yield* second.append("d")
        assert.deepStrictEqual(ids(second.applied()), ["a", "d"])
      })
    )
  )

  it.effect("is dead once its scope is closed", () =>
    memory(
      Effect.gen(function* () {
        const scope = yield* Scope.make()
        const owner = yield* openOwner().pipe(Scope.provide(scope))
        yield* owner.append("a")
        yield* Scope.close(scope, Exit.void)
        const error = yield* failureOf(owner.append("b"))
        assert.isTrue(error._tag === "NotOwner" && error.detail === "closed")
      })
    )
  )

  it.effect("takes two appends at one time for a defect", () =>
    memory(
      Effect.gen(function* () {
        const store = yield* ObjectStore
        const faults = new Faults(1)
        const owner = yield* openOwner().pipe(Effect.provideService(ObjectStore, withFaults(store, faults)))
        faults.turnsMax = 10
        const exits = yield* Effect.all([Effect.exit(owner.append("a")), Effect.exit(owner.append("b"))], {
          concurrency: 2
        })
        assert.deepStrictEqual([exits.filter(Exit.isSuccess).length, exits.filter(Exit.hasDies).length], [1, 1])
      })
    )
  )

  it.effect("looks at the manifest once in a lease, and does not prune before several of them", () =>
    memory(
      Effect.gen(function* () {
        const store = yield* ObjectStore
        const faults = new Faults(1)
        const lease = { leaseMillis: 2_000 }
        const looks = () => faults.calls.filter((call) => call === `get ${manifestKey}`).length
        const first = yield* openOwner(lease).pipe(Effect.provideService(ObjectStore, withFaults(store, faults)))
        const before = looks()
        for (let i = 0; i < 50; i++) yield* first.append(`a${i}`)
        assert.strictEqual(looks(), before)
        yield* TestClock.adjust(2_000)
        for (let i = 0; i < 50; i++) yield* first.append(`b${i}`)
        assert.strictEqual(looks(), before + 1)
        yield* first.snapshot
        yield* first.append("c")
        yield* first.snapshot
        assert.strictEqual(first.log.oldestSeq(), 101)
        assert.isAbove((yield* keysBelow("log/")).length, 100)
        yield* TestClock.adjust(6_000)
        yield* first.append("d")
        yield* first.snapshot
        assert.deepStrictEqual(yield* keysBelow("log/"), ["log/0000000000000066"])
      })
    )
  )

  it.effect("does not let an owner that slept take a position that was pruned meanwhile", () =>
    Effect.gen(function* () {
      for (const leaseMillis of [0, 2_000]) {
        yield* memory(
          Effect.gen(function* () {
            const sleeper = yield* openOwner({ leaseMillis })
            yield* sleeper.append("a")
            const second = yield* openOwner({ leaseMillis })
            yield* TestClock.adjust(10_000)
            for (const id of ["b", "c", "d"]) {
              yield* second.append(id)
              yield* second.snapshot
            }
            assert.isFalse((yield* keysBelow("log/")).includes(logKey(2).slice(prefix.length + 1)))
            const error = yield* failureOf(sleeper.append("lost"))
            assert.strictEqual(error._tag, "NotOwner")
            yield* second.append("e")
            const next = yield* openOwner({ leaseMillis })
            assert.deepStrictEqual(ids(next.applied()), ["a", "b", "c", "d", "e"])
          })
        )
      }
    })
  )

  it.effect("is refused to an opener that slept between its last look and its first write", () =>
    memory(
      Effect.gen(function* () {
        const store = yield* ObjectStore
        yield* session(Effect.flatMap(openOwner(), (owner) => owner.append("a")))
        const second = yield* Deferred.make<void>()
        const reached = yield* Deferred.make<void>()
        const sleepy: ObjectStore["Service"] = {
          ...store,
          create: (key, body) =>
            key === logKey(2)
              ? Deferred.succeed(reached, undefined).pipe(
                  Effect.andThen(Deferred.await(second)),
                  Effect.andThen(store.create(key, body))
                )
              : store.create(key, body)
        }
        const sleeper = yield* Effect.forkChild(
          Effect.exit(openOwner().pipe(Effect.provideService(ObjectStore, sleepy)))
        )
        yield* Deferred.await(reached)
        const owner = yield* openOwner()
        for (const id of ["b", "c", "d"]) {
          yield* owner.append(id)
          yield* owner.snapshot
        }
        assert.isFalse((yield* keysBelow("log/")).includes(logKey(2).slice(prefix.length + 1)))
        yield* Deferred.succeed(second, undefined)
        // Its write succeeds, since the position is free again, and still it must not take itself for the owner.
        const error = yield* Effect.flip(yield* Fiber.join(sleeper))
        assert.strictEqual(error._tag, "NotOwner")
        yield* owner.append("e")
        yield* owner.snapshot
        assert.deepStrictEqual(ids(yield* openAndReplay), ["a", "b", "c", "d", "e"])
      })
    )
  )

  it.effect("does not take for damage what it cannot tell from another owner's pruning", () =>
    memory(
      Effect.gen(function* () {
        const store = yield* ObjectStore
        const unreadable: ObjectStore["Service"] = {
          ...store,
          get: (key, range) =>
            key === manifestKey && pruned
              ? Effect.fail(new StoreFailure({ operation: "get", key, detail: "refused", uncertain: false }))
              : store.get(key, range)
        }
        let pruned = false
        const first = yield* openOwner().pipe(Effect.provideService(ObjectStore, unreadable))
        yield* first.append("a")
        const second = yield* openOwner()
        for (const id of ["b", "c", "d"]) {
          yield* second.append(id)
          yield* second.snapshot
        }
        pruned = true
        assert.strictEqual((yield* failureOf(Stream.runDrain(first.log.read(1))))._tag, "StoreFailure")
        pruned = false
        assert.strictEqual((yield* failureOf(Stream.runDrain(first.log.read(1))))._tag, "Compacted")
      })
    )
  )

  it.effect("leaves the snapshot that a newer owner is making alone", () =>
    memory(
      Effect.gen(function* () {
        const store = yield* ObjectStore
        const faults = new Faults(1)
        const slow = yield* openOwner().pipe(Effect.provideService(ObjectStore, withFaults(store, faults)))
        for (const id of ["a", "b"]) {
          yield* slow.append(id)
          yield* slow.snapshot
        }
        yield* slow.append("c")
        // Its manifest is in place; before it prunes, another owner has stored files that no manifest names yet.
        const underWay = `${prefix}/snapshot/${"0".repeat(16)}-2-${"f".repeat(16)}/records`
        yield* slow.snapshot.pipe(
          Effect.provideService(ObjectStore, store),
          Effect.tap(() => Effect.void)
        )
        yield* store.create(underWay, new Uint8Array(3))
        yield* slow.append("d")
        yield* slow.snapshot
        assert.isTrue((yield* store.list(underWay)).length === 1)
      })
    )
  )
})

describe("partition log, failing store", () => {
  const withStore = <A, E>(body: (faults: Faults) => Effect.Effect<A, E, ObjectStore | Scope.Scope>, seed = 1) =>
    memory(
      Effect.gen(function* () {
        const faults = new Faults(seed)
        const faulty = withFaults(yield* ObjectStore, faults)
        return yield* body(faults).pipe(Effect.provideService(ObjectStore, faulty))
      })
    )

  it.effect("fails a write for which there is no space, and goes on when there is", () =>
    withStore((faults) =>
      Effect.gen(function* () {
        const owner = yield* openOwner()
        yield* owner.append("a")
        for (const mode of ["full", "fsyncFails"] as const) {
          faults[mode] = true
          for (let i = 0; i < 5; i++) {
            const error = yield* Effect.result(owner.append(`refused ${mode} ${i}`))
            if (mode === "full") assert.isTrue(error._tag === "Failure" && error.failure._tag === "StoreFailure")
          }
          const snapshot = yield* Effect.result(owner.snapshot)
          if (mode === "full") assert.strictEqual(snapshot._tag, "Failure")
          faults[mode] = false
          yield* owner.append(`after ${mode}`)
        }
        const applied = owner.applied()
        assert.isFalse(ids(applied).some((id) => id.startsWith("refused full")))
        assert.deepStrictEqual(yield* openAndReplay, applied)
      })
    )
  )

  it.effect("counts an append as done whose answer was lost", () =>
    withStore((faults) =>
      Effect.gen(function* () {
        const owner = yield* openOwner()
        faults.doubtShare = 1
        assert.strictEqual(yield* owner.append("a"), 1)
        assert.strictEqual(yield* owner.append("b"), 2)
        yield* faults.heal
        assert.deepStrictEqual(ids(yield* openAndReplay), ["a", "b"])
      })
    )
  )

  it.effect("says for certain that an append did not happen, and takes the same position again", () =>
    withStore((faults) =>
      Effect.gen(function* () {
        const owner = yield* openOwner()
        faults.dropShare = 1
        const error = yield* failureOf(owner.append("a"))
        assert.isTrue(error._tag === "StoreFailure" && !error.uncertain)
        yield* faults.heal
        assert.strictEqual(yield* owner.append("b"), 1)
        assert.deepStrictEqual(ids(yield* openAndReplay), ["b"])
      })
    )
  )

  it.effect("gives back an append that nobody could tell of, before the next one", () =>
    Effect.gen(function* () {
      for (const how of ["append", "settle"] as const) {
        yield* memory(
          Effect.gen(function* () {
            const store = yield* ObjectStore
            let readable = true
            const faults = new Faults(1)
            const faulty = withFaults(store, faults)
            const owner = yield* openOwner().pipe(
              Effect.provideService(ObjectStore, {
                ...faulty,
                get: (key) => {
                  faults.failShare = readable ? 0 : 1
                  return Effect.ensuring(
                    faulty.get(key),
                    Effect.sync(() => {
                      faults.failShare = 0
                    })
                  )
                }
              })
            )
            yield* owner.append("a")
            faults.doubtShare = 1
            readable = false
            const error = yield* failureOf(owner.append("b"))
            assert.isTrue(error._tag === "StoreFailure" && error.uncertain, String(error))
            assert.deepStrictEqual(ids(owner.applied()), ["a"])
            yield* faults.heal
            readable = true
            if (how === "append") assert.strictEqual(yield* owner.append("c"), 3)
            else yield* owner.settle
            assert.deepStrictEqual(ids(owner.applied()), how === "append" ? ["a", "b", "c"] : ["a", "b"])
            yield* owner.settle
            assert.deepStrictEqual(yield* openAndReplay, owner.applied())
          })
        )
      }
    })
  )

  it.effect("gives back an append that arrives after it was found absent", () =>
    withStore((faults) =>
      Effect.gen(function* () {
        const owner = yield* openOwner()
        yield* owner.append("a")
        faults.lateShare = 1
        const error = yield* failureOf(owner.append("b"))
        assert.isTrue(error._tag === "StoreFailure" && !error.uncertain)
        yield* faults.heal
        assert.strictEqual(yield* owner.append("c"), 3)
        assert.deepStrictEqual(ids(owner.applied()), ["a", "b", "c"])
        assert.deepStrictEqual(yield* openAndReplay, owner.applied())
      })
    )
  )

  it.effect("keeps its snapshot where the manifest's answer was lost, and its files where nobody knows", () =>
    withStore((faults) =>
      Effect.gen(function* () {
        const owner = yield* openOwner()
        for (const [share, id] of [
          ["doubtShare", "a"],
          ["lateShare", "b"],
          ["dropShare", "c"]
        ] as const) {
          yield* owner.append(id)
          faults[share] = 1
          yield* Effect.exit(owner.snapshot)
          yield* faults.heal
          assert.deepStrictEqual(
            ids(yield* probe),
            owner.applied().map(([, applied]) => applied)
          )
        }
        yield* owner.append("d")
        yield* owner.snapshot
        yield* owner.append("e")
        yield* owner.snapshot
        assert.strictEqual((yield* keysBelow("snapshot/")).length, 4)
        assert.deepStrictEqual(yield* openAndReplay, owner.applied())
      })
    )
  )

  /** What is there, without a claim: a copy of the partition is opened. */
  const probe = Effect.gen(function* () {
    const store = yield* ObjectStore
    return yield* memory(
      Effect.gen(function* () {
        const copy = yield* ObjectStore
        for (const { key } of yield* store.list(`${prefix}/`)) {
          const { body } = yield* store.get(key)
          yield* copy.create(key, body)
        }
        return yield* openAndReplay
      })
    )
  })

  it.effect("loses nothing whatever step a process dies at", () =>
    Effect.gen(function* () {
      let steps = 0
      for (let callsLeft = 1; ; callsLeft++) {
        let finished = false
        for (const crashAfterEffect of [false, true]) {
          yield* memory(
            Effect.gen(function* () {
              const truth = yield* ObjectStore
              const acknowledged: Array<string> = []
              const attempted: Array<string> = []
              const life = (owner: Effect.Success<ReturnType<typeof openOwner>>, from: number) =>
                Effect.gen(function* () {
                  for (let i = from; i < from + 4; i++) {
                    attempted.push(`id${i}`)
                    yield* owner.append(`id${i}`)
                    acknowledged.push(`id${i}`)
                    if (i % 2 === 0) yield* owner.snapshot
                  }
                })
              // A life before, so that there are snapshots to prune, then one that ends at some call.
              yield* session(Effect.flatMap(openOwner(), (owner) => life(owner, 0)))
              const faults = new Faults(callsLeft)
              const mortal = Effect.provideService(ObjectStore, withFaults(truth, faults))
              faults.callsLeft = callsLeft
              faults.crashAfterEffect = crashAfterEffect
              const exit = yield* Effect.exit(
                session(Effect.flatMap(openOwner(), (owner) => Effect.andThen(owner.snapshot, life(owner, 4)))).pipe(
                  mortal
                )
              )
              finished = Exit.isSuccess(exit) && !faults.dead
              const found = ids(yield* openAndReplay)
              assert.deepStrictEqual(found.slice(0, acknowledged.length), acknowledged, `dead after ${callsLeft} calls`)
              assert.deepStrictEqual(found, attempted.slice(0, found.length), `dead after ${callsLeft} calls`)
              // And it goes on.
              yield* session(Effect.flatMap(openOwner(), (owner) => Effect.andThen(owner.append("z"), owner.snapshot)))
              assert.deepStrictEqual(ids(yield* openAndReplay), [...found, "z"])
              // Nothing superfluous is left for good: two snapshots, and the log after the older one.
              assert.isAtMost((yield* keysBelow("snapshot/")).length, 4)
            })
          )
        }
        steps = callsLeft
        if (finished) break
      }
      assert.isAbove(steps, 30)
    })
  )

  it.effect("loses nothing under seeded failures of all kinds, and prunes only what is safe", () =>
    forEachSeed(60, (seed) =>
      memory(
        Effect.gen(function* () {
          const truth = yield* ObjectStore
          const random = seededRandom(seed * 7_919)
          const acknowledged = new Map<string, number>()
          const attempted = new Set<string>()
          let next = 0
          for (let life = 0; life < 4; life++) {
            const faults = new Faults(seed * 31 + life)
            yield* session(
              Effect.gen(function* () {
                const opened = yield* Effect.result(openOwner())
                if (opened._tag === "Failure") {
                  assert.strictEqual(opened.failure._tag, "StoreFailure", String(opened.failure))
                  return
                }
                const owner = opened.success
                for (let step = 0; step < 25; step++) {
                  if (random() < 0.15) yield* Effect.exit(owner.snapshot)
                  if (random() < 0.1) yield* Effect.exit(owner.settle)
                  const id = `id${next++}`
                  attempted.add(id)
                  const appended = yield* Effect.result(owner.append(id))
                  if (appended._tag === "Success") acknowledged.set(id, appended.success)
                  else assert.strictEqual(appended.failure._tag, "StoreFailure", String(appended.failure))
                }
                yield* faults.heal
                yield* owner.settle
                const history = yield* Effect.provideService(probe, ObjectStore, truth)
                // The index and the log agree, whatever went wrong on the way.
                assert.deepStrictEqual(owner.applied(), history)
              })
            ).pipe(
              Effect.provideService(
                ObjectStore,
                withFaults(
                  truth,
                  Object.assign(faults, {
                    failShare: random() * 0.15,
                    dropShare: random() * 0.15,
                    doubtShare: random() * 0.15,
                    lateShare: random() * 0.15
                  })
                )
              )
            )
            yield* faults.heal
          }
          checkHistory(yield* openAndReplay, acknowledged, attempted)
        })
      )
    )
  )
})

const checkHistory = (history: Applied, acknowledged: ReadonlyMap<string, number>, attempted: ReadonlySet<string>) => {
  const at = new Map(history.map(([seq, id]) => [id, seq]))
  assert.strictEqual(at.size, history.length, "an id is there twice")
  for (const [id, seq] of acknowledged) assert.strictEqual(at.get(id), seq, `${id} was acknowledged`)
  for (const id of at.keys()) assert.isTrue(attempted.has(id))
  for (let i = 1; i < history.length; i++) {
    assert.isBelow((history[i - 1] as Applied[number])[0], (history[i] as Applied[number])[0])
  }
}

describe("partition log, several owners at once", () => {
  it.effect("can all open at once", () =>
    memory(
      Effect.gen(function* () {
        yield* session(Effect.flatMap(openOwner(), (owner) => owner.append("a")))
        const store = yield* ObjectStore
        const opened = yield* Effect.forEach(
          range(8),
          (i) => {
            const faults = Object.assign(new Faults(i), { turnsMax: 6 })
            return Effect.result(openOwner().pipe(Effect.provideService(ObjectStore, withFaults(store, faults))))
          },
          { concurrency: "unbounded" }
        )
        for (const result of opened) if (result._tag === "Failure") assert.strictEqual(result.failure._tag, "NotOwner")
        const owners = opened.flatMap((result) => (result._tag === "Success" ? [result.success] : []))
        const exits = yield* Effect.forEach(owners, (owner, i) => Effect.exit(owner.append(`b${i}`)))
        assert.strictEqual(exits.filter(Exit.isSuccess).length, 1)
        const newest = Math.max(...owners.map(({ log }) => log.epoch))
        assert.isTrue(
          Exit.isSuccess(exits[owners.findIndex(({ log }) => log.epoch === newest)] as Exit.Exit<number, unknown>)
        )
      })
    )
  )
})

describe("partition log, segments", () => {
  it.effect("marks a change of owner by a segment without operations, which nobody is given", () =>
    memory(
      Effect.gen(function* () {
        yield* openAndReplay
        const owner = yield* openOwner()
        const store = yield* ObjectStore
        const { body } = yield* store.get(logKey(1))
        const header = verifySegment(body)
        assert.deepStrictEqual([header.epoch, header.seq, header.count], [2, 1, 0])
        assert.deepStrictEqual(yield* Stream.runCollect(owner.log.read(1)), [])
        assert.strictEqual(yield* owner.append("a"), 2)
        assert.deepStrictEqual(
          (yield* Stream.runCollect(owner.log.read(1))).map(({ seq }) => seq),
          [2]
        )
      })
    )
  )

  it.effect("does not take a snapshot twice, nor one of what it does not have", () =>
    memory(
      Effect.gen(function* () {
        const owner = yield* openOwner()
        yield* owner.append("a")
        yield* owner.snapshot
        yield* owner.snapshot
        assert.strictEqual((yield* keysBelow("snapshot/")).length, 2)
        const exit = yield* Effect.exit(withSnapshotFiles([], (files) => owner.log.commitSnapshot(2, files)))
        assert.isTrue(Exit.hasDies(exit))
      })
    )
  )
})
