/**
 * The `AgentChannel` entity: owner of one channel of a topic, an ordered log of messages on the machinery of partitions' logs
 * (`ChannelLog.ts`). A message is acknowledged when it is durable in the cold tier, and handed out not before.
 */
import { Clock, Deferred, Duration, Effect, Layer, Stream } from "effect"
import { Entity } from "effect/cluster"
import { Settings } from "../config.ts"
import {
  AgentChannel,
  type ChannelError,
  channelAddressOf,
  type Message,
  type MessagePage,
  type MessagePosition
} from "../protocol/AgentChannel.ts"
import { Overloaded, StorageUnavailable, TopicUnavailable } from "../protocol/Errors.ts"
import { endOfObject, isBefore } from "../protocol/IndexPartition.ts"
import { shownName } from "../protocol/Tenant.ts"
import { TopicCatalog } from "../protocol/TopicCatalog.ts"
import { MemoryBudget } from "../tiers/MemoryBudget.ts"
import { channelPrefix } from "../tiers/TopicsObject.ts"
import * as ChannelLog from "./ChannelLog.ts"
import * as ChannelOwner from "./ChannelOwner.ts"
import { MessageChannel, messagesOf } from "./MessageChannel.ts"

export const layer = Layer.unwrap(
  Effect.map(Settings, (settings) =>
    AgentChannel.toLayer(makeChannel, {
      concurrency: "unbounded",
      disableFatalDefects: true,
      mailboxCapacity: 65_536,
      maxIdleTime: Duration.millis(settings.topicIdleMillis)
    })
  )
)

interface Resident {
  readonly channel: ChannelLog.ChannelLog
  readonly machine: MessageChannel
  readonly retentionMillis: number
  /** Done when there is more than there was. */
  readonly news: () => Deferred.Deferred<void>
}

