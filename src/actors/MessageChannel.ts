/**
 * The messages of one channel: which ids were published lately, where subscribers are, and the newest messages in memory for
 * who reads at the end. Older ones are read from the log.
 */
import { Result } from "effect"
import type { SettingValues } from "../config.ts"
import type { Message, MessagePosition, NewMessage } from "../protocol/AgentChannel.ts"
import { Overloaded } from "../protocol/Errors.ts"
import { endOfObject, isBefore } from "../protocol/IndexPartition.ts"
import { type ChannelRecord, decodeRecords } from "../tiers/ChannelRecord.ts"
import type { ChannelMachine, Decision } from "./ChannelLog.ts"

type Head =
  /** A message: its id. */
  | readonly ["m", string]
  /** A subscriber's position. */
  | readonly ["p", number, number]
  | readonly ["forget"]
  /** Of snapshots: the key is an id that was published. */
  | readonly ["i"]

interface Subscriber {
  readonly position: MessagePosition
  readonly atMillis: number
}

export class MessageChannel implements ChannelMachine {
  readonly #settings: SettingValues
  /** By id, oldest first. */
  readonly #published = new Map<string, number>()
  readonly #subscribers = new Map<string, Subscriber>()
  /** Newest messages that are durable, in order; those of one log object are all there or none. */
  readonly #window: Array<Message> = []
  #windowBytes = 0
  /** Everything after it is in the window. */
  #windowAfter: MessagePosition = { seq: 0, index: endOfObject }
  #pending: Array<Message> = []
  #onNews: () => void = () => {}

  constructor(settings: SettingValues) {
    this.#settings = settings
  }

  onNews(call: () => void): void {
    this.#onNews = call
  }

  readonly apply = (record: ChannelRecord, seq: number, index: number): void => {
    const head = JSON.parse(record.head) as Head
    switch (head[0]) {
      case "m":
        this.#pending.push(messageOf(record, head[1], seq, index))
        this.#remember(head[1], record.atMillis)
        return
      case "p":
        this.#subscribers.set(record.key, { position: { seq: head[1], index: head[2] }, atMillis: record.atMillis })
        return
      case "forget":
        this.#subscribers.delete(record.key)
    }
  }

