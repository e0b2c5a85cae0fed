/** A program with a client ends when it has nothing to do any more: nothing of the client's keeps it. */
import { type ChildProcess, spawn } from "node:child_process"
import { once } from "node:events"
import { createServer, type Server } from "node:http"
import type { AddressInfo } from "node:net"
import { afterAll, assert, beforeAll, describe, it } from "@effect/vitest"
import { WebSocketServer } from "ws"

/** What the server puts off, and for how long: longer than any test may take. */
const retryAfterMillis = 600_000

const entry = new URL("../../src/client/index.ts", import.meta.url).href

/** Runs a program; resolves with what it printed when it has ended by itself. */
const outputOf = async (text: string, url: string): Promise<string> => {
  const program = `import { VectorDB } from ${JSON.stringify(entry)}\nconst url = process.argv[1]\n${text}`
  const child: ChildProcess = spawn(process.execPath, ["--input-type=module", "-e", program, url], {
    stdio: ["ignore", "pipe", "inherit"]
  })
  let output = ""
  child.stdout?.on("data", (chunk) => {
    output += chunk
  })
  try {
    const [code] = await once(child, "close", { signal: AbortSignal.timeout(30_000) })
    assert.strictEqual(code, 0)
    return output.trim()
  } finally {
    child.kill("SIGKILL")
  }
}

describe("a program with a client", () => {
  let server: Server
  let url = ""
  beforeAll(async () => {
    server = createServer((_, response) => {
      response.writeHead(503, {
        "content-type": "application/problem+json",
        "retry-after": String(retryAfterMillis / 1_000)
      })
      response.end(JSON.stringify({ code: "overloaded", status: 503, retry_after_ms: retryAfterMillis }))
    })
    const sockets = new WebSocketServer({ server })
    sockets.on("connection", (socket) =>
      socket.on("message", (data, isBinary) => {
        // Length of the JSON, then that.
        const bytes = data as Buffer
        const text = isBinary ? bytes.subarray(4, 4 + bytes.readUInt32LE()) : bytes
        const { id, type } = JSON.parse(text.toString())
        if (type !== "search") return
        const problem = { code: "overloaded", status: 503, retry_after_ms: retryAfterMillis }
        socket.send(JSON.stringify({ event: "error", id, problem }))
      })
    )
    server.listen(0, "127.0.0.1")
    await once(server, "listening")
    url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`
  })
  afterAll(() => {
    server.closeAllConnections()
    server.close()
  })

  for (const streaming of [true, false]) {
    it(`ends after close, though a call was put off for long: ${streaming ? "WebSocket" : "HTTP"}`, async () => {
      const text = `
        const db = new VectorDB({ endpoint: url, streaming: ${streaming}, deadlineMillis: 60 * 60_000 })
        const answer = db.search([1, 0]).catch(({ code }) => code)
        await new Promise((resolve) => setTimeout(resolve, 300))
        await db.close()
        console.log(await answer)`
      assert.strictEqual(await outputOf(text, url), "closed")
    })
  }

  it("ends when the only call has been given up, though there is no service and no close", async () => {
    const text = `
      // A port that nobody listens on.
      const db = new VectorDB({ endpoint: "http://127.0.0.1:1", reconnectBaseMillis: 60_000, reconnectCapMillis: 60_000 })
      const gone = new AbortController()
      const answer = db.search([1, 0], { signal: gone.signal, deadlineMillis: 60 * 60_000 }).catch((error) => error.name)
      setTimeout(() => gone.abort(), 300)
      console.log(await answer)`
    assert.strictEqual(await outputOf(text, url), "AbortError")
  })

  it("lives for as long as a call waits for the service to come back", async () => {
    const text = `
      const db = new VectorDB({ endpoint: "http://127.0.0.1:1", reconnectCapMillis: 100 })
      console.log(await db.search([1, 0], { deadlineMillis: 700 }).catch(({ code }) => code))`
    assert.strictEqual(await outputOf(text, url), "disconnected")
  })
})
