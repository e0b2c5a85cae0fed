/** What is to be reached, on a machine with 2 cores, at equal recall and in the same run. */
import type { MedianOf, RowWire } from "./report.ts"
import { shares } from "./truth.ts"

export const scenarioNames = {
  load: "load, batches of 100",
  afterLoad: "after load",
  defaults: "default settings",
  search: (lanes: number) => `search, ${lanes} in flight`,
  duringInserts: "search, 8 in flight, during inserts",
  restart: "restart",
  restartAfterKill: "restart after kill -9",
  idle: "idle streams",
  filter: (percent: number) => `filter matching ${percent} %`
} as const

export const metricNames = {
  recall: "recall@10",
  rate: "rate",
  p50: "p50",
  p95: "p95",
  p99: "p99",
  cpu: "server CPU per search",
  memory: "memory",
  memoryEach: "memory each",
  inserts: "inserts",
  ready: "until ready",
  firstAnswer: "first answer"
} as const

export interface Target {
  readonly wire: RowWire
  readonly scenario: string
  readonly metric: string
  readonly asked: string
  /** Undefined where something it compares was not measured. */
  readonly reached: (medianOf: MedianOf) => boolean | undefined
}

export const targetOf = (wire: RowWire, scenario: string, metric: string): Target | undefined =>
  targets.find((target) => target.wire === wire && target.scenario === scenario && target.metric === metric)

type Key = readonly [wire: RowWire, scenario: string, metric: string]

const ofOurs = ([wire, scenario, metric]: Key, asked: string, check: (ours: number) => boolean): Target => ({
  wire,
  scenario,
  metric,
  asked,
  reached: (medianOf) => {
    const ours = medianOf("ours", wire, scenario, metric)
    return ours === undefined ? undefined : check(ours)
  }
})

const toBare = ([wire, scenario, metric]: Key, asked: string, check: (ratio: number) => boolean): Target => ({
  wire,
  scenario,
  metric,
  asked,
  reached: (medianOf) => {
    const ours = medianOf("ours", wire, scenario, metric)
    const bare = medianOf("bare", wire, scenario, metric)
    return ours === undefined || bare === undefined ? undefined : check(ours / bare)
  }
})

const toOurs = (
  [wire, scenario, metric]: Key,
  other: Key,
  asked: string,
  check: (ours: number, other: number) => boolean
): Target => ({
  wire,
  scenario,
  metric,
  asked,
  reached: (medianOf) => {
    const ours = medianOf("ours", wire, scenario, metric)
    const compared = medianOf("ours", ...other)
    return ours === undefined || compared === undefined ? undefined : check(ours, compared)
  }
})

const { load, afterLoad, defaults, search, duringInserts, restart, restartAfterKill, idle, filter } = scenarioNames
const { recall, rate, p50, p99, cpu, memory, memoryEach, inserts, ready } = metricNames

const afterRestart = (scenario: string): ReadonlyArray<Target> => [
  ofOurs(["-", scenario, ready], "< 2,000 ms", (ours) => ours < 2_000),
  toOurs(
    ["http", scenario, recall],
    ["http", defaults, recall],
    "within 0.005 of before",
    (ours, before) => Math.abs(ours - before) <= 0.005
  )
]

const targets: ReadonlyArray<Target> = [
  toBare(["http", load, rate], ">= 0.9 x bare", (ratio) => ratio >= 0.9),
  toBare(["-", afterLoad, memory], "<= 2 x bare", (ratio) => ratio <= 2),
  ofOurs(["http", defaults, recall], ">= 0.95", (ours) => ours >= 0.95),
  toBare(["http", search(1), p50], "<= 1.3 x bare", (ratio) => ratio <= 1.3),
  toBare(["http", search(32), rate], ">= 1.2 x bare (stretch 1.6)", (ratio) => ratio >= 1.2),
  toBare(["http", search(32), p99], "<= bare", (ratio) => ratio <= 1),
  toOurs(["ws", search(32), rate], ["http", search(32), rate], ">= over http", (ws, http) => ws >= http),
  ...(["grpc", "grpc-session"] as const).map((wire) =>
    toOurs(
      [wire, search(32), cpu],
      ["ws-stream", search(32), cpu],
      "<= 1.3 x ws-stream",
      (grpc, ws) => grpc <= 1.3 * ws
    )
  ),
  toBare(["http", duringInserts, p99], "<= 0.2 x bare", (ratio) => ratio <= 0.2),
  toBare(["http", duringInserts, inserts], ">= 0.8 x bare", (ratio) => ratio >= 0.8),
  ...afterRestart(restart),
  ...afterRestart(restartAfterKill),
  ofOurs(["ws", idle, memoryEach], "<= 45 KB", (ours) => ours <= 45),
  ofOurs(["sse", idle, memoryEach], "<= 45 KB", (ours) => ours <= 45),
  ...shares.map(({ percent }) => ofOurs(["http", filter(percent), recall], ">= 0.95", (ours) => ours >= 0.95))
]
