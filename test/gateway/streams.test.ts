/** The streaming wires: events exactly the contract's, ids, cancel, sessions, resume, keep-alive, slow readers. */
import * as net from "node:net"
import { afterAll, assert, beforeAll, describe, it } from "@effect/vitest"
import { type RunningNode, startNode } from "../support/Node.ts"
import { binaryFrame, type Event, readSse, SocketClient } from "../support/Streams.ts"

const count = 200
const dimensions = 8
const vectorOf = (i: number) => Array.from({ length: dimensions }, (_, d) => Math.fround(Math.sin((i + 1) * (d + 1))))

let node: RunningNode

beforeAll(async () => {
  node = await startNode({ outboundBytesMax: 262_144, pingIntervalMillis: 300, idleTimeoutMillis: 1_500 })
  const vectors = Array.from({ length: count }, (_, i) => ({
    id: `v${i}`,
    vector: vectorOf(i),
    metadata: { i, text: "x".repeat(2_000) }
  }))
  const response = await fetch(`${node.base}/api/v1/insert`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ vectors })
  })
  assert.deepStrictEqual(await response.json(), { inserted: count })
})
afterAll(() => node.stop())

const b64 = (i: number) => Buffer.from(new Float32Array(vectorOf(i)).buffer).toString("base64url")

describe("SSE", () => {
  it("sends the source's events, in order, and ends", async () => {
    const response = await fetch(`${node.base}/api/v1/stream/search?query_b64=${b64(7)}&k=3`)
    assert.strictEqual(response.headers.get("content-type"), "text/event-stream; charset=utf-8")
    const events = await readSse(response)
    assert.strictEqual(events.length, 5)
    assert.deepStrictEqual(Object.keys(events[0]?.data ?? {}), ["event", "query_id"])
    assert.deepStrictEqual(Object.keys(events[1]?.data ?? {}), ["event", "vector_id", "score"])
    assert.deepInclude(events[1]?.data, { event: "result", vector_id: "v7" })
    assert.deepStrictEqual(events[4]?.data, { event: "search_complete", total_results: 3 })
  })

  it("goes on after Last-Event-ID, and is 204 after the end", async () => {
    const url = `${node.base}/api/v1/stream/search?query_vector_id=v9&k=20&include=metadata`
    const whole = await readSse(await fetch(`${url}&keep_open=true`), (events) => events.length >= 22)
    const cut = whole[4]
    const rest = await readSse(await fetch(url, { headers: { "last-event-id": cut?.id ?? "" } }))
    assert.deepStrictEqual(rest, whole.slice(5))
    const after = await fetch(url, { headers: { "last-event-id": whole[21]?.id ?? "" } })
    assert.strictEqual(after.status, 204)
    const unknown = await readSse(await fetch(url, { headers: { "last-event-id": "s_0.q_0.3" } }))
    assert.strictEqual(unknown[0]?.data.event, "search_start")
    assert.strictEqual(unknown.length, 22)
  })

  it("keep_open keeps it open, with comments", async () => {
    const controller = new AbortController()
    const response = await fetch(`${node.base}/api/v1/stream/search?query_vector_id=v1&k=1&keep_open=true`, {
      signal: controller.signal
    })
    const reader = (response.body as ReadableStream<Uint8Array>).getReader()
    let text = ""
    while (!text.includes(": keep-alive")) text += new TextDecoder().decode((await reader.read()).value)
    assert.include(text, '"search_complete"')
    controller.abort()
  })

  it("refuses with problems, before the stream begins", async () => {
    for (const [search, field] of [
      ["", "query"],
      ["query_b64=!!", "query_b64"],
      ["query_vector_id=v1&k=zero", "k"],
      ["query_vector_id=v1&k=0", "k"],
      ["query_vector_id=v1&other=1", "other"],
      ["query_vector_id=v1&filter={", "filter"],
      ["query_vector_id=v1&keep_open=maybe", "keep_open"],
      ["query_b64=AACAPw", "query"]
    ] as const) {
      const response = await fetch(`${node.base}/api/v1/stream/search?${search}`)
      const problem = (await response.json()) as { field: string; expected: string; got: string }
      assert.strictEqual(response.status, 400, search)
      assert.strictEqual(problem.field, field, JSON.stringify(problem))
    }
    const missing = await fetch(`${node.base}/api/v1/stream/search?query_vector_id=nobody`)
    assert.deepInclude((await missing.json()) as object, { code: "vector_not_found", status: 404 })
  })
})

