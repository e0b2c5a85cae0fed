/** What the RPC wire does with peers that do not keep to it: by hand-written messages, not by a client of Effect. */
import { once } from "node:events"
import { assert, describe, it } from "@effect/vitest"
import { Effect, Schema } from "effect"
import { type RpcMessage, RpcSerialization } from "effect/rpc"
import { WebSocket } from "ws"
import { closeCodes } from "../../src/protocol/Frames.ts"
import { RuvectorRpcs } from "../../src/protocol/Rpcs.ts"
import { bulky, endless, openRpcServer, startRpcServer } from "./rpcServer.ts"

type Message = Readonly<Record<string, unknown>> & { readonly _tag: string }

const request = (id: string | number, tag: string, payload: unknown, more: object = {}) =>
  JSON.stringify({ _tag: "Request", id, tag, payload, headers: [], ...more })

const line = (...args: Parameters<typeof request>) => `${request(...args)}\n`

const ok = { _tag: "Exit", requestId: "last", exit: { _tag: "Success", value: [] } }

const until = (condition: () => boolean) =>
  Effect.gen(function* () {
    while (!condition()) yield* Effect.sleep(5)
  }).pipe(Effect.timeout(15_000))

const post = Effect.fnUntraced(function* (
  url: string,
  body: RequestInit["body"],
  headers: Record<string, string>,
  more?: object
) {
  const response = yield* Effect.promise(() => fetch(url, { method: "POST", body: body as string, headers, ...more }))
  const text = yield* Effect.promise(() => response.text())
  return { status: response.status, type: response.headers.get("content-type"), text }
})

/** Messages of an NDJSON body. */
const messagesOf = (text: string): ReadonlyArray<Message> =>
  text
    .split("\n")
    .filter((part) => part !== "")
    .map((part) => JSON.parse(part) as Message)

const serverOf = Effect.fnUntraced(function* (...settings: Parameters<typeof startRpcServer>) {
  const server = yield* startRpcServer(...settings)
  const url = `http://127.0.0.1:${server.port}/api/v1/rpc`
  const ndjson = (body: string) => post(url, body, { "content-type": "application/ndjson" })
  return { ...server, url, ndjson }
})

/** A connection of `ws`, with the NDJSON messages it has been sent. */
const connect = Effect.fnUntraced(function* (port: number, path: string, options: WebSocket.ClientOptions = {}) {
  const socket = yield* Effect.acquireRelease(
    Effect.sync(() => new WebSocket(`ws://127.0.0.1:${port}${path}`, options)),
    (ws) => Effect.sync(() => ws.terminate())
  )
  const received: Array<Message> = []
  let closed: number | undefined
  socket.on("message", (data, isBinary) => {
    if (!isBinary) received.push(...messagesOf(data.toString()))
  })
  socket.on("close", (code) => {
    closed = code
  })
  socket.on("error", () => {})
  yield* Effect.promise(() => once(socket, "open"))
  return { socket, received, closedWith: () => closed }
})

const ndjsonPath = "/api/v1/rpc/ws/ndjson"

const defectsOf = (messages: ReadonlyArray<Message>) =>
  messages.filter(({ _tag }) => _tag === "Defect").map(({ defect }) => (defect as { message: string }).message)

