/**
 * The way from a topic's name to its channels and its queue of tasks, wherever their owners are. Names are those inside
 * (`Tenant.ts`); errors name topics as clients do.
 */
import { Context, Effect, Exit, type Fiber, Layer } from "effect"
import { Settings } from "../config.ts"
import {
  AgentChannel,
  type ChannelError,
  channelId,
  type LeasedTask,
  type NewMessage,
  queueChannel,
  TaskQueue
} from "../protocol/AgentChannel.ts"
import { type ApiError, TopicNotFound, TopicUnavailable } from "../protocol/Errors.ts"
import { shownName } from "../protocol/Tenant.ts"
import type { Topic, TopicRequest } from "../protocol/Topic.ts"
import { TopicCatalog, topicCatalogId } from "../protocol/TopicCatalog.ts"
import { Calls } from "./Calls.ts"
import { type DeliveryError, isDelivery } from "./Delivery.ts"
import { groupByPartition, partitionOf } from "./PartitionMap.ts"

type Channel = ReturnType<Effect.Success<typeof AgentChannel.client>>
type Queue = ReturnType<Effect.Success<typeof TaskQueue.client>>

export interface TakeRequest {
  readonly takeId: string
  readonly agent: string
  readonly max: number
  /** 0: the topic's. */
  readonly leaseMillis: number
  readonly waitMillis: number
}

export class TopicRouter extends Context.Service<
  TopicRouter,
  {
    readonly topic: (name: string) => Effect.Effect<Topic, ApiError>
    readonly topics: Effect.Effect<ReadonlyArray<Topic>, ApiError>
    readonly create: (
      name: string,
      request: TopicRequest
    ) => Effect.Effect<{ readonly topic: Topic; readonly created: boolean }, ApiError>
    readonly remove: (name: string) => Effect.Effect<void, ApiError>
    /** All messages of one key, in the order given; those of different channels not all or nothing. */
    readonly publish: (name: string, messages: ReadonlyArray<NewMessage>) => Effect.Effect<number, ApiError>
    /** With one channel of a topic; once more where what is known of the topic is out of date. */
    readonly channel: <A, E extends { readonly _tag: string }>(
      of: Topic,
      channel: number,
      use: (channel: Channel) => Effect.Effect<A, E>
    ) => Effect.Effect<A, Exclude<E, DeliveryError> | TopicUnavailable>
    readonly queue: <A, E extends { readonly _tag: string }>(
      name: string,
      use: (queue: Queue) => Effect.Effect<A, E>
    ) => Effect.Effect<A, Exclude<E, DeliveryError> | ApiError>
    /** Waits for a task as long as is asked, in calls of at most `topicPollMillis`. */
    readonly take: (name: string, request: TakeRequest) => Effect.Effect<ReadonlyArray<LeasedTask>, ApiError>
    /** What is known of the topic may be out of date. */
    readonly forget: (of: Topic) => void
  }
