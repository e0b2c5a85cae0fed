/**
 * What entities live on. One process alone: Effect Cluster with its runner set and message storage in memory. Several: runners
 * that share a table of themselves and the locks of their shards in Postgres, and speak to each other by TCP; gateways are
 * clients of theirs and hold no shard. The entities are the same ones, only these layers differ.
 *
 * Two groups of shards, `partitions` and `default`, so that the weight of one does not decide where the other lives. Messages
 * are volatile: what was under way when a runner dies is sent again by its caller, so calls are at least once.
 */
import { Duration, Effect, Layer } from "effect"
import * as MessageStorage from "effect/cluster/MessageStorage"
import * as RunnerHealth from "effect/cluster/RunnerHealth"
import * as RunnerStorage from "effect/cluster/RunnerStorage"
import * as Runners from "effect/cluster/Runners"
import * as Sharding from "effect/cluster/Sharding"
import * as ShardingConfig from "effect/cluster/ShardingConfig"
import { Settings, type SettingValues } from "../config.ts"
import { partitionsGroup } from "../protocol/IndexPartition.ts"
import { Calls } from "./Calls.ts"
import { ClusterNodes } from "./ClusterNodes.ts"
import type { LocalActors } from "./LocalActors.ts"
import { Membership, shardsPerGroup } from "./Membership.ts"
import { Peers } from "./Peers.ts"
import { Placement } from "./Placement.ts"

/** The database of the cluster cannot be used. */
export class ClusterUnavailable extends Error {
  readonly _tag = "ClusterUnavailable"
}

/**
 * Actors that act on the process they run in (load shedder, tier promoter): each process has its own, reached by nobody else.
 * One process without services has all its actors so.
 */
export const layerNode = Layer.unwrap(
  Effect.map(Settings, (settings) =>
    Sharding.layer.pipe(
      Layer.provideMerge(Runners.layerNoop),
      Layer.provideMerge(MessageStorage.layerMemory),
      Layer.provide([RunnerStorage.layerMemory, RunnerHealth.layerNoop]),
      Layer.provide(
        ShardingConfig.layer({
          ...sharedConfig(settings),
          // Nothing is divided among others, and each shard costs time to take at the start and to give up at the end.
          shardsPerGroup: 1,
          // Messages between actors of one process are handed over as they are, not encoded and decoded.
          simulateRemoteSerialization: false
        })
      )
    )
  )
)

/** The actors that are somewhere in the cluster; in this process where it is alone. */
export const layer: Layer.Layer<Member, ClusterUnavailable, Settings | LocalActors> = Layer.unwrap(
  Effect.map(Settings, (settings): Layer.Layer<Member, ClusterUnavailable, Settings | LocalActors> => {
    if (settings.databaseUrl === "") return layerAlone
    // Loaded only here: a node alone needs nothing of a database, nor of connections to other nodes.
    return Layer.unwrap(
      Effect.map(
        Effect.promise(() => import("./PostgresCluster.ts")),
        (members) =>
          Calls.layer.pipe(
            Layer.provideMerge(Placement.layer),
            Layer.provideMerge(settings.role === "gateway" ? members.gateway(settings) : members.runner(settings))
          )
      )
    )
  })
)

/** What a process has of the cluster that it is in, or would be. */
type Member = Sharding.Sharding | Membership | Placement | Calls | Peers | ClusterNodes

/** A process that is alone. */
export const layerAlone = Placement.layer.pipe(
  Layer.provideMerge(layerNode),
  Layer.provideMerge(Membership.layerAlone),
  Layer.provideMerge(Calls.layerAlone),
  Layer.provideMerge(Peers.layerAlone),
  Layer.provideMerge(ClusterNodes.layerAlone)
)

/** The same for all members, whichever way they are joined. */
export const sharedConfig = (settings: SettingValues) => ({
  shardsPerGroup,
  availableShardGroups: ["default", partitionsGroup],
  assignedShardGroups: ["default", partitionsGroup],
  maxResidentEntities: settings.residentEntitiesMax,
  entityTerminationTimeout: Duration.millis(settings.drainMillis),
  entityMaxIdleTime: Duration.millis(settings.sessionIdleMillis)
})
