/**
 * Topics, as agents know them: messages that are published to who listens, and tasks that are handed to who takes them.
 * A topic has a number of channels, each an ordered log of messages (those of one key are all in one), and one queue of tasks.
 * Requests here are the same on every wire; values of messages and tasks are JSON.
 */
import { Schema } from "effect"
import { ClientId, CollectionName, integer, Json } from "./Fields.ts"
import * as Limits from "./Limits.ts"
import { Cursor, SlowPolicy } from "./Subscription.ts"

export const TopicName = CollectionName

/** A topic of every tenant, made when it is first used. */
interface BuiltInTopic {
  readonly retention_ms: number
}

const hourMillis = 3_600_000

export const builtInTopics: ReadonlyMap<string, BuiltInTopic> = new Map([
  ["agent-coordination", { retention_ms: 7 * 24 * hourMillis }],
  ["task-distribution", { retention_ms: 24 * hourMillis }],
  ["vector-updates", { retention_ms: hourMillis }]
])

export const RetentionMillis = integer(1_000, Limits.retentionMillisMax)
export const Channels = integer(1, Limits.channelsMax)
export const LeaseMillis = integer(10, Limits.leaseMillisMax)
export const AttemptsMax = integer(1, 1_000)
export const Priority = integer(-Limits.priorityMax, Limits.priorityMax)
export const DelayMillis = integer(0, Limits.retentionMillisMax)
export const WaitMillis = integer(0, Limits.deadlineMillisMax)
export const TakeMax = integer(1, Limits.takeTasksMax)
export const Token = integer(1, Number.MAX_SAFE_INTEGER)

/** What is left out takes the server's defaults. */
export const TopicRequest = Schema.Struct({
  /** How long messages are kept, and tasks: one that nobody has done by then is a dead letter, one that is done is forgotten. */
  retention_ms: Schema.optionalKey(RetentionMillis),
  /** Logs that its messages are spread over, by key. */
  channels: Schema.optionalKey(Channels),
  /** Of a task that is taken with none named. */
  lease_ms: Schema.optionalKey(LeaseMillis),
  /** Times that a task is handed out before it is a dead letter. */
  attempts_max: Schema.optionalKey(AttemptsMax)
}).annotate({ identifier: "TopicRequest" })
export type TopicRequest = typeof TopicRequest.Type

export const Topic = Schema.Struct({
  name: Schema.String,
  uid: Schema.String,
  retention_ms: Schema.Int,
  channels: Schema.Int,
  lease_ms: Schema.Int,
  attempts_max: Schema.Int,
  created_ms: Schema.Int
}).annotate({ identifier: "Topic" })
export type Topic = typeof Topic.Type

const topic = { topic: TopicName }
const taken = { ...topic, task_id: ClientId, token: Token }
const bounded = <A>(of: Schema.Codec<A>, max: number, what: string) =>
  Schema.Array(of).check(
    Schema.makeFilter((items: ReadonlyArray<unknown>) => items.length > 0 && items.length <= max, {
      expected: `1 to ${max} ${what}`
    })
  )
const Value = Json(Limits.messageBytesMax)
const Text = (max: number) =>
  Schema.String.check(
    Schema.makeFilter((text: string) => text.length <= max, { expected: `at most ${max} characters` })
  )

export const TaskState = Schema.Literals(["waiting", "leased", "done", "dead"])
export type TaskState = typeof TaskState.Type

/** What can be asked of a topic. The names are those of WebSocket frames, and of the last part of the path of a `POST`. */
export const requests = {
  /** Messages of one key stay in order. `id`: published once, however often it is sent. */
  publish: Schema.Struct({
    ...topic,
    messages: bounded(
      Schema.Struct({
        key: Schema.optionalKey(ClientId),
        id: Schema.optionalKey(ClientId),
        message: Value
      }),
      Limits.publishMessagesMax,
      "messages"
    )
  }),
  /** The subscriber has dealt with the message that came with the cursor, and with all before it. */
  acknowledge: Schema.Struct({ ...topic, subscriber: ClientId, cursor: Cursor }),
  /** The subscriber's position is forgotten. */
  forget: Schema.Struct({ ...topic, subscriber: ClientId }),
  /** `id`: enqueued once, however often it is sent. Greater priorities first; those of one in the order they came in. */
  enqueue: Schema.Struct({
    ...topic,
    tasks: bounded(
      Schema.Struct({
        id: Schema.optionalKey(ClientId),
        task: Value,
        priority: Schema.optionalKey(Priority),
        delay_ms: Schema.optionalKey(DelayMillis)
      }),
      Limits.publishMessagesMax,
      "tasks"
    )
  }),
  /**
   * Tasks, each with a lease of its own; waits `wait_ms` for one. Asked again with the same `take_id`, the same tasks are
   * given as long as they are still leased by it.
   */
  take: Schema.Struct({
    ...topic,
    agent: Schema.optionalKey(ClientId),
    take_id: Schema.optionalKey(ClientId),
    max: Schema.optionalKey(TakeMax),
    lease_ms: Schema.optionalKey(LeaseMillis),
    wait_ms: Schema.optionalKey(WaitMillis)
  }),
  /** The lease runs for as long again from now. */
  extend: Schema.Struct({ ...taken, lease_ms: Schema.optionalKey(LeaseMillis) }),
  complete: Schema.Struct({ ...taken, result: Schema.optionalKey(Json(Limits.metadataBytesMax)) }),
  /** Handed out again after `delay_ms`, or a dead letter; `release`: given back untried, which counts as no attempt. */
  fail: Schema.Struct({
    ...taken,
    error: Schema.optionalKey(Text(Limits.taskErrorCharsMax)),
    delay_ms: Schema.optionalKey(DelayMillis),
    release: Schema.optionalKey(Schema.Boolean)
  }),
  /** Dead letters are handed out again, as if for the first time: those named, or all. */
  redrive: Schema.Struct({
    ...topic,
    task_ids: Schema.optionalKey(bounded(ClientId, Limits.publishMessagesMax, "task_ids"))
  }),
  /** Tasks that wait, are leased or dead are taken away. */
  cancel: Schema.Struct({ ...topic, task_ids: bounded(ClientId, Limits.publishMessagesMax, "task_ids") }),
  task: Schema.Struct({ ...topic, task_id: ClientId }),
  /** By the time they came in; `after` the id of one. */
  tasks: Schema.Struct({
    ...topic,
    state: Schema.optionalKey(TaskState),
    after: Schema.optionalKey(ClientId),
    limit: Schema.optionalKey(integer(1, Limits.publishMessagesMax))
  }),
  create: Schema.Struct({ ...topic, ...TopicRequest.fields }),
  describe: Schema.Struct(topic),
  list: Schema.Struct({}),
  delete: Schema.Struct(topic)
} as const
export type TopicOperation = keyof typeof requests
export type TopicRequests = { readonly [Operation in TopicOperation]: (typeof requests)[Operation]["Type"] }

