/**
 * How long frames of WebSockets are read before the rest of the process has its turn. One read of a socket can bring
 * hundreds of frames, and one look at the sockets a thousand sockets that each have one: read without a pause, they would
 * hold up every answer that is ready meanwhile. So frames are read for `frameTurnMillis` in a turn of the event loop; those
 * beyond wait at their connections, from which nothing more is read, and the connections have turns of some frames each.
 *
 * New connections need no such bound: the system hands over one in a turn of the event loop.
 */

/** A connection with frames that wait. */
export interface FrameSource {
  /** Reads so many of them at most. Whether there are more. */
  readWaiting(framesMax: number): boolean
}

export class FrameTurns {
  readonly #millis: number
  #waiting: Array<FrameSource> = []
  /** When the turn began; 0: there is none. */
  #beganAt = 0

  constructor(millis: number) {
    this.#millis = millis
  }

  /** Whether a frame that came now may be read now. */
  mayRead(): boolean {
    if (this.#waiting.length > 0) return false
    const now = performance.now()
    if (this.#beganAt === 0) this.#begin(now)
    return now - this.#beganAt < this.#millis
  }

  /** The connection has frames that wait, which it had not. */
  wait(source: FrameSource): void {
    this.#waiting.push(source)
  }

  #begin(now: number): void {
    this.#beganAt = now
    setImmediate(() => this.#next())
  }

  #next(): void {
    const turn = this.#waiting
    if (turn.length === 0) {
      this.#beganAt = 0
      return
    }
    this.#begin(performance.now())
    const again: Array<FrameSource> = []
    let at = 0
    while (at < turn.length && performance.now() - this.#beganAt < this.#millis) {
      const source = turn[at++] as FrameSource
      if (source.readWaiting(framesAtOnce)) again.push(source)
    }
    this.#waiting = at === turn.length ? again : [...turn.slice(at), ...again]
  }
}

/** Frames of one connection that are read before those of others. */
const framesAtOnce = 16
