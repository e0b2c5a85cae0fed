/**
 * Members of a cluster that meet in Postgres: its tables say which runners there are and who holds which shard; to each other
 * they speak by TCP. Loaded only by a node that is one.
 */
import { randomBytes } from "node:crypto"
import { PgClient } from "@effect/sql-pg"
import { Cause, Context, Duration, Effect, Layer, Option, Redacted, Schedule } from "effect"
import {
  MessageStorage,
  RunnerAddress,
  RunnerHealth,
  RunnerServer,
  Runners,
  Sharding,
  ShardingConfig,
  SocketRunner,
  SqlRunnerStorage
} from "effect/cluster"
import { RpcClient, RpcSerialization, RpcServer } from "effect/rpc"
import * as Socket from "effect/socket/Socket"
import { SqlClient } from "effect/sql"
import type { SettingValues } from "../config.ts"
import { PeerRpcs } from "../protocol/Peer.ts"
import { ClusterUnavailable, sharedConfig } from "./Cluster.ts"
import * as ClusterListener from "./ClusterListener.ts"
import { ClusterNodes } from "./ClusterNodes.ts"
import * as ClusterTables from "./ClusterTables.ts"
import * as CorkedSocket from "./CorkedSocket.ts"
import { freePort } from "./freePort.ts"
import { Membership } from "./Membership.ts"
import { Peers } from "./Peers.ts"
import { RunnerMonitor } from "./RunnerMonitor.ts"

/** For a connection to another node to be there. */
const openMillis = 1_000

/** Between two tries at a call to an actor that the runner asked does not have, or not yet. */
const sendRetryMillis = 50

/** Between two looks at what was not taken or given, in looks at who owns what. */
const pollRefreshes = 4

/** Between two looks at whether the database is there, at start. */
const reachPauseMillis = 500

/** Largest message between two nodes: a group of records that is inserted. */
const frameBytesMax = 256 * 1_048_576

const member = (settings: SettingValues) => ({
  ...sharedConfig(settings),
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
  entityMessagePollInterval: Duration.millis(settings.shardRefreshMillis * pollRefreshes),
  sendRetryInterval: Duration.millis(sendRetryMillis)
})

/** A member that holds no shard. */
export const gateway = (settings: SettingValues) =>
  SocketRunner.layerClientOnly.pipe(
    Layer.provideMerge(Peers.layer),
    Layer.provide(clientProtocol(settings)),
    Layer.provideMerge(MessageStorage.layerNoop),
    Layer.provideMerge(storage(settings, `gateway-${randomBytes(6).toString("hex")}`)),
    Layer.provide(ShardingConfig.layer({ ...member(settings), runnerAddress: Option.none() })),
    Layer.provide(serialization)
  )

/** A member that owns shards. */
export const runner = (settings: SettingValues) =>
  Layer.unwrap(
    Effect.map(portOf(settings), (port) => {
      const address = RunnerAddress.make(settings.clusterHost, port)
      const listen = { host: settings.clusterListen === "" ? settings.clusterHost : settings.clusterListen, port }
      return server.pipe(
        Layer.provideMerge(Sharding.layer),
        Layer.provideMerge(RunnerMonitor.layer(tablePrefix(settings))),
        Layer.provide(Layer.effect(RunnerHealth.RunnerHealth, RunnerMonitor.health)),
        Layer.provide(Runners.layerRpc),
        Layer.provideMerge(Peers.layer),
        Layer.provide([
          ClusterListener.layer({ ...listen, noDelay: true }).pipe(
            Layer.catch((error) =>
              Layer.effectContext(Effect.fail(new ClusterUnavailable(notListening(listen, error))))
            )
          ),
          clientProtocol(settings)
        ]),
        Layer.provideMerge(MessageStorage.layerNoop),
        Layer.provideMerge(storage(settings, `${settings.clusterHost}:${port}`)),
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
}).pipe(Layer.provide([RunnerServer.layerHandlers, Peers.handlers]), Layer.provide(RpcServer.layerProtocolSocketServer))

const serialization = RpcSerialization.layerSchemaBinary({ maxFrameSize: frameBytesMax })

/** As Effect's own, over sockets that are as quick as they can be. */
const clientProtocol = ({ clusterPingMillis }: SettingValues) =>
  Layer.effect(
    Runners.RpcClientProtocol,
    Effect.map(RpcSerialization.RpcSerialization, (serialization) => ({
      codecFor: serialization.codecFor,
      make: Effect.fnUntraced(function* (address: RunnerAddress.RunnerAddress) {
        const { host, port } = address
        const socket = yield* CorkedSocket.make({ host, port, openMillis })
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

/** The runners and their locks. The tables are made where they are missing and this role may; else `ruvector migrate` does. */
const storage = (settings: SettingValues, node: string) =>
  Layer.unwrap(
    Effect.as(
      reachable(settings),
      Membership.layer(tablePrefix(settings)).pipe(
        Layer.provide(SqlRunnerStorage.layerStorage({ prefix: tablePrefix(settings) })),
        Layer.provideMerge(ClusterNodes.layer(tablePrefix(settings), node)),
        Layer.provide(Layer.effectDiscard(ClusterTables.prepare(tablePrefix(settings)))),
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
    Effect.retry(Schedule.upTo(Schedule.spaced(reachPauseMillis), { duration: settings.databaseWaitMillis })),
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
    : Effect.promise(() => freePort(clusterListen === "" ? clusterHost : clusterListen))
