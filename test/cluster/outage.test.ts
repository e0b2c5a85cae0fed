/**
 * A small cluster of real processes on a Postgres of its own: what clients of a gateway see when a runner comes or goes, and
 * when the database does.
 */
import { randomBytes } from "node:crypto"
import { mkdtemp, rm } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { afterAll, assert, beforeAll, describe, it } from "@effect/vitest"
import { type Postgres, skipPostgres, startPostgres } from "../support/Postgres.ts"
import { ready, type ServerProcess, startServer } from "../support/ServerProcess.ts"

let postgres: Postgres
let data: string
let gateways: Array<ServerProcess>
let runners: Array<ServerProcess>
const cell = `t${randomBytes(4).toString("hex")}`

/** Longer than a call may take: what waits for open requests to end is seen by it. */
const drainMillis = 20_000
const callMillis = 8_000

const start = (role: "gateway" | "runner") =>
  startServer(data, [
    ...["--role", role, "--database-url", postgres.url, "--cell", cell, "--threads", "1"],
    ...["--address-rate", "0", "--result-cache-bytes", "0", "--activate", "none"],
    ...["--drain-millis", `${drainMillis}`, "--cluster-call-millis", `${callMillis}`]
  ])

const call = async (server: ServerProcess, method: string, path: string, body?: unknown) => {
  const response = await fetch(`${server.base}${path}`, {
    method,
    ...(body === undefined ? {} : { headers: { "content-type": "application/json" }, body: JSON.stringify(body) })
  })
  return { status: response.status, body: (await response.json()) as Record<string, unknown> }
}

const insert = (server: ServerProcess, id: string) =>
  call(server, "POST", "/api/v1/insert", { collection: "c", vectors: [{ id, vector: [1, Math.random(), 0] }] })

const search = (server: ServerProcess) =>
  call(server, "POST", "/api/v1/search", { collection: "c", query: [1, 0, 0], k: 3 })

const metric = async (server: ServerProcess, name: string): Promise<number> => {
  const text = await (await fetch(`${server.base}/metrics`)).text()
  const found = new RegExp(`^${name}(?:\\{[^}]*\\})? (\\S+)$`, "m").exec(text)
  return found === null ? 0 : Number(found[1])
}

const sum = async (name: string): Promise<number> =>
  (await Promise.all(runners.map((runner) => metric(runner, name)))).reduce((all, one) => all + one, 0)

/** Writes and searches by two clients until `during` is over; what was not answered as it should be, and what was written. */
const load = async (during: () => Promise<void>) => {
  let going = true
  const faults: Array<string> = []
  const written: Array<string> = []
  const client = async (n: number) => {
    for (let i = 0; going; i++) {
      const server = gateways[n % gateways.length] as ServerProcess
      const id = `${n}-${i}-${written.length}`
      const put = await insert(server, id)
      if (put.status === 200) written.push(id)
      else faults.push(JSON.stringify(put))
      const found = await search(server)
      if (found.status !== 200 || found.body["partial"] !== false) faults.push(JSON.stringify(found))
    }
  }
  const clients = Promise.all([client(0), client(1)])
  await during()
  going = false
  await clients
  return { faults, written }
}

const allThere = async (ids: ReadonlyArray<string>) => {
  for (const id of ids) {
    const { status } = await call(gateways[0] as ServerProcess, "GET", `/api/v1/embed/${id}?collection=c`)
    assert.strictEqual(status, 200, id)
  }
}

const until = async (isSo: () => boolean | Promise<boolean>, what: string, millis = 30_000) => {
  const end = performance.now() + millis
  while (!(await isSo())) {
    if (performance.now() > end) throw new Error(`not within ${millis} ms: ${what}`)
    await sleep(50)
  }
}

const sleep = (millis: number) => new Promise((resolve) => setTimeout(resolve, millis))

/** So many that a runner that joins is given some: each with a chance of a third. */
const partitions = 16

