/** Clients of the streaming wires that are not ours: `ws`, and SSE read from a plain HTTP response. */
import { WebSocket } from "ws"

export type Event = Record<string, unknown> & { readonly event: string }

/** How a connection says who it is from. */
export interface SocketCredentials {
  readonly headers?: Record<string, string>
  readonly query?: string
  readonly protocols?: ReadonlyArray<string>
}

/** A WebSocket whose answers are awaited one by one, or by the request's id. */
export class SocketClient {
  readonly socket: WebSocket
  readonly closed: Promise<{ readonly code: number; readonly reason: string }>
  readonly #waiting: Array<(event: Event) => void> = []
  readonly #events: Array<Event> = []

  private constructor(socket: WebSocket) {
    this.socket = socket
    this.closed = new Promise((resolve) => {
      socket.once("close", (code, reason) => resolve({ code, reason: reason.toString() }))
    })
    socket.on("error", () => {})
    socket.on("message", (data: Buffer) => {
      const event = JSON.parse(data.toString()) as Event
      const waiting = this.#waiting.shift()
      if (waiting === undefined) this.#events.push(event)
      else waiting(event)
    })
  }

  static async open(
    base: string,
    { headers = {}, query = "", protocols = [] }: SocketCredentials = {}
  ): Promise<SocketClient> {
    const url = `${base.replace("http", "ws")}/api/v1/ws${query}`
    const socket = new WebSocket(url, [...protocols], { perMessageDeflate: false, headers })
    const client = new SocketClient(socket)
    await new Promise((resolve, reject) => {
      socket.once("open", resolve)
      socket.once("error", reject)
    })
    return client
  }

  send(frame: unknown): void {
    this.socket.send(typeof frame === "string" || Buffer.isBuffer(frame) ? frame : JSON.stringify(frame))
  }

  next(): Promise<Event> {
    const event = this.#events.shift()
    return event === undefined ? new Promise((resolve) => this.#waiting.push(resolve)) : Promise.resolve(event)
  }

  /** The events up to and with the first of this kind. */
  async until(kind: string): Promise<Array<Event>> {
    const events: Array<Event> = []
    for (;;) {
      const event = await this.next()
      events.push(event)
      if (event.event === kind) return events
    }
  }

  async ask(frame: unknown): Promise<Event> {
    this.send(frame)
    return this.next()
  }

  close(): Promise<unknown> {
    this.socket.close()
    return this.closed
  }
}

/** The binary form of a frame: length, JSON, padding, float32s. */
export const binaryFrame = (frame: object, vectors: ReadonlyArray<number>): Buffer => {
  const json = Buffer.from(JSON.stringify(frame))
  const head = Buffer.alloc(4 + ((json.length + 3) & ~3))
  head.writeUInt32LE(json.length, 0)
  json.copy(head, 4)
  return Buffer.concat([head, Buffer.from(new Float32Array(vectors).buffer)])
}

export interface SseEvent {
  readonly id: string
  readonly data: Event
}

/** Reads a whole event stream, or until `enough` says so. */
export const readSse = async (
  response: Response,
  enough: (events: ReadonlyArray<SseEvent>) => boolean = () => false
): Promise<ReadonlyArray<SseEvent>> => {
  const events: Array<SseEvent> = []
  let text = ""
  const reader = (response.body as ReadableStream<Uint8Array>).getReader()
  const decoder = new TextDecoder()
  for (;;) {
    const { done, value } = await reader.read()
    if (done) return events
    text += decoder.decode(value, { stream: true })
    for (;;) {
      const end = text.indexOf("\n\n")
      if (end === -1) break
      const block = text.slice(0, end)
      text = text.slice(end + 2)
      const id = /^id: (.*)$/m.exec(block)?.[1] ?? ""
      const data = /^data: (.*)$/m.exec(block)?.[1]
      if (data !== undefined) events.push({ id, data: JSON.parse(data) as Event })
    }
    if (enough(events)) {
      await reader.cancel()
      return events
    }
  }
}
