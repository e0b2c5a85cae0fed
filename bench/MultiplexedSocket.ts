/** A WebSocket of a client that carries many sessions: searches awaited by their ids. */
import { WebSocket } from "ws"
import { openWebSocket } from "./wires.ts"

export class MultiplexedSocket {
  readonly #socket: WebSocket
  readonly #waiting = new Map<string, { resolve: () => void; reject: (error: Error | Refused) => void }>()
  #asked = 0

  private constructor(socket: WebSocket) {
    this.#socket = socket
    socket.on("message", (data: Buffer) => {
      const event = JSON.parse(data.toString()) as {
        readonly event: string
        readonly id?: string
        readonly problem?: { readonly retry_after_ms?: number }
      }
      const waiting = this.#waiting.get(event.id ?? "")
      if (waiting === undefined) return
      this.#waiting.delete(event.id ?? "")
      const retryAfterMillis = event.problem?.retry_after_ms
      if (event.event === "results") waiting.resolve()
      else if (retryAfterMillis !== undefined) waiting.reject(new Refused(retryAfterMillis))
      else waiting.reject(new Error(`not an answer to a search: ${data.toString()}`))
    })
    socket.on("error", () => {})
    socket.on("close", (code) => {
      for (const { reject } of this.#waiting.values()) reject(new Error(`closed with ${code}`))
    })
  }

  static async open(url: string): Promise<MultiplexedSocket> {
    return new MultiplexedSocket(await openWebSocket(new URL(url)))
  }

  get isOpen(): boolean {
    return this.#socket.readyState === WebSocket.OPEN
  }

  /** Ten nearest; `session` empty for the connection's own, `collection` for the default one. */
  search(session: string, query: string, collection = ""): Promise<void> {
    const id = String(this.#asked++)
    const named =
      (session === "" ? "" : `"session":"${session}",`) + (collection === "" ? "" : `"collection":"${collection}",`)
    return new Promise((resolve, reject) => {
      this.#waiting.set(id, { resolve, reject })
      this.#socket.send(`{"type":"search","id":"${id}",${named}"query":${query},"k":10}`)
    })
  }

  /** The same, asked again while it is refused, when the server says. How often it was. */
  async insist(session: string, query: string, collection = ""): Promise<number> {
    for (let refused = 0; ; refused++) {
      try {
        await this.search(session, query, collection)
        return refused
      } catch (error) {
        if (!this.isOpen || !(error instanceof Refused)) throw error
        const { retryAfterMillis } = error
        await new Promise((resolve) => setTimeout(resolve, retryAfterMillis))
      }
    }
  }

  /** Ends it without a word. */
  end(): void {
    this.#socket.removeAllListeners("close")
    this.#socket.terminate()
  }
}

/** Under load: to be asked again later. */
class Refused {
  readonly retryAfterMillis: number

  constructor(retryAfterMillis: number) {
    this.retryAfterMillis = retryAfterMillis
  }
}

/** Milliseconds, sorted when they are asked for. */
export class Latencies {
  readonly #millis: Array<number> = []

  add(millis: number): void {
    this.#millis.push(millis)
  }

  at(share: number): number {
    this.#millis.sort((a, b) => a - b)
    return this.#millis[Math.min(this.#millis.length - 1, Math.floor(this.#millis.length * share))] ?? Number.NaN
  }

  text(): string {
    return `p50 ${this.at(0.5).toFixed(1)} ms, p99 ${this.at(0.99).toFixed(1)} ms, max ${this.at(1).toFixed(1)} ms`
  }
}
