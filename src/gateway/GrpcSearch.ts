/** The methods of `ruvector.v1.VectorSearch` on a call. */
import { Effect, Exit, type Fiber, Result } from "effect"
import type { SettingValues } from "../config.ts"
import { type ApiError, InternalError, InvalidInput, Overloaded, ShuttingDown, toProblem } from "../protocol/Errors.ts"
import { ClientId, decoderOf, describe } from "../protocol/Fields.ts"
import type { Principal } from "../protocol/Principal.ts"
import type { SearchAnswer, SessionQuery } from "../protocol/StreamSession.ts"
import { shownError } from "../protocol/Tenant.ts"
import type { Router } from "../shards/Router.ts"
import { type CallHandler, type GrpcCall, pieceBytes, type Source } from "./GrpcCall.ts"
import {
  answerBytes,
  faultOf,
  readSearchRequest,
  resultFrames,
  type SearchFault,
  type SearchMessage,
  summaryFrame
} from "./GrpcMessages.ts"
import { grpcStatus, type Trailers } from "./GrpcStatus.ts"
import { countDefect, countRequest } from "./Instruments.ts"
import { instance, queryOfBody } from "./Queries.ts"
import type { SessionLink, Sessions } from "./Sessions.ts"
import { askedBy } from "./Sources.ts"
import { storedQuery } from "./TenantRouter.ts"

export interface SearchHub {
  readonly settings: SettingValues
  readonly router: Router["Service"]
  readonly sessions: Sessions["Service"]
  readonly run: <A, E>(effect: Effect.Effect<A, E>) => Fiber.Fiber<A, E>
  readonly isDraining: () => boolean
  /** Whether one may search there, and now: what a call is asked once for each of its messages. */
  readonly mayRead: (caller: Caller, collection: string) => ApiError | undefined
}

export interface Caller {
  readonly principal: Principal
  readonly address: string
  /** What its searches wait their turns with. */
  readonly source: string
}

/** One search, and the end. */
export class StreamSearch implements CallHandler {
  readonly #hub: SearchHub
  readonly #call: GrpcCall
  readonly #caller: Caller
  #search: Fiber.Fiber<SearchAnswer, ApiError> | undefined

  constructor(hub: SearchHub, call: GrpcCall, caller: Caller) {
    this.#hub = hub
    this.#call = call
    this.#caller = caller
  }

  onMessage(bytes: Buffer): void {
    const call = this.#call
    const message = readMessage(bytes)
    if (message === undefined) return call.fail(malformed)
    if (this.#search !== undefined) return call.fail(oneMessage("more"))
    const query = queryOf(message)
    if (Result.isFailure(query)) return call.fail(query.failure)
    const refused = this.#hub.mayRead(this.#caller, query.success.collection)
    if (refused !== undefined) return call.fail(refused)
    const started = performance.now()
    this.#search = this.#hub.run(this.#hub.router.search(asked(this.#caller, query.success)))
    this.#search.addObserver((exit) => {
      const millis = performance.now() - started
      if (Exit.isFailure(exit)) {
        const error = errorOf(this.#hub, exit)
        countRequest("grpc", "StreamSearch", statusOfExit(error), millis)
        return call.fail(error ?? shuttingDown)
      }
      countRequest("grpc", "StreamSearch", 200, millis)
      const source = new AnswerSource(exit.value, message.requestId, false)
      if (!call.sendLast(source, summaryTrailers(exit.value))) call.fail(tooMuchWaiting)
    })
  }

  onEnd(): void {
    if (this.#search === undefined) this.#call.fail(oneMessage("none"))
  }

  onClose(): void {
    this.#search?.interruptUnsafe()
  }
}

/** A session: requests under way at once, each answered by its results and a summary. */
export class BidirectionalSearch implements CallHandler {
  readonly #hub: SearchHub
  readonly #call: GrpcCall
  readonly #caller: Caller
  /** Requests whose search is under way, by id (by a number where they have none). */
  readonly #searches = new Map<string | number, Fiber.Fiber<SearchAnswer, ApiError>>()
  /** Those, and requests whose answer waits to be sent. */
  #underWay = 0
  #unnamed = 0
  #session: Promise<SessionLink | ApiError> | SessionLink | undefined
  #inputEnded = false
  #draining = false
  #closed = false

  constructor(hub: SearchHub, call: GrpcCall, caller: Caller) {
    this.#hub = hub
    this.#call = call
    this.#caller = caller
  }

  onMessage(bytes: Buffer): void {
    const message = readMessage(bytes)
    if (message === undefined) return this.#call.fail(malformed)
    this.#take(message)
    this.#holdIfFull()
  }

