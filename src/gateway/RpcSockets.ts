/**
 * The WebSockets of the RPC wire, with the bounds that Effect's socket leaves to others: frames of at most
 * `maxFrameBytes`; at most `outboundBytesMax` waiting for a client that does not read, and nothing more read from it
 * meanwhile; an end for one that reads too slowly or is gone.
 *
 * Connections are looked after by one timer, and cost none of their own.
 */
import type { IncomingMessage } from "node:http"
import type { Socket as NodeSocket } from "node:net"
import type { Duplex } from "node:stream"
import * as NodeHttpServerRequest from "@effect/platform-node/NodeHttpServerRequest"
import { Cause, Effect, Exit, Latch } from "effect"
import type { HttpServerRequest } from "effect/http"
import { Socket } from "effect/socket"
import { WebSocket, WebSocketServer } from "ws"
import { Settings, type SettingValues } from "../config.ts"
import { toProblem } from "../protocol/Errors.ts"
import { closeCodes, retryReason } from "../protocol/Frames.ts"
import { Access } from "./Access.ts"
import { callerOf } from "./Callers.ts"
import { connectionClosed, connectionOpened } from "./Instruments.ts"

/** Milliseconds for a peer to answer a close frame; then its socket is destroyed. */
const closeTimeoutMillis = 2_000

/** The server that RPC connections have to be upgraded by. */
export class RpcWebSocketServer extends WebSocketServer {
  readonly #settings: SettingValues
  readonly #access: Access["Service"]
  readonly #connections = new Set<Connection>()
  readonly #intervalMillis: number
  readonly #timer: NodeJS.Timeout
  #lookedAt = Date.now()
  /** Milliseconds this process has run for, without those it was held up: a peer is not to blame for our own silence. */
  #clockMillis = 1

  constructor(settings: SettingValues, access: Access["Service"]) {
    super({
      noServer: true,
      maxPayload: settings.maxFrameBytes,
      perMessageDeflate: false,
      closeTimeout: closeTimeoutMillis
      // An option of ws that its types do not have yet.
    } as ConstructorParameters<typeof WebSocketServer>[0])
    this.#settings = settings
    this.#access = access
    const quarter = Math.min(settings.pingIntervalMillis, settings.idleTimeoutMillis) / 4
    this.#intervalMillis = Math.max(50, Math.min(5_000, quarter))
    this.#timer = setInterval(() => this.#lookAfterAll(), this.#intervalMillis)
    this.#timer.unref()
  }

  override handleUpgrade(
    request: IncomingMessage,
    socket: Duplex,
    head: Buffer,
    done: (ws: WebSocket, request: IncomingMessage) => void
  ): void {
    super.handleUpgrade(request, socket, head, (ws: WebSocket) => {
      // What an HTTP server hands over is the connection's own socket.
      const connection = new Connection(ws, socket as NodeSocket, this.#settings, () => this.#clockMillis)
      upgraded.set(request, connection)
      this.#connections.add(connection)
      const stopWatch = this.#access.watch(callerOf(request), (error) =>
        ws.close(closeCodes.unauthenticated, toProblem(error).detail)
      )
      ws.once("close", (code) => {
        stopWatch()
        this.#connections.delete(connection)
        connection.ended(code)
      })
      done(ws, request)
    })
  }

