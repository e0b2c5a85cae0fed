/**
 * Who may do what, on every wire of a whole node: keys and tokens that are good, and all that are not; tenants that do not
 * see each other; rates; and streams that end with their credential.
 */
import { NodeHttpClient } from "@effect/platform-node"
import { Cause, Context, Effect, Exit, Layer, Stream } from "effect"
import { RpcClient, RpcSerialization } from "effect/rpc"
import { afterAll, assert, beforeAll, describe, it } from "vitest"
import { closeCodes } from "../../src/protocol/Frames.ts"
import { RuvectorRpcs } from "../../src/protocol/Rpcs.ts"
import { metadataOf, outcome, searchClient } from "../support/Grpc.ts"
import { type RunningNode, startNode } from "../support/Node.ts"
import { type Event, SocketClient } from "../support/Streams.ts"
import { startIssuer, type TokenIssuer } from "../support/TokenIssuer.ts"

let node: RunningNode
let issuer: TokenIssuer
const logged: Array<string> = []
/** Every credential that was made or shown: none may be in a log. */
const secrets: Array<string> = []

const keyRefreshMillis = 600
/** NOT_FOUND */
const notFoundOfGrpc = 5
const unshed = { shedUserRate: 100_000, shedPercent: 0 }

beforeAll(async () => {
  issuer = await startIssuer()
  node = await startNode(
    {
      jwtIssuer: issuer.issuer,
      jwtAudience: issuer.audience,
      jwtJwks: issuer.jwks,
      jwtClockToleranceSeconds: 0,
      jwksCooldownMillis: 100,
      keyRefreshMillis,
      // This machine may be busy with other tests: that is not what is tested here.
      ...unshed,
      keyRate: 0,
      addressRate: 0,
      refusalsPerMinute: 100_000
    },
    logged
  )
})
afterAll(async () => {
  await node?.stop()
  await issuer?.close()
})

interface Answer {
  readonly status: number
  readonly headers: Headers
  // biome-ignore lint/suspicious/noExplicitAny: bodies of many shapes, looked at field by field
  readonly body: any
}

const call = async (
  credential: string | undefined,
  method: string,
  path: string,
  body?: unknown,
  headers: Record<string, string> = {},
  base = node.base
): Promise<Answer> => {
  const response = await fetch(`${base}${path}`, {
    method,
    headers: {
      ...(credential === undefined ? {} : { authorization: `Bearer ${credential}` }),
      ...(body === undefined ? {} : { "content-type": "application/json" }),
      ...headers
    },
    ...(body === undefined ? {} : { body: JSON.stringify(body) })
  })
  const text = await response.text()
  const isJson = response.headers.get("content-type")?.includes("json") ?? false
  return { status: response.status, headers: response.headers, body: isJson && text !== "" ? JSON.parse(text) : text }
}

/** Makes a key, as the operator on this machine. */
const makeKey = async (wanted: Record<string, unknown>, base = node.base, by?: string) => {
  const made = await call(by, "POST", "/api/v1/keys", { name: "a test's", ...wanted }, {}, base)
  assert.strictEqual(made.status, 201, JSON.stringify(made.body))
  secrets.push((made.body.key as string).split("_").slice(2).join("_"))
  return made.body as { readonly key: string; readonly id: string }
}

const all = ["read", "write", "admin"]
const point = (id: string) => ({ id, vector: [1, 0], metadata: { id } })

const insert = (credential: string | undefined, collection: string, ids: ReadonlyArray<string>) =>
  call(credential, "POST", "/api/v1/insert", { collection, vectors: ids.map(point) })
const search = (credential: string | undefined, collection: string) =>
  call(credential, "POST", "/api/v1/search", { collection, query: [1, 0], k: 5 })
const collectionOf = (credential: string, name: string) =>
  call(credential, "PUT", `/api/v1/collections/${name}`, { dimensions: 2 })

/** The first block of an event stream, which then is cut. */
const firstEvent = async (path: string, headers: Record<string, string> = {}) => {
  const cut = new AbortController()
  const response = await fetch(`${node.base}${path}`, { headers, signal: cut.signal })
  const reader = response.body?.getReader()
  const text = new TextDecoder().decode((await reader?.read())?.value)
  cut.abort()
  return { status: response.status, text }
}

