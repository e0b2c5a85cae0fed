/** Logical sessions of a WebSocket: many on one connection, each with its own credits, bounds and end. */
import { afterEach, assert, describe, it } from "@effect/vitest"
import { Deferred, Effect } from "effect"
import type { SessionSink } from "../../src/gateway/SessionSink.ts"
import { Overloaded } from "../../src/protocol/Errors.ts"
import { startNode } from "../support/Node.ts"
import { random, seedOf } from "../support/Seeded.ts"
import { type Event, SocketClient } from "../support/Streams.ts"
import { answerOf, type SocketServer, startConnections, startSocketServer } from "./socketServer.ts"

let server: SocketServer
const started: Array<SocketServer> = []
const start = async (...options: Parameters<typeof startSocketServer>): Promise<SocketServer> => {
  const made = await startSocketServer(...options)
  started.push(made)
  return made
}
afterEach(() => Promise.all(started.splice(0).map((one) => one.stop())))

const vector = [1, 0]
const tenResults = (query: { readonly queryId: string; readonly k: number }) =>
  Effect.succeed(answerOf(query.queryId, query.k))

/** Asks until all before it was taken; gives what came before its answer. */
const upTo = async (client: SocketClient, id: string): Promise<Array<Event>> => {
  client.send({ type: "ping", id })
  const events: Array<Event> = []
  for (;;) {
    const event = await client.next()
    if (event["id"] === id && event.event === "pong") return events
    events.push(event)
  }
}

const problemOf = (event: Event | undefined) => event?.["problem"] as { code: string; field: string } | undefined

describe("sessions of one connection", () => {
  it("are as many as sessionsPerConnection, made by the frames that name them, and asked for nothing before they search", async () => {
    server = await start(tenResults, { sessionsPerConnection: 1_000 })
    const client = await SocketClient.open(server.base)
    assert.deepStrictEqual(await client.ask({ type: "ping" }), { event: "pong" })
    assert.strictEqual(server.gateway.sessions(), 0)
    for (let n = 0; n < 1_000; n++) client.send({ type: "credit", session: `s${n}`, events: 5 })
    assert.deepStrictEqual(await upTo(client, "made"), [])
    assert.strictEqual(server.gateway.sessions(), 1_000)
    assert.strictEqual(server.opened(), 0)
    const one = await client.ask({ type: "search", session: "s7", id: "a", query: vector, k: 1 })
    assert.deepInclude(one, { event: "results", id: "a" })
    assert.strictEqual(server.opened(), 1)
    const over = await client.ask({ type: "search", session: "one more", id: "b", query: vector, k: 1 })
    assert.deepInclude(problemOf(over), { code: "overloaded", field: "sessionsPerConnection" })
    assert.deepStrictEqual(await client.ask({ type: "close", session: "s7" }), { event: "closed", session: "s7" })
    assert.strictEqual(server.opened(), 0)
    assert.strictEqual((await client.ask({ type: "search", session: "one more", query: vector })).event, "results")
    await client.close()
  })

  it("end one by one: what the closed one had under way is given up, the others are answered", async () => {
    const gate = Deferred.makeUnsafe<void>()
    let interrupted = 0
    server = await start((query) =>
      Effect.onInterrupt(Effect.as(Deferred.await(gate), answerOf(query.queryId, 1)), () =>
        Effect.sync(() => interrupted++)
      )
    )
    const client = await SocketClient.open(server.base)
    for (const session of ["a", "b", "a"]) client.send({ type: "search", session, query: vector })
    client.send({ type: "close", session: "a" })
    assert.deepStrictEqual(await client.next(), { event: "closed", session: "a" })
    await Effect.runPromise(Deferred.succeed(gate, undefined))
    assert.strictEqual((await client.next()).event, "results")
    assert.strictEqual(interrupted, 2)
    assert.deepStrictEqual(await upTo(client, "end"), [])
    await client.close()
  })

  it("have bounds of their own on what is under way, within that of the connection", async () => {
    server = await start(() => Effect.never, { sessionSearchesMax: 2, connectionSearchesMax: 5 })
    const client = await SocketClient.open(server.base)
    const ask = (session: string) => client.send({ type: "search", session, query: vector })
    for (const session of ["a", "a", "a", "b", "b", "c", "c"]) ask(session)
    const refused = await upTo(client, "end")
    assert.deepStrictEqual(
      refused.map((event) => problemOf(event)?.field),
      ["sessionSearchesMax", "connectionSearchesMax"]
    )
    await client.close()
  })

  it("a frame whose handling throws is answered as a defect; its session, connection and neighbours go on", async () => {
    let bad = true
    server = await start((query) => {
      if (bad) throw new Error("thrown, not failed")
      return tenResults(query)
    })
    const client = await SocketClient.open(server.base)
    const neighbour = await SocketClient.open(server.base)
    assert.strictEqual(problemOf(await client.ask({ type: "search", id: "x", query: vector }))?.code, "internal_error")
    bad = false
    assert.strictEqual((await neighbour.ask({ type: "search", query: vector })).event, "results")
    assert.deepInclude(await client.ask({ type: "search", id: "x", query: vector }), { event: "results", id: "x" })
    await Promise.all([client.close(), neighbour.close()])
  })
})

