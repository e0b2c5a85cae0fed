/**
 * What is asked of topics, whatever the wire: requests decoded, callers held to what they may do, names of tenants mapped on
 * the way in and out. `listen` is a delivery like those of `Subscriptions.ts`.
 *
 * A credential that is for some collections alone is for topics of those names alone.
 */
import { randomUUID } from "node:crypto"
import { Context, Effect, Layer, Result } from "effect"
import { Settings } from "../config.ts"
import type { LeasedTask, Message, MessagePosition, TaskSummary } from "../protocol/AgentChannel.ts"
import { type ApiError, InvalidCursor, InvalidInput, Overloaded, TopicNotFound } from "../protocol/Errors.ts"
import { decoderOf, type Json } from "../protocol/Fields.ts"
import { isBefore } from "../protocol/IndexPartition.ts"
import type { Principal, Scope } from "../protocol/Principal.ts"
import type { SlowPolicy } from "../protocol/Subscription.ts"
import { shownCollection, storedName, tenantOf } from "../protocol/Tenant.ts"
import {
  builtInTopics,
  type ListenRequest,
  requests,
  type Topic,
  type TopicAnswers,
  type TopicOperation,
  type TopicRequests
} from "../protocol/Topic.ts"
import { TopicFeeds, type TopicFollower } from "../shards/TopicFeeds.ts"
import { TopicRouter } from "../shards/TopicRouter.ts"
import { Access } from "./Access.ts"
import { type Binding, Cursors } from "./Cursors.ts"
import type { StreamEvent } from "./StreamEvents.ts"
import * as StreamEvents from "./StreamEvents.ts"
import type { Delivery, DeliveryListener } from "./Subscriptions.ts"

export class Topics extends Context.Service<
  Topics,
  {
    /** `request` is as it came. */
    readonly call: <Operation extends TopicOperation>(
      whose: Principal,
      operation: Operation,
      request: unknown
    ) => Effect.Effect<TopicAnswers[Operation], ApiError>
    readonly listen: (
      whose: Principal,
      request: ListenRequest,
      listener: DeliveryListener
    ) => Effect.Effect<Delivery, ApiError>
  }