describe("a body", () => {
  it.live("is answered in the encoding it came in", () =>
    Effect.gen(function* () {
      const { url } = yield* serverOf()
      for (const type of ["application/ndjson", "application/x-ndjson; charset=utf-8", "Application/NDJSON"]) {
        const answer = yield* post(url, line("last", "ListCollections", null), { "content-type": type })
        assert.deepStrictEqual([answer.status, answer.type], [200, "application/x-ndjson"])
        assert.deepStrictEqual(messagesOf(answer.text), [ok])
      }
    })
  )

  it.live("may leave out what says nothing: the last line's end, the headers, the payload of a call without one", () =>
    Effect.gen(function* () {
      const { ndjson } = yield* serverOf()
      const { text } = yield* ndjson('{"_tag":"Request","id":"last","tag":"ListCollections"}')
      assert.deepStrictEqual(messagesOf(text), [ok])
    })
  )

  it.live("carries several calls, of which a bad one fails alone", () =>
    Effect.gen(function* () {
      const { ndjson } = yield* serverOf()
      const { text } = yield* ndjson(
        line(1, "Search", { query_vector_id: "a", k: "ten" }) +
          line(2, "Search", { query_vector_id: "a", kk: 10 }) +
          line(3, "Search", null) +
          line(4, "Search", { query: "AACAPw" }) +
          line(5, "NoSuchCall", {}) +
          line("last", "ListCollections", null)
      )
      const byId = new Map(messagesOf(text).map((message) => [message["requestId"], message["exit"]]))
      const invalid = (field: string, expected: string, got: string) => ({
        _tag: "Failure",
        cause: [{ _tag: "Fail", error: { _tag: "InvalidInput", field, expected, got } }]
      })
      assert.deepStrictEqual(byId.get(1), invalid("k", "number", "ten"))
      assert.deepStrictEqual(byId.get(2), invalid("kk", "no such field", "10"))
      assert.deepStrictEqual(byId.get(3), invalid("", "object", "null"))
      assert.deepStrictEqual(byId.get(4), invalid("query", "a valid Base64 string", "AACAPw"))
      assert.deepStrictEqual(byId.get(5), {
        _tag: "Failure",
        cause: [{ _tag: "Die", defect: "Unknown request tag: NoSuchCall" }]
      })
      assert.deepStrictEqual(byId.get("last"), ok.exit)
    })
  )

  it.live("for Effect 3 is answered in its forms, and in ASCII", () =>
    Effect.gen(function* () {
      const { url } = yield* serverOf()
      const body =
        line(1, "Insert", { vectors: [{ id: "ü\u{1f600}", vector: "AACAPw==" }] }) +
        line(2, "Get", { id: "ü\u{1f600}" }) +
        line(3, "Get", { id: "ö" }) +
        line(4, "DeleteCollection", { name: "default" })
      const { type, text } = yield* post(`${url}/effect3`, body, { "content-type": "application/ndjson" })
      assert.strictEqual(type, "application/ndjson")
      assert.strictEqual(Buffer.byteLength(text), text.length)
      const byId = new Map(messagesOf(text).map((message) => [message["requestId"], message["exit"]]))
      assert.deepStrictEqual(byId.get(2), {
        _tag: "Success",
        value: { vector_id: "ü\u{1f600}", vector: "AACAPw==", metadata: "{}", version: "v0" }
      })
      const error = { _tag: "VectorNotFound", collection: "default", id: "ö" }
      assert.deepStrictEqual(byId.get(3), { _tag: "Failure", cause: { _tag: "Fail", error } })
      assert.deepStrictEqual(byId.get(4), { _tag: "Success" })

      const other = yield* post(`${url}/effect3`, body, { "content-type": "application/msgpack" })
      assert.strictEqual(other.status, 415)
      assert.match(defectsOf(messagesOf(other.text))[0] as string, /^Send content-type: application\/ndjson/)
    })
  )

  it.live("that cannot be read is answered with a defect that says why", () =>
    Effect.gen(function* () {
      const { ndjson, url } = yield* serverOf()
      const bodies: ReadonlyArray<[body: string, expected: string]> = [
        ["", "Expected lines of JSON RPC messages, got no whole message."],
        ["nonsense", "Expected lines of JSON RPC messages, got Unexpected token"],
        ["[]", "Expected a message (an object), got an array of 0."],
        ["null", "Expected a message (an object), got null."],
        ['{"_tag":"Nothing"}', "Expected Request, Ack, Interrupt or Ping as _tag of a message, got Nothing."],
        ['{"_tag":"Request","tag":"ListCollections"}', "Expected a string or number as id of a Request, got nothing."],
        ['{"_tag":"Request","id":1,"tag":{}}', "Expected the name of a call as tag of a Request, got an object."],
        [
          '{"_tag":"Request","id":1,"tag":"ListCollections","headers":[["a"]]}',
          "Expected an array of pairs of strings as headers of a Request, got an array of 1."
        ],
        ['{"_tag":"Ack"}', "Expected a string or number as requestId of Ack, got nothing."],
        [line(1, "ListCollections", null).repeat(10_001), "Expected at most 10000 messages at once, got 10001."]
      ]
      for (const [body, expected] of bodies) {
        const { status, text } = yield* ndjson(body)
        const [defect] = defectsOf(messagesOf(text))
        assert.strictEqual(status, 200)
        assert.isTrue(defect?.startsWith(expected), `${body.slice(0, 80)} was answered with ${text}`)
      }
      for (const body of [new Uint8Array(0), new Uint8Array([5]), new Uint8Array(1_000).fill(7)]) {
        const { status, text } = yield* post(url, body, { "content-type": "application/vnd.effect.rpc+schema-binary" })
        assert.strictEqual(status, 200)
        assert.include(text, "Expected SchemaBinary frames of RPC messages, got ")
      }
    })
  )

  it.live("of another kind, or over its bound, is refused by its status", () =>
    Effect.gen(function* () {
      const { url } = yield* serverOf({ maxBodyBytes: 2_000 })
      const other = yield* post(url, "{}", { "content-type": "application/json" })
      assert.deepStrictEqual([other.status, other.type], [415, "application/problem+json"])
      assert.deepInclude(JSON.parse(other.text), {
        code: "unsupported_media_type",
        field: "content-type",
        got: "application/json"
      })

      const encoded = yield* post(url, "{}", { "content-type": "application/ndjson", "content-encoding": "compress" })
      assert.deepStrictEqual([encoded.status, encoded.type], [415, "application/x-ndjson"])
      assert.deepStrictEqual(defectsOf(messagesOf(encoded.text)), [
        "Send a body that is not encoded, or by one of gzip, br, zstd, not compress."
      ])

      const large = line(1, "Search", { query_vector_id: "x".repeat(4_000) })
      const streamed = new Blob([large]).stream()
      for (const [body, more] of [
        [large, {}],
        [streamed, { duplex: "half" }]
      ] as const) {
        const answer = yield* post(url, body, { "content-type": "application/ndjson" }, more)
        assert.strictEqual(answer.status, 413)
        assert.deepStrictEqual(defectsOf(messagesOf(answer.text)), ["The body is over its limit of 2000 bytes."])
      }
      const notText = yield* post(url, new Uint8Array([0x7b, 0xff, 0x7d]), { "content-type": "application/ndjson" })
      assert.strictEqual(notText.status, 400)
      const binary = yield* post(url, new Uint8Array(3_000), {
        "content-type": "application/vnd.effect.rpc+schema-binary"
      })
      assert.deepStrictEqual([binary.status, binary.type], [413, "application/vnd.effect.rpc+schema-binary"])
    })
  )
})