const rpc = <A>(
  credential: string | undefined,
  use: (client: RpcClient.FromGroup<typeof RuvectorRpcs, unknown>) => Effect.Effect<A, unknown>
): Promise<Exit.Exit<A, unknown>> =>
  Effect.runPromise(
    Effect.exit(
      Effect.scoped(
        Effect.gen(function* () {
          const context = yield* Layer.build(
            RpcClient.layerProtocolHttp({ url: `${node.base}/api/v1/rpc` }).pipe(
              Layer.provide(RpcSerialization.layerNdjson),
              Layer.provide(NodeHttpClient.layerNodeHttp)
            )
          )
          const client = yield* Effect.provideContext(
            RpcClient.make(RuvectorRpcs),
            Context.merge(context, yield* Effect.context<never>()) as Context.Context<never>
          )
          const headers = credential === undefined ? {} : { authorization: `Bearer ${credential}` }
          return yield* RpcClient.withHeaders(use(client as never), headers)
        }) as Effect.Effect<A, unknown, never>
      )
    )
  )

const failureOf = (exit: Exit.Exit<unknown, unknown>) => {
  assert.isTrue(Exit.isFailure(exit))
  const error = Exit.isFailure(exit) ? Cause.findErrorOption(exit.cause) : undefined
  return error?._tag === "Some" ? (error.value as { readonly _tag: string; readonly collection?: string }) : undefined
}

