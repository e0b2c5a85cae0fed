/** What a snapshot's files are read from, whole or not: the same partition, or a refusal, never anything else. */
import { mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { afterAll, assert, beforeAll, describe, it } from "@effect/vitest"
import { Graph } from "../../../src/tiers/index/Graph.ts"
import { checkGraphFile, noGraph } from "../../../src/tiers/index/GraphFile.ts"
import { Partition } from "../../../src/tiers/index/Partition.ts"
import { readRecords, writeRecords } from "../../../src/tiers/index/RecordsFile.ts"
import type { LogOp } from "../../../src/tiers/LogSegment.ts"
import type { IndexSpec } from "../../../src/tiers/VectorIndex.ts"
import { random, seedOf } from "../../support/Seeded.ts"
import { apply, finished, partitionOf } from "./indexSupport.ts"

const dimensions = 1_000
const count = 260
const tuning = { graphFrom: 200, exactRowsPerBeam: 1 }
let directory = ""
let original: Partition
let records: Buffer
let graph: Buffer
let copies = 0

const write = async (partition: Partition, to: string) => {
  const { spec, table, arena } = partition
  await finished(writeRecords(join(to, "records"), spec, table, arena, partition.graph))
  if (partition.graph === undefined) writeFileSync(join(to, "graph"), noGraph)
  else await partition.graph.write(join(to, "graph"))
}

const read = async (spec: IndexSpec, from: string): Promise<Partition> => {
  const partition = new Partition(spec, tuning)
  const { graphNodes, nodeOfSlot } = await finished(
    readRecords(join(from, "records"), spec, partition.table, partition.arena)
  )
  const nodes = await finished(checkGraphFile(join(from, "graph"), spec))
  assert.strictEqual(nodes, graphNodes)
  const graph = nodes === 0 ? undefined : await Graph.load(spec, join(from, "graph"))
  graph?.assign(nodeOfSlot)
  partition.restored(graph)
  return partition
}

const copy = (of: { readonly records?: Buffer; readonly graph?: Buffer }): string => {
  const to = mkdtempSync(join(directory, `copy-${copies++}-`))
  writeFileSync(join(to, "records"), of.records ?? records)
  writeFileSync(join(to, "graph"), of.graph ?? graph)
  return to
}

const refusal = async (spec: IndexSpec, from: string): Promise<string | undefined> => {
  try {
    const partition = await read(spec, from)
    // What was taken for good is searched, so that a wrong link shows.
    partition.find(new Float32Array(dimensions).fill(1), 10, 100, undefined)
    partition.dispose()
    return undefined
  } catch (error) {
    return error instanceof Error ? error.message : "thrown"
  } finally {
    rmSync(from, { recursive: true })
  }
}

beforeAll(async () => {
  directory = mkdtempSync(join(tmpdir(), "snapshot-files-"))
  const source = random(seedOf(21))
  original = new Partition({ dimensions, metric: "l2", m: 16, efConstruction: 200 }, tuning)
  let counter = 0
  const version = () => {
    counter += 1
    return { time: 2n ** 63n + BigInt(counter), region: counter % 2 === 0 ? "here" : "there-2", counter }
  }
  const upsert = (i: number): LogOp => ({
    kind: "upsert",
    id: i === 7 ? "ü".repeat(256) : `id ${i}`,
    version: version(),
    vector: Float32Array.from(source.vector(dimensions)),
    metadata: i % 3 === 0 ? "" : JSON.stringify({ i, text: i === 8 ? "ß".repeat(30_000) : "t" })
  })
  apply(
    original,
    Array.from({ length: count }, (_, i) => upsert(i))
  )
  while (original.hasBackgroundWork) original.backgroundStep()
  apply(original, [
    ...[1, 2, 3, 4].map(upsert),
    { kind: "metadata", id: "id 5", version: version(), metadata: "" },
    { kind: "metadata", id: "id 6", version: version(), metadata: `{"later":true}` },
    ...[10, 11, 12].map((i): LogOp => ({ kind: "delete", id: `id ${i}`, version: version() })),
    { kind: "metadata", id: "id 11", version: version(), metadata: `{"orphan":1}` },
    { kind: "metadata", id: "never", version: version(), metadata: `{"orphan":2}` },
    { kind: "delete", id: "nor this", version: version() }
  ])
  assert.isDefined(original.graph)
  await write(original, directory)
  records = readFileSync(join(directory, "records"))
  graph = readFileSync(join(directory, "graph"))
})

afterAll(() => rmSync(directory, { recursive: true, force: true }))

/** Everything that a partition holds. */
const contents = ({ table, arena }: Partition) => ({
  visible: new Map(
    [...table.slots].map(([id, slot]) => [
      id,
      {
        vector: [...arena.row(slot)],
        version: table.vectorVersion(slot),
        metadata: table.metadata[slot],
        metadataVersion: table.metadataVersion(slot)
      }
    ])
  ),
  hidden: table.hidden,
  tombstones: table.tombstones,
  maxTime: table.maxTime,
  counters: table.counters
})

describe("a snapshot's files", () => {
  it("give the partition back: records, versions, tombstones, orphans, graph", async () => {
    const again = await read(original.spec, copy({}))
    assert.deepStrictEqual(contents(again), contents(original))
    assert.strictEqual(again.graph?.nodes, original.graph?.nodes)
    assert.strictEqual(again.graph?.dead, original.graph?.dead)
    while (again.hasBackgroundWork) again.backgroundStep()
    const source = random(seedOf(22))
    for (let i = 0; i < 20; i++) {
      const query = Float32Array.from(source.vector(dimensions))
      const ids = (of: Partition, filter?: string) =>
        [...of.find(query, 20, 64, filter).slots].map((slot) => of.table.ids[slot])
      assert.deepStrictEqual(ids(again), ids(original))
      assert.deepStrictEqual(ids(again, `{"text":"t"}`), ids(original, `{"text":"t"}`))
    }
    // And written anew it is the same, but for the slots, which close ranks.
    const second = mkdtempSync(join(directory, "second-"))
    await write(again, second)
    assert.deepStrictEqual(contents(await read(original.spec, second)), contents(original))
  })

  it("give an empty partition back", async () => {
    for (const ops of [[], [{ kind: "delete", id: "a", version: { time: 9n, region: "x", counter: 4 } } as const]]) {
      const empty = partitionOf(3)
      apply(empty, ops)
      const to = mkdtempSync(join(directory, "empty-"))
      await write(empty, to)
      assert.deepStrictEqual(contents(await read(empty.spec, to)), contents(empty))
    }
  })

  it("are refused where they are of another index", async () => {
    const { spec } = original
    const others: ReadonlyArray<Partial<IndexSpec>> = [
      { dimensions: 999 },
      { metric: "ip" },
      { m: 15 },
      { efConstruction: 100 }
    ]
    for (const other of others) {
      const expected = new RegExp(`^${Object.keys(other)[0]} .*, expected ${Object.values(other)[0]}$`)
      assert.match((await refusal({ ...spec, ...other }, copy({}))) ?? "", expected)
    }
    const plain = partitionOf(dimensions, "l2")
    apply(plain, [
      {
        kind: "upsert",
        id: "a",
        version: { time: 1n, region: "a", counter: 1 },
        vector: new Float32Array(dimensions),
        metadata: ""
      }
    ])
    const to = mkdtempSync(join(directory, "plain-"))
    await write(plain, to)
    assert.isAbove(statSync(join(to, "records")).size, dimensions * 4)
    // Another snapshot's graph.
    const nodes = original.graph!.nodes
    const shorter = Buffer.from(graph)
    shorter.writeBigUInt64LE(BigInt(nodes - 1), 16)
    assert.isDefined(await refusal(spec, copy({ graph: shorter })))
    assert.match((await refusal(spec, copy({ graph: Buffer.from(noGraph) }))) ?? "", /expected/)
  })

  it("are refused where they are cut, or go on", { timeout: 60_000 }, async () => {
    const { spec } = original
    for (let part = 0; part < 40; part++) {
      const cut = (file: Buffer) => file.subarray(0, Math.floor((file.length * part) / 40))
      assert.isDefined(await refusal(spec, copy({ records: cut(records) })), `records ${part}`)
      assert.isDefined(await refusal(spec, copy({ graph: cut(graph) })), `graph ${part}`)
    }
    const longer = (file: Buffer) => Buffer.concat([file, Buffer.alloc(4)])
    assert.isDefined(await refusal(spec, copy({ records: longer(records) })))
    assert.isDefined(await refusal(spec, copy({ graph: longer(graph) })))
    assert.isDefined(await refusal(spec, copy({ records: graph })))
    assert.isDefined(await refusal(spec, copy({ graph: records })))
  })

  it("never end the process, whatever is changed in them", { timeout: 60_000 }, async () => {
    const { spec } = original
    const source = random(seedOf(23))
    const nodes = original.graph!.nodes
    const nodeBytes = spec.m * 2 * 4 + 4 + dimensions * 4 + 8
    const upperAt = 96 + nodes * nodeBytes
    const places: ReadonlyArray<readonly ["records" | "graph", () => number]> = [
      ["records", () => source.below(96)],
      ["records", () => 96 + source.below(20_000)],
      ["graph", () => source.below(96)],
      // Links and their counts, then labels, then upper levels.
      ["graph", () => 96 + source.below(nodes) * nodeBytes + source.below(spec.m * 8 + 4)],
      ["graph", () => 96 + source.below(nodes) * nodeBytes + nodeBytes - 8 + source.below(8)],
      ["graph", () => upperAt + source.below(graph.length - upperAt)]
    ]
    let refused = 0
    for (let n = 0; n < 150; n++) {
      const [which, at] = places[n % places.length]!
      const changed = Buffer.from(which === "records" ? records : graph)
      for (let times = 1 + source.below(3); times > 0; times--)
        changed[at()] = source.pick([0, 1, 0x7f, 0xff, source.below(256)])
      if ((await refusal(spec, copy({ [which]: changed }))) !== undefined) refused += 1
    }
    assert.isAbove(refused, 75)
  })
})
