/** From what was measured to the level at which load is shed, and no to and fro between levels. */
import type { LoadCause, LoadLevel, LoadSample } from "../protocol/LoadShedder.ts"

/** From which on load is shed: shares 0..1, milliseconds. */
export interface LoadTriggers {
  readonly cpu: number
  readonly memory: number
  readonly connections: number
  readonly latencyMillis: number
  readonly loopMillis: number
}

/**
 * A share that is over its trigger asks for the level it is at, or for the first; a latency over its trigger asks for the
 * first, since there is no share of it.
 */
export const levelOf = (sample: LoadSample, cause: LoadCause, triggers: LoadTriggers): LoadLevel => {
  switch (cause) {
    case "latency":
      return sample.search_p99_ms > triggers.latencyMillis ? 85 : 0
    case "event_loop":
      return sample.event_loop_p99_ms > triggers.loopMillis ? 85 : 0
    default: {
      const share = sample[cause]
      if (share <= triggers[cause]) return 0
      return share >= 0.95 ? 95 : share >= 0.9 ? 90 : 85
    }
  }
}

const causes: ReadonlyArray<LoadCause> = ["cpu", "memory", "connections", "latency", "event_loop"]

/** The highest level asked for, and what asks for one at all. */
export const judge = (
  sample: LoadSample,
  triggers: LoadTriggers
): { readonly level: LoadLevel; readonly causes: ReadonlyArray<LoadCause> } => {
  let level: LoadLevel = 0
  for (const cause of causes) {
    const one = levelOf(sample, cause, triggers)
    if (one > level) level = one
  }
  return { level, causes: causes.filter((cause) => levelOf(sample, cause, triggers) > 0) }
}

/**
 * The level in force. It rises when a higher one was asked for without a break for `raiseMillis`, to the least of those asked
 * for in that time; it falls when a lower one was for `lowerMillis`, to the greatest of those.
 */
export class LoadLevels {
  readonly #raiseMillis: number
  readonly #lowerMillis: number
  #level: LoadLevel = 0
  #higher: { readonly since: number; readonly least: LoadLevel } | undefined
  #lower: { readonly since: number; readonly greatest: LoadLevel } | undefined

  constructor(options: { readonly raiseMillis: number; readonly lowerMillis: number }) {
    this.#raiseMillis = options.raiseMillis
    this.#lowerMillis = options.lowerMillis
  }

  get level(): LoadLevel {
    return this.#level
  }

  /** Answers the level now in force. */
  next(asked: LoadLevel, nowMillis: number): LoadLevel {
    if (asked > this.#level) {
      const { since = nowMillis, least = asked } = this.#higher ?? {}
      this.#higher = { since, least: asked < least ? asked : least }
      this.#lower = undefined
      if (nowMillis - since >= this.#raiseMillis) this.#change(this.#higher.least)
    } else if (asked < this.#level) {
      const { since = nowMillis, greatest = asked } = this.#lower ?? {}
      this.#lower = { since, greatest: asked > greatest ? asked : greatest }
      this.#higher = undefined
      if (nowMillis - since >= this.#lowerMillis) this.#change(this.#lower.greatest)
    } else {
      this.#higher = undefined
      this.#lower = undefined
    }
    return this.#level
  }

  #change(level: LoadLevel): void {
    this.#level = level
    this.#higher = undefined
    this.#lower = undefined
  }
}