  onEnd(): void {
    this.#inputEnded = true
    this.#endIfDone()
  }

  onClose(): void {
    if (this.#closed) return
    this.#closed = true
    for (const fiber of this.#searches.values()) fiber.interruptUnsafe()
    const session = this.#session
    if (session === undefined) return
    void Promise.resolve(session).then((link) => "_tag" in link || this.#hub.run(link.close))
  }

  /** Ends the call once what is under way is answered. */
  drain(): void {
    this.#draining = true
    this.#endIfDone()
  }

  onRoom(): void {
    if (!this.#holdIfFull()) this.#call.readOn()
  }

  #take(message: SearchMessage): void {
    const { requestId } = message
    if (message.cancel) return this.#searches.get(requestId)?.interruptUnsafe()
    if (requestId !== "") {
      const id = decodeRequestId(requestId)
      // An id that cannot be given back cannot be answered either.
      if (Result.isFailure(id)) return this.#call.fail(id.failure)
      if (this.#searches.has(requestId)) {
        const expected = "an id that is not under way"
        return this.#refuse(new InvalidInput({ field: "request_id", expected, got: describe(requestId) }), requestId)
      }
    }
    if (this.#hub.isDraining()) return this.#refuse(shuttingDown, requestId)
    const query = queryOf(message)
    if (Result.isFailure(query)) return this.#refuse(query.failure, requestId)
    const refused = this.#hub.mayRead(this.#caller, query.success.collection)
    if (refused !== undefined) return this.#refuse(refused, requestId)
    this.#search(asked(this.#caller, query.success), requestId)
  }

  /** What comes while enough is under way waits at the client: that is what flow control is for. */
  #holdIfFull(): boolean {
    if (this.#underWay >= this.#hub.settings.sessionSearchesMax) this.#call.hold()
    else if (this.#call.outboundIsHigh) this.#call.holdForOutbound()
    else return false
    return true
  }

  #search(query: SessionQuery, requestId: string): void {
    const started = performance.now()
    const key = requestId === "" ? this.#unnamed++ : requestId
    this.#underWay += 1
    const session = this.#session ?? this.#open()
    // Nearly always it is open: then no promise is waited for.
    const search = !(session instanceof Promise)
      ? session.search(query)
      : Effect.flatMap(
          Effect.promise(() => session),
          (link) => ("_tag" in link ? Effect.fail(link) : link.search(query))
        )
    const fiber = this.#hub.run(search)
    this.#searches.set(key, fiber)
    fiber.addObserver((exit) => {
      this.#searches.delete(key)
      if (this.#closed) return
      if (Exit.isSuccess(exit)) {
        countRequest("grpc", "BidirectionalSearch", 200, performance.now() - started)
        const source = new AnswerSource(exit.value, requestId, true, () => this.#sent())
        if (!this.#call.send(source)) this.#answer(faultOf(tooMuchWaiting), requestId)
        return
      }
      const error = errorOf(this.#hub, exit)
      countRequest("grpc", "BidirectionalSearch", statusOfExit(error), performance.now() - started)
      this.#answer(error === undefined ? cancelled : faultOf(error), requestId)
    })
  }

  /** Answers a request that was not begun. */
  #refuse(error: ApiError, requestId: string): void {
    countRequest("grpc", "BidirectionalSearch", toProblem(error).status, 0)
    this.#underWay += 1
    this.#answer(faultOf(error), requestId)
  }

  #answer(fault: SearchFault, requestId: string): void {
    const frame = summaryFrame(requestId, fault)
    let sent = false
    const source: Source = {
      next: () => {
        sent = true
        return frame
      },
      done: () => sent,
      // A summary is always taken: as many as there are requests under way.
      bytes: 0,
      onSent: () => this.#sent()
    }
    if (!this.#call.send(source)) this.#call.fail(tooMuchWaiting)
  }

  #sent(): void {
    this.#underWay -= 1
    if (this.#closed) return
    this.onRoom()
    this.#endIfDone()
  }

  #endIfDone(): void {
    if (this.#underWay > 0) return
    if (this.#inputEnded) this.#call.end()
    else if (this.#draining) this.#call.fail(shuttingDown)
  }

  #open(): Promise<SessionLink | ApiError> {
    const { promise, resolve } = Promise.withResolvers<SessionLink | ApiError>()
    this.#session = promise
    this.#hub.run(this.#hub.sessions.open).addObserver((exit) => {
      if (Exit.isSuccess(exit)) {
        this.#session = exit.value
        return resolve(exit.value)
      }
      // The next request tries again.
      this.#session = undefined
      resolve(errorOf(this.#hub, exit) ?? shuttingDown)
    })
    return promise
  }
}

/** An answer as frames: its results, and the summary where that is a message. */
class AnswerSource implements Source {
  readonly #answer: SearchAnswer
  readonly #requestId: string
  readonly #withSummary: boolean
  readonly bytes: number
  readonly onSent?: () => void
  #next = 0
  #done = false

  constructor(answer: SearchAnswer, requestId: string, withSummary: boolean, onSent?: () => void) {
    this.#answer = answer
    this.#requestId = requestId
    this.#withSummary = withSummary
    this.bytes = answerBytes(answer)
    if (onSent !== undefined) this.onSent = onSent
  }

  next(): Buffer {
    const { buffer, next } = resultFrames(this.#answer, this.#next, pieceBytes, this.#requestId)
    this.#next = next
    this.#done = next === this.#answer.ids.length
    if (!this.#done || !this.#withSummary) return buffer
    return Buffer.concat([buffer, summaryFrame(this.#requestId, this.#answer)])
  }

  done(): boolean {
    return this.#done
  }
}

const readMessage = (bytes: Buffer): SearchMessage | undefined => {
  try {
    return readSearchRequest(bytes)
  } catch {
    return undefined
  }
}

const malformed = new InvalidInput({
  field: "",
  expected: "a message ruvector.v1.SearchRequest",
  got: "bytes that are not one"
})

const oneMessage = (got: string) => new InvalidInput({ field: "", expected: "one message", got })

const tooMuchWaiting = new Overloaded({ bound: "outboundBytesMax", retryAfterMillis: 1_000 })

const shuttingDown = new ShuttingDown({ retryAfterMillis: 1_000 })

const cancelled: SearchFault = {
  code: grpcStatus.cancelled,
  message: "The request was cancelled.",
  problem: "cancelled"
}

const decodeRequestId = decoderOf(ClientId, "request_id")

/** What is 0 or empty is left out, as in JSON: the same rules hold for both. */
const queryOf = (message: SearchMessage): Result.Result<SessionQuery, InvalidInput> => {
  const { query, k, metric, collection, queryVectorId, ef, filter, includeMetadata, includeVector, deadlineMillis } =
    message
  const request: Record<string, unknown> = {}
  if (query !== undefined && query.length > 0) request["query"] = query
  if (queryVectorId !== "") request["query_vector_id"] = queryVectorId
  if (collection !== "") request["collection"] = collection
  if (k !== 0) request["k"] = k
  if (ef !== 0) request["ef"] = ef
  if (metric !== "") request["metric"] = metric
  if (deadlineMillis !== 0) request["deadline_ms"] = deadlineMillis
  if (includeMetadata || includeVector) {
    request["include"] = [...(includeMetadata ? ["metadata"] : []), ...(includeVector ? ["vector"] : [])]
  }
  if (filter !== "") {
    try {
      request["filter"] = JSON.parse(filter)
    } catch {
      return Result.fail(
        new InvalidInput({ field: "filter", expected: "JSON text of a filter", got: describe(filter) })
      )
    }
  }
  return queryOfBody(request)
}

const summaryTrailers = ({ queryId, missing }: SearchAnswer): Trailers => {
  const trailers: Trailers = { "grpc-status": "0", "ruvector-query-id": queryId }
  if (missing.length > 0) {
    trailers["ruvector-partial"] = "true"
    trailers["ruvector-missing-partitions"] = missing.join(",")
  }
  return trailers
}

/** A caller's query, as it is run. */
const asked = ({ principal, source }: Caller, query: SessionQuery): SessionQuery =>
  askedBy(storedQuery(principal, query), principal, source)

/** What a search failed with; `undefined` where it was ended before. A defect is logged, and told by its id alone. */
const errorOf = (hub: SearchHub, exit: Exit.Failure<unknown, ApiError>): ApiError | undefined => {
  const error = Exit.findErrorOption(exit)
  if (error._tag === "Some") return shownError(error.value)
  if (Exit.hasInterrupts(exit)) return undefined
  const requestId = `req_grpc${(defects++).toString(36)}_${hub.settings.region}_${instance}`
  countDefect()
  hub.run(Effect.annotateLogs(Effect.logError("Search met a defect", exit.cause), { request_id: requestId }))
  return new InternalError({ requestId })
}

let defects = 0

const statusOfExit = (error: ApiError | undefined): number => (error === undefined ? 499 : toProblem(error).status)