describe("a connection", () => {
  it.live("is not made without an upgrade", () =>
    Effect.gen(function* () {
      const { port } = yield* serverOf()
      const response = yield* Effect.promise(() => fetch(`http://127.0.0.1:${port}${ndjsonPath}`))
      assert.strictEqual(response.status, 400)
      assert.deepInclude(yield* Effect.promise(() => response.json()), {
        code: "invalid_input",
        field: "upgrade",
        got: "none"
      })
    })
  )

  it.live("goes on after messages that cannot be read", () =>
    Effect.gen(function* () {
      const { port } = yield* serverOf()
      const { received, socket, closedWith } = yield* connect(port, ndjsonPath)
      const bad = [
        "nonsense\n",
        "null\n",
        "[1]\n",
        '{"_tag":"Exit"}\n',
        '{"_tag":"Request","id":null}\n',
        '{"_tag":"Ack","requestId":{}}\n'
      ]
      for (const text of bad) socket.send(text)
      yield* until(() => received.length === bad.length)
      assert.lengthOf(defectsOf(received), bad.length)
      socket.send('{"_tag":"Eof"}\n{"_tag":"Ack","requestId":"none"}\n{"_tag":"Ping"}\n')
      yield* until(() => received.at(-1)?._tag === "Pong")
      socket.send(line("last", "ListCollections", null))
      yield* until(() => received.at(-1)?._tag === "Exit")
      assert.deepStrictEqual(received.at(-1), ok)
      assert.isUndefined(closedWith())
    })
  )

  it.live("goes on after bytes that are no SchemaBinary", () =>
    Effect.gen(function* () {
      const { port } = yield* serverOf()
      const { socket, closedWith } = yield* connect(port, "/api/v1/rpc/ws")
      const answers: Array<Buffer> = []
      socket.on("message", (data) => answers.push(data as Buffer))
      for (const bytes of [[1], [3, 1, 2, 3], Array(200).fill(255)]) socket.send(Uint8Array.from(bytes))
      yield* until(() => answers.length >= 2)
      socket.send(yield* binaryRequest)
      yield* until(() => answers.some((data) => data.toString("latin1").includes("last")))
      assert.isUndefined(closedWith())
    })
  )

  it.live("goes on after a second request of an id that is under way", () =>
    Effect.gen(function* () {
      const { port, seen } = yield* serverOf()
      const { received, socket, closedWith } = yield* connect(port, ndjsonPath)
      socket.send(line("same", "Search", { collection: endless, query_vector_id: "a" }))
      yield* until(() => seen.searchesUnderWay === 1)
      socket.send(line("same", "ListCollections", null) + line("last", "ListCollections", null))
      yield* until(() => received.length === 2)
      assert.match(defectsOf(received)[0] as string, /^Field id: expected the id of no request under way/)
      assert.deepStrictEqual(received.at(-1), ok)
      socket.send('{"_tag":"Interrupt","requestId":"same"}\n')
      yield* until(() => seen.searchesUnderWay === 0 && received.length === 3)
      assert.isUndefined(closedWith())
    })
  )

  it.live("sends the next message of a stream when the last one is acknowledged", () =>
    Effect.gen(function* () {
      const { port, seen } = yield* serverOf()
      const { received, socket } = yield* connect(port, ndjsonPath)
      socket.send(line("s", "SearchStream", { collection: bulky, query_vector_id: "a", include_metadata: true }))
      yield* until(() => received.length === 1)
      yield* Effect.sleep(50)
      assert.lengthOf(received, 1)
      assert.strictEqual(seen.sessionsOpen, 1)
      socket.send('{"_tag":"Ack","requestId":"s"}\n')
      yield* until(() => received.length === 2)
      socket.send('{"_tag":"Ack","requestId":"s"}\n')
      yield* until(() => received.length === 3)
      assert.deepStrictEqual(received[2], { _tag: "Exit", requestId: "s", exit: { _tag: "Success", value: null } })
      yield* until(() => seen.sessionsOpen === 0)
    })
  )

  it.live("is closed with 1009 by a frame or a line over the bound", () =>
    Effect.gen(function* () {
      const { port } = yield* serverOf({ maxFrameBytes: 4_096 })
      const frame = yield* connect(port, ndjsonPath)
      frame.socket.send("x".repeat(5_000))
      yield* until(() => frame.closedWith() === closeCodes.frameTooLarge)
      const oneLine = yield* connect(port, ndjsonPath)
      oneLine.socket.send("x".repeat(4_000))
      oneLine.socket.send("x".repeat(4_000))
      yield* until(() => oneLine.closedWith() === closeCodes.frameTooLarge)
    })
  )

  it.live("holds what a slow reader leaves within its bound, and is closed with 4008; others notice nothing", () =>
    Effect.gen(function* () {
      const outboundBytesMax = 65_536
      const { port, seen, sockets } = yield* serverOf({
        outboundBytesMax,
        idleTimeoutMillis: 700,
        pingIntervalMillis: 200
      })
      const slow = yield* connect(port, ndjsonPath)
      const [atServer] = Array.from(sockets.clients)
      slow.socket.pause()
      let waitedBytes = 0
      const watch = setInterval(() => {
        waitedBytes = Math.max(waitedBytes, atServer?.bufferedAmount ?? 0)
      }, 1)
      // 20 frames of 64 KiB, each with about 650 searches whose answers are of 100 KB.
      const search = (id: number) =>
        line(id, "Search", { collection: bulky, query_vector_id: "a", include_metadata: true })
      for (let i = 0; i < 20; i++) slow.socket.send(Array.from({ length: 650 }, (_, j) => search(i * 650 + j)).join(""))
      const other = yield* connect(port, ndjsonPath)
      other.socket.send(line("last", "ListCollections", null))
      yield* until(() => other.received.length === 1)
      yield* until(() => atServer?.readyState !== WebSocket.OPEN)
      clearInterval(watch)
      const answerBytes = 110_000
      assert.isBelow(waitedBytes, outboundBytesMax + answerBytes)
      slow.socket.resume()
      yield* until(() => slow.closedWith() !== undefined)
      // No more was begun than one connection may have under way and what its own buffers took.
      assert.isBelow(seen.queries.length, 1_000)
      assert.strictEqual(slow.closedWith(), closeCodes.slowReader)
      other.socket.send(line("last", "ListCollections", null))
      yield* until(() => other.received.length === 2)
      assert.isUndefined(other.closedWith())
    })
  )

  it.live("waits for a reader that only pauses, and loses nothing", () =>
    Effect.gen(function* () {
      const { port } = yield* serverOf({ outboundBytesMax: 65_536 })
      const { socket, received, closedWith } = yield* connect(port, ndjsonPath)
      socket.pause()
      for (let i = 0; i < 100; i++) {
        socket.send(line(i, "Search", { collection: bulky, query_vector_id: "a", include_metadata: true }))
      }
      yield* Effect.sleep(200)
      socket.resume()
      yield* until(() => received.length === 100)
      assert.isUndefined(closedWith())
    })
  )

  it.live("is kept by answers to pings, and closed with 4009 without them", () =>
    Effect.gen(function* () {
      const { port } = yield* serverOf({ pingIntervalMillis: 100, idleTimeoutMillis: 400 })
      const live = yield* connect(port, ndjsonPath)
      const silent = yield* connect(port, ndjsonPath, { autoPong: false } as WebSocket.ClientOptions)
      yield* until(() => silent.closedWith() === closeCodes.idle)
      yield* Effect.sleep(500)
      assert.isUndefined(live.closedWith())
    })
  )

  it.live("is told to come back elsewhere when the server drains", () =>
    Effect.gen(function* () {
      const { port, seen, sockets } = yield* serverOf()
      const { socket, closedWith } = yield* connect(port, ndjsonPath)
      socket.send(line("s", "SearchStream", { collection: endless, query_vector_id: "a" }))
      yield* until(() => seen.sessionsOpen === 1)
      sockets.drain()
      yield* until(() => closedWith() === closeCodes.restart)
      yield* until(() => seen.sessionsOpen === 0)
    })
  )

  it.live("is told the same when the server stops without draining", () =>
    Effect.gen(function* () {
      const server = yield* Effect.promise(() => openRpcServer({}))
      const { socket, closedWith } = yield* connect(server.port, ndjsonPath)
      socket.send(line("s", "SearchStream", { collection: endless, query_vector_id: "a" }))
      yield* until(() => server.seen.sessionsOpen === 1)
      yield* Effect.promise(server.close)
      yield* until(() => closedWith() === closeCodes.restart)
      assert.strictEqual(server.seen.sessionsOpen, 0)
    })
  )
})

