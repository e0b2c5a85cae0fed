/**
 * Which runners live. Effect Cluster has one of them look after all the others, so that the death of that one is noticed only
 * when its lock has run out. Here each looks after all: who does not answer, and whose heartbeat in the database has stopped,
 * is marked as dead at once. A runner that merely cannot be reached from here keeps its heartbeat, and its shards.
 *
 * One that starts where another died is not to be taken for that one, by its answers and its heartbeat: before either it takes
 * away what the other left in the database, so that the rest can go to those who are ready for it.
 */
import { Duration, Effect, Layer } from "effect"
import { type RunnerAddress, RunnerHealth, RunnerStorage, Runners, ShardingConfig } from "effect/cluster"
import { SqlClient } from "effect/sql"
import { Settings } from "../config.ts"
import { answerWithin } from "./answerWithin.ts"

/** Answers to a ping that may be missed: one that is refused fails at once, one that is not answered after a while. */
const pingTries = 3

/** Intervals of its heartbeat after which a runner is asked whether it lives, and after which it is dead if it does not answer. */
const suspectHeartbeats = 1.5
const deadHeartbeats = 2.5

export const RunnerMonitor = {
  /**
   * Looks after the other runners for as long as the layer lives. `prefix`: of the tables' names. The address of this one has to
   * be listened on already, as nobody else does then.
   */
  layer: (prefix: string) =>
    Layer.effectDiscard(
      Effect.gen(function* () {
        const settings = yield* Settings
        const runners = yield* Runners.Runners
        const storage = yield* RunnerStorage.RunnerStorage
        const sql = (yield* SqlClient.SqlClient).withoutTransforms()
        const runnersTable = sql(`${prefix}_runners`)
        const { runnerAddress } = yield* ShardingConfig.ShardingConfig
        const own = runnerAddress._tag === "Some" ? `${runnerAddress.value.host}:${runnerAddress.value.port}` : ""
        /** Runners without a heartbeat for so many intervals of it. */
        const silent = (heartbeats: number) =>
          Effect.map(
            sql<{ readonly address: string }>`
              SELECT address FROM ${runnersTable}
              WHERE healthy AND last_heartbeat <
                NOW() - ${Math.ceil(heartbeats * settings.runnerHeartbeatMillis)} * INTERVAL '1 millisecond'`,
            (rows) => new Set(rows.map(({ address }) => address))
          )

        const look = Effect.gen(function* () {
          const suspects = yield* silent(suspectHeartbeats)
          if (suspects.size === 0) return
          const all = yield* storage.getRunners
          for (const [{ address }, healthy] of all) {
            const name = `${address.host}:${address.port}`
            if (!healthy || name === own || !suspects.has(name)) continue
            // Of a machine that is gone nothing comes back, so that it is not waited for each of the answers.
            const answered = isAlive(runners, address, settings.runnerPingMillis)
            if (
              yield* Effect.timeoutOrElse(answered, {
                duration: settings.runnerPingMillis,
                orElse: () => Effect.succeed(false)
              })
            )
              continue
            if (!(yield* silent(deadHeartbeats)).has(name)) continue
            yield* Effect.logWarning("A runner is dead: it does not answer, nor does it say that it lives", {
              runner: name
            })
            yield* storage.setRunnerHealth(address, false)
          }
        })
        const leftBehind = sql`
          WITH gone AS (DELETE FROM ${runnersTable} WHERE address = ${own})
          DELETE FROM ${sql(`${prefix}_locks`)} WHERE address = ${own}`
        yield* answerWithin(settings.databaseQueryMillis, leftBehind).pipe(
          Effect.catchCause((cause) =>
            Effect.logWarning("What ran here before could not be taken off the runners", cause)
          )
        )

        // The one that the locks' refreshing brings along comes too seldom to be missed soon.
        const beat = sql`UPDATE ${runnersTable} SET last_heartbeat = NOW() WHERE address = ${own}`
        yield* beat.pipe(
          Effect.catchCause((cause) => Effect.logDebug("The heartbeat was not written", cause)),
          Effect.andThen(Effect.sleep(Duration.millis(settings.runnerHeartbeatMillis))),
          Effect.forever,
          Effect.forkScoped
        )
        yield* look.pipe(
          Effect.catchCause((cause) => Effect.logDebug("The runners could not be looked at", cause)),
          Effect.andThen(Effect.sleep(Duration.millis(settings.runnerHealthMillis))),
          Effect.forever,
          Effect.forkScoped
        )
      })
    ),

  /** What the one runner asks that looks after all: whether another answers. */
  health: Effect.gen(function* () {
    const { runnerPingMillis } = yield* Settings
    const runners = yield* Runners.Runners
    return RunnerHealth.RunnerHealth.of({ isAlive: (address) => isAlive(runners, address, runnerPingMillis) })
  })
}

const isAlive = (
  runners: Runners.Runners["Service"],
  address: RunnerAddress.RunnerAddress,
  pingMillis: number
): Effect.Effect<boolean> =>
  runners.ping(address).pipe(
    Effect.timeout(pingMillis),
    Effect.tapError(() => Effect.sleep(pauseMillis)),
    Effect.retry({ times: pingTries - 1 }),
    Effect.isSuccess
  )

/** Between two pings of one that does not answer. */
const pauseMillis = 250
