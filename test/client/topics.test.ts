/** Topics and tasks by the client: the same over every way that a client has, cut or not, and embedded. */
import { mkdtemp, rm } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { assert, describe, it } from "@effect/vitest"
import { VectorDB, type VectorDBError } from "../../src/client/index.ts"
import { VectorDB as EmbeddedDB } from "../../src/index.ts"
import { startNode } from "../support/Node.ts"
import { type Random, seeded, seedOf } from "../support/Seeded.ts"
import { startTcpProxy } from "../support/TcpProxy.ts"

const hows = ["over a WebSocket", "over a WebSocket that is cut", "over requests alone", "embedded"] as const

interface Place {
  readonly db: VectorDB
  /** One that can listen. */
  readonly listening: VectorDB
  readonly cut: () => void
  readonly close: () => Promise<void>
}

const open = async (how: (typeof hows)[number]): Promise<Place> => {
  if (how === "embedded") {
    const path = await mkdtemp(join(tmpdir(), "ruvector-topics-"))
    const db = await EmbeddedDB.open({ path })
    const close = async () => {
      await db.close()
      await rm(path, { recursive: true })
    }
    return { db, listening: db, cut: () => {}, close }
  }
  const node = await startNode({ keyRate: 0, addressRate: 0 })
  const proxy = await startTcpProxy(node.port)
  const endpoint = how.endsWith("cut") ? `http://127.0.0.1:${proxy.port}` : node.base
  const waits = { reconnectBaseMillis: 5, reconnectCapMillis: 50 }
  const db = new VectorDB({ endpoint, streaming: how !== "over requests alone", ...waits })
  const listening = how === "over requests alone" ? new VectorDB({ endpoint }) : db
  const close = async () => {
    await listening.close()
    await db.close()
    await proxy.close()
    await node.stop()
  }
  return { db, listening, cut: () => proxy.cut(), close }
}

const codeOf = (promise: Promise<unknown>): Promise<string> =>
  promise.then(
    () => "it was done",
    (error: VectorDBError) => error.code
  )

describe.each(hows)("%s", (how) => {
  it(
    "messages come in order, each once or again, and a named subscriber goes on after what it acknowledged",
    {
      timeout: 60_000
    },
    () =>
      seeded(seedOf(41), async (random) => {
        const place = await open(how)
        const { db } = place
        const topic = await db.topics.create("news", { channels: 2, retentionMillis: 60_000 })
        assert.deepInclude(topic, { name: "news", channels: 2, retentionMillis: 60_000 })
        assert.strictEqual(await codeOf(db.topics.create("news", { channels: 3 })), "topic_conflict")
        assert.deepStrictEqual(await db.topics.get("nothing"), undefined)
        assert.strictEqual(await codeOf(db.channel("nothing").publish(1)), "topic_not_found")
        const channel = db.channel<{ readonly n: number }>("news")

        const total = 120
        const heard = listen(place, total)
        const named: Array<number> = []
        const keys = ["a", "b", "c", "d"]
        const published = new Map<string, Array<number>>()
        for (let n = 0; n < total; n++) {
          const key = random.pick(keys)
          await channel.publish({ n }, { key, id: `m${n}` })
          published.set(key, [...(published.get(key) ?? []), n])
          if (random.below(10) === 0)
            assert.strictEqual(await channel.publishMany([{ message: { n }, key, id: `m${n}` }]), 1)
          if (random.below(20) === 0) place.cut()
          if (random.below(30) === 0) named.push(...(await subscribed(place, 10)))
        }
        while (named.length < total) named.push(...(await subscribed(place, 10)))
        for (const all of [await heard, named]) {
          assert.strictEqual(new Set(all).size, total)
          for (const numbers of published.values()) {
            assert.deepStrictEqual(
              all.filter((n) => numbers.includes(n)),
              numbers
            )
          }
        }
        // From a cursor of one's own.
        const first: Array<string> = []
        for await (const { cursor } of place.listening.channel("news").subscribe({ from: "oldest" })) {
          first.push(cursor)
          break
        }
        let rest = 0
        for await (const _ of place.listening.channel("news").subscribe({ cursor: first[0] as string })) {
          rest += 1
          if (rest === total - 1) break
        }
        const wrong = place.listening.channel("news").subscribe({ cursor: `${first[0]?.slice(0, -2)}AA` })
        assert.strictEqual(await codeOf(wrong.next()), "invalid_cursor")
        assert.isTrue(await db.topics.delete("news"))
        assert.isFalse(await db.topics.delete("news"))
        await place.close()
      })
  )

  it("agents that are stopped at random do all tasks, in order of priority, and none twice", { timeout: 60_000 }, () =>
    seeded(seedOf(42), (random) => work(how, random))
  )

  it("a task goes its ways: failed, released, dead, redriven, cancelled, done", { timeout: 30_000 }, async () => {
    const place = await open(how)
    const tasks = place.db.tasks<{ readonly what: string }>("jobs")
    assert.strictEqual(await codeOf(tasks.enqueue({ what: "x" })), "topic_not_found")
    await place.db.topics.create("jobs", { attemptsMax: 2 })
    const id = await tasks.enqueue({ what: "x" }, { priority: 3 })
    assert.strictEqual(await tasks.enqueue({ what: "y" }, { id }), id)
    assert.deepInclude(await tasks.get(id), { state: "waiting", task: { what: "x" }, priority: 3, attempts: 0 })
    const take = async () => {
      const [task] = await tasks.take({ agent: "me", waitMillis: 5_000 })
      assert.strictEqual(task?.id, id)
      return task as NonNullable<typeof task>
    }
    await tasks.release(await take())
    const first = await take()
    assert.deepInclude(first, { task: { what: "x" }, attempt: 1 })
    assert.isAbove(await tasks.extend(first, { leaseMillis: 20_000 }), 19_999)
    assert.strictEqual(await tasks.fail(first, "broken"), "waiting")
    assert.strictEqual(await codeOf(tasks.complete(first)), "lease_lost")
    assert.strictEqual(await tasks.fail(await take(), "broken"), "dead")
    assert.deepStrictEqual(await tasks.take(), [])
    const [dead] = await tasks.list({ state: "dead" })
    assert.deepInclude(dead, { id, error: "broken", attempts: 2 })
    assert.strictEqual(await tasks.redrive([id]), 1)
    await tasks.complete(await take(), { well: true })
    assert.deepInclude(await tasks.get(id), { state: "done", result: { well: true } })
    const other = await tasks.enqueue({ what: "z" })
    assert.strictEqual(await tasks.cancel([other, "unknown"]), 1)
    assert.deepStrictEqual(await tasks.get(other), undefined)
    assert.deepStrictEqual((await place.db.topics.get("jobs"))?.tasks, { waiting: 0, leased: 0, done: 1, dead: 0 })
    // Made when they are first used.
    await place.db.tasks().enqueue(1)
    await place.db.channel("agent-coordination").publish("hello")
    const names = (await place.db.topics.list()).map(({ name }) => name).toSorted()
    assert.deepStrictEqual(names, ["agent-coordination", "jobs", "task-distribution"])
    assert.strictEqual((await place.db.topics.get("agent-coordination"))?.retentionMillis, 7 * 86_400_000)
    assert.strictEqual(await codeOf(place.db.topics.delete("agent-coordination")), "invalid_input")
    await place.close()
  })
})

