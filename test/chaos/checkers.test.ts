/** The checkers themselves: right histories pass, and each kind of wrong one is found. */
import { assert, describe, it } from "@effect/vitest"
import type { Segment } from "../../src/tiers/LogSegment.ts"
import { random } from "../support/Seeded.ts"
import { checkFeed, checkMembers, membersOf } from "./feeds.ts"
import type { FeedEvent, MemberEvent, ReadOperation, Violation, WriteOperation } from "./History.ts"
import { changesOf, checkEffects, checkOwners, type LogChange, type PartitionHistory } from "./partitionHistory.ts"
import { checkRegisters } from "./registers.ts"

const write = (value: number, invoked: number, completed?: number, kind: WriteOperation["kind"] = "upsert") =>
  ({ kind, client: 1, key: "a", value, invoked, completed }) satisfies WriteOperation
const read = (value: number | undefined, invoked: number, completed: number, kind: ReadOperation["kind"] = "get") =>
  ({ kind, client: 2, key: "a", value, invoked, completed }) satisfies ReadOperation

const kinds = (violations: ReadonlyArray<Violation>) => [...new Set(violations.map(({ kind }) => kind))]

describe("registers", () => {
  const of = (writes: ReadonlyArray<WriteOperation>, reads: ReadonlyArray<ReadOperation>) =>
    kinds(checkRegisters(writes, reads))

  it("a write that is read as soon as it is answered, and while it is under way or not", () => {
    const writes = [write(1, 0, 10), write(2, 20, 30)]
    assert.deepStrictEqual(of(writes, [read(1, 11, 12), read(1, 21, 22), read(2, 23, 24), read(2, 31, 32)]), [])
    assert.deepStrictEqual(of(writes, [read(2, 21, 29), read(1, 21, 29), read(2, 40, 41, "final")]), [])
  })

  it("an acknowledged write that is not read later is stale", () => {
    assert.deepStrictEqual(of([write(1, 0, 10), write(2, 20, 30)], [read(1, 31, 32)]), ["stale read"])
    assert.deepStrictEqual(of([write(1, 0, 10)], [read(undefined, 11, 12)]), ["stale read"])
  })

  it("and lost where it is gone in the end", () => {
    const writes = [write(1, 0, 10), write(2, 20, 30)]
    assert.deepStrictEqual(of(writes, [read(1, 100, 101, "final")]), ["lost write"])
    assert.deepStrictEqual(of(writes, [read(undefined, 100, 101, "final")]), ["lost write"])
  })

  it("reads that go back, though the write has no answer", () => {
    const writes = [write(1, 0, 10), write(2, 20)]
    assert.deepStrictEqual(of(writes, [read(1, 30, 31), read(2, 40, 41)]), [])
    assert.deepStrictEqual(of(writes, [read(2, 30, 31), read(1, 40, 41)]), ["stale read"])
  })

  it("a write without an answer may come late, and once", () => {
    const writes = [write(1, 0, 10), write(2, 20), write(3, 40, 50)]
    assert.deepStrictEqual(of(writes, [read(3, 51, 52), read(2, 60, 61), read(2, 100, 101, "final")]), [])
    assert.deepStrictEqual(of(writes, [read(2, 35, 36), read(3, 51, 52), read(2, 60, 61)]), ["stale read"])
  })

  it("one that was acknowledged may not: that is its effect a second time", () => {
    const writes = [write(1, 0, 10), write(2, 20, 30), write(3, 40, 50)]
    assert.deepStrictEqual(of(writes, [read(3, 51, 52), read(2, 60, 61, "final")]), ["lost write"])
  })

  it("a value that nobody wrote, or nobody yet", () => {
    assert.deepStrictEqual(of([write(1, 0, 10)], [read(7, 11, 12)]), ["value from nowhere"])
    assert.deepStrictEqual(of([write(1, 20, 30)], [read(1, 11, 12)]), ["value from nowhere"])
  })

  it("deletions", () => {
    const writes = [write(1, 0, 10), write(2, 20, 30, "delete"), write(3, 40, 50), write(4, 60, 70, "delete")]
    const reads = [read(undefined, -5, -4), read(undefined, 31, 32), read(3, 51, 52), read(undefined, 71, 72)]
    assert.deepStrictEqual(of(writes, reads), [])
    assert.deepStrictEqual(of(writes, [read(1, 31, 32)]), ["stale read"])
    assert.deepStrictEqual(of(writes, [read(3, 80, 81, "final")]), ["lost write"])
    assert.deepStrictEqual(of(writes.slice(0, 3), [read(undefined, 55, 56)]), ["stale read"])
    // Its answer is not known: the record may be there or not, but not there again.
    const open = [write(1, 0, 10), write(2, 20, undefined, "delete")]
    assert.deepStrictEqual(of(open, [read(1, 30, 31), read(undefined, 40, 41)]), [])
    assert.deepStrictEqual(of(open, [read(undefined, 30, 31), read(1, 40, 41)]), ["stale read"])
  })

  it("two clients that write one key at once may be done in either order, but in one", () => {
    const writes = [write(1, 0, 20), { ...write(2, 5, 15), client: 3 }]
    assert.deepStrictEqual(of(writes, [read(1, 21, 22), read(1, 30, 31)]), [])
    assert.deepStrictEqual(of(writes, [read(2, 21, 22), read(2, 30, 31)]), [])
    assert.deepStrictEqual(of(writes, [read(2, 21, 22), read(1, 30, 31)]), ["stale read"])
  })

  it("whatever one record does passes, and one answer changed in it is found", () => {
    for (let seed = 1; seed <= 200; seed++) {
      const { reads, writes } = recorded(seed)
      assert.deepStrictEqual(checkRegisters(writes, reads), [], `seed ${seed}`)
      // Reads of the state before the last acknowledged write, at the end of all.
      const acknowledged = writes.filter(({ completed }) => completed !== undefined)
      const end =
        1 + Math.max(...writes.map((w) => Math.max(w.invoked, w.completed ?? 0)), ...reads.map((r) => r.completed))
      const old = acknowledged.find((w) => acknowledged.some((later) => later.invoked > (w.completed as number)))
      if (old === undefined || old.kind === "delete") continue
      const wrong = [...reads, { ...read(old.value, end, end + 1), key: old.key }]
      assert.isAbove(checkRegisters(writes, wrong).length, 0, `seed ${seed}: ${old.value}`)
    }
  })
})