describe("a key", () => {
  it("is told once, is kept as a hash, and may do what its scopes say, wherever it stands", async () => {
    const writer = await makeKey({ tenant: "scopes", scopes: ["read", "write"] })
    const reader = await makeKey({ tenant: "scopes", scopes: ["read"] })
    assert.strictEqual((await collectionOf(writer.key, "docs")).status, 201)
    assert.strictEqual((await insert(writer.key, "docs", ["a"])).status, 200)
    assert.strictEqual((await search(reader.key, "docs")).body.total_results, 1)
    const byHeader = await call(undefined, "GET", "/api/v1/collections", undefined, { "x-api-key": reader.key })
    assert.deepStrictEqual(
      byHeader.body.collections.map(({ name }: { name: string }) => name),
      ["docs"]
    )

    const refused = await insert(reader.key, "docs", ["b"])
    assert.deepStrictEqual([refused.status, refused.body.code, refused.body.expected], [403, "forbidden", "write"])
    assert.include(refused.headers.get("www-authenticate") ?? "", 'error="insufficient_scope"')
    for (const [method, path] of [
      ["DELETE", "/api/v1/collections/docs"],
      ["GET", "/api/v1/keys"],
      ["GET", "/api/v1/tiers"],
      ["GET", "/metrics"],
      ["GET", "/api/v1/load"],
      ["GET", "/api/v1/load/events"]
    ] as const) {
      assert.strictEqual((await call(writer.key, method, path)).status, 403, path)
    }
    assert.strictEqual((await search(reader.key, "docs")).body.total_results, 1)

    const listed = await call(undefined, "GET", "/api/v1/keys")
    const told = listed.body.keys.find(({ id }: { id: string }) => id === reader.id)
    assert.deepStrictEqual([told.tenant, told.scopes, told.tier], ["scopes", ["read"], "standard"])
    assert.notInclude(JSON.stringify(listed.body), "hash")
  })

  it("that is unknown, wrong, cut, given twice or past its end is refused, and none of it says more than another", async () => {
    const good = await makeKey({ tenant: "wrong", scopes: ["read"], expires_ms: Date.now() + 1_000 })
    assert.strictEqual((await call(good.key, "GET", "/api/v1/collections")).status, 200)
    const wrongSecret = `${good.key.slice(0, -2)}${good.key.endsWith("AA") ? "BB" : "AA"}`
    const unknownId = `rvk_0000000000000000_${good.key.slice(21)}`
    const bodies = []
    for (const credential of [wrongSecret, unknownId]) {
      const answer = await call(credential, "GET", "/api/v1/collections")
      assert.strictEqual(answer.status, 401)
      assert.include(answer.headers.get("www-authenticate") ?? "", 'Bearer realm="ruvector", error="invalid_token"')
      bodies.push(answer.body)
    }
    assert.deepStrictEqual(bodies[0], bodies[1])
    assert.strictEqual((await call(good.key.slice(0, 30), "GET", "/api/v1/collections")).status, 401)
    const twice = await call(good.key, "GET", "/api/v1/collections", undefined, { "x-api-key": wrongSecret })
    assert.deepStrictEqual([twice.status, twice.body.code], [401, "unauthenticated"])
    const basic = await call(undefined, "GET", "/api/v1/collections", undefined, { authorization: "Basic abc" })
    assert.strictEqual(basic.status, 401)
    await until(async () => (await call(good.key, "GET", "/api/v1/collections")).status === 401)
  })

  it("makes, sees and revokes no more than it may itself", async () => {
    const admin = await makeKey({ tenant: "lords", scopes: all })
    const narrow = await makeKey({ tenant: "lords", scopes: ["read", "admin"], collections: ["one"] })
    const other = await makeKey({ tenant: "serfs", scopes: ["read"] })
    const make = (by: string, wanted: object) => call(by, "POST", "/api/v1/keys", { name: "n", ...wanted })
    assert.strictEqual((await make(admin.key, { tenant: "serfs" })).status, 403)
    assert.strictEqual((await make(narrow.key, { scopes: ["write"], collections: ["one"] })).status, 403)
    assert.strictEqual((await make(narrow.key, { scopes: ["read"] })).status, 403)
    assert.strictEqual((await make(narrow.key, { scopes: ["read"], collections: ["one"] })).status, 201)
    const own = await make(admin.key, {})
    assert.deepStrictEqual([own.status, own.body.tenant, own.body.scopes], [201, "lords", ["read"]])
    const seen = (await call(admin.key, "GET", "/api/v1/keys")).body.keys as Array<{ tenant: string }>
    assert.deepStrictEqual([...new Set(seen.map(({ tenant }) => tenant))], ["lords"])

    const absent = await call(admin.key, "DELETE", "/api/v1/keys/0000000000000000")
    const anothers = await call(admin.key, "DELETE", `/api/v1/keys/${other.id}`)
    assert.deepStrictEqual([absent.status, anothers.status], [404, 404])
    assert.deepStrictEqual(withoutNames(anothers.body, other.id), withoutNames(absent.body, "0000000000000000"))
    assert.strictEqual((await call(other.key, "GET", "/api/v1/collections")).status, 200)
    for (const bad of [{ scopes: ["all"] }, { tenant: "A B" }, { tier: "gold" }, { expires_ms: 5 }, { name: "" }]) {
      assert.strictEqual((await make(admin.key, bad)).status, 400, JSON.stringify(bad))
    }
  })

  it("that is revoked works no more, at once on the node that revoked it", async () => {
    const key = await makeKey({ tenant: "gone", scopes: ["read"] })
    assert.strictEqual((await call(key.key, "GET", "/api/v1/collections")).status, 200)
    assert.strictEqual((await call(undefined, "DELETE", `/api/v1/keys/${key.id}`)).status, 204)
    assert.strictEqual((await call(key.key, "GET", "/api/v1/collections")).status, 401)
    const listed = (await call(undefined, "GET", "/api/v1/keys")).body.keys as Array<{
      id: string
      revoked_ms?: number
    }>
    assert.isNumber(listed.find(({ id }) => id === key.id)?.revoked_ms)
  })

  it("for some collections sees those alone", async () => {
    const whole = await makeKey({ tenant: "part", scopes: all })
    const part = await makeKey({ tenant: "part", scopes: ["read", "write"], collections: ["open"] })
    for (const name of ["open", "closed"]) {
      await collectionOf(whole.key, name)
      await insert(whole.key, name, ["a"])
    }
    assert.strictEqual((await search(part.key, "open")).body.total_results, 1)
    const hidden = await search(part.key, "closed")
    const absent = await search(part.key, "absent")
    assert.deepStrictEqual([hidden.status, absent.status], [404, 404])
    assert.deepStrictEqual(withoutNames(hidden.body, "closed"), withoutNames(absent.body, "absent"))
    const made = [await collectionOf(part.key, "closed"), await collectionOf(part.key, "other")]
    assert.deepStrictEqual(
      made.map(({ status }) => status),
      [403, 403]
    )
    assert.deepStrictEqual(made[0]?.body, made[1]?.body)
    const names = (await call(part.key, "GET", "/api/v1/collections")).body.collections as Array<{ name: string }>
    assert.deepStrictEqual(
      names.map(({ name }) => name),
      ["open"]
    )
  })
})

