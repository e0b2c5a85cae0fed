/** A collection under random operations and restarts, against the plainest model there is: a map. */
import { assert, describe, it } from "@effect/vitest"
import { Effect, Layer } from "effect"
import type { SessionQuery } from "../../src/protocol/StreamSession.ts"
import { ObjectStore } from "../../src/tiers/ObjectStore.ts"
import { startActors } from "../support/Actors.ts"
import { type Random, seeded, seedOf } from "../support/Seeded.ts"

const dimensions = 6
const ids = Array.from({ length: 60 }, (_, i) => `id-${i}`)
const colours = ["red", "green", "blue"]
const operations = 600

interface Record_ {
  readonly vector: ReadonlyArray<number>
  readonly metadata: Readonly<Record<string, unknown>>
}

describe("a collection", () => {
  for (const [metric, partitions, seed] of [
    ["cosine", 1, 1],
    ["l2", 3, 2],
    ["ip", 2, 3]
  ] as const) {
    it(
      `${metric}, ${partitions} partition(s): ${operations} random operations and restarts, as a map would answer`,
      {
        timeout: 120_000
      },
      () =>
        seeded(seedOf(seed), async (source) => {
          const store = await Effect.runPromise(Effect.scoped(Layer.build(ObjectStore.layerMemory)))
          const settings = { snapshotOps: 100, snapshotSharePercent: 1, snapshotIdleMillis: 100 }
          let node = await startActors(store, settings)
          const model = new Map<string, Record_>()
          try {
            await Effect.runPromise(node.router.createCollection("c", { dimensions, metric, partitions }))
            for (let n = 0; n < operations; n++) {
              const choice = source.next()
              if (choice < 0.35) await upsert(node.router, model, source)
              else if (choice < 0.5) await remove(node.router, model, source)
              else if (choice < 0.65) await patch(node.router, model, source)
              else if (choice < 0.75) await read(node.router, model, source)
              else if (choice < 0.985) await search(node.router, model, source, metric)
              else {
                await node.stop()
                node = await startActors(store, settings)
              }
            }
            for (const id of ids) assert.deepStrictEqual(await readOne(node.router, id), model.get(id))
          } finally {
            await node.stop()
          }
        })
    )
  }
})

type Node = Awaited<ReturnType<typeof startActors>>["router"]
type Model = Map<string, Record_>

const vectorOf = (source: Random): Array<number> => source.vector(dimensions).map(Math.fround)

const metadataOf = (source: Random): Record<string, unknown> =>
  source.below(3) === 0 ? {} : { colour: source.pick(colours), n: source.below(10) }

const upsert = async (router: Node, model: Model, source: Random) => {
  const batch = Array.from({ length: 1 + source.below(8) }, () => ({
    id: source.pick(ids),
    vector: vectorOf(source),
    metadata: metadataOf(source)
  }))
  const records = batch.map(({ id, vector, metadata }) => ({
    id,
    vector: new Float32Array(vector),
    metadata: Object.keys(metadata).length === 0 ? "" : JSON.stringify(metadata)
  }))
  assert.strictEqual(
    await Effect.runPromise(router.upsert("c", records, source.pick(["memory", "warm", "cold"] as const))),
    batch.length
  )
  for (const { id, vector, metadata } of batch) model.set(id, { vector, metadata })
}

const remove = async (router: Node, model: Model, source: Random) => {
  const some = [...new Set(Array.from({ length: 1 + source.below(5) }, () => source.pick(ids)))]
  const there = some.filter((id) => model.has(id)).length
  assert.strictEqual(await Effect.runPromise(router.remove("c", some)), there)
  for (const id of some) model.delete(id)
}

const patch = async (router: Node, model: Model, source: Random) => {
  const id = source.pick(ids)
  const fields = { colour: source.pick([...colours, null]), extra: source.below(100) }
  const result = await Effect.runPromise(Effect.exit(router.updateMetadata("c", id, JSON.stringify(fields))))
  const before = model.get(id)
  assert.strictEqual(result._tag === "Success", before !== undefined)
  if (before === undefined) return
  const after: Record<string, unknown> = { ...before.metadata, ...fields }
  if (after["colour"] === null) delete after["colour"]
  model.set(id, { ...before, metadata: after })
}

const readOne = async (router: Node, id: string): Promise<Record_ | undefined> => {
  const exit = await Effect.runPromise(Effect.exit(router.get("c", id)))
  if (exit._tag === "Failure") return undefined
  const { vector, metadata } = exit.value
  return { vector: Array.from(vector), metadata: metadata === "" ? {} : JSON.parse(metadata) }
}

const read = async (router: Node, model: Model, source: Random) => {
  const id = source.pick(ids)
  assert.deepStrictEqual(await readOne(router, id), model.get(id))
}

const search = async (router: Node, model: Model, source: Random, metric: "cosine" | "l2" | "ip") => {
  const colour = source.below(2) === 0 ? source.pick(colours) : undefined
  const k = 1 + source.below(12)
  const vector = vectorOf(source)
  const query: SessionQuery = {
    queryId: "q_1",
    collection: "c",
    vector: new Float32Array(vector),
    k,
    ef: 0,
    filter: colour === undefined ? "" : JSON.stringify({ colour }),
    includeMetadata: true,
    includeVector: true,
    deadlineMillis: 0
  }
  const answer = await Effect.runPromise(router.search(query))
  const truth = [...model]
    .filter(([, record]) => colour === undefined || record.metadata["colour"] === colour)
    .map(([id, record]) => ({ id, score: scoreOf(metric, vector, record.vector) }))
    .sort((a, b) => b.score - a.score)
    .slice(0, k)
  assert.strictEqual(answer.ids.length, truth.length)
  for (let i = 0; i < truth.length; i++) {
    // Ids may change places only where scores are equal to float32.
    assert.approximately(answer.scores[i] as number, truth[i]?.score as number, 1e-4)
    const record = model.get(answer.ids[i] as string) as Record_
    const metadata = answer.metadata?.[i] ?? ""
    assert.deepStrictEqual(metadata === "" ? {} : JSON.parse(metadata), record.metadata)
    assert.deepStrictEqual(
      Array.from(answer.vectors?.subarray(i * dimensions, (i + 1) * dimensions) ?? []),
      record.vector
    )
  }
}

const scoreOf = (metric: "cosine" | "l2" | "ip", a: ReadonlyArray<number>, b: ReadonlyArray<number>): number => {
  const dot = a.reduce((sum, x, i) => sum + x * (b[i] as number), 0)
  if (metric === "ip") return dot
  if (metric === "cosine") return dot / (Math.hypot(...a) * Math.hypot(...b))
  return -Math.hypot(...a.map((x, i) => x - (b[i] as number)))
}
