/** What is known of an answer: its members in order, as changes come. */
import { isBefore, type StandingMember, type WatchChange } from "../protocol/StandingQuery.ts"

export class StandingShare {
  /** Nearest first; another array after each change, of the same objects where they have not changed. */
  members: ReadonlyArray<StandingMember> = []

  apply({ first, left, entered }: WatchChange): void {
    if (first) {
      const known = new Map(this.members.map((member) => [member.id, member]))
      const members = entered.map((member) => {
        const before = known.get(member.id)
        return before?.version === member.version && before.score === member.score ? before : member
      })
      this.members = members.sort(inOrder)
      return
    }
    const before = this.members
    const isGone = amongThem(left, entered)
    const stay = left.length + entered.length === 0 ? before : before.filter(({ id }) => !isGone(id))
    if (entered.length === 0) {
      this.members = stay
      return
    }
    const came = entered.length === 1 ? entered : [...entered].sort(inOrder)
    this.members = mergeMembers([stay, came], stay.length + came.length)
  }
}

/** Whether an id is among those that left or entered. Mostly they are one or two, which no set has to be made of. */
const amongThem = (left: ReadonlyArray<string>, entered: ReadonlyArray<StandingMember>): ((id: string) => boolean) => {
  if (left.length + entered.length <= fewIds) return (id) => left.includes(id) || entered.some((one) => one.id === id)
  const ids = new Set(left)
  for (const { id } of entered) ids.add(id)
  return (id) => ids.has(id)
}

const fewIds = 4

/** The best `k` of lists in order, which do not change any more. */
export const mergeMembers = (
  lists: ReadonlyArray<ReadonlyArray<StandingMember>>,
  k: number
): ReadonlyArray<StandingMember> => {
  const [only] = lists
  if (only !== undefined && lists.length === 1) return only.length <= k ? only : only.slice(0, k)
  const heads = new Array<number>(lists.length).fill(0)
  const merged: Array<StandingMember> = []
  while (merged.length < k) {
    let best = -1
    let next: StandingMember | undefined
    for (let i = 0; i < lists.length; i++) {
      const head = lists[i]![heads[i]!]
      if (head === undefined || (next !== undefined && !isBefore(head, next))) continue
      best = i
      next = head
    }
    if (next === undefined) break
    heads[best]! += 1
    merged.push(next)
  }
  return merged
}

const inOrder = (a: StandingMember, b: StandingMember): number => (isBefore(a, b) ? -1 : 1)
