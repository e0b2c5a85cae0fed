/**
 * Who listens to topics on this node. The newest messages of a channel are read once for all who listen to it, by calls that
 * wait for news; each has a position, and none a fiber. One that is behind those reads pages of its own until it has caught
 * up. Every call says where to read on, so a channel's owner may change at any time.
 */
import { Context, Effect, Exit, type Fiber, Layer, Semaphore } from "effect"
import { Settings } from "../config.ts"
import type { Message, MessagePage, MessagePosition } from "../protocol/AgentChannel.ts"
import type { ApiError } from "../protocol/Errors.ts"
import { isBefore } from "../protocol/IndexPartition.ts"
import type { Topic } from "../protocol/Topic.ts"
import { TopicRouter } from "./TopicRouter.ts"

export type Heard =
  | { readonly kind: "message"; readonly message: Message; readonly positions: ReadonlyArray<MessagePosition> }
  /** Messages after where the listener was are past their retention; it goes on with the oldest that are kept. */
  | { readonly kind: "gap"; readonly positions: ReadonlyArray<MessagePosition> }

export interface TopicFollower {
  /** By channel. */
  readonly positions: () => ReadonlyArray<MessagePosition>
  /** What comes next, where it is at hand. `undefined`: there is none now, and `onReady` is called when there may be. */
  readonly next: () => Heard | undefined
  readonly close: () => void
}

/** Called synchronously; must not throw. */
export interface TopicListener {
  readonly onReady: () => void
  /** The topic is gone. */
  readonly onLost: (error: ApiError) => void
}

/** Messages read by one call. */
const pageMax = 256
/** Before a read that failed is tried again. */
const retryMillis = 250

export class TopicFeeds extends Context.Service<
  TopicFeeds,
  {
    /** `fromOldest`: what is before the first message that is kept was not missed. */
    readonly open: (
      of: Topic,
      from: ReadonlyArray<MessagePosition>,
      fromOldest: boolean,
      listener: TopicListener
    ) => TopicFollower
  }
>()("ruvector/shards/TopicFeeds") {
  static readonly layer = Layer.effect(
    TopicFeeds,
    Effect.gen(function* () {
      const settings = yield* Settings
      const router = yield* TopicRouter
      const reads = yield* Semaphore.make(settings.topicReadsMax)
      const run = Effect.runForkWith(yield* Effect.context<never>())
      const tails = new Map<string, Tail>()
      const hub: Hub = {
        tailMax: settings.topicTailMessages,
        read: (of, channel, after, waitMillis) =>
          router.channel(of, channel, (client) => client.Read({ ...after, limit: pageMax, waitMillis })),
        behind: (effect) => reads.withPermit(effect),
        pollMillis: settings.topicPollMillis,
        run,
        forget: (of) => router.forget(of),
        tail: (of, channel, after) => {
          const key = `${of.uid}/${channel}`
          let tail = tails.get(key)
          if (tail === undefined) {
            tail = new Tail(hub, of, channel, after, () => void tails.delete(key))
            tails.set(key, tail)
          }
          return tail
        }
      }
      yield* Effect.addFinalizer(() =>
        Effect.sync(() => {
          for (const tail of tails.values()) tail.end()
        })
      )
      return TopicFeeds.of({
        open: (of, from, fromOldest, listener) => new Follower(hub, of, from, fromOldest, listener)
      })
    })
  )
}

interface Hub {
  readonly tailMax: number
  readonly pollMillis: number
  readonly read: (
    of: Topic,
    channel: number,
    after: MessagePosition,
    waitMillis: number
  ) => Effect.Effect<MessagePage, ApiError>
  /** One of those that catch up. */
  readonly behind: <A, E>(effect: Effect.Effect<A, E>) => Effect.Effect<A, E>
  readonly run: <A, E>(effect: Effect.Effect<A, E>) => Fiber.Fiber<A, E>
  readonly forget: (of: Topic) => void
  readonly tail: (of: Topic, channel: number, after: MessagePosition) => Tail
}

/** The newest messages of a channel, for as long as somebody listens to it. */
class Tail {
  readonly #hub: Hub
  readonly #of: Topic
  readonly #channel: number
  readonly #onEnd: () => void
  readonly #listeners = new Set<Follower>()
  /** In order; those after `#after` are all here, up to `#upTo`. */
  #messages: Array<Message> = []
  #after: MessagePosition
  #upTo: MessagePosition
  #fiber: Fiber.Fiber<unknown, unknown> | undefined
  #ended = false

  constructor(hub: Hub, of: Topic, channel: number, after: MessagePosition, onEnd: () => void) {
    this.#hub = hub
    this.#of = of
    this.#channel = channel
    this.#after = after
    this.#upTo = after
    this.#onEnd = onEnd
  }

