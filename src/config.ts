/**
 * Every setting: its name, unit, default and bound. Settings come from flags (`--max-body-bytes 1000000`) or from the
 * environment (`RUVECTOR_MAX_BODY_BYTES`; for the port also `PORT`); flags win. `serve --help` prints this table.
 *
 * Code below `main.ts` is given values of {@link Settings}; it never reads the environment itself.
 */
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

const mebibyte = 1_048_576

export const settings = {
  // Where and what
  port: integer("TCP port to listen on; 0 takes a free one", "", 8080, 0, 65_535),
  host: text("address to listen on", "127.0.0.1", "an address or host name", /^\S{1,255}$/),
  data: text("data directory", "./data", "a path", /^[^\0]{1,4096}$/),
  region: text("region stamped into versions and request ids", "local", "1-32 of a-z 0-9 -", regionPattern),
  logLevel: choice("least severe log line written", "info", ["trace", "debug", "info", "warn", "error"]),
  logFormat: choice("log lines as JSON, or for people (auto: people on a terminal)", "auto", [
    "auto",
    "json",
    "pretty"
  ]),
  activate: choice("collections whose partitions must be resident before the node is ready", "all", ["all", "none"]),

  // Collections
  defaultPartitions: integer("partitions of a collection that names none", "partitions", 1, 1, 256),
  defaultM: integer("HNSW m of a collection that names none", "links", 16, 2, 128),
  defaultEfConstruction: integer("HNSW efConstruction of a collection that names none", "candidates", 200, 8, 2_000),
  defaultEfSearch: integer("HNSW ef of a search and a collection that name none", "candidates", 128, 1, 10_000),

  // Vector threads
  threads: integer("vector threads; 0: one for each core beyond the first", "threads", 0, 0, 256),
  insertSliceMillis: integer("insertion work between two looks at waiting searches", "ms", 4, 1, 1_000),
  threadPendingMax: integer("searches waiting for one vector thread", "searches", 4_096, 1, 1_000_000),

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
  snapshotOps: integer("operations after which a snapshot is taken", "operations", 10_000, 100, 10_000_000),
  snapshotSharePercent: integer("and this share of the partition's records", "%", 50, 1, 1_000),
  snapshotIdleMillis: integer(
    "quiet time after which a partition with news is snapshotted",
    "ms",
    5_000,
    100,
    3_600_000
  ),
  changeBufferMax: integer(
    "newest changes kept in memory for followers, a partition",
    "changes",
    16_384,
    16,
    1_000_000
  ),

  // Searches
  searchDeadlineMillis: integer("deadline of a search that names none", "ms", 10_000, 1, 60_000),
  activationDeadlineMillis: integer("wait for a partition to become resident", "ms", 120_000, 100, 3_600_000),

  // Actors
  partitionIdleMillis: integer("quiet time after which a partition is passivated; 0: never", "ms", 0, 0, 86_400_000),
  sessionIdleMillis: integer("quiet time after which a session is passivated", "ms", 30_000, 5_000, 86_400_000),
  sessionSearchesMax: integer("searches under way in one session", "searches", 256, 1, 10_000),
  sessionAnswersKept: integer("newest answers a session keeps for resuming", "answers", 2, 0, 64),
  sessionsPerConnection: integer("sessions on one connection", "sessions", 1_000, 1, 100_000),
  sessionsMax: integer("sessions on this node", "sessions", 200_000, 1, 10_000_000),
  residentEntitiesMax: integer("actors resident on this node", "actors", 300_000, 1_000, 10_000_000),

  // Wires
  maxBodyBytes: integer("bytes of a request body", "bytes", 32 * mebibyte, 1_024, 1_024 * mebibyte),
  maxFrameBytes: integer("bytes of a WebSocket frame", "bytes", 16 * mebibyte, 1_024, 256 * mebibyte),
  maxHeaderBytes: integer("bytes of a request's headers", "bytes", 16_384, 1_024, mebibyte),
  connectionsMax: integer("open connections", "connections", 20_000, 1, 1_000_000),
  outboundBytesMax: integer(
    "bytes waiting for a client that does not read, a connection",
    "bytes",
    4 * mebibyte,
    65_536,
    1_024 * mebibyte
  ),
  pingIntervalMillis: integer("between two keep-alive pings of a quiet stream", "ms", 60_000, 100, 3_600_000),
  idleTimeoutMillis: integer("after which a WebSocket that answers nothing is closed", "ms", 90_000, 200, 3_600_000),
  headersTimeoutMillis: integer("for a request's headers to arrive", "ms", 10_000, 100, 600_000),
  requestTimeoutMillis: integer("for a request to arrive whole", "ms", 60_000, 100, 3_600_000),
  keepAliveTimeoutMillis: integer("that a quiet HTTP connection is kept", "ms", 60_000, 100, 3_600_000),
  drainMillis: integer("for open requests to end when shutting down", "ms", 8_000, 0, 600_000)
} as const satisfies Record<string, SettingSpec<string> | SettingSpec<number>>

export type SettingName = keyof typeof settings
export type SettingValues = {
  readonly [Name in SettingName]: (typeof settings)[Name]["default"] extends number
    ? number
    : ReturnType<(typeof settings)[Name]["parse"]>
}

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
  if (read.pingIntervalMillis >= read.idleTimeoutMillis) {
    const expected = `less than ${flagOf("idleTimeoutMillis")} (${read.idleTimeoutMillis}), or quiet clients are cut`
    throw new SettingError(`--${flagOf("pingIntervalMillis")}: expected ${expected}, got ${read.pingIntervalMillis}`)
  }
  return read
}
