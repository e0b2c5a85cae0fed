import { assert, describe, it } from "@effect/vitest"
import { Effect } from "effect"
import { WarmStore } from "../../src/tiers/WarmStore.ts"
import { partition, record, warmStoreSuite } from "./warmStoreSuite.ts"

describe("WarmStore in memory", () => {
  warmStoreSuite(({ ttlMillis }) => WarmStore.layerMemory({ bytesMax: 1_000_000, ttlMillis }))

  it("keeps within its bytes; what was not used longest goes first", () =>
    Effect.runPromise(
      Effect.gen(function* () {
        const warm = yield* WarmStore
        yield* warm.fence(partition)
        const ids = Array.from({ length: 100 }, (_, i) => `id-${i}`)
        for (const id of ids) {
          yield* warm.putRecords(partition, [record(id)], warm.ticket())
          yield* warm.getRecords(partition, ["id-0"])
          assert.isAtMost((yield* warm.state).bytes, 10_000)
        }
        const found = yield* warm.getRecords(partition, ids)
        const kept = ids.filter((_, i) => found[i] !== null)
        assert.isAbove(kept.length, 10)
        assert.deepStrictEqual(kept, ["id-0", ...ids.slice(101 - kept.length)])
      }).pipe(Effect.provide(WarmStore.layerMemory({ bytesMax: 10_000, ttlMillis: 60_000 })))
    ))
})
