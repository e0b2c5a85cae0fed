/**
 * What the one port costs: the processor time of a new connection beside a server that does not look at its first bytes, of
 * a search over HTTP/2 beside one over HTTP/1.1, and what a client that behaves waits while every wire is attacked.
 *
 *   npm run bench:port [-- --rounds 3 --count 20000]
 */
import { fork } from "node:child_process"
import { once } from "node:events"
import { mkdtempSync, rmSync } from "node:fs"
import * as Http from "node:http"
import * as Http2 from "node:http2"
import { type AddressInfo, connect } from "node:net"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { fileURLToPath } from "node:url"
import { parseArgs } from "node:util"
import { Effect, Exit, Scope } from "effect"
import { defaultSettings, Settings } from "../src/config.ts"
import { ClientAddresses } from "../src/gateway/ClientAddresses.ts"
import * as OnePort from "../src/gateway/OnePort.ts"
import { attack } from "../test/support/Attackers.ts"
import { mainThreadMicros } from "./processTree.ts"
import { startOurs } from "./servers.ts"
import { openWire, searchFields } from "./wires.ts"
import { loadWords, vectorText } from "./words.ts"

const { values } = parseArgs({
  options: {
    rounds: { type: "string", default: "3" },
    count: { type: "string", default: "20000" },
    attack: { type: "string" }
  }
})

// The attackers are a process of their own: what they do must not hold up the client that is measured.
if (values.attack !== undefined) {
  const attackers = attack(Number(values.attack), 2)
  process.once("message", () => void attackers.stop().then(() => process.exit(0)))
  process.on("disconnect", () => process.exit(0))
  await new Promise(() => {})
}

const rounds = Number(values.rounds)
const searches = 3_000
const lanes = 16
const data = loadWords({ count: Number(values.count), queries: 500, seed: 1 })

const median = (numbers: ReadonlyArray<number>): number =>
  numbers.toSorted((a, b) => a - b)[Math.floor(numbers.length / 2)] as number
const percentile = (numbers: ReadonlyArray<number>, share: number): number =>
  numbers.toSorted((a, b) => a - b)[Math.floor((numbers.length - 1) * share)] as number

