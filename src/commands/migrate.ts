/** `migrate`: makes a cell's tables in its database, or brings them up to date. */
import { Cause, Console, Effect, Option } from "effect"
import { Command, Flag } from "effect/cli"
import { defaultSettings, flagOf, settings, variableOf } from "../config.ts"
import * as ClusterTables from "../shards/ClusterTables.ts"
import { database, tablePrefix } from "../shards/PostgresCluster.ts"
import { migrate as migrateDirectory } from "../shards/PostgresDirectory.ts"
import { Refused } from "./Refused.ts"

export const migrate = Command.make(
  "migrate",
  {
    databaseUrl: Flag.String("database-url").pipe(
      Flag.withDescription(`Postgres of the cluster, as a role that may make tables (${variableOf("databaseUrl")})`),
      Flag.optional
    ),
    directoryUrl: Flag.String("directory-url").pipe(
      Flag.withDescription(`Postgres of the region's directory of cells (${variableOf("directoryUrl")})`),
      Flag.optional
    ),
    cell: Flag.String("cell").pipe(Flag.withDescription(`the cell (${variableOf("cell")})`), Flag.optional),
    grantTo: Flag.String("grant-to").pipe(
      Flag.withDescription("role that the nodes use, which then needs no right to make tables"),
      Flag.optional
    )
  },
  (given) =>
    Effect.gen(function* () {
      const read = (name: "databaseUrl" | "directoryUrl" | "cell") =>
        Effect.try({
          try: () =>
            settings[name].parse(
              Option.getOrElse(given[name], () => process.env[variableOf(name)] ?? settings[name].default)
            ),
          catch: (error) => new Refused({ message: `--${flagOf(name)}: ${(error as Error).message}` })
        })
      const directoryUrl = yield* read("directoryUrl")
      const values = { ...defaultSettings, databaseUrl: yield* read("databaseUrl"), cell: yield* read("cell") }
      if (values.databaseUrl === "") {
        return yield* new Refused({ message: "--database-url: expected the cluster's Postgres" })
      }
      const prefix = tablePrefix(values)
      const work = Effect.gen(function* () {
        const done = yield* ClusterTables.migrate(prefix)
        if (Option.isSome(given.grantTo)) yield* ClusterTables.grant(prefix, given.grantTo.value)
        return done
      }).pipe(Effect.provide(database(values)), Effect.timeout(migrateMillisMax))
      const { from, to } = yield* Effect.catchCause(work, (cause) =>
        Effect.fail(new Refused({ message: `the database cannot be migrated: ${reasonOf(Cause.squash(cause))}` }))
      )
      yield* Console.log(
        from === to
          ? `The tables of cell ${values.cell} have version ${to}: nothing to do.`
          : `The tables of cell ${values.cell} have version ${to} now${from === 0 ? "" : `, had ${from}`}.`
      )
      if (directoryUrl !== "") {
        yield* migrateDirectory(Option.getOrUndefined(given.grantTo)).pipe(
          Effect.provide(database({ ...values, databaseUrl: directoryUrl })),
          Effect.timeout(migrateMillisMax),
          Effect.catchCause((cause) =>
            Effect.fail(new Refused({ message: `the directory cannot be migrated: ${reasonOf(Cause.squash(cause))}` }))
          )
        )
        yield* Console.log("The directory of cells has its tables.")
      }
      if (Option.isSome(given.grantTo)) yield* Console.log(`Role ${given.grantTo.value} may use them.`)
    })
).pipe(Command.withDescription("Make the tables of a cluster in its database, or bring them up to date"))

/** Another one that migrates is waited for that long. */
const migrateMillisMax = 60_000

const reasonOf = (error: unknown): string => {
  if (!(error instanceof Error)) return String(error)
  return error.cause instanceof Error ? reasonOf(error.cause) : error.message
}