  /** Tells every client to connect again, elsewhere or in a moment, and ends its calls. */
  drain(): void {
    const reason = retryReason("restarting", this.#settings.reconnectSpreadMillis)
    for (const { ws } of this.#connections) ws.close(closeCodes.restart, reason)
  }

  override close(done?: (error?: Error) => void): void {
    clearInterval(this.#timer)
    super.close(done)
  }

  #lookAfterAll(): void {
    const now = Date.now()
    this.#clockMillis += Math.max(0, Math.min(now - this.#lookedAt, 2 * this.#intervalMillis))
    this.#lookedAt = now
    for (const connection of this.#connections) connection.lookAfter()
  }
}

/** Open for as long as its scope; then its clients are told to come back elsewhere. */
export const webSocketServer = Effect.gen(function* () {
  const settings = yield* Settings
  const access = yield* Access
  return yield* Effect.acquireRelease(
    Effect.sync(() => new RpcWebSocketServer(settings, access)),
    (server) =>
      Effect.sync(() => {
        server.drain()
        server.close()
      })
  )
})

/** The same request, whose upgrade gives a socket within the bounds of the {@link RpcWebSocketServer} that made it. */
export const bounded = (request: HttpServerRequest.HttpServerRequest): HttpServerRequest.HttpServerRequest =>
  Object.create(request, {
    upgrade: {
      value: Effect.map(request.upgrade, (socket) =>
        boundedSocket(socket, () => {
          const connection = upgraded.get(NodeHttpServerRequest.toIncomingMessage(request) as IncomingMessage)
          if (connection === undefined) throw new Error("an RPC WebSocket was not upgraded by an RpcWebSocketServer")
          return connection
        })
      )
    }
  })

const upgraded = new WeakMap<IncomingMessage, Connection>()

class Connection {
  readonly ws: WebSocket
  readonly #socket: NodeSocket
  readonly #settings: SettingValues
  readonly #clock: () => number
  /** Open while there is room for what is written. */
  readonly #room = Latch.makeUnsafe(true)
  /** Since when there has been none, or 0. */
  #fullSince = 0
  #gathering = false
  #heardAt: number
  #heardBytes = 0
  #pingedAt = 0

  constructor(ws: WebSocket, socket: NodeSocket, settings: SettingValues, clock: () => number) {
    this.ws = ws
    this.#socket = socket
    this.#settings = settings
    this.#clock = clock
    this.#heardAt = clock()
    connectionOpened("rpc")
  }

  /** Keeps what is written in this turn of the event loop for one call to the system. */
  gather(): void {
    if (this.#gathering) return
    this.#gathering = true
    this.#socket.cork()
    process.nextTick(() => {
      this.#gathering = false
      this.#socket.uncork()
    })
  }

  /** Runs now, or as soon as no more than `outboundBytesMax` wait for the client. */
  whenRoom<A, E>(effect: Effect.Effect<A, E>): Effect.Effect<A, E> {
    return Effect.suspend(() => (this.#isFull() ? Effect.andThen(this.#room.await, this.whenRoom(effect)) : effect))
  }

  #isFull(): boolean {
    if (this.ws.readyState !== WebSocket.OPEN || this.ws.bufferedAmount <= this.#settings.outboundBytesMax) return false
    if (this.#fullSince === 0) {
      this.#fullSince = this.#clock()
      this.#room.closeUnsafe()
      // More than a socket's high-water mark waits here, so Node tells when none does any more.
      this.#socket.once("drain", () => this.#hasRoom())
    }
    return true
  }

  #hasRoom(): void {
    this.#fullSince = 0
    this.#room.openUnsafe()
  }

  lookAfter(): void {
    if (this.ws.readyState !== WebSocket.OPEN) return
    const now = this.#clock()
    const { idleTimeoutMillis, pingIntervalMillis } = this.#settings
    if (this.#fullSince !== 0) {
      // Its answers to pings are not read either, so they prove nothing here.
      this.#heardAt = now
      if (now - this.#fullSince > idleTimeoutMillis) this.ws.close(closeCodes.slowReader, "reads too slowly")
      return
    }
    if (this.#socket.bytesRead !== this.#heardBytes) {
      this.#heardBytes = this.#socket.bytesRead
      this.#heardAt = now
    } else if (now - this.#heardAt > idleTimeoutMillis) {
      this.ws.close(closeCodes.idle, "nothing was heard")
    } else if (now - Math.max(this.#heardAt, this.#pingedAt) > pingIntervalMillis) {
      this.#pingedAt = now
      this.ws.ping()
    }
  }

  /** Nothing serves it any more: it is closed already, or the node stops, or met a defect. */
  release(exit: Exit.Exit<unknown, unknown>): void {
    const isDefect = Exit.isFailure(exit) && Cause.hasDies(exit.cause)
    this.ws.close(isDefect ? closeCodes.internalError : closeCodes.restart)
  }

  ended(code: number): void {
    connectionClosed("rpc", code, this.#socket.bytesWritten)
    this.#hasRoom()
  }
}

const boundedSocket = (socket: Socket.Socket, connectionOf: () => Connection): Socket.Socket => {
  let connection: Connection | undefined
  return Socket.make({
    reader: Effect.gen(function* () {
      const { pull, upgrade } = yield* socket.reader
      const opened = connectionOf()
      connection = opened
      yield* Effect.addFinalizer((exit) => Effect.sync(() => opened.release(exit)))
      // What still comes when its connection is being closed is read past, up to the answer to the close frame.
      const next: typeof pull = Effect.flatMap(opened.whenRoom(pull), (frames) =>
        opened.ws.readyState === WebSocket.OPEN ? Effect.succeed(frames) : next
      )
      return { pull: next, upgrade }
    }),
    writer: Effect.map(socket.writer, (writer) => {
      const write: Socket.Writer["write"] = (chunk) => {
        const to = connection
        if (to === undefined || Socket.isCloseEvent(chunk)) return writer.write(chunk)
        return to.whenRoom(
          Effect.suspend(() => {
            to.gather()
            return writer.write(chunk)
          })
        )
      }
      return { write, writeAll: (chunks) => Effect.forEach(chunks, write, { discard: true }) }
    })
  })
}