/** Sends `request` on connections of its own, one after the other on each of a few lanes. */
const connections = async (port: number, count: number): Promise<void> => {
  let left = count
  const lane = async (): Promise<void> => {
    while (left-- > 0) {
      await new Promise<void>((resolve, reject) => {
        const socket = connect(port, "127.0.0.1")
        socket.on("error", reject)
        socket.on("close", () => resolve())
        socket.resume()
        socket.write("DELETE /none HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
      })
    }
  }
  await Promise.all(Array.from({ length: 8 }, lane))
}

const overHttp2 = async (url: URL): Promise<(done: () => void, query: number) => void> => {
  const session = Http2.connect(url)
  await new Promise((resolve) => session.once("remoteSettings", resolve))
  const bodies = data.queries.words.map((_, query) => Buffer.from(`{${searchFields(data.queries, query, {})}}`))
  return (done, query) => {
    const stream = session.request({
      ":method": "POST",
      ":path": "/api/v1/search",
      "content-type": "application/json"
    })
    stream.on("response", (headers) => {
      if (headers[":status"] !== 200) throw new Error(`search answered ${headers[":status"]}`)
    })
    stream.resume()
    stream.on("close", done)
    stream.end(bodies[query])
  }
}

/** Runs searches on all lanes and gives the server's processor time for one, on its first thread. */
const measure = async (pid: number, ask: (done: () => void, query: number, lane: number) => void): Promise<number> => {
  const before = mainThreadMicros(pid)
  let sent = 0
  await Promise.all(
    Array.from(
      { length: lanes },
      (_, lane) =>
        new Promise<void>((resolve) => {
          const next = (): void => {
            if (sent >= searches) return resolve()
            ask(next, sent++ % data.queries.words.length, lane)
          }
          next()
        })
    )
  )
  return (mainThreadMicros(pid) - before) / searches
}

const directory = mkdtempSync(join(tmpdir(), "ruvector-port-"))
const server = await startOurs(directory, ["--log-level", "error"])
const url = new URL(server.url)
for (let row = 0; row < data.base.words.length; row += 1_000) {
  const vectors = data.base.words
    .slice(row, row + 1_000)
    .map((word, i) => `{"id":${JSON.stringify(word)},"vector":${vectorText(data.base, row + i)}}`)
  const body = `{"vectors":[${vectors.join(",")}]}`
  const headers = { "content-type": "application/json" }
  const response = await fetch(`${server.url}/api/v1/insert`, { method: "POST", headers, body })
  if (response.status !== 200) throw new Error(await response.text())
}

// A plain server in this process, and the port in front of the same handler. The client is in it too, the same for both.
const answer = (_: Http.IncomingMessage, response: Http.ServerResponse) => void response.writeHead(405).end()
const plain = Http.createServer({ noDelay: true, keepAlive: true }, answer)
await new Promise<void>((resolve) => plain.listen(0, "127.0.0.1", resolve))
const scope = await Effect.runPromise(Scope.make())
const settings = { ...defaultSettings, port: 0 }
const port = await Effect.runPromise(
  Effect.gen(function* () {
    return yield* OnePort.make(settings, yield* ClientAddresses, {
      onRequest: answer,
      onUpgrade: (_, socket) => socket.destroy(),
      onGrpc: (stream) => stream.close(),
      onRefused: () => {},
      onConnection: () => {}
    })
  }).pipe(
    Effect.provide(ClientAddresses.layer),
    Effect.provideService(Settings, settings),
    Effect.provideService(Scope.Scope, scope)
  )
)

const http1 = await openWire.http({
  url,
  lanes,
  queries: data.queries,
  onFailure: (error) => {
    throw error
  }
})
const http2 = await overHttp2(url)
const perSearch = { http1: [] as Array<number>, http2: [] as Array<number> }
const perConnection = { plain: [] as Array<number>, port: [] as Array<number> }
const connectionCost = async (to: number): Promise<number> => {
  const before = process.cpuUsage()
  await connections(to, 3_000)
  const { user, system } = process.cpuUsage(before)
  return (user + system) / 3_000
}
for (let round = 0; round < rounds; round++) {
  perSearch.http1.push(await measure(server.pid, (done, query, lane) => http1.ask(lane, query, done)))
  perSearch.http2.push(await measure(server.pid, (done, query) => http2(done, query)))
  perConnection.plain.push(await connectionCost((plain.address() as AddressInfo).port))
  perConnection.port.push(await connectionCost(port.address.port))
}

const latencies = async (millis: number): Promise<Array<number>> => {
  const times: Array<number> = []
  const until = performance.now() + millis
  for (let query = 0; performance.now() < until; query = (query + 1) % data.queries.words.length) {
    const started = performance.now()
    await new Promise<void>((resolve) => http2(resolve, query))
    times.push(performance.now() - started)
    await new Promise((resolve) => setTimeout(resolve, 5))
  }
  return times
}
const calm = await latencies(5_000)
const attackers = fork(fileURLToPath(import.meta.url), ["--attack", url.port])
// Until each has begun.
await new Promise((resolve) => setTimeout(resolve, 2_000))
const attacked = await latencies(10_000)
const { sample } = (await (await fetch(`${server.url}/api/v1/load`)).json()) as {
  readonly sample: { readonly event_loop_p99_ms: number }
}
attackers.send("stop")
await once(attackers, "exit")

const show = (name: string, figures: Record<string, number>) =>
  process.stdout.write(
    `${name}: ${Object.entries(figures)
      .map(([what, figure]) => `${what} ${figure.toFixed(2)}`)
      .join(", ")}\n`
  )
show("main thread, us a search", {
  http1: median(perSearch.http1),
  http2: median(perSearch.http2),
  ratio: median(perSearch.http2) / median(perSearch.http1)
})
const [plainMicros, portMicros] = [median(perConnection.plain), median(perConnection.port)]
show("client and server, us a connection with one request", {
  plain: plainMicros,
  port: portMicros,
  "the port more": portMicros - plainMicros
})
show("a search while every wire is attacked, ms", {
  "calm p50": percentile(calm, 0.5),
  "calm p99": percentile(calm, 0.99),
  "attacked p50": percentile(attacked, 0.5),
  "attacked p99": percentile(attacked, 0.99),
  "p99 x": percentile(attacked, 0.99) / percentile(calm, 0.99),
  "p99 of the server's event loop delay, attacked": sample.event_loop_p99_ms
})
http1.close()
plain.close()
await Effect.runPromise(Scope.close(scope, Exit.void))
await server.stop()
rmSync(directory, { recursive: true, force: true })
process.exit(0)
