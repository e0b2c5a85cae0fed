/** One port: the same answers over HTTP/1.1 and HTTP/2, whatever the first packets look like. */
import * as net from "node:net"
import { afterAll, assert, beforeAll, describe, it } from "@effect/vitest"
import { answerOf, Http2Client } from "../support/Http2Client.ts"
import { type RunningNode, startNode } from "../support/Node.ts"
import { readSse, SocketClient } from "../support/Streams.ts"

let node: RunningNode
let h2: Http2Client

beforeAll(async () => {
  node = await startNode({ maxBodyBytes: 100_000, pingIntervalMillis: 300, idleTimeoutMillis: 1_500 })
  h2 = await Http2Client.open(node.base)
  const vectors = Array.from({ length: 50 }, (_, i) => ({
    id: `v${i}`,
    vector: [1, i, i * i],
    metadata: { i, text: "x".repeat(5_000) }
  }))
  const inserted = []
  for (let i = 0; i < 50; i += 10) inserted.push(await h2.json("/api/v1/insert", { vectors: vectors.slice(i, i + 10) }))
  assert.deepStrictEqual(
    inserted.map(({ text }) => text),
    inserted.map(() => '{"inserted":10}')
  )
})
afterAll(async () => {
  h2.close()
  await node.stop()
})

const volatile = new Set(["date", "connection", "keep-alive", "transfer-encoding", "x-request-id", "content-length"])
const stable = (headers: Iterable<readonly [string, unknown]>) =>
  Object.fromEntries([...headers].filter(([name]) => !volatile.has(name) && !name.startsWith(":")).toSorted())
const timeless = (text: string) =>
  text.replaceAll(/"query_id":"[^"]*"|"took_ms":[\d.]+|"version":"[^"]*"|^id: s_.*$/gm, "")

describe("HTTP/1.1 and HTTP/2 in the clear on one port", () => {
  const calls: ReadonlyArray<readonly [method: string, path: string, body?: string]> = [
    ["GET", "/health/ready"],
    ["GET", "/"],
    ["GET", "/openapi.json"],
    ["GET", "/docs"],
    ["GET", "/api/v1/collections"],
    ["GET", "/api/v1/embed/v7"],
    ["GET", "/api/v1/embed/nobody"],
    ["GET", "/api/v1/search?query_vector_id=v3&k=4"],
    ["GET", "/api/v1/stream/search?query_vector_id=v3&k=4"],
    ["GET", "/api/v1/stream/search?query_vector_id=nobody"],
    ["GET", "/nothing/here"],
    ["DELETE", "/api/v1/search"],
    ["POST", "/api/v1/search", '{"query":[1,2,3],"k":5,"include":["metadata","vector"]}'],
    ["POST", "/api/v1/search", '{"query":[1,2],"k":5}'],
    ["POST", "/api/v1/search", "{"],
    ["POST", "/api/v1/search", "x".repeat(100_001)],
    ["POST", "/api/v1/insert", '{"vectors":[{"id":"x","vector":[3,2,1]}]}'],
    ["POST", "/api/v1/insert", "x".repeat(100_001)],
    ["POST", "/api/v1/delete", '{"ids":["x"]}'],
    ["PATCH", "/api/v1/vectors/v9", '{"metadata":{"a":1}}'],
    ["PUT", "/api/v1/collections/c", '{"dimensions":3}'],
    ["DELETE", "/api/v1/collections/c"]
  ]
  for (const [method, path, body] of calls) {
    it(`${method} ${path} ${body?.slice(0, 40) ?? ""}`, async () => {
      const type: Record<string, string> = body === undefined ? {} : { "content-type": "application/json" }
      const overHttp1 = () =>
        fetch(`${node.base}${path}`, { method, headers: type, ...(body === undefined ? {} : { body }) })
      // The first may change something; those compared come to the same.
      await (await overHttp1()).text()
      const one = await overHttp1()
      const two = await h2.ask(path, body, { ":method": method, ...type })
      assert.deepStrictEqual(
        { status: two.status, headers: stable(Object.entries(two.headers)), text: timeless(two.text) },
        { status: one.status, headers: stable(one.headers), text: timeless(await one.text()) }
      )
      assert.match(String(two.headers["x-request-id"]), /^req_/)
      assert.isBelow(two.status, 500)
    })
  }

  it("an RPC call over HTTP/2", async () => {
    const call = (id: string) =>
      `${JSON.stringify({ _tag: "Request", id, tag: "ListCollections", payload: null, headers: [] })}\n`
    const two = await h2.ask("/api/v1/rpc", call("1"), { "content-type": "application/ndjson" })
    const one = await fetch(`${node.base}/api/v1/rpc`, {
      method: "POST",
      headers: { "content-type": "application/ndjson" },
      body: call("1")
    })
    assert.strictEqual(two.status, one.status)
    assert.strictEqual(two.text, await one.text())
  })

  it("a kept-open event stream goes on beside searches on its session, and is told when it is quiet", async () => {
    const client = await Http2Client.open(node.base)
    const stream = client.session.request({ ":path": "/api/v1/stream/search?query_vector_id=v1&k=2&keep_open=true" })
    let text = ""
    stream.setEncoding("utf8")
    stream.on("data", (chunk: string) => (text += chunk))
    const until = Date.now() + 5_000
    while (!text.includes(": keep-alive")) {
      const searched = await client.json("/api/v1/search", { query: [1, 2, 3], k: 1 })
      assert.strictEqual(searched.status, 200)
      assert.isBelow(Date.now(), until)
      await new Promise((resolve) => setTimeout(resolve, 20))
    }
    assert.include(text, '"search_complete"')
    client.close()
  })

  it("an event stream resumes over the other protocol", async () => {
    const path = "/api/v1/stream/search?query_vector_id=v9&k=20"
    const whole = await readSse(await fetch(`${node.base}${path}&keep_open=true`), (events) => events.length >= 22)
    const rest = await h2.ask(path, undefined, { "last-event-id": whole[4]?.id ?? "" })
    const datas = [...rest.text.matchAll(/^data: (.*)$/gm)].map((match) => JSON.parse(match[1] as string))
    assert.deepStrictEqual(
      datas,
      whole.slice(5).map(({ data }) => data)
    )
  })

  it("a search that is cancelled leaves its session as it was", async () => {
    for (let i = 0; i < 50; i++) {
      const stream = h2.session.request({ ":path": "/api/v1/search", ":method": "POST" })
      stream.end('{"query":[1,2,3],"k":50,"include":["metadata"]}')
      stream.close(8)
      await answerOf(stream)
    }
    assert.strictEqual((await h2.json("/api/v1/search", { query: [1, 2, 3] })).status, 200)
  })

  it("a WebSocket beside them", async () => {
    const client = await SocketClient.open(node.base)
    assert.strictEqual((await client.ask({ type: "search", query: [1, 2, 3], k: 1 })).event, "results")
    await client.close()
  })

  it("gRPC is told apart by its content type, and answered in its own words", async () => {
    const answer = await h2.ask("/ruvector.VectorSearch/StreamSearch", Buffer.alloc(5), {
      "content-type": "application/grpc+proto",
      te: "trailers"
    })
    assert.strictEqual(answer.status, 200)
    assert.strictEqual(answer.headers["grpc-status"], "12")
    assert.strictEqual((await h2.ask("/health/live")).status, 200)
  })
})

