/** Subscriptions on each wire: their events, what is refused, slow readers, and feeds that no longer reach back. */
import * as net from "node:net"
import { afterAll, assert, beforeAll, describe, it } from "@effect/vitest"
import { type RunningNode, startNode } from "../support/Node.ts"
import { binaryFrame, type Event, readSse, SocketClient } from "../support/Streams.ts"

let node: RunningNode

beforeAll(async () => {
  node = await startNode({
    subscriptionsPerSession: 4,
    subscriptionsMax: 40,
    outboundBytesMax: 65_536,
    reconnectSpreadMillis: 0
  })
})
afterAll(() => node.stop())

const send = async (method: string, path: string, body: object): Promise<unknown> => {
  const headers = { "content-type": "application/json" }
  const response = await fetch(`${node.base}/api/v1/${path}`, { method, headers, body: JSON.stringify(body) })
  const text = await response.text()
  assert.isTrue(response.ok, text)
  return text === "" ? undefined : JSON.parse(text)
}

const insert = (
  collection: string,
  ...vectors: ReadonlyArray<{ id: string; vector: Array<number>; metadata?: object }>
) => send("POST", "insert", { collection, vectors })

let collections = 0
const freshCollection = async (dimensions = 2, partitions = 1): Promise<string> => {
  const name = `c${collections++}`
  await send("PUT", `collections/${name}`, { dimensions, partitions })
  return name
}

const sse = (path: string, headers: Record<string, string> = {}) => {
  const controller = new AbortController()
  return fetch(`${node.base}/api/v1/stream/${path}`, { headers, signal: controller.signal })
}

const b64 = (...components: ReadonlyArray<number>) =>
  Buffer.from(Float32Array.from(components).buffer).toString("base64url")