>()("ruvector/gateway/Topics") {
  static readonly layer = Layer.effect(
    Topics,
    Effect.gen(function* () {
      const settings = yield* Settings
      const access = yield* Access
      const cursors = yield* Cursors
      const router = yield* TopicRouter
      const feeds = yield* TopicFeeds
      let listening = 0

      const refusalOf = (whose: Principal, scope: Scope, topic: string): ApiError | undefined => {
        const refusal = access.allow(whose, scope, topic)
        return refusal?._tag === "CollectionNotFound" ? new TopicNotFound({ topic }) : refusal
      }

      /** By operation: what it needs, and what it does. */
      const operations: {
        readonly [Operation in TopicOperation]: {
          readonly scope: Scope
          readonly run: (
            request: TopicRequests[Operation],
            stored: string,
            whose: Principal
          ) => Effect.Effect<TopicAnswers[Operation], ApiError>
        }
      } = {
        publish: {
          scope: "write",
          run: ({ messages }, stored) =>
            Effect.map(
              router.publish(
                stored,
                messages.map(({ id = randomUUID(), key = "", message }) => ({ id, key, body: JSON.stringify(message) }))
              ),
              (duplicates) => ({ published: messages.length - duplicates, duplicates })
            )
        },
        acknowledge: {
          scope: "write",
          run: ({ cursor, subscriber }, stored, whose) =>
            Effect.gen(function* () {
              const of = yield* router.topic(stored)
              const positions = yield* positionsOf(bindingOf(whose, of), of, cursor)
              yield* eachChannel(of, (channel) =>
                router.channel(of, channel, (client) =>
                  client.Acknowledge({ name: subscriber, ...(positions[channel] as MessagePosition) })
                )
              )
              return {}
            })
        },
        forget: {
          scope: "write",
          run: ({ subscriber }, stored) =>
            Effect.gen(function* () {
              const of = yield* router.topic(stored)
              yield* eachChannel(of, (channel) =>
                router.channel(of, channel, (client) => client.Forget({ name: subscriber }))
              )
              return {}
            })
        },
        enqueue: {
          scope: "write",
          run: ({ tasks }, stored) => {
            const fresh = tasks.map(({ delay_ms = 0, id = randomUUID(), priority = 0, task }) => ({
              id,
              priority,
              delayMillis: delay_ms,
              body: JSON.stringify(task)
            }))
            return Effect.map(
              router.queue(stored, (queue) => queue.Enqueue({ tasks: fresh })),
              ({ duplicates }) => ({ task_ids: fresh.map(({ id }) => id), duplicates })
            )
          }
        },
        take: {
          scope: "write",
          run: ({ agent = "", lease_ms = 0, max = 1, take_id = randomUUID(), wait_ms = 0 }, stored) =>
            Effect.map(
              router.take(stored, { takeId: take_id, agent, max, leaseMillis: lease_ms, waitMillis: wait_ms }),
              (tasks) => ({ tasks: tasks.map(takenTask) })
            )
        },
        extend: {
          scope: "write",
          run: ({ lease_ms = 0, task_id, token }, stored) =>
            Effect.map(
              router.queue(stored, (queue) => queue.Extend({ id: task_id, token, leaseMillis: lease_ms })),
              ({ leaseMillis }) => ({ lease_ms: leaseMillis })
            )
        },
        complete: {
          scope: "write",
          run: ({ result, task_id, token }, stored) =>
            Effect.as(
              router.queue(stored, (queue) =>
                queue.Complete({ id: task_id, token, result: result === undefined ? "" : JSON.stringify(result) })
              ),
              {}
            )
        },
        fail: {
          scope: "write",
          run: ({ delay_ms = 0, error = "", release = false, task_id, token }, stored) =>
            router.queue(stored, (queue) => queue.Fail({ id: task_id, token, error, delayMillis: delay_ms, release }))
        },
        redrive: {
          scope: "write",
          run: ({ task_ids }, stored) =>
            Effect.map(
              router.queue(stored, (queue) => queue.Redrive({ ids: task_ids ?? null })),
              ({ count }) => ({ redriven: count })
            )
        },
        cancel: {
          scope: "write",
          run: ({ task_ids }, stored) =>
            Effect.map(
              router.queue(stored, (queue) => queue.Cancel({ ids: task_ids })),
              ({ count }) => ({ cancelled: count })
            )
        },
        task: {
          scope: "read",
          run: ({ task_id }, stored) =>
            Effect.map(
              router.queue(stored, (queue) => queue.Get({ id: task_id })),
              taskInfo
            )
        },
        tasks: {
          scope: "read",
          run: ({ after = "", limit = 100, state }, stored) =>
            Effect.map(
              router.queue(stored, (queue) => queue.List({ state: state ?? null, after, limit })),
              (tasks) => ({ tasks: tasks.map(taskInfo) })
            )
        },
        create: {
          scope: "write",
          run: ({ topic, ...request }, stored, whose) => {
            if (whose.collections !== undefined && !whose.collections.has(topic)) {
              return Effect.fail(new TopicNotFound({ topic }))
            }
            return Effect.map(router.create(stored, request), ({ created, topic }) => ({
              ...shownCollection(topic),
              created
            }))
          }
        },
        describe: {
          scope: "read",
          run: (_, stored) =>
            Effect.gen(function* () {
              const of = yield* router.topic(stored)
              const tasks = yield* router.queue(stored, (queue) => queue.Stats())
              return { ...shownCollection(of), tasks }
            })
        },
        list: {
          scope: "read",
          run: (_, __, whose) =>
            Effect.map(router.topics, (all) => ({
              topics: all
                .filter(({ name }) => tenantOf(name) === whose.tenant)
                .map(shownCollection)
                .filter(({ name }) => whose.collections === undefined || whose.collections.has(name))
            }))
        },
        delete: {
          scope: "admin",
          run: ({ topic }, stored) =>
            builtInTopics.has(topic)
              ? Effect.fail(new InvalidInput({ field: "topic", expected: "a topic that was created", got: topic }))
              : Effect.as(router.remove(stored), {})
        }
      }

      const call = <Operation extends TopicOperation>(whose: Principal, operation: Operation, request: unknown) =>
        Effect.suspend((): Effect.Effect<TopicAnswers[Operation], ApiError> => {
          const decoded = decoders[operation](request)
          if (Result.isFailure(decoded)) return Effect.fail(decoded.failure)
          const { run, scope } = operations[operation]
          const { topic }: { readonly topic?: string } = decoded.success
          const refusal = topic === undefined ? access.allow(whose, scope) : refusalOf(whose, scope, topic)
          if (refusal !== undefined) return Effect.fail(refusal)
          return run(decoded.success, storedName(whose.tenant, topic ?? ""), whose)
        })

      const bindingOf = (whose: Principal, of: Topic): Binding =>
        cursors.binding(["topic", whose.tenant, whose.id, of.uid])

      const positionsOf = (
        binding: Binding,
        of: Topic,
        cursor: string
      ): Effect.Effect<ReadonlyArray<MessagePosition>, InvalidCursor> => {
        const positions = cursors.readFeed(binding, cursor)
        return positions === undefined || positions.length !== of.channels
          ? Effect.fail(new InvalidCursor())
          : Effect.succeed(positions)
      }

      const eachChannel = <A>(of: Topic, use: (channel: number) => Effect.Effect<A, ApiError>) =>
        Effect.forEach(
          Array.from({ length: of.channels }, (_, channel) => channel),
          use,
          { concurrency: "unbounded" }
        )

      /** Where to begin. A position beyond the end is of a log that was put back to an earlier state since. */
      const begin = Effect.fnUntraced(function* (of: Topic, binding: Binding, request: ListenRequest) {
        const { cursor, from = "newest", subscriber } = request
        if (cursor !== undefined) {
          const positions = yield* positionsOf(binding, of, cursor)
          const newest = yield* eachChannel(of, (channel) =>
            router.channel(of, channel, (client) => client.Position({ of: "newest" }))
          )
          return positions.map((position, n) => {
            const end = newest[n] as MessagePosition
            return isBefore(end, position) ? end : position
          })
        }
        return yield* eachChannel(of, (channel) =>
          router.channel(of, channel, (client) =>
            subscriber === undefined ? client.Position({ of: from }) : client.Subscriber({ name: subscriber, from })
          )
        )
      })

      const open = Effect.fnUntraced(function* (whose: Principal, request: ListenRequest, listener: DeliveryListener) {
        const stored = storedName(whose.tenant, request.topic)
        let of = yield* router.topic(stored)
        const started = yield* Effect.result(begin(of, bindingOf(whose, of), request))
        let positions: ReadonlyArray<MessagePosition>
        if (Result.isSuccess(started)) positions = started.success
        else {
          if (started.failure._tag !== "TopicNotFound") return yield* started.failure
          // What was known of it is out of date.
          router.forget(of)
          of = yield* router.topic(stored)
          positions = yield* begin(of, bindingOf(whose, of), request)
        }
        const fromOldest = request.cursor === undefined && request.from === "oldest"
        return new ListenDelivery(cursors, bindingOf(whose, of), of, request.policy, listener, (heard) =>
          feeds.open(of, positions, fromOldest, heard)
        )
      })

      const listen = (whose: Principal, request: ListenRequest, listener: DeliveryListener) =>
        Effect.suspend((): Effect.Effect<Delivery, ApiError> => {
          const { subscriber, topic } = request
          const refusal = refusalOf(whose, subscriber === undefined ? "read" : "write", topic)
          if (refusal !== undefined) return Effect.fail(refusal)
          if (listening >= settings.subscriptionsMax) {
            return Effect.fail(new Overloaded({ bound: "subscriptionsMax", retryAfterMillis: 5_000 }))
          }
          listening += 1
          let stopWatch = () => {}
          let ended = false
          const end = () => {
            if (!ended) listening -= 1
            ended = true
            stopWatch()
          }
          const lost = (error: ApiError) => {
            end()
            listener.onLost(error)
          }
          return open(whose, request, { onReady: listener.onReady, onLost: lost }).pipe(
            Effect.onExit((exit) =>
              Effect.sync(() => {
                if (exit._tag === "Failure") end()
              })
            ),
            Effect.map(({ close, next, policy }): Delivery => {
              const closed = () => {
                end()
                close()
              }
              stopWatch = access.watch(whose, (error) => {
                closed()
                listener.onLost(error)
              })
              return { policy, next, close: closed }
            })
          )
        })

      return Topics.of({ call, listen })
    })
  )
}

