/** The checks of a sketch file say the same as plain JavaScript. */
import { assert, describe, it } from "@effect/vitest"
import fc from "fast-check"
import { memoryOf } from "../../../src/tiers/index/Assembler.ts"
import { checkKernelOf } from "../../../src/tiers/index/CheckKernel.ts"

/** Of which some are near each other, and some are at the ends of what an int32 can be. */
const word = fc.oneof(
  fc.integer({ min: 0, max: 40 }),
  fc.integer({ min: 0, max: 0xffff_ffff }),
  fc.constantFrom(0xffff_ffff, 0x8000_0000, 0x7fff_ffff)
)
const words = fc.array(word, { maxLength: 200 })

const from = 64
const put = (values: ReadonlyArray<number>) => {
  const memory = memoryOf(1)
  new Uint32Array(memory.buffer, from, values.length).set(values)
  return { memory, kernel: checkKernelOf(memory), end: from + values.length * 4 }
}
const count = (values: ReadonlyArray<number>, isWrong: (value: number, i: number) => boolean): number =>
  values.filter(isWrong).length

describe("the checks of a sketch", () => {
  it("find floats that are no numbers", () => {
    const floats = fc.array(
      fc.oneof(fc.float(), fc.constantFrom(Number.NaN, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY, 0)),
      { maxLength: 100 }
    )
    fc.assert(
      fc.property(floats, (values) => {
        const { kernel, end } = put([...new Uint32Array(Float32Array.from(values).buffer)])
        assert.strictEqual(
          kernel.endless(from, end),
          count(values, (value) => !Number.isFinite(value))
        )
      })
    )
  })

  it("find what is beyond a limit, and what falls", () => {
    fc.assert(
      fc.property(words, word, (values, limit) => {
        const { kernel, end } = put(values)
        assert.strictEqual(
          kernel.beyond(from, end, limit),
          count(values, (value) => value >= limit)
        )
        assert.strictEqual(
          kernel.falling(from, end),
          count(values, (value, i) => i > 0 && value < (values[i - 1] as number))
        )
      })
    )
  })

  it("find what does not grow within its group", () => {
    fc.assert(
      fc.property(words, fc.integer({ min: 0, max: 7 }), (values, bits) => {
        const group = 2 ** bits
        const { kernel, end } = put(values)
        assert.strictEqual(
          kernel.stalling(from, end, group - 1),
          count(values, (value, i) => i % group !== 0 && value <= (values[i - 1] as number))
        )
      })
    )
  })

  it("count the different numbers below a limit", () => {
    fc.assert(
      fc.property(words, fc.integer({ min: 0, max: 500 }), (values, limit) => {
        const { kernel, end } = put(values)
        assert.strictEqual(
          kernel.distinct(from, end, limit, 4_096),
          new Set(values.filter((value) => value < limit)).size
        )
      })
    )
  })
})
