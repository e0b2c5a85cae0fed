/**
 * Who may do what, asked by every wire: who a request is from ({@link Access.authenticate}), whether that one may do it
 * ({@link Access.allow}), and whether it asks too often ({@link Access.admit}).
 *
 * All three are plain calls, because they are made for every request and every frame: an answer is there at once where the
 * credential was seen before, and a promise where it has to be looked up.
 */
import type { IncomingHttpHeaders } from "node:http"
import { Context } from "effect"
import type { ApiError, RateLimited } from "../protocol/Errors.ts"
import type { Principal, Scope } from "../protocol/Principal.ts"

/** What of a request says who it is from. */
export interface AccessRequest {
  /** With names in lower case. */
  readonly headers: IncomingHttpHeaders
  /** With the query string, where credentials may stand in it (`access_token`): event streams and WebSockets. */
  readonly url?: string
  /** The client's address. */
  readonly address: string
}

export class Access extends Context.Service<
  Access,
  {
    /** Who a request is from. Refusals are logged here. An unknown address that fails too often is {@link RateLimited}. */
    readonly authenticate: (request: AccessRequest) => Principal | ApiError | Promise<Principal | ApiError>
    /** Whether the principal may do that at all and, where one is named (as the client names it), with that collection. */
    readonly allow: (principal: Principal, scope: Scope, collection?: string) => ApiError | undefined
    /** One request (or frame that asks for work) more of this principal from this address. */
    readonly admit: (principal: Principal, address: string) => RateLimited | undefined
    /**
     * For what is held open: calls `ended` once, when the credential is revoked or past its end. The answer stops the watch;
     * whoever holds the connection calls it when that closes.
     */
    readonly watch: (principal: Principal, ended: (error: ApiError) => void) => () => void
  }
>()("ruvector/gateway/Access") {}

/** Whether a {@link Access.authenticate} answered with a principal. */
export const isPrincipal = (answer: Principal | ApiError): answer is Principal => !("_tag" in answer)
