/** A partition's change feed: everything after a position, in order, once; from the buffer, from the log, and as it comes. */
import { assert, describe, it } from "@effect/vitest"
import { Effect, Fiber, Layer, Stream } from "effect"
import { type Change, IndexPartition, partitionId } from "../../src/protocol/IndexPartition.ts"
import { ObjectStore } from "../../src/tiers/ObjectStore.ts"
import { type RunningActors, startActors } from "../support/Actors.ts"

const batches = 12

describe("the change feed", () => {
  for (const [where, changeBufferMax, restart] of [
    ["the buffer", 1_000, false],
    ["the log, where the buffer is too short", 16, false],
    ["the log, after a restart", 1_000, true]
  ] as const) {
    it(`follows on from any position, out of ${where}`, { timeout: 30_000 }, async () => {
      const store = await Effect.runPromise(Effect.scoped(Layer.build(ObjectStore.layerMemory)))
      let node = await startActors(store, { changeBufferMax })
      const { collection } = await Effect.runPromise(node.router.createCollection("c", { dimensions: 2 }))
      const id = partitionId({ collection: "c", uid: collection.uid, partition: 0 })
      for (let n = 0; n < batches; n++) await write(node, n)
      const all = await follow(node, id, { seq: 0, index: 0 }, batches * 3)
      if (restart) {
        await node.stop()
        node = await startActors(store, { changeBufferMax })
      }
      const ids = Array.from({ length: batches }, (_, n) => [`a${n}`, `b${n}`, `a${n}`]).flat()
      assert.deepStrictEqual(
        all.map((change) => change.id),
        ids
      )
      for (let at = 0; at < all.length; at += 5) {
        const rest = await follow(node, id, all[at] as Change, all.length - at - 1)
        assert.deepStrictEqual(rest, all.slice(at + 1))
      }
      // One who waits at the end is told what comes next.
      const waiting = Effect.runFork(Effect.provideContext(changes(id, all[all.length - 1] as Change, 3), node.context))
      await write(node, batches)
      const next = await Effect.runPromise(Fiber.join(waiting))
      assert.deepStrictEqual(
        next.map((change) => change.kind),
        ["upsert", "upsert", "metadata"]
      )
      await node.stop()
    })
  }
})

/** Two records and an update of the first. */
const write = async (node: RunningActors, n: number) => {
  const records = ["a", "b"].map((name) => ({ id: `${name}${n}`, vector: new Float32Array([1, n]), metadata: "" }))
  await Effect.runPromise(node.router.upsert("c", records))
  await Effect.runPromise(node.router.updateMetadata("c", `a${n}`, `{"n":${n}}`))
}

const changes = (id: string, after: { readonly seq: number; readonly index: number }, count: number) =>
  Effect.flatMap(IndexPartition.client, (client) =>
    client(id).Changes({ seq: after.seq, index: after.index }).pipe(Stream.take(count), Stream.runCollect)
  )

const follow = (
  node: RunningActors,
  id: string,
  after: { readonly seq: number; readonly index: number },
  count: number
): Promise<ReadonlyArray<Change>> =>
  count === 0 ? Promise.resolve([]) : Effect.runPromise(Effect.provideContext(changes(id, after, count), node.context))
