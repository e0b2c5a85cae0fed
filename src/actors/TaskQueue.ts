/**
 * The `TaskQueue` entity: owner of a topic's tasks (`TaskMachine.ts`) over their log. Whatever it answers is durable: that a
 * task is there, who has it, that it is done. Takings that find nothing wait in a line, and are served in its order.
 */
import { Duration, Effect, Layer, Result } from "effect"
import { Entity } from "effect/cluster"
import { Settings } from "../config.ts"
import { type ChannelError, channelAddressOf, type LeasedTask, TaskQueue } from "../protocol/AgentChannel.ts"
import { Overloaded } from "../protocol/Errors.ts"
import { shownName } from "../protocol/Tenant.ts"
import type { Topic } from "../protocol/Topic.ts"
import { TopicCatalog } from "../protocol/TopicCatalog.ts"
import { queuePrefix } from "../tiers/TopicsObject.ts"
import * as ChannelLog from "./ChannelLog.ts"
import * as ChannelOwner from "./ChannelOwner.ts"
import { type Taking, TaskMachine } from "./TaskMachine.ts"

export const layer = Layer.unwrap(
  Effect.map(Settings, (settings) =>
    TaskQueue.toLayer(makeQueue, {
      concurrency: "unbounded",
      disableFatalDefects: true,
      mailboxCapacity: 65_536,
      maxIdleTime: Duration.millis(settings.topicIdleMillis)
    })
  )
)

interface Resident {
  readonly channel: ChannelLog.ChannelLog
  readonly machine: TaskMachine
  readonly take: (taking: Taking, waitMillis: number) => Effect.Effect<ReadonlyArray<LeasedTask>, ChannelError>
}

/** Leases that are ended by one record group, and what is past its retention. */
const lookMax = 1_000
/** Between two looks at what has ended, where nothing is known to. */
const lookMillis = 1_000
/** What a command without a task counts in the queue. */
const commandBytes = 512

const monotonicMillis = (): number => performance.now()

