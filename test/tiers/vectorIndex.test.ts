/** The vector threads as the layers above see them. */
import { mkdtempSync, rmSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { assert, describe, it } from "@effect/vitest"
import { Effect, Exit, Fiber, Option, Scope } from "effect"
import type { Metric } from "../../src/protocol/Fields.ts"
import { encodeSegment, type LogOp } from "../../src/tiers/LogSegment.ts"
import {
  type IndexQuery,
  type IndexSpec,
  type PartitionIndex,
  type SnapshotFiles,
  VectorIndex
} from "../../src/tiers/VectorIndex.ts"
import { type Random, random, seeded, seedOf } from "../support/Seeded.ts"
import { nearest, scoreOf, segmentOf, stamper } from "./index/indexSupport.ts"

const specOf = (dimensions: number, metric: Metric = "cosine"): IndexSpec => ({
  dimensions,
  metric,
  m: 16,
  efConstruction: 200
})

const queryOf = (vector: ArrayLike<number>, options: Partial<IndexQuery> = {}): IndexQuery => ({
  vector: Float32Array.from(vector),
  k: 10,
  ef: 128,
  filter: undefined,
  includeMetadata: false,
  includeVector: false,
  ...options
})

const directory = Effect.acquireRelease(
  Effect.sync(() => mkdtempSync(join(tmpdir(), "vector-index-"))),
  (path) => Effect.sync(() => rmSync(path, { recursive: true, force: true }))
)

const upsertsOf = (
  source: Random,
  dimensions: number,
  count: number,
  stamp: ReturnType<typeof stamper>
): Array<LogOp> =>
  Array.from({ length: count }, (_, i) => ({
    kind: "upsert",
    id: `${i}`,
    version: stamp(),
    vector: Float32Array.from(source.vector(dimensions)),
    metadata: JSON.stringify({ n: i, even: i % 2 === 0 })
  }))

describe("a partition in a vector thread", () => {
  for (const [metric, quantization, seed] of [
    ["cosine", "none", 1],
    ["l2", "none", 2],
    ["ip", "none", 3],
    ["cosine", "pq", 31],
    ["l2", "i8", 32],
    ["ip", "bf16", 33]
  ] as const) {
    const name = `answers as a map would, through snapshots and reopening: ${metric}, ${quantization}`
    it(name, { timeout: 60_000 }, () =>
      seeded(seedOf(seed), (source) =>
        model({ ...specOf(5, metric), quantization }, source).pipe(
          Effect.scoped,
          Effect.provide(
            VectorIndex.layerWith({
              threads: 2,
              graphFrom: 500,
              sketchFrom: 1,
              blockCacheBytes: 65_536,
              // Some wait for their searches, as an embedded engine does.
              searchWaitMillis: seed % 2 === 0 ? 4 : 0
            })
          ),
          Effect.runPromise
        )
      )
    )
  }

  it.live("answers all of many searches and reads asked at once", () =>
    Effect.gen(function* () {
      const source = random(seedOf(4))
      const index = yield* (yield* VectorIndex).open(specOf(8), undefined)
      const ops = upsertsOf(source, 8, 500, stamper())
      yield* index.apply(segmentOf(8, ops))
      const answers = yield* Effect.forEach(
        ops,
        (op, i) =>
          Effect.all([
            index.search(
              queryOf(op.kind === "upsert" ? op.vector : [], {
                k: 1 + (i % 7),
                includeMetadata: i % 2 === 0,
                includeVector: i % 3 === 0,
                filter: i % 5 === 0 ? `{"even":${i % 2 === 0}}` : undefined
              })
            ),
            index.get([op.id, "nobody"])
          ]),
        { concurrency: "unbounded" }
      )
      for (const [i, [hits, records]] of answers.entries()) {
        const op = ops[i]!
        if (op.kind !== "upsert") continue
        assert.strictEqual(hits.ids[0], op.id)
        assert.closeTo(hits.scores[0]!, 1, 1e-6)
        assert.lengthOf(hits.ids, 1 + (i % 7))
        assert.strictEqual(hits.metadata?.[0], i % 2 === 0 ? op.metadata : undefined)
        assert.deepStrictEqual(hits.vectors?.subarray(0, 8), i % 3 === 0 ? op.vector : undefined)
        const { id, vector, metadata, version } = op
        assert.deepStrictEqual(records, [{ id, vector, metadata, version }, undefined])
      }
    }).pipe(Effect.scoped, Effect.provide(VectorIndex.layerWith({ threads: 1, graphFrom: 500 })))
  )

  it.live("answers a search before a long apply ends, also beside another partition's", () =>
    Effect.gen(function* () {
      const source = random(seedOf(5))
      const vectors = yield* VectorIndex
      const busy = yield* vectors.open(specOf(64), undefined)
      const other = yield* vectors.open(specOf(4), undefined)
      yield* other.apply(segmentOf(4, upsertsOf(source, 4, 20, stamper())))
      const stamp = stamper()
      yield* busy.apply(segmentOf(64, upsertsOf(source, 64, 1_000, stamp)))
      const order: Array<string> = []
      const said = (what: string) => Effect.sync(() => void order.push(what))
      const apply = yield* busy
        .apply(segmentOf(64, upsertsOf(source, 64, 1_000, stamp)))
        .pipe(Effect.andThen(said("applied")), Effect.forkChild({ startImmediately: true }))
      for (let i = 0; i < 5; i++) {
        yield* busy.search(queryOf(source.vector(64), i % 2 === 0 ? {} : { filter: `{"even":true}` }))
        yield* other.search(queryOf(source.vector(4)))
        yield* busy.get(["1"])
        yield* said("searched")
      }
      yield* Fiber.join(apply)
      assert.deepStrictEqual(order, ["searched", "searched", "searched", "searched", "searched", "applied"])
    }).pipe(Effect.scoped, Effect.provide(VectorIndex.layerWith({ threads: 1, graphFrom: 500 })))
  )

  it.live("makes progress with an apply while searches never cease", () =>
    Effect.gen(function* () {
      const source = random(seedOf(6))
      const index = yield* (yield* VectorIndex).open(specOf(32), undefined)
      const stamp = stamper()
      yield* index.apply(segmentOf(32, upsertsOf(source, 32, 1_000, stamp)))
      const searchers = yield* Effect.forever(index.search(queryOf(source.vector(32)))).pipe(
        Effect.replicateEffect(8, { concurrency: "unbounded" }),
        Effect.forkChild({ startImmediately: true })
      )
      yield* index.apply(segmentOf(32, upsertsOf(source, 32, 300, stamp)))
      yield* Fiber.interrupt(searchers)
      assert.strictEqual((yield* index.stats).count, 1_000)
    }).pipe(Effect.scoped, Effect.provide(VectorIndex.layerWith({ threads: 1, graphFrom: 500 })))
  )

  it.live("snapshots what was applied before, and goes on answering meanwhile", () =>
    Effect.gen(function* () {
      const source = random(seedOf(7))
      const vectors = yield* VectorIndex
      const index = yield* vectors.open(specOf(16), undefined)
      const stamp = stamper()
      yield* index.apply(segmentOf(16, upsertsOf(source, 16, 2_000, stamp)))
      const path = yield* directory
      const snapshot = yield* Effect.forkChild(index.snapshot(path), { startImmediately: true })
      const later = yield* index
        .apply(segmentOf(16, [{ kind: "delete", id: "0", version: stamp() }]))
        .pipe(Effect.forkChild({ startImmediately: true }))
      yield* index.search(queryOf(source.vector(16)))
      const files = yield* Fiber.join(snapshot)
      yield* Fiber.join(later)
      const queries = Array.from({ length: 20 }, () => source.vector(16))
      const again = yield* vectors.open(specOf(16), files)
      assert.strictEqual((yield* again.stats).count, 2_000)
      assert.strictEqual((yield* again.stats).graphSlots, 2_000)
      assert.strictEqual((yield* index.stats).count, 1_999)
      yield* again.apply(segmentOf(16, [{ kind: "delete", id: "0", version: stamp() }]))
      for (const query of queries) {
        const before = yield* index.search(queryOf(query, { includeMetadata: true }))
        assert.deepStrictEqual(yield* again.search(queryOf(query, { includeMetadata: true })), before)
      }
      // A filter asked at once waits for the metadata index, which opening leaves for later.
      const third = yield* vectors.open(specOf(16), files)
      const hits = yield* third.search(queryOf(queries[0]!, { k: 3_000, filter: `{"even":true}` }))
      assert.lengthOf(hits.ids, 1_000)
    }).pipe(Effect.scoped, Effect.provide(VectorIndex.layerWith({ threads: 1, graphFrom: 500 })))
  )

  it.live("is not begun for one that was interrupted, and refuses more than may wait", () =>
    Effect.gen(function* () {
      const source = random(seedOf(8))
      const index = yield* (yield* VectorIndex).open(specOf(4), undefined)
      yield* index.apply(segmentOf(4, upsertsOf(source, 4, 100, stamper())))
      const query = queryOf(source.vector(4))
      const exits = yield* Effect.forEach(Array.from({ length: 20 }), () => Effect.exit(index.search(query)), {
        concurrency: "unbounded"
      })
      assert.strictEqual(exits.filter(Exit.isSuccess).length, 8)
      for (const exit of exits.slice(8)) {
        assert.deepStrictEqual(
          Option.map(Exit.findErrorOption(exit), (error) => error._tag),
          Option.some("IndexBusy")
        )
      }
      for (let round = 0; round < 50; round++) {
        const fibers = yield* Effect.forEach(Array.from({ length: 8 }), () =>
          Effect.forkChild(index.search(query), { startImmediately: true })
        )
        if (round % 2 === 0) yield* Effect.promise(() => new Promise((resolve) => setImmediate(resolve)))
        yield* Fiber.interruptAll(fibers)
      }
      // Those that were interrupted wait no more.
      const after = yield* Effect.all(
        Array.from({ length: 8 }, () => index.search(query)),
        { concurrency: "unbounded" }
      )
      assert.lengthOf(after, 8)
    }).pipe(Effect.scoped, Effect.provide(VectorIndex.layerWith({ threads: 1, graphFrom: 500, threadPendingMax: 8 })))
  )

  it.live("is lost, alone, by a segment that cannot be applied", () =>
    Effect.gen(function* () {
      const source = random(seedOf(9))
      const vectors = yield* VectorIndex
      const index = yield* vectors.open(specOf(4), undefined)
      const other = yield* vectors.open(specOf(4), undefined)
      const good = segmentOf(4, upsertsOf(source, 4, 100, stamper()))
      for (const one of [index, other]) yield* one.apply(good)
      const errors = yield* Effect.all([Effect.flip(index.apply(good.slice(0, 500))), Effect.flip(index.apply(good))], {
        concurrency: "unbounded"
      })
      assert.deepStrictEqual(
        errors.map((error) => error._tag),
        ["IndexLost", "IndexLost"]
      )
      assert.isTrue(index.lost())
      assert.strictEqual((yield* Effect.flip(index.stats))._tag, "IndexLost")
      assert.strictEqual((yield* other.stats).count, 100)
      const again = yield* vectors.open(specOf(4), undefined)
      assert.strictEqual((yield* again.apply(good)).effects.length, 100)
      const [thread] = yield* vectors.threads
      assert.strictEqual(thread?.restarts, 0)
    }).pipe(Effect.scoped, Effect.provide(VectorIndex.layerWith({ threads: 1, graphFrom: 500 })))
  )

  it.live("survives bytes of any kind, and queries that its caller should have refused", () =>
    Effect.gen(function* () {
      const source = random(seedOf(10))
      const vectors = yield* VectorIndex
      const good = segmentOf(4, upsertsOf(source, 4, 20, stamper()))
      for (let i = 0; i < 100; i++) {
        const bytes =
          i % 2 === 0 ? good.slice() : Uint8Array.from({ length: source.below(300) }, () => source.below(256))
        if (i % 2 === 0) bytes[source.below(bytes.length)]! ^= 1 + source.below(255)
        const index = yield* vectors.open(specOf(4), undefined)
        assert.strictEqual((yield* Effect.flip(index.apply(bytes)))._tag, "IndexLost")
      }
      const index = yield* vectors.open(specOf(4), undefined)
      yield* index.apply(good)
      for (const bad of [
        queryOf([1, 2]),
        queryOf([1, 2, 3, 4], { filter: "{" }),
        queryOf([1, 2, 3, 4], { filter: "[]" })
      ]) {
        assert.isTrue(Exit.hasDies(yield* Effect.exit(index.search(bad))))
      }
      assert.lengthOf((yield* index.search(queryOf([1, 2, 3, 4]))).ids, 10)
      assert.lengthOf((yield* index.search(queryOf([Number.NaN, 2, 3, 4]))).ids, 10)
    }).pipe(Effect.scoped, Effect.provide(VectorIndex.layerWith({ threads: 1, graphFrom: 500 })))
  )

  it.live("gives its memory back with its scope, and is opened where least is held", () =>
    Effect.gen(function* () {
      const source = random(seedOf(16))
      const vectors = yield* VectorIndex
      const scope = yield* Scope.make()
      const big = yield* Scope.provide(vectors.open(specOf(256), undefined), scope)
      for (let i = 0; i < 40; i++) {
        const ops = upsertsOf(source, 256, 500, stamper()).map((op): LogOp => ({ ...op, id: `${i} ${op.id}` }))
        // A graph would take longer than there is any need for here.
        yield* big.apply(segmentOf(256, i === 0 ? ops : ops.slice(0, 1)))
      }
      const partitions = (states: ReadonlyArray<{ readonly partitions: number }>) =>
        states.map((state) => state.partitions)
      assert.deepStrictEqual(partitions(yield* vectors.threads).sort(), [0, 1])
      yield* vectors.open(specOf(4), undefined)
      assert.deepStrictEqual(partitions(yield* vectors.threads), [1, 1])
      yield* Scope.close(scope, Exit.void)
      const held = Effect.map(vectors.threads, (states) => Math.max(...states.map(({ bytes }) => bytes)))
      // A turn of each side later, its memory is counted no more.
      while ((yield* held) > 500_000) yield* Effect.sleep(5)
      assert.deepStrictEqual(partitions(yield* vectors.threads).sort(), [0, 1])
      assert.strictEqual((yield* Effect.flip(big.search(queryOf(source.vector(256)))))._tag, "IndexLost")
    }).pipe(Effect.scoped, Effect.provide(VectorIndex.layerWith({ threads: 2, graphFrom: 500 })))
  )
})

describe("the vector threads", () => {
  it.live("end inside of insertion, search and snapshot without ending the process", () =>
    Effect.gen(function* () {
      const source = random(seedOf(19))
      const root = yield* directory
      for (let round = 0; round < 12; round++) {
        const life = Effect.gen(function* () {
          const stamp = stamper()
          const index = yield* (yield* VectorIndex).open(specOf(64), undefined)
          const apply = index.apply(segmentOf(64, upsertsOf(source, 64, 800, stamp)))
          if (round % 3 === 0) yield* apply
          yield* Effect.forkChild(apply)
          yield* Effect.forkChild(Effect.forever(index.search(queryOf(source.vector(64)))))
          yield* Effect.forkChild(index.snapshot(join(root, `${round}`)))
          yield* Effect.sleep(source.below(80))
        })
        yield* life.pipe(Effect.scoped, Effect.provide(VectorIndex.layerWith({ threads: 2, graphFrom: 100 })))
      }
    }).pipe(Effect.scoped)
  )
})

describe("a partition that is closed", () => {
  it.live("at any moment of opening, applying, searching or snapshotting harms no other", () =>
    Effect.gen(function* () {
      const source = random(seedOf(18))
      const vectors = yield* VectorIndex
      const root = yield* directory
      const stamp = stamper()
      const good = segmentOf(16, upsertsOf(source, 16, 1_200, stamp))
      const steady = yield* vectors.open(specOf(16), undefined)
      yield* steady.apply(good)
      const files = yield* steady.snapshot(join(root, "steady"))
      for (let round = 0; round < 40; round++) {
        const scope = yield* Scope.make()
        const life = Effect.gen(function* () {
          const index = yield* vectors.open(specOf(16), round % 3 === 0 ? undefined : files)
          yield* Effect.all(
            [
              round % 3 === 0 ? index.apply(good) : index.snapshot(join(root, `${round}`)),
              index.apply(segmentOf(16, upsertsOf(source, 16, 50, stamp))),
              Effect.forever(index.search(queryOf(source.vector(16), { filter: `{"even":true}` })))
            ],
            { concurrency: "unbounded" }
          )
        })
        const fiber = yield* Effect.forkChild(Scope.provide(life, scope), { startImmediately: true })
        yield* Effect.sleep(source.below(round % 3 === 0 ? 60 : 25))
        if (round % 2 === 0) yield* Fiber.interrupt(fiber)
        yield* Scope.close(scope, Exit.void)
        const exit = yield* Fiber.await(fiber)
        if (round % 2 === 1) {
          const tag = Option.map(Exit.findErrorOption(exit), (error) => error._tag)
          assert.deepStrictEqual(tag, Option.some("IndexLost"))
        }
        assert.strictEqual((yield* steady.stats).count, 1_200)
        assert.lengthOf((yield* steady.search(queryOf(source.vector(16)))).ids, 10)
      }
      const [thread] = yield* vectors.threads
      assert.deepStrictEqual([thread?.partitions, thread?.restarts], [1, 0])
    }).pipe(Effect.scoped, Effect.provide(VectorIndex.layerWith({ threads: 1, graphFrom: 500 })))
  )
})

describe("a vector thread that dies", () => {
  const entry = new URL("./index/mortalThread.ts", import.meta.url)

  for (const how of ["leave", "throw", "hoard"] as const) {
    it.live(`fails what it was asked, is replaced and counted, and harms nothing else: ${how}`, () =>
      Effect.gen(function* () {
        const source = random(seedOf(17))
        const vectors = yield* VectorIndex
        const channel = new BroadcastChannel("mortal vector thread")
        yield* Effect.addFinalizer(() => Effect.sync(() => channel.close()))
        const stamp = stamper()
        const good = segmentOf(16, upsertsOf(source, 16, 1_000, stamp))
        for (let death = 1; death <= 3; death++) {
          const index = yield* vectors.open(specOf(16), undefined)
          const other = yield* vectors.open(specOf(16), undefined)
          yield* other.apply(good)
          const asked = yield* Effect.forkChild(
            Effect.all(
              [
                Effect.flip(index.apply(good)),
                Effect.flip(index.apply(good)),
                Effect.flip(Effect.forever(index.search(queryOf(source.vector(16))))),
                Effect.flip(Effect.forever(other.get(["1"])))
              ],
              { concurrency: "unbounded" }
            ),
            { startImmediately: true }
          )
          channel.postMessage(how)
          for (const error of yield* Fiber.join(asked)) assert.strictEqual(error._tag, "IndexLost")
          assert.isTrue(index.lost() && other.lost())
          assert.strictEqual((yield* Effect.flip(other.stats))._tag, "IndexLost")
          // What is opened now waits for the next thread, which is started after a short while at most.
          const again = yield* vectors.open(specOf(16), undefined)
          yield* again.apply(good)
          assert.lengthOf((yield* again.search(queryOf(source.vector(16)))).ids, 10)
          assert.deepStrictEqual(
            (yield* vectors.threads).map(({ restarts }) => restarts),
            [death]
          )
        }
      }).pipe(
        Effect.scoped,
        Effect.provide(VectorIndex.layerWith({ threads: 1, graphFrom: 500, entry, threadHeapMegabytes: 64 }))
      )
    )
  }
})

/** Random operations on a partition and on a map; whatever is asked, both say the same. */
const model = Effect.fnUntraced(function* (spec: IndexSpec, source: Random) {
  const { dimensions, metric } = spec
  const vectors = yield* VectorIndex
  const root = yield* directory
  const stamp = stamper()
  const records = new Map<
    string,
    { readonly vector: Float32Array; readonly metadata: string; readonly deleted: boolean }
  >()
  let scope = yield* Scope.make()
  let index: PartitionIndex = yield* Scope.provide(vectors.open(spec, undefined), scope)
  const reopen = Effect.fnUntraced(function* (files: SnapshotFiles) {
    yield* Scope.close(scope, Exit.void)
    scope = yield* Scope.make()
    const { records, sketch } = files
    const isMapped = sketch !== undefined && source.next() < 0.5
    index = yield* Scope.provide(
      isMapped ? vectors.openMapped(spec, { records, sketch }) : vectors.open(spec, files),
      scope
    )
    assert.strictEqual(
      index.form(),
      isMapped || (sketch !== undefined && spec.quantization !== "none") ? "mapped" : "full"
    )
  })
  const idOf = () => `id-${source.below(150)}`
  const metadataOf = () => (source.next() < 0.2 ? "" : JSON.stringify({ tag: source.below(3), n: source.next() }))
  const visible = () => [...records].filter(([, { deleted }]) => !deleted)

  for (let turn = 0; turn < 250; turn++) {
    const dice = source.next()
    if (dice < 0.45) {
      const ops = Array.from({ length: 1 + source.below(12) }, (): LogOp => {
        const id = idOf()
        const version = stamp()
        const known = records.get(id)
        const kind = source.next()
        if (kind < 0.6) {
          const vector = Float32Array.from(source.vector(dimensions))
          const metadata = metadataOf()
          records.set(id, { vector, metadata, deleted: false })
          return { kind: "upsert", id, version, vector, metadata }
        }
        if (kind < 0.8) {
          const metadata = metadataOf()
          if (known !== undefined && !known.deleted) records.set(id, { ...known, metadata })
          return { kind: "metadata", id, version, metadata }
        }
        if (known !== undefined) records.set(id, { ...known, deleted: true })
        return { kind: "delete", id, version }
      })
      // Some segments come twice, as they do when a log is replayed over a snapshot.
      const segment = encodeSegment({ epoch: 1, seq: turn, nonce: 0n, dimensions }, ops)
      for (let times = source.next() < 0.2 ? 2 : 1; times > 0; times--) yield* index.apply(segment)
    } else if (dice < 0.8) {
      const query = source.vector(dimensions)
      const k = 1 + source.below(30)
      const tag = source.below(4)
      const filtered = source.next() < 0.5
      const candidates = visible().filter(
        ([, { metadata }]) => !filtered || (metadata !== "" && (JSON.parse(metadata) as { tag: number }).tag === tag)
      )
      const filter = filtered ? JSON.stringify({ tag }) : undefined
      const hits = yield* index.search(queryOf(query, { k, filter, includeMetadata: true, includeVector: true }))
      const expected = nearest(
        metric,
        query,
        candidates.map(([id, { vector }]) => [id, vector] as const),
        k
      )
      assert.deepStrictEqual([...hits.ids], expected)
      for (const [i, id] of hits.ids.entries()) {
        const record = records.get(id)!
        assert.closeTo(hits.scores[i]!, scoreOf(metric, query, record.vector), 1e-5)
        assert.strictEqual(hits.metadata?.[i], record.metadata)
        assert.deepStrictEqual(hits.vectors?.slice(i * dimensions, (i + 1) * dimensions), record.vector)
      }
    } else if (dice < 0.95) {
      const ids = Array.from({ length: 5 }, idOf)
      const found = yield* index.get(ids)
      for (const [i, id] of ids.entries()) {
        const record = records.get(id)
        if (record === undefined || record.deleted) assert.isUndefined(found[i])
        else {
          assert.deepStrictEqual(found[i]?.vector, record.vector)
          assert.strictEqual(found[i]?.metadata, record.metadata)
        }
      }
      assert.strictEqual((yield* index.stats).count, visible().length)
    } else {
      const before = yield* index.stats
      const files = yield* index.snapshot(join(root, `${turn}`))
      yield* reopen(files)
      const after = yield* index.stats
      assert.deepStrictEqual(
        [after.count, after.tombstones, after.maxTime, after.counters],
        [before.count, before.tombstones, before.maxTime, before.counters]
      )
    }
  }
  yield* Scope.close(scope, Exit.void)
})
