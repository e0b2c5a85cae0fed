/**
 * The ways a search reaches a server. Each is opened with a number of lanes, one search in flight on each: over HTTP a
 * lane is a connection, over the others all lanes share one. What is sent is made before anything is timed.
 */
import { WebSocket } from "ws"
import { type Answer, HttpConnection, postJson } from "./HttpConnection.ts"
import { filterOf, type ShareField, truthK } from "./truth.ts"
import { vectorOf, vectorText, type WordVectors } from "./words.ts"

export interface SearchOptions {
  readonly url: URL
  readonly lanes: number
  readonly queries: WordVectors
  readonly ef?: number
  readonly filter?: ShareField
  readonly onFailure: (error: Error) => void
}

export interface Wire {
  /** Sends a query on a free lane, and calls back when its answer is there. */
  readonly ask: (lane: number, query: number, onAnswer: () => void) => void
  /** The newest answer to each query that was asked: ids, nearest first. Read after the measurement. */
  readonly answers: () => Array<ReadonlyArray<string> | undefined>
  readonly close: () => void
}

export const wireNames = ["http", "ws", "ws-binary", "ws-stream", "rpc", "grpc", "grpc-session"] as const

export type WireName = (typeof wireNames)[number]

/** A wire more is a name more and an entry more here. */
export const openWire: Record<WireName, (options: SearchOptions) => Promise<Wire>> = {
  http: async ({ url, lanes, queries, onFailure, ...rest }) => {
    const requests = queries.words.map((_, query) =>
      postJson(url, "/api/v1/search", `{${searchFields(queries, query, rest)}}`)
    )
    const connections = await Promise.all(Array.from({ length: lanes }, () => HttpConnection.open(url, onFailure)))
    const answers = new Array<Answer | undefined>(requests.length)
    return {
      ask: (lane, query, onAnswer) =>
        connections[lane]?.send(requests[query] as Buffer, (answer) => {
          if (answer.status !== 200) onFailure(new Error(`search answered ${answer.status}: ${answer.body}`))
          answers[query] = answer
          onAnswer()
        }),
      answers: () => answers.map((answer) => answer && idsOf(JSON.parse(answer.body.toString()) as SearchResults)),
      close: () => {
        for (const connection of connections) connection.close()
      }
    }
  },

  ws: (options) =>
    overWebSocket(options, false, (query) =>
      Buffer.from(`{"type":"search","id":"${query}",${searchFields(options.queries, query, options)}}`)
    ),

  "ws-binary": (options) =>
    overWebSocket(options, true, (query) => {
      const fields = withoutVector(query, options)
      return binaryFrame(`{"type":"search","id":"${query}",${fields}}`, vectorOf(options.queries, query))
    }),

  "ws-stream": (options) =>
    overWebSocket(options, false, (query) =>
      Buffer.from(`{"type":"search","id":"${query}","stream":true,${searchFields(options.queries, query, options)}}`)
    ),

  // Loaded only here: the other wires need nothing of it.
  grpc: async (options) => (await import("./grpcWire.ts")).openGrpc(options),
  "grpc-session": async (options) => (await import("./grpcWire.ts")).openGrpcSession(options),

  // Loaded only here: the other wires need nothing of Effect.
  rpc: async (options) => (await import("./rpcWire.ts")).openRpc(options)
}

const overWebSocket = async (
  { url, lanes, queries, onFailure }: SearchOptions,
  binary: boolean,
  frameOf: (query: number) => Buffer
): Promise<Wire> => {
  if (lanes > queries.words.length) throw new Error("a query in flight is known by its number: too few for the lanes")
  const frames = queries.words.map((_, query) => frameOf(query))
  const answers = new Array<SearchResults | undefined>(frames.length)
  const waiting = new Map<string, () => void>()
  const streamed = new Map<string, { readonly results: Array<StreamedEvent> }>()
  const socket = await openWebSocket(url)
  socket.on("error", onFailure)
  socket.on("close", (code) => onFailure(new Error(`the server closed the WebSocket with ${code}`)))
  socket.on("message", (data) => {
    const event = JSON.parse(data.toString()) as SearchResults & StreamedEvent
    const onAnswer = waiting.get(event.id)
    if (onAnswer === undefined || !answerEvents.has(event.event)) {
      onFailure(new Error(`not an answer to a search: ${data.toString()}`))
      return
    }
    if (event.event === "search_start") streamed.set(event.id, { results: [] })
    else if (event.event === "result") streamed.get(event.id)?.results.push(event)
    else {
      waiting.delete(event.id)
      answers[Number(event.id)] = event.event === "results" ? event : streamed.get(event.id)
      onAnswer()
    }
  })
  return {
    ask: (_, query, onAnswer) => {
      waiting.set(String(query), onAnswer)
      socket.send(frames[query] as Buffer, { binary })
    },
    answers: () => answers.map((answer) => answer && idsOf(answer)),
    close: () => {
      socket.removeAllListeners("close")
      socket.terminate()
    }
  }
}

/** Length of the JSON, the JSON, zero bytes up to a multiple of four, the vector as little-endian float32. */
const binaryFrame = (json: string, vector: Float32Array): Buffer => {
  const vectorFrom = Math.ceil((4 + Buffer.byteLength(json)) / 4) * 4
  const frame = Buffer.alloc(vectorFrom + vector.byteLength)
  frame.writeUInt32LE(Buffer.byteLength(json))
  frame.write(json, 4)
  for (const [i, component] of vector.entries()) frame.writeFloatLE(component, vectorFrom + i * 4)
  return frame
}

export const openWebSocket = (url: URL): Promise<WebSocket> =>
  new Promise((resolve, reject) => {
    const socket = new WebSocket(new URL("/api/v1/ws", url.href.replace("http", "ws")), { perMessageDeflate: false })
    socket.once("error", reject)
    socket.once("open", () => {
      socket.off("error", reject)
      resolve(socket)
    })
  })

/** What a search says in any JSON form, without its braces. */
export const searchFields = (
  queries: WordVectors,
  query: number,
  options: Pick<SearchOptions, "ef" | "filter">
): string => `"query":${vectorText(queries, query)},${withoutVector(query, options)}`

const withoutVector = (query: number, { ef, filter }: Pick<SearchOptions, "ef" | "filter">): string =>
  `"k":${truthK}` +
  (ef === undefined ? "" : `,"ef":${ef}`) +
  (filter === undefined ? "" : `,"filter":${JSON.stringify(filterOf(filter, query))}`)

const answerEvents = new Set(["results", "search_start", "result", "search_complete"])

interface StreamedEvent {
  readonly event: string
  readonly id: string
  readonly vector_id: string
}

interface SearchResults {
  readonly results: ReadonlyArray<{ readonly vector_id: string }>
}

const idsOf = ({ results }: SearchResults): Array<string> => results.map((result) => result.vector_id)
