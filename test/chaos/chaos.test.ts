/**
 * A short run of chaos: a cluster of five processes loses a runner, the way between two nodes, Redis, and the right time, while
 * clients write, read, search and follow. `npm run chaos` has the other faults, and longer runs.
 */
import { assert, describe, it } from "@effect/vitest"
import { skipPostgres } from "../support/Postgres.ts"
import { skipRedis } from "../support/RedisServer.ts"
import { random, seedOf } from "../support/Seeded.ts"
import { withDirectory } from "../support/ServerProcess.ts"
import { runChaos } from "./Chaos.ts"
import { reportOf } from "./report.ts"
import { type FaultKind, scheduleOf } from "./Schedule.ts"

const seed = seedOf(20_261)

describe("the schedule", () => {
  const of = (seed: number) =>
    scheduleOf({
      source: random(seed),
      durationMillis: 1_800_000,
      kinds: ["kill", "freeze", "partition", "postgresDown", "clockSkew"],
      gateways: ["gateway-1", "gateway-2"],
      runners: ["runner-1", "runner-2", "runner-3"],
      shardLockMillis: 10_000,
      quietMillis: 10_000,
      postgresDownMillis: 60_000,
      pauseMillis: [20_000, 30_000]
    })

  it("is the seed's, one fault at a time, each kind in turn, and ends before the run does", () => {
    const faults = of(seed)
    assert.deepStrictEqual(of(seed), faults)
    assert.notDeepEqual(of(seed + 1), faults)
    assert.isAbove(faults.length, 20)
    assert.strictEqual(new Set(faults.slice(0, 5).map(({ kind }) => kind)).size, 5)
    faults.forEach(({ beginMillis, holdMillis }, n) => {
      assert.isAtMost(beginMillis + holdMillis, faults[n + 1]?.beginMillis ?? 1_790_000)
    })
    for (const { kind, targets } of faults) {
      if (kind === "partition") assert.strictEqual(new Set(targets).size, 2)
      if (kind === "partition") assert.isFalse(targets.every((target) => target.startsWith("gateway")))
    }
  })
})

describe.skipIf(skipPostgres || skipRedis)("chaos", () => {
  it("keeps what was acknowledged, in order and once", { timeout: 300_000 }, () =>
    withDirectory(async (directory) => {
      const lines: Array<string> = []
      const kinds: ReadonlyArray<FaultKind> = ["kill", "partition", "redisKill", "clockSkew"]
      const verdict = await runChaos({
        seed,
        durationMillis: 30_000,
        kinds,
        directory,
        clients: 3,
        partitions: 3,
        quietMillis: 2_000,
        pausesMillis: [500, 1_500],
        print: (line) => void lines.push(line)
      })
      const told = `${lines.join("\n")}\n${reportOf(verdict)}`
      assert.deepStrictEqual(verdict.violations, [], told)
      assert.isAbove(verdict.faults.length, 1, told)
      for (const { failed } of verdict.faults) assert.isUndefined(failed, told)
      // What was checked is what happened: clients were answered, and logs and feeds have what they wrote.
      assert.isAbove(verdict.operations, 20, told)
      assert.isAbove(verdict.readsChecked, 50, told)
      assert.isAbove(verdict.changesChecked, verdict.operations / 2, told)
      assert.isAbove(verdict.calls - verdict.failed, verdict.failed, told)
    })
  )
})
