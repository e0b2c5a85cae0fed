/**
 * Writes with a request's id, made again: after other writes, beside themselves, at the next owner, after snapshots and
 * pruning. A model does each request once and remembers what it answered.
 */
import { assert, describe, it } from "@effect/vitest"
import { Context, Effect, Fiber, Layer } from "effect"
import type { ApiError } from "../../src/protocol/Errors.ts"
import { giveRequestId, requestIdOf } from "../../src/shards/RequestIds.ts"
import { ObjectStore } from "../../src/tiers/ObjectStore.ts"
import { type RunningActors, startActors } from "../support/Actors.ts"
import { type Random, seeded, seedOf } from "../support/Seeded.ts"

const ids = Array.from({ length: 12 }, (_, i) => `id-${i}`)

/** A write as a client asks for it. */
type Request = { readonly requestId: string } & (
  | {
      readonly kind: "upsert"
      readonly ids: ReadonlyArray<string>
      readonly n: number
      readonly ack: "memory" | "cold"
    }
  | { readonly kind: "patch"; readonly id: string; readonly n: number }
  | { readonly kind: "delete"; readonly ids: ReadonlyArray<string> }
)

/** What it was answered; a patch of no record fails, and was not done. */
type Answer = number | { readonly metadata: string; readonly version: string } | "vector_not_found"

const make = (node: RunningActors, request: Request): Promise<Answer> => {
  const { router } = node
  const asked: Effect.Effect<Answer, ApiError> =
    request.kind === "upsert"
      ? router.upsert(
          "c",
          request.ids.map((id) => ({ id, vector: Float32Array.of(1, request.n), metadata: `{"n":${request.n}}` })),
          request.ack,
          request.requestId
        )
      : request.kind === "patch"
        ? router.updateMetadata("c", request.id, `{"patch":${request.n}}`, request.requestId)
        : router.remove("c", request.ids, request.requestId)
  return Effect.runPromise(Effect.catchTag(asked, "VectorNotFound", () => Effect.succeed<Answer>("vector_not_found")))
}

interface Model {
  readonly records: Map<string, Record<string, unknown>>
  readonly done: Map<string, { readonly request: Request; readonly answer: Answer }>
}

/** Does a request that was not done, and answers; the version of a patch is the server's. */
const expected = ({ records }: Model, request: Request): Answer => {
  switch (request.kind) {
    case "upsert":
      for (const id of request.ids) records.set(id, { n: request.n })
      return request.ids.length
    case "patch": {
      const before = records.get(request.id)
      if (before === undefined) return "vector_not_found"
      const after = { ...before, patch: request.n }
      records.set(request.id, after)
      return { metadata: JSON.stringify(after), version: "" }
    }
    case "delete": {
      const there = new Set(request.ids.filter((id) => records.has(id)))
      for (const id of there) records.delete(id)
      return there.size
    }
  }
}

const freshRequest = (source: Random, n: number): Request => {
  const requestId = source.below(2) === 0 ? giveRequestId() : requestIdOf("client", String(n))
  const some = [...new Set(Array.from({ length: 1 + source.below(4) }, () => source.pick(ids)))]
  const kind = source.pick(["upsert", "upsert", "patch", "delete"] as const)
  if (kind === "patch") return { kind, requestId, id: source.pick(ids), n }
  if (kind === "delete") return { kind, requestId, ids: some }
  return { kind, requestId, ids: some, n, ack: source.pick(["memory", "cold"] as const) }
}

const stateOf = (node: RunningActors, id: string): Promise<unknown> =>
  Effect.runPromise(
    node.router.get("c", id).pipe(
      Effect.map(({ metadata }) => (metadata === "" ? {} : JSON.parse(metadata))),
      Effect.catchTag("VectorNotFound", () => Effect.succeed(undefined))
    )
  )

const memoryStore = () => Effect.runPromise(Effect.scoped(Layer.build(ObjectStore.layerMemory)))

