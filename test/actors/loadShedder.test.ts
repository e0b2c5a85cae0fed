/** The shedder with injected samples: levels, their causes, what follows from them, and who follows. */
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { Context, Effect, Exit, Fiber, Layer, Logger, References, Scope, Stream } from "effect"
import { afterAll, assert, beforeAll, describe, test } from "vitest"
import { judge, LoadLevels } from "../../src/actors/LoadLevels.ts"
import * as LoadShedderActor from "../../src/actors/LoadShedder.ts"
import { defaultSettings, Settings } from "../../src/config.ts"
import { type LoadEvent, type LoadSample, LoadShedder, localShedderId } from "../../src/protocol/LoadShedder.ts"
import { Admission } from "../../src/shards/Admission.ts"
import * as Cluster from "../../src/shards/Cluster.ts"
import { LoadMeter } from "../../src/shards/LoadMeter.ts"
import { Shedding } from "../../src/shards/Shedding.ts"
import { containerCpu } from "../../src/tiers/ContainerCpu.ts"

const calm: LoadSample = { cpu: 0.2, memory: 0.3, connections: 0.1, search_p99_ms: 5, event_loop_p99_ms: 1 }

describe("the level asked for", () => {
  const triggers = { cpu: 0.85, memory: 0.9, connections: 0.95, latencyMillis: 100, loopMillis: 100 }
  test.each([
    [{}, 0, []],
    [{ cpu: 0.86 }, 85, ["cpu"]],
    [{ cpu: 0.92 }, 90, ["cpu"]],
    [{ cpu: 0.99 }, 95, ["cpu"]],
    [{ memory: 0.89 }, 0, []],
    [{ memory: 0.91 }, 90, ["memory"]],
    [{ memory: 0.97 }, 95, ["memory"]],
    [{ connections: 0.94 }, 0, []],
    [{ connections: 0.96 }, 95, ["connections"]],
    [{ search_p99_ms: 101 }, 85, ["latency"]],
    [{ event_loop_p99_ms: 150 }, 85, ["event_loop"]],
    [{ cpu: 0.86, memory: 0.93 }, 90, ["cpu", "memory"]]
  ] as const)("%o: %i", (more, level, causes) => {
    assert.deepStrictEqual(judge({ ...calm, ...more }, triggers), { level, causes: [...causes] })
  })
})

describe("the level in force", () => {
  test("rises to what was asked for all the time, and falls to what was at most", () => {
    const levels = new LoadLevels({ raiseMillis: 2_000, lowerMillis: 10_000 })
    assert.strictEqual(levels.next(95, 0), 0)
    assert.strictEqual(levels.next(90, 1_000), 0)
    assert.strictEqual(levels.next(95, 2_000), 90)
    assert.strictEqual(levels.next(85, 3_000), 90)
    assert.strictEqual(levels.next(0, 8_000), 90)
    assert.strictEqual(levels.next(0, 13_000), 85)
    assert.strictEqual(levels.next(0, 14_000), 85)
    assert.strictEqual(levels.next(0, 24_000), 0)
  })

  test("does not follow what comes and goes", () => {
    const levels = new LoadLevels({ raiseMillis: 2_000, lowerMillis: 10_000 })
    for (let now = 0; now < 60_000; now += 1_000) assert.strictEqual(levels.next(now % 2_000 === 0 ? 95 : 0, now), 0)
    levels.next(90, 60_000)
    assert.strictEqual(levels.next(90, 62_000), 90)
    for (let now = 63_000; now < 120_000; now += 1_000) {
      assert.strictEqual(levels.next(now % 3_000 === 0 ? 90 : 0, now), 90)
    }
  })
})

describe("the share of the processors", () => {
  const directory = mkdtempSync(join(tmpdir(), "ruvector-"))
  afterAll(() => rmSync(directory, { recursive: true, force: true }))
  const write = (path: string, text: string) => {
    mkdirSync(join(directory, path, ".."), { recursive: true })
    writeFileSync(join(directory, path), text)
  }
  /** A process that used 300 ms of CPU in a second. */
  const meter = (root: string, groups: string) => {
    let micros = 0
    let now = 0
    const cpu = containerCpu({
      root: join(directory, root),
      groups,
      processors: 4,
      ownMicros: () => micros,
      nowMillis: () => now
    })
    return {
      allowed: cpu.allowed,
      second: () => {
        micros += 300_000
        now += 1_000
        return cpu.share()
      }
    }
  }

  test("is of the tightest quota of version 2, and of all that share it", () => {
    write("v2/a/b/cpu.max", "200000 100000\n")
    write("v2/a/b/cpu.stat", "usage_usec 5000000\nuser_usec 1\n")
    write("v2/a/cpu.max", "50000 100000\n")
    write("v2/a/cpu.stat", "usage_usec 1000000\n")
    const cpu = meter("v2", "0::/a/b\n")
    assert.strictEqual(cpu.allowed, 0.5)
    assert.closeTo(cpu.second(), 0.6, 1e-9)
    write("v2/a/cpu.stat", "usage_usec 1450000\n")
    assert.closeTo(cpu.second(), 0.9, 1e-9)
  })

  test("is of the quota of version 1", () => {
    write("v1/cpu,cpuacct/x/cpu.cfs_quota_us", "150000\n")
    write("v1/cpu,cpuacct/x/cpu.cfs_period_us", "100000\n")
    write("v1/cpu,cpuacct/x/cpuacct.usage", "0\n")
    const cpu = meter("v1", "5:cpu,cpuacct:/x\n2:memory:/\n")
    assert.strictEqual(cpu.allowed, 1.5)
    assert.closeTo(cpu.second(), 0.2, 1e-9)
  })

  test("is of the machine's processors where there is no quota", () => {
    write("none/cpu.max", "max 100000\n")
    const cpu = meter("none", "0::/\n")
    assert.strictEqual(cpu.allowed, 4)
    assert.closeTo(cpu.second(), 0.075, 1e-9)
  })
})

