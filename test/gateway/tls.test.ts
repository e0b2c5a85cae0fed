/** TLS in process: HTTP/1.1, HTTP/2 and WebSockets by it, certificates renewed under standing connections. */
import { mkdtemp, rm, writeFile } from "node:fs/promises"
import * as Https from "node:https"
import * as net from "node:net"
import { tmpdir } from "node:os"
import { join } from "node:path"
import * as Tls from "node:tls"
import { afterAll, assert, beforeAll, describe, it } from "@effect/vitest"
import { Effect } from "effect"
import { WebSocket } from "ws"
import { defaultSettings, type SettingValues } from "../../src/config.ts"
import * as TlsWire from "../../src/gateway/TlsWire.ts"
import { makeCertificate } from "../support/Certificates.ts"
import { Http2Client } from "../support/Http2Client.ts"
import { type RunningNode, startNode } from "../support/Node.ts"
import { runServe } from "../support/ServerProcess.ts"

const first = makeCertificate("first")
const second = makeCertificate("second")

let directory: string
let files: { readonly tlsCert: string; readonly tlsKey: string }
let node: RunningNode
let base: string

beforeAll(async () => {
  directory = await mkdtemp(join(tmpdir(), "ruvector-tls-"))
  files = { tlsCert: join(directory, "cert.pem"), tlsKey: join(directory, "key.pem") }
  await writeFile(files.tlsCert, first.cert)
  await writeFile(files.tlsKey, first.key)
  node = await startNode({ ...files, sniffTimeoutMillis: 500 })
  base = `https://127.0.0.1:${node.port}`
})
afterAll(async () => {
  await node.stop()
  await rm(directory, { recursive: true, force: true })
})

interface Answer {
  readonly status: number
  readonly text: string
}

const overHttp1 = (path: string, ca: string, agent: Https.Agent, body?: string): Promise<Answer> =>
  new Promise((resolve, reject) => {
    const method = body === undefined ? "GET" : "POST"
    const headers = body === undefined ? {} : { "content-type": "application/json" }
    const request = Https.request(`${base}${path}`, { ca, agent, method, headers }, (response) => {
      let text = ""
      response.setEncoding("utf8")
      response.on("data", (chunk: string) => (text += chunk))
      response.on("end", () => resolve({ status: response.statusCode ?? 0, text }))
    })
    request.on("error", reject)
    request.end(body)
  })

/** Whose certificate a new connection is shown. */
const shown = (): Promise<string> =>
  new Promise((resolve, reject) => {
    const socket = Tls.connect({ host: "127.0.0.1", port: node.port, rejectUnauthorized: false }, () => {
      const name = socket.getPeerCertificate().subject.CN
      socket.destroy()
      resolve(String(name))
    })
    socket.on("error", reject)
  })

