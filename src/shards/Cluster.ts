/**
 * What entities live on. One process alone: Effect Cluster with its runner set and message storage in memory. Several: runners
 * that share a table of themselves and the locks of their shards in Postgres, and speak to each other by TCP; gateways are
 * clients of theirs and hold no shard. The entities are the same ones, only these layers differ.
 *
 * Two groups of shards, `partitions` and `default`, so that the weight of one does not decide where the other lives. Messages
 * are volatile: what was under way when a runner dies is sent again by its caller, so calls are at least once.
 */
import { createServer } from "node:net"
import * as NodeSocket from "@effect/platform-node/NodeSocket"
import * as NodeSocketServer from "@effect/platform-node/NodeSocketServer"
import { PgClient } from "@effect/sql-pg"
import { Cause, Context, Duration, Effect, Layer, Option, Redacted, Schedule } from "effect"
import {
  MessageStorage,
  RunnerAddress,
  RunnerHealth,
  RunnerServer,
  RunnerStorage,
  Runners,
  Sharding,
  ShardingConfig,
  SocketRunner,
  SqlRunnerStorage
} from "effect/cluster"
import { RpcClient, RpcSerialization, RpcServer } from "effect/rpc"
import * as Socket from "effect/socket/Socket"
import { SqlClient } from "effect/sql"
import { Settings, type SettingValues } from "../config.ts"
import { partitionsGroup } from "../protocol/IndexPartition.ts"
import { PeerRpcs } from "../protocol/Peer.ts"
import { Calls } from "./Calls.ts"
import type { LocalActors } from "./LocalActors.ts"
import { Membership, shardsPerGroup } from "./Membership.ts"
import { Peers } from "./Peers.ts"
import { Placement } from "./Placement.ts"
import { RunnerMonitor } from "./RunnerMonitor.ts"

/** Largest message between two nodes: a group of records that is inserted. */
const frameBytesMax = 256 * 1_048_576

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
          ...shared(settings),
          // Messages between actors of one process are handed over as they are, not encoded and decoded.
          simulateRemoteSerialization: false
        })
      )
    )
  )
)

/** The actors that are somewhere in the cluster; in this process where it is alone. */
export const layer = Layer.unwrap(
  Effect.map(
    Settings,
    (
      settings
    ): Layer.Layer<
      Sharding.Sharding | Membership | Placement | Peers | Calls,
      ClusterUnavailable, Settings | LocalActors> => {
      if (settings.databaseUrl === "") return layerAlone
      return Calls.layer.pipe(
        Layer.provideMerge(Placement.layer),
        Layer.provideMerge(settings.role === "gateway" ? gateway(settings) : runner(settings))
      )
    }
  )
)

/** A process that is alone. */
export const layerAlone = Placement.layer.pipe(Layer.provideMerge(Calls.layerAlone),Layer.provideMerge(layerNode), Layer.provideMerge(Membership.layerAlone), Layer.provideMerge(Peers.layerAlone))

/** The same for all members, whichever way they are joined. */
const shared = (settings: SettingValues) => ({
  shardsPerGroup,
  availableShardGroups: ["default", partitionsGroup],
  assignedShardGroups: ["default", partitionsGroup],
  maxResidentEntities: settings.residentEntitiesMax,
  entityTerminationTimeout: Duration.millis(settings.drainMillis),
  entityMaxIdleTime: Duration.millis(settings.sessionIdleMillis)
})

const member = (settings: SettingValues) => ({
  ...shared(settings),
  simulateRemoteSerialization: false,
  runnerShardWeight: settings.clusterWeight,
  shardLockExpiration: Duration.millis(settings.shardLockMillis),
  // Locks are rows: those of a session would go with it, when the database restarts.
  shardLockDisableAdvisory: true,
  refreshAssignmentsInterval: Duration.millis(settings.shardRefreshMillis),
  runnerHealthCheckInterval: Duration.millis(settings.runnerHealthMillis),
  runnerJoinDebounce: Duration.millis(settings.joinDebounceMillis),
  // Nothing is stored for later that were to be polled; but shards that were given up, and are this runner's again before that was
  // done, are taken only when it is polled, and so are all after a failure.
  entityMessagePollInterval: Duration.millis(settings.shardRefreshMillis * 4),
  sendRetryInterval: Duration.millis(50)
})

const gateway = (settings: SettingValues) =>
  SocketRunner.layerClientOnly.pipe(
    Layer.provideMerge(Peers.layer),
    Layer.provide(clientProtocol(settings)),
    Layer.provideMerge(MessageStorage.layerNoop),
    Layer.provideMerge(storage(settings)),
    Layer.provide(ShardingConfig.layer({ ...member(settings), runnerAddress: Option.none() })),
    Layer.provide(serialization)
  )

