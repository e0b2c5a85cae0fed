/** How a gRPC call ends: the status code of each error, and the trailers that say it. */
import { type ApiError, toProblem } from "../protocol/Errors.ts"

/** Status codes of gRPC that this server answers with. */
export const grpcStatus = {
  ok: 0,
  cancelled: 1,
  invalidArgument: 3,
  deadlineExceeded: 4,
  notFound: 5,
  alreadyExists: 6,
  permissionDenied: 7,
  resourceExhausted: 8,
  failedPrecondition: 9,
  unimplemented: 12,
  internal: 13,
  unavailable: 14,
  dataLoss: 15,
  unauthenticated: 16
} as const

export const statusOf = (error: ApiError): number => statuses[error._tag]

const statuses: Readonly<Record<ApiError["_tag"], number>> = {
  InvalidInput: grpcStatus.invalidArgument,
  InvalidCursor: grpcStatus.invalidArgument,
  Unauthenticated: grpcStatus.unauthenticated,
  Forbidden: grpcStatus.permissionDenied,
  RateLimited: grpcStatus.resourceExhausted,
  AuthenticationUnavailable: grpcStatus.unavailable,
  KeyNotFound: grpcStatus.notFound,
  CollectionNotFound: grpcStatus.notFound,
  VectorNotFound: grpcStatus.notFound,
  RouteNotFound: grpcStatus.unimplemented,
  MethodNotAllowed: grpcStatus.unimplemented,
  CollectionConflict: grpcStatus.alreadyExists,
  TopicNotFound: grpcStatus.notFound,
  TaskNotFound: grpcStatus.notFound,
  TopicConflict: grpcStatus.alreadyExists,
  LeaseLost: grpcStatus.failedPrecondition,
  TopicUnavailable: grpcStatus.unavailable,
  TooLarge: grpcStatus.resourceExhausted,
  UnsupportedMediaType: grpcStatus.unimplemented,
  Overloaded: grpcStatus.resourceExhausted,
  StorageUnavailable: grpcStatus.unavailable,
  PartitionUnavailable: grpcStatus.unavailable,
  PartitionCorrupt: grpcStatus.dataLoss,
  DeadlineExceeded: grpcStatus.deadlineExceeded,
  ShuttingDown: grpcStatus.unavailable,
  InternalError: grpcStatus.internal
}

export type Trailers = Record<string, string>

export const okTrailers: Trailers = { "grpc-status": "0" }

/** The trailers of a call that failed: gRPC's own, our code, and the problem in the form that the other wires give it. */
export const trailersOf = (error: ApiError): Trailers => {
  const problem = toProblem(error)
  const trailers: Trailers = {
    "grpc-status": String(statusOf(error)),
    "grpc-message": grpcMessage(problem.detail),
    "ruvector-code": problem.code,
    "ruvector-problem-bin": Buffer.from(JSON.stringify(problem)).toString("base64")
  }
  if (problem.retry_after_ms !== undefined) {
    trailers["retry-after-ms"] = String(problem.retry_after_ms)
    // What clients with a retry policy wait before they try again.
    trailers["grpc-retry-pushback-ms"] = String(problem.retry_after_ms)
  }
  return trailers
}

const messageCharsMax = 1_024

/** Percent-encoded, as `grpc-message` is. */
export const grpcMessage = (text: string): string => {
  if (text.length > messageCharsMax) return grpcMessage(`${text.slice(0, messageCharsMax - 3)}...`)
  if (plain.test(text)) return text
  let encoded = ""
  for (const byte of Buffer.from(text)) {
    encoded +=
      byte < 0x20 || byte > 0x7e || byte === 0x25
        ? `%${byte.toString(16).toUpperCase().padStart(2, "0")}`
        : String.fromCharCode(byte)
  }
  return encoded
}

const plain = /^[\x20-\x24\x26-\x7e]*$/
