/**
 * Hostile input: whatever arrives, the answer is a typed problem that names what was wrong, and the node goes on serving.
 */
import * as net from "node:net"
import { afterAll, assert, beforeAll, describe, it } from "@effect/vitest"
import { type RunningNode, startNode } from "../support/Node.ts"
import { type Random, random, seedOf } from "../support/Seeded.ts"
import { SocketClient } from "../support/Streams.ts"

let node: RunningNode

beforeAll(async () => {
  node = await startNode({
    maxBodyBytes: 1_000_000,
    maxFrameBytes: 500_000,
    headersTimeoutMillis: 1_000,
    requestTimeoutMillis: 1_500
  })
  await send("PUT", "/api/v1/collections/c", '{"dimensions":3}')
  await send("PUT", "/api/v1/collections/l2", '{"dimensions":3,"metric":"l2"}')
  await send("POST", "/api/v1/insert", '{"collection":"c","vectors":[{"id":"a","vector":[1,2,3]}]}')
})
afterAll(() => node.stop())

interface Answer {
  readonly status: number
  readonly body: Record<string, unknown> | undefined
}

const send = async (
  method: string,
  path: string,
  body?: string | Buffer,
  headers: Record<string, string> = {}
): Promise<Answer> => {
  const response = await fetch(`${node.base}${path}`, {
    method,
    headers: { ...(body === undefined ? {} : { "content-type": "application/json" }), ...headers },
    ...(body === undefined ? {} : { body: typeof body === "string" ? body : new Uint8Array(body) })
  })
  const text = await response.text()
  return { status: response.status, body: text === "" ? undefined : JSON.parse(text) }
}

const deep = (levels: number): unknown => (levels === 0 ? 1 : { a: deep(levels - 1) })

