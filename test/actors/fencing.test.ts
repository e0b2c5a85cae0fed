/**
 * Fencing as writers see it: several writers that each take themselves for the owner of one partition, over real logs on
 * the simulated store, each with an index that takes its time. What was acknowledged is in the one history and was visible
 * when it was acknowledged; batches are whole; a patch changes the record that precedes it in that history. Writes with a
 * request's id are made again, by whoever and at whichever owner: each is in the history once, and answered as it was.
 */
import { readFile, writeFile } from "node:fs/promises"
import { assert, describe, it } from "@effect/vitest"
import { Deferred, Effect, Fiber, Result, Stream } from "effect"
import { vi } from "vitest"
import * as PartitionWriter from "../../src/actors/PartitionWriter.ts"
import { formatVersion, VersionClock } from "../../src/protocol/Version.ts"
import { decodeRequests, decodeSegment, type LogOp } from "../../src/tiers/LogSegment.ts"
import { ObjectStore } from "../../src/tiers/ObjectStore.ts"
import * as PartitionLog from "../../src/tiers/PartitionLog.ts"
import { RequestWindow } from "../../src/tiers/RequestWindow.ts"
import type { PartitionIndex } from "../../src/tiers/VectorIndex.ts"
import { prefix } from "../tiers/partitionOwner.ts"
import { illnessOf, type Machine, Simulation } from "../tiers/Simulation.ts"

vi.mock("node:fs/promises", async (original) => {
  const { withSimulatedFiles } = await import("../tiers/SimulatedFiles.ts")
  return withSimulatedFiles(await original())
})
vi.mock("node:crypto", async (original) => {
  const { withSimulatedRandom } = await import("../tiers/SimulatedFiles.ts")
  return withSimulatedRandom(await original())
})

const only = process.env["RUVECTOR_TEST_SEED"]
const seeds = only === undefined ? Math.ceil(Number(process.env["RUVECTOR_SEEDS"] ?? 2_000) / 4) : 1
const firstSeed = only === undefined ? 1 : Number(only)

describe("writers of one partition", () => {
  it(`acknowledge what is in the one history, and visible, in ${seeds} seeds`, { timeout: 3_600_000 }, async () => {
    let acknowledged = 0
    let failed = 0
    let late = 0
    let patched = 0
    let repeated = 0
    for (let seed = firstSeed; seed < firstSeed + seeds; seed++) {
      const outcome = await runWriters(seed)
      acknowledged += outcome.acknowledged
      failed += outcome.failed
      late += outcome.late
      patched += outcome.patched
      repeated += outcome.repeated
    }
    if (only !== undefined) return
    assert.isAbove(acknowledged, seeds * 5)
    assert.isAbove(failed, seeds)
    assert.isAbove(patched, seeds)
    assert.isAbove(late, seeds / 20, "writes that failed and are in the history")
    assert.isAbove(repeated, seeds, "requests that were answered more than once")
  })
})

interface Outcome {
  readonly acknowledged: number
  readonly failed: number
  readonly late: number
  readonly patched: number
  readonly repeated: number
}

/** Runs one seed. Throws, with the seed and what happened last, where a promise is broken. */
const runWriters = async (seed: number): Promise<Outcome> => {
  const simulation = new Simulation(seed, illnessOf(seed))
  try {
    return await simulate(simulation)
  } catch (error) {
    const last = simulation.trace.slice(-60).join("\n")
    throw new Error(`RUVECTOR_TEST_SEED=${seed}: ${String(error)}\n${last}`, { cause: error })
  }
}

/** An operation as it was applied. `state` is the number of the write that made it. */
interface Entry {
  readonly seq: number
  readonly kind: LogOp["kind"]
  readonly id: string
  readonly state: number
  readonly metadata: string
  readonly time: string
  /** The request that it was for, where that had an id, and whether it deleted a visible record. */
  readonly request?: string | undefined
  readonly deleted?: boolean
}

interface Write {
  readonly state: number
  readonly kind: LogOp["kind"]
  readonly ids: ReadonlyArray<string>
  readonly request: PartitionWriter.WriteRequest | undefined
}

/** What a write was answered. */
type Answer = number | { readonly metadata: string; readonly version: string } | undefined

/** Of ids that clients chose, and of given ones. */
const requestOf = (state: number, isGiven: boolean): PartitionWriter.WriteRequest => {
  const bytes = Buffer.alloc(16)
  bytes.writeUInt32LE(state, 4)
  if (isGiven) bytes[0] = 0x80
  return { id: bytes.toString("base64url"), digest: isGiven ? 0 : state }
}

