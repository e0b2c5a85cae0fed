/** The tables of a cell: made once however many are at it, usable without the right to make them, and never misread. */
import { spawn } from "node:child_process"
import { once } from "node:events"
import { PgClient } from "@effect/sql-pg"
import { afterAll, assert, beforeAll, describe, it } from "@effect/vitest"
import { Effect, Exit, Layer, Redacted } from "effect"
import { SqlClient } from "effect/sql"
import { defaultSettings, Settings } from "../../src/config.ts"
import * as Cluster from "../../src/shards/Cluster.ts"
import { ClusterNodes } from "../../src/shards/ClusterNodes.ts"
import * as ClusterTables from "../../src/shards/ClusterTables.ts"
import { LocalActors } from "../../src/shards/LocalActors.ts"
import { tablePrefix } from "../../src/shards/PostgresCluster.ts"
import { type Postgres, skipPostgres, startPostgres } from "../support/Postgres.ts"

const processes = 8

describe.skipIf(skipPostgres)("the tables of a cell", () => {
  let postgres: Postgres
  beforeAll(async () => {
    postgres = await startPostgres()
  }, 60_000)
  afterAll(() => postgres.stop())

  const as = (role: string) =>
    PgClient.layer({ url: Redacted.make(postgres.url.replace("postgres@", `${role}@`)), maxConnections: 2 })
  const asOwner = <A, E>(work: Effect.Effect<A, E, SqlClient.SqlClient>) =>
    Effect.runPromise(Effect.provide(work, as("postgres")))

  it("are made once by eight processes that start together on an empty database", { timeout: 60_000 }, async () => {
    const children = Array.from({ length: processes }, () =>
      spawn(process.execPath, [new URL("./migrator.ts", import.meta.url).pathname, postgres.url, "ruvector_many"], {
        stdio: ["pipe", "pipe", "inherit"]
      })
    )
    const texts = children.map(() => "")
    const ended = children.map((child) => once(child, "exit"))
    await Promise.all(
      children.map(
        (child, i) =>
          new Promise<void>((loaded) => {
            child.stdout.on("data", (chunk: Buffer) => {
              texts[i] += chunk.toString()
              if (texts[i]?.includes("loaded")) loaded()
            })
          })
      )
    )
    for (const child of children) child.stdin.end("go\n")
    for (const [code] of await Promise.all(ended)) assert.strictEqual(code, 0, texts.join(""))
    // Those that came later may have found them.
    for (const text of texts) assert.match(text, /from [01]\n/)
    const rows = await asOwner(
      Effect.gen(function* () {
        const sql = yield* SqlClient.SqlClient
        yield* sql`INSERT INTO ruvector_many_runners (address, runner) VALUES ('a', 'b')`
        return yield* sql<{ readonly version: number }>`SELECT version FROM ruvector_many_schema`
      })
    )
    assert.deepStrictEqual(rows, [{ version: ClusterTables.schemaVersion }])
  })

  it("serve a runner whose role may not make tables, once they were made for it", { timeout: 60_000 }, async () => {
    await asOwner(
      Effect.gen(function* () {
        const sql = yield* SqlClient.SqlClient
        yield* sql`REVOKE CREATE ON SCHEMA public FROM PUBLIC`
        yield* sql`CREATE ROLE runtime LOGIN`
      })
    )
    const settings = {
      ...defaultSettings,
      databaseUrl: postgres.url.replace("postgres@", "runtime@"),
      databaseWaitMillis: 0,
      cell: "granted",
      role: "runner" as const
    }
    const runner = Effect.exit(
      Effect.scoped(
        Effect.gen(function* () {
          const context = yield* Layer.build(
            Cluster.layer.pipe(Layer.provide([LocalActors.layer, Layer.succeed(Settings, settings)]))
          )
          return yield* Effect.provideContext(
            Effect.flatMap(ClusterNodes, (nodes) => nodes.all),
            context
          )
        })
      )
    )
    const before = await Effect.runPromise(runner)
    assert.isTrue(Exit.isFailure(before))
    assert.match(String(before), /it has no tables of this cell.*ruvector migrate/)
    const prefix = tablePrefix(settings)
    await asOwner(Effect.andThen(ClusterTables.migrate(prefix), ClusterTables.grant(prefix, "runtime")))
    const after = await Effect.runPromise(runner)
    assert.isTrue(Exit.isSuccess(after), String(after))
    if (Exit.isSuccess(after))
      assert.deepStrictEqual(
        after.value.map(({ role, health }) => [role, health]),
        [["runner", "up"]]
      )
  })

  it("are refused by a program that is too old for them, and used by one that is not", {
    timeout: 60_000
  }, async () => {
    const version = ClusterTables.schemaVersion + 1
    const settled = (oldest: number) =>
      asOwner(
        Effect.gen(function* () {
          const sql = yield* SqlClient.SqlClient
          yield* ClusterTables.migrate("ruvector_newer")
          yield* sql`UPDATE ruvector_newer_schema SET version = ${version}, oldest = ${oldest}`
          return yield* Effect.exit(ClusterTables.prepare("ruvector_newer"))
        })
      )
    assert.isTrue(Exit.isSuccess(await settled(ClusterTables.schemaVersion)))
    const refused = await asOwner(
      Effect.gen(function* () {
        const sql = yield* SqlClient.SqlClient
        yield* sql`UPDATE ruvector_newer_schema SET oldest = ${version}`
        return yield* Effect.exit(ClusterTables.prepare("ruvector_newer"))
      })
    )
    assert.match(String(refused), /start a newer release/)
  })

  it("have room for as many runners as a cell may have, and no more", { timeout: 60_000 }, async () => {
    const settings = {
      ...defaultSettings,
      cell: "full",
      cellRunnersMax: 1,
      nodeReportMillis: 200,
      role: "runner" as const
    }
    await asOwner(ClusterTables.migrate("ruvector_full"))
    const join = (name: string, role: "runner" | "gateway") =>
      Layer.build(
        ClusterNodes.layer("ruvector_full", name).pipe(
          Layer.provide(Layer.succeed(Settings, { ...settings, role })),
          Layer.provide(as("postgres"))
        )
      )
    const [second, third] = await Effect.runPromise(
      Effect.scoped(
        Effect.gen(function* () {
          yield* join("a:1", "runner")
          yield* join("gateway-a", "gateway")
          const second = yield* Effect.exit(join("b:2", "runner"))
          return [second, undefined]
        })
      ).pipe(
        // The first has left by now, and made room.
        Effect.flatMap(([second]) =>
          Effect.map(Effect.scoped(Effect.exit(join("b:2", "runner"))), (third) => [second, third] as const)
        )
      )
    )
    assert.match(String(second), /cell full has 1 runners, and may have 1 \(cellRunnersMax\)/)
    assert.isTrue(third !== undefined && Exit.isSuccess(third), String(third))
  })
})
