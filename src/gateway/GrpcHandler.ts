/** What answers the streams of HTTP/2 that are gRPC. The port is built without it where a program leaves it out. */
import type { IncomingHttpHeaders, ServerHttp2Stream } from "node:http2"
import { Context, type Effect } from "effect"

export class GrpcHandler extends Context.Service<
  GrpcHandler,
  {
    /** Called for every stream whose content type is `application/grpc` or begins with it; answers and ends the stream. */
    readonly handleStream: (stream: ServerHttp2Stream, headers: IncomingHttpHeaders) => void
    /** The node goes: new calls are refused as unavailable, standing ones are ended so that their clients go elsewhere. */
    readonly drain: Effect.Effect<void>
  }
>()("ruvector/gateway/GrpcHandler") {}

export const isGrpc = (headers: IncomingHttpHeaders): boolean =>
  headers["content-type"]?.startsWith("application/grpc") ?? false

/** Status codes of gRPC that the port itself answers with. */
export const grpcStatus = { resourceExhausted: 8, unimplemented: 12, unavailable: 14 } as const

/** Answers a call with a status and nothing else; the message is plain ASCII. */
export const refuseGrpc = (stream: ServerHttp2Stream, status: number, message: string): void => {
  if (stream.destroyed || stream.headersSent) return
  stream.respond(
    {
      ":status": 200,
      "content-type": "application/grpc",
      "grpc-status": String(status),
      "grpc-message": message.replaceAll(/[^ -$&-~]/g, "?")
    },
    { endStream: true }
  )
  stream.close()
}
