/**
 * One listening port for every wire: HTTP/1.1 with its upgrades, and HTTP/2, which carries REST, events and gRPC; in the
 * clear, where the first bytes of a connection tell which it speaks, or by TLS, where the handshake does.
 *
 * The HTTP/1.1 server itself listens, because its timeouts run only on a server that does; its own handling of connections
 * is called once it is known that a connection is its.
 */
import * as Http from "node:http"
import type { AddressInfo, Socket } from "node:net"
import type { Duplex } from "node:stream"
import { Data, Effect } from "effect"
import type { SettingValues } from "../config.ts"
import { type ClientAddresses, networkOf, plainAddress } from "./ClientAddresses.ts"
import type { GrpcHandler } from "./GrpcHandler.ts"
import { Http2Wire, slowReaderGraceMillis } from "./Http2Wire.ts"
import { malformed, type RawProblem, rawProblems } from "./RawProblems.ts"
import * as TlsWire from "./TlsWire.ts"

/** The port or address could not be listened on. `message` is one line for people. */
export class ListenError extends Data.TaggedError("ListenError")<{ readonly message: string }> {}

export interface PortHandlers {
  readonly onRequest: (request: Http.IncomingMessage, response: Http.ServerResponse) => void
  /** A connection was opened; what it speaks is not known yet. */
  readonly onConnection: (socket: Socket) => void
  readonly onUpgrade: (request: Http.IncomingMessage, socket: Duplex, head: Buffer) => void
  readonly onGrpc: GrpcHandler["Service"]["handleStream"]
  /** A connection, session or request was refused or cut before a handler saw it, and why. */
  readonly onRefused: (reason: string) => void
}

export interface OnePort {
  readonly address: AddressInfo
  readonly connections: () => number
  /**
   * Takes no more connections and tells the standing ones to end: GOAWAY, and `connection: close` with each answer. Requests
   * under way go on.
   */
  readonly drain: () => void
  /** Ends connections that wait for nothing. */
  readonly closeIdle: () => void
}

/** Listens for as long as the scope is open; then cuts what is still there. */
export const make = Effect.fnUntraced(function* (
  settings: SettingValues,
  addresses: ClientAddresses["Service"],
  handlers: PortHandlers
) {
  const port = new Port(settings, addresses, handlers)
  const tls = yield* TlsWire.make(settings, {
    onSecure: (socket, http2) => port.secured(socket, http2),
    onFault: () => handlers.onRefused("tls")
  })
  yield* Effect.addFinalizer(() => Effect.sync(() => port.close()))
  const address = yield* port.listen(tls)
  return {
    address,
    connections: () => port.connections,
    drain: () => port.drain(),
    closeIdle: () => port.closeIdle()
  } satisfies OnePort
})

class Port {
  readonly #settings: SettingValues
  readonly #addresses: ClientAddresses["Service"]
  readonly #handlers: PortHandlers
  readonly #server: Http.Server
  readonly #http1: (socket: Socket) => void
  readonly #http2: Http2Wire
  #tls: TlsWire.TlsWire | undefined
  readonly #sockets = new Map<Socket, Peer>()
  /** Of which it is not known yet what they speak. */
  readonly #unknown = new Set<Socket>()
  readonly #byNetwork = new Map<string, number>()
  /** Told why they were refused, and not gone yet. */
  readonly #refused = new Set<Duplex>()
  readonly #timer: NodeJS.Timeout
  #draining = false