  readonly committed = (seq: number): void => {
    if (this.#window.length === 0 && this.#pending.length === 0) this.#windowAfter = { seq, index: endOfObject }
    if (this.#pending.length === 0) return
    for (const message of this.#pending) {
      this.#window.push(message)
      this.#windowBytes += sizeOf(message)
    }
    this.#pending = []
    this.#trim()
    this.#onNews()
  }

  readonly capture = (): Iterable<ChannelRecord> => {
    const published = [...this.#published]
    const subscribers = [...this.#subscribers]
    return captured(published, subscribers)
  }

  readonly restore = (record: ChannelRecord): void => {
    const head = JSON.parse(record.head) as Head
    if (head[0] === "i") this.#remember(record.key, record.atMillis)
    else this.apply(record, 0, 0)
  }

  publish(
    messages: ReadonlyArray<NewMessage>,
    atMillis: number
  ): Decision<{ readonly duplicates: ReadonlyArray<number> }, never> {
    const records: Array<ChannelRecord> = []
    const duplicates: Array<number> = []
    const here = new Set<string>()
    for (let i = 0; i < messages.length; i++) {
      const { id, key, body } = messages[i] as NewMessage
      const before = this.#published.get(id)
      if (here.has(id) || (before !== undefined && atMillis - before < this.#settings.topicDedupeMillis)) {
        duplicates.push(i)
        continue
      }
      here.add(id)
      records.push({ key, atMillis, head: JSON.stringify(["m", id]), body })
    }
    return { records, answer: Result.succeed({ duplicates }) }
  }

  /** The subscriber's position, which from now on it has. */
  subscriber(name: string, from: MessagePosition, atMillis: number): Decision<MessagePosition, Overloaded> {
    const known = this.#subscribers.get(name)
    const position = known?.position ?? from
    if (known === undefined && this.#subscribers.size >= this.#settings.topicSubscribersMax) {
      this.#forgetOld(atMillis)
      if (this.#subscribers.size >= this.#settings.topicSubscribersMax) {
        const error = new Overloaded({ bound: "topicSubscribersMax", retryAfterMillis: 60_000 })
        return { records: [], answer: Result.fail(error) }
      }
    }
    return { records: [positionRecord(name, position, atMillis)], answer: Result.succeed(position) }
  }

  acknowledge(name: string, position: MessagePosition, atMillis: number): Decision<void, Overloaded> {
    const known = this.#subscribers.get(name)
    if (known !== undefined && !isBefore(known.position, position))
      return { records: [], answer: Result.succeed(undefined) }
    const { answer, records } = this.subscriber(name, position, atMillis)
    if (Result.isFailure(answer)) return { records, answer: Result.fail(answer.failure) }
    return { records: [positionRecord(name, position, atMillis)], answer: Result.succeed(undefined) }
  }

  forget(name: string, atMillis: number): Decision<void, never> {
    const records = this.#subscribers.has(name) ? [{ key: name, atMillis, head: '["forget"]', body: "" }] : []
    return { records, answer: Result.succeed(undefined) }
  }

  /** Messages of the window after a position; `undefined` where it does not reach back that far. */
  newest(after: MessagePosition, limit: number): ReadonlyArray<Message> | undefined {
    if (isBefore(after, this.#windowAfter)) return undefined
    let low = 0
    let high = this.#window.length
    while (low < high) {
      const middle = (low + high) >>> 1
      if (isBefore(after, this.#window[middle] as Message)) high = middle
      else low = middle + 1
    }
    return this.#window.slice(low, low + limit)
  }

  #remember(id: string, atMillis: number): void {
    const { topicDedupeMax, topicDedupeMillis } = this.#settings
    this.#published.delete(id)
    this.#published.set(id, atMillis)
    for (const [oldest, at] of this.#published) {
      if (this.#published.size <= topicDedupeMax && atMillis - at < topicDedupeMillis) return
      this.#published.delete(oldest)
    }
  }

  #forgetOld(nowMillis: number): void {
    for (const [name, { atMillis }] of this.#subscribers) {
      if (nowMillis - atMillis >= this.#settings.topicSubscriberMillis) this.#subscribers.delete(name)
    }
  }

  /** Bytes of the messages in memory. */
  get windowBytes(): number {
    return this.#windowBytes
  }

  /** Gives up about so many bytes of the oldest messages in memory; they are read from the log from now on. */
  shrinkWindow(bytes: number): void {
    this.#keep(Math.max(0, this.#windowBytes - bytes), 0)
  }

  /** Half of it goes at once. */
  #trim(): void {
    const { topicWindowBytes } = this.#settings
    if (this.#windowBytes > topicWindowBytes) this.#keep(topicWindowBytes / 2, 1)
  }

  /** Gives up the oldest messages until no more bytes are left, or no more messages. */
  #keep(bytesMax: number, messagesMin: number): void {
    let bytes = this.#windowBytes
    let count = 0
    while (count < this.#window.length - messagesMin && bytes > bytesMax) {
      bytes -= sizeOf(this.#window[count] as Message)
      count += 1
    }
    const last = this.#window[count - 1]
    if (last === undefined) return
    this.#window.splice(0, count)
    this.#windowBytes = bytes
    this.#windowAfter = { seq: last.seq, index: last.index }
  }
}

/** The messages of a log object. */
export const messagesOf = (seq: number, bytes: Uint8Array): ReadonlyArray<Message> => {
  const messages: Array<Message> = []
  decodeRecords(bytes).forEach((record, index) => {
    if (!record.head.startsWith('["m"')) return
    const [, id] = JSON.parse(record.head) as ["m", string]
    messages.push(messageOf(record, id, seq, index))
  })
  return messages
}

const messageOf = ({ key, body, atMillis }: ChannelRecord, id: string, seq: number, index: number): Message => ({
  seq,
  index,
  key,
  id,
  body,
  atMillis
})

const sizeOf = ({ key, id, body }: Message): number => 128 + key.length + id.length + body.length

const positionRecord = (name: string, { seq, index }: MessagePosition, atMillis: number): ChannelRecord => ({
  key: name,
  atMillis,
  head: JSON.stringify(["p", seq, index] satisfies Head),
  body: ""
})

const captured = function* (
  published: ReadonlyArray<readonly [string, number]>,
  subscribers: ReadonlyArray<readonly [string, Subscriber]>
): Generator<ChannelRecord> {
  for (const [id, atMillis] of published) yield { key: id, atMillis, head: '["i"]', body: "" }
  for (const [name, { position, atMillis }] of subscribers) yield positionRecord(name, position, atMillis)
}
