/** Filters through the index, against looking at every record. */
import { assert, describe, it } from "@effect/vitest"
import fc from "fast-check"
import { parseFilter } from "../../../src/protocol/Filter.ts"
import { filterStringCharsMax } from "../../../src/protocol/Limits.ts"
import { meets, parseMetadata } from "../../../src/tiers/index/MetadataIndex.ts"
import type { LogOp } from "../../../src/tiers/LogSegment.ts"
import { apply, partitionOf, stamper } from "./indexSupport.ts"

const fields = ["a", "b", "__proto__", "and?"]
const longText = "x".repeat(filterStringCharsMax + 1)

const scalar = fc.oneof(
  fc.constantFrom<unknown>("", "x", "y", "10", true, false, null, 0, -0, 1, 2.5, 10, 1e300),
  fc.integer({ min: -3, max: 3 })
)
const value = fc.oneof(
  { weight: 6, arbitrary: scalar },
  { weight: 2, arbitrary: fc.array(scalar, { maxLength: 4 }) },
  { weight: 1, arbitrary: fc.constantFrom<unknown>(longText, { nested: "x" }, [["x"], { y: 1 }]) }
)
const metadata = fc
  .array(fc.tuple(fc.constantFrom(...fields), value), { maxLength: 4 })
  .map((entries) => (entries.length === 0 ? "" : JSON.stringify(Object.fromEntries(entries))))

const bound = fc.oneof(fc.integer({ min: -2, max: 3 }), fc.constantFrom("", "x", "10", 2.5))
const leaf = fc.oneof(
  fc.tuple(fc.constantFrom(...fields), scalar).map(([field, is]) => Object.fromEntries([[field, is]])),
  fc
    .tuple(
      fc.constantFrom(...fields),
      fc.record(
        {
          in: fc.array(scalar, { maxLength: 3 }),
          exists: fc.boolean(),
          gt: bound,
          gte: bound,
          lt: bound,
          lte: bound
        },
        { requiredKeys: [] }
      )
    )
    .filter(([, conditions]) => Object.keys(conditions).length > 0)
    .map(([field, conditions]) => Object.fromEntries([[field, conditions]]))
)
const { filter } = fc.letrec<{ filter: object }>((tie) => ({
  filter: fc.oneof(
    { maxDepth: 3 },
    leaf,
    fc.array(tie("filter"), { minLength: 1, maxLength: 3 }).map((and) => ({ and })),
    fc.array(tie("filter"), { minLength: 1, maxLength: 3 }).map((or) => ({ or })),
    tie("filter").map((not) => ({ not }))
  )
}))

/** What the contract says of a filter in its JSON form, read from there and not from the code's own form of it. */
const holds = (filter: object, of: Readonly<Record<string, unknown>>): boolean =>
  Object.entries(filter).every(([key, condition]: [string, unknown]) => {
    if (key === "and") return (condition as Array<object>).every((part) => holds(part, of))
    if (key === "or") return (condition as Array<object>).some((part) => holds(part, of))
    if (key === "not") return !holds(condition as object, of)
    const there = Object.hasOwn(of, key)
    const values = (Array.isArray(of[key]) ? (of[key] as Array<unknown>) : [of[key]]).filter(
      (one) => there && one !== longText && (typeof one !== "object" || one === null)
    )
    if (typeof condition !== "object" || condition === null) return values.some((one) => one === condition)
    const { exists, in: among, ...range } = condition as Readonly<Record<string, unknown>>
    if (exists !== undefined && exists !== there) return false
    if (among !== undefined && !values.some((one) => (among as Array<unknown>).some((of) => of === one))) return false
    const bounds = Object.entries(range) as Array<[string, string | number]>
    if (bounds.length === 0) return true
    // One value has to be within all bounds.
    return values.some((one) =>
      bounds.every(([op, limit]) => {
        if (typeof one !== typeof limit) return false
        const is = one as string | number
        return op === "gt" ? is > limit : op === "gte" ? is >= limit : op === "lt" ? is < limit : is <= limit
      })
    )
  })

const selected = (partition: ReturnType<typeof partitionOf>, filter: object): Array<string> => {
  const { slots } = partition.find(Float32Array.of(1, 0), 10_000, 16, JSON.stringify(filter))
  return [...slots].map((slot) => partition.table.ids[slot]!).sort()
}

