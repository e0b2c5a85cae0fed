/**
 * The RPC wire served on a port of its own, over a router that keeps vectors in a map. What reaches the actors is the
 * router's and the sessions' to do, so a test can see here that it does, and what of it is under way.
 */
import * as Http from "node:http"
import type { AddressInfo } from "node:net"
import { NodeHttpServer } from "@effect/platform-node"
import { Effect, Exit, Layer, Logger, Scope, Stream } from "effect"
import { HttpRouter } from "effect/http"
import { defaultSettings, Settings, type SettingValues } from "../../src/config.ts"
import { Callers } from "../../src/gateway/Callers.ts"
import { ClientAddresses } from "../../src/gateway/ClientAddresses.ts"
import { Promoter } from "../../src/gateway/Promoter.ts"
import * as RpcGateway from "../../src/gateway/RpcGateway.ts"
import { Sessions } from "../../src/gateway/Sessions.ts"
import { Subscriptions } from "../../src/gateway/Subscriptions.ts"
import { TenantRouter } from "../../src/gateway/TenantRouter.ts"
import { Topics } from "../../src/gateway/Topics.ts"
import type { Collection } from "../../src/protocol/Collection.ts"
import {
  CollectionConflict,
  CollectionNotFound,
  InvalidInput,
  Overloaded,
  VectorNotFound
} from "../../src/protocol/Errors.ts"
import type { SearchAnswer, SessionQuery } from "../../src/protocol/StreamSession.ts"
import { Router } from "../../src/shards/Router.ts"
import { Shedding } from "../../src/shards/Shedding.ts"
import { accessLayer } from "../support/AccessLayer.ts"

export interface RpcTestServer {
  readonly port: number
  readonly seen: Seen
  /** Lines of its log. */
  readonly logged: ReadonlyArray<string>
  readonly sockets: RpcGateway.RpcWebSocketServer
}

/** What the router and the sessions were asked. */
export interface Seen {
  readonly queries: Array<SessionQuery>
  searchesUnderWay: number
  searchesInterrupted: number
  sessionsOpen: number
  sessionsOpened: number
}

export const nothingSeen = (): Seen => ({
  queries: [],
  searchesUnderWay: 0,
  searchesInterrupted: 0,
  sessionsOpen: 0,
  sessionsOpened: 0
})

interface StoredRecord {
  readonly vector: Float32Array
  readonly metadata: string
  readonly version: string
}

/** Searches of this collection never end. */
export const endless = "endless"
/** Searches of this collection meet a defect. */
export const broken = "broken"
/** Searches of this collection give ten results with 10,000 characters of metadata each. */
export const bulky = "bulky"

export const startRpcServer = Effect.fnUntraced(function* (given: Partial<SettingValues> = {}) {
  const settings: SettingValues = { ...defaultSettings, ...given }
  const seen = nothingSeen()
  const router = mapRouter(seen)
  const logged: Array<string> = []
  const services = Layer.mergeAll(
    Logger.layer([Logger.map(Logger.formatJson, (line) => void logged.push(line))]),
    Layer.succeed(Settings, settings),
    Layer.succeed(Router, router),
    Layer.succeed(Sessions, countedSessions(router, seen)),
    Layer.succeed(Promoter, noPromoter),
    Layer.provide(Shedding.layer, Layer.succeed(Settings, settings)),
    Layer.succeed(Subscriptions, noSubscriptions),
    Layer.succeed(Topics, {} as unknown as Topics["Service"])
  )
  const access = TenantRouter.layer.pipe(
    Layer.provideMerge(
      Callers.layer({
        urlCredentials: () => true,
        ownRefusals: (path) => !path.includes("/ws"),
        operators: new Set()
      })
    ),
    Layer.provideMerge(accessLayer),
    Layer.provide(ClientAddresses.layer),
    Layer.provideMerge(services)
  )
  return yield* Effect.gen(function* () {
    const scope = yield* Effect.scope
    const app = yield* HttpRouter.toHttpEffect(RpcGateway.layer)
    const sockets = yield* RpcGateway.webSocketServer
    const server = Http.createServer()
    const callers = yield* Callers
    const handler = yield* NodeHttpServer.makeHandler(app, { scope })
    const upgrade = yield* NodeHttpServer.makeUpgradeHandler(Effect.succeed(sockets), app, { scope })
    const pathOf = ({ url }: Http.IncomingMessage) => (url as string).split("?", 1)[0] as string
    server.on("request", (request, response) =>
      callers.request(request, response, "req", pathOf(request), () => handler(request, response))
    )
    server.on("upgrade", (request, socket, head) =>
      callers.upgrade(request, socket, pathOf(request), () => upgrade(request, socket, head))
    )
    yield* Effect.acquireRelease(
      Effect.callback<void>((resume) => {
        server.listen({ port: 0, host: "127.0.0.1" }, () => resume(Effect.void))
      }),
      () =>
        Effect.sync(() => {
          server.close()
          server.closeAllConnections()
        })
    )
    return { port: (server.address() as AddressInfo).port, seen, logged, sockets } satisfies RpcTestServer
  }).pipe(Effect.provide(access), Effect.provide(NodeHttpServer.layerHttpServices))
})