const runner = (settings: SettingValues) =>
  Layer.unwrap(
    Effect.map(portOf(settings), (port) => {
      const address = RunnerAddress.make(settings.clusterHost, port)
      const listen = { host: settings.clusterListen === "" ? settings.clusterHost : settings.clusterListen, port }
      return server.pipe(
        Layer.provideMerge(Sharding.layer),
        Layer.provideMerge(RunnerMonitor.layer(`${tablePrefix(settings)}_runners`)),
        Layer.provide(Layer.effect(RunnerHealth.RunnerHealth, RunnerMonitor.health)),
        Layer.provide(Runners.layerRpc),
        Layer.provideMerge(Peers.layer),
        Layer.provide([
          NodeSocketServer.layer({ ...listen, noDelay: true }).pipe(
            Layer.catch((error) =>
              Layer.effectContext(Effect.fail(new ClusterUnavailable(notListening(listen, error))))
            )
          ),
          clientProtocol(settings)
        ]),
        Layer.provideMerge(MessageStorage.layerNoop),
        Layer.provideMerge(storage(settings)),
        Layer.provide(ShardingConfig.layer({ ...member(settings), runnerAddress: Option.some(address) })),
        Layer.provide(serialization)
      )
    })
  )

/** Effect Cluster's own server, which also answers what processes ask each other directly. */
const server = RpcServer.layer(Runners.Rpcs.merge(PeerRpcs), {
  spanPrefix: "RunnerServer",
  disableTracing: true,
  disableFatalDefects: true
}).pipe(
  Layer.provide([RunnerServer.layerHandlers, Peers.handlers]),
  Layer.provide(RpcServer.layerProtocolSocketServer)
)

const serialization = RpcSerialization.layerSchemaBinary({ maxFrameSize: frameBytesMax })

/** As Effect's own, but without Nagle's delay, which holds small messages back for 40 ms and more. */
const clientProtocol = ({ clusterPingMillis }: SettingValues) =>
  Layer.effect(
    Runners.RpcClientProtocol,
    Effect.map(RpcSerialization.RpcSerialization, (serialization) => ({
      codecFor: serialization.codecFor,
      make: Effect.fnUntraced(function* (address: RunnerAddress.RunnerAddress) {
        const { host, port } = address
        const socket = yield* NodeSocket.makeNet({ host, port, noDelay: true, openTimeout: 1_000 })
        return yield* RpcClient.makeProtocolSocket({ pingInterval: clusterPingMillis }).pipe(
          Effect.provideService(Socket.Socket, socket),
          Effect.provideService(RpcSerialization.RpcSerialization, serialization)
        )
      }, Effect.orDie)
    }))
  )

/** Names of the cluster's tables in the database: a database may serve several cells. */
export const tablePrefix = (settings: Pick<SettingValues, "cell">): string =>
  `ruvector_${settings.cell.replaceAll("-", "_")}`

/** The database of the cluster. Its pool is small: only locks, heartbeats and the list of runners are there. */
export const database = (settings: SettingValues) =>
  PgClient.layer({
    url: Redacted.make(settings.databaseUrl),
    applicationName: `ruvector-${settings.role}`,
    maxConnections: settings.databaseConnectionsMax,
    connectTimeout: Duration.millis(settings.databaseConnectMillis)
  })

/** The runners and their locks. The tables are made where they are missing, by one node at a time. */
const storage = (settings: SettingValues) =>
  Layer.unwrap(
    Effect.as(
      reachable(settings),
      Membership.layer(tablePrefix(settings)).pipe(
        Layer.provide(SqlRunnerStorage.layerWith({ prefix: tablePrefix(settings) })),
        Layer.provideMerge(database(settings)),
        Layer.catchCause((cause) => Layer.effectContext(Effect.fail(unusable(settings, cause))))
      )
    )
  )

/** Waits until the database answers: nodes and database may be started at once. */
const reachable = (settings: SettingValues) => {
  const asked = Effect.gen(function* () {
    const sql = Context.get(yield* Layer.build(database(settings)), SqlClient.SqlClient)
    yield* sql`SELECT 1`
  }).pipe(Effect.scoped, Effect.timeout(settings.databaseConnectMillis))
  return asked.pipe(
    Effect.tapCause((cause) => Effect.logWarning(unusable(settings, cause).message)),
    Effect.retry(Schedule.upTo(Schedule.spaced(500), { duration: settings.databaseWaitMillis })),
    Effect.catchCause((cause) => Effect.fail(unusable(settings, cause)))
  )
}

const notListening = ({ host, port }: { readonly host: string; readonly port: number }, error: Error): string =>
  `It cannot be listened on ${host}:${port} for other nodes: ${error.cause instanceof Error ? error.cause.message : error.message}`

const unusable = ({ databaseUrl }: SettingValues, cause: Cause.Cause<unknown>): ClusterUnavailable => {
  const { host, pathname } = new URL(databaseUrl)
  const why = Cause.squash(cause)
  const reason = why instanceof Error ? (why.cause instanceof Error ? why.cause.message : why.message) : String(why)
  return new ClusterUnavailable(`The database ${host}${pathname} cannot be used: ${reason}`)
}

/** The port that was asked for, or a free one: the others have to be told it before it is listened on. */
const portOf = ({ clusterListen, clusterHost, clusterPort }: SettingValues) =>
  clusterPort !== 0
    ? Effect.succeed(clusterPort)
    : Effect.callback<number>((resume) => {
        const probe = createServer()
        probe.listen(0, clusterListen === "" ? clusterHost : clusterListen, () => {
          const { port } = probe.address() as { readonly port: number }
          probe.close(() => resume(Effect.succeed(port)))
        })
        probe.on("error", (error) => resume(Effect.die(error)))
      })
