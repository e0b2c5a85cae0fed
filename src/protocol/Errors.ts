/**
 * Every error a client can be given. The same classes travel over RPC; {@link toProblem} gives the RFC 9457 form that
 * HTTP, SSE and WebSocket carry. `code` is stable: clients may switch on it.
 */
import { Schema } from "effect"

/** 400: the request is not what the contract says. Names the field, what was expected there, and what came. */
export class InvalidInput extends Schema.TaggedError<InvalidInput>()("InvalidInput", {
  /** Path of the field from the request's root, `vectors[3].vector[7]`; empty for the request itself. */
  field: Schema.String,
  expected: Schema.String,
  /** What came, cut to a readable length. */
  got: Schema.String
}) {}

/** 400: a cursor that cannot be gone on from here: not one of ours, another's, or of something else than is asked for. */
export class InvalidCursor extends Schema.TaggedError<InvalidCursor>()("InvalidCursor", {}) {}

/** 401: no credential, or one that is not (or no longer) good. Get another; the same one will not do. */
export class Unauthenticated extends Schema.TaggedError<Unauthenticated>()("Unauthenticated", {
  /** As RFC 6750 has it: what is told in `WWW-Authenticate`. `missing`: there was no credential at all. */
  reason: Schema.Literals(["missing", "invalid_request", "invalid_token"]),
  /** For the client; nothing of the credential, and nothing that helps to make one. */
  detail: Schema.String
}) {}

/** 403: the credential is good, and does not allow this. */
export class Forbidden extends Schema.TaggedError<Forbidden>()("Forbidden", {
  /** The scope that is missing; empty where it is not a scope that is. */
  scope: Schema.String,
  detail: Schema.String
}) {}

/** 503: whether a credential is good cannot be found out now. */
export class AuthenticationUnavailable extends Schema.TaggedError<AuthenticationUnavailable>()(
  "AuthenticationUnavailable",
  { detail: Schema.String, retryAfterMillis: Schema.Int }
) {}

/** 404: no API key of that id, of those that the caller may see. */
export class KeyNotFound extends Schema.TaggedError<KeyNotFound>()("KeyNotFound", { id: Schema.String }) {}

/** 404: no collection of that name; or 421, where it lives in another cell. */
export class CollectionNotFound extends Schema.TaggedError<CollectionNotFound>()("CollectionNotFound", {
  collection: Schema.String,
  /** That cell, and the address of its gateways. */
  elsewhere: Schema.optionalKey(Schema.Struct({ cell: Schema.String, url: Schema.String }))
}) {}

/** 404: no vector of that id in the collection. */
export class VectorNotFound extends Schema.TaggedError<VectorNotFound>()("VectorNotFound", {
  collection: Schema.String,
  id: Schema.String
}) {}

/** 404: no topic of that name. */
export class TopicNotFound extends Schema.TaggedError<TopicNotFound>()("TopicNotFound", { topic: Schema.String }) {}

/** 404: no task of that id in the topic, or no longer. */
export class TaskNotFound extends Schema.TaggedError<TaskNotFound>()("TaskNotFound", {
  topic: Schema.String,
  id: Schema.String
}) {}

/** 404: no such path. */
export class RouteNotFound extends Schema.TaggedError<RouteNotFound>()("RouteNotFound", { path: Schema.String }) {}

/** 405: the path exists, not for that method. */
export class MethodNotAllowed extends Schema.TaggedError<MethodNotAllowed>()("MethodNotAllowed", {
  method: Schema.String,
  allowed: Schema.Array(Schema.String)
}) {}

/** 409: a collection of that name exists with other parameters. */
export class CollectionConflict extends Schema.TaggedError<CollectionConflict>()("CollectionConflict", {
  collection: Schema.String,
  field: Schema.String,
  expected: Schema.String,
  got: Schema.String
}) {}

/** 409: a topic of that name exists with other parameters, or is one that every tenant has. */
export class TopicConflict extends Schema.TaggedError<TopicConflict>()("TopicConflict", {
  topic: Schema.String,
  field: Schema.String,
  expected: Schema.String,
  got: Schema.String
}) {}

