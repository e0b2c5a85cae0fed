/** The directory of a region's cells in Postgres. Loaded only where there is one. */
import { PgClient } from "@effect/sql-pg"
import { Cause, Duration, Effect, Layer, Redacted, Semaphore } from "effect"
import { Migrator, SqlClient } from "effect/sql"
import type { SettingValues } from "../config.ts"
import { StorageUnavailable } from "../protocol/Errors.ts"
import { answerWithin } from "./answerWithin.ts"
import { CellDirectory, type CellPlace } from "./CellDirectory.ts"

/** Makes its tables, nothing where they are; `grantTo` is a role that may use them then. */
export const migrate = Effect.fnUntraced(function* (grantTo?: string) {
  const sql = (yield* SqlClient.SqlClient).withoutTransforms()
  const [found] = yield* sql<{ readonly there: boolean }>`
    SELECT to_regclass('ruvector_directory_collections') IS NOT NULL AS there`
  if (found?.there !== true) {
    yield* Migrator.make({})({ loader: migrations, table: "ruvector_directory_migrations" })
  }
  if (grantTo === undefined) return
  for (const name of ["cells", "collections"]) {
    yield* sql`GRANT SELECT, INSERT, UPDATE, DELETE ON ${sql(`ruvector_directory_${name}`)} TO ${sql(grantTo)}`
  }
})

export const layer = (settings: SettingValues): Layer.Layer<CellDirectory, Error> =>
  Layer.effect(
    CellDirectory,
    Effect.gen(function* () {
      const sql = (yield* SqlClient.SqlClient).withoutTransforms()
      const { cell, cellUrl } = settings
      yield* migrate()
      yield* sql`INSERT INTO ruvector_directory_cells (cell, url) VALUES (${cell}, ${cellUrl})
        ON CONFLICT (cell) DO UPDATE SET url = ${cellUrl}`
      const gate = yield* Semaphore.make(lookupsMax)
      const asked = <A>(work: Effect.Effect<A, unknown>): Effect.Effect<A, StorageUnavailable> =>
        gate
          .withPermit(answerWithin(settings.databaseQueryMillis, work))
          .pipe(
            Effect.catchCause((cause) =>
              Effect.andThen(
                Effect.logWarning("The directory of cells does not answer", Cause.squash(cause)),
                new StorageUnavailable({ detail: "The directory of cells does not answer.", retryAfterMillis: 1_000 })
              )
            )
          )
      const place = (name: string) =>
        Effect.map(
          sql<CellPlace>`
            SELECT cell, url FROM ruvector_directory_collections JOIN ruvector_directory_cells USING (cell)
            WHERE name = ${name} AND cell <> ${cell}`,
          (rows) => rows[0]
        )
      const insert = (names: ReadonlyArray<string>) => sql`
        INSERT INTO ruvector_directory_collections (name, cell)
        VALUES ${sql.csv(names.map((name) => sql`(${name}, ${cell})`))}
        ON CONFLICT (name) DO NOTHING`
      return CellDirectory.of({
        find: (name) => asked(place(name)),
        claim: (name) => asked(Effect.andThen(insert([name]), place(name))),
        claimAll: (names) =>
          Effect.map(
            Effect.forEach(chunksOf(names), (some) =>
              asked(
                Effect.andThen(
                  insert(some),
                  sql<{ readonly name: string }>`
                    SELECT name FROM ruvector_directory_collections WHERE ${sql.in("name", some)} AND cell <> ${cell}`
                )
              )
            ),
            (found) => found.flat().map(({ name }) => name)
          ),
        release: (name) =>
          asked(Effect.asVoid(sql`DELETE FROM ruvector_directory_collections WHERE name = ${name} AND cell = ${cell}`))
      })
    })
  ).pipe(
    Layer.provide(
      PgClient.layer({
        url: Redacted.make(settings.directoryUrl),
        applicationName: `ruvector-${settings.role}-directory`,
        maxConnections: connectionsMax,
        connectTimeout: Duration.millis(settings.databaseConnectMillis)
      })
    ),
    Layer.catchCause((cause) => {
      const { host, pathname } = new URL(settings.directoryUrl)
      const why = Cause.squash(cause)
      const reason = why instanceof Error ? why.message : String(why)
      return Layer.effectContext(Effect.fail(new Error(`The directory ${host}${pathname} cannot be used: ${reason}`)))
    })
  )

/** To the directory's database. */
const connectionsMax = 2

/** Questions under way; others wait. */
const lookupsMax = 16

const chunkNames = 1_000

const chunksOf = (names: ReadonlyArray<string>): ReadonlyArray<ReadonlyArray<string>> =>
  Array.from({ length: Math.ceil(names.length / chunkNames) }, (_, i) =>
    names.slice(i * chunkNames, (i + 1) * chunkNames)
  )

const migrations = Migrator.fromRecord({
  "0001_directory": Effect.gen(function* () {
    const sql = (yield* SqlClient.SqlClient).withoutTransforms()
    yield* sql`CREATE TABLE ruvector_directory_cells (cell TEXT PRIMARY KEY, url TEXT NOT NULL)`
    yield* sql`CREATE TABLE ruvector_directory_collections (name TEXT PRIMARY KEY, cell TEXT NOT NULL)`
  })
})
