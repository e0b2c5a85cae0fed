/**
 * One response that is a stream of Server-Sent Events, written on Node's response directly: an open stream holds no fiber
 * and no timer of its own.
 */
import type { ServerResponse } from "node:http"

export class SseConnection {
  readonly #response: ServerResponse
  readonly #onEnd: (code: string, bytes: number) => void
  #bytes = 0
  #lastSentAt = Date.now()
  /** The socket takes no more before it has drained. Kept here: a response of HTTP/2 does not say. */
  #full = false
  #drains: Array<() => void> = []
  #ended = false

  /** `onEnd` is called once, with why: `gone`, `slow`, or what {@link end} was given. */
  constructor(response: ServerResponse, requestId: string, onEnd: (code: string, bytes: number) => void) {
    this.#response = response
    this.#onEnd = onEnd
    response.on("close", () => this.#finish("gone"))
    response.on("error", () => this.#finish("gone"))
    response.on("drain", () => this.#drained())
    response.writeHead(200, {
      "content-type": "text/event-stream; charset=utf-8",
      "cache-control": "no-cache",
      "x-accel-buffering": "no",
      "x-request-id": requestId
    })
  }

  get ended(): boolean {
    return this.#ended
  }

  /** Whether the client reads what it is sent. */
  readonly hasRoom = (): boolean => !this.#ended && !this.#full

  /** Answers whether there is room for more. */
  write(text: string): boolean {
    this.#bytes += text.length
    this.#lastSentAt = Date.now()
    if (!this.#response.write(text)) this.#full = true
    return !this.#full
  }

  readonly onDrain = (callback: () => void): void => {
    this.#drains.push(callback)
  }

  /** To be called now and then: a comment on a quiet stream, an end to one that is not read. */
  keepAlive(now: number, pingIntervalMillis: number, idleTimeoutMillis: number): void {
    if (this.#ended) return
    const quiet = now - this.#lastSentAt
    if (this.#full) {
      if (quiet < idleTimeoutMillis) return
      this.#finish("slow")
      this.#response.destroy()
    } else if (quiet >= pingIntervalMillis) this.write(": keep-alive\n\n")
  }

  end(code: string, last: string): void {
    if (this.#ended) return
    this.#response.end(last)
    this.#finish(code)
  }

  #drained(): void {
    this.#full = false
    const drains = this.#drains
    this.#drains = []
    for (const drain of drains) drain()
  }

  #finish(code: string): void {
    if (this.#ended) return
    this.#ended = true
    this.#onEnd(code, this.#bytes)
  }
}
