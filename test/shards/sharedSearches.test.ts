/**
 * Searches that the router runs once for many, over a partition under the test's control: it answers when it is told to, and
 * its revision is what the test says.
 */
import { assert, describe, it } from "@effect/vitest"
import { Context, Deferred, Effect, Exit, Fiber, Layer, PubSub, References, Scope } from "effect"
import { type PartitionHits, partitionId } from "../../src/protocol/IndexPartition.ts"
import type { SessionQuery } from "../../src/protocol/StreamSession.ts"
import { CacheEvents } from "../../src/shards/CacheEvents.ts"
import { LocalActors } from "../../src/shards/LocalActors.ts"
import { ResultCache } from "../../src/shards/ResultCache.ts"
import { ResultStore } from "../../src/shards/ResultStore.ts"
import { ObjectStore } from "../../src/tiers/ObjectStore.ts"
import { startActors } from "../support/Actors.ts"

interface Asked {
  readonly answer: (ids: ReadonlyArray<string>) => void
  interrupted: boolean
}

/** A node whose collection `c` has partitions that are played by the test. */
const stage = async (partitions: number, use: (on: Stage) => Promise<void>) => {
  const objects = await Effect.runPromise(Effect.scoped(Layer.build(ObjectStore.layerMemory)))
  const stored = new Map<string, Uint8Array>()
  const store = ResultStore.of({
    get: (key) => Effect.sync(() => stored.get(key)),
    put: (key, bytes) => Effect.sync(() => void stored.set(key, bytes))
  })
  const node = await startActors(Context.add(objects, ResultStore, store))
  const scope = await Effect.runPromise(Scope.make())
  const { collection } = await Effect.runPromise(node.router.createCollection("c", { dimensions: 2, partitions }))
  const { context } = node
  const revisions: Array<string | undefined> = Array.from({ length: partitions }, () => "1.1")
  const asked: Array<Array<Asked>> = Array.from({ length: partitions }, () => [])
  for (let partition = 0; partition < partitions; partition++) {
    const played = {
      search: () =>
        Effect.suspend(() => {
          const reply = Deferred.makeUnsafe<PartitionHits>()
          const one: Asked = {
            answer: (ids) =>
              Deferred.doneUnsafe(reply, Effect.succeed({ ids, scores: Float32Array.from(ids, (_, i) => -i) })),
            interrupted: false
          }
          asked[partition]?.push(one)
          return Effect.onInterrupt(Deferred.await(reply), () => Effect.sync(() => (one.interrupted = true)))
        }),
      get: (ids: ReadonlyArray<string>) =>
        Effect.succeed(ids.map((id) => ({ id, vector: Float32Array.of(1, 0), metadata: "", version: "" }))),
      revision: () => revisions[partition],
      watch: () => Effect.die("not asked"),
      position: () => 0,
      collection,
      handOver: Effect.void
    }
    const id = partitionId({ collection: "c", uid: collection.uid, partition })
    const register = Context.get(context, LocalActors).registerPartition(id, played)
    await Effect.runPromise(Scope.provide(register, scope))
  }
  try {
    await use({ router: node.router, asked, revisions, stored, context })
  } finally {
    await Effect.runPromise(Scope.close(scope, Exit.void))
    await node.stop()
  }
}
interface Stage {
  readonly router: Awaited<ReturnType<typeof startActors>>["router"]
  /** By partition, the searches it was asked, in their order. */
  readonly asked: ReadonlyArray<ReadonlyArray<Asked>>
  readonly revisions: Array<string | undefined>
  readonly stored: Map<string, Uint8Array>
  readonly context: Awaited<ReturnType<typeof startActors>>["context"]
}

const query = (change: Partial<SessionQuery> = {}): SessionQuery => ({
  queryId: "q",
  collection: "c",
  vectorId: "x",
  k: 10,
  ef: 0,
  filter: "",
  includeMetadata: false,
  includeVector: false,
  deadlineMillis: 0,
  ...change
})

const { vectorId: _, ...unnamed } = query()
const byVector: SessionQuery = { ...unnamed, vector: Float32Array.of(1, 0) }

