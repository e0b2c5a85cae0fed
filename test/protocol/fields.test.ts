import { assert, describe, it } from "@effect/vitest"
import { Result, Schema } from "effect"
import { CollectionRequest } from "../../src/protocol/Collection.ts"
import { decoderOf, Float32FromBytes, VectorFromBytes } from "../../src/protocol/Fields.ts"
import { checkFilter } from "../../src/protocol/Filter.ts"
import { filterConditionsMax } from "../../src/protocol/Limits.ts"
import { compareVersions, formatVersion, parseVersion, VersionClock } from "../../src/protocol/Version.ts"

describe("vectors as bytes", () => {
  // A small Buffer is a view somewhere in a pool that others write to.
  const pooled = () => Buffer.concat([Buffer.from(new Float32Array([1, -2.5, 3e-8]).buffer)])

  for (const [name, schema] of [
    ["Float32FromBytes", Float32FromBytes],
    ["VectorFromBytes", VectorFromBytes]
  ] as const) {
    it(`${name} reads a Buffer where it lies, and keeps a copy`, () => {
      const bytes = pooled()
      const vector = Schema.decodeSync(schema)(bytes)
      bytes.fill(0xff)
      assert.deepStrictEqual(Array.from(vector), [1, -2.5, 3e-8].map(Math.fround))
      assert.deepStrictEqual(Buffer.from(Schema.encodeSync(schema)(vector)), pooled())
    })
  }
})

describe("versions", () => {
  it("a clock never repeats nor goes back, whatever the wall clock does", () => {
    const clock = new VersionClock("local", 0n, 0)
    const walls = [1_000, 1_000, 999, 2_000, 0, 2_000]
    const versions = walls.map((wall) => clock.next(wall))
    for (let i = 1; i < versions.length; i++) {
      const [before, after] = [versions[i - 1], versions[i]]
      if (before === undefined || after === undefined) throw new Error("unreachable")
      assert.isBelow(compareVersions(before, after), 0)
      assert.strictEqual(after.counter, before.counter + 1)
    }
    const seen = { time: 10n ** 18n, region: "far", counter: 3 }
    clock.observe(seen)
    assert.isAbove(compareVersions(clock.next(0), seen), 0)
  })

  it("as text, and back", () => {
    const version = { time: 0x17a1b2c3d4e5f607n, region: "us-central1", counter: 123_456 }
    assert.deepStrictEqual(parseVersion(formatVersion(version)), version)
    for (const text of ["", "x", "17a1b2c3d4e5f607-1", "17a1b2c3d4e5f607-1-BAD"]) assert.isUndefined(parseVersion(text))
  })
})

describe("faults are named", () => {
  it("missing, excess and wrong fields", () => {
    const decode = decoderOf(CollectionRequest)
    const faultOf = (input: unknown) => {
      const { field, expected, got } = Result.getOrThrow(Result.flip(decode(input)))
      return [field, expected, got]
    }
    assert.deepStrictEqual(faultOf({}), ["dimensions", "a value", "nothing"])
    assert.deepStrictEqual(faultOf({ dimensions: 2, x: 1 }), ["x", "no such field", "1"])
    assert.deepStrictEqual(faultOf({ dimensions: 0 }), ["dimensions", "an integer from 1 to 4096", "0"])
    assert.strictEqual(faultOf({ dimensions: 2, index: { m: "x" } })[0], "index.m")
    assert.strictEqual(faultOf({ dimensions: 2, metric: "x" })[0], "metric")
  })

  it("of filters, with their path", () => {
    assert.isUndefined(
      checkFilter({ a: 1, b: { in: ["x", null] }, and: [{ c: { gte: 1, lt: "z" } }, { not: { d: true } }] })
    )
    assert.deepInclude(checkFilter({ and: [{ a: { gt: true } }] }), { path: ["and", 0, "a", "gt"] })
    assert.deepInclude(checkFilter({ a: [1] }), { path: ["a"] })
    const many = Object.fromEntries(Array.from({ length: filterConditionsMax + 1 }, (_, i) => [`f${i}`, i]))
    assert.match(checkFilter(many)?.expected ?? "", /at most/)
  })
})