/** With which message to begin where there is no cursor, and no position of the subscriber: the next one, or the oldest. */
export const ListenFrom = Schema.Literals(["newest", "oldest"])

const listening = {
  ...topic,
  from: Schema.optionalKey(ListenFrom),
  /** Goes on after what this subscriber has acknowledged. */
  subscriber: Schema.optionalKey(ClientId),
  policy: Schema.optionalKey(SlowPolicy),
  cursor: Schema.optionalKey(Cursor)
}
export const ListenRequest = Schema.Struct(listening)
export type ListenRequest = typeof ListenRequest.Type

export const ListenFrame = Schema.Struct({
  type: Schema.Literal("listen"),
  id: ClientId,
  session: Schema.optionalKey(ClientId),
  ...listening
})

const Any = Schema.Json

/** Of Server-Sent Events the cursor is the event's id, and not in its data. */
const withCursor = { cursor: Schema.optionalKey(Schema.String) }

/**
 * One event of a topic that is listened to. First `listening`: messages after its cursor follow. `gap`: messages before its
 * cursor are past their retention and were not sent.
 */
export const ListenEvent = Schema.Union([
  Schema.Struct({ event: Schema.Literals(["listening", "gap"]), ...withCursor }),
  Schema.Struct({
    event: Schema.Literal("message"),
    key: Schema.String,
    message_id: Schema.String,
    message: Any,
    at_ms: Schema.Int,
    ...withCursor
  })
]).annotate({ identifier: "ListenEvent" })
export type ListenEvent = typeof ListenEvent.Type

export const TakenTask = Schema.Struct({
  task_id: Schema.String,
  /** Of this lease alone: what is done with an older one is refused. */
  token: Schema.Int,
  task: Any,
  priority: Schema.Int,
  /** 1 where it is handed out for the first time. */
  attempt: Schema.Int,
  lease_ms: Schema.Int,
  enqueued_ms: Schema.Int
}).annotate({ identifier: "TakenTask" })

export const TaskInfo = Schema.Struct({
  task_id: Schema.String,
  state: TaskState,
  task: Schema.optionalKey(Any),
  priority: Schema.Int,
  attempts: Schema.Int,
  enqueued_ms: Schema.Int,
  /** Who has it. */
  agent: Schema.optionalKey(Schema.String),
  error: Schema.optionalKey(Schema.String),
  result: Schema.optionalKey(Any)
}).annotate({ identifier: "TaskInfo" })

/** What each answers. */
export const answers = {
  publish: Schema.Struct({ published: Schema.Int, duplicates: Schema.Int }),
  acknowledge: Schema.Struct({}),
  forget: Schema.Struct({}),
  enqueue: Schema.Struct({ task_ids: Schema.Array(Schema.String), duplicates: Schema.Int }),
  take: Schema.Struct({ tasks: Schema.Array(TakenTask) }),
  extend: Schema.Struct({ lease_ms: Schema.Int }),
  complete: Schema.Struct({}),
  fail: Schema.Struct({ state: TaskState }),
  redrive: Schema.Struct({ redriven: Schema.Int }),
  cancel: Schema.Struct({ cancelled: Schema.Int }),
  task: TaskInfo,
  tasks: Schema.Struct({ tasks: Schema.Array(TaskInfo) }),
  create: Topic,
  describe: Schema.Struct({
    ...Topic.fields,
    tasks: Schema.Struct({ waiting: Schema.Int, leased: Schema.Int, done: Schema.Int, dead: Schema.Int })
  }),
  list: Schema.Struct({ topics: Schema.Array(Topic) }),
  delete: Schema.Struct({})
} as const

/** The same as types; who creates a topic is also told whether it was there already. */
export type TopicAnswers = {
  readonly [Operation in TopicOperation]: (typeof answers)[Operation]["Type"] &
    (Operation extends "create" ? { readonly created: boolean } : unknown)
}
