/** What every `WarmStore` does, run on each of them. */
import { assert, it } from "@effect/vitest"
import { Context, Effect, Layer } from "effect"
import type { PartitionRecord } from "../../src/protocol/IndexPartition.ts"
import { WarmStore } from "../../src/tiers/WarmStore.ts"
import { type Random, seeded, seedOf } from "../support/Seeded.ts"

export const partition = "c/0123456789abcdef/0"

export const record = (id: string, version = 1, metadata = ""): PartitionRecord => ({
  id,
  vector: Float32Array.of(version, 0.5, -1),
  metadata,
  version: `${version.toString(16).padStart(16, "0")}-1-local`
})

export const warmStoreSuite = (layer: (options: { readonly ttlMillis: number }) => Layer.Layer<WarmStore>) => {
  const run = <A>(use: (warm: WarmStore["Service"]) => Effect.Effect<A>, ttlMillis = 60_000) =>
    Effect.runPromise(
      Effect.scoped(
        Effect.flatMap(Layer.build(layer({ ttlMillis })), (context) => use(Context.get(context, WarmStore)))
      )
    )

  it("gives what was put, whole, in the order of the ids", () =>
    run((warm) =>
      Effect.gen(function* () {
        yield* warm.fence(partition)
        const records = [record("a", 1, `{"name":"Zoë"}`), record("ключ\u0001", 2), record("c", 3)] as const
        assert.strictEqual(yield* warm.putRecords(partition, records, warm.ticket()), 3)
        const found = yield* warm.getRecords(partition, ["c", "none", "ключ\u0001", "a"])
        assert.deepStrictEqual(found, [records[2], null, records[1], records[0]])
        const state = yield* warm.state
        assert.deepInclude(state, { level: "up", hits: 3, misses: 1, errors: 0, partitions: 1 })
      })
    ))

  it("neither gives nor takes anything of a partition that is not fenced here", () =>
    run((warm) =>
      Effect.gen(function* () {
        assert.strictEqual(yield* warm.putRecords(partition, [record("a")], warm.ticket()), 0)
        assert.deepStrictEqual(yield* warm.getRecords(partition, ["a"]), [null])
      })
    ))

  it("an invalidated record is not given, its partition's others are", () =>
    run((warm) =>
      Effect.gen(function* () {
        yield* warm.fence(partition)
        yield* warm.putRecords(partition, [record("a"), record("b")], warm.ticket())
        yield* warm.invalidate(partition, ["a", "none"])
        assert.deepStrictEqual(yield* warm.getRecords(partition, ["a", "b"]), [null, record("b")])
      })
    ))

  it("what was read before a write and is put after it is not taken", () =>
    run((warm) =>
      Effect.gen(function* () {
        yield* warm.fence(partition)
        const ticket = warm.ticket()
        yield* warm.invalidate(partition, ["a"])
        assert.strictEqual(yield* warm.putRecords(partition, [record("a"), record("b")], ticket), 1)
        assert.deepStrictEqual(yield* warm.getRecords(partition, ["a", "b"]), [null, record("b")])
      })
    ))

  it("a fence ends all that was put before, a distrusted partition gives nothing", () =>
    run((warm) =>
      Effect.gen(function* () {
        yield* warm.fence(partition, { epoch: 1, seq: 1 })
        yield* warm.putRecords(partition, [record("a")], warm.ticket())
        yield* warm.fence(partition, { epoch: 2, seq: 2 })
        assert.deepStrictEqual(yield* warm.getRecords(partition, ["a"]), [null])
        yield* warm.putRecords(partition, [record("a", 2)], warm.ticket())
        assert.deepStrictEqual(yield* warm.getRecords(partition, ["a"]), [record("a", 2)])
        yield* warm.distrust(partition)
        assert.deepStrictEqual(yield* warm.getRecords(partition, ["a"]), [null])
      })
    ))

  it("a fence that follows its own release keeps what is there; one with anything between does not", () =>
    run((warm) =>
      Effect.gen(function* () {
        yield* warm.fence(partition, { epoch: 4, seq: 10 })
        yield* warm.putRecords(partition, [record("a")], warm.ticket())
        yield* warm.release(partition, { epoch: 4, seq: 12 })
        assert.deepStrictEqual(yield* warm.getRecords(partition, ["a"]), [record("a")])
        yield* warm.fence(partition, { epoch: 5, seq: 13 })
        assert.deepStrictEqual(yield* warm.getRecords(partition, ["a"]), [record("a")])
        yield* warm.release(partition, { epoch: 5, seq: 13 })
        yield* warm.fence(partition, { epoch: 7, seq: 15 })
        assert.deepStrictEqual(yield* warm.getRecords(partition, ["a"]), [null])
      })
    ))

  it("records live their time from the last read on", () =>
    run(
      (warm) =>
        Effect.gen(function* () {
          yield* warm.fence(partition)
          yield* warm.putRecords(partition, [record("read"), record("left")], warm.ticket())
          for (let n = 0; n < 8; n++) {
            yield* Effect.sleep(100)
            assert.isNotNull((yield* warm.getRecords(partition, ["read"]))[0])
          }
          assert.deepStrictEqual(yield* warm.getRecords(partition, ["left"]), [null])
        }),
      600
    ))

  it("a deleted collection is gone, and what was read of it does not come back", () =>
    run((warm) =>
      Effect.gen(function* () {
        const other = "d/fedcba9876543210/0"
        yield* warm.fence(partition)
        yield* warm.fence(other)
        const ticket = warm.ticket()
        yield* warm.putRecords(partition, [record("a")], ticket)
        yield* warm.putRecords(other, [record("b")], ticket)
        yield* warm.drop("0123456789abcdef")
        assert.strictEqual(yield* warm.putRecords(partition, [record("a")], ticket), 0)
        assert.deepStrictEqual(yield* warm.getRecords(partition, ["a"]), [null])
        assert.deepStrictEqual(yield* warm.getRecords(other, ["b"]), [record("b")])
      })
    ))

  it("keeps results for their time", () =>
    run((warm) =>
      Effect.gen(function* () {
        const bytes = Uint8Array.of(0, 255, 13, 10, 7)
        yield* warm.putResult("key", bytes, 60_000)
        yield* warm.putResult("short", bytes, 20)
        assert.deepStrictEqual(new Uint8Array((yield* warm.getResult("key")) ?? []), bytes)
        yield* Effect.sleep(60)
        assert.isUndefined(yield* warm.getResult("short"))
        assert.isUndefined(yield* warm.getResult("none"))
        yield* warm.putResult("c0ffee/a", bytes, 60_000)
        yield* warm.putResult("decade/a", bytes, 60_000)
        yield* warm.drop("c0ffee")
        assert.isUndefined(yield* warm.getResult("c0ffee/a"))
        assert.isDefined(yield* warm.getResult("decade/a"))
      })
    ))

  it(
    "never gives a version older than the last acknowledged write, whatever the interleaving",
    { timeout: 30_000 },
    () => seeded(seedOf(11), (source) => run((warm) => interleave(warm, source)))
  )
}

