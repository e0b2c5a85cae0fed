/** Partitions in their mapped and full forms, through snapshots, restarts and damage: answers as a map would give them. */
import { assert, describe, it } from "@effect/vitest"
import { Context, Effect, Layer } from "effect"
import type { Collection } from "../../src/protocol/Collection.ts"
import { ObjectStore } from "../../src/tiers/ObjectStore.ts"
import { type RunningActors, startActors } from "../support/Actors.ts"
import { type Random, seeded, seedOf } from "../support/Seeded.ts"

const dimensions = 8
const records = 3_000
const settings = { snapshotOps: 1_000, snapshotSharePercent: 10, snapshotIdleMillis: 100 }

type Model = Map<string, { readonly vector: Float32Array; readonly metadata: string }>

const run = <A, E>(effect: Effect.Effect<A, E>): Promise<A> => Effect.runPromise(effect)

const vectorOf = (source: Random): Float32Array =>
  Float32Array.from({ length: dimensions }, () => source.next() * 2 - 1)

const write = async (node: RunningActors, model: Model, source: Random, ids: ReadonlyArray<string>) => {
  const drafts = ids.map((id) => ({ id, vector: vectorOf(source), metadata: `{"n":${source.below(10)}}` }))
  await run(node.router.upsert("c", drafts))
  for (const { id, vector, metadata } of drafts) model.set(id, { vector, metadata })
}

const remove = async (node: RunningActors, model: Model, ids: ReadonlyArray<string>) => {
  await run(node.router.remove("c", ids))
  for (const id of ids) model.delete(id)
}

const check = async (node: RunningActors, model: Model, ids: ReadonlyArray<string>) => {
  for (const id of ids) {
    const expected = model.get(id)
    const found = await run(Effect.result(node.router.get("c", id)))
    if (expected === undefined) {
      assert.strictEqual(found._tag, "Failure", id)
      continue
    }
    if (found._tag === "Failure") return assert.fail(`${id}: ${found.failure._tag}`)
    assert.deepStrictEqual([...found.success.vector], [...expected.vector], id)
    assert.strictEqual(found.success.metadata, expected.metadata, id)
  }
}

const search = async (node: RunningActors, vector: Float32Array, filter = "") =>
  run(
    node.router.search({
      queryId: "q",
      collection: "c",
      vector,
      k: 10,
      ef: 0,
      filter,
      includeMetadata: true,
      includeVector: true,
      deadlineMillis: 0
    })
  )

/** A record finds itself, with its own vector and a score of one; a deleted one is not found. */
const checkSearches = async (node: RunningActors, model: Model, ids: ReadonlyArray<string>) => {
  for (const id of ids) {
    const expected = model.get(id)
    if (expected === undefined) continue
    const answer = await search(node, expected.vector)
    assert.strictEqual(answer.ids[0], id)
    assert.approximately(answer.scores[0] as number, 1, 1e-5)
    for (const [i, other] of answer.ids.entries()) {
      const stored = model.get(other)
      assert.isDefined(stored, `${other} is not there any more`)
      assert.deepStrictEqual(
        [...(answer.vectors as Float32Array).subarray(i * dimensions, (i + 1) * dimensions)],
        [...(stored?.vector ?? [])]
      )
    }
    const filtered = await search(node, expected.vector, expected.metadata)
    assert.strictEqual(filtered.ids[0], id)
    for (const metadata of filtered.metadata ?? []) assert.strictEqual(metadata, expected.metadata)
  }
}

const until = async (what: string, holds: () => Promise<boolean>) => {
  for (let i = 0; i < 400; i++) {
    if (await holds()) return
    await new Promise((resolve) => setTimeout(resolve, 25))
  }
  assert.fail(`not within ten seconds: ${what}`)
}

const statsOf = async (node: RunningActors, of: Collection) => {
  const [stats] = await run(node.router.stats(of))
  return stats as NonNullable<typeof stats>
}

const forms = (name: string, quantization: "none" | "bf16" | "i8" | "pq", settled: "full" | "mapped") =>
  it(`${name}: written, snapshotted, restarted, and written again`, { timeout: 60_000 }, () =>
    seeded(seedOf(31), async (source) => {
      const store = await run(Effect.scoped(Layer.build(ObjectStore.layerMemory)))
      let node = await startActors(store, settings)
      const model: Model = new Map()
      try {
        const { collection } = await run(
          node.router.createCollection("c", { dimensions, partitions: 1, index: { quantization } })
        )
        const ids = Array.from({ length: records }, (_, i) => `r${i}`)
        for (let at = 0; at < records; at += 500) await write(node, model, source, ids.slice(at, at + 500))
        for (let round = 0; round < 3; round++) {
          await node.stop()
          node = await startActors(store, settings)
          // Whatever form answers now, and while it changes.
          const some = Array.from({ length: 30 }, () => `r${source.below(records + 300)}`)
          await checkSearches(node, model, some.slice(0, 5))
          await check(node, model, some)
          await write(node, model, source, some.slice(0, 10))
          await remove(node, model, some.slice(10, 15))
          await check(node, model, some)
          await checkSearches(node, model, some.slice(0, 8))
          await until(`the form is ${settled}`, async () => (await statsOf(node, collection)).form === settled)
          await check(node, model, some)
          await checkSearches(node, model, some.slice(0, 8))
          assert.strictEqual((await statsOf(node, collection)).count, model.size)
        }
        await check(node, model, ids)
      } finally {
        await node.stop()
      }
    })
  )

describe("a partition", () => {
  forms("as it is", "none", "full")
  forms("bf16", "bf16", "mapped")
  forms("i8", "i8", "mapped")
  forms("pq", "pq", "mapped")

  for (const file of ["records", "sketch"] as const) {
    it(`whose snapshot's ${file} are damaged answers from what is left, and says so`, { timeout: 60_000 }, () =>
      seeded(seedOf(32), async (source) => {
        const store = await run(Effect.scoped(Layer.build(ObjectStore.layerMemory)))
        let node = await startActors(store, settings)
        const model: Model = new Map()
        try {
          const { collection } = await run(
            node.router.createCollection("c", { dimensions, partitions: 1, index: { quantization: "pq" } })
          )
          const ids = Array.from({ length: records }, (_, i) => `r${i}`)
          for (let at = 0; at < records; at += 500) await write(node, model, source, ids.slice(at, at + 500))
          await node.stop()
          await damage(store, file, source)
          node = await startActors(store, settings)
          await check(node, model, ids)
          await checkSearches(node, model, ids.slice(0, 5))
          if (file === "records") assert.isAtLeast((await statsOf(node, collection)).snapshots_refused, 1)
        } finally {
          await node.stop()
        }
      })
    )
  }
})

/** Flips a bit somewhere in the second half of the newest snapshot's file, where records and codes are. */
const damage = (store: Context.Context<ObjectStore>, file: "records" | "sketch", source: Random) =>
  run(
    Effect.gen(function* () {
      const objects = Context.get(store, ObjectStore)
      const all = yield* objects.list("collections/", { limit: 10_000 })
      const newest = all.filter(({ key }) => key.endsWith(`/${file}`)).at(-1)
      if (newest === undefined) return yield* Effect.die(`there is no ${file}`)
      const { body } = yield* objects.get(newest.key)
      const at = Math.floor(body.length / 2) + source.below(Math.floor(body.length / 2))
      body[at] = (body[at] as number) ^ 4
      yield* objects.delete(newest.key)
      yield* objects.create(newest.key, body)
    }).pipe(Effect.orDie)
  )
