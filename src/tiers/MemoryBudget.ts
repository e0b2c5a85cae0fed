/**
 * The hot tier's budget: what the process may hold in memory, shared by the resident partitions and the caches.
 *
 * **Measured.** `runtime` is what the process takes beside them: its resident memory less what partitions and caches say
 * they hold: the mean of the last {@link runtimeWindowMillis} and what it deviates from that, since garbage comes and goes and
 * memory that was just given up comes back with a delay. Partitions and caches share what the budget leaves beside that. While the process holds more than
 * its budget, garbage is collected again and again.
 *
 * **Kept.** Who opens a partition, or changes it to its full form, reserves what that will take. Where there is no room,
 * room is made: first caches give way, then full forms become mapped ones, then what mapped partitions were given since their
 * snapshot is merged into a new one, then mapped partitions are let go; the longest unused and largest first. What was used within {@link restMillis} or has requests under way is not let go, and what has
 * just changed its form does not change it again; if that leaves nothing, the answer is `Overloaded`, at once.
 */
import { Context, Effect, Layer, Metric, type Scope, Semaphore } from "effect"
import { Settings } from "../config.ts"
import { Overloaded } from "../protocol/Errors.ts"
import { collectGrown } from "./collectGarbage.ts"
import type { IndexForm } from "./VectorIndex.ts"

/** A resident partition, as the budget sees it. Everything is cheap to ask; `measure` asks its thread. */
export interface ResidentPartition {
  /** The partition's entity id. */
  readonly partition: string
  readonly form: () => IndexForm
  /** Bytes held when last measured. */
  readonly bytes: () => number
  /** Bytes of the full form: measured, or estimated from the snapshot's files. */
  readonly fullBytes: () => number
  /** Bytes of the mapped form; `undefined` where there is none, since it has too few records. */
  readonly mappedBytes: () => number | undefined
  /** When it was last asked for anything, and when a change of its form last ended, well or not; milliseconds since 1970. */
  readonly usedAt: () => number
  readonly changedAt: () => number
  /** Whether a change of form is under way. */
  readonly changing: () => boolean
  /** Whether there is a full form: a quantised collection's partitions have none. */
  readonly hasFull: boolean
  /** Requests under way. */
  readonly inFlight: () => number
  readonly measure: Effect.Effect<void>
  /** Changes the form; false where it could not. `demote` snapshots first where there is news. */
  readonly promote: Effect.Effect<boolean>
  readonly demote: Effect.Effect<boolean>
  /** Bytes that {@link merge} gives back: of what was written since the snapshot, in the mapped form. */
  readonly recentBytes: () => number
  /** Snapshots a mapped partition, which goes on from that; false where it could not. */
  readonly merge: Effect.Effect<boolean>
  /** Lets go of the partition; the next request opens it again. */
  readonly passivate: Effect.Effect<void>
}

/** A cache that lives within the budget. */
export interface BudgetedCache {
  readonly bytes: () => number
  /** Gives up about so many bytes. */
  readonly shrink: (bytes: number) => void
}

export interface BudgetState {
  /** What the process may hold. */
  readonly budgetBytes: number
  /** What it holds: measured by the kernel. */
  readonly residentBytes: number
  /** Of these, beside partitions and caches. */
  readonly runtimeBytes: number
  readonly partitionBytes: number
  /** What partitions may hold beside the caches as they are. */
  readonly partitionRoomBytes: number
  readonly cacheBytes: number
  readonly reservedBytes: number
}

export class MemoryBudget extends Context.Service<
  MemoryBudget,
  {
    /** Reserves memory until the scope closes; makes room for it first, or fails with `Overloaded`. */
    readonly reserve: (bytes: number) => Effect.Effect<void, Overloaded, Scope.Scope>
    /** Whether so much would fit without anything giving way. */
    readonly fits: (bytes: number) => boolean
    /** Whether writes must wait: memory is over the budget, and nothing can give way. */
    readonly exhausted: () => boolean
    readonly join: (resident: ResidentPartition) => Effect.Effect<void, never, Scope.Scope>
    readonly joinCache: (cache: BudgetedCache) => Effect.Effect<void, never, Scope.Scope>
    /** Called when the process holds too much: other threads' garbage is collected. */
    readonly joinCollector: (collect: () => void) => Effect.Effect<void, never, Scope.Scope>
    readonly residents: () => ReadonlyArray<ResidentPartition>
    readonly state: () => BudgetState
  }
>()("ruvector/tiers/MemoryBudget") {
  static readonly layer: Layer.Layer<MemoryBudget, never, Settings> = Layer.effect(
    MemoryBudget,
    Effect.flatMap(Settings, ({ budgetBytes }) =>
      make({ budgetBytes: budgetBytes === 0 ? defaultBudgetBytes() : budgetBytes })
    )
  )

  /** With another budget, or another measure of the process. */
  static readonly layerWith = (options: MemoryBudgetOptions): Layer.Layer<MemoryBudget> =>
    Layer.effect(MemoryBudget, make(options))
}