  join(follower: Follower): void {
    this.#listeners.add(follower)
    if (this.#fiber === undefined) this.#read()
  }

  leave(follower: Follower): void {
    this.#listeners.delete(follower)
    if (this.#listeners.size === 0) this.end()
  }

  end(): void {
    if (this.#ended) return
    this.#ended = true
    this.#fiber?.interruptUnsafe()
    this.#onEnd()
  }

  /** Whether what follows a position is here, as far as it is known. */
  reaches(position: MessagePosition): boolean {
    return !isBefore(position, this.#after)
  }

  next(position: MessagePosition): Message | undefined {
    const messages = this.#messages
    let low = 0
    let high = messages.length
    while (low < high) {
      const middle = (low + high) >>> 1
      if (isBefore(position, messages[middle] as Message)) high = middle
      else low = middle + 1
    }
    return messages[low]
  }

  #read(): void {
    if (this.#ended) return
    this.#fiber = this.#hub.run(this.#hub.read(this.#of, this.#channel, this.#upTo, this.#hub.pollMillis))
    this.#fiber.addObserver((exit) => {
      if (this.#ended) return
      if (Exit.isFailure(exit)) {
        const error = Exit.findErrorOption(exit)
        if (error._tag === "Some" && lastErrors.has((error.value as ApiError)._tag)) {
          this.#hub.forget(this.#of)
          for (const follower of [...this.#listeners]) follower.lost(error.value as ApiError)
          return this.end()
        }
        return void setTimeout(() => this.#read(), retryMillis).unref()
      }
      this.#take(exit.value as MessagePage)
      this.#read()
    })
  }

  #take({ gap, messages, next }: MessagePage): void {
    if (isBefore(this.#upTo, next)) this.#upTo = next
    // Who is here has missed nothing that it could not have had: a page of its own will say so to whom has.
    if (gap) {
      this.#messages = []
      this.#after = messages[0] === undefined ? next : { seq: messages[0].seq, index: messages[0].index - 1 }
    }
    if (messages.length === 0 && !gap) return
    this.#messages.push(...messages)
    const excess = this.#messages.length - this.#hub.tailMax
    if (excess > 0) {
      const { index, seq } = this.#messages[excess - 1] as Message
      this.#messages.splice(0, excess)
      this.#after = { seq, index }
    }
    for (const follower of [...this.#listeners]) follower.news()
  }
}

const lastErrors: ReadonlySet<string> = new Set(["TopicNotFound"])

class Follower implements TopicFollower {
  readonly #hub: Hub
  readonly #of: Topic
  readonly #listener: TopicListener
  readonly #tails: ReadonlyArray<Tail>
  #positions: ReadonlyArray<MessagePosition>
  /** By channel, what was read of messages that tails have no more. */
  readonly #pages: Array<Array<Message>>
  readonly #missed: Array<boolean>
  /** By channel: nothing was had of it, and what came before is not missed. */
  readonly #fresh: Array<boolean>
  readonly #reading: Array<Fiber.Fiber<unknown, unknown> | undefined>
  #turn = 0
  #closed = false

  constructor(hub: Hub, of: Topic, from: ReadonlyArray<MessagePosition>, fromOldest: boolean, listener: TopicListener) {
    this.#hub = hub
    this.#of = of
    this.#listener = listener
    this.#positions = from
    this.#pages = from.map(() => [])
    this.#missed = from.map(() => false)
    this.#fresh = from.map(() => fromOldest)
    this.#reading = from.map(() => undefined)
    this.#tails = from.map((position, channel) => hub.tail(of, channel, position))
    for (const tail of this.#tails) tail.join(this)
  }

  readonly positions = (): ReadonlyArray<MessagePosition> => this.#positions

  readonly next = (): Heard | undefined => {
    if (this.#closed) return undefined
    const { length } = this.#positions
    for (let n = 0; n < length; n++) {
      const channel = (this.#turn + n) % length
      const heard = this.#nextOf(channel)
      if (heard === undefined) continue
      this.#turn = channel + 1
      return heard
    }
    return undefined
  }

  readonly close = (): void => {
    if (this.#closed) return
    this.#closed = true
    for (const fiber of this.#reading) fiber?.interruptUnsafe()
    for (const tail of this.#tails) tail.leave(this)
  }

  news(): void {
    if (!this.#closed) this.#listener.onReady()
  }

  lost(error: ApiError): void {
    if (this.#closed) return
    this.close()
    this.#listener.onLost(error)
  }

  #nextOf(channel: number): Heard | undefined {
    if (this.#missed[channel]) {
      this.#missed[channel] = false
      return { kind: "gap", positions: this.#positions }
    }
    const position = this.#positions[channel] as MessagePosition
    const tail = this.#tails[channel] as Tail
    const page = this.#pages[channel] as Array<Message>
    const message = page.shift() ?? (tail.reaches(position) ? tail.next(position) : this.#catchUp(channel))
    if (message === undefined) return undefined
    this.#fresh[channel] = false
    this.#move(channel, { seq: message.seq, index: message.index })
    return { kind: "message", message, positions: this.#positions }
  }

  #move(channel: number, to: MessagePosition): void {
    this.#positions = this.#positions.map((position, n) => (n === channel ? to : position))
  }

  /** Begins to read what the tail has no more. */
  #catchUp(channel: number): undefined {
    if (this.#reading[channel] !== undefined) return
    const fiber = this.#hub.run(
      this.#hub.behind(this.#hub.read(this.#of, channel, this.#positions[channel] as MessagePosition, 0))
    )
    this.#reading[channel] = fiber
    fiber.addObserver((exit) => {
      if (this.#closed) return
      if (Exit.isSuccess(exit)) {
        this.#reading[channel] = undefined
        const { gap, messages, next } = exit.value
        if (gap && !this.#fresh[channel]) this.#missed[channel] = true
        if (messages.length === 0) {
          this.#move(channel, next)
        } else this.#pages[channel] = [...messages]
        return this.#listener.onReady()
      }
      const error = Exit.findErrorOption(exit)
      if (error._tag === "Some" && lastErrors.has(error.value._tag)) return this.lost(error.value)
      setTimeout(() => {
        this.#reading[channel] = undefined
        this.news()
      }, retryMillis).unref()
    })
    return undefined
  }
}
