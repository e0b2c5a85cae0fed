/** Topics and tasks on every wire of a whole node, for those who may; a queue that outlives its node. */
import { mkdtemp, rm } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { NodeHttpClient } from "@effect/platform-node"
import { Context, Effect, Layer, Stream } from "effect"
import { RpcClient, RpcSerialization } from "effect/rpc"
import { afterAll, assert, beforeAll, describe, it } from "vitest"
import { RuvectorRpcs } from "../../src/protocol/Rpcs.ts"
import { type RunningNode, startNode } from "../support/Node.ts"
import { readSse, SocketClient } from "../support/Streams.ts"

let node: RunningNode
let data: string
const settings = { keyRate: 0, addressRate: 0, shedUserRate: 100_000, shedPercent: 0 }

beforeAll(async () => {
  data = await mkdtemp(join(tmpdir(), "ruvector-"))
  node = await startNode({ ...settings, data })
})
afterAll(async () => {
  await node?.stop()
  await rm(data, { recursive: true, force: true })
})

const ask = async (method: string, path: string, body?: unknown, credential?: string) => {
  const response = await fetch(`${node.base}/api/v1${path}`, {
    method,
    headers: {
      ...(body === undefined ? {} : { "content-type": "application/json" }),
      ...(credential === undefined ? {} : { authorization: `Bearer ${credential}` })
    },
    ...(body === undefined ? {} : { body: JSON.stringify(body) })
  })
  const text = await response.text()
  // biome-ignore lint/suspicious/noExplicitAny: bodies of many shapes, looked at field by field
  return { status: response.status, body: (text === "" ? undefined : JSON.parse(text)) as any }
}

const keyOf = async (wanted: object): Promise<string> => {
  const made = await ask("POST", "/keys", { name: "a test's", ...wanted })
  assert.strictEqual(made.status, 201, JSON.stringify(made.body))
  return made.body.key as string
}

describe("requests and event streams", () => {
  it("create, publish, listen, come back after an event, acknowledge", async () => {
    assert.strictEqual((await ask("PUT", "/topics/rest", { channels: 2 })).status, 201)
    assert.strictEqual((await ask("PUT", "/topics/rest", { channels: 2 })).status, 200)
    assert.deepInclude((await ask("PUT", "/topics/rest", { channels: 3 })).body, {
      code: "topic_conflict",
      status: 409
    })
    const messages = ["a", "b", "c"].map((id) => ({ id, key: "k", message: { id } }))
    assert.deepStrictEqual((await ask("POST", "/topics/rest/publish", { messages })).body, {
      published: 3,
      duplicates: 0
    })
    assert.deepStrictEqual((await ask("POST", "/topics/rest/publish", { messages: messages.slice(1) })).body, {
      published: 0,
      duplicates: 2
    })
    const url = `${node.base}/api/v1/stream/topic?topic=rest&from=oldest`
    const events = await readSse(await fetch(url), (so) => so.length >= 3)
    assert.deepStrictEqual(
      events.slice(0, 3).map(({ data }) => data.event),
      ["listening", "message", "message"]
    )
    assert.deepInclude(events[1]?.data, { key: "k", message_id: "a", message: { id: "a" } })
    const back = await fetch(url, { headers: { "last-event-id": events[2]?.id as string } })
    const rest = await readSse(back, (so) => so.length >= 2)
    assert.deepInclude(rest[1]?.data, { message_id: "c" })
    const acknowledge = { subscriber: "me", cursor: events[1]?.id }
    assert.strictEqual((await ask("POST", "/topics/rest/acknowledge", acknowledge)).status, 200)
    const named = await fetch(`${node.base}/api/v1/stream/topic?topic=rest&subscriber=me`)
    assert.deepInclude((await readSse(named, (so) => so.length >= 2))[1]?.data, { message_id: "b" })
    assert.strictEqual((await ask("POST", "/topics/rest/forget", { subscriber: "me" })).status, 200)
    assert.deepInclude((await ask("POST", "/topics/rest/acknowledge", { subscriber: "me", cursor: "AAAA" })).body, {
      code: "invalid_cursor"
    })
    assert.strictEqual((await ask("DELETE", "/topics/rest")).status, 204)
    assert.deepInclude((await ask("DELETE", "/topics/rest")).body, { code: "topic_not_found", status: 404 })
    assert.strictEqual((await fetch(url)).status, 404)
  })

  it("what is wrong with a request is said", async () => {
    for (const [path, body, field] of [
      ["publish", { messages: [] }, "messages"],
      ["publish", { messages: [{ key: 1, message: 1 }] }, "messages[0].key"],
      ["publish", { messages: [{}] }, "messages[0].message"],
      ["publish", { topic: "x", messages: [{ message: 1 }] }, "topic"],
      ["enqueue", { tasks: [{ task: 1, priority: 1_001 }] }, "tasks[0].priority"],
      ["take", { max: 101 }, "max"],
      ["take", { wait_ms: 60_001 }, "wait_ms"],
      ["complete", { task_id: "x" }, "token"]
    ] as const) {
      const { body: problem, status } = await ask("POST", `/topics/agent-coordination/${path}`, body)
      assert.deepInclude({ status, ...problem }, { status: 400, code: "invalid_input", field })
    }
    const large = { messages: [{ message: "x".repeat(300_000) }] }
    assert.deepInclude((await ask("POST", "/topics/agent-coordination/publish", large)).body, {
      field: "messages[0].message"
    })
  })

  it("a task taken before the node is started anew is done after, and a stale token is refused", async () => {
    await ask("PUT", "/topics/jobs", { lease_ms: 60_000 })
    const { body: enqueued } = await ask("POST", "/topics/jobs/enqueue", { tasks: [{ task: { n: 1 }, priority: 5 }] })
    const [id] = enqueued.task_ids
    const { body: taken } = await ask("POST", "/topics/jobs/take", { agent: "me", max: 5 })
    assert.strictEqual(taken.tasks.length, 1)
    const { token } = taken.tasks[0]
    await node.stop()
    node = await startNode({ ...settings, data })
    assert.deepInclude((await ask("GET", `/topics/jobs/tasks/${id}`)).body, { state: "leased", agent: "me" })
    const stale = await ask("POST", "/topics/jobs/complete", { task_id: id, token: token + 1 })
    assert.deepInclude(stale.body, { code: "lease_lost", status: 409 })
    assert.deepStrictEqual((await ask("POST", "/topics/jobs/extend", { task_id: id, token })).body, {
      lease_ms: 60_000
    })
    assert.strictEqual((await ask("POST", "/topics/jobs/complete", { task_id: id, token, result: 7 })).status, 200)
    assert.deepInclude((await ask("GET", "/topics/jobs/tasks?state=done&limit=5")).body.tasks[0], {
      task_id: id,
      result: 7
    })
    assert.deepStrictEqual((await ask("GET", "/topics/jobs")).body.tasks, { waiting: 0, leased: 0, done: 1, dead: 0 })
    assert.isTrue((await ask("GET", "/topics")).body.topics.some(({ name }: { name: string }) => name === "jobs"))
  })
})

