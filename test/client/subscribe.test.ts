/** Standing queries and change feeds by the client: what is handed on, folded, is the truth, whatever was cut meanwhile. */
import { mkdtemp, rm } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { assert, describe, it } from "@effect/vitest"
import { VectorDB, type VectorDBError } from "../../src/client/index.ts"
import { VectorDB as EmbeddedDB } from "../../src/index.ts"
import { startNode } from "../support/Node.ts"
import { random as randomOf, seedOf } from "../support/Seeded.ts"
import { startTcpProxy } from "../support/TcpProxy.ts"

interface Record {
  readonly vector: ReadonlyArray<number>
  readonly kind: string
}

const query = [1, 0.5, 0.25]
const k = 5
const minScore = 0.7

const score = (vector: ReadonlyArray<number>): number => {
  const dot = vector.reduce((sum, x, i) => sum + x * (query[i] as number), 0)
  return dot / (Math.hypot(...vector) * Math.hypot(...query))
}

/** Ids of the answer, nearest first. */
const truth = (records: ReadonlyMap<string, Record>): ReadonlyArray<string> =>
  [...records]
    .filter(([, { kind, vector }]) => kind === "task" && score(vector) >= minScore)
    .toSorted(([, a], [, b]) => score(b.vector) - score(a.vector))
    .slice(0, k)
    .map(([id]) => id)

const until = async (holds: () => boolean): Promise<void> => {
  for (let n = 0; n < 400 && !holds(); n++) await new Promise((resolve) => setTimeout(resolve, 25))
  assert.isTrue(holds(), "it did not come to pass in 10 s")
}

