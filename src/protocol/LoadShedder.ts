/**
 * Messages of the `LoadShedder` entity, one for each node. It watches how much the node carries, decides at which level load
 * is shed, and says so in events that one can follow.
 *
 * It acts on the process it runs in, so a node's shedder belongs on that node.
 */
import { Schema } from "effect"
import * as Entity from "effect/cluster/Entity"
import * as Rpc from "effect/rpc/Rpc"
import { ApiError } from "./Errors.ts"

/** The id of the shedder of the node that asks. */
export const localShedderId = "local"

/**
 * 0: nothing is shed. 85: each user may ask `shedUserRate` times a second. 90: idle connections are closed as well.
 * 95: new connections are rejected, and a share of what is not premium.
 */
export const loadLevels = [0, 85, 90, 95] as const
export const LoadLevel = Schema.Literals(loadLevels)
export type LoadLevel = typeof LoadLevel.Type

export const LoadCause = Schema.Literals(["cpu", "memory", "connections", "latency", "event_loop"])
export type LoadCause = typeof LoadCause.Type

/** What was measured. Shares are of what the process may use, 1: all of it. */
export const LoadSample = Schema.Struct({
  cpu: Schema.Finite,
  memory: Schema.Finite,
  connections: Schema.Finite,
  /** 99th percentile of searches in the last seconds; 0 where there were too few to say. */
  search_p99_ms: Schema.Finite,
  event_loop_p99_ms: Schema.Finite
})
export type LoadSample = typeof LoadSample.Type

const at = {
  /** Position: one more with each event of this shedder, from 1 when it starts. */
  seq: Schema.Int,
  at_ms: Schema.Int
}

export const LoadEvent = Schema.Union([
  /** The first that a follower is given: what comes now follows `seq`. */
  Schema.Struct({ event: Schema.Literal("following"), ...at }),
  /** `causes`: what is at this level or above. */
  Schema.Struct({
    event: Schema.Literal("level_changed"),
    ...at,
    from: LoadLevel,
    to: LoadLevel,
    causes: Schema.Array(LoadCause),
    sample: LoadSample
  }),
  Schema.Struct({ event: Schema.Literal("idle_closed"), ...at, connections: Schema.Int }),
  /** What was refused since the last such event, by the bound that was reached. */
  Schema.Struct({ event: Schema.Literal("refused"), ...at, bounds: Schema.Record(Schema.String, Schema.Int) }),
  /** The follower was too slow: this many events before this position are gone. */
  Schema.Struct({ event: Schema.Literal("events_missed"), ...at, count: Schema.Int })
]).annotate({ identifier: "LoadEvent" })
export type LoadEvent = typeof LoadEvent.Type

export const LoadState = Schema.Struct({
  level: LoadLevel,
  /** Since when, milliseconds since 1970. */
  since_ms: Schema.Int,
  causes: Schema.Array(LoadCause),
  sample: LoadSample,
  /** Searches: how many may be under way at once, how many are, and how many wait. */
  searches: Schema.Struct({
    limit: Schema.Int,
    under_way: Schema.Int,
    waiting: Schema.Int,
    /** How many times longer a search takes than it does alone. */
    slowdown: Schema.Finite
  }),
  /** Refused since the process started, by the bound that was reached. */
  refused: Schema.Record(Schema.String, Schema.Int)
}).annotate({ identifier: "LoadState" })
export type LoadState = typeof LoadState.Type

export const LoadShedder = Entity.make("LoadShedder", [
  Rpc.make("State", { success: LoadState }),
  /** Events after a position, then those to come; without one, those to come. */
  Rpc.make("Events", {
    payload: { after: Schema.optionalKey(Schema.Int) },
    success: LoadEvent,
    error: ApiError,
    stream: true
  })
])
