/** Topics by the client, with promises: {@link Channel} for messages, {@link Tasks} for work that agents share. */
import type { VectorDBError } from "./ClientError.ts"
import { type Aborts, iterate, run } from "./Promises.ts"
import type {
  FailOptions,
  LeasedTask,
  ListenOptions,
  NewMessage,
  NewTask,
  TakeOptions,
  TaskInfo,
  TaskState,
  TopicCall,
  TopicClient,
  TopicMessage
} from "./Topics.ts"

/** For how long to try, and what ends the call before that. */
export type TopicOptions = TopicCall & Aborts

/** Messages of a topic. `T`: what they are. */
export class Channel<T = unknown> {
  readonly topic: string
  readonly #client: TopicClient

  constructor(client: TopicClient, topic: string) {
    this.#client = client
    this.topic = topic
  }

  /** Resolves when the message is durable. Sent again because of a cut, or with an `id` of your own, it is published once. */
  async publish(message: T, options: Omit<NewMessage, "message"> & TopicOptions = {}): Promise<void> {
    const { id, key } = options
    await this.publishMany(
      [{ message, ...(id === undefined ? {} : { id }), ...(key === undefined ? {} : { key }) }],
      options
    )
  }

  /** At most 1,000 at once. Resolves with how many had been published before. */
  async publishMany(messages: ReadonlyArray<NewMessage<T>>, options: TopicOptions = {}): Promise<number> {
    const { duplicates } = await run(this.#client.publish(this.topic, messages, options), options.signal)
    return duplicates
  }

  /**
   * Messages from now on, from the oldest, after a cursor, or after what a named subscriber has acknowledged; in order for each
   * key. It goes on by itself after cuts, until the loop is left.
   *
   *     for await (const { message, cursor } of channel.subscribe({ subscriber: "planner" })) {
   *       await handle(message)
   *       await channel.acknowledge("planner", cursor)
   *     }
   */
  async *subscribe(options: ListenOptions & Aborts = {}): AsyncGenerator<TopicMessage<T>, void, undefined> {
    const { onGap, signal, ...listen } = options
    for await (const heard of iterate(this.#client.listen(this.topic, listen), signal)) {
      if ("gap" in heard) onGap?.()
      else yield heard as TopicMessage<T>
    }
  }

  /** The subscriber has dealt with the message of the cursor, and all before it. */
  acknowledge(subscriber: string, cursor: string, options: TopicOptions = {}): Promise<void> {
    return run(this.#client.acknowledge(this.topic, subscriber, cursor, options), options.signal)
  }

  /** The subscriber's position is forgotten: it begins anew. */
  forget(subscriber: string, options: TopicOptions = {}): Promise<void> {
    return run(this.#client.forget(this.topic, subscriber, options), options.signal)
  }
}

/** How an agent works on tasks. */
export interface WorkOptions extends Aborts {
  /** Tasks at one time; 1 where left out. */
  readonly concurrency?: number
  readonly leaseMillis?: number
  /** Before a task that failed is handed out again. */
  readonly retryDelayMillis?: number
  /** Who works, for people. */
  readonly agent?: string
  /** Told of what went wrong with a task, its lease lost among it. */
  readonly onError?: (error: unknown, task: LeasedTask) => void
}

/** Tasks of a topic, for agents that compete for them. `T`: what they are. */
export class Tasks<T = unknown> {
  readonly topic: string
  readonly #client: TopicClient

  constructor(client: TopicClient, topic: string) {
    this.#client = client
    this.topic = topic
  }

  /** Resolves with the task's id when it is durable. */
  async enqueue(task: T, options: Omit<NewTask, "task"> & TopicOptions = {}): Promise<string> {
    const { deadlineMillis: _, signal: __, ...rest } = options
    const [id] = await this.enqueueMany([{ ...rest, task }], options)
    return id as string
  }

  /** At most 1,000 at once. */
  enqueueMany(tasks: ReadonlyArray<NewTask<T>>, options: TopicOptions = {}): Promise<ReadonlyArray<string>> {
    return run(this.#client.enqueue(this.topic, tasks, options), options.signal)
  }

  /** The first that wait, each with a lease; none where there are none, after `waitMillis`. */
  async take(options: TakeOptions & TopicOptions = {}): Promise<ReadonlyArray<LeasedTask<T>>> {
    const tasks = await run(this.#client.take(this.topic, options, options), options.signal)
    return tasks as ReadonlyArray<LeasedTask<T>>
  }

  /** The lease runs for as long again from now; rejects with `lease_lost` where it has ended. */
  extend(task: LeasedTask<T>, options: { readonly leaseMillis?: number } & TopicOptions = {}): Promise<number> {
    return run(this.#client.extend(this.topic, task, options.leaseMillis, options), options.signal)
  }

  /** The task is done, with what came of it; rejects with `lease_lost` where the lease has ended. */
  complete(task: LeasedTask<T>, result?: unknown, options: TopicOptions = {}): Promise<void> {
    return run(this.#client.complete(this.topic, task, result, options), options.signal)
  }

  /** For another try, or a dead letter after the last one. */
  fail(task: LeasedTask<T>, error: string, options: FailOptions & TopicOptions = {}): Promise<TaskState> {
    return run(this.#client.fail(this.topic, task, error, options, options), options.signal)
  }

  /** Given back untried. */
  release(task: LeasedTask<T>, options: TopicOptions = {}): Promise<void> {
    return run(this.#client.release(this.topic, task, options), options.signal)
  }

  /** What is known of a task; `undefined` where there is none, or none any more. */
  get(id: string, options: TopicOptions = {}): Promise<TaskInfo<T> | undefined> {
    return run(this.#client.task(this.topic, id, options), options.signal) as Promise<TaskInfo<T> | undefined>
  }

  /** Tasks in the order of their ids, `limit` after one. */
  list(
    options: { readonly state?: TaskState; readonly after?: string; readonly limit?: number } & TopicOptions = {}
  ): Promise<ReadonlyArray<TaskInfo<T>>> {
    const { deadlineMillis: _, signal, ...rest } = options
    return run(this.#client.tasks(this.topic, rest, options), signal) as Promise<ReadonlyArray<TaskInfo<T>>>
  }

  /** Dead letters are handed out again, those named or all. */
  redrive(ids?: ReadonlyArray<string>, options: TopicOptions = {}): Promise<number> {
    return run(this.#client.redrive(this.topic, ids, options), options.signal)
  }

  /** Takes tasks away that are not done. How many there were. */
  cancel(ids: ReadonlyArray<string>, options: TopicOptions = {}): Promise<number> {
    return run(this.#client.cancel(this.topic, ids, options), options.signal)
  }

  /**
   * Takes tasks and has them handled, `concurrency` at one time, until the signal aborts; then those not done are given back. While
   * one is handled its lease is extended; `signal` of a handler aborts where the lease is lost all the same. What the handler
   * resolves with is the task's result; where it rejects the task has failed.
   */
  async work(
    handle: (task: LeasedTask<T>, context: { readonly signal: AbortSignal }) => unknown,
    options: WorkOptions = {}
  ): Promise<void> {
    const { agent, concurrency = 1, leaseMillis, signal } = options
    const underWay = new Set<Promise<void>>()
    while (signal?.aborted !== true) {
      const max = Math.min(concurrency - underWay.size, takeMax)
      if (max <= 0) {
        await Promise.race(underWay)
        continue
      }
      const tasks = await this.take({
        max,
        waitMillis: workWaitMillis,
        ...(agent === undefined ? {} : { agent }),
        ...(leaseMillis === undefined ? {} : { leaseMillis }),
        ...(signal === undefined ? {} : { signal })
      }).catch((error: unknown) => {
        if (signal?.aborted === true) return []
        throw error
      })
      for (const task of tasks) {
        const handled = this.#handle(task, handle, options).finally(() => underWay.delete(handled))
        underWay.add(handled)
      }
    }
    await Promise.all(underWay)
  }

  async #handle(
    task: LeasedTask<T>,
    handle: (task: LeasedTask<T>, context: { readonly signal: AbortSignal }) => unknown,
    { onError, retryDelayMillis, signal }: WorkOptions
  ): Promise<void> {
    const lost = new AbortController()
    const stops = signal === undefined ? lost.signal : AbortSignal.any([signal, lost.signal])
    const timer = setInterval(() => {
      this.extend(task).catch((error: VectorDBError) => {
        if (error.code === "lease_lost" || error.code === "task_not_found") lost.abort(error)
      })
    }, task.leaseMillis / 3)
    try {
      const result = await handle(task, { signal: stops })
      await this.complete(task, result === undefined ? undefined : result)
    } catch (error) {
      onError?.(error, task)
      if (!lost.signal.aborted) {
        const given =
          signal?.aborted === true
            ? this.release(task)
            : this.fail(
                task,
                error instanceof Error ? error.message : String(error),
                retryDelayMillis === undefined ? {} : { delayMillis: retryDelayMillis }
              )
        // What cannot be said the end of the lease says.
        await Promise.resolve(given).catch(() => {})
      }
    } finally {
      clearInterval(timer)
    }
  }
}

/** Tasks taken at once. */
const takeMax = 100
/** That one call waits for tasks. */
const workWaitMillis = 20_000
