/**
 * Limits of a public server, on every wire: each attacker is refused or cut, told why where it can be, and a client that
 * behaves is served meanwhile.
 */
import * as net from "node:net"
import * as Zlib from "node:zlib"
import { afterAll, assert, beforeAll, describe, it } from "@effect/vitest"
import { answerOf, Http2Client } from "../support/Http2Client.ts"
import { type RunningNode, startNode } from "../support/Node.ts"
import { fields, frame, get, goawayCode, preface, RawClient } from "../support/RawClient.ts"
import { SocketClient } from "../support/Streams.ts"

let node: RunningNode

beforeAll(async () => {
  node = await startNode({
    sniffTimeoutMillis: 600,
    headersTimeoutMillis: 600,
    requestTimeoutMillis: 1_200,
    keepAliveTimeoutMillis: 800,
    pingIntervalMillis: 300,
    idleTimeoutMillis: 900,
    maxBodyBytes: 4 << 20,
    outboundBytesMax: 1 << 20,
    bodyRatioMax: 20,
    h2StreamsMax: 8,
    h2ResetsBurst: 20,
    h2ResetsPerSecond: 1,
    h2OverheadBytesPerSecond: 4_096
  })
  const vectors = Array.from({ length: 60 }, (_, i) => ({
    id: `v${i}`,
    vector: [1, i, i * i],
    metadata: { text: "x".repeat(60_000) }
  }))
  const inserted = await post("/api/v1/insert", JSON.stringify({ vectors }))
  assert.deepStrictEqual(inserted, { status: 200, body: { inserted: 60 } })
})
afterAll(() => node.stop())

const post = async (path: string, body: string | Buffer, headers: Record<string, string> = {}) => {
  const response = await fetch(`${node.base}${path}`, {
    method: "POST",
    headers: { "content-type": "application/json", ...headers },
    body: typeof body === "string" ? body : new Uint8Array(body)
  })
  return { status: response.status, body: (await response.json()) as Record<string, unknown> }
}

const refusals = async (reason: string): Promise<number> => {
  const text = await (await fetch(`${node.base}/metrics`)).text()
  return Number(new RegExp(`ruvector_port_refusals\\{reason="${reason}"\\} (\\d+)`).exec(text)?.[1] ?? 0)
}

const served = async () => {
  const { status } = await post("/api/v1/search", '{"query":[1,2,3],"k":1}')
  assert.strictEqual(status, 200)
}

const problem = (text: string) => JSON.parse(text.slice(text.indexOf("{"))) as Record<string, unknown>

