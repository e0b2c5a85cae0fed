/**
 * Whether what a follower was told is what the partitions' logs have: every change, once, and in their order for each partition.
 * And whether the changes of a standing query, applied one after the other, are its answer.
 */
import type { FeedEvent, MemberEvent, Violation } from "./History.ts"
import type { LogChange } from "./partitionHistory.ts"

/** `logs`: by partition, from where the follower began. */
export const checkFeed = (
  follower: string,
  events: ReadonlyArray<FeedEvent>,
  logs: ReadonlyArray<ReadonlyArray<LogChange>>,
  partitionOf: (id: string) => number
): ReadonlyArray<Violation> => {
  const violations: Array<Violation> = []
  for (const { at, kind } of events) {
    if (kind === "resync") {
      violations.push({ kind: "feed gap", what: `${follower} was told at ${at.toFixed(1)} ms that changes are gone` })
    }
  }
  logs.forEach((log, partition) => {
    const places = new Map(log.map(({ version, id, kind }, place) => [`${kind} ${id} ${version}`, place]))
    const told = new Set<number>()
    let last = -1
    const where = `${follower}, partition ${partition}`
    for (const { kind, id, version, at } of events) {
      if (kind === "resync" || partitionOf(id) !== partition) continue
      const what = `${kind} of ${id} (${version}), told at ${at.toFixed(1)} ms`
      const place = places.get(`${kind} ${id} ${version}`)
      if (place === undefined) {
        violations.push({ kind: "value from nowhere", what: `${where}: ${what}, is not in the log` })
        continue
      }
      if (told.has(place)) violations.push({ kind: "feed repeat", what: `${where}: ${what}, was told before` })
      else if (place < last) violations.push({ kind: "feed order", what: `${where}: ${what}, after a later one` })
      told.add(place)
      last = Math.max(last, place)
    }
    log.forEach(({ kind, id, version }, place) => {
      if (told.has(place)) return
      violations.push({ kind: "feed gap", what: `${where}: was not told of ${kind} of ${id} (${version})` })
    })
  })
  return violations
}

export interface Member {
  readonly id: string
  readonly version: string
  readonly score: number
}

/** The members that the changes leave; and those changes that could not be applied. */
export const membersOf = (
  subscriber: string,
  events: ReadonlyArray<MemberEvent>
): { readonly members: ReadonlyMap<string, Member>; readonly violations: ReadonlyArray<Violation> } => {
  const members = new Map<string, Member>()
  const violations: Array<Violation> = []
  for (const { type, id, version, score, at } of events) {
    if (members.has(id) === (type === "enter")) {
      const what = `${subscriber}: ${type} of ${id} at ${at.toFixed(1)} ms, which ${type === "enter" ? "is" : "is not"} a member`
      violations.push({ kind: "standing query", what })
    }
    if (type === "leave") members.delete(id)
    else members.set(id, { id, version, score })
  }
  return { members, violations }
}

/** Scores nearer to each other than this are equal, and their records not ordered. */
const tie = 1e-5

/** `answer`: all records, or more of them than k, nearest first. */
export const checkMembers = (
  subscriber: string,
  members: ReadonlyMap<string, Member>,
  answer: ReadonlyArray<Member>,
  k: number
): ReadonlyArray<Violation> => {
  const violations: Array<Violation> = []
  const wrong = (what: string) => violations.push({ kind: "standing query", what: `${subscriber}: ${what}` })
  const nearest = answer.slice(0, k)
  const least = nearest.at(-1)?.score ?? Number.NEGATIVE_INFINITY
  if (members.size !== nearest.length) wrong(`has ${members.size} members, the answer ${nearest.length}`)
  for (const { id, version, score } of nearest) {
    const member = members.get(id)
    if (member === undefined) {
      if (score > least + tie) wrong(`does not have ${id} (${version}, ${score}), which the answer has`)
    } else if (member.version !== version) wrong(`has ${id} as ${member.version}, the answer as ${version}`)
  }
  const all = new Map(answer.map((one) => [one.id, one]))
  for (const { id, version } of members.values()) {
    const now = all.get(id)
    if (now === undefined || now.score < least - tie) wrong(`has ${id} (${version}), which the answer does not have`)
  }
  return violations
}