describe("credits", () => {
  it("a session is sent as many events as it gave credit for, in order; others are not held up", async () => {
    server = await start(tenResults)
    const client = await SocketClient.open(server.base)
    client.send({ type: "credit", session: "slow", events: 3 })
    client.send({ type: "search", session: "slow", id: "s", query: vector, k: 10, stream: true })
    const first = await upTo(client, "1")
    assert.deepStrictEqual(
      first.map((event) => event.event),
      ["search_start", "result", "result"]
    )
    assert.strictEqual((await client.ask({ type: "search", session: "quick", query: vector })).event, "results")
    assert.strictEqual((await client.ask({ type: "search", query: vector })).event, "results")
    client.send({ type: "credit", session: "slow", events: 4 })
    const second = await upTo(client, "2")
    client.send({ type: "credit", session: "slow", events: 100 })
    const third = await upTo(client, "3")
    const all = [...first, ...second, ...third]
    assert.deepStrictEqual(
      all.filter((event) => event.event === "result").map((event) => event["vector_id"]),
      Array.from({ length: 10 }, (_, i) => `v${i}`)
    )
    assert.strictEqual(second.length, 4)
    assert.deepInclude(all.at(-1), { event: "search_complete", total_results: 10, id: "s" })
    // What is left of the credit is there for what comes next.
    assert.strictEqual((await client.ask({ type: "search", session: "slow", query: vector })).event, "results")
    await client.close()
  })

  it("never more than was given, nothing lost or out of order, whatever comes when (seeded)", async () => {
    server = await start((query) => Effect.delay(tenResults(query), Math.random() * 3))
    const source = random(seedOf(72))
    const client = await SocketClient.open(server.base)
    const sessions = ["a", "b", "c"]
    const given = new Map<string, number>()
    const got = new Map<string, number>()
    const results = new Map<string, Array<string>>()
    const asked = new Map<string, number>()
    const take = (events: ReadonlyArray<Event>) => {
      for (const event of events) {
        assert.notStrictEqual(event.event, "error", JSON.stringify(event))
        const id = event["id"] as string
        const session = id.slice(0, 1)
        got.set(session, (got.get(session) ?? 0) + 1)
        if (event.event === "result") results.set(id, [...(results.get(id) ?? []), event["vector_id"] as string])
        if (event.event === "search_complete") assert.strictEqual(results.get(id)?.length ?? 0, asked.get(id))
        assert.isAtMost(got.get(session) as number, given.get(session) ?? 0, `seed ${source.seed}`)
      }
    }
    for (const session of sessions) client.send({ type: "credit", session, events: 0 })
    for (let n = 0; n < 300; n++) {
      const session = source.pick(sessions)
      if (source.below(3) === 0) {
        const k = 1 + source.below(12)
        asked.set(`${session}${n}`, k)
        client.send({ type: "search", id: `${session}${n}`, session, query: vector, k, stream: true })
      } else {
        const events = source.below(8)
        given.set(session, (given.get(session) ?? 0) + events)
        client.send({ type: "credit", session, events })
      }
      if (source.below(10) === 0) take(await upTo(client, `p${n}`))
    }
    for (const session of sessions) {
      given.set(session, 1_000_000)
      client.send({ type: "credit", session, events: 100_000 })
    }
    const total = [...asked.values()].reduce((sum, k) => sum + k + 2, 0)
    while ([...got.values()].reduce((sum, n) => sum + n, 0) < total) take([await client.next()])
    for (const [id, k] of asked) {
      assert.deepStrictEqual(
        results.get(id),
        Array.from({ length: k }, (_, i) => `v${i}`)
      )
    }
    await client.close()
  })

  it("searches that would wait beyond sessionOutboundEventsMax are refused before they run", async () => {
    let ran = 0
    server = await start(
      (query) => {
        ran++
        return tenResults(query)
      },
      { sessionOutboundEventsMax: 40 }
    )
    const client = await SocketClient.open(server.base)
    client.send({ type: "credit", session: "s", events: 0 })
    for (let n = 0; n < 5; n++) client.send({ type: "search", session: "s", query: vector, k: 10, stream: true })
    const refused = await upTo(client, "end")
    assert.deepStrictEqual(
      refused.map((event) => problemOf(event)?.field),
      ["sessionOutboundEventsMax", "sessionOutboundEventsMax"]
    )
    assert.strictEqual(ran, 3)
    client.send({ type: "credit", session: "s", events: 1_000 })
    assert.strictEqual((await upTo(client, "all")).length, 36)
    await client.close()
  })

  it("a session whose events wait beyond sessionOutboundBytesMax is closed with 4008, and no other", async () => {
    server = await start((query) => Effect.succeed(answerOf(query.queryId, 1, "x".repeat(6_000))), {
      sessionOutboundBytesMax: 16_384
    })
    const client = await SocketClient.open(server.base)
    client.send({ type: "credit", session: "slow", events: 0 })
    for (let n = 0; n < 4; n++) client.send({ type: "search", session: "slow", query: vector })
    assert.deepStrictEqual(await client.next(), {
      event: "session_closed",
      session: "slow",
      code: 4008,
      reason: "no credits"
    })
    assert.strictEqual((await client.ask({ type: "search", session: "other", query: vector })).event, "results")
    // The label is free for another, with no credits counted.
    assert.strictEqual((await client.ask({ type: "search", session: "slow", query: vector })).event, "results")
    await client.close()
  })

  it("what all sessions without credit wait for stays within outboundBytesMax: the largest is closed", async () => {
    server = await start((query) => Effect.succeed(answerOf(query.queryId, 1, "x".repeat(query.k))), {
      outboundBytesMax: 65_536
    })
    const client = await SocketClient.open(server.base)
    const search = (session: string, k: number) => {
      client.send({ type: "credit", session, events: 0 })
      client.send({ type: "search", session, query: vector, k })
    }
    for (let n = 0; n < 5; n++) search(`small${n}`, 5_000)
    for (let n = 0; n < 4; n++) client.send({ type: "search", session: "large", query: vector, k: 1_000 })
    client.send({ type: "credit", session: "large", events: 0 })
    for (let n = 0; n < 5; n++) client.send({ type: "search", session: "large", query: vector, k: 9_000 })
    const events = (await upTo(client, "end")).filter((event) => event.event !== "results")
    assert.deepInclude(events[0], { event: "session_closed", session: "large", code: 4008 })
    for (let n = 0; n < 5; n++) {
      client.send({ type: "credit", session: `small${n}`, events: 1 })
      assert.strictEqual((await client.next()).event, "results")
    }
    await client.close()
  })

  it("bad ones are refused", async () => {
    server = await start(tenResults)
    const client = await SocketClient.open(server.base)
    for (const [events, field] of [
      [-1, "events"],
      [1.5, "events"],
      [1_000_001, "events"],
      [undefined, "events"]
    ] as const) {
      const answer = await client.ask({ type: "credit", id: "c", events })
      assert.deepInclude(problemOf(answer), { code: "invalid_input", field })
      assert.strictEqual(answer["id"], "c")
    }
    await client.close()
  })
})