/**
 * Writers, readers that fill, passivations and activations of one partition, in an order that the seed finds. A read may give what
 * was current at any moment since it began, never anything older.
 */
const interleave = (warm: WarmStore["Service"], source: Random) =>
  Effect.gen(function* () {
    const ids = ["a", "b", "c"]
    /** The state in the index, and what of it has been acknowledged. */
    const current = new Map<string, number>(ids.map((id) => [id, 0]))
    const acknowledged = new Map<string, number>(ids.map((id) => [id, 0]))
    let version = 0
    let claim = { epoch: 1, seq: 1 }
    let given = 0
    const pause = Effect.suspend(() =>
      source.below(4) === 0
        ? Effect.sleep(source.below(3))
        : Effect.forEach(Array.from({ length: source.below(5) }), () => Effect.yieldNow, { discard: true })
    )
    yield* warm.fence(partition, claim)
    const write = Effect.gen(function* () {
      yield* pause
      const id = source.pick(ids)
      const mine = ++version
      current.set(id, mine)
      claim = { ...claim, seq: claim.seq + 1 }
      yield* warm.invalidate(partition, [id])
      acknowledged.set(id, Math.max(mine, acknowledged.get(id) as number))
    })
    const fill = Effect.gen(function* () {
      yield* pause
      const id = source.pick(ids)
      const ticket = warm.ticket()
      const read = record(id, current.get(id))
      yield* pause
      yield* warm.putRecords(partition, [read], ticket)
    })
    const look = Effect.gen(function* () {
      yield* pause
      const id = source.pick(ids)
      const before = acknowledged.get(id) as number
      const found = (yield* warm.getRecords(partition, [id]))[0]
      if (found === null || found === undefined) return
      given += 1
      assert.isAtLeast(found.vector[0] as number, before, `a read of ${id} went back in time`)
    })
    const reopen = Effect.gen(function* () {
      yield* pause
      if (source.below(2) === 0) yield* warm.release(partition, claim)
      claim = { epoch: claim.epoch + 1, seq: claim.seq + 1 }
      yield* warm.fence(partition, claim)
    })
    for (let round = 0; round < 150; round++) {
      const steps = Array.from({ length: 12 }, () => {
        const choice = source.next()
        return choice < 0.25 ? write : choice < 0.6 ? fill : look
      })
      yield* Effect.all(steps, { concurrency: "unbounded" })
      if (source.below(5) === 0) yield* reopen
    }
    assert.isAbove(given, 100, "the cache was of use")
  })
