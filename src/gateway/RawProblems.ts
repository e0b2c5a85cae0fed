/** Problems that are answered where there is no request to answer: before it was parsed, or instead of parsing it. */
import { STATUS_CODES } from "node:http"
import { problemContentType } from "./Problems.ts"

export interface RawProblem {
  readonly status: number
  readonly contentType: string
  readonly body: string
  /** The whole answer in HTTP/1.1, after which the connection ends. */
  readonly text: string
}

const rawProblem = (status: number, code: string, detail: string, extra: Record<string, unknown> = {}): RawProblem => {
  const title = STATUS_CODES[status] ?? ""
  const body = JSON.stringify({ type: `urn:ruvector:problem:${code}`, title, status, detail, code, ...extra })
  const retry =
    "retry_after_ms" in extra ? `retry-after: ${Math.ceil(Number(extra["retry_after_ms"]) / 1_000)}\r\n` : ""
  const head = `content-type: ${problemContentType}\r\ncontent-length: ${Buffer.byteLength(body)}\r\ncache-control: no-store\r\n`
  return {
    status,
    contentType: problemContentType,
    body,
    text: `HTTP/1.1 ${status} ${title}\r\n${head}${retry}connection: close\r\n\r\n${body}`
  }
}

const overloaded = (status: number, bound: string) =>
  rawProblem(status, "overloaded", `The bound ${bound} is reached; nothing was done.`, {
    field: bound,
    retry_after_ms: 1_000
  })

export const rawProblems = {
  headersTooLarge: rawProblem(431, "headers_too_large", "The request's headers are over the limit.", {
    field: "headers",
    expected: "headers of at most maxHeaderBytes",
    got: "more"
  }),
  requestTimeout: rawProblem(408, "request_timeout", "The request did not arrive in time.", {
    field: "",
    expected: "a whole request within requestTimeoutMillis, its headers within headersTimeoutMillis",
    got: "part of one"
  }),
  plaintext: rawProblem(400, "tls_required", "This port speaks TLS.", {
    field: "scheme",
    expected: "https",
    got: "a request in the clear"
  }),
  connectionsMax: overloaded(503, "connectionsMax"),
  connectionsPerIpMax: overloaded(429, "connectionsPerIpMax"),
  notGateway: rawProblem(421, "not_gateway", "This node owns partitions and serves no clients: ask a gateway."),
  shuttingDown: rawProblem(503, "shutting_down", "This node is shutting down; nothing was done.", {
    retry_after_ms: 1_000
  })
}

/** What HTTP/1.1's parser could not read. */
export const malformed = (got: string): RawProblem =>
  rawProblem(400, "invalid_input", "The request is not HTTP/1.1.", {
    field: "",
    expected: "an HTTP/1.1 request within the limits",
    got
  })
