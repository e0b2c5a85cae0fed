/**
 * What clients notice of a cluster that loses nodes or its database: two gateways and three runners as processes, clients that
 * write, read, search and follow, and one node after the other that is killed, or told to stop and started again; then Postgres
 * is gone for a minute. The checkers of the chaos suite look over all of it.
 *
 *     npm run bench:failover -- [--times 20] [--only kill|stop|rolling|postgres] [--seed 1] [--keep]
 *
 * `--keep` keeps logs, history and data.
 */
import { mkdtempSync, rmSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { parseArgs } from "node:util"
import { runChaos, type Verdict } from "../test/chaos/Chaos.ts"
import type { Fault } from "../test/chaos/Schedule.ts"

const { values } = parseArgs({
  options: {
    times: { type: "string", default: "20" },
    only: { type: "string" },
    seed: { type: "string", default: "1" },
    keep: { type: "boolean", default: false }
  }
})
for (const signal of ["SIGINT", "SIGTERM"] as const) process.on(signal, () => process.exit(1))

const times = Number(values.times)
const runners = ["runner-1", "runner-2", "runner-3"]
const gateways = ["gateway-1", "gateway-2"]

/** One after the other, with a pause in which all is well. */
const pauseMillis = 5_000

/** That the database is gone. */
const outageMillis = 60_000

const each = (kind: "kill" | "term", targets: ReadonlyArray<string>, holdMillis: number): ReadonlyArray<Fault> =>
  targets.map((target, n) => ({
    kind,
    targets: [target],
    beginMillis: pauseMillis + n * (pauseMillis + holdMillis),
    holdMillis,
    amountMillis: 0
  }))

const inTurn = (count: number) => Array.from({ length: count }, (_, n) => runners[n % runners.length] as string)

const run = async (faults: ReadonlyArray<Fault>): Promise<Verdict> => {
  const directory = mkdtempSync(join(tmpdir(), "ruvector-failover-"))
  const verdict = await runChaos({
    seed: Number(values.seed),
    // It goes on until the last one has ended.
    durationMillis: 0,
    kinds: [],
    faults,
    directory,
    probeMillis: 100,
    print: (line) => void process.stdout.write(`${line}\n`)
  })
  if (verdict.violations.length > 0) process.stdout.write(`${verdict.violations.length} violations\n`)
  if (verdict.violations.length === 0 && !values.keep) rmSync(directory, { recursive: true, force: true })
  else process.stdout.write(`logs, history and data: ${directory}\n`)
  return verdict
}

const rows: Array<readonly [string, string, string]> = []
const seconds = (millis: number | undefined) =>
  millis === undefined ? "not in time" : `${(millis / 1_000).toFixed(2)} s`
const returned = ({ faults }: Verdict) =>
  [
    "  when it is back: longest wait for a partition",
    seconds(Math.max(...faults.map(({ returnPauseMillis }) => returnPauseMillis))),
    ""
  ] as const
const common = (what: string, verdict: Verdict) => {
  rows.push([`${what}: calls that failed`, `${verdict.failed} of ${verdict.calls}`, what === "kill -9" ? "" : "0"])
  rows.push([`${what}: lost, repeated, out of order`, `${verdict.violations.length}`, "0"])
}

if (values.only === undefined || values.only === "kill") {
  // Longer than it takes the others to take over, so that it is they who answer again.
  const verdict = await run(each("kill", inTurn(times), 12_000))
  const recovered = verdict.faults
    .map(({ recoveredMillis }) => recoveredMillis ?? Number.POSITIVE_INFINITY)
    .sort((a, b) => a - b)
  rows.push([
    `kill -9 of a runner, ${recovered.length} times: every partition answers again, p50`,
    seconds(recovered[Math.floor((recovered.length - 1) / 2)]),
    "<= 4 s"
  ])
  rows.push(["  worst", seconds(recovered.at(-1)), "<= 10 s"])
  rows.push(returned(verdict))
  process.stdout.write(`recovered after ${recovered.map(seconds).join(", ")}\n`)
  common("kill -9", verdict)
}
if (values.only === undefined || values.only === "stop") {
  const verdict = await run(each("term", inTurn(Math.min(times, 6)), 3_000))
  const longest = Math.max(...verdict.faults.map(({ lossPauseMillis }) => lossPauseMillis))
  rows.push([
    `SIGTERM of a runner, ${verdict.faults.length} times: longest wait for a partition`,
    seconds(longest),
    "<= 1 s"
  ])
  rows.push(returned(verdict))
  common("SIGTERM", verdict)
}
if (values.only === undefined || values.only === "rolling") {
  const verdict = await run(each("term", [...runners, ...gateways], 0))
  const longest = Math.max(...verdict.faults.map(({ pauseMillis }) => pauseMillis))
  rows.push(["rolling restart of all nodes: longest wait for a partition", seconds(longest), ""])
  common("rolling restart", verdict)
}
if (values.only === undefined || values.only === "postgres") {
  const verdict = await run([
    { kind: "postgresDown", targets: ["postgres"], beginMillis: pauseMillis, holdMillis: outageMillis, amountMillis: 0 }
  ])
  const [outage] = verdict.faults
  const what = `Postgres down ${outageMillis / 1_000} s`
  rows.push([`${what}: longest wait for a partition`, seconds(outage?.lossPauseMillis), ""])
  rows.push(["  when it is back", seconds(outage?.returnPauseMillis), ""])
  common(what, verdict)
}

process.stdout.write(`\n${"".padEnd(76)}${"found".padEnd(18)}asked\n`)
for (const [what, found, asked] of rows) process.stdout.write(`${what.padEnd(76)}${found.padEnd(18)}${asked}\n`)