describe("a token", () => {
  it("of the issuer is good for its tenant and scopes", async () => {
    const token = await issuer.token()
    secrets.push(token)
    assert.strictEqual((await collectionOf(token, "notes")).status, 201)
    assert.strictEqual((await insert(token, "notes", ["a"])).status, 200)
    const key = await makeKey({ tenant: "acme", scopes: ["read"] })
    assert.strictEqual((await search(key.key, "notes")).body.total_results, 1)
    const list = await issuer.token({ scope: ["ruvector:read", "else"], sub: "bob" })
    assert.strictEqual((await search(list, "notes")).status, 200)
    assert.strictEqual((await insert(list, "notes", ["b"])).status, 403)
    const none = await issuer.token({ scope: "profile" })
    assert.strictEqual((await search(none, "notes")).status, 403)
    const narrow = await issuer.token({ collections: ["other"] })
    assert.strictEqual((await search(narrow, "notes")).status, 404)
  })

  it("that is forged, expired, for others, by others or of another algorithm is refused on every wire", async () => {
    const past = Math.trunc(Date.now() / 1_000) - 5
    const bad: Record<string, string> = {
      forged: await issuer.forged(),
      expired: await issuer.token({ exp: past }),
      "not yet": await issuer.token({ nbf: past + 600 }),
      "without end": await issuer.token({ exp: undefined }),
      "wrong audience": await issuer.token({ aud: "another" }),
      "no audience": await issuer.token({ aud: undefined }),
      "wrong issuer": await issuer.token({ iss: "http://127.0.0.1:1/" }),
      "algorithm none": issuer.unsigned(),
      "HS256 with the public key": await issuer.confused(),
      "no tenant": await issuer.token({ tenant: undefined }),
      "a tenant that is none": await issuer.token({ tenant: "../x" }),
      "no subject": await issuer.token({ sub: undefined }),
      nonsense: "abc.def.ghi"
    }
    for (const [what, token] of Object.entries(bad)) {
      secrets.push(token)
      const answer = await search(token, "notes")
      assert.deepStrictEqual([answer.status, answer.body.code], [401, "unauthenticated"], what)
      assert.include(answer.headers.get("www-authenticate") ?? "", 'error="invalid_token"', what)
      assert.notInclude(JSON.stringify(answer.body), token)
      const stream = await call(token, "GET", "/api/v1/stream/search?collection=notes&query_vector_id=a")
      assert.strictEqual(stream.status, 401, what)
      assert.strictEqual(await upgradeStatus({ headers: { authorization: `Bearer ${token}` } }), 401, what)
      const failure = failureOf(await rpc(token, (client) => client.ListCollections()))
      assert.strictEqual(failure?._tag, "Unauthenticated", what)
    }
  })

  it("is good after the issuer has changed its keys, and its old ones are not", async () => {
    const old = await issuer.token({ sub: "carol" })
    assert.strictEqual((await search(old, "notes")).status, 200)
    await pause(150)
    await issuer.rotate(true)
    assert.strictEqual((await search(await issuer.token(), "notes")).status, 200)
    assert.strictEqual((await search(old, "notes")).status, 200)
    await pause(150)
    await issuer.rotate(false)
    assert.strictEqual((await search(await issuer.token(), "notes")).status, 200)
    assert.strictEqual((await search(old, "notes")).status, 401)
  })

  it("of an unknown key asks the issuer once in a while, not each time", async () => {
    const before = issuer.asked()
    const many = await Promise.all(Array.from({ length: 40 }, async () => search(await issuer.token({}), "notes")))
    assert.isTrue(many.every(({ status }) => status === 200))
    const [head, ...rest] = (await issuer.token()).split(".") as [string, string, string]
    const named = (kid: string) =>
      [
        Buffer.from(JSON.stringify({ ...JSON.parse(Buffer.from(head, "base64url").toString()), kid })).toString(
          "base64url"
        ),
        ...rest
      ].join(".")
    const started = Date.now()
    for (let i = 0; i < 30; i++) assert.strictEqual((await search(named(`x${i}`), "notes")).status, 401)
    assert.isAtMost(issuer.asked() - before, 1 + Math.ceil((Date.now() - started) / 100))
  })

  it("goes on while the issuer is down; before its keys were ever read the answer is 503", async () => {
    const token = await issuer.token({ sub: "dave" })
    issuer.down = true
    try {
      assert.strictEqual((await search(token, "notes")).status, 200)
      const fresh = await startNode({
        jwtIssuer: issuer.issuer,
        jwtAudience: issuer.audience,
        jwtJwks: issuer.jwks,
        jwksCooldownMillis: 100
      })
      try {
        const answer = await call(token, "GET", "/api/v1/collections", undefined, {}, fresh.base)
        assert.deepStrictEqual([answer.status, answer.body.code], [503, "authentication_unavailable"])
        assert.isNotNull(answer.headers.get("retry-after"))
        issuer.down = false
        await until(
          async () => (await call(token, "GET", "/api/v1/collections", undefined, {}, fresh.base)).status === 200
        )
      } finally {
        await fresh.stop()
      }
    } finally {
      issuer.down = false
    }
  })
})

