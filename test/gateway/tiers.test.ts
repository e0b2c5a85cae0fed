/** Warming, the state of the tiers and their events, over REST, Server-Sent Events and RPC, against a whole node. */
import { NodeHttpClient, NodeWS } from "@effect/platform-node"
import { afterAll, assert, beforeAll, describe, it } from "@effect/vitest"
import { Context, Effect, Fiber, Layer, type Scope, Stream } from "effect"
import { RpcClient, RpcSerialization } from "effect/rpc"
import { Socket } from "effect/socket"
import { framesOf } from "../../src/gateway/NodeEvents.ts"
import { RuvectorRpcs } from "../../src/protocol/Rpcs.ts"
import type { TierEvent } from "../../src/protocol/TierPromoter.ts"
import { type RunningNode, startNode } from "../support/Node.ts"

let node: RunningNode

beforeAll(async () => {
  node = await startNode({ tierSubscribersMax: 3, pingIntervalMillis: 100, idleTimeoutMillis: 500 })
  await call("PUT", "/api/v1/collections/c", { dimensions: 2, partitions: 2 })
  const vectors = Array.from({ length: 50 }, (_, i) => ({ id: `r${i}`, vector: [1, i] }))
  await call("POST", "/api/v1/insert", { collection: "c", vectors })
})
afterAll(() => node.stop())

const call = async (method: string, path: string, body?: unknown) => {
  const response = await fetch(`${node.base}${path}`, {
    method,
    ...(body === undefined ? {} : { body: JSON.stringify(body), headers: { "content-type": "application/json" } })
  })
  const text = await response.text()
  return { status: response.status, body: text === "" ? undefined : JSON.parse(text) }
}

interface Frame {
  readonly id: string
  readonly data: TierEvent
}

/** Follows the events; `next` waits for one more. */
const follow = async (query = "", headers: Record<string, string> = {}) => {
  const abort = new AbortController()
  const response = await fetch(`${node.base}/api/v1/tiers/events${query}`, { signal: abort.signal, headers })
  const reader = (response.body as ReadableStream<Uint8Array>).pipeThrough(new TextDecoderStream()).getReader()
  let text = ""
  let comments = 0
  const next = async (): Promise<Frame> => {
    for (;;) {
      const end = text.indexOf("\n\n")
      if (end !== -1) {
        const frame = text.slice(0, end)
        text = text.slice(end + 2)
        if (frame.startsWith(":")) {
          comments += 1
          continue
        }
        const [id, data] = frame.split("\n") as [string, string]
        return { id: id.slice("id: ".length), data: JSON.parse(data.slice("data: ".length)) as TierEvent }
      }
      const { value, done } = await reader.read()
      if (done) throw new Error("the stream ended")
      text += value
    }
  }
  return { response, next, comments: () => comments, close: () => abort.abort() }
}

describe("REST", () => {
  it("warms a list and says what came of it", async () => {
    const warmed = await call("POST", "/api/v1/warm", { collection: "c", ids: ["r1", "r2", "r2", "nobody"] })
    assert.strictEqual(warmed.status, 200)
    assert.deepInclude(warmed.body, { requested: 3, found: 2, missing: 1, missing_sample: ["nobody"], hit_rate: 1 })
    assert.deepInclude(warmed.body, { hot: 2, warm: 2, cold: 0 })
  })

  it("warms what was read in a window", async () => {
    for (let n = 0; n < 2; n++) for (const id of ["r7", "r8"]) await call("GET", `/api/v1/embed/${id}?collection=c`)
    const warmed = await call("POST", "/api/v1/warm", { collection: "c", window: { last_minutes: 5 }, limit: 2 })
    assert.deepInclude(warmed.body, { requested: 2, found: 2, hit_rate: 1 })
    const tiers = await call("GET", "/api/v1/tiers")
    assert.strictEqual(tiers.status, 200)
    assert.includeMembers(
      tiers.body.hottest.slice(0, 2).map(({ id }: { id: string }) => id),
      ["r7", "r8"]
    )
    assert.isAtLeast(tiers.body.record_cache.records, 4)
    const metrics = await (await fetch(`${node.base}/metrics`)).text()
    assert.match(metrics, /^ruvector_tier_warmings [1-9]/m)
    assert.match(metrics, /^ruvector_tier_promotions\{to="hot"\} [1-9]/m)
  })
})

