/** Collects measurements, and shows them as one table: medians, ratios to the baselines, and the targets. */
import type { ServerName } from "./servers.ts"
import { targetOf } from "./targets.ts"
import type { WireName } from "./wires.ts"

export type Unit = "vectors/s" | "searches/s" | "ms" | "us" | "MB" | "KB" | "share"

export type RowWire = WireName | "sse" | "-"

export interface Measure {
  readonly wire: RowWire
  readonly scenario: string
  readonly metric: string
  readonly unit: Unit
}

export interface Row extends Measure {
  readonly server: ServerName
  readonly value: number
}

export type MedianOf = (server: ServerName, wire: RowWire, scenario: string, metric: string) => number | undefined

export class Report {
  readonly #samples = new Map<string, { readonly row: Omit<Row, "value">; readonly values: Array<number> }>()

  add(server: ServerName, measure: Measure, value: number): void {
    const key = keyOf(server, measure.wire, measure.scenario, measure.metric)
    const kept = this.#samples.get(key)
    if (kept === undefined) this.#samples.set(key, { row: { server, ...measure }, values: [value] })
    else kept.values.push(value)
  }

  readonly medianOf: MedianOf = (...of) => {
    const values = this.#samples.get(keyOf(...of))?.values
    return values === undefined ? undefined : median(values)
  }

  rows(): Array<Row> {
    return [...this.#samples.values()].map(({ row: { server, wire, scenario, metric, unit }, values }) => ({
      server,
      wire,
      scenario,
      metric,
      value: Number(median(values).toPrecision(6)),
      unit
    }))
  }

  table(): string {
    const measures = new Map<string, Measure>()
    for (const { row } of this.#samples.values()) measures.set(`${row.wire}|${row.scenario}|${row.metric}`, row)
    // Rows of a scenario together, scenarios in the order in which they were first measured.
    const scenarios = [...new Set([...measures.values()].map(rowName))]
    const ordered = [...measures.values()].sort((a, b) => scenarios.indexOf(rowName(a)) - scenarios.indexOf(rowName(b)))
    return columns([header, ...ordered.map((measure) => this.#cells(measure))])
  }

  #cells({ wire, scenario, metric, unit }: Measure): Array<string> {
    const [ours, bare, simd] = (["ours", "bare", "bare-simd"] as const).map((server) =>
      this.medianOf(server, wire, scenario, metric)
    )
    const target = targetOf(wire, scenario, metric)
    const reached = target?.reached(this.medianOf)
    return [
      rowName({ wire, scenario }),
      metric,
      unit === "share" ? "" : unit,
      shown(ours, unit),
      shown(bare, unit),
      shown(simd, unit),
      ratio(ours, bare),
      ratio(ours, simd),
      target?.asked ?? "",
      reached === undefined ? "" : reached ? "yes" : "NO"
    ]
  }
}

const header = [
  "scenario",
  "metric",
  "unit",
  "ours",
  "bare",
  "bare-simd",
  "ours/bare",
  "ours/simd",
  "target",
  "reached"
]
const numericFrom = 3
const numericTo = 7

const keyOf = (server: ServerName, wire: RowWire, scenario: string, metric: string): string =>
  [server, wire, scenario, metric].join("|")

export const rowName = ({ wire, scenario }: Pick<Measure, "wire" | "scenario">): string =>
  wire === "-" ? scenario : `${scenario} (${wire})`

export const median = (values: ReadonlyArray<number>): number => {
  const sorted = [...values].sort((a, b) => a - b)
  const middle = sorted.length >> 1
  const upper = sorted[middle] ?? Number.NaN
  return sorted.length % 2 === 1 ? upper : (upper + (sorted[middle - 1] ?? Number.NaN)) / 2
}

export const shown = (value: number | undefined, unit: Unit): string => {
  if (value === undefined) return ""
  if (unit === "share") return value.toFixed(4)
  const digits = unit === "ms" ? 2 : unit === "KB" || unit === "MB" ? 1 : 0
  return value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits })
}

const ratio = (ours: number | undefined, other: number | undefined): string =>
  ours === undefined || other === undefined ? "" : (ours / other).toFixed(2)

const columns = (lines: ReadonlyArray<ReadonlyArray<string>>): string => {
  const widths = header.map((_, column) => Math.max(...lines.map((line) => line[column]?.length ?? 0)))
  const aligned = (line: ReadonlyArray<string>): string =>
    line
      .map((cell, column) => {
        const width = widths[column] ?? 0
        return column >= numericFrom && column <= numericTo ? cell.padStart(width) : cell.padEnd(width)
      })
      .join("  ")
      .trimEnd()
  const [head = [], ...body] = lines
  const rule = widths.map((width) => "-".repeat(width)).join("  ")
  return [aligned(head), rule, ...body.map(aligned)].join("\n")
}
