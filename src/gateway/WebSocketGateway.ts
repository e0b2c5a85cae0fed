/**
 * `/api/v1/ws`: many searches and inserts on one connection, each with its own id. Taken from the HTTP server before Effect
 * sees the upgrade. A connection is authenticated, admitted, registered, and from then on served as
 * `WebSocketConnection.ts` says. One timer looks after all connections, and one call at the end of each turn of the event
 * loop writes what they are sent.
 */
import type { IncomingMessage } from "node:http"
import type { Duplex } from "node:stream"
import { Context, Effect, Layer } from "effect"
import { WebSocketServer } from "ws"
import { Settings } from "../config.ts"
import { bearerSubprotocol, closeCodes, retryReason, subprotocol } from "../protocol/Frames.ts"
import { Admission } from "../shards/Admission.ts"
import { Access } from "./Access.ts"
import { addressOf, callerOf } from "./Callers.ts"
import { FrameTurns } from "./FrameTurns.ts"
import { countRequest } from "./Instruments.ts"
import { rawProblems } from "./RawProblems.ts"
import { SubscriptionFrames } from "./SessionSink.ts"
import { Sessions } from "./Sessions.ts"
import { TenantRouter } from "./TenantRouter.ts"
import { Topics } from "./Topics.ts"
import { ClientSocket, type Hub, WebSocketConnection } from "./WebSocketConnection.ts"

export const path = "/api/v1/ws"

export class WebSocketGateway extends Context.Service<
  WebSocketGateway,
  {
    readonly handleUpgrade: (request: IncomingMessage, socket: Duplex, head: Buffer) => void
    /** Tells every connection to come back elsewhere (1012), and closes it; refuses new ones. */
    readonly drain: Effect.Effect<void>
    /**
     * Closes connections (4029) that have asked for nothing for so long and have nothing under way, those quiet the longest
     * first, at most `max`. How many.
     */
    readonly closeIdle: (olderThanMillis: number, max: number, retryAfterMillis: number) => number
    readonly count: () => number
    /** Logical sessions of all connections, asleep or awake. */
    readonly sessions: () => number
  }
>()("ruvector/gateway/WebSocketGateway") {
  static readonly layer = Layer.effect(
    WebSocketGateway,
    Effect.gen(function* () {
      const settings = yield* Settings
      const server = new WebSocketServer({
        noServer: true,
        clientTracking: false,
        maxPayload: settings.maxFrameBytes,
        maxFragments: fragmentsMax,
        perMessageDeflate: false,
        // Answered by the connection, which bounds them.
        autoPong: false,
        handleProtocols: protocolOf,
        // `ws` waits this long for the peer's close frame before it destroys the socket.
        closeTimeout: closeTimeoutMillis,
        WebSocket: ClientSocket
        // Options of ws that its types do not have yet.
      } as ConstructorParameters<typeof WebSocketServer>[0])
      const connections = new Set<WebSocketConnection>()

      const intervalMillis = Math.max(50, Math.min(5_000, settings.pingIntervalMillis / 4))
      const clock = new Clock(2 * intervalMillis)
      const timer = setInterval(() => {
        clock.tick()
        for (const connection of connections) connection.lookAfter()
      }, intervalMillis)
      timer.unref()

      let written: Array<WebSocketConnection> = []
      const flushAll = () => {
        const all = written
        written = []
        for (const connection of all) connection.flush()
      }

      const hub: Hub = {
        settings,
        access: yield* Access,
        tenants: yield* TenantRouter,
        admission: yield* Admission,
        sessions: yield* Sessions,
        topics: yield* Topics,
        subscriptions: yield* SubscriptionFrames,
        turns: new FrameTurns(settings.frameTurnMillis),
        run: Effect.runForkWith(yield* Effect.context<never>()),
        clock: () => clock.now(),
        flushLater: (connection) => {
          if (written.push(connection) === 1) setImmediate(flushAll)
        },
        ended: (connection) => connections.delete(connection)
      }

      let isDraining = false
      const drain = Effect.sync(() => {
        isDraining = true
        const reason = retryReason("restarting", settings.reconnectSpreadMillis)
        for (const connection of connections) connection.close(closeCodes.restart, reason)
      })
      yield* Effect.addFinalizer(() =>
        Effect.andThen(
          drain,
          Effect.sync(() => {
            clearInterval(timer)
            server.close()
          })
        )
      )

      return WebSocketGateway.of({
        handleUpgrade: (request, socket, head) => {
          if (isDraining) {
            countRequest("ws", "upgrade", rawProblems.shuttingDown.status, 0)
            socket.end(rawProblems.shuttingDown.text)
            return
          }
          server.handleUpgrade(request, socket, head, (ws) => {
            connections.add(
              new WebSocketConnection(hub, ws as ClientSocket, socket, callerOf(request), addressOf(request))
            )
          })
        },
        drain,
        closeIdle: (olderThanMillis, max, retryAfterMillis) => {
          const idle: Array<readonly [number, WebSocketConnection]> = []
          for (const connection of connections) {
            const millis = connection.idleMillis()
            if (millis > olderThanMillis) idle.push([millis, connection])
          }
          idle.sort(([a], [b]) => b - a)
          const closed = idle.slice(0, max)
          const reason = retryReason("idle while load is shed", retryAfterMillis)
          for (const [, connection] of closed) connection.close(closeCodes.rateLimited, reason)
          return closed.length
        },
        count: () => connections.size,
        sessions: () => {
          let sessions = 0
          for (const connection of connections) sessions += connection.sessions
          return sessions
        }
      })
    })
  )
}

/** Ours where it is offered, else the first that is no secret. */
const protocolOf = (offered: Set<string>): string | false => {
  if (offered.has(subprotocol)) return subprotocol
  for (const protocol of offered) if (!protocol.startsWith(bearerSubprotocol)) return protocol
  return false
}

/** Fragments of one message. */
const fragmentsMax = 1_024

/** Milliseconds for a peer to answer a close frame; then its socket is destroyed. */
const closeTimeoutMillis = 2_000

/** Milliseconds for which this process ran; of time that it was held up for, no more than `stepMillisMax` counts. */
class Clock {
  readonly #stepMillisMax: number
  #tickedAt = performance.now()
  #millis = 1

  constructor(stepMillisMax: number) {
    this.#stepMillisMax = stepMillisMax
  }

  now(): number {
    return this.#millis + Math.min(performance.now() - this.#tickedAt, this.#stepMillisMax)
  }

  tick(): void {
    this.#millis = this.now()
    this.#tickedAt = performance.now()
  }
}
