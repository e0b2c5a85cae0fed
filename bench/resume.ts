/**
 * Streams that are cut, and events that go to many.
 *
 *   cuts     subscribers of standing queries and change feeds on every wire, cut 10,000 times under a load of changes: by the
 *            client, by the network in the middle of an event, by partitions that are passivated, and with the node, which is
 *            stopped and killed. What the events come to is compared with all records, and with every write's answer.
 *   fan-out  one change to 1,000 sessions, of one query and of 1,000 different ones: CPU of the main thread for each event
 *   cursor   what a cursor costs
 *
 *   npm run bench:resume -- [--only cuts,fan-out,cursor] [--cuts 10000] [--sessions 1000] [--changes 100] [--seed 1]
 */
import { mkdtempSync, rmSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { parseArgs } from "node:util"
import { Effect, Layer } from "effect"
import { WebSocket } from "ws"
import { defaultSettings, Settings } from "../src/config.ts"
import { Cursors } from "../src/gateway/Cursors.ts"
import { partitionOf } from "../src/shards/PartitionMap.ts"
import { ObjectStore } from "../src/tiers/ObjectStore.ts"
import { type CutProxy, startCutProxy } from "../test/support/CutProxy.ts"
import { type Random, random } from "../test/support/Seeded.ts"
import {
  AnswerFold,
  type Asked,
  bruteForce,
  ChangeLoad,
  differences,
  FeedFold,
  isSequenceOf,
  noFaults,
  Subscriber,
  type Wire
} from "../test/support/Subscribers.ts"
import { mainThreadMicros } from "./processTree.ts"
import { type Server, startOurs } from "./servers.ts"

const { values } = parseArgs({
  options: {
    only: { type: "string", default: "cuts,fan-out,cursor" },
    cuts: { type: "string", default: "10000" },
    sessions: { type: "string", default: "1000" },
    changes: { type: "string", default: "100" },
    seed: { type: "string", default: "1" }
  }
})

const say = (words: string): void => {
  process.stdout.write(`${words}\n`)
}

const directory = mkdtempSync(join(tmpdir(), "ruvector-resume-"))
process.on("exit", () => rmSync(directory, { recursive: true, force: true, maxRetries: 3 }))
for (const signal of ["SIGINT", "SIGTERM"] as const) process.on(signal, () => process.exit(1))

const put = async (url: string, path: string, body: object): Promise<void> => {
  const headers = { "content-type": "application/json" }
  const response = await fetch(`${url}/api/v1/${path}`, { method: "PUT", headers, body: JSON.stringify(body) })
  if (!response.ok) throw new Error(`${path}: ${response.status} ${await response.text()}`)
}

const sleep = (millis: number) => new Promise((resolve) => setTimeout(resolve, millis))

/** Waits until it holds, and answers why it does not. */
const settled = async (why: () => string, millis: number): Promise<string> => {
  const until = Date.now() + millis
  for (let words = why(); ; words = why()) {
    if (words === "" || Date.now() > until) return words
    await sleep(50)
  }
}

// --- Cuts ------------------------------------------------------------------------------------------------------------

const collection = "cut"
const dimensions = 8
const partitions = 3
const wires: ReadonlyArray<Wire> = ["sse", "ws", "rpc"]

const standing = (source: Random): ReadonlyArray<Asked & { readonly stream: "subscribe" }> => [
  { stream: "subscribe", collection, query: source.vector(dimensions), k: 5 },
  { stream: "subscribe", collection, query: source.vector(dimensions), k: 30, min_score: 0.2, include: ["metadata"] },
  { stream: "subscribe", collection, query: source.vector(dimensions), k: 10, filter: { even: true } }
]

/** Partitions that the server has made resident. */
const activations = async ({ url }: Server): Promise<number> => {
  const text = await (await fetch(`${url}/metrics`)).text()
  return Number(/^ruvector_partition_activations(?:\{[^}]*\})? (\d+)/m.exec(text)?.[1] ?? Number.NaN)
}

