import { assert, describe, it } from "@effect/vitest"
import { Effect, Exit, Layer } from "effect"
import { ObjectStore } from "../../src/tiers/ObjectStore.ts"
import * as FaultyObjectStore from "./FaultyObjectStore.ts"
import { bytesOf, objectStoreSuite, textOf } from "./objectStoreSuite.ts"

const layer = FaultyObjectStore.layer(1).pipe(Layer.provide(ObjectStore.layerMemory))

objectStoreSuite("with faults switched off", layer)

describe("store with faults", () => {
  it.effect("fails as it is told to", () =>
    Effect.gen(function* () {
      const store = yield* ObjectStore
      const faults = yield* FaultyObjectStore.StoreFaults
      const fails = function* (key: string, uncertain: boolean) {
        const error = yield* Effect.flip(store.create(key, bytesOf(key)))
        assert.isTrue(error._tag === "StoreFailure" && error.uncertain === uncertain, String(error))
      }
      const there = (key: string) => Effect.map(Effect.exit(store.get(key)), Exit.isSuccess)

      faults.full = true
      yield* fails("full", false)
      faults.full = false
      assert.isFalse(yield* there("full"))

      faults.dropShare = 1
      yield* fails("dropped", true)
      faults.dropShare = 0
      assert.isFalse(yield* there("dropped"))

      faults.doubtShare = 1
      yield* fails("doubted", true)
      faults.doubtShare = 0
      assert.isTrue(yield* there("doubted"))

      faults.lateShare = 1
      yield* fails("late", true)
      assert.isFalse(yield* there("late"))
      yield* faults.heal
      assert.isTrue(yield* there("late"))

      faults.corruptShare = 1
      assert.notStrictEqual(textOf((yield* store.get("late")).body), "late")
      yield* faults.heal
      assert.strictEqual(textOf((yield* store.get("late")).body), "late")

      faults.callsLeft = 1
      faults.crashAfterEffect = true
      yield* fails("last-words", true)
      yield* fails("never", true)
      yield* faults.heal
      assert.isTrue(yield* there("last-words"))
      assert.isFalse(yield* there("never"))
    }).pipe(Effect.provide(layer))
  )

  it("gives the same faults for the same seed", () => {
    const draw = (seed: number) => Array.from({ length: 5 }, FaultyObjectStore.seededRandom(seed))
    assert.deepStrictEqual(draw(7), draw(7))
    assert.notDeepEqual(draw(7), draw(8))
    assert.isTrue(draw(9).every((n) => n >= 0 && n < 1))
  })
})
