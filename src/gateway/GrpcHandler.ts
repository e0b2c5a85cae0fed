/**
 * gRPC on the streams of an HTTP/2 server: `proto/ruvector/v1/vector_search.proto` and the standard health service. The port
 * hands a stream on whose content type is `application/grpc`; here its method is found, and what holds for every call is
 * seen to: credentials, compression, deadline, size of messages, slow clients, shutting down.
 */
import {
  constants,
  type Http2Session,
  type IncomingHttpHeaders,
  type OutgoingHttpHeaders,
  type ServerHttp2Stream
} from "node:http2"
import { Context, Effect, Layer, Result } from "effect"
import { Settings } from "../config.ts"
import { InvalidInput, ShuttingDown } from "../protocol/Errors.ts"
import { Router } from "../shards/Router.ts"
import { type CallHandler, GrpcCall, Outbound } from "./GrpcCall.ts"
import { acceptedEncodings, encodingOf, PartialBytes } from "./GrpcFrames.ts"
import { healthCheck, healthWatch } from "./GrpcHealth.ts"
import { BidirectionalSearch, streamSearch } from "./GrpcSearch.ts"
import { grpcMessage, grpcStatus, type Trailers, trailersOf } from "./GrpcStatus.ts"
import { connectionClosed, connectionOpened, countRequest } from "./Instruments.ts"
import { Readiness } from "./Readiness.ts"
import { Sessions } from "./Sessions.ts"

export class GrpcHandler extends Context.Service<
  GrpcHandler,
  {
    readonly handleStream: (stream: ServerHttp2Stream, headers: IncomingHttpHeaders) => void
    /** Begins no more searches, and ends every call that is open once what it has under way is answered. */
    readonly drain: Effect.Effect<void>
    /** Calls that are open. */
    readonly count: () => number
  }
>()("ruvector/gateway/GrpcHandler") {
  static readonly layer = Layer.effect(
    GrpcHandler,
    Effect.gen(function* () {
      const settings = yield* Settings
      const hub = {
        settings,
        router: yield* Router,
        sessions: yield* Sessions,
        readiness: yield* Readiness,
        services: new Set<string>(["ruvector.v1.VectorSearch", "grpc.health.v1.Health"]),
        run: Effect.runForkWith(yield* Effect.context<never>()),
        isDraining: () => draining
      }
      const methods: ReadonlyMap<string, Method> = new Map<string, Method>([
        ["/ruvector.v1.VectorSearch/StreamSearch", { name: "StreamSearch", start: (call) => streamSearch(hub, call) }],
        [
          "/ruvector.v1.VectorSearch/BidirectionalSearch",
          { name: "BidirectionalSearch", start: (call) => new BidirectionalSearch(hub, call), isLong: true }
        ],
        ["/grpc.health.v1.Health/Check", { name: "Check", start: (call) => healthCheck(hub, call), always: true }],
        [
          "/grpc.health.v1.Health/Watch",
          { name: "Watch", start: (call) => healthWatch(hub, call), isLong: true, always: true }
        ]
      ])
      const open = new Map<GrpcCall, StartedHandler>()
      const outbounds = new WeakMap<Http2Session, Outbound>()
      const partial = new PartialBytes(settings.grpcPartialBytesMax)
      let draining = false

      const outboundOf = (session: Http2Session): Outbound => {
        const found = outbounds.get(session)
        if (found !== undefined) return found
        const made = new Outbound()
        outbounds.set(session, made)
        return made
      }

      const timer = setInterval(
        () => {
          const now = Date.now()
          for (const call of open.keys()) call.lookAfter(now)
        },
        Math.max(50, Math.min(5_000, settings.requestTimeoutMillis / 4, settings.idleTimeoutMillis / 4))
      )
      timer.unref()

      const drain = Effect.sync(() => {
        draining = true
        for (const handler of open.values()) handler.drain?.()
      })
      yield* Effect.addFinalizer(() =>
        Effect.andThen(
          drain,
          Effect.sync(() => {
            clearInterval(timer)
            for (const call of open.keys()) call.stream.close(constants.NGHTTP2_CANCEL)
          })
        )
      )

      const handleStream = (stream: ServerHttp2Stream, headers: IncomingHttpHeaders): void => {
        stream.on("error", () => {})
        const { session } = stream
        if (session === undefined || stream.destroyed) return
        const wrong = wrongRequest(headers)
        if (wrong !== undefined) {
          countRequest("grpc", "refused", wrong[":status"], 0)
          stream.respond(wrong, { endStream: true })
          return
        }
        const refuse = (trailers: Trailers) => {
          countRequest("grpc", "refused", 400, 0)
          stream.respond({ ...trailersOnly, ...trailers }, { endStream: true })
          // What it still sends is not read.
          stream.resume()
          setImmediate(() => {
            if (!stream.readableEnded && !stream.closed) stream.close(constants.NGHTTP2_NO_ERROR)
          })
        }
        const path = headers[":path"] ?? ""
        const method = methods.get(path)
        if (method === undefined) return refuse(unimplemented(`There is no method ${path}.`))
        const { encoding: encodingName = "identity", timeout } = {
          encoding: headers["grpc-encoding"] as string | undefined,
          timeout: headers["grpc-timeout"] as string | undefined
        }
        const encoding = encodingOf(encodingName)
        if (encoding === undefined) return refuse(unimplemented(`Messages in ${encodingName} are not read.`))
        const timeoutMillis = timeout === undefined ? Result.succeed(0) : timeoutOf(timeout)
        if (Result.isFailure(timeoutMillis)) return refuse(trailersOf(timeoutMillis.failure))
        if (draining && method.always !== true) return refuse(trailersOf(shuttingDown))

        if (method.isLong) connectionOpened("grpc")
        const call = new GrpcCall(stream, {
          messageBytesMax: settings.grpcMessageBytesMax,
          outboundBytesMax: settings.outboundBytesMax,
          compressBytesMin: settings.grpcCompressBytesMin,
          requestTimeoutMillis: settings.requestTimeoutMillis,
          idleTimeoutMillis: settings.idleTimeoutMillis,
          partial,
          outbound: outboundOf(session),
          encoding,
          timeoutMillis: timeoutMillis.success,
          onOver: (status, bytes) => {
            if (method.isLong) connectionClosed("grpc", status, bytes)
          },
          onClosed: () => open.delete(call)
        })
        const handler = method.start(call)
        open.set(call, handler)
        call.start(handler)
      }

      return GrpcHandler.of({ handleStream, drain, count: () => open.size })
    })
  )
}

