/** gRPC through a client that is not ours: searches, sessions, deadlines, cancellation, compression, health, shutting down. */
import * as grpc from "@grpc/grpc-js"
import { Effect } from "effect"
import { afterEach, assert, beforeEach, describe, it } from "vitest"
import { healthClient, metadataOf, outcome, type Result, type SearchClient, searchClient } from "../support/Grpc.ts"
import { type GrpcTestServer, openGrpcServer } from "./grpcServer.ts"
import { broken, bulky, endless } from "./rpcServer.ts"

let server: GrpcTestServer
let client: SearchClient

const count = 50
const vectorOf = (i: number) => [Math.cos(i / count), Math.sin(i / count)]

const start = async (settings: Parameters<typeof openGrpcServer>[0] = {}, options: grpc.ClientOptions = {}) => {
  server = await openGrpcServer(settings)
  const records = Array.from({ length: count }, (_, i) => ({
    id: i === 7 ? "sieben-ü" : `v${i}`,
    vector: new Float32Array(vectorOf(i)),
    metadata: i === 3 ? "" : JSON.stringify({ i })
  }))
  await Effect.runPromise(server.router.upsert("default", records))
  client = searchClient(server.port, options)
}

beforeEach(() => start())
afterEach(async () => {
  client.close()
  await server.close()
})

/** Waits for what a message of this process or of the client's has yet to bring about. */
const until = async (holds: () => boolean, what: string) => {
  const deadline = Date.now() + 10_000
  while (!holds()) {
    assert.isBelow(Date.now(), deadline, what)
    await new Promise((resolve) => setTimeout(resolve, 2))
  }
}

const restart = async (settings: Parameters<typeof openGrpcServer>[0], options: grpc.ClientOptions = {}) => {
  client.close()
  await server.close()
  await start(settings, options)
}

