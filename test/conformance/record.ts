/**
 * Records exchanges on every wire into `vectors/`, against a node of its own. Run after a wire has got something new; what
 * was recorded before stays as it is, being what clients that are out there do. `npm run format` afterwards.
 *
 *   node scripts/run.mjs test/conformance/record.ts [--again NAME]
 */
import { existsSync, writeFileSync } from "node:fs"
import { parseArgs } from "node:util"
import { startNode } from "../support/Node.ts"
import { binaryFrame } from "../support/Streams.ts"
import { binaryMessage, binaryRequest, type Exchange, play, type ScriptStep, type Step } from "./Exchange.ts"
import { prepare } from "./prepare.ts"

type Script = Pick<Exchange, "name" | "wire" | "path"> & { readonly steps: ReadonlyArray<ScriptStep> }

const get = (path: string, headers = ""): ScriptStep => ({
  send: `GET ${path} HTTP/1.1\r\nhost: localhost\r\naccept: text/event-stream\r\n${headers}\r\n`
})
const post = (path: string, body: object): ScriptStep => {
  const text = JSON.stringify(body)
  return {
    send: `POST ${path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: ${text.length}\r\n\r\n${text}`
  }
}
const frame = (of: object): ScriptStep => ({ send: JSON.stringify(of) })
const line = (of: object): ScriptStep => ({ send: `${JSON.stringify(of)}\n` })
const request = (id: string, tag: string, payload: object): ScriptStep =>
  line({ _tag: "Request", id, tag, payload, headers: [] })
const answers = (count: number): ScriptStep => ({ answers: count })
const change = (id: string, vector: ReadonlyArray<number>): ScriptStep => ({
  write: "POST /api/v1/insert",
  body: { collection: "conf", vectors: [{ id, vector, metadata: { n: 1 } }] }
})
const removal = (id: string): ScriptStep => ({
  write: "POST /api/v1/delete",
  body: { collection: "conf", ids: [id] }
})

const b64 = Buffer.from(Float32Array.of(1, 0).buffer).toString("base64url")
const bytes = Buffer.from(Float32Array.of(1, 0).buffer).toString("base64")
const query = Float32Array.of(1, 0)
const followed = "/api/v1/stream/changes?collection=conf"
const subscribed = `/api/v1/stream/subscribe?collection=conf&query_b64=${b64}&k=3&min_score=0.1&include=metadata`
const searched = `/api/v1/stream/search?collection=conf&query_b64=${b64}&k=2&include=metadata,vector`

const rpcs = (path: string, name: string): Script => ({
  name,
  wire: "rpc-ndjson",
  path,
  steps: [
    request("1", "Search", { collection: "conf", query: bytes, k: 2, include_metadata: true, include_vector: true }),
    answers(1),
    request("2", "SearchStream", { collection: "conf", query_vector_id: "a", k: 2 }),
    answers(1),
    line({ _tag: "Ack", requestId: "2" }),
    answers(1),
    request("3", "Get", { collection: "nowhere", id: "a" }),
    answers(1),
    request("4", "Insert", { collection: "conf", vectors: [{ id: "x", vector: bytes, metadata: '{"n":1}' }] }),
    answers(1),
    request("5", "Delete", { collection: "conf", ids: ["x"] }),
    answers(1),
    request("6", "Subscribe", { collection: "conf", query: bytes, k: 3, min_score: 0.1, include_metadata: true }),
    answers(1),
    line({ _tag: "Ack", requestId: "6" }),
    change("c", [1, 0.2]),
    answers(1),
    line({ _tag: "Interrupt", requestId: "6" }),
    answers(1),
    removal("c"),
    request("7", "Subscribe", {
      collection: "conf",
      query: bytes,
      k: 3,
      min_score: 0.1,
      include_metadata: true,
      cursor: "{{cursor}}"
    }),
    answers(1),
    request("8", "Changes", { collection: "conf" }),
    answers(1),
    line({ _tag: "Ack", requestId: "8" }),
    change("d", [0, 1]),
    answers(1),
    removal("d"),
    line({ _tag: "Ping" }),
    answers(1)
  ]
})

