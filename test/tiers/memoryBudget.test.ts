/** The memory budget: what it lets in, what it makes give way and in which order, and what it leaves alone. */
import { assert, describe, it } from "@effect/vitest"
import { Effect, Exit, Scope } from "effect"
import { TestClock } from "effect/testing"
import { MemoryBudget, type ResidentPartition } from "../../src/tiers/MemoryBudget.ts"
import type { IndexForm } from "../../src/tiers/VectorIndex.ts"
import { forEachSeed, seededRandom } from "./FaultyObjectStore.ts"

const megabyte = 1_048_576
const runtime = 100 * megabyte

/** A process in which nothing is but what a test puts into it. */
class Process {
  readonly partitions = new Map<string, Partition>()
  cacheBytes = 0

  get residentBytes(): number {
    let bytes = runtime + this.cacheBytes
    for (const partition of this.partitions.values()) bytes += partition.bytes
    return bytes
  }
}

class Partition {
  readonly name: string
  readonly full: number
  readonly mapped: number | undefined
  readonly process: Process
  form: IndexForm = "full"
  usedAt = 0
  changedAt = 0
  inFlight = 0
  demotable = true
  /** Written since its snapshot, of one that is mapped. */
  recent = 0
  merges = 0
  readonly scope = Scope.makeUnsafe()

  constructor(process: Process, name: string, full: number, mapped: number | undefined) {
    this.process = process
    this.name = name
    this.full = full
    this.mapped = mapped
  }

  get bytes(): number {
    return this.form === "full" ? this.full : (this.mapped ?? this.full) + this.recent
  }

  get resident(): ResidentPartition {
    return {
      partition: this.name,
      form: () => this.form,
      bytes: () => this.bytes,
      fullBytes: () => this.full,
      mappedBytes: () => this.mapped,
      usedAt: () => this.usedAt,
      changedAt: () => this.changedAt,
      changing: () => false,
      hasFull: true,
      inFlight: () => this.inFlight,
      measure: Effect.void,
      promote: Effect.succeed(false),
      demote: Effect.sync(() => {
        this.changedAt = Date.now()
        if (this.demotable) this.form = "mapped"
        return this.demotable
      }),
      recentBytes: () => (this.form === "full" ? 0 : this.recent),
      merge: Effect.sync(() => {
        this.changedAt = Date.now()
        this.recent = 0
        this.merges += 1
        return true
      }),
      passivate: Effect.suspend(() => {
        this.process.partitions.delete(this.name)
        return Scope.close(this.scope, Exit.void)
      })
    }
  }
}

/** Opens a partition as an actor does: reserves, joins, gives the reservation back. */
const enter = Effect.fnUntraced(function* (partition: Partition) {
  const budget = yield* MemoryBudget
  yield* Effect.scoped(
    Effect.gen(function* () {
      yield* budget.reserve(partition.bytes)
      partition.process.partitions.set(partition.name, partition)
      yield* Scope.provide(budget.join(partition.resident), partition.scope)
    })
  )
})

const withBudget = <A, E>(
  process: Process,
  budgetBytes: number,
  use: Effect.Effect<A, E, MemoryBudget | Scope.Scope>
): Effect.Effect<A, E> =>
  Effect.scoped(use).pipe(
    Effect.provide(MemoryBudget.layerWith({ budgetBytes, residentBytes: () => process.residentBytes }))
  )

const used = (partition: Partition, agoMillis: number): Partition => {
  partition.usedAt = Date.now() - agoMillis
  return partition
}