describe("bad input is named", () => {
  const insert = (record: unknown) => JSON.stringify({ collection: "c", vectors: [record] })
  const cases: ReadonlyArray<readonly [string, string, string, string | undefined, number, string]> = [
    ["wrong dimension", "POST", "/api/v1/insert", insert({ id: "x", vector: [1, 2] }), 400, "vectors[0].vector"],
    ["wrong dimension of a query", "POST", "/api/v1/search", '{"collection":"c","query":[1]}', 400, "query"],
    ["NaN", "POST", "/api/v1/insert", '{"collection":"c","vectors":[{"id":"x","vector":[1,2,NaN]}]}', 400, ""],
    [
      "null for a number",
      "POST",
      "/api/v1/insert",
      insert({ id: "x", vector: [1, null, 3] }),
      400,
      "vectors[0].vector[1]"
    ],
    [
      "infinity",
      "POST",
      "/api/v1/insert",
      '{"collection":"c","vectors":[{"id":"x","vector":[1,2,1e999]}]}',
      400,
      "vectors[0].vector[2]"
    ],
    [
      "beyond float32",
      "POST",
      "/api/v1/insert",
      insert({ id: "x", vector: [1, 2, 1e39] }),
      400,
      "vectors[0].vector[2]"
    ],
    [
      "zero vector under cosine",
      "POST",
      "/api/v1/insert",
      insert({ id: "x", vector: [0, 0, 0] }),
      400,
      "vectors[0].vector"
    ],
    ["zero query under cosine", "POST", "/api/v1/search", '{"collection":"c","query":[0,0,0]}', 400, "query"],
    ["empty vector", "POST", "/api/v1/insert", insert({ id: "x", vector: [] }), 400, "vectors[0].vector"],
    [
      "strings for numbers",
      "POST",
      "/api/v1/insert",
      insert({ id: "x", vector: ["1", 2, 3] }),
      400,
      "vectors[0].vector[0]"
    ],
    ["k 0", "POST", "/api/v1/search", '{"collection":"c","query":[1,2,3],"k":0}', 400, "k"],
    ["k too large", "POST", "/api/v1/search", '{"collection":"c","query":[1,2,3],"k":10001}', 400, "k"],
    ["k fractional", "POST", "/api/v1/search", '{"collection":"c","query":[1,2,3],"k":1.5}', 400, "k"],
    ["ef below k", "POST", "/api/v1/search", '{"collection":"c","query":[1,2,3],"k":10,"ef":5}', 400, "ef"],
    ["no query", "POST", "/api/v1/search", '{"collection":"c"}', 400, "query"],
    ["two queries", "POST", "/api/v1/search", '{"collection":"c","query":[1,2,3],"query_vector_id":"a"}', 400, "query"],
    ["another metric", "POST", "/api/v1/search", '{"collection":"c","query":[1,2,3],"metric":"l2"}', 400, "metric"],
    ["unknown collection", "POST", "/api/v1/search", '{"collection":"nope","query":[1,2,3]}', 404, "collection"],
    [
      "insert into an unknown collection",
      "POST",
      "/api/v1/insert",
      '{"collection":"nope","vectors":[{"id":"x","vector":[1]}]}',
      404,
      "collection"
    ],
    ["unknown id", "GET", "/api/v1/embed/nobody?collection=c", undefined, 404, "id"],
    ["unknown query id", "POST", "/api/v1/search", '{"collection":"c","query_vector_id":"nobody"}', 404, "id"],
    ["bad JSON", "POST", "/api/v1/search", '{"query":', 400, ""],
    ["empty body", "POST", "/api/v1/search", "", 400, ""],
    ["not an object", "POST", "/api/v1/search", "[]", 400, ""],
    ["unknown field", "POST", "/api/v1/search", '{"collection":"c","query":[1,2,3],"kk":1}', 400, "kk"],
    [
      "over-long id",
      "POST",
      "/api/v1/insert",
      insert({ id: "x".repeat(513), vector: [1, 2, 3] }),
      400,
      "vectors[0].id"
    ],
    [
      "over-long id in bytes",
      "POST",
      "/api/v1/insert",
      insert({ id: "ü".repeat(257), vector: [1, 2, 3] }),
      400,
      "vectors[0].id"
    ],
    ["empty id", "POST", "/api/v1/insert", insert({ id: "", vector: [1, 2, 3] }), 400, "vectors[0].id"],
    [
      "control character in an id",
      "POST",
      "/api/v1/insert",
      insert({ id: "a\u0000b", vector: [1, 2, 3] }),
      400,
      "vectors[0].id"
    ],
    [
      "metadata too large",
      "POST",
      "/api/v1/insert",
      insert({ id: "x", vector: [1, 2, 3], metadata: { a: "x".repeat(65_536) } }),
      400,
      "vectors[0].metadata"
    ],
    [
      "metadata too deep",
      "POST",
      "/api/v1/insert",
      insert({ id: "x", vector: [1, 2, 3], metadata: deep(17) }),
      400,
      "vectors[0].metadata"
    ],
    [
      "metadata an array",
      "POST",
      "/api/v1/insert",
      insert({ id: "x", vector: [1, 2, 3], metadata: [] }),
      400,
      "vectors[0].metadata"
    ],
    ["no vectors", "POST", "/api/v1/insert", '{"collection":"c","vectors":[]}', 400, "vectors"],
    [
      "filter without meaning",
      "POST",
      "/api/v1/search",
      '{"collection":"c","query":[1,2,3],"filter":{"a":{"near":1}}}',
      400,
      "filter.a.near"
    ],
    [
      "filter too deep",
      "POST",
      "/api/v1/search",
      `{"collection":"c","query":[1,2,3],"filter":${'{"not":'.repeat(20)}{"a":1}${"}".repeat(20)}}`,
      400,
      ""
    ],
    ["warming of nothing", "POST", "/api/v1/warm", "{}", 400, "ids"],
    ["warming of no ids", "POST", "/api/v1/warm", '{"collection":"c","ids":[]}', 400, "ids"],
    [
      "warming of a list and a window",
      "POST",
      "/api/v1/warm",
      '{"collection":"c","ids":["a"],"window":{"last_minutes":5}}',
      400,
      "ids"
    ],
    ["warming of an id that is none", "POST", "/api/v1/warm", '{"collection":"c","ids":["a",7]}', 400, "ids[1]"],
    ["warming of a window without an end", "POST", "/api/v1/warm", '{"window":{"from_ms":1}}', 400, "window"],
    [
      "warming of a window that ends before it begins",
      "POST",
      "/api/v1/warm",
      '{"window":{"from_ms":2,"to_ms":1}}',
      400,
      "window.to_ms"
    ],
    [
      "warming of two windows",
      "POST",
      "/api/v1/warm",
      '{"window":{"from_ms":1,"to_ms":2,"last_minutes":1}}',
      400,
      "window"
    ],
    [
      "warming of a window without measure",
      "POST",
      "/api/v1/warm",
      '{"window":{"last_minutes":1e9}}',
      400,
      "window.last_minutes"
    ],
    ["warming beyond its limit", "POST", "/api/v1/warm", '{"window":{"last_minutes":5},"limit":100001}', 400, "limit"],
    [
      "warming of an unknown collection",
      "POST",
      "/api/v1/warm",
      '{"collection":"nope","ids":["a"]}',
      404,
      "collection"
    ],
    ["tier events from nowhere", "GET", "/api/v1/tiers/events?after=-1", undefined, 400, "after"],
    ["tier events with another parameter", "GET", "/api/v1/tiers/events?before=1", undefined, 400, "before"],
    ["bad collection name", "PUT", "/api/v1/collections/.hidden", '{"dimensions":3}', 400, "name"],
    ["dimensions 0", "PUT", "/api/v1/collections/n", '{"dimensions":0}', 400, "dimensions"],
    ["dimensions 4097", "PUT", "/api/v1/collections/n", '{"dimensions":4097}', 400, "dimensions"],
    ["unknown metric", "PUT", "/api/v1/collections/n", '{"dimensions":3,"metric":"hamming"}', 400, "metric"],
    ["unknown path", "GET", "/api/v2/anything", undefined, 404, "path"],
    ["wrong method", "DELETE", "/api/v1/search", undefined, 405, "method"],
    [
      "parameter twice",
      "GET",
      "/api/v1/search?query_vector_id=a&query_vector_id=b&collection=c",
      undefined,
      400,
      "query_vector_id"
    ]
  ]
  for (const [what, method, path, body, status, field] of cases) {
    it(what, async () => {
      const answer = await send(method, path, body)
      assert.strictEqual(answer.status, status, JSON.stringify(answer.body))
      for (const member of ["type", "title", "detail", "code"]) assert.isString(answer.body?.[member])
      for (const member of ["expected", "got"])
        assert.isString(answer.body?.[member], `${member}: ${JSON.stringify(answer.body)}`)
      if (what !== "filter too deep") assert.strictEqual(answer.body?.["field"], field, JSON.stringify(answer.body))
      else assert.match(String(answer.body?.["field"]), /^filter/)
    })
  }

  it("an insert with one bad vector inserts none of them", async () => {
    const vectors = [
      { id: "good", vector: [1, 2, 3] },
      { id: "bad", vector: [1] }
    ]
    assert.strictEqual((await send("POST", "/api/v1/insert", JSON.stringify({ collection: "c", vectors }))).status, 400)
    assert.strictEqual((await send("GET", "/api/v1/embed/good?collection=c")).status, 404)
  })

  it("a body over the bound is 413, a compressed or foreign one 415", async () => {
    const large = await send("POST", "/api/v1/insert", "x".repeat(1_000_001))
    assert.deepInclude(large.body, { status: 413, code: "too_large" })
    const form = await send("POST", "/api/v1/search", "a=b", { "content-type": "application/x-www-form-urlencoded" })
    assert.deepInclude(form.body, { status: 415, code: "unsupported_media_type" })
    const encoded = await send("POST", "/api/v1/search", "{}", { "content-encoding": "compress" })
    assert.strictEqual(encoded.status, 415)
    const latin1 = await send("POST", "/api/v1/search", Buffer.from([0x22, 0xe9, 0x22]))
    assert.strictEqual(latin1.status, 400)
  })

  it("a frame over the bound closes with 1009", async () => {
    const client = await SocketClient.open(node.base)
    client.send("x".repeat(500_001))
    assert.strictEqual((await client.closed).code, 1009)
  })

  it("names like __proto__ and constructor are data", async () => {
    const metadata = '{"__proto__":{"polluted":true},"constructor":1,"and":2}'
    const body = `{"collection":"c","vectors":[{"id":"__proto__","vector":[1,1,1],"metadata":${metadata}}]}`
    assert.strictEqual((await send("POST", "/api/v1/insert", body)).status, 200)
    const read = await fetch(`${node.base}/api/v1/embed/__proto__?collection=c`)
    assert.include(await read.text(), '"constructor":1')
    assert.isUndefined(({} as { polluted?: boolean }).polluted)
    const patched = await send("PATCH", "/api/v1/vectors/__proto__?collection=c", '{"metadata":{"toString":"x"}}')
    assert.strictEqual(patched.status, 200)
  })
})

