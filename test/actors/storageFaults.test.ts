/**
 * A store that is full, whose fsync fails, or that loses answers: writes fail with a typed error, what was acknowledged is
 * there, reads and searches go on, and the partition recovers by itself.
 */
import { assert, describe, it } from "@effect/vitest"
import { Context, Effect, Exit, Layer, Option } from "effect"
import type { SessionQuery } from "../../src/protocol/StreamSession.ts"
import { ObjectStore } from "../../src/tiers/ObjectStore.ts"
import { type RunningActors, startActors } from "../support/Actors.ts"
import { type Random, random, seedOf } from "../support/Seeded.ts"
import { Faults, withFaults } from "../tiers/FaultyObjectStore.ts"

const dimensions = 4

describe("a store that fails", () => {
  const modes: ReadonlyArray<readonly [string, (faults: Faults) => void]> = [
    ["disk full", (faults) => (faults.full = true)],
    ["failing fsync", (faults) => (faults.fsyncFails = true)],
    [
      "answers lost, before and after the effect",
      (faults) => Object.assign(faults, { dropShare: 0.3, doubtShare: 0.3 })
    ],
    ["writes that arrive late", (faults) => Object.assign(faults, { lateShare: 0.4, failShare: 0.2 })]
  ]
  for (const [mode, begin] of modes) {
    it(`${mode}: typed errors, nothing acknowledged is lost, searches go on, it recovers`, {
      timeout: 60_000
    }, async () => {
      const source = random(seedOf(7))
      const faults = new Faults(source.seed)
      const inner = Context.get(
        await Effect.runPromise(Effect.scoped(Layer.build(ObjectStore.layerMemory))),
        ObjectStore
      )
      const store = Context.make(ObjectStore, withFaults(inner, faults))
      const settings = { snapshotOps: 100, snapshotSharePercent: 1, snapshotIdleMillis: 100 }
      let node = await startActors(store, settings)
      await Effect.runPromise(node.router.createCollection("c", { dimensions }))
      const known = new Map<string, { state: number; maybe: Set<number> }>()
      let failed = 0

      const round = async (writes: number) => {
        for (let n = 0; n < writes; n++) {
          failed += Number(!(await write(node, known, source)))
          if (n % 5 === 0) await searchWorks(node, known)
        }
      }
      await round(30)
      assert.strictEqual(failed, 0)
      begin(faults)
      await round(60)
      assert.isAbove(failed, 0, "the faults were met")
      await Effect.runPromise(faults.heal)
      const before = failed
      await eventually(async () => assert.isTrue(await write(node, known, source)))
      await round(30)
      assert.isAtMost(failed - before, 3, "it recovers")
      await verify(node, known)
      // What memory answers is what the log says.
      await node.stop()
      node = await startActors(store, settings)
      await verify(node, known)
      await node.stop()
    })
  }
})

let states = 0

/** One batch of three records with one state. Whether it was acknowledged; where not, the error is of the right kind. */
const write = async (
  node: RunningActors,
  known: Map<string, { state: number; maybe: Set<number> }>,
  source: Random
): Promise<boolean> => {
  const state = ++states
  const ids = [0, 1, 2].map((i) => `id-${source.below(12) + i}`)
  const records = ids.map((id) => ({
    id,
    vector: new Float32Array(source.vector(dimensions)),
    metadata: `{"state":${state}}`
  }))
  for (const id of ids) {
    const entry = known.get(id) ?? { state: 0, maybe: new Set() }
    known.set(id, entry)
    entry.maybe.add(state)
  }
  const exit = await Effect.runPromise(Effect.exit(node.router.upsert("c", records)))
  if (Exit.isSuccess(exit)) {
    for (const id of ids) known.set(id, { state, maybe: new Set() })
    return true
  }
  const error = Option.getOrThrow(Exit.findErrorOption(exit))
  assert.include(["StorageUnavailable", "PartitionUnavailable"], error._tag)
  return false
}

const searchWorks = async (node: RunningActors, known: ReadonlyMap<string, unknown>) => {
  const query: SessionQuery = {
    queryId: "q_1",
    collection: "c",
    vector: new Float32Array([1, 0, 0, 0]),
    k: 5,
    ef: 0,
    filter: "",
    includeMetadata: false,
    includeVector: false,
    deadlineMillis: 0
  }
  const answer = await Effect.runPromise(node.router.search(query))
  assert.isAtMost(answer.ids.length, 5)
  for (const id of answer.ids) assert.isTrue(known.has(id))
}

const verify = async (node: RunningActors, known: Map<string, { state: number; maybe: Set<number> }>) => {
  for (const [id, entry] of known) {
    const exit = await Effect.runPromise(Effect.exit(node.router.get("c", id)))
    if (Exit.isFailure(exit)) {
      assert.strictEqual(entry.state, 0, `${id} was acknowledged with ${entry.state} and is gone`)
      continue
    }
    const { state } = JSON.parse(exit.value.metadata) as { state: number }
    assert.isTrue(state === entry.state || entry.maybe.has(state), `${id} is ${state}, acknowledged ${entry.state}`)
    // From here on it is known, and memory and log must agree on it.
    known.set(id, { state, maybe: new Set() })
  }
}

const eventually = async (check: () => Promise<void>) => {
  for (let attempt = 0; ; attempt++) {
    try {
      return await check()
    } catch (error) {
      if (attempt === 50) throw error
      await new Promise((resolve) => setTimeout(resolve, 100))
    }
  }
}

describe("a failed write that turns out to be in the log", () => {
  it("is in the index too, without another write", { timeout: 30_000 }, async () => {
    const faults = new Faults(1)
    const inner = Context.get(await Effect.runPromise(Effect.scoped(Layer.build(ObjectStore.layerMemory))), ObjectStore)
    let armed = false
    const store: ObjectStore["Service"] = {
      ...inner,
      create: (key, body) =>
        Effect.tap(inner.create(key, body), () =>
          Effect.sync(() => {
            if (armed) faults.failShare = 1
          })
        )
    }
    const node = await startActors(Context.make(ObjectStore, withFaults(store, faults)), {
      snapshotIdleMillis: 3_600_000
    })
    await Effect.runPromise(node.router.createCollection("c", { dimensions }))
    const known = new Map<string, { state: number; maybe: Set<number> }>()
    const source = random(1)
    assert.isTrue(await write(node, known, source))
    // The write happens, its answer is lost, and then nothing can be read that would tell.
    faults.doubtShare = 1
    armed = true
    assert.isFalse(await write(node, known, source))
    armed = false
    await Effect.runPromise(faults.heal)
    const logged = await Effect.runPromise(inner.list("collections/"))
    assert.isAtLeast(logged.filter(({ key }) => key.includes("/log/")).length, 2)
    await eventually(async () => {
      for (const [id, { state, maybe }] of known) {
        const { metadata } = await Effect.runPromise(node.router.get("c", id))
        const expected = maybe.size === 0 ? state : Math.max(...maybe)
        assert.strictEqual((JSON.parse(metadata) as { state: number }).state, expected)
      }
    })
    await node.stop()
  })
})
