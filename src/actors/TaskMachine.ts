/**
 * The tasks of a topic: which wait, who has which by which lease, which are done or dead. A record holds the whole state of
 * one task but its body, which only the first one has.
 *
 * **Leases.** Each has a token greater than all before it in the queue's history, and only what comes with the newest token
 * of a task is done. A lease's end is no time but a duration, counted on the owner's own monotonic clock from when it was
 * given or extended; an owner that takes over counts each anew from its beginning. So a lease may last longer than was
 * told, and never ends before.
 */
import { Result } from "effect"
import type { SettingValues } from "../config.ts"
import type { LeasedTask, NewTask, TaskSummary } from "../protocol/AgentChannel.ts"
import { LeaseLost, Overloaded, TaskNotFound } from "../protocol/Errors.ts"
import type { TaskState } from "../protocol/Topic.ts"
import type { ChannelRecord } from "../tiers/ChannelRecord.ts"
import type { ChannelMachine, Decision } from "./ChannelLog.ts"
import { Heap } from "./Heap.ts"

/** Of one task: never changed, only replaced. */
interface Task {
  readonly id: string
  readonly body: string
  readonly priority: number
  /** Place among those of one priority. */
  readonly order: number
  readonly state: TaskState
  readonly attempts: number
  /** Of its newest lease, or greater than that where it was lost. */
  readonly token: number
  readonly leaseMillis: number
  readonly takeId: string
  readonly agent: string
  readonly delayMillis: number
  readonly enqueuedMillis: number
  /** When it came into this state, by the wall clock. */
  readonly atMillis: number
  readonly error: string
  readonly result: string
}

/** What a record's head says. */
type Head = readonly [
  priority: number,
  order: number,
  state: TaskState,
  attempts: number,
  token: number,
  leaseMillis: number,
  takeId: string,
  agent: string,
  delayMillis: number,
  enqueuedMillis: number,
  error: string,
  result: string
]

interface Due {
  readonly at: number
  readonly task: Task
}

export interface TaskTopic {
  readonly name: string
  readonly leaseMillis: number
  readonly attemptsMax: number
  readonly retentionMillis: number
}

export interface Taking {
  readonly takeId: string
  readonly agent: string
  readonly max: number
  readonly leaseMillis: number
}