describe("WebSocket frames", () => {
  it("publish, listen, take and complete, with what is wrong said in the frame's answer", async () => {
    const client = await SocketClient.open(node.base)
    client.send({ type: "listen", id: "l", topic: "vector-updates" })
    assert.deepInclude(await client.next(), { event: "listening", id: "l" })
    client.send({ type: "topic.publish", id: "p", topic: "vector-updates", messages: [{ key: "k", message: [1] }] })
    const answers = [await client.next(), await client.next()]
    assert.deepInclude(
      answers.find(({ id }) => id === "l"),
      { event: "message", key: "k" }
    )
    assert.deepInclude(
      answers.find(({ id }) => id === "p"),
      { event: "topic.publish", published: 1, duplicates: 0 }
    )
    assert.deepInclude(await client.ask({ type: "unsubscribe", id: "l" }), { event: "unsubscribed" })
    // Waits for the task that comes then.
    client.send({ type: "topic.take", id: "t", topic: "vector-updates", wait_ms: 20_000 })
    const enqueue = { type: "topic.enqueue", id: "e", topic: "vector-updates", tasks: [{ id: "job", task: "x" }] }
    client.send(enqueue)
    const both = [await client.next(), await client.next()]
    const taken = both.find(({ id }) => id === "t") as unknown as {
      tasks: Array<{ token: number; [member: string]: unknown }>
    }
    assert.deepInclude(taken.tasks[0], { task_id: "job", task: "x", attempt: 1 })
    const complete = { type: "topic.complete", id: "c", topic: "vector-updates", task_id: "job" }
    assert.deepInclude(await client.ask({ ...complete, token: taken.tasks[0]?.token }), { event: "topic.complete" })
    const refused = await client.ask({ ...complete, token: 999_999 })
    assert.deepInclude(refused["problem"], { code: "lease_lost" })
    assert.deepInclude((await client.ask({ type: "topic.take", id: "x", topic: "no" }))["problem"], {
      code: "topic_not_found"
    })
    await client.close()
  })
})

