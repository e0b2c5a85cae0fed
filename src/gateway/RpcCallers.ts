/**
 * Who calls over RPC. A call's handler sees headers and no request: those of the request or the upgrade, and over them those
 * that the client gives with the call, where a credential may stand too. Who the connection is from is carried to its calls
 * in a header that only the server can write: a random name, known here for as long as the request or the connection lasts.
 */
import { randomUUID } from "node:crypto"
import type { IncomingHttpHeaders, IncomingMessage } from "node:http"
import * as NodeHttpServerRequest from "@effect/platform-node/NodeHttpServerRequest"
import { Effect, type Scope } from "effect"
import { Headers, type HttpServerRequest } from "effect/http"
import { type ApiError, Unauthenticated } from "../protocol/Errors.ts"
import type { Principal } from "../protocol/Principal.ts"
import { type Access, isPrincipal } from "./Access.ts"
import { addressOf, answerOf } from "./Callers.ts"
import { sourceOfRequest } from "./Sources.ts"

export interface Caller {
  readonly principal: Principal
  readonly address: string
  /** What its searches wait their turns with. */
  readonly source: string
}

interface Carried {
  readonly answer: Principal | ApiError
  readonly address: string
  readonly message: IncomingMessage
}

const header = "x-ruvector-caller"

const known = new Map<string, Carried>()

/** Serves a request, or a connection, whose calls know who they are from. */
export const carried = <A, E, R>(
  request: HttpServerRequest.HttpServerRequest,
  serve: (carrying: HttpServerRequest.HttpServerRequest) => Effect.Effect<A, E, R>
): Effect.Effect<A, E, R | Scope.Scope> =>
  Effect.suspend(() => {
    const message = NodeHttpServerRequest.toIncomingMessage(request) as IncomingMessage
    const name = randomUUID()
    known.set(name, { answer: answerOf(message), address: addressOf(message), message })
    const headers = Headers.set(request.headers, header, name)
    return Effect.andThen(
      // A response that is streamed goes on as long as the request's scope.
      Effect.addFinalizer(() => Effect.sync(() => known.delete(name))),
      serve(Object.create(request, { headers: { value: headers } }))
    )
  })

/** Who a call is from: whose credential it gives itself, else whose the connection is. */
export const callerOfCall = (access: Access["Service"], headers: Headers.Headers): Effect.Effect<Caller, ApiError> =>
  Effect.suspend((): Effect.Effect<Caller, ApiError> => {
    const found = known.get(headers[header] ?? "")
    // A client that writes the header itself names nobody.
    if (found === undefined) return Effect.fail(nobody)
    const { address, message } = found
    const settled = (answer: Principal | ApiError): Effect.Effect<Caller, ApiError> =>
      isPrincipal(answer)
        ? Effect.succeed({ principal: answer, address, source: sourceOfRequest(message, answer) })
        : Effect.fail(answer)
    const own = ownCredentials(headers, message.headers)
    if (own === undefined) return settled(found.answer)
    const answer = access.authenticate({ headers: own, address })
    return answer instanceof Promise
      ? Effect.flatMap(
          Effect.promise(() => answer),
          settled
        )
      : settled(answer)
  })

const credentialHeaders = ["authorization", "x-api-key"] as const

/** The credentials of a call that are not those of its connection. */
const ownCredentials = (call: Headers.Headers, connection: IncomingHttpHeaders): IncomingHttpHeaders | undefined => {
  let own: Record<string, string> | undefined
  for (const name of credentialHeaders) {
    const given = call[name]
    if (given !== undefined && given !== connection[name]) own = { ...own, [name]: given }
  }
  return own
}

const nobody = new Unauthenticated({ reason: "invalid_request", detail: "The call does not say whose it is." })