/** A record as clients see it that call at the same time: each call is done at one moment within it, or never known. */
const recorded = (seed: number) => {
  const source = random(seed)
  const writes: Array<WriteOperation> = []
  const reads: Array<ReadOperation> = []
  const moments: Array<{ readonly at: number; readonly run: () => void }> = []
  let state: number | undefined
  for (let client = 0; client < 3; client++) {
    let now = source.next() * 10
    for (let n = 0; n < 12; n++) {
      const invoked = now
      const at = invoked + source.next() * 10
      const completed = at + source.next() * 10
      now = completed + source.next() * 5
      const value = client * 100 + n
      if (source.below(2) === 0) {
        moments.push({ at, run: () => reads.push({ ...read(state, invoked, completed), client }) })
        continue
      }
      const kind = source.below(4) === 0 ? ("delete" as const) : ("upsert" as const)
      const isKnown = source.below(5) > 0
      const operation = { ...write(value, invoked, isKnown ? completed : undefined, kind), client }
      writes.push(operation)
      // One without an answer is done at any time, or never.
      const when = isKnown ? at : at + source.next() * 100
      if (isKnown || source.below(2) === 0) {
        moments.push({
          at: when,
          run: () => {
            state = kind === "delete" ? undefined : value
          }
        })
      }
    }
  }
  for (const { run } of moments.sort((a, b) => a.at - b.at)) run()
  return { writes, reads }
}