describe("the first bytes of a connection", () => {
  const settings = Buffer.from([0, 0, 0, 4, 0, 0, 0, 0, 0])
  const preface = Buffer.concat([Buffer.from("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), settings])
  const http1 = Buffer.from("PUT /health/live HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")

  /** Sends bytes in pieces of a size, each a packet of its own, and reads for as long as `enough` says no. */
  const inPieces = (bytes: Buffer, size: number, enough: (read: Buffer) => boolean): Promise<Buffer> =>
    new Promise((resolve, reject) => {
      const socket = net.connect(node.port, "127.0.0.1")
      socket.setNoDelay(true)
      let read = Buffer.alloc(0)
      let at = 0
      const next = () => {
        if (at >= bytes.length) return
        socket.write(bytes.subarray(at, at + size))
        at += size
        setTimeout(next, 1)
      }
      socket.on("connect", next)
      socket.on("data", (chunk) => {
        read = Buffer.concat([read, chunk])
        if (enough(read)) socket.destroy()
      })
      socket.on("error", reject)
      socket.on("close", () => resolve(read))
    })

  for (const size of [1, 2, 3, 4, 5, 23, 24, 25, 1_000]) {
    it(`in pieces of ${size}`, async () => {
      // Of HTTP/2 the server's settings (type 4) and its acknowledgement of ours (type 4, flag 1).
      const isAcknowledged = (read: Buffer) => read.includes(Buffer.from([0, 0, 0, 4, 1, 0, 0, 0, 0]))
      const two = await inPieces(preface, size, isAcknowledged)
      assert.strictEqual(two[3], 4)
      assert.isTrue(isAcknowledged(two))
      // `P` may still become either.
      assert.match((await inPieces(http1, size, () => false)).toString(), /^HTTP\/1\.1 405 /)
    })
  }

  it("a preface that turns out wrong is refused, and nobody else notices", async () => {
    const wrong = await inPieces(Buffer.from("PRI / HTTP/1.1\r\nhost: localhost\r\n\r\n"), 100, () => false)
    assert.notMatch(wrong.toString("latin1"), /^HTTP\/1\.1 2/)
    assert.strictEqual((await h2.ask("/health/live")).status, 200)
  })
})