/** 409: the token is not that of the task's lease: it has ended, and another may have the task by now. */
export class LeaseLost extends Schema.TaggedError<LeaseLost>()("LeaseLost", {
  topic: Schema.String,
  id: Schema.String,
  token: Schema.Int
}) {}

/** 413: body, frame or batch over its bound. */
export class TooLarge extends Schema.TaggedError<TooLarge>()("TooLarge", {
  what: Schema.String,
  limitBytes: Schema.Int
}) {}

/** 415: a body of a kind the server does not read. */
export class UnsupportedMediaType extends Schema.TaggedError<UnsupportedMediaType>()("UnsupportedMediaType", {
  expected: Schema.String,
  got: Schema.String
}) {}

/** 429: more requests of one key or address than `limit` a second; nothing was done. */
export class RateLimited extends Schema.TaggedError<RateLimited>()("RateLimited", {
  by: Schema.Literals(["key", "address"]),
  /** Requests a second. */
  limit: Schema.Int,
  retryAfterMillis: Schema.Int
}) {}

/** 429 or 503: a named bound is reached; nothing was done, try again later. */
export class Overloaded extends Schema.TaggedError<Overloaded>()("Overloaded", {
  /** The setting whose bound was reached. */
  bound: Schema.String,
  retryAfterMillis: Schema.Int
}) {}

/** 503: the storage below refused or failed; the write it names was not acknowledged. */
export class StorageUnavailable extends Schema.TaggedError<StorageUnavailable>()("StorageUnavailable", {
  detail: Schema.String,
  retryAfterMillis: Schema.Int
}) {}

/** 503: a partition cannot answer now (starting, moved, failed); `detail` says why. */
export class PartitionUnavailable extends Schema.TaggedError<PartitionUnavailable>()("PartitionUnavailable", {
  collection: Schema.String,
  partition: Schema.Int,
  detail: Schema.String,
  retryAfterMillis: Schema.Int
}) {}

/** 503: a partition's log or snapshot is damaged and nothing was skipped over; an operator has to restore it. */
export class PartitionCorrupt extends Schema.TaggedError<PartitionCorrupt>()("PartitionCorrupt", {
  collection: Schema.String,
  partition: Schema.Int,
  /** Key of the damaged object. */
  object: Schema.String,
  detail: Schema.String
}) {}

/** 503: a channel of a topic cannot answer now (starting, moved, failed, damaged); `detail` says why. */
export class TopicUnavailable extends Schema.TaggedError<TopicUnavailable>()("TopicUnavailable", {
  topic: Schema.String,
  detail: Schema.String,
  retryAfterMillis: Schema.Int
}) {}

/** 504: the caller's deadline passed before any partition had answered. */
export class DeadlineExceeded extends Schema.TaggedError<DeadlineExceeded>()("DeadlineExceeded", {
  deadlineMillis: Schema.Int
}) {}

/** 503: this node is shutting down; ask another, or again shortly. */
export class ShuttingDown extends Schema.TaggedError<ShuttingDown>()("ShuttingDown", {
  retryAfterMillis: Schema.Int
}) {}

/** 500: a defect of ours. `request_id` finds it in the logs. */
export class InternalError extends Schema.TaggedError<InternalError>()("InternalError", {
  requestId: Schema.String
}) {}

/** What any call may answer with. */
export const ApiError = Schema.Union([
  InvalidInput,
  InvalidCursor,
  Unauthenticated,
  Forbidden,
  RateLimited,
  AuthenticationUnavailable,
  KeyNotFound,
  CollectionNotFound,
  VectorNotFound,
  TopicNotFound,
  TaskNotFound,
  RouteNotFound,
  MethodNotAllowed,
  CollectionConflict,
  TopicConflict,
  LeaseLost,
  TooLarge,
  UnsupportedMediaType,
  Overloaded,
  StorageUnavailable,
  PartitionUnavailable,
  PartitionCorrupt,
  TopicUnavailable,
  DeadlineExceeded,
  ShuttingDown,
  InternalError
])
export type ApiError = typeof ApiError.Type

