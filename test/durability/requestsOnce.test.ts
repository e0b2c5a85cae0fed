/**
 * `kill -9` in the middle of keyed writes over every wire that writes. What was under way is made again under its key once
 * somebody else has changed the records: if it had happened, it is answered as done and changes nothing; else it happens.
 */
import { assert, describe, it } from "@effect/vitest"
import { Effect, Exit, Layer, Scope } from "effect"
import { FetchHttpClient } from "effect/http"
import { RpcClient, RpcSerialization } from "effect/rpc"
import { RuvectorRpcs } from "../../src/protocol/Rpcs.ts"
import { type Random, seeded, seedOf } from "../support/Seeded.ts"
import { ready, type ServerProcess, startServer, withDirectory } from "../support/ServerProcess.ts"

const kills = 4
const dimensions = 4
const idsOfEach = 6

/** One write; `state` is what it leaves in the metadata of the records. */
interface Request {
  readonly key: string
  readonly kind: "insert" | "patch" | "delete"
  readonly ids: ReadonlyArray<string>
  readonly state: number
}

type Answer = { readonly count: number } | { readonly version: string }

/** A connection to one server. Rejects where that is lost; then nobody knows what became of the request. */
interface Wire {
  readonly send: (request: Request) => Promise<Answer>
  readonly close: () => Promise<void>
}

const overHttp = async ({ base }: ServerProcess): Promise<Wire> => ({
  send: async ({ key, kind, ids, state }) => {
    const [method, path, body] =
      kind === "insert"
        ? ["POST", "insert", { vectors: ids.map((id) => ({ id, vector: vectorOf(state), metadata: { state } })) }]
        : kind === "patch"
          ? ["PATCH", `vectors/${ids[0]}`, { metadata: { state } }]
          : ["POST", "delete", { ids }]
    const response = await fetch(`${base}/api/v1/${path}`, {
      method: method as string,
      headers: { "content-type": "application/json", "idempotency-key": key },
      body: JSON.stringify(body)
    })
    const answer = (await response.json()) as { inserted?: number; deleted?: number; version?: string }
    if (!response.ok) throw new Error(`${response.status}: ${JSON.stringify(answer)}`)
    return answer.version === undefined
      ? { count: Number(answer.inserted ?? answer.deleted) }
      : { version: answer.version }
  },
  close: async () => {}
})

/** Only inserts go over a WebSocket. */
const overWebSocket = async ({ base }: ServerProcess): Promise<Wire> => {
  const socket = new WebSocket(`${base.replace("http", "ws")}/api/v1/ws`)
  const waiting = new Map<string, { resolve: (answer: Answer) => void; reject: (error: Error) => void }>()
  socket.onmessage = ({ data }) => {
    const event = JSON.parse(String(data)) as { id: string; event: string; inserted: number }
    const pending = waiting.get(event.id)
    waiting.delete(event.id)
    if (event.event === "inserted") pending?.resolve({ count: event.inserted })
    else pending?.reject(new Error(String(data)))
  }
  socket.onclose = () => {
    for (const { reject } of waiting.values()) reject(new Error("the connection is lost"))
  }
  await new Promise((resolve) => {
    socket.onopen = resolve
  })
  let sent = 0
  return {
    send: ({ key, ids, state }) =>
      new Promise((resolve, reject) => {
        if (socket.readyState !== WebSocket.OPEN) return reject(new Error("the connection is lost"))
        const id = String(sent++)
        waiting.set(id, { resolve, reject })
        const vectors = ids.map((id) => ({ id, vector: vectorOf(state), metadata: { state } }))
        socket.send(JSON.stringify({ type: "insert", id, vectors, idempotency_key: key }))
      }),
    close: async () => socket.close()
  }
}

const overRpc = async ({ base }: ServerProcess): Promise<Wire> => {
  const scope = await Effect.runPromise(Scope.make())
  const protocol = RpcClient.layerProtocolHttp({ url: `${base}/api/v1/rpc` }).pipe(
    Layer.provide([FetchHttpClient.layer, RpcSerialization.layerSchemaBinary()])
  )
  const client = await Effect.runPromise(
    RpcClient.make(RuvectorRpcs).pipe(
      Effect.provide(await Effect.runPromise(Layer.buildWithScope(protocol, scope))),
      Scope.provide(scope)
    )
  )
  return {
    send: ({ key: idempotency_key, kind, ids, state }) => {
      const metadata = JSON.stringify({ state })
      const asked: Effect.Effect<Answer, unknown> =
        kind === "insert"
          ? Effect.map(
              client.Insert({
                vectors: ids.map((id) => ({ id, vector: Float32Array.from(vectorOf(state)), metadata })),
                idempotency_key
              }),
              ({ inserted }) => ({ count: inserted })
            )
          : kind === "patch"
            ? client.UpdateMetadata({ id: ids[0] as string, metadata, idempotency_key })
            : Effect.map(client.Delete({ ids, idempotency_key }), ({ deleted }) => ({ count: deleted }))
      return Effect.runPromise(
        Effect.map(asked, (answer) => ("version" in answer ? { version: answer.version } : answer))
      )
    },
    close: () => Effect.runPromise(Scope.close(scope, Exit.void))
  }
}

const wires = { http: overHttp, webSocket: overWebSocket, rpc: overRpc }
type WireName = keyof typeof wires

/** What a writer knows of its own records. */
interface Writer {
  readonly wire: WireName
  readonly records: Map<string, number>
  readonly answered: Array<{ readonly request: Request; readonly answer: Answer }>
  underWay: Request | undefined
}