const scripts: ReadonlyArray<Script> = [
  {
    name: "http-search",
    wire: "http",
    path: "",
    steps: [
      post("/api/v1/search", { collection: "conf", query: [1, 0], k: 2, include: ["metadata", "vector"] }),
      answers(2),
      post("/api/v1/search", { collection: "conf", query: [1, 0, 0], k: 2 }),
      answers(2),
      get("/api/v1/search?collection=conf&query_vector_id=a&k=2"),
      answers(2),
      get("/api/v1/embed/a?collection=conf"),
      answers(2),
      get("/api/v1/embed/nobody?collection=conf"),
      answers(2)
    ]
  },
  {
    name: "sse-search",
    wire: "http",
    path: "",
    steps: [
      get(`${searched}&keep_open=true`),
      answers(5),
      get(searched, "last-event-id: s_1.q_1.0\r\n"),
      answers(5),
      get("/api/v1/stream/search?collection=conf"),
      answers(2)
    ]
  },
  {
    name: "sse-subscribe",
    wire: "http",
    path: "",
    steps: [
      get(subscribed),
      answers(2),
      change("c", [1, 0.2]),
      answers(1),
      change("c", [1, 0.3]),
      answers(1),
      removal("c"),
      get(subscribed, "last-event-id: {{cursor}}\r\n"),
      answers(2),
      get(`${subscribed}&cursor={{cursor}}`),
      answers(2),
      get(`${subscribed}&policy=close&cursor=AAAA`),
      answers(2)
    ]
  },
  {
    name: "sse-changes",
    wire: "http",
    path: "",
    steps: [
      get(`${followed}&from=newest`),
      answers(2),
      change("c", [1, 0.2]),
      answers(1),
      removal("c"),
      answers(1),
      change("d", [1, 0.2]),
      { write: "PATCH /api/v1/vectors/d?collection=conf", body: { metadata: { n: 2 } } },
      get(followed, "last-event-id: {{cursor}}\r\n"),
      answers(4),
      removal("d")
    ]
  },
  {
    name: "ws-json",
    wire: "ws",
    path: "/api/v1/ws",
    steps: [
      frame({ type: "search", id: "1", collection: "conf", query: [1, 0], k: 2, include: ["metadata", "vector"] }),
      answers(1),
      frame({ type: "search", id: "2", collection: "conf", query: [1, 0], k: 2, stream: true, session: "s" }),
      answers(4),
      frame({
        type: "insert",
        id: "3",
        collection: "conf",
        vectors: [{ id: "x", vector: [0, 1], metadata: { n: 1 } }]
      }),
      answers(1),
      removal("x"),
      frame({ type: "cancel", id: "4" }),
      answers(1),
      frame({ type: "ping", id: "5" }),
      answers(1),
      frame({ type: "close", session: "s" }),
      answers(1),
      frame({ type: "search", id: "6", collection: "conf", query: [] }),
      answers(1)
    ]
  },
  {
    name: "ws-subscriptions",
    wire: "ws",
    path: "/api/v1/ws",
    steps: [
      frame({
        type: "subscribe",
        id: "q",
        session: "s",
        collection: "conf",
        query: [1, 0],
        k: 3,
        include: ["metadata"]
      }),
      answers(1),
      change("c", [1, 0.2]),
      answers(1),
      frame({ type: "unsubscribe", id: "q", session: "s" }),
      answers(1),
      removal("c"),
      frame({
        type: "resume",
        id: "r",
        collection: "conf",
        query: [1, 0],
        k: 3,
        include: ["metadata"],
        cursor: "{{cursor}}"
      }),
      answers(1),
      frame({ type: "follow", id: "f", session: "f", collection: "conf" }),
      answers(1),
      frame({ type: "unsubscribe", id: "r" }),
      answers(1),
      change("d", [0, 1]),
      answers(1),
      removal("d"),
      answers(1),
      frame({ type: "unsubscribe", id: "f", session: "f" }),
      answers(1),
      frame({ type: "credit", session: "p", events: 1 }),
      frame({ type: "subscribe", id: "p", session: "p", collection: "conf", query: [1, 0], policy: "close" }),
      answers(1),
      change("d", [1, 0.1]),
      answers(1),
      removal("d")
    ]
  },
  {
    name: "ws-binary",
    wire: "ws",
    path: "/api/v1/ws",
    steps: [
      { send: binaryFrame({ type: "search", id: "1", collection: "conf", k: 2 }, [1, 0]) },
      answers(1),
      { send: binaryFrame({ type: "insert", id: "2", collection: "conf", vectors: [{ id: "x" }] }, [0, 1]) },
      answers(1),
      removal("x"),
      { send: binaryFrame({ type: "subscribe", id: "3", collection: "conf", k: 2 }, [1, 0]) },
      answers(1)
    ]
  },
  rpcs("/api/v1/rpc/ws/ndjson", "rpc-ndjson"),
  rpcs("/api/v1/rpc/effect3/ws", "rpc-effect3"),
  {
    name: "rpc-binary",
    wire: "rpc-binary",
    path: "/api/v1/rpc/ws",
    steps: [
      { send: binaryRequest("1", "Search", { collection: "conf", query, k: 2, include_metadata: true }) },
      answers(1),
      { send: binaryRequest("2", "SearchStream", { collection: "conf", query_vector_id: "a", k: 2 }) },
      answers(1),
      { send: binaryMessage({ _tag: "Ack", requestId: "2" }) },
      answers(1),
      { send: binaryRequest("3", "Get", { collection: "nowhere", id: "a" }) },
      answers(1),
      { send: binaryRequest("4", "Insert", { collection: "conf", vectors: [{ id: "x", vector: query }] }) },
      answers(1),
      removal("x"),
      { send: binaryRequest("5", "Search", { collection: "conf", query: Float32Array.of(1, 0, 0) }) },
      answers(1),
      { send: binaryRequest("6", "Subscribe", { collection: "conf", query, k: 3, include_metadata: true }) },
      answers(1),
      { send: binaryMessage({ _tag: "Ack", requestId: "6" }) },
      change("c", [1, 0.2]),
      answers(1),
      { send: binaryMessage({ _tag: "Interrupt", requestId: "6" }) },
      answers(1),
      { send: binaryRequest("7", "Changes", { collection: "conf" }) },
      answers(1),
      { send: binaryMessage({ _tag: "Ack", requestId: "7" }) },
      removal("c"),
      answers(1)
    ]
  }
]

const { values } = parseArgs({ options: { again: { type: "string", multiple: true, default: [] } } })

for (const { steps, ...exchange } of scripts) {
  const file = new URL(`./vectors/${exchange.name}.json`, import.meta.url)
  if (existsSync(file) && !values.again.includes(exchange.name)) continue
  const node = await startNode()
  try {
    await prepare(node.base)
    const came = [...(await play(node.base, exchange, steps))]
    const recorded = steps.map((step): Step => {
      if ("answers" in step) {
        const { answers, raw } = came.shift() as (typeof came)[number]
        return { answers, ...(exchange.wire === "rpc-binary" ? { raw } : {}) }
      }
      if ("write" in step) return step
      if (typeof step.send === "string") return { send: step.send }
      return { send: step.send.toString("base64"), isBinary: true }
    })
    writeFileSync(file, `${JSON.stringify({ ...exchange, steps: recorded }, null, 1)}\n`)
    process.stdout.write(`recorded ${exchange.name}\n`)
  } finally {
    await node.stop()
  }
}
