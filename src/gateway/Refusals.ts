/**
 * Answers to what is refused under load, made without an error and without reading what was asked: a refusal has to cost next
 * to nothing, since there are most of them when there is least to spare.
 */
import { type IncomingMessage, type ServerResponse, STATUS_CODES } from "node:http"
import type { Duplex } from "node:stream"
import { type Overloaded, toProblem } from "../protocol/Errors.ts"
import { anonymous, type Principal } from "../protocol/Principal.ts"
import type { Asker, Refusal } from "../shards/Shedding.ts"
import { problemContentType } from "./Problems.ts"

/**
 * Who asks, by the principal; by the address where there is none. Nobody in particular: what comes without a credential from
 * this machine, where one address may be many.
 */
export const askerOf = (address: string | undefined, principal: Principal = anonymous): Asker => {
  if (principal.id !== anonymous.id) return { user: `${principal.tenant}/${principal.id}`, tier: principal.tier }
  if (address === undefined || loopback.test(address)) return nobody
  return { user: address, tier: principal.tier }
}

const loopback = /^(?:127\.|::1$|::ffff:127\.)/
/** Users who cannot be told apart. */
export const nobody: Asker = { tier: anonymous.tier }

/** 503 where the node, and not the request, is why. */
type Status = 429 | 503

/** The problem that `toProblem` makes of the same error. */
export const refusalProblem = (refusal: Refusal, status: Status = 429): string =>
  JSON.stringify({
    ...toProblem({ _tag: "Overloaded", ...refusal } as Overloaded),
    ...(status === 429 ? {} : { status, title: STATUS_CODES[status] })
  })

/** Bytes of a body that are read past, to keep a connection. */
const passedBytesMax = 262_144

/** Answers a request whose body was not read. */
export const refuseRequest = (
  request: IncomingMessage,
  response: ServerResponse,
  requestId: string,
  refusal: Refusal,
  status: Status = 429
): void => {
  const text = refusalProblem(refusal, status)
  const headers: Record<string, string | number> = {
    "content-type": problemContentType,
    "content-length": Buffer.byteLength(text),
    "cache-control": "no-store",
    "retry-after": Math.ceil(refusal.retryAfterMillis / 1_000),
    "x-request-id": requestId
  }
  if (request.httpVersionMajor === 1 && (status === 503 || !isShort(request))) headers["connection"] = "close"
  response.writeHead(status, headers)
  response.end(text)
}

const isShort = ({ headers, method }: IncomingMessage): boolean => {
  const length = headers["content-length"]
  if (length === undefined) return method === "GET" || method === "HEAD"
  return Number(length) <= passedBytesMax
}

/** Answers an upgrade, and ends its connection. */
export const refuseUpgrade = (socket: Duplex, refusal: Refusal): void => {
  const text = refusalProblem(refusal, 503)
  const headers = [
    `HTTP/1.1 503 ${STATUS_CODES[503]}`,
    `content-type: ${problemContentType}`,
    `content-length: ${Buffer.byteLength(text)}`,
    "cache-control: no-store",
    `retry-after: ${Math.ceil(refusal.retryAfterMillis / 1_000)}`,
    "connection: close"
  ]
  socket.end(`${headers.join("\r\n")}\r\n\r\n${text}`)
}

/**
 * The part of an answer's text that gives a search frame's id back, where the frame shows at once that it is a search:
 * `type` first, then `id` if it has one, and no session. `undefined`: it has to be decoded to know.
 */
export const searchEnvelope = (data: Buffer, isBinary: boolean): string | undefined => {
  const from = isBinary ? 4 : 0
  const head = data.toString("latin1", from, Math.min(data.length, from + headBytes))
  const match = searchHead.exec(head)
  if (match === null || data.includes(sessionKey)) return undefined
  // Escapes or other alphabets in an id, or one further on, are for a decoder.
  const id = match[1]
  if (id === undefined && data.includes(idKey)) return undefined
  return id === undefined ? "" : `,"id":"${id}"`
}

const headBytes = 192
const searchHead = /^\{"type":"search"(?:,"id":"([\w.:-]{1,128})")?,/
const sessionKey = Buffer.from('"session"')
const idKey = Buffer.from('"id"')
