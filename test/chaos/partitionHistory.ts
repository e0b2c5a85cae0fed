/**
 * What the log of a partition tells of its owners and of the writes: positions without a gap, epochs that only rise and have one
 * owner each, versions that only rise, nothing in it that nobody wrote, all in it that was acknowledged, and each write once.
 */
import { formatVersion } from "../../src/protocol/Version.ts"
import type { Segment } from "../../src/tiers/LogSegment.ts"
import type { Violation, WriteOperation } from "./History.ts"

export interface PartitionHistory {
  readonly partition: number
  /** The manifest's. */
  readonly epoch: number
  readonly prunedSeq: number
  readonly segments: ReadonlyArray<Segment>
}

/** An operation of the log, as a follower is told of it. */
export interface LogChange {
  readonly kind: "upsert" | "metadata" | "delete"
  readonly id: string
  readonly version: string
  /** The writer's value; `undefined` of a deletion. */
  readonly value: number | undefined
  /** The value that its vector is made of. */
  readonly base: number | undefined
  readonly epoch: number
}

/** The upper 40 bits of a nonce are random for each opening of a log. */
const openingOf = (nonce: bigint): bigint => nonce >> 24n

export const checkOwners = ({ partition, epoch, prunedSeq, segments }: PartitionHistory): ReadonlyArray<Violation> => {
  const violations: Array<Violation> = []
  const wrong = (what: string) => violations.push({ kind: "ownership", what: `partition ${partition}: ${what}` })
  const owners = new Map<number, bigint>()
  let seq = prunedSeq
  let newest = 0
  let time = 0n
  for (const segment of segments) {
    if (segment.seq !== seq + 1) wrong(`position ${segment.seq} follows ${seq}`)
    seq = segment.seq
    if (segment.epoch < newest) wrong(`position ${seq} is of epoch ${segment.epoch}, after one of ${newest}`)
    newest = Math.max(newest, segment.epoch)
    const opening = openingOf(segment.nonce)
    const known = owners.get(segment.epoch)
    if (known !== undefined && known !== opening) wrong(`epoch ${segment.epoch} has two owners, at position ${seq}`)
    owners.set(segment.epoch, opening)
    for (const op of segment.ops) {
      if (op.version.time <= time) wrong(`position ${seq} has a version that is not above those before, of ${op.id}`)
      if (op.version.time > time) time = op.version.time
    }
  }
  if (newest > epoch) wrong(`its log has epoch ${newest}, its manifest ${epoch}`)
  return violations
}

/** The log's operations in their order. */
export const changesOf = ({ segments }: PartitionHistory): ReadonlyArray<LogChange> =>
  segments.flatMap(({ epoch, ops }) =>
    ops.map((op): LogChange => {
      const metadata = op.kind === "delete" || op.metadata === "" ? {} : JSON.parse(op.metadata)
      const version = formatVersion(op.version)
      return { kind: op.kind, id: op.id, version, value: metadata["value"], base: metadata["base"], epoch }
    })
  )

/** `keys`: of ids that the history's clients write; others are not looked at. */
export const checkEffects = (
  changes: ReadonlyArray<LogChange>,
  writes: ReadonlyArray<WriteOperation>,
  keys: (id: string) => boolean
): ReadonlyArray<Violation> => {
  const violations: Array<Violation> = []
  const byValue = new Map(writes.map((write) => [write.value, write]))
  const times = new Map<number, number>()
  const deletions = new Map<string, number>()
  /** Of each record, the value that its vector is made of. */
  const bases = new Map<string, number | undefined>()
  for (const { id, kind, value, base, version } of changes) {
    if (!keys(id)) continue
    if (kind === "delete") {
      deletions.set(id, (deletions.get(id) ?? 0) + 1)
      bases.delete(id)
      continue
    }
    if (kind === "metadata" && (!bases.has(id) || bases.get(id) !== base)) {
      const what = `${id}: metadata ${value} (${version}) is of vector ${base}, the vector is ${bases.get(id) ?? "none"}`
      violations.push({ kind: "torn record", what })
    }
    if (kind === "upsert") bases.set(id, base)
    const write = value === undefined ? undefined : byValue.get(value)
    if (write === undefined || write.key !== id) {
      violations.push({
        kind: "value from nowhere",
        what: `the log has ${value} of ${id} (${version}), which nobody wrote`
      })
      continue
    }
    times.set(write.value, (times.get(write.value) ?? 0) + 1)
  }
  for (const write of writes) {
    const count = times.get(write.value) ?? 0
    const what = `${write.kind} ${write.value} of ${write.key} by client ${write.client}`
    if (write.kind !== "delete") {
      if (count === 0 && write.completed !== undefined) {
        violations.push({ kind: "lost write", what: `${what} was acknowledged and is not in the log` })
      }
      if (count > 1) violations.push({ kind: "repeated effect", what: `${what} is in the log ${count} times` })
    }
  }
  // Deletions carry no value: they are counted for each key.
  const begun = new Map<string, number>()
  for (const write of writes) if (write.kind === "delete") begun.set(write.key, (begun.get(write.key) ?? 0) + 1)
  for (const [id, count] of deletions) {
    const most = begun.get(id) ?? 0
    if (count > most) {
      violations.push({
        kind: "repeated effect",
        what: `the log has ${count} deletions of ${id}, and ${most} were begun`
      })
    }
  }
  return violations
}
