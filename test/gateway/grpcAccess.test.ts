/** What `Access` says holds on every call: who it is from, what that one may do, how often, and for how long. */
import * as grpc from "@grpc/grpc-js"
import { Effect } from "effect"
import { afterEach, assert, beforeEach, it } from "vitest"
import type { Access } from "../../src/gateway/Access.ts"
import { type ApiError, Forbidden, RateLimited, Unauthenticated } from "../../src/protocol/Errors.ts"
import { anonymous, type Principal } from "../../src/protocol/Principal.ts"
import { healthClient, metadataOf, outcome, type SearchClient, searchClient } from "../support/Grpc.ts"
import { type GrpcTestServer, openGrpcServer } from "./grpcServer.ts"

/** Knows three credentials, one of which it has to look up, and collections `open` only. */
class TestAccess {
  admitted = 0
  readonly admittedMax = 5
  readonly watched = new Map<string, (error: ApiError) => void>()
  readonly addresses = new Set<string>()

  readonly service: Access["Service"] = {
    withoutCredential: new Unauthenticated({ reason: "missing", detail: "none" }),
    varies: () => true,
    authenticate: ({ headers, address }) => {
      this.addresses.add(address)
      const id = /^Bearer (\w+)$/.exec(headers.authorization ?? "")?.[1] ?? ""
      const principal: Principal = { ...anonymous, id }
      if (id === "slow") return new Promise((resolve) => setTimeout(resolve, 20, principal))
      return id === "quick" || id === "limited" ? principal : expired
    },
    allow: (_, scope, collection) => {
      assert.strictEqual(scope, "read")
      return collection === "open" ? undefined : new Forbidden({ scope: "", detail: "not yours" })
    },
    admit: ({ id }) => {
      if (id !== "limited") return undefined
      this.admitted += 1
      if (this.admitted <= this.admittedMax) return undefined
      return new RateLimited({ by: "key", limit: this.admittedMax, retryAfterMillis: 300 })
    },
    watch: ({ id }, ended) => {
      this.watched.set(id, ended)
      return () => this.watched.delete(id)
    }
  }
}

const expired = new Unauthenticated({ reason: "invalid_token", detail: "expired" })

let access: TestAccess
let server: GrpcTestServer
let client: SearchClient

beforeEach(async () => {
  access = new TestAccess()
  server = await openGrpcServer({}, access.service)
  for (const name of ["open", "closed"]) {
    await Effect.runPromise(server.router.createCollection(name, { dimensions: 2 }))
    await Effect.runPromise(server.router.upsert(name, [{ id: "a", vector: new Float32Array([1, 0]), metadata: "" }]))
  }
  client = searchClient(server.port)
})
afterEach(async () => {
  client.close()
  await server.close()
})

const as = (id: string) => metadataOf({ authorization: `Bearer ${id}` })
const search = async (id: string, collection = "open") => {
  const { messages, status } = await outcome(client.StreamSearch({ query: [1, 0], collection }, as(id)))
  return [messages.length, status.code, ...status.metadata.get("ruvector-code")]
}

it("refuses who is not known, before anything of the call is read", async () => {
  const { UNAUTHENTICATED } = grpc.status
  assert.deepStrictEqual(await search("nobody"), [0, UNAUTHENTICATED, "unauthenticated"])
  const bare = await outcome(client.StreamSearch({ query: [1, 0], collection: "open" }))
  assert.strictEqual(bare.status.code, UNAUTHENTICATED)
  const session = client.BidirectionalSearch(as("nobody"))
  assert.strictEqual((await outcome(session)).status.code, UNAUTHENTICATED)
  assert.deepStrictEqual([server.seen.queries.length, server.seen.sessionsOpened], [0, 0])
})

it("serves who is known, at once or after a look-up", async () => {
  assert.deepStrictEqual(await search("quick"), [1, grpc.status.OK])
  assert.deepStrictEqual(await search("slow"), [1, grpc.status.OK])
  const session = client.BidirectionalSearch(as("slow"))
  session.write({ query: [1, 0], collection: "open" })
  session.end()
  assert.strictEqual((await outcome(session)).messages.length, 2)
  assert.deepStrictEqual([...access.addresses], ["127.0.0.1"])
})

it("a call that is cancelled during the look-up is not begun", async () => {
  const call = client.BidirectionalSearch(as("slow"))
  const ended = outcome(call)
  while (access.addresses.size === 0) await new Promise((resolve) => setTimeout(resolve, 1))
  call.cancel()
  assert.strictEqual((await ended).status.code, grpc.status.CANCELLED)
  assert.deepStrictEqual(await search("slow"), [1, grpc.status.OK])
  assert.strictEqual(server.seen.sessionsOpened, 0)
})

it("asks for each request whether it may be made, and goes on with the next", async () => {
  assert.deepStrictEqual(await search("quick", "closed"), [0, grpc.status.PERMISSION_DENIED, "forbidden"])
  const session = client.BidirectionalSearch(as("quick"))
  for (const collection of ["closed", "open"]) session.write({ query: [1, 0], collection, request_id: collection })
  session.end()
  const { messages, status } = await outcome(session)
  assert.strictEqual(status.code, grpc.status.OK)
  const errors = messages.flatMap(({ request_id, summary }) =>
    summary ? [[request_id, summary.error?.code ?? 0]] : []
  )
  assert.deepStrictEqual(Object.fromEntries(errors), { closed: grpc.status.PERMISSION_DENIED, open: 0 })
})

it("tells who asks too often when to come again", async () => {
  const session = client.BidirectionalSearch(as("limited"))
  for (let i = 0; i < 8; i++) session.write({ query: [1, 0], collection: "open" })
  session.end()
  const { messages } = await outcome(session)
  const errors = messages.flatMap(({ summary }) => summary?.error ?? [])
  assert.deepStrictEqual(
    errors.map(({ code, problem, retry_after_ms }) => [code, problem, retry_after_ms]),
    new Array(3).fill([grpc.status.RESOURCE_EXHAUSTED, "rate_limited", 300])
  )
  const { status } = await outcome(client.StreamSearch({ query: [1, 0], collection: "open" }, as("limited")))
  assert.strictEqual(status.code, grpc.status.RESOURCE_EXHAUSTED)
  assert.deepStrictEqual(status.metadata.get("grpc-retry-pushback-ms"), ["300"])
})

it("ends a session whose credential ends, and watches no longer than the session is", async () => {
  const session = client.BidirectionalSearch(as("quick"))
  const ended = outcome(session)
  session.write({ query: [1, 0], collection: "open" })
  await new Promise((resolve) => session.once("data", resolve))
  access.watched.get("quick")?.(expired)
  const { status } = await ended
  assert.deepStrictEqual([status.code, status.details], [grpc.status.UNAUTHENTICATED, "expired"])
  const next = client.BidirectionalSearch(as("quick"))
  next.write({ query: [1, 0], collection: "open" })
  next.end()
  await outcome(next)
  while (server.handler.count() > 0) await new Promise((resolve) => setTimeout(resolve, 1))
  assert.strictEqual(access.watched.size, 0)
})

it("tells everybody its health", async () => {
  const health = healthClient(server.port)
  server.readiness.set({ state: "ready" })
  const status = await new Promise((resolve) => {
    health.Check({ service: "" }, (error, response) => resolve(error ?? response?.status))
  })
  assert.strictEqual(status, "SERVING")
  health.close()
})