export interface MemoryBudgetOptions {
  readonly budgetBytes: number
  /** The process's resident memory; the kernel's count where none is given. */
  readonly residentBytes?: () => number
  /** Collects the main thread's garbage; V8's own where none is given. */
  readonly collect?: () => void
}

/** Share of the container's memory, or of the machine's, where no budget is set. */
const budgetShare = 0.75

const defaultBudgetBytes = (): number => {
  const constrained = process.constrainedMemory()
  const limit = constrained > 0 && constrained < Number.MAX_SAFE_INTEGER ? constrained : process.availableMemory()
  return Math.floor(limit * budgetShare)
}

/** Between two looks at how much is held. */
const lookMillis = 250

/** Over so long the mean of what the process takes beside partitions and caches is what counts. */
const runtimeWindowMillis = 10_000

/** Share of the budget that partitions and caches have whatever the rest of the process takes. */
const shareMin = 0.1

/** A partition that was used so recently is in use. */
const restMillis = 1_000

/** A form stays for so long at least. */
const changeMillis = 2_000

/** Times that room is made for one reservation. */
const evictionsMax = 256

/** While the process holds more than it may, its garbage is collected; not more often than this, since that takes its time. */
const collectEveryMillis = 1_000

/** Least bytes written since a snapshot, and their least share of the partition, that are merged to make room. */
const mergeBytesMin = 1_048_576
const mergeShareMin = 0.2

/** Over the budget by so much, writes wait. */
const exhaustedFactor = 1.05

