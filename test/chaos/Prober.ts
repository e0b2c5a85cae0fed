/**
 * Asks every partition again and again to write a record, through each gateway in turn, and so knows when which did not answer.
 * One request each, without trying again: what a client makes of it is measured by its calls.
 */
import type { ClusterNode } from "./Nodes.ts"

export interface Probe {
  readonly partition: number
  readonly gateway: string
  readonly invoked: number
  /** `undefined`: not answered, or refused. */
  completed: number | undefined
}

export interface ProberOptions {
  readonly gateways: ReadonlyArray<ClusterNode>
  readonly collection: string
  /** An id of each partition. */
  readonly ids: ReadonlyArray<string>
  readonly dimensions: number
  readonly everyMillis: number
  readonly now: () => number
}

/** After which a probe counts as not answered. */
const lateMillis = 1_000

export class Prober {
  readonly probes: Array<Probe> = []
  readonly #options: ProberOptions
  readonly #timer: ReturnType<typeof setInterval>
  #round = 0

  constructor(options: ProberOptions) {
    this.#options = options
    this.#timer = setInterval(() => this.#ask(), options.everyMillis)
  }

  /**
   * Milliseconds from `begin` until every partition answered again for good, as seen before `until` through gateways that are not
   * `exempt`; 0 where none failed to, `undefined` where one does not yet.
   */
  recovered(begin: number, until: number, exempt: ReadonlyArray<string>): number | undefined {
    const recent = this.#since(begin)
    let latest = 0
    for (let partition = 0; partition < this.#options.ids.length; partition++) {
      const seen = recent.filter(
        (probe) => probe.partition === partition && probe.invoked < until && !exempt.includes(probe.gateway)
      )
      const failed = seen.findLast(
        ({ completed, invoked }) => completed === undefined || completed - invoked > lateMillis
      )
      if (failed === undefined) continue
      const answered = seen.filter(({ completed, invoked }) => completed !== undefined && invoked > failed.invoked)
      if (answered.length === 0) return undefined
      const first = Math.min(...answered.map(({ completed }) => completed as number))
      latest = Math.max(latest, first - begin)
    }
    return latest
  }

  /** The longest time between `begin` and `until` in which a partition that was asked did not answer. */
  pause(begin: number, until: number, exempt: ReadonlyArray<string>): number {
    const recent = this.#since(begin)
    let longest = 0
    for (let partition = 0; partition < this.#options.ids.length; partition++) {
      let since: number | undefined
      for (const probe of recent) {
        if (probe.partition !== partition || exempt.includes(probe.gateway) || probe.invoked >= until) continue
        since ??= probe.invoked
        if (probe.completed === undefined) continue
        longest = Math.max(longest, probe.completed - since)
        since = undefined
      }
      if (since !== undefined) longest = Math.max(longest, until - since)
    }
    return longest
  }

  close(): void {
    clearInterval(this.#timer)
  }

  /** Those that may still have been under way at the beginning, and all after it. */
  #since(begin: number): ReadonlyArray<Probe> {
    return this.probes.slice(this.probes.findLastIndex(({ invoked }) => invoked < begin - lateMillis) + 1)
  }

  #ask(): void {
    const { collection, dimensions, gateways, ids, now } = this.#options
    this.#round += 1
    ids.forEach((id, partition) => {
      const gateway = gateways[(this.#round + partition) % gateways.length] as ClusterNode
      const probe: Probe = { partition, gateway: gateway.name, invoked: now(), completed: undefined }
      this.probes.push(probe)
      const vector = Array.from({ length: dimensions }, (_, i) => (i === partition % dimensions ? 1 : -0.5))
      const body = JSON.stringify({ collection, vectors: [{ id, vector }] })
      fetch(`${gateway.base}/api/v1/insert`, {
        method: "POST",
        headers: { "content-type": "application/json" },
        body,
        signal: AbortSignal.timeout(2 * lateMillis)
      }).then(
        async (response) => {
          await response.arrayBuffer()
          if (response.ok) probe.completed = now()
        },
        () => {}
      )
    })
  }
}