const makeChannel = Effect.gen(function* () {
  const { entityId } = yield* Entity.CurrentAddress
  const { channel, topic, uid } = channelAddressOf(entityId)
  const settings = yield* Settings
  const budget = yield* MemoryBudget
  const prefix = channelPrefix(uid, channel)
  const name = shownName(topic)
  let waiting = 0

  const open = (of: { readonly retention_ms: number }, onLost: (detail: string) => void) =>
    Effect.gen(function* () {
      const machine = new MessageChannel(settings)
      let news = Deferred.makeUnsafe<void>()
      machine.onNews(() => {
        const before = news
        news = Deferred.makeUnsafe()
        Deferred.doneUnsafe(before, Effect.void)
      })
      const retainMillis = of.retention_ms
      const opened = yield* ChannelLog.open({ prefix, settings, machine, retainMillis, onLost })
      // What is in memory of it is read from the log where there is no room.
      yield* budget.joinCache({ bytes: () => machine.windowBytes, shrink: (bytes) => machine.shrinkWindow(bytes) })
      return { channel: opened, machine, retentionMillis: retainMillis, news: () => news } satisfies Resident
    })

  const owner = yield* ChannelOwner.make<Resident>({
    prefix,
    topic,
    uid,
    activationMillis: settings.activationDeadlineMillis,
    topics: yield* TopicCatalog.client,
    open
  })

  const pageOf = (messages: ReadonlyArray<Message>, old: number, next: MessagePosition, more: boolean): MessagePage => {
    const kept = messages.filter(({ atMillis }) => atMillis > old)
    return { messages: kept, next, gap: kept.length < messages.length, more }
  }

  /** What follows a position, now. */
  const read = Effect.fnUntraced(function* (of: Resident, asked: MessagePosition, limit: number) {
    const { log } = of.channel
    const old = (yield* Clock.currentTimeMillis) - of.retentionMillis
    const newest: MessagePosition = { seq: log.lastSeq(), index: endOfObject }
    const recent = of.machine.newest(asked, limit)
    if (recent !== undefined) {
      const last = recent.at(-1)
      return pageOf(
        recent,
        old,
        last === undefined ? asked : { seq: last.seq, index: last.index },
        recent.length === limit
      )
    }
    const oldest: MessagePosition = { seq: log.oldestSeq() - 1, index: endOfObject }
    const isPruned = isBefore(asked, oldest)
    const from = isPruned ? oldest : asked
    const found = yield* log.read(from.index === endOfObject ? from.seq + 1 : Math.max(from.seq, 1)).pipe(
      Stream.map(({ seq, bytes }) => messagesOf(seq, bytes).filter((message) => isBefore(from, message))),
      Stream.flattenIterable,
      Stream.take(limit),
      Stream.runCollect
    )
    const last = found.at(-1)
    const isAll = found.length < limit
    const page = pageOf(
      found,
      old,
      last !== undefined && (!isAll || last.seq > newest.seq) ? { seq: last.seq, index: last.index } : newest,
      !isAll
    )
    return isPruned ? { ...page, gap: true } : page
  })

  const readError = (error: { readonly _tag: string; readonly detail?: string }): ChannelError =>
    error._tag === "StoreFailure" || error._tag === "Compacted"
      ? new StorageUnavailable({ detail: `It could not be read: ${error.detail ?? error._tag}`, retryAfterMillis: 200 })
      : new TopicUnavailable({ topic: name, detail: `It is damaged: ${error.detail ?? ""}`, retryAfterMillis: 10_000 })

  /** What follows a position, as soon as there is something. */
  const awaited = Effect.fnUntraced(function* (
    of: Resident,
    asked: MessagePosition,
    limit: number,
    waitMillis: number
  ): Effect.fn.Return<MessagePage, ChannelError> {
    const until = performance.now() + waitMillis
    for (;;) {
      const news = of.news()
      const page = yield* Effect.mapError(read(of, asked, limit), readError)
      const left = until - performance.now()
      if (page.messages.length > 0 || page.gap || left <= 0) return page
      if (waiting >= settings.topicWaitersMax) {
        return yield* new Overloaded({ bound: "topicWaitersMax", retryAfterMillis: 1_000 })
      }
      waiting += 1
      yield* Effect.ensuring(
        Effect.timeoutOption(Deferred.await(news), left),
        Effect.sync(() => {
          waiting -= 1
        })
      )
    }
  })

  const positionOf = ({ channel: { log } }: Resident, of: "newest" | "oldest"): MessagePosition => ({
    seq: of === "newest" ? log.lastSeq() : log.oldestSeq() - 1,
    index: endOfObject
  })

  return AgentChannel.of({
    Publish: ({ payload: { messages } }) =>
      owner.use(({ channel, machine }) => {
        let bytes = 0
        for (const { body, id, key } of messages) bytes += 128 + body.length + id.length + key.length
        return channel.submit(bytes, (now) => machine.publish(messages, now))
      }),
    Read: ({ payload: { limit, waitMillis, ...asked } }) => owner.use((of) => awaited(of, asked, limit, waitMillis)),
    Position: ({ payload }) => owner.use((of) => Effect.succeed(positionOf(of, payload.of))),
    Subscriber: ({ payload }) =>
      owner.use((of) =>
        of.channel.submit(recordBytes, (now) => of.machine.subscriber(payload.name, positionOf(of, payload.from), now))
      ),
    Acknowledge: ({ payload: { name: subscriber, ...position } }) =>
      owner.use(({ channel, machine }) => {
        const { log } = channel
        const last: MessagePosition = { seq: log.lastSeq(), index: endOfObject }
        const upTo = isBefore(last, position) ? last : position
        return channel.submit(recordBytes, (now) => machine.acknowledge(subscriber, upTo, now))
      }),
    Forget: ({ payload }) =>
      owner.use(({ channel, machine }) => channel.submit(recordBytes, (now) => machine.forget(payload.name, now))),
    Remove: () => owner.remove
  })
})

/** What a command without a message counts in the queue. */
const recordBytes = 256
