/**
 * Topics by the client, as effects and streams: messages to who listens, tasks to who takes them. Whatever changes something has
 * an id of its own, so that it can be sent again without being done twice.
 */
import { Effect, type Stream } from "effect"
import type { VectorDBError } from "./ClientError.ts"
import type { Engine, Heard } from "./Engine.ts"

/** What a topic is made with; what is left out takes the server's defaults. */
export interface TopicParameters {
  /** How long messages and tasks are kept. */
  readonly retentionMillis?: number
  /** Logs that messages are spread over, by key; 1 to 64. */
  readonly channels?: number
  readonly leaseMillis?: number
  /** Times that a task is handed out before it is a dead letter. */
  readonly attemptsMax?: number
}

/** A topic as it is. */
export interface TopicInfo extends Required<TopicParameters> {
  readonly name: string
  readonly uid: string
  /** Tasks by state; where one topic was asked for. */
  readonly tasks?: Readonly<Record<TaskState, number>>
}

/** `leased`: somebody has it; `dead`: it has failed too often, or nobody did it in time. */
export type TaskState = "waiting" | "leased" | "done" | "dead"

/** A message to be published. */
export interface NewMessage<T = unknown> {
  /** JSON. */
  readonly message: T
  /** Messages of one key stay in order. */
  readonly key?: string
  /** A message of an id that was published lately is not published again. */
  readonly id?: string
}

/** A message as who listens is given it. */
export interface TopicMessage<T = unknown> {
  readonly id: string
  readonly key: string
  readonly message: T
  /** When it was published, by the server's clock. */
  readonly atMillis: number
  /** To go on after it, and to acknowledge it. */
  readonly cursor: string
}

/** Where to begin, and what to be told. */
export interface ListenOptions {
  /** Where there is no cursor, and no position of the subscriber. By default `newest`. */
  readonly from?: "newest" | "oldest"
  /** Goes on after the message that came with it. */
  readonly cursor?: string
  /** Goes on after what this name has acknowledged. */
  readonly subscriber?: string
  /** Messages are past their retention that were not handed on. */
  readonly onGap?: () => void
}

/** A task to be enqueued. */
export interface NewTask<T = unknown> {
  readonly task: T
  /** A task of an id that is there, or was done lately, is not enqueued again. */
  readonly id?: string
  /** -1,000 to 1,000, the greatest first; 0 where left out. */
  readonly priority?: number
  /** Not handed out before. */
  readonly delayMillis?: number
}

/** A task that was taken, and its lease. */
export interface LeasedTask<T = unknown> {
  readonly id: string
  /** Of this lease: greater than any before it, so that what it writes elsewhere can be told from what an older one does. */
  readonly token: number
  readonly task: T
  readonly priority: number
  /** 1 where it is handed out for the first time. */
  readonly attempt: number
  readonly leaseMillis: number
}

/** How many tasks, for how long, and how long to wait for one. */
export interface TakeOptions {
  /** Tasks at most, 1 to 100; 1 where left out. */
  readonly max?: number
  readonly leaseMillis?: number
  /** Waits so long for one, at most a minute; 0 where left out. */
  readonly waitMillis?: number
  /** Who takes it, for people. */
  readonly agent?: string
}

/** What becomes of a task that failed. */
export interface FailOptions {
  /** Before it is handed out again. */
  readonly delayMillis?: number
}

/** A task as it is now. */
export interface TaskInfo<T = unknown> {
  readonly id: string
  readonly state: TaskState
  /** Not of one that is done. */
  readonly task?: T
  readonly priority: number
  readonly attempts: number
  readonly agent?: string
  readonly error?: string
  readonly result?: unknown
}