describe("a standing query", () => {
  it("over SSE: the answer, then what changes, each with its cursor as id", async () => {
    const c = await freshCollection()
    await insert(c, { id: "a", vector: [1, 0], metadata: { n: 1 } }, { id: "far", vector: [-1, 0] })
    const stream = await sse(`subscribe?collection=${c}&query_b64=${b64(1, 0)}&k=2&min_score=0.5&include=metadata`)
    assert.strictEqual(stream.status, 200)
    const reading = readSse(stream, (events) => events.length === 4)
    await new Promise((resolve) => setTimeout(resolve, 50))
    await insert(c, { id: "b", vector: [1, 0.1] })
    await new Promise((resolve) => setTimeout(resolve, 50))
    await send("PATCH", `vectors/a?collection=${c}`, { metadata: { n: 2 } })
    await new Promise((resolve) => setTimeout(resolve, 50))
    await send("POST", "delete", { collection: c, ids: ["a"] })
    const events = await reading
    assert.strictEqual(new Set(events.map(({ id }) => id)).size, 4)
    const [first, enter, update, leave] = events.map(({ data }) => data)
    assert.deepStrictEqual(Object.keys(first ?? {}), ["event", "results"])
    const [member] = (first?.["results"] ?? []) as Array<Record<string, unknown>>
    assert.deepStrictEqual(Object.keys(member ?? {}), ["vector_id", "score", "version", "metadata"])
    assert.deepInclude(member, { vector_id: "a", score: 1, metadata: { n: 1 } })
    const changesOf = (event: Event | undefined) => (event?.["changes"] ?? []) as Array<Record<string, unknown>>
    assert.deepInclude(changesOf(enter)[0], { type: "enter", vector_id: "b", metadata: {} })
    assert.deepInclude(changesOf(update)[0], { type: "update", vector_id: "a", metadata: { n: 2 } })
    assert.deepStrictEqual(changesOf(leave), [{ type: "leave", vector_id: "a" }])
  })

  it("resumed: what stayed, what changed, in one event; with nothing changed, nothing", async () => {
    const c = await freshCollection()
    await insert(c, { id: "a", vector: [1, 0] }, { id: "b", vector: [1, 0.1] }, { id: "c", vector: [1, 0.2] })
    const path = `subscribe?collection=${c}&query_b64=${b64(1, 0)}&k=3`
    const [first] = await readSse(await sse(path), (events) => events.length === 1)
    const cursor = first?.id ?? ""
    const [same] = await readSse(await sse(path, { "last-event-id": cursor }), (events) => events.length === 1)
    assert.deepStrictEqual(same?.data, { event: "resumed", changes: [] })
    await send("POST", "delete", { collection: c, ids: ["b"] })
    await insert(c, { id: "d", vector: [1, 0.05] })
    await send("PATCH", `vectors/a?collection=${c}`, { metadata: { n: 1 } })
    for (const resume of [
      () => sse(path, { "last-event-id": cursor }),
      () => sse(`${path}&cursor=${cursor}`),
      // The header is the newer one.
      () => sse(`${path}&cursor=${same?.id}`, { "last-event-id": cursor })
    ]) {
      const [resumed] = await readSse(await resume(), (events) => events.length === 1)
      assert.deepStrictEqual(resumed?.data["keep"], ["a", "c"])
      const changes = resumed?.data["changes"] as Array<Record<string, unknown>>
      assert.deepStrictEqual(
        changes.map(({ type, vector_id }) => [type, vector_id]),
        [
          ["enter", "d"],
          ["update", "a"]
        ]
      )
    }
  })

  it("over a WebSocket: many, in sessions, with binary vectors; unsubscribed from", async () => {
    const c = await freshCollection()
    await insert(c, { id: "a", vector: [1, 0] })
    const client = await SocketClient.open(node.base)
    const one = await client.ask({ type: "subscribe", id: "one", collection: c, query: [1, 0] })
    assert.deepInclude(one, { event: "subscribed", id: "one" })
    assert.notProperty(one, "session")
    const two = await client.ask(
      binaryFrame({ type: "subscribe", id: "one", session: "s", collection: c, k: 1 }, [0, 1])
    )
    assert.deepInclude(two, { event: "subscribed", id: "one", session: "s" })
    await insert(c, { id: "b", vector: [0, 1] })
    const changed = [await client.next(), await client.next()]
    assert.sameDeepMembers(
      changed.map((event) => [event["session"], (event["changes"] as Array<Event>).map((change) => change["type"])]),
      [
        [undefined, ["enter"]],
        ["s", ["leave", "enter"]]
      ]
    )
    assert.deepStrictEqual(await client.ask({ type: "unsubscribe", id: "one" }), { event: "unsubscribed", id: "one" })
    await insert(c, { id: "c", vector: [0, 1] })
    // Under cosine a tie: who is first stays, and so says nothing.
    assert.deepStrictEqual(await client.ask({ type: "unsubscribe", id: "one" }), { event: "unsubscribed", id: "one" })
    const cursor = one["cursor"] as string
    const resumed = await client.ask({ type: "resume", id: "again", collection: c, query: [1, 0], cursor })
    assert.deepInclude(resumed, { event: "resumed", id: "again" })
    assert.deepStrictEqual(
      (resumed["changes"] as Array<Event>).map((change) => [change["type"], change["vector_id"]]),
      [
        ["enter", "b"],
        ["enter", "c"]
      ]
    )
    await client.close()
  })

  it("ends with an error when its collection is deleted, and so does a change feed", async () => {
    const c = await freshCollection()
    await insert(c, { id: "a", vector: [1, 0] })
    const client = await SocketClient.open(node.base)
    await client.ask({ type: "subscribe", id: "q", collection: c, query: [1, 0] })
    await client.ask({ type: "follow", id: "f", collection: c })
    const stream = readSse(await sse(`changes?collection=${c}`))
    await send("DELETE", `collections/${c}`, {})
    const errors = [await client.next(), await client.next()]
    for (const error of errors) assert.deepInclude(error["problem"], { code: "collection_not_found" })
    assert.sameMembers(
      errors.map((error) => error["id"]),
      ["q", "f"]
    )
    const events = await stream
    assert.deepInclude(events.at(-1)?.data["problem"], { code: "collection_not_found" })
    await client.close()
  })
})