describe("Effect RPC", () => {
  it("has all of it, typed", async () => {
    const outcome = await Effect.runPromise(
      Effect.scoped(
        Effect.gen(function* () {
          const context = yield* Layer.build(
            RpcClient.layerProtocolHttp({ url: `${node.base}/api/v1/rpc` }).pipe(
              Layer.provide(RpcSerialization.layerNdjson),
              Layer.provide(NodeHttpClient.layerNodeHttp)
            )
          )
          const client = yield* Effect.provideContext(
            RpcClient.make(RuvectorRpcs),
            Context.merge(context, yield* Effect.context<never>()) as Context.Context<never>
          )
          const topic = "typed"
          assert.isTrue((yield* client.CreateTopic({ topic, attempts_max: 1 })).created)
          yield* client.Publish({ topic, messages: [{ id: "m", key: "k", message: '{ "n": 1 }' }] })
          const events = yield* client.Listen({ topic, from: "oldest" }).pipe(Stream.take(2), Stream.runCollect)
          assert.deepInclude(events[1], { event: "message", message_id: "m", message: '{"n":1}' })
          yield* client.Acknowledge({ topic, subscriber: "s", cursor: (events[1] as { cursor: string }).cursor })
          yield* client.Enqueue({ topic, tasks: [{ id: "t", task: '"x"' }] })
          const { tasks } = yield* client.Take({ topic, wait_ms: 1_000 })
          assert.deepInclude(tasks[0], { task_id: "t", task: '"x"' })
          const token = tasks[0]?.token as number
          assert.deepStrictEqual(yield* client.Fail({ topic, task_id: "t", token, error: "no" }), { state: "dead" })
          assert.strictEqual((yield* client.ListTasks({ topic, state: "dead" })).tasks[0]?.error, "no")
          assert.deepStrictEqual(yield* client.Redrive({ topic }), { redriven: 1 })
          assert.strictEqual((yield* client.GetTask({ topic, task_id: "t" })).state, "waiting")
          const wrong = yield* Effect.flip(client.Publish({ topic, messages: [{ message: "{" }] }))
          assert.deepInclude(wrong, { _tag: "InvalidInput", field: "messages[0].message" })
          const stale = yield* Effect.flip(client.Complete({ topic, task_id: "t", token }))
          assert.strictEqual((stale as { readonly _tag: string })._tag, "LeaseLost")
          yield* client.DeleteTopic({ topic })
          return (yield* client.ListTopics()).topics.some(({ name }) => name === topic)
        }) as Effect.Effect<boolean, unknown, never>
      )
    )
    assert.isFalse(outcome)
  })
})

describe("access", () => {
  it("what a credential may not do with collections it may not do with topics", async () => {
    await ask("PUT", "/topics/shared", {})
    const reads = await keyOf({ scopes: ["read"] })
    const publish = { messages: [{ message: 1 }] }
    assert.strictEqual((await ask("GET", "/topics/shared", undefined, reads)).status, 200)
    for (const [method, path, body] of [
      ["POST", "/topics/shared/publish", publish],
      ["POST", "/topics/shared/take", {}],
      ["PUT", "/topics/mine", {}],
      ["DELETE", "/topics/shared", undefined]
    ] as const) {
      assert.strictEqual((await ask(method, path, body, reads)).status, 403, path)
    }
    const stream = (topic: string, credential: string, more = "") =>
      fetch(`${node.base}/api/v1/stream/topic?topic=${topic}${more}`, {
        headers: { authorization: `Bearer ${credential}` }
      })
    assert.strictEqual((await stream("shared", reads, "&subscriber=x")).status, 403)

    const restricted = await keyOf({ scopes: ["read", "write", "admin"], collections: ["only"] })
    assert.strictEqual((await ask("PUT", "/topics/only", {}, restricted)).status, 201)
    assert.strictEqual((await ask("PUT", "/topics/other", {}, restricted)).status, 404)
    assert.deepInclude((await ask("POST", "/topics/shared/publish", publish, restricted)).body, {
      code: "topic_not_found"
    })
    assert.strictEqual((await stream("shared", restricted)).status, 404)
    assert.deepStrictEqual(
      (await ask("GET", "/topics", undefined, restricted)).body.topics.map(({ name }: { name: string }) => name),
      ["only"]
    )

    // Another tenant's topic of the same name is another topic, its cursor and messages its own.
    const theirs = await keyOf({ tenant: "them", scopes: ["read", "write", "admin"] })
    assert.strictEqual((await ask("POST", "/topics/shared/publish", publish, theirs)).status, 404)
    assert.strictEqual((await ask("PUT", "/topics/shared", {}, theirs)).status, 201)
    await ask("POST", "/topics/shared/publish", { messages: [{ id: "theirs", message: 1 }] }, theirs)
    await ask("POST", "/topics/shared/publish", { messages: [{ id: "ours", message: 1 }] })
    const heard = await readSse(await stream("shared", theirs, "&from=oldest"), (so) => so.length >= 2)
    assert.deepInclude(heard[1]?.data, { message_id: "theirs" })
    const forged = await stream("shared", reads, `&cursor=${heard[1]?.id}`)
    assert.strictEqual(forged.status, 400)
  })
})
