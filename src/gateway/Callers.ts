/**
 * The door in front of the HTTP wires: finds out who a request is from before any of them sees it, and lets through who may
 * come in at all. The wires then ask {@link callerOf}.
 */
import type { IncomingMessage, ServerResponse } from "node:http"
import { STATUS_CODES } from "node:http"
import type { Duplex } from "node:stream"
import { Context, Effect, Layer } from "effect"
import { Settings } from "../config.ts"
import { type ApiError, Forbidden, toProblem, Unauthenticated } from "../protocol/Errors.ts"
import { anonymous, isOperator, type Principal } from "../protocol/Principal.ts"
import { Access, type AccessRequest, credentialOf, isPrincipal, withoutAccessToken } from "./Access.ts"
import { ClientAddresses } from "./ClientAddresses.ts"
import { countRequest } from "./Instruments.ts"
import { problemContentType, problemHeaders } from "./Problems.ts"

/** Paths, other than those of event streams, that the door treats in a way of their own. */
export interface DoorPaths {
  /** Event streams, and what is upgraded: a credential may stand in the URL. */
  readonly urlCredentials: (path: string) => boolean
  /** Answered by a protocol that has errors of its own: refusals are left to it, and so is the counting of calls. */
  readonly ownRefusals: (path: string) => boolean
  /** For operators, unless the settings open them to everybody. */
  readonly operators: ReadonlySet<string>
}

export class Callers extends Context.Service<
  Callers,
  {
    /** Calls `next` where the request may come in, at once or later; else answers it. */
    readonly request: (
      request: IncomingMessage,
      response: ServerResponse,
      requestId: string,
      path: string,
      next: () => void
    ) => void
    /** The same before an upgrade. */
    readonly upgrade: (request: IncomingMessage, socket: Duplex, path: string, next: () => void) => void
  }
>()("ruvector/gateway/Callers") {
  static readonly layer = (paths: DoorPaths) =>
    Layer.effect(
      Callers,
      Effect.gen(function* () {
        const access = yield* Access
        const { clientAddress } = yield* ClientAddresses
        const { docsAccess, metricsAccess } = yield* Settings
        const open = new Set(["/", "/health/live", "/health/ready"])
        if (metricsAccess === "open") for (const path of paths.operators) open.add(path)
        if (docsAccess === "open") for (const path of ["/docs", "/openapi.json"]) open.add(path)

        const known = (request: IncomingMessage, path: string, done: (caller: Principal | ApiError) => void): void => {
          const address = clientAddress(request)
          addresses.set(request, address)
          // A protocol with errors of its own may have credentials of its own too.
          if (paths.ownRefusals(path) && credentialOf(request.headers, undefined) === undefined) {
            return done(access.withoutCredential)
          }
          const asked: AccessRequest = { headers: request.headers, address }
          const inUrl = paths.urlCredentials(path)
          const answer = access.authenticate(inUrl ? { ...asked, url: request.url as string } : asked)
          if (inUrl) request.url = withoutAccessToken(request.url as string)
          if (answer instanceof Promise) void answer.then(done)
          else done(answer)
        }

        const refusalOf = (
          request: IncomingMessage,
          caller: Principal | ApiError,
          path: string
        ): ApiError | undefined => {
          if (!isPrincipal(caller)) return caller
          if (paths.operators.has(path)) return isOperator(caller) ? undefined : operatorsOnly
          return access.admit(caller, addressOf(request))
        }

        return Callers.of({
          request: (request, response, requestId, path, next) => {
            if (open.has(path)) {
              addresses.set(request, clientAddress(request))
              callers.set(request, stranger)
              return next()
            }
            known(request, path, (caller) => {
              if (paths.ownRefusals(path)) {
                callers.set(request, caller)
                return next()
              }
              const refusal = refusalOf(request, caller, path)
              if (refusal !== undefined) return refuse(request, response, refusal, requestId)
              callers.set(request, caller)
              next()
            })
          },
          upgrade: (request, socket, path, next) => {
            known(request, path, (caller) => {
              if (socket.destroyed) return
              const refusal = refusalOf(request, caller, path)
              if (refusal !== undefined) return refuseUpgrade(socket, refusal)
              callers.set(request, caller)
              next()
            })
          }
        })
      })
    )
}

/** Who a request that came through the door is from. */
export const callerOf = (request: IncomingMessage): Principal => {
  const caller = answerOf(request)
  if (!isPrincipal(caller)) throw new Error(`a request of nobody came through the door: ${caller._tag}`)
  return caller
}

/** The same where refusals are left to the wire. */
export const answerOf = (request: IncomingMessage): Principal | ApiError => callers.get(request) ?? nobody

/** The client's address, behind the proxies that are trusted. */
export const addressOf = (request: IncomingMessage): string => addresses.get(request) ?? ""

const addresses = new WeakMap<IncomingMessage, string>()

const callers = new WeakMap<IncomingMessage, Principal | ApiError>()

/** Who asks for what is open to everybody: may do nothing else. */
const stranger: Principal = { ...anonymous, scopes: new Set() }

/** Of what did not come through the door. */
const nobody = new Unauthenticated({ reason: "missing", detail: "Send an API key or a token." })

export const operatorsOnly = new Forbidden({
  scope: "admin",
  detail: "This is for operators: the scope admin in the tenant default."
})

const refuse = (request: IncomingMessage, response: ServerResponse, error: ApiError, requestId: string): void => {
  const problem = toProblem(error)
  countRequest("http", "refused", problem.status, 0)
  if (response.writableEnded) return
  response.writeHead(problem.status, {
    "content-type": problemContentType,
    "x-request-id": requestId,
    ...problemHeaders(error, problem, request.httpVersionMajor)
  })
  response.end(JSON.stringify(problem))
}

/** Answers what asked to be upgraded, and ends its connection. */
export const refuseUpgrade = (socket: Duplex, error: ApiError): void => {
  const problem = toProblem(error)
  countRequest("http", "refused", problem.status, 0)
  const body = JSON.stringify(problem)
  const headers = {
    ...problemHeaders(error, problem),
    "content-type": problemContentType,
    "content-length": String(Buffer.byteLength(body)),
    connection: "close"
  }
  const head = Object.entries(headers).map(([name, value]) => `${name}: ${value}\r\n`)
  socket.end(`HTTP/1.1 ${problem.status} ${STATUS_CODES[problem.status] ?? ""}\r\n${head.join("")}\r\n${body}`)
}
