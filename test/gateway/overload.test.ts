/** A real server that is asked for more than it may do. */
import { Agent, request } from "node:http"
import { type ClientHttp2Session, connect as connectHttp2 } from "node:http2"
import { connect } from "node:net"
import { afterAll, assert, beforeAll, describe, test } from "vitest"
import { WebSocket } from "ws"
import type { Problem } from "../../src/protocol/Errors.ts"
import type { LoadState } from "../../src/protocol/LoadShedder.ts"
import { type RunningNode, startNode } from "../support/Node.ts"
import { SocketClient } from "../support/Streams.ts"

const dimensions = 16
const vectors = Array.from({ length: 300 }, (_, i) => ({
  id: `v${i}`,
  vector: Array.from({ length: dimensions }, (_, d) => Math.sin(i * dimensions + d))
}))

const post = (base: string, path: string, body: unknown) =>
  fetch(`${base}${path}`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body)
  })

describe("over capacity", () => {
  let node: RunningNode
  beforeAll(async () => {
    node = await startNode({
      searchLimitMin: 1,
      searchLimitMax: 1,
      searchQueueMax: 2,
      searchQueueMin: 1,
      resultCacheBytes: 0,
      sessionSearchesMax: 1_000
    })
    assert.strictEqual((await post(node.base, "/api/v1/insert", { vectors })).status, 200)
  })
  afterAll(() => node.stop())

  test("over HTTP each is answered: rightly, or with when to come back", async () => {
    let answered = 0
    let refused = 0
    for (let round = 0; round < 5; round++) {
      await Promise.all(
        vectors.slice(0, 60).map(async ({ id, vector }) => {
          const response = await post(node.base, "/api/v1/search", { query: vector, k: 3 })
          if (response.status === 200) {
            const { results } = (await response.json()) as { results: ReadonlyArray<{ vector_id: string }> }
            assert.strictEqual(results[0]?.vector_id, id)
            answered += 1
            return
          }
          const problem = (await response.json()) as Problem
          assert.strictEqual(response.status, 429)
          assert.strictEqual(response.headers.get("content-type"), "application/problem+json")
          assert.strictEqual(problem.code, "overloaded")
          assert.isAbove(problem.retry_after_ms ?? 0, 0)
          assert.isAtLeast(Number(response.headers.get("retry-after")), 1)
          refused += 1
        })
      )
    }
    assert.strictEqual(answered + refused, 300)
    assert.isAbove(answered, 0)
    assert.isAbove(refused, 0)
  })

  test("over a WebSocket too, in whatever form a search is written", async () => {
    const ws = new WebSocket(`${node.base.replace("http", "ws")}/api/v1/ws`)
    await new Promise((resolve) => ws.once("open", resolve))
    const events = new Map<string, { event: string; problem?: Problem; results?: Array<{ vector_id: string }> }>()
    const all = new Promise<void>((resolve) => {
      ws.on("message", (data) => {
        const event = JSON.parse(String(data))
        events.set(event.id, event)
        if (events.size === 300) resolve()
      })
    })
    for (const [i, { id, vector }] of vectors.entries()) {
      const query = JSON.stringify(vector)
      const text =
        i % 3 === 0
          ? `{"type":"search","id":"${id}","query":${query},"k":3}`
          : i % 3 === 1
            ? `{"query":${query},"k":3,"id":"${id}","type":"search"}`
            : `{"type":"search","query":${query},"k":3,"id":"${id}"}`
      ws.send(text)
    }
    await all
    let answered = 0
    for (const [id, { event, problem, results }] of events) {
      if (event === "results") {
        answered += 1
        assert.strictEqual(results?.[0]?.vector_id, id)
      } else {
        assert.strictEqual(problem?.code, "overloaded")
        assert.isAbove(problem?.retry_after_ms ?? 0, 0)
      }
    }
    assert.isAbove(answered, 0)
    assert.isBelow(answered, 300)
    ws.terminate()
    const state = (await (await fetch(`${node.base}/api/v1/load`)).json()) as LoadState
    assert.strictEqual(state.searches.limit, 1)
    assert.isAbove(state.refused["searchQueue"] ?? 0, 0)
  })
})

