/** The vector instructions say the same as plain JavaScript. */
import { assert, describe, it } from "@effect/vitest"
import fc from "fast-check"
import { assemble, isValid, Kernel, memoryOf, relaxedSwizzle, swizzle } from "../../../src/tiers/index/Assembler.ts"
import { Bitset } from "../../../src/tiers/index/Bitset.ts"
import { NarrowRows } from "../../../src/tiers/index/NarrowRows.ts"
import type { Quantiser } from "../../../src/tiers/index/Quantiser.ts"
import {
  blockVectors,
  nibbleOf,
  type SketchKernel,
  sketchFunctions,
  sketchKernelOf
} from "../../../src/tiers/index/SketchKernel.ts"
import { random, seedOf } from "../../support/Seeded.ts"

const seeds = fc.integer({ min: 0, max: 2 ** 31 - 1 })

const kernels = [
  ["the swizzle of all engines", swizzle],
  ["the relaxed one", relaxedSwizzle]
] as const

describe("the scan of codes", () => {
  for (const [name, lookUp] of kernels) {
    const bytes = assemble(sketchFunctions(lookUp))
    it.skipIf(!isValid(bytes))(`finds the vectors whose sums are below the threshold: ${name}`, () => {
      const kernel = new Kernel<SketchKernel>(() => bytes)
      fc.assert(
        fc.property(
          seeds,
          fc.integer({ min: 1, max: 300 }),
          fc.integer({ min: 1, max: 5 }),
          (seed, subspaces, blocks) => {
            const source = random(seed)
            const codes = 32_768
            const out = codes + blocks * subspaces * 16
            const memory = memoryOf(Math.ceil((out + blocks * blockVectors * 8) / 65_536))
            const all = new Uint8Array(memory.buffer)
            const ints = new Int32Array(memory.buffer)
            const tables = 1_024
            // The greatest entries whose sums are still below 2^16.
            const cap = Math.min(255, Math.floor(65_534 / subspaces))
            for (let i = codes; i < out; i++) all[i] = source.below(256)
            for (let i = 0; i < subspaces * 16; i++)
              all[tables + i] = source.below(4) === 0 ? cap : source.below(cap + 1)
            const threshold = source.below(4) === 0 ? 65_535 : 1 + source.below(subspaces * cap)
            const expected: Array<[number, number]> = []
            for (let at = 0; at < blocks * blockVectors; at++) {
              const { byte, shift } = nibbleOf(at % blockVectors)
              let sum = 0
              for (let m = 0; m < subspaces; m++) {
                const pair = all[codes + (Math.floor(at / blockVectors) * subspaces + m) * 16 + byte]!
                sum += all[tables + m * 16 + ((pair >>> shift) & 15)]!
              }
              if (sum < threshold) expected.push([7 + at, sum])
            }
            const end = kernel.on(memory).scan(codes, out, tables, tables + subspaces * 16, threshold, 7, 0, out)
            const found: Array<[number, number]> = []
            for (let i = out >>> 2; i < end >>> 2; i += 2) found.push([ints[i]!, ints[i + 1]!])
            assert.deepStrictEqual(found, expected)
          }
        ),
        { numRuns: 60, seed: seedOf(41) }
      )
    })
  }

  it("has a place for each of a block's vectors, and no two share it", () => {
    const places = new Set(Array.from({ length: blockVectors }, (_, i) => JSON.stringify(nibbleOf(i))))
    assert.strictEqual(places.size, blockVectors)
  })
})

describe("the tables of a query", () => {
  it("are the products or squared distances, above the least, in steps, up to the cap", () => {
    const source = random(seedOf(42))
    for (let run = 0; run < 50; run++) {
      const subspaces = 1 + source.below(20)
      const memory = memoryOf(2)
      const kernel = sketchKernelOf(memory)
      const floats = new Float32Array(memory.buffer)
      const bytes = new Uint8Array(memory.buffer)
      const codebook = 1_024
      const entries = codebook + subspaces * 128
      const leasts = entries + subspaces * 64
      const tables = leasts + subspaces * 16
      for (let i = 0; i < subspaces * 2; i++) floats[i] = source.next() * 4 - 2
      for (let i = codebook / 4; i < entries / 4; i++) floats[i] = source.next() * 4 - 2
      const isDistance = run % 2 === 0
      const make = isDistance ? kernel.distances : kernel.products
      make(0, codebook, entries, entries)
      const widest = kernel.range(entries, leasts, leasts)
      const cap = 100
      const scale = 200 / widest
      kernel.quantise(entries, leasts, leasts, scale, cap, tables)
      let expectedWidest = 0
      for (let m = 0; m < subspaces; m++) {
        const values = Array.from({ length: 16 }, (_, j) => {
          const first = floats[codebook / 4 + m * 32 + j]!
          const second = floats[codebook / 4 + m * 32 + 16 + j]!
          const [a, b] = [floats[2 * m]!, floats[2 * m + 1]!]
          return isDistance ? (a - first) ** 2 + (b - second) ** 2 : -(a * first + b * second)
        })
        const least = Math.min(...values)
        expectedWidest = Math.max(expectedWidest, Math.max(...values) - least)
        assert.closeTo(floats[leasts / 4 + m * 4]!, least, 1e-5)
        for (const [j, value] of values.entries()) {
          assert.closeTo(floats[entries / 4 + m * 16 + j]!, value, 1e-5)
          assert.closeTo(bytes[tables + m * 16 + j]!, Math.min(cap, (value - least) * scale), 0.51)
        }
      }
      assert.closeTo(widest, expectedWidest, 1e-5)
    }
  })
})

