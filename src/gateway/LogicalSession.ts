/**
 * One logical session of a WebSocket: what of it stays in memory while it does nothing is this object, its label and an
 * entry in its connection's map; its entity is passivated. Its events wait here while it has no credit, or its connection
 * no room: answers as the objects they are, made into text when they are sent.
 */
import { Overloaded } from "../protocol/Errors.ts"
import { closeCodes } from "../protocol/Frames.ts"
import * as Limits from "../protocol/Limits.ts"
import type { SearchAnswer } from "../protocol/StreamSession.ts"
import * as Answers from "./Answers.ts"
import type { SessionSink } from "./SessionSink.ts"
import type { SessionLink } from "./Sessions.ts"

/** The connection, as its sessions see it. */
export interface SessionOwner {
  /** Whether an event would go out now, and not wait for the client to read. */
  hasRoom(): boolean
  write(text: string): void
  /** The session has something to do that only room keeps it from. */
  ready(session: LogicalSession): void
  /** So many bytes more, or fewer, wait in its sessions. */
  waits(bytes: number): void
  endSession(session: LogicalSession, code: number, reason: string): void
  defect(defect: unknown): void
}

export interface SessionBounds {
  readonly sessionOutboundEventsMax: number
  readonly sessionOutboundBytesMax: number
}

export class LogicalSession implements SessionSink {
  readonly label: string
  /** Its entity's address, once it has searched. */
  link: SessionLink | undefined = undefined
  /** Requests under way. */
  underWay = 0
  /** Whether it stands in its connection's queue of those that have something to send. */
  isQueued = false
  readonly #owner: SessionOwner
  readonly #bounds: SessionBounds
  #credits = unlimited
  /** Events that searches under way may come to. */
  #promised = 0
  #waitingEvents = 0
  #waitingBytes = 0
  #first: Outgoing | undefined = undefined
  #last: Outgoing | undefined = undefined
  #drains: Array<() => void> | undefined = undefined
  #isEnded = false

  constructor(label: string, owner: SessionOwner, bounds: SessionBounds) {
    this.label = label
    this.#owner = owner
    this.#bounds = bounds
  }

  get isEnded(): boolean {
    return this.#isEnded
  }

  /** Bytes that wait because the session has no credit for them. */
  get uncreditedBytes(): number {
    return this.#credits === 0 ? this.#waitingBytes : 0
  }

  /** One answer waits, or one event, or nothing. */
  get waitsForOne(): boolean {
    return this.#first === this.#last
  }

  /** Takes on a request that may come to so many events, where there is a place for them should no credit come. */
  promise(events: number): Overloaded | undefined {
    if (this.#credits !== unlimited) {
      const waiting = this.#waitingEvents + this.#promised
      if (waiting > 0 && waiting + events - this.#credits > this.#bounds.sessionOutboundEventsMax) {
        return new Overloaded({ bound: "sessionOutboundEventsMax", retryAfterMillis: 1_000 })
      }
    }
    this.underWay += 1
    this.#promised += events
    return undefined
  }

  /** Such a request has ended. */
  release(events: number): void {
    this.underWay -= 1
    this.#promised -= events
  }

