/** A node's own backup: what it holds back from pruning, for how long, and what it says at a stop. */
import { mkdtemp, rm, writeFile } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { assert, describe, it } from "@effect/vitest"
import { Context, Effect, Layer } from "effect"
import { defaultSettings, Settings } from "../../src/config.ts"
import { openBackup } from "../../src/tiers/BackupReader.ts"
import { openToRead, openToWrite } from "../../src/tiers/BackupStore.ts"
import { partitionPrefix } from "../../src/tiers/CatalogueObject.ts"
import { DataDirectory } from "../../src/tiers/DataDirectory.ts"
import { encodeSegment } from "../../src/tiers/LogSegment.ts"
import { ObjectStore } from "../../src/tiers/ObjectStore.ts"
import * as PartitionLog from "../../src/tiers/PartitionLog.ts"
import { ServerBackup } from "../../src/tiers/ServerBackup.ts"
import { startActors } from "../support/Actors.ts"

const inDirectory = Effect.acquireRelease(
  Effect.promise(() => mkdtemp(join(tmpdir(), "ruvector-"))),
  (directory) => Effect.promise(() => rm(directory, { recursive: true, force: true }))
)

describe("a log", () => {
  it.live("is pruned up to what may go, and keeps the rest beside its snapshots", () =>
    Effect.gen(function* () {
      const directory = yield* inDirectory
      let limit = 3
      const log = yield* Effect.provideService(
        PartitionLog.open("collections/x/p000", { snapshotsKept: 1, leaseMillis: 0 }),
        PartitionLog.PruneLimit,
        () => limit
      )
      const snapshotAt = (seq: number) =>
        Effect.gen(function* () {
          const files = { records: join(directory, "records"), graph: join(directory, "graph") }
          yield* Effect.promise(() => Promise.all([writeFile(files.records, "r"), writeFile(files.graph, "g")]))
          yield* log.commitSnapshot(seq, files)
        })
      for (let seq = 1; seq <= 8; seq++) {
        yield* log.append((position) => encodeSegment({ ...position, dimensions: 0 }, []))
      }
      const logKeys = Effect.flatMap(ObjectStore, (store) => store.list("collections/x/p000/log/")).pipe(
        Effect.map((objects) => objects.length)
      )
      yield* snapshotAt(5)
      assert.strictEqual(log.oldestSeq(), 4)
      assert.strictEqual(yield* logKeys, 5)
      limit = Number.MAX_SAFE_INTEGER
      yield* snapshotAt(7)
      assert.strictEqual(log.oldestSeq(), 8)
      assert.strictEqual(yield* logKeys, 1)
    }).pipe(Effect.scoped, Effect.provide(ObjectStore.layerMemory))
  )
})

describe("a node's own backup", () => {
  const withNode = (
    lagMillisMax: number,
    use: (limit: (prefix: string) => number, prefix: string) => Effect.Effect<void>
  ) =>
    Effect.gen(function* () {
      const directory = yield* inDirectory
      const store = Context.get(yield* Layer.build(ObjectStore.layerMemory), ObjectStore)
      const actors = yield* Effect.promise(() => startActors(Context.make(ObjectStore, store)))
      const { collection } = yield* Effect.orDie(actors.router.createCollection("c", { dimensions: 2 }))
      yield* Effect.orDie(actors.router.upsert("c", [{ id: "a", vector: new Float32Array([1, 2]), metadata: "" }]))
      const backupTo = join(directory, "backup")
      const settings = {
        ...defaultSettings,
        backupTo,
        backupIntervalMillis: 3_600_000,
        backupLagMillisMax: lagMillisMax
      }
      yield* Effect.gen(function* () {
        const context = yield* Layer.build(ServerBackup.layer)
        yield* Effect.orDie(Context.get(context, ServerBackup).now)
        yield* use(Context.get(context, PartitionLog.PruneLimit), partitionPrefix(collection.uid, 0))
        yield* Effect.orDie(actors.router.upsert("c", [{ id: "b", vector: new Float32Array([1, 2]), metadata: "" }]))
      }).pipe(
        Effect.scoped,
        Effect.provide(DataDirectory.layer({ path: join(directory, "data") })),
        Effect.provideService(ObjectStore, store),
        Effect.provideService(Settings, settings)
      )
      yield* Effect.promise(() => actors.stop())
      // One more when it stopped, with what was written since.
      const run = yield* Effect.orDie(Effect.flatMap(openToRead(backupTo, defaultSettings), openBackup))
      assert.strictEqual(run.collections[0]?.partitions[0]?.[0]?.lastSeq, 2)
    }).pipe(Effect.scoped)

  it.live("holds back what it has not copied, of partitions it does not know everything", () =>
    withNode(60_000, (limit, prefix) =>
      Effect.sync(() => {
        assert.strictEqual(limit(prefix), 1)
        assert.strictEqual(limit("collections/other/p000"), 0)
      })
    )
  )

  it.live("lets go once it has not succeeded for too long", () =>
    withNode(5, (limit, prefix) =>
      Effect.gen(function* () {
        assert.strictEqual(limit("collections/other/p000"), 0)
        yield* Effect.sleep(20)
        assert.strictEqual(limit(prefix), Number.MAX_SAFE_INTEGER)
        assert.strictEqual(limit("collections/other/p000"), Number.MAX_SAFE_INTEGER)
      })
    )
  )

  it.live("does not go into the data directory, nor where it is not read", () =>
    Effect.gen(function* () {
      const directory = yield* inDirectory
      for (const place of [directory, join(directory, "objects")]) {
        assert.match(
          (yield* Effect.flip(openToWrite(place, directory, defaultSettings))).message,
          /lies in the data directory/
        )
      }
      assert.match((yield* Effect.flip(openToRead(directory, defaultSettings))).message, /there is no backup/)
    }).pipe(Effect.scoped)
  )
})
