/**
 * A persistent HTTP/1.1 connection with one request in flight, on a plain socket: requests are bytes made beforehand, and
 * an answer is cut out of what was received. It costs a few microseconds a request, so that on a small machine the
 * client takes little of what is to be measured.
 */
import { connect, type Socket } from "node:net"

export interface Answer {
  readonly status: number
  readonly body: Buffer
}

export type OnAnswer = (answer: Answer) => void

export class HttpConnection {
  static open(url: URL, onFailure: (error: Error) => void): Promise<HttpConnection> {
    return new Promise((resolve, reject) => {
      const socket = connect(Number(url.port), url.hostname)
      socket.once("error", reject)
      socket.once("connect", () => {
        socket.off("error", reject)
        socket.setNoDelay(true)
        resolve(new HttpConnection(socket, onFailure))
      })
    })
  }

  readonly #socket: Socket
  readonly #onFailure: (error: Error) => void
  #received: Buffer | undefined
  #onAnswer: OnAnswer | undefined

  private constructor(socket: Socket, onFailure: (error: Error) => void) {
    this.#socket = socket
    this.#onFailure = onFailure
    socket.on("data", (chunk) => this.#receive(chunk))
    socket.on("error", (error) => this.#fail(error))
    socket.on("close", () => this.#fail(new Error("the server closed the connection")))
  }

  send(request: Uint8Array, onAnswer: OnAnswer): void {
    if (this.#onAnswer !== undefined) throw new Error("a request is in flight on this connection")
    this.#onAnswer = onAnswer
    this.#socket.write(request)
  }

  close(): void {
    this.#socket.removeAllListeners("close")
    this.#socket.destroy()
  }

  #receive(chunk: Buffer): void {
    const bytes = this.#received === undefined ? chunk : Buffer.concat([this.#received, chunk])
    const parsed = parseAnswer(bytes)
    if (parsed === undefined) {
      this.#received = bytes
      return
    }
    this.#received = undefined
    if (this.#onAnswer === undefined || parsed.end !== bytes.length) {
      this.#fail(new Error("the server sent bytes that no request asked for"))
      return
    }
    const onAnswer = this.#onAnswer
    this.#onAnswer = undefined
    onAnswer(parsed)
  }

  #fail(error: Error): void {
    this.close()
    this.#onFailure(error)
  }
}

/** The bytes of a request with a JSON body, for a connection that stays open. */
export const postJson = (url: URL, path: string, body: string): Buffer =>
  Buffer.from(
    `POST ${path} HTTP/1.1\r\nhost: ${url.host}\r\ncontent-type: application/json\r\n` +
      `content-length: ${Buffer.byteLength(body)}\r\n\r\n${body}`
  )

interface ParsedAnswer extends Answer {
  /** Where the answer ends in the bytes. */
  readonly end: number
}

/** The answer at the start of the bytes, or undefined if it is not all there yet. */
export const parseAnswer = (bytes: Buffer): ParsedAnswer | undefined => {
  const headEnd = bytes.indexOf("\r\n\r\n")
  if (headEnd < 0) return undefined
  const head = bytes.toString("latin1", 0, headEnd + 2)
  const status = Number(head.slice(9, 12))
  const bodyFrom = headEnd + 4
  const length = contentLength.exec(head)?.[1]
  if (length !== undefined) {
    const end = bodyFrom + Number(length)
    return end > bytes.length ? undefined : { status, body: bytes.subarray(bodyFrom, end), end }
  }
  if (chunkedEncoding.test(head)) return parseChunks(bytes, bodyFrom, status)
  if (status === 204 || status === 304) return { status, body: Buffer.alloc(0), end: bodyFrom }
  throw new Error(`an answer without a length: ${head}`)
}

const contentLength = /\r\ncontent-length:[ \t]*(\d+)/i
const chunkedEncoding = /\r\ntransfer-encoding:[ \t]*chunked/i

const parseChunks = (bytes: Buffer, from: number, status: number): ParsedAnswer | undefined => {
  const chunks: Array<Buffer> = []
  for (let at = from; ; ) {
    const lineEnd = bytes.indexOf("\r\n", at)
    if (lineEnd < 0) return undefined
    // Number.parseInt stops at a chunk extension.
    const size = Number.parseInt(bytes.toString("latin1", at, lineEnd), 16)
    const dataFrom = lineEnd + 2
    if (size === 0) {
      // Trailers, if any, end with an empty line.
      const end =
        bytes.toString("latin1", dataFrom, dataFrom + 2) === "\r\n" ? dataFrom : bytes.indexOf("\r\n\r\n", dataFrom) + 2
      if (end < dataFrom || end + 2 > bytes.length) return undefined
      return { status, body: Buffer.concat(chunks), end: end + 2 }
    }
    const next = dataFrom + size + 2
    if (next > bytes.length) return undefined
    chunks.push(bytes.subarray(dataFrom, dataFrom + size))
    at = next
  }
}