describe("the memory budget", () => {
  it.effect("turns the longest unused full form into a mapped one, and leaves the others", () => {
    const process = new Process()
    return withBudget(
      process,
      runtime + 100 * megabyte,
      Effect.gen(function* () {
        const a = used(new Partition(process, "a", 40 * megabyte, 2 * megabyte), 5_000)
        const b = used(new Partition(process, "b", 40 * megabyte, 2 * megabyte), 60_000)
        const c = used(new Partition(process, "c", 40 * megabyte, 2 * megabyte), 0)
        for (const one of [a, b, c]) yield* enter(one)
        assert.deepStrictEqual([a.form, b.form, c.form], ["full", "mapped", "full"])
      })
    )
  })

  it.effect("lets go of what cannot be mapped, but not of what is in use; then refuses, at once and by name", () => {
    const process = new Process()
    return withBudget(
      process,
      runtime + 100 * megabyte,
      Effect.gen(function* () {
        const busy = used(new Partition(process, "busy", 50 * megabyte, undefined), 60_000)
        busy.inFlight = 1
        const idle = used(new Partition(process, "idle", 45 * megabyte, undefined), 10_000)
        yield* enter(busy)
        yield* enter(idle)
        const next = used(new Partition(process, "next", 45 * megabyte, undefined), 0)
        yield* enter(next)
        assert.deepStrictEqual([...process.partitions.keys()], ["busy", "next"])
        const error = yield* Effect.flip(enter(new Partition(process, "more", 45 * megabyte, undefined)))
        assert.deepStrictEqual([error._tag, error.bound], ["Overloaded", "budgetBytes"])
        assert.deepStrictEqual([...process.partitions.keys()], ["busy", "next"])
      })
    )
  })

  it.effect("gives up the full form of one in use where no idle one is left: it goes on answering", () => {
    const process = new Process()
    return withBudget(
      process,
      runtime + 100 * megabyte,
      Effect.gen(function* () {
        const a = used(new Partition(process, "a", 60 * megabyte, 3 * megabyte), 0)
        a.inFlight = 3
        yield* enter(a)
        yield* enter(used(new Partition(process, "b", 60 * megabyte, 3 * megabyte), 0))
        assert.strictEqual(a.form, "mapped")
      })
    )
  })

  it.effect(
    "merges what mapped partitions in use were given, the most first, before it refuses; small ones not at all",
    () => {
      const process = new Process()
      return withBudget(
        process,
        runtime + 100 * megabyte,
        Effect.gen(function* () {
          const budget = yield* MemoryBudget
          const written = [30, 45, 1].map((recent, i) => {
            const one = used(new Partition(process, `p${i}`, 60 * megabyte, 8 * megabyte), 0)
            one.form = "mapped"
            one.inFlight = 1
            one.recent = recent * megabyte
            return one
          })
          const [a, b, small] = written as [Partition, Partition, Partition]
          // Given what they have after they were opened, as by writes.
          for (const one of written) {
            const { recent } = one
            one.recent = 0
            yield* enter(one)
            one.recent = recent
          }
          yield* Effect.scoped(budget.reserve(20 * megabyte))
          assert.deepStrictEqual([a.merges, b.merges, small.merges], [0, 1, 0])
          assert.strictEqual(process.partitions.size, 3)
          a.changedAt = 0
          yield* Effect.scoped(budget.reserve(70 * megabyte))
          assert.deepStrictEqual([a.merges, b.merges, small.merges], [1, 1, 0])
          const error = yield* Effect.flip(Effect.scoped(budget.reserve(80 * megabyte)))
          assert.deepStrictEqual([error._tag, small.merges], ["Overloaded", 0])
        })
      )
    }
  )

  it.effect("goes on looking and collecting while something that gives way takes its time", () => {
    const process = new Process()
    let collected = 0
    return Effect.scoped(
      Effect.gen(function* () {
        const budget = yield* MemoryBudget
        const slow = used(new Partition(process, "slow", 80 * megabyte, 2 * megabyte), 60_000)
        process.partitions.set("slow", slow)
        yield* budget.join({ ...slow.resident, demote: Effect.never })
        process.cacheBytes = 50 * megabyte
        yield* TestClock.adjust(1_000)
        const before = collected
        process.cacheBytes = 60 * megabyte
        // The interval between two collections is one of the wall's clock.
        yield* Effect.promise(() => new Promise((resolve) => setTimeout(resolve, 1_100)))
        yield* TestClock.adjust(1_000)
        assert.isAbove(collected, before)
      })
    ).pipe(
      Effect.provide(
        MemoryBudget.layerWith({
          budgetBytes: runtime + 100 * megabyte,
          residentBytes: () => process.residentBytes,
          collect: () => {
            collected += 1
          }
        })
      )
    )
  })

  it.effect("goes on to the next where one cannot change its form", () => {
    const process = new Process()
    return withBudget(
      process,
      runtime + 100 * megabyte,
      Effect.gen(function* () {
        const stubborn = used(new Partition(process, "stubborn", 40 * megabyte, 2 * megabyte), 90_000)
        stubborn.demotable = false
        stubborn.inFlight = 1
        const other = used(new Partition(process, "other", 40 * megabyte, 2 * megabyte), 10_000)
        other.inFlight = 1
        yield* enter(stubborn)
        yield* enter(other)
        yield* enter(used(new Partition(process, "new", 40 * megabyte, 2 * megabyte), 0))
        assert.deepStrictEqual([stubborn.form, other.form], ["full", "mapped"])
      })
    )
  })

  it.effect("takes caches first", () => {
    const process = new Process()
    return withBudget(
      process,
      runtime + 100 * megabyte,
      Effect.gen(function* () {
        const budget = yield* MemoryBudget
        process.cacheBytes = 50 * megabyte
        yield* budget.joinCache({
          bytes: () => process.cacheBytes,
          shrink: (bytes) => {
            process.cacheBytes = Math.max(0, process.cacheBytes - bytes)
          }
        })
        const a = used(new Partition(process, "a", 60 * megabyte, 3 * megabyte), 60_000)
        yield* enter(a)
        assert.strictEqual(process.cacheBytes, 40 * megabyte)
        assert.strictEqual(a.form, "full")
      })
    )
  })

  it.effect("opens the first partition whatever it takes", () => {
    const process = new Process()
    return withBudget(process, runtime + megabyte, enter(new Partition(process, "a", 60 * megabyte, undefined)))
  })

  it.effect("measures: what the process grew beside its partitions is taken off their room, after a while", () => {
    const process = new Process()
    return withBudget(
      process,
      runtime + 100 * megabyte,
      Effect.gen(function* () {
        const a = used(new Partition(process, "a", 60 * megabyte, 3 * megabyte), 60_000)
        yield* enter(a)
        const budget = yield* MemoryBudget
        assert.isTrue(budget.fits(40 * megabyte))
        assert.strictEqual(budget.state().runtimeBytes, runtime)
        a.form = "mapped"
        yield* TestClock.adjust(500)
        assert.strictEqual(budget.state().partitionBytes, 3 * megabyte)
      })
    )
  })

  it.effect("never holds more than it may, whatever is opened and used, and never touches what is in use", () =>
    forEachSeed(100, (seed) => {
      const process = new Process()
      const room = 100 * megabyte
      return withBudget(
        process,
        runtime + room,
        Effect.gen(function* () {
          const random = seededRandom(seed)
          for (let n = 0; n < 60; n++) {
            const full = Math.ceil(random() * 60) * megabyte
            const partition = used(
              new Partition(process, `p${n}`, full, random() < 0.7 ? Math.ceil(full / 20) : undefined),
              Math.floor(random() * 100_000)
            )
            partition.inFlight = random() < 0.3 ? 1 : 0
            const before = [...process.partitions.values()].filter((one) => one.inFlight > 0)
            const exit = yield* Effect.exit(enter(partition))
            for (const one of before) assert.isTrue(process.partitions.has(one.name), `${one.name} was in use`)
            if (Exit.isFailure(exit)) assert.isFalse(process.partitions.has(partition.name))
            const held = process.residentBytes - runtime
            assert.isTrue(held <= room || process.partitions.size === 1, `${held / megabyte} MB`)
            if (random() < 0.3) for (const one of process.partitions.values()) one.inFlight = random() < 0.3 ? 1 : 0
          }
        })
      )
    })
  )
})
