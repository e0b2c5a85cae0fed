/**
 * A server that is told to stop while every wire is busy: everybody is told to go elsewhere, what was begun is answered,
 * what was acknowledged is there after the next start, and it ends in time though some peers are gone.
 */
import * as net from "node:net"
import { assert, describe, it } from "@effect/vitest"
import { answerOf, Http2Client } from "../support/Http2Client.ts"
import { ready, startServer, withDirectory } from "../support/ServerProcess.ts"
import { SocketClient } from "../support/Streams.ts"

const drainMillis = 3_000

describe("told to stop under load", () => {
  it("tells every wire, loses no acknowledged write, and ends with 0", { timeout: 60_000 }, () =>
    withDirectory(async (data) => {
      const flags = ["--drain-millis", String(drainMillis), "--drain-notice-millis", "500", "--log-level", "error"]
      const server = await startServer(data, flags)
      await ready(server.base)
      const { base, port } = server
      const json = { "content-type": "application/json" }
      const body = (id: string) => JSON.stringify({ vectors: [{ id, vector: [1, Math.random()] }] })
      await fetch(`${base}/api/v1/insert`, { method: "POST", headers: json, body: body("first") })

      const acknowledged: Array<string> = []
      let stopping = false
      let ended = 0
      /** Inserts one after the other until the server does not answer any more. */
      const writer = async (name: string, insert: (id: string) => Promise<boolean>) => {
        for (let n = 0; ; n++) {
          const id = `${name}-${n}`
          if (!(await insert(id).catch(() => false))) break
          acknowledged.push(id)
        }
        assert.isTrue(stopping, `${name} was refused before the stop`)
        ended += 1
      }
      const h2 = await Http2Client.open(base)
      const events = await SocketClient.open(base)
      const writing = [
        writer("http1", async (id) => {
          const response = await fetch(`${base}/api/v1/insert`, { method: "POST", headers: json, body: body(id) })
          await response.text()
          return response.status === 200
        }),
        writer("http2", async (id) => (await h2.ask("/api/v1/insert", body(id))).text === '{"inserted":1}'),
        writer("ws", async (id) => {
          const answer = events.ask({ type: "insert", vectors: [{ id, vector: [1, Math.random()] }] })
          const event = await Promise.race([answer, events.closed.then(() => undefined)])
          return event?.event === "inserted"
        })
      ]

      // Streams that are held open, on every wire that has them.
      const path = "/api/v1/stream/search?query_vector_id=first&k=1&keep_open=true"
      const sse1 = await fetch(`${base}${path}`)
      const sse1Text = sse1.text()
      const held = await Http2Client.open(base)
      const sse2 = answerOf(held.session.request({ ":path": path }))
      const quiet = await Http2Client.open(base)
      const rpc = new WebSocket(`${base.replace("http", "ws")}/api/v1/rpc/ws/ndjson`)
      await new Promise((resolve) => rpc.addEventListener("open", resolve, { once: true }))
      const rpcClosed = new Promise<number>((resolve) => rpc.addEventListener("close", ({ code }) => resolve(code)))
      // One whose request is half there, and one that reads nothing of its stream and will never go.
      const half = net.connect(port, "127.0.0.1")
      const text = body("half")
      let halfAnswer = ""
      half.on("data", (chunk) => {
        halfAnswer += chunk.toString()
      })
      half.write(
        `POST /api/v1/insert HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: ${text.length}\r\n\r\n${text.slice(0, 20)}`
      )
      const halfClosed = new Promise((resolve) => half.once("close", resolve))
      const dead = net.connect({ port, host: "127.0.0.1", allowHalfOpen: true })
      dead.on("error", () => {})
      dead.write(
        `POST /api/v1/insert HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{`
      )
      await new Promise((resolve) => setTimeout(resolve, 500))

      stopping = true
      const started = Date.now()
      const stopped = server.stop("SIGTERM")
      // Within its notice it takes everything, but says that it is going.
      await new Promise((resolve) => setTimeout(resolve, 150))
      const notice = await fetch(`${base}/health/ready`)
      assert.strictEqual(notice.status, 503)
      assert.strictEqual(((await notice.json()) as { status: string }).status, "draining")
      const newcomer = await fetch(`${base}/api/v1/search`, {
        method: "POST",
        headers: json,
        body: '{"query_vector_id":"first"}'
      })
      assert.strictEqual(newcomer.status, 200)
      await newcomer.text()

      assert.match(await sse1Text, /retry: \d+\nevent: bye/)
      assert.match((await sse2).text, /retry: \d+\nevent: bye/)
      assert.strictEqual((await sse2).resetCode, 0)
      assert.strictEqual((await events.closed).code, 1012)
      assert.strictEqual(await rpcClosed, 1012)
      for (const client of [h2, held, quiet]) {
        await client.closed
        assert.strictEqual(client.goaway, 0)
      }
      // What was half there may still be finished, and is the last on its connection.
      half.write(text.slice(20))
      await halfClosed
      assert.match(halfAnswer, /^HTTP\/1\.1 200 /)
      assert.match(halfAnswer, /\r\nconnection: close\r\n/i)
      assert.match(halfAnswer, /\{"inserted":1\}$/)
      acknowledged.push("half")

      assert.strictEqual(await stopped, 0)
      const tookMillis = Date.now() - started
      // The dead peer was cut at the end of the drain; what follows is a snapshot of little.
      assert.isAtLeast(tookMillis, drainMillis - 100)
      await Promise.all(writing)
      assert.strictEqual(ended, writing.length)
      assert.isAbove(acknowledged.length, 30)
      dead.destroy()

      const again = await startServer(data, ["--log-level", "error"])
      await ready(again.base)
      for (const name of ["http1", "http2", "ws"])
        assert.isTrue(
          acknowledged.some((id) => id.startsWith(name)),
          name
        )
      const reader = await Http2Client.open(again.base)
      for (let i = 0; i < acknowledged.length; i += 100) {
        const ids = acknowledged.slice(i, i + 100)
        const found = await Promise.all(ids.map((id) => reader.ask(`/api/v1/embed/${id}`)))
        for (const [n, { status }] of found.entries()) assert.strictEqual(status, 200, `${ids[n]} was acknowledged`)
      }
      reader.close()
      assert.strictEqual(await again.stop("SIGTERM"), 0)
    })
  )
})
