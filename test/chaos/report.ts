/** A verdict for people: what was found beside what is asked. */
import type { Injected, Verdict } from "./Chaos.ts"
import { faultKinds } from "./Schedule.ts"

/** Share of calls that succeed outside of the windows of faults. */
const availabilityAsked = 0.999

/** Violations of one kind that are printed; all are in the run's directory. */
const shownMax = 5

export const availabilityOf = ({ callsOutside, failedOutside }: Verdict): number =>
  callsOutside === 0 ? 1 : 1 - failedOutside / callsOutside

export const isKept = (verdict: Verdict): boolean =>
  verdict.violations.length === 0 &&
  availabilityOf(verdict) >= availabilityAsked &&
  verdict.faults.every(({ failed }) => failed === undefined)

export const reportOf = (verdict: Verdict): string => {
  const { faults, violations } = verdict
  const percent = (share: number) => `${(100 * share).toFixed(3)} %`
  const failures = Object.entries(verdict.failures).map(([code, count]) => `${code} ${count}`)
  const lines = [
    `seed ${verdict.seed}, ${(verdict.durationMillis / 60_000).toFixed(1)} min, ${faults.length} faults, network: ${verdict.network}` +
      (verdict.skipped.length === 0 ? "" : `, skipped: ${verdict.skipped.join(", ")}`),
    `${verdict.operations} writes, ${verdict.readsChecked} reads and ${verdict.changesChecked} changes in logs and feeds checked`,
    "",
    row("", "found", "asked"),
    row("violations", `${violations.length}`, "0"),
    row("calls that succeed outside of faults' windows", percent(availabilityOf(verdict)), ">= 99.9 %"),
    row("  of", `${verdict.callsOutside} calls`, ""),
    row("calls that succeed, all", percent(1 - verdict.failed / Math.max(1, verdict.calls)), ""),
    row("  failed", `${verdict.failed}${failures.length === 0 ? "" : ` (${failures.join(", ")})`}`, ""),
    "",
    "seconds from the fault's beginning until every partition answers again, and for which a partition did not answer",
    row("", "times, p50, worst", "longest wait"),
    ...faultKinds.flatMap((kind) => {
      const of = faults.filter((fault) => fault.kind === kind)
      return of.length === 0 ? [] : [row(`  ${kind}`, recoveryOf(of), longestOf(of))]
    })
  ]
  for (const { failed, kind, targets } of faults) {
    if (failed !== undefined) lines.push(`${kind} of ${targets.join(" and ")}: ${failed}`)
  }
  for (const kind of new Set(violations.map((violation) => violation.kind))) {
    const of = violations.filter((violation) => violation.kind === kind)
    lines.push("", `${kind}: ${of.length}`)
    for (const { what } of of.slice(0, shownMax)) lines.push(`  ${what}`)
    if (of.length > shownMax) lines.push(`  and ${of.length - shownMax} more`)
  }
  return lines.join("\n")
}

const row = (what: string, found: string, asked: string): string =>
  `${what.padEnd(48)}${found.padEnd(26)}${asked}`.trimEnd()

const longestOf = (faults: ReadonlyArray<Injected>): string =>
  (Math.max(...faults.map(({ pauseMillis }) => pauseMillis)) / 1_000).toFixed(1)

const recoveryOf = (faults: ReadonlyArray<Injected>): string => {
  const times = faults.map(({ recoveredMillis }) => recoveredMillis ?? Number.POSITIVE_INFINITY).sort((a, b) => a - b)
  const seconds = (millis: number) => (Number.isFinite(millis) ? (millis / 1_000).toFixed(1) : "not in time")
  const middle = times[Math.floor((times.length - 1) / 2)] as number
  return `${times.length}, ${seconds(middle)}, ${seconds(times.at(-1) as number)}`
}
