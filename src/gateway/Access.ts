/**
 * Who may do what, asked by every wire: who a request is from ({@link Access.authenticate}), whether that one may do it
 * ({@link Access.allow}), and whether it asks too often ({@link Access.admit}).
 *
 * All three are plain calls, because they are made for every request and every frame: an answer is there at once where the
 * credential was seen before, and a promise where it has to be looked up.
 */
import type { IncomingHttpHeaders } from "node:http"
import { isIPv4 } from "node:net"
import { Context, Data, Effect, Layer } from "effect"
import { Settings, type SettingValues } from "../config.ts"
import { type ApiError, CollectionNotFound, Forbidden, type RateLimited, Unauthenticated } from "../protocol/Errors.ts"
import { bearerSubprotocol } from "../protocol/Frames.ts"
import { anonymous, type Principal, type Scope } from "../protocol/Principal.ts"
import { ApiKeyring, isKeyPrincipal } from "./ApiKeyring.ts"
import { countDenial } from "./Instruments.ts"
import { RateLimits } from "./RateLimits.ts"
import { TokenVerifier } from "./TokenVerifier.ts"

/** What of a request says who it is from. */
export interface AccessRequest {
  /** With names in lower case. */
  readonly headers: IncomingHttpHeaders
  /** With the query string, where credentials may stand in it (`access_token`): event streams and WebSockets. */
  readonly url?: string
  /** The client's address. */
  readonly address: string
}

/** The node would listen where nobody could use it, or anybody could. `message` is one line for people. */
export class AccessRefused extends Data.TaggedError("AccessRefused")<{ readonly message: string }> {}

export class Access extends Context.Service<
  Access,
  {
    /** Who a request without a credential is from. */
    readonly withoutCredential: Principal | Unauthenticated
    /** Whether answers can differ by credential at all: what may be cached for everybody has to say so. */
    readonly varies: () => boolean
    /** Who a request is from. Refusals are logged here. */
    readonly authenticate: (request: AccessRequest) => Principal | ApiError | Promise<Principal | ApiError>
    /**
     * Whether the principal may do that at all and, where one is named (as the client names it), with that collection. One
     * that the credential is not for is answered as one that is not there.
     */
    readonly allow: (principal: Principal, scope: Scope, collection?: string) => ApiError | undefined
    /** One request (or frame that asks for work) more of this principal from this address. */
    readonly admit: (principal: Principal, address: string) => RateLimited | undefined
    /**
     * For what is held open: calls `ended` once, when the credential is revoked or past its end. The answer stops the watch;
     * whoever holds the connection calls it when that closes.
     */
    readonly watch: (principal: Principal, ended: (error: ApiError) => void) => () => void
  }
