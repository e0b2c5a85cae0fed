/**
 * One request to Google Cloud Storage's JSON API, over connections that are kept. Credentials and the endpoint are the
 * storage library's (`STORAGE_EMULATOR_HOST` too); the request is Node's own. The library's uploads pass through three
 * layers of streams and its retries do not say what they had sent, which is what a conditional write has to know.
 */
import { createReadStream } from "node:fs"
import * as http from "node:http"
import * as https from "node:https"
import { crc32c } from "./Crc32c.ts"

export interface GcsRequest {
  readonly method: "GET" | "POST" | "PUT" | "DELETE"
  /** From the endpoint's root, with its query; or a whole address that the store gave. */
  readonly path: string
  readonly headers?: Readonly<Record<string, string>>
  readonly body?: RequestBody
  /** Ends the request when it is aborted. */
  readonly signal?: AbortSignal | undefined
}

/** Bytes one after the other, or a stretch of a file, which is read as it is sent. */
export type RequestBody =
  | ReadonlyArray<Uint8Array>
  | { readonly file: string; readonly offset: number; readonly length: number }

export interface GcsAnswer {
  readonly status: number
  readonly headers: http.IncomingHttpHeaders
  /** Memory of its own. */
  readonly body: Buffer
  /** CRC-32C of the body. */
  readonly crc: number
}

/** No whole answer came. `sent` is false where the store cannot have got anything of the request. */
export class RequestFailed extends Error {
  readonly sent: boolean

  constructor(detail: string, sent: boolean) {
    super(detail)
    this.sent = sent
  }
}

/** There are no credentials, or none could be had. */
export class CredentialsFailed extends RequestFailed {}

export interface GcsRequestsOptions {
  /** Such as `https://storage.googleapis.com`, without a slash at its end. */
  readonly endpoint: string
  /** The headers that say who asks. Rejects where there are no credentials. */
  readonly authorize: () => Promise<Iterable<readonly [string, string]>>
  /** Requests under way at one time; more wait, within their own time. */
  readonly connectionsMax: number
  /** Time for one request, its body and its answer. */
  readonly requestMillis: number
}

export class GcsRequests {
  readonly #options: GcsRequestsOptions
  readonly #agents: Readonly<Record<string, http.Agent>>

  constructor(options: GcsRequestsOptions) {
    this.#options = options
    const agentOptions = {
      keepAlive: true,
      maxSockets: options.connectionsMax,
      noDelay: true,
      scheduling: "lifo" as const
    }
    this.#agents = { "http:": new http.Agent(agentOptions), "https:": new https.Agent(agentOptions) }
  }

  /** Closes the connections. */
  close(): void {
    for (const agent of Object.values(this.#agents)) agent.destroy()
  }

  async send(request: GcsRequest): Promise<GcsAnswer> {
    let authorization: Iterable<readonly [string, string]>
    try {
      authorization = await within(this.#options.requestMillis, this.#options.authorize())
    } catch (cause) {
      throw new CredentialsFailed(`no credentials: ${messageOf(cause).replace(/[.\s]*$/, "")}`, false)
    }
    return await this.#exchange(request, { ...request.headers, ...Object.fromEntries(authorization) })
  }

  #exchange(request: GcsRequest, headers: Record<string, string>): Promise<GcsAnswer> {
    return new Promise((resolve, reject) => {
      const url = new URL(request.path, this.#options.endpoint)
      const { body, signal } = request
      const length = body === undefined ? 0 : lengthOf(body)
      if (request.method !== "GET" && request.method !== "DELETE") headers["content-length"] = String(length)
      let sent = false
      let settled = false
      const client = (url.protocol === "http:" ? http : https).request(url, {
        method: request.method,
        headers,
        agent: this.#agents[url.protocol]
      })

      const settle = (act: () => void): void => {
        if (settled) return
        settled = true
        clearTimeout(late)
        signal?.removeEventListener("abort", onAbort)
        act()
      }
      const fail = (detail: string): void =>
        settle(() => {
          client.destroy()
          reject(new RequestFailed(detail, sent))
        })
      const onAbort = (): void => fail("interrupted")
      const late = setTimeout(
        () => fail(`no whole answer within ${this.#options.requestMillis} ms`),
        this.#options.requestMillis
      )
      signal?.addEventListener("abort", onAbort)

      client.on("socket", (socket) => {
        // A kept connection is open already. A TLS connection carries nothing before its handshake is done.
        if (!socket.connecting) sent = true
        else socket.once(url.protocol === "http:" ? "connect" : "secureConnect", () => (sent = true))
      })
      client.on("error", (cause) => fail(messageOf(cause)))
      client.on("response", (response) => {
        receive(response).then(
          (received) =>
            settle(() => resolve({ status: response.statusCode ?? 0, headers: response.headers, ...received })),
          (cause: unknown) => fail(messageOf(cause))
        )
      })

      if (signal?.aborted === true) fail("interrupted")
      else if (body === undefined) client.end()
      else if ("file" in body && length > 0) {
        const { file, offset } = body
        const source = createReadStream(file, {
          start: offset,
          end: offset + length - 1,
          highWaterMark: fileChunkBytes
        })
        source.on("error", (cause) => fail(messageOf(cause)))
        client.on("close", () => source.destroy())
        source.pipe(client)
      } else if ("file" in body) client.end()
      else {
        client.cork()
        for (const part of body) client.write(part)
        client.end()
      }
    })
  }
}

/** Bytes of a file read at one time while it is sent. */
const fileChunkBytes = 262_144

const lengthOf = (body: RequestBody): number =>
  "file" in body ? body.length : body.reduce((sum, part) => sum + part.length, 0)

/** The whole body, in memory of its own; rejects where it is cut. */
const receive = (response: http.IncomingMessage): Promise<{ readonly body: Buffer; readonly crc: number }> =>
  new Promise((resolve, reject) => {
    const declared = response.headers["content-length"]
    const expected = declared === undefined ? undefined : Number(declared)
    let body = expected === undefined ? undefined : Buffer.allocUnsafeSlow(expected)
    const parts: Array<Buffer> = []
    let received = 0
    let crc = 0
    response.on("data", (part: Buffer) => {
      if (body === undefined) parts.push(part)
      else body.set(part, received)
      received += part.length
      crc = crc32c(part, crc)
    })
    response.on("error", reject)
    response.on("aborted", () => reject(new Error(`the answer was cut after ${received} bytes`)))
    response.on("end", () => {
      if (expected !== undefined && received !== expected) {
        reject(new Error(`the answer was cut after ${received} of ${expected} bytes`))
        return
      }
      if (body === undefined) {
        body = Buffer.allocUnsafeSlow(received)
        let at = 0
        for (const part of parts) at += part.copy(body, at)
      }
      resolve({ body, crc })
    })
  })

const within = <A>(millis: number, work: Promise<A>): Promise<A> => {
  let late: NodeJS.Timeout | undefined
  const timeout = new Promise<never>((_, reject) => {
    late = setTimeout(() => reject(new Error(`no answer within ${millis} ms`)), millis)
  })
  return Promise.race([work, timeout]).finally(() => clearTimeout(late))
}

const messageOf = (cause: unknown): string => {
  const { code, message } = cause as NodeJS.ErrnoException
  if (code === undefined || message?.includes(code) === true) return message ?? String(cause)
  return `${message} (${code})`
}
