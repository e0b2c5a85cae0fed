/**
 * The `TopicCatalog` entity: the one writer of the object that lists the topics. Every change is a conditional replace of that
 * object. A deletion is first recorded (`removing`), then the channels are told to remove themselves, then it is forgotten.
 */
import { randomBytes } from "node:crypto"
import { Duration, Effect, Semaphore } from "effect"
import { Settings } from "../config.ts"
import { AgentChannel, channelId, queueChannel, TaskQueue } from "../protocol/AgentChannel.ts"
import { Overloaded, StorageUnavailable, TopicConflict, TopicNotFound } from "../protocol/Errors.ts"
import { topicsMax } from "../protocol/Limits.ts"
import { shownName } from "../protocol/Tenant.ts"
import { builtInTopics, type Topic, type TopicRequest } from "../protocol/Topic.ts"
import { TopicCatalog } from "../protocol/TopicCatalog.ts"
import { Calls } from "../shards/Calls.ts"
import { ObjectStore } from "../tiers/ObjectStore.ts"
import * as SharedObject from "../tiers/SharedObject.ts"
import { type TopicList, TopicListText, topicsFormat, topicsKey } from "../tiers/TopicsObject.ts"

export const layer = TopicCatalog.toLayer(
  Effect.gen(function* () {
    const settings = yield* Settings
    const store = yield* ObjectStore
    const channels = yield* AgentChannel.client
    const queues = yield* TaskQueue.client
    const calls = yield* Calls
    const scope = yield* Effect.scope
    const gate = yield* Semaphore.make(1)
    const { read, write } = SharedObject.make<TopicList>(store, {
      key: topicsKey,
      codec: TopicListText,
      empty: { format: topicsFormat, topics: [], removing: [] },
      name: "The list of topics",
      onRead: ({ removing }) =>
        removing.length === 0 ? Effect.void : Effect.asVoid(Effect.forkIn(gate.withPermit(finishRemovals), scope))
    })

    const finishRemovals: Effect.Effect<void, StorageUnavailable> = Effect.gen(function* () {
      const { value: list } = yield* read
      for (const topic of list.removing) {
        const { name, uid } = topic
        yield* Effect.forEach(
          Array.from({ length: topic.channels }, (_, channel) => channel),
          (channel) => {
            const id = channelId({ topic: name, uid, channel })
            return calls.to({ group: "default", id }, channels(id).Remove(), notRemoved)
          },
          { concurrency: 4, discard: true }
        ).pipe(Effect.mapError(notRemoved))
        const id = channelId({ topic: name, uid, channel: queueChannel })
        yield* Effect.mapError(calls.to({ group: "default", id }, queues(id).Remove(), notRemoved), notRemoved)
        const now = yield* read
        yield* write({ ...now.value, removing: now.value.removing.filter((one) => one.uid !== uid) }, now.etag)
      }
    })

    const create = Effect.fn("TopicCatalog.create")(function* (name: string, request: TopicRequest) {
      const { etag, value: list } = yield* read
      const there = list.topics.find((topic) => topic.name === name)
      if (there !== undefined) {
        const conflict = conflictOf(there, request)
        if (conflict !== undefined) return yield* conflict
        return { topic: there, created: false }
      }
      if (list.topics.length >= topicsMax)
        return yield* new Overloaded({ bound: "topicsMax", retryAfterMillis: 60_000 })
      const builtIn = builtInTopics.get(shownName(name))
      const topic: Topic = {
        name,
        uid: randomBytes(8).toString("hex"),
        retention_ms: builtIn?.retention_ms ?? request.retention_ms ?? settings.topicRetentionMillis,
        channels: request.channels ?? settings.topicChannels,
        lease_ms: request.lease_ms ?? settings.taskLeaseMillis,
        attempts_max: request.attempts_max ?? settings.taskAttemptsMax,
        created_ms: Date.now()
      }
      const conflict = conflictOf(topic, request)
      if (conflict !== undefined) return yield* conflict
      yield* write({ ...list, topics: [...list.topics, topic] }, etag)
      return { topic, created: true }
    })

    const find = (name: string) =>
      Effect.map(read, ({ value: list }) => list.topics.find((topic) => topic.name === name))

    const findOrMake = Effect.fnUntraced(function* (name: string) {
      const found = yield* find(name)
      if (found !== undefined) return found
      if (!builtInTopics.has(shownName(name))) return yield* new TopicNotFound({ topic: shownName(name) })
      return yield* gate.withPermit(create(name, {})).pipe(
        Effect.map(({ topic }) => topic),
        Effect.catchTag("TopicConflict", (error) => Effect.die(error))
      )
    })

    const remove = Effect.fn("TopicCatalog.remove")(function* (name: string) {
      const topic = yield* find(name)
      if (topic === undefined) return yield* new TopicNotFound({ topic: shownName(name) })
      const { etag, value: list } = yield* read
      const topics = list.topics.filter((one) => one.uid !== topic.uid)
      yield* write({ ...list, topics, removing: [...list.removing, topic] }, etag)
      yield* finishRemovals
    })

    return TopicCatalog.of({
      Create: ({ payload }) => gate.withPermit(create(payload.name, payload.request)),
      Read: ({ payload }) => findOrMake(payload.name),
      List: () => Effect.map(read, ({ value: list }) => list.topics),
      Delete: ({ payload }) => gate.withPermit(remove(payload.name))
    })
  }),
  { concurrency: "unbounded", disableFatalDefects: true, maxIdleTime: Duration.infinity }
)

const notRemoved = () =>
  new StorageUnavailable({ detail: "A channel could not be removed; it will be.", retryAfterMillis: 1_000 })

/** What of a request contradicts the topic that is there; what it leaves out contradicts nothing. */
const conflictOf = (there: Topic, request: TopicRequest): TopicConflict | undefined => {
  for (const field of ["retention_ms", "channels", "lease_ms", "attempts_max"] as const) {
    const got = request[field]
    if (got !== undefined && got !== there[field]) {
      return new TopicConflict({
        topic: shownName(there.name),
        field,
        expected: String(there[field]),
        got: String(got)
      })
    }
  }
  return undefined
}