describe("requests", { timeout: 30_000 }, () => {
  for (const [partitions, seed] of [
    [1, 11],
    [2, 12]
  ] as const) {
    it(`are done once, ${partitions} partition(s), whatever happens in between`, { timeout: 120_000 }, () =>
      seeded(seedOf(seed), async (source) => {
        const store = await memoryStore()
        const settings = {
          partitionIdleMillis: 0,
          snapshotOps: 60,
          snapshotSharePercent: 1,
          snapshotIdleMillis: 100
        }
        let node = await startActors(store, settings)
        const model: Model = { records: new Map(), done: new Map() }
        let again = 0
        try {
          await Effect.runPromise(node.router.createCollection("c", { dimensions: 2, partitions }))
          for (let n = 1; n <= 250; n++) {
            const choice = source.next()
            if (choice < 0.5 || model.done.size === 0) {
              const request = freshRequest(source, n)
              // Sometimes it is there twice at once: one of them waits for the other.
              const times = source.below(4) === 0 ? 2 : 1
              const answers = await Promise.all(Array.from({ length: times }, () => make(node, request)))
              const answer = expected(model, request)
              for (const given of answers) check(given, answer)
              for (const given of answers) assert.deepStrictEqual(given, answers[0])
              if (answer !== "vector_not_found") {
                model.done.set(request.requestId, { request, answer: answers[0] as Answer })
              }
            } else if (choice < 0.97) {
              const { request, answer } = source.pick([...model.done.values()])
              again += 1
              assert.deepStrictEqual(await make(node, request), answer, JSON.stringify(request))
            } else {
              // Another owner takes over, after the one before ended or while that still thinks it is the owner.
              const before = node
              const isKilled = source.below(2) === 0
              if (!isKilled) await before.stop()
              node = await startActors(store, settings)
              if (isKilled) {
                await stateOf(node, ids[0] as string)
                if (partitions > 1) await Promise.all(ids.map((id) => stateOf(node, id)))
                await before.stop()
              }
            }
            if (n % 20 === 0) {
              for (const id of ids)
                assert.deepStrictEqual(await stateOf(node, id), model.records.get(id), `${n}: ${id}`)
            }
          }
          assert.isAbove(again, 60)
        } finally {
          await node.stop()
        }
      })
    )
  }

  const insert = (n: number, requestId?: string, ack: "memory" | "cold" = "cold"): Request => ({
    kind: "upsert",
    ids: ["a"],
    n,
    ack,
    requestId: requestId ?? requestIdOf("client", `insert ${n}`)
  })

  const withNode = async <A>(
    use: (node: RunningActors, store: Context.Context<ObjectStore>) => Promise<A>,
    settings: Parameters<typeof startActors>[1] = {}
  ): Promise<A> => {
    const store = await memoryStore()
    const node = await startActors(store, settings)
    try {
      await Effect.runPromise(node.router.createCollection("c", { dimensions: 2 }))
      return await use(node, store)
    } finally {
      await node.stop()
    }
  }

  it("are of one caller alone, and of one thing alone", () =>
    withNode(async (node) => {
      assert.notStrictEqual(requestIdOf("t/a", "1"), requestIdOf("t/b", "1"))
      assert.notStrictEqual(requestIdOf("t/a", "b1"), requestIdOf("t/ab", "1"))
      const requestId = requestIdOf("t/a", "1")
      await make(node, insert(1, requestId))
      const others: ReadonlyArray<Request> = [
        insert(2, requestId),
        { ...insert(1, requestId), ids: ["a", "b"] } as Request,
        { kind: "patch", id: "a", n: 1, requestId },
        { kind: "delete", ids: ["a"], requestId }
      ]
      for (const other of others) {
        const refused = await make(node, other).then(
          () => undefined,
          (error: ApiError) => error
        )
        assert.strictEqual(refused?._tag, "InvalidInput")
        assert.strictEqual((refused as { readonly field: string }).field, "idempotency_key")
      }
      assert.deepStrictEqual(await stateOf(node, "a"), { n: 1 })
      assert.isUndefined(await stateOf(node, "b"))
    }))

  it("are done again where newer ones fill the window", () =>
    withNode(
      async (node) => {
        await make(node, insert(1))
        await make(node, insert(2))
        await make(node, insert(1))
        assert.deepStrictEqual(await stateOf(node, "a"), { n: 2 })
        for (let n = 3; n <= 6; n++) await make(node, insert(n))
        await make(node, insert(1))
        assert.deepStrictEqual(await stateOf(node, "a"), { n: 1 }, "four newer ones are all that is remembered")
      },
      { requestWindowMax: 4 }
    ))

  it("are done again once the window has passed", () =>
    withNode(
      async (node) => {
        await make(node, insert(1))
        await make(node, insert(2))
        await new Promise((resolve) => setTimeout(resolve, 300))
        await make(node, insert(1))
        assert.deepStrictEqual(await stateOf(node, "a"), { n: 1 })
      },
      { requestWindowMillis: 200 }
    ))

  it("that were refused, or found no record, are tried anew", () =>
    withNode(async (node) => {
      const patch: Request = { kind: "patch", id: "a", n: 1, requestId: giveRequestId() }
      assert.strictEqual(await make(node, patch), "vector_not_found")
      await make(node, insert(1))
      check(await make(node, patch), { metadata: '{"n":1,"patch":1}', version: "" })
    }))

  it("that are under way are waited for, and are one write", async () => {
    const inner = Context.get(await memoryStore(), ObjectStore)
    let open = () => {}
    const opened = new Promise<void>((resolve) => {
      open = resolve
    })
    let held = false
    const objects: Array<string> = []
    const create: ObjectStore["Service"]["create"] = (key, body) => {
      if (!key.includes("/log/")) return inner.create(key, body)
      objects.push(key)
      return held
        ? Effect.andThen(
            Effect.promise(() => opened),
            inner.create(key, body)
          )
        : inner.create(key, body)
    }
    const node = await startActors(Context.make(ObjectStore, ObjectStore.of({ ...inner, create })))
    try {
      await Effect.runPromise(node.router.createCollection("c", { dimensions: 2 }))
      await make(node, insert(0))
      held = true
      const before = objects.length
      const first = Effect.runFork(Effect.promise(() => make(node, insert(1))))
      while (objects.length === before) await new Promise((resolve) => setTimeout(resolve, 1))
      const others = [make(node, insert(1)), make(node, insert(1))]
      // The caller of the first goes away; who joined it still is answered.
      Effect.runFork(Fiber.interrupt(first))
      open()
      assert.deepStrictEqual(await Promise.all(others), [1, 1])
      assert.strictEqual(objects.length, before + 1)
    } finally {
      open()
      await node.stop()
    }
  })

  it("are known from the snapshot before, where a snapshot's copy of the window is damaged", () =>
    withNode(
      async (node, store) => {
        const objects = Context.get(store, ObjectStore)
        const copies = async () =>
          (await Effect.runPromise(objects.list("collections/", { limit: 1_000 }))).filter(({ key }) =>
            key.endsWith("/requests")
          )
        for (let n = 1; n <= 2; n++) {
          await make(node, insert(n))
          while ((await copies()).length < n) await new Promise((resolve) => setTimeout(resolve, 20))
        }
        const newest = (await copies()).at(-1)?.key as string
        const { body, etag } = await Effect.runPromise(objects.get(newest))
        const damaged = new Uint8Array(body)
        damaged[20] = (damaged[20] as number) ^ 1
        await Effect.runPromise(Effect.result(objects.replace(newest, damaged, etag)))
        const next = await startActors(store)
        try {
          await make(next, insert(1))
          await make(next, insert(2))
          await make(next, insert(3))
          await make(next, insert(2))
          assert.deepStrictEqual(await stateOf(next, "a"), { n: 3 })
        } finally {
          await next.stop()
        }
      },
      { snapshotIdleMillis: 100 }
    ))
})

const check = (given: Answer, answer: Answer) => {
  if (typeof given !== "object" || typeof answer !== "object") return assert.strictEqual(given, answer)
  assert.deepStrictEqual(JSON.parse(given.metadata), JSON.parse(answer.metadata))
  assert.match(given.version, /^[0-9a-f]{16}-/)
}
