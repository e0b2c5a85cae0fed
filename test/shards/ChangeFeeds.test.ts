/** Followers of a collection whose partitions are another node's, and of one that are passivated here. */
import { assert, describe, it } from "@effect/vitest"
import { Context, Effect, Exit, Layer, Scope } from "effect"
import { defaultSettings, Settings } from "../../src/config.ts"
import type { ChangePosition } from "../../src/protocol/IndexPartition.ts"
import { Calls } from "../../src/shards/Calls.ts"
import { ChangeFeeds, type ChangeFollower, type Followed, type FollowFrom } from "../../src/shards/ChangeFeeds.ts"
import { LocalActors } from "../../src/shards/LocalActors.ts"
import { ObjectStore } from "../../src/tiers/ObjectStore.ts"
import { type RunningActors, startActors } from "../support/Actors.ts"

const partitions = 3

/** Feeds that find nothing here, as on a node that owns none of the partitions. */
const feedsElsewhere = (node: RunningActors, mirrorMax: number, scope: Scope.Scope) =>
  Effect.runPromise(
    ChangeFeeds.layerWith(() => false).pipe(
      Layer.provide(Layer.mergeAll(LocalActors.layer, Calls.layerAlone)),
      Layer.provide(Layer.succeed(Settings, { ...defaultSettings, changeBufferMax: mirrorMax })),
      Layer.provide(Layer.succeedContext(node.context)),
      Layer.buildWithScope(scope),
      Effect.map(Context.get(ChangeFeeds))
    )
  )

const follow = async (node: RunningActors, feeds: ChangeFeeds["Service"], from: FollowFrom) => {
  const collection = await Effect.runPromise(node.router.collection("c"))
  const got: Array<Followed> = []
  let follower: ChangeFollower | undefined
  const look = () => {
    for (let next = follower?.next(); next !== undefined; next = follower?.next()) got.push(next)
  }
  follower = await Effect.runPromise(feeds.open(collection, from, { onReady: look, onLost: () => {} }))
  look()
  return { follower, got }
}

const write = (node: RunningActors, from: number, count: number) =>
  Effect.runPromise(
    node.router.upsert(
      "c",
      Array.from({ length: count }, (_, i) => ({ id: `v${from + i}`, vector: Float32Array.of(1, i), metadata: "" }))
    )
  )

const settled = async (holds: () => boolean): Promise<void> => {
  const until = Date.now() + 10_000
  while (!holds() && Date.now() < until) await new Promise((resolve) => setTimeout(resolve, 10))
  assert.isTrue(holds())
}

const idsOf = (got: ReadonlyArray<Followed>) =>
  got.map((one) => (one.kind === "change" ? one.change.id : one.kind)).sort()
const ids = (from: number, count: number) => Array.from({ length: count }, (_, i) => `v${from + i}`).sort()

describe("followers of changes", () => {
  for (const [where, elsewhere, mirrorMax] of [
    ["partitions here", false, 1_024],
    ["another node's partitions, mirrored", true, 1_024],
    ["another node's partitions, beyond what is mirrored", true, 16]
  ] as const) {
    it(`have every change once: ${where}`, { timeout: 30_000 }, async () => {
      const store = await Effect.runPromise(Effect.scoped(Layer.build(ObjectStore.layerMemory)))
      const node = await startActors(store)
      await Effect.runPromise(node.router.createCollection("c", { dimensions: 2, partitions }))
      const scope = await Effect.runPromise(Scope.make())
      const feeds = elsewhere ? await feedsElsewhere(node, mirrorMax, scope) : Context.get(node.context, ChangeFeeds)
      await write(node, 0, 40)
      const newest = await follow(node, feeds, "newest")
      const oldest = await follow(node, feeds, "oldest")
      await settled(() => oldest.got.length === 40)
      await write(node, 40, 200)
      await settled(() => newest.got.length === 200 && oldest.got.length === 240)
      assert.deepStrictEqual(idsOf(newest.got), ids(40, 200))
      assert.deepStrictEqual(idsOf(oldest.got), ids(0, 240))
      // From any state of one, another follows with what came after it.
      for (const at of [0, 17, 120, 239]) {
        const from: ReadonlyArray<ChangePosition> = (oldest.got[at] as Followed).state.positions
        const later = await follow(node, feeds, from)
        await settled(() => later.got.length === 239 - at)
        assert.deepStrictEqual(idsOf(later.got), idsOf(oldest.got.slice(at + 1)))
        later.follower.close()
      }
      assert.strictEqual(feeds.count(), 2)
      newest.follower.close()
      oldest.follower.close()
      assert.strictEqual(feeds.count(), 0)
      await Effect.runPromise(Scope.close(scope, Exit.void))
      await node.stop()
    })
  }

  it("go on when their partitions are passivated and come back; equal ones share their state", {
    timeout: 30_000
  }, async () => {
    const store = await Effect.runPromise(Effect.scoped(Layer.build(ObjectStore.layerMemory)))
    const node = await startActors(store, { partitionIdleMillis: 200 })
    await Effect.runPromise(node.router.createCollection("c", { dimensions: 2, partitions }))
    const feeds = Context.get(node.context, ChangeFeeds)
    const local = Context.get(node.context, LocalActors)
    const one = await follow(node, feeds, "newest")
    const other = await follow(node, feeds, "newest")
    for (let round = 0; round < 2; round++) {
      // An idle follower keeps no partition resident.
      if (round > 0) await settled(() => local.changes.size === 0)
      await write(node, round * 20, 20)
      await settled(() => one.got.length === (round + 1) * 20 && other.got.length === (round + 1) * 20)
      assert.strictEqual(one.follower.state(), other.follower.state())
    }
    assert.deepStrictEqual(idsOf(one.got), ids(0, 40))
    one.follower.close()
    other.follower.close()
    await node.stop()
  })
})