describe("anything at all", () => {
  const seed = Number(process.env["RUVECTOR_TEST_SEED"] ?? Date.now() % 1_000_000)

  it.live(`is survived (seed ${seed})`, () =>
    Effect.gen(function* () {
      const { port, ndjson, url } = yield* serverOf()
      const random = randomOf(seed)
      const text = line(
        "last",
        "Search",
        { query: "AACAPwAAAAA=", k: 3, filter: '{"a":1}' },
        { traceId: "a", spanId: "b" }
      )
      const binary = yield* binaryRequest
      const lines = yield* connect(port, ndjsonPath)
      const frames = yield* connect(port, "/api/v1/rpc/ws")
      for (let i = 0; i < 2_000; i++) {
        lines.socket.send(mutated(Buffer.from(text), random).toString("utf8"))
        frames.socket.send(mutated(Buffer.from(binary), random))
      }
      for (let i = 0; i < 100; i++) {
        const [body, bytes] = [mutated(Buffer.from(text), random), mutated(Buffer.from(binary), random)]
        const asText = yield* ndjson(body.toString("utf8"))
        const asBytes = yield* post(url, new Uint8Array(bytes), {
          "content-type": "application/vnd.effect.rpc+schema-binary"
        })
        assert.deepStrictEqual([asText.status, asBytes.status], [200, 200])
        assert.isNotEmpty(asText.text)
        assert.isNotEmpty(asBytes.text)
      }
      lines.socket.send(`\n${line("end", "ListCollections", null)}`)
      yield* until(() => lines.received.some(({ requestId }) => requestId === "end"))
      const fresh = yield* ndjson(line("last", "ListCollections", null))
      assert.deepStrictEqual(messagesOf(fresh.text), [ok])
      assert.deepStrictEqual([lines.closedWith(), frames.closedWith()], [undefined, undefined])
    })
  )
})