describe("raw bytes on the port", () => {
  const raw = (bytes: string | Buffer, end = false): Promise<string> =>
    new Promise((resolve) => {
      const socket = net.connect(node.port, "127.0.0.1", () => (end ? socket.end(bytes) : socket.write(bytes)))
      let text = ""
      socket.on("data", (chunk) => (text += chunk.toString("latin1")))
      socket.on("error", () => {})
      socket.once("close", () => resolve(text))
    })

  it("what is not HTTP is 400; headers over the bound are 431; a request that never ends is cut", async () => {
    assert.match(await raw("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"), /^HTTP\/1\.1 400 /)
    assert.match(await raw(`GET / HTTP/1.1\r\nhost: x\r\nx: ${"y".repeat(20_000)}\r\n\r\n`), /^HTTP\/1\.1 431 /)
    assert.match(await raw("GET / HTTP/1.1\r\nhost: x\r\nx: "), /^HTTP\/1\.1 408 /)
    assert.match(
      await raw(
        'POST /api/v1/search HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"que'
      ),
      /^(HTTP\/1\.1 (408|400) |$)/
    )
    assert.strictEqual((await send("GET", "/health/live")).status, 200)
  })

  it("an upgrade to a path or protocol that is not ours is refused", async () => {
    const upgrade = (path: string, headers: string) =>
      raw(`GET ${path} HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\n${headers}\r\n\r\n`)
    assert.match(
      await upgrade(
        "/api/v1/nothing",
        "upgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA=="
      ),
      /^HTTP\/1\.1 4\d\d /
    )
    assert.match(await upgrade("/api/v1/ws", "upgrade: websocket"), /^HTTP\/1\.1 4\d\d /)
  })
})

