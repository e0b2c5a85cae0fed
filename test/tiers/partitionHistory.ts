/**
 * What several owners of one partition, each of which takes itself for the only one, may have done when all is over: one
 * history. Every promise of the log is checked here, against what the owners were told.
 */
import { assert } from "@effect/vitest"
import { Effect, Fiber, Option, Result, Stream } from "effect"
import { verifySegment } from "../../src/tiers/LogSegment.ts"
import * as PartitionLog from "../../src/tiers/PartitionLog.ts"
import { decodeManifest } from "../../src/tiers/PartitionManifest.ts"
import { type Applied, idOf, logKey, type Owner, openOwner, prefix } from "./partitionOwner.ts"
import { type Illness, illnessOf, Simulation } from "./Simulation.ts"

type Open = typeof PartitionLog.open

export interface RunOptions {
  /** The log, where it is another one than the program's. */
  readonly open?: Open
  readonly illness?: Illness | undefined
}

/** How often what happened in a run, so that a test can show that the runs together had everything in them. */
export interface Happened {
  readonly digest: number
  readonly acknowledged: number
  readonly opened: number
  /** Owners that were told that they are one no longer. */
  readonly lost: number
  /** Appends that were reported as not done, for certain and with doubt. */
  readonly refused: number
  readonly doubted: number
  /** Of those, the ones that came to be in the history. */
  readonly late: number
  readonly recovered: number
  /** Log positions that were written again after they had been pruned. */
  readonly reborn: number
  readonly pruned: number
  readonly snapshots: number
  readonly killed: number
  readonly slept: number
  readonly clockSet: number
  readonly twice: number
}

const names = ["A", "B", "C"]
const livesOfEach = 3

/** Runs one seed. Throws, with the seed and what happened last, where a promise is broken. */
export const runOwners = async (seed: number, options: RunOptions = {}): Promise<Happened> => {
  const simulation = new Simulation(seed, options.illness ?? illnessOf(seed))
  try {
    return await simulate(simulation, options.open ?? PartitionLog.open)
  } catch (error) {
    const last = simulation.trace.slice(-Number(process.env["RUVECTOR_TRACE"] ?? 60)).join("\n")
    throw new Error(`RUVECTOR_TEST_SEED=${seed}: ${String(error)}\n${last}`, { cause: error })
  }
}

const simulate = async (simulation: Simulation, open: Open): Promise<Happened> => {
  const history = new History(simulation)
  const leaseMillis = simulation.chance(0.25) ? 0 : 40 + simulation.below(simulation.chance(0.4) ? 3_000 : 400)
  // Each life is a process of its own: what an earlier one has sent may still be on its way.
  const live = (name: string, life: number): void => {
    if (life === livesOfEach) return
    const machine = simulation.machine(`${name}${life}`)
    simulation.spawn(machine, history.life(machine.name, leaseMillis, open), () => live(name, life + 1))
  }
  for (const name of names) live(name, 0)
  await simulation.run()
  simulation.heal()
  // The first owner after the trouble sees all that counts, while messages of the dead are about; the second sees the same.
  const first = await replay(simulation, "Y", open)
  simulation.drain()
  const second = await replay(simulation, "Z", open)
  assert.deepStrictEqual(second, first, "the history changed after an owner had opened")
  history.check(second)
  return history.happened()
}

/** What a new owner has applied once it has opened. */
const replay = async (simulation: Simulation, name: string, open: Open): Promise<Applied> => {
  let applied: Applied = []
  const opened = Effect.scoped(
    Effect.map(openOwner({ leaseMillis: 0 }, open), (owner) => {
      applied = owner.applied()
    })
  )
  simulation.spawn(simulation.machine(name), opened)
  await simulation.run()
  return applied
}

class History {
  readonly #simulation: Simulation
  readonly #attempted = new Set<string>()
  readonly #acknowledged = new Map<string, { readonly seq: number; readonly epoch: number }>()
  /** Appends that were reported as not done for certain, and the step at which that was found out. */
  readonly #refused = new Map<string, number>()
  readonly #doubted = new Set<string>()
  /** Of those, the ones that their owner has settled to be out of the log for good. */
  readonly #settledOut = new Set<string>()
  /** The last step at which a process looked at an object of the log. */
  readonly #looked = new Map<string, number>()
  /** Steps at which the segment of an id was put into the log. */
  readonly #written = new Map<string, Array<number>>()
  /** What every owner had applied, always the same array as the owner's. */
  readonly #applied: Array<Applied> = []
  readonly #read: Array<{ readonly from: number; readonly ids: ReadonlyArray<string> }> = []
  readonly #deleted = new Set<string>()
  /** Newest epoch in the manifest, and the newest that each process has put there. */
  #claimed = 0
  readonly #claimedBy = new Map<string, number>()
  #newestOpened = 0
  #next = 0
  #opened = 0
  #lost = 0
  #recovered = 0
  #reborn = 0
  #pruned = 0
  #snapshots = 0

