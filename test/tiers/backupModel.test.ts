/**
 * A random history of several collections, with snapshots, pruned logs, deletions, restarts and backups while it goes on;
 * restored at random times it is what a map was at those times, to the bit.
 */
import { mkdtemp, rm } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { assert, describe, it } from "@effect/vitest"
import { Context, Effect, Layer } from "effect"
import { backup } from "../../src/tiers/Backup.ts"
import { openBackup } from "../../src/tiers/BackupReader.ts"
import { truthOf } from "../../src/tiers/BackupTruth.ts"
import { verifyBackup, verifyData } from "../../src/tiers/BackupVerify.ts"
import { ObjectStore } from "../../src/tiers/ObjectStore.ts"
import { PruneLimit } from "../../src/tiers/PartitionLog.ts"
import { restore } from "../../src/tiers/Restore.ts"
import { type RunningActors, startActors } from "../support/Actors.ts"
import { type Random, seeded, seedOf } from "../support/Seeded.ts"

const dimensions = 4
const ids = Array.from({ length: 40 }, (_, i) => `id-${i}`)
const names = ["a", "b", "c"]
const settings = { snapshotOps: 100, snapshotSharePercent: 1, snapshotIdleMillis: 100 }

interface Record_ {
  readonly vector: ReadonlyArray<number>
  readonly metadata: Readonly<Record<string, unknown>>
}

/** Collections by name, records by id. */
type Model = ReadonlyMap<string, ReadonlyMap<string, Record_>>

describe("a backup", () => {
  for (const seed of [1, 2]) {
    it(`restored at random times is what there was, seed ${seed}`, { timeout: 120_000 }, () =>
      seeded(seedOf(seed), async (source) => {
        const scratch = await mkdtemp(join(tmpdir(), "ruvector-"))
        const store = await memory()
        const destination = await memory()
        const held = new Map<string, number>()
        const context = Context.add(Context.make(ObjectStore, store), PruneLimit, (prefix) => held.get(prefix) ?? 0)
        let node = await startActors(context, settings)
        const model = new Map<string, Map<string, Record_>>()
        const history: Array<{ readonly at: number; readonly state: Model }> = []
        const takeBackup = async () => {
          const report = await Effect.runPromise(backup({ source: store, destination, scratch, pruneEveryMillis: 0 }))
          assert.deepStrictEqual(report.damaged, [])
          for (const { collection, partitions } of report.run.collections) {
            for (const [i, chains] of partitions.entries()) {
              assert.isAtMost(chains.length, 1, "the log is held back, so that nothing is missed")
              held.set(`collections/${collection.uid}/p00${i}`, chains.at(-1)?.lastSeq ?? 0)
            }
          }
          return report.run.horizonMillis
        }
        try {
          for (let n = 0; n < 260; n++) {
            const choice = source.next()
            if (choice < 0.93) await change(node, model, source, takeBackup)
            else if (choice < 0.985) {
              // Beside a writer.
              await Promise.all([takeBackup(), change(node, model, source, undefined)])
            } else {
              await node.stop()
              node = await startActors(context, settings)
            }
            history.push({ at: await nextMillisecond(), state: copyOf(model) })
          }
          await nextMillisecond()
          const horizonMillis = await takeBackup()
          await node.stop()
          assert.deepStrictEqual((await Effect.runPromise(verifyData(store, { deep: true }))).damaged, [])
          const verdict = await Effect.runPromise(verifyBackup(destination, { deep: true }))
          assert.deepStrictEqual(verdict.damaged, [])

          const run = await Effect.runPromise(openBackup(destination))
          for (const { at, state } of history) {
            // The plain reading of the backup, at every time.
            const wanted = run.collections.filter(
              ({ collection, removedMillis }) =>
                collection.created_ms <= at && (removedMillis === undefined || at < removedMillis)
            )
            assert.sameMembers(
              wanted.map(({ collection }) => collection.name),
              [...state.keys()]
            )
          }
          for (let n = 0; n < 6; n++) {
            const { at, state } = n === 0 ? last(history) : source.pick(history)
            assert.isAtMost(at, horizonMillis)
            const target = await memory()
            const report = await Effect.runPromise(restore({ backup: destination, target, scratch, atMillis: at }))
            assert.isAtMost(Number(report.newest / 1_000_000n), at)
            assert.deepStrictEqual((await Effect.runPromise(verifyData(target, { deep: true }))).damaged, [])
            const restored = await startActors(Context.make(ObjectStore, target), settings)
            try {
              await compare(restored, state)
              for (const { from } of report.collections) {
                const truth = await Effect.runPromise(truthOf(destination, run, from.uid, at))
                const plain = new Map(
                  [...truth].map(([id, { vector, metadata }]) => [
                    id,
                    { vector: Array.from(vector), metadata: metadata === "" ? {} : JSON.parse(metadata) }
                  ])
                )
                assert.deepStrictEqual(sorted(plain), sorted(state.get(from.name) ?? new Map()))
              }
              // It goes on from there.
              for (const name of state.keys()) {
                await Effect.runPromise(
                  restored.router.upsert(name, [{ id: "new", vector: new Float32Array(dimensions), metadata: "" }])
                )
                await Effect.runPromise(restored.router.remove(name, [ids[0] as string]))
              }
            } finally {
              await restored.stop()
            }
          }
        } finally {
          await rm(scratch, { recursive: true, force: true })
        }
      })
    )
  }
})

