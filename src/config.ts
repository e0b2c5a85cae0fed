/**
 * Every setting: its name, unit, default and bound. Settings come from flags (`--max-body-bytes 1000000`) or from the
 * environment (`RUVECTOR_MAX_BODY_BYTES`; for the port also `PORT`); flags win. `serve --help` prints this table.
 *
 * Code below `main.ts` is given values of {@link Settings}; it never reads the environment itself.
 */
import { isIP } from "node:net"
import { Context } from "effect"
import { regionPattern } from "./protocol/Version.ts"

export interface SettingSpec<A> {
  readonly description: string
  readonly unit: string
  readonly default: A
  /** Parses the text of a flag or variable; throws a `RangeError` that says what was expected. */
  readonly parse: (text: string) => A
  /** What is accepted, for people. */
  readonly bound: string
}

const integer = (
  description: string,
  unit: string,
  value: number,
  minimum: number,
  maximum: number
): SettingSpec<number> => ({
  description,
  unit,
  default: value,
  bound: `${minimum}..${maximum}`,
  parse: (text) => {
    const n = /^\d{1,15}$/.test(text) ? Number(text) : Number.NaN
    if (!(n >= minimum && n <= maximum)) throw new RangeError(`expected an integer from ${minimum} to ${maximum}`)
    return n
  }
})

const choice = <const A extends string>(description: string, value: A, options: ReadonlyArray<A>): SettingSpec<A> => ({
  description,
  unit: "",
  default: value,
  bound: options.join("|"),
  parse: (text) => {
    const found = options.find((option) => option === text)
    if (found === undefined) throw new RangeError(`expected one of ${options.join(", ")}`)
    return found
  }
})

const text = (description: string, value: string, bound: string, pattern: RegExp): SettingSpec<string> => ({
  description,
  unit: "",
  default: value,
  bound,
  parse: (input) => {
    if (!pattern.test(input)) throw new RangeError(`expected ${bound}`)
    return input
  }
})

const networks = (description: string, value: string, bound: string): SettingSpec<string> => ({
  description,
  unit: "",
  default: value,
  bound,
  parse: (input) => {
    for (const entry of input === "none" ? [] : input.split(",")) {
      const [address = "", prefix = "0", ...more] = entry.trim().split("/")
      const version = isIP(address)
      const bits = version === 6 ? 128 : 32
      if (version === 0 || more.length > 0 || !/^\d{1,3}$/.test(prefix) || Number(prefix) > bits) {
        throw new RangeError(`expected ${bound}`)
      }
    }
    return input
  }
})

const mebibyte = 1_048_576

/** Empty, or a URL of Redis, in the clear or by TLS. */
const redisPattern = /^(?:|rediss?:\/\/\S{1,2000})$/

