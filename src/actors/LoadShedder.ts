/**
 * The `LoadShedder` entity: how much this node carries, looked at every `loadSampleMillis`, and the level at which load is
 * shed for it. The level is put into `shards/Shedding.ts`, where the wires ask for it; what the shedder does itself is to close
 * idle connections, from level 90 on.
 *
 * Changes of level, connections closed and what was refused are events for those who follow, lines in the log (one a minute
 * about the same), and metrics. A look that fails leaves the level as it is, and the next one follows.
 */
import { Clock, Context, Duration, Effect, Layer, Metric, Stream } from "effect"
import { Settings } from "../config.ts"
import { Overloaded } from "../protocol/Errors.ts"
import {
  type LoadCause,
  type LoadEvent,
  type LoadSample,
  LoadShedder,
  type LoadState,
  localShedderId
} from "../protocol/LoadShedder.ts"
import { Admission } from "../shards/Admission.ts"
import { layerNode } from "../shards/Cluster.ts"
import { LoadMeter } from "../shards/LoadMeter.ts"
import { Shedding } from "../shards/Shedding.ts"
import { EventLog } from "./EventLog.ts"
import { judge, LoadLevels } from "./LoadLevels.ts"

/** What is refused is told so often. */
const refusedEveryMillis = 1_000

/** And the log is told so often. */
const logEveryMillis = 60_000

const makeShedder = Effect.gen(function* () {
  const settings = yield* Settings
  const meter = yield* LoadMeter
  const shedding = yield* Shedding
  const admission = yield* Admission
  const events = new EventLog<LoadEvent>(settings.loadEventsMax)
  const levels = new LoadLevels({ raiseMillis: settings.loadRaiseMillis, lowerMillis: settings.loadLowerMillis })
  const triggers = {
    cpu: settings.loadCpuPercent / 100,
    memory: settings.loadMemoryPercent / 100,
    connections: settings.loadConnectionsPercent / 100,
    latencyMillis: settings.loadLatencyMillis,
    loopMillis: settings.loadLoopMillis
  }
  let sample: LoadSample = { cpu: 0, memory: 0, connections: 0, search_p99_ms: 0, event_loop_p99_ms: 0 }
  let causes: ReadonlyArray<LoadCause> = []
  let sinceMillis = yield* Clock.currentTimeMillis
  let refusedBefore: ReadonlyMap<string, number> = new Map()
  let refusedAt = 0
  const loggedAt = new Map<string, number>()

  /** A line about each kind of thing a minute; changes of level to a higher one always. */
  const log = (kind: string, now: number, message: string, details: object) => {
    if (now - (loggedAt.get(kind) ?? Number.NEGATIVE_INFINITY) < logEveryMillis) return Effect.void
    loggedAt.set(kind, now)
    return Effect.logWarning(message, details)
  }

  const tellRefused = (now: number) => {
    if (now - refusedAt < refusedEveryMillis) return Effect.void
    refusedAt = now
    const bounds: Record<string, number> = {}
    for (const [bound, count] of shedding.refused()) {
      const more = count - (refusedBefore.get(bound) ?? 0)
      if (more > 0) bounds[bound] = more
    }
    if (Object.keys(bounds).length === 0) return Effect.void
    refusedBefore = new Map(shedding.refused())
    events.publish({ event: "refused", bounds }, now)
    return log("refused", now, "Requests are refused under load", { bounds, searches: admission.state() })
  }

  const look = Effect.gen(function* () {
    const now = yield* Clock.currentTimeMillis
    sample = meter.sample()
    const asked = judge(sample, triggers)
    causes = asked.causes
    const from = levels.level
    const to = levels.next(asked.level, now)
    if (to !== from) {
      sinceMillis = now
      shedding.setLevel(to)
      events.publish({ event: "level_changed", from, to, causes, sample }, now)
      yield* to > from
        ? Effect.logWarning("Load is shed", { from, to, causes, sample })
        : Effect.logInfo("Less load is shed", { from, to, sample })
    }
    if (to >= 90) {
      const closed = shedding.closeIdle(settings.shedIdleMillis, settings.shedIdleBatch)
      if (closed > 0) {
        idleClosed.updateUnsafe(closed, metricContext)
        events.publish({ event: "idle_closed", connections: closed }, now)
        yield* log("idle", now, "Idle connections are closed under load", { connections: closed })
      }
    }
    yield* tellRefused(now)
    report(sample, to, admission.state())
  })

  yield* Effect.forkScoped(
    Effect.forever(
      Effect.andThen(
        Effect.sleep(Duration.millis(settings.loadSampleMillis)),
        Effect.catchCause(look, (cause) => Effect.logError("The load could not be looked at", cause))
      )
    )
  )
  yield* Effect.addFinalizer(() => Effect.sync(() => shedding.setLevel(0)))

  let followers = 0

  return LoadShedder.of({
    State: () =>
      Effect.sync((): LoadState => {
        const { limit, slowdown, underWay, waiting } = admission.state()
        return {
          level: levels.level,
          since_ms: sinceMillis,
          causes,
          sample,
          searches: { limit, under_way: underWay, waiting, slowdown },
          refused: Object.fromEntries(shedding.refused())
        }
      }),
    Events: ({ payload }) =>
      Stream.unwrap(
        Effect.gen(function* () {
          if (followers >= settings.loadSubscribersMax) {
            return yield* new Overloaded({ bound: "loadSubscribersMax", retryAfterMillis: 5_000 })
          }
          yield* Effect.acquireRelease(
            Effect.sync(() => (followers += 1)),
            () => Effect.sync(() => (followers -= 1))
          )
          return events.follow(payload.after ?? events.last, yield* Clock.currentTimeMillis)
        })
      )
  })
})