describe("the actor", () => {
  let sample = calm
  let context: Context.Context<Shedding | LoadMeter | Admission>
  let sharding: Context.Context<never>
  const scope = Effect.runSync(Scope.make())
  const asked: Array<readonly [number, number]> = []

  beforeAll(async () => {
    const layer = LoadShedderActor.layer.pipe(
      Layer.provideMerge(Cluster.layerNode),
      Layer.provideMerge(Layer.succeed(LoadMeter, { sample: () => sample })),
      Layer.provideMerge(Admission.layerWith({ parallel: 1, now: () => performance.now() })),
      Layer.provideMerge(Shedding.layer),
      Layer.provideMerge(
        Layer.succeed(Settings, {
          ...defaultSettings,
          loadSampleMillis: 20,
          loadRaiseMillis: 60,
          loadLowerMillis: 60,
          loadSubscribersMax: 1
        })
      ),
      Layer.provideMerge(
        Layer.mergeAll(Logger.layer([Logger.consoleJson]), Layer.succeed(References.MinimumLogLevel, "Fatal"))
      )
    )
    const built = await Effect.runPromise(Layer.buildWithScope(layer, scope))
    context = built
    sharding = built as Context.Context<never>
    await Effect.runPromise(
      Scope.provide(
        Context.get(context, Shedding).joinConnections({
          count: () => 150,
          closeIdle: (olderThan, max) => {
            asked.push([olderThan, max])
            return asked.length === 1 ? 100 : asked.length === 2 ? 50 : 0
          }
        }),
        scope
      )
    )
  })
  afterAll(() => Effect.runPromise(Scope.close(scope, Exit.void)))

  const run = <A, E, R>(effect: Effect.Effect<A, E, R>): Promise<A> =>
    Effect.runPromise(Effect.provideContext(effect as Effect.Effect<A, E, never>, sharding))
  const client = Effect.map(LoadShedder.client, (make) => make(localShedderId))
  const until = async (what: () => boolean) => {
    while (!what()) await new Promise((resolve) => setTimeout(resolve, 5))
  }

  test("puts its level in force, closes idle connections a hundred at a time, and tells those who follow", async () => {
    const shedding = Context.get(context, Shedding)
    const events: Array<LoadEvent> = []
    const following = Effect.runFork(
      Effect.provideContext(
        Effect.flatMap(client, (shedder) =>
          Stream.runForEach(shedder.Events({}), (event) => Effect.sync(() => void events.push(event)))
        ) as Effect.Effect<void>,
        sharding
      )
    )
    await until(() => events.length === 1)
    const second = await run(Effect.flatMap(client, (shedder) => Effect.exit(Stream.runDrain(shedder.Events({})))))
    assert.isTrue(Exit.isFailure(second))

    sample = { ...calm, memory: 0.92 }
    await until(() => shedding.level() === 90)
    await until(() => asked.length > 3)
    assert.deepStrictEqual(asked[0], [300_000, 100])
    const state = await run(Effect.flatMap(client, (shedder) => shedder.State()))
    assert.strictEqual(state.level, 90)
    assert.deepStrictEqual(state.causes, ["memory"])
    assert.strictEqual(state.sample.memory, 0.92)

    sample = { ...calm, connections: 0.97 }
    await until(() => shedding.level() === 95)
    assert.strictEqual(shedding.connectionRefusal()?.bound, "connections")
    await until(() => events.some(({ event }) => event === "refused"))

    sample = calm
    await until(() => shedding.level() === 0)
    await until(() => events.filter(({ event }) => event === "level_changed").length === 3)
    assert.deepStrictEqual(
      events.flatMap((event) => (event.event === "level_changed" ? [[event.from, event.to]] : [])),
      [
        [0, 90],
        [90, 95],
        [95, 0]
      ]
    )
    assert.deepStrictEqual(
      events.flatMap((event) => (event.event === "idle_closed" ? [event.connections] : [])),
      [100, 50]
    )
    assert.deepStrictEqual(
      events.map(({ seq }) => seq),
      events.map((_, i) => i)
    )
    await Effect.runPromise(Fiber.interrupt(following))
  })
})