const makeQueue = Effect.gen(function* () {
  const { entityId } = yield* Entity.CurrentAddress
  const { topic, uid } = channelAddressOf(entityId)
  const settings = yield* Settings
  const prefix = queuePrefix(uid)

  const open = Effect.fnUntraced(function* (of: Topic, onLost: (detail: string) => void) {
    const machine = new TaskMachine(
      {
        name: shownName(topic),
        leaseMillis: of.lease_ms,
        attemptsMax: of.attempts_max,
        retentionMillis: of.retention_ms
      },
      settings,
      monotonicMillis
    )
    const line = new WaitingLine()
    const services = yield* Effect.context<never>()
    const run = Effect.runForkWith(services)
    /** Committed changes may have tasks for those who wait. */
    const observed: ChannelLog.ChannelMachine = {
      apply: machine.apply,
      capture: machine.capture,
      restore: machine.restore,
      committed: () => {
        if (line.size > 0) line.wake(machine.stats().waiting)
        arm()
      }
    }
    let timer: ReturnType<typeof setTimeout> | undefined
    let timerAt = Number.POSITIVE_INFINITY
    let closed = false
    let channel: ChannelLog.ChannelLog | undefined
    /** Looks when the next lease or delay ends, and now and then. */
    const arm = () => {
      if (closed || channel === undefined) return
      const now = monotonicMillis()
      const at = Math.min(machine.nextDue() ?? Number.POSITIVE_INFINITY, now + lookMillis)
      if (timer !== undefined && timerAt <= at) return
      clearTimeout(timer)
      timerAt = at
      timer = setTimeout(look, Math.max(1, at - now + 1))
      timer.unref()
    }
    const look = () => {
      timer = undefined
      timerAt = Number.POSITIVE_INFINITY
      if (closed || channel === undefined) return
      run(
        Effect.andThen(
          Effect.ignore(channel.submit(0, (now) => machine.look(lookMax, now))),
          Effect.sync(() => {
            if (line.size > 0 && machine.hasWaiting()) line.wake(machine.stats().waiting)
            arm()
          })
        )
      )
    }
    yield* Effect.addFinalizer(() =>
      Effect.sync(() => {
        closed = true
        clearTimeout(timer)
        line.wake(Number.POSITIVE_INFINITY)
      })
    )
    const opened = yield* ChannelLog.open({ prefix, settings, machine: observed, retainMillis: 0, onLost })
    channel = opened
    arm()

    const take = (taking: Taking, waitMillis: number) =>
      Effect.suspend(() => {
        const until = monotonicMillis() + waitMillis
        const asker = { isGone: false }
        const attempt = (isAgain: boolean): Effect.Effect<ReadonlyArray<LeasedTask>, ChannelError> =>
          Effect.flatMap(
            opened.submit(commandBytes, (now) =>
              asker.isGone ? { records: [], answer: Result.succeed([]) } : machine.take(taking, now)
            ),
            (tasks): Effect.Effect<ReadonlyArray<LeasedTask>, ChannelError> => {
              const left = until - monotonicMillis()
              if (tasks.length > 0 || left <= 0) return Effect.succeed(tasks)
              if (line.size >= settings.topicWaitersMax) {
                return Effect.fail(new Overloaded({ bound: "topicWaitersMax", retryAfterMillis: 1_000 }))
              }
              return Effect.andThen(
                line.wait(left, isAgain),
                Effect.suspend(() => attempt(true))
              )
            }
          )
        // What it was given by then would wait for its lease's end, for nobody.
        return Effect.onInterrupt(attempt(false), () =>
          Effect.sync(() => {
            asker.isGone = true
            run(Effect.ignore(opened.submit(0, (now) => machine.giveBack(taking.takeId, now))))
          })
        )
      })
    return { channel: opened, machine, take } satisfies Resident
  })

  const owner = yield* ChannelOwner.make<Resident>({
    prefix,
    topic,
    uid,
    activationMillis: settings.activationDeadlineMillis,
    topics: yield* TopicCatalog.client,
    open
  })

  return TaskQueue.of({
    Enqueue: ({ payload: { tasks } }) =>
      owner.use(({ channel, machine }) => {
        let bytes = 0
        for (const { body, id } of tasks) bytes += 256 + body.length + id.length
        return channel.submit(bytes, (now) => machine.enqueue(tasks, now))
      }),
    Take: ({ payload: { waitMillis, ...taking } }) => owner.use((of) => of.take(taking, waitMillis)),
    Extend: ({ payload: { id, leaseMillis, token } }) =>
      owner.use(({ channel, machine }) =>
        channel.submit(commandBytes, (now) => machine.extend(id, token, leaseMillis, now))
      ),
    Complete: ({ payload: { id, result, token } }) =>
      owner.use(({ channel, machine }) =>
        channel.submit(commandBytes + result.length, (now) => machine.complete(id, token, result, now))
      ),
    Fail: ({ payload: { id, token, ...failure } }) =>
      owner.use(({ channel, machine }) => channel.submit(commandBytes, (now) => machine.fail(id, token, failure, now))),
    Redrive: ({ payload }) =>
      owner.use(({ channel, machine }) => channel.submit(commandBytes, (now) => machine.redrive(payload.ids, now))),
    Cancel: ({ payload }) =>
      owner.use(({ channel, machine }) => channel.submit(commandBytes, (now) => machine.cancel(payload.ids, now))),
    // Answered behind what was asked before, so that nothing is told that might not come to be.
    Get: ({ payload }) =>
      owner.use(({ channel, machine }) => channel.submit(0, () => ({ records: [], answer: machine.get(payload.id) }))),
    List: ({ payload: { after, limit, state } }) =>
      owner.use(({ channel, machine }) =>
        channel.submit(0, () => ({ records: [], answer: Result.succeed(machine.list(state, after, limit)) }))
      ),
    Stats: () =>
      owner.use(({ channel, machine }) =>
        channel.submit(0, () => ({ records: [], answer: Result.succeed(machine.stats()) }))
      ),
    Remove: () => owner.remove
  })
})

/** Takings that found nothing, the one that waits longest first. */
class WaitingLine {
  readonly #waiting = new Set<() => void>()
  /** Those that were woken and found nothing again: before all others. */
  readonly #first = new Set<() => void>()

  get size(): number {
    return this.#waiting.size + this.#first.size
  }

  /** Until it is woken, or the time is up. */
  wait(millis: number, isAgain: boolean): Effect.Effect<void> {
    return Effect.callback((resume) => {
      const line = isAgain ? this.#first : this.#waiting
      const timer = setTimeout(() => wake(), millis)
      const wake = () => {
        clearTimeout(timer)
        line.delete(wake)
        resume(Effect.void)
      }
      line.add(wake)
      return Effect.sync(() => {
        clearTimeout(timer)
        line.delete(wake)
      })
    })
  }

  wake(count: number): void {
    let left = count
    for (const line of [this.#first, this.#waiting]) {
      for (const wake of line) {
        if (left <= 0) return
        left -= 1
        wake()
      }
    }
  }
}
