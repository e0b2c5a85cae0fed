/** The newest messages of a channel in memory: they count in the budget, give way, and are read from the log then. */
import { assert, describe, it } from "@effect/vitest"
import { Context, Effect, Layer } from "effect"
import { MessageChannel } from "../../src/actors/MessageChannel.ts"
import { defaultSettings } from "../../src/config.ts"
import { AgentChannel, channelId } from "../../src/protocol/AgentChannel.ts"
import { endOfObject } from "../../src/protocol/IndexPartition.ts"
import { TopicCatalog, topicCatalogId } from "../../src/protocol/TopicCatalog.ts"
import { MemoryBudget } from "../../src/tiers/MemoryBudget.ts"
import { ObjectStore } from "../../src/tiers/ObjectStore.ts"
import { startActors } from "../support/Actors.ts"

describe("messages of a channel in memory", () => {
  it("give way from the oldest on, and are known to be gone", () => {
    const channel = new MessageChannel(defaultSettings)
    for (let seq = 1; seq <= 10; seq++) {
      const { records } = channel.publish([{ key: "k", id: `m-${seq}`, body: "x".repeat(1_000) }], seq)
      for (const [index, record] of records.entries()) channel.apply(record, seq, index)
      channel.committed(seq)
    }
    const before = channel.windowBytes
    assert.isAbove(before, 10_000)
    assert.strictEqual(channel.newest({ seq: 0, index: endOfObject }, 100)?.length, 10)
    channel.shrinkWindow(before * 0.49)
    assert.isAtMost(channel.windowBytes, before * 0.51)
    assert.isUndefined(channel.newest({ seq: 0, index: endOfObject }, 100))
    assert.deepStrictEqual(
      channel.newest({ seq: 5, index: 0 }, 100)?.map(({ id }) => id),
      ["m-6", "m-7", "m-8", "m-9", "m-10"]
    )
    channel.shrinkWindow(before)
    assert.strictEqual(channel.windowBytes, 0)
    assert.isUndefined(channel.newest({ seq: 9, index: 0 }, 100))
    assert.deepStrictEqual(channel.newest({ seq: 10, index: 0 }, 100), [])
  })

  it("count in the memory budget while their channel is resident", async () => {
    const store = await Effect.runPromise(Effect.scoped(Layer.build(ObjectStore.layerMemory)))
    const actors = await startActors(Context.make(ObjectStore, Context.get(store, ObjectStore)))
    const run = <A, E>(effect: Effect.Effect<A, E, Effect.Services<typeof AgentChannel.client>>) =>
      Effect.runPromise(Effect.provideContext(effect, actors.context))
    const held = () => Context.get(actors.context, MemoryBudget).state().cacheBytes
    const { topic } = await run(
      Effect.flatMap(TopicCatalog.client, (client) => client(topicCatalogId).Create({ name: "t", request: {} }))
    )
    const channel = (await run(AgentChannel.client))(channelId({ topic: "t", uid: topic.uid, channel: 0 }))
    const before = held()
    const body = JSON.stringify("x".repeat(100_000))
    await run(channel.Publish({ messages: [{ key: "", id: "a", body }] }))
    assert.isAtLeast(held() - before, 100_000)
    await actors.stop()
    assert.isAtMost(held(), before)
  })
})