describe("the history of a partition", () => {
  let time = 0n
  const op = (id: string, value: number, base = value) => {
    time += 1n
    const version = { time, region: "local", counter: Number(time) }
    const metadata = JSON.stringify({ value, base })
    return { kind: "upsert" as const, id, version, vector: new Float32Array(1), metadata }
  }
  const segment = (seq: number, epoch: number, ops: Segment["ops"], opening = epoch): Segment => ({
    seq,
    epoch,
    nonce: (BigInt(opening) << 24n) | BigInt(seq),
    dimensions: 1,
    count: ops.length,
    ops
  })
  const history = (segments: ReadonlyArray<Segment>, epoch = 2): PartitionHistory => ({
    partition: 0,
    epoch,
    prunedSeq: 0,
    segments
  })

  it("owners one after the other", () => {
    time = 0n
    const segments = [segment(1, 1, []), segment(2, 1, [op("a", 1)]), segment(3, 2, []), segment(4, 2, [op("a", 2)])]
    assert.deepStrictEqual(checkOwners(history(segments)), [])
  })

  it("what no one owner's history has", () => {
    time = 0n
    const early = op("a", 1)
    const late = op("a", 2)
    const of = (segments: ReadonlyArray<Segment>, epoch?: number) => kinds(checkOwners(history(segments, epoch)))
    assert.deepStrictEqual(of([segment(1, 1, []), segment(3, 1, [])]), ["ownership"], "a gap")
    assert.deepStrictEqual(of([segment(1, 1, []), segment(1, 1, [])]), ["ownership"], "a position twice")
    assert.deepStrictEqual(of([segment(1, 2, []), segment(2, 1, [])]), ["ownership"], "an earlier owner writes on")
    assert.deepStrictEqual(of([segment(1, 1, []), segment(2, 1, [], 9)]), ["ownership"], "two owners of an epoch")
    assert.deepStrictEqual(of([segment(1, 3, [])]), ["ownership"], "an epoch that nobody claimed")
    assert.deepStrictEqual(of([segment(1, 1, [late]), segment(2, 1, [early])]), ["ownership"], "versions go back")
  })

  it("effects", () => {
    time = 0n
    const gone = { kind: "delete" as const, id: "a", version: { time: 9n, region: "local", counter: 9 } }
    const of = (ops: Segment["ops"], writes: ReadonlyArray<WriteOperation>) =>
      kinds(checkEffects(changesOf(history([segment(1, 1, ops)])), writes, () => true))
    const writes = [write(1, 0, 1), write(2, 2, 3), write(3, 4, undefined), write(4, 5, 6, "delete")]
    assert.deepStrictEqual(of([op("a", 1), op("a", 2), gone], writes), [])
    assert.deepStrictEqual(of([op("a", 1), op("a", 2), op("a", 3), gone], writes), [])
    assert.deepStrictEqual(of([op("a", 1), gone], writes), ["lost write"])
    assert.deepStrictEqual(of([op("a", 1), op("a", 2), op("a", 1), gone], writes), ["repeated effect"])
    assert.deepStrictEqual(of([op("a", 1), op("a", 2), gone, gone], writes), ["repeated effect"])
    assert.deepStrictEqual(of([op("a", 1), op("a", 2), op("a", 7)], writes), ["value from nowhere"])
    assert.deepStrictEqual(of([op("a", 1), op("a", 2), op("b", 2)], writes), ["value from nowhere"])
  })

  it("metadata is of the vector that it was set beside", () => {
    time = 0n
    const patch = (value: number, base: number) => ({ ...op("a", value, base), kind: "metadata" as const })
    const of = (ops: Segment["ops"]) =>
      kinds(
        checkEffects(
          changesOf(history([segment(1, 1, ops)])),
          [write(1, 0, 1), write(2, 2, 3), write(3, 4, 5)],
          () => true
        )
      )
    assert.deepStrictEqual(of([op("a", 1), op("a", 2), patch(3, 2)]), [])
    assert.deepStrictEqual(of([op("a", 1), op("a", 2), patch(3, 1)]), ["torn record"])
  })
})