describe("WebSocket", () => {
  it("streams a search, or answers it whole; frames carry their id", async () => {
    const client = await SocketClient.open(node.base)
    client.send({ type: "search", id: "one", query: vectorOf(3), k: 2, stream: true })
    const events = await client.until("search_complete")
    const queryId = events[0]?.["query_id"]
    assert.deepStrictEqual(events[0], { event: "search_start", query_id: queryId as string, id: "one" })
    assert.deepInclude(events[1], { event: "result", vector_id: "v3", query_id: queryId, id: "one" })
    assert.deepStrictEqual(events[3], {
      event: "search_complete",
      total_results: 2,
      query_id: queryId as string,
      id: "one"
    })
    const whole = await client.ask({ type: "search", id: "two", query: vectorOf(3), k: 2 })
    assert.deepInclude(whole, { event: "results", id: "two", total_results: 2, partial: false })
    assert.strictEqual((whole["results"] as Array<Event>).length, 2)
    await client.close()
  })

  it("answers many in flight, each under its own id", async () => {
    const client = await SocketClient.open(node.base)
    for (let i = 0; i < 100; i++) client.send({ type: "search", id: `r${i}`, query: vectorOf(i), k: 1 })
    const answered = new Map<string, string>()
    for (let i = 0; i < 100; i++) {
      const event = await client.next()
      answered.set(event["id"] as string, ((event["results"] as Array<Event>)[0] as Event)["vector_id"] as string)
    }
    for (let i = 0; i < 100; i++) assert.strictEqual(answered.get(`r${i}`), `v${i}`)
    await client.close()
  })

  it("takes binary vectors for searches and inserts", async () => {
    const client = await SocketClient.open(node.base)
    const found = await client.ask(binaryFrame({ type: "search", id: "b", k: 1 }, vectorOf(11)))
    assert.deepInclude((found["results"] as Array<Event>)[0], { vector_id: "v11" })
    const frame = {
      type: "insert",
      id: "i",
      collection: "binary",
      vectors: [{ id: "x", metadata: { n: 1 } }, { id: "y" }]
    }
    await fetch(`${node.base}/api/v1/collections/binary`, {
      method: "PUT",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ dimensions: 2 })
    })
    assert.deepStrictEqual(await client.ask(binaryFrame(frame, [1, 0, 0, 1])), {
      event: "inserted",
      inserted: 2,
      id: "i"
    })
    const y = (await (await fetch(`${node.base}/api/v1/embed/y?collection=binary`)).json()) as { vector: Array<number> }
    assert.deepStrictEqual(y.vector, [0, 1])
    await client.close()
  })

  it("ping, cancel, sessions", async () => {
    const client = await SocketClient.open(node.base)
    assert.deepStrictEqual(await client.ask({ type: "ping" }), { event: "pong" })
    assert.deepStrictEqual(await client.ask({ type: "cancel", id: "none" }), { event: "cancelled", id: "none" })
    client.send({ type: "search", id: "c", query: vectorOf(1), k: 100, include: ["metadata"] })
    client.send({ type: "cancel", id: "c" })
    const first = await client.next()
    assert.deepStrictEqual(first, { event: "cancelled", id: "c" })
    // Nothing of the cancelled request follows.
    assert.deepStrictEqual(await client.ask({ type: "ping", id: "p" }), { event: "pong", id: "p" })
    const inB = await client.ask({ type: "search", session: "b", query: vectorOf(5), k: 1 })
    assert.strictEqual(inB.event, "results")
    assert.deepStrictEqual(await client.ask({ type: "close", session: "b" }), { event: "closed", session: "b" })
    await client.close()
  })

  it("answers what is wrong, and stays open", async () => {
    const client = await SocketClient.open(node.base)
    const wrong: ReadonlyArray<readonly [unknown, string]> = [
      ["{", ""],
      ["[]", ""],
      [{ type: "dance" }, "type"],
      [{}, "type"],
      [{ type: "search" }, "query"],
      [{ type: "search", query: [1] }, "query"],
      [{ type: "search", query: vectorOf(1), k: -1 }, "k"],
      [{ type: "search", query: vectorOf(1), extra: 1 }, "extra"],
      [{ type: "insert", vectors: [] }, "vectors"],
      [{ type: "cancel" }, "id"],
      [Buffer.from([1, 2]), ""],
      [Buffer.from([255, 255, 255, 255, 0]), ""]
    ]
    for (const [frame, field] of wrong) {
      const event = await client.ask(frame)
      assert.strictEqual(event.event, "error")
      assert.deepInclude(
        event["problem"],
        { status: 400, code: "invalid_input", field },
        JSON.stringify([frame, event])
      )
    }
    assert.strictEqual((await client.ask({ type: "ping" })).event, "pong")
    await client.close()
  })

  it("is pinged when quiet, and closed with 4009 when it answers nothing", async () => {
    const client = await SocketClient.open(node.base)
    await new Promise((resolve) => client.socket.once("ping", resolve))
    // A peer that is gone without a word: it reads nothing more, so it answers no ping.
    client.socket.pause()
    const deaf = client.closed
    setTimeout(() => client.socket.resume(), 2_500)
    assert.deepStrictEqual(await deaf, { code: 4009, reason: "idle" })
  })
})