describe("StreamSearch", () => {
  it("gives each result as a message, nearest first, and the summary as trailers", async () => {
    const { messages, status } = await outcome(client.StreamSearch({ query: vectorOf(7), k: 3 }))
    assert.strictEqual(status.code, grpc.status.OK)
    assert.deepStrictEqual(new Set(messages.map(({ vector_id }) => vector_id)), new Set(["sieben-ü", "v6", "v8"]))
    assert.strictEqual(messages[0]?.vector_id, "sieben-ü")
    assert.approximately(messages[0]?.score ?? 0, 1, 1e-6)
    assert.isTrue(
      messages.every(({ metadata, vector, summary }) => metadata.length === 0 && !vector.length && !summary)
    )
    assert.match(String(status.metadata.get("ruvector-query-id")[0]), /^q_/)
    assert.deepStrictEqual(status.metadata.get("ruvector-partial"), [])
  })

  it("takes all that a search on another wire takes", async () => {
    const request = {
      query_vector_id: "v3",
      k: 2,
      metric: "cosine",
      ef: 200,
      filter: '{"i":{"lt":9}}',
      include_metadata: true,
      include_vector: true,
      deadline_ms: 1_234,
      request_id: "mine"
    }
    const { messages, status } = await outcome(client.StreamSearch(request))
    assert.strictEqual(status.code, grpc.status.OK, status.details)
    assert.strictEqual(messages[0]?.vector_id, "v3")
    assert.strictEqual(messages[0]?.metadata.toString(), "{}")
    assert.match(messages[1]?.metadata.toString() ?? "", /^\{"i":[24]\}$/)
    assert.deepStrictEqual(messages[0]?.vector, Array.from(new Float32Array(vectorOf(3))))
    assert.deepStrictEqual([...new Set(messages.map(({ request_id }) => request_id))], ["mine"])
    const { queryId: _, source, ...query } = server.seen.queries[0] as (typeof server.seen.queries)[0]
    assert.match(source ?? "", /^c_/)
    assert.deepStrictEqual(query, {
      collection: "default",
      vectorId: "v3",
      k: 2,
      ef: 200,
      metric: "cosine",
      filter: '{"i":{"lt":9}}',
      includeMetadata: true,
      includeVector: true,
      deadlineMillis: 1_234
    })
  })

  it("leaves to the server what is left out", async () => {
    const { messages } = await outcome(client.StreamSearch({ query: vectorOf(1) }))
    assert.strictEqual(messages.length, 10)
  })

  it("gives an empty answer as a status alone", async () => {
    await Effect.runPromise(server.router.createCollection("empty", { dimensions: 2 }))
    const { messages, status } = await outcome(client.StreamSearch({ collection: "empty", query: [1, 0] }))
    assert.strictEqual(status.code, grpc.status.OK)
    assert.strictEqual(messages.length, 0)
  })

  it("refuses with the status, the code and the whole problem", async () => {
    const refused = async (request: Parameters<SearchClient["StreamSearch"]>[0]) => {
      const { status, messages } = await outcome(client.StreamSearch(request))
      assert.strictEqual(messages.length, 0)
      const [problem] = status.metadata.get("ruvector-problem-bin")
      const told = JSON.parse((problem as Buffer).toString()) as { field: string; code: string; detail: string }
      assert.strictEqual(told.detail, status.details)
      assert.strictEqual(told.code, status.metadata.get("ruvector-code")[0])
      return [status.code, told.code, told.field]
    }
    const invalid = grpc.status.INVALID_ARGUMENT
    assert.deepStrictEqual(await refused({}), [invalid, "invalid_input", "query"])
    assert.deepStrictEqual(await refused({ query: [1, 0], query_vector_id: "v1" }), [invalid, "invalid_input", "query"])
    assert.deepStrictEqual(await refused({ query: [1, 0], k: -1 }), [invalid, "invalid_input", "k"])
    assert.deepStrictEqual(await refused({ query: [1, Number.NaN] }), [invalid, "invalid_input", "query[1]"])
    assert.deepStrictEqual(await refused({ query: [1, 0, 0] }), [invalid, "invalid_input", "query"])
    assert.deepStrictEqual(await refused({ query: [1, 0], filter: "{" }), [invalid, "invalid_input", "filter"])
    assert.deepStrictEqual(await refused({ query: [1, 0], metric: "ü%" }), [invalid, "invalid_input", "metric"])
    assert.deepStrictEqual(await refused({ query: [1, 0], collection: "none" }), [
      grpc.status.NOT_FOUND,
      "collection_not_found",
      "collection"
    ])
    assert.deepStrictEqual(await refused({ query_vector_id: "nobody" }), [
      grpc.status.NOT_FOUND,
      "vector_not_found",
      "id"
    ])
  })

  it("tells a defect by its id alone, which finds it in the log", async () => {
    const { status } = await outcome(client.StreamSearch({ collection: broken, query: [1, 0] }))
    assert.strictEqual(status.code, grpc.status.INTERNAL)
    const [problem] = status.metadata.get("ruvector-problem-bin")
    const { request_id } = JSON.parse((problem as Buffer).toString()) as { request_id: string }
    assert.notInclude((problem as Buffer).toString(), "a defect of the router")
    const line = server.logged.find((line) => line.includes(request_id))
    assert.include(line, "a defect of the router")
  })

  it("ends a search at the call's deadline", async () => {
    const deadline = Date.now() + 200
    const { status } = await outcome(
      client.StreamSearch({ collection: endless, query: [1, 0] }, new grpc.Metadata(), { deadline })
    )
    assert.strictEqual(status.code, grpc.status.DEADLINE_EXCEEDED)
    await until(() => server.seen.searchesInterrupted === 1, "the search goes on")
    assert.strictEqual(server.seen.searchesUnderWay, 0)
  })

  it("ends a search that the client cancels", async () => {
    const call = client.StreamSearch({ collection: endless, query: [1, 0] })
    const ended = outcome(call)
    await until(() => server.seen.searchesUnderWay === 1, "the search did not begin")
    call.cancel()
    assert.strictEqual((await ended).status.code, grpc.status.CANCELLED)
    await until(() => server.seen.searchesInterrupted === 1, "the search goes on")
    await until(() => server.handler.count() === 0, "the call is kept")
  })

  it("carries 1,000 at once on one connection", async () => {
    const outcomes = await Promise.all(
      Array.from({ length: 1_000 }, (_, i) =>
        outcome(client.StreamSearch({ query: vectorOf(i % count), k: 1, request_id: `r${i}` }))
      )
    )
    for (const [i, { messages, status }] of outcomes.entries()) {
      assert.strictEqual(status.code, grpc.status.OK)
      assert.deepInclude(messages[0], {
        request_id: `r${i}`,
        vector_id: i % count === 7 ? "sieben-ü" : `v${i % count}`
      })
    }
  })

  it("answers a client that compresses in kind, both ways", async () => {
    for (const algorithm of [grpc.compressionAlgorithms.gzip, grpc.compressionAlgorithms.deflate]) {
      await restart({}, { "grpc.default_compression_algorithm": algorithm })
      const request = { collection: bulky, query: [1, 0], include_metadata: true }
      const { messages, status } = await outcome(client.StreamSearch(request))
      assert.strictEqual(status.code, grpc.status.OK)
      assert.deepStrictEqual(
        messages.map(({ metadata }) => metadata.length),
        new Array(10).fill(10_000)
      )
      assert.strictEqual((JSON.parse(messages[9]?.metadata.toString() ?? "") as { text: string }).text.length, 9_989)
    }
  })

  it("refuses a message over grpcMessageBytesMax", async () => {
    await restart({ grpcMessageBytesMax: 2_000 })
    const { status } = await outcome(client.StreamSearch({ query: new Array(600).fill(1) }))
    assert.strictEqual(status.code, grpc.status.RESOURCE_EXHAUSTED)
    assert.deepStrictEqual(status.metadata.get("ruvector-code"), ["too_large"])
    assert.strictEqual((await outcome(client.StreamSearch({ query: vectorOf(1) }))).status.code, grpc.status.OK)
  })
})