>()("ruvector/shards/TopicRouter") {
  static readonly layer = Layer.effect(
    TopicRouter,
    Effect.gen(function* () {
      const settings = yield* Settings
      const calls = yield* Calls
      const catalog = (yield* TopicCatalog.client)(topicCatalogId)
      const channels = yield* AgentChannel.client
      const queues = yield* TaskQueue.client
      // Bounded by the list's own bound; those that were deleted are dropped when that is found out.
      const known = new Map<string, Topic>()
      const run = Effect.runForkWith(yield* Effect.context<never>())

      /** Calls that wait for news are answered later than others by as long as they wait. */
      const deadlineMillis = settings.clusterCallMillis + settings.topicPollMillis

      const delivered = <A, E extends { readonly _tag: string }>(
        name: string,
        id: string,
        call: Effect.Effect<A, E>
      ) => {
        const unreached = (detail: string, retryAfterMillis: number) =>
          new TopicUnavailable({ topic: shownName(name), detail, retryAfterMillis })
        const late = () => unreached("It did not answer in time.", 1_000)
        return Effect.mapError(
          calls.to({ group: "default", id }, call, late, deadlineMillis),
          (error): Exclude<E, DeliveryError> | TopicUnavailable => {
            if (!isDelivery(error)) return error as Exclude<E, DeliveryError> | TopicUnavailable
            return error._tag === "MailboxFull"
              ? unreached("Too much waits for it.", 250)
              : unreached("It cannot be reached now.", 1_000)
          }
        )
      }

      const topic = (name: string): Effect.Effect<Topic, ApiError> => {
        const found = known.get(name)
        if (found !== undefined) return Effect.succeed(found)
        return Effect.tap(delivered(name, topicCatalogId, catalog.Read({ name })), (read) =>
          Effect.sync(() => known.set(name, read))
        )
      }

      const forget = (of: Topic): void => {
        if (known.get(of.name)?.uid === of.uid) known.delete(of.name)
      }

      /** Once more with a fresh reading of the topic, where what was known is out of date. */
      const withTopic = <A, E>(name: string, use: (of: Topic) => Effect.Effect<A, E>): Effect.Effect<A, E | ApiError> =>
        Effect.suspend(() => {
          const cached = known.get(name)
          if (cached === undefined) return Effect.flatMap(topic(name), use)
          return Effect.catchIf(
            use(cached) as Effect.Effect<A, E | ApiError>,
            (error) => error instanceof TopicNotFound,
            () => {
              forget(cached)
              return Effect.flatMap(topic(name), use)
            }
          )
        })

      const channel = <A, E extends { readonly _tag: string }>(
        { name, uid }: Topic,
        number: number,
        use: (channel: Channel) => Effect.Effect<A, E>
      ) => {
        const id = channelId({ topic: name, uid, channel: number })
        return delivered(name, id, use(channels(id)))
      }

      const queue = <A, E extends { readonly _tag: string }>(
        name: string,
        use: (queue: Queue) => Effect.Effect<A, E>
      ) =>
        withTopic(name, ({ uid }) => {
          const id = channelId({ topic: name, uid, channel: queueChannel })
          return delivered(name, id, use(queues(id)))
        })

      const publishers = new Map<string, Publisher>()
      const publisherOf = (of: Topic, number: number): Publisher => {
        const key = channelId({ topic: of.name, uid: of.uid, channel: number })
        let publisher = publishers.get(key)
        if (publisher === undefined) {
          const send = (messages: ReadonlyArray<NewMessage>) =>
            channel(of, number, (client) => client.Publish({ messages }))
          publisher = new Publisher(send, run, () => void publishers.delete(key))
          publishers.set(key, publisher)
        }
        return publisher
      }

      const publish = (name: string, messages: ReadonlyArray<NewMessage>) =>
        withTopic(name, (of): Effect.Effect<number, ApiError> => {
          const [only, more] = messages
          // One without a key goes where its id says, so that sent again it meets itself.
          const placeOf = ({ id, key }: NewMessage) => (key === "" ? id : key)
          if (only !== undefined && more === undefined) {
            return publisherOf(of, partitionOf(placeOf(only), of.channels)).publish(messages)
          }
          const groups = groupByPartition(messages, placeOf, of.channels)
          return Effect.map(
            Effect.forEach(groups, ([number, group]) => publisherOf(of, number).publish(group), {
              concurrency: "unbounded"
            }),
            (duplicates) => duplicates.reduce((sum, count) => sum + count, 0)
          )
        })

      const take = (name: string, { waitMillis, ...taking }: TakeRequest) =>
        Effect.suspend(() => {
          const until = performance.now() + waitMillis
          const ask = (left: number): Effect.Effect<ReadonlyArray<LeasedTask>, ApiError> => {
            const wait = Math.max(0, Math.min(left, settings.topicPollMillis))
            const once: Effect.Effect<ReadonlyArray<LeasedTask>, ChannelError | ApiError> = queue(name, (client) =>
              client.Take({ ...taking, waitMillis: Math.round(wait) })
            )
            return Effect.matchEffect(once, {
              onSuccess: (tasks) =>
                tasks.length > 0 || until - performance.now() <= 1
                  ? Effect.succeed(tasks)
                  : ask(until - performance.now()),
              onFailure: (error) => {
                // Its owner closes, or is another by now: what waits waits on there.
                const passes = error._tag === "StorageUnavailable" || error._tag === "TopicUnavailable"
                const left = until - performance.now()
                return passes && left > retryMillis
                  ? Effect.delay(
                      Effect.suspend(() => ask(until - performance.now())),
                      retryMillis
                    )
                  : Effect.fail(error)
              }
            })
          }
          return ask(waitMillis)
        })

      return TopicRouter.of({
        topic,
        topics: Effect.mapError(delivered("", topicCatalogId, catalog.List()), (error) => error as ApiError),
        create: (name, request) =>
          Effect.tap(delivered(name, topicCatalogId, catalog.Create({ name, request })), ({ topic }) =>
            Effect.sync(() => known.set(name, topic))
          ),
        remove: (name) =>
          Effect.ensuring(
            delivered(name, topicCatalogId, catalog.Delete({ name })),
            Effect.sync(() => known.delete(name))
          ),
        publish,
        channel,
        queue,
        take,
        forget
      })
    })
  )
}