describe("slow readers", () => {
  it("a WebSocket that does not read is closed with 4008; memory stays, others are served", async () => {
    const slow = await SocketClient.open(node.base)
    const other = await SocketClient.open(node.base)
    slow.socket.pause()
    const before = process.memoryUsage().rss
    // 800 MB of answers, were they all made and kept.
    for (let i = 0; i < 2_000; i++) slow.send({ type: "search", query: vectorOf(i), k: count, include: ["metadata"] })
    for (let i = 0; i < 50; i++) {
      assert.strictEqual((await other.ask({ type: "search", query: vectorOf(i), k: 1 })).event, "results")
    }
    setTimeout(() => slow.socket.resume(), 500)
    const { code } = await slow.closed
    assert.include([4008, 1006], code)
    // What is under way at once (`sessionSearchesMax`) may be answered; the rest is refused or not begun.
    assert.isBelow(process.memoryUsage().rss - before, 300e6)
    await other.close()
  })

  it("an event stream that is not read is cut; memory stays, others are served", { timeout: 30_000 }, async () => {
    // 9 MB of answer, more than the sockets' buffers hold.
    const vectors = Array.from({ length: 150 }, (_, i) => ({
      id: `l${i}`,
      vector: vectorOf(i),
      metadata: { text: "x".repeat(60_000) }
    }))
    const json = { "content-type": "application/json" }
    const made = await fetch(`${node.base}/api/v1/collections/large`, {
      method: "PUT",
      headers: json,
      body: JSON.stringify({ dimensions })
    })
    assert.strictEqual(made.status, 201)
    const body = JSON.stringify({ collection: "large", vectors })
    const inserted = await fetch(`${node.base}/api/v1/insert`, { method: "POST", headers: json, body })
    assert.deepStrictEqual(await inserted.json(), { inserted: 150 })
    const before = process.memoryUsage().rss
    const socket = net.connect(node.port, "127.0.0.1")
    socket.pause()
    socket.on("error", () => {})
    const path = "/api/v1/stream/search?collection=large&query_vector_id=l1&k=150&include=metadata"
    socket.write(`GET ${path} HTTP/1.1\r\nhost: localhost\r\n\r\n`)
    const other = await SocketClient.open(node.base)
    const closed = async () => /ruvector_stream_closes\{wire="sse",code="slow"\} 1/.test(await metrics())
    const metrics = async () => (await fetch(`${node.base}/metrics`)).text()
    const until = Date.now() + 15_000
    while (!(await closed())) {
      assert.isBelow(Date.now(), until, "the stream was not cut")
      assert.strictEqual((await other.ask({ type: "search", query: vectorOf(1), k: 1 })).event, "results")
      await new Promise((resolve) => setTimeout(resolve, 50))
    }
    assert.isBelow(process.memoryUsage().rss - before, 150e6)
    await other.close()
    socket.destroy()
  })
})