describe("BidirectionalSearch", () => {
  /** Results by request, each closed by its summary. */
  class Answers {
    readonly byRequest = new Map<string, Array<Result>>()
    readonly done = new Map<string, NonNullable<Result["summary"]>>()
    readonly ended: ReturnType<typeof outcome<Result>>
    constructor(call: ReturnType<SearchClient["BidirectionalSearch"]>) {
      this.ended = outcome(call)
      call.on("data", (result: Result) => {
        const { request_id, summary } = result
        assert.isFalse(this.done.has(request_id), "nothing follows a summary")
        if (summary !== null) this.done.set(request_id, summary)
        else this.byRequest.set(request_id, [...(this.byRequest.get(request_id) ?? []), result])
      })
    }
  }

  it("answers many under way, each by its results and one summary, in a session that ends with the call", async () => {
    const call = client.BidirectionalSearch()
    const answers = new Answers(call)
    for (let i = 0; i < 200; i++) call.write({ query: vectorOf(i % count), k: 2, request_id: `r${i}` })
    await until(() => answers.done.size === 200, "not all were answered")
    assert.strictEqual(server.seen.sessionsOpen, 1)
    call.end()
    const { status } = await answers.ended
    assert.strictEqual(status.code, grpc.status.OK)
    for (let i = 0; i < 200; i++) {
      const results = answers.byRequest.get(`r${i}`) as Array<Result>
      assert.strictEqual(results.length, 2)
      assert.strictEqual(results[0]?.vector_id, i % count === 7 ? "sieben-ü" : `v${i % count}`)
      assert.deepInclude(answers.done.get(`r${i}`), { total_results: 2, partial: false, error: null, took_ms: 0.25 })
    }
    await until(() => server.seen.sessionsOpen === 0, "the session is kept")
  })

  it("tells a request's fault in its summary, and goes on", async () => {
    const call = client.BidirectionalSearch()
    const answers = new Answers(call)
    call.write({ query: [1, 0], k: -1, request_id: "bad" })
    call.write({ query: [1, 0], collection: "none", request_id: "none" })
    call.write({ query: [1, 0], collection: broken, request_id: "broken" })
    call.write({ query: [1, 0], k: 1, request_id: "good" })
    call.write({ query: [1, 0], k: 1 })
    call.end()
    assert.strictEqual((await answers.ended).status.code, grpc.status.OK)
    const fault = (id: string) => answers.done.get(id)?.error
    assert.deepInclude(fault("bad"), {
      code: grpc.status.INVALID_ARGUMENT,
      problem: "invalid_input",
      field: "k",
      got: "-1"
    })
    assert.deepInclude(fault("none"), { code: grpc.status.NOT_FOUND, problem: "collection_not_found" })
    assert.deepInclude(fault("broken"), { code: grpc.status.INTERNAL, problem: "internal_error" })
    assert.match(fault("broken")?.server_request_id ?? "", /^req_/)
    assert.isNull(fault("good"))
    assert.strictEqual(answers.byRequest.get("")?.length, 1)
  })

  it("cancels one request, and the others go on", async () => {
    const call = client.BidirectionalSearch()
    const answers = new Answers(call)
    call.write({ query: [1, 0], collection: endless, request_id: "a" })
    call.write({ query: [1, 0], collection: endless, request_id: "b" })
    await until(() => server.seen.searchesUnderWay === 2, "they did not begin")
    call.write({ query: [1, 0], collection: endless, request_id: "a" })
    await until(() => answers.done.has("a"), "an id that is under way was taken")
    assert.deepInclude(answers.done.get("a")?.error, { field: "request_id", problem: "invalid_input" })
    answers.done.delete("a")
    call.write({ request_id: "a", cancel: true })
    call.write({ request_id: "nobody", cancel: true })
    await until(() => answers.done.has("a"), "it was not cancelled")
    assert.deepInclude(answers.done.get("a")?.error, { code: grpc.status.CANCELLED, problem: "cancelled" })
    assert.deepStrictEqual([server.seen.searchesUnderWay, answers.done.size], [1, 1])
    call.cancel()
    assert.strictEqual((await answers.ended).status.code, grpc.status.CANCELLED)
    await until(() => server.seen.searchesInterrupted === 2, "a search goes on")
    await until(() => server.seen.sessionsOpen === 0, "the session is kept")
  })

  it("reads no more than sessionSearchesMax at once, and answers all", async () => {
    await restart({ sessionSearchesMax: 8 })
    const call = client.BidirectionalSearch()
    const answers = new Answers(call)
    for (let i = 0; i < 8; i++) call.write({ query: [1, 0], collection: endless, request_id: `e${i}` })
    for (let i = 0; i < 20; i++) call.write({ query: [1, 0], k: 1, request_id: `r${i}` })
    await until(() => server.seen.searchesUnderWay === 8, "they did not begin")
    await new Promise((resolve) => setTimeout(resolve, 50))
    assert.strictEqual(server.seen.queries.length, 8)
    call.cancel()
    await answers.ended
    const next = client.BidirectionalSearch()
    const others = new Answers(next)
    for (let i = 0; i < 100; i++) next.write({ query: vectorOf(i % count), k: 1, request_id: `r${i}` })
    next.end()
    assert.strictEqual((await others.ended).status.code, grpc.status.OK)
    assert.strictEqual(others.done.size, 100)
    assert.isTrue([...others.done.values()].every(({ error }) => error === null))
  })

  it("has the call's deadline over all of it", async () => {
    const call = client.BidirectionalSearch(new grpc.Metadata(), { deadline: Date.now() + 200 })
    const answers = new Answers(call)
    call.write({ query: [1, 0], k: 1, request_id: "one" })
    call.write({ query: [1, 0], collection: endless, request_id: "two" })
    assert.strictEqual((await answers.ended).status.code, grpc.status.DEADLINE_EXCEEDED)
    assert.deepStrictEqual([...answers.done.keys()], ["one"])
    await until(() => server.seen.searchesUnderWay === 0, "a search goes on")
  })

  it("says which bound is reached where no session can be had", async () => {
    const calls = Array.from({ length: 101 }, () => client.BidirectionalSearch())
    const answers = calls.map((call) => new Answers(call))
    for (const call of calls) call.write({ query: [1, 0], k: 1 })
    await until(() => answers.every(({ done }) => done.size === 1), "not all were answered")
    const errors = answers.map(({ done }) => done.get("")?.error).filter((error) => error !== null)
    assert.strictEqual(errors.length, 1)
    assert.deepInclude(errors[0], {
      code: grpc.status.RESOURCE_EXHAUSTED,
      problem: "overloaded",
      field: "sessionsMax",
      retry_after_ms: 5_000
    })
    for (const call of calls) call.end()
    await Promise.all(answers.map(({ ended }) => ended))
  })
})