  credit(events: number): void {
    this.#credits = Math.min(Limits.creditsMax, (this.#credits === unlimited ? 0 : this.#credits) + events)
    if (this.#wantsRoom()) this.#owner.ready(this)
  }

  /** Events of an answer, now or as there is room. */
  answer(answer: SearchAnswer, tail: string, isStreamed: boolean): void {
    if (!isStreamed && this.#maySend()) this.#write(Answers.searchResults(answer, tail))
    else this.#take(isStreamed ? new StreamedAnswer(answer, tail) : new WholeAnswer(answer, tail))
  }

  /** One event of a search, now or as there is room. */
  event(text: string): void {
    if (this.#maySend()) this.#write(text)
    else this.#take(new TextEvent(text))
  }

  hasRoom(): boolean {
    return this.#maySend()
  }

  send(text: string): boolean {
    if (!this.#maySend()) return false
    this.#write(text)
    return true
  }

  onDrain(callback: () => void): void {
    if (this.#isEnded) return
    this.#drains ??= []
    this.#drains.push(callback)
    if (this.#credits !== 0) this.#owner.ready(this)
  }

  close(code: number, reason: string): void {
    if (!this.#isEnded) this.#owner.endSession(this, code, reason)
  }

  /** Nothing more is sent, and what waits is let go. */
  end(): void {
    this.#isEnded = true
    this.#owner.waits(-this.#waitingBytes)
    this.#waitingEvents = 0
    this.#waitingBytes = 0
    this.#first = undefined
    this.#last = undefined
    this.#drains = undefined
  }

  /** Sends at most so many of the events that wait. Whether it has more, and may send it as soon as there is room. */
  pump(eventsMax: number): boolean {
    for (let n = 0; n < eventsMax; n++) {
      const first = this.#first
      if (first === undefined || this.#credits === 0 || !this.#owner.hasRoom()) break
      this.#write(first.next())
      this.#waitingEvents -= 1
      if (first.left === 0) this.#shift(first)
    }
    if (this.#maySend()) this.#drained()
    return this.#wantsRoom()
  }

  #drained(): void {
    const drains = this.#drains
    this.#drains = undefined
    for (let i = 0; drains !== undefined && i < drains.length; i++) {
      if (!this.#maySend()) {
        // The others are still behind: before those that asked again meanwhile.
        if (!this.#isEnded) this.#drains = [...drains.slice(i), ...(this.#drains ?? [])]
        return
      }
      try {
        ;(drains[i] as () => void)()
      } catch (defect) {
        this.#owner.defect(defect)
        this.close(closeCodes.internalError, "a defect of the server")
      }
    }
  }

  #maySend(): boolean {
    return !this.#isEnded && this.#first === undefined && this.#credits !== 0 && this.#owner.hasRoom()
  }

  #wantsRoom(): boolean {
    return !this.#isEnded && this.#credits !== 0 && (this.#first !== undefined || (this.#drains?.length ?? 0) > 0)
  }

  #write(text: string): void {
    if (this.#credits !== unlimited) this.#credits -= 1
    this.#owner.write(text)
  }

  #take(outgoing: Outgoing): void {
    while (this.#maySend()) {
      this.#write(outgoing.next())
      if (outgoing.left === 0) return
    }
    if (this.#isEnded) return
    const bytes = outgoing.bytes()
    if (this.#first !== undefined && this.#isOver(outgoing.left, bytes)) {
      return this.close(closeCodes.slowReader, this.#credits === 0 ? "no credits" : "reads too slowly")
    }
    if (this.#last === undefined) this.#first = outgoing
    else this.#last.after = outgoing
    this.#last = outgoing
    this.#waitingEvents += outgoing.left
    this.#waitingBytes += bytes
    outgoing.waitingBytes = bytes
    if (this.#credits !== 0) this.#owner.ready(this)
    this.#owner.waits(bytes)
  }

  #isOver(events: number, bytes: number): boolean {
    // What the connection's own session is not read for is not read for the connection, which has its bound.
    if (this.label === ownSession && this.#credits !== 0) return false
    return (
      this.#waitingBytes + bytes > this.#bounds.sessionOutboundBytesMax ||
      (this.#credits !== unlimited && this.#waitingEvents + events > this.#bounds.sessionOutboundEventsMax)
    )
  }

  #shift(first: Outgoing): void {
    this.#first = first.after
    if (this.#first === undefined) this.#last = undefined
    this.#waitingBytes -= first.waitingBytes
    this.#owner.waits(-first.waitingBytes)
  }
}

/** The label of the session that every connection has. */
export const ownSession = ""

/** No credits are counted. */
const unlimited = -1

/** One or more events that wait. */
interface Outgoing {
  after: Outgoing | undefined
  /** What it was counted with. */
  waitingBytes: number
  /** Events not sent yet. */
  readonly left: number
  next(): string
  /** What it holds, about. */
  bytes(): number
}

class TextEvent implements Outgoing {
  after: Outgoing | undefined = undefined
  waitingBytes = 0
  left = 1
  readonly #text: string

  constructor(text: string) {
    this.#text = text
  }

  next(): string {
    this.left = 0
    return this.#text
  }

  bytes(): number {
    return itemBytes + this.#text.length
  }
}

class WholeAnswer implements Outgoing {
  after: Outgoing | undefined = undefined
  waitingBytes = 0
  left = 1
  readonly #answer: SearchAnswer
  readonly #tail: string

  constructor(answer: SearchAnswer, tail: string) {
    this.#answer = answer
    this.#tail = tail
  }

  next(): string {
    this.left = 0
    return Answers.searchResults(this.#answer, this.#tail)
  }

  bytes(): number {
    return bytesOf(this.#answer, this.#tail)
  }
}

class StreamedAnswer implements Outgoing {
  after: Outgoing | undefined = undefined
  waitingBytes = 0
  readonly #answer: SearchAnswer
  readonly #tail: string
  #sent = 0

  constructor(answer: SearchAnswer, tail: string) {
    this.#answer = answer
    this.#tail = tail
  }

  get left(): number {
    return this.#answer.ids.length + 1 - this.#sent
  }

  next(): string {
    const at = this.#sent++
    return at < this.#answer.ids.length
      ? Answers.searchResult(this.#answer, at, this.#tail)
      : Answers.searchComplete(this.#answer, this.#tail)
  }

  bytes(): number {
    return bytesOf(this.#answer, this.#tail)
  }
}

const itemBytes = 128

const bytesOf = (answer: SearchAnswer, tail: string): number => {
  let bytes = itemBytes + tail.length + answer.scores.byteLength + (answer.vectors?.byteLength ?? 0)
  for (const id of answer.ids) bytes += 24 + id.length
  if (answer.metadata !== undefined) for (const metadata of answer.metadata) bytes += 24 + metadata.length
  return bytes
}
