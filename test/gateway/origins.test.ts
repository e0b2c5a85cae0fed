/** Which web pages may call a server, and that others can do nothing in it. */
import { request } from "node:http"
import { afterAll, assert, beforeAll, describe, it } from "@effect/vitest"
import { WebSocket } from "ws"
import { type RunningNode, startNode } from "../support/Node.ts"

interface Answer {
  readonly status: number
  readonly headers: Record<string, string | ReadonlyArray<string> | undefined>
  readonly body: string
}

const ask = (port: number, method: string, path: string, headers: Record<string, string>, body = ""): Promise<Answer> =>
  new Promise((resolve, reject) => {
    const asked = request({ host: "127.0.0.1", port, method, path, headers }, (response) => {
      let text = ""
      response.on("data", (chunk: Buffer) => (text += chunk.toString()))
      response.on("end", () => resolve({ status: response.statusCode ?? 0, headers: response.headers, body: text }))
    })
    asked.on("error", reject)
    asked.end(body)
  })

const insert = '{"vectors":[{"id":"a","vector":[1,0]}]}'

/** 101, or the status of the refusal. */
const upgraded = (port: number, headers: Record<string, string>): Promise<number> =>
  new Promise((resolve) => {
    const socket = new WebSocket(`ws://127.0.0.1:${port}/api/v1/ws`, { headers })
    socket.on("open", () => {
      socket.terminate()
      resolve(101)
    })
    socket.on("unexpected-response", (_, response) => {
      resolve(response.statusCode ?? 0)
      response.destroy()
    })
    socket.on("error", () => {})
  })

describe("origins of web pages", () => {
  let node: RunningNode
  let listed: RunningNode
  beforeAll(async () => {
    node = await startNode()
    listed = await startNode({ corsOrigins: "https://app.example,https://b.example" })
  })
  afterAll(async () => {
    await node.stop()
    await listed.stop()
  })

  it("lets pages of this machine call, and answers their preflights", async () => {
    for (const origin of [
      "http://localhost:3000",
      "http://127.0.0.1:5173",
      "http://[::1]:80",
      "http://app.localhost"
    ]) {
      const preflight = await ask(node.port, "OPTIONS", "/api/v1/insert", {
        origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type"
      })
      assert.strictEqual(preflight.status, 204)
      assert.strictEqual(preflight.headers["access-control-allow-origin"], origin)
      assert.strictEqual(preflight.headers["access-control-allow-headers"], "authorization,content-type")
      assert.include(String(preflight.headers["access-control-allow-methods"]), "PATCH")
      for (const [path, body] of [
        ["/api/v1/insert", insert],
        ["/api/v1/search", '{"query":[1,0]}']
      ] as const) {
        const answer = await ask(node.port, "POST", path, { origin, "content-type": "application/json" }, body)
        assert.strictEqual(answer.status, 200)
        assert.strictEqual(answer.headers["access-control-allow-origin"], origin)
      }
      const stream = await ask(node.port, "GET", "/api/v1/stream/search?query_vector_id=a", { origin })
      assert.strictEqual(stream.headers["access-control-allow-origin"], origin)
      assert.strictEqual(await upgraded(node.port, { origin }), 101)
    }
  })

  it("refuses others, whatever they send: nothing is done for them", async () => {
    const before = await ask(node.port, "GET", "/api/v1/collections", {})
    for (const origin of [
      "https://evil.example",
      "null",
      "http://127.0.0.1.evil.example",
      "http://localhost.evil.example"
    ]) {
      const preflight = await ask(node.port, "OPTIONS", "/api/v1/insert", {
        origin,
        "access-control-request-method": "POST"
      })
      assert.strictEqual(preflight.status, 403)
      assert.isUndefined(preflight.headers["access-control-allow-origin"])
      // What a page may send without a preflight.
      const body = insert.replace('"vectors"', '"collection":"evil","vectors"')
      const simple = await ask(node.port, "POST", "/api/v1/insert", { origin }, body)
      assert.strictEqual(simple.status, 403)
      assert.strictEqual((JSON.parse(simple.body) as { code: string }).code, "forbidden")
      assert.strictEqual(await upgraded(node.port, { origin }), 403)
      assert.strictEqual(await upgraded(listed.port, { origin }), 403)
    }
    assert.strictEqual((await ask(node.port, "GET", "/api/v1/collections", {})).body, before.body)
  })

  it("takes a list, and all", async () => {
    const origin = "https://b.example"
    assert.strictEqual((await ask(listed.port, "GET", "/api/v1/collections", { origin })).status, 200)
    assert.strictEqual((await ask(listed.port, "GET", "/", { origin: "http://localhost" })).status, 403)
    const all = await startNode({ corsOrigins: "*" })
    assert.strictEqual((await ask(all.port, "GET", "/", { origin: "https://any.example" })).status, 200)
    await all.stop()
  })

  it("is not fooled by a name that was given this machine's address", async () => {
    for (const host of ["evil.example", `evil.example:${node.port}`, "10.0.0.1"]) {
      const answer = await ask(node.port, "GET", "/api/v1/collections", { host, origin: `http://${host}` })
      assert.strictEqual(answer.status, 403)
      const browser = { host, "user-agent": "Mozilla/5.0 (X11; Linux x86_64)" }
      assert.strictEqual((await ask(node.port, "GET", "/api/v1/collections", browser)).status, 403)
      // Of no page: a proxy, or a program that calls this machine by another name.
      assert.strictEqual((await ask(node.port, "GET", "/api/v1/collections", { host })).status, 200)
      assert.strictEqual(await upgraded(node.port, { host, origin: `http://${host}` }), 403)
    }
    for (const host of ["localhost", `127.0.0.1:${node.port}`, "[::1]:80", "LOCALHOST:1"]) {
      assert.strictEqual((await ask(node.port, "GET", "/api/v1/collections", { host })).status, 200)
    }
  })
})
