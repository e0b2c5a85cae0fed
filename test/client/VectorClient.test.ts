/** The client for programs on Effect: the same calls, on a service and with the engine in the process. */
import { mkdtemp, rm } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { assert, describe, it } from "@effect/vitest"
import { Context, Effect, Fiber, Layer, Queue, Schema, Stream } from "effect"
import { hasCode, type TypedClient, VectorClient } from "../../src/client/index.ts"
import { layerEmbedded, makeEmbedded } from "../../src/effect.ts"
import { startNode } from "../support/Node.ts"

const temporary = Effect.acquireRelease(
  Effect.promise(() => mkdtemp(join(tmpdir(), "ruvector-effect-"))),
  (path) => Effect.promise(() => rm(path, { recursive: true, force: true }))
)

const served = Effect.acquireRelease(
  Effect.promise(() => startNode()),
  (node) => Effect.promise(node.stop)
)

const variants: ReadonlyArray<readonly [string, Layer.Layer<VectorClient, unknown>]> = [
  ["on a service", Layer.unwrap(Effect.map(served, ({ base }) => VectorClient.layer({ endpoint: base })))],
  ["embedded", Layer.unwrap(Effect.map(temporary, (path) => layerEmbedded({ path })))]
]

describe.each(variants)("VectorClient %s", (_, layer) => {
  it("has calls as effects and streams, and typed errors", () =>
    Effect.gen(function* () {
      const client = yield* VectorClient
      const items = Stream.range(1, 50).pipe(Stream.map((i) => ({ id: `v${i}`, vector: [i, 1], metadata: { i } })))
      assert.strictEqual(yield* client.insertMany(items, { batchSize: 7 }), 50)
      const hits = yield* Stream.runCollect(client.searchStream([1, 1], { k: 3 }))
      assert.deepStrictEqual(
        [...hits].map(({ id }) => id),
        ["v1", "v2", "v3"]
      )
      const { code, field } = yield* Effect.flip(client.search([1, 2, 3]))
      assert.deepStrictEqual([code, field], ["invalid_input", "query"])
      const none = yield* Effect.catchIf(
        client.search([1, 2], { collection: "none" }),
        hasCode("vector_not_found", "collection_not_found"),
        () => Effect.succeed("none")
      )
      assert.strictEqual(none, "none")
      const other = yield* Effect.flip(
        Effect.catchIf(client.search([1, 2], { collection: "none" }), hasCode("overloaded"), () => Effect.void)
      )
      assert.strictEqual(other.code, "collection_not_found")
    }).pipe(Effect.provide(layer), Effect.runPromise))

  it("streams what changes among the nearest, until it is interrupted", () =>
    Effect.gen(function* () {
      const client = yield* VectorClient
      yield* client.insert({ id: "far", vector: [0, 1] })
      const changes = yield* Queue.unbounded<string>()
      const watching = yield* client.subscribe([1, 0], { k: 1 }).pipe(
        Stream.runForEach(({ id, type }) => Queue.offer(changes, `${type} ${id}`)),
        Effect.forkChild
      )
      assert.strictEqual(yield* Queue.take(changes), "enter far")
      yield* client.insert({ id: "near", vector: [1, 0] })
      assert.deepStrictEqual([yield* Queue.take(changes), yield* Queue.take(changes)], ["leave far", "enter near"])
      yield* Fiber.interrupt(watching)
      yield* client.delete("near")
      assert.strictEqual(yield* Queue.size(changes), 0)
    }).pipe(Effect.provide(layer), Effect.runPromise))
})

const Task = Schema.Struct({ title: Schema.String, priority: Schema.Int })

class Tasks extends Context.Service<Tasks, TypedClient<typeof Task.Type>>()("test/Tasks") {}

const metadata = Schema.toStandardSchemaV1(Task)

describe.each([
  [
    "on a service",
    Layer.effect(
      Tasks,
      Effect.flatMap(served, ({ base }) => VectorClient.make({ endpoint: base, metadata }))
    )
  ],
  [
    "embedded",
    Layer.effect(
      Tasks,
      Effect.flatMap(temporary, (path) => makeEmbedded({ path, metadata }))
    )
  ]
] as const)("a client of a program's own, %s", (_, layer) => {
  it("has metadata of its own type", () =>
    Effect.gen(function* () {
      const tasks = yield* Tasks
      yield* tasks.insert({ id: "t1", vector: [1, 0], metadata: { title: "write", priority: 1 } })
      const [first] = yield* tasks.search([1, 0])
      const title: string | undefined = first?.metadata.title
      assert.strictEqual(title, "write")
      const { code, field } = yield* Effect.flip(
        tasks.insert({ id: "t2", vector: [1, 0], metadata: { title: "read", priority: 0.5 } })
      )
      assert.deepStrictEqual([code, field], ["invalid_metadata", "metadata.priority"])
    }).pipe(Effect.provide(layer), Effect.runPromise))
})

describe("a layer", () => {
  it("ends what it made: calls fail, and the directory is free", () =>
    Effect.gen(function* () {
      const path = yield* temporary
      const kept = yield* Effect.provide(VectorClient, layerEmbedded({ path }))
      assert.strictEqual((yield* Effect.flip(kept.search([1, 0]))).code, "closed")
      const again = yield* Effect.scoped(
        Effect.gen(function* () {
          yield* makeEmbedded({ path })
          return yield* Effect.flip(Effect.provide(VectorClient, layerEmbedded({ path })))
        })
      )
      assert.strictEqual(again.code, "not_opened")
      assert.match(again.message, /is in use by process/)
      yield* Effect.provide(VectorClient, layerEmbedded({ path }))
    }).pipe(Effect.scoped, Effect.runPromise))
})