/** `ListCollections` of id `last`, as SchemaBinary. */
const binaryRequest = Effect.gen(function* () {
  const serialization = yield* RpcSerialization.RpcSerialization
  const list = RuvectorRpcs.requests.get("ListCollections")
  const payload = Schema.encodeSync(serialization.codecFor(list?.payloadSchema ?? Schema.Void))(undefined)
  const message: RpcMessage.RequestEncoded = {
    _tag: "Request",
    id: "last",
    tag: "ListCollections",
    payload,
    headers: []
  }
  return serialization.makeUnsafe().encode(message) as Uint8Array
}).pipe(Effect.provide(RpcSerialization.layerSchemaBinary()))

/** Numbers from 0 to below 1, the same for the same seed (Marsaglia's xorshift). */
const randomOf = (seed: number) => {
  let state = seed || 1
  return () => {
    state ^= state << 13
    state ^= state >>> 17
    state ^= state << 5
    return (state >>> 0) / 2 ** 32
  }
}

/** A few bytes changed, left out, repeated or put in. */
const mutated = (bytes: Buffer, random: () => number): Buffer => {
  let out = bytes
  for (let n = 1 + Math.floor(random() * 4); n > 0; n--) {
    const at = Math.floor(random() * out.length)
    const [before, after] = [out.subarray(0, at), out.subarray(at)]
    const byte = Buffer.of(Math.floor(random() * 256))
    const kind = random()
    if (kind < 0.4) out = Buffer.concat([before, byte, after.subarray(1)])
    else if (kind < 0.6) out = Buffer.concat([before, after.subarray(1 + Math.floor(random() * 8))])
    else if (kind < 0.8) out = Buffer.concat([before, byte, after])
    else out = Buffer.concat([out, after])
  }
  return out
}