/** RFC 9457 problem details, with this service's extension members. */
export const Problem = Schema.Struct({
  type: Schema.String,
  title: Schema.String,
  status: Schema.Int,
  detail: Schema.String,
  /** Stable, snake_case. */
  code: Schema.String,
  field: Schema.optionalKey(Schema.String),
  expected: Schema.optionalKey(Schema.String),
  got: Schema.optionalKey(Schema.String),
  /** With 421: the cell that has it, and the address to ask instead. */
  cell: Schema.optionalKey(Schema.String),
  location: Schema.optionalKey(Schema.String),
  /** With 429 and 503, beside the `Retry-After` header. */
  retry_after_ms: Schema.optionalKey(Schema.Int),
  request_id: Schema.optionalKey(Schema.String)
}).annotate({ identifier: "Problem", description: "RFC 9457 problem details" })
export type Problem = typeof Problem.Type

/** Every `code` that a service answers with, on any wire. */
export type ProblemCode =
  | "authentication_unavailable"
  | "collection_conflict"
  | "collection_elsewhere"
  | "collection_not_found"
  | "deadline_exceeded"
  | "forbidden"
  | "headers_too_large"
  | "internal_error"
  | "invalid_cursor"
  | "invalid_input"
  | "key_not_found"
  | "lease_lost"
  | "method_not_allowed"
  | "overloaded"
  | "partition_corrupt"
  | "partition_unavailable"
  | "rate_limited"
  | "request_timeout"
  | "route_not_found"
  | "shutting_down"
  | "storage_unavailable"
  | "task_not_found"
  | "tls_required"
  | "too_large"
  | "topic_conflict"
  | "topic_not_found"
  | "topic_unavailable"
  | "unauthenticated"
  | "unsupported_media_type"
  | "vector_not_found"

const problem = (
  status: number,
  code: ProblemCode,
  title: string,
  detail: string,
  extra: Partial<Problem> = {}
): Problem => ({
  type: `urn:ruvector:problem:${code}`,
  title,
  status,
  detail,
  code,
  ...extra
})

