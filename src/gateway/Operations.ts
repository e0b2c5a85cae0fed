/** Routes for operators: `/health/live`, `/health/ready`, `/metrics`, `/api/v1/load` and its events; and `/`, which says what this is. */
import { monitorEventLoopDelay } from "node:perf_hooks"
import { Context, Effect, Metric } from "effect"
import { HttpRouter, HttpServerRequest, HttpServerResponse } from "effect/http"
import { PrometheusMetrics } from "effect/observability"
import { Settings } from "../config.ts"
import { LocalActors } from "../shards/LocalActors.ts"
import { Membership } from "../shards/Membership.ts"
import { ResultCache } from "../shards/ResultCache.ts"
import { Shedding } from "../shards/Shedding.ts"
import { MemoryBudget } from "../tiers/MemoryBudget.ts"
import { RecordCache, recordCacheMetrics } from "../tiers/RecordCache.ts"
import { VectorIndex } from "../tiers/VectorIndex.ts"
import { WarmStore, warmMetrics } from "../tiers/WarmStore.ts"
import { Load } from "./Load.ts"
import * as NodeEvents from "./NodeEvents.ts"
import { problemResponse } from "./Problems.ts"
import { Readiness } from "./Readiness.ts"
import { Sessions } from "./Sessions.ts"

/** What the node carries, and what it sheds for it. */
export const loadPath = "/api/v1/load"
/** Changes of what is shed, as they come. */
export const loadEventsPath = "/api/v1/load/events"

const gauge = (name: string, description: string) => Metric.gauge(name, { description })

const gauges = {
  residentPartitions: gauge("ruvector_partitions_resident", "Partitions resident in this process"),
  quarantined: gauge("ruvector_partitions_quarantined", "Partitions not opened for a while, since they kept failing"),
  sessions: gauge("ruvector_sessions", "Open stream sessions of this process"),
  sessionsResident: gauge("ruvector_sessions_resident", "Stream sessions resident in this process"),
  ready: gauge("ruvector_ready", "1 when this node is ready for requests"),
  threadBytes: gauge("ruvector_index_bytes", "Bytes held by the vector threads"),
  budgetBytes: gauge("ruvector_budget_bytes", "Memory that the process may hold"),
  budgetRuntimeBytes: gauge("ruvector_budget_runtime_bytes", "Resident memory beside partitions and caches"),
  budgetPartitionBytes: gauge("ruvector_budget_partition_bytes", "Memory of the resident partitions"),
  budgetCacheBytes: gauge("ruvector_budget_cache_bytes", "Memory of the caches"),
  budgetReservedBytes: gauge("ruvector_budget_reserved_bytes", "Memory promised to what is being opened"),
  partitionsFull: gauge("ruvector_partitions_full", "Resident partitions in their full form"),
  partitionsMapped: gauge("ruvector_partitions_mapped", "Resident partitions in their mapped form"),
  threadRestarts: gauge("ruvector_thread_restarts", "Vector threads that died and were replaced"),
  rssBytes: gauge("process_resident_memory_bytes", "Resident memory"),
  heapBytes: gauge("nodejs_heap_used_bytes", "Heap of the main thread in use"),
  heapTotalBytes: gauge("nodejs_heap_total_bytes", "Heap of the main thread, reserved"),
  arrayBufferBytes: gauge("nodejs_array_buffers_bytes", "Array buffers of the main thread"),
  cpuSeconds: gauge("process_cpu_seconds", "CPU time used, user and system"),
  eventLoopP99Millis: gauge(
    "nodejs_eventloop_delay_p99_ms",
    "99th percentile of the main thread's delay since the last reading"
  )
}