describe("the sink of a session", () => {
  const withSink = async (settings = {}) => {
    const sinks = new Map<string, SessionSink>()
    const ended: Array<string> = []
    server = await start(tenResults, settings, () => ({
      size: 1,
      frame: (_, session) => sinks.set(session.label, session),
      sessionEnded: (session) => ended.push(session.label),
      close: () => ended.push("all")
    }))
    const client = await SocketClient.open(server.base)
    for (const session of ["a", "b"]) client.send({ type: "subscribe", id: session, session })
    await upTo(client, "subscribed")
    return { client, a: sinks.get("a") as SessionSink, b: sinks.get("b") as SessionSink, ended }
  }

  it("takes events while there is credit, says when there is none, and calls back in order when there is again", async () => {
    const { client, a, b } = await withSink()
    client.send({ type: "credit", session: "a", events: 2 })
    await upTo(client, "1")
    assert.deepStrictEqual(
      [1, 2, 3].map((n) => a.send(`{"event":"changes","n":${n}}`)),
      [true, true, false]
    )
    assert.isFalse(a.hasRoom())
    assert.isTrue(b.send('{"event":"changes","n":"b"}'))
    const called: Array<string> = []
    for (const name of ["first", "second", "third"]) {
      a.onDrain(() => {
        called.push(name)
        a.send(`{"event":"changes","n":"${name}"}`)
      })
    }
    assert.deepStrictEqual(
      (await upTo(client, "2")).map((event) => event["n"]),
      [1, 2, "b"]
    )
    assert.deepStrictEqual(called, [])
    client.send({ type: "credit", session: "a", events: 2 })
    assert.deepStrictEqual(
      (await upTo(client, "3")).map((event) => event["n"]),
      ["first", "second"]
    )
    assert.deepStrictEqual(called, ["first", "second"])
    client.send({ type: "credit", session: "a", events: 1 })
    assert.strictEqual((await upTo(client, "4")).length, 1)
    await client.close()
  })

  it("ends its session alone, with a code; a callback that throws ends it as a defect", async () => {
    const { client, a, b, ended } = await withSink()
    b.close(4010, "resume")
    assert.deepStrictEqual(await client.next(), { event: "session_closed", session: "b", code: 4010, reason: "resume" })
    assert.isFalse(b.send("{}"))
    a.onDrain(() => {
      throw new Error("of a subscription")
    })
    assert.deepInclude(await client.next(), { event: "session_closed", session: "a", code: 1011 })
    assert.deepStrictEqual(ended, ["b", "a"])
    assert.strictEqual((await client.ask({ type: "search", query: vector })).event, "results")
    await client.close()
    while (!ended.includes("all")) await new Promise((resolve) => setTimeout(resolve, 5))
  })

  it("has no room while the client does not read, and calls back when it does", async () => {
    const { client, a } = await withSink({ outboundBytesMax: 1_000_000 })
    client.socket.pause()
    const text = JSON.stringify({ event: "changes", text: "x".repeat(50_000) })
    let taken = 0
    // Until what lies between them is full, and half of the bound.
    while (taken < 2_000) {
      if (a.send(text)) taken++
      else break
      await new Promise((resolve) => setImmediate(resolve))
    }
    assert.isBelow(taken, 2_000)
    const drained = new Promise<void>((resolve) => a.onDrain(resolve))
    client.socket.resume()
    await drained
    assert.isTrue(a.send('{"event":"last"}'))
    assert.strictEqual((await client.until("last")).length, taken + 1)
    await client.close()
  })
})