>()("ruvector/gateway/Access") {
  static readonly layer: Layer.Layer<Access, AccessRefused, ApiKeyring | RateLimits | Settings | TokenVerifier> =
    Layer.effect(
      Access,
      Effect.gen(function* () {
        const settings = yield* Settings
        const keys = yield* ApiKeyring
        const tokens = yield* TokenVerifier
        const rates = yield* RateLimits
        const run = Effect.runForkWith(yield* Effect.context<never>())
        const onLoopback = isLoopback(settings.host)
        const isOpen =
          settings.anonymousAccess === "everyone" || (settings.anonymousAccess === "loopback" && onLoopback)
        if (settings.anonymousAccess === "loopback" && !onLoopback && !tokens.configured && !keys.any()) {
          return yield* new AccessRefused({ message: nobodyCould(settings) })
        }
        if (isOpen) {
          const who =
            settings.anonymousAccess === "everyone" ? "everybody who reaches the port" : "whoever is on this machine"
          yield* Effect.logWarning("Requests without a credential may do everything", {
            who,
            setting: `--anonymous-access ${settings.anonymousAccess}`
          })
        }

        const log = new RefusalLog((message, fields) => {
          run(Effect.logWarning(message, fields))
        })
        const refused = (error: ApiError, fields: Record<string, string>): void => {
          countDenial(error._tag)
          log.write("Refused", error, fields)
        }
        const settle = (answer: Principal | ApiError, address: string, id: string): Principal | ApiError => {
          if (isPrincipal(answer)) return answer
          // What could not be found out is nobody's fault, and without a credential nothing is guessed.
          if (answer._tag === "Unauthenticated" && answer.reason !== "missing") rates.refused(address)
          refused(answer, { address, credential: id })
          return answer
        }

        const watches = new Watches(settings.credentialsWatchedMax, (principal) =>
          principal.expiresAtMillis <= Date.now()
            ? expired
            : isKeyPrincipal(principal)
              ? keys.ended(principal)
              : undefined
        )
        const timer = setInterval(
          () => watches.look(),
          Math.max(25, Math.min(1_000, Math.trunc(settings.keyRefreshMillis / 4)))
        )
        timer.unref()
        yield* Effect.addFinalizer(() => Effect.sync(() => clearInterval(timer)))

        return Access.of({
          withoutCredential: isOpen ? anonymous : missing,
          varies: () => tokens.configured || keys.any(),
          authenticate: ({ headers, url, address }) => {
            const found = credentialOf(headers, url)
            if (found === undefined) return isOpen ? anonymous : settle(missing, address, "none")
            if (typeof found !== "string") return settle(found, address, "unclear")
            const isKey = found.startsWith("rvk_")
            const answer = isKey ? keys.authenticate(found) : tokens.authenticate(found)
            if (typeof answer !== "function" && isPrincipal(answer)) return answer
            // Only what is not known as good is held up by what the address did before.
            const tooMany = rates.tooManyRefusals(address)
            if (tooMany !== undefined) {
              countDenial(tooMany._tag)
              return tooMany
            }
            const id = isKey ? `key ${found.slice(4, 20).replaceAll(/[^0-9a-z]/g, "?")}` : "token"
            return typeof answer === "function"
              ? answer().then((settled) => settle(settled, address, id))
              : settle(answer, address, id)
          },
          allow: (principal, scope, collection) => {
            const hidden =
              collection !== undefined && principal.collections !== undefined && !principal.collections.has(collection)
            if (principal.scopes.has(scope)) return hidden ? new CollectionNotFound({ collection }) : undefined
            const error = hidden
              ? new CollectionNotFound({ collection })
              : new Forbidden({ scope, detail: `This needs the scope ${scope}, which the credential does not have.` })
            refused(error, { principal: principal.id, tenant: principal.tenant, scope })
            return error
          },
          admit: (principal, address) => {
            if (principal === anonymous) {
              // On loopback it is the user at this machine; elsewhere everybody, told apart by address.
              return onLoopback && settings.anonymousAccess === "loopback" ? undefined : rates.byAddress(address)
            }
            const limited = rates.byKey(`${principal.tenant}/${principal.id}`) ?? rates.byAddress(address)
            if (limited !== undefined) countDenial(limited._tag)
            return limited
          },
          watch: (principal, ended) => (principal === anonymous ? notWatched : watches.add(principal, ended))
        })
      })
    )
}

/** Where there are no wires: the program itself asks, and may do everything. */
export const layerEmbedded = Layer.succeed(Access, {
  withoutCredential: anonymous,
  varies: () => false,
  authenticate: () => anonymous,
  allow: () => undefined,
  admit: () => undefined,
  watch: () => notWatched
})

/** Whether {@link Access.authenticate} answered with a principal. */
export const isPrincipal = (answer: Principal | ApiError): answer is Principal => !("_tag" in answer)

const notWatched = () => {}

const missing = new Unauthenticated({
  reason: "missing",
  detail: "Send an API key or a token: Authorization: Bearer ..., or x-api-key."
})
const expired = new Unauthenticated({ reason: "invalid_token", detail: "The credential has expired." })
const unclear = (detail: string) => new Unauthenticated({ reason: "invalid_request", detail })

/** Whether an address to listen on is reached from this machine only. */
export const isLoopback = (host: string): boolean =>
  host === "localhost" || host === "::1" || (isIPv4(host) && host.startsWith("127."))

const nobodyCould = ({ host, data }: SettingValues): string =>
  `${host} is reached from other machines, and nobody has a credential yet: make a key (ruvector keys create --name first --scopes read,write,admin --data ${data}), ` +
  "name an issuer of tokens (--jwt-issuer), or let everybody in (--anonymous-access everyone)"

