/**
 * The client that puts load on a server, a process of its own so that it does not share a thread with anything else. It
 * is forked by `LoadClient.ts`, told by messages what to do, and ends with whoever forked it.
 */

import { HttpConnection, postJson } from "./HttpConnection.ts"
import { type Idle, openIdle } from "./idleStreams.ts"
import { exactTruth, metadataOf, recallOf, type ShareField } from "./truth.ts"
import { openWire, type WireName } from "./wires.ts"
import { type DataOptions, loadWords, vectorText } from "./words.ts"

export type Task =
  | {
      readonly type: "search"
      readonly url: string
      readonly wire: WireName
      readonly lanes: number
      /** So many searches, or for how long after which warm-up. */
      readonly until: { readonly searches: number } | { readonly seconds: number; readonly warmUpSeconds: number }
      readonly ef?: number
      readonly filter?: ShareField
    }
  | ({ readonly type: "prepareInserts" } & Inserts)
  | ({ readonly type: "insert"; readonly inFlight: number; readonly seconds?: number } & Inserts)
  | { readonly type: "openIdle"; readonly url: string; readonly wire: "ws" | "sse"; readonly count: number }
  | { readonly type: "closeIdle" }

export interface Inserts {
  readonly url: string
  /** The words to load, or new ones. */
  readonly part: "base" | "reserve"
  readonly from: number
}

export interface Latencies {
  readonly count: number
  readonly seconds: number
  readonly rate: number
  readonly p50: number
  readonly p95: number
  readonly p99: number
  readonly max: number
}

export interface Outcomes {
  /** `total` counts the warm-up too; latencies are milliseconds of what was answered in the measured time. */
  readonly search: Latencies & { readonly total: number; readonly recall: number }
  readonly prepareInserts: Record<string, never>
  /** Latencies of batches; `next` is the row after the last that was sent. */
  readonly insert: Latencies & { readonly inserted: number; readonly vectorsPerSecond: number; readonly next: number }
  readonly openIdle: Record<string, never>
  /** How many were still open. */
  readonly closeIdle: { readonly open: number }
}

export interface Request {
  readonly id: number
  readonly task: Task
}

export interface Reply {
  readonly id: number
  readonly outcome?: Outcomes[Task["type"]]
  readonly failure?: string
}

const batchSize = 100
const preparedNewWords = 30_000