describe("peers that take their time", () => {
  it("HTTP/1.1: headers, body, and a connection that says nothing", async () => {
    const head = "POST /api/v1/search HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    const slow = [
      new RawClient(node.port),
      new RawClient(node.port, "P"),
      new RawClient(node.port, "PR"),
      new RawClient(node.port, head),
      new RawClient(node.port, `${head}content-length: 100\r\n\r\n{"que`)
    ]
    const trickling = new RawClient(node.port, head)
    slow.push(trickling)
    const timer = setInterval(() => trickling.socket.write("x: y\r\n"), 50)
    for (const { closed } of slow) {
      const text = await closed
      assert.match(text, /^HTTP\/1\.1 408 /)
      assert.deepInclude(problem(text), { status: 408, code: "request_timeout" })
      await served()
    }
    clearInterval(timer)
  })

  it("HTTP/2: no request, headers that never end, and a body that never ends", async () => {
    const idle = new RawClient(node.port, preface)
    const headers = new RawClient(node.port, Buffer.concat([preface, frame(1, 0, 1, get("/health/live"))]))
    const timer = setInterval(() => headers.socket.write(frame(9, 0, 1, fields({ x: "y" }))), 100)
    const half = new RawClient(node.port, Buffer.concat([preface, Buffer.from([0, 0, 8])]))
    const client = await Http2Client.open(node.base)
    const stream = client.session.request({ ":method": "POST", ":path": "/api/v1/search" })
    stream.write('{"query":[')
    const dribble = setInterval(() => stream.write(" "), 100)
    const late = await answerOf(stream)
    clearInterval(dribble)
    assert.strictEqual(late.status, 408)
    assert.deepInclude(JSON.parse(late.text) as object, { status: 408, code: "request_timeout" })
    // Its session goes on.
    assert.strictEqual((await client.json("/api/v1/search", { query: [1, 2, 3] })).status, 200)
    client.close()
    assert.strictEqual(goawayCode(await idle.closed), 0)
    await headers.closed
    await half.closed
    clearInterval(timer)
    assert.isAtLeast(await refusals("headersTimeoutMillis"), 2)
    assert.isAtLeast(await refusals("requestTimeoutMillis"), 1)
    await served()
  })

  it("HTTP/2 sessions without a request are ended, those with a stream are not", async () => {
    const quiet = await Http2Client.open(node.base)
    const open = await Http2Client.open(node.base)
    assert.strictEqual((await quiet.ask("/health/live")).status, 200)
    const stream = open.session.request({ ":path": "/api/v1/stream/search?query_vector_id=v1&k=1&keep_open=true" })
    stream.resume()
    await quiet.closed
    assert.strictEqual(quiet.goaway, 0)
    assert.isFalse(open.session.destroyed)
    assert.strictEqual((await open.ask("/health/live")).status, 200)
    open.close()
  })

  it("HTTP/2 peers that are gone without a word are found out by a ping", async () => {
    const path = "/api/v1/stream/search?query_vector_id=v1&k=1&keep_open=true"
    // It answers no ping: nothing more is ever sent.
    const gone = new RawClient(node.port, Buffer.concat([preface, frame(4, 1, 0), frame(1, 5, 1, get(path))]))
    const text = await gone.closed
    assert.include(text, '"search_complete"')
    assert.isAtLeast(await refusals("peer_gone"), 1)
  })

  it("answers that are not read end with their connection, on HTTP/1.1 and HTTP/2", { timeout: 30_000 }, async () => {
    const search = '{"query":[1,2,3],"k":60,"include":["metadata"]}'
    const head = `POST /api/v1/search HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: ${search.length}`
    const request = `${head}\r\n\r\n${search}`
    // One after the other on one connection, so that more waits than the system's buffers hold.
    const one = net.connect(node.port, "127.0.0.1")
    one.pause()
    one.on("error", () => {})
    one.write(request.repeat(20))
    const two = await Http2Client.open(node.base, { settings: { initialWindowSize: 0 } })
    // 3.6 MB and none taken: no more is made for it.
    const stalled = two.json("/api/v1/search", JSON.parse(search))
    while ((await refusals("outboundBytesMax")) === 0) {
      const more = await Promise.race([
        two.json("/api/v1/search", JSON.parse(search)),
        new Promise<undefined>((resolve) => setTimeout(resolve, 50, undefined))
      ])
      if (more !== undefined) assert.include([7, 11], more.resetCode)
    }
    const until = Date.now() + 20_000
    while ((await refusals("slow_reader")) < 2) {
      assert.isBelow(Date.now(), until)
      await served()
      await new Promise((resolve) => setTimeout(resolve, 100))
    }
    assert.notStrictEqual((await stalled).resetCode, 0)
    one.destroy()
    two.close()
  })
})