describe("random and mutated input", () => {
  const bodies = [
    '{"collection":"c","query":[1,2,3],"k":3,"ef":50,"filter":{"a":{"in":[1,2]}},"include":["metadata"],"deadline_ms":1000}',
    '{"collection":"c","vectors":[{"id":"m","vector":[1,2,3],"metadata":{"a":1,"b":["x"]}}],"ack":"cold"}',
    '{"collection":"c","ids":["m","n"]}',
    '{"metadata":{"a":null,"b":{"c":1}}}',
    '{"dimensions":3,"metric":"cosine","partitions":1,"index":{"m":16}}',
    '{"type":"search","id":"1","collection":"c","query":[1,2,3],"k":3,"stream":true}',
    '{"type":"insert","id":"2","collection":"c","vectors":[{"id":"m","vector":[1,2,3]}]}'
  ]
  const paths: ReadonlyArray<readonly [string, string]> = [
    ["POST", "/api/v1/search"],
    ["POST", "/api/v1/insert"],
    ["POST", "/api/v1/delete"],
    ["PATCH", "/api/v1/vectors/a?collection=c"],
    ["PUT", "/api/v1/collections/c"]
  ]

  it("5,000 bodies: never a 5xx, a hang or a crash; every refusal is a problem", { timeout: 120_000 }, async () => {
    const source = random(seedOf(41))
    for (let round = 0; round < 250; round++) {
      await Promise.all(
        Array.from({ length: 20 }, async () => {
          const [method, path] = source.pick(paths)
          const body = mutate(source, source.pick(bodies))
          const answer = await send(method, path, body)
          const shown = `seed ${source.seed}: ${method} ${path} ${body.toString("latin1")} -> ${JSON.stringify(answer)}`
          assert.isBelow(answer.status, 500, shown)
          if (answer.status >= 400) {
            assert.isString(answer.body?.["code"], shown)
            assert.isString(answer.body?.["detail"], shown)
          }
        })
      )
    }
    assert.strictEqual((await send("GET", "/health/ready")).status, 200)
  })

  it("5,000 frames: each is answered, or ends its connection with a code; others are served", {
    timeout: 120_000
  }, async () => {
    const source = random(seedOf(42))
    let client = await SocketClient.open(node.base)
    for (let n = 0; n < 5_000; n++) {
      const frame = mutate(source, source.pick(bodies))
      client.socket.send(frame, { binary: source.below(4) === 0 })
      // In bursts; a ping tells that all before it were taken.
      if (n % 50 !== 49) continue
      client.send({ type: "ping", id: `sync${n}` })
      const synced = (async () => {
        for (;;) {
          const event = await client.next()
          assert.notStrictEqual(
            (event["problem"] as { status?: number } | undefined)?.status,
            500,
            JSON.stringify(event)
          )
          if (event["id"] === `sync${n}`) return
        }
      })()
      const ended = client.closed.then(({ code }) => {
        assert.include([1002, 1003, 1007, 1009], code, `seed ${source.seed}`)
        return "closed" as const
      })
      if ((await Promise.race([synced, ended])) === "closed") client = await SocketClient.open(node.base)
    }
    await client.close()
    assert.strictEqual((await send("GET", "/health/ready")).status, 200)
  })
})