describe("a connection that asks more than is answered", () => {
  let node: RunningNode
  beforeAll(async () => {
    const limits = { searchLimitMin: 1, searchLimitMax: 1, searchQueueMax: 8, searchQueueMin: 8, resultCacheBytes: 0 }
    node = await startNode(limits)
    assert.strictEqual((await post(node.base, "/api/v1/insert", { vectors })).status, 200)
  })
  afterAll(() => node.stop())

  /** A search by HTTP/2, on a connection with others. */
  const searchOn = (session: ClientHttp2Session, body: string): Promise<number> =>
    new Promise((resolve, reject) => {
      const headers = { ":method": "POST", ":path": "/api/v1/search", "content-type": "application/json" }
      const stream = session.request(headers)
      let status = 0
      stream.on("response", (answer) => (status = Number(answer[":status"])))
      stream.on("error", reject)
      stream.on("end", () => resolve(status))
      stream.resume()
      stream.end(body)
    })

  test("is refused what is too much; others, on whatever wire, are answered", async () => {
    const session = connectHttp2(node.base)
    const agent = new Agent({ keepAlive: true, maxSockets: 1 })
    const socket = await SocketClient.open(node.base)
    const body = (i: number) => JSON.stringify({ query: vectors[i % vectors.length]?.vector, k: 3 })
    let done = false
    const statuses = new Map<number, number>()
    const greedy = Promise.all(
      Array.from({ length: 40 }, async (_, i) => {
        while (!done) {
          const status = await searchOn(session, body(i))
          statuses.set(status, (statuses.get(status) ?? 0) + 1)
        }
      })
    )
    const searchOnce = (i: number): Promise<number | undefined> =>
      new Promise((resolve, reject) => {
        const headers = { "content-type": "application/json" }
        const asked = request(`${node.base}/api/v1/search`, { agent, method: "POST", headers }, (response) => {
          response.resume()
          response.on("end", () => resolve(response.statusCode))
        })
        asked.on("error", reject)
        asked.end(body(i))
      })
    try {
      while ((statuses.get(429) ?? 0) === 0) await new Promise(setImmediate)
      for (let i = 0; i < 30; i++) {
        const frame = { type: "search", query: vectors[i]?.vector, k: 3 }
        const [status, event] = await Promise.all([searchOnce(i), socket.ask(frame)])
        assert.strictEqual(status, 200)
        assert.strictEqual(event.event, "results", JSON.stringify(event))
      }
    } finally {
      done = true
      await greedy
      session.close()
      agent.destroy()
      await socket.close()
    }
    assert.isAbove(statuses.get(200) ?? 0, 0)
    assert.deepStrictEqual([...statuses.keys()].sort(), [200, 429])
  })
})

describe("at level 95", () => {
  let node: RunningNode
  const sockets: Array<ReturnType<typeof connect>> = []
  beforeAll(async () => {
    node = await startNode({ connectionsMax: 100, loadSampleMillis: 50, loadRaiseMillis: 0, loadLowerMillis: 100 })
    // Held open from before: more than the trigger, and room for those that ask.
    for (let i = 0; i < 96; i++) {
      const socket = connect(node.port, "127.0.0.1")
      await new Promise((resolve) => socket.once("connect", resolve))
      socket.on("error", () => {})
      sockets.push(socket)
    }
  })
  afterAll(async () => {
    for (const socket of sockets) socket.destroy()
    await node.stop()
  })

  /** One request on a connection of its own. */
  const ask = (text: string): Promise<string> =>
    new Promise((resolve, reject) => {
      const socket = connect(node.port, "127.0.0.1", () => socket.write(text))
      let answer = ""
      socket.on("data", (data) => (answer += data))
      socket.on("close", () => resolve(answer))
      socket.on("error", reject)
    })
  const get = (path: string, more = "") =>
    ask(`GET ${path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: ${more === "" ? "close" : more}\r\n\r\n`)

  test("new connections are rejected with a time to come back, operators are answered, and it ends", async () => {
    let ready = ""
    while (!ready.includes('"load_level":95')) ready = await get("/health/ready")
    assert.match(ready, /^HTTP\/1\.1 200 /)
    const rejected = await get("/api/v1/collections")
    assert.match(rejected, /^HTTP\/1\.1 503 [\s\S]*\r\nretry-after: [1-9]/i)
    assert.include(rejected, '"code":"overloaded"')
    const upgrade = await get(
      "/api/v1/ws",
      "Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ=="
    )
    assert.match(upgrade, /^HTTP\/1\.1 503 [\s\S]*\r\nretry-after: [1-9]/i)
    assert.match(await get("/metrics"), /\nruvector_load_level 95\n/)

    for (const socket of sockets.splice(5)) socket.destroy()
    let answer = ""
    while (!answer.startsWith("HTTP/1.1 200")) answer = await get("/api/v1/collections")
    // At a lower level all are answered again, but for what is not asked here; it is left a moment later.
    while ((await get("/health/ready")).includes("load_level")) await new Promise((resolve) => setTimeout(resolve, 20))

    // All of it in events, for who follows from the first one on.
    const abort = new AbortController()
    const stream = await fetch(`${node.base}/api/v1/load/events?after=0`, { signal: abort.signal })
    assert.match(stream.headers.get("content-type") ?? "", /^text\/event-stream/)
    let text = ""
    const levels = () =>
      [...text.matchAll(/"event":"level_changed".*?"from":(\d+),"to":(\d+)/g)].map(([, from, to]) => [from, to])
    for await (const chunk of (stream.body as ReadableStream<Uint8Array>).pipeThrough(new TextDecoderStream())) {
      text += chunk
      if (levels().at(-1)?.[1] === "0") break
    }
    abort.abort()
    assert.match(text, /^id: \d+\ndata: \{"event":"following"/)
    assert.include(
      levels().map(([, to]) => to),
      "95"
    )
    const wrong = await get("/api/v1/load/events?since=1")
    assert.match(wrong, /^HTTP\/1\.1 400 /)
  })
})
