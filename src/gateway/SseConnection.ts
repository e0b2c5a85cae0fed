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
  #ended = false

  /** `onEnd` is called once, with why: `gone`, `slow`, or what {@link end} was given. */
  constructor(response: ServerResponse, requestId: string, onEnd: (code: string, bytes: number) => void) {
    this.#response = response
    this.#onEnd = onEnd
    response.on("close", () => this.#finish("gone"))
    response.on("error", () => this.#finish("gone"))
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
  readonly hasRoom = (): boolean => !this.#ended && !this.#response.writableNeedDrain

  /** Answers whether there is room for more. */
  write(text: string): boolean {
    this.#bytes += text.length
    this.#lastSentAt = Date.now()
    return this.#response.write(text)
  }

  readonly onDrain = (callback: () => void): void => {
    this.#response.once("drain", callback)
  }

  /** To be called now and then: a comment on a quiet stream, an end to one that is not read. */
  keepAlive(now: number, pingIntervalMillis: number, idleTimeoutMillis: number): void {
    if (this.#ended) return
    const quiet = now - this.#lastSentAt
    if (this.#response.writableNeedDrain) {
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

  #finish(code: string): void {
    if (this.#ended) return
    this.#ended = true
    this.#onEnd(code, this.#bytes)
  }
}