const tokens = [
  "null",
  "true",
  "-1",
  "1e400",
  '""',
  "[]",
  "{}",
  '"\\ud800"',
  "9007199254740993",
  '"__proto__"',
  "[[[[]]]]",
  "NaN",
  ","
]

/** A valid text with bytes flipped, cut, doubled, or values put in the place of others. */
const mutate = (source: Random, text: string): Buffer => {
  let mutated = text
  const times = source.below(4)
  for (let i = 0; i < times; i++) {
    const at = source.below(mutated.length + 1)
    switch (source.below(6)) {
      case 0:
        mutated = mutated.slice(0, at)
        break
      case 1:
        mutated = mutated.slice(0, at) + source.pick(tokens) + mutated.slice(at)
        break
      case 2:
        mutated = mutated.replace(source.pick([/\d+/, /"[^"]*"/, /\[[^\]]*\]/, /\{[^{}]*\}/]), () =>
          source.pick(tokens)
        )
        break
      case 3:
        mutated = mutated.slice(0, at) + mutated.slice(source.below(mutated.length + 1))
        break
      case 4:
        mutated += mutated
        break
      default: {
        const bytes = Buffer.from(mutated)
        if (bytes.length > 0) bytes[source.below(bytes.length)] = source.below(256)
        return bytes
      }
    }
  }
  return Buffer.from(mutated)
}
