/**
 * Messages of the entities `AgentChannel`, an ordered log of messages, and `TaskQueue`, the tasks of a topic. An id is
 * `<topic>/<uid>/<channel>`, so that a topic made anew under an old name has other channels.
 *
 * Calls are at least once. What makes that harmless: a message and a task by its id, a taking by its `takeId`, what is done with
 * a lease by its token; positions only go forward.
 */
import { Schema } from "effect"
import { ClusterSchema, Entity } from "effect/cluster"
import { Rpc } from "effect/rpc"
import { LeaseLost, Overloaded, StorageUnavailable, TaskNotFound, TopicNotFound, TopicUnavailable } from "./Errors.ts"
import type { ChangePosition } from "./IndexPartition.ts"
import { ListenFrom, TaskState } from "./Topic.ts"

export interface ChannelAddress {
  readonly topic: string
  readonly uid: string
  readonly channel: number
}

export const channelId = ({ topic, uid, channel }: ChannelAddress): string => `${topic}/${uid}/${channel}`

export const channelAddressOf = (entityId: string): ChannelAddress => {
  const [topic, uid, channel] = entityId.split("/") as [string, string, string]
  return { topic, uid, channel: Number(channel) }
}

/** The number in the id of a topic's queue of tasks. */
export const queueChannel = 0

/** What a channel answers when it cannot do what it is asked, whatever it is. */
export const ChannelError = Schema.Union([TopicNotFound, TopicUnavailable, StorageUnavailable, Overloaded])
export type ChannelError = typeof ChannelError.Type

/** Place of a message: log object, and message within it. */
export type MessagePosition = ChangePosition
const position = { seq: Schema.Int, index: Schema.Int }
const MessagePosition = Schema.Struct(position)

export const Message = Schema.Struct({
  ...position,
  key: Schema.String,
  id: Schema.String,
  /** JSON text. */
  body: Schema.String,
  atMillis: Schema.Number
})
export type Message = typeof Message.Type

export const MessagePage = Schema.Struct({
  messages: Schema.Array(Message),
  /** Where to read on. */
  next: MessagePosition,
  /** Messages after the position that was asked for are past their retention. */
  gap: Schema.Boolean,
  /** There is more at once. */
  more: Schema.Boolean
})
export type MessagePage = typeof MessagePage.Type

export const NewMessage = Schema.Struct({ key: Schema.String, id: Schema.String, body: Schema.String })
export type NewMessage = typeof NewMessage.Type

export const AgentChannel = Entity.make("AgentChannel", [
  /** All or nothing, in the order given; answers which were there already, by their place in what was given. */
  Rpc.make("Publish", {
    payload: { messages: Schema.Array(NewMessage) },
    success: Schema.Struct({ duplicates: Schema.Array(Schema.Int) }),
    error: ChannelError
  }),
  /** What follows a position; waits for it so long, or until the channel moves: who waits asks its next owner. */
  Rpc.make("Read", {
    payload: { ...position, limit: Schema.Int, waitMillis: Schema.Int },
    success: MessagePage,
    error: ChannelError
  }).annotate(ClusterSchema.InterruptOnTermination, true),
  /** Before the oldest message that is kept, or after the newest. */
  Rpc.make("Position", { payload: { of: ListenFrom }, success: MessagePosition, error: ChannelError }),
  /** The subscriber's position; where it has none, from now on the one that is asked for. */
  Rpc.make("Subscriber", {
    payload: { name: Schema.String, from: ListenFrom },
    success: MessagePosition,
    error: ChannelError
  }),
  Rpc.make("Acknowledge", { payload: { name: Schema.String, ...position }, success: Schema.Void, error: ChannelError }),
  Rpc.make("Forget", { payload: { name: Schema.String }, success: Schema.Void, error: ChannelError }),
  /** Deactivates the channel and deletes its objects. Only the TopicCatalog asks this. */
  Rpc.make("Remove", { success: Schema.Void, error: StorageUnavailable })
])

export const NewTask = Schema.Struct({
  id: Schema.String,
  /** JSON text. */
  body: Schema.String,
  priority: Schema.Int,
  delayMillis: Schema.Int
})
export type NewTask = typeof NewTask.Type

export const LeasedTask = Schema.Struct({
  id: Schema.String,
  token: Schema.Int,
  body: Schema.String,
  priority: Schema.Int,
  attempt: Schema.Int,
  leaseMillis: Schema.Int,
  enqueuedMillis: Schema.Number
})
export type LeasedTask = typeof LeasedTask.Type

export const TaskSummary = Schema.Struct({
  id: Schema.String,
  state: TaskState,
  /** JSON text; empty for one that is done. */
  body: Schema.String,
  priority: Schema.Int,
  attempts: Schema.Int,
  enqueuedMillis: Schema.Number,
  agent: Schema.String,
  error: Schema.String,
  /** JSON text, or empty. */
  result: Schema.String
})
export type TaskSummary = typeof TaskSummary.Type

const lease = { id: Schema.String, token: Schema.Int }
const LeaseError = Schema.Union([ChannelError, LeaseLost, TaskNotFound])

export const TaskQueue = Entity.make("TaskQueue", [
  /** All or nothing. Answers how many were there already. */
  Rpc.make("Enqueue", {
    payload: { tasks: Schema.Array(NewTask) },
    success: Schema.Struct({ duplicates: Schema.Int }),
    error: ChannelError
  }),
  Rpc.make("Take", {
    payload: {
      takeId: Schema.String,
      agent: Schema.String,
      max: Schema.Int,
      /** 0: the topic's. */
      leaseMillis: Schema.Int,
      waitMillis: Schema.Int
    },
    success: Schema.Array(LeasedTask),
    error: ChannelError
  }).annotate(ClusterSchema.InterruptOnTermination, true),
  Rpc.make("Extend", {
    payload: { ...lease, leaseMillis: Schema.Int },
    success: Schema.Struct({ leaseMillis: Schema.Int }),
    error: LeaseError
  }),
  /** `result`: JSON text, or empty. */
  Rpc.make("Complete", { payload: { ...lease, result: Schema.String }, success: Schema.Void, error: LeaseError }),
  Rpc.make("Fail", {
    payload: { ...lease, error: Schema.String, delayMillis: Schema.Int, release: Schema.Boolean },
    success: Schema.Struct({ state: TaskState }),
    error: LeaseError
  }),
  /** Without ids: all that are dead. */
  Rpc.make("Redrive", {
    payload: { ids: Schema.NullOr(Schema.Array(Schema.String)) },
    success: Schema.Struct({ count: Schema.Int }),
    error: ChannelError
  }),
  Rpc.make("Cancel", {
    payload: { ids: Schema.Array(Schema.String) },
    success: Schema.Struct({ count: Schema.Int }),
    error: ChannelError
  }),
  Rpc.make("Get", {
    payload: { id: Schema.String },
    success: TaskSummary,
    error: Schema.Union([ChannelError, TaskNotFound])
  }),
  Rpc.make("List", {
    payload: { state: Schema.NullOr(TaskState), after: Schema.String, limit: Schema.Int },
    success: Schema.Array(TaskSummary),
    error: ChannelError
  }),
  Rpc.make("Stats", {
    success: Schema.Struct({ waiting: Schema.Int, leased: Schema.Int, done: Schema.Int, dead: Schema.Int }),
    error: ChannelError
  }),
  Rpc.make("Remove", { success: Schema.Void, error: StorageUnavailable })
])