describe("filters", () => {
  it("select what looking at every record selects, as records come, change and go", () => {
    const change = fc.record({
      id: fc.nat(20).map((n) => `id-${n}`),
      kind: fc.constantFrom("upsert" as const, "upsert" as const, "metadata" as const, "delete" as const),
      metadata
    })
    fc.assert(
      fc.property(
        fc.array(fc.array(change, { maxLength: 20 }), { minLength: 1, maxLength: 4 }),
        fc.array(filter, { minLength: 1, maxLength: 4 }),
        (batches, filters) => {
          const partition = partitionOf(2)
          const stamp = stamper()
          const model = new Map<string, string>()
          for (const batch of batches) {
            for (const { id, kind, metadata } of batch) {
              if (kind === "delete") model.delete(id)
              else if (kind === "upsert" || model.has(id)) model.set(id, metadata)
            }
            // An orphan would be shown once a vector comes; here an upsert always brings newer metadata.
            apply(
              partition,
              batch.map(({ id, kind, metadata }): LogOp => {
                const version = stamp()
                if (kind === "upsert") return { kind, id, version, vector: Float32Array.of(1, 1), metadata }
                return kind === "metadata" ? { kind, id, version, metadata } : { kind, id, version }
              })
            )
            // Each filter is asked after each batch, so that from the second on its answer is the one kept in step.
            for (const filter of filters) {
              const expected = [...model]
                .filter(([, text]) => holds(filter, text === "" ? {} : JSON.parse(text)))
                .map(([id]) => id)
              assert.deepStrictEqual(selected(partition, filter), expected.sort(), JSON.stringify(filter))
            }
          }
        }
      ),
      { numRuns: 500 }
    )
  })

  it("say the same of one record as of all", () => {
    fc.assert(
      fc.property(metadata, filter, (text, filter) => {
        const expected = holds(filter, text === "" ? {} : JSON.parse(text))
        assert.strictEqual(meets(parseFilter(filter), parseMetadata(text)), expected)
      }),
      { numRuns: 2_000 }
    )
  })

  it("find ranges in a field of very many different numbers", () => {
    const count = 3_000
    const partition = partitionOf(2)
    const stamp = stamper()
    const numbers = (i: number): unknown =>
      i % 50 === 0 ? [i, i + 0.5, "x"] : i % 7 === 0 ? `${i}` : i % 11 === 0 ? { n: i } : i
    const upsert = (i: number): LogOp => ({
      kind: "upsert",
      id: `${i}`,
      version: stamp(),
      vector: Float32Array.of(1, i),
      metadata: JSON.stringify({ n: numbers(i) })
    })
    const model = new Map<string, Record<string, unknown>>()
    const check = () => {
      const bounds = [
        { gte: 100, lt: 200 },
        { gt: 100, lte: 200 },
        { gt: 1_499.9 },
        { lt: 0 },
        { gt: 10, gte: 10, lt: 11, lte: 11 },
        { gte: "2", lt: "21" },
        { gte: 5, lt: "7" }
      ]
      for (const n of bounds) {
        const expected = [...model].filter(([, of]) => holds({ n }, of)).map(([id]) => id)
        assert.deepStrictEqual(selected(partition, { n }), expected.sort(), JSON.stringify(n))
      }
    }
    apply(
      partition,
      Array.from({ length: count }, (_, i) => upsert(i))
    )
    for (let i = 0; i < count; i++) model.set(`${i}`, { n: numbers(i) })
    check()
    const changes: Array<LogOp> = []
    for (let i = 0; i < count; i += 3) {
      if (i % 2 === 0) {
        model.delete(`${i}`)
        changes.push({ kind: "delete", id: `${i}`, version: stamp() })
      } else {
        model.set(`${i}`, { n: numbers(i + 120) })
        changes.push({
          kind: "metadata",
          id: `${i}`,
          version: stamp(),
          metadata: JSON.stringify({ n: numbers(i + 120) })
        })
      }
    }
    apply(partition, changes)
    check()
  })

  it("give all memory of the index back when the metadata go", () => {
    const partition = partitionOf(2)
    const stamp = stamper()
    const ids = Array.from({ length: 2_000 }, (_, i) => `${i}`)
    const vector = Float32Array.of(1, 1)
    apply(
      partition,
      ids.map((id): LogOp => ({ kind: "upsert", id, version: stamp(), vector, metadata: "" }))
    )
    const bare = partition.bytes
    const rounds = [1, 2].map(() => {
      apply(
        partition,
        ids.map((id, i): LogOp => {
          const metadata = JSON.stringify({ [`field-${i % 9}`]: i, tags: ["a", `t${i % 40}`], text: `text ${id}` })
          return { kind: "upsert", id, version: stamp(), vector, metadata }
        })
      )
      const full = partition.bytes
      apply(
        partition,
        ids.map((id): LogOp => ({ kind: "upsert", id, version: stamp(), vector, metadata: "" }))
      )
      return { full, empty: partition.bytes }
    })
    assert.isAbove(rounds[0]!.full, bare + 200_000)
    assert.deepStrictEqual(
      rounds.map(({ empty }) => empty),
      [bare, bare]
    )
  })
})