const metricContext = Context.empty()

const gauge = (name: string, description: string) => Metric.gauge(name, { description })

const gauges = {
  level: gauge("ruvector_load_level", "Level at which load is shed: 0, 85, 90 or 95"),
  limit: gauge("ruvector_search_limit", "Searches that may be under way at once"),
  underWay: gauge("ruvector_searches_under_way", "Searches under way"),
  waiting: gauge("ruvector_searches_waiting", "Searches that wait to begin"),
  slowdown: gauge("ruvector_search_slowdown", "How many times longer a search takes than alone"),
  cpu: gauge("ruvector_load_cpu", "Share of the processors in use that the process may use"),
  memory: gauge("ruvector_load_memory", "Share of the container's memory that the process holds"),
  connections: gauge("ruvector_load_connections", "Share of connectionsMax that is open"),
  latency: gauge("ruvector_load_search_p99_ms", "99th percentile of the searches of the last seconds"),
  loop: gauge("ruvector_load_event_loop_p99_ms", "99th percentile of the main thread's delay since the last look")
}
const idleClosed = Metric.counter("ruvector_shed_idle_closed", {
  description: "Idle connections closed under load",
  incremental: true
})

const report = (sample: LoadSample, level: number, searches: ReturnType<Admission["Service"]["state"]>): void => {
  const set = (metric: Metric.Gauge<number>, value: number) => metric.updateUnsafe(value, metricContext)
  set(gauges.level, level)
  set(gauges.limit, searches.limit)
  set(gauges.underWay, searches.underWay)
  set(gauges.waiting, searches.waiting)
  set(gauges.slowdown, searches.slowdown)
  set(gauges.cpu, sample.cpu)
  set(gauges.memory, sample.memory)
  set(gauges.connections, sample.connections)
  set(gauges.latency, sample.search_p99_ms)
  set(gauges.loop, sample.event_loop_p99_ms)
}

/** Asks for the state until it is told: the entity starts with the first message. */
const awaken = Effect.gen(function* () {
  const shedder = (yield* LoadShedder.client)(localShedderId)
  yield* Effect.forkScoped(
    Effect.catchCause(shedder.State(), (cause) => Effect.logDebug("The load shedder did not start yet", cause)).pipe(
      Effect.andThen(Effect.sleep(awakenMillis)),
      Effect.forever
    )
  )
})

/** The shedder that was lost, by whatever fault, is back after so long. */
const awakenMillis = 5_000

/** The entity of this process, kept awake. */
export const layer = Layer.effectDiscard(awaken).pipe(
  Layer.provideMerge(
    LoadShedder.toLayer(makeShedder, {
      concurrency: "unbounded",
      disableFatalDefects: true,
      mailboxCapacity: 1_024,
      maxIdleTime: Duration.infinity
    })
  ),
  Layer.provide(layerNode)
)