describe("lifecycle", () => {
  it("a credential that ends closes the connection with 4001, whether it is quiet or not", async () => {
    const { base, connections, stop } = await startConnections({ expiresAtMillis: Date.now() + 300 })
    const quiet = await SocketClient.open(base)
    const busy = await SocketClient.open(base)
    assert.deepStrictEqual(await busy.ask({ type: "ping" }), { event: "pong" })
    await new Promise((resolve) => setTimeout(resolve, 350))
    busy.send({ type: "ping" })
    assert.deepStrictEqual(await busy.closed, { code: 4001, reason: "credential expired" })
    connections[0]?.lookAfter()
    assert.deepStrictEqual(await quiet.closed, { code: 4001, reason: "credential expired" })
    await stop()
  })

  it("closeIdle closes the quietest, as many as it may, and none that waits for an answer or is subscribed", async () => {
    const subscribed = () => ({ size: 1, frame: () => {}, sessionEnded: () => {}, close: () => {} })
    server = await start(() => Effect.never, {}, subscribed)
    const clients: Array<SocketClient> = []
    for (let n = 0; n < 5; n++) {
      clients.push(await SocketClient.open(server.base))
      await new Promise((resolve) => setTimeout(resolve, 5))
    }
    const [first, second, third, searching, subscriber] = clients as [
      SocketClient,
      SocketClient,
      SocketClient,
      SocketClient,
      SocketClient
    ]
    searching.send({ type: "search", query: vector })
    subscriber.send({ type: "subscribe" })
    await Promise.all([upTo(searching, "1"), upTo(subscriber, "1")])
    assert.strictEqual(server.gateway.closeIdle(60_000, 100, 5_000), 0)
    assert.strictEqual(server.gateway.closeIdle(0, 2, 5_000), 2)
    for (const client of [first, second]) {
      assert.deepStrictEqual(await client.closed, { code: 4029, reason: "idle while load is shed, retry=5000" })
    }
    assert.strictEqual(server.gateway.closeIdle(0, 100, 5_000), 1)
    assert.strictEqual((await third.closed).code, 4029)
    while (server.gateway.count() !== 2) await new Promise((resolve) => setTimeout(resolve, 5))
    await Promise.all([searching.close(), subscriber.close()])
  })

  it("a node that stops says 1012 and over how long to spread, and refuses upgrades with a problem", async () => {
    server = await start(tenResults, { reconnectSpreadMillis: 1_234 })
    const client = await SocketClient.open(server.base)
    await Effect.runPromise(server.gateway.drain)
    assert.deepStrictEqual(await client.closed, { code: 1012, reason: "restarting, retry=1234" })
    const refused = await SocketClient.open(server.base).then(
      () => "opened",
      (error: Error) => error.message
    )
    assert.strictEqual(refused, "Unexpected server response: 503")
  })

  it("sessions are no actors of their own, keep their credits, and closed connections leave nothing", async () => {
    const node = await startNode()
    try {
      await fetch(`${node.base}/api/v1/insert`, {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify({ vectors: [{ id: "a", vector: [1, 0] }] })
      })
      const gauge = async (name: string) =>
        Number(new RegExp(`^${name} (\\d+)`, "m").exec(await (await fetch(`${node.base}/metrics`)).text())?.[1])
      const until = async (name: string, value: number) => {
        while ((await gauge(name)) !== value) await new Promise((resolve) => setTimeout(resolve, 100))
      }
      const client = await SocketClient.open(node.base)
      const sessions = ["x", "y", "z"]
      for (const session of sessions) {
        assert.strictEqual((await client.ask({ type: "search", session, query: vector })).event, "results")
      }
      client.send({ type: "credit", session: "x", events: 1 })
      assert.strictEqual(await gauge("ruvector_sessions_resident"), 0)
      assert.strictEqual(await gauge("ruvector_sessions"), 3)
      // Its credits are what they were.
      for (let n = 0; n < 2; n++) client.send({ type: "search", session: "x", id: `${n}`, query: vector })
      assert.deepInclude(await client.next(), { event: "results", id: "0" })
      client.send({ type: "credit", session: "x", events: 1 })
      assert.deepInclude(await client.next(), { event: "results", id: "1" })
      await client.close()
      await until("ruvector_sessions", 0)
    } finally {
      await node.stop()
    }
  })

  it("a node's bound on sessions is an answer, not an end", async () => {
    server = await start(() => Effect.fail(new Overloaded({ bound: "residentEntitiesMax", retryAfterMillis: 1 })))
    const client = await SocketClient.open(server.base)
    assert.strictEqual(problemOf(await client.ask({ type: "search", query: vector }))?.field, "residentEntitiesMax")
    assert.deepStrictEqual(await client.ask({ type: "ping" }), { event: "pong" })
    await client.close()
  })
})
