/**
 * Which of several endpoints is used: with `region: "auto"` the nearest that is well, by measured round trip, else the first
 * that is well. One in trouble is passed over until a probe finds it well again, and then returned to.
 */
import type { ResolvedOptions } from "./ClientOptions.ts"

/** A nearer endpoint is moved to only if it is nearer by this share: round trips vary. */
const nearerShare = 0.8

/** Round trips measured of one endpoint in one probe; the shortest counts. */
const probesEach = 3

interface Endpoint {
  readonly url: string
  /** Infinity: in trouble, or not measured. */
  millis: number
  well: boolean
}

export class Endpoints {
  readonly #options: ResolvedOptions
  readonly #all: ReadonlyArray<Endpoint>
  readonly #onNearer: () => void
  #current: Endpoint
  #measured: Promise<void> | undefined
  #timer: ReturnType<typeof setInterval> | undefined

  /** `onNearer`: another endpoint has become the better one. */
  constructor(options: ResolvedOptions, onNearer: () => void) {
    this.#options = options
    this.#all = options.endpoints.map((url) => ({ url, millis: Number.POSITIVE_INFINITY, well: true }))
    this.#current = this.#all[0] as Endpoint
    this.#onNearer = onNearer
  }

  /** The one in use. */
  get url(): string {
    return this.#current.url
  }

  /** The one to use next; measures first where that has not been done. */
  async choose(): Promise<string> {
    if (this.#all.length === 1) return this.#current.url
    if (this.#options.auto && this.#measured === undefined) await this.#measure()
    this.#startTimer()
    this.#current = this.#best()
    return this.#current.url
  }

  /** The endpoint did not connect, or was lost: another is tried, and this one when a probe finds it well. */
  failed(url: string): void {
    const endpoint = this.#all.find((one) => one.url === url)
    if (endpoint === undefined || this.#all.length === 1) return
    endpoint.well = false
    // Where none is well, all are tried in turn again.
    if (this.#all.every((one) => !one.well)) for (const one of this.#all) one.well = one !== endpoint
    this.#startTimer()
  }

  close(): void {
    clearInterval(this.#timer)
  }

  #best(): Endpoint {
    const well = this.#all.filter((one) => one.well)
    const candidates = well.length === 0 ? this.#all : well
    if (!this.#options.auto) return candidates[0] as Endpoint
    const nearest = candidates.reduce((best, one) => (one.millis < best.millis ? one : best))
    if (!candidates.includes(this.#current)) return nearest
    return nearest.millis < this.#current.millis * nearerShare ? nearest : this.#current
  }

  #startTimer(): void {
    if (this.#timer !== undefined) return
    this.#timer = setInterval(() => {
      void this.#measure().then(() => {
        if (this.#best() !== this.#current) this.#onNearer()
      })
    }, this.#options.probeIntervalMillis)
    unref(this.#timer)
  }

  /** One measurement at a time; the first to be asked for is waited for by all. */
  #measure(): Promise<void> {
    const measuring = Promise.all(this.#all.map((endpoint) => this.#probe(endpoint))).then(() => {})
    this.#measured = measuring
    return measuring
  }

  async #probe(endpoint: Endpoint): Promise<void> {
    let shortest = Number.POSITIVE_INFINITY
    for (let n = 0; n < probesEach; n++) {
      const started = performance.now()
      try {
        const response = await this.#options.fetch(`${endpoint.url}/health/ready`, {
          signal: AbortSignal.timeout(this.#options.connectMillis)
        })
        await response.arrayBuffer()
        if (!response.ok) break
        shortest = Math.min(shortest, performance.now() - started)
      } catch {
        break
      }
    }
    endpoint.millis = shortest
    endpoint.well = shortest !== Number.POSITIVE_INFINITY
  }
}

/** Makes a timer keep a Node process alive again. */
export const ref = (timer: unknown): void => {
  if (typeof timer === "object" && timer !== null && "ref" in timer) (timer as { ref(): void }).ref()
}

/** A timer that does not keep a Node process alive; a browser's has nothing of the kind. */
export const unref = (timer: unknown): void => {
  if (typeof timer === "object" && timer !== null && "unref" in timer) (timer as { unref(): void }).unref()
}
