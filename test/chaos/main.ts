/**
 * Chaos by command: `npm run chaos -- --seed 7 --minutes 30`. Exits with 1 where a promise was not kept.
 *
 *     --seed N         of the schedule and of what clients do; printed where it is left out
 *     --minutes M      2 where it is left out
 *     --faults a,b     only these kinds
 *     --clients N      6 where it is left out
 *     --keep           keeps the directory with logs, history and data, also where all is well
 *     --loopback       no network namespaces: without faults of the network
 */
import { mkdtempSync, rmSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { parseArgs } from "node:util"
import { runChaos } from "./Chaos.ts"
import { isKept, reportOf } from "./report.ts"
import { type FaultKind, faultKinds, faultWords } from "./Schedule.ts"

const { values } = parseArgs({
  options: {
    seed: { type: "string" },
    minutes: { type: "string", default: "2" },
    faults: { type: "string" },
    clients: { type: "string", default: "6" },
    keep: { type: "boolean", default: false },
    loopback: { type: "boolean", default: false },
    help: { type: "boolean", default: false }
  }
})

const usage = (): never => {
  const kinds = faultKinds.map((kind) => `  ${kind.padEnd(16)} ${faultWords[kind]}`).join("\n")
  process.stdout.write(
    `npm run chaos -- [--seed N] [--minutes M] [--faults a,b] [--clients N] [--keep] [--loopback]\n\nFaults:\n${kinds}\n`
  )
  process.exit(values.help ? 0 : 2)
}

const kinds = values.faults === undefined ? faultKinds : values.faults.split(",")
const seed = values.seed === undefined ? Math.floor(Math.random() * 1e9) : Number(values.seed)
const minutes = Number(values.minutes)
if (values.help || !kinds.every((kind) => faultKinds.includes(kind as FaultKind))) usage()
if (!Number.isSafeInteger(seed) || !(minutes > 0) || !(Number(values.clients) > 0)) usage()

for (const signal of ["SIGINT", "SIGTERM"] as const) process.on(signal, () => process.exit(1))

const directory = mkdtempSync(join(tmpdir(), "ruvector-chaos-"))
process.stdout.write(`chaos: seed ${seed}, ${minutes} min, logs in ${directory}\n`)
const verdict = await runChaos({
  seed,
  durationMillis: minutes * 60_000,
  kinds: kinds as ReadonlyArray<FaultKind>,
  directory,
  clients: Number(values.clients),
  postgresDownMillis: Math.min(60_000, minutes * 12_000),
  ...(values.loopback ? { namespaces: false } : {}),
  print: (line) => void process.stdout.write(`${line}\n`)
})
process.stdout.write(`\n${reportOf(verdict)}\n`)
if (isKept(verdict) && !values.keep) rmSync(directory, { recursive: true, force: true })
else process.stdout.write(`logs, history and data: ${directory}\n`)
process.exitCode = isKept(verdict) ? 0 : 1
