/** gRPC as bytes: frames cut anywhere, what is broken or hostile, and clients that do not read. */
import { constants } from "node:http2"
import { gzipSync } from "node:zlib"
import { Effect } from "effect"
import { afterEach, assert, beforeEach, describe, it } from "vitest"
import type { SettingValues } from "../../src/config.ts"
import {
  answerOf,
  bidirectionalPath,
  frameOf,
  framesIn,
  RawConnection,
  requestBytes,
  resultOf,
  searchPath,
  statusOf
} from "../support/Grpc.ts"
import { seeded } from "../support/Seeded.ts"
import { type GrpcTestServer, openGrpcServer } from "./grpcServer.ts"
import { bulky, endless } from "./rpcServer.ts"

let server: GrpcTestServer
let raw: RawConnection

const start = async (settings: Partial<SettingValues> = {}) => {
  server = await openGrpcServer(settings)
  const records = [1, 2, 3].map((i) => ({ id: `v${i}`, vector: new Float32Array([1, i]), metadata: "" }))
  await Effect.runPromise(server.router.upsert("default", records))
  raw = new RawConnection(server.port)
}

const restart = async (settings: Partial<SettingValues>) => {
  raw.close()
  await server.close()
  await start(settings)
}

beforeEach(() => start())
afterEach(async () => {
  raw.close()
  await server.close()
})

const until = async (holds: () => boolean, what: string) => {
  const deadline = Date.now() + 10_000
  while (!holds()) {
    assert.isBelow(Date.now(), deadline, what)
    await new Promise((resolve) => setTimeout(resolve, 2))
  }
}

const search = requestBytes({ query: [1, 1], k: 2 })
const foundIn = (body: Buffer) => framesIn(body).map(({ message }) => resultOf(message).vector_id)
const code = (answer: Awaited<ReturnType<RawConnection["call"]>>) =>
  answer.trailers["ruvector-code"] ?? answer.headers["ruvector-code"]

