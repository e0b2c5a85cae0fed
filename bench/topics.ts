/**
 * Topics and tasks of a server in a process of its own, by the client over WebSockets, durable as served: the time from the call
 * of `publish` to the message at a listener at a steady rate, apart from the first seconds, in which a process that has just
 * started compiles what it runs; acknowledged publishings a second, one message each; and agents that compete for tasks and are
 * killed at random.
 *
 *   npm run bench:topics -- [--rate 1000] [--warm-up 5] [--seconds 8] [--in-flight 256] [--agents 50] [--tasks 20000] [--seed 1]
 */
import { mkdtempSync, rmSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { parseArgs } from "node:util"
import { VectorDB } from "../src/client/index.ts"
import { cpuMicros } from "./processTree.ts"
import { type Server, startOurs } from "./servers.ts"

const leaseMillis = 1_000
/** Tasks of one taking. */
const prefetch = 4
const priorities = 10
/** Of an agent, after each task. */
const killShare = 0.002

const main = async (): Promise<void> => {
  const { values } = parseArgs({
    options: {
      rate: { type: "string", default: "1000" },
      "warm-up": { type: "string", default: "5" },
      seconds: { type: "string", default: "8" },
      "in-flight": { type: "string", default: "256" },
      agents: { type: "string", default: "50" },
      tasks: { type: "string", default: "20000" },
      seed: { type: "string", default: "1" }
    }
  })
  const directory = mkdtempSync(join(tmpdir(), "ruvector-bench-"))
  const limits = ["--key-rate", "0", "--address-rate", "0", "--shed-user-rate", "100000", "--log-level", "error"]
  const server = await startOurs(directory, limits)
  try {
    const seconds = Number(values.seconds)
    await latency(server.url, Number(values.rate), Number(values["warm-up"]), seconds)
    await throughput(server, Number(values["in-flight"]), seconds)
    if (Number(values.tasks) > 0) {
      await distribution(server.url, Number(values.agents), Number(values.tasks), randomOf(Number(values.seed)))
    }
  } finally {
    await server.stop()
    rmSync(directory, { recursive: true, force: true })
  }
}

const latency = async (endpoint: string, rate: number, warmUp: number, seconds: number): Promise<void> => {
  const [publisher, listener] = [new VectorDB({ endpoint }), new VectorDB({ endpoint })]
  const channel = publisher.channel<number>("vector-updates")
  await channel.publish(0)
  /** By when it was sent, and how long it took. */
  const took: Array<readonly [number, number]> = []
  const acknowledged: Array<readonly [number, number]> = []
  const total = Math.round(rate * (warmUp + seconds))
  const ready = Promise.withResolvers<void>()
  const heard = (async () => {
    for await (const { message } of listener.channel<number>("vector-updates").subscribe()) {
      if (message < 0) ready.resolve()
      else took.push([message, performance.now() - message])
      if (took.length === total) break
    }
  })()
  // Until the listener is there.
  const knock = setInterval(() => void channel.publish(-1), 20)
  await ready.promise
  clearInterval(knock)
  const started = performance.now()
  const sent: Array<Promise<void>> = []
  for (let n = 0; n < total; n++) {
    const due = started + (n * 1_000) / rate
    const wait = due - performance.now()
    if (wait > 0) await new Promise((resolve) => setTimeout(resolve, wait))
    const at = performance.now()
    sent.push(
      channel.publish(at, { key: `k${n % 64}` }).then(() => void acknowledged.push([at, performance.now() - at]))
    )
  }
  await Promise.all(sent)
  await heard
  const steady = started + warmUp * 1_000
  const told = (what: string, all: ReadonlyArray<readonly [number, number]>): void => {
    for (const [when, isOf] of [
      [`the first ${warmUp} s`, (at: number) => at < steady],
      [`${seconds} s after them`, (at: number) => at >= steady]
    ] as const) {
      const millis = all.filter(([at]) => isOf(at)).map(([, millis]) => millis)
      console.log(
        `${what}, ${when}: p50 ${show(percentile(millis, 50))} ms, p99 ${show(percentile(millis, 99))} ms (${millis.length} messages)`
      )
    }
  }
  told(`publish to subscribe, ${rate} messages/s`, took)
  told("publish to its acknowledgement", acknowledged)
  await publisher.close()
  await listener.close()
}

const throughput = async ({ pid, url: endpoint }: Server, inFlight: number, seconds: number): Promise<void> => {
  const db = new VectorDB({ endpoint, inFlightMax: inFlight })
  const channel = db.channel<string>("agent-coordination")
  const until = performance.now() + seconds * 1_000
  let published = 0
  const lane = async (key: string) => {
    while (performance.now() < until) {
      await channel.publish("a message of some length, as agents send each other", { key })
      published += 1
    }
  }
  const started = performance.now()
  const cpu = cpuMicros(pid)
  const ownCpu = process.cpuUsage()
  await Promise.all(Array.from({ length: inFlight }, (_, n) => lane(`k${n}`)))
  const rate = published / ((performance.now() - started) / 1_000)
  const { system, user } = process.cpuUsage(ownCpu)
  console.log(
    `acknowledged publishings, durable, one message each, ${inFlight} in flight: ${Math.round(rate)} /s; ` +
      `CPU of the server ${Math.round((cpuMicros(pid) - cpu) / published)} us each, of the client ${Math.round((user + system) / published)} us`
  )
  await db.close()
}

const distribution = async (endpoint: string, agents: number, total: number, random: () => number): Promise<void> => {
  const db = new VectorDB({ endpoint })
  await db.topics.create("bench", { leaseMillis, attemptsMax: 100 })
  const queue = db.tasks<number>("bench")
  const all = Array.from({ length: total }, (_, n) => ({
    task: n,
    id: `t${n}`,
    priority: Math.floor(random() * priorities)
  }))
  const enqueueing = performance.now()
  for (let n = 0; n < total; n += 1_000) await queue.enqueueMany(all.slice(n, n + 1_000))
  const enqueued = performance.now() - enqueueing

  /** By task, who has it as far as that one knows. */
  const holders = new Map<string, { readonly token: number; readonly until: number }>()
  const done = new Set<string>()
  let lowest = Number.POSITIVE_INFINITY
  let killed = 0
  let redelivered = 0
  let heldTwice = 0
  let doneTwice = 0
  let outOfOrder = 0
  let lost = 0

  /** Lives until it is killed: then its connection is gone, and what it has it says nothing of. */
  const agent = async (): Promise<void> => {
    const own = new VectorDB({ endpoint })
    const tasks = own.tasks<number>("bench")
    while (done.size < total) {
      const lowestBefore = lowest
      const taken = await tasks.take({ max: prefetch, waitMillis: 500 })
      const until = performance.now() + leaseMillis
      for (const { attempt, id, priority, token } of taken) {
        const holder = holders.get(id)
        if (done.has(id) || (holder !== undefined && holder.until > performance.now())) heldTwice += 1
        holders.set(id, { token, until })
        if (attempt > 1) redelivered += 1
        // Before this was asked for, one of a lower priority had been given.
        else if (priority > lowestBefore) outOfOrder += 1
        if (attempt === 1 && priority < lowest) lowest = priority
      }
      for (const task of taken) {
        if (random() < killShare) {
          killed += 1
          // Known to nobody but this process: its holder is gone.
          for (const { id, token } of taken) if (holders.get(id)?.token === token) holders.delete(id)
          await own.close()
          return
        }
        await tasks.complete(task).then(
          () => {
            if (done.has(task.id)) doneTwice += 1
            done.add(task.id)
            holders.delete(task.id)
          },
          () => (lost += 1)
        )
      }
    }
    await own.close()
  }
  const started = performance.now()
  await Promise.all(
    Array.from({ length: agents }, async () => {
      while (done.size < total) await agent()
    })
  )
  const took = (performance.now() - started) / 1_000
  const stats = (await db.topics.get("bench"))?.tasks
  console.log(`${total} tasks enqueued, 1,000 at once: ${Math.round(total / (enqueued / 1_000))} /s`)
  console.log(
    `${agents} agents, ${killed} of them killed: ${stats?.done} of ${total} tasks done in ${show(took)} s (${Math.round(total / took)} /s), ` +
      `${redelivered} handed out again, ${lost} completions refused for a lost lease`
  )
  console.log(
    `held by two at once: ${heldTwice}; done twice: ${doneTwice}; handed out first after one of lower priority: ${outOfOrder}`
  )
  await db.close()
}

const percentile = (values: ReadonlyArray<number>, percent: number): number => {
  const sorted = values.toSorted((a, b) => a - b)
  return sorted[Math.min(sorted.length - 1, Math.floor((sorted.length * percent) / 100))] ?? Number.NaN
}

const show = (value: number): string => value.toFixed(value < 10 ? 2 : 1)

/** Mulberry32, in [0, 1). */
const randomOf = (seed: number): (() => number) => {
  let state = seed | 0
  return () => {
    state = (state + 0x6d2b79f5) | 0
    let t = Math.imul(state ^ (state >>> 15), 1 | state)
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t
    return ((t ^ (t >>> 14)) >>> 0) / 4_294_967_296
  }
}

await main()
