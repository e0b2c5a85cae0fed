/** What the node carries, measured since the last time that somebody asked. Tests bring another. */
import { monitorEventLoopDelay } from "node:perf_hooks"
import { Context, Effect, Layer } from "effect"
import { Settings } from "../config.ts"
import type { LoadSample } from "../protocol/LoadShedder.ts"
import { containerCpu } from "../tiers/ContainerCpu.ts"
import { MemoryBudget } from "../tiers/MemoryBudget.ts"
import { Admission } from "./Admission.ts"
import { Shedding } from "./Shedding.ts"

/** A 99th percentile is of so many searches at least. */
const searchesMin = 100

/** The event loop's delay is looked at so often. */
const loopResolutionMillis = 20

/** Of memory, where the budget is exceeded and nothing can give way: writes are refused then. */
const exhaustedShare = 0.91

export class LoadMeter extends Context.Service<LoadMeter, { readonly sample: () => LoadSample }>()(
  "ruvector/shards/LoadMeter"
) {
  static readonly layer = Layer.effect(
    LoadMeter,
    Effect.gen(function* () {
      const settings = yield* Settings
      const admission = yield* Admission
      const shedding = yield* Shedding
      const budget = yield* MemoryBudget
      const cpu = containerCpu()
      const memoryBytes = memoryLimit()
      const loop = monitorEventLoopDelay({ resolution: loopResolutionMillis })
      loop.enable()
      yield* Effect.addFinalizer(() => Effect.sync(() => loop.disable()))
      return LoadMeter.of({
        sample: () => {
          const held = process.memoryUsage.rss() / memoryBytes
          const delay = loop.percentile(99) / 1e6 - loopResolutionMillis
          loop.reset()
          const p99 = admission.latencies.percentile(0.99, searchesMin)
          admission.latencies.turn()
          return {
            cpu: cpu.share(),
            memory: budget.exhausted() ? Math.max(held, exhaustedShare) : held,
            connections: shedding.connections() / settings.connectionsMax,
            search_p99_ms: p99,
            event_loop_p99_ms: Number.isFinite(delay) ? Math.max(0, delay) : 0
          }
        }
      })
    })
  )
}

/** The container's memory, or the machine's. */
const memoryLimit = (): number => {
  const constrained = process.constrainedMemory()
  return constrained > 0 && constrained < Number.MAX_SAFE_INTEGER
    ? constrained
    : process.availableMemory() + process.memoryUsage.rss()
}