const main = (): void => {
  const data = loadWords(JSON.parse(process.argv[2] as string) as DataOptions)
  const truth = exactTruth(data)
  // Requests made before they are timed, by the row they start with.
  const prepared = new Map<number, Buffer>()
  let idle: Idle | undefined

  const carryOut = async (task: Task): Promise<Outcomes[Task["type"]]> => {
    switch (task.type) {
      case "search":
        return search(task)
      case "prepareInserts":
        prepareInserts(task)
        return {}
      case "insert":
        return insert(task)
      case "openIdle":
        idle = await openIdle({ ...task, url: new URL(task.url), queries: data.queries })
        return {}
      case "closeIdle": {
        const open = idle?.open() ?? 0
        idle?.close()
        idle = undefined
        return { open }
      }
    }
  }

  const search = async (task: Extract<Task, { type: "search" }>): Promise<Outcomes["search"]> => {
    const failure = Promise.withResolvers<never>()
    const { lanes, ef, filter } = task
    const wire = await openWire[task.wire]({
      url: new URL(task.url),
      lanes,
      queries: data.queries,
      ...(ef === undefined ? {} : { ef }),
      ...(filter === undefined ? {} : { filter }),
      onFailure: failure.reject
    })
    try {
      const limit = "searches" in task.until ? task.until.searches : Number.POSITIVE_INFINITY
      const clock = "searches" in task.until ? new Clock() : new Clock(task.until.seconds, task.until.warmUpSeconds)
      let asked = 0
      const lanesDone = Array.from({ length: lanes }, (_, lane) =>
        closedLoop(clock, (onAnswer) => {
          if (asked >= limit) return false
          wire.ask(lane, asked++ % data.options.queries, onAnswer)
          return true
        })
      )
      await Promise.race([Promise.all(lanesDone), failure.promise])
      return { ...clock.latencies(), total: asked, recall: recallOf(truth, wire.answers(), filter) }
    } finally {
      wire.close()
    }
  }

  const prepareInserts = (task: Inserts): void => {
    prepared.clear()
    // All of what is loaded, and of the new words what a round may need; beyond it they are made as they are sent.
    const rows = data[task.part].words.length
    const to = task.part === "base" ? rows : Math.min(rows, task.from + preparedNewWords)
    for (let row = task.from; row < to; row += batchSize) prepared.set(row, insertRequest(task, row))
  }

  const insertRequest = ({ part, url }: Inserts, from: number): Buffer => {
    // New words go on where the loaded ones end, so that they spread over the values of the filters in the same way.
    const metadataFrom = part === "base" ? 0 : data.options.count
    const { words } = data[part]
    const vectors: Array<string> = []
    for (let row = from; row < Math.min(from + batchSize, words.length); row++) {
      const id = JSON.stringify(words[row])
      const metadata = JSON.stringify(metadataOf(metadataFrom + row))
      vectors.push(`{"id":${id},"vector":${vectorText(data[part], row)},"metadata":${metadata}}`)
    }
    return postJson(new URL(url), "/api/v1/insert", `{"vectors":[${vectors.join(",")}]}`)
  }

  const insert = async (task: Extract<Task, { type: "insert" }>): Promise<Outcomes["insert"]> => {
    const url = new URL(task.url)
    const failure = Promise.withResolvers<never>()
    const rows = data[task.part].words.length
    const connections = await Promise.all(
      Array.from({ length: task.inFlight }, () => HttpConnection.open(url, failure.reject))
    )
    try {
      const clock = new Clock(task.seconds)
      let next = task.from
      const lanesDone = connections.map((connection) =>
        closedLoop(clock, (onAnswer) => {
          if (next >= rows) return false
          const at = next
          next = Math.min(next + batchSize, rows)
          connection.send(prepared.get(at) ?? insertRequest(task, at), ({ status, body }) => {
            if (status !== 200) failure.reject(new Error(`insert answered ${status}: ${body}`))
            prepared.delete(at)
            onAnswer()
          })
          return true
        })
      )
      await Promise.race([Promise.all(lanesDone), failure.promise])
      const latencies = clock.latencies()
      const inserted = Math.min(latencies.count * batchSize, rows - task.from)
      return { ...latencies, inserted, vectorsPerSecond: inserted / latencies.seconds, next }
    } finally {
      for (const connection of connections) connection.close()
    }
  }

  process.on("message", ({ id, task }: Request) => {
    const reply = (rest: Omit<Reply, "id">): void => {
      process.send?.({ id, ...rest } satisfies Reply)
    }
    carryOut(task).then(
      (outcome) => reply({ outcome }),
      (error: unknown) => reply({ failure: error instanceof Error ? error.message : String(error) })
    )
  })
  process.on("disconnect", () => process.exit())
}

/** Sends, waits for the answer, sends again, until there is nothing more to send or the time is over. */
const closedLoop = (clock: Clock, send: (onAnswer: () => void) => boolean): Promise<void> =>
  new Promise((resolve) => {
    let sentAt = 0
    const onAnswer = (): void => {
      clock.record(sentAt)
      next()
    }
    const next = (): void => {
      sentAt = performance.now()
      if (sentAt >= clock.end || !send(onAnswer)) resolve()
    }
    next()
  })

/** The measured time, and the latency of every answer that came within it. */
class Clock {
  readonly start = performance.now()
  readonly measuredFrom: number
  readonly end: number
  #milliseconds = new Float64Array(1 << 16)
  #count = 0
  #lastAnswer = 0

  constructor(seconds = Number.POSITIVE_INFINITY, warmUpSeconds = 0) {
    this.measuredFrom = this.start + warmUpSeconds * 1_000
    this.end = this.measuredFrom + seconds * 1_000
  }

  record(sentAt: number): void {
    const now = performance.now()
    if (now < this.measuredFrom || now > this.end) return
    this.#lastAnswer = now
    if (this.#count === this.#milliseconds.length) {
      const larger = new Float64Array(this.#count * 2)
      larger.set(this.#milliseconds)
      this.#milliseconds = larger
    }
    this.#milliseconds[this.#count++] = now - sentAt
  }

  latencies(): Latencies {
    const sorted = this.#milliseconds.subarray(0, this.#count).sort()
    const at = (share: number): number =>
      sorted[Math.min(this.#count - 1, Math.floor(this.#count * share))] ?? Number.NaN
    const until = this.end === Number.POSITIVE_INFINITY ? this.#lastAnswer : this.end
    const seconds = (until - this.measuredFrom) / 1_000
    return {
      count: this.#count,
      seconds,
      rate: this.#count / seconds,
      p50: at(0.5),
      p95: at(0.95),
      p99: at(0.99),
      max: at(1)
    }
  }
}

main()