const idsOfAll = ["a", "b", "c", "d", "e"]
const livesOfEach = 3
const clientsOfEach = 3

const simulate = async (simulation: Simulation): Promise<Outcome> => {
  const leaseMillis = simulation.chance(0.25) ? 0 : 40 + simulation.below(1_000)
  const writes = new Map<number, Write>()
  const acknowledged = new Set<number>()
  const failed = new Set<number>()
  /** Writes that can be made again, and what each was answered. */
  const again: Array<Write> = []
  const answers = new Map<string, Array<Answer>>()
  // Where the log is pruned at once, a patch that is made again is answered with the record as it is by then.
  const retainMillis = simulation.chance(0.3) ? 0 : 1_000_000_000
  let states = 0

  const fresh = (): Write => {
    const kind = simulation.chance(0.5) ? "upsert" : simulation.chance(0.6) ? "metadata" : "delete"
    const first = simulation.below(idsOfAll.length)
    const count = kind === "metadata" ? 1 : 1 + simulation.below(3)
    const ids = idsOfAll.slice(first, first + count)
    const state = ++states
    const request = simulation.chance(0.6) ? requestOf(state, simulation.chance(0.5)) : undefined
    const write = { state, kind, ids, request } as const
    writes.set(state, write)
    if (request !== undefined) again.push(write)
    return write
  }

  const client = Effect.fnUntraced(function* (name: string, writer: PartitionWriter.PartitionWriter, index: FakeIndex) {
    const steps = 1 + simulation.below(5)
    for (let step = 0; step < steps; step++) {
      if (simulation.chance(0.2)) yield* Effect.sleep(simulation.below(300))
      const isAgain = again.length > 0 && simulation.chance(0.4)
      const { state, kind, ids, request } = isAgain ? (again[simulation.below(again.length)] as Write) : fresh()
      const written: Effect.Effect<Answer, PartitionWriter.WriteError> =
        kind === "metadata"
          ? writer.patch(ids[0] as string, { patch: state }, request)
          : writer.write(
              ids.map(
                (id): PartitionWriter.Draft =>
                  kind === "upsert"
                    ? { kind, id, vector: new Float32Array([state]), metadata: `{"state":${state}}` }
                    : { kind, id }
              ),
              "cold",
              request
            )
      const outcome = yield* Effect.result(written)
      if (Result.isFailure(outcome)) {
        failed.add(state)
        simulation.note(`${name} fails ${kind} ${state} of ${ids}: ${outcome.failure._tag}`)
        if (outcome.failure._tag === "NotOwner") return
        continue
      }
      if (outcome.success === undefined) {
        if (request === undefined) writes.delete(state)
        continue
      }
      if (request !== undefined) answers.set(request.id, [...(answers.get(request.id) ?? []), outcome.success])
      simulation.note(`${name} acknowledges ${kind} ${state} of ${ids}`)
      acknowledged.add(state)
      // A deletion's operations have no room for its number: its writer's effect is looked at by its ids below.
      if (kind !== "delete") assert.isTrue(index.states.has(state), `${state} was acknowledged before it was visible`)
    }
  })

  const life = (machine: Machine) =>
    Effect.scoped(
      Effect.gen(function* () {
        const opened = yield* Effect.result(openIndex(simulation, machine, { leaseMillis, retainMillis }))
        if (Result.isFailure(opened)) return
        const { log, index, window } = opened.success
        const lost = yield* Deferred.make<void>()
        const writer = yield* PartitionWriter.make({
          log,
          index: index.service,
          clock: new VersionClock("r", index.maxTime, 0),
          dimensions: 1,
          bounds: { commitBytesMax: 300, writeQueueBytesMax: 100_000, applyBacklogBytesMax: 200 },
          window,
          onApplied: () => {},
          onFatal: () => Effect.asVoid(Deferred.succeed(lost, undefined))
        })
        const clients = yield* Effect.forEach(
          Array.from({ length: clientsOfEach }, (_, i) => i),
          (i) => Effect.forkChild(client(`${machine.name}.${i}`, writer, index), { startImmediately: true })
        )
        if (simulation.chance(0.5)) {
          yield* Effect.sleep(simulation.below(400))
          yield* Effect.result(index.snapshot(log, writer))
        }
        yield* Effect.race(Fiber.awaitAll(clients), Deferred.await(lost))
        yield* Fiber.awaitAll(clients)
      })
    )

  const live = (name: string, count: number): void => {
    if (count === livesOfEach) return
    const machine = simulation.machine(`${name}${count}`)
    simulation.spawn(machine, life(machine), () => live(name, count + 1))
  }
  for (const name of ["A", "B"]) live(name, 0)
  await simulation.run()
  simulation.heal()
  const last: { index?: FakeIndex } = {}
  for (const name of ["Y", "Z"]) {
    const machine = simulation.machine(name)
    const opening = Effect.map(openIndex(simulation, machine, { leaseMillis: 0, retainMillis }), ({ index }) => {
      if (last.index !== undefined) assert.deepStrictEqual(index.entries, last.index.entries)
      last.index = index
    })
    simulation.spawn(machine, Effect.scoped(opening))
    await simulation.run()
    simulation.drain()
  }
  const { entries } = last.index as FakeIndex
  checkEntries(entries, writes, acknowledged)
  checkAnswers(entries, answers, retainMillis > 0)
  const there = new Set(entries.map(({ state }) => state))
  return {
    acknowledged: acknowledged.size,
    failed: failed.size,
    late: [...failed].filter((state) => there.has(state)).length,
    patched: [...acknowledged].filter((state) => writes.get(state)?.kind === "metadata").length,
    repeated: [...answers.values()].filter((given) => given.length > 1).length
  }
}