/** Everything from the oldest on, until there are so many different ones. */
const listen = async ({ listening }: Place, total: number): Promise<ReadonlyArray<number>> => {
  const seen = new Set<number>()
  for await (const { message } of listening.channel<{ readonly n: number }>("news").subscribe({ from: "oldest" })) {
    seen.add(message.n)
    if (seen.size === total) break
  }
  return [...seen]
}

/** What a named subscriber is given next, some of it, acknowledged. */
const subscribed = async ({ listening }: Place, count: number): Promise<ReadonlyArray<number>> => {
  const channel = listening.channel<{ readonly n: number }>("news")
  const given: Array<number> = []
  const ends = new AbortController()
  const timer = setTimeout(() => ends.abort(), 300)
  let last: string | undefined
  try {
    for await (const { cursor, message } of channel.subscribe({
      subscriber: "s",
      from: "oldest",
      signal: ends.signal
    })) {
      given.push(message.n)
      last = cursor
      if (given.length === count) break
    }
  } catch (error) {
    if (!ends.signal.aborted) throw error
  }
  clearTimeout(timer)
  if (last !== undefined) await channel.acknowledge("s", last)
  return given
}

const work = async (how: (typeof hows)[number], random: Random): Promise<void> => {
  const place = await open(how)
  const { db } = place
  await db.topics.create("jobs", { leaseMillis: 400, attemptsMax: 100 })
  const tasks = db.tasks<{ readonly n: number }>("jobs")
  const total = 60
  const ids = await tasks.enqueueMany(
    Array.from({ length: total }, (_, n) => ({ task: { n }, id: `t${n}`, priority: n % 3 }))
  )
  assert.strictEqual(ids.length, total)
  /** Priorities, in the order in which tasks were handed out first. */
  const begun: Array<number> = []
  /** By task, the newest of its leases that was heard of. */
  const tokens = new Map<string, number>()
  const faults: Array<string> = []
  const enough = new AbortController()
  const agents = new Set<Promise<void>>()
  const agent = (name: string): void => {
    const stops = new AbortController()
    const running = tasks
      .work(
        async ({ task, token, id, attempt }, { signal }) => {
          if (attempt === 1) begun.push(task.n % 3)
          if (token <= (tokens.get(id) ?? 0)) faults.push(`${id} is held with ${token}, after ${tokens.get(id)}`)
          tokens.set(id, token)
          // An agent that dies with a task in its hands, and says nothing; one that is told to stop.
          if (random.below(10) === 0) await tasks.take()
          if (random.below(10) === 0) stops.abort()
          await new Promise((resolve) => setTimeout(resolve, random.below(10)))
          signal.throwIfAborted()
        },
        { agent: name, concurrency: 2, signal: AbortSignal.any([stops.signal, enough.signal]) }
      )
      .finally(() => {
        agents.delete(running)
        if (!enough.signal.aborted) agent(`${name}'`)
      })
    agents.add(running)
  }
  for (let n = 0; n < 5; n++) agent(`agent${n}`)
  for (let n = 0; n < 400; n++) {
    if (random.below(8) === 0) place.cut()
    await new Promise((resolve) => setTimeout(resolve, 50))
    const stats = (await db.topics.get("jobs"))?.tasks
    if (stats?.done === total) break
    assert.isBelow(n, 399, JSON.stringify(stats))
  }
  const done = await tasks.list({ state: "done", limit: 1_000 })
  assert.deepStrictEqual(done.map(({ id }) => id).toSorted(), ids.toSorted())
  assert.deepStrictEqual(faults, [])
  // At first those of the greatest priority, but for what is taken at one time.
  assert.isBelow(begun.indexOf(0), total)
  assert.isAtLeast(begun.indexOf(0), total / 3)
  enough.abort()
  await Promise.all(agents)
  await place.close()
}