/** Topics, as effects and streams. */
export interface TopicClient {
  /** Finds the one that is there with the same parameters. */
  readonly create: (
    topic: string,
    parameters: TopicParameters,
    call?: TopicCall
  ) => Effect.Effect<TopicInfo, VectorDBError>
  /** `undefined` where there is none. */
  readonly get: (topic: string, call?: TopicCall) => Effect.Effect<TopicInfo | undefined, VectorDBError>
  /** The topics that there are. */
  readonly list: (call?: TopicCall) => Effect.Effect<ReadonlyArray<TopicInfo>, VectorDBError>
  /** Whether there was one. */
  readonly delete: (topic: string, call?: TopicCall) => Effect.Effect<boolean, VectorDBError>
  /** Durable when it succeeds. How many were there already. */
  readonly publish: (
    topic: string,
    messages: ReadonlyArray<NewMessage>,
    call?: TopicCall
  ) => Effect.Effect<{ readonly duplicates: number }, VectorDBError>
  /** In order for each key, at least once; goes on by itself after cuts. */
  readonly listen: (topic: string, options?: ListenOptions) => Stream.Stream<Heard, VectorDBError>
  /** The subscriber has dealt with the message of the cursor, and all before it. */
  readonly acknowledge: (
    topic: string,
    subscriber: string,
    cursor: string,
    call?: TopicCall
  ) => Effect.Effect<void, VectorDBError>
  /** The subscriber's position is forgotten. */
  readonly forget: (topic: string, subscriber: string, call?: TopicCall) => Effect.Effect<void, VectorDBError>
  /** The tasks' ids. */
  readonly enqueue: (
    topic: string,
    tasks: ReadonlyArray<NewTask>,
    call?: TopicCall
  ) => Effect.Effect<ReadonlyArray<string>, VectorDBError>
  /** The first that wait, each with a lease; none where there are none in time. */
  readonly take: (
    topic: string,
    options?: TakeOptions,
    call?: TopicCall
  ) => Effect.Effect<ReadonlyArray<LeasedTask>, VectorDBError>
  /** For how long the lease runs from now. */
  readonly extend: (
    topic: string,
    lease: Lease,
    leaseMillis?: number,
    call?: TopicCall
  ) => Effect.Effect<number, VectorDBError>
  /** The task is done. Fails with `lease_lost` where its lease has ended. */
  readonly complete: (
    topic: string,
    lease: Lease,
    result?: unknown,
    call?: TopicCall
  ) => Effect.Effect<void, VectorDBError>
  /** `waiting` for another try, or `dead`. */
  readonly fail: (
    topic: string,
    lease: Lease,
    error: string,
    options?: FailOptions,
    call?: TopicCall
  ) => Effect.Effect<TaskState, VectorDBError>
  /** Given back untried. */
  readonly release: (topic: string, lease: Lease, call?: TopicCall) => Effect.Effect<void, VectorDBError>
  /** `undefined` where it is not known, or no longer. */
  readonly task: (topic: string, id: string, call?: TopicCall) => Effect.Effect<TaskInfo | undefined, VectorDBError>
  /** By the time they came in, those of one state or all. */
  readonly tasks: (
    topic: string,
    options?: { readonly state?: TaskState; readonly after?: string; readonly limit?: number },
    call?: TopicCall
  ) => Effect.Effect<ReadonlyArray<TaskInfo>, VectorDBError>
  /** Dead letters are handed out again: those named, or all. How many. */
  readonly redrive: (
    topic: string,
    ids?: ReadonlyArray<string>,
    call?: TopicCall
  ) => Effect.Effect<number, VectorDBError>
  /** How many there were. */
  readonly cancel: (topic: string, ids: ReadonlyArray<string>, call?: TopicCall) => Effect.Effect<number, VectorDBError>
}

/** For how long to try; what is left out is the client's. */
export interface TopicCall {
  readonly deadlineMillis?: number
}

/** A lease of a task, by what it is known for. */
export type Lease = Pick<LeasedTask, "id" | "token">

