/**
 * What WebSockets and their logical sessions cost, each part against a server of its own:
 *
 *   idle      a connection that does nothing, beside one of bare `ws` in the same run
 *   memory    a session that has just searched, and one that is asleep
 *   overhead  CPU of the main thread a search, at 64 under way
 *   streams   100,000 sessions on 100 connections, 1,000 searches/s among them
 *   storm     10,000 connections cut at once, and another client's searches meanwhile
 *
 *   node scripts/run.mjs --with bench bench/sessions.ts [part]... [--vectors N] [--seconds N] [--connections N]
 *
 * A process may open so many files and no more (`ulimit -n`): a part that needs more connections says so and takes as many
 * as it may. Sessions are not files.
 */
import { execFileSync, fork } from "node:child_process"
import { mkdtempSync, rmSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { fileURLToPath } from "node:url"
import { parseArgs } from "node:util"
import { Latencies, MultiplexedSocket } from "./MultiplexedSocket.ts"
import { mainThreadMicros, mainThreadNanos, residentBytes, settledBytes } from "./processTree.ts"
import { type Server, startBareWebSockets, startOurs } from "./servers.ts"
import { loadWords, vectorText } from "./words.ts"

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    vectors: { type: "string", default: "5000" },
    seconds: { type: "string", default: "30" },
    connections: { type: "string", default: "10000" },
    probe: { type: "string" }
  }
})
const vectors = Number(values.vectors)
const seconds = Number(values.seconds)
const { base, queries } = loadWords({ count: vectors, queries: 1_000, seed: 1 })
const queryTexts = queries.words.map((_, row) => vectorText(queries, row))
const queryText = (n: number): string => queryTexts[n % queryTexts.length] as string

