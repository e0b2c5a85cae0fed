/**
 * WebSocket frames of clients, and the close codes of ours. A text frame is JSON. A binary frame is a 32-bit little-endian
 * length, that many bytes of the same JSON without its vectors, zero bytes up to a multiple of four, and the vectors as
 * little-endian float32, one after the other: for a search the query, for an insert those of its `vectors` in order.
 */
import { Schema } from "effect"
import { Ack, ClientId, CollectionName, Credits, MetadataObject, VectorFromNumbers, VectorId } from "./Fields.ts"
import * as Limits from "./Limits.ts"
import { IdempotencyKey } from "./RequestId.ts"
import { SearchFrame } from "./Search.ts"
import { requests, type TopicOperation } from "./Topic.ts"

const addressed = { id: Schema.optionalKey(ClientId), session: Schema.optionalKey(ClientId) }

export const InsertFrame = Schema.Struct({
  type: Schema.Literal("insert"),
  ...addressed,
  collection: Schema.optionalKey(CollectionName),
  vectors: Schema.Array(
    Schema.Struct({ id: VectorId, vector: VectorFromNumbers, metadata: Schema.optionalKey(MetadataObject) })
  ).check(
    Schema.makeFilter(
      (vectors: ReadonlyArray<unknown>) => vectors.length > 0 && vectors.length <= Limits.batchItemsMax,
      {
        expected: `1 to ${Limits.batchItemsMax} vectors`
      }
    )
  ),
  ack: Schema.optionalKey(Ack),
  /** Under which it is done once. */
  idempotency_key: Schema.optionalKey(IdempotencyKey)
})
export type InsertFrame = typeof InsertFrame.Type

/** Ends a request that is under way; answered by `{"event":"cancelled","id"}` in any case. */
export const CancelFrame = Schema.Struct({ type: Schema.Literal("cancel"), id: ClientId })

export const PingFrame = Schema.Struct({ type: Schema.Literal("ping"), id: Schema.optionalKey(ClientId) })

/** Closes one of the connection's sessions; answered by `{"event":"closed","session"}`. */
export const CloseFrame = Schema.Struct({
  type: Schema.Literal("close"),
  id: Schema.optionalKey(ClientId),
  session: ClientId
})

/**
 * Lets a session be sent so many events more: of searches and subscriptions, not answers to other frames. A session that
 * was never given credits is sent all there is. Not answered.
 */
export const CreditFrame = Schema.Struct({ type: Schema.Literal("credit"), ...addressed, events: Credits })

export { SearchFrame }

/** Frames about what a session is subscribed to. */
export const subscriptionFrameTypes = ["subscribe", "resume", "follow", "listen", "unsubscribe"] as const

/**
 * Frames that ask something of topics: `topic.publish`, `topic.take`... Beside `type`, `id` and `session`, what `requests` in
 * `Topic.ts` has; answered by an event of the frame's type.
 */
export const topicFrameTypes: ReadonlyMap<unknown, TopicOperation> = new Map(
  (Object.keys(requests) as Array<TopicOperation>).map((operation) => [`topic.${operation}`, operation])
)

export const frameTypes = ["search", "insert", "cancel", "ping", "close", "credit", ...subscriptionFrameTypes] as const
export type FrameType = (typeof frameTypes)[number]

/**
 * Why a WebSocket of ours was closed, or, in `session_closed`, one session of it, and what a client does then. Those of
 * ours alone are from 4000 on: the last two digits are of the HTTP status that is nearest.
 */
export const closeCodes = {
  /** The client asked for it. */
  normal: 1000,
  /** Rules of WebSocket were broken, or more was sent than is borne. Not to be tried again. */
  policyViolation: 1008,
  /** A frame over `maxFrameBytes`. Send smaller ones. */
  frameTooLarge: 1009,
  /** A defect of ours. Connect again. */
  internalError: 1011,
  /** The node is shutting down. Connect again, elsewhere or in a moment: the reason says `retry=<ms>`. */
  restart: 1012,
  /** A bound of the node is reached. Connect again after some seconds. */
  tryAgainLater: 1013,
  /** No credential, one that has expired, or one that was revoked. Connect again with another. */
  unauthenticated: 4001,
  /** Not allowed, with this credential. Not to be tried again with it. */
  forbidden: 4003,
  /** Events were read too slowly, or no credits were given for them. Connect, or begin the session, again; read faster or ask for less. */
  slowReader: 4008,
  /** Nothing came for `idleTimeoutMillis`, not even answers to pings. Connect again. */
  idle: 4009,
  /** The connection is well. Resume the session or subscription on it now. */
  resume: 4010,
  /** Too much was sent, or the node sheds load. Connect again after a while: the reason says `retry=<ms>`. */
  rateLimited: 4029
} as const

/**
 * A reason that spreads those who come back (with {@link closeCodes.restart}, `tryAgainLater` and `rateLimited`): each waits
 * a random time below it.
 */
export const retryReason = (reason: string, retryMillis: number): string => `${reason}, retry=${retryMillis}`

/** The subprotocol of `/ws`, for clients that name one. */
export const subprotocol = "ruvector.v1"

/** What a subprotocol begins with that is a credential: browsers can send no header. It is never given back. */
export const bearerSubprotocol = "ruvector.bearer."
