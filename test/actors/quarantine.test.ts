/** What keeps failing is left alone for longer and longer, says so, harms nobody else, and can be let out. */
import { mkdtemp, rm, writeFile } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { assert, describe, it } from "@effect/vitest"
import { Context, Effect, Layer } from "effect"
import { Quarantine } from "../../src/actors/Quarantine.ts"
import { LocalActors } from "../../src/shards/LocalActors.ts"
import { ObjectStore } from "../../src/tiers/ObjectStore.ts"
import { VectorIndex } from "../../src/tiers/VectorIndex.ts"
import { startActors } from "../support/Actors.ts"

const bounds = { quarantineFailures: 3, quarantineMillis: 100, quarantineMillisMax: 500, quarantineCalmMillis: 1_000 }

describe("a quarantine", () => {
  it("begins with the third failure in a row, doubles with each one more, to a bound, and ends by calm or release", () => {
    const quarantine = new Quarantine({ collection: "c", partition: 0 }, bounds)
    const lengths: Array<number> = []
    let now = 1_000_000
    for (let n = 1; n <= 6; n++) {
      quarantine.failed(`failure ${n}`, now)
      assert.isTrue(quarantine.isSuspect(now))
      const until = quarantine.until(now)
      lengths.push(until === 0 ? 0 : until - now)
      now = until === 0 ? now + 1 : until
      assert.strictEqual(quarantine.until(now), 0, "tried again then")
      quarantine.opened(now)
    }
    assert.deepStrictEqual(lengths, [0, 0, 100, 200, 400, 500])
    assert.include(quarantine.state(now), { failures: 6, detail: "failure 6", collection: "c", partition: 0 })
    assert.isTrue(quarantine.isSuspect(now + 999))
    assert.isFalse(quarantine.isSuspect(now + 1_000))
    assert.isUndefined(quarantine.state(now + 1_000))
    quarantine.failed("anew", now + 1_001)
    assert.strictEqual(quarantine.until(now + 1_001), 0, "counted from one again")
    for (let n = 0; n < 3; n++) quarantine.failed("again", now + 1_002)
    assert.isAbove(quarantine.until(now + 1_002), 0)
    quarantine.release()
    assert.strictEqual(quarantine.until(now + 1_002), 0)
  })

  it("keeps data that kills its thread from the other partitions of the process", { timeout: 60_000 }, async () => {
    const directory = await mkdtemp(join(tmpdir(), "ruvector-poison-"))
    const poison = join(directory, "poison")
    process.env["RUVECTOR_TEST_POISON"] = poison
    const objects = Context.get(
      await Effect.runPromise(Effect.scoped(Layer.build(ObjectStore.layerMemory))),
      ObjectStore
    )
    const entry = new URL("./poisonedThread.ts", import.meta.url)
    const scoped = await Effect.runPromise(
      Effect.scoped(
        Effect.gen(function* () {
          const vectors = yield* Layer.build(VectorIndex.layerWith({ threads: 1, entry }))
          const services = Context.make(ObjectStore, objects).pipe(Context.merge(vectors))
          const node = yield* Effect.promise(() => startActors(services, { quarantineMillis: 400 }))
          const { router } = node
          const { threads } = Context.get(vectors, VectorIndex)
          const restarts = Effect.map(threads, (all) => all.reduce((sum, thread) => sum + thread.restarts, 0))
          const local = Context.get(node.context, LocalActors)
          const record = (id: string) => ({ id, vector: Float32Array.of(1, 0), metadata: "" })

          yield* router.createCollection("good", { dimensions: 2 })
          yield* router.createCollection("bad", { dimensions: 2 })
          yield* router.upsert("good", [record("a")])
          yield* router.upsert("bad", [record("a")])
          yield* Effect.promise(() => writeFile(poison, ""))
          yield* Effect.exit(router.upsert("bad", [record("poison")]))

          // The log has it by now, so it is met at every opening.
          const waits: Array<number> = []
          let deathsSeen = 0
          for (let ask = 0; ask < 600 && waits.length < 3; ask++) {
            const error = yield* Effect.flip(router.get("bad", "a"))
            assert.strictEqual((yield* router.get("good", "a")).id, "a")
            if (error._tag === "PartitionUnavailable" && error.detail.includes("in quarantine")) {
              const deaths = yield* restarts
              // The first answer of each quarantine has the longest wait.
              if (deaths !== deathsSeen) waits.push(error.retryAfterMillis)
              deathsSeen = deaths
            }
            yield* Effect.sleep(20)
          }
          assert.lengthOf(waits, 3)
          assert.isAbove(waits[1] as number, 400)
          assert.isAbove(waits[2] as number, 800)
          const [state] = local.quarantined()
          assert.include(state, { collection: "bad", partition: 0 })
          assert.match(state?.detail ?? "", /its vector thread died at work on it/)

          // Each of those deaths was in a thread of its own, but for the first.
          const good = yield* threads
          assert.lengthOf(good, 1)
          const before = yield* restarts
          yield* router.get("good", "a")
          assert.strictEqual(yield* restarts, before)

          yield* Effect.promise(() => rm(poison))
          assert.isTrue(yield* router.release("bad", 0))
          assert.strictEqual((yield* router.get("bad", "poison")).id, "poison")
          assert.lengthOf(local.quarantined(), 0)
          yield* Effect.promise(node.stop)
          return true
        })
      ).pipe(Effect.ensuring(Effect.promise(() => rm(directory, { recursive: true, force: true }))))
    )
    assert.isTrue(scoped)
  })
})