const cuts = async (wanted: number): Promise<void> => {
  const source = random(Number(values.seed))
  const data = join(directory, "cuts")
  // Looked at every five seconds: then whatever has just nothing to do is passivated, under load and followers.
  const flags = ["--partition-idle-millis", "5", "--drain-millis", "300", "--reconnect-spread-millis", "0"]
  const start = () => startOurs(data, [...flags, "--log-level", "error"])
  let server: Server = await start()
  const portOf = () => Number(new URL(server.url).port)
  await put(server.url, `collections/${collection}`, { dimensions, partitions })
  const proxy: CutProxy = await startCutProxy(portOf())
  proxy.allowance = () => 100 + source.below(4_000)
  const faults = noFaults()
  const answers = wires.flatMap((wire) =>
    [...standing(source), ...standing(source)].map((asked) => {
      const fold = new AnswerFold(faults)
      return { wire, asked, fold, subscriber: new Subscriber(wire, () => proxy.port, asked, fold) }
    })
  )
  const feeds = wires.flatMap((wire) =>
    [0, 1].map(() => {
      const fold = new FeedFold(faults, (id) => partitionOf(id, partitions))
      const asked = { stream: "changes", collection, from: "oldest" } as const
      return { wire, fold, subscriber: new Subscriber(wire, () => proxy.port, asked, fold) }
    })
  )
  const subscribers = [...answers, ...feeds].map(({ subscriber }) => subscriber)
  const load = new ChangeLoad(() => server.url, collection, source, 150, dimensions)
  const counts = { client: 0, passivated: 0, stopped: 0, killed: 0 }
  const cutSoFar = () => proxy.cuts() + counts.client
  const started = performance.now()
  let nextEvent = 0.1
  while (cutSoFar() < wanted) {
    await load.run(30)
    for (const subscriber of subscribers) {
      if (source.next() < 0.3) {
        subscriber.cut()
        counts.client += 1
      }
    }
    // Ten times, spread over the run: stopped, or killed with writes under way.
    if (cutSoFar() >= wanted * nextEvent) {
      nextEvent += 0.09
      const kill = counts.stopped > counts.killed
      counts.passivated += (await activations(server)) - partitions
      const writing = kill ? load.run(20) : Promise.resolve()
      if (kill) await sleep(30)
      await server.stop(kill ? "SIGKILL" : "SIGTERM")
      await writing
      server = await start()
      proxy.target = portOf()
      counts[kill ? "killed" : "stopped"] += 1
      process.stderr.write(`  ${cutSoFar()} cuts, ${load.changes} changes\n`)
    }
  }
  const seconds = (performance.now() - started) / 1_000
  proxy.allowance = () => undefined
  await load.run(30)
  const records = await load.records()
  let wrong = 0
  for (const { wire, asked, fold } of answers) {
    const words = await settled(() => differences(fold.answer(), bruteForce(records, asked)), 15_000)
    if (words === "") continue
    wrong += 1
    say(`  ${wire} ${JSON.stringify(asked)}: ${words}`)
  }
  const least = [...load.acknowledged.values()].flat().filter((kind) => !kind.endsWith("?")).length
  let resyncs = 0
  let events = answers.reduce((sum, { fold }) => sum + fold.changes, 0)
  for (const { wire, fold } of feeds) {
    await settled(() => (fold.changes.length >= least ? "" : "some are missing"), 15_000)
    resyncs += fold.resyncs
    events += fold.changes.length
    for (const [id, kinds] of load.acknowledged) {
      const followed = fold.changes.filter((change) => change.id === id).map(({ kind }) => kind)
      if (isSequenceOf(followed, kinds)) continue
      faults.gaps += 1
      say(`  ${wire} ${id}: ${followed.length} changes followed, ${kinds.length} made`)
    }
  }
  await Promise.all(subscribers.map((subscriber) => subscriber.stop()))
  const refusals = new Map<string, number>()
  for (const code of subscribers.flatMap((subscriber) => subscriber.refusals)) {
    refusals.set(code, (refusals.get(code) ?? 0) + 1)
  }
  await proxy.stop()
  await server.stop()
  const resumed = subscribers.reduce((sum, subscriber) => sum + subscriber.resumed, 0)
  say(
    `cuts: ${cutSoFar()} (${proxy.cuts()} by the network, ${counts.client} by clients), node stopped ${counts.stopped} and killed ` +
      `${counts.killed} times, partitions passivated ${counts.passivated} times; ${resumed} resumed; ${load.changes} changes made, ` +
      `${events} received, ${seconds.toFixed(0)} s`
  )
  if (refusals.size > 0) say(`  answered meanwhile: ${[...refusals].map(([code, n]) => `${code} ${n}`).join(", ")}`)
  for (const words of faults.said) say(`  ${words}`)
  say(
    `gaps ${faults.gaps}, repeats ${faults.repeats}, out of order ${faults.outOfOrder} (asked 0, 0, 0); wrong answers at the end ` +
      `${wrong}, resyncs ${resyncs}`
  )
  if (faults.gaps + faults.repeats + faults.outOfOrder + wrong + resyncs > 0) process.exitCode = 1
}

