/** A gRPC client that is not ours (`@grpc/grpc-js`), and the same wire as raw frames. */
import * as http2 from "node:http2"
import { fileURLToPath } from "node:url"
import * as grpc from "@grpc/grpc-js"
import { loadSync, type PackageDefinition } from "@grpc/proto-loader"

export const protoDirectory = fileURLToPath(new URL("../../proto/", import.meta.url))

export const protoFiles = ["ruvector/v1/vector_search.proto", "grpc/health/v1/health.proto"]

export const definition: PackageDefinition = loadSync(protoFiles, {
  includeDirs: [protoDirectory],
  keepCase: true,
  longs: Number,
  enums: String,
  defaults: true
})

export interface Request {
  query?: ReadonlyArray<number>
  k?: number
  metric?: string
  collection?: string
  query_vector_id?: string
  ef?: number
  filter?: string
  include_metadata?: boolean
  include_vector?: boolean
  deadline_ms?: number
  request_id?: string
  cancel?: boolean
}

export interface SearchError {
  readonly code: number
  readonly message: string
  readonly problem: string
  readonly field: string
  readonly expected: string
  readonly got: string
  readonly retry_after_ms: number
  readonly server_request_id: string
}

export interface Result {
  readonly vector_id: string
  readonly score: number
  readonly metadata: Buffer
  readonly request_id: string
  readonly vector: ReadonlyArray<number>
  readonly summary: {
    readonly query_id: string
    readonly total_results: number
    readonly partial: boolean
    readonly missing_partitions: ReadonlyArray<number>
    readonly took_ms: number
    readonly error: SearchError | null
  } | null
}

export interface SearchClient extends grpc.Client {
  readonly StreamSearch: (
    request: Request,
    metadata?: grpc.Metadata,
    options?: grpc.CallOptions
  ) => grpc.ClientReadableStream<Result>
  readonly BidirectionalSearch: (
    metadata?: grpc.Metadata,
    options?: grpc.CallOptions
  ) => grpc.ClientDuplexStream<Request, Result>
}

interface HealthClient extends grpc.Client {
  readonly Check: (
    request: { readonly service: string },
    callback: (error: grpc.ServiceError | null, response?: { readonly status: string }) => void
  ) => void
  readonly Watch: (request: { readonly service: string }) => grpc.ClientReadableStream<{ readonly status: string }>
}

const clientOf = <A>(service: string, port: number, options: grpc.ClientOptions): A => {
  const made = grpc.makeClientConstructor(definition[service] as grpc.ServiceDefinition, service)
  return new made(`127.0.0.1:${port}`, grpc.credentials.createInsecure(), {
    // A channel of its own, not one shared with another client of this process.
    "grpc.use_local_subchannel_pool": 1,
    ...options
  }) as unknown as A
}

export const searchClient = (port: number, options: grpc.ClientOptions = {}): SearchClient =>
  clientOf("ruvector.v1.VectorSearch", port, options)

export const healthClient = (port: number): HealthClient => clientOf("grpc.health.v1.Health", port, {})

/** Everything a call gives until it ends. */
export const outcome = <A>(
  call: grpc.ClientReadableStream<A>
): Promise<{ readonly messages: Array<A>; readonly status: grpc.StatusObject }> =>
  new Promise((resolve) => {
    const messages: Array<A> = []
    call.on("data", (message: A) => messages.push(message))
    call.on("error", () => {})
    call.on("status", (status: grpc.StatusObject) => resolve({ messages, status }))
  })

export const metadataOf = (fields: Readonly<Record<string, string>>): grpc.Metadata => {
  const metadata = new grpc.Metadata()
  for (const [name, value] of Object.entries(fields)) metadata.set(name, value)
  return metadata
}

/** One message as a frame. */
export const frameOf = (message: Uint8Array, flag = 0): Buffer => {
  const head = Buffer.alloc(5)
  head[0] = flag
  head.writeUInt32BE(message.length, 1)
  return Buffer.concat([head, message])
}

/** A request as the bytes that another implementation makes of it. */
export const requestBytes = (request: Request): Buffer => {
  const service = definition["ruvector.v1.VectorSearch"] as grpc.ServiceDefinition
  return (service["StreamSearch"] as grpc.MethodDefinition<Request, Result>).requestSerialize(request)
}

export const resultOf = (bytes: Buffer): Result => {
  const service = definition["ruvector.v1.VectorSearch"] as grpc.ServiceDefinition
  return (service["StreamSearch"] as grpc.MethodDefinition<Request, Result>).responseDeserialize(bytes)
}

/** The messages of frames that came whole, with their flags. */
export const framesIn = (bytes: Buffer): Array<{ readonly flag: number; readonly message: Buffer }> => {
  const frames: Array<{ flag: number; message: Buffer }> = []
  for (let at = 0; at < bytes.length; ) {
    const end = at + 5 + bytes.readUInt32BE(at + 1)
    frames.push({ flag: bytes[at] as number, message: bytes.subarray(at + 5, end) })
    at = end
  }
  return frames
}

export interface RawAnswer {
  readonly headers: http2.IncomingHttpHeaders & http2.IncomingHttpStatusHeader
  readonly body: Buffer
  readonly trailers: http2.IncomingHttpHeaders
  readonly rstCode: number
}

export const searchPath = "/ruvector.v1.VectorSearch/StreamSearch"
export const bidirectionalPath = "/ruvector.v1.VectorSearch/BidirectionalSearch"

export class RawConnection {
  readonly session: http2.ClientHttp2Session
  readonly port: number

  constructor(port: number, options: http2.ClientSessionOptions = {}) {
    this.port = port
    this.session = http2.connect(`http://127.0.0.1:${port}`, options)
    this.session.on("error", () => {})
  }

  open(path: string, headers: http2.OutgoingHttpHeaders = {}): http2.ClientHttp2Stream {
    const stream = this.session.request({
      ":method": "POST",
      ":path": path,
      "content-type": "application/grpc",
      te: "trailers",
      ...headers
    })
    stream.on("error", () => {})
    return stream
  }

  /** Sends the pieces, a turn of the event loop after another, and waits for the end. */
  async call(path: string, pieces: ReadonlyArray<Buffer>, headers: http2.OutgoingHttpHeaders = {}): Promise<RawAnswer> {
    const stream = this.open(path, headers)
    const answered = answerOf(stream)
    for (const piece of pieces) {
      if (stream.destroyed) break
      stream.write(piece)
      await new Promise((resolve) => setImmediate(resolve))
    }
    stream.end()
    return answered
  }

  close(): void {
    this.session.destroy()
  }
}

export const answerOf = (stream: http2.ClientHttp2Stream): Promise<RawAnswer> =>
  new Promise((resolve) => {
    let headers: RawAnswer["headers"] = {}
    let trailers: http2.IncomingHttpHeaders = {}
    const chunks: Array<Buffer> = []
    stream.on("response", (received) => {
      headers = received
    })
    stream.on("trailers", (received) => {
      trailers = received
    })
    stream.on("data", (chunk: Buffer) => chunks.push(chunk))
    stream.on("close", () => resolve({ headers, body: Buffer.concat(chunks), trailers, rstCode: stream.rstCode ?? 0 }))
  })

/** `grpc-status` where it is: in the trailers, or in the head of an answer without messages. */
export const statusOf = ({ headers, trailers }: RawAnswer): string | undefined =>
  (trailers["grpc-status"] ?? headers["grpc-status"]) as string | undefined