describe("what is refused", () => {
  it("names the field, before the stream begins", async () => {
    const c = await freshCollection()
    for (const [path, field] of [
      [`subscribe?collection=${c}`, "query"],
      [`subscribe?collection=${c}&query_b64=${b64(1, 0)}&query_vector_id=a`, "query"],
      [`subscribe?collection=${c}&query_b64=${b64(1)}`, "query"],
      [`subscribe?collection=${c}&query_b64=${b64(0, 0)}`, "query"],
      [`subscribe?collection=${c}&query_b64=${b64(1, 0)}&k=257`, "k"],
      [`subscribe?collection=${c}&query_b64=${b64(1, 0)}&min_score=high`, "min_score"],
      [`subscribe?collection=${c}&query_b64=${b64(1, 0)}&policy=drop`, "policy"],
      [`subscribe?collection=${c}&query_b64=${b64(1, 0)}&filter={`, "filter"],
      [`subscribe?collection=${c}&query_b64=${b64(1, 0)}&ef=9`, "ef"],
      [`changes?collection=${c}&from=middle`, "from"],
      [`changes?collection=${c}&query_vector_id=a`, "query_vector_id"],
      [`changes?collection=${c}&cursor=`, "cursor"]
    ] as const) {
      const response = await sse(path)
      assert.strictEqual(response.status, 400, path)
      assert.deepInclude((await response.json()) as object, { field }, path)
    }
    const missing = await sse("changes?collection=nobody")
    assert.deepInclude((await missing.json()) as object, { code: "collection_not_found", status: 404 })
    const posted = await fetch(`${node.base}/api/v1/stream/changes`, { method: "POST" })
    assert.strictEqual(posted.status, 405)
  })

  it("a cursor that is forged, of another subscription, of another collection, or of its name's predecessor", async () => {
    const c = await freshCollection()
    const other = await freshCollection()
    await insert(c, { id: "a", vector: [1, 0] })
    const one = `subscribe?collection=${c}&query_b64=${b64(1, 0)}&k=3`
    const [first] = await readSse(await sse(one), (events) => events.length === 1)
    const [following] = await readSse(await sse(`changes?collection=${c}`), (events) => events.length === 1)
    const answer = first?.id ?? ""
    const feed = following?.id ?? ""
    const wrong: ReadonlyArray<readonly [string, string]> = [
      [one, `${answer.slice(0, -1)}${answer.endsWith("A") ? "B" : "A"}`],
      [one, answer.slice(0, -4)],
      [one, feed],
      [one, "x".repeat(8_000)],
      [`${one}&min_score=0`, answer],
      [`${one}&filter={"n":1}`, answer],
      [`${one}&include=metadata`, answer],
      [one.replace("k=3", "k=4"), answer],
      [one.replace(b64(1, 0), b64(0, 1)), answer],
      [one.replace(c, other), answer],
      [`changes?collection=${c}`, answer],
      [`changes?collection=${other}`, feed]
    ]
    const refusals = new Set<string>()
    for (const [path, cursor] of wrong) {
      const response = await sse(path, { "last-event-id": cursor })
      assert.strictEqual(response.status, 400, path)
      refusals.add(await response.text())
    }
    // All in the same words: which of them it was is not told.
    assert.strictEqual(refusals.size, 1)
    assert.include([...refusals][0], '"code":"invalid_cursor"')
    const client = await SocketClient.open(node.base)
    const refused = await client.ask({ type: "resume", id: "r", collection: c, query: [1, 0], k: 3, cursor: feed })
    assert.deepInclude(refused["problem"], { code: "invalid_cursor" })
    await client.close()
    const huge = await sse(`${one}&cursor=${"x".repeat(8_193)}`)
    assert.strictEqual(huge.status, 400)
    await send("DELETE", `collections/${c}`, {})
    await send("PUT", `collections/${c}`, { dimensions: 2 })
    assert.strictEqual((await sse(`changes?collection=${c}`, { "last-event-id": feed })).status, 400)
  })

  it("more subscriptions than a session or the node may have; ended ones make room", async () => {
    const c = await freshCollection()
    await insert(c, { id: "a", vector: [1, 0] })
    const client = await SocketClient.open(node.base)
    for (let n = 0; n < 4; n++) await client.ask({ type: "follow", id: `f${n}`, collection: c })
    const over = await client.ask({ type: "follow", id: "f4", collection: c })
    assert.deepInclude(over["problem"], { code: "overloaded", field: "subscriptionsPerSession" })
    const twice = await client.ask({ type: "follow", id: "f0", collection: c })
    assert.deepInclude(twice["problem"], { code: "invalid_input", field: "id" })
    await client.ask({ type: "unsubscribe", id: "f0" })
    assert.strictEqual((await client.ask({ type: "follow", id: "f4", collection: c })).event, "following")
    let refused: Event | undefined
    for (let n = 0; n < 60 && refused === undefined; n++) {
      const event = await client.ask({ type: "follow", id: "f", session: `s${n}`, collection: c })
      if (event.event === "error") refused = event
    }
    assert.deepInclude(refused?.["problem"], { code: "overloaded", field: "subscriptionsMax" })
    await client.close()
    const until = Date.now() + 5_000
    let status = 0
    while (status !== 200 && Date.now() < until) {
      const response = await sse(`changes?collection=${c}`)
      status = response.status
      await response.body?.cancel()
    }
    assert.strictEqual(status, 200)
  })
})

