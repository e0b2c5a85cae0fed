/** A runner at the address of one that died: what that one left in the database is not taken for its own. */
import { PgClient } from "@effect/sql-pg"
import { afterAll, assert, beforeAll, describe, it } from "@effect/vitest"
import { Context, Effect, Exit, Layer, Redacted, type Scope } from "effect"
import { SqlClient } from "effect/sql"
import { defaultSettings, Settings } from "../../src/config.ts"
import * as Cluster from "../../src/shards/Cluster.ts"
import { freePort } from "../../src/shards/freePort.ts"
import { LocalActors } from "../../src/shards/LocalActors.ts"
import { Membership } from "../../src/shards/Membership.ts"
import { type Postgres, skipPostgres, startPostgres } from "../support/Postgres.ts"

const heartbeatMillis = 50

interface RunnerRow {
  readonly address: string
  readonly runner: string
}

interface LockRow {
  readonly shard_id: string
  readonly address: string
}

describe.skipIf(skipPostgres)("a runner that starts where another was killed", () => {
  let postgres: Postgres
  let port: number
  beforeAll(async () => {
    postgres = await startPostgres()
    port = await freePort("127.0.0.1")
  }, 60_000)
  afterAll(() => postgres.stop())

  const start = Effect.suspend(() =>
    Effect.map(
      Layer.build(
        Cluster.layer.pipe(
          Layer.provide([
            LocalActors.layer,
            Layer.succeed(Settings, {
              ...defaultSettings,
              databaseUrl: postgres.url,
              cell: "again",
              role: "runner" as const,
              clusterHost: "127.0.0.1",
              clusterPort: port,
              runnerHeartbeatMillis: heartbeatMillis,
              shardRefreshMillis: 50
            })
          ])
        )
      ),
      (context) => Context.get(context, Membership)
    )
  )

  const rows = Effect.gen(function* () {
    const sql = yield* SqlClient.SqlClient
    return {
      runners: yield* sql<RunnerRow>`SELECT address, runner FROM ruvector_again_runners ORDER BY address`,
      locks: yield* sql<LockRow>`SELECT shard_id, address FROM ruvector_again_locks ORDER BY shard_id`
    }
  })

  const untilHeld = Effect.repeat(rows, { until: ({ locks, runners }) => runners.length > 0 && locks.length > 0 })

  const run = <A>(work: Effect.Effect<A, unknown, SqlClient.SqlClient | Scope.Scope>) =>
    Effect.runPromise(
      Effect.provide(Effect.scoped(work), PgClient.layer({ url: Redacted.make(postgres.url), maxConnections: 2 }))
    )

  it(
    "frees its shards before it says that it lives, and is given shards when it is ready for them",
    {
      timeout: 60_000
    },
    () =>
      run(
        Effect.gen(function* () {
          const sql = yield* SqlClient.SqlClient
          // What there is while a runner lives is what a kill leaves behind.
          const left = yield* Effect.scoped(
            Effect.gen(function* () {
              yield* (yield* start).admit
              return yield* untilHeld
            })
          )
          const own = `127.0.0.1:${port}`
          assert.deepStrictEqual([...new Set([...left.runners, ...left.locks].map(({ address }) => address))], [own])
          for (const { address, runner } of left.runners)
            yield* sql`INSERT INTO ruvector_again_runners (address, runner) VALUES (${address}, ${runner})`
          for (const { address, shard_id } of left.locks)
            yield* sql`INSERT INTO ruvector_again_locks (shard_id, address, acquired_at) VALUES (${shard_id}, ${address}, NOW())`
          yield* sql`INSERT INTO ruvector_again_locks (shard_id, address, acquired_at) VALUES ('another', '127.0.0.2:1', NOW())`

          const again = yield* start
          const others = [{ shard_id: "another", address: "127.0.0.2:1" }]
          assert.deepStrictEqual(yield* rows, { runners: [], locks: others })
          // Nor does its heartbeat bring it among the runners.
          yield* Effect.sleep(heartbeatMillis * 4)
          assert.deepStrictEqual(yield* rows, { runners: [], locks: others })

          yield* again.admit
          const held = yield* Effect.repeat(rows, {
            until: ({ locks, runners }) => runners.length > 0 && locks.length === left.locks.length + 1
          })
          assert.deepStrictEqual(
            held.runners.map(({ address }) => address),
            [own]
          )

          // One that is started beside it by mistake takes nothing from it.
          const mistaken = yield* Effect.exit(Effect.scoped(start))
          assert.isTrue(Exit.isFailure(mistaken))
          assert.match(String(mistaken), /It cannot be listened on 127\.0\.0\.1/)
          assert.deepStrictEqual(yield* rows, held)
        })
      )
  )
})