export class TaskMachine implements ChannelMachine {
  readonly #topic: TaskTopic
  readonly #settings: SettingValues
  /** Monotonic milliseconds. */
  readonly #clock: () => number
  /** Those that are not done, in the order they came in. */
  readonly #tasks = new Map<string, Task>()
  readonly #done = new Map<string, Task>()
  readonly #dead = new Map<string, Task>()
  readonly #byTaking = new Map<string, Set<string>>()
  // Entries of a task that was replaced are passed over.
  readonly #waiting = new Heap<Task>((a, b) =>
    a.priority === b.priority ? a.order < b.order : a.priority > b.priority
  )
  readonly #delayed = new Heap<Due>(earlier)
  readonly #leases = new Heap<Due>(earlier)
  /** Those that wait longest, for what is past its retention. */
  readonly #aging = new Heap<Task>((a, b) => a.enqueuedMillis < b.enqueuedMillis)
  #leased = 0
  #bytes = 0
  #lastToken = 0
  #lastOrder = 0

  constructor(topic: TaskTopic, settings: SettingValues, clock: () => number) {
    this.#topic = topic
    this.#settings = settings
    this.#clock = clock
  }

  readonly committed = (): void => {}

  readonly apply = (record: ChannelRecord): void => {
    const before = this.#tasks.get(record.key) ?? this.#done.get(record.key)
    if (record.head === goneHead) {
      if (before !== undefined) this.#drop(before)
      return
    }
    if (record.key === "") {
      const [token, order] = JSON.parse(record.head) as [number, number]
      this.#lastToken = Math.max(this.#lastToken, token)
      this.#lastOrder = Math.max(this.#lastOrder, order)
      return
    }
    if (before !== undefined) this.#unlink(before)
    this.#put(taskOf(record, before?.body ?? ""))
  }

  readonly capture = (): Iterable<ChannelRecord> =>
    captured(this.#lastToken, this.#lastOrder, [...this.#tasks.values(), ...this.#done.values()])

  readonly restore = (record: ChannelRecord): void => this.apply(record)

  stats(): { readonly waiting: number; readonly leased: number; readonly done: number; readonly dead: number } {
    const dead = this.#dead.size
    return { waiting: this.#tasks.size - this.#leased - dead, leased: this.#leased, done: this.#done.size, dead }
  }

  get(id: string): Result.Result<TaskSummary, TaskNotFound> {
    const task = this.#tasks.get(id) ?? this.#done.get(id)
    return task === undefined ? Result.fail(this.#notFound(id)) : Result.succeed(summaryOf(task))
  }

  list(state: TaskState | null, after: string, limit: number): ReadonlyArray<TaskSummary> {
    const found: Array<TaskSummary> = []
    const from = state === "done" ? [this.#done] : state === "dead" ? [this.#dead] : [this.#tasks, this.#done]
    let begun = after === ""
    for (const map of from) {
      for (const task of map.values()) {
        if (begun && (state === null || task.state === state)) {
          found.push(summaryOf(task))
          if (found.length === limit) return found
        }
        begun ||= task.id === after
      }
    }
    return found
  }

  enqueue(tasks: ReadonlyArray<NewTask>, nowMillis: number): Decision<{ readonly duplicates: number }, Overloaded> {
    const fresh: Array<Task> = []
    const here = new Set<string>()
    let bytes = 0
    for (const { id, body, priority, delayMillis } of tasks) {
      if (here.has(id) || this.#tasks.has(id) || this.#done.has(id)) continue
      here.add(id)
      const order = this.#lastOrder + fresh.length + 1
      const task: Task = {
        ...blank,
        id,
        body,
        priority,
        order,
        delayMillis,
        enqueuedMillis: nowMillis,
        atMillis: nowMillis
      }
      bytes += sizeOf(task)
      fresh.push(task)
    }
    const { taskBytesMax, tasksMax } = this.#settings
    const full = this.#tasks.size + fresh.length > tasksMax ? "tasksMax" : "taskBytesMax"
    if (fresh.length > 0 && (full === "tasksMax" || this.#bytes + bytes > taskBytesMax)) {
      return failed(new Overloaded({ bound: full, retryAfterMillis: 1_000 }))
    }
    return decided(
      { duplicates: tasks.length - fresh.length },
      fresh.map((task) => recordOf(task, nowMillis, task.body))
    )
  }

  /** Leases to one that asks: those of the same taking that it still has, else the first that wait. */
  take({ agent, leaseMillis, max, takeId }: Taking, nowMillis: number): Decision<ReadonlyArray<LeasedTask>, never> {
    const again = this.#byTaking.get(takeId)
    if (again !== undefined) {
      // Its leases begin anew: whoever asks again has not heard of them.
      const held = [...again].map((id) => this.#tasks.get(id) as Task)
      return decided(
        held.map(leasedOf),
        held.map((task) => recordOf(task, nowMillis))
      )
    }
    const taken: Array<Task> = []
    this.#wake()
    while (taken.length < max) {
      const task = this.#nextWaiting()
      if (task === undefined) break
      taken.push({
        ...task,
        state: "leased",
        attempts: task.attempts + 1,
        token: this.#lastToken + taken.length + 1,
        leaseMillis: leaseMillis === 0 ? this.#topic.leaseMillis : leaseMillis,
        takeId,
        agent,
        atMillis: nowMillis
      })
    }
    return decided(
      taken.map(leasedOf),
      taken.map((task) => recordOf(task, nowMillis))
    )
  }

  /** Whether `take` would give something. */
  hasWaiting(): boolean {
    this.#wake()
    const task = this.#nextWaiting()
    if (task !== undefined) this.#waiting.push(task)
    return task !== undefined
  }

  extend(
    id: string,
    token: number,
    leaseMillis: number,
    nowMillis: number
  ): Decision<{ readonly leaseMillis: number }, LeaseLost | TaskNotFound> {
    const task = this.#leasedBy(id, token)
    if (Result.isFailure(task)) return failed(task.failure)
    const lease = leaseMillis === 0 ? task.success.leaseMillis : leaseMillis
    return decided({ leaseMillis: lease }, [recordOf({ ...task.success, leaseMillis: lease }, nowMillis)])
  }

  complete(id: string, token: number, result: string, nowMillis: number): Decision<void, LeaseLost | TaskNotFound> {
    // Said once more.
    if (this.#done.get(id)?.token === token) return decided(undefined, [])
    const task = this.#leasedBy(id, token)
    if (Result.isFailure(task)) return failed(task.failure)
    return decided(undefined, [recordOf({ ...task.success, state: "done", error: "", result }, nowMillis)])
  }

  fail(
    id: string,
    token: number,
    failure: { readonly error: string; readonly delayMillis: number; readonly release: boolean },
    nowMillis: number
  ): Decision<{ readonly state: TaskState }, LeaseLost | TaskNotFound> {
    const there = this.#tasks.get(id)
    // Said once more.
    if (there?.token === token && there.state !== "leased") return decided({ state: there.state }, [])
    const task = this.#leasedBy(id, token)
    if (Result.isFailure(task)) return failed(task.failure)
    const next = this.#after(task.success, failure)
    return decided({ state: next.state }, [recordOf(next, nowMillis)])
  }

  /** Gives back what a taking has, as its asker has gone away. */
  giveBack(takeId: string, nowMillis: number): Decision<void, never> {
    const held = [...(this.#byTaking.get(takeId) ?? [])].map((id) => this.#tasks.get(id) as Task)
    const released = held.map((task) => this.#after(task, { error: task.error, delayMillis: 0, release: true }))
    return decided(
      undefined,
      released.map((task) => recordOf(task, nowMillis))
    )
  }

  redrive(ids: ReadonlyArray<string> | null, nowMillis: number): Decision<{ readonly count: number }, never> {
    const records: Array<ChannelRecord> = []
    for (const id of new Set(ids ?? this.#dead.keys())) {
      const task = this.#dead.get(id)
      if (task === undefined) continue
      const order = this.#lastOrder + records.length + 1
      const again: Task = { ...task, state: "waiting", attempts: 0, order, delayMillis: 0, enqueuedMillis: nowMillis }
      records.push(recordOf(again, nowMillis))
    }
    return decided({ count: records.length }, records)
  }

  cancel(ids: ReadonlyArray<string>, nowMillis: number): Decision<{ readonly count: number }, never> {
    const there = [...new Set(ids)].filter((id) => this.#tasks.has(id))
    const records = there.map((key) => ({ key, atMillis: nowMillis, head: goneHead, body: "" }))
    return decided({ count: records.length }, records)
  }

  /** Leases that have ended, and what is past its retention, at most so many. */
  look(max: number, nowMillis: number): Decision<void, never> {
    const records: Array<ChannelRecord> = []
    const now = this.#clock()
    let tokens = this.#lastToken
    for (let due = this.#leases.peek(); due !== undefined && records.length < max; due = this.#leases.peek()) {
      if (this.#isCurrent(due.task)) {
        if (due.at > now) break
        const next = this.#after(due.task, { error: "its lease ended", delayMillis: 0, release: false })
        // The token that it was leased by is good for nothing more.
        records.push(recordOf({ ...next, token: ++tokens }, nowMillis))
      }
      this.#leases.pop()
    }
    const old = nowMillis - this.#topic.retentionMillis
    for (let task = this.#aging.peek(); task !== undefined && records.length < max; task = this.#aging.peek()) {
      if (this.#isCurrent(task)) {
        if (task.enqueuedMillis > old) break
        records.push(recordOf({ ...task, state: "dead", error: "nobody did it within the retention" }, nowMillis))
      }
      this.#aging.pop()
    }
    this.#sweep(nowMillis)
    return decided(undefined, records)
  }

  /** Monotonic time of the next lease's end or delay's; `undefined` for none. */
  nextDue(): number | undefined {
    for (const heap of [this.#leases, this.#delayed]) {
      while (heap.peek() !== undefined && !this.#isCurrent((heap.peek() as Due).task)) heap.pop()
    }
    const [lease, delay] = [this.#leases.peek()?.at, this.#delayed.peek()?.at]
    return lease === undefined ? delay : delay === undefined ? lease : Math.min(lease, delay)
  }

  /** A task that was leased and is no longer, undone. */
  #after(
    task: Task,
    { error, delayMillis, release }: { readonly error: string; readonly delayMillis: number; readonly release: boolean }
  ): Task {
    const attempts = release ? task.attempts - 1 : task.attempts
    const isDead = attempts >= this.#topic.attemptsMax
    return { ...task, attempts, state: isDead ? "dead" : "waiting", delayMillis, error, takeId: "", agent: "" }
  }

  #leasedBy(id: string, token: number): Result.Result<Task, LeaseLost | TaskNotFound> {
    const task = this.#tasks.get(id)
    if (task === undefined && !this.#done.has(id)) return Result.fail(this.#notFound(id))
    return task !== undefined && task.state === "leased" && task.token === token
      ? Result.succeed(task)
      : Result.fail(new LeaseLost({ topic: this.#topic.name, id, token }))
  }

  #notFound(id: string): TaskNotFound {
    return new TaskNotFound({ topic: this.#topic.name, id })
  }

  #isCurrent(task: Task): boolean {
    return this.#tasks.get(task.id) === task
  }

  /** Those whose delay has passed wait. */
  #wake(): void {
    const now = this.#clock()
    for (let due = this.#delayed.peek(); due !== undefined && due.at <= now; due = this.#delayed.peek()) {
      this.#delayed.pop()
      if (this.#isCurrent(due.task)) this.#waiting.push(due.task)
    }
  }

  #nextWaiting(): Task | undefined {
    for (;;) {
      const task = this.#waiting.pop()
      if (task === undefined || this.#isCurrent(task)) return task
    }
  }

  #put(task: Task): void {
    this.#lastToken = Math.max(this.#lastToken, task.token)
    this.#lastOrder = Math.max(this.#lastOrder, task.order)
    if (task.state === "done") {
      this.#tasks.delete(task.id)
      this.#done.set(task.id, { ...task, body: "" })
      trim(this.#done, this.#settings.tasksDoneMax)
      return
    }
    this.#tasks.set(task.id, task)
    this.#bytes += sizeOf(task)
    const now = this.#clock()
    switch (task.state) {
      case "leased": {
        this.#leased += 1
        this.#leases.push({ at: now + task.leaseMillis + this.#settings.taskGraceMillis, task })
        const taking = this.#byTaking.get(task.takeId) ?? new Set()
        this.#byTaking.set(task.takeId, taking.add(task.id))
        break
      }
      case "waiting":
        if (task.delayMillis === 0) this.#waiting.push(task)
        else this.#delayed.push({ at: now + task.delayMillis, task })
        this.#aging.push(task)
        break
      default: {
        this.#dead.set(task.id, task)
        while (this.#dead.size > this.#settings.tasksDeadMax) this.#drop(first(this.#dead) as Task)
      }
    }
    for (const heap of [this.#waiting, this.#aging]) this.#compact(heap, (one) => one)
    for (const heap of [this.#delayed, this.#leases]) this.#compact(heap, (one) => one.task)
  }

  /** Drops what was passed over once that is most of a heap. */
  #compact<A>(heap: Heap<A>, taskOfEntry: (entry: A) => Task): void {
    if (heap.size > 2 * this.#tasks.size + 1_024) heap.keep((entry) => this.#isCurrent(taskOfEntry(entry)))
  }

  #drop(task: Task): void {
    this.#unlink(task)
    this.#tasks.delete(task.id)
  }

  /** What it is counted in; it keeps its place, since another state of it follows. */
  #unlink(task: Task): void {
    if (task.state === "done") {
      this.#done.delete(task.id)
      return
    }
    this.#bytes -= sizeOf(task)
    if (task.state === "dead") this.#dead.delete(task.id)
    if (task.state !== "leased") return
    this.#leased -= 1
    const taking = this.#byTaking.get(task.takeId)
    taking?.delete(task.id)
    if (taking?.size === 0) this.#byTaking.delete(task.takeId)
  }

  /** What is done or dead for longer than the retention is forgotten: by everyone who reads the log, so it is not in it. */
  #sweep(nowMillis: number): void {
    const old = nowMillis - this.#topic.retentionMillis
    for (const map of [this.#done, this.#dead]) {
      for (let task = first(map); task !== undefined && task.atMillis <= old; task = first(map)) this.#drop(task)
    }
  }
}

const earlier = (a: Due, b: Due): boolean => a.at < b.at

const first = (map: ReadonlyMap<string, Task>): Task | undefined => map.values().next().value

const trim = (map: Map<string, Task>, max: number): void => {
  for (const id of map.keys()) {
    if (map.size <= max) return
    map.delete(id)
  }
}

const goneHead = '"gone"'

const blank = {
  state: "waiting",
  attempts: 0,
  token: 0,
  leaseMillis: 0,
  takeId: "",
  agent: "",
  error: "",
  result: ""
} as const

/** What a task counts in `taskBytesMax`. */
const sizeOf = ({ id, body, error }: Task): number => 256 + id.length + body.length + error.length

const decided = <A>(answer: A, records: ReadonlyArray<ChannelRecord>): Decision<A, never> => ({
  records,
  answer: Result.succeed(answer)
})

const failed = <E>(error: E): Decision<never, E> => ({ records: [], answer: Result.fail(error) })

const recordOf = (task: Task, atMillis: number, body = ""): ChannelRecord => {
  const {
    agent,
    attempts,
    delayMillis,
    enqueuedMillis,
    error,
    leaseMillis,
    order,
    priority,
    result,
    state,
    takeId,
    token
  } = task
  const head: Head = [
    priority,
    order,
    state,
    attempts,
    token,
    leaseMillis,
    takeId,
    agent,
    delayMillis,
    enqueuedMillis,
    error,
    result
  ]
  return { key: task.id, atMillis, head: JSON.stringify(head), body }
}

const taskOf = ({ key, atMillis, head, body }: ChannelRecord, bodyBefore: string): Task => {
  const [
    priority,
    order,
    state,
    attempts,
    token,
    leaseMillis,
    takeId,
    agent,
    delayMillis,
    enqueuedMillis,
    error,
    result
  ] = JSON.parse(head) as Head
  return {
    id: key,
    body: body === "" ? bodyBefore : body,
    priority,
    order,
    state,
    attempts,
    token,
    leaseMillis,
    takeId,
    agent,
    delayMillis,
    enqueuedMillis,
    atMillis,
    error,
    result
  }
}

const leasedOf = ({ id, token, body, priority, attempts, leaseMillis, enqueuedMillis }: Task): LeasedTask => ({
  id,
  token,
  body,
  priority,
  attempt: attempts,
  leaseMillis,
  enqueuedMillis
})

const summaryOf = ({
  id,
  state,
  body,
  priority,
  attempts,
  enqueuedMillis,
  agent,
  error,
  result
}: Task): TaskSummary => ({
  id,
  state,
  body,
  priority,
  attempts,
  enqueuedMillis,
  agent,
  error,
  result
})

const captured = function* (token: number, order: number, tasks: ReadonlyArray<Task>): Generator<ChannelRecord> {
  yield { key: "", atMillis: 0, head: JSON.stringify([token, order]), body: "" }
  for (const task of tasks) yield recordOf(task, task.atMillis, task.body)
}