describe.each(["over a WebSocket", "over a WebSocket that is cut", "embedded"] as const)("%s", (how) => {
  it("folds to the k nearest, nothing twice, and the feed has every change once in order", {
    timeout: 60_000
  }, async () => {
    const seed = seedOf(21)
    console.log(`seed ${seed}`)
    const random = randomOf(seed)
    const directory = how === "embedded" ? await mkdtemp(join(tmpdir(), "ruvector-embedded-")) : ""
    const node = how === "embedded" ? undefined : await startNode()
    const proxy = node === undefined ? undefined : await startTcpProxy(node.port)
    const writer =
      node === undefined ? await EmbeddedDB.open({ path: directory }) : new VectorDB({ endpoint: node.base })
    const reader =
      proxy === undefined
        ? writer
        : new VectorDB({ endpoint: `http://127.0.0.1:${proxy.port}`, reconnectBaseMillis: 5, reconnectCapMillis: 50 })
    await writer.collections.create("default", { dimensions: 3, partitions: 2 })

    const members = new Map<string, string>()
    const faults: Array<string> = []
    const ends = new AbortController()
    const subscribed = (async () => {
      for await (const change of reader.subscribe(query, {
        k,
        minScore,
        filter: { kind: "task" },
        signal: ends.signal
      })) {
        const known = members.get(change.id)
        if (change.type === "leave") {
          if (known === undefined) faults.push(`${change.id} left and was not there`)
          members.delete(change.id)
          continue
        }
        if (change.type === "enter" && known !== undefined) faults.push(`${change.id} entered twice`)
        if (change.type === "update" && known === undefined) faults.push(`${change.id} changed and was not there`)
        if (change.metadata["kind"] !== "task") faults.push(`${change.id} is of another kind`)
        members.set(change.id, change.version)
      }
    })()
    const changes: Array<string> = []
    const followed = (async () => {
      for await (const change of reader.follow({ from: "oldest", signal: ends.signal })) {
        changes.push(change.kind === "resync" ? "resync" : `${change.kind} ${change.id}`)
      }
    })()

    const records = new Map<string, Record>()
    const written = new Map<string, Array<string>>()
    const note = (id: string, kind: string) => {
      const list = written.get(id) ?? []
      list.push(`${kind} ${id}`)
      written.set(id, list)
    }
    for (let i = 0; i < 300; i++) {
      const id = `v${random.below(40)}`
      const roll = random.below(10)
      const known = records.get(id)
      if (known !== undefined && roll < 2) {
        await writer.delete(id)
        records.delete(id)
        note(id, "delete")
      } else if (known !== undefined && roll < 4) {
        const kind = known.kind === "task" ? "note" : "task"
        await writer.update(id, { metadata: { kind } })
        records.set(id, { ...known, kind })
        note(id, "metadata")
      } else {
        const vector = [random.below(1_000) - 200, random.below(1_000), random.below(1_000)].map(
          (x) => x / 1_000 + 1e-3
        )
        const kind = random.below(4) === 0 ? "note" : "task"
        await writer.insert(id, vector, { metadata: { kind } })
        records.set(id, { vector, kind })
        note(id, "upsert")
      }
      if (how === "over a WebSocket that is cut" && i % 15 === 7) proxy?.cut()
    }

    const total = [...written.values()].flat().length
    const answer = truth(records)
    await until(() => changes.length >= total && [...members.keys()].toSorted().join() === answer.toSorted().join())
    assert.deepStrictEqual(faults, [])
    for (const [id, version] of members) assert.strictEqual((await writer.get(id))?.version, version)
    assert.strictEqual(changes.length, total)
    for (const [id, list] of written)
      assert.deepStrictEqual(
        changes.filter((change) => change.endsWith(` ${id}`)),
        list
      )
    if (how === "over a WebSocket that is cut") assert.isAtLeast(proxy?.cuts() ?? 0, 10)

    // The reader's loops end with the signal's reason.
    ends.abort(new Error("enough"))
    for (const loop of [subscribed, followed]) {
      assert.strictEqual(
        await loop.then(
          () => "",
          (error: Error) => error.message
        ),
        "enough"
      )
    }
    await reader.close()
    await writer.close()
    await proxy?.close()
    await node?.stop()
    if (directory !== "") await rm(directory, { recursive: true })
  })

  it("ends with the reason where it cannot go on", async () => {
    const directory = how === "embedded" ? await mkdtemp(join(tmpdir(), "ruvector-embedded-")) : ""
    const node = how === "embedded" ? undefined : await startNode()
    const db = node === undefined ? await EmbeddedDB.open({ path: directory }) : new VectorDB({ endpoint: node.base })
    const first = async (collection: string): Promise<string> => {
      try {
        for await (const _ of db.subscribe([1, 0], { collection })) return "a change"
      } catch (error) {
        return (error as VectorDBError).code
      }
      return "the end"
    }
    assert.strictEqual(await first("nowhere"), "collection_not_found")
    await db.insert("a", [1, 0])
    assert.strictEqual(await first("default"), "a change")
    const waiting = (async () => {
      for await (const change of db.follow({ collection: "default" })) assert.fail(JSON.stringify(change))
    })().then(
      () => "the end",
      (error: VectorDBError) => error.code
    )
    await new Promise((resolve) => setTimeout(resolve, 100))
    await db.close()
    assert.strictEqual(await waiting, "closed")
    await node?.stop()
    if (directory !== "") await rm(directory, { recursive: true })
  })
})

describe("a reader that lags", () => {
  it("is not sent what it does not read, and comes to the newest answer", { timeout: 30_000 }, async () => {
    const node = await startNode()
    const db = new VectorDB({ endpoint: node.base, subscriptionBufferMax: 4 })
    await db.insert("a", [1, 0])
    const seen: Array<string> = []
    const changes = db.subscribe([1, 0], { k: 1 })[Symbol.asyncIterator]()
    const take = async () => {
      const { value } = await changes.next()
      seen.push(value.type === "leave" ? value.type : String(value.metadata["n"]))
    }
    await take()
    for (let n = 1; n <= 200; n++) await db.update("a", { metadata: { n } })
    while (seen.at(-1) !== "200") await take()
    assert.isBelow(seen.length, 100)
    await changes.return?.()
    await db.close()
    await node.stop()
  })
})
