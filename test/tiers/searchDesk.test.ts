/** Searches that the main thread waits for: the same answers as by message, and its event loop has its turns. */
import { assert, describe, it } from "@effect/vitest"
import { Context, Effect, Exit, Fiber, Layer } from "effect"
import {
  type IndexQuery,
  type PartitionIndex,
  VectorIndex,
  type VectorIndexOptions
} from "../../src/tiers/VectorIndex.ts"
import { type Random, random, seedOf } from "../support/Seeded.ts"
import { segmentOf, stamper } from "./index/indexSupport.ts"

const dimensions = 24
const spec = { dimensions, metric: "cosine", m: 16, efConstruction: 100 } as const
const words = ["plain", "größer", "日本語", "😀😃", ""]

const segment = (source: Random, count: number): Uint8Array => {
  const stamp = stamper()
  return segmentOf(
    dimensions,
    Array.from({ length: count }, (_, n) => {
      const word = source.pick(words)
      return {
        kind: "upsert" as const,
        id: `${word}${n}`,
        version: stamp(),
        vector: Float32Array.from(source.vector(dimensions)),
        metadata: word === "" ? "" : JSON.stringify({ n, word })
      }
    })
  )
}

const queryOf = (source: Random, options: Partial<IndexQuery> = {}): IndexQuery => ({
  vector: Float32Array.from(source.vector(dimensions)),
  k: 10,
  ef: 128,
  filter: undefined,
  includeMetadata: true,
  includeVector: false,
  ...options
})

const opened = (options: VectorIndexOptions) =>
  Effect.gen(function* () {
    const context = yield* Layer.build(VectorIndex.layerWith({ threads: 1, ...options }))
    return yield* Context.get(context, VectorIndex).open(spec, undefined)
  })

/** Whether it was answered at once, without a turn of the event loop. */
const atOnce = (index: PartitionIndex, query: IndexQuery): boolean =>
  Exit.isSuccess(Effect.runSyncExit(index.search(query)))

const turn = Effect.promise(() => new Promise((resolve) => setTimeout(resolve, 1)))

describe("a search that the main thread waits for", () => {
  it.live("has the answer that one by message has", () =>
    Effect.gen(function* () {
      const bytes = segment(random(seedOf(71)), 2_000)
      const waited = yield* opened({ graphFrom: 500, searchWaitMillis: 50 })
      const sent = yield* opened({ graphFrom: 500 })
      yield* waited.apply(bytes)
      yield* sent.apply(bytes)
      const source = random(seedOf(72))
      for (let i = 0; i < 300; i++) {
        const query = queryOf(source, {
          // The largest of them have no room at the desk.
          k: source.pick([1, 3, 10, 100, 700]),
          filter: source.pick([undefined, undefined, '{"word":"größer"}', '{"n":{"lt":100}}']),
          includeMetadata: source.below(2) === 0,
          includeVector: source.below(3) === 0
        })
        assert.deepStrictEqual(yield* waited.search(query), yield* sent.search(query))
      }
    }).pipe(Effect.scoped)
  )

  it.live("is answered at once where it is alone, and by a message where it is not or is told not to wait", () =>
    Effect.gen(function* () {
      const source = random(seedOf(73))
      const index = yield* opened({ searchWaitMillis: 1_000 })
      const other = yield* opened({})
      for (const one of [index, other]) {
        yield* one.apply(segment(source, 100))
        yield* turn
      }
      let answered = 0
      for (let i = 0; i < 20; i++) {
        answered += Number(atOnce(index, queryOf(source)))
        assert.isFalse(atOnce(other, queryOf(source)))
        yield* turn
      }
      assert.isAbove(answered, 0)
      const applying = yield* Effect.forkChild(index.apply(segment(source, 100)), { startImmediately: true })
      assert.isFalse(atOnce(index, queryOf(source)))
      yield* Fiber.join(applying)
    }).pipe(Effect.scoped)
  )

  it.live("is answered beside writes, and after some were given up", () =>
    Effect.gen(function* () {
      const source = random(seedOf(74))
      const index = yield* opened({ graphFrom: 500, searchWaitMillis: 1 })
      const applying = yield* Effect.forkChild(index.apply(segment(source, 2_000)), { startImmediately: true })
      let searches = 0
      while (applying.pollUnsafe() === undefined) {
        const { ids } = yield* index.search(queryOf(source))
        assert.isAtMost(ids.length, 10)
        searches += 1
      }
      assert.isAbove(searches, 0)
      for (let i = 0; i < 100; i++) {
        const given = yield* Effect.forkChild(index.search(queryOf(source, { k: 1_000, ef: 2_000 })), {
          startImmediately: true
        })
        yield* Fiber.interrupt(given)
        assert.lengthOf((yield* index.search(queryOf(source))).ids, 10)
      }
    }).pipe(Effect.scoped)
  )

  it.live("lets the event loop have its turns", () =>
    Effect.gen(function* () {
      const source = random(seedOf(75))
      const index = yield* opened({ searchWaitMillis: 1 })
      yield* index.apply(segment(source, 1_000))
      const query = queryOf(source)
      yield* Effect.promise(async () => {
        let turns = 0
        let searches = 0
        const count = () => {
          turns += 1
          if (turns < 20) setImmediate(count)
        }
        setImmediate(count)
        // Answers alone never give it one: promises are settled before that.
        for (; turns < 20 && searches < 100_000; searches++) await Effect.runPromise(index.search(query))
        assert.strictEqual(turns, 20, `${searches} searches`)
      })
    }).pipe(Effect.scoped)
  )

  it.live("fails where the partition is closed", () =>
    Effect.gen(function* () {
      const source = random(seedOf(76))
      const context = yield* Layer.build(VectorIndex.layerWith({ threads: 1, searchWaitMillis: 50 }))
      const index = yield* Effect.scoped(
        Effect.tap(Context.get(context, VectorIndex).open(spec, undefined), (one) => one.apply(segment(source, 10)))
      )
      assert.strictEqual((yield* Effect.flip(index.search(queryOf(source))))._tag, "IndexLost")
      const next = yield* Context.get(context, VectorIndex).open(spec, undefined)
      yield* next.apply(segment(source, 10))
      assert.lengthOf((yield* next.search(queryOf(source))).ids, 10)
    }).pipe(Effect.scoped)
  )
})