/** The same for a test that runs no effects of its own. */
export const openRpcServer = async (settings: Partial<SettingValues>) => {
  const scope = await Effect.runPromise(Scope.make())
  const server = await Effect.runPromise(Scope.provide(startRpcServer(settings), scope))
  return { ...server, close: () => Effect.runPromise(Scope.close(scope, Exit.void)) }
}

export const mapRouter = (seen: Seen): Router["Service"] => {
  const collections = new Map<string, { collection: Collection; records: Map<string, StoredRecord> }>()
  let written = 0

  const find = (name: string) =>
    Effect.suspend(() => {
      const found = collections.get(name)
      return found === undefined ? Effect.fail(new CollectionNotFound({ collection: name })) : Effect.succeed(found)
    })

  const create: Router["Service"]["createCollection"] = Effect.fnUntraced(function* (name, request) {
    const there = collections.get(name)?.collection
    if (there !== undefined && there.dimensions !== request.dimensions) {
      const [expected, got] = [String(there.dimensions), String(request.dimensions)]
      return yield* new CollectionConflict({ collection: name, field: "dimensions", expected, got })
    }
    if (there !== undefined) return { collection: there, created: false }
    const collection: Collection = {
      name,
      uid: `u${collections.size}`,
      dimensions: request.dimensions,
      metric: request.metric ?? "cosine",
      partitions: request.partitions ?? 1,
      index: { m: 16, ef_construction: 200, ef_search: 128, ...request.index },
      created_ms: 1_700_000_000_000
    }
    collections.set(name, { collection, records: new Map() })
    return { collection, created: true }
  })

  const search = Effect.fnUntraced(function* (query: SessionQuery) {
    seen.queries.push(query)
    if (query.collection === endless) return yield* Effect.never
    if (query.collection === broken) return yield* Effect.die(new Error("a defect of the router"))
    if (query.collection === bulky) return bulkyAnswer(query.queryId)
    const { collection, records } = yield* find(query.collection)
    const vector = query.vector ?? records.get(query.vectorId as string)?.vector
    if (vector === undefined) {
      return yield* new VectorNotFound({ collection: collection.name, id: query.vectorId as string })
    }
    if (vector.length !== collection.dimensions) {
      const expected = `${collection.dimensions} numbers, the dimensions of collection ${collection.name}`
      return yield* new InvalidInput({ field: "query", expected, got: String(vector.length) })
    }
    const nearest = Array.from(records, ([id, record]) => ({ id, ...record, score: product(record.vector, vector) }))
      .sort((a, b) => b.score - a.score)
      .slice(0, query.k)
    return {
      queryId: query.queryId,
      ids: nearest.map(({ id }) => id),
      scores: Float32Array.from(nearest, ({ score }) => score),
      ...(query.includeMetadata ? { metadata: nearest.map(({ metadata }) => metadata) } : {}),
      ...(query.includeVector ? { vectors: Float32Array.from(nearest.flatMap((hit) => Array.from(hit.vector))) } : {}),
      dimensions: collection.dimensions,
      missing: [],
      tookMillis: 0.25
    } satisfies SearchAnswer
  })

  return Router.of({
    createCollection: create,
    collection: (name) => Effect.map(find(name), ({ collection }) => collection),
    refresh: (name) => Effect.map(find(name), ({ collection }) => collection),
    collections: Effect.sync(() => Array.from(collections.values(), ({ collection }) => collection)),
    deleteCollection: (name) => Effect.map(find(name), () => void collections.delete(name)),
    count: ({ name }) => Effect.map(find(name), ({ records }) => records.size),
    stats: () => Effect.succeed([]),
    release: () => Effect.succeed(false),
    activate: () => Effect.void,
    upsert: Effect.fnUntraced(function* (name, records) {
      if (name === "default") yield* create(name, { dimensions: records[0]?.vector.length ?? 1 })
      const { records: stored } = yield* find(name)
      for (const { id, vector, metadata } of records) stored.set(id, { vector, metadata, version: `v${written++}` })
      return records.length
    }),
    get: Effect.fnUntraced(function* (name, id) {
      const record = (yield* find(name)).records.get(id)
      return record === undefined ? yield* new VectorNotFound({ collection: name, id }) : { id, ...record }
    }),
    updateMetadata: Effect.fnUntraced(function* (name, id, patch) {
      const { records } = yield* find(name)
      const record = records.get(id)
      if (record === undefined) return yield* new VectorNotFound({ collection: name, id })
      const fields = { ...(JSON.parse(record.metadata || "{}") as object), ...(JSON.parse(patch) as object) }
      const metadata = JSON.stringify(Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== null)))
      const version = `v${written++}`
      records.set(id, { ...record, metadata, version })
      return { metadata, version }
    }),
    searchByUrl: (query) =>
      Effect.map(Effect.zip(search(query), find(query.collection)), ([answer, { collection }]) => ({
        answer,
        collection,
        revision: undefined,
        cached: false
      })),
    revision: () => undefined,
    invalidate: (name, { scope }) =>
      Effect.map(find(name), () => ({ collection: name, scope, generation: 0, effective_ms: 0, tags: [] })),
    remove: (name, ids) => Effect.map(find(name), ({ records }) => ids.filter((id) => records.delete(id)).length),
    search: (query) =>
      Effect.suspend(() => {
        seen.searchesUnderWay += 1
        return Effect.onExit(search(query), (exit) =>
          Effect.sync(() => {
            seen.searchesUnderWay -= 1
            if (exit._tag === "Failure" && exit.cause.reasons.some((reason) => reason._tag === "Interrupt")) {
              seen.searchesInterrupted += 1
            }
          })
        )
      })
  })
}