/** Topics on an engine. */
export const topicClientOf = (engine: Engine, deadlineMillis: number): TopicClient => {
  const ask = (operation: string, request: Json, call: TopicCall | undefined, moreMillis = 0) =>
    engine.topic(operation, request, (call?.deadlineMillis ?? deadlineMillis) + moreMillis)
  const asked =
    <A>(read: (answer: Json) => A) =>
    (answer: Effect.Effect<Json, VectorDBError>) =>
      Effect.map(answer, read)
  const found = <A>(effect: Effect.Effect<A, VectorDBError>, code: string) =>
    Effect.catchIf(
      effect as Effect.Effect<A | undefined, VectorDBError>,
      (error) => error.code === code,
      () => Effect.undefined
    )
  const nothing = () => {}

  return {
    create: (topic, { attemptsMax, channels, leaseMillis, retentionMillis }, call) =>
      ask(
        "create",
        given({
          topic,
          retention_ms: retentionMillis,
          channels,
          lease_ms: leaseMillis,
          attempts_max: attemptsMax
        }),
        call
      ).pipe(asked(topicOf)),
    get: (topic, call) => found(ask("describe", { topic }, call).pipe(asked(topicOf)), "topic_not_found"),
    list: (call) => ask("list", {}, call).pipe(asked(({ topics }) => (topics as ReadonlyArray<Json>).map(topicOf))),
    delete: (topic, call) =>
      Effect.map(
        found(ask("delete", { topic }, call).pipe(asked(() => true)), "topic_not_found"),
        (deleted) => deleted === true
      ),
    publish: (topic, messages, call) =>
      // Its own id, so that one that is sent again because of a cut is published once.
      ask(
        "publish",
        { topic, messages: messages.map(({ id = newId(), ...message }) => ({ ...message, id })) },
        call
      ).pipe(asked(({ duplicates }) => ({ duplicates: Number(duplicates) }))),
    listen: (topic, options = {}) => engine.listen(topic, options),
    acknowledge: (topic, subscriber, cursor, call) =>
      ask("acknowledge", { topic, subscriber, cursor }, call).pipe(asked(nothing)),
    forget: (topic, subscriber, call) => ask("forget", { topic, subscriber }, call).pipe(asked(nothing)),
    enqueue: (topic, tasks, call) =>
      ask(
        "enqueue",
        {
          topic,
          tasks: tasks.map(({ delayMillis, id = newId(), priority, task }) =>
            given({ task, id, priority, delay_ms: delayMillis })
          )
        },
        call
      ).pipe(asked(({ task_ids }) => task_ids as ReadonlyArray<string>)),
    take: (topic, options = {}, call) => {
      const { agent, leaseMillis, max, waitMillis = 0 } = options
      const request = { topic, take_id: newId(), agent, max, lease_ms: leaseMillis, wait_ms: waitMillis }
      return ask("take", given(request), call, waitMillis).pipe(
        asked(({ tasks }) => (tasks as ReadonlyArray<Json>).map(leasedOf))
      )
    },
    extend: (topic, { id, token }, leaseMillis, call) =>
      ask("extend", given({ topic, task_id: id, token, lease_ms: leaseMillis }), call).pipe(
        asked(({ lease_ms }) => Number(lease_ms))
      ),
    complete: (topic, { id, token }, result, call) =>
      ask("complete", given({ topic, task_id: id, token, result }), call).pipe(asked(nothing)),
    fail: (topic, { id, token }, error, options, call) =>
      ask(
        "fail",
        given({ topic, task_id: id, token, error: error.slice(0, errorCharsMax), delay_ms: options?.delayMillis }),
        call
      ).pipe(asked(({ state }) => state as TaskState)),
    release: (topic, { id, token }, call) =>
      ask("fail", { topic, task_id: id, token, release: true }, call).pipe(asked(nothing)),
    task: (topic, id, call) => found(ask("task", { topic, task_id: id }, call).pipe(asked(infoOf)), "task_not_found"),
    tasks: (topic, options = {}, call) =>
      ask("tasks", given({ topic, ...options }), call).pipe(
        asked(({ tasks }) => (tasks as ReadonlyArray<Json>).map(infoOf))
      ),
    redrive: (topic, ids, call) =>
      ask("redrive", given({ topic, task_ids: ids }), call).pipe(asked(({ redriven }) => Number(redriven))),
    cancel: (topic, ids, call) =>
      ids.length === 0
        ? Effect.succeed(0)
        : ask("cancel", { topic, task_ids: ids }, call).pipe(asked(({ cancelled }) => Number(cancelled)))
  }
}

type Json = Readonly<Record<string, unknown>>

/** What the server takes of the text of an error. */
const errorCharsMax = 1_024

/** Without the members that are not given. */
const given = (request: Json): Json =>
  Object.fromEntries(Object.entries(request).filter(([, value]) => value !== undefined))

/** Not `randomUUID`, which pages without TLS have not. */
const newId = (): string => {
  let id = ""
  for (const byte of globalThis.crypto.getRandomValues(new Uint8Array(16))) id += byte.toString(16).padStart(2, "0")
  return id
}

const topicOf = (body: Json): TopicInfo => ({
  name: String(body["name"]),
  uid: String(body["uid"]),
  retentionMillis: Number(body["retention_ms"]),
  channels: Number(body["channels"]),
  leaseMillis: Number(body["lease_ms"]),
  attemptsMax: Number(body["attempts_max"]),
  ...(body["tasks"] === undefined ? {} : { tasks: body["tasks"] as Record<TaskState, number> })
})

const leasedOf = (task: Json): LeasedTask => ({
  id: String(task["task_id"]),
  token: Number(task["token"]),
  task: task["task"],
  priority: Number(task["priority"]),
  attempt: Number(task["attempt"]),
  leaseMillis: Number(task["lease_ms"])
})

const infoOf = (body: Json): TaskInfo => {
  const { task_id, enqueued_ms: _, ...info } = body
  // The server's own names, but for these two; not looked at again, since a schema would double what a page loads.
  return { ...info, id: String(task_id) } as unknown as TaskInfo
}