const parts: Record<string, () => Promise<void>> = {
  idle: async () => {
    const count = Math.floor(within(10_000) / 2)
    const bare = await startBareWebSockets()
    const ours = await served([], 0)
    const each = async (server: Pick<Server, "url" | "pid">): Promise<number> => {
      // The first thousands use up what starting has left free in the heap.
      const first = await openSome(server.url, count)
      const before = await settledBytes(server.pid)
      const sockets = await openSome(server.url, count)
      const after = await settledBytes(server.pid)
      sockets.push(...first)
      const open = sockets.filter((socket) => socket.isOpen).length
      if (open !== 2 * count) throw new Error(`${2 * count - open} of ${2 * count} connections were closed`)
      for (const socket of sockets) socket.end()
      return (after - before) / count
    }
    const bareBytes = await each(bare)
    const oursBytes = await each(ours)
    say(`idle connection: ${kb(oursBytes)} KB, of bare ws ${kb(bareBytes)} KB (${count} of each, after as many)`)
    await bare.stop()
    await ours.stop()
  },

  memory: async () => {
    const connections = 100
    const each = 100
    const count = connections * each
    const searched = (sockets: ReadonlyArray<MultiplexedSocket>, from: number, to: number) =>
      Promise.all(
        sockets.map(async (socket) => {
          for (let n = from; n < to; n++) await socket.insist(`s${n}`, queryText(n))
        })
      )
    {
      const server = await served(["--session-idle-millis", "600000"])
      const sockets = await openSome(server.url, connections)
      // The first of them make what all share.
      await searched(sockets, 0, 10)
      const before = await settledBytes(server.pid)
      await searched(sockets, 10, 10 + each)
      const after = await settledBytes(server.pid)
      say(`active session: ${kb((after - before) / count)} KB (${count} sessions on ${connections} connections)`)
      for (const socket of sockets) socket.end()
      await server.stop()
    }
    {
      const server = await served(["--session-idle-millis", "5000"])
      const sockets = await openSome(server.url, connections)
      // What as many had while they were awake is free in the heap, and used again by the next.
      await searched(sockets, 0, each)
      await untilAsleep(server.url)
      const before = await settledBytes(server.pid)
      await searched(sockets, each, 2 * each)
      await untilAsleep(server.url)
      const after = await settledBytes(server.pid)
      say(`asleep session: ${kb((after - before) / count)} KB (${count} more of them)`)
      for (const socket of sockets) socket.end()
      await server.stop()
    }
  },

  overhead: async () => {
    const server = await served()
    const [socket] = (await openSome(server.url, 1)) as [MultiplexedSocket]
    const lanes = 64
    const run = async (until: number): Promise<number> => {
      let searches = 0
      await Promise.all(
        Array.from({ length: lanes }, async (_, lane) => {
          for (let n = lane; performance.now() < until; n += lanes) {
            await socket.insist(`s${lane}`, queryText(n))
            searches++
          }
        })
      )
      return searches
    }
    await run(performance.now() + 4_000)
    // Others on the machine make a search dearer, by what they leave of the caches: the cheapest windows are the ones least
    // disturbed.
    const windows: Array<number> = []
    let all = 0
    for (let window = 0; window < 20; window++) {
      const before = mainThreadNanos(server.pid)
      const searches = await run(performance.now() + 500)
      windows.push((mainThreadNanos(server.pid) - before) / searches / 1_000)
      all += searches
    }
    windows.sort((a, b) => a - b)
    const at = (share: number) => (windows[Math.floor(windows.length * share)] as number).toFixed(0)
    say(
      `search over WebSocket, CPU of the main thread: ${at(0.1)} us where least disturbed (tenth percentile of half seconds; ` +
        `asked <= 120), median ${at(0.5)} us (${all} searches, ${Math.round(all / 10)}/s)`
    )
    socket.end()
    await server.stop()
  },

  streams: async () => {
    const connections = 100
    const each = 1_000
    const rate = 1_000
    const server = await served()
    const before = residentBytes(server.pid)
    const sockets = await openSome(server.url, connections)
    const session = (n: number) => `s${Math.floor(n / connections)}`
    // Each session searches once, so that each is known to the server.
    const all = connections * each
    let made = 0
    await Promise.all(
      sockets.map(async (socket, connection) => {
        for (let n = connection; n < all; n += connections) {
          await socket.insist(session(n), queryText(n))
          if (++made % 20_000 === 0) say(`${made} sessions`)
        }
      })
    )
    const latencies = new Latencies()
    const cpuBefore = mainThreadMicros(server.pid)
    const asked: Array<Promise<void>> = []
    let refused = 0
    const started = performance.now()
    let n = 0
    let peak = 0
    // A fixed rate, whatever the answers take; latency counts from when the search was due.
    while (n < rate * seconds) {
      const due = Math.min(rate * seconds, Math.floor(((performance.now() - started) * rate) / 1_000))
      for (; n < due; n++) {
        // Any order that comes to all of them.
        const which = (n * 7_919) % all
        const at = started + (n * 1_000) / rate
        const socket = sockets[which % connections] as MultiplexedSocket
        asked.push(
          socket.search(session(which), queryText(n)).then(
            () => latencies.add(performance.now() - at),
            () => void refused++
          )
        )
      }
      if (n % 1_000 < 20) peak = Math.max(peak, residentBytes(server.pid))
      await new Promise((resolve) => setTimeout(resolve, 2))
    }
    await Promise.all(asked)
    const cpu = (mainThreadMicros(server.pid) - cpuBefore) / 1e4 / ((performance.now() - started) / 1_000)
    const known = await metric(server.url, "ruvector_sessions")
    const awake = await metric(server.url, "ruvector_sessions_resident")
    const open = sockets.filter((socket) => socket.isOpen).length
    say(
      `${all} sessions on ${connections} connections, ${rate} searches/s for ${seconds} s: ${latencies.text()}; ` +
        `${asked.length - refused} answered, ${refused} refused, ${known} sessions of ${all} and ${open} connections there, ${awake} awake at the end; ` +
        `RSS at most ${mb(peak)} MB (${mb(before)} before), main thread ${cpu.toFixed(0)} % busy`
    )
    for (const socket of sockets) socket.end()
    await server.stop()
  },

  storm: async () => {
    const count = within(Number(values.connections))
    const spreadMillis = count / 2
    const server = await served()
    let sockets = await openSome(server.url, count)
    await Promise.all(sockets.map((socket, n) => socket.insist("", queryText(n))))
    say(`${count} connections, each with a session`)
    const calm = await probed(server.url, 10)
    const during = probed(server.url, 15)
    const watched = watchLoad(server)
    // The other client is there first.
    await new Promise((resolve) => setTimeout(resolve, 1_500))
    const started = performance.now()
    for (const socket of sockets) socket.end()
    const back = new Latencies()
    sockets = await Promise.all(
      Array.from({ length: count }, async (_, n) => {
        await new Promise((resolve) => setTimeout(resolve, Math.random() * spreadMillis))
        const socket = await MultiplexedSocket.open(server.url)
        await socket.insist("", queryText(n))
        back.add(performance.now() - started)
        return socket
      })
    )
    const all = (performance.now() - started) / 1_000
    const storm = await during
    const { busyPercent, loopMillis, searchMillis } = watched()
    say(
      `${count} connections cut at once, back over ${spreadMillis / 1_000} s: all back, and answered, after ${all.toFixed(1)} s; ` +
        `searches of another client: p99 ${calm.p99.toFixed(1)} ms before, ${storm.p99.toFixed(1)} ms meanwhile ` +
        `(${(storm.p99 / calm.p99).toFixed(2)} x; asked <= 2 x, all back < 30 s), p50 ${calm.p50.toFixed(1)} and ${storm.p50.toFixed(1)} ms`
    )
    // What the machine's other programs, the clients among them, keep from the server is in the latencies above too.
    say(
      `of that the server's: main thread ${busyPercent.toFixed(0)} % of a core, p99 of its event loop's delay at most ` +
        `${loopMillis.toFixed(0)} ms, of all its searches at most ${searchMillis.toFixed(0)} ms (samples of ${loadSampleMillis} ms)`
    )
    for (const socket of sockets) socket.end()
    await server.stop()
  }
}

