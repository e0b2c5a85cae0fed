/**
 * Streams through cuts: by the client, by the network in the middle of an event, by partitions that are closed and opened
 * again, and by restarts of the node. Whatever is cut, the events in the order they came in come to the right answer, and
 * to every change once.
 */
import { mkdtemp, rm } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { assert, describe, it } from "@effect/vitest"
import { partitionOf } from "../../src/shards/PartitionMap.ts"
import { type CutProxy, startCutProxy } from "../support/CutProxy.ts"
import { type RunningNode, startNode } from "../support/Node.ts"
import { type Random, seeded, seedOf } from "../support/Seeded.ts"
import {
  AnswerFold,
  type Asked,
  bruteForce,
  ChangeLoad,
  differences,
  FeedFold,
  noFaults,
  Subscriber,
  type Wire
} from "../support/Subscribers.ts"

const collection = "cut"
const dimensions = 4
const partitions = 3
const wires: ReadonlyArray<Wire> = ["sse", "ws", "rpc"]

const standing = (random: Random): ReadonlyArray<Asked & { readonly stream: "subscribe" }> => [
  { stream: "subscribe", collection, query: random.vector(dimensions), k: 5 },
  { stream: "subscribe", collection, query: random.vector(dimensions), k: 20, min_score: 0.25, include: ["metadata"] },
  { stream: "subscribe", collection, query: random.vector(dimensions), k: 8, filter: { even: true } }
]

/** One subscriber of each kind on each wire, all through a proxy that cuts. */
const subscribeAll = (random: Random, proxy: CutProxy) => {
  const faults = noFaults()
  const port = () => proxy.port
  const answers = wires.flatMap((wire) =>
    standing(random).map((asked) => {
      const fold = new AnswerFold(faults)
      return { wire, asked, fold, subscriber: new Subscriber(wire, port, asked, fold) }
    })
  )
  const feeds = wires.map((wire) => {
    const fold = new FeedFold(faults, (id) => partitionOf(id, partitions))
    return {
      wire,
      fold,
      subscriber: new Subscriber(wire, port, { stream: "changes", collection, from: "oldest" }, fold)
    }
  })
  return { faults, answers, feeds, subscribers: [...answers, ...feeds].map(({ subscriber }) => subscriber) }
}

/** Partitions made resident so far. */
const activations = async (node: RunningNode): Promise<number> => {
  const text = await (await fetch(`${node.base}/metrics`)).text()
  return Number(/^ruvector_partition_activations(?:\{[^}]*\})? (\d+)/m.exec(text)?.[1] ?? Number.NaN)
}

/** Waits until it holds; answers the last words of why it does not. */
const settled = async (why: () => string, millis = 10_000): Promise<string> => {
  const until = Date.now() + millis
  for (;;) {
    const words = why()
    if (words === "" || Date.now() > until) return words
    await new Promise((resolve) => setTimeout(resolve, 20))
  }
}

describe("streams that are cut", () => {
  it("come to the right answers, and to every change once", { timeout: 60_000 }, () =>
    seeded(seedOf(20_261_126), async (random) => {
      const data = await mkdtemp(join(tmpdir(), "ruvector-"))
      // Looked at every five seconds: then whatever has just nothing to do is passivated, under load and followers.
      const start = () => startNode({ data, partitionIdleMillis: 5, drainMillis: 200, reconnectSpreadMillis: 0 })
      let node: RunningNode = await start()
      const proxy = await startCutProxy(node.port)
      try {
        const made = await fetch(`${node.base}/api/v1/collections/${collection}`, {
          method: "PUT",
          headers: { "content-type": "application/json" },
          body: JSON.stringify({ dimensions, partitions })
        })
        assert.strictEqual(made.status, 201)
        proxy.allowance = () => 150 + random.below(3_000)
        const { faults, answers, feeds, subscribers } = subscribeAll(random, proxy)
        const load = new ChangeLoad(() => node.base, collection, random, 60, dimensions)
        for (let round = 0; round < 7; round++) {
          await load.run(60)
          for (const subscriber of subscribers) if (random.next() < 0.3) subscriber.cut()
          if (round === 2 || round === 5) {
            await node.stop()
            node = await start()
            proxy.target = node.port
          }
          if (round === 4) {
            const before = await activations(node)
            const until = Date.now() + 15_000
            while (!((await activations(node)) > before)) {
              assert.isBelow(Date.now(), until, "no partition was passivated")
              await load.run(10)
            }
          }
        }
        // Cut until all have been, and then left alone.
        await load.run(60)
        proxy.allowance = () => undefined
        const records = await load.records()
        for (const { wire, asked, fold, subscriber } of answers) {
          const right = bruteForce(records, asked)
          const words = await settled(() => differences(fold.answer(), right))
          assert.strictEqual(words, "", `${wire} ${JSON.stringify(asked)} ${subscriber.refusals.join(" ")}`)
          assert.isAbove(subscriber.resumed, 0)
        }
        const acknowledged = [...load.acknowledged.values()].reduce((sum, kinds) => sum + kinds.length, 0)
        for (const { wire, fold } of feeds) {
          await settled(() => (fold.changes.length >= acknowledged ? "" : "some are missing"))
          assert.strictEqual(fold.resyncs, 0)
          for (const [id, kinds] of load.acknowledged) {
            const followed = fold.changes.filter((change) => change.id === id).map(({ kind }) => kind)
            assert.deepStrictEqual(followed, kinds, `${wire} ${id}`)
          }
          assert.strictEqual(fold.changes.length, acknowledged)
        }
        const { said, ...counted } = faults
        assert.deepStrictEqual(counted, { gaps: 0, repeats: 0, outOfOrder: 0 }, said.join("\n"))
        const resumed = subscribers.reduce((sum, subscriber) => sum + subscriber.resumed, 0)
        assert.isAbove(resumed, 200)
        await Promise.all(subscribers.map((subscriber) => subscriber.stop()))
      } finally {
        await proxy.stop()
        await node.stop()
        await rm(data, { recursive: true, force: true })
      }
    })
  )
})
