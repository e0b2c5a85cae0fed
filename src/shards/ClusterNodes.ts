/**
 * The nodes of a cell, gateways too: each writes every `nodeReportMillis` what it is and how it does into a row of its own, and
 * anyone can read all of them. For people and for the bound on runners; nothing is routed by it.
 *
 * A node that is alone has itself.
 */
import { Context, Data, Effect, Layer, Option, Schedule, Schema } from "effect"
import * as SqlClient from "effect/sql/SqlClient"
import { Settings, type SettingValues } from "../config.ts"
import { NodeReport, type NodeState } from "../protocol/Cluster.ts"
import { answerWithin } from "./answerWithin.ts"

export class ClusterNodes extends Context.Service<
  ClusterNodes,
  {
    /** Of this process. */
    readonly node: string
    /** All, with this one; fails where the database does not answer. */
    readonly all: Effect.Effect<ReadonlyArray<NodeState>, Error>
    /** What this node says of itself from now on, asked before each report. */
    readonly reportWith: (report: () => NodeReport) => void
    /** Of this node, now. */
    readonly own: () => NodeState
  }
>()("ruvector/shards/ClusterNodes") {
  /** A node on its own. */
  static readonly layerAlone = Layer.effect(
    ClusterNodes,
    Effect.map(Settings, (settings) => {
      const self = new Self(settings, settings.role)
      return ClusterNodes.of({ ...self.service, all: Effect.sync(() => [self.state()]) })
    })
  )

  /** A member of a cell. Fails where the cell has all the runners that it may have. */
  static readonly layer = (prefix: string, node: string) =>
    Layer.effect(
      ClusterNodes,
      Effect.gen(function* () {
        const settings = yield* Settings
        const sql = (yield* SqlClient.SqlClient).withoutTransforms()
        const table = sql(`${prefix}_nodes`)
        const self = new Self(settings, node)
        const silentMillis = silentReports * settings.nodeReportMillis
        const span = (millis: number) => sql`${Math.ceil(millis)} * INTERVAL '1 millisecond'`

        const write = Effect.suspend(() => {
          const report = JSON.stringify(self.report())
          return sql`
            INSERT INTO ${table} (node, role, program, report)
            VALUES (${node}, ${settings.role}, ${String(process.pid)}, ${report})
            ON CONFLICT (node) DO UPDATE SET seen = NOW(), report = ${report}`
        })
        const others = sql<{ readonly runners: number }>`
          SELECT COUNT(*)::int AS runners FROM ${table}
          WHERE role <> 'gateway' AND node <> ${node} AND seen > NOW() - ${span(silentMillis)}`

        // Counted and written by one runner at a time, so that two do not take the last place.
        const join = sql.withTransaction(
          Effect.gen(function* () {
            yield* sql`SELECT pg_advisory_xact_lock(hashtext(${`${prefix}_nodes`}))`
            const [found] = yield* others
            if (settings.role !== "gateway" && (found?.runners ?? 0) >= settings.cellRunnersMax) {
              return yield* new CellFull({
                message: `cell ${settings.cell} has ${found?.runners} runners, and may have ${settings.cellRunnersMax} (cellRunnersMax): add a cell for more`
              })
            }
            yield* sql`DELETE FROM ${table} WHERE node = ${node}`
            yield* write
          })
        )
        yield* join.pipe(
          // One that died is counted until it has been silent for long enough.
          Effect.retry({
            while: (error) => error instanceof CellFull,
            times: Math.ceil((silentMillis + settings.nodeReportMillis) / joinPauseMillis),
            schedule: joinPause
          })
        )
        const forgotten = sql`DELETE FROM ${table} WHERE seen < NOW() - ${span(forgottenMillis)}`
        yield* answerWithin(settings.databaseQueryMillis, Effect.andThen(write, forgotten)).pipe(
          Effect.catchCause((cause) => Effect.logDebug("The node's report was not written", cause)),
          Effect.andThen(Effect.sleep(settings.nodeReportMillis)),
          Effect.forever,
          Effect.forkScoped
        )
        yield* Effect.addFinalizer(() =>
          Effect.ignore(answerWithin(farewellMillis, sql`DELETE FROM ${table} WHERE node = ${node}`))
        )

        const all = sql<Row>`
          SELECT node, role, report, (EXTRACT(EPOCH FROM NOW() - started) * 1000)::float8 AS up,
            (EXTRACT(EPOCH FROM NOW() - seen) * 1000)::float8 AS silent FROM ${table} ORDER BY role, node`.pipe(
          Effect.map((rows) =>
            rows.map((row): NodeState => {
              if (row.node === node) return self.state()
              const report = Option.getOrElse(decodeReport(row.report), () => nothing)
              return {
                node: row.node,
                role: row.role,
                cell: settings.cell,
                health: row.silent > silentMillis ? "silent" : "up",
                uptime_ms: Math.round(row.up),
                silent_ms: Math.max(0, Math.round(row.silent)),
                ...report
              }
            })
          )
        )
        return ClusterNodes.of({ ...self.service, all: answerWithin(settings.databaseQueryMillis, all) })
      })
    )
}

/** The cell has as many runners as it may have. */
export class CellFull extends Data.TaggedError("CellFull")<{ readonly message: string }> {}

interface Row {
  readonly node: string
  readonly role: string
  readonly report: string
  readonly up: number
  readonly silent: number
}

/** Reports that may be missing before a node counts as silent. */
const silentReports = 4
/** After which one that is silent is not listed any more. */
const forgottenMillis = 600_000
const farewellMillis = 1_000
const joinPauseMillis = 500
const joinPause = Schedule.spaced(joinPauseMillis)

const decodeReport = Schema.decodeUnknownOption(Schema.fromJsonString(NodeReport))

const nothing: NodeReport = { url: "", ready: false, shards: 0, partitions: 0, load_level: 0, quarantined: [] }

class Self {
  readonly #settings: SettingValues
  readonly #node: string
  #report: () => NodeReport = () => nothing

  constructor(settings: SettingValues, node: string) {
    this.#settings = settings
    this.#node = node
  }

  report(): NodeReport {
    return this.#report()
  }

  state(): NodeState {
    const { role, cell } = this.#settings
    const uptime_ms = Math.round(process.uptime() * 1_000)
    return { node: this.#node, role, cell, health: "up", uptime_ms, silent_ms: 0, ...this.#report() }
  }

  get service() {
    return {
      node: this.#node,
      own: () => this.state(),
      reportWith: (report: () => NodeReport) => {
        this.#report = report
      }
    }
  }
}
