/** gRPC on a whole node, beside the other wires of its port; clients of two languages that are not ours. */
import * as grpc from "@grpc/grpc-js"
import { afterAll, assert, beforeAll, describe, it } from "vitest"
import { healthClient, outcome, type SearchClient, searchClient } from "../support/Grpc.ts"
import { runPython, withoutGrpcPython } from "../support/GrpcPython.ts"
import { type RunningNode, startNode } from "../support/Node.ts"

const count = 200
const vectorOf = (i: number) => [1, i / count]

let node: RunningNode
let client: SearchClient

beforeAll(async () => {
  // A thousand at once are not what is looked at here, but who carries them.
  node = await startNode({
    defaultPartitions: 3,
    searchQueueMax: 10_000,
    searchQueueBurstMillis: 60_000,
    searchQueueStandingMillis: 60_000
  })
  const vectors = Array.from({ length: count }, (_, i) => ({
    id: `v${i}`,
    vector: vectorOf(i),
    metadata: { i, text: "x".repeat(1_500) }
  }))
  const response = await fetch(`${node.base}/api/v1/insert`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ vectors })
  })
  assert.deepStrictEqual(await response.json(), { inserted: count })
  client = searchClient(node.port)
})
afterAll(async () => {
  client.close()
  await node.stop()
})

const post = async (request: object) => {
  const response = await fetch(`${node.base}/api/v1/search`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(request)
  })
  return (await response.json()) as { results: ReadonlyArray<{ vector_id: string; score: number; metadata: object }> }
}

describe("the port", () => {
  it("answers a search over gRPC as over HTTP", async () => {
    const same = { query: vectorOf(17), k: 7, ef: 200 }
    const { results } = await post({ ...same, filter: { i: { gte: 10 } }, include: ["metadata"] })
    const request = { ...same, filter: '{"i":{"gte":10}}', include_metadata: true }
    const { messages, status } = await outcome(client.StreamSearch(request))
    assert.strictEqual(status.code, grpc.status.OK)
    assert.deepStrictEqual(
      messages.map(({ vector_id, score, metadata }) => ({
        vector_id,
        score: Math.fround(score),
        metadata: JSON.parse(metadata.toString()) as object
      })),
      results.map(({ vector_id, score, metadata }) => ({ vector_id, score: Math.fround(score), metadata }))
    )
  })

  it("carries more calls at once than it lets a connection have, and long sessions beside them", async () => {
    const sessions = Array.from({ length: 20 }, () => client.BidirectionalSearch())
    const answered = sessions.map((call) => outcome(call))
    for (const [s, call] of sessions.entries()) {
      for (let i = 0; i < 50; i++) call.write({ query: vectorOf((s + i) % count), k: 2, request_id: `${i}` })
      call.end()
    }
    const calls = await Promise.all(
      Array.from({ length: 1_000 }, (_, i) =>
        outcome(client.StreamSearch({ query: vectorOf(i % count), k: 1, ef: 200 }))
      )
    )
    for (const [i, { messages, status }] of calls.entries()) {
      assert.strictEqual(status.code, grpc.status.OK, status.details)
      assert.strictEqual(messages[0]?.vector_id, `v${i % count}`)
    }
    for (const { messages, status } of await Promise.all(answered)) {
      assert.strictEqual(status.code, grpc.status.OK)
      const errors = messages.flatMap(({ summary }) => (summary?.error == null ? [] : [summary.error]))
      assert.deepStrictEqual(errors, [])
      assert.strictEqual(messages.length, 150)
    }
  })

  it("takes a session that sends much for what it is, not for noise", async () => {
    const call = client.BidirectionalSearch()
    const ended = outcome(call)
    // 1,000-number vectors of the wrong dimensions: much comes, little goes out.
    const query = new Array<number>(1_000).fill(0.5)
    const until = Date.now() + 2_500
    let sent = 0
    while (Date.now() < until) {
      for (let i = 0; i < 50; i++, sent++) call.write({ query, request_id: `${sent}` })
      await new Promise((resolve) => setTimeout(resolve, 50))
    }
    call.end()
    const { messages, status } = await ended
    assert.strictEqual(status.code, grpc.status.OK, status.details)
    assert.strictEqual(messages.length, sent)
    assert.isTrue(messages.every(({ summary }) => summary?.error?.field === "query"))
  })

  it("counts calls among its requests and connections", async () => {
    const call = client.BidirectionalSearch()
    const ended = outcome(call)
    call.write({ query: vectorOf(1), k: 1 })
    await new Promise((resolve) => call.once("data", resolve))
    const metrics = async () => (await fetch(`${node.base}/metrics`)).text()
    const open = await metrics()
    assert.match(open, /ruvector_connections\{wire="grpc"\} 1/)
    assert.match(open, /ruvector_requests\{wire="grpc",route="StreamSearch",status="200"\} \d+/)
    call.end()
    await ended
    assert.match(await metrics(), /ruvector_stream_closes\{wire="grpc",code="0"\} \d+/)
  })

  it.skipIf(withoutGrpcPython())("answers a client that protoc makes for Python", async () => {
    assert.deepStrictEqual(await runPython("../gateway/grpcClient.py", node.port), {
      search: { results: ["v20", "v21"], partial: false },
      whole: ["v3", { i: 3, text: "x".repeat(1_500) }, 2],
      refused: {
        status: "INVALID_ARGUMENT",
        details: "Field k: expected an integer from 1 to 10000, got -1.",
        code: "invalid_input"
      },
      unknown: {
        status: "INVALID_ARGUMENT",
        details:
          "Field collection: expected a name of 1 to 128 characters of A-Z a-z 0-9 _ . - beginning with a letter or digit, got nümber.",
        code: "invalid_input"
      },
      missing: {
        status: "NOT_FOUND",
        details: 'There is no vector "niemand-ü" in collection "default".',
        code: "vector_not_found"
      },
      deadline: "DEADLINE_EXCEEDED",
      many: [101, 300],
      bad: [grpc.status.INVALID_ARGUMENT, "invalid_input", "query"],
      good: [false, 3],
      held: ["v0", true],
      cancelled: "CANCELLED",
      health: "SERVING",
      watch: "SERVING",
      Gzip: [50, [true]],
      Deflate: [50, [true]]
    })
  })

  it("tells whoever watches its health, and ends sessions, when it stops", async () => {
    const own = await startNode({ drainMillis: 3_000 })
    const search = searchClient(own.port)
    const health = healthClient(own.port)
    const session = search.BidirectionalSearch()
    const watch = health.Watch({ service: "" })
    const ended = Promise.all([outcome(session), outcome(watch)])
    await new Promise((resolve) => watch.once("data", resolve))
    await own.stop()
    const [first, second] = await ended
    assert.strictEqual(first.status.code, grpc.status.UNAVAILABLE)
    assert.strictEqual(second.status.code, grpc.status.UNAVAILABLE)
    assert.strictEqual(second.messages.at(-1)?.status, "NOT_SERVING")
    search.close()
    health.close()
  })
})
