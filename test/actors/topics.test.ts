/**
 * Channels and queues as their clients know them, over a store that loses answers, with owners that are stopped, started and
 * doubled: what was acknowledged is there once, in order; a task is held by one lease at a time, and is done once.
 */
import { assert, describe, it } from "@effect/vitest"
import { Context, Effect, Exit, Layer, Result } from "effect"
import {
  AgentChannel,
  channelId,
  type LeasedTask,
  type Message,
  type MessagePosition,
  queueChannel,
  TaskQueue
} from "../../src/protocol/AgentChannel.ts"
import { endOfObject } from "../../src/protocol/IndexPartition.ts"
import type { Topic, TopicRequest } from "../../src/protocol/Topic.ts"
import { TopicCatalog, topicCatalogId } from "../../src/protocol/TopicCatalog.ts"
import { ObjectStore } from "../../src/tiers/ObjectStore.ts"
import { type RunningActors, startActors } from "../support/Actors.ts"
import { type Random, seeded, seedOf } from "../support/Seeded.ts"
import { Faults, withFaults } from "../tiers/FaultyObjectStore.ts"

const settings = { topicSnapshotObjects: 15, taskGraceMillis: 0, topicCommitMillis: 0, topicWindowBytes: 65_536 }

const memoryStore = async () =>
  Context.get(await Effect.runPromise(Effect.scoped(Layer.build(ObjectStore.layerMemory))), ObjectStore)

/** One or two nodes on one store, each of which takes itself for the owner of everything. */
class Nodes {
  readonly #store: Context.Context<ObjectStore>
  readonly #running: Array<RunningActors> = []

  constructor(store: Context.Context<ObjectStore>) {
    this.#store = store
  }