describe("the loops of training", () => {
  it("find the nearest centroid of each vector, and of each subspace", () => {
    const source = random(seedOf(43))
    for (let run = 0; run < 40; run++) {
      const stride = 4 * (1 + source.below(12))
      const lists = 4 * (1 + source.below(9))
      const rows = 1 + source.below(30)
      const memory = memoryOf(4)
      const kernel = sketchKernelOf(memory)
      const floats = new Float32Array(memory.buffer)
      const ints = new Int32Array(memory.buffer)
      const bytes = new Uint8Array(memory.buffer)
      const centroids = rows * stride * 4
      const halfNorms = centroids + lists * stride * 4
      const out = halfNorms + lists * 4
      for (let i = 0; i < halfNorms / 4; i++) floats[i] = source.next() * 2 - 1
      const distance = (row: number, list: number, components = stride, offset = 0) => {
        let sum = 0
        for (let d = offset; d < offset + components; d++) {
          sum += (floats[row * stride + d]! - floats[centroids / 4 + list * stride + d]!) ** 2
        }
        return sum
      }
      for (let list = 0; list < lists; list++) {
        let sum = 0
        for (let d = 0; d < stride; d++) sum += floats[centroids / 4 + list * stride + d]! ** 2
        floats[halfNorms / 4 + list] = sum / 2
      }
      kernel.nearest(0, centroids, stride * 4, centroids, halfNorms, out, out)
      for (let row = 0; row < rows; row++) {
        let best = 0
        const at = out / 4 + row * 8
        for (let lane = 1; lane < 4; lane++) if (floats[at + lane]! < floats[at + best]!) best = lane
        const all = Array.from({ length: lists }, (_, list) => distance(row, list))
        assert.closeTo(all[ints[at + 4 + best]!]!, Math.min(...all), 1e-4)
      }
      const codebook = Math.ceil((out + rows * 32) / 16) * 16
      for (let j = 0; j < 32; j++) floats[codebook / 4 + j] = source.next() * 2 - 1
      const codes = codebook + 128
      const from = 2 * source.below(stride / 2)
      kernel.encode(from * 4, centroids + from * 4, stride * 4, codebook, codes)
      for (let row = 0; row < rows; row++) {
        const all = Array.from(
          { length: 16 },
          (_, j) =>
            (floats[row * stride + from]! - floats[codebook / 4 + j]!) ** 2 +
            (floats[row * stride + from + 1]! - floats[codebook / 4 + 16 + j]!) ** 2
        )
        assert.closeTo(all[bytes[codes + row]!]!, Math.min(...all), 1e-5)
      }
    }
  })
})

describe("narrow rows", () => {
  for (const kind of ["bf16", "i8"] as const) {
    for (const metric of ["cosine", "l2", "ip"] as const) {
      it(`put vectors into the order of their scores, but for what rounding changes: ${kind}, ${metric}`, () => {
        const source = random(seedOf(44))
        for (const dimensions of [1, 2, 7, 16, 100, 333]) {
          const count = 1_100
          // Far from the origin, where the precision would be lost if it were not taken from the middle of all.
          const away = metric === "cosine" ? 0 : 50
          const vectors = Float32Array.from({ length: count * dimensions }, () => source.next() + away)
          const middle = new Float32Array(Math.ceil(dimensions / 4) * 4)
          const quantiser: Quantiser = {
            dimensions,
            metric,
            unit: 1 / 64,
            centroids: middle.fill(
              metric === "cosine" ? 0.5 / Math.sqrt(dimensions / 3) : (away + 0.5) / 64,
              0,
              dimensions
            ),
            codebook: new Float32Array(0),
            trainedOn: count,
            error: 0
          }
          const rows = new NarrowRows(kind, quantiser, Uint32Array.of(count), count)
          rows.set(0, vectors.subarray(0, 10 * dimensions))
          rows.set(10, vectors.subarray(10 * dimensions))
          const query = Float32Array.from({ length: dimensions }, () => source.next() + away)
          const slots = Int32Array.from({ length: count }, (_, i) => count - 1 - i)
          const values = new Float32Array(count)
          rows.values(query, slots, values)
          const exact = Array.from(slots, (slot) => {
            const row = vectors.subarray(slot * dimensions, (slot + 1) * dimensions)
            const factor = (of: Float32Array) => (metric === "cosine" ? 1 / Math.hypot(...of) : 1 / 64)
            const [ofRow, ofQuery] = [factor(row), factor(query)]
            let sum = 0
            for (let d = 0; d < dimensions; d++) {
              const [a, b] = [row[d]! * ofRow, query[d]! * ofQuery]
              sum += metric === "l2" ? (a - b) ** 2 : -a * b
            }
            return sum
          })
          // Values are scores but for something that is the same for all of a query's.
          const offset = exact.reduce((sum, one, i) => sum + one - values[i]!, 0) / count
          const spread = Math.max(...exact) - Math.min(...exact)
          const worst = Math.max(...exact.map((one, i) => Math.abs(one - values[i]! - offset)))
          assert.isBelow(worst, spread * 0.03 + 1e-6)
          assert.isAbove(rows.bytes, 0)
        }
      })
    }
  }
})

describe("a set of slots", () => {
  it("may begin with all of them", () => {
    for (const count of [0, 1, 31, 32, 33, 100]) {
      const all = Bitset.full(count)
      const slots: Array<number> = []
      all.forEach((slot) => {
        slots.push(slot)
      })
      assert.deepStrictEqual(
        slots,
        Array.from({ length: count }, (_, i) => i)
      )
      assert.strictEqual(all.count, count)
    }
  })
})