describe("frames", () => {
  it("may be cut anywhere, and come many in one piece", () =>
    seeded(20_403, async (source) => {
      const requests = Array.from({ length: 12 }, (_, i) =>
        frameOf(
          requestBytes({ query: [1, 1], k: 1, request_id: `r${i}`, filter: i % 3 ? "" : `{"a":"${"x".repeat(900)}"}` })
        )
      )
      const bytes = Buffer.concat(requests)
      const expected = await raw.call(bidirectionalPath, [bytes])
      assert.strictEqual(statusOf(expected), "0")
      const requestIds = (body: Buffer) =>
        framesIn(body)
          .map(({ message }) => resultOf(message).request_id)
          .sort()
      assert.strictEqual(framesIn(expected.body).length, 24)
      for (let round = 0; round < 20; round++) {
        const pieces: Array<Buffer> = []
        for (let at = 0; at < bytes.length; ) {
          const size = 1 + source.below(round < 2 ? 1 : source.pick([3, 50, 2_000]))
          pieces.push(bytes.subarray(at, at + size))
          at += size
        }
        const answer = await raw.call(bidirectionalPath, pieces)
        assert.strictEqual(statusOf(answer), "0")
        assert.deepStrictEqual(requestIds(answer.body), requestIds(expected.body))
      }
    }))

  it("are compressed or not, each as its flag says", async () => {
    const packed = frameOf(gzipSync(search), 1)
    const answer = await raw.call(searchPath, [packed.subarray(0, 9), packed.subarray(9)], { "grpc-encoding": "gzip" })
    assert.deepStrictEqual([statusOf(answer), foundIn(answer.body)], ["0", ["v3", "v2"]])
    assert.strictEqual(answer.headers["grpc-encoding"], "gzip")
    const large = requestBytes({ collection: bulky, query: [1], include_metadata: true })
    const plain = await raw.call(searchPath, [frameOf(large)], { "grpc-encoding": "gzip" })
    assert.isTrue(framesIn(plain.body).every(({ flag }) => flag === 1))
    assert.isBelow(plain.body.length, 20_000)
    const onlyDeflate = { "grpc-encoding": "gzip", "grpc-accept-encoding": "identity, deflate" }
    const unread = await raw.call(searchPath, [frameOf(large)], onlyDeflate)
    assert.strictEqual(unread.headers["grpc-encoding"], undefined)
    assert.isTrue(framesIn(unread.body).every(({ flag }) => flag === 0))
    const none = await raw.call(searchPath, [frameOf(large)])
    assert.isTrue(framesIn(none.body).every(({ flag }) => flag === 0))
    const mixed = Buffer.concat([packed, frameOf(search), packed, packed, frameOf(search)])
    const many = await raw.call(bidirectionalPath, [mixed], { "grpc-encoding": "gzip" })
    assert.strictEqual(framesIn(many.body).length, 15)
  })

  it("that are wrong end the call with what was expected", async () => {
    const refused = async (pieces: ReadonlyArray<Buffer>, headers: Record<string, string> = {}, path = searchPath) => {
      const answer = await raw.call(path, pieces, headers)
      assert.strictEqual(answer.headers[":status"], 200)
      return [statusOf(answer), code(answer)]
    }
    const invalid = ["3", "invalid_input"]
    assert.deepStrictEqual(await refused([frameOf(Buffer.alloc(20, 0xff))]), invalid)
    assert.deepStrictEqual(await refused([frameOf(Buffer.alloc(20, 0xff))], {}, bidirectionalPath), invalid)
    assert.deepStrictEqual(await refused([frameOf(search, 2)]), invalid)
    assert.deepStrictEqual(await refused([frameOf(gzipSync(search), 1)]), invalid)
    assert.deepStrictEqual(await refused([frameOf(search, 1)], { "grpc-encoding": "gzip" }), invalid)
    assert.deepStrictEqual(await refused([frameOf(search).subarray(0, -1)]), invalid)
    assert.deepStrictEqual(await refused([Buffer.from([0, 0])]), invalid)
    assert.deepStrictEqual(await refused([]), invalid)
    assert.deepStrictEqual(await refused([frameOf(search).subarray(0, -1)], {}, bidirectionalPath), invalid)
    const two = frameOf(requestBytes({ collection: endless, query: [1] }))
    assert.deepStrictEqual(await refused([two, two]), invalid)
    assert.deepStrictEqual(await refused([frameOf(search)], { "grpc-timeout": "soon" }), invalid)
    for (const over of ["0S", "1n", "999u"]) {
      assert.strictEqual((await refused([frameOf(search)], { "grpc-timeout": over }))[0], "4", over)
    }
    const id = frameOf(requestBytes({ query: [1, 1], request_id: "x".repeat(129) }))
    assert.deepStrictEqual(await refused([id], {}, bidirectionalPath), invalid)
    assert.strictEqual((await refused([frameOf(search)], { "grpc-encoding": "br" }))[0], "12")
    assert.strictEqual((await refused([frameOf(search)], {}, "/other.Service/Call"))[0], "12")
    assert.strictEqual((await refused([frameOf(search)], {}, "/"))[0], "12")
    // The connection goes on.
    const answer = await raw.call(searchPath, [frameOf(search)])
    assert.deepStrictEqual([statusOf(answer), foundIn(answer.body)], ["0", ["v3", "v2"]])
    await until(() => server.handler.count() === 0, "a call is kept")
    assert.strictEqual(server.seen.searchesUnderWay, 0)
  })

  it("of another protocol are answered in HTTP's terms", async () => {
    const status = async (headers: Record<string, string>) =>
      (await raw.call(searchPath, [], headers)).headers[":status"]
    assert.strictEqual(await status({ "content-type": "application/json" }), 415)
    assert.strictEqual(await status({ "content-type": "application/grpc+json" }), 415)
    assert.strictEqual(await status({ "content-type": "application/grpc-web+proto" }), 415)
    assert.strictEqual(await status({ ":method": "PUT" }), 405)
    assert.strictEqual(await status({ "content-type": "application/grpc+proto" }), 200)
  })
})

