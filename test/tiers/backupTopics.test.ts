/**
 * Topics through a backup: at a time within it and at its end, what comes back is what there was, with the ids that are known,
 * the places of subscribers, tasks in every state and dead letters, and is gone on with. Positions mean what they meant.
 */
import { mkdtemp, rm } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { assert, describe, it } from "@effect/vitest"
import { Context, Effect, Layer } from "effect"
import {
  AgentChannel,
  channelId,
  type LeasedTask,
  type Message,
  queueChannel,
  TaskQueue
} from "../../src/protocol/AgentChannel.ts"
import { endOfObject } from "../../src/protocol/IndexPartition.ts"
import type { Topic } from "../../src/protocol/Topic.ts"
import { TopicCatalog, topicCatalogId } from "../../src/protocol/TopicCatalog.ts"
import { type BackupReport, backup } from "../../src/tiers/Backup.ts"
import { verifyBackup, verifyData } from "../../src/tiers/BackupVerify.ts"
import { ObjectStore } from "../../src/tiers/ObjectStore.ts"
import { PruneLimit } from "../../src/tiers/PartitionLog.ts"
import { restore } from "../../src/tiers/Restore.ts"
import { type RunningActors, startActors } from "../support/Actors.ts"

type Store = ObjectStore["Service"]

const settings = { topicSnapshotObjects: 10, taskGraceMillis: 0, topicCommitMillis: 0 }
const channels = 2

/** All that can be asked of a topic. */
interface State {
  readonly messages: ReadonlyArray<ReadonlyArray<Message>>
  readonly tasks: ReadonlyArray<unknown>
  readonly subscriber: unknown
}

describe("topics in a backup", () => {
  it("are back as they were, at a time and at the end, and go on from there", { timeout: 60_000 }, () =>
    withPlaces(async ({ source, destination, memory, scratch }) => {
      // As a node that backs itself up: what is not copied yet is not pruned.
      const kept = Context.make(ObjectStore, source).pipe(Context.add(PruneLimit, () => 0))
      const node = new Node(await startActors(kept, settings))
      const topic = await node.create("work", { channels, retention_ms: 3_600_000, attempts_max: 1 })
      await node.create("never-used", {})
      await node.work(topic, 0, 30)
      const run = () => Effect.runPromise(backup({ source, destination, scratch, pruneEveryMillis: 0 }))
      const first = await run()
      assert.deepStrictEqual(first.damaged, [])
      await node.work(topic, 30, 45)
      const then = await node.state(topic)
      const atMillis = await laterThan(Date.now())
      await node.work(topic, 45, 70)
      const newest = await node.state(topic)
      await node.actors.stop()
      const last = await run()
      assert.deepStrictEqual(last.damaged, [])
      assert.isAbove(snapshotsOf(last), 0, "a snapshot of a channel was copied")
      assert.isAbove(last.segments, 0)
      assert.deepStrictEqual((await Effect.runPromise(verifyBackup(destination, { deep: true }))).damaged, [])

      for (const [time, expected] of [
        [atMillis, then],
        [undefined, newest]
      ] as const) {
        const target = await memory()
        const report = await Effect.runPromise(restore({ backup: destination, target, scratch, atMillis: time }))
        assert.deepStrictEqual(report.topics.map(({ topic }) => topic.name).sort(), ["never-used", "work"])
        const { damaged, topics } = await Effect.runPromise(verifyData(target, { deep: true }))
        assert.deepStrictEqual([damaged, topics], [[], 2])
        const again = new Node(await startActors(Context.make(ObjectStore, target), settings))
        const restored = await again.read("work")
        assert.notStrictEqual(restored.uid, topic.uid)
        assert.deepStrictEqual({ ...restored, uid: "" }, { ...topic, uid: "" })
        assert.deepStrictEqual(await again.state(restored), expected)
        // What was published before is known, and what comes now has a place after it.
        assert.deepStrictEqual(await again.publish(restored, 0, "m-0"), [0])
        assert.deepStrictEqual(await again.publish(restored, 0, "new"), [])
        const { messages } = await again.state(restored)
        assert.deepStrictEqual(messages[0]?.slice(0, -1), expected.messages[0])
        assert.strictEqual(messages[0]?.at(-1)?.id, "new")
        await again.work(restored, 100, 110)
        await again.actors.stop()
      }
    })
  )

  it("that were deleted are there at the times before", { timeout: 60_000 }, () =>
    withPlaces(async ({ source, destination, memory, scratch }) => {
      const node = new Node(await startActors(Context.make(ObjectStore, source), settings))
      const topic = await node.create("gone", {})
      await node.publish(topic, 0, "a")
      const before = await node.state(topic)
      const atMillis = await laterThan(Date.now())
      const run = () => Effect.runPromise(backup({ source, destination, scratch, pruneEveryMillis: 0 }))
      await run()
      await laterThan(Date.now() + 2)
      await node.remove("gone")
      const { run: after } = await run()
      assert.isDefined(after.topics?.[0]?.removedMillis)
      await node.actors.stop()
      const latest = await Effect.runPromise(
        restore({ backup: destination, target: await memory(), scratch, atMillis: undefined })
      )
      assert.deepStrictEqual(latest.topics, [])
      const target = await memory()
      await Effect.runPromise(restore({ backup: destination, target, scratch, atMillis }))
      const again = new Node(await startActors(Context.make(ObjectStore, target), settings))
      assert.deepStrictEqual(await again.state(await again.read("gone")), before)
      await again.actors.stop()
    })
  )

  it("are verified: a flipped byte is found and named", { timeout: 60_000 }, () =>
    withPlaces(async ({ source, destination, scratch }) => {
      const node = new Node(await startActors(Context.make(ObjectStore, source), settings))
      const topic = await node.create("t", {})
      await node.publish(topic, 0, "a")
      await node.actors.stop()
      await Effect.runPromise(backup({ source, destination, scratch }))
      for (const store of [source, destination]) {
        const objects = await Effect.runPromise(store.list("channels/"))
        const log = objects.find(({ key }) => key.includes("/m000/") && key.includes("/log/"))?.key as string
        const { body } = await Effect.runPromise(store.get(log))
        const bytes = Uint8Array.from(body)
        bytes[bytes.length >> 1]! ^= 1
        await Effect.runPromise(Effect.andThen(store.delete(log), store.create(log, bytes)))
        const look: (
          of: Store
        ) => Effect.Effect<{ readonly damaged: ReadonlyArray<{ readonly object: string }> }, unknown> =
          store === source ? verifyData : verifyBackup
        const { damaged } = await Effect.runPromise(look(store))
        assert.deepStrictEqual(
          damaged.map(({ object }) => object),
          [log]
        )
      }
    })
  )
})

