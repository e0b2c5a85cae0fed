/**
 * `kill -9` at random moments of a mixed write load: what was acknowledged is there, and of what was not, each batch is
 * there whole or not at all.
 */
import { assert, describe, it } from "@effect/vitest"
import { partitionOf } from "../../src/shards/PartitionMap.ts"
import { type Random, seeded, seedOf } from "../support/Seeded.ts"
import { ready, type ServerProcess, startServer, withDirectory } from "../support/ServerProcess.ts"

const kills = 30
const dimensions = 8
const idsPerWriter = 40
const writers = 4

const partitions = 2

/** What one writer knows. A state is the number of the batch that wrote it, negative for a deletion, 0 for never written. */
interface Model {
  readonly name: string
  /** Last acknowledged state of each id. */
  readonly acknowledged: Array<number>
  /** The batch whose answer never came: it may have happened. */
  outstanding: { readonly state: number; readonly touched: ReadonlyArray<number> } | undefined
}

describe("kill -9", () => {
  it(`${kills} times: nothing acknowledged is lost, no batch is half there`, { timeout: 240_000 }, () =>
    withDirectory((directory) =>
      seeded(seedOf(20_261_123), async (source) => {
        const models = Array.from(
          { length: writers },
          (_, writer): Model => ({
            name: `w${writer}`,
            acknowledged: new Array<number>(idsPerWriter).fill(0),
            outstanding: undefined
          })
        )
        const counter = { value: 0 }
        let acknowledgedWrites = 0
        for (let round = 0; round < kills; round++) {
          const server = await startServer(directory, [
            "--snapshot-ops",
            "300",
            "--default-partitions",
            String(partitions)
          ])
          await ready(server.base)
          await verify(server, models)
          const stop = { stopped: false }
          const load = models.map((model) => write(server, model, counter, source, stop))
          await new Promise((resolve) => setTimeout(resolve, 30 + source.below(350)))
          stop.stopped = true
          await server.stop("SIGKILL")
          acknowledgedWrites += (await Promise.all(load)).reduce((sum, n) => sum + n, 0)
        }
        const server = await startServer(directory)
        await ready(server.base)
        await verify(server, models)
        assert.strictEqual(await server.stop("SIGTERM"), 0)
        assert.isAbove(acknowledgedWrites, kills * 5, "the load wrote something between the kills")
      })
    )
  )
})

/** Writes batches, one after the other, until told to stop or the server is gone. Answers how many were acknowledged. */
const write = async (
  server: ServerProcess,
  model: Model,
  counter: { value: number },
  source: Random,
  stop: { readonly stopped: boolean }
): Promise<number> => {
  let acknowledged = 0
  while (!stop.stopped) {
    const number = ++counter.value
    const first = source.below(idsPerWriter - 4)
    const four = [0, 1, 2, 3].map((i) => first + i)
    const kind = source.pick(["insert", "insert", "insert", "delete", "patch"])
    // A patch is of one record that is surely there.
    const there = four.find((i) => (model.acknowledged[i] as number) > 0)
    if (kind === "patch" && there === undefined) continue
    const touched = kind === "patch" ? [there as number] : four
    const state = kind === "delete" ? -number : number
    model.outstanding = { state, touched }
    const ids = touched.map((i) => `${model.name}-${i}`)
    const status =
      kind === "patch"
        ? await send(server, "PATCH", `/api/v1/vectors/${ids[0]}`, { metadata: { state } })
        : kind === "delete"
          ? await send(server, "POST", "/api/v1/delete", { ids })
          : await send(server, "POST", "/api/v1/insert", {
              vectors: ids.map((id) => ({ id, vector: source.vector(dimensions), metadata: { state } }))
            })
    if (status === undefined) return acknowledged
    model.outstanding = undefined
    // Before the first insert there is no collection to delete from.
    if (status === 404 && kind === "delete") continue
    if (status !== 200) throw new Error(`${kind} answered ${status}`)
    for (const i of touched) model.acknowledged[i] = state
    acknowledged += 1
  }
  return acknowledged
}

/** The status, or `undefined` where the connection broke: then nobody knows. */
const send = (server: ServerProcess, method: string, path: string, body: unknown): Promise<number | undefined> =>
  fetch(`${server.base}${path}`, {
    method,
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body)
  }).then(
    async (response) => {
      await response.arrayBuffer()
      return response.status
    },
    () => undefined
  )

const verify = async (server: ServerProcess, models: ReadonlyArray<Model>) => {
  for (const model of models) {
    const found = await Promise.all(model.acknowledged.map((_, i) => stateOf(server, `${model.name}-${i}`)))
    const { outstanding } = model
    for (let i = 0; i < found.length; i++) {
      const state = found[i]
      const acknowledged = model.acknowledged[i] as number
      if (outstanding?.touched.includes(i)) {
        const happened = state === (outstanding.state > 0 ? outstanding.state : undefined)
        const before = state === (acknowledged > 0 ? acknowledged : undefined)
        assert.isTrue(
          happened || before,
          `${model.name}-${i} is ${state}, was ${acknowledged}, then perhaps ${outstanding.state}`
        )
      } else {
        assert.strictEqual(
          state,
          acknowledged > 0 ? acknowledged : undefined,
          `${model.name}-${i}, acknowledged ${acknowledged}`
        )
      }
    }
    if (outstanding !== undefined && outstanding.state > 0) {
      // All or nothing, a partition.
      for (let partition = 0; partition < partitions; partition++) {
        const group = outstanding.touched.filter((i) => partitionOf(`${model.name}-${i}`, partitions) === partition)
        const there = group.filter((i) => found[i] === outstanding.state)
        assert.isTrue(
          there.length === 0 || there.length === group.length,
          `half of batch ${outstanding.state} of ${model.name}`
        )
      }
    }
    // What happened to it is known from here on.
    for (let i = 0; i < found.length; i++) model.acknowledged[i] = found[i] ?? 0
    model.outstanding = undefined
  }
}

const stateOf = async (server: ServerProcess, id: string): Promise<number | undefined> => {
  const response = await fetch(`${server.base}/api/v1/embed/${id}`)
  if (response.status === 404) {
    await response.arrayBuffer()
    return undefined
  }
  assert.strictEqual(response.status, 200)
  const record = (await response.json()) as { vector: Array<number>; metadata: { state: number } }
  assert.strictEqual(record.vector.length, dimensions)
  return record.metadata.state
}