describe("Server-Sent Events", () => {
  it("tell what happens, with comments where it is quiet, and go on after the last one seen", async () => {
    const stream = await follow()
    assert.strictEqual(stream.response.status, 200)
    assert.match(stream.response.headers.get("content-type") ?? "", /^text\/event-stream/)
    const first = await stream.next()
    assert.strictEqual(first.data.event, "following")
    const started = stream.next()
    await new Promise((resolve) => setTimeout(resolve, 600))
    assert.isAtLeast(stream.comments(), 1)
    await call("POST", "/api/v1/warm", { collection: "c", ids: ["r1"] })
    assert.deepInclude((await started).data, { event: "warming_started", requested: 1 })
    stream.close()

    const again = await follow("", { "last-event-id": (await started).id })
    assert.strictEqual((await again.next()).data.event, "following")
    const events = [(await again.next()).data.event, (await again.next()).data.event, (await again.next()).data.event]
    assert.deepStrictEqual(events, ["warming_progress", "warming_progress", "warming_finished"])
    again.close()
  })

  it("refuse more followers than there may be, before the stream begins", async () => {
    const streams = [await follow(), await follow(), await follow()]
    const refused = await call("GET", "/api/v1/tiers/events")
    assert.strictEqual(refused.status, 429)
    assert.deepInclude(refused.body, { code: "overloaded", field: "tierSubscribersMax" })
    for (const stream of streams) stream.close()
    for (let n = 0; n < 200; n++) {
      const stream = await follow()
      stream.close()
      if (stream.response.status === 200) return
      await new Promise((resolve) => setTimeout(resolve, 10))
    }
    assert.fail("no place became free")
  })

  it("cut a client that does not read, not one that waits, and end when the node drains", async () => {
    const event = (seq: number): TierEvent => ({ event: "warming_started", seq, at_ms: 0, warming: seq, requested: 1 })
    let cuts = 0
    const cut = () => {
      cuts += 1
    }
    let draining = false
    const options = { pingMillis: 10_000, idleMillis: 300, cut }
    const until = async (holds: () => boolean) => {
      for (let n = 0; n < 1_000 && !holds(); n++) await new Promise((resolve) => setTimeout(resolve, 5))
      assert.isTrue(holds())
    }
    await Effect.runPromise(
      Effect.scoped(
        Effect.gen(function* () {
          const quiet = Stream.concat(Stream.make(event(1)), Stream.never)
          const frames = yield* framesOf("tiers", quiet, () => draining, options)
          const reading = yield* Effect.forkScoped(Stream.runCollect(frames))
          yield* Effect.sleep(900)
          assert.strictEqual(cuts, 0)
          draining = true
          assert.lengthOf(yield* Fiber.join(reading), 1)
        })
      )
    )
    draining = false
    await Effect.runPromise(
      Effect.scoped(
        Effect.gen(function* () {
          let made = 0
          const many = Stream.fromEffectRepeat(Effect.sync(() => event(++made)))
          const frames = yield* framesOf("tiers", many, () => draining, options)
          const stuck = Stream.runForEach(frames, () => Effect.never)
          yield* Effect.forkScoped(stuck)
          yield* Effect.sleep(50)
          const taken = made
          yield* Effect.promise(() => until(() => cuts > 0))
          // While it does not read, next to nothing is made for it.
          assert.isAtMost(made - taken, 1)
          assert.isAtMost(made, 8)
        })
      )
    )
  })
})

describe("RPC", () => {
  it("warms, and streams the events", async () => {
    const events = await Effect.runPromise(
      Effect.scoped(
        Effect.gen(function* () {
          const protocol = RpcClient.layerProtocolSocket().pipe(
            Layer.provide(
              Layer.effect(Socket.Socket, Socket.makeWebSocket(`ws://127.0.0.1:${node.port}/api/v1/rpc/ws`))
            ),
            Layer.provide(NodeWS.layerWebSocketConstructor),
            Layer.provide(RpcSerialization.layerSchemaBinary())
          )
          const context = yield* Layer.build(Layer.merge(protocol, NodeHttpClient.layerNodeHttp))
          const client = yield* Effect.provideContext(
            RpcClient.make(RuvectorRpcs),
            Context.merge(context, yield* Effect.context<Scope.Scope>())
          )
          const opened = Promise.withResolvers<void>()
          const following = yield* Effect.forkScoped(
            client.TierEvents({}).pipe(
              Stream.tap((event) => Effect.sync(() => event.event === "following" && opened.resolve())),
              Stream.take(3),
              Stream.runCollect
            )
          )
          yield* Effect.promise(() => opened.promise)
          const report = yield* client.Warm({ collection: "c", ids: ["r1", "r2"] })
          assert.deepInclude(report, { requested: 2, found: 2, hit_rate: 1 })
          const neither = yield* Effect.flip(client.Warm({ collection: "c" }))
          assert.deepInclude(neither, { _tag: "InvalidInput", field: "ids" })
          const empty = yield* Effect.flip(client.Warm({ collection: "c", ids: [] }))
          assert.deepInclude(empty, { _tag: "InvalidInput", field: "ids" })
          return yield* Fiber.join(following)
        })
      )
    )
    assert.deepStrictEqual(
      events.map(({ event }) => event),
      ["following", "warming_started", "warming_progress"]
    )
  })
})
