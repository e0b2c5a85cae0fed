/** Searches over gRPC, as frames made beforehand on one HTTP/2 connection: a call each, or all on one bidirectional call. */
import { type ClientHttp2Session, type ClientHttp2Stream, connect, constants } from "node:http2"
import protobuf from "protobufjs"
import { filterOf, truthK } from "./truth.ts"
import type { SearchOptions, Wire } from "./wires.ts"
import { vectorOf } from "./words.ts"

const root = protobuf.loadSync(new URL("../proto/ruvector/v1/vector_search.proto", import.meta.url).pathname)
const request = root.lookupType("ruvector.v1.SearchRequest")
const result = root.lookupType("ruvector.v1.SearchResult")

interface Result {
  readonly vectorId: string
  readonly requestId: string
  readonly summary: { readonly error: { readonly message: string } | null } | null
}

const service = "/ruvector.v1.VectorSearch/"

/** One `StreamSearch` a search. */
export const openGrpc = async (options: SearchOptions): Promise<Wire> => {
  const { queries, onFailure } = options
  const session = await openSession(options.url, onFailure)
  const frames = queries.words.map((_, query) => frameOf(messageOf(options, query)))
  const answers = new Array<Buffer | undefined>(frames.length)
  return {
    ask: (_, query, onAnswer) => {
      const stream = openStream(session, "StreamSearch", onFailure)
      const chunks: Array<Buffer> = []
      stream.on("data", (chunk: Buffer) => chunks.push(chunk))
      stream.on("trailers", (trailers) => {
        if (trailers["grpc-status"] !== "0") onFailure(new Error(`a call ended with ${JSON.stringify(trailers)}`))
      })
      stream.on("close", () => {
        answers[query] = Buffer.concat(chunks)
        onAnswer()
      })
      stream.end(frames[query])
    },
    answers: () => answers.map((answer) => answer && [...resultsIn(answer)].map(({ vectorId }) => vectorId)),
    close: () => session.destroy()
  }
}

/** All on one `BidirectionalSearch`, where a request is known by its lane: the same query may be under way on two. */
export const openGrpcSession = async (options: SearchOptions): Promise<Wire> => {
  const { queries, lanes, onFailure } = options
  const session = await openSession(options.url, onFailure)
  const messages = queries.words.map((_, query) => messageOf(options, query))
  const ids = Array.from({ length: lanes }, (_, lane) => Buffer.from(request.encode({ requestId: `${lane}` }).finish()))
  const answers = new Array<Array<string> | undefined>(messages.length)
  const waiting = new Map<string, { readonly query: number; readonly found: Array<string>; onAnswer: () => void }>()
  const stream = openStream(session, "BidirectionalSearch", onFailure)
  let rest: Buffer | undefined
  stream.on("data", (chunk: Buffer) => {
    const bytes = rest === undefined ? chunk : Buffer.concat([rest, chunk])
    let at = 0
    for (; bytes.length - at >= 5; ) {
      const end = at + 5 + bytes.readUInt32BE(at + 1)
      if (end > bytes.length) break
      const { vectorId, requestId, summary } = result.decode(bytes.subarray(at + 5, end)) as unknown as Result
      at = end
      const asked = waiting.get(requestId)
      if (asked === undefined) return onFailure(new Error(`an answer to ${requestId}, which was not asked`))
      if (summary === null) {
        asked.found.push(vectorId)
        continue
      }
      if (summary.error !== null) return onFailure(new Error(`a search failed: ${summary.error.message}`))
      waiting.delete(requestId)
      answers[asked.query] = asked.found
      asked.onAnswer()
    }
    rest = at === bytes.length ? undefined : bytes.subarray(at)
  })
  return {
    ask: (lane, query, onAnswer) => {
      waiting.set(String(lane), { query, found: [], onAnswer })
      stream.write(frameOf(messages[query] as Buffer, ids[lane] as Buffer))
    },
    answers: () => answers,
    close: () => session.destroy()
  }
}

const openSession = (url: URL, onFailure: (error: Error) => void): Promise<ClientHttp2Session> =>
  new Promise((resolve, reject) => {
    const session = connect(url.href, { settings: { initialWindowSize: 1_048_576 } })
    session.once("error", reject)
    session.once("remoteSettings", () => {
      session.off("error", reject)
      session.on("error", onFailure)
      resolve(session)
    })
  })

const openStream = (
  session: ClientHttp2Session,
  method: string,
  onFailure: (error: Error) => void
): ClientHttp2Stream => {
  const stream = session.request({
    [constants.HTTP2_HEADER_METHOD]: "POST",
    [constants.HTTP2_HEADER_PATH]: service + method,
    "content-type": "application/grpc",
    te: "trailers"
  })
  stream.on("error", onFailure)
  return stream
}

const messageOf = ({ queries, ef, filter }: SearchOptions, query: number): Buffer =>
  Buffer.from(
    request
      .encode({
        query: vectorOf(queries, query),
        k: truthK,
        ...(ef === undefined ? {} : { ef }),
        ...(filter === undefined ? {} : { filter: JSON.stringify(filterOf(filter, query)) })
      })
      .finish()
  )

/** A message of so many parts, each some of its fields. */
const frameOf = (...parts: ReadonlyArray<Buffer>): Buffer => {
  const head = Buffer.alloc(5)
  head.writeUInt32BE(
    parts.reduce((bytes, part) => bytes + part.length, 0),
    1
  )
  return Buffer.concat([head, ...parts])
}

const resultsIn = function* (bytes: Buffer): Generator<Result> {
  for (let at = 0; at < bytes.length; ) {
    const end = at + 5 + bytes.readUInt32BE(at + 1)
    yield result.decode(bytes.subarray(at + 5, end)) as unknown as Result
    at = end
  }
}
