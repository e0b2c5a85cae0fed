/**
 * How much of the processors that the process may use is used. What it may use is the quota of its control group, or of one
 * above it (`cpu.max` of version 2, `cpu.cfs_quota_us` of version 1), or else the machine's processors. A quota is shared by
 * all in the group, and all are throttled together: where there is one, what the group uses counts, if it is more than what
 * this process does.
 */
import { readFileSync } from "node:fs"
import { availableParallelism } from "node:os"
import { dirname, join } from "node:path"

export interface ContainerCpuOptions {
  /** Where the control groups are mounted. */
  readonly root?: string
  /** What `/proc/self/cgroup` says. */
  readonly groups?: string
  readonly processors?: number
  /** CPU time of this process, in microseconds. */
  readonly ownMicros?: () => number
  readonly nowMillis?: () => number
}

export interface ContainerCpu {
  /** Processors that may be used, 0.5 for half of one. */
  readonly allowed: number
  /** The share used since the last call. */
  readonly share: () => number
}

export const containerCpu = (options: ContainerCpuOptions = {}): ContainerCpu => {
  const root = options.root ?? "/sys/fs/cgroup"
  const now = options.nowMillis ?? (() => performance.now())
  const own = options.ownMicros ?? ownMicros
  const processors = options.processors ?? availableParallelism()
  const quota = quotaOf(root, options.groups ?? read("/proc/self/cgroup") ?? "")
  const allowed = Math.min(processors, quota?.processors ?? processors)
  let at = now()
  let ownBefore = own()
  let groupBefore = quota?.usedMicros()
  return {
    allowed,
    share: () => {
      const next = now()
      const millis = next - at
      if (millis <= 0) return 0
      const ownNext = own()
      const groupNext = quota?.usedMicros()
      const used = Math.max(
        ownNext - ownBefore,
        groupNext === undefined || groupBefore === undefined ? 0 : groupNext - groupBefore
      )
      at = next
      ownBefore = ownNext
      groupBefore = groupNext
      return used / 1_000 / millis / allowed
    }
  }
}

interface Quota {
  readonly processors: number
  /** CPU time of all in the group, in microseconds. */
  readonly usedMicros: () => number | undefined
}

/** The tightest quota of the process's groups and those above them. */
const quotaOf = (root: string, groups: string): Quota | undefined => {
  let tightest: Quota | undefined
  for (const line of groups.split("\n")) {
    const [, controllers, path] = /^\d+:([^:]*):(.*)$/.exec(line) ?? []
    if (controllers === undefined || path === undefined) continue
    const names = controllers.split(",")
    if (controllers !== "" && !names.includes("cpu")) continue
    const mounts = controllers === "" ? [root, join(root, "unified")] : [join(root, controllers), join(root, "cpu")]
    for (const mount of mounts) {
      for (const group of upwards(path)) {
        const at = join(mount, group)
        const found = controllers === "" ? version2(at) : version1(at, root, group)
        if (found !== undefined && found.processors < (tightest?.processors ?? Number.POSITIVE_INFINITY)) {
          tightest = found
        }
      }
    }
  }
  return tightest
}

const upwards = (path: string): ReadonlyArray<string> =>
  path === "/" || path === "." || path === "" ? ["/"] : [path, ...upwards(dirname(path))]

const version2 = (directory: string): Quota | undefined => {
  const [quota, period] = (read(join(directory, "cpu.max")) ?? "").trim().split(" ").map(Number)
  if (!isPositive(quota) || !isPositive(period)) return undefined
  return {
    processors: quota / period,
    usedMicros: () => {
      const used = /^usage_usec (\d+)$/m.exec(read(join(directory, "cpu.stat")) ?? "")?.[1]
      return used === undefined ? undefined : Number(used)
    }
  }
}

const version1 = (directory: string, root: string, group: string): Quota | undefined => {
  const quota = Number(read(join(directory, "cpu.cfs_quota_us")) ?? -1)
  const period = Number(read(join(directory, "cpu.cfs_period_us")) ?? 0)
  if (!isPositive(quota) || !isPositive(period)) return undefined
  return {
    processors: quota / period,
    usedMicros: () => {
      const nanos = read(join(directory, "cpuacct.usage")) ?? read(join(root, "cpuacct", group, "cpuacct.usage"))
      return nanos === undefined ? undefined : Number(nanos) / 1_000
    }
  }
}

const isPositive = (n: number | undefined): n is number => n !== undefined && n > 0 && Number.isFinite(n)

const read = (path: string): string | undefined => {
  try {
    return readFileSync(path, "utf8")
  } catch {
    return undefined
  }
}

const ownMicros = (): number => {
  const { system, user } = process.cpuUsage()
  return user + system
}
