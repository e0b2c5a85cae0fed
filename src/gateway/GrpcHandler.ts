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
import {
  type ApiError,
  DeadlineExceeded,
  InvalidInput,
  Overloaded,
  ShuttingDown,
  toProblem
} from "../protocol/Errors.ts"
import { anonymous, type Principal } from "../protocol/Principal.ts"
import { Router } from "../shards/Router.ts"
import { Access, isPrincipal } from "./Access.ts"
import { ClientAddresses } from "./ClientAddresses.ts"
import { type CallHandler, type CallLimits, GrpcCall, grpcContentType, Outbound, withoutBody } from "./GrpcCall.ts"
import { acceptedEncodings, type Encoding, encodingOf, PartialBytes } from "./GrpcFrames.ts"
import { healthCheck, healthWatch } from "./GrpcHealth.ts"
import { BidirectionalSearch, type Caller, StreamSearch } from "./GrpcSearch.ts"
import { grpcMessage, grpcStatus, type Trailers, trailersOf } from "./GrpcStatus.ts"
import { connectionClosed, connectionOpened, countRequest } from "./Instruments.ts"
import { Readiness } from "./Readiness.ts"
import { Sessions } from "./Sessions.ts"
import { sourceBehind } from "./Sources.ts"

export class GrpcHandler extends Context.Service<
  GrpcHandler,
  {
    /**
     * Called for every stream whose content type begins with `application/grpc`; answers and ends it. `onBytes` is told how
     * much of its messages has come, which the port must not take for noise.
     */
    readonly handleStream: (
      stream: ServerHttp2Stream,
      headers: IncomingHttpHeaders,
      onBytes: (bytes: number) => void
    ) => void
    /** Ends a call before anything of it is read. */
    readonly refuse: (stream: ServerHttp2Stream, error: ApiError) => void
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
      const access = yield* Access
      const { streamAddress } = yield* ClientAddresses
      const hub = {
        settings,
        router: yield* Router,
        sessions: yield* Sessions,
        readiness: yield* Readiness,
        services: new Set<string>(["ruvector.v1.VectorSearch", "grpc.health.v1.Health"]),
        run: Effect.runForkWith(yield* Effect.context<never>()),
        isDraining: () => draining,
        mayRead: (caller: Caller, collection: string) =>
          access.admit(caller.principal, caller.address) ?? access.allow(caller.principal, "read", collection)
      }
      const methods: ReadonlyMap<string, Method> = new Map<string, Method>([
        [
          "/ruvector.v1.VectorSearch/StreamSearch",
          { name: "StreamSearch", start: (call, caller) => new StreamSearch(hub, call, caller) }
        ],
        [
          "/ruvector.v1.VectorSearch/BidirectionalSearch",
          {
            name: "BidirectionalSearch",
            start: (call, caller) => new BidirectionalSearch(hub, call, caller),
            isLong: true
          }
        ],
        ["/grpc.health.v1.Health/Check", { name: "Check", start: (call) => healthCheck(hub, call), isOpen: true }],
        [
          "/grpc.health.v1.Health/Watch",
          { name: "Watch", start: (call) => healthWatch(hub, call), isLong: true, isOpen: true }
        ]
      ])
      const open = new Map<GrpcCall, StartedHandler>()
      const outbounds = new WeakMap<Http2Session, Outbound>()
      const limits: CallLimits = {
        messageBytesMax: settings.grpcMessageBytesMax,
        partial: new PartialBytes(settings.grpcPartialBytesMax),
        outboundBytesMax: settings.outboundBytesMax,
        compressBytesMin: settings.grpcCompressBytesMin,
        requestTimeoutMillis: settings.requestTimeoutMillis,
        idleTimeoutMillis: settings.idleTimeoutMillis
      }
      let draining = false
      let watches = 0

      const isClosed = (call: GrpcCall) => {
        open.delete(call)
      }
      const shortIsOver = () => {}
      const longIsOver = (_: GrpcCall, status: string, bytes: number) => connectionClosed("grpc", status, bytes)

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

      const handleStream: GrpcHandler["Service"]["handleStream"] = (stream, headers, onBytes) => {
        stream.on("error", ignored)
        const { session } = stream
        if (session === undefined || stream.destroyed) return
        const wrong = wrongRequest(headers)
        if (wrong !== undefined) {
          countRequest("grpc", "refused", wrong[":status"], 0)
          return respondLast(stream, wrong)
        }
        const refuse = (trailers: Trailers, status: number) => {
          countRequest("grpc", "refused", status, 0)
          respondLast(stream, { ...trailersOnly, ...trailers })
        }
        const fail = (error: ApiError) => refuse(trailersOf(error), toProblem(error).status)

        const path = headers[":path"] ?? ""
        const method = methods.get(path)
        if (method === undefined) return refuse(unimplemented(`There is no method ${path}.`), 404)
        const encodingName = (headers["grpc-encoding"] as string | undefined) ?? "identity"
        const encoding = encodingOf(encodingName)
        if (encoding === undefined) return refuse(unimplemented(`Messages in ${encodingName} are not read.`), 415)
        const timeoutMillis = timeoutOf(headers["grpc-timeout"] as string | undefined)
        if (Result.isFailure(timeoutMillis)) return fail(timeoutMillis.failure)
        if (timeoutMillis.success > 0 && timeoutMillis.success < timeoutMillisMin) {
          return fail(new DeadlineExceeded({ deadlineMillis: 0 }))
        }
        if (draining && method.isOpen !== true) return fail(shuttingDown)
        if (open.size >= settings.grpcCallsMax) return fail(tooMany("grpcCallsMax"))
        if (method.name === "Watch" && watches >= settings.grpcWatchesMax) return fail(tooMany("grpcWatchesMax"))

        const begin = (caller: Caller) => {
          if (method.isLong) connectionOpened("grpc")
          const call = new GrpcCall(stream, limits, {
            outbound: outboundOf(session),
            encoding,
            replyEncoding: accepts(headers, encoding) ? encoding : "identity",
            timeoutMillis: timeoutMillis.success,
            onBytes,
            onOver: method.isLong ? longIsOver : shortIsOver,
            onClosed: isClosed
          })
          const handler = method.start(call, caller)
          open.set(call, handler)
          if (method.name === "Watch") {
            watches += 1
            stream.once("close", () => {
              watches -= 1
            })
          }
          call.start(handler)
          if (!method.isLong || method.isOpen) return
          const stop = access.watch(caller.principal, (error) => call.fail(error))
          stream.once("close", stop)
        }

        const address = streamAddress(stream, headers)
        const callerOf = (principal: Principal): Caller => {
          const source = sourceBehind(principal, session, address, session.socket.remoteAddress)
          return { principal, address, source }
        }
        if (method.isOpen) return begin(callerOf(anonymous))
        // Until it is known who asks nothing is read.
        const known = (who: Principal | ApiError) => {
          if (stream.destroyed || stream.closed) return
          if (isPrincipal(who)) begin(callerOf(who))
          else fail(who)
        }
        const who = access.authenticate({ headers, address })
        if (who instanceof Promise) void who.then(known)
        else known(who)
      }

      const refuse = (stream: ServerHttp2Stream, error: ApiError): void => {
        stream.on("error", ignored)
        if (stream.session === undefined || stream.destroyed) return
        countRequest("grpc", "refused", toProblem(error).status, 0)
        respondLast(stream, { ...trailersOnly, ...trailersOf(error) })
      }

      return GrpcHandler.of({ handleStream, refuse, drain, count: () => open.size })
    })
  )
}