/** The one credential of a request, wherever it stands; `undefined` where there is none. */
export const credentialOf = (
  headers: IncomingHttpHeaders,
  url: string | undefined
): string | Unauthenticated | undefined => {
  const { authorization } = headers
  let found: string | undefined
  if (authorization !== undefined) {
    const bearer = /^bearer +([\x21-\x7e]+) *$/i.exec(authorization)
    if (bearer === null) return unclear("Authorization: expected Bearer and a credential.")
    found = bearer[1] as string
  }
  const others = [
    headers["x-api-key"],
    subprotocolCredential(headers),
    url === undefined ? undefined : accessToken(url)
  ]
  for (const other of others) {
    if (other === undefined) continue
    if (typeof other !== "string" || other === "") return unclear("A credential is given twice, or is empty.")
    if (found !== undefined && found !== other) return unclear("Two different credentials are given.")
    found = other
  }
  return found
}

/** Browsers can give a WebSocket no header but this one. */
const subprotocolCredential = (headers: IncomingHttpHeaders): string | undefined => {
  const offered = headers["sec-websocket-protocol"]
  if (offered === undefined || !offered.includes(bearerSubprotocol)) return undefined
  for (const one of offered.split(",")) {
    const name = one.trim()
    if (name.startsWith(bearerSubprotocol)) return name.slice(bearerSubprotocol.length)
  }
  return undefined
}

const accessToken = (url: string): string | Array<string> | undefined => {
  if (!url.includes(accessTokenParameter)) return undefined
  const given = new URLSearchParams(url.slice(url.indexOf("?") + 1)).getAll(accessTokenParameter)
  return given.length > 1 ? given : given[0]
}

const accessTokenParameter = "access_token"

/** The URL without the credential in it, so that nothing further on sees or logs it. */
export const withoutAccessToken = (url: string): string => {
  if (!url.includes(accessTokenParameter)) return url
  const at = url.indexOf("?")
  if (at === -1) return url
  const rest = url
    .slice(at + 1)
    .split("&")
    .filter((pair) => !isAccessToken(pair.split("=", 1)[0] as string))
    .join("&")
  return rest === "" ? url.slice(0, at) : `${url.slice(0, at)}?${rest}`
}

const isAccessToken = (name: string): boolean => {
  try {
    return decodeURIComponent(name.replaceAll("+", " ")) === accessTokenParameter
  } catch {
    return false
  }
}

/** Refusals as lines of the log, at most {@link refusalLinesPerSecond}: whoever guesses at keys does not fill a disk. */
class RefusalLog {
  readonly #write: (message: string, fields: Record<string, string | number>) => void
  #second = 0
  #lines = 0
  #left = 0

  constructor(write: (message: string, fields: Record<string, string | number>) => void) {
    this.#write = write
  }

  write(message: string, error: ApiError, fields: Record<string, string>): void {
    const second = Math.trunc(Date.now() / 1_000)
    if (second !== this.#second) {
      this.#second = second
      this.#lines = 0
    }
    if (this.#lines >= refusalLinesPerSecond) {
      this.#left += 1
      return
    }
    this.#lines += 1
    const why = "detail" in error ? error.detail : error._tag
    const left = this.#left === 0 ? {} : { not_logged_before: this.#left }
    this.#left = 0
    this.#write(message, { ...fields, why, ...left })
  }
}

const refusalLinesPerSecond = 10

/** Streams held open, by the credential they were opened with: looked at once for all of one credential. */
class Watches {
  readonly #max: number
  readonly #endOf: (principal: Principal) => Unauthenticated | undefined
  readonly #watched = new Map<Principal, Set<(error: ApiError) => void>>()

  constructor(max: number, endOf: (principal: Principal) => Unauthenticated | undefined) {
    this.#max = max
    this.#endOf = endOf
  }

  add(principal: Principal, ended: (error: ApiError) => void): () => void {
    let listeners = this.#watched.get(principal)
    if (listeners === undefined) {
      // What cannot be watched is not held open.
      if (this.#watched.size >= this.#max) {
        setImmediate(ended, tooManyWatched)
        return notWatched
      }
      listeners = new Set()
      this.#watched.set(principal, listeners)
    }
    const all = listeners
    // A listener of its own for each watch, also of one function.
    const listener = (error: ApiError) => ended(error)
    all.add(listener)
    return () => {
      all.delete(listener)
      if (all.size === 0 && this.#watched.get(principal) === all) this.#watched.delete(principal)
    }
  }

  look(): void {
    for (const [principal, listeners] of this.#watched) {
      const error = this.#endOf(principal)
      if (error === undefined) continue
      this.#watched.delete(principal)
      for (const ended of listeners) ended(error)
    }
  }
}

const tooManyWatched = new Unauthenticated({
  reason: "invalid_token",
  detail: "Too many credentials have streams open (credentialsWatchedMax)."
})