describe("tenants", () => {
  it("have collections of the same name, and see, find and count their own on every wire", async () => {
    const keys: Record<string, string> = {}
    for (const tenant of ["north", "south"]) {
      const { key } = await makeKey({ tenant, scopes: all })
      keys[tenant] = key
      assert.strictEqual((await collectionOf(key, "map")).status, 201)
      const ids = tenant === "north" ? ["n1", "n2"] : ["s1"]
      assert.strictEqual((await insert(key, "map", ids)).status, 200)
    }
    for (const [tenant, ids] of [
      ["north", ["n1", "n2"]],
      ["south", ["s1"]]
    ] as const) {
      const key = keys[tenant] as string
      const asked = { headers: { authorization: `Bearer ${key}` } }
      const found = (body: { results: Array<{ vector_id: string }> }) => body.results.map((one) => one.vector_id).sort()
      assert.deepStrictEqual(found((await search(key, "map")).body), [...ids])
      const byUrl = await call(key, "GET", `/api/v1/search?collection=map&query_vector_id=${ids[0]}`)
      assert.deepStrictEqual(found(byUrl.body), [...ids])
      assert.strictEqual(byUrl.headers.get("cache-control"), "private, max-age=30")
      assert.strictEqual(byUrl.headers.get("vary"), "origin, authorization, x-api-key")
      const info = await call(key, "GET", "/api/v1/collections/map")
      assert.deepStrictEqual([info.body.name, info.body.count], ["map", ids.length])
      const socket = await SocketClient.open(node.base, asked)
      const event = await socket.ask({ type: "search", id: "1", collection: "map", query: [1, 0] })
      assert.deepStrictEqual(found(event as never), [...ids])
      socket.socket.close()
      const listed = await rpc(key, (client) => client.ListCollections())
      assert.deepStrictEqual(Exit.isSuccess(listed) ? listed.value.map(({ name }) => name) : listed, ["map"])
      const tiers = await call(key, "GET", "/api/v1/tiers")
      assert.deepStrictEqual(
        tiers.body.partitions.map((one: { collection: string }) => one.collection),
        ["map"]
      )
    }
    const mine = await call(undefined, "GET", "/api/v1/collections")
    assert.notInclude(JSON.stringify(mine.body), '"map"')
  })

  it("are told of another's collection what they are told of one that is not there, on every wire", async () => {
    const owner = await makeKey({ tenant: "owner", scopes: all })
    const guest = await makeKey({ tenant: "guest", scopes: all })
    await collectionOf(owner.key, "secret")
    await insert(owner.key, "secret", ["a"])
    const absent = "nowhere"
    const wires: Record<string, (name: string) => Promise<unknown>> = {
      search: async (name) => rest(await search(guest.key, name)),
      "search by URL": async (name) =>
        rest(await call(guest.key, "GET", `/api/v1/search?collection=${name}&query_vector_id=a`)),
      "search with a copy": async (name) =>
        rest(
          await call(guest.key, "GET", `/api/v1/search?collection=${name}&query_vector_id=a`, undefined, {
            "if-none-match": 'W/"x", *'
          })
        ),
      embed: async (name) => rest(await call(guest.key, "GET", `/api/v1/embed/a?collection=${name}`)),
      insert: async (name) => rest(await insert(guest.key, name, ["b"])),
      patch: async (name) =>
        rest(await call(guest.key, "PATCH", `/api/v1/vectors/a?collection=${name}`, { metadata: { x: 1 } })),
      delete: async (name) => rest(await call(guest.key, "DELETE", `/api/v1/vectors/a?collection=${name}`)),
      "delete many": async (name) =>
        rest(await call(guest.key, "POST", "/api/v1/delete", { collection: name, ids: ["a"] })),
      read: async (name) => rest(await call(guest.key, "GET", `/api/v1/collections/${name}`)),
      drop: async (name) => rest(await call(guest.key, "DELETE", `/api/v1/collections/${name}`)),
      invalidate: async (name) =>
        rest(await call(guest.key, "POST", `/api/v1/collections/${name}/invalidate`, { scope: "all" })),
      warm: async (name) => rest(await call(guest.key, "POST", "/api/v1/warm", { collection: name, ids: ["a"] })),
      "SSE search": async (name) =>
        rest(await call(guest.key, "GET", `/api/v1/stream/search?collection=${name}&query_vector_id=a`)),
      "SSE subscribe": async (name) =>
        rest(await call(guest.key, "GET", `/api/v1/stream/subscribe?collection=${name}&query_vector_id=a`)),
      "SSE changes": async (name) => rest(await call(guest.key, "GET", `/api/v1/stream/changes?collection=${name}`)),
      ...Object.fromEntries(
        (
          [
            ["search", { query: [1, 0] }],
            ["insert", { vectors: [point("b")] }],
            ["subscribe", { query: [1, 0] }],
            ["follow", {}]
          ] as const
        ).map(([type, frame]) => [
          `WebSocket ${type}`,
          async (name: string) => {
            const socket = await SocketClient.open(node.base, { headers: { "x-api-key": guest.key } })
            const event: Event = await socket.ask({ type, id: "1", collection: name, ...frame })
            socket.socket.close()
            const { query_id: _, ...told } = event
            return told
          }
        ])
      ),
      "RPC Search": async (name) =>
        failureOf(await rpc(guest.key, (c) => c.Search({ collection: name, query: Float32Array.of(1, 0) }))),
      "RPC Get": async (name) => failureOf(await rpc(guest.key, (c) => c.Get({ collection: name, id: "a" }))),
      "RPC Delete": async (name) => failureOf(await rpc(guest.key, (c) => c.Delete({ collection: name, ids: ["a"] }))),
      "RPC SearchStream": async (name) =>
        failureOf(
          await rpc(guest.key, (c) =>
            Stream.runDrain(
              c.SearchStream({ collection: name, query: Float32Array.of(1, 0) }) as Stream.Stream<unknown>
            )
          )
        ),
      "gRPC StreamSearch": async (name) => {
        const client = searchClient(node.port)
        const told = await outcome(
          client.StreamSearch({ collection: name, query: [1, 0] }, metadataOf({ authorization: `Bearer ${guest.key}` }))
        )
        client.close()
        return [told.status.code === notFoundOfGrpc ? "collection_not_found" : told.status.code, told.status.details]
      },
      "RPC Changes": async (name) =>
        failureOf(
          await rpc(guest.key, (c) => Stream.runDrain(c.Changes({ collection: name }) as Stream.Stream<unknown>))
        )
    }
    for (const [wire, ask] of Object.entries(wires)) {
      const anothers = withoutNames(await ask("secret"), "secret")
      assert.deepStrictEqual(anothers, withoutNames(await ask(absent), absent), wire)
      assert.match(JSON.stringify(anothers), /collection_not_found|CollectionNotFound/, wire)
    }
    assert.strictEqual((await search(owner.key, "secret")).body.total_results, 1)
  })

  it("are told of their own partitions and records alone by events of the tiers", async () => {
    const one = await makeKey({ tenant: "watchers", scopes: all })
    const first = await firstEvent("/api/v1/tiers/events", { authorization: `Bearer ${one.key}` })
    assert.deepStrictEqual([first.status, /"event":"following"/.test(first.text)], [200, true])
    const window = await call(one.key, "POST", "/api/v1/warm", { window: { last_minutes: 5 } })
    assert.deepStrictEqual([window.status, window.body.field], [400, "collection"])
  })

  it("do not take up each other's streams", async () => {
    const one = await makeKey({ tenant: "cursors", scopes: all })
    const two = await makeKey({ tenant: "cursors", scopes: all })
    await collectionOf(one.key, "c")
    await insert(one.key, "c", ["a", "b"])
    const path = "/api/v1/stream/subscribe?collection=c&query_vector_id=a"
    const mine = await firstEvent(path, { authorization: `Bearer ${one.key}` })
    const id = /^id: (.+)$/m.exec(mine.text)?.[1] as string
    assert.isString(id)
    const stolen = await call(two.key, "GET", path, undefined, { "last-event-id": id })
    assert.deepStrictEqual([stolen.status, stolen.body.code], [400, "invalid_cursor"])
    const own = await firstEvent(path, { authorization: `Bearer ${one.key}`, "last-event-id": id })
    assert.strictEqual(own.status, 200)
  })
})

