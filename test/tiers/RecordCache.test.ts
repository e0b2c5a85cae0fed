import { assert, describe, it } from "@effect/vitest"
import { Context, Effect, Layer } from "effect"
import { RecordCache, recordBytes } from "../../src/tiers/RecordCache.ts"
import { seeded, seedOf } from "../support/Seeded.ts"
import { partition, record } from "./warmStoreSuite.ts"

const cacheOf = (bytesMax: number): RecordCache["Service"] =>
  Effect.runSync(
    Effect.scoped(Effect.map(Layer.build(RecordCache.layerWith({ bytesMax })), (all) => Context.get(all, RecordCache)))
  )

describe("RecordCache", () => {
  it("gives what was put until it is invalidated or dropped", () => {
    const cache = cacheOf(100_000)
    cache.put(partition, record("a"), cache.ticket())
    cache.put("d/other/0", record("a", 2), cache.ticket())
    assert.deepStrictEqual(cache.get(partition, "a"), record("a"))
    assert.deepStrictEqual(cache.get("d/other/0", "a"), record("a", 2))
    cache.invalidate(partition, ["a"])
    assert.isUndefined(cache.get(partition, "a"))
    cache.put(partition, record("b"), cache.ticket())
    cache.dropPartition(partition)
    assert.isUndefined(cache.get(partition, "b"))
    cache.dropCollection("other")
    assert.isUndefined(cache.get("d/other/0", "a"))
    assert.strictEqual(cache.bytes(), 0)
    assert.strictEqual(cache.count(), 0)
    assert.deepStrictEqual([cache.hits(), cache.misses()], [2, 3])
  })

  it("does not take what was read before a write, a drop, or more writes than it remembers", () => {
    const cache = cacheOf(100_000)
    const ticket = cache.ticket()
    cache.invalidate(partition, ["a"])
    cache.put(partition, record("a"), ticket)
    assert.isUndefined(cache.get(partition, "a"))
    cache.put(partition, record("b"), ticket)
    assert.isDefined(cache.get(partition, "b"))
    // Others read meanwhile, so that all of these are noted.
    for (let n = 0; n < 656; n++) {
      cache.invalidate(
        partition,
        Array.from({ length: 100 }, (_, i) => `w-${n}-${i}`)
      )
      cache.ticket()
      if (n < 600) {
        cache.put(partition, record("b"), ticket)
        assert.isDefined(cache.get(partition, "b"), "it is not one of them")
      }
    }
    cache.put(partition, record("c"), ticket)
    assert.isUndefined(cache.get(partition, "c"))
    const before = cache.ticket()
    cache.invalidate(
      partition,
      Array.from({ length: 10_000 }, (_, i) => `w-${i}`)
    )
    cache.put(partition, record("w-7"), before)
    assert.isUndefined(cache.get(partition, "w-7"))
    const later = cache.ticket()
    cache.put(partition, record("c"), later)
    assert.isDefined(cache.get(partition, "c"))
    cache.dropPartition(partition)
    cache.put(partition, record("c"), later)
    assert.isUndefined(cache.get(partition, "c"))
  })

  it("keeps within its bytes and counts them exactly; what was not used longest goes first", () =>
    seeded(seedOf(5), async (source) => {
      const bytesMax = 20_000
      const cache = cacheOf(bytesMax)
      /** Least recently used first. */
      const model = new Map<string, number>()
      const sum = () => [...model.values()].reduce((all, bytes) => all + bytes, 0)
      for (let n = 0; n < 5_000; n++) {
        const id = `id-${source.below(80)}`
        const choice = source.next()
        if (choice < 0.4) {
          const next = record(id, 1, "x".repeat(source.below(300)))
          cache.put(partition, next, cache.ticket())
          model.delete(id)
          model.set(id, recordBytes(next))
          for (const oldest of model.keys()) {
            if (sum() <= bytesMax) break
            model.delete(oldest)
          }
        } else if (choice < 0.9) {
          const bytes = model.get(id)
          assert.strictEqual(cache.get(partition, id) !== undefined, bytes !== undefined)
          if (bytes === undefined) continue
          model.delete(id)
          model.set(id, bytes)
        } else {
          cache.invalidate(partition, [id])
          model.delete(id)
        }
        assert.strictEqual(cache.bytes(), sum())
        assert.strictEqual(cache.count(), model.size)
      }
    }))

  it("does not keep an answer alive for one record's sake, nor take what is larger than itself", () => {
    const cache = cacheOf(2_000)
    const answer = new Float32Array(100_000)
    cache.put(partition, { ...record("a"), vector: answer.subarray(10, 13) }, cache.ticket())
    assert.strictEqual(cache.get(partition, "a")?.vector.buffer.byteLength, 12)
    cache.put(partition, { ...record("big"), vector: answer }, cache.ticket())
    assert.isUndefined(cache.get(partition, "big"))
    assert.isDefined(cache.get(partition, "a"))
    const none = cacheOf(0)
    none.put(partition, record("a"), none.ticket())
    assert.isUndefined(none.get(partition, "a"))
  })
})