describe("a change feed", () => {
  it("has each change once, of early writes too when they are in the log", async () => {
    const c = await freshCollection(2, 3)
    const following = await sse(`changes?collection=${c}`)
    const reading = readSse(following, (events) => events.length === 1 + 3 * 8)
    const expected: Array<string> = []
    for (const ack of ["memory", "warm", "cold"]) {
      const vectors = Array.from({ length: 8 }, (_, i) => ({ id: `${ack}${i}`, vector: [1, i] }))
      expected.push(...vectors.map(({ id }) => id))
      await send("POST", "insert", { collection: c, vectors, ack })
    }
    const events = await reading
    assert.strictEqual(events[0]?.data.event, "following")
    assert.sameMembers(
      events.slice(1).map(({ data }) => data["vector_id"]),
      expected
    )
    // From the beginning, and from each event: what followed it, in whatever order partitions take turns.
    const all = await readSse(await sse(`changes?collection=${c}&from=oldest`), (so) => so.length === 25)
    assert.sameMembers(
      all.slice(1).map(({ data }) => data["vector_id"]),
      expected
    )
    for (let at = 0; at < 25; at += 6) {
      const rest = await readSse(
        await sse(`changes?collection=${c}`, { "last-event-id": all[at]?.id ?? "" }),
        (so) => so.length === 25 - at
      )
      assert.sameMembers(
        rest.slice(1).map(({ data }) => data["vector_id"]),
        all.slice(at + 1).map(({ data }) => data["vector_id"])
      )
    }
  })
})

describe("slow readers", () => {
  // 18 MB of events, more than the sockets' buffers hold.
  const text = "x".repeat(60_000)
  const floods = 300

  it("of a standing query: sent the newest answer when they read again, and little waits for them", {
    timeout: 30_000
  }, async () => {
    const c = await freshCollection()
    await insert(c, { id: "a", vector: [1, 0], metadata: { n: -1, text } })
    const slow = await SocketClient.open(node.base)
    await slow.ask({ type: "subscribe", id: "q", collection: c, query: [1, 0], include: ["metadata"] })
    slow.socket.pause()
    for (let n = 0; n < floods; n++) {
      const vectors = [{ id: "a", vector: [1, 0], metadata: { n, text } }]
      await send("POST", "insert", { collection: c, vectors, ack: "memory" })
    }
    slow.socket.resume()
    let last = -1
    let events = 0
    while (last !== floods - 1) {
      const event = await slow.next()
      events += 1
      const [change] = event["changes"] as Array<{ type: string; metadata: { n: number } }>
      assert.strictEqual(change?.type, "update")
      assert.isAbove(change?.metadata.n ?? -2, last)
      last = change?.metadata.n ?? -2
    }
    // What was not sent while nothing was read has come to one event.
    assert.isBelow(events, floods)
    await slow.close()
  })

  it("who want to be: their session is closed with 4010, the connection goes on, and resumes", {
    timeout: 30_000
  }, async () => {
    const c = await freshCollection()
    await insert(c, { id: "a", vector: [1, 0], metadata: { n: -1, text } })
    const slow = await SocketClient.open(node.base)
    const asked = { id: "q", session: "s", collection: c, query: [1, 0], include: ["metadata"], policy: "close" }
    const first = await slow.ask({ type: "subscribe", ...asked })
    slow.send({ type: "credit", session: "s", events: 1 })
    await insert(c, { id: "a", vector: [1, 0], metadata: { n: 0, text } })
    const changed = await slow.next()
    assert.strictEqual(changed.event, "changes")
    await insert(c, { id: "a", vector: [1, 0], metadata: { n: 1, text } })
    await insert(c, { id: "a", vector: [1, 0], metadata: { n: 2, text } })
    const closed = await slow.next()
    assert.deepInclude(closed, { event: "session_closed", session: "s", code: 4010 })
    const resumed = await slow.ask({ type: "resume", ...asked, cursor: changed["cursor"] })
    assert.strictEqual(resumed.event, "resumed")
    const [change] = resumed["changes"] as Array<{ type: string; metadata: { n: number } }>
    assert.deepInclude(change, { type: "update" })
    assert.strictEqual(change?.metadata.n, 2)
    assert.notStrictEqual(first["cursor"], changed["cursor"])
    await slow.close()
  })

  it("of event streams: one that waits has every change of the feed when it reads again", {
    timeout: 30_000
  }, async () => {
    const c = await freshCollection()
    await insert(c, { id: "a", vector: [1, 0] })
    const socket = net.connect(node.port, "127.0.0.1")
    let got = ""
    socket.on("data", (chunk) => (got += chunk.toString()))
    socket.write(`GET /api/v1/stream/changes?collection=${c} HTTP/1.1\r\nhost: localhost\r\n\r\n`)
    while (!got.includes("following")) await new Promise((resolve) => setTimeout(resolve, 5))
    socket.pause()
    const id = "i".repeat(500)
    const count = 6_000
    const before = process.memoryUsage().rss
    for (let n = 0; n < count; n += 1_000) {
      await insert(c, ...Array.from({ length: 1_000 }, (_, i) => ({ id: `${id}${n + i}`, vector: [1, i] })))
    }
    assert.isBelow(process.memoryUsage().rss - before, 200e6)
    socket.resume()
    const until = Date.now() + 20_000
    while (!got.includes(`${id}${count - 1}"`)) {
      assert.isBelow(Date.now(), until)
      await new Promise((resolve) => setTimeout(resolve, 20))
    }
    const ids = [...got.matchAll(/"vector_id":"i+(\d+)"/g)].map((match) => Number(match[1]))
    assert.deepStrictEqual(
      ids,
      Array.from({ length: count }, (_, i) => i)
    )
    socket.destroy()
  })
})

