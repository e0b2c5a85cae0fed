/**
 * Which web pages may call. A browser says where a page comes from (`Origin`) with every request that could do anything,
 * and with every WebSocket; who says nothing is no page. Pages of the server's own origin may always call, others by the
 * setting `corsOrigins`; all others are refused, not only kept from reading the answer, so that no page that somebody
 * opens can write into a server on their machine.
 *
 * A page's host may be given the address of this machine once it is open ("DNS rebinding"), so that its own origin seems
 * to be the server's. Where only pages of this machine may call, what a browser asks a server that listens on a loopback
 * address for must therefore have this machine's name. A proxy on this machine that hands on other names needs `corsOrigins`.
 */
import type { IncomingMessage, ServerResponse } from "node:http"
import { isIP } from "node:net"
import type { Duplex } from "node:stream"
import { Forbidden, toProblem } from "../protocol/Errors.ts"
import { countRequest } from "./Instruments.ts"
import { problemContentType } from "./Problems.ts"

/** Seconds that a browser may remember what a preflight was answered. */
const preflightSeconds = 7_200

const methods = "GET, HEAD, POST, PUT, PATCH, DELETE"
const exposed = "etag, retry-after, x-request-id, x-cache, cache-tag"

export class Origins {
  readonly #allowed: "loopback" | "*" | ReadonlySet<string>
  readonly #local: boolean

  /** `corsOrigins` as the setting has it; `host` is the address listened on. */
  constructor(corsOrigins: string, host: string) {
    this.#allowed = corsOrigins === "loopback" || corsOrigins === "*" ? corsOrigins : new Set(corsOrigins.split(","))
    this.#local = corsOrigins === "loopback" && isLoopback(host)
  }

  /** `true`: the request is answered, as a preflight or with a refusal. Else the response has the headers it needs. */
  answered(request: IncomingMessage, response: ServerResponse, requestId: string): boolean {
    const { origin } = request.headers
    if (origin === undefined && !this.#local) return false
    const refused = this.refusal(request)
    if (refused !== undefined) {
      const body = JSON.stringify(toProblem(refused))
      response.writeHead(403, {
        "content-type": problemContentType,
        "cache-control": "no-store",
        "x-request-id": requestId
      })
      response.end(body)
      // What is left of the body is not read.
      request.resume()
      return true
    }
    if (origin === undefined) return false
    response.setHeader("access-control-allow-origin", origin)
    response.setHeader("access-control-expose-headers", exposed)
    response.setHeader("vary", "origin")
    if (request.method !== "OPTIONS" || request.headers["access-control-request-method"] === undefined) return false
    response.writeHead(204, {
      "access-control-allow-methods": methods,
      "access-control-allow-headers": request.headers["access-control-request-headers"] ?? "content-type",
      "access-control-max-age": String(preflightSeconds),
      ...(request.headers["access-control-request-private-network"] === "true"
        ? { "access-control-allow-private-network": "true" }
        : {}),
      "x-request-id": requestId
    })
    response.end()
    return true
  }

  /** Why a request or an upgrade is refused; `undefined` where it is not. */
  refusal(request: IncomingMessage): Forbidden | undefined {
    const asked = request.headers.host ?? (request.headers[":authority"] as string | undefined)
    if (this.#local && asked !== undefined && isBrowser(request) && !isLoopback(hostOf(asked))) {
      return new Forbidden({
        scope: "",
        detail: `This server is for its own machine: ask for it as 127.0.0.1 or localhost, not ${asked.slice(0, 80)}.`
      })
    }
    const { origin } = request.headers
    if (origin === undefined || this.#allows(origin, asked)) return undefined
    return new Forbidden({
      scope: "",
      detail: `Pages of ${origin.slice(0, 80)} may not call this server (corsOrigins).`
    })
  }

  #allows(origin: string, asked: string | undefined): boolean {
    if (this.#allowed === "*") return true
    const url = URL.canParse(origin) ? new URL(origin) : undefined
    if (url !== undefined && url.host === asked) return true
    if (this.#allowed === "loopback") return url !== undefined && isLoopback(url.hostname)
    return this.#allowed.has(origin)
  }
}

/** An upgrade has no response to answer with. */
export const refusePage = (socket: Duplex, error: Forbidden): void => {
  countRequest("http", "origin", 403, 0)
  const body = JSON.stringify(toProblem(error))
  socket.end(
    `HTTP/1.1 403 Forbidden\r\ncontent-type: ${problemContentType}\r\ncontent-length: ${Buffer.byteLength(body)}\r\nconnection: close\r\n\r\n${body}`
  )
}

/** A page that reads what seems to be its own server sends no origin; what a browser calls itself it cannot change. */
const isBrowser = ({ headers }: IncomingMessage): boolean =>
  headers.origin !== undefined || headers["user-agent"]?.startsWith("Mozilla/") === true

/** `example.com:80` -> `example.com`, `[::1]:80` -> `::1` */
const hostOf = (authority: string): string => authority.replace(/:\d*$/, "").replace(/^\[(.*)\]$/, "$1")

const isLoopback = (host: string): boolean => {
  const name = host.toLowerCase().replace(/^\[(.*)\]$/, "$1")
  return (
    name === "localhost" ||
    name.endsWith(".localhost") ||
    name === "::1" ||
    (isIP(name) === 4 && name.startsWith("127."))
  )
}
