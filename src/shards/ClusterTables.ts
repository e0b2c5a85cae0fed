/**
 * What a cell keeps in its database: the runners and locks of Effect Cluster, the nodes that there are, and which version these
 * tables have. They are made and brought up to date by `ruvector migrate`, or by whichever node starts first where its role
 * in the database may; many may be at it at once.
 *
 * A version says which is the oldest program that can still work with it, so that nodes of two releases run side by side while
 * a cluster is upgraded, and one that is too old refuses to start instead of misreading what it finds.
 */
import { Data, Effect } from "effect"
import { SqlRunnerStorage } from "effect/cluster"
import { Migrator, SqlClient, type SqlError } from "effect/sql"

/** The version of the tables that this program makes. */
export const schemaVersion = 1

/** The tables were made by a newer release, which says that this one is too old for them. */
export class SchemaNewer extends Data.TaggedError("SchemaNewer")<{
  readonly version: number
  readonly oldest: number
}> {
  override get message(): string {
    return `its tables have version ${this.version}, which needs a program that knows version ${this.oldest}; this one knows ${schemaVersion}: start a newer release.`
  }
}

/** There are no tables, or older ones, and this role may not make them. */
export class SchemaMissing extends Data.TaggedError("SchemaMissing")<{ readonly found: number }> {
  override get message(): string {
    const state = this.found === 0 ? "it has no tables of this cell" : `its tables have version ${this.found}`
    return `${state}, version ${schemaVersion} is needed, and this role may not make them: run \`ruvector migrate\` with one that owns them.`
  }
}

export interface Migrated {
  readonly from: number
  readonly to: number
}

/** Makes the tables, or brings them up to date; nothing where they are. */
export const migrate = Effect.fnUntraced(function* (prefix: string) {
  const from = (yield* versionOf(prefix))?.version ?? 0
  if (from >= schemaVersion) return { from, to: from } satisfies Migrated
  const run = Migrator.make({})
  yield* run({ loader: SqlRunnerStorage.migrations({ prefix }), table: `${prefix}_runner_migrations` })
  yield* run({ loader: migrations(prefix), table: `${prefix}_migrations` })
  return { from, to: schemaVersion } satisfies Migrated
})

/** Makes sure at start that the tables are what this program needs. */
export const prepare = Effect.fnUntraced(function* (prefix: string) {
  const found = yield* versionOf(prefix)
  if (found !== undefined && found.version >= schemaVersion) return
  yield* migrate(prefix).pipe(
    Effect.catchIf(mayNot, () => Effect.fail(new SchemaMissing({ found: found?.version ?? 0 })))
  )
})

/** What a role needs that works with the tables and does not make them. */
export const grant = Effect.fnUntraced(function* (prefix: string, role: string) {
  const sql = (yield* SqlClient.SqlClient).withoutTransforms()
  for (const name of tables) {
    yield* sql`GRANT SELECT, INSERT, UPDATE, DELETE ON ${sql(`${prefix}_${name}`)} TO ${sql(role)}`
  }
  yield* sql`GRANT USAGE ON SEQUENCE ${sql(`${prefix}_runners_machine_id_seq`)} TO ${sql(role)}`
})

/** Names of the tables, after their prefix. */
const tables = ["runners", "locks", "runner_migrations", "migrations", "schema", "nodes"]

/** Refuses tables that are too new. */
const versionOf = Effect.fnUntraced(function* (prefix: string) {
  const sql = (yield* SqlClient.SqlClient).withoutTransforms()
  const [there] = yield* sql<{
    readonly there: boolean
  }>`SELECT to_regclass(${`${prefix}_schema`}) IS NOT NULL AS there`
  if (there?.there !== true) return undefined
  const [found] = yield* sql<{ readonly version: number; readonly oldest: number }>`
    SELECT version, oldest FROM ${sql(`${prefix}_schema`)}`
  if (found !== undefined && found.oldest > schemaVersion) return yield* new SchemaNewer(found)
  return found
})

const migrations = (prefix: string) =>
  Migrator.fromRecord({
    "0001_nodes": Effect.gen(function* () {
      const sql = (yield* SqlClient.SqlClient).withoutTransforms()
      const schema = sql(`${prefix}_schema`)
      yield* sql`CREATE TABLE ${schema} (
        one BOOLEAN PRIMARY KEY DEFAULT TRUE CHECK (one),
        version INTEGER NOT NULL,
        oldest INTEGER NOT NULL
      )`
      // What is in it is a few seconds old at most, and told anew.
      yield* sql`CREATE UNLOGGED TABLE ${sql(`${prefix}_nodes`)} (
        node TEXT PRIMARY KEY,
        role TEXT NOT NULL,
        program TEXT NOT NULL,
        started TIMESTAMPTZ NOT NULL DEFAULT NOW(),
        seen TIMESTAMPTZ NOT NULL DEFAULT NOW(),
        report TEXT NOT NULL
      )`
      yield* sql`INSERT INTO ${schema} (version, oldest) VALUES (1, 1)`
    })
  })

const mayNot = (error: unknown): boolean => {
  const { _tag, reason, cause } = error as SqlError.SqlError & { readonly cause?: unknown }
  if (_tag === "SqlError") return reason._tag === "AuthorizationError"
  return cause !== undefined && cause !== error && typeof cause === "object" && cause !== null && mayNot(cause)
}