describe("hostile clients", () => {
  it("a bomb is inflated no further than a message may be", async () => {
    const bomb = frameOf(gzipSync(Buffer.alloc(64_000_000)), 1)
    const before = process.memoryUsage().rss
    const answers = await Promise.all(
      Array.from({ length: 20 }, () => raw.call(searchPath, [bomb], { "grpc-encoding": "gzip" }))
    )
    for (const answer of answers) assert.deepStrictEqual([statusOf(answer), code(answer)], ["8", "too_large"])
    assert.isBelow(process.memoryUsage().rss - before, 150e6)
  })

  it("lengths that are promised cost nothing; what comes of messages is bounded over all calls", async () => {
    await restart({ grpcPartialBytesMax: 1_048_576 })
    const promise = Buffer.from([0, 0, 0x3f, 0xff, 0xff])
    const promised = Array.from({ length: 200 }, () => raw.open(searchPath))
    for (const stream of promised) stream.write(promise)
    const large = frameOf(Buffer.alloc(700_000))
    const first = raw.open(searchPath)
    first.write(large.subarray(0, -1))
    const answer = await raw.call(searchPath, [large])
    assert.deepStrictEqual([statusOf(answer), code(answer)], ["8", "overloaded"])
    for (const stream of [...promised, first]) stream.close(constants.NGHTTP2_CANCEL)
    await until(() => server.handler.count() === 0, "a call is kept")
    // All is given back.
    const again = await raw.call(searchPath, [large])
    assert.deepStrictEqual([statusOf(again), code(again)], ["3", "invalid_input"])
  })

  it("a message that does not come whole in requestTimeoutMillis ends its call", async () => {
    await restart({ requestTimeoutMillis: 300 })
    const ended = async (path: string, bytes: Buffer) => {
      const stream = raw.open(path)
      const answer = answerOf(stream)
      if (bytes.length > 0) stream.write(bytes)
      return statusOf(await answer)
    }
    const quiet = raw.open(bidirectionalPath)
    const quietAnswer = answerOf(quiet)
    quiet.write(frameOf(search))
    assert.deepStrictEqual(
      await Promise.all([
        ended(searchPath, Buffer.alloc(0)),
        ended(searchPath, frameOf(search).subarray(0, 7)),
        ended(bidirectionalPath, Buffer.concat([frameOf(search), Buffer.from([0])]))
      ]),
      ["4", "4", "4"]
    )
    // One that sent whole messages may be quiet.
    quiet.end(frameOf(search))
    assert.strictEqual(statusOf(await quietAnswer), "0")
  })

  it("calls that are reset at once leave nothing behind", async () => {
    const request = frameOf(requestBytes({ collection: endless, query: [1] }))
    for (let i = 0; i < 600; i++) {
      const stream = raw.open(i % 2 ? searchPath : bidirectionalPath)
      // Half of them are being answered meanwhile.
      stream.write(i % 4 < 2 ? request : frameOf(search))
      for (let turn = 0; turn < i % 5; turn++) await new Promise((resolve) => setImmediate(resolve))
      stream.close(constants.NGHTTP2_CANCEL)
    }
    await until(() => server.handler.count() === 0 && server.seen.searchesUnderWay === 0, "a call is kept")
    await until(() => server.seen.sessionsOpen === 0, "a session is kept")
  })
})

