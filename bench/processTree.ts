/** What a process and all that it started use, read from Linux's /proc. */
import { readdirSync, readFileSync } from "node:fs"

/** Processor time used so far by all threads, also those that have ended, in microseconds. */
export const cpuMicros = (pid: number): number => {
  let ticks = 0
  for (const { fields } of tree(pid)) ticks += Number(fields[utime]) + Number(fields[stime])
  return ticks * microsPerTick
}

/** Processor time of a process's first thread so far, in microseconds: of ours, the one that serves the wires. */
export const mainThreadMicros = (pid: number): number => {
  const stat = readFileSync(`/proc/${pid}/task/${pid}/stat`, "latin1")
  const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ")
  return (Number(fields[utime]) + Number(fields[stime])) * microsPerTick
}

/** The same to the nanosecond, from the scheduler: for measurements of less than seconds. */
export const mainThreadNanos = (pid: number): number =>
  Number(readFileSync(`/proc/${pid}/task/${pid}/schedstat`, "latin1").split(" ")[0])

/** Resident memory. Pages shared between the processes of the tree are counted in each. */
export const residentBytes = (pid: number): number => {
  let pages = 0
  for (const { fields } of tree(pid)) pages += Number(fields[rss])
  return pages * pageBytes
}

/** Resident memory once it has stopped changing (under 1 % in six seconds: garbage is collected when it is quiet), or after 30 seconds. */
export const settledBytes = async (pid: number): Promise<number> => {
  const samples: Array<number> = []
  for (let sample = 0; sample < 60; sample++) {
    samples.push(residentBytes(pid))
    const last = samples.slice(-13)
    if (last.length === 13 && Math.max(...last) < Math.min(...last) * 1.01) break
    await new Promise((resolve) => setTimeout(resolve, 500))
  }
  return samples.at(-1) as number
}

/** Linux shows processor time to user space in hundredths of a second, whatever its own clock. */
const microsPerTick = 10_000
const pageBytes = 4_096

// Fields of /proc/PID/stat, counted from the one after the name (which may hold spaces).
const parent = 1
const utime = 11
const stime = 12
const rss = 21

interface Entry {
  readonly pid: number
  readonly fields: ReadonlyArray<string>
}

const tree = (root: number): Array<Entry> => {
  const entries = readdirSync("/proc")
    .filter((name) => /^\d+$/.test(name))
    .flatMap(readEntry)
  const found = entries.filter((entry) => entry.pid === root)
  if (found.length === 0) throw new Error(`process ${root} is gone`)
  for (const { pid } of found) found.push(...entries.filter((entry) => Number(entry.fields[parent]) === pid))
  return found
}

const readEntry = (pid: string): Array<Entry> => {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, "latin1")
    return [{ pid: Number(pid), fields: stat.slice(stat.lastIndexOf(")") + 2).split(" ") }]
  } catch {
    // Ended since it was listed.
    return []
  }
}