interface StartedHandler extends CallHandler {
  /** The node shuts down. A call that does not know is short, and is left to end. */
  readonly drain?: () => void
}

interface Method {
  readonly name: string
  readonly start: (call: GrpcCall) => StartedHandler
  /** Kept open, and so counted among connections. */
  readonly isLong?: boolean
  /** Also while the node shuts down. */
  readonly always?: boolean
}

const trailersOnly = {
  ":status": 200,
  "content-type": "application/grpc+proto",
  "grpc-accept-encoding": acceptedEncodings
}

const unimplemented = (message: string): Trailers => ({
  "grpc-status": String(grpcStatus.unimplemented),
  "grpc-message": grpcMessage(message)
})

const shuttingDown = new ShuttingDown({ retryAfterMillis: 1_000 })

/** A request that is no gRPC call of ours is answered in HTTP's own terms. */
const wrongRequest = (headers: IncomingHttpHeaders): (OutgoingHttpHeaders & { ":status": number }) | undefined => {
  if (!/^application\/grpc(?:\+proto)?(?:;|$)/.test(headers["content-type"] ?? "")) return { ":status": 415 }
  if (headers[":method"] !== "POST") return { ":status": 405, allow: "POST" }
  return undefined
}

const unitMillis: Readonly<Record<string, number>> = { H: 3_600_000, M: 60_000, S: 1_000, m: 1, u: 1e-3, n: 1e-6 }

/** `grpc-timeout`: at most eight digits and a unit. */
const timeoutOf = (text: string): Result.Result<number, InvalidInput> => {
  const match = /^(\d{1,8})([HMSmun])$/.exec(text)
  if (match === null) {
    const expected = "at most 8 digits and one of H M S m u n"
    return Result.fail(new InvalidInput({ field: "grpc-timeout", expected, got: text.slice(0, 80) }))
  }
  // What is over already still has a timer, which goes off at once.
  return Result.succeed(Math.max(Number.MIN_VALUE, Number(match[1]) * (unitMillis[match[2] as string] as number)))
}