describe("HTTP/2 by its frames", () => {
  it("headers over the bound are 431 on both protocols, and the session goes on", async () => {
    const one = await fetch(`${node.base}/health/live`, { headers: { x: "y".repeat(65_536) } })
    assert.strictEqual(one.status, 431)
    assert.deepInclude((await one.json()) as object, { status: 431, code: "headers_too_large" })
    const client = await Http2Client.open(node.base, { maxSendHeaderBlockLength: 1 << 20 } as object)
    for (const size of [20_000, 65_536 - 200]) {
      const two = await client.ask("/health/live", undefined, { x: "y".repeat(size) })
      assert.strictEqual(two.status, 431)
      assert.deepInclude(JSON.parse(two.text) as object, { status: 431, code: "headers_too_large" })
    }
    const many = Object.fromEntries(Array.from({ length: 500 }, (_, i) => [`x-${i}`, "1"]))
    assert.notStrictEqual((await client.ask("/health/live", undefined, many)).status, 200)
    assert.strictEqual((await client.ask("/health/live")).status, 200)
    // Far beyond it the session is ended.
    assert.strictEqual((await client.ask("/health/live", undefined, { x: "y".repeat(500_000) })).status, 0)
    await client.closed
    await served()
  })

  it("streams beyond the bound are not opened", async () => {
    // A client that keeps no count of its own.
    const path = "/api/v1/stream/search?query_vector_id=v1&k=1&keep_open=true"
    const streams = Array.from({ length: 12 }, (_, i) => frame(1, 5, 2 * i + 1, get(path)))
    const client = new RawClient(node.port, Buffer.concat([preface, frame(4, 1, 0), ...streams]))
    // Those within the bound are opened; going on from there breaks the protocol.
    const text = await client.closed
    assert.isNotNaN(goawayCode(text))
    assert.isAtMost(text.match(/"search_complete"/g)?.length ?? 0, 8)
    await served()
  })

  it("rapid reset ends the session", async () => {
    const body = Buffer.from('{"query":[1,2,3],"k":60,"include":["metadata"]}')
    const search = fields({
      ":method": "POST",
      ":scheme": "http",
      ":authority": "localhost",
      ":path": "/api/v1/search",
      "content-type": "application/json"
    })
    const attacks = Array.from({ length: 200 }, (_, i) =>
      Buffer.concat([
        frame(1, 4, 2 * i + 1, search),
        frame(0, 1, 2 * i + 1, body),
        frame(3, 0, 2 * i + 1, Buffer.from([0, 0, 0, 8]))
      ])
    )
    const attacker = new RawClient(node.port, Buffer.concat([preface, frame(4, 1, 0), ...attacks]))
    assert.include([1, 2, 11], goawayCode(await attacker.closed))
    await served()
  })

  const noise: ReadonlyArray<readonly [string, Buffer]> = [
    ["pings", frame(6, 0, 0, Buffer.alloc(8))],
    ["settings", frame(4, 0, 0)],
    ["priorities", frame(2, 0, 1, Buffer.from([0, 0, 0, 0, 1]))],
    ["window updates", frame(8, 0, 0, Buffer.from([0, 0, 0, 1]))],
    ["frames of no known kind", frame(0xbb, 0, 0, Buffer.alloc(100))]
  ]
  it("floods of frames end the session", async () => {
    await Promise.all(
      noise.map(async ([what, piece]) => {
        const path = "/api/v1/stream/search?query_vector_id=v1&k=1&keep_open=true"
        const open = Buffer.concat([preface, frame(4, 1, 0), frame(1, 5, 1, get(path))])
        const text = await new RawClient(node.port, open).flood(Buffer.concat(Array(200).fill(piece)), 20)
        assert.isNotNaN(goawayCode(text), what)
      })
    )
    assert.isAtLeast(await refusals("h2OverheadBytesPerSecond"), 4)
    await served()
  })

  it("frames that break the protocol end the session and harm nobody", async () => {
    const wrong: ReadonlyArray<Buffer> = [
      frame(0, 0, 1, Buffer.from("data for no stream")),
      frame(1, 4, 2, get("/")),
      frame(9, 4, 1, get("/")),
      frame(1, 4, 1, Buffer.from([0xff, 0xff, 0xff, 0xff, 0xff])),
      frame(8, 0, 0, Buffer.from([0x7f, 0xff, 0xff, 0xff])),
      frame(5, 4, 1, Buffer.alloc(8)),
      Buffer.from([0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1])
    ]
    for (const bytes of wrong) {
      const client = new RawClient(node.port, Buffer.concat([preface, bytes]))
      assert.notStrictEqual(goawayCode(await client.closed), 0)
    }
    await served()
  })
})

