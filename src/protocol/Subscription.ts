/**
 * Subscriptions: standing queries and the change feed, as they are asked for and as their events are sent, the same on
 * every wire.
 *
 * A standing query's answer is a set of records. Its events applied in order give the answer at the cursor of the last
 * one: `subscribed` is the answer itself; `resumed` drops all that is not in its `keep` (where it has one) and
 * then is like `changes`: leaves, enters, updates.
 */
import { Schema } from "effect"
import {
  ClientId,
  CollectionName,
  FilterObject,
  Include,
  StandingK,
  VectorFromBase64Url,
  VectorFromNumbers,
  VectorId
} from "./Fields.ts"
import { cursorCharsMax } from "./Limits.ts"

/** What came with an event, to go on after it. Opaque; good for who was given it and for what it was given for. */
export const Cursor = Schema.String.check(
  Schema.makeFilter((cursor: string) => cursor.length > 0 && cursor.length <= cursorCharsMax, {
    expected: `a cursor, of at most ${cursorCharsMax} characters`
  })
)

/**
 * What is done for a client that reads slower than the answer changes: it is sent the newest answer's difference when it
 * reads again, or its session is closed, to be resumed.
 */
export const SlowPolicy = Schema.Literals(["coalesce", "close"])
export type SlowPolicy = typeof SlowPolicy.Type

const standing = {
  collection: Schema.optionalKey(CollectionName),
  query: Schema.optionalKey(VectorFromNumbers),
  query_b64: Schema.optionalKey(VectorFromBase64Url),
  query_vector_id: Schema.optionalKey(VectorId),
  k: Schema.optionalKey(StandingK),
  /** Records with a lower score are not in the answer. */
  min_score: Schema.optionalKey(Schema.Finite),
  filter: Schema.optionalKey(FilterObject),
  include: Schema.optionalKey(Include),
  policy: Schema.optionalKey(SlowPolicy),
  cursor: Schema.optionalKey(Cursor)
}

/** A standing query, as a URL's parameters stand for one. */
export const SubscribeRequest = Schema.Struct(standing)
export type SubscribeRequest = typeof SubscribeRequest.Type

/** With which change to begin where there is no cursor: the next one, or the oldest that is kept. */
export const FollowFrom = Schema.Literals(["newest", "oldest"])

const following = {
  collection: Schema.optionalKey(CollectionName),
  from: Schema.optionalKey(FollowFrom),
  policy: Schema.optionalKey(SlowPolicy),
  cursor: Schema.optionalKey(Cursor)
}

/** A collection's change feed. */
export const FollowRequest = Schema.Struct(following)
export type FollowRequest = typeof FollowRequest.Type

/** Of a WebSocket's frames: `id` names the subscription in its events, and in `unsubscribe`. */
const addressed = { id: ClientId, session: Schema.optionalKey(ClientId) }

export const SubscribeFrame = Schema.Struct({ type: Schema.Literal("subscribe"), ...addressed, ...standing })
export const ResumeFrame = Schema.Struct({
  type: Schema.Literal("resume"),
  ...addressed,
  ...standing,
  cursor: Cursor
})
export const FollowFrame = Schema.Struct({ type: Schema.Literal("follow"), ...addressed, ...following })
/** Answered by `{"event":"unsubscribed","id"}` in any case. */
export const UnsubscribeFrame = Schema.Struct({ type: Schema.Literal("unsubscribe"), ...addressed })

const JsonObject = Schema.Record(Schema.String, Schema.Json)

/** A record of a standing query's answer. */
export const Member = Schema.Struct({
  vector_id: Schema.String,
  score: Schema.Number,
  version: Schema.String,
  metadata: Schema.optionalKey(JsonObject),
  vector: Schema.optionalKey(Schema.Array(Schema.Number))
}).annotate({ identifier: "Member" })

/** `update`: the record of a member is another version, or its score another: everything of it anew. */
export const AnswerChange = Schema.Union([
  Schema.Struct({ type: Schema.Literal("leave"), vector_id: Schema.String }),
  Schema.Struct({ type: Schema.Literals(["enter", "update"]), ...Member.fields })
]).annotate({ identifier: "AnswerChange" })

/** Of Server-Sent Events the cursor is the event's id, and not in its data. */
const withCursor = { cursor: Schema.optionalKey(Schema.String) }

/** One event of a standing query. */
export const SubscriptionEvent = Schema.Union([
  Schema.Struct({ event: Schema.Literal("subscribed"), results: Schema.Array(Member), ...withCursor }),
  /** `keep`: who is left of the answer before; absent where nobody left it. */
  Schema.Struct({
    event: Schema.Literal("resumed"),
    keep: Schema.optionalKey(Schema.Array(Schema.String)),
    changes: Schema.Array(AnswerChange),
    ...withCursor
  }),
  Schema.Struct({ event: Schema.Literal("changes"), changes: Schema.Array(AnswerChange), ...withCursor })
]).annotate({ identifier: "SubscriptionEvent" })
export type SubscriptionEvent = typeof SubscriptionEvent.Type

/**
 * One event of a change feed. First `following`: changes after its cursor follow. `resync`: changes before its cursor are
 * gone that were not sent: read the collection anew.
 */
export const FollowEvent = Schema.Union([
  Schema.Struct({ event: Schema.Literals(["following", "resync"]), ...withCursor }),
  Schema.Struct({
    event: Schema.Literal("change"),
    kind: Schema.Literals(["upsert", "metadata", "delete"]),
    vector_id: Schema.String,
    version: Schema.String,
    ...withCursor
  })
]).annotate({ identifier: "FollowEvent" })
export type FollowEvent = typeof FollowEvent.Type
