/** The decision which partitions are full: over budgets, sizes and heats, and over time under a load that wavers. */
import { assert, describe, it } from "@effect/vitest"
import fc from "fast-check"
import type { Form, PartitionForm } from "../../src/tiers/PartitionForms.ts"
import { decide, mappedShare, type PolicyInput } from "../../src/tiers/TierPolicy.ts"
import { type Random, random, seedOf } from "../support/Seeded.ts"

const settings = { hysteresis: 1.5, heatMin: 1, residenceMillis: 60_000, movesMax: 12 }

const partitionArbitrary = fc.record({
  full: fc.boolean(),
  size: fc.integer({ min: 1_000, max: 1_000_000 }),
  heat: fc.oneof(fc.constant(0), fc.double({ min: 0, max: 10_000, noNaN: true })),
  busy: fc.boolean(),
  age: fc.integer({ min: 0, max: 120_000 })
})

const made = (of: ReadonlyArray<{ full: boolean; size: number; heat: number; busy: boolean; age: number }>) => ({
  partitions: of.map(
    ({ full, size, heat, busy }, i): PartitionForm => ({
      partition: `c/u/${i}`,
      form: full ? "full" : "mapped",
      bytes: full ? size : size * mappedShare,
      fullBytesEstimate: size,
      heat,
      busy
    })
  ),
  formSince: new Map(of.map(({ age }, i) => [`c/u/${i}`, 1_000_000 - age]))
})

describe("one decision", () => {
  it("is within the budget after each move, moves nothing busy or newly moved, and no more than it may", () => {
    fc.assert(
      fc.property(
        fc.array(partitionArbitrary, { maxLength: 40 }),
        fc.double({ min: 0, max: 1.2, noNaN: true }),
        fc.integer({ min: 0, max: 20 }),
        (of, share, movesMax) => {
          const { partitions, formSince } = made(of)
          const budgetBytes = share * partitions.reduce((sum, one) => sum + one.fullBytesEstimate, 0)
          const input: PolicyInput = { ...settings, partitions, budgetBytes, nowMillis: 1_000_000, formSince, movesMax }
          const moves = decide(input)
          assert.isAtMost(moves.length, movesMax)
          assert.strictEqual(new Set(moves.map((move) => move.partition)).size, moves.length)
          let used = partitions.reduce((sum, one) => sum + one.bytes, 0)
          for (const move of moves) {
            const one = partitions.find(({ partition }) => partition === move.partition) as PartitionForm
            assert.isFalse(one.busy)
            assert.strictEqual(one.form, move.from)
            if (move.to === "full") {
              used += one.fullBytesEstimate
              assert.isAtMost(used, budgetBytes + 1e-6)
              assert.isAtLeast(one.heat, settings.heatMin)
            } else {
              if (move.reason === "displaced") {
                const age = 1_000_000 - (formSince.get(move.partition) as number)
                assert.isAtLeast(age, settings.residenceMillis)
              }
              used -= one.bytes * (1 - mappedShare)
            }
          }
          // Over its budget, with moves left, only what is busy is still full.
          if (used > budgetBytes + 1e-6 && moves.length < movesMax) {
            const moved = new Set(moves.map((move) => move.partition))
            assert.isTrue(partitions.every((one) => one.form === "mapped" || one.busy || moved.has(one.partition)))
          }
        }
      ),
      { seed: seedOf(11), numRuns: 400 }
    )
  })

  it("displaces only for what is hotter a byte, and hotter than all it displaces together", () => {
    const of = (heat: number, form: Form, size: number, i: number): PartitionForm => ({
      partition: `c/u/${i}`,
      form,
      bytes: form === "full" ? size : size * mappedShare,
      fullBytesEstimate: size,
      heat,
      busy: false
    })
    const moves = (partitions: ReadonlyArray<PartitionForm>, budgetBytes: number) =>
      decide({ ...settings, partitions, budgetBytes, nowMillis: 1e9, formSince: new Map() }).map(
        ({ partition, to, reason }) => `${partition} ${to} ${reason}`
      )
    const equal = (candidateHeat: number) => [of(100, "full", 1_000, 0), of(candidateHeat, "mapped", 800, 1)]
    assert.deepStrictEqual(moves(equal(100), 1_100), [])
    assert.deepStrictEqual(moves(equal(149), 1_100), [])
    assert.deepStrictEqual(moves(equal(150), 1_100), ["c/u/0 mapped displaced", "c/u/1 full hotter"])
    // A small, dense one does not throw out a large one that serves more.
    assert.deepStrictEqual(moves([of(100, "full", 10_000, 0), of(20, "mapped", 100, 1)], 10_100), [])
    assert.deepStrictEqual(moves([of(0.5, "mapped", 1_000, 0)], 10_000), [])
    assert.deepStrictEqual(moves([of(5, "mapped", 1_000, 0)], 10_000), ["c/u/0 full hot"])
    assert.deepStrictEqual(moves([of(5, "full", 1_000, 0), of(1, "full", 1_000, 1)], 1_200), [
      "c/u/1 mapped over_budget"
    ])
  })
})

