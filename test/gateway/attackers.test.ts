/** Every attack at once, on every wire, while clients that behave are answered: all of them, rightly, whichever wire. */
import { assert, describe, it } from "@effect/vitest"
import { attack } from "../support/Attackers.ts"
import { Http2Client } from "../support/Http2Client.ts"
import { startNode } from "../support/Node.ts"
import { SocketClient } from "../support/Streams.ts"

describe("attackers on every wire at once", () => {
  it("clients that behave are all answered, and memory is bounded", { timeout: 60_000 }, async () => {
    const node = await startNode({
      sniffTimeoutMillis: 800,
      headersTimeoutMillis: 800,
      requestTimeoutMillis: 1_500,
      keepAliveTimeoutMillis: 2_000,
      pingIntervalMillis: 500,
      idleTimeoutMillis: 1_500,
      maxBodyBytes: 4 << 20,
      maxFrameBytes: 1 << 20,
      outboundBytesMax: 1 << 20,
      h2OverheadBytesPerSecond: 8_192
    })
    const client = await Http2Client.open(node.base)
    const vectors = Array.from({ length: 50 }, (_, i) => ({
      id: `v${i}`,
      vector: [1, i, i * i],
      metadata: { text: "x".repeat(20_000) }
    }))
    assert.strictEqual((await client.json("/api/v1/insert", { vectors })).text, '{"inserted":50}')
    const json = { "content-type": "application/json" }
    const socket = await SocketClient.open(node.base)
    const idsOf = (answer: unknown) =>
      (answer as { results?: ReadonlyArray<{ vector_id: string }> }).results?.map(({ vector_id }) => vector_id)
    const searches: Record<string, (i: number) => Promise<unknown>> = {
      http1: async (i) => {
        const body = `{"query_vector_id":"v${i}","k":1}`
        const response = await fetch(`${node.base}/api/v1/search`, { method: "POST", headers: json, body })
        return idsOf(await response.json())
      },
      http2: async (i) => {
        const answer = await client.json("/api/v1/search", { query_vector_id: `v${i}`, k: 1 })
        return idsOf(JSON.parse(answer.text))
      },
      ws: async (i) => idsOf(await socket.ask({ type: "search", query: vectors[i]?.vector, k: 1 })),
      sse: async (i) => {
        const response = await fetch(`${node.base}/api/v1/stream/search?query_vector_id=v${i}&k=1`)
        return /"vector_id":"([^"]*)"/.exec(await response.text())?.slice(1)
      }
    }

    const before = process.memoryUsage().rss
    const attackers = attack(node.port, 1)
    const until = Date.now() + 6_000
    const rounds = await Promise.all(
      Object.entries(searches).map(async ([wire, search]) => {
        let n = 0
        for (; Date.now() < until; n++) {
          const i = n % 50
          assert.deepStrictEqual(await search(i), [`v${i}`], `${wire}, search ${n}`)
          await new Promise((resolve) => setTimeout(resolve, 5))
        }
        return n
      })
    )
    const during = process.memoryUsage().rss
    await attackers.stop()
    // The attackers live in this process too, with what they were sent.
    assert.isBelow(during - before, 500e6)
    for (const n of rounds) assert.isAbove(n, 10)
    // They were cut, and came again.
    const attempts = [...attackers.attempts.values()].reduce((sum, n) => sum + n, 0)
    assert.isAbove(attempts, 2 * attackers.attempts.size)
    const metrics = await (await fetch(`${node.base}/metrics`)).text()
    const refused = [...metrics.matchAll(/ruvector_port_refusals\{reason="([^"]*)"\} [1-9]/g)].map((match) => match[1])
    assert.includeMembers(refused, [
      "sniffTimeoutMillis",
      "headersTimeoutMillis",
      "requestTimeoutMillis",
      "maxHeaderBytes",
      "unparsed",
      "h2OverheadBytesPerSecond"
    ])
    assert.notMatch(metrics, /ruvector_defects(\{\})? [1-9]/)
    client.close()
    await socket.close()
    await node.stop()
  })
})