describe("where a credential stands", () => {
  it("a browser's WebSocket and EventSource can show one, and it is given back by nobody", async () => {
    const { key } = await makeKey({ tenant: "browser", scopes: ["read"] })
    const places = [
      { query: `?access_token=${key}` },
      { protocols: ["ruvector.v1", `ruvector.bearer.${key}`] },
      { headers: { "x-api-key": key } },
      { headers: { authorization: `Bearer ${key}` } }
    ]
    for (const place of places) {
      const socket = await SocketClient.open(node.base, place)
      const event = await socket.ask({ type: "insert", id: "1", collection: "x", vectors: [point("a")] })
      assert.strictEqual((event["problem"] as { code: string }).code, "forbidden", JSON.stringify(Object.keys(place)))
      assert.notInclude(socket.socket.protocol, key)
      socket.socket.close()
    }
    const stream = await call(undefined, "GET", `/api/v1/stream/changes?access_token=${key}&collection=x`)
    assert.strictEqual(stream.status, 404)
    assert.strictEqual(
      (await call(undefined, "GET", `/api/v1/stream/changes?access_token=no&collection=x`)).status,
      401
    )
    // Where headers can be sent, a URL is no place for one.
    const url = await call(undefined, "GET", `/api/v1/search?access_token=${key}&query_vector_id=a`)
    assert.deepStrictEqual([url.status, url.body.field], [400, "access_token"])
  })
})

