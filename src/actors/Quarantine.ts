/**
 * Whether a partition that keeps failing is left alone for a while. What counts is what is its own fault: it cannot be opened
 * because of its data or a defect, or its vector thread died, or had to let go of it, at work on it. Not that storage, memory or
 * another node is missing.
 *
 * From the first failure on it is opened in a thread of its own, where there is room for one: so it takes no other partition
 * along. After `quarantineFailures` in a row it is not opened until `quarantineMillis` have passed, twice as long after each
 * failure more; one that stays well for `quarantineCalmMillis` has none.
 */
import type { SettingValues } from "../config.ts"
import type { QuarantinedPartition } from "../protocol/Cluster.ts"

export type QuarantineBounds = Pick<
  SettingValues,
  "quarantineFailures" | "quarantineMillis" | "quarantineMillisMax" | "quarantineCalmMillis"
>

export class Quarantine {
  readonly #bounds: QuarantineBounds
  readonly #of: { readonly collection: string; readonly partition: number }
  #failures = 0
  #failedAt = 0
  #detail = ""
  /** Since when it is resident. */
  #openSince: number | undefined

  constructor(of: { readonly collection: string; readonly partition: number }, bounds: QuarantineBounds) {
    this.#of = of
    this.#bounds = bounds
  }

  failed(detail: string, now: number): void {
    this.#calm(now)
    this.#openSince = undefined
    this.#failures += 1
    this.#failedAt = now
    this.#detail = detail
  }

  opened(now: number): void {
    this.#openSince = now
  }

  /** It failed lately: it is not to share a thread. */
  isSuspect(now: number): boolean {
    this.#calm(now)
    return this.#failures > 0
  }

  /** Until when it is not opened; 0 where it may be. */
  until(now: number): number {
    const retryAt = this.#retryAt(now) ?? 0
    return retryAt > now ? retryAt : 0
  }

  /** While it is in quarantine, or on trial after it. */
  state(now: number): QuarantinedPartition | undefined {
    const retryAt = this.#retryAt(now)
    if (retryAt === undefined) return undefined
    return {
      ...this.#of,
      failures: this.#failures,
      detail: this.#detail,
      failed_ms: this.#failedAt,
      retry_ms: retryAt
    }
  }

  /** An operator knows better. */
  release(): void {
    this.#failures = 0
  }

  /** When it may be opened after the last of too many failures. */
  #retryAt(now: number): number | undefined {
    this.#calm(now)
    const { quarantineFailures, quarantineMillis, quarantineMillisMax } = this.#bounds
    const beyond = this.#failures - quarantineFailures
    return beyond < 0 ? undefined : this.#failedAt + Math.min(quarantineMillis * 2 ** beyond, quarantineMillisMax)
  }

  #calm(now: number): void {
    if (this.#openSince !== undefined && now - this.#openSince >= this.#bounds.quarantineCalmMillis) this.#failures = 0
  }
}
