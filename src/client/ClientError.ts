/** What a call of the client can fail with. */
import { Data } from "effect"
import type { ProblemCode } from "../protocol/Errors.ts"

/** The members of a problem document (RFC 9457) that the client hands on. */
export interface ProblemMembers {
  readonly code: string
  readonly detail?: string
  readonly title?: string
  readonly status?: number
  readonly field?: string
  readonly expected?: string
  readonly got?: string
  readonly retry_after_ms?: number
  readonly request_id?: string
  readonly location?: string
}

/** Codes of the client's own. */
export type ClientErrorCode =
  | "closed"
  | "deadline_exceeded"
  | "disconnected"
  | "invalid_metadata"
  | "not_opened"
  | "not_streaming"
  | "queue_full"

/** What `code` of an error is: known ones, or one of a service that is newer than its client. */
export type ErrorCode = ProblemCode | ClientErrorCode | (string & {})

/**
 * An error with a stable `code`: one of the server's (`docs/protocol.md`), or one of the client's own:
 *
 * | code | |
 * |---|---|
 * | `disconnected` | no endpoint could be reached before the deadline; a write may or may not have been done |
 * | `deadline_exceeded` | connected, but no answer before the deadline; likewise |
 * | `queue_full` | `waitingMax` calls wait already; nothing was sent |
 * | `invalid_metadata` | the schema given refuses the metadata; `field` says where |
 * | `not_streaming` | a subscription was asked of a client with `streaming: false` |
 * | `closed` | the client was closed |
 | `not_opened` | the engine could not be opened in this process; the message says why |
 */
export class VectorDBError extends Data.TaggedError("VectorDBError")<{
  /** Stable: programs may switch on it. */
  readonly code: ErrorCode
  /** For people. */
  readonly message: string
  /** HTTP's number for it; 0 for the client's own. */
  readonly status: number
  /** Path of what was wrong in the request, `vectors[3].vector[7]`. */
  readonly field?: string
  /** What is right there. */
  readonly expected?: string
  /** What came. */
  readonly got?: string
  /** When to try again, where the server said so. */
  readonly retryAfterMillis?: number
  /** With `collection_elsewhere`: the service to ask instead. */
  readonly location?: string
  /** Finds the fault in the server's log. */
  readonly requestId?: string
}> {}

export const errorOfProblem = (problem: ProblemMembers): VectorDBError =>
  new VectorDBError({
    code: problem.code,
    message: problem.detail ?? problem.title ?? problem.code,
    status: problem.status ?? 0,
    ...(problem.field === undefined ? {} : { field: problem.field }),
    ...(problem.expected === undefined ? {} : { expected: problem.expected }),
    ...(problem.got === undefined ? {} : { got: problem.got }),
    ...(problem.retry_after_ms === undefined ? {} : { retryAfterMillis: problem.retry_after_ms }),
    ...(problem.location === undefined ? {} : { location: problem.location }),
    ...(problem.request_id === undefined ? {} : { requestId: problem.request_id })
  })

export const ownError = (code: ClientErrorCode, message: string, field?: string): VectorDBError =>
  new VectorDBError({ code, message, status: 0, ...(field === undefined ? {} : { field }) })

/**
 * Whether an error has one of these codes, for `Effect.catchIf` and the like:
 *
 *     Effect.catchIf(client.search(query), hasCode("collection_not_found"), () => Effect.succeed([]))
 */
export const hasCode =
  (...codes: ReadonlyArray<ErrorCode>) =>
  (error: VectorDBError): boolean =>
    codes.includes(error.code)

/** Codes of errors that pass by themselves: nothing was done, or it may be done again. */
export const isTransient = (code: string): boolean => transient.has(code)

const transient = new Set([
  "overloaded",
  "rate_limited",
  "storage_unavailable",
  "partition_unavailable",
  "topic_unavailable",
  "shutting_down"
])