  constructor(settings: SettingValues, addresses: ClientAddresses["Service"], handlers: PortHandlers) {
    this.#settings = settings
    this.#addresses = addresses
    this.#handlers = handlers
    const server = Http.createServer({
      maxHeaderSize: settings.maxHeaderBytes,
      headersTimeout: settings.headersTimeoutMillis,
      requestTimeout: settings.requestTimeoutMillis,
      keepAliveTimeout: settings.keepAliveTimeoutMillis,
      connectionsCheckingInterval: 1_000,
      noDelay: true,
      // A peer that is gone without a word is found out by the system.
      keepAlive: true,
      keepAliveInitialDelay: settings.pingIntervalMillis
    })
    // Those beyond the bound are told so, as long as they are few.
    server.maxConnections = settings.connectionsMax + refusedMax
    server.maxRequestsPerSocket = settings.requestsPerConnectionMax
    const http1 = server.listeners("connection")[0] as (this: Http.Server, socket: Socket) => void
    server.removeAllListeners("connection")
    this.#http1 = (socket) => http1.call(server, socket)
    server.on("connection", (socket) => this.#connected(socket))
    server.on("request", (request, response) => {
      if (this.#draining) response.setHeader("connection", "close")
      handlers.onRequest(request, response)
    })
    server.on("upgrade", handlers.onUpgrade)
    server.on("clientError", (error: NodeJS.ErrnoException, socket: Duplex) => this.#unparsed(error, socket))
    server.on("drop", () => handlers.onRefused("connectionsMax"))
    this.#server = server
    this.#http2 = new Http2Wire(settings, handlers)
    this.#timer = setInterval(() => this.#lookForReaders(), Math.max(1_000, settings.idleTimeoutMillis / 4))
    this.#timer.unref()
  }

  get connections(): number {
    return this.#sockets.size
  }

  listen(tls: TlsWire.TlsWire | undefined): Effect.Effect<AddressInfo, ListenError> {
    this.#tls = tls
    return Effect.callback((resume) => {
      const server = this.#server
      const { host, port } = this.#settings
      const onError = (error: NodeJS.ErrnoException) =>
        resume(Effect.fail(new ListenError({ message: listenFault(error, port, host) })))
      server.once("error", onError)
      server.listen({ port, host, backlog: 4_096 }, () => {
        server.off("error", onError)
        resume(Effect.succeed(server.address() as AddressInfo))
      })
    })
  }

  secured(socket: Socket, http2: boolean): void {
    if (http2) this.#http2.accept(socket)
    else this.#http1(socket)
  }

  drain(): void {
    if (this.#draining) return
    this.#draining = true
    if (this.#server.listening) this.#server.close()
    this.#http2.drain()
    for (const socket of this.#unknown) socket.destroy()
    // Answers under way are to say that they are the last on their connection.
    for (const socket of this.#sockets.keys()) {
      const response = (socket as { _httpMessage?: Http.ServerResponse | null })._httpMessage
      if (response?.headersSent === false) response.setHeader("connection", "close")
    }
  }

  closeIdle(): void {
    this.#server.closeIdleConnections()
  }

  close(): void {
    this.drain()
    clearInterval(this.#timer)
    this.#http2.close()
    for (const socket of this.#sockets.keys()) socket.destroy()
    for (const socket of this.#refused) socket.destroy()
  }

  #connected(socket: Socket): void {
    socket.on("error", () => {})
    const address = plainAddress(socket.remoteAddress)
    if (this.#sockets.size >= this.#settings.connectionsMax) {
      this.#handlers.onRefused("connectionsMax")
      return this.#refuse(socket, rawProblems.connectionsMax)
    }
    const network = this.#addresses.isTrusted(address) ? undefined : networkOf(address)
    if (network !== undefined) {
      const open = this.#byNetwork.get(network) ?? 0
      if (open >= this.#settings.connectionsPerIpMax) {
        this.#handlers.onRefused("connectionsPerIpMax")
        return this.#refuse(socket, rawProblems.connectionsPerIpMax)
      }
      this.#byNetwork.set(network, open + 1)
    }
    this.#sockets.set(socket, { unread: "", since: 0 })
    socket.once("close", () => {
      this.#sockets.delete(socket)
      if (network === undefined) return
      const open = (this.#byNetwork.get(network) ?? 1) - 1
      if (open === 0) this.#byNetwork.delete(network)
      else this.#byNetwork.set(network, open)
    })
    this.#handlers.onConnection(socket)
    this.#sniff(socket)
  }

  /** Waits for the first bytes, which may come one by one, and hands the connection to the protocol they begin. */
  #sniff(socket: Socket): void {
    let first: Buffer | undefined
    const onReadable = () => {
      const chunk = socket.read() as Buffer | null
      if (chunk === null) return
      first = first === undefined ? chunk : Buffer.concat([first, chunk])
      if (this.#tls !== undefined) {
        stop()
        if (first[0] === tlsHandshake) {
          socket.unshift(first)
          return this.#tls.accept(socket)
        }
        this.#handlers.onRefused("plaintext")
        return this.#refuse(socket, rawProblems.plaintext)
      }
      const known = Math.min(first.length, prefaceStart.length)
      const isHttp2 = first.compare(prefaceStart, 0, known, 0, known) === 0
      // Put back only once: a chunk put back while waiting would be readable again at once, and for ever.
      if (isHttp2 && known < prefaceStart.length) return
      stop()
      socket.unshift(first)
      if (isHttp2) this.#http2.accept(socket)
      else this.#http1(socket)
    }
    const late = setTimeout(() => {
      stop()
      this.#handlers.onRefused("sniffTimeoutMillis")
      if (this.#tls === undefined) this.#refuse(socket, rawProblems.requestTimeout)
      else socket.destroy()
    }, this.#settings.sniffTimeoutMillis)
    const onEnd = () => socket.destroy()
    const stop = () => {
      clearTimeout(late)
      this.#unknown.delete(socket)
      socket.off("readable", onReadable)
      socket.off("end", onEnd)
      socket.off("close", stop)
    }
    this.#unknown.add(socket)
    socket.on("readable", onReadable)
    socket.on("end", onEnd)
    socket.on("close", stop)
  }

  #unparsed(error: NodeJS.ErrnoException, socket: Duplex): void {
    if (socket.destroyed || !socket.writable) return
    const problem =
      error.code === "HPE_HEADER_OVERFLOW"
        ? rawProblems.headersTooLarge
        : error.code === "ERR_HTTP_REQUEST_TIMEOUT"
          ? rawProblems.requestTimeout
          : malformed(error.code ?? "something else")
    this.#handlers.onRefused(refusalOf[problem.status] ?? "unparsed")
    this.#refuse(socket, problem)
  }

  /** Answers by hand and ends the connection, also where the peer does not. */
  #refuse(socket: Duplex, problem: RawProblem): void {
    // Nothing can be said to a peer with which no key is agreed.
    const mute = this.#tls !== undefined && !("encrypted" in socket) && problem !== rawProblems.plaintext
    if (mute || this.#refused.size >= refusedMax) return void socket.destroy()
    this.#refused.add(socket)
    socket.end(problem.text)
    // What still comes is read past, or the answer might be lost with a connection reset.
    socket.resume()
    const linger = setTimeout(() => socket.destroy(), lingerMillis)
    socket.once("close", () => {
      clearTimeout(linger)
      this.#refused.delete(socket)
    })
  }

  /** Cuts connections whose peer reads nothing of what waits for it. */
  #lookForReaders(): void {
    const now = Date.now()
    for (const [socket, peer] of this.#sockets) {
      const handle = (socket as { _handle?: { writeQueueSize?: number } | null })._handle
      const waiting = handle?.writeQueueSize ?? 0
      const unread = waiting + socket.writableLength === 0 ? "" : `${waiting} ${socket.bytesWritten}`
      if (unread === "" || unread !== peer.unread) {
        peer.unread = unread
        peer.since = now
      } else if (now - peer.since >= this.#settings.idleTimeoutMillis + slowReaderGraceMillis) {
        this.#handlers.onRefused("slow_reader")
        socket.destroy()
      }
    }
  }
}

interface Peer {
  /** What it had not read when it was last looked at, and since when that is so. */
  unread: string
  since: number
}

const refusalOf: Record<number, string> = {
  [rawProblems.headersTooLarge.status]: "maxHeaderBytes",
  [rawProblems.requestTimeout.status]: "requestTimeoutMillis"
}

/** No method of HTTP/1.1 begins so. */
const prefaceStart = Buffer.from("PRI ")

/** The first byte of a TLS handshake. */
const tlsHandshake = 0x16

/** Connections that are being told why they were refused. */
const refusedMax = 64

/** Milliseconds for a peer to read why it was refused. */
const lingerMillis = 1_000

const listenFault = (error: NodeJS.ErrnoException, port: number, host: string): string => {
  switch (error.code) {
    case "EADDRINUSE":
      return `Port ${port} on ${host} is taken by another program; choose one with --port, or --port 0 for any free one.`
    case "EACCES":
      return `Port ${port} on ${host} may not be listened on by this user; choose one above 1023 with --port.`
    case "EADDRNOTAVAIL":
    case "ENOTFOUND":
      return `${host} is no address of this machine; choose one with --host.`
    default:
      return `Cannot listen on ${host}:${port}: ${error.message}.`
  }
}