/** Routes of the operators' wire. */
export const layer = HttpRouter.use(
  Effect.fnUntraced(function* (router) {
    const settings = yield* Settings
    const readiness = yield* Readiness
    const membership = yield* Membership
    const load = yield* Load
    const shedding = yield* Shedding
    const results = yield* ResultCache
    const local = yield* LocalActors
    const sessions = yield* Sessions
    const vectors = yield* VectorIndex
    const budget = yield* MemoryBudget
    const cache = yield* RecordCache
    const warm = yield* WarmStore
    const delay = monitorEventLoopDelay({ resolution: 20 })
    delay.enable()
    yield* Effect.addFinalizer(() => Effect.sync(() => delay.disable()))

    yield* router.add("GET", "/health/live", Effect.succeed(HttpServerResponse.jsonUnsafe({ status: "live" }, noStore)))
    yield* router.add(
      "GET",
      "/health/ready",
      Effect.sync(() => {
        const state = readiness.get()
        const ready = state.state === "ready"
        const level = shedding.level()
        const outage = membership.outage()
        return HttpServerResponse.jsonUnsafe(
          {
            status: state.state,
            ...("detail" in state ? { detail: state.detail } : {}),
            // What there is goes on; to take nodes out that could serve would make an outage of it.
            ...(ready && outage !== undefined
              ? { detail: `the cluster's database is gone since ${new Date(outage.sinceMillis).toISOString()}` }
              : {}),
            // An overloaded node is ready all the same: to take it out would put its load on the others.
            ...(level === 0 ? {} : { load_level: level })
          },
          { status: ready ? 200 : 503, headers: { ...noStore.headers, ...(ready ? {} : { "retry-after": "1" }) } }
        )
      })
    )
    yield* router.add(
      "GET",
      loadPath,
      load.state.pipe(
        Effect.map((state) => HttpServerResponse.jsonUnsafe(state, noStore)),
        Effect.catch((error) => Effect.succeed(problemResponse(error)))
      )
    )
    yield* router.add(
      "GET",
      loadEventsPath,
      Effect.gen(function* () {
        const request = yield* HttpServerRequest.HttpServerRequest
        return yield* NodeEvents.follow("load", request, load.events, readiness, settings)
      }).pipe(Effect.catch((error) => Effect.succeed(problemResponse(error))))
    )
    yield* router.add(
      "GET",
      "/metrics",
      Effect.gen(function* () {
        results.report()
        const threads = yield* vectors.threads
        const set = (metric: Metric.Gauge<number>, value: number) => metric.updateUnsafe(value, context)
        recordCacheMetrics(cache)
        warmMetrics(yield* warm.state)
        set(gauges.residentPartitions, local.partitions.size)
        set(gauges.quarantined, local.quarantined().length)
        set(gauges.sessions, sessions.count())
        set(gauges.sessionsResident, local.sessions.size)
        set(gauges.ready, readiness.get().state === "ready" ? 1 : 0)
        set(
          gauges.threadBytes,
          threads.reduce((sum, thread) => sum + thread.bytes, 0)
        )
        set(
          gauges.threadRestarts,
          threads.reduce((sum, thread) => sum + thread.restarts, 0)
        )
        const held = budget.state()
        set(gauges.budgetBytes, held.budgetBytes)
        set(gauges.budgetRuntimeBytes, held.runtimeBytes)
        set(gauges.budgetPartitionBytes, held.partitionBytes)
        set(gauges.budgetCacheBytes, held.cacheBytes)
        set(gauges.budgetReservedBytes, held.reservedBytes)
        const full = budget.residents().filter((one) => one.form() === "full").length
        set(gauges.partitionsFull, full)
        set(gauges.partitionsMapped, budget.residents().length - full)
        const memory = process.memoryUsage()
        set(gauges.rssBytes, memory.rss)
        set(gauges.heapBytes, memory.heapUsed)
        set(gauges.heapTotalBytes, memory.heapTotal)
        set(gauges.arrayBufferBytes, memory.arrayBuffers)
        const cpu = process.cpuUsage()
        set(gauges.cpuSeconds, (cpu.user + cpu.system) / 1e6)
        set(gauges.eventLoopP99Millis, delay.percentile(99) / 1e6)
        delay.reset()
        return HttpServerResponse.text(PrometheusMetrics.formatUnsafe(context), {
          contentType: "text/plain; version=0.0.4; charset=utf-8",
          headers: noStore.headers
        })
      })
    )
    yield* router.add(
      "GET",
      "/",
      Effect.succeed(
        HttpServerResponse.jsonUnsafe({
          service: "ruvector-streaming",
          docs: "/docs",
          openapi: "/openapi.json",
          health: "/health/ready",
          metrics: "/metrics"
        })
      )
    )
  })
)

const context = Context.empty()
const noStore = { headers: { "cache-control": "no-store" } }