describe("compressed bodies", () => {
  const ways: ReadonlyArray<readonly [string, (bytes: Buffer) => Buffer]> = [
    ["gzip", (bytes) => Zlib.gzipSync(bytes)],
    ["br", (bytes) => Zlib.brotliCompressSync(bytes, { params: { [Zlib.constants.BROTLI_PARAM_QUALITY]: 5 } })],
    ["zstd", (bytes) => Zlib.zstdCompressSync(bytes)]
  ]
  const call = `${JSON.stringify({ _tag: "Request", id: "1", tag: "ListCollections", payload: null, headers: [] })}\n`

  for (const [n, [coding, compress]] of ways.entries()) {
    const encoded = { "content-encoding": coding }
    it(`${coding}: read like those that are not, whichever wire`, async () => {
      const vectors = Array.from({ length: 100 }, (_, i) => ({
        id: `${coding}${i}`,
        vector: [i + 1, n + 2, Math.sin(i)]
      }))
      const body = Buffer.from(JSON.stringify({ vectors }))
      assert.deepStrictEqual(await post("/api/v1/insert", compress(body), encoded), {
        status: 200,
        body: { inserted: 100 }
      })
      const search = Buffer.from(`{"query_vector_id":"${coding}7","k":1}`)
      const found = await post("/api/v1/search", compress(search), encoded)
      assert.strictEqual((found.body["results"] as Array<{ vector_id: string }>)[0]?.vector_id, `${coding}7`)
      const client = await Http2Client.open(node.base)
      assert.strictEqual((await client.ask("/api/v1/search", compress(search), encoded)).status, 200)
      client.close()
      const rpc = await fetch(`${node.base}/api/v1/rpc`, {
        method: "POST",
        headers: { "content-type": "application/ndjson", ...encoded },
        body: new Uint8Array(compress(Buffer.from(call)))
      })
      assert.include(await rpc.text(), '"_tag":"Success"')
    })

    it(`${coding}: come whole, also of many pieces`, async () => {
      const textOf = (i: number) => `${i} `.repeat(100)
      const vectors = Array.from({ length: 1_500 }, (_, i) => ({
        id: `${coding}-${i}`,
        vector: [1, Math.sin(i), Math.cos(i)],
        metadata: { text: textOf(i) }
      }))
      const body = compress(Buffer.from(JSON.stringify({ vectors })))
      assert.deepStrictEqual(await post("/api/v1/insert", body, encoded), { status: 200, body: { inserted: 1_500 } })
      for (const i of [0, 700, 1_499]) {
        const response = await fetch(`${node.base}/api/v1/embed/${coding}-${i}`)
        const stored = (await response.json()) as { readonly metadata: { readonly text: string } }
        assert.strictEqual(stored.metadata.text, textOf(i))
      }
    })

    it(`${coding}: bombs are refused for what they become, long before they have`, async () => {
      const bomb = compress(Buffer.alloc(64 << 20, 32))
      const before = process.memoryUsage().rss
      for (const path of ["/api/v1/insert", "/api/v1/search"]) {
        const refused = await Promise.all(Array.from({ length: 16 }, () => post(path, bomb, encoded)))
        for (const { status, body } of refused) {
          assert.strictEqual(status, 413)
          assert.deepInclude(body, { code: "too_large", field: "decompressed body" })
        }
      }
      const rpc = await post("/api/v1/rpc", bomb, { ...encoded, "content-type": "application/ndjson" })
      assert.strictEqual(rpc.status, 413)
      // 33 bombs of 64 MB.
      assert.isBelow(process.memoryUsage().rss - before, 200e6)
      await served()
    })

    it(`${coding}: what is cut off, damaged or nothing of the kind is 400`, async () => {
      const whole = compress(Buffer.from(JSON.stringify({ query: [1, 2, 3], k: 3 })))
      const damaged = Buffer.from(whole)
      damaged.fill(0xff, whole.length >> 1)
      for (const bytes of [whole.subarray(0, whole.length - 3), damaged, Buffer.from("{}"), Buffer.alloc(0)]) {
        const { status, body } = await post("/api/v1/search", bytes, encoded)
        assert.strictEqual(status, 400, bytes.toString("hex"))
        assert.strictEqual(body["code"], "invalid_input")
      }
    })
  }

  it("other codings are 415, and several at once", async () => {
    for (const coding of ["deflate", "compress", "gzip, gzip", "gzip,br", "x"]) {
      const { status, body } = await post("/api/v1/search", "{}", { "content-encoding": coding })
      assert.strictEqual(status, 415)
      assert.include(String(body["detail"]), "gzip, br, zstd")
    }
    assert.strictEqual(
      (await post("/api/v1/search", '{"query":[1,2,3]}', { "content-encoding": "identity" })).status,
      200
    )
  })
})