describe("over time", () => {
  it("under a steady Zipf load with noise it settles on the hottest and stays there", () => {
    const seed = seedOf(23)
    const source = random(seed)
    const node = new Simulated(source, 60, 20)
    node.run(40, 0.15)
    const settled = node.moves
    node.run(400, 0.15)
    assert.strictEqual(node.moves, settled, `moved again, RUVECTOR_SEED=${seed}`)
    // No partition that is not full is hotter by the margin than one that is.
    const coldestFull = Math.min(...node.heatsOf("full"))
    const hottestMapped = Math.max(...node.heatsOf("mapped"))
    assert.isBelow(hottestMapped, coldestFull * settings.hysteresis)
    assert.isAtLeast(node.heatsOf("full").length, 12)
  })

  it("when the load moves elsewhere it follows, within its moves a step", () => {
    const seed = seedOf(29)
    const node = new Simulated(random(seed), 60, 20)
    node.run(40, 0.15)
    node.shuffle()
    node.run(200, 0.15)
    const ranks = node.ranksOf("full")
    for (let rank = 0; rank < 8; rank++) assert.include(ranks, rank, `rank ${rank}, RUVECTOR_SEED=${seed}`)
  })

  it("thrown about at random it makes no more moves than residence allows", () => {
    const seed = seedOf(31)
    const node = new Simulated(random(seed), 60, 20)
    for (let step = 0; step < 240; step++) {
      node.shuffle()
      node.run(1, 0.5)
    }
    // 240 steps of 5 s: each partition may be demoted for another once a minute.
    for (const count of node.displacements.values()) assert.isAtMost(count, 20, `RUVECTOR_SEED=${seed}`)
  })
})

/** Partitions of one size under a Zipf load; the budget holds some of them. Five seconds a step. */
class Simulated {
  readonly #source: Random
  readonly #heats: Array<number>
  readonly #forms: Array<Form>
  readonly #since = new Map<string, number>()
  readonly #budgetBytes: number
  readonly displacements = new Map<string, number>()
  #now = 0
  moves = 0

  constructor(source: Random, partitions: number, fits: number) {
    this.#source = source
    this.#heats = Array.from({ length: partitions }, (_, i) => 10_000 / (i + 1))
    this.#forms = Array.from({ length: partitions }, () => "mapped")
    this.#budgetBytes = fits * size
    this.shuffle()
  }

  shuffle(): void {
    for (let i = this.#heats.length - 1; i > 0; i--) {
      const j = this.#source.below(i + 1)
      const held = this.#heats[i] as number
      this.#heats[i] = this.#heats[j] as number
      this.#heats[j] = held
    }
  }

  run(steps: number, noise: number): void {
    for (let step = 0; step < steps; step++) {
      this.#now += 5_000
      const partitions = this.#heats.map(
        (heat, i): PartitionForm => ({
          partition: `c/u/${i}`,
          form: this.#forms[i] as Form,
          bytes: this.#forms[i] === "full" ? size : size * mappedShare,
          fullBytesEstimate: size,
          heat: heat * (1 + noise * (2 * this.#source.next() - 1)),
          busy: false
        })
      )
      const moves = decide({
        ...settings,
        partitions,
        budgetBytes: this.#budgetBytes,
        nowMillis: this.#now,
        formSince: this.#since
      })
      this.moves += moves.length
      for (const { partition, to, reason } of moves) {
        this.#forms[Number(partition.split("/")[2])] = to
        this.#since.set(partition, this.#now)
        if (reason === "displaced") this.displacements.set(partition, (this.displacements.get(partition) ?? 0) + 1)
      }
    }
  }

  heatsOf(form: Form): Array<number> {
    return this.#heats.filter((_, i) => this.#forms[i] === form)
  }

  /** Ranks by heat, 0 the hottest, of those in a form. */
  ranksOf(form: Form): Array<number> {
    const sorted = [...this.#heats].sort((a, b) => b - a)
    return this.heatsOf(form).map((heat) => sorted.indexOf(heat))
  }
}

const size = 1_000_000
