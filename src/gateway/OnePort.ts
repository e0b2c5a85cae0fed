/**
 * One listening port for every wire: HTTP/1.1 with its upgrades, and HTTP/2 in the clear by prior knowledge, which carries
 * REST, events and gRPC. The first bytes of a connection tell which it speaks.
 *
 * The HTTP/1.1 server itself listens, because its timeouts run only on a server that does; its own handling of connections
 * is called once it is known that a connection is its.
 */
import * as Http from "node:http"
import type { AddressInfo, Socket } from "node:net"
import type { Duplex } from "node:stream"
import { Data, Effect } from "effect"
import type { SettingValues } from "../config.ts"
import type { GrpcHandler } from "./GrpcHandler.ts"
import { Http2Wire } from "./Http2Wire.ts"
import { malformed, type RawProblem, rawProblems } from "./RawProblems.ts"

/** The port or address could not be listened on. `message` is one line for people. */
export class ListenError extends Data.TaggedError("ListenError")<{ readonly message: string }> {}

export interface PortHandlers {
  readonly onRequest: (request: Http.IncomingMessage, response: Http.ServerResponse) => void
  readonly onUpgrade: (request: Http.IncomingMessage, socket: Duplex, head: Buffer) => void
  readonly onGrpc: GrpcHandler["Service"]["handleStream"]
  /** A connection, session or request was refused or cut before a handler saw it; `status` is 0 where none was answered. */
  readonly onRefused: (reason: string, status: number) => void
}

export class OnePort {
  readonly #settings: SettingValues
  readonly #handlers: PortHandlers
  readonly #server: Http.Server
  readonly #http1: (socket: Socket) => void
  readonly #http2: Http2Wire
  readonly #sockets = new Set<Socket>()

  constructor(settings: SettingValues, handlers: PortHandlers) {
    this.#settings = settings
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
    server.maxConnections = settings.connectionsMax
    server.maxRequestsPerSocket = settings.requestsPerConnectionMax
    const http1 = server.listeners("connection")[0] as (this: Http.Server, socket: Socket) => void
    server.removeAllListeners("connection")
    this.#http1 = (socket) => http1.call(server, socket)
    server.on("connection", (socket) => this.#connected(socket))
    server.on("request", handlers.onRequest)
    server.on("upgrade", handlers.onUpgrade)
    server.on("clientError", (error: NodeJS.ErrnoException, socket: Duplex) => this.#unparsed(error, socket))
    server.on("drop", () => handlers.onRefused("connectionsMax", 0))
    this.#server = server
    this.#http2 = new Http2Wire(settings, handlers)
  }

  get connections(): number {
    return this.#sockets.size
  }

  listen(port: number, host: string): Effect.Effect<AddressInfo, ListenError> {
    return Effect.callback((resume) => {
      const server = this.#server
      const onError = (error: NodeJS.ErrnoException) =>
        resume(Effect.fail(new ListenError({ message: listenFault(error, port, host) })))
      server.once("error", onError)
      server.listen({ port, host, backlog: 4_096 }, () => {
        server.off("error", onError)
        resume(Effect.succeed(server.address() as AddressInfo))
      })
    })
  }

  /** Takes no more connections, and lets those go that are idle or come to be. */
  drain(): void {
    if (this.#server.listening) this.#server.close()
    this.#http2.drain()
  }

  closeIdle(): void {
    this.#server.closeIdleConnections()
  }

  /** Cuts what is still there. */
  close(): void {
    this.drain()
    this.#http2.close()
    for (const socket of this.#sockets) socket.destroy()
  }

  #connected(socket: Socket): void {
    this.#sockets.add(socket)
    socket.once("close", () => this.#sockets.delete(socket))
    this.#sniff(socket)
  }

  /** Waits for the first bytes, which may come one by one, and hands the connection to the protocol they begin. */
  #sniff(socket: Socket): void {
    let first: Buffer | undefined
    const onReadable = () => {
      const chunk = socket.read() as Buffer | null
      if (chunk === null) return
      first = first === undefined ? chunk : Buffer.concat([first, chunk])
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
      this.#handlers.onRefused("sniff_timeout", rawProblems.requestTimeout.status)
      stop()
      this.#refuse(socket, rawProblems.requestTimeout)
    }, this.#settings.sniffTimeoutMillis)
    const onError = () => socket.destroy()
    const stop = () => {
      clearTimeout(late)
      socket.off("readable", onReadable)
      socket.off("error", onError)
      socket.off("end", onEnd)
      socket.off("close", stop)
    }
    const onEnd = () => socket.destroy()
    socket.on("readable", onReadable)
    socket.on("error", onError)
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
    this.#handlers.onRefused("unparsed", problem.status)
    this.#refuse(socket, problem)
  }

  /** Answers by hand and ends the connection, also where the peer does not. */
  #refuse(socket: Duplex, problem: RawProblem): void {
    socket.on("error", () => {})
    socket.end(problem.text)
    // What still comes is read past, or the answer might be lost with a connection reset.
    socket.resume()
    const linger = setTimeout(() => socket.destroy(), lingerMillis)
    socket.once("close", () => clearTimeout(linger))
  }
}

/** No method of HTTP/1.1 begins so. */
const prefaceStart = Buffer.from("PRI ")

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