describe("connections", () => {
  it("beyond the bound, in all and of one address, are told so; those that stand are served", async () => {
    const few = await startNode({
      connectionsMax: 6,
      connectionsPerIpMax: 3,
      trustedProxies: "none",
      maxHeaderBytes: 8_192
    })
    const held = [await SocketClient.open(few.base), await SocketClient.open(few.base)]
    const h2 = await Http2Client.open(few.base)
    const from = (localAddress: string) =>
      new Promise<string>((resolve) => {
        const socket = net.connect({ port: few.port, host: "127.0.0.1", localAddress })
        let text = ""
        socket.on("data", (chunk) => {
          text += chunk.toString()
        })
        socket.on("error", () => {})
        socket.once("close", () => resolve(text))
        socket.write("GET /health/live HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
      })
    const fourth = await from("127.0.0.1")
    assert.match(fourth, /^HTTP\/1\.1 429 .*\r\nretry-after: 1\r\n/s)
    assert.deepInclude(problem(fourth), { status: 429, code: "overloaded", field: "connectionsPerIpMax" })
    // Another address has connections of its own.
    assert.match(await from("127.0.0.2"), /^HTTP\/1\.1 200 /)
    const others = Array.from({ length: 3 }, () =>
      net.connect({ port: few.port, host: "127.0.0.1", localAddress: "127.0.0.3" })
    )
    await Promise.all(others.map((socket) => new Promise((resolve) => socket.once("connect", resolve))))
    const seventh = await from("127.0.0.4")
    assert.match(seventh, /^HTTP\/1\.1 503 /)
    assert.deepInclude(problem(seventh), { status: 503, code: "overloaded", field: "connectionsMax" })
    for (const client of held) assert.strictEqual((await client.ask({ type: "ping" })).event, "pong")
    assert.strictEqual((await h2.ask("/health/live")).status, 200)
    // Room again.
    for (const socket of others) socket.destroy()
    await held[0]?.close()
    const until = Date.now() + 5_000
    while (!(await from("127.0.0.1")).startsWith("HTTP/1.1 200 ")) assert.isBelow(Date.now(), until)
    h2.close()
    await held[1]?.close()
    await few.stop()
  })

  it("end after so many requests, without one being lost", async () => {
    const few = await startNode({ requestsPerConnectionMax: 3 })
    const request = "GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n"
    const one = new RawClient(few.port, request.repeat(3))
    const text = await one.closed
    assert.strictEqual(text.match(/HTTP\/1\.1 200 /g)?.length, 3)
    assert.match(text.slice(text.lastIndexOf("HTTP/1.1")), /\r\nconnection: close\r\n/i)
    const two = await Http2Client.open(few.base)
    const answers = await Promise.all(Array.from({ length: 3 }, () => two.ask("/health/live")))
    for (const { status } of answers) assert.strictEqual(status, 200)
    await two.closed
    assert.strictEqual(two.goaway, 0)
    await few.stop()
  })
})