// --- Fan-out -----------------------------------------------------------------------------------------------------------

const fanOut = async (sessions: number, changes: number): Promise<void> => {
  for (const kind of ["one query", "different queries", "change feed"] as const) {
    const server = await startOurs(join(directory, kind.replace(" ", "-")), ["--log-level", "error"])
    await put(server.url, "collections/fan", { dimensions, partitions: 1 })
    const source = random(Number(values.seed))
    const near = source.vector(dimensions)
    const insert = async (n: number) => {
      const vector = near.map((component) => component + 0.01 * source.next())
      const body = JSON.stringify({ collection: "fan", vectors: [{ id: "moving", vector, metadata: { n } }] })
      const headers = { "content-type": "application/json" }
      const response = await fetch(`${server.url}/api/v1/insert`, { method: "POST", headers, body })
      if (!response.ok) throw new Error(await response.text())
    }
    await insert(0)
    const connections = 10
    let events = 0
    const sockets = await Promise.all(
      Array.from({ length: connections }, async () => {
        const socket = new WebSocket(`${server.url.replace("http", "ws")}/api/v1/ws`, { perMessageDeflate: false })
        await new Promise((resolve, reject) => socket.once("open", resolve).once("error", reject))
        // Only counted: the reader must not be what limits.
        socket.on("message", () => (events += 1))
        return socket
      })
    )
    const cpuOf = async (work: () => Promise<void>): Promise<number> => {
      const before = mainThreadMicros(server.pid)
      await work()
      return mainThreadMicros(server.pid) - before
    }
    const write = async () => {
      for (let n = 1; n <= changes; n++) {
        const expected = events + subscribed
        await insert(n)
        while (events < expected) await sleep(1)
      }
    }
    let subscribed = 0
    await write()
    const alone = await cpuOf(write)
    for (let n = 0; n < sessions; n++) {
      const query = near.map((component) => component + (kind === "different queries" ? 0.2 * source.next() : 0))
      const frame =
        kind === "change feed"
          ? { type: "follow", id: "s", session: `s${n}`, collection: "fan" }
          : { type: "subscribe", id: "s", session: `s${n}`, collection: "fan", query, k: 10 }
      sockets[n % connections]?.send(JSON.stringify(frame))
    }
    while (events < sessions) await sleep(5)
    subscribed = sessions
    await write()
    const together = await cpuOf(write)
    const micros = (together - alone) / (changes * sessions)
    say(
      `fan-out, ${kind}: one change to ${sessions} sessions, main thread ${micros.toFixed(1)} us for each event (asked <= 15)`
    )
    for (const socket of sockets) socket.terminate()
    await server.stop()
  }
}

// --- Cursors -----------------------------------------------------------------------------------------------------------

const cursor = async (): Promise<void> => {
  const layer = Cursors.layer.pipe(
    Layer.provide(ObjectStore.layerMemory),
    Layer.provide(Layer.succeed(Settings, defaultSettings))
  )
  const cursors = await Effect.runPromise(Effect.provide(Effect.scoped(Cursors), layer))
  const binding = cursors.binding(["standing", "tenant", "principal", "uid", "definition"])
  for (const k of [10, 256]) {
    const members = Array.from({ length: k }, (_, i) => ({
      id: `vector-${i}`,
      version: `18eb957e1752e0c0-${i}-local`,
      score: i
    }))
    let length = 0
    const each = (turns: number) => {
      const started = process.cpuUsage()
      for (let i = 0; i < turns; i++) length = cursors.ofAnswer(binding, [i], members).length
      const { user, system } = process.cpuUsage(started)
      return (user + system) / turns
    }
    each(10_000)
    say(`cursor of an answer of ${k}: ${each(50_000).toFixed(2)} us, ${length} characters`)
  }
}

const only = values.only.split(",")
if (only.includes("cursor")) await cursor()
if (only.includes("fan-out")) await fanOut(Number(values.sessions), Number(values.changes))
if (only.includes("cuts")) await cuts(Number(values.cuts))