/** Lets everything run that can. */
const settle = async () => {
  for (let i = 0; i < 20; i++) await new Promise((resolve) => setImmediate(resolve))
}

const urlSearch = (on: Stage, change: Partial<SessionQuery> = {}) =>
  Effect.runFork(on.router.searchByUrl(query(change)))

const urlSearches = (on: Stage, n: number, change: (i: number) => Partial<SessionQuery> = () => ({})) =>
  Array.from({ length: n }, (_, i) => urlSearch(on, { queryId: `q${i}`, ...change(i) }))

const join = <A, E>(fiber: Fiber.Fiber<A, E>): Promise<A> => Effect.runPromise(Fiber.join(fiber))

const first = (on: Stage, n = 0): Asked => on.asked[0]?.[n] as Asked

describe("searches at once", () => {
  it("that ask the same are one; each is answered under its own id", () =>
    stage(1, async (on) => {
      const fibers = urlSearches(on, 10)
      await settle()
      assert.strictEqual(on.asked[0]?.length, 1)
      first(on).answer(["a", "b"])
      for (const [i, fiber] of fibers.entries()) {
        const { answer, revision, cached } = await join(fiber)
        assert.deepInclude(answer, { queryId: `q${i}`, ids: ["a", "b"] })
        assert.deepStrictEqual([revision, cached], ["1.1", false])
      }
      const again = await Effect.runPromise(on.router.searchByUrl(query()))
      assert.deepStrictEqual([again.cached, again.answer.ids], [true, ["a", "b"]])
      assert.strictEqual(on.asked[0]?.length, 1)
    }))

  it("that ask something else are not", () =>
    stage(1, async (on) => {
      const fibers = urlSearches(on, 3, (i) => ({ k: 10 + i }))
      await settle()
      assert.strictEqual(on.asked[0]?.length, 3)
      for (let i = 0; i < 3; i++) first(on, i).answer([`k${i}`])
      for (const [i, fiber] of fibers.entries()) {
        assert.deepStrictEqual((await join(fiber)).answer.ids, [`k${i}`])
      }
    }))

  it("after a write do not join one from before it, nor is that one's answer kept", () =>
    stage(1, async (on) => {
      const before = urlSearch(on)
      await settle()
      on.revisions[0] = "1.2"
      const after = urlSearch(on)
      await settle()
      assert.strictEqual(on.asked[0]?.length, 2)
      first(on, 1).answer(["new"])
      await settle()
      first(on, 0).answer(["old"])
      const old = await join(before)
      assert.isUndefined(old.revision)
      assert.deepStrictEqual((await join(after)).answer.ids, ["new"])
      const next = await Effect.runPromise(on.router.searchByUrl(query()))
      assert.deepStrictEqual([next.cached, next.answer.ids], [true, ["new"]])
    }))

  it("while a write is being applied are each run, and nothing of them is kept", () =>
    stage(1, async (on) => {
      on.revisions[0] = undefined
      const fibers = urlSearches(on, 3)
      await settle()
      assert.strictEqual(on.asked[0]?.length, 3)
      for (let i = 0; i < 3; i++) first(on, i).answer(["between"])
      for (const fiber of fibers) assert.isUndefined((await join(fiber)).revision)
      assert.strictEqual(Context.get(on.context, ResultCache).entries(), 0)
      assert.strictEqual(on.stored.size, 0)
    }))

  it("go on for the others when one goes away, and end when all have", () =>
    stage(1, async (on) => {
      const fibers = urlSearches(on, 4)
      await settle()
      for (const fiber of fibers.slice(0, 3)) await Effect.runPromise(Fiber.interrupt(fiber))
      assert.isFalse(first(on).interrupted)
      first(on).answer(["a"])
      const last = fibers[3] as (typeof fibers)[number]
      assert.deepStrictEqual((await join(last)).answer.ids, ["a"])

      const others = urlSearches(on, 2, () => ({ k: 3 }))
      await settle()
      for (const fiber of others) await Effect.runPromise(Fiber.interrupt(fiber))
      await settle()
      assert.isTrue(first(on, 1).interrupted)
    }))

  it("keep their own deadlines: a shorter one ends alone, a longer one outlives the search it waited for", () =>
    stage(1, async (on) => {
      const [leader, short, long] = [300, 40, 5_000].map((deadlineMillis) =>
        urlSearch(on, { deadlineMillis })
      ) as Triple<ReturnType<typeof urlSearch>>
      const shortExit = await Effect.runPromise(Fiber.await(short))
      assert.strictEqual(Exit.findErrorOption(shortExit).pipe(tagOf), "DeadlineExceeded")
      const leaderExit = await Effect.runPromise(Fiber.await(leader))
      assert.strictEqual(Exit.findErrorOption(leaderExit).pipe(tagOf), "DeadlineExceeded")
      await settle()
      on.asked[0]?.at(-1)?.answer(["late"])
      assert.deepStrictEqual((await join(long)).answer.ids, ["late"])
    }))

  it("with a partition missing are never kept", () =>
    stage(2, async (on) => {
      const fiber = urlSearch(on, { deadlineMillis: 50 })
      await settle()
      first(on).answer(["a"])
      const { answer } = await join(fiber)
      assert.deepStrictEqual(answer.missing, [1])
      assert.strictEqual(Context.get(on.context, ResultCache).entries(), 0)
      assert.strictEqual(on.stored.size, 0)
    }))
})

