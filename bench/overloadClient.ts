/**
 * An open-loop client: searches are sent when a schedule says, whether others were answered or not, on a few WebSockets and,
 * for a share of them, on HTTP connections of their own. Forked by `overload.ts`; latencies count from the time a search was
 * due, so that a client which falls behind does not hide what its server did.
 */
import type { WebSocket } from "ws"
import { openWebSocket, searchFields } from "./wires.ts"
import { type DataOptions, loadWords } from "./words.ts"

export interface Round {
  readonly url: string
  readonly perSecond: number
  readonly seconds: number
  readonly warmUpSeconds: number
  readonly sockets: number
  readonly ef: number
}

export interface Outcome {
  readonly offered: number
  readonly answered: number
  readonly perSecond: number
  readonly refused: number
  /** Refusals that are not what the contract says. */
  readonly untyped: number
  readonly unanswered: number
  readonly p50: number
  readonly p99: number
  readonly refusedP99: number
  /** How late searches were sent. */
  readonly lagP99: number
  readonly wrong: number
}

const main = (): void => {
  const data = loadWords(JSON.parse(process.argv[2] as string) as DataOptions)
  const { queries } = data

  const run = async ({ ef, perSecond, seconds, sockets: count, url, warmUpSeconds }: Round): Promise<Outcome> => {
    const bodies = queries.words.map((_, query) => `${searchFields(queries, query, { ef })}}`)
    const sockets = await Promise.all(Array.from({ length: count }, () => openWebSocket(new URL(url))))
    const start = performance.now()
    const from = start + warmUpSeconds * 1_000
    const end = from + seconds * 1_000
    const due = new Map<number, number>()
    const answers: Array<number> = []
    const refusals: Array<number> = []
    const lags: Array<number> = []
    let offered = 0
    let inTime = 0
    let untyped = 0
    let wrong = 0
    for (const socket of sockets) {
      socket.on("message", (bytes: Buffer) => {
        const now = performance.now()
        const id = Number(idPattern.exec(bytes.toString("latin1"))?.[1])
        const at = due.get(id)
        if (at === undefined) {
          wrong += 1
          return
        }
        due.delete(id)
        const isAnswer = bytes.subarray(0, answerStart.length).equals(answerStart)
        if (isAnswer && now >= from && now < end) inTime += 1
        if (at < from || at >= end) return
        if (isAnswer) answers.push(now - at)
        else {
          refusals.push(now - at)
          const { problem } = JSON.parse(bytes.toString()) as {
            problem?: { code?: string; retry_after_ms?: number; status?: number }
          }
          const isTyped = problem?.code === "overloaded" && (problem.retry_after_ms ?? 0) > 0 && problem.status === 429
          if (!isTyped) untyped += 1
        }
      })
    }
    let next = start
    let id = 0
    await new Promise<void>((resolve) => {
      const send = (): void => {
        const now = performance.now()
        while (next <= now && next < end) {
          const socket = sockets[id % count] as WebSocket
          due.set(id, next)
          if (next >= from) {
            offered += 1
            lags.push(now - next)
          }
          socket.send(`{"type":"search","id":"${id}",${bodies[id % bodies.length]}`)
          id += 1
          // Poisson arrivals.
          next += (-Math.log(1 - Math.random()) * 1_000) / perSecond
        }
        if (next >= end) return resolve()
        setTimeout(send, 1)
      }
      send()
    })
    const patience = performance.now() + 3_000
    while (due.size > 0 && performance.now() < patience) await new Promise((resolve) => setTimeout(resolve, 20))
    for (const socket of sockets) socket.terminate()
    return {
      offered,
      answered: answers.length,
      perSecond: inTime / seconds,
      refused: refusals.length,
      untyped,
      unanswered: due.size,
      p50: quantile(answers, 0.5),
      p99: quantile(answers, 0.99),
      refusedP99: quantile(refusals, 0.99),
      lagP99: quantile(lags, 0.99),
      wrong
    }
  }

  process.on("message", (round: Round) => {
    run(round).then(
      (outcome) => process.send?.({ outcome }),
      (error: unknown) => process.send?.({ failure: String(error) })
    )
  })
  process.on("disconnect", () => process.exit())
}

const answerStart = Buffer.from('{"event":"results"')
const idPattern = /"id":"(\d+)"/

const quantile = (values: Array<number>, share: number): number =>
  values.sort((a, b) => a - b)[Math.min(values.length - 1, Math.floor(values.length * share))] ?? Number.NaN

main()