/** The form of an error that HTTP, SSE and WebSocket carry. */
export const toProblem = (error: ApiError): Problem => {
  switch (error._tag) {
    case "InvalidInput": {
      const { field, expected, got } = error
      const at = field === "" ? "The request" : `Field ${field}`
      return problem(400, "invalid_input", "Invalid input", `${at}: expected ${expected}, got ${got}.`, {
        field,
        expected,
        got
      })
    }
    case "InvalidCursor":
      return problem(
        400,
        "invalid_cursor",
        "Invalid cursor",
        "This cursor cannot be gone on from: leave it out to begin anew.",
        { field: "cursor", expected: "the newest cursor of this very subscription", got: "another" }
      )
    case "Unauthenticated":
      return problem(401, "unauthenticated", "Not authenticated", error.detail)
    case "Forbidden":
      return problem(
        403,
        "forbidden",
        "Forbidden",
        error.detail,
        error.scope === "" ? {} : { field: "scope", expected: error.scope }
      )
    case "AuthenticationUnavailable":
      return problem(503, "authentication_unavailable", "Authentication unavailable", error.detail, {
        retry_after_ms: error.retryAfterMillis
      })
    case "KeyNotFound":
      return problem(404, "key_not_found", "Not found", `There is no key ${JSON.stringify(error.id)}.`, {
        field: "id",
        expected: "the id of a key",
        got: error.id
      })
    case "RateLimited":
      return problem(
        429,
        "rate_limited",
        "Too many requests",
        `More than ${error.limit} requests a second of one ${error.by}; nothing was done.`,
        { field: error.by, expected: `at most ${error.limit} a second`, retry_after_ms: error.retryAfterMillis }
      )
    case "CollectionNotFound":
      if (error.elsewhere !== undefined) {
        const { cell, url } = error.elsewhere
        const detail = `Collection ${JSON.stringify(error.collection)} lives in cell ${cell}: ask ${url}.`
        return problem(421, "collection_elsewhere", "Collection elsewhere", detail, {
          field: "collection",
          cell,
          location: url
        })
      }
      return problem(
        404,
        "collection_not_found",
        "Not found",
        `There is no collection ${JSON.stringify(error.collection)}.`,
        {
          field: "collection",
          expected: "the name of a collection",
          got: error.collection
        }
      )
    case "VectorNotFound":
      return problem(
        404,
        "vector_not_found",
        "Not found",
        `There is no vector ${JSON.stringify(error.id)} in collection ${JSON.stringify(error.collection)}.`,
        { field: "id", expected: "the id of a vector", got: error.id }
      )
    case "TopicNotFound":
      return problem(404, "topic_not_found", "Not found", `There is no topic ${JSON.stringify(error.topic)}.`, {
        field: "topic",
        expected: "the name of a topic",
        got: error.topic
      })
    case "TaskNotFound":
      return problem(
        404,
        "task_not_found",
        "Not found",
        `There is no task ${JSON.stringify(error.id)} in topic ${JSON.stringify(error.topic)}.`,
        { field: "task_id", expected: "the id of a task", got: error.id }
      )
    case "RouteNotFound":
      return problem(404, "route_not_found", "Not found", `Nothing is served at ${error.path}.`, {
        field: "path",
        expected: "a path of /openapi.json",
        got: error.path
      })
    case "MethodNotAllowed":
      return problem(405, "method_not_allowed", "Method not allowed", `Allowed here: ${error.allowed.join(", ")}.`, {
        field: "method",
        expected: error.allowed.join(", "),
        got: error.method
      })
    case "CollectionConflict": {
      const { collection, field, expected, got } = error
      const detail = `Collection ${JSON.stringify(collection)} exists with ${field} ${expected}, not ${got}.`
      return problem(409, "collection_conflict", "Conflict", detail, { field, expected, got })
    }
    case "TopicConflict": {
      const { topic, field, expected, got } = error
      const detail = `Topic ${JSON.stringify(topic)} exists with ${field} ${expected}, not ${got}.`
      return problem(409, "topic_conflict", "Conflict", detail, { field, expected, got })
    }
    case "LeaseLost":
      return problem(
        409,
        "lease_lost",
        "Lease lost",
        `The lease ${error.token} of task ${JSON.stringify(error.id)} has ended; another may have the task.`,
        { field: "token", expected: "the token of the task's lease", got: String(error.token) }
      )
    case "TooLarge":
      return problem(
        413,
        "too_large",
        "Too large",
        `The ${error.what} is over its limit of ${error.limitBytes} bytes.`,
        {
          field: error.what,
          expected: `at most ${error.limitBytes} bytes`,
          got: "more"
        }
      )
    case "UnsupportedMediaType":
      return problem(
        415,
        "unsupported_media_type",
        "Unsupported media type",
        `Send ${error.expected}, not ${error.got}.`,
        {
          field: "content-type",
          expected: error.expected,
          got: error.got
        }
      )
    case "Overloaded":
      return problem(429, "overloaded", "Too many requests", `The bound ${error.bound} is reached; nothing was done.`, {
        field: error.bound,
        retry_after_ms: error.retryAfterMillis
      })
    case "StorageUnavailable":
      return problem(503, "storage_unavailable", "Storage unavailable", error.detail, {
        retry_after_ms: error.retryAfterMillis
      })
    case "PartitionUnavailable":
      return problem(
        503,
        "partition_unavailable",
        "Partition unavailable",
        `Partition ${error.partition} of ${JSON.stringify(error.collection)}: ${error.detail}`,
        { retry_after_ms: error.retryAfterMillis }
      )
    case "PartitionCorrupt":
      return problem(
        503,
        "partition_corrupt",
        "Partition damaged",
        `Partition ${error.partition} of ${JSON.stringify(error.collection)} does not serve: ${error.object}: ${error.detail}`
      )
    case "TopicUnavailable":
      return problem(
        503,
        "topic_unavailable",
        "Topic unavailable",
        `Topic ${JSON.stringify(error.topic)}: ${error.detail}`,
        { retry_after_ms: error.retryAfterMillis }
      )
    case "DeadlineExceeded":
      return problem(504, "deadline_exceeded", "Deadline exceeded", `No answer within ${error.deadlineMillis} ms.`)
    case "ShuttingDown":
      return problem(503, "shutting_down", "Shutting down", "This node is shutting down; nothing was done.", {
        retry_after_ms: error.retryAfterMillis
      })
    case "InternalError":
      return problem(
        500,
        "internal_error",
        "Internal error",
        "A defect of the server; the request id finds it in its logs.",
        {
          request_id: error.requestId
        }
      )
  }
}
