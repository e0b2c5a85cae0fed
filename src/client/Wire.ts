/**
 * One WebSocket to the service, made when it is first needed and made anew whenever it is lost. Calls are frames with an id
 * of their own; every call of ours may be repeated (a write has a key under which it is done once, subscriptions go on from
 * their cursor), so what was not answered when a connection is lost is sent again on the next, until its deadline.
 *
 * A Node process lives for as long as the connection is open or a call is under way, whatever that waits for; no timer keeps
 * it beyond.
 */
import { Backoff } from "./Backoff.ts"
import { errorOfProblem, isTransient, ownError, type ProblemMembers, type VectorDBError } from "./ClientError.ts"
import type { ResolvedOptions, WebSocketLike } from "./ClientOptions.ts"
import { Endpoints, ref, unref } from "./Endpoints.ts"

/** An event of the server, decoded. */
export type WireEvent = Readonly<Record<string, unknown>> & { readonly event: string }

export interface WireCall {
  /** The frame without its `id`; asked anew each time it is sent, so that a subscription can show its newest cursor. */
  readonly frame: () => Readonly<Record<string, unknown>>
  /** Vectors of the frame, one after the other: they travel as bytes. */
  readonly floats?: Float32Array
  /** Infinity: for as long as it is wanted. */
  readonly deadlineMillis: number
  /** `true`: that was the last event. */
  readonly onEvent: (event: WireEvent) => boolean
  readonly onError: (error: VectorDBError) => void
  /** The frame that ends it early on the server; by default `cancel`. */
  readonly endFrame?: string
}

interface Pending {
  readonly id: string
  readonly call: WireCall
  readonly deadlineAt: number
  /** What it counts among those under way: a subscription, which is always under way, nothing. */
  readonly weight: 0 | 1
  timer: ReturnType<typeof setTimeout> | undefined
  /** Until it is sent again, where the server has put it off. */
  retry: ReturnType<typeof setTimeout> | undefined
  /** Sent on the connection that is open now. */
  sent: boolean
  attempts: number
}

/** Attempts at one call that the server puts off, beside those that a lost connection costs. */
const attemptsMax = 8

/** Close codes of the server after which connecting again, as it is, is of no use. `protocol/Frames.ts` has them all. */
const unauthenticatedCode = 4001
const forbiddenCode = 4003

export class Wire {
  readonly #options: ResolvedOptions
  readonly #endpoints: Endpoints
  readonly #backoff: Backoff
  /** By id, in the order in which they came. */
  readonly #calls = new Map<string, Pending>()
  /** Not sent, in the order in which they are to be. */
  readonly #waiting = new Set<Pending>()
  #socket: WebSocketLike | undefined
  #open = false
  #reconnect: ReturnType<typeof setTimeout> | undefined
  #quiet: ReturnType<typeof setInterval> | undefined
  #heardAt = 0
  #asked = false
  #connecting = false
  #refusals = 0
  #sent = 0
  #ids = 0
  #closed = false

  constructor(options: ResolvedOptions) {
    this.#options = options
    this.#backoff = new Backoff(options.reconnectBaseMillis, options.reconnectCapMillis)
    // The nearer one is used from the next connection on; this one is ended when nothing would be lost by it.
    this.#endpoints = new Endpoints(options, () => this.#socket?.close(1000, "moving to a nearer region"))
  }

  /** The endpoint in use, for calls beside the connection. */
  get endpoint(): Promise<string> {
    return this.#endpoints.choose()
  }

  /** The endpoint did not answer a call made beside the connection. */
  failed(url: string): void {
    this.#endpoints.failed(url)
  }