describe("TLS", () => {
  it("the same answers by HTTP/1.1 and HTTP/2, events and WebSockets too", async () => {
    const agent = new Https.Agent({ keepAlive: true })
    const h2 = await Http2Client.open(base, { ca: first.cert })
    assert.strictEqual((h2.session.socket as Tls.TLSSocket).alpnProtocol, "h2")
    const body = '{"vectors":[{"id":"a","vector":[1,0]},{"id":"b","vector":[0.8,0.6]}]}'
    assert.strictEqual((await h2.ask("/api/v1/insert", body)).text, '{"inserted":2}')
    assert.deepStrictEqual(await overHttp1("/api/v1/insert", first.cert, agent, body), {
      status: 200,
      text: '{"inserted":2}'
    })
    const searches = [
      await overHttp1("/api/v1/search", first.cert, agent, '{"query":[1,0],"k":2}'),
      await h2.json("/api/v1/search", { query: [1, 0], k: 2 })
    ]
    for (const { text } of searches) {
      const ids = (JSON.parse(text) as { results: Array<{ vector_id: string }> }).results.map((one) => one.vector_id)
      assert.deepStrictEqual(ids, ["a", "b"])
    }
    for (const { text } of [
      await overHttp1("/api/v1/stream/search?query_vector_id=a", first.cert, agent),
      await h2.ask("/api/v1/stream/search?query_vector_id=a")
    ]) {
      assert.include(text, '"event":"search_complete","total_results":2')
    }
    const large = await overHttp1("/api/v1/search", first.cert, agent, `"${"x".repeat(40 << 20)}`)
    assert.strictEqual(large.status, 413)
    const ws = new WebSocket(`${base.replace("https", "wss")}/api/v1/ws`, { ca: first.cert })
    await new Promise((resolve) => ws.once("open", resolve))
    ws.send('{"type":"ping","id":"1"}')
    const pong = await new Promise<string>((resolve) => ws.once("message", (data) => resolve(String(data))))
    assert.strictEqual(pong, '{"event":"pong","id":"1"}')
    ws.close()
    h2.close()
    agent.destroy()
  })

  it("refuses what is in the clear, older than TLS 1.2, or never finishes its handshake", async () => {
    const answer = (bytes: string | Buffer): Promise<string> =>
      new Promise((resolve) => {
        const socket = net.connect(node.port, "127.0.0.1", () => socket.write(bytes))
        let text = ""
        socket.on("data", (chunk) => (text += chunk.toString("latin1")))
        socket.on("error", () => {})
        socket.once("close", () => resolve(text))
      })
    assert.match(await answer("GET / HTTP/1.1\r\nhost: x\r\n\r\n"), /^HTTP\/1\.1 400 .*"code":"tls_required"/s)
    assert.match(await answer("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), /^HTTP\/1\.1 400 .*"code":"tls_required"/s)
    assert.strictEqual(await answer(Buffer.from([0x16, 3, 1])), "")
    assert.strictEqual(await answer(""), "")
    const old = await new Promise<string>((resolve) => {
      const socket = Tls.connect(
        {
          host: "127.0.0.1",
          port: node.port,
          rejectUnauthorized: false,
          minVersion: "TLSv1.1",
          maxVersion: "TLSv1.1",
          ciphers: "DEFAULT@SECLEVEL=0"
        },
        () => resolve("connected")
      )
      socket.on("error", (error: NodeJS.ErrnoException) => resolve(error.code ?? error.message))
    })
    assert.match(old, /PROTOCOL_VERSION|ALERT|ECONNRESET/)
  })

  it("takes a renewed certificate, at once on SIGHUP, and drops nobody", async () => {
    const agent = new Https.Agent({ keepAlive: true, maxSockets: 1 })
    const h2 = await Http2Client.open(base, { ca: first.cert })
    const ws = new WebSocket(`${base.replace("https", "wss")}/api/v1/ws`, { ca: first.cert })
    await new Promise((resolve) => ws.once("open", resolve))
    await overHttp1("/health/live", first.cert, agent)
    assert.strictEqual(await shown(), "first")

    // Half of a renewal is none: the key is not that of the certificate.
    await writeFile(files.tlsCert, second.cert)
    process.kill(process.pid, "SIGHUP")
    await new Promise((resolve) => setTimeout(resolve, 300))
    assert.strictEqual(await shown(), "first")
    await writeFile(files.tlsKey, second.key)
    process.kill(process.pid, "SIGHUP")
    const until = Date.now() + 5_000
    while ((await shown()) !== "second") {
      assert.isBelow(Date.now(), until)
      await new Promise((resolve) => setTimeout(resolve, 20))
    }

    assert.strictEqual((await h2.ask("/health/live")).status, 200)
    ws.send('{"type":"ping"}')
    assert.strictEqual(
      await new Promise<string>((resolve) => ws.once("message", (data) => resolve(String(data)))),
      '{"event":"pong"}'
    )
    // The agent's one connection is the old one: a new one would not be believed by this authority.
    assert.strictEqual((await overHttp1("/health/live", first.cert, agent)).status, 200)
    ws.close()
    h2.close()
    agent.destroy()
  })

  it("says at start what is wrong with the files", { timeout: 60_000 }, async () => {
    const other = join(directory, "other.pem")
    await writeFile(other, makeCertificate("other").key)
    const nothing = join(directory, "nothing.pem")
    const cases: ReadonlyArray<readonly [Partial<SettingValues>, RegExp]> = [
      [{ tlsCert: files.tlsCert }, /--tls-key is not set/],
      [{ tlsCert: files.tlsCert, tlsKey: nothing }, /nothing\.pem cannot be read: ENOENT/],
      [{ tlsCert: files.tlsCert, tlsKey: other }, /other\.pem is not that of the certificate .*cert\.pem/],
      [{ tlsCert: other, tlsKey: other }, /other\.pem is no certificate in PEM/],
      [{ tlsCert: files.tlsCert, tlsKey: files.tlsCert }, /cert\.pem is no private key in PEM/]
    ]
    for (const [values, message] of cases) {
      const made = TlsWire.make({ ...defaultSettings, ...values }, { onSecure: () => {}, onFault: () => {} })
      const error = await Effect.runPromise(Effect.flip(Effect.scoped(made)))
      assert.match(error.message, message)
    }
    const flags = ["--port", "0", "--data", join(directory, "data"), "--log-level", "error", "--tls-cert", nothing]
    const { code, stderr } = await runServe([...flags, "--tls-key", other])
    assert.strictEqual(code, 1)
    assert.match(stderr, /^ruvector: The TLS certificate .*nothing\.pem cannot be read: ENOENT\.\n$/)
  })
})
