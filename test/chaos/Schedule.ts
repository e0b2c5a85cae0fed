/** Which faults happen when, to whom and for how long: all of it from the seed. */
import type { Random } from "../support/Seeded.ts"

export const faultKinds = [
  "kill",
  "term",
  "freeze",
  "partition",
  "isolate",
  "postgresRestart",
  "postgresDown",
  "redisKill",
  "slowDisk",
  "clockSkew"
] as const
export type FaultKind = (typeof faultKinds)[number]

/** What each is, for people. */
export const faultWords: Record<FaultKind, string> = {
  kill: "kill -9 of a node, started again after a while",
  term: "SIGTERM of a node, started again when it has ended",
  freeze: "SIGSTOP of a node for longer than its locks are kept, then SIGCONT",
  partition: "nothing passes between two nodes, or a node and Postgres or Redis",
  isolate: "nothing passes between a runner and any other node, nor Postgres, nor Redis",
  postgresRestart: "Postgres is restarted",
  postgresDown: "Postgres is down",
  redisKill: "kill -9 of Redis, started again after a while",
  slowDisk: "files of a node open, flush and are named slowly",
  clockSkew: "the wall clock of a node is wrong, then right again"
}

/** Faults that need a network whose parts can be parted. */
export const networkFaults: ReadonlySet<FaultKind> = new Set<FaultKind>(["partition", "isolate"])

export interface Fault {
  readonly kind: FaultKind
  /** Who it happens to; of a partition, the two. */
  readonly targets: ReadonlyArray<string>
  /** After the beginning of the run. */
  readonly beginMillis: number
  readonly holdMillis: number
  /** Of a slow disk: what an operation waits; of a clock: by what it is wrong. */
  readonly amountMillis: number
}

export interface ScheduleOptions {
  readonly source: Random
  readonly durationMillis: number
  readonly kinds: ReadonlyArray<FaultKind>
  readonly gateways: ReadonlyArray<string>
  readonly runners: ReadonlyArray<string>
  readonly shardLockMillis: number
  /** Before the first fault, and after the last one has ended. */
  readonly quietMillis: number
  /** That Postgres is down. */
  readonly postgresDownMillis: number
  /** Least and most between the end of one and the beginning of the next, what a node takes to start included. */
  readonly pauseMillis: readonly [number, number]
}

export const scheduleOf = (options: ScheduleOptions): ReadonlyArray<Fault> => {
  const { durationMillis, kinds, pauseMillis, quietMillis, source } = options
  const faults: Array<Fault> = []
  const [least, most] = pauseMillis
  let at = quietMillis
  let left: Array<FaultKind> = []
  while (kinds.length > 0) {
    // Each kind once before any comes again, in an order of the seed.
    if (left.length === 0) left = [...kinds]
    const kind = left.splice(source.below(left.length), 1)[0] as FaultKind
    const fault = faultOf(kind, at, options)
    const end = fault.beginMillis + fault.holdMillis
    if (end + quietMillis > durationMillis) {
      // A shorter one may still have its place.
      if (left.length > 0 && kind === "postgresDown") continue
      break
    }
    faults.push(fault)
    at = end + least + source.below(Math.max(1, most - least))
  }
  return faults
}

const faultOf = (kind: FaultKind, beginMillis: number, options: ScheduleOptions): Fault => {
  const { gateways, runners, shardLockMillis, source } = options
  const between = (from: number, to: number) => from + source.below(to - from)
  // Runners carry more of what may go wrong.
  const node = () => (source.below(4) === 0 ? source.pick(gateways) : source.pick(runners))
  const fault = (targets: ReadonlyArray<string>, holdMillis: number, amountMillis = 0): Fault => ({
    kind,
    targets,
    beginMillis,
    holdMillis,
    amountMillis
  })
  switch (kind) {
    case "kill":
      return fault([node()], between(500, 5_000))
    case "term":
      return fault([node()], 0)
    case "freeze":
      return fault([node()], shardLockMillis + between(1_000, 4_000))
    case "partition": {
      const places = [...gateways, ...runners]
      const one = source.pick(places)
      // Gateways do not speak to each other.
      const others = [...runners, "postgres", "redis"].filter((place) => place !== one)
      return fault([one, source.pick(others)], between(3_000, shardLockMillis + 5_000))
    }
    case "isolate":
      return fault([source.pick(runners)], between(3_000, shardLockMillis + 5_000))
    case "postgresRestart":
      return fault(["postgres"], 0)
    case "postgresDown":
      return fault(["postgres"], options.postgresDownMillis)
    case "redisKill":
      return fault(["redis"], between(1_000, 5_000))
    case "slowDisk":
      return fault([source.pick(runners)], between(4_000, 10_000), between(20, 300))
    case "clockSkew":
      return fault([node()], between(4_000, 10_000), between(1_000, 60_000) * (source.below(2) === 0 ? -1 : 1))
  }
}