describe("followers", () => {
  const change = (id: string, version: string): LogChange => ({
    kind: "upsert",
    id,
    version,
    value: undefined,
    base: undefined,
    epoch: 1
  })
  const event = (id: string, version: string): FeedEvent => ({ kind: "upsert", id, version, at: 0 })
  const partitionOf = (id: string) => (id.startsWith("a") ? 0 : 1)
  const logs = [[change("a", "1"), change("a2", "2"), change("a", "3")], [change("b", "1")]]
  const of = (events: ReadonlyArray<FeedEvent>) => kinds(checkFeed("f", events, logs, partitionOf))

  it("are told everything once and in order, partitions in any", () => {
    assert.deepStrictEqual(of([event("a", "1"), event("b", "1"), event("a2", "2"), event("a", "3")]), [])
    assert.deepStrictEqual(of([event("b", "1"), event("a", "1"), event("a2", "2"), event("a", "3")]), [])
  })

  it("gaps, repeats, another order, and what is not in the log", () => {
    assert.deepStrictEqual(of([event("b", "1"), event("a", "1"), event("a", "3")]), ["feed gap"])
    assert.deepStrictEqual(of([event("a", "1"), event("a2", "2"), event("a", "3")]), ["feed gap"])
    const whole = [event("b", "1"), event("a", "1"), event("a2", "2"), event("a", "3")]
    assert.deepStrictEqual(of([...whole, event("a2", "2")]), ["feed repeat"])
    assert.deepStrictEqual(of([event("b", "1"), event("a2", "2"), event("a", "1"), event("a", "3")]), ["feed order"])
    assert.deepStrictEqual(of([...whole, event("a", "9")]), ["value from nowhere"])
    assert.deepStrictEqual(of([...whole, { ...event("", ""), kind: "resync" }]), ["feed gap"])
  })
})

describe("standing queries", () => {
  const event = (type: MemberEvent["type"], id: string, version = "1", score = 0): MemberEvent => ({
    type,
    id,
    version,
    score,
    at: 0
  })
  const answer = [
    { id: "a", version: "1", score: 0.9 },
    { id: "b", version: "1", score: 0.8 },
    { id: "c", version: "1", score: 0.8 },
    { id: "d", version: "1", score: 0.1 }
  ]
  const of = (events: ReadonlyArray<MemberEvent>) => {
    const { members, violations } = membersOf("s", events)
    return [...violations, ...checkMembers("s", members, answer, 2)].length
  }

  it("the changes leave the answer, of ties either", () => {
    assert.strictEqual(of([event("enter", "d"), event("enter", "a"), event("leave", "d"), event("enter", "b")]), 0)
    assert.strictEqual(of([event("enter", "a"), event("enter", "c")]), 0)
    assert.strictEqual(of([event("enter", "a", "0"), event("enter", "c"), event("update", "a", "1")]), 0)
  })

  it("members that are missing, stale, not in the answer, or too many", () => {
    assert.isAbove(of([event("enter", "b"), event("enter", "c")]), 0)
    assert.isAbove(of([event("enter", "a", "0"), event("enter", "b")]), 0)
    assert.isAbove(of([event("enter", "a"), event("enter", "d")]), 0)
    assert.isAbove(of([event("enter", "a"), event("enter", "b"), event("enter", "c")]), 0)
    assert.isAbove(of([event("enter", "a"), event("enter", "x")]), 0)
  })

  it("changes that cannot be applied", () => {
    assert.isAbove(of([event("enter", "a"), event("enter", "a"), event("enter", "b")]), 0)
    assert.isAbove(of([event("enter", "a"), event("leave", "d"), event("enter", "b")]), 0)
    assert.isAbove(of([event("enter", "a"), event("update", "b")]), 0)
  })
})
