/**
 * Whether what was read of each key is what one record would give that is changed and read one operation at a time, each at some
 * moment between its call and its answer (linearizability: Herlihy and Wing, 1990). Writes have values of their own, so that it
 * is decided by the zones of Gibbons and Korach ("Testing Shared Memories", 1997): a value's zone is the time in which it must
 * have been the record's (its write and its reads do not all overlap), or in which there is a moment at which it all may have
 * been. Two of the first kind may not overlap, and none of the second may lie within one of the first.
 *
 * A write without an answer may be done at any later time, once, or never. That there is no record does not say which deletion it
 * is read of, so that one is looked for which explains it.
 */
import { millisOf, type ReadOperation, type Violation, type WriteOperation } from "./History.ts"

export const checkRegisters = (
  writes: ReadonlyArray<WriteOperation>,
  reads: ReadonlyArray<ReadOperation>
): ReadonlyArray<Violation> => {
  const keys = new Map<string, { readonly writes: Array<WriteOperation>; readonly reads: Array<ReadOperation> }>()
  const of = (key: string) => {
    const found = keys.get(key) ?? { writes: [], reads: [] }
    keys.set(key, found)
    return found
  }
  for (const write of writes) of(write.key).writes.push(write)
  for (const read of reads) of(read.key).reads.push(read)
  return [...keys].flatMap(([key, operations]) => checkKey(key, operations.writes, operations.reads))
}

/** A value: its write and what was read of it. */
interface Cluster {
  /** `undefined`: there is no record before the first write. */
  readonly write: WriteOperation | undefined
  /** The first answer, and the last call. */
  first: number
  last: number
  lastRead: ReadOperation | undefined
}

const checkKey = (
  key: string,
  writes: ReadonlyArray<WriteOperation>,
  reads: ReadonlyArray<ReadOperation>
): ReadonlyArray<Violation> => {
  const violations: Array<Violation> = []
  const clusters = new Map<number, Cluster>()
  const initial: Cluster = {
    write: undefined,
    first: Number.NEGATIVE_INFINITY,
    last: Number.NEGATIVE_INFINITY,
    lastRead: undefined
  }
  for (const write of [...writes].sort((a, b) => a.invoked - b.invoked)) {
    clusters.set(write.value, {
      write,
      first: write.completed ?? Number.POSITIVE_INFINITY,
      last: write.invoked,
      lastRead: undefined
    })
  }

  const absent: Array<ReadOperation> = []
  for (const read of reads) {
    if (read.value === undefined) {
      absent.push(read)
      continue
    }
    const cluster = clusters.get(read.value)
    if (cluster?.write === undefined || cluster.write.kind === "delete" || cluster.write.invoked > read.completed) {
      violations.push({
        kind: "value from nowhere",
        what: `${key}: ${read.value} was read at ${millisOf(read.completed)}, and no write of it had begun`
      })
      continue
    }
    extend(cluster, read)
  }

  const deletions = [...clusters.values()].filter(({ write }) => write?.kind === "delete").reverse()
  const all = [initial, ...clusters.values()]
  absent.sort((a, b) => a.completed - b.completed)
  if (!explain(absent, [...deletions, initial], all)) {
    // Whatever is said of it, it contradicts something: by the newest deletion it is the plainest.
    for (const read of absent) {
      const newest = deletions.find(({ write }) => (write as WriteOperation).invoked <= read.completed)
      extend(newest ?? initial, read)
    }
  }

  for (const [a, b] of collisions(all)) violations.push(violationOf(key, a, b))
  return violations
}

/** Steps in which it is looked for which deletion explains which read; a key's history needs about one a read. */
const stepsMax = 100_000

/** Lays each read of no record to a deletion that can explain it, the newest where there are several; false: there is no way. */
const explain = (
  reads: ReadonlyArray<ReadOperation>,
  deletions: ReadonlyArray<Cluster>,
  all: ReadonlyArray<Cluster>
): boolean => {
  let steps = 0
  const from = (place: number): boolean => {
    const read = reads[place]
    if (read === undefined) return true
    for (const cluster of deletions) {
      if (cluster.write !== undefined && cluster.write.invoked > read.completed) continue
      steps += 1
      if (steps > stepsMax) return false
      const before = { ...cluster }
      extend(cluster, read)
      if (all.every((other) => other === cluster || !collide(cluster, other)) && from(place + 1)) return true
      Object.assign(cluster, before)
    }
    return false
  }
  return from(0)
}

const extend = (cluster: Cluster, read: ReadOperation): void => {
  cluster.first = Math.min(cluster.first, read.completed)
  if (read.invoked >= cluster.last) cluster.lastRead = read
  cluster.last = Math.max(cluster.last, read.invoked)
}

const isForward = ({ first, last }: Cluster): boolean => first < last

const collide = (a: Cluster, b: Cluster): boolean => {
  if (isForward(a) && isForward(b)) return Math.max(a.first, b.first) < Math.min(a.last, b.last)
  if (isForward(a)) return within(b, a)
  return isForward(b) && within(a, b)
}

/** Whether all of `inner`, which has a moment at which it may have been, lies in the time in which `outer` must have been. */
const within = (inner: Cluster, outer: Cluster): boolean => outer.first < inner.last && inner.first < outer.last

/** Those that cannot both have been, each with the one before it that it contradicts. */
const collisions = (clusters: ReadonlyArray<Cluster>): ReadonlyArray<readonly [Cluster, Cluster]> => {
  const found: Array<readonly [Cluster, Cluster]> = []
  const forward = clusters.filter(isForward).sort((a, b) => a.first - b.first)
  let longest: Cluster | undefined
  for (const cluster of forward) {
    if (longest !== undefined && cluster.first < longest.last) found.push([longest, cluster])
    if (longest === undefined || cluster.last > longest.last) longest = cluster
  }
  for (const cluster of clusters) {
    if (isForward(cluster)) continue
    const outer = forward.find((other) => within(cluster, other))
    if (outer !== undefined) found.push([outer, cluster])
  }
  return found
}

const violationOf = (key: string, a: Cluster, b: Cluster): Violation => {
  const isFinal = [a, b].some(({ lastRead }) => lastRead?.kind === "final")
  return { kind: isFinal ? "lost write" : "stale read", what: `${key}: ${zoneOf(a)}, and ${zoneOf(b)}` }
}

const zoneOf = ({ write, first, last, lastRead }: Cluster): string => {
  const what = write === undefined ? "no record" : `${write.value} (${write.kind} of client ${write.client})`
  const written = write === undefined ? "" : ` written ${millisOf(write.invoked)} to ${millisOf(write.completed)}`
  const read =
    lastRead === undefined
      ? ""
      : `, last read (${lastRead.kind} of client ${lastRead.client}) ${millisOf(lastRead.invoked)} to ${millisOf(lastRead.completed)}`
  const zone = first < last ? ` must have been there ${millisOf(first)} to ${millisOf(last)}` : ""
  return `${what}${written}${read}${zone}`
}