describe("searches by vector", () => {
  it("are kept from their second time on", () =>
    stage(1, async (on) => {
      for (let n = 0; n < 4; n++) {
        const fiber = Effect.runFork(on.router.search(byVector))
        await settle()
        on.asked[0]?.[n]?.answer(["a"])
        assert.deepStrictEqual((await join(fiber)).ids, ["a"])
      }
      assert.strictEqual(on.asked[0]?.length, 2)
    }))
})

describe("the store behind the cache", () => {
  it("answers what this process has dropped, at the same revision only, and is not believed where it is damaged", () =>
    stage(1, async (on) => {
      const fiber = urlSearch(on)
      await settle()
      first(on).answer(["a"])
      await join(fiber)
      await settle()
      assert.strictEqual(on.stored.size, 1)
      const cache = Context.get(on.context, ResultCache)
      const uid = (await Effect.runPromise(on.router.collection("c"))).uid
      cache.dropCollection(uid)
      assert.deepStrictEqual((await Effect.runPromise(on.router.searchByUrl(query()))).answer.ids, ["a"])
      assert.strictEqual(on.asked[0]?.length, 1)

      cache.dropCollection(uid)
      for (const key of on.stored.keys()) on.stored.set(key, Buffer.from("{"))
      const mended = urlSearch(on)
      await settle()
      first(on, 1).answer(["b"])
      assert.deepStrictEqual((await join(mended)).answer.ids, ["b"])

      on.revisions[0] = "1.2"
      const newer = urlSearch(on)
      await settle()
      assert.strictEqual(on.asked[0]?.length, 3)
      first(on, 2).answer(["c"])
      await join(newer)
    }))
})

describe("an invalidation", () => {
  it("is an event with the tags to purge", () =>
    stage(1, async (on) => {
      const events = Context.get(on.context, CacheEvents)
      const program = Effect.scoped(
        Effect.gen(function* () {
          const subscription = yield* events.subscribe
          const all = yield* on.router.invalidate("c", { scope: "all", notice_ms: 60_000 })
          const some = yield* on.router.invalidate("c", { scope: "ids", ids: ["x"] })
          return { all, some, published: [yield* PubSub.take(subscription), yield* PubSub.take(subscription)] }
        })
      )
      const quiet = Effect.provideService(program, References.MinimumLogLevel, "Fatal")
      const { all, some, published } = await Effect.runPromise(quiet)
      assert.deepInclude(published[0], {
        _tag: "CacheInvalidated",
        scope: "all",
        tags: all.tags,
        effectiveMillis: all.effective_ms
      })
      assert.deepInclude(published[1], { scope: "ids", ids: ["x"], tags: some.tags })
    }))
})

type Triple<A> = [A, A, A]

const tagOf = (error: { readonly _tag: string; readonly value?: { readonly _tag: string } }): string | undefined =>
  error.value?._tag