/** Of each operation, which is what `fromEntries` forgets. */
const decoders = Object.fromEntries(
  Object.entries(requests).map(([operation, schema]) => [operation, decoderOf(schema as (typeof requests)["publish"])])
) as unknown as {
  readonly [Operation in TopicOperation]: (input: unknown) => Result.Result<TopicRequests[Operation], InvalidInput>
}

const takenTask = ({ id, token, body, priority, attempt, leaseMillis, enqueuedMillis }: LeasedTask) => ({
  task_id: id,
  token,
  task: JSON.parse(body) as Json,
  priority,
  attempt,
  lease_ms: leaseMillis,
  enqueued_ms: enqueuedMillis
})

const taskInfo = (task: TaskSummary): TopicAnswers["task"] => ({
  task_id: task.id,
  state: task.state,
  ...(task.body === "" ? {} : { task: JSON.parse(task.body) as Json }),
  priority: task.priority,
  attempts: task.attempts,
  enqueued_ms: task.enqueuedMillis,
  ...(task.agent === "" ? {} : { agent: task.agent }),
  ...(task.error === "" ? {} : { error: task.error }),
  ...(task.result === "" ? {} : { result: JSON.parse(task.result) as Json })
})

/** Events of messages, shared by the listeners of one principal to a topic of one channel: all are where the message is. */
const shared = new WeakMap<Message, { readonly binding: string; readonly event: StreamEvent }>()