/** What a request was answered, each time, is what it did in the history, once. */
const checkAnswers = (
  entries: ReadonlyArray<Entry>,
  answers: ReadonlyMap<string, ReadonlyArray<Answer>>,
  isLogKept: boolean
) => {
  const done = Map.groupBy(
    entries.filter(({ request }) => request !== undefined),
    ({ request }) => request as string
  )
  for (const [id, found] of done) {
    assert.strictEqual(new Set(found.map(({ seq }) => seq)).size, 1, `${id} was done more than once`)
    assert.strictEqual(new Set(found.map(({ id }) => id)).size, found.length, `${id} was done more than once`)
  }
  for (const [id, given] of answers) {
    const found = done.get(id)
    assert.isDefined(found, `${id} was answered and is not there`)
    const [first] = found as [Entry]
    if (first.kind === "metadata" && !isLogKept) continue
    const answer: Answer =
      first.kind === "metadata"
        ? { metadata: first.metadata, version: formatVersion({ time: BigInt(first.time), region: "r", counter: 0 }) }
        : first.kind === "delete"
          ? (found as Array<Entry>).filter(({ deleted }) => deleted).length
          : (found as Array<Entry>).length
    for (const one of given) assert.deepStrictEqual(plainOf(one), plainOf(answer), `the answer to ${id}`)
  }
}

/** Without the counter of a version, which entries do not have. */
const plainOf = (answer: Answer) =>
  typeof answer === "object" ? { ...answer, version: answer.version.split(/[-.:@]/)[0] } : answer

const checkEntries = (
  entries: ReadonlyArray<Entry>,
  writes: ReadonlyMap<number, Write>,
  acknowledged: ReadonlySet<number>
) => {
  const byState = new Map<number, Array<Entry>>()
  const metadata = new Map<string, string>()
  let time = ""
  for (const entry of entries) {
    // Versions rise along the history, so that replaying it in any order gives the same.
    assert.isTrue(entry.time > time, `the version of ${entry.id} at ${entry.seq}`)
    time = entry.time
    if (entry.kind === "delete") {
      metadata.delete(entry.id)
      continue
    }
    byState.set(entry.state, [...(byState.get(entry.state) ?? []), entry])
    if (entry.kind === "metadata") {
      const before = metadata.get(entry.id)
      assert.isDefined(before, `patch ${entry.state} of ${entry.id}, which was not there`)
      assert.deepStrictEqual(
        JSON.parse(entry.metadata),
        { ...JSON.parse(before as string), patch: entry.state },
        `patch ${entry.state} of ${entry.id} at ${entry.seq} changed something else than what precedes it`
      )
    }
    metadata.set(entry.id, entry.metadata)
  }
  for (const [state, found] of byState) {
    const write = writes.get(state)
    assert.isDefined(write, `${state} is nobody's`)
    assert.deepStrictEqual(
      found.map(({ id }) => id),
      write?.ids,
      `write ${state} is there in part, or twice`
    )
    assert.strictEqual(new Set(found.map(({ seq }) => seq)).size, 1, `write ${state} is in two groups`)
  }
  for (const state of acknowledged) {
    if (writes.get(state)?.kind !== "delete") assert.isTrue(byState.has(state), `${state} was acknowledged`)
  }
}

/** The index's promises without vectors: applies in the order in which it is asked, the greatest version wins. */
class FakeIndex {
  readonly entries: Array<Entry> = []
  readonly states = new Set<number>()
  readonly records = new Map<string, { readonly metadata: string; readonly state: number }>()
  maxTime = 0n
  #last: Fiber.Fiber<void> | undefined
  readonly #simulation: Simulation
  readonly #machine: Machine