describe("what is held open", () => {
  it("is closed with 4001 when its key is revoked, and when it ends", async () => {
    const revoked = await makeKey({ tenant: "open", scopes: all })
    const ending = await makeKey({ tenant: "open", scopes: ["read"], expires_ms: Date.now() + 1_500 })
    const kept = await makeKey({ tenant: "open", scopes: ["read"] })
    await collectionOf(revoked.key, "c")
    await insert(revoked.key, "c", ["a"])
    const open = (key: string) => SocketClient.open(node.base, { headers: { "x-api-key": key } })
    const sockets = await Promise.all([open(revoked.key), open(ending.key), open(kept.key)])
    const streams = await Promise.all(
      [revoked.key, ending.key].map((key) =>
        fetch(`${node.base}/api/v1/stream/subscribe?collection=c&query_vector_id=a`, { headers: { "x-api-key": key } })
      )
    )
    assert.deepStrictEqual(
      streams.map(({ status }) => status),
      [200, 200]
    )
    const texts = streams.map((stream) => stream.text())
    await call(undefined, "DELETE", `/api/v1/keys/${revoked.id}`)
    assert.strictEqual((await sockets[0].closed).code, closeCodes.unauthenticated)
    assert.strictEqual((await sockets[1].closed).code, closeCodes.unauthenticated)
    for (const text of await Promise.all(texts)) assert.match(text, /"code":"unauthenticated"/)
    assert.deepStrictEqual(await sockets[2].ask({ type: "ping", id: "p" }), { event: "pong", id: "p" })
    sockets[2].socket.close()
  })

  it("is closed when its token ends", async () => {
    const token = await issuer.token({ exp: Math.trunc(Date.now() / 1_000) + 2 })
    const socket = await SocketClient.open(node.base, { headers: { authorization: `Bearer ${token}` } })
    assert.deepStrictEqual((await socket.ask({ type: "ping", id: "p" })).event, "pong")
    assert.strictEqual((await socket.closed).code, closeCodes.unauthenticated)
  })
})

describe("rates", () => {
  it("of a key and of an address are limited, with the time to come again; frames are told, not cut", async () => {
    const limited = await startNode({
      ...unshed,
      keyRate: 5,
      keyBurst: 5,
      addressRate: 40,
      addressBurst: 40,
      refusalsPerMinute: 5
    })
    try {
      const first = await makeKey({ tenant: "fast", scopes: ["read"] }, limited.base)
      const ask = (credential: string) => call(credential, "GET", "/api/v1/collections", undefined, {}, limited.base)
      const answers = await Promise.all(Array.from({ length: 20 }, () => ask(first.key)))
      const refused = answers.filter(({ status }) => status === 429)
      assert.isAtLeast(refused.length, 5)
      assert.strictEqual(refused[0]?.body.code, "rate_limited")
      assert.isAtLeast(Number(refused[0]?.headers.get("retry-after")), 1)
      assert.isAbove(refused[0]?.body.retry_after_ms, 0)

      const second = await makeKey({ tenant: "fast", scopes: ["read"] }, limited.base)
      const socket = await SocketClient.open(limited.base, { headers: { "x-api-key": second.key } })
      for (let i = 0; i < 12; i++) socket.send({ type: "search", id: `${i}`, query: [1, 0] })
      const codes: Array<string> = []
      for (let i = 0; i < 12; i++) codes.push(((await socket.next())["problem"] as { code: string }).code)
      assert.include(codes, "rate_limited")
      assert.strictEqual((await socket.ask({ type: "ping", id: "p" })).event, "pong")
      socket.socket.close()

      // Many keys of one address together come to its bound.
      const keys = await Promise.all(Array.from({ length: 15 }, () => makeKey({ scopes: ["read"] }, limited.base)))
      const spread = (
        await Promise.all(keys.map(({ key }) => Promise.all([ask(key), ask(key), ask(key), ask(key)])))
      ).flat()
      assert.isTrue(spread.some(({ status, body }) => status === 429 && body.field === "address"))
      // The user at this machine is not counted.
      const own = await Promise.all(
        Array.from({ length: 60 }, () => call(undefined, "GET", "/api/v1/collections", undefined, {}, limited.base))
      )
      assert.isTrue(own.every(({ status }) => status === 200))

      const guesses = []
      for (let i = 0; i < 10; i++) guesses.push((await ask(`rvk_000000000000000${i}_${"x".repeat(43)}`)).status)
      assert.deepStrictEqual([guesses[0], guesses.at(-1)], [401, 429])
    } finally {
      await limited.stop()
    }
  })
})