describe.skipIf(skipPostgres)("a cluster", { timeout: 120_000 }, () => {
  beforeAll(async () => {
    postgres = await startPostgres()
    data = await mkdtemp(join(tmpdir(), "ruvector-cluster-"))
    runners = await Promise.all([start("runner"), start("runner")])
    gateways = await Promise.all([start("gateway"), start("gateway")])
    await Promise.all([...runners, ...gateways].map(({ base }) => ready(base)))
    const made = await call(gateways[0] as ServerProcess, "PUT", "/api/v1/collections/c", {
      dimensions: 3,
      partitions
    })
    assert.strictEqual(made.status, 201, JSON.stringify(made))
    await insert(gateways[0] as ServerProcess, "first")
    assert.strictEqual((await search(gateways[0] as ServerProcess)).status, 200)
  }, 120_000)

  afterAll(async () => {
    await Promise.all([...gateways, ...runners].map(({ stop }) => stop("SIGKILL")))
    await postgres.stop()
    await rm(data, { recursive: true, force: true })
  })

  it("spreads the partitions of a collection evenly over its runners", async () => {
    const resident = await Promise.all(runners.map((runner) => metric(runner, "ruvector_partitions_resident")))
    assert.deepStrictEqual(resident, [partitions / 2, partitions / 2])
  })

  it("goes on while its database is gone, and moves nothing when it is back", async () => {
    const before = await sum("ruvector_partition_activations")
    const { faults, written } = await load(async () => {
      await postgres.kill()
      await sleep(4_000)
      const ready = await call(gateways[0] as ServerProcess, "GET", "/health/ready")
      assert.strictEqual(ready.status, 200)
      assert.match(String(ready.body["detail"]), /database/)
      await postgres.start()
      // As long as locks are refreshed in, and after it.
      await sleep(4_500)
    })
    assert.deepStrictEqual(faults, [])
    assert.isAbove(written.length, 0)
    await allThere(written)
    assert.strictEqual(await sum("ruvector_partition_activations"), before)
    assert.strictEqual(await sum("ruvector_cluster_database_up"), runners.length)
    assert.isUndefined((await call(gateways[0] as ServerProcess, "GET", "/health/ready")).body["detail"])
  })

  it("answers every call while a runner joins that is given partitions which are followed and watched", async () => {
    const [one, other] = gateways as [ServerProcess, ServerProcess]
    const stop = new AbortController()
    // By each gateway: they are other processes than the partitions' owners, whatever becomes of these.
    const followed = await Promise.all(
      [
        `${one.base}/api/v1/stream/changes?collection=c`,
        `${other.base}/api/v1/stream/changes?collection=c`,
        `${one.base}/api/v1/stream/subscribe?collection=c&query_vector_id=first&k=3`
      ].map((url) => fetch(url, { signal: stop.signal, headers: { accept: "text/event-stream" } }))
    )
    for (const { status } of followed) assert.strictEqual(status, 200)
    const seen = followed.map(idsOf)
    const { faults, written } = await load(async () => {
      const joined = await start("runner")
      runners.push(joined)
      await ready(joined.base)
      await until(async () => (await metric(joined, "ruvector_partitions_resident")) > 0, "it has partitions")
      await sleep(1_000)
    })
    assert.deepStrictEqual(faults, [])
    await allThere(written)
    // And what they follow goes on: each change is told, by whoever owns its partition.
    for (const { ids } of seen.slice(0, 2))
      await until(() => written.every((id) => ids.has(id)), "every change is told")
    stop.abort()
    await Promise.all(seen.map(({ ended }) => ended))
  })

  it("takes up a stream at another gateway after the one that carried it has died", async () => {
    const [one, other] = gateways as [ServerProcess, ServerProcess]
    const path = "/api/v1/stream/search?collection=c&query_vector_id=first&k=3&keep_open=true"
    const events = await eventsOf(`${one.base}${path}`, 2)
    await one.stop("SIGKILL")
    gateways = [other]
    const [, second] = events as [SseEvent, SseEvent]
    const resumed = await eventsOf(`${other.base}${path}`, 1, second.id)
    const whole = await eventsOf(`${other.base}${path}`, 1, (events[0] as SseEvent).id)
    // The event after the first is the one that was seen, of the same search.
    assert.strictEqual(whole[0]?.data, second.data)
    assert.notStrictEqual(resumed[0]?.data, second.data)
  })

  it("answers every call while a runner is told to stop", async () => {
    const { faults, written } = await load(async () => {
      await sleep(500)
      const [first] = runners.splice(0, 1) as [ServerProcess]
      assert.strictEqual(await first.stop("SIGTERM"), 0, first.output())
      await sleep(1_500)
    })
    assert.deepStrictEqual(faults, [])
    await allThere(written)
    assert.strictEqual(await sum("ruvector_partitions_resident"), partitions)
  })
})

/** The ids that a stream of events has told of so far, until it is cut. */
const idsOf = (response: Response): { readonly ids: ReadonlySet<string>; readonly ended: Promise<void> } => {
  const ids = new Set<string>()
  const read = async () => {
    let text = ""
    for await (const chunk of response.body as ReadableStream<Uint8Array>) {
      const lines = (text + Buffer.from(chunk).toString()).split("\n")
      text = lines.pop() as string
      for (const line of lines) {
        const id = /^data: .*"vector_id":"([^"]+)"/.exec(line)?.[1]
        if (id !== undefined) ids.add(id)
      }
    }
  }
  return { ids, ended: read().catch(() => {}) }
}

interface SseEvent {
  readonly id: string
  readonly data: string
}

/** The first events of a stream, which is then cut. */
const eventsOf = async (url: string, count: number, lastEventId?: string): Promise<ReadonlyArray<SseEvent>> => {
  const abort = new AbortController()
  const response = await fetch(url, {
    signal: abort.signal,
    headers: { accept: "text/event-stream", ...(lastEventId === undefined ? {} : { "last-event-id": lastEventId }) }
  })
  assert.strictEqual(response.status, 200)
  const events: Array<SseEvent> = []
  let text = ""
  for await (const chunk of response.body as ReadableStream<Uint8Array>) {
    text += Buffer.from(chunk).toString()
    const blocks = text.split("\n\n")
    text = blocks.pop() as string
    for (const block of blocks) {
      const id = /^id: ?(.*)$/m.exec(block)?.[1]
      const data = /^data: ?(.*)$/m.exec(block)?.[1]
      if (id !== undefined && data !== undefined) events.push({ id, data })
    }
    if (events.length >= count) break
  }
  abort.abort()
  return events.slice(0, count)
}