  /** Starts a call; the answer ends it early. Ends nothing that has ended. */
  start(call: WireCall): () => void {
    if (this.#closed) {
      call.onError(ownError("closed", "The client is closed."))
      return nothing
    }
    if (this.#waiting.size >= this.#options.waitingMax && (!this.#open || this.#sent >= this.#options.inFlightMax)) {
      call.onError(ownError("queue_full", `${this.#waiting.size} calls wait already (waitingMax).`))
      return nothing
    }
    const { deadlineMillis } = call
    const pending: Pending = {
      id: (this.#ids++).toString(36),
      call,
      deadlineAt: Date.now() + deadlineMillis,
      weight: deadlineMillis === Number.POSITIVE_INFINITY ? 0 : 1,
      timer: undefined,
      retry: undefined,
      sent: false,
      attempts: 0
    }
    if (deadlineMillis !== Number.POSITIVE_INFINITY) {
      pending.timer = setTimeout(() => this.#expire(pending), deadlineMillis)
    }
    this.#calls.set(pending.id, pending)
    this.#submit(pending)
    return () => this.#cancel(pending)
  }

  close(): void {
    if (this.#closed) return
    this.#closed = true
    clearTimeout(this.#reconnect)
    clearInterval(this.#quiet)
    this.#endpoints.close()
    for (const pending of [...this.#calls.values()]) {
      this.#end(pending)
      pending.call.onError(ownError("closed", "The client was closed."))
    }
    this.#socket?.close(1000, "")
  }

  #submit(pending: Pending): void {
    if (this.#open && this.#sent < this.#options.inFlightMax) return this.#send(pending)
    this.#waiting.add(pending)
    if (!this.#open) this.#connect()
  }

  #send(pending: Pending): void {
    const { call, id } = pending
    pending.sent = true
    this.#sent += pending.weight
    const text = JSON.stringify({ ...call.frame(), id })
    this.#socket?.send(call.floats === undefined ? text : binaryFrame(text, call.floats))
  }

  /** Sends what waits, as far as may be under way. */
  #flush(): void {
    for (const next of this.#waiting) {
      if (!this.#open || this.#sent >= this.#options.inFlightMax) return
      this.#waiting.delete(next)
      this.#send(next)
    }
  }

  #end(pending: Pending): void {
    clearTimeout(pending.timer)
    clearTimeout(pending.retry)
    this.#calls.delete(pending.id)
    // Nobody waits for the connection to be made anew.
    if (this.#calls.size === 0) unref(this.#reconnect)
    this.#waiting.delete(pending)
    if (pending.sent) {
      pending.sent = false
      this.#sent -= pending.weight
    }
  }

  #cancel(pending: Pending): void {
    if (!this.#calls.has(pending.id)) return
    if (pending.sent && this.#open) {
      this.#socket?.send(JSON.stringify({ type: pending.call.endFrame ?? "cancel", id: pending.id }))
    }
    this.#end(pending)
    this.#flush()
  }

  #expire(pending: Pending): void {
    const { deadlineMillis } = pending.call
    const { sent } = pending
    this.#cancel(pending)
    pending.call.onError(
      sent
        ? ownError("deadline_exceeded", `No answer within ${deadlineMillis} ms.`)
        : ownError("disconnected", `${this.#endpoints.url} could not be reached within ${deadlineMillis} ms.`)
    )
  }

  #connect(): void {
    if (this.#closed || this.#connecting || this.#socket !== undefined) return
    if (this.#reconnect !== undefined) return ref(this.#reconnect)
    this.#connecting = true
    void this.#dial().catch((error: unknown) => {
      // A credential that could not be had, or an address that the platform refuses.
      this.#connecting = false
      this.#lost("", 0, error instanceof Error ? error.message : String(error))
    })
  }

  async #dial(): Promise<void> {
    const { credential, connectMillis, webSocket } = this.#options
    const token = await credential?.()
    const endpoint = await this.#endpoints.choose()
    this.#connecting = false
    if (this.#closed) return
    const url = `${endpoint.replace(/^http/, "ws")}/api/v1/ws`
    const socket = webSocket(url, token === undefined ? [] : [protocolName, `${tokenProtocol}${token}`])
    this.#socket = socket
    socket.binaryType = "arraybuffer"
    let late: ReturnType<typeof setTimeout> | undefined = setTimeout(() => socket.close(), connectMillis)
    unref(late)
    socket.onopen = () => {
      clearTimeout(late)
      late = undefined
      this.#opened(socket)
    }
    socket.onmessage = ({ data }) => this.#message(data)
    socket.onerror = nothing
    let over = false
    socket.onclose = ({ code, reason }) => {
      clearTimeout(late)
      if (over) return
      over = true
      if (this.#socket === socket) this.#socket = undefined
      this.#lost(endpoint, code, reason)
    }
  }

  #opened(socket: WebSocketLike): void {
    if (this.#closed) return socket.close(1000, "")
    this.#open = true
    this.#heardAt = Date.now()
    this.#asked = false
    const { quietMillis } = this.#options
    this.#quiet = setInterval(() => this.#lookAfter(), quietMillis / 2)
    unref(this.#quiet)
    this.#flush()
  }

  /** A connection can be dead without a word: the server is asked for one, and given up if it has none. */
  #lookAfter(): void {
    const quiet = Date.now() - this.#heardAt
    const { quietMillis } = this.#options
    if (quiet < quietMillis) return
    if (!this.#asked) {
      this.#asked = true
      this.#socket?.send('{"type":"ping"}')
    } else if (quiet >= 2 * quietMillis) {
      const socket = this.#socket
      if (socket === undefined) return
      // Its close may never come.
      socket.onclose?.({ code: 1006, reason: "no sign of life" })
      socket.close()
    }
  }

  #message(data: unknown): void {
    this.#heardAt = Date.now()
    this.#asked = false
    this.#refusals = 0
    if (this.#backoff.attempts > 0) this.#backoff.reset()
    if (typeof data !== "string") return
    const event = decode(data)
    // Not our server, or one that is ill.
    if (event === undefined) return this.#socket?.close(1000, "")
    if (event.event === "session_closed") return this.#resume()
    const id = event["id"]
    const pending = typeof id === "string" ? this.#calls.get(id) : undefined
    if (pending === undefined) return
    if (event.event === "error") return this.#refused(pending, event["problem"] as ProblemMembers)
    if (!pending.call.onEvent(event)) return
    this.#end(pending)
    this.#flush()
  }

  /** The server has ended the session, and the connection is well: all that was under way is asked for again. */
  #resume(): void {
    for (const pending of this.#calls.values()) {
      if (!pending.sent) continue
      pending.sent = false
      this.#sent -= pending.weight
      this.#waiting.add(pending)
    }
    this.#flush()
  }

  #refused(pending: Pending, problem: ProblemMembers): void {
    const error = errorOfProblem(problem)
    const wait = Math.max(error.retryAfterMillis ?? 0, Math.random() * 100 * 2 ** pending.attempts)
    const again = isTransient(error.code) && pending.attempts < attemptsMax && Date.now() + wait < pending.deadlineAt
    if (!again) {
      this.#end(pending)
      pending.call.onError(error)
      return this.#flush()
    }
    pending.attempts += 1
    pending.sent = false
    this.#sent -= pending.weight
    pending.retry = setTimeout(() => {
      if (!pending.sent) this.#submit(pending)
    }, wait)
    this.#flush()
  }

  #lost(endpoint: string, code: number, reason: string): void {
    this.#open = false
    clearInterval(this.#quiet)
    if (this.#closed) return
    this.#sent = 0
    this.#waiting.clear()
    for (const pending of this.#calls.values()) {
      pending.sent = false
      this.#waiting.add(pending)
    }
    const final = this.#finalError(code, reason)
    if (final !== undefined) {
      for (const pending of [...this.#calls.values()]) {
        this.#end(pending)
        pending.call.onError(final)
      }
      this.#waiting.clear()
      return
    }
    if (code !== 1000) this.#endpoints.failed(endpoint)
    if (this.#calls.size === 0) return
    const spread = Number(/retry[= ](\d{1,9})/.exec(reason)?.[1] ?? 0)
    // One that was ended on purpose, by either side, is made anew at once, unless the server asks for time.
    const wait = code === 1000 && spread === 0 ? 0 : this.#backoff.next(spread)
    this.#reconnect = setTimeout(() => {
      this.#reconnect = undefined
      if (this.#calls.size > 0) this.#connect()
    }, wait)
  }

  /** A credential that is fetched may be a better one the next time; one that is given is not. */
  #finalError(code: number, reason: string): VectorDBError | undefined {
    if (code === forbiddenCode) return errorOfProblem({ code: "forbidden", status: 403, detail: reason })
    if (code !== unauthenticatedCode) return undefined
    this.#refusals += 1
    return this.#refusals > refusalsMax
      ? errorOfProblem({ code: "unauthenticated", status: 401, detail: reason })
      : undefined
  }
}

/** Connections in a row that end with {@link unauthenticatedCode} before calls fail with it. */
const refusalsMax = 2

/** A browser can send no header with a WebSocket: the credential goes as a subprotocol beside this one. */
const protocolName = "ruvector.v1"
const tokenProtocol = "ruvector.bearer."

const nothing = () => {}

const decode = (text: string): WireEvent | undefined => {
  try {
    return JSON.parse(text) as WireEvent
  } catch {
    return undefined
  }
}

const encoder = new TextEncoder()

/** Length of the JSON, JSON, zeros to a multiple of four, floats (little-endian). */
const binaryFrame = (text: string, floats: Float32Array): Uint8Array<ArrayBuffer> => {
  return text.length <= shortText ? (asciiFrame(text, floats) ?? anyFrame(text, floats)) : anyFrame(text, floats)
}

/** Characters up to which writing them one by one is quicker than the encoder, by half. */
const shortText = 1_024

/** `undefined` where it is not ASCII, a byte a character, as a search nearly always is. */
const asciiFrame = (text: string, floats: Float32Array): Uint8Array<ArrayBuffer> | undefined => {
  const { length } = text
  const frame = emptyFrame(length, floats)
  for (let i = 0; i < length; i++) {
    const code = text.charCodeAt(i)
    if (code > 0x7f) return undefined
    frame[4 + i] = code
  }
  return frame
}

const anyFrame = (text: string, floats: Float32Array): Uint8Array<ArrayBuffer> => {
  const json = encoder.encode(text)
  const frame = emptyFrame(json.length, floats)
  frame.set(json, 4)
  return frame
}

/** All but the JSON. */
const emptyFrame = (jsonBytes: number, floats: Float32Array): Uint8Array<ArrayBuffer> => {
  const at = 4 + ((jsonBytes + 3) & ~3)
  const frame = new Uint8Array(at + floats.byteLength)
  new DataView(frame.buffer).setUint32(0, jsonBytes, true)
  frame.set(new Uint8Array(floats.buffer, floats.byteOffset, floats.byteLength), at)
  return frame
}
