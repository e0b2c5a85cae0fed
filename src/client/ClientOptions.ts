/** How a client is made: every bound and wait, with its unit and default. */

/** The part of the standard `WebSocket` that the client uses; `ws` has it too. */
export interface WebSocketLike {
  binaryType: string
  readonly readyState: number
  /** Sends one message, of text or of bytes. */
  send(data: string | Uint8Array<ArrayBuffer>): void
  /** Ends the connection, with a code and a reason for the other side. */
  close(code?: number, reason?: string): void
  /** Told when messages can be sent. */
  onopen: ((event: never) => void) | null
  /** Told of each message. */
  onmessage: ((event: { readonly data: unknown }) => void) | null
  /** Told when the connection has ended, or could not be made. */
  onclose: ((event: { readonly code: number; readonly reason: string }) => void) | null
  /** Told of trouble, before `onclose`. */
  onerror: ((event: never) => void) | null
}

/** A key, or a function that is asked for a fresh one before each connection and after one was refused. */
export type Credential = string | (() => string | Promise<string>)

/** Where a client finds its service, and the bounds of what it does; only `endpoint` has to be given. */
export interface ClientOptions {
  /** `https://host`, or several, of which the nearest that is well is used (`region: "auto"`) or the first that is well. */
  readonly endpoint: string | ReadonlyArray<string>
  /**
   * `auto`: of several endpoints the one with the shortest round trip, measured at the start, after trouble, and every
   * `probeIntervalMillis`. Anything else is a name for people; endpoints are then tried in the order given.
   */
  readonly region?: string
  /** `false`: no connection is held open; every call is a request of its own, and nothing can be subscribed to. */
  readonly streaming?: boolean
  /** API key or JWT. */
  readonly apiKey?: Credential
  /** Collection of calls that name none; `default` where left out. */
  readonly collection?: string
  /** For one call, everything included: waiting, connecting, trying again. 10,000 where left out. */
  readonly deadlineMillis?: number
  /** Calls sent and not answered; the next ones wait. 256 where left out. */
  readonly inFlightMax?: number
  /** Calls that wait, for a connection or for their turn; the next one fails with `queue_full`. 10,000 where left out. */
  readonly waitingMax?: number
  /** The first wait before connecting again is random below this, the next below twice that, and so on. 100 where left out. */
  readonly reconnectBaseMillis?: number
  /** The longest of these bounds. 10,000 where left out. */
  readonly reconnectCapMillis?: number
  /** For one attempt to connect. 5,000 where left out. */
  readonly connectMillis?: number
  /** Without a sign of life for this long the server is asked for one; after as long again the connection is given up. 30,000 where left out. */
  readonly quietMillis?: number
  /** Changes of one subscription that wait to be read; then no more are asked for until half of them are. 1,000 where left out. */
  readonly subscriptionBufferMax?: number
  /** Between two looks at which endpoint is nearest. 30,000 where left out. */
  readonly probeIntervalMillis?: number
  /** In place of the platform's `WebSocket`. */
  readonly webSocket?: (url: string, protocols: ReadonlyArray<string>) => WebSocketLike
  /** In place of the platform's `fetch`. */
  readonly fetch?: typeof globalThis.fetch
}

export interface ResolvedOptions {
  readonly endpoints: ReadonlyArray<string>
  readonly auto: boolean
  readonly streaming: boolean
  readonly credential: (() => Promise<string | undefined>) | undefined
  readonly collection: string
  readonly deadlineMillis: number
  readonly inFlightMax: number
  readonly waitingMax: number
  readonly reconnectBaseMillis: number
  readonly reconnectCapMillis: number
  readonly connectMillis: number
  readonly quietMillis: number
  readonly subscriptionBufferMax: number
  readonly probeIntervalMillis: number
  readonly webSocket: (url: string, protocols: ReadonlyArray<string>) => WebSocketLike
  readonly fetch: typeof globalThis.fetch
}

/** Fills in defaults. Throws a `TypeError` or `RangeError` that names the option. */
export const resolveOptions = (options: ClientOptions): ResolvedOptions => {
  const given = typeof options.endpoint === "string" ? [options.endpoint] : options.endpoint
  if (given.length === 0) throw new TypeError("endpoint: expected an address such as https://host, got none")
  const { apiKey, webSocket, fetch } = options
  const bounded = (name: keyof ClientOptions, value: unknown, fallback: number, least: number, most: number) => {
    if (value === undefined) return fallback
    if (typeof value === "number" && value >= least && value <= most) return value
    throw new RangeError(`${name}: expected a number from ${least} to ${most}, got ${String(value)}`)
  }
  return {
    endpoints: given.map(endpointOf),
    auto: options.region === "auto",
    streaming: options.streaming ?? true,
    credential: apiKey === undefined ? undefined : async () => (typeof apiKey === "function" ? await apiKey() : apiKey),
    collection: options.collection ?? "default",
    deadlineMillis: bounded("deadlineMillis", options.deadlineMillis, 10_000, 1, 3_600_000),
    inFlightMax: bounded("inFlightMax", options.inFlightMax, 256, 1, 10_000),
    waitingMax: bounded("waitingMax", options.waitingMax, 10_000, 0, 1_000_000),
    reconnectBaseMillis: bounded("reconnectBaseMillis", options.reconnectBaseMillis, 100, 1, 60_000),
    reconnectCapMillis: bounded("reconnectCapMillis", options.reconnectCapMillis, 10_000, 1, 600_000),
    connectMillis: bounded("connectMillis", options.connectMillis, 5_000, 1, 600_000),
    quietMillis: bounded("quietMillis", options.quietMillis, 30_000, 100, 600_000),
    subscriptionBufferMax: bounded("subscriptionBufferMax", options.subscriptionBufferMax, 1_000, 1, 1_000_000),
    probeIntervalMillis: bounded("probeIntervalMillis", options.probeIntervalMillis, 30_000, 100, 3_600_000),
    webSocket: webSocket ?? platformWebSocket,
    fetch: fetch ?? ((input, init) => globalThis.fetch(input, init))
  }
}

const endpointOf = (text: string): string => {
  const url = URL.canParse(text) ? new URL(text) : undefined
  if (url === undefined || !/^(?:http|ws)s?:$/.test(url.protocol)) {
    throw new TypeError(`endpoint: expected an address such as https://host, got ${JSON.stringify(text)}`)
  }
  const { protocol, host, pathname } = url
  return `${protocol.replace("ws", "http")}//${host}${pathname.replace(/\/$/, "")}`
}

/** The types of platforms give their own events to listeners, of which only what `WebSocketLike` names is used. */
const platformWebSocket = (url: string, protocols: ReadonlyArray<string>): WebSocketLike =>
  new globalThis.WebSocket(url, [...protocols]) as unknown as WebSocketLike
