/** A process that makes the tables of a cell when it is told to, and says which version they had. */
import { PgClient } from "@effect/sql-pg"
import { Effect, Redacted } from "effect"
import * as ClusterTables from "../../src/shards/ClusterTables.ts"

const [, , url = "", prefix = ""] = process.argv

process.stdout.write("loaded\n")
process.stdin.once("data", () =>
  Effect.runPromise(Effect.provide(ClusterTables.migrate(prefix), PgClient.layer({ url: Redacted.make(url) }))).then(
    ({ from }) => process.stdout.write(`from ${from}\n`, () => process.exit(0)),
    (error) => process.stdout.write(`${error}\n`, () => process.exit(1))
  )
)