describe("health, and shutting down", () => {
  const check = (service: string) =>
    new Promise<string>((resolve) => {
      const health = healthClient(server.port)
      health.Check({ service }, (error, response) => {
        health.close()
        resolve(error === null ? (response?.status ?? "") : (grpc.status[error.code] as string))
      })
    })

  it("Check is the node's readiness, of the whole and of its services", async () => {
    assert.strictEqual(await check(""), "NOT_SERVING")
    server.readiness.set({ state: "ready" })
    assert.strictEqual(await check(""), "SERVING")
    assert.strictEqual(await check("ruvector.v1.VectorSearch"), "SERVING")
    assert.strictEqual(await check("other.Service"), "NOT_FOUND")
    server.readiness.set({ state: "draining" })
    await Effect.runPromise(server.handler.drain)
    assert.strictEqual(await check("ruvector.v1.VectorSearch"), "NOT_SERVING")
  })

  it("Watch tells each change, through shutting down", async () => {
    const health = healthClient(server.port)
    const seen: Array<string> = []
    const watch = health.Watch({ service: "ruvector.v1.VectorSearch" })
    const ended = outcome(watch)
    watch.on("data", ({ status }) => seen.push(status))
    const unknown = health.Watch({ service: "other.Service" })
    const unknownEnded = outcome(unknown)
    await until(() => seen.length === 1, "nothing was told")
    server.readiness.set({ state: "ready" })
    await until(() => seen.length === 2, "the change was not told")
    server.readiness.set({ state: "draining" })
    await Effect.runPromise(server.handler.drain)
    assert.strictEqual((await ended).status.code, grpc.status.UNAVAILABLE)
    assert.deepStrictEqual(seen, ["NOT_SERVING", "SERVING", "NOT_SERVING"])
    const { messages } = await unknownEnded
    assert.deepStrictEqual([...new Set(messages.map(({ status }) => status))], ["SERVICE_UNKNOWN"])
    health.close()
  })

  it("ends calls that are open once what is under way is answered; what comes then is UNAVAILABLE", async () => {
    const idle = outcome(client.BidirectionalSearch())
    const call = client.BidirectionalSearch()
    const ended = outcome(call)
    call.write({ query: [1, 0], collection: endless, request_id: "e" })
    await until(() => server.seen.searchesUnderWay === 1, "it did not begin")
    await until(() => server.handler.count() === 2, "not both are open")
    await Effect.runPromise(server.handler.drain)
    const { status } = await idle
    assert.strictEqual(status.code, grpc.status.UNAVAILABLE)
    assert.deepStrictEqual(status.metadata.get("ruvector-code"), ["shutting_down"])
    assert.deepStrictEqual(status.metadata.get("grpc-retry-pushback-ms"), ["1000"])
    call.write({ query: [1, 0], k: 1, request_id: "late" })
    call.write({ request_id: "e", cancel: true })
    const { messages, status: last } = await ended
    assert.deepStrictEqual(
      new Map(messages.map(({ request_id, summary }) => [request_id, summary?.error?.problem])),
      new Map([
        ["late", "shutting_down"],
        ["e", "cancelled"]
      ])
    )
    assert.strictEqual(last.code, grpc.status.UNAVAILABLE)
    const after = await outcome(client.StreamSearch({ query: [1, 0] }))
    assert.strictEqual(after.status.code, grpc.status.UNAVAILABLE)
  })
})

it("lets metadata of the client through, and says UNIMPLEMENTED to what it does not know", async () => {
  const metadata = metadataOf({ "x-trace": "x", "x-other": "1" })
  assert.strictEqual((await outcome(client.StreamSearch({ query: [1, 0] }, metadata))).status.code, grpc.status.OK)
  const other = grpc.makeGenericClientConstructor(
    {
      call: {
        path: "/ruvector.v1.VectorSearch/Other",
        requestStream: false,
        responseStream: false,
        requestSerialize: (value: Buffer) => value,
        requestDeserialize: (value: Buffer) => value,
        responseSerialize: (value: Buffer) => value,
        responseDeserialize: (value: Buffer) => value
      }
    },
    "Other"
  )
  const unknown = new other(`127.0.0.1:${server.port}`, grpc.credentials.createInsecure())
  const error = await new Promise<grpc.ServiceError | null>((resolve) => {
    ;(unknown as unknown as { call: (request: Buffer, done: (error: grpc.ServiceError | null) => void) => void }).call(
      Buffer.alloc(0),
      resolve
    )
  })
  assert.strictEqual(error?.code, grpc.status.UNIMPLEMENTED)
  unknown.close()
})