  constructor(simulation: Simulation, machine: Machine) {
    this.#simulation = simulation
    this.#machine = machine
  }

  take(entry: Entry): void {
    this.entries.push(entry)
    this.states.add(entry.state)
    const time = BigInt(entry.time)
    if (time > this.maxTime) this.maxTime = time
    if (entry.kind === "delete") this.records.delete(entry.id)
    else this.records.set(entry.id, { metadata: entry.metadata, state: entry.state })
  }

  takeSegment(bytes: Uint8Array): Uint8Array {
    const { seq, ops } = decodeSegment(bytes)
    const requests = decodeRequests(bytes)?.requests ?? []
    return new Uint8Array(
      ops.map((op, i) => {
        const request = requests.find(({ first, count }) => i >= first && i < first + count)?.id
        const metadata = op.kind === "delete" ? "" : op.metadata
        const fields = metadata === "" ? {} : (JSON.parse(metadata) as { state?: number; patch?: number })
        const state = op.kind === "metadata" ? fields.patch : fields.state
        const visible = this.records.has(op.id)
        const time = String(op.version.time)
        const deleted = op.kind === "delete" && visible
        this.take({ seq, kind: op.kind, id: op.id, state: state ?? 0, metadata, time, request, deleted })
        return op.kind === "delete" ? (visible ? 3 : 4) : visible ? 2 : 1
      })
    )
  }

  snapshot(log: PartitionLog.PartitionLogHandle, writer: PartitionWriter.PartitionWriter) {
    return Effect.gen({ self: this }, function* () {
      const seq = writer.appliedSeq()
      if (this.#last !== undefined) yield* Fiber.await(this.#last)
      const entries = this.entries.filter((entry) => entry.seq <= seq)
      const { name } = this.#machine
      const window = yield* writer.requests
      const requests = window === undefined ? undefined : `requests-${name}`
      const files = { records: `records-${name}`, graph: `graph-${name}`, requests }
      if (window !== undefined && requests !== undefined) yield* Effect.promise(() => writeFile(requests, window))
      yield* Effect.promise(() => writeFile(files.records, JSON.stringify(entries)))
      yield* Effect.promise(() => writeFile(files.graph, "graph"))
      yield* log.commitSnapshot(seq, files)
    })
  }

  readonly service = {
    apply: (bytes: Uint8Array) =>
      Effect.gen({ self: this }, function* () {
        const before = this.#last
        const done = yield* Deferred.make<Uint8Array>()
        this.#last = yield* Effect.forkDetach(
          Effect.gen({ self: this }, function* () {
            if (before !== undefined) yield* Fiber.await(before)
            yield* this.#simulation.work(this.#machine, "apply")
            yield* Deferred.succeed(done, this.takeSegment(bytes))
          }),
          { startImmediately: true }
        )
        return { effects: yield* Deferred.await(done) }
      }),
    get: (ids: ReadonlyArray<string>) =>
      Effect.map(this.#work("get"), () =>
        ids.map((id) => {
          const record = this.records.get(id)
          if (record === undefined) return undefined
          const version = { time: 0n, region: "r", counter: 0 }
          return { id, vector: new Float32Array([record.state]), metadata: record.metadata, version }
        })
      )
  } as unknown as PartitionIndex

  #work(what: string): Effect.Effect<void> {
    return Effect.suspend(() => this.#simulation.work(this.#machine, what))
  }
}

const openIndex = Effect.fnUntraced(function* (
  simulation: Simulation,
  machine: Machine,
  options: PartitionLog.PartitionLogOptions
) {
  const store = yield* ObjectStore
  const log = yield* PartitionLog.open(prefix, options)
  const index = new FakeIndex(simulation, machine)
  const window = new RequestWindow({ requestWindowMillis: 1_000_000_000, requestWindowMax: 1_000 })
  if (log.snapshot?.requests !== undefined) window.load((yield* store.get(log.snapshot.requests.key)).body)
  if (log.snapshot !== undefined) {
    const text = yield* store.withFile(log.snapshot.records.key, (path) => Effect.promise(() => readFile(path, "utf8")))
    for (const entry of JSON.parse(text) as ReadonlyArray<Entry>) index.take(entry)
  }
  yield* Stream.runForEach(log.tail, ({ seq, bytes }) =>
    Effect.sync(() => window.observe(seq, decodeRequests(bytes), { effects: index.takeSegment(bytes) }))
  )
  return { log, index, window }
})
