/**
 * Sends a delivery's events on a wire that is pushed to, as long as there is room; with a full one it waits until there is
 * again, or, where the client wants that, ends what it would fall behind on.
 */
import type { StreamEvent } from "./StreamEvents.ts"
import type { Delivery } from "./Subscriptions.ts"

export interface PushTarget {
  readonly hasRoom: () => boolean
  /** Called with room. */
  readonly send: (event: StreamEvent) => void
  /** Calls back once, when there is room. */
  readonly onDrain: (callback: () => void) => void
  /** There is no room, and the policy is not to wait. */
  readonly tooSlow: () => void
}

/** Events sent in one turn of the event loop: who catches up on many lets others have theirs. */
const turnEvents = 64

export class Pusher {
  readonly #target: PushTarget
  #delivery: Delivery | undefined
  #waiting = false
  #ended = false

  constructor(target: PushTarget) {
    this.#target = target
  }

  start(delivery: Delivery): void {
    if (this.#ended) return delivery.close()
    this.#delivery = delivery
    this.#pump()
  }

  /** There may be something to send. */
  readonly ready = (): void => {
    if (this.#delivery === undefined) return
    if (!this.#waiting) return this.#pump()
    if (this.#delivery.policy === "close" && !this.#target.hasRoom()) this.#target.tooSlow()
  }

  end(): void {
    this.#ended = true
    this.#delivery?.close()
    this.#delivery = undefined
  }

  #pump(): void {
    for (let sent = 0; this.#delivery !== undefined; sent++) {
      if (!this.#target.hasRoom()) {
        this.#waiting = true
        return this.#target.onDrain(() => this.#again())
      }
      if (sent === turnEvents) {
        this.#waiting = true
        setImmediate(() => this.#again())
        return
      }
      const event = this.#delivery.next()
      if (event === undefined) return
      this.#target.send(event)
    }
  }

  #again(): void {
    this.#waiting = false
    this.#pump()
  }
}