/** That a stream broke is told by its end. */
const ignored = () => {}

interface StartedHandler extends CallHandler {
  /** The node shuts down. A call that does not know is short, and is left to end. */
  readonly drain?: () => void
}

interface Method {
  readonly name: string
  readonly start: (call: GrpcCall, caller: Caller) => StartedHandler
  /** Kept open, and so counted among connections. */
  readonly isLong?: boolean
  /** To everybody, also while the node shuts down. */
  readonly isOpen?: boolean
}

const trailersOnly = {
  ":status": 200,
  "content-type": grpcContentType,
  "grpc-accept-encoding": acceptedEncodings
}

/** Whether a request of HTTP/2 is a call. */
export const isGrpc = (headers: IncomingHttpHeaders): boolean =>
  headers["content-type"]?.startsWith("application/grpc") ?? false

const respondLast = (stream: ServerHttp2Stream, headers: OutgoingHttpHeaders): void => {
  stream.respond(headers, withoutBody)
  // What it still sends is not read.
  stream.resume()
  setImmediate(() => {
    if (!stream.readableEnded && !stream.closed) stream.close(constants.NGHTTP2_NO_ERROR)
  })
}

const unimplemented = (message: string): Trailers => ({
  "grpc-status": String(grpcStatus.unimplemented),
  "grpc-message": grpcMessage(message)
})

const tooMany = (bound: string) => new Overloaded({ bound, retryAfterMillis: 1_000 })

const shuttingDown = new ShuttingDown({ retryAfterMillis: 1_000 })

/** A request that is no gRPC call of ours is answered in HTTP's own terms. */
const wrongRequest = (headers: IncomingHttpHeaders): (OutgoingHttpHeaders & { ":status": number }) | undefined => {
  if (!/^application\/grpc(?:\+proto)?(?:;|$)/.test(headers["content-type"] ?? "")) return { ":status": 415 }
  if (headers[":method"] !== "POST") return { ":status": 405, allow: "POST" }
  return undefined
}

/** Whether a client that compresses its messages so can read them too: it can, unless it says what else it can. */
const accepts = (headers: IncomingHttpHeaders, encoding: Encoding): boolean => {
  const accepted = headers["grpc-accept-encoding"] as string | undefined
  return accepted === undefined || accepted.split(",").some((name) => name.trim() === encoding)
}

const unitMillis: Readonly<Record<string, number>> = { H: 3_600_000, M: 60_000, S: 1_000, m: 1, u: 1e-3, n: 1e-6 }

/** A call that has less time is over when it is read: its answer would only be in time by chance. */
const timeoutMillisMin = 1

/** Milliseconds of `grpc-timeout`: at most eight digits and a unit; 0: there is none. */
const timeoutOf = (text: string | undefined): Result.Result<number, InvalidInput> => {
  if (text === undefined) return Result.succeed(0)
  const match = /^(\d{1,8})([HMSmun])$/.exec(text)
  if (match === null) {
    const expected = "at most 8 digits and one of H M S m u n"
    return Result.fail(new InvalidInput({ field: "grpc-timeout", expected, got: text.slice(0, 80) }))
  }
  return Result.succeed(Math.max(Number.MIN_VALUE, Number(match[1]) * (unitMillis[match[2] as string] as number)))
}