const memory = async (): Promise<ObjectStore["Service"]> =>
  Context.get(await Effect.runPromise(Effect.scoped(Layer.build(ObjectStore.layerMemory))), ObjectStore)

/** Ends when a later millisecond has begun; answers the one before it. */
const nextMillisecond = async (): Promise<number> => {
  const at = Date.now()
  while (Date.now() <= at) await new Promise((resolve) => setTimeout(resolve, 1))
  return at
}

const change = async (
  { router }: RunningActors,
  model: Map<string, Map<string, Record_>>,
  source: Random,
  beforeDeletion: (() => Promise<unknown>) | undefined
) => {
  const name = source.pick(names)
  const records = model.get(name)
  if (records === undefined) {
    await Effect.runPromise(
      router.createCollection(name, { dimensions, metric: "l2", partitions: 1 + source.below(2) })
    )
    model.set(name, new Map())
    return
  }
  const choice = source.next()
  if (choice < 0.04 && beforeDeletion !== undefined) {
    // What a collection was is known up to the last backup before its end.
    await beforeDeletion()
    await Effect.runPromise(router.deleteCollection(name))
    model.delete(name)
  } else if (choice < 0.6) {
    const batch = Array.from({ length: 1 + source.below(8) }, () => ({
      id: source.pick(ids),
      vector: source.vector(dimensions).map(Math.fround),
      metadata: source.below(2) === 0 ? {} : { n: source.below(10) }
    }))
    await Effect.runPromise(
      router.upsert(
        name,
        batch.map(({ id, vector, metadata }) => ({
          id,
          vector: new Float32Array(vector),
          metadata: Object.keys(metadata).length === 0 ? "" : JSON.stringify(metadata)
        }))
      )
    )
    for (const { id, vector, metadata } of batch) records.set(id, { vector, metadata })
  } else if (choice < 0.8) {
    const some = [...new Set(Array.from({ length: 1 + source.below(5) }, () => source.pick(ids)))]
    await Effect.runPromise(router.remove(name, some))
    for (const id of some) records.delete(id)
  } else {
    const id = source.pick(ids)
    const n = source.below(100)
    const before = records.get(id)
    const patched = await Effect.runPromise(Effect.exit(router.updateMetadata(name, id, JSON.stringify({ n }))))
    assert.strictEqual(patched._tag === "Success", before !== undefined)
    if (before !== undefined) records.set(id, { ...before, metadata: { ...before.metadata, n } })
  }
}

const copyOf = (model: Model): Model => new Map([...model].map(([name, records]) => [name, new Map(records)]))

const sorted = <A>(map: ReadonlyMap<string, A>) => [...map].sort(([a], [b]) => (a < b ? -1 : 1))

const last = <A>(all: ReadonlyArray<A>): A => all[all.length - 1] as A

const compare = async ({ router }: RunningActors, state: Model) => {
  const collections = await Effect.runPromise(router.collections)
  assert.sameMembers(
    collections.map(({ name }) => name),
    [...state.keys()]
  )
  for (const [name, records] of state) {
    for (const id of ids) {
      const found = await Effect.runPromise(Effect.exit(router.get(name, id)))
      const expected = records.get(id)
      assert.strictEqual(found._tag === "Success", expected !== undefined, `${name}/${id}`)
      if (found._tag !== "Success") continue
      const { vector, metadata } = found.value
      assert.deepStrictEqual(
        { vector: Array.from(vector), metadata: metadata === "" ? {} : JSON.parse(metadata) },
        expected
      )
    }
  }
}