describe("a feed that does not reach back", () => {
  it("says resync, and goes on with the oldest that is kept", { timeout: 30_000 }, async () => {
    const short = await startNode({
      snapshotOps: 100,
      snapshotIdleMillis: 100,
      changeRetentionMillis: 0,
      changeBufferMax: 16
    })
    try {
      const post = async (first: number) => {
        const vectors = Array.from({ length: 150 }, (_, i) => ({ id: `v${first + i}`, vector: [1, i] }))
        const headers = { "content-type": "application/json" }
        await fetch(`${short.base}/api/v1/insert`, { method: "POST", headers, body: JSON.stringify({ vectors }) })
      }
      await post(0)
      const url = `${short.base}/api/v1/stream/changes`
      const [following] = await readSse(await fetch(`${url}?from=oldest`), (events) => events.length >= 1)
      const until = Date.now() + 20_000
      const headers = { "last-event-id": following?.id ?? "" }
      const isResync = ({ data }: { readonly data: Event }) => data.event === "resync"
      let events: Awaited<ReturnType<typeof readSse>> = []
      let at = -1
      for (let n = 1; at === -1; n++) {
        assert.isBelow(Date.now(), until, "the log was not pruned")
        await post(n * 150)
        await new Promise((resolve) => setTimeout(resolve, 250))
        const all = 1 + (n + 1) * 150
        events = await readSse(
          await fetch(url, { headers }),
          (so) => so.length >= all || so.slice(0, -1).some(isResync)
        )
        at = events.findIndex(isResync)
      }
      const idsOf = (of: typeof events) => of.map(({ data }) => data["vector_id"])
      // Whatever is still to be had before what is gone comes before that is said.
      assert.deepStrictEqual(
        idsOf(events.slice(1, at)),
        Array.from({ length: at - 1 }, (_, i) => `v${i}`)
      )
      // From the oldest on nothing is missing, and so nothing is said.
      const [first, second] = await readSse(await fetch(`${url}?from=oldest`), (so) => so.length >= 2)
      assert.deepStrictEqual([first?.data.event, second?.data.event], ["following", "change"])
      assert.strictEqual(second?.data["vector_id"], events[at + 1]?.data["vector_id"])
      assert.isAbove(Number(String(second?.data["vector_id"]).slice(1)), at - 1)
    } finally {
      await short.stop()
    }
  })
})