class ListenDelivery implements Delivery {
  readonly policy: SlowPolicy
  readonly #cursors: Cursors["Service"]
  readonly #binding: Binding
  readonly #bindingText: string
  readonly #isShared: boolean
  readonly #listener: DeliveryListener
  readonly #follower: TopicFollower
  #begun = false
  #closed = false

  constructor(
    cursors: Cursors["Service"],
    binding: Binding,
    of: Topic,
    policy: SlowPolicy | undefined,
    listener: DeliveryListener,
    open: (heard: { readonly onReady: () => void; readonly onLost: (error: ApiError) => void }) => TopicFollower
  ) {
    this.policy = policy ?? "coalesce"
    this.#cursors = cursors
    this.#binding = binding
    this.#bindingText = Buffer.from(binding).toString("base64url")
    this.#isShared = of.channels === 1
    this.#listener = listener
    this.#follower = open({
      onReady: () => {
        if (!this.#closed) this.#listener.onReady()
      },
      onLost: (error) => {
        if (this.#closed) return
        this.close()
        this.#listener.onLost(error)
      }
    })
  }

  readonly next = (): StreamEvent | undefined => {
    if (this.#closed) return undefined
    if (!this.#begun) {
      this.#begun = true
      return StreamEvents.heard("listening", this.#cursor(this.#follower.positions()))
    }
    const heard = this.#follower.next()
    if (heard === undefined) return undefined
    if (heard.kind === "gap") return StreamEvents.heard("gap", this.#cursor(heard.positions))
    const { message, positions } = heard
    if (!this.#isShared) return StreamEvents.message(message, this.#cursor(positions))
    const found = shared.get(message)
    if (found?.binding === this.#bindingText) return found.event
    const event = StreamEvents.message(message, this.#cursor(positions))
    shared.set(message, { binding: this.#bindingText, event })
    return event
  }

  readonly close = (): void => {
    if (this.#closed) return
    this.#closed = true
    this.#follower.close()
  }

  #cursor(positions: ReadonlyArray<MessagePosition>): string {
    return this.#cursors.ofFeed(this.#binding, positions)
  }
}
