/**
 * The `TopicCatalog` entity: the one writer of the object that lists the topics. Every change is a conditional replace of that
 * object. A deletion is first recorded (`removing`), then the channels are told to remove themselves, then it is forgotten.
 */
import { randomBytes } from "node:crypto"
import { Duration, Effect, Schema, Semaphore } from "effect"
import { Settings } from "../config.ts"
import { AgentChannel, channelId, queueChannel, TaskQueue } from "../protocol/AgentChannel.ts"
import { Overloaded, StorageUnavailable, TopicConflict, TopicNotFound } from "../protocol/Errors.ts"
import { topicsMax } from "../protocol/Limits.ts"
import { shownName } from "../protocol/Tenant.ts"
import { builtInTopics, type Topic, type TopicRequest } from "../protocol/Topic.ts"
import { TopicCatalog } from "../protocol/TopicCatalog.ts"
import { ObjectStore, type StoreFailure } from "../tiers/ObjectStore.ts"
import { type TopicList, TopicListText, topicsFormat, topicsKey } from "../tiers/TopicsObject.ts"

export const layer = TopicCatalog.toLayer(
  Effect.gen(function* () {
    const settings = yield* Settings
    const store = yield* ObjectStore
    const channels = yield* AgentChannel.client
    const queues = yield* TaskQueue.client
    const scope = yield* Effect.scope
    const gate = yield* Semaphore.make(1)
    let current: { readonly list: TopicList; readonly etag: string | undefined } | undefined

    const storageError = (failure: StoreFailure) =>
      new StorageUnavailable({ detail: `The list of topics: ${failure.detail}`, retryAfterMillis: 1_000 })

    const read = Effect.gen(function* () {
      if (current !== undefined) return current
      const object = yield* store.get(topicsKey).pipe(
        Effect.catchTag("ObjectMissing", () => Effect.undefined),
        Effect.mapError(storageError)
      )
      if (object === undefined) {
        current = { list: { format: topicsFormat, topics: [], removing: [] }, etag: undefined }
        return current
      }
      const list = yield* Schema.decodeUnknownEffect(TopicListText)(Buffer.from(object.body).toString("utf8")).pipe(
        Effect.mapError(
          (error) =>
            new StorageUnavailable({
              detail: `The list of topics cannot be read: ${error.message}`,
              retryAfterMillis: 10_000
            })
        )
      )
      current = { list, etag: object.etag }
      if (list.removing.length > 0) yield* Effect.forkIn(gate.withPermit(finishRemovals), scope)
      return current
    })

    /** Writes a changed list; on any doubt about what is stored, what is in memory is forgotten and read anew. */
    const write = (list: TopicList, etag: string | undefined) =>
      Effect.gen(function* () {
        const body = Buffer.from(yield* Effect.orDie(Schema.encodeEffect(TopicListText)(list)))
        const stored = etag === undefined ? store.create(topicsKey, body) : store.replace(topicsKey, body, etag)
        current = { list, etag: yield* stored }
      }).pipe(
        Effect.tapError(() => Effect.sync(() => (current = undefined))),
        Effect.mapError((error) =>
          error._tag === "StoreFailure"
            ? storageError(error)
            : new StorageUnavailable({
                detail: "The list of topics was changed by another node.",
                retryAfterMillis: 100
              })
        )
      )

    const finishRemovals: Effect.Effect<void, StorageUnavailable> = Effect.gen(function* () {
      const { list } = yield* read
      for (const topic of list.removing) {
        const { name, uid } = topic
        yield* Effect.forEach(
          Array.from({ length: topic.channels }, (_, channel) => channel),
          (channel) => channels(channelId({ topic: name, uid, channel })).Remove(),
          { concurrency: 4, discard: true }
        ).pipe(
          Effect.andThen(queues(channelId({ topic: name, uid, channel: queueChannel })).Remove()),
          Effect.mapError(
            () =>
              new StorageUnavailable({
                detail: "A channel could not be removed; it will be.",
                retryAfterMillis: 1_000
              })
          )
        )
        const now = yield* read
        yield* write({ ...now.list, removing: now.list.removing.filter((one) => one.uid !== uid) }, now.etag)
      }
    })

    const create = Effect.fn("TopicCatalog.create")(function* (name: string, request: TopicRequest) {
      const { etag, list } = yield* read
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

    const find = (name: string) => Effect.map(read, ({ list }) => list.topics.find((topic) => topic.name === name))

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
      const { etag, list } = yield* read
      const topics = list.topics.filter((one) => one.uid !== topic.uid)
      yield* write({ ...list, topics, removing: [...list.removing, topic] }, etag)
      yield* finishRemovals
    })

    return TopicCatalog.of({
      Create: ({ payload }) => gate.withPermit(create(payload.name, payload.request)),
      Read: ({ payload }) => findOrMake(payload.name),
      List: () => Effect.map(read, ({ list }) => list.topics),
      Delete: ({ payload }) => gate.withPermit(remove(payload.name))
    })
  }),
  { concurrency: "unbounded", disableFatalDefects: true, maxIdleTime: Duration.infinity }
)

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