describe("keyed writes and kill -9", () => {
  it(`${kills} times, over HTTP, WebSocket and RPC: each is done once`, { timeout: 120_000 }, () =>
    withDirectory((directory) =>
      seeded(seedOf(20_261_126), async (source) => {
        const writers = (Object.keys(wires) as Array<WireName>).map(
          (wire): Writer => ({ wire, records: new Map(), answered: [], underWay: undefined })
        )
        const counter = { value: 0 }
        let cut = 0
        for (let round = 0; round <= kills; round++) {
          const server = await startServer(directory, ["--snapshot-ops", "100"])
          await ready(server.base)
          for (const writer of writers) {
            const wire = await wires[writer.wire](server)
            const request = writer.underWay
            if (request !== undefined) {
              cut += 1
              await makeAgain(server, wire, writer, request, counter)
            }
            // Of those that were answered some are made again, and change nothing.
            for (let i = 0; i < 5 && writer.answered.length > 0; i++) {
              const { request, answer } = source.pick(writer.answered)
              assert.deepStrictEqual(await wire.send(request), answer, `${writer.wire} ${JSON.stringify(request)}`)
            }
            await verify(server, writer)
            await wire.close()
          }
          if (round === kills) {
            assert.strictEqual(await server.stop("SIGTERM"), 0)
            break
          }
          const load = Promise.all(writers.map((writer) => write(server, writer, counter, source)))
          await new Promise((resolve) => setTimeout(resolve, 50 + source.below(250)))
          await server.stop("SIGKILL")
          await load
        }
        const answered = writers.map(({ answered }) => answered.length)
        for (const count of answered) assert.isAbove(count, kills, "each wire has written")
        assert.isAbove(cut, kills, "writes were under way")
      })
    )
  )
})

const requestOf = (writer: Writer, counter: { value: number }, source: Random): Request => {
  const state = ++counter.value
  const key = `${writer.wire} ${state}`
  const all = Array.from({ length: idsOfEach }, (_, i) => `${writer.wire}-${i}`)
  const first = source.below(idsOfEach - 2)
  const some = all.slice(first, first + 3)
  const there = [...writer.records.keys()]
  const kind = writer.wire === "webSocket" ? "insert" : source.pick(["insert", "insert", "patch", "delete"] as const)
  if (kind === "patch" && there.length > 0) return { key, kind, ids: [source.pick(there)], state }
  return { key, kind: kind === "patch" ? "insert" : kind, ids: some, state }
}

/** Writes until the server is gone. */
const write = async (server: ServerProcess, writer: Writer, counter: { value: number }, source: Random) => {
  const wire = await wires[writer.wire](server)
  try {
    // Deleting needs a collection.
    for (let first = writer.records.size === 0; ; first = false) {
      const request = requestOf(writer, counter, source)
      if (first && request.kind !== "insert") continue
      writer.underWay = request
      const answer = await wire.send(request).catch(() => undefined)
      if (answer === undefined) return
      note(writer, request)
      writer.answered.push({ request, answer })
      writer.underWay = undefined
    }
  } finally {
    await wire.close()
  }
}

const note = ({ records }: Writer, { kind, ids, state }: Request) => {
  for (const id of ids) {
    if (kind === "delete") records.delete(id)
    else records.set(id, state)
  }
}

/** Makes a request again that may have happened before the server was killed. */
const makeAgain = async (
  server: ServerProcess,
  wire: Wire,
  writer: Writer,
  request: Request,
  counter: { value: number }
): Promise<void> => {
  const { records } = writer
  const found = await Promise.all(request.ids.map((id) => stateOf(server, id)))
  const before = request.ids.map((id) => records.get(id))
  const isDone = found.every((state) => state === (request.kind === "delete" ? undefined : request.state))
  const isThere = before.some((state) => state !== undefined)
  // Where there was nothing to delete nothing tells.
  const isKnown = request.kind !== "delete" || isThere
  if (!isDone) assert.deepStrictEqual(found, before, `half of ${JSON.stringify(request)}`)
  // Somebody else changes the records meanwhile, without a key.
  const other: Request = { key: `other ${counter.value + 1}`, kind: "insert", ids: request.ids, state: ++counter.value }
  await (await overHttp(server)).send(other)
  note(writer, other)
  const answer = await wire.send(request)
  if ("count" in answer && request.kind === "insert") assert.strictEqual(answer.count, request.ids.length)
  if ("count" in answer && request.kind === "delete" && isKnown) {
    const there = isDone ? before : request.ids
    assert.strictEqual(answer.count, there.filter((state) => state !== undefined).length)
  }
  if (isKnown) {
    if (!isDone) note(writer, request)
    await verify(server, writer)
  } else {
    for (const id of request.ids) {
      const state = await stateOf(server, id)
      if (state === undefined) records.delete(id)
    }
  }
  writer.answered.push({ request, answer })
  writer.underWay = undefined
}

const vectorOf = (state: number): Array<number> => Array.from({ length: dimensions }, (_, i) => state + i + 1)

const verify = async (server: ServerProcess, { wire, records }: Writer) => {
  for (let i = 0; i < idsOfEach; i++) {
    const id = `${wire}-${i}`
    assert.strictEqual(await stateOf(server, id), records.get(id), id)
  }
}

const stateOf = async (server: ServerProcess, id: string): Promise<number | undefined> => {
  const response = await fetch(`${server.base}/api/v1/embed/${id}`)
  const body = (await response.json()) as { metadata: { state: number } }
  if (response.status === 404) return undefined
  assert.strictEqual(response.status, 200)
  return body.metadata.state
}