  async start(count: number): Promise<void> {
    while (this.#running.length < count) this.#running.push(await startActors(this.#store, settings))
  }

  async restart(at: number): Promise<void> {
    await this.#running[at]?.stop()
    this.#running[at] = await startActors(this.#store, settings)
  }

  async stop(): Promise<void> {
    for (const node of this.#running) await node.stop()
  }

  get count(): number {
    return this.#running.length
  }

  run<A, E>(
    at: number,
    effect: Effect.Effect<A, E, Effect.Services<typeof AgentChannel.client>>
  ): Promise<Exit.Exit<A, E>> {
    return Effect.runPromiseExit(Effect.provideContext(effect, (this.#running[at] as RunningActors).context))
  }
}

const create = (name: string, request: TopicRequest = {}) =>
  Effect.flatMap(TopicCatalog.client, (client) => client(topicCatalogId).Create({ name, request }))

const channelOf = ({ name, uid }: Topic, channel = 0) =>
  Effect.map(AgentChannel.client, (client) => client(channelId({ topic: name, uid, channel })))

const queueOf = ({ name, uid }: Topic) =>
  Effect.map(TaskQueue.client, (client) => client(channelId({ topic: name, uid, channel: queueChannel })))

/** Asks until it is answered otherwise than that it passes. */
const insist = async <A, E>(ask: () => Promise<Exit.Exit<A, E>>): Promise<Result.Result<A, E>> => {
  for (let n = 0; n < 400; n++) {
    const exit = await ask()
    if (Exit.isSuccess(exit)) return Result.succeed(exit.value)
    const error = Exit.findErrorOption(exit)
    if (error._tag === "None") throw new Error(String(exit.cause))
    const tag = (error.value as { readonly _tag: string })._tag
    if (tag !== "StorageUnavailable" && tag !== "TopicUnavailable") return Result.fail(error.value)
    await new Promise((resolve) => setTimeout(resolve, 10))
  }
  throw new Error("It did not come to pass.")
}

const given = async <A, E>(ask: () => Promise<Exit.Exit<A, E>>): Promise<A> => Result.getOrThrow(await insist(ask))

const readAll = async (nodes: Nodes, topic: Topic, limit: number): Promise<ReadonlyArray<Message>> => {
  const all: Array<Message> = []
  let at: MessagePosition = { seq: 0, index: endOfObject }
  for (;;) {
    const page = await given(() =>
      nodes.run(
        0,
        Effect.flatMap(channelOf(topic), (channel) => channel.Read({ ...at, limit, waitMillis: 0 }))
      )
    )
    all.push(...page.messages)
    at = page.next
    if (!page.more && page.messages.length < limit) return all
  }
}

describe("messages", () => {
  for (const mode of ["one owner, restarted", "two that take themselves for the owner", "a store that loses answers"]) {
    it(`${mode}: acknowledged once, in order, and read from anywhere`, { timeout: 60_000 }, () =>
      seeded(seedOf(31), async (source) => {
        const faults = new Faults(source.seed)
        const nodes = new Nodes(Context.make(ObjectStore, withFaults(await memoryStore(), faults)))
        await nodes.start(mode.startsWith("two") ? 2 : 1)
        const { topic } = await given(() => nodes.run(0, create("t")))
        if (mode.endsWith("answers")) Object.assign(faults, { dropShare: 0.1, doubtShare: 0.1 })
        const published: Array<string> = []
        let duplicates = 0
        const publish = (ids: ReadonlyArray<string>) =>
          given(() =>
            nodes.run(
              source.below(nodes.count),
              Effect.flatMap(channelOf(topic), (channel) =>
                channel.Publish({ messages: ids.map((id) => ({ id, key: `k${id.length}`, body: `{"id":"${id}"}` })) })
              )
            )
          )
        for (let n = 0; n < 100; n++) {
          if (published.length > 0 && source.below(4) === 0) {
            // Sent once more, as one who was not answered does.
            const at = source.below(Math.max(1, published.length - 20))
            const again = published.slice(at, at + 3)
            assert.strictEqual((await publish(again)).duplicates.length, again.length)
            duplicates += again.length
          } else {
            const ids = Array.from({ length: 1 + source.below(3) }, (_, i) => `m${n}-${i}`)
            await publish(ids)
            published.push(...ids)
          }
          if (source.below(25) === 0) await nodes.restart(source.below(nodes.count))
        }
        await Effect.runPromise(faults.heal)
        assert.isAbove(duplicates, 10)
        // Of two, the one that does not know of the other's claim yet reads what it knows.
        if (nodes.count === 2) await nodes.restart(0)
        const all = await readAll(nodes, topic, 7)
        assert.deepStrictEqual(
          all.map(({ id }) => id),
          published
        )
        assert.isTrue(all.every(({ id, body }) => body === `{"id":"${id}"}`))
        const middle = all[Math.trunc(all.length / 2)] as Message
        const rest = await given(() =>
          nodes.run(
            0,
            Effect.flatMap(channelOf(topic), (channel) =>
              channel.Read({ seq: middle.seq, index: middle.index, limit: 1_000, waitMillis: 0 })
            )
          )
        )
        assert.deepStrictEqual(
          rest.messages.map(({ id }) => id),
          published.slice(published.indexOf(middle.id) + 1)
        )
        await nodes.stop()
      })
    )
  }

  it("a reader waits for what is not there yet, a subscriber's position only goes forward and outlives the owner", async () => {
    const nodes = new Nodes(Context.make(ObjectStore, await memoryStore()))
    await nodes.start(1)
    const { topic } = await given(() => nodes.run(0, create("t")))
    const ask = <A, E>(use: (channel: Effect.Success<ReturnType<typeof channelOf>>) => Effect.Effect<A, E>) =>
      given(() => nodes.run(0, Effect.flatMap(channelOf(topic), use)))
    const begin = await ask((channel) => channel.Subscriber({ name: "s", from: "newest" }))
    const waiting = ask((channel) => channel.Read({ ...begin, limit: 10, waitMillis: 20_000 }))
    await ask((channel) => channel.Publish({ messages: [{ id: "a", key: "k", body: "1" }] }))
    const [first] = (await waiting).messages
    assert.strictEqual(first?.id, "a")
    const { seq, index } = first as Message
    await ask((channel) => channel.Acknowledge({ name: "s", seq, index }))
    await ask((channel) => channel.Acknowledge({ name: "s", ...begin }))
    await nodes.restart(0)
    assert.deepStrictEqual(await ask((channel) => channel.Subscriber({ name: "s", from: "oldest" })), { seq, index })
    await ask((channel) => channel.Forget({ name: "s" }))
    assert.deepStrictEqual(await ask((channel) => channel.Subscriber({ name: "s", from: "oldest" })), {
      seq: 0,
      index: endOfObject
    })
    await nodes.stop()
  })

  it("past its retention a message is not handed out, and who had not read it is told", async () => {
    const nodes = new Nodes(Context.make(ObjectStore, await memoryStore()))
    await nodes.start(1)
    const { topic } = await given(() => nodes.run(0, create("t", { retention_ms: 1_000 })))
    const ask = <A, E>(use: (channel: Effect.Success<ReturnType<typeof channelOf>>) => Effect.Effect<A, E>) =>
      given(() => nodes.run(0, Effect.flatMap(channelOf(topic), use)))
    await ask((channel) => channel.Publish({ messages: [{ id: "old", key: "", body: "1" }] }))
    await new Promise((resolve) => setTimeout(resolve, 1_100))
    await ask((channel) => channel.Publish({ messages: [{ id: "new", key: "", body: "2" }] }))
    for (const restarted of [false, true]) {
      if (restarted) await nodes.restart(0)
      const page = await ask((channel) => channel.Read({ seq: 0, index: endOfObject, limit: 10, waitMillis: 0 }))
      assert.deepStrictEqual(
        page.messages.map(({ id }) => id),
        ["new"]
      )
      assert.isTrue(page.gap)
    }
    await nodes.stop()
  })

  it("a topic that was deleted is gone with its messages, and one made anew is empty", async () => {
    const nodes = new Nodes(Context.make(ObjectStore, await memoryStore()))
    await nodes.start(1)
    const { topic } = await given(() => nodes.run(0, create("t", { channels: 2 })))
    await given(() =>
      nodes.run(
        0,
        Effect.flatMap(channelOf(topic, 1), (channel) =>
          channel.Publish({ messages: [{ id: "a", key: "", body: "1" }] })
        )
      )
    )
    await given(() =>
      nodes.run(
        0,
        Effect.flatMap(TopicCatalog.client, (client) => client(topicCatalogId).Delete({ name: "t" }))
      )
    )
    const refused = await insist(() =>
      nodes.run(
        0,
        Effect.flatMap(channelOf(topic, 1), (channel) =>
          channel.Publish({ messages: [{ id: "b", key: "", body: "1" }] })
        )
      )
    )
    assert.strictEqual(Result.isFailure(refused) && refused.failure._tag, "TopicNotFound")
    const anew = await given(() => nodes.run(0, create("t", { channels: 2 })))
    assert.deepStrictEqual(await readAll(nodes, anew.topic, 10), [])
    await nodes.stop()
  })
})

describe("tasks", () => {
  for (const mode of ["one owner, restarted", "two that take themselves for the owner", "a store that loses answers"]) {
    it(`${mode}: each is done once, by the newest of its leases`, { timeout: 60_000 }, () =>
      seeded(seedOf(32), (source) => distribute(source, mode))
    )
  }

  it("go by priority, then in the order they came in; not before their delay", async () => {
    const { stop, take, tasks } = await openQueue({})
    await tasks((queue) =>
      queue.Enqueue({
        tasks: [
          { id: "a", body: "1", priority: 0, delayMillis: 0 },
          { id: "b", body: "2", priority: 5, delayMillis: 0 },
          { id: "later", body: "3", priority: 9, delayMillis: 600 },
          { id: "c", body: "4", priority: 5, delayMillis: 0 },
          { id: "d", body: "5", priority: -5, delayMillis: 0 }
        ]
      })
    )
    assert.deepStrictEqual(
      (await take(3, 0)).map(({ id }) => id),
      ["b", "c", "a"]
    )
    assert.deepStrictEqual(
      (await take(3, 0)).map(({ id }) => id),
      ["d"]
    )
    assert.deepStrictEqual(
      (await take(3, 5_000)).map(({ id }) => id),
      ["later"]
    )
    await stop()
  })

  it("a lease that ends is lost with its token; extended, it goes on; after the last attempt it is a dead letter", async () => {
    const { stop, take, tasks, refused } = await openQueue({ attempts_max: 2 })
    await tasks((queue) => queue.Enqueue({ tasks: [{ id: "a", body: '{"x":1}', priority: 0, delayMillis: 0 }] }))
    const [first] = await take(1, 0, 400)
    assert.strictEqual(first?.attempt, 1)
    const token = first?.token as number
    for (let n = 0; n < 3; n++) {
      await new Promise((resolve) => setTimeout(resolve, 200))
      await tasks((queue) => queue.Extend({ id: "a", token, leaseMillis: 0 }))
    }
    const [second] = await take(1, 5_000, 60_000)
    assert.strictEqual(second?.attempt, 2)
    assert.isAbove(second?.token as number, token)
    assert.strictEqual(await refused((queue) => queue.Complete({ id: "a", token, result: "" })), "LeaseLost")
    assert.strictEqual(await refused((queue) => queue.Extend({ id: "a", token, leaseMillis: 0 })), "LeaseLost")
    const failure = { id: "a", token: second?.token as number, error: "no", delayMillis: 0, release: false }
    assert.strictEqual((await tasks((queue) => queue.Fail(failure))).state, "dead")
    // Said once more.
    assert.strictEqual((await tasks((queue) => queue.Fail(failure))).state, "dead")
    const [dead] = await tasks((queue) => queue.List({ state: "dead", after: "", limit: 10 }))
    assert.deepInclude(dead, { id: "a", body: '{"x":1}', attempts: 2, error: "no" })
    assert.deepStrictEqual(await take(1, 0), [])
    assert.strictEqual((await tasks((queue) => queue.Redrive({ ids: null }))).count, 1)
    const [third] = await take(1, 0)
    assert.strictEqual(third?.attempt, 1)
    const done = { id: "a", token: third?.token as number, result: '"well"' }
    await tasks((queue) => queue.Complete(done))
    await tasks((queue) => queue.Complete(done))
    assert.deepInclude(await tasks((queue) => queue.Get({ id: "a" })), { state: "done", result: '"well"' })
    assert.strictEqual(await refused((queue) => queue.Complete({ ...done, token: 1 })), "LeaseLost")
    assert.strictEqual(await refused((queue) => queue.Complete({ ...done, id: "b" })), "TaskNotFound")
    assert.deepStrictEqual(await tasks((queue) => queue.Stats()), { waiting: 0, leased: 0, done: 1, dead: 0 })
    await stop()
  })

  it("a taking repeated gives the same leases, one given up gives them back, and a lease outlives its owner", async () => {
    const { nodes, stop, take, tasks, queue } = await openQueue({})
    const enqueued = Array.from({ length: 4 }, (_, i) => ({ id: `t${i}`, body: "0", priority: 0, delayMillis: 0 }))
    await tasks((queue) => queue.Enqueue({ tasks: enqueued }))
    const taking = { takeId: "x", agent: "a", max: 2, leaseMillis: 60_000, waitMillis: 0 }
    const first = await tasks((queue) => queue.Take(taking))
    assert.deepStrictEqual(await tasks((queue) => queue.Take(taking)), first)
    await nodes.restart(0)
    assert.deepStrictEqual(await tasks((queue) => queue.Take(taking)), first)
    assert.strictEqual((await take(10, 0)).length, 2)
    assert.deepStrictEqual(await take(10, 0), [])
    for (const { id, token } of first) await tasks((queue) => queue.Complete({ id, token, result: "" }))
    // Whoever waits and goes away leaves nothing leased.
    const given = Effect.flatMap(queue, (of) => of.Take({ ...taking, takeId: "gone", waitMillis: 20_000 }))
    await nodes.run(0, Effect.timeoutOption(given, 50))
    await tasks((queue) => queue.Enqueue({ tasks: [{ id: "last", body: "0", priority: 0, delayMillis: 0 }] }))
    assert.deepStrictEqual(
      (await take(1, 5_000)).map(({ id }) => id),
      ["last"]
    )
    await stop()
  })
})

const openQueue = async (request: TopicRequest) => {
  const nodes = new Nodes(Context.make(ObjectStore, await memoryStore()))
  await nodes.start(1)
  const { topic } = await given(() => nodes.run(0, create("q", request)))
  const queue = queueOf(topic)
  type Queue = Effect.Success<typeof queue>
  const tasks = <A, E>(use: (queue: Queue) => Effect.Effect<A, E>) =>
    given(() => nodes.run(0, Effect.flatMap(queue, use)))
  let takings = 0
  return {
    nodes,
    queue,
    tasks,
    take: (max: number, waitMillis: number, leaseMillis = 60_000) => {
      const takeId = `take${takings++}`
      return tasks((queue) => queue.Take({ takeId, agent: "a", max, leaseMillis, waitMillis }))
    },
    refused: async <A, E extends { readonly _tag: string }>(use: (queue: Queue) => Effect.Effect<A, E>) => {
      const outcome = await insist(() => nodes.run(0, Effect.flatMap(queue, use)))
      return Result.isFailure(outcome) ? outcome.failure._tag : "it was done"
    },
    stop: () => nodes.stop()
  }
}

const distribute = async (source: Random, mode: string): Promise<void> => {
  const faults = new Faults(source.seed)
  const nodes = new Nodes(Context.make(ObjectStore, withFaults(await memoryStore(), faults)))
  await nodes.start(mode.startsWith("two") ? 2 : 1)
  const { topic } = await given(() => nodes.run(0, create("q", { attempts_max: 1_000 })))
  if (mode.endsWith("answers")) Object.assign(faults, { dropShare: 0.1, doubtShare: 0.1 })
  const queue = queueOf(topic)
  type Queue = Effect.Success<typeof queue>
  const ask = <A, E>(use: (queue: Queue) => Effect.Effect<A, E>) =>
    insist(() => nodes.run(source.below(nodes.count), Effect.flatMap(queue, use)))

  const total = 40
  const leaseMillis = 250
  let restarts = 0
  const enqueued = Array.from({ length: total }, (_, i) => `t${i}`)
  let next = 0
  let takings = 0
  let greatest = 0
  /** By task the newest token, and what came of it. */
  const newest = new Map<string, number>()
  const held: Array<LeasedTask> = []
  const done = new Set<string>()
  let stale = 0
  for (let step = 0; done.size < total; step++) {
    assert.isBelow(step, 4_000, `${done.size} done`)
    const roll = source.below(10)
    if (next < total && roll < 3) {
      const ids = enqueued.slice(next, next + 3)
      const tasks = ids.map((id) => ({ id, body: `"${id}"`, priority: source.below(3), delayMillis: 0 }))
      assert.isTrue(Result.isSuccess(await ask((of) => of.Enqueue({ tasks }))))
      next += ids.length
    } else if (roll < 6 && held.length < 10) {
      const taking = {
        takeId: `take${takings++}`,
        agent: "a",
        max: 1 + source.below(4),
        leaseMillis: 60,
        waitMillis: 0
      }
      const taken = Result.getOrThrow(await ask((of) => of.Take(taking)))
      for (const task of taken) {
        // Tokens of all owners are of one history.
        assert.isAbove(task.token, greatest)
        greatest = Math.max(greatest, task.token)
        assert.isFalse(done.has(task.id), `${task.id} was done and is handed out`)
        assert.strictEqual(task.body, `"${task.id}"`)
        newest.set(task.id, task.token)
        held.push(task)
      }
    } else if (held.length > 0) {
      const [task] = held.splice(source.below(held.length), 1) as [LeasedTask]
      const { id, token } = task
      // An agent that stopped for longer than its lease.
      if (source.below(12) === 0) await new Promise((resolve) => setTimeout(resolve, leaseMillis + 10))
      const isNewest = newest.get(id) === token
      if (roll === 6) {
        const outcome = await ask((of) => of.Extend({ id, token, leaseMillis }))
        if (Result.isSuccess(outcome)) {
          assert.isTrue(isNewest && !done.has(id), `${id} was extended with token ${token}`)
          held.push(task)
        }
      } else if (roll === 7) {
        const release = source.below(2) === 0
        await ask((of) => of.Fail({ id, token, error: "", delayMillis: 0, release }))
      } else {
        const outcome = await ask((of) => of.Complete({ id, token, result: "" }))
        if (Result.isSuccess(outcome)) {
          assert.isTrue(isNewest, `${id} was completed with token ${token}, ${newest.get(id)} is the newest`)
          assert.isFalse(done.has(id), `${id} was completed twice`)
          done.add(id)
        } else stale += 1
      }
    } else await new Promise((resolve) => setTimeout(resolve, 5))
    if (source.below(30) === 0 && restarts < 5) {
      restarts += 1
      await nodes.restart(source.below(nodes.count))
    }
  }
  await Effect.runPromise(faults.heal)
  assert.isAbove(stale, 0, "leases were lost")
  await nodes.restart(0)
  const stats = await given(() =>
    nodes.run(
      0,
      Effect.flatMap(queue, (of) => of.Stats())
    )
  )
  assert.deepStrictEqual(stats, { waiting: 0, leased: 0, done: total, dead: 0 })
  await nodes.stop()
}