it("calls have a bound, and those that watch the health", async () => {
  await restart({ grpcCallsMax: 6, grpcWatchesMax: 2 })
  const refused = async (path: string) => {
    const answer = await raw.call(path, [frameOf(Buffer.alloc(0))])
    const problem = String(answer.headers["ruvector-problem-bin"] ?? "")
    return (JSON.parse(Buffer.from(problem, "base64").toString() || "{}") as { field?: string }).field
  }
  const watchPath = "/grpc.health.v1.Health/Watch"
  const watches = [1, 2].map(() => raw.open(watchPath))
  for (const watch of watches) watch.write(frameOf(Buffer.alloc(0)))
  await until(() => server.handler.count() === 2, "not both are open")
  assert.strictEqual(await refused(watchPath), "grpcWatchesMax")
  const sessions = [1, 2, 3, 4].map(() => raw.open(bidirectionalPath))
  await until(() => server.handler.count() === 6, "not all are open")
  assert.strictEqual(await refused(searchPath), "grpcCallsMax")
  for (const stream of [...watches, ...sessions]) stream.close(constants.NGHTTP2_CANCEL)
  await until(() => server.handler.count() === 0, "a call is kept")
  const watch = raw.open(watchPath)
  watch.write(frameOf(Buffer.alloc(0)))
  await until(() => server.handler.count() === 1, "a watch is refused")
})

describe("clients that do not read", () => {
  /** Ten results of 10,000 characters. */
  const request = frameOf(requestBytes({ collection: bulky, query: [1], include_metadata: true }))

  it("hold no more than outboundBytesMax on a connection, over all its calls; others are served", async () => {
    await restart({ outboundBytesMax: 1_000_000, sessionSearchesMax: 64 })
    const streams = Array.from({ length: 20 }, (_, i) => {
      const stream = raw.open(i % 2 ? searchPath : bidirectionalPath)
      stream.pause()
      return stream
    })
    const answers = streams.map(answerOf)
    for (const [i, stream] of streams.entries()) {
      if (i % 2) stream.end(request)
      else for (let n = 0; n < 20; n++) stream.write(request)
    }
    const other = new RawConnection(server.port)
    const large = () => server.seen.queries.filter(({ collection }) => collection === bulky).length
    let asked = 0
    for (let quiet = 0; quiet < 20; quiet++) {
      assert.strictEqual(statusOf(await other.call(searchPath, [frameOf(search)])), "0")
      if (large() !== asked) quiet = 0
      asked = large()
    }
    // Of 210 searches those were made whose answers may wait, and what had been begun by then.
    assert.isBelow(asked, 40)
    other.close()
    // Read, they are all answered, or told what the bound is.
    for (const [i, stream] of streams.entries()) {
      if (i % 2 === 0) stream.end()
      stream.resume()
    }
    let results = 0
    for (const [i, answer] of (await Promise.all(answers)).entries()) {
      if (i % 2) {
        assert.include(["0", "8"], statusOf(answer))
        continue
      }
      assert.strictEqual(statusOf(answer), "0")
      const summaries = framesIn(answer.body).flatMap(({ message }) => resultOf(message).summary ?? [])
      assert.strictEqual(summaries.length, 20)
      for (const { error, total_results } of summaries) {
        if (error === null) results += total_results
        else assert.deepInclude(error, { problem: "overloaded", field: "outboundBytesMax" })
      }
    }
    assert.isAbove(results, 0)
  })

  it("are cut off after idleTimeoutMillis", async () => {
    await restart({ idleTimeoutMillis: 400, pingIntervalMillis: 200 })
    const stream = raw.open(searchPath)
    stream.pause()
    const answer = answerOf(stream)
    stream.end(request)
    const small = raw.open(bidirectionalPath)
    small.pause()
    for (let i = 0; i < 20; i++) small.write(request)
    await until(() => server.seen.queries.length > 1, "nothing was asked")
    await until(() => server.handler.count() === 0, "a call is kept")
    stream.resume()
    assert.strictEqual((await answer).rstCode, constants.NGHTTP2_ENHANCE_YOUR_CALM)
  })

  it("that read again are given all of a large answer", async () => {
    const stream = raw.open(searchPath)
    stream.pause()
    const answer = answerOf(stream)
    stream.end(request)
    await until(() => server.seen.queries.length === 1, "nothing was asked")
    await new Promise((resolve) => setTimeout(resolve, 50))
    stream.resume()
    const { body, trailers } = await answer
    assert.deepStrictEqual([framesIn(body).length, trailers["grpc-status"]], [10, "0"])
  })
})