const snapshotsOf = ({ run }: BackupReport): number =>
  (run.topics ?? []).flatMap(({ logs }) => logs.flat()).reduce((sum, { snapshotSeq }) => sum + snapshotSeq, 0)

const withPlaces = async (
  use: (places: {
    readonly source: Store
    readonly destination: Store
    readonly memory: () => Promise<Store>
    readonly scratch: string
  }) => Promise<void>
): Promise<void> => {
  const scratch = await mkdtemp(join(tmpdir(), "ruvector-"))
  const memory = async () =>
    Context.get(await Effect.runPromise(Effect.scoped(Layer.build(ObjectStore.layerMemory))), ObjectStore)
  try {
    await use({ source: await memory(), destination: await memory(), memory, scratch })
  } finally {
    await rm(scratch, { recursive: true, force: true })
  }
}

const laterThan = async (millis: number): Promise<number> => {
  while (Date.now() <= millis + 1) await new Promise((resolve) => setTimeout(resolve, 1))
  const now = Date.now()
  while (Date.now() <= now + 1) await new Promise((resolve) => setTimeout(resolve, 1))
  return now
}

class Node {
  readonly actors: RunningActors

  constructor(actors: RunningActors) {
    this.actors = actors
  }

  create(name: string, request: object): Promise<Topic> {
    return this.#run(
      Effect.flatMap(TopicCatalog.client, (client) => client(topicCatalogId).Create({ name, request }))
    ).then(({ topic }) => topic)
  }

  read(name: string): Promise<Topic> {
    return this.#run(Effect.flatMap(TopicCatalog.client, (client) => client(topicCatalogId).Read({ name })))
  }

  remove(name: string): Promise<void> {
    return this.#run(Effect.flatMap(TopicCatalog.client, (client) => client(topicCatalogId).Delete({ name })))
  }

  async publish(topic: Topic, channel: number, id: string): Promise<ReadonlyArray<number>> {
    const messages = [{ key: `key-${id}`, id, body: JSON.stringify({ of: id }) }]
    const client = await this.#channel(topic, channel)
    return (await this.#run(client.Publish({ messages }))).duplicates
  }

  /** Some of all that there is to do, one log object each. */
  async work(topic: Topic, from: number, to: number): Promise<void> {
    const queue = await this.#queue(topic)
    for (let i = from; i < to; i++) {
      await this.publish(topic, i % topic.channels, `m-${i}`)
      const task = { id: `t-${i}`, body: String(i), priority: i % 3, delayMillis: 0 }
      await this.#run(queue.Enqueue({ tasks: [task] }))
      if (i % 2 === 0) continue
      const [taken] = (await this.#run(
        queue.Take({ takeId: `take-${i}`, agent: "a", max: 1, leaseMillis: 600_000, waitMillis: 0 })
      )) as ReadonlyArray<LeasedTask>
      const { id, token } = taken as LeasedTask
      if (i % 6 === 1) await this.#run(queue.Complete({ id, token, result: `"r-${i}"` }))
      else if (i % 6 === 3) await this.#run(queue.Fail({ id, token, error: "no", delayMillis: 0, release: false }))
      if (i % 5 !== 0) continue
      const channel = await this.#channel(topic, 0)
      const { seq, index } = await this.#run(channel.Position({ of: "newest" }))
      await this.#run(channel.Acknowledge({ name: "reader", seq, index }))
    }
  }

  async state(topic: Topic): Promise<State> {
    const messages: Array<ReadonlyArray<Message>> = []
    for (let channel = 0; channel < topic.channels; channel++) {
      const client = await this.#channel(topic, channel)
      const page = await this.#run(client.Read({ seq: 0, index: endOfObject, limit: 10_000, waitMillis: 0 }))
      messages.push(page.messages)
    }
    const queue = await this.#queue(topic)
    const tasks = await this.#run(queue.List({ state: null, after: "", limit: 1_000 }))
    const channel = await this.#channel(topic, 0)
    return {
      messages,
      tasks: [...tasks].sort((a, b) => (a.id < b.id ? -1 : 1)),
      subscriber: await this.#run(channel.Subscriber({ name: "reader", from: "oldest" }))
    }
  }

  #channel({ name, uid }: Topic, channel: number) {
    return this.#run(Effect.map(AgentChannel.client, (client) => client(channelId({ topic: name, uid, channel }))))
  }

  #queue({ name, uid }: Topic) {
    return this.#run(
      Effect.map(TaskQueue.client, (client) => client(channelId({ topic: name, uid, channel: queueChannel })))
    )
  }

  #run<A, E>(effect: Effect.Effect<A, E, Effect.Services<typeof AgentChannel.client>>): Promise<A> {
    return Effect.runPromise(Effect.provideContext(effect, this.actors.context))
  }
}