export const settings = {
  // Where and what
  port: integer("TCP port to listen on; 0 takes a free one", "", 8080, 0, 65_535),
  host: text("address to listen on", "127.0.0.1", "an address or host name", /^\S{1,255}$/),
  data: text("data directory, or bucket", "./data", "a path or gs://bucket/prefix", /^[^\0]{1,4096}$/),
  region: text("region stamped into versions and request ids", "local", "1-32 of a-z 0-9 -", regionPattern),
  logLevel: choice("least severe log line written", "info", ["trace", "debug", "info", "warn", "error"]),
  logFormat: choice("log lines as JSON, or for people (auto: people on a terminal)", "auto", [
    "auto",
    "json",
    "pretty"
  ]),
  activate: choice("collections whose partitions must be resident before the node is ready", "all", ["all", "none"]),

  // Cluster
  role: choice("what this process does: serve clients, own partitions, or both", "all", ["all", "gateway", "runner"]),
  databaseUrl: text(
    "Postgres that the nodes of a cluster meet in; empty: this node is alone",
    "",
    "postgres://.. or empty",
    /^(?:|postgres(?:ql)?:\/\/\S{1,2000})$/
  ),
  databaseConnectionsMax: integer("connections to it", "connections", 4, 2, 100),
  databaseConnectMillis: integer("for a connection to it", "ms", 5_000, 100, 600_000),
  databaseQueryMillis: integer(
    "for its answer, before it counts as gone; at most a quarter of shard-lock-millis",
    "ms",
    2_500,
    50,
    600_000
  ),
  databaseOutageMillis: integer(
    "that runners keep their shards while it is gone; then they give them up until it is back",
    "ms",
    600_000,
    0,
    86_400_000
  ),
  databaseWaitMillis: integer("that it may take until it is there, at start", "ms", 60_000, 0, 3_600_000),
  cell: text("cluster that this node belongs to, within the region", "main", "1-32 of a-z 0-9 -", regionPattern),
  directoryUrl: text(
    "Postgres in which the cells of the region say which collections each has; empty: it has one cell",
    "",
    "postgres://.. or empty",
    /^(?:|postgres(?:ql)?:\/\/\S{1,2000})$/
  ),
  cellUrl: text(
    "where clients reach this cell's gateways, told those who ask another cell",
    "",
    "http(s)://.. or empty",
    /^(?:|https?:\/\/\S{1,2000})$/
  ),
  clusterHost: text(
    "address at which the others reach this runner",
    "127.0.0.1",
    "an address or host name",
    /^\S{1,255}$/
  ),
  clusterPort: integer("and port; 0 takes a free one", "", 0, 0, 65_535),
  clusterListen: text(
    "address that it listens on for them; empty: cluster-host",
    "",
    "an address, a host name, or empty",
    /^\S{0,255}$/
  ),
  clusterWeight: integer("shards that this runner takes, in relation to others", "shares", 1, 1, 1_000),
  clusterPingMillis: integer("between two pings of a connection to another runner", "ms", 5_000, 100, 600_000),
  clusterCallMillis: integer(
    "for an answer of another node to a call that has no deadline of its own",
    "ms",
    30_000,
    100,
    600_000
  ),
  shardLockMillis: integer(
    "after which the shards of a runner that stands still go to others",
    "ms",
    10_000,
    1_000,
    600_000
  ),
  shardRefreshMillis: integer("between two looks at which runner owns what", "ms", 250, 50, 60_000),
  prepareMillis: integer(
    "that a runner which comes or goes gives the next owners of its partitions to prepare for them",
    "ms",
    3_000,
    0,
    600_000
  ),
  standbyMillis: integer("that what was prepared is kept until it is needed", "ms", 30_000, 0, 600_000),
  ownerCheckMillis: integer(
    "between two looks at whether partitions are still this runner's, while the database is gone",
    "ms",
    1_000,
    50,
    60_000
  ),
  runnerHeartbeatMillis: integer(
    "between two heartbeats of a runner, at most a third of shard-lock-millis",
    "ms",
    1_000,
    100,
    60_000
  ),
  runnerHealthMillis: integer("between two looks at whether the others live", "ms", 500, 50, 60_000),
  runnerPingMillis: integer("for a runner's answer to whether it lives", "ms", 2_000, 50, 60_000),
  catalogueRefreshMillis: integer(
    "after which a node knows of collections that were changed or deleted by another one",
    "ms",
    2_000,
    50,
    600_000
  ),
  cellRunnersMax: integer("runners of a cell; one more is refused", "runners", 64, 1, 1_000),
  nodeReportMillis: integer("between two reports of a node on itself to the others", "ms", 2_000, 100, 60_000),
  joinDebounceMillis: integer("quiet time after which runners that joined are given shards", "ms", 0, 0, 600_000),

  // Object storage (where data is gs://bucket/prefix)
  cacheDir: text("directory for cached snapshots and scratch files", "./cache", "a path", /^[^\0]{1,4096}$/),
  diskCacheBytes: integer(
    "cached snapshot files on the local disk",
    "bytes",
    10_240 * mebibyte,
    mebibyte,
    1_000_000_000_000_000 - 1
  ),
  storeConnectionsMax: integer("requests under way to the object store", "requests", 64, 1, 4_096),
  storeRequestMillis: integer("for one request to the object store", "ms", 20_000, 100, 600_000),
  storeAttemptsMax: integer("attempts at one operation of the object store", "attempts", 8, 1, 100),
  storeRetryMillis: integer("after which an operation is not attempted again", "ms", 60_000, 0, 3_600_000),
  storeResumableBytes: integer(
    "body from which an upload is resumable, and one piece of it",
    "bytes",
    16 * mebibyte,
    262_144,
    1_024 * mebibyte
  ),
  storeDownloadBytes: integer("one piece of a parallel download", "bytes", 8 * mebibyte, 65_536, 256 * mebibyte),

  // Collections
  defaultPartitions: integer("partitions of a collection that names none", "partitions", 1, 1, 256),
  defaultM: integer("HNSW m of a collection that names none", "links", 16, 2, 128),
  defaultEfConstruction: integer("HNSW efConstruction of a collection that names none", "candidates", 200, 8, 2_000),
  defaultEfSearch: integer("HNSW ef of a search and a collection that name none", "candidates", 128, 1, 10_000),

  // Vector threads
  threads: integer("vector threads; 0: one for each core beyond the first", "threads", 0, 0, 256),
  insertSliceMillis: integer("insertion work between two looks at waiting searches", "ms", 4, 1, 1_000),
  threadPendingMax: integer("searches waiting for one vector thread", "searches", 4_096, 1, 1_000_000),
  searchWaitMillis: integer(
    "that the main thread may be kept waiting for searches that are alone, in a turn of its event loop; 0: never, as is right where it serves others. An engine in a program's own process has 4",
    "ms",
    0,
    0,
    1_000
  ),

  // Memory
  budgetBytes: integer(
    "memory that the process may hold, partitions and caches included; 0: three quarters of the container's",
    "bytes",
    0,
    0,
    2 ** 49
  ),

  // Mapped and quantised partitions
  blockCacheBytes: integer(
    "bytes of snapshot files kept in memory for partitions in the mapped form, a vector thread",
    "bytes",
    32 * mebibyte,
    mebibyte,
    65_536 * mebibyte
  ),

  // Writes
  commitBytesMax: integer(
    "bytes gathered into one log object, or one insert that is larger",
    "bytes",
    8 * mebibyte,
    65_536,
    256 * mebibyte
  ),
  writeQueueBytesMax: integer(
    "bytes waiting to be committed, a partition",
    "bytes",
    64 * mebibyte,
    mebibyte,
    4_096 * mebibyte
  ),
  applyBacklogBytesMax: integer(
    "bytes committed and not yet in the index, a partition",
    "bytes",
    32 * mebibyte,
    mebibyte,
    4_096 * mebibyte
  ),
  requestWindowMillis: integer(
    "within which a write that is made again under the same key is not done again",
    "ms",
    900_000,
    1_000,
    86_400_000
  ),
  requestWindowMax: integer(
    "writes with keys that are remembered for that, a partition",
    "writes",
    65_536,
    64,
    16_777_216
  ),
  snapshotOps: integer("operations after which a snapshot is taken", "operations", 10_000, 100, 10_000_000),
  snapshotSharePercent: integer("and this share of the partition's records", "%", 50, 1, 1_000),
  snapshotIdleMillis: integer(
    "quiet time after which a partition with news is snapshotted",
    "ms",
    5_000,
    100,
    3_600_000
  ),
  changeRetentionMillis: integer(
    "that the log is kept for followers of changes, beyond what its snapshots need",
    "ms",
    3_600_000,
    0,
    2_592_000_000
  ),
  changeReadsMax: integer("followers of changes that read the log at once", "followers", 16, 1, 4_096),
  changeBufferMax: integer("newest changes kept in memory for followers, a partition", "changes", 1_024, 16, 1_000_000),

  // Topics
  topicRetentionMillis: integer(
    "that messages and tasks are kept of a topic that names no other time",
    "ms",
    86_400_000,
    1_000,
    2_592_000_000
  ),
  topicChannels: integer("channels of a topic that names no other number", "channels", 1, 1, 64),
  topicCommitMillis: integer("between two log objects of a channel at least, under load", "ms", 1, 0, 1_000),
  topicQueueBytesMax: integer(
    "of messages and tasks waiting to be committed, a channel",
    "bytes",
    16 * mebibyte,
    65_536,
    4_096 * mebibyte
  ),
  topicWindowBytes: integer(
    "newest messages kept in memory for listeners, a channel",
    "bytes",
    4 * mebibyte,
    65_536,
    1_024 * mebibyte
  ),
  topicDedupeMillis: integer(
    "within which a message of an id that was published before is not published again",
    "ms",
    600_000,
    1_000,
    86_400_000
  ),
  topicDedupeMax: integer("newest ids of messages that are known for that, a channel", "ids", 100_000, 100, 10_000_000),
  topicSubscribersMax: integer("named subscribers of a channel", "subscribers", 10_000, 1, 1_000_000),
  topicSubscriberMillis: integer(
    "after which the position of a subscriber that never came back is forgotten",
    "ms",
    2_592_000_000,
    60_000,
    31_536_000_000
  ),
  topicSnapshotObjects: integer("log objects after which a channel is snapshotted", "objects", 5_000, 10, 1_000_000),
  topicSnapshotBytes: integer("or bytes of them", "bytes", 32 * mebibyte, 65_536, 4_096 * mebibyte),
  topicIdleMillis: integer("quiet time after which a channel is passivated", "ms", 300_000, 5_000, 86_400_000),
  topicPollMillis: integer(
    "longest wait of one call to a channel's owner; a longer one is made of several",
    "ms",
    5_000,
    10,
    60_000
  ),
  topicWaitersMax: integer("calls that wait for news of a channel", "calls", 10_000, 1, 1_000_000),
  topicTailMessages: integer(
    "newest messages of a channel that a node keeps for its listeners",
    "messages",
    1_024,
    16,
    1e6
  ),
  topicReadsMax: integer("listeners on a node that catch up at once", "listeners", 16, 1, 4_096),
  taskLeaseMillis: integer("lease of a task, where neither topic nor agent names one", "ms", 30_000, 10, 86_400_000),
  taskGraceMillis: integer("that a lease runs longer than was told, for the way there and back", "ms", 500, 0, 60_000),
  taskAttemptsMax: integer("times that a task is handed out before it is a dead letter", "attempts", 5, 1, 1_000),
  tasksMax: integer("tasks of a topic that are not done", "tasks", 200_000, 1, 10_000_000),
  taskBytesMax: integer("and their bytes", "bytes", 128 * mebibyte, 65_536, 16_384 * mebibyte),
  tasksDeadMax: integer("dead letters of a topic; then the oldest goes", "tasks", 10_000, 1, 1_000_000),
  tasksDoneMax: integer("tasks done that a topic remembers; then the oldest goes", "tasks", 100_000, 1, 10_000_000),

  // Backups
  backupTo: text(
    "where the node backs itself up to; empty: nowhere",
    "",
    "a path, gs://bucket/prefix, or empty",
    /^[^\0]{0,4096}$/
  ),
  backupIntervalMillis: integer("between two backups: the most that is lost", "ms", 900_000, 100, 3_600_000),
  backupKeepDays: integer("any time within which can be restored", "days", 30, 1, 3_650),
  backupLagMillisMax: integer(
    "that the log is kept for a backup that fails, before it is pruned all the same",
    "ms",
    86_400_000,
    1_000,
    2_592_000_000
  ),

  // Searches
  searchDeadlineMillis: integer("deadline of a search that names none", "ms", 10_000, 1, 60_000),
  activationDeadlineMillis: integer("wait for a partition to become resident", "ms", 120_000, 100, 3_600_000),

  // Standing queries
  standingQueriesMax: integer(
    "different standing queries on this node, and at one partition",
    "queries",
    100_000,
    1,
    10_000_000
  ),
  standingRetryMillis: integer(
    "longest wait before a partition that was lost is asked again for its standing queries",
    "ms",
    10_000,
    100,
    600_000
  ),

  // Admission of searches: adaptive, within these bounds
  searchLimitMin: integer("least searches that may be under way at once", "searches", 4, 1, 10_000),
  searchLimitMax: integer("and most", "searches", 1_024, 1, 100_000),
  searchSlowdownPercent: integer(
    "of the time alone that a search may take before fewer are under way at once",
    "%",
    200,
    110,
    10_000
  ),
  searchProbeMillis: integer("between two looks at what searches take alone, under load", "ms", 10_000, 500, 3_600_000),
  searchQueueMax: integer("searches that wait to begin, in a burst", "searches", 1_024, 1, 100_000),
  searchQueueBurstMillis: integer("that a search waits to begin, in a burst", "ms", 250, 5, 60_000),
  searchQueueStandingMillis: integer("least wait that, when it lasts that long, is overload", "ms", 100, 1, 60_000),
  searchQueueMillis: integer("mean time that a search waits to begin under overload", "ms", 5, 1, 60_000),
  searchQueueMin: integer("searches that wait under overload, however long that takes", "searches", 12, 1, 100_000),

  // Load shedding
  loadSampleMillis: integer("between two looks at the load", "ms", 1_000, 50, 60_000),
  loadRaiseMillis: integer("above a level before load is shed at it", "ms", 2_000, 0, 600_000),
  loadLowerMillis: integer("below the level before less is shed", "ms", 10_000, 0, 3_600_000),
  loadCpuPercent: integer("of the processors from which on load is shed", "%", 85, 1, 1_000),
  loadMemoryPercent: integer("of the container's memory from which on load is shed", "%", 90, 1, 1_000),
  loadConnectionsPercent: integer("of connections-max from which on load is shed", "%", 95, 1, 1_000),
  loadLatencyMillis: integer("99th percentile of searches from which on load is shed", "ms", 100, 1, 60_000),
  loadLoopMillis: integer(
    "99th percentile of the main thread's delay from which on load is shed",
    "ms",
    100,
    1,
    60_000
  ),
  loadEventsMax: integer("load events kept for followers", "events", 256, 16, 65_536),
  loadSubscribersMax: integer("followers of load events", "followers", 64, 1, 10_000),
  shedUserRate: integer("requests of one user from level 85 on", "requests a second", 10, 1, 100_000),
  shedUsersMax: integer("users whose rate is known", "users", 100_000, 100, 10_000_000),
  shedIdleMillis: integer(
    "quiet time after which a connection is closed from level 90 on",
    "ms",
    300_000,
    100,
    86_400_000
  ),
  shedIdleBatch: integer("connections closed at once for that", "connections", 100, 1, 100_000),
  shedPercent: integer("of requests that are not premium refused at level 95", "%", 20, 0, 100),
  shedRetryMillis: integer("least mean time after which one who is refused is to come back", "ms", 250, 10, 60_000),

  // Caching
  httpCache: choice("who may cache answers to GET: shared caches too, the client alone, or nobody", "public", [
    "public",
    "private",
    "off"
  ]),
  embedCacheSeconds: integer("that a vector read by GET may be cached", "s", 300, 0, 86_400),
  searchCacheSeconds: integer("that a search by GET may be cached", "s", 30, 0, 86_400),
  notFoundCacheSeconds: integer("that a 404 of those may be cached", "s", 60, 0, 86_400),
  resultCacheBytes: integer(
    "of answers kept until their collection changes; 0: none",
    "bytes",
    32 * mebibyte,
    0,
    4_096 * mebibyte
  ),
  resultStoreSeconds: integer("that the warm tier keeps the answer of a search by GET", "s", 300, 1, 86_400),

  // Actors
  partitionIdleMillis: integer("quiet time after which a partition is passivated; 0: never", "ms", 0, 0, 86_400_000),
  quarantineFailures: integer(
    "failures in a row, by its own fault, after which a partition is not opened for a while",
    "failures",
    3,
    1,
    1_000
  ),
  quarantineMillis: integer("that it is not; twice as long after each failure more", "ms", 10_000, 100, 3_600_000),
  quarantineMillisMax: integer("and at most", "ms", 600_000, 100, 86_400_000),
  quarantineCalmMillis: integer("without a failure after which it has none", "ms", 60_000, 100, 86_400_000),
  sessionIdleMillis: integer("quiet time after which a session is passivated", "ms", 30_000, 5_000, 86_400_000),
  sessionSearchesMax: integer("searches under way in one session", "searches", 256, 1, 10_000),
  sessionAnswersKept: integer("newest answers a session keeps for resuming", "answers", 2, 0, 64),
  sessionsPerConnection: integer("sessions on one connection", "sessions", 1_000, 1, 100_000),
  connectionSearchesMax: integer("requests under way on one WebSocket", "requests", 4_096, 1, 1_000_000),
  sessionOutboundEventsMax: integer(
    "events waiting for credits, a session; or those of one search that has more",
    "events",
    16_384,
    16,
    10_000_000
  ),
  sessionOutboundBytesMax: integer(
    "bytes waiting for credits or for a slow client, a session; or one answer that is larger",
    "bytes",
    mebibyte,
    4_096,
    1_024 * mebibyte
  ),
  sessionsMax: integer("sessions on this node", "sessions", 200_000, 1, 10_000_000),
  residentEntitiesMax: integer("actors resident on this node", "actors", 300_000, 1_000, 10_000_000),

  // Tiers: what is read, and what is promoted for it
  accessSketchWidth: integer(
    "counters in each row of the record frequency sketch",
    "counters",
    65_536,
    256,
    16_777_216
  ),
  accessTopRecords: integer("records read most that are known by name, a window", "records", 10_000, 100, 100_000),
  accessPastHours: integer("hours whose most read records are remembered", "h", 48, 1, 168),
  accessHalfLifeMillis: integer("after which a record's reads count half", "ms", 1_800_000, 60_000, 86_400_000),
  accessPartitionsMax: integer("partitions whose heat is known", "partitions", 65_536, 1_024, 10_000_000),
  heatHalfLifeMillis: integer("after which a partition's reads count half", "ms", 300_000, 1_000, 86_400_000),
  promoteAccesses: integer("reads in five minutes that promote a record to the warm tier", "reads", 3, 1, 1_000_000),
  trendAccesses: integer("least reads in a minute of a record that trends", "reads", 20, 5, 1_000_000),
  trendRatio: integer("rise in its share of reads from which on a record trends", "times", 3, 2, 1_000),
  tierTickMillis: integer("between two looks at what to promote and demote", "ms", 5_000, 100, 600_000),
  tierMovesPerMinute: integer("partitions promoted and demoted", "moves a minute", 12, 1, 10_000),
  tierResidenceMillis: integer(
    "a partition keeps its form before it is demoted for another",
    "ms",
    60_000,
    0,
    86_400_000
  ),
  tierHysteresisPercent: integer("heat a byte of a partition over that of those it displaces", "%", 150, 100, 10_000),
  tierHeatMin: integer("least heat of a partition that is promoted", "reads a minute", 6, 0, 1_000_000),
  tierEventsMax: integer("tier events waiting for a subscriber that does not read", "events", 1_024, 16, 65_536),
  tierSubscribersMax: integer("subscribers to tier events", "subscribers", 64, 1, 10_000),
  warmBatchRecords: integer("records of one batch while warming", "records", 256, 1, 10_000),
  warmsMax: integer("warmings under way on this node", "warmings", 2, 1, 64),

  // Caches of records, and Redis
  recordCacheBytes: integer("records cached on the main thread; 0: none", "bytes", 64 * mebibyte, 0, 65_536 * mebibyte),
  redisUrl: text(
    "Redis of the warm tier; empty: the warm tier is in memory",
    "",
    "redis://.. or rediss://..",
    redisPattern
  ),
  redisPrefix: text("what the names of keys in Redis begin with", "rv", "1-32 of a-z 0-9 -", regionPattern),
  redisTimeoutMillis: integer("wait for an answer of Redis, then go on without it", "ms", 250, 5, 60_000),
  redisPoolMax: integer("connections for commands that block", "connections", 8, 1, 1_024),
  warmTtlMillis: integer("time a record stays in the warm tier after its last use", "ms", 3_600_000, 100, 604_800_000),
  warmBytesMax: integer("warm tier where it is in memory; 0: none", "bytes", 64 * mebibyte, 0, 65_536 * mebibyte),
  warmWriteBytesMax: integer(
    "writes acknowledged as warm and not yet in the log, a partition",
    "bytes",
    16 * mebibyte,
    65_536,
    1_024 * mebibyte
  ),
  warmWriteMillis: integer("and the time Redis keeps them", "ms", 86_400_000, 60_000, 604_800_000),

  // Who may do what
  anonymousAccess: choice(
    "who may do everything without a credential: whoever is on this machine, where the address listened on is a loopback; nobody; or everybody",
    "loopback",
    ["loopback", "off", "everyone"]
  ),
  metricsAccess: choice("who may read /metrics and /load: operators, or everybody", "operator", ["operator", "open"]),
  docsAccess: choice("who may read /docs and /openapi.json: everybody, or who has a credential", "open", [
    "open",
    "authenticated"
  ]),
  keyRefreshMillis: integer(
    "after which an API key that was revoked elsewhere works no more, and streams opened with it are closed",
    "ms",
    10_000,
    100,
    3_600_000
  ),
  keyOutageMillis: integer(
    "that keys seen before go on working while the store of keys cannot be read",
    "ms",
    300_000,
    0,
    86_400_000
  ),
  keysCachedMax: integer("API keys known in memory", "keys", 10_000, 16, 1_000_000),
  keyLookupsMax: integer("API keys being looked up in the store", "lookups", 64, 1, 10_000),
  jwtIssuer: text("issuer (iss) of the tokens that are accepted; empty: no tokens are", "", "a text", /^\S{0,1024}$/),
  jwtAudience: text("audience (aud) that tokens are to be for", "", "a text", /^\S{0,1024}$/),
  jwtJwks: text("key set (JWKS) of the issuer", "", "a URL, or the path of a file", /^[^\0\n]{0,2048}$/),
  jwtAlgorithms: text(
    "signature algorithms that are accepted",
    "RS256,RS384,RS512,PS256,PS384,PS512,ES256,ES384,ES512,EdDSA",
    "some of RS256 RS384 RS512 PS256 PS384 PS512 ES256 ES384 ES512 EdDSA, by commas",
    /^(?:[RPE]S(?:256|384|512)|EdDSA)(?:,(?:[RPE]S(?:256|384|512)|EdDSA))*$/
  ),
  jwtClockToleranceSeconds: integer("that the issuer's clock may differ from ours", "s", 30, 0, 600),
  jwtTenant: text(
    "tenant of tokens that name none; empty: those are refused",
    "",
    "a tenant's name, or empty",
    /^(?:[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?)?$/
  ),
  jwtTenantClaim: text("claim that names the tenant", "tenant", "a claim's name", /^\S{1,256}$/),
  jwtScopeClaim: text("claim with the scopes: a text with spaces, or a list", "scope", "a claim's name", /^\S{1,256}$/),
  jwtTierClaim: text("claim with the tier", "tier", "a claim's name", /^\S{1,256}$/),
  jwtCollectionsClaim: text(
    "claim with a list of the only collections",
    "collections",
    "a claim's name",
    /^\S{1,256}$/
  ),
  jwtTokensMax: integer("tokens known as good, so that they are not checked anew", "tokens", 10_000, 16, 1_000_000),
  jwksMaxAgeMillis: integer("after which the key set is read anew", "ms", 600_000, 1_000, 86_400_000),
  jwksCooldownMillis: integer("between two readings of the key set at least", "ms", 10_000, 100, 3_600_000),
  jwksTimeoutMillis: integer("for the key set to arrive", "ms", 5_000, 100, 60_000),
  credentialsWatchedMax: integer("credentials with open streams", "credentials", 200_000, 16, 10_000_000),

  // Rates
  keyRate: integer("requests of one key or token; 0: no limit", "requests/s", 100, 0, 1_000_000),
  keyBurst: integer("and at once, after a pause", "requests", 200, 1, 1_000_000),
  addressRate: integer("requests of one address; 0: no limit", "requests/s", 100, 0, 1_000_000),
  addressBurst: integer("and at once, after a pause", "requests", 200, 1, 1_000_000),
  refusalsPerMinute: integer("wrong credentials of one address", "requests/min", 60, 1, 1_000_000),
  ratesKnownMax: integer("keys and addresses whose rate is known", "entries", 100_000, 128, 10_000_000),

  // Wires
  corsOrigins: text(
    "origins of web pages that may call, beside the server's own: those of this machine, all, or a list",
    "loopback",
    "loopback, *, or https://a.example,https://b.example",
    /^(?:loopback|\*|https?:\/\/[^\s,/]{1,255}(?:,https?:\/\/[^\s,/]{1,255}){0,255})$/
  ),
  maxBodyBytes: integer("bytes of a request body", "bytes", 32 * mebibyte, 1_024, 1_024 * mebibyte),
  bodyRatioMax: integer("bytes that a byte of a compressed body may become, above 1 MiB", "bytes", 100, 1, 10_000),
  maxFrameBytes: integer("bytes of a WebSocket frame", "bytes", 16 * mebibyte, 1_024, 256 * mebibyte),
  maxHeaderBytes: integer("bytes of a request's headers", "bytes", 16_384, 1_024, mebibyte),
  connectionsPerIpMax: integer(
    "open connections of one IPv4 address or IPv6 /64 that is no trusted proxy",
    "connections",
    1_000,
    1,
    1_000_000
  ),
  trustedProxies: networks(
    "peers whose X-Forwarded-For is believed",
    "127.0.0.0/8,::1",
    "addresses or networks separated by commas, or none"
  ),
  tlsCert: text(
    "file of the TLS certificate and its chain, PEM; empty: no TLS",
    "",
    "a path, or empty",
    /^[^\0]{0,4096}$/
  ),
  tlsKey: text("file of its key, PEM", "", "a path, or empty", /^[^\0]{0,4096}$/),
  connectionsMax: integer("open connections", "connections", 20_000, 1, 1_000_000),
  outboundBytesMax: integer(
    "bytes waiting for a client that does not read, a connection",
    "bytes",
    4 * mebibyte,
    65_536,
    1_024 * mebibyte
  ),
  subscriptionsPerSession: integer(
    "standing queries and change feeds of one session",
    "subscriptions",
    100,
    1,
    100_000
  ),
  subscriptionsMax: integer(
    "standing queries and change feeds followed on this node",
    "subscriptions",
    200_000,
    1,
    10_000_000
  ),
  cursorSecret: text(
    "secret that cursors are signed with; empty: one kept with the data",
    "",
    "empty, or 16-512 characters",
    /^(?:|.{16,512})$/
  ),
  pingIntervalMillis: integer("between two keep-alive pings of a quiet stream", "ms", 60_000, 100, 3_600_000),
  frameTurnMillis: integer(
    "that frames of WebSockets are read before what else there is to do has its turn",
    "ms",
    8,
    1,
    1_000
  ),
  controlFramesMax: integer("pings and pongs of one WebSocket in a minute", "frames", 600, 10, 1_000_000),
  idleTimeoutMillis: integer("after which a WebSocket that answers nothing is closed", "ms", 90_000, 200, 3_600_000),
  headersTimeoutMillis: integer("for a request's headers to arrive", "ms", 10_000, 100, 600_000),
  requestTimeoutMillis: integer("for a request to arrive whole", "ms", 60_000, 100, 3_600_000),
  keepAliveTimeoutMillis: integer("that a quiet HTTP connection is kept", "ms", 60_000, 100, 3_600_000),
  reconnectSpreadMillis: integer(
    "over which clients of a node that stops are told to spread their return",
    "ms",
    5_000,
    0,
    600_000
  ),
  sniffTimeoutMillis: integer("for the first bytes of a connection, or its TLS handshake", "ms", 10_000, 100, 600_000),
  requestsPerConnectionMax: integer("requests on one HTTP connection, then it ends", "requests", 1_000_000, 1, 1e12),
  h2StreamsMax: integer("requests under way on one HTTP/2 connection", "streams", 256, 1, 65_536),
  h2SessionMemoryBytes: integer("memory of one HTTP/2 connection", "bytes", 10 * mebibyte, mebibyte, 1_024 * mebibyte),
  h2WindowBytes: integer(
    "bytes under way to one HTTP/2 request; four times as many to all of a connection",
    "bytes",
    262_144,
    65_535,
    64 * mebibyte
  ),
  h2ResetsBurst: integer("requests an HTTP/2 connection may cancel at once", "requests", 1_000, 1, 1_000_000),
  h2ResetsPerSecond: integer("and in a second, over time", "requests", 33, 1, 100_000),
  h2OverheadBytesPerSecond: integer(
    "received on an HTTP/2 connection that belong to no request (pings, settings)",
    "bytes a second",
    65_536,
    1_024,
    1_024 * mebibyte
  ),
  grpcCallsMax: integer("open gRPC calls on this node", "calls", 100_000, 1, 10_000_000),
  grpcWatchesMax: integer("of which watch its health, which needs no credential", "calls", 1_024, 1, 1_000_000),
  grpcMessageBytesMax: integer("bytes of a gRPC message, inflated", "bytes", 4 * mebibyte, 1_024, 256 * mebibyte),
  grpcPartialBytesMax: integer(
    "bytes of gRPC messages that have not come whole, all calls together",
    "bytes",
    64 * mebibyte,
    mebibyte,
    4_096 * mebibyte
  ),
  grpcCompressBytesMin: integer(
    "bytes from which on a message is compressed for a gRPC client that compresses its own",
    "bytes",
    1_024,
    1,
    256 * mebibyte
  ),
  drainNoticeMillis: integer(
    "between readiness off and the end of new connections when shutting down, for load balancers",
    "ms",
    0,
    0,
    600_000
  ),
  drainMillis: integer("for open requests to end when shutting down, that included", "ms", 8_000, 0, 600_000),
  stopMillis: integer("for a process that is told to stop to end, or it ends at once", "ms", 29_000, 1_000, 3_600_000)
} as const satisfies Record<string, SettingSpec<string> | SettingSpec<number>>

/** A setting's name, as in a program; `docs/operating.md` has them all, with unit, default and bound. */
export type SettingName = keyof typeof settings
/** What the settings are. */
export type SettingValues = {
  readonly [Name in SettingName]: (typeof settings)[Name]["default"] extends number
    ? number
    : ReturnType<(typeof settings)[Name]["parse"]>
}

/** What they are where nothing else is said. */
export const defaultSettings: SettingValues = Object.fromEntries(
  Object.entries(settings).map(([name, spec]) => [name, spec.default])
) as SettingValues

/** The settings in force. */
export class Settings extends Context.Service<Settings, SettingValues>()("ruvector/config/Settings") {}

/** `maxBodyBytes` -> `max-body-bytes`. */
export const flagOf = (name: SettingName): string => name.replace(/[A-Z]/g, (c) => `-${c.toLowerCase()}`)

/** `maxBodyBytes` -> `RUVECTOR_MAX_BODY_BYTES`. */
export const variableOf = (name: SettingName): string => `RUVECTOR_${flagOf(name).replaceAll("-", "_").toUpperCase()}`

/** A flag or variable that is not one, or whose value is out of its bound. */
export class SettingError extends Error {}

/** Settings from flags (by setting name) and environment variables. Throws {@link SettingError} with one line for people. */
export const readSettings = (
  flags: Readonly<Partial<Record<SettingName, string>>>,
  environment: Readonly<Record<string, string | undefined>>
): SettingValues => {
  const values: Record<string, string | number> = { ...defaultSettings }
  const set = (name: SettingName, value: string | undefined, source: string) => {
    if (value === undefined || value === "") return
    try {
      values[name] = settings[name].parse(value)
    } catch (error) {
      const expected = error instanceof RangeError ? error.message : String(error)
      throw new SettingError(`${source}: ${expected}, got ${JSON.stringify(value)}`)
    }
  }
  set("port", environment["PORT"], "PORT")
  for (const name of Object.keys(settings) as Array<SettingName>) {
    set(name, environment[variableOf(name)], variableOf(name))
    set(name, flags[name], `--${flagOf(name)}`)
  }
  const read = values as SettingValues
  const issuer = [read.jwtIssuer, read.jwtAudience, read.jwtJwks]
  if (issuer.some((value) => value !== "") && issuer.includes("")) {
    const names = (["jwtIssuer", "jwtAudience", "jwtJwks"] as const).map((name) => `--${flagOf(name)}`)
    throw new SettingError(`${names.join(", ")}: expected all of them, or none`)
  }
  if (read.databaseUrl === "" && read.role !== "all") {
    throw new SettingError(`--${flagOf("databaseUrl")}: expected the cluster's Postgres, for the role ${read.role}`)
  }
  if ((read.directoryUrl === "") !== (read.cellUrl === "")) {
    throw new SettingError(`--${flagOf("directoryUrl")}, --${flagOf("cellUrl")}: expected both of them, or none`)
  }
  if (read.runnerHeartbeatMillis * 3 > read.shardLockMillis) {
    const expected = `at most a third of ${flagOf("shardLockMillis")} (${read.shardLockMillis})`
    throw new SettingError(
      `--${flagOf("runnerHeartbeatMillis")}: expected ${expected}, got ${read.runnerHeartbeatMillis}`
    )
  }
  if (read.databaseQueryMillis * 4 > read.shardLockMillis) {
    const expected = `at most a quarter of ${flagOf("shardLockMillis")} (${read.shardLockMillis})`
    throw new SettingError(`--${flagOf("databaseQueryMillis")}: expected ${expected}, got ${read.databaseQueryMillis}`)
  }
  if (read.pingIntervalMillis >= read.idleTimeoutMillis) {
    const expected = `less than ${flagOf("idleTimeoutMillis")} (${read.idleTimeoutMillis}), or quiet clients are cut`
    throw new SettingError(`--${flagOf("pingIntervalMillis")}: expected ${expected}, got ${read.pingIntervalMillis}`)
  }
  return read
}