/** Messages of one call to a channel, at most, and their bytes. */
const callMessagesMax = 1_000
const callBytesMax = 1_048_576

interface Publishing {
  readonly messages: ReadonlyArray<NewMessage>
  readonly done: (answer: Effect.Effect<number, ChannelError>) => void
}

/** What is published to a channel in one turn of the event loop goes to its owner in one call. */
class Publisher {
  readonly #send: (
    messages: ReadonlyArray<NewMessage>
  ) => Effect.Effect<{ readonly duplicates: ReadonlyArray<number> }, ChannelError>
  readonly #run: <A, E>(effect: Effect.Effect<A, E>) => Fiber.Fiber<A, E>
  readonly #onIdle: () => void
  #gathered: Array<Publishing> = []
  readonly #flush: () => void

  constructor(
    send: (
      messages: ReadonlyArray<NewMessage>
    ) => Effect.Effect<{ readonly duplicates: ReadonlyArray<number> }, ChannelError>,
    run: <A, E>(effect: Effect.Effect<A, E>) => Fiber.Fiber<A, E>,
    onIdle: () => void
  ) {
    this.#send = send
    this.#run = run
    this.#onIdle = onIdle
    this.#flush = () => this.#sendAll()
  }

  /** How many were there already. */
  publish(messages: ReadonlyArray<NewMessage>): Effect.Effect<number, ChannelError> {
    // Not taken back where the caller goes away: it may be under way.
    return Effect.callback((resume) => {
      if (this.#gathered.push({ messages, done: resume }) === 1) setImmediate(this.#flush)
    })
  }

  #sendAll(): void {
    const all = this.#gathered
    this.#gathered = []
    this.#onIdle()
    let part: Array<Publishing> = []
    let messages: Array<NewMessage> = []
    let bytes = 0
    for (const publishing of all) {
      let size = 0
      for (const { body } of publishing.messages) size += body.length
      const isFull = messages.length + publishing.messages.length > callMessagesMax || bytes + size > callBytesMax
      if (part.length > 0 && isFull) {
        this.#sendPart(part, messages)
        part = []
        messages = []
        bytes = 0
      }
      part.push(publishing)
      messages.push(...publishing.messages)
      bytes += size
    }
    this.#sendPart(part, messages)
  }

  #sendPart(part: ReadonlyArray<Publishing>, messages: ReadonlyArray<NewMessage>): void {
    this.#run(this.#send(messages)).addObserver((exit) => {
      if (Exit.isFailure(exit)) {
        const failed = Effect.failCause(exit.cause)
        for (const { done } of part) done(failed)
        return
      }
      const { duplicates } = exit.value
      let first = 0
      let at = 0
      for (const { done, messages } of part) {
        const end = first + messages.length
        let count = 0
        while (at < duplicates.length && (duplicates[at] as number) < end) {
          at += 1
          count += 1
        }
        done(Effect.succeed(count))
        first = end
      }
    })
  }
}

/** Before a call that waits for news is made again. */
const retryMillis = 200
