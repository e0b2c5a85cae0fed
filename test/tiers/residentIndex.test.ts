/**
 * A partition that changes its form while it is written to and searched: nothing acknowledged is missed by a search, no
 * search fails, and the form that was given up is closed once.
 */
import { assert, describe, it } from "@effect/vitest"
import { Effect, Exit, Scope, Stream } from "effect"
import type { LogEntry } from "../../src/tiers/PartitionLog.ts"
import * as ResidentIndex from "../../src/tiers/ResidentIndex.ts"
import { type IndexForm, IndexLost, type PartitionIndex } from "../../src/tiers/VectorIndex.ts"
import { seededRandom } from "./FaultyObjectStore.ts"

const seeds = Number(process.env["RUVECTOR_SEEDS"] ?? 200)

describe("a change of form", () => {
  it.live(`under writes and searches, ${seeds} seeds`, () =>
    Effect.forEach(
      Array.from({ length: seeds }, (_, i) => i + 1),
      (seed) =>
        Effect.scoped(simulate(seed)).pipe(
          Effect.onError(() => Effect.sync(() => console.error(`failed with seed ${seed}`)))
        ),
      { discard: true }
    )
  )

  it.live("that fails leaves the form in use, closes what was opened, and a write goes on", () =>
    Effect.scoped(
      Effect.gen(function* () {
        const random = seededRandom(1)
        const log: Array<number> = []
        const first = model("mapped", random)
        const { resident } = yield* start(first)
        yield* write(resident, log, 1)
        for (const failing of ["open", "log", "lost"] as const) {
          const next = model("full", random)
          const exit = yield* Effect.exit(
            resident.change({
              open:
                failing === "open"
                  ? Effect.fail("no file" as const)
                  : Effect.as(
                      Effect.addFinalizer(() => Effect.sync(() => next.close())),
                      failing === "lost" ? { ...next.index, lost: () => true } : next.index
                    ),
              log: failing === "log" ? Stream.fail("compacted" as const) : Stream.empty
            })
          )
          assert.isTrue(Exit.isFailure(exit), failing)
          assert.strictEqual(resident.form(), "mapped")
          assert.isFalse(resident.changing())
          if (failing !== "open") assert.strictEqual(next.closed(), 1, failing)
          yield* write(resident, log, log.length + 1)
          yield* check(resident, log.length)
        }
        assert.strictEqual(first.closed(), 0)
      })
    )
  )
})

/** An index that holds numbers: a segment is one number, a search answers how many of 1, 2, … it has without a gap. */
const model = (form: IndexForm, random: () => number) => {
  const applied = new Set<number>()
  let closed = 0
  const turns = Effect.suspend(() => Effect.repeat(Effect.yieldNow, { times: Math.floor(random() * 4) }))
  const alive = Effect.suspend(() => (closed > 0 ? Effect.fail(new IndexLost({ detail: "closed" })) : Effect.void))
  let last: Promise<unknown> = Promise.resolve()
  const index: PartitionIndex = {
    form: () => form,
    lost: () => closed > 0,
    // In the order in which they are asked, as a thread does.
    apply: (segment) =>
      Effect.suspend(() => {
        const number = new DataView(segment.buffer, segment.byteOffset).getUint32(0)
        const before = last
        let done = () => {}
        last = new Promise<void>((resolve) => {
          done = resolve
        })
        return Effect.gen(function* () {
          yield* Effect.promise(() => before)
          yield* turns
          yield* alive
          applied.add(number)
          return { effects: new Uint8Array(1) }
        }).pipe(Effect.ensuring(Effect.sync(() => done())))
      }),
    search: () =>
      Effect.gen(function* () {
        yield* turns
        yield* alive
        let gapless = 0
        while (applied.has(gapless + 1)) gapless += 1
        return { ids: [], scores: Float32Array.of(gapless), metadata: undefined, vectors: undefined }
      }),
    get: () => Effect.as(alive, []),
    stats: Effect.die("not asked"),
    snapshot: () => Effect.die("not asked"),
    watch: () => Effect.die("not asked")
  }
  return {
    index,
    close: () => {
      closed += 1
    },
    closed: () => closed
  }
}

const start = Effect.fnUntraced(function* (first: ReturnType<typeof model>) {
  const scope = yield* Scope.fork(yield* Effect.scope)
  yield* Scope.addFinalizer(
    scope,
    Effect.sync(() => first.close())
  )
  return { resident: yield* ResidentIndex.make(first.index, scope) }
})

const segmentOf = (number: number): Uint8Array => {
  const bytes = new Uint8Array(4)
  new DataView(bytes.buffer).setUint32(0, number)
  return bytes
}

const write = (resident: ResidentIndex.ResidentIndex, log: Array<number>, number: number) =>
  Effect.suspend(() => {
    log.push(number)
    return resident.apply(segmentOf(number))
  })

const check = Effect.fnUntraced(function* (resident: ResidentIndex.ResidentIndex, acknowledged: number) {
  const { scores } = yield* resident.search({
    vector: new Float32Array(1),
    k: 1,
    ef: 1,
    filter: undefined,
    includeMetadata: false,
    includeVector: false
  })
  assert.isAtLeast(scores[0] as number, acknowledged)
})

const simulate = Effect.fnUntraced(function* (seed: number) {
  const random = seededRandom(seed)
  const log: Array<number> = []
  const models = [model("mapped", random)]
  const { resident } = yield* start(models[0] as ReturnType<typeof model>)
  const writes = 20 + Math.floor(random() * 60)
  let acknowledged = 0
  let writing = true

  const writer = Effect.gen(function* () {
    for (let number = 1; number <= writes; number++) {
      yield* write(resident, log, number)
      acknowledged = number
      yield* Effect.repeat(Effect.yieldNow, { times: Math.floor(random() * 3) })
    }
    writing = false
  })
  const searcher = Effect.gen(function* () {
    while (writing) {
      yield* check(resident, acknowledged)
      yield* Effect.yieldNow
    }
  })
  const changer = Effect.gen(function* () {
    while (writing) {
      const next = model(resident.form() === "full" ? "mapped" : "full", random)
      models.push(next)
      yield* resident.change({
        open: Effect.as(
          Effect.addFinalizer(() => Effect.sync(() => next.close())),
          next.index
        ),
        // As it was committed when it is read: the writes under way come to the next form by themselves.
        log: Stream.suspend(() =>
          Stream.fromIterable(log.slice().map((number): LogEntry => ({ seq: number, bytes: segmentOf(number) })))
        )
      })
      assert.strictEqual(resident.form(), next.index.form())
      yield* Effect.repeat(Effect.yieldNow, { times: Math.floor(random() * 20) })
    }
  })
  yield* Effect.all([writer, searcher, searcher, changer], { concurrency: "unbounded" })
  yield* check(resident, writes)
  assert.deepStrictEqual(
    models.map((one) => one.closed()),
    models.map((_, i) => (i === models.length - 1 ? 0 : 1))
  )
})
