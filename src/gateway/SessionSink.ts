/**
 * Where the events of one logical session go. Whoever makes events (a standing query, a change feed) is given a sink and
 * keeps nothing for a session that has no room: it notes that the session is behind, and sends what is current when there
 * is room again.
 */
import { Context } from "effect"
import type { Principal } from "../protocol/Principal.ts"
import type { Frame } from "./WebSocketFrames.ts"

export interface SessionSink {
  /** The client's name for the session; empty for the one that its connection has of its own. */
  readonly label: string
  /** Whether `send` would take an event now. */
  hasRoom(): boolean
  /**
   * Takes one event, a JSON text, and with it a credit where the session counts them. `false`: there is no room now, and
   * nothing was kept.
   */
  send(text: string): boolean
  /** Calls back once, in order of asking, as soon as there is room; at once where there is. Never after the session ended. */
  onDrain(callback: () => void): void
  /** Ends the session, and no other: the client is told by `session_closed`. */
  close(code: number, reason: string): void
}

/** What a connection's sessions are subscribed to. One for each connection that subscribes to something. */
export interface ConnectionSubscriptions {
  /** Subscriptions there are: a connection with some is not idle. */
  readonly size: number
  /** Takes a frame of its types. `envelope`: members that each answer to the frame carries. */
  frame(frame: Frame, session: SessionSink, envelope: string): void
  /** The session has ended, and with it what it was subscribed to. Sends nothing. */
  sessionEnded(session: SessionSink): void
  /** The connection has ended. */
  close(): void
}

/** Takes the frames of `subscriptionFrameTypes`. */
export class SubscriptionFrames extends Context.Service<
  SubscriptionFrames,
  { readonly connect: (caller: Principal) => ConnectionSubscriptions }
>()("ruvector/gateway/SubscriptionFrames") {}