describe("without a credential", () => {
  it("nothing is served but health and documents, where that is said", async () => {
    const closed = await startNode({ anonymousAccess: "off" })
    try {
      const status = async (method: string, path: string) =>
        (await call(undefined, method, path, undefined, {}, closed.base)).status
      for (const path of ["/health/live", "/health/ready", "/", "/docs", "/openapi.json"]) {
        assert.strictEqual(await status("GET", path), 200, path)
      }
      for (const path of [
        "/metrics",
        "/api/v1/load",
        "/api/v1/load/events",
        "/api/v1/collections",
        "/api/v1/keys",
        "/api/v1/stream/search?query_vector_id=a",
        "/api/v1/stream/changes",
        "/api/v1/tiers/events",
        "/api/v1/embed/a",
        "/no/such/path"
      ]) {
        const answer = await call(undefined, "GET", path, undefined, {}, closed.base)
        assert.strictEqual(answer.status, 401, path)
        assert.strictEqual(answer.headers.get("www-authenticate"), 'Bearer realm="ruvector"', path)
      }
      assert.strictEqual(await upgradeStatus({}, closed.base), 401)
    } finally {
      await closed.stop()
    }
  })

  it("a node does not listen to other machines unless somebody has a credential, or it is said that nobody needs one", async () => {
    const started = await startNode({ host: "0.0.0.0" }).then(
      async (running) => {
        await running.stop()
        return "started"
      },
      (error: Error) => String(error.message)
    )
    assert.match(started, /keys create/)
    assert.match(started, /--anonymous-access everyone/)
    const open = await startNode({ host: "0.0.0.0", anonymousAccess: "everyone" })
    try {
      assert.strictEqual((await call(undefined, "GET", "/api/v1/collections", undefined, {}, open.base)).status, 200)
      await makeKey({ scopes: all }, open.base)
    } finally {
      await open.stop()
    }
  })
})

it("what was refused is logged: who and why, and no secret", () => {
  const refusals = logged.filter((line) => line.includes('"Refused"'))
  for (const why of [
    "The token's signature is wrong.",
    "The API key was revoked.",
    "which the credential does not have"
  ]) {
    assert.isTrue(
      refusals.some((line) => line.includes(why) && /address|principal/.test(line)),
      why
    )
  }
  const text = logged.join("\n")
  for (const secret of secrets) assert.isFalse(text.includes(secret), "a credential is in the log")
})

const rest = ({ status, body, headers }: Answer) => ({ status, body, cached: headers.get("cache-control") })

/** An answer without the name that was asked for. */
const withoutNames = (answer: unknown, name: string): unknown =>
  JSON.parse(JSON.stringify(answer).replaceAll(name, "<name>"))

const upgradeStatus = (place: Parameters<typeof SocketClient.open>[1], base = node.base): Promise<number> =>
  SocketClient.open(base, place).then(
    (client) => {
      client.socket.close()
      return 101
    },
    (error: Error) => Number(/Unexpected server response: (\d+)/.exec(error.message)?.[1] ?? 0)
  )

const pause = (millis: number) => new Promise((resolve) => setTimeout(resolve, millis))

const until = async (isSo: () => Promise<boolean>): Promise<void> => {
  const end = Date.now() + 15_000
  while (!(await isSo())) {
    if (Date.now() > end) throw new Error("it never came about")
    await pause(50)
  }
}