export const countedSessions = (router: Router["Service"], seen: Seen): Sessions["Service"] => {
  const openUnsafe = () => {
    if (seen.sessionsOpen >= 100) return new Overloaded({ bound: "sessionsMax", retryAfterMillis: 5_000 })
    seen.sessionsOpen += 1
    seen.sessionsOpened += 1
    const ended = Effect.sync(() => {
      seen.sessionsOpen -= 1
    })
    return { id: `s${seen.sessionsOpened}`, search: router.search, close: ended, abandon: ended }
  }
  const open = Effect.suspend(() => {
    const link = openUnsafe()
    return link instanceof Overloaded ? Effect.fail(link) : Effect.succeed(link)
  })
  return Sessions.of({
    open,
    openUnsafe,
    openResumable: open,
    answer: () => Effect.succeed(undefined),
    count: () => seen.sessionsOpen
  })
}

/** The tiers' own calls are tested against a whole node, `tiers.test.ts`. */
const untiered = new Overloaded({ bound: "warmsMax", retryAfterMillis: 1_000 })
const noPromoter: Promoter["Service"] = {
  state: Effect.fail(untiered),
  warm: () => Effect.fail(untiered),
  events: () => Stream.fail(untiered)
}

/** Subscriptions are tested against a whole node, `subscriptions.test.ts` and `resume.test.ts`. */
const unsubscribed = new Overloaded({ bound: "subscriptionsMax", retryAfterMillis: 1_000 })
const noSubscriptions: Subscriptions["Service"] = {
  subscribe: () => Effect.fail(unsubscribed),
  follow: () => Effect.fail(unsubscribed),
  count: () => 0
}

const product = (a: Float32Array, b: Float32Array): number =>
  a.reduce((sum, value, i) => sum + value * (b[i] as number), 0)

const bulkyAnswer = (queryId: string): SearchAnswer => ({
  queryId,
  ids: Array.from({ length: 10 }, (_, i) => `b${i}`),
  scores: new Float32Array(10),
  metadata: Array.from({ length: 10 }, () => JSON.stringify({ text: "x".repeat(9_989) })),
  dimensions: 1,
  missing: [],
  tookMillis: 0.25
})