  constructor(simulation: Simulation) {
    this.#simulation = simulation
    simulation.onEffect = (machine, operation, key, body) => {
      if (key === `${prefix}/manifest` && body !== undefined && operation !== "get") {
        this.#claimed = Result.getOrThrow(decodeManifest(body)).epoch
        this.#claimedBy.set(machine, this.#claimed)
      }
      if (!key.startsWith(`${prefix}/log/`)) return
      if (operation === "get") return void this.#looked.set(`${machine} ${key}`, simulation.steps)
      if (operation === "delete") this.#deleted.add(key)
      if (body === undefined) return
      if (operation === "create" && this.#deleted.has(key)) this.#reborn += 1
      if (verifySegment(body).count === 0) return
      const id = idOf(body)
      this.#written.set(id, [...(this.#written.get(id) ?? []), simulation.steps])
    }
  }

  /** Opens, does what an owner does in an order of the seed's choosing, and ends or loses. */
  readonly life = (name: string, leaseMillis: number, open: Open) => {
    const simulation = this.#simulation
    return Effect.scoped(
      Effect.gen({ self: this }, function* () {
        // Some look at the manifest beforehand, and it may be another one by the time they claim.
        const peeked = simulation.chance(0.5) ? yield* Effect.option(PartitionLog.peek(prefix)) : Option.none()
        const seen = Option.isSome(peeked) && peeked.value !== undefined ? { seen: peeked.value.seen } : {}
        const opened = yield* Effect.result(openOwner({ leaseMillis, ...seen }, open))
        if (Result.isFailure(opened)) {
          const { _tag } = opened.failure
          const overtaken = this.#claimed > (this.#claimedBy.get(name) ?? 0)
          // The snapshot that an owner is about to read may be pruned by one that came after it.
          const fair = _tag === "StoreFailure" || _tag === "NotOwner" || (_tag === "ObjectMissing" && overtaken)
          return assert.isTrue(fair, `${name}: ${String(opened.failure)}`)
        }
        const owner = opened.success
        this.#opened += 1
        this.#newestOpened = Math.max(this.#newestOpened, owner.log.epoch)
        this.#applied.push(owner.applied())
        const there = new Map(owner.applied().map(([seq, id]) => [id, seq]))
        for (const [id, { seq, epoch }] of this.#acknowledged) {
          // A newer owner may have opened, and acknowledged, while this one read its tail.
          if (epoch > owner.log.epoch) continue
          assert.strictEqual(there.get(id), seq, `${name} opened without ${id}, which was acknowledged`)
        }
        let snapshot: Fiber.Fiber<Result.Result<void, unknown>> | undefined
        const steps = 3 + simulation.below(14)
        for (let step = 0; step < steps; step++) {
          if (simulation.chance(0.12)) yield* Effect.sleep(simulation.below(600))
          if (simulation.chance(0.15)) {
            if (snapshot !== undefined) yield* Fiber.join(snapshot)
            // Beside the appends, as the real owner takes it.
            snapshot = yield* Effect.forkChild(Effect.result(owner.snapshot), { startImmediately: true })
          }
          if (simulation.chance(0.08)) yield* this.#reads(owner)
          const before = owner.applied().length
          const going = simulation.chance(0.1) ? yield* this.#settle(name, owner) : yield* this.#append(name, owner)
          this.#recovered += Math.max(0, owner.applied().length - before - 1)
          if (!going) {
            this.#lost += 1
            // The loser stops, and stays stopped.
            assert.strictEqual((yield* Effect.flip(owner.append("after the end")))._tag, "NotOwner")
            assert.strictEqual((yield* Effect.flip(owner.settle))._tag, "NotOwner")
            break
          }
        }
        if (snapshot !== undefined) this.#snapshots += Number(Result.isSuccess(yield* Fiber.join(snapshot)))
        this.#pruned = Math.max(this.#pruned, owner.log.oldestSeq() - 1)
      })
    )
  }

  /** False where the owner is one no longer. */
  readonly #append = Effect.fnUntraced(function* (this: History, name: string, owner: Owner) {
    const id = `${name}.${this.#next++}`
    const superseded = this.#newestOpened > owner.log.epoch
    this.#attempted.add(id)
    const begun = this.#simulation.steps
    const appended = yield* Effect.result(owner.append(id))
    if (Result.isSuccess(appended)) {
      assert.isFalse(superseded, `${id} was begun after a newer owner had opened, and acknowledged`)
      this.#acknowledged.set(id, { seq: appended.success, epoch: owner.log.epoch })
      this.#simulation.note(`${name} acknowledges ${id} at ${appended.success}`)
      return true
    }
    if (appended.failure._tag === "NotOwner") return false
    if (appended.failure.uncertain) this.#doubted.add(id)
    else {
      const looked = this.#looked.get(`${name} ${logKey(owner.log.lastSeq() + 1)}`) ?? 0
      this.#refused.set(id, looked > begun ? looked : this.#simulation.steps)
    }
    this.#simulation.note(`${name} refuses ${id}${appended.failure.uncertain ? ", with doubt" : ""}`)
    return true
  })

  readonly #settle = Effect.fnUntraced(function* (this: History, name: string, owner: Owner) {
    const settled = yield* Effect.result(owner.settle)
    if (Result.isFailure(settled)) return settled.failure._tag !== "NotOwner"
    // From here on it is certain what became of everything that had failed.
    const there = new Set(owner.applied().map(([, id]) => id))
    for (const id of [...this.#refused.keys(), ...this.#doubted]) {
      if (id.startsWith(`${name}.`) && !there.has(id)) this.#settledOut.add(id)
    }
    return true
  })

  readonly #reads = Effect.fnUntraced(function* (this: History, owner: Owner) {
    const from = owner.log.oldestSeq()
    const read = yield* Effect.result(Stream.runCollect(owner.log.read(from)))
    if (Result.isSuccess(read)) {
      return void this.#read.push({ from, ids: read.success.map(({ bytes }) => idOf(bytes)) })
    }
    const error = read.failure
    // One that sleeps while others prune finds that out, in one way or the other.
    assert.isTrue(error._tag === "StoreFailure" || error._tag === "Compacted", String(error))
  })

  /** Whether the final history is one that keeps every promise. */
  check(history: Applied): void {
    const at = new Map(history.map(([seq, id]) => [id, seq]))
    assert.strictEqual(at.size, history.length, "an id is in the history twice")
    for (let i = 1; i < history.length; i++) {
      assert.isBelow((history[i - 1] as Applied[number])[0], (history[i] as Applied[number])[0])
    }
    for (const [id, { seq }] of this.#acknowledged) assert.strictEqual(at.get(id), seq, `${id} was acknowledged`)
    for (const id of at.keys()) assert.isTrue(this.#attempted.has(id), `${id} is nobody's`)
    // Every owner's state was the beginning of it.
    for (const applied of this.#applied) assert.deepStrictEqual(applied, history.slice(0, applied.length))
    for (const { from, ids } of this.#read) {
      const expected = history.filter(([seq]) => seq >= from).slice(0, ids.length)
      assert.deepStrictEqual(
        ids,
        expected.map(([, id]) => id),
        `read from ${from}`
      )
    }
    // What was refused for certain is there only where the store itself wrote it after that.
    for (const [id, step] of this.#refused) {
      if (!at.has(id)) continue
      assert.isTrue(
        this.#written.get(id)?.some((written) => written > step),
        `${id} was said not to be there`
      )
    }
    for (const id of this.#settledOut) assert.isFalse(at.has(id), `${id} was settled not to be there`)
    this.#checkSnapshots(history)
  }

  /** Every snapshot that counts is the history up to its position, and the log goes on from the oldest of them. */
  #checkSnapshots(history: Applied): void {
    const simulation = this.#simulation
    const manifest = simulation.object(`${prefix}/manifest`) ?? new Uint8Array(0)
    const { snapshots, prunedSeq } = Result.getOrThrow(decodeManifest(manifest))
    for (const { seq, records } of snapshots) {
      const text = Buffer.from(simulation.object(`${prefix}/${records.key}`) ?? "").toString()
      assert.deepStrictEqual(
        JSON.parse(text),
        history.filter(([position]) => position <= seq),
        `snapshot of ${seq}`
      )
    }
    for (const [seq, id] of history) {
      if (seq > prunedSeq) assert.strictEqual(idOf(simulation.object(logKey(seq)) ?? new Uint8Array(0)), id)
    }
  }

  happened(): Happened {
    const { killed, slept, clockSet, twice } = this.#simulation.counts
    const inHistory = (id: string) => this.#written.has(id)
    return {
      digest: this.#simulation.digest,
      acknowledged: this.#acknowledged.size,
      opened: this.#opened,
      lost: this.#lost,
      refused: this.#refused.size,
      doubted: this.#doubted.size,
      late: [...this.#refused.keys(), ...this.#doubted].filter(inHistory).length,
      recovered: this.#recovered,
      reborn: this.#reborn,
      pruned: this.#pruned,
      snapshots: this.#snapshots,
      killed,
      slept,
      clockSet,
      twice
    }
  }
}