const served = async (flags: ReadonlyArray<string> = [], loaded = vectors): Promise<Server> => {
  const directory = mkdtempSync(join(tmpdir(), "ruvector-sessions-"))
  process.on("exit", () => rmSync(directory, { recursive: true, force: true }))
  // Every search is one: queries come again, and their answers are not kept.
  const server = await startOurs(directory, ["--result-cache-bytes", "0", ...flags])
  const batch = 500
  for (let at = 0; at < loaded; at += batch) {
    const body = Array.from(
      { length: Math.min(batch, loaded - at) },
      (_, i) => `{"id":${JSON.stringify(base.words[at + i])},"vector":${vectorText(base, at + i)}}`
    )
    const response = await fetch(`${server.url}/api/v1/insert`, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: `{"vectors":[${body.join(",")}]}`
    })
    if (response.status !== 200) throw new Error(`insert answered ${response.status}: ${await response.text()}`)
  }
  return server
}

const openSome = async (url: string, count: number): Promise<Array<MultiplexedSocket>> => {
  const sockets: Array<MultiplexedSocket> = []
  let opening = 0
  await Promise.all(
    Array.from({ length: 32 }, async () => {
      while (opening < count) {
        opening++
        sockets.push(await MultiplexedSocket.open(url))
      }
    })
  )
  return sockets
}

/** Files that this process may open leave room for so many connections. */
const within = (count: number): number => {
  const limit = Number(execFileSync("sh", ["-c", "ulimit -n"]).toString())
  const may = Number.isFinite(limit) ? limit - 500 : count
  if (may < count) say(`only ${may} connections: the limit of open files is ${limit} (ulimit -n)`)
  return Math.min(may, count)
}

const metric = async (url: string, name: string): Promise<number> => {
  const text = await (await fetch(`${url}/metrics`)).text()
  return Number(new RegExp(`^${name} (\\S+)`, "m").exec(text)?.[1])
}

/** Looks at the server's own view of its load until it is asked for the greatest of what was seen. */
const watchLoad = (server: Server) => {
  const started = performance.now()
  const before = mainThreadNanos(server.pid)
  let loopMillis = 0
  let searchMillis = 0
  const look = async (): Promise<void> => {
    const { sample } = (await (await fetch(`${server.url}/api/v1/load`)).json()) as {
      readonly sample: { readonly event_loop_p99_ms: number; readonly search_p99_ms: number }
    }
    loopMillis = Math.max(loopMillis, sample.event_loop_p99_ms)
    searchMillis = Math.max(searchMillis, sample.search_p99_ms)
  }
  const timer = setInterval(() => void look().catch(() => {}), loadSampleMillis)
  return () => {
    clearInterval(timer)
    const busy = (mainThreadNanos(server.pid) - before) / 1e6 / (performance.now() - started)
    return { busyPercent: 100 * busy, loopMillis, searchMillis }
  }
}

const loadSampleMillis = 1_000

const untilAsleep = async (url: string): Promise<void> => {
  while ((await metric(url, "ruvector_sessions_resident")) > 0) await new Promise((resolve) => setTimeout(resolve, 500))
}

/** Searches of another client, a process of its own, at 100/s. */
const probed = (url: string, forSeconds: number): Promise<{ readonly p50: number; readonly p99: number }> =>
  new Promise((resolve, reject) => {
    const child = fork(fileURLToPath(import.meta.url), [
      ...["--vectors", values.vectors, "--seconds", String(forSeconds), "--probe", url]
    ])
    child.on("message", resolve as (message: unknown) => void)
    child.on("exit", (code) => reject(new Error(`the other client ended with ${code}`)))
  })

const probe = async (url: string): Promise<void> => {
  const socket = await MultiplexedSocket.open(url)
  const latencies = new Latencies()
  const started = performance.now()
  for (let n = 0; performance.now() < started + seconds * 1_000; n++) {
    const at = started + n * 10
    const wait = at - performance.now()
    if (wait > 0) await new Promise((resolve) => setTimeout(resolve, wait))
    const sent = performance.now()
    await socket.insist("probe", queryText(n))
    if (sent > started + 1_000) latencies.add(performance.now() - sent)
  }
  process.send?.({ p50: latencies.at(0.5), p99: latencies.at(0.99) })
  process.disconnect()
  socket.end()
}

const say = (text: string): void => console.log(text)
const kb = (bytes: number): string => (bytes / 1_000).toFixed(1)
const mb = (bytes: number): string => (bytes / 1e6).toFixed(0)

if (values.probe !== undefined) await probe(values.probe)
else {
  for (const name of positionals.length === 0 ? Object.keys(parts) : positionals) {
    const part = parts[name]
    if (part === undefined) throw new Error(`no part ${name}: one of ${Object.keys(parts).join(", ")}`)
    await part()
  }
}
