/** What changed from one answer of a standing query to the next. */
import type { StandingMember } from "../shards/StandingQueries.ts"
import type { CursorMember, KnownMembers } from "./Cursors.ts"

/** Applied in this order to the answer before, they give the one after. */
export interface AnswerDifference {
  /** Ids. */
  readonly leaves: ReadonlyArray<string>
  /** Nearest first, as the updates. */
  readonly enters: ReadonlyArray<StandingMember>
  readonly updates: ReadonlyArray<StandingMember>
}

export const isEmpty = ({ leaves, enters, updates }: AnswerDifference): boolean =>
  leaves.length + enters.length + updates.length === 0

export const differenceOf = (
  before: ReadonlyArray<StandingMember>,
  after: ReadonlyArray<StandingMember>
): AnswerDifference => {
  // Members that stayed as they were are the same objects, and mostly all but one or two.
  const gone = without(before, after)
  const came = without(after, before)
  const left = new Map<string, StandingMember>()
  for (const member of gone) left.set(member.id, member)
  const enters: Array<StandingMember> = []
  const updates: Array<StandingMember> = []
  for (const member of came) {
    const known = left.get(member.id)
    if (known === undefined) enters.push(member)
    else {
      left.delete(member.id)
      if (known.version !== member.version || known.score !== member.score) updates.push(member)
    }
  }
  return { leaves: [...left.keys()], enters, updates }
}

/** Those of an answer that are not in another. */
const without = (
  members: ReadonlyArray<StandingMember>,
  others: ReadonlyArray<StandingMember>
): ReadonlyArray<StandingMember> => {
  if (others.length <= fewMembers) return members.filter((member) => !others.includes(member))
  const all = new Set(others)
  return members.filter((member) => !all.has(member))
}

/** So few are looked through faster than a set of them is made. */
const fewMembers = 16

/** The same from an answer that is known by its hashes only. Who left it is known by who is left: `keep`. */
export const differenceFromKnown = (
  before: KnownMembers,
  after: ReadonlyArray<StandingMember>,
  hashes: { readonly idHash: (id: string) => number; readonly stateHash: (member: CursorMember) => number }
): AnswerDifference & { readonly keep: ReadonlyArray<string> | undefined } => {
  const keep: Array<string> = []
  const enters: Array<StandingMember> = []
  const updates: Array<StandingMember> = []
  for (const member of after) {
    const known = before.get(hashes.idHash(member.id))
    if (known === undefined) {
      enters.push(member)
      continue
    }
    keep.push(member.id)
    if (known !== hashes.stateHash(member)) updates.push(member)
  }
  return { leaves: [], enters, updates, keep: keep.length === before.size ? undefined : keep }
}