const make = Effect.fnUntraced(function* (options: MemoryBudgetOptions) {
  const { budgetBytes } = options
  const residentBytes = options.residentBytes ?? (() => process.memoryUsage.rss())
  const residents = new Map<string, ResidentPartition>()
  const caches = new Set<BudgetedCache>()
  const gate = yield* Semaphore.make(1)
  const samples: Array<{ readonly at: number; readonly bytes: number }> = []
  let reservedBytes = 0
  const collect = options.collect ?? collectGrown
  const collectors = new Set<() => void>()
  let collectedAt = 0
  let stuck = false

  const partitionBytes = (): number => {
    let bytes = 0
    for (const resident of residents.values()) bytes += resident.bytes()
    return bytes
  }

  const cacheBytes = (): number => {
    let bytes = 0
    for (const cache of caches) bytes += cache.bytes()
    return bytes
  }

  const sample = (): void => {
    const now = Date.now()
    samples.push({ at: now, bytes: Math.max(0, residentBytes() - partitionBytes() - cacheBytes()) })
    while (samples.length > 1 && samples[0]!.at < now - runtimeWindowMillis) samples.shift()
  }

  const runtimeBytes = (): number => {
    if (samples.length === 0) sample()
    let sum = 0
    let squares = 0
    for (const { bytes } of samples) {
      sum += bytes
      squares += bytes * bytes
    }
    const mean = sum / samples.length
    return mean + Math.sqrt(Math.max(0, squares / samples.length - mean * mean))
  }

  /** What partitions and caches may hold together. */
  const shared = (): number => Math.max(budgetBytes * shareMin, budgetBytes - runtimeBytes())

  /** What is left; negative where too much is held. */
  const room = (): number => shared() - partitionBytes() - cacheBytes() - reservedBytes

  /** What makes some room, or `undefined` where nothing can give way. */
  const whatGivesWay = (wanted: number): Effect.Effect<unknown> | undefined => {
    for (const cache of caches) {
      if (cache.bytes() > 0) return Effect.sync(() => cache.shrink(wanted))
    }
    const now = Date.now()
    const isIdle = (one: ResidentPartition) => one.inFlight() === 0 && now - one.usedAt() >= restMillis
    /** Idle time times what is gained: the longest unused and largest first. */
    const gain = (one: ResidentPartition, bytes: number) => (now - one.usedAt() + 1) * bytes
    let act: Effect.Effect<unknown> | undefined
    let most = 0
    const offer = (candidate: Effect.Effect<unknown>, by: number) => {
      if (by <= most) return
      act = candidate
      most = by
    }
    // A mapped partition goes on answering, so the full form is given up even by one in use, if no idle one is left.
    for (const idleOnly of [true, false]) {
      for (const one of residents.values()) {
        const mapped = one.mappedBytes()
        if (one.form() !== "full" || mapped === undefined || (idleOnly && !isIdle(one))) continue
        if (now - one.changedAt() < changeMillis) continue
        if (one.bytes() > mapped) offer(count(one.demote, demotions), gain(one, one.bytes() - mapped))
      }
      if (act !== undefined) return act
    }
    // What is written all the time is in use all the time. Each merge rewrites a whole partition, so small ones are not worth it.
    for (const one of residents.values()) {
      const recent = one.recentBytes()
      if (one.form() !== "mapped" || one.changing() || recent < Math.max(mergeBytesMin, one.bytes() * mergeShareMin))
        continue
      if (now - one.changedAt() >= changeMillis) offer(count(one.merge, merges), recent)
    }
    if (act !== undefined) return act
    for (const one of residents.values()) {
      if (isIdle(one)) offer(count(Effect.as(one.passivate, true), passivations), gain(one, one.bytes()))
    }
    return act
  }

  const makeRoom = (bytes: number): Effect.Effect<boolean> =>
    gate.withPermit(
      Effect.gen(function* () {
        for (let i = 0; i < evictionsMax && room() < bytes; i++) {
          const act = whatGivesWay(bytes - room())
          if (act === undefined) return false
          yield* act
        }
        return room() >= bytes
      })
    )

  const reserve = (bytes: number): Effect.Effect<void, Overloaded, Scope.Scope> =>
    Effect.acquireRelease(
      Effect.suspend(() => {
        const take = Effect.sync(() => {
          reservedBytes += bytes
        })
        if (room() >= bytes) return take
        return Effect.flatMap(makeRoom(bytes), (made) => {
          // The first partition is opened whatever it takes: a budget that holds none is not a budget.
          if (made || (residents.size === 0 && reservedBytes === 0)) return take
          return Effect.andThen(
            Metric.update(refusals, 1),
            Effect.fail(new Overloaded({ bound: "budgetBytes", retryAfterMillis: 500 }))
          )
        })
      }),
      () =>
        Effect.sync(() => {
          reservedBytes -= bytes
        })
    )

  const look = Effect.gen(function* () {
    while (true) {
      yield* Effect.sleep(lookMillis)
      const since = Date.now() - 2 * lookMillis
      yield* Effect.forEach(
        [...residents.values()].filter((one) => one.usedAt() >= since || one.bytes() === 0),
        (one) => one.measure,
        { concurrency: 8, discard: true }
      )
      if (residentBytes() > budgetBytes && Date.now() - collectedAt >= collectEveryMillis) {
        collect()
        for (const one of collectors) one()
        collectedAt = Date.now()
      }
      sample()
    }
  })
  yield* Effect.forkScoped(look)

  // Apart from looking: what gives way may take seconds, and that is when most is held.
  const keep = Effect.gen(function* () {
    while (true) {
      yield* Effect.sleep(lookMillis)
      stuck = room() < 0 && !(yield* makeRoom(0))
    }
  })
  yield* Effect.forkScoped(keep)

  return MemoryBudget.of({
    reserve,
    fits: (bytes) => room() >= bytes,
    exhausted: () => stuck && room() < -(exhaustedFactor - 1) * budgetBytes,
    join: (resident) =>
      Effect.acquireRelease(
        Effect.sync(() => {
          residents.set(resident.partition, resident)
        }),
        () =>
          Effect.sync(() => {
            if (residents.get(resident.partition) === resident) residents.delete(resident.partition)
          })
      ),
    joinCache: (cache) =>
      Effect.acquireRelease(
        Effect.sync(() => {
          caches.add(cache)
        }),
        () => Effect.sync(() => caches.delete(cache))
      ),
    joinCollector: (one) =>
      Effect.acquireRelease(
        Effect.sync(() => {
          collectors.add(one)
        }),
        () => Effect.sync(() => collectors.delete(one))
      ),
    residents: () => [...residents.values()],
    state: () => ({
      budgetBytes,
      residentBytes: residentBytes(),
      runtimeBytes: runtimeBytes(),
      partitionBytes: partitionBytes(),
      partitionRoomBytes: Math.max(0, shared() - cacheBytes() - reservedBytes),
      cacheBytes: cacheBytes(),
      reservedBytes
    })
  })
})

const count = (act: Effect.Effect<boolean>, metric: Metric.Counter<number>): Effect.Effect<boolean> =>
  Effect.tap(act, (done) => (done ? Metric.update(metric, 1) : Effect.void))

const demotions = Metric.counter("ruvector_budget_demotions", {
  description: "Full forms given up for mapped ones because memory was needed"
})
const passivations = Metric.counter("ruvector_budget_passivations", {
  description: "Partitions let go because memory was needed"
})
const merges = Metric.counter("ruvector_budget_merges", {
  description: "Mapped partitions snapshotted because the memory of what was written since was needed"
})
const refusals = Metric.counter("ruvector_budget_refusals", {
  description: "Requests refused because memory was needed and everything was in use"
})
