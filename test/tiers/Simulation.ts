/**
 * Several processes over one object store, in one thread, with every choice made by a seed: which message of the network
 * moves next, which is lost, comes twice or comes long after its sender gave up, who sleeps, who dies, and what each one's
 * clocks say meanwhile.
 *
 * A call of the store is three messages' worth of choices. Its **request** is parked until the scheduler delivers it; then
 * it takes **effect**, at once and atomically; then its **answer** is parked until it is delivered. On the way the caller may
 * be told that it failed: for certain (then it has no effect) or with doubt (then the request stays parked, to take effect at
 * any later time, or never). Timers and an index's work are parked the same way.
 *
 * Nothing runs but what the scheduler has let go: each step moves one thing and then lets everybody run until all wait again.
 */
import { readFile, rm, writeFile } from "node:fs/promises"
import { Cause, Clock, Context, Duration, Effect, Exit, type Fiber, References, Scheduler } from "effect"
import {
  ObjectChanged,
  ObjectExists,
  ObjectMissing,
  ObjectStore,
  type StoredObject,
  StoreFailure,
  withFileOf
} from "../../src/tiers/ObjectStore.ts"
import { seededRandom } from "./FaultyObjectStore.ts"
import { removeSimulatedFiles, seedRandomBytes } from "./SimulatedFiles.ts"

/** How ill a run is; shares are of messages, from 0 to 1. */
export interface Illness {
  /** Requests that are refused for certain. */
  readonly refused: number
  /** Requests whose sender gives up before they have taken effect. */
  readonly late: number
  /** Of those, the ones that never arrive. */
  readonly lost: number
  /** Answers that never arrive. */
  readonly unanswered: number
  /** Writes that arrive twice. */
  readonly twice: number
  /** Messages that take a hundred times as long as others. */
  readonly slow: number
  /** A step in which a process falls asleep, dies, or has its wall clock set. */
  readonly asleep: number
  readonly killed: number
  readonly clockSet: number
}

/** One process: its clocks and whether it runs. */
export class Machine {
  readonly name: string
  readonly #simulation: Simulation
  /** Its clocks' milliseconds in one of the simulation's. */
  readonly rate: number
  /** Whether its sleep stops the monotonic clock (a suspended machine) or not (a process that is not scheduled). */
  readonly suspends: boolean
  wallOffset = 0
  suspendedMillis = 0
  asleepUntil = 0
  dead = false

  constructor(simulation: Simulation, name: string, rate: number, suspends: boolean) {
    this.#simulation = simulation
    this.name = name
    this.rate = rate
    this.suspends = suspends
  }

  monotonicMillis(): number {
    return (this.#simulation.now - this.suspendedMillis) * this.rate
  }

  wallMillis(): number {
    return Math.trunc(1_700_000_000_000 + this.#simulation.now * this.rate + this.wallOffset)
  }

  get awake(): boolean {
    return !this.dead && this.asleepUntil <= this.#simulation.now
  }
}

/** Something that waits to be moved on by the scheduler. */
interface Parked {
  readonly machine: Machine
  readonly what: string
  readonly weight: number
  /** In the network towards the store, or on its way back; a timer or work of the process itself is `local`. */
  phase: "request" | "answer" | "local"
  readonly write: boolean
  readonly apply: () => Effect.Effect<unknown, unknown>
  resume: ((effect: Effect.Effect<never, never>) => void) | undefined
  answer: Effect.Effect<unknown, unknown>
}

interface Timer {
  readonly machine: Machine
  readonly dueMonotonicMillis: number
  readonly resume: () => void
}

interface Running {
  readonly machine: Machine
  readonly fiber: Fiber.Fiber<unknown, unknown>
  readonly ended: () => void
}

const stepsMax = 20_000

export class Simulation {
  readonly seed: number
  readonly random: () => number
  readonly illness: Illness
  /** True time in milliseconds, which no process sees. */
  now = 0
  steps = 0
  readonly #objects = new Map<string, { readonly body: Uint8Array; readonly etag: string }>()
  #etags = 0
  #parked: Array<Parked> = []
  #timers: Array<Timer> = []
  #running: Array<Running> = []
  #healed = false
  /** What happened, newest last, bounded: printed with a failure. */
  readonly trace: Array<string> = []
  /** A number that is the same for two runs in which the same happened. */
  digest = 0
  /** Called with each read and write of an object as it takes effect. */
  onEffect: (machine: string, operation: string, key: string, body: Uint8Array | undefined) => void = () => {}
  readonly counts = { late: 0, twice: 0, killed: 0, slept: 0, clockSet: 0, refused: 0, unanswered: 0 }

  constructor(seed: number, illness: Illness) {
    this.seed = seed
    this.random = seededRandom(seed)
    this.illness = illness
    removeSimulatedFiles()
    seedRandomBytes(seededRandom(seed ^ 0x5bd1_e995))
  }

  chance(share: number): boolean {
    return share > 0 && this.random() < share
  }

  below(n: number): number {
    return Math.floor(this.random() * n)
  }

  machine(name: string): Machine {
    const ill = this.illness.clockSet > 0 || this.illness.asleep > 0
    return new Machine(this, name, ill ? 0.7 + this.random() * 0.7 : 1, ill && this.chance(0.3))
  }

  /** Runs a program as a process; `ended` is called when it has ended or was killed, and may spawn another. */
  spawn<A, E>(machine: Machine, program: Effect.Effect<A, E, ObjectStore>, ended: () => void = () => {}): void {
    const context = Context.make(ObjectStore, this.#storeOf(machine)).pipe(
      Context.add(Clock.Clock, this.#clockOf(machine)),
      Context.add(Scheduler.Scheduler, new Scheduler.MixedScheduler("async", microtask)),
      Context.add(References.MinimumLogLevel, "None")
    )
    const fiber = Effect.runForkWith(context)(program)
    this.#running.push({ machine, fiber, ended })
  }

  /** Moves one thing after the other until every process has ended. A defect of one ends the run. */
  async run(): Promise<void> {
    for (;;) {
      await settled()
      const ended = this.#running.filter(({ machine, fiber }) => {
        const exit = fiber.pollUnsafe()
        if (exit !== undefined && Exit.isFailure(exit)) throw Cause.squash(exit.cause)
        return exit !== undefined || machine.dead
      })
      this.#running = this.#running.filter((process) => !ended.includes(process))
      for (const process of ended) process.ended()
      if (this.#running.length === 0) return
      if (this.steps++ > stepsMax) throw new Error(`no end after ${stepsMax} steps`)
      this.#step()
    }
  }

  /** No more faults from here on, and everybody is awake. */
  heal(): void {
    this.#healed = true
  }

  /** Delivers, or drops, what given-up senders and the dead have left in the network. */
  drain(): void {
    for (const message of this.#parked.splice(0)) if (message.phase === "request") this.#takeEffect(message)
  }

  /** Work of a process that takes its time, such as an index's. */
  work(machine: Machine, what: string): Effect.Effect<void> {
    return Effect.callback<void>((resume) => {
      this.#park({ machine, what, write: false, phase: "local", apply: () => Effect.void, resume: resume as never })
    })
  }

  /** The objects as they are. */
  object(key: string): Uint8Array | undefined {
    return this.#objects.get(key)?.body
  }

  keys(): ReadonlyArray<string> {
    return [...this.#objects.keys()].sort()
  }

  note(text: string): void {
    for (let i = 0; i < text.length; i++) this.digest = (Math.imul(this.digest, 31) + text.charCodeAt(i)) | 0
    this.trace.push(`${this.steps} ${this.now.toFixed(0)} ms: ${text}`)
    if (this.trace.length > 400) this.trace.splice(0, 200)
  }

  #step(): void {
    this.now += this.random() * 4
    if (!this.#healed && this.#mishap()) return
    // Timers first where they are due: which of two is the first is a choice as well.
    const due = this.#timers.filter(
      ({ machine, dueMonotonicMillis }) => this.#runs(machine) && machine.monotonicMillis() >= dueMonotonicMillis
    )
    if (due.length > 0 && this.chance(0.5)) {
      const timer = due[this.below(due.length)] as Timer
      this.#timers.splice(this.#timers.indexOf(timer), 1)
      this.note(`${timer.machine.name} timer`)
      return timer.resume()
    }
    const message = this.#choose()
    if (message === undefined) {
      // Everybody waits for time to pass.
      this.now += 5 + this.random() * 200
      return
    }
    this.#move(message)
  }

  /** Something happens to a process. */
  #mishap(): boolean {
    const { asleep, killed, clockSet } = this.illness
    const { machine } = this.#running[this.below(this.#running.length)] as Running
    if (this.chance(asleep)) {
      const millis = 50 + this.random() ** 3 * 6_000
      machine.asleepUntil = this.now + millis
      if (machine.suspends) machine.suspendedMillis += millis
      this.counts.slept += 1
      this.note(`${machine.name} sleeps ${millis.toFixed(0)} ms`)
      return true
    }
    if (this.chance(killed)) {
      machine.dead = true
      this.counts.killed += 1
      this.note(`${machine.name} is killed`)
      // What it sent is on its way; what it waited for is not.
      this.#timers = this.#timers.filter((timer) => timer.machine !== machine)
      this.#parked = this.#parked.filter((message) => message.machine !== machine || message.phase === "request")
      for (const message of this.#parked) if (message.machine === machine) message.resume = undefined
      return true
    }
    if (this.chance(clockSet)) {
      // A clock is set back only where the other one goes on through sleep: a machine whose clocks both stand is not fenced by time.
      const direction = machine.suspends || this.chance(0.6) ? 1 : -1
      machine.wallOffset += direction * this.random() * 100_000
      this.counts.clockSet += 1
      this.note(`${machine.name} clock set to ${machine.wallMillis().toFixed(0)}`)
      return true
    }
    return false
  }

  #runs(machine: Machine): boolean {
    return machine.awake || (this.#healed && !machine.dead)
  }

  #choose(): Parked | undefined {
    let total = 0
    const movable = (message: Parked) => message.phase === "request" || this.#runs(message.machine)
    for (const message of this.#parked) if (movable(message)) total += message.weight
    if (total === 0) return undefined
    let at = this.random() * total
    for (const message of this.#parked) {
      if (!movable(message)) continue
      at -= message.weight
      if (at < 0) return message
    }
    return undefined
  }

  #move(message: Parked): void {
    const { refused, late, lost, unanswered, twice } = this.#healed ? healthy : this.illness
    const remove = () => this.#parked.splice(this.#parked.indexOf(message), 1)
    const answer = (effect: Effect.Effect<unknown, unknown>, said: string) => {
      const { resume } = message
      message.resume = undefined
      this.note(`${message.machine.name} ${message.what}: ${said}`)
      resume?.(effect as Effect.Effect<never, never>)
    }
    if (message.phase === "local") {
      remove()
      return answer(Effect.void, "done")
    }
    if (message.phase === "answer") {
      remove()
      if (this.chance(unanswered)) {
        this.counts.unanswered += 1
        return answer(failure(message, "timed out after it", message.write), "no answer")
      }
      return answer(message.answer, "answered")
    }
    if (message.resume === undefined) {
      // Nobody waits for it any more.
      remove()
      if (this.chance(lost)) return this.note(`${message.machine.name} ${message.what}: lost`)
      this.#takeEffect(message)
      return this.note(`${message.machine.name} ${message.what}: takes effect late`)
    }
    if (this.chance(refused)) {
      remove()
      this.counts.refused += 1
      return answer(failure(message, "refused", false), "refused")
    }
    if (this.#runs(message.machine) && this.chance(late)) {
      if (!message.write) remove()
      this.counts.late += 1
      return answer(failure(message, "timed out", message.write), "given up")
    }
    if (message.write && this.chance(twice)) {
      this.counts.twice += 1
      this.#parked.push({ ...message, resume: undefined })
    }
    this.#takeEffect(message)
    message.phase = "answer"
    this.note(`${message.machine.name} ${message.what}: takes effect`)
  }

  #takeEffect(message: Parked): void {
    message.answer = message.apply()
  }

  #park(message: Omit<Parked, "weight" | "answer">): void {
    this.#parked.push({ ...message, weight: this.chance(this.illness.slow) ? 0.01 : 1, answer: Effect.void })
  }

  #call<A, E>(
    machine: Machine,
    operation: string,
    key: string,
    write: boolean,
    apply: () => Effect.Effect<A, E>
  ): Effect.Effect<A, E | StoreFailure> {
    return Effect.callback<A, E | StoreFailure>((resume) => {
      this.#park({
        machine,
        what: `${operation} ${key}`,
        write,
        phase: "request",
        apply,
        resume: resume as never
      })
    })
  }

  #storeOf(machine: Machine): ObjectStore["Service"] {
    const objects = this.#objects
    const put = (operation: string, key: string, body: Uint8Array) => {
      const etag = `e${++this.#etags}`
      objects.set(key, { body, etag })
      this.onEffect(machine.name, operation, key, body)
      return Effect.succeed(etag)
    }
    const read = (key: string): Effect.Effect<StoredObject, ObjectMissing> => {
      const found = objects.get(key)
      this.onEffect(machine.name, "get", key, found?.body)
      if (found === undefined) return Effect.fail(new ObjectMissing({ key }))
      return Effect.succeed({ body: found.body.slice(), etag: found.etag, sizeBytes: found.body.length })
    }
    const create = (key: string, body: Uint8Array) =>
      this.#call(machine, "create", key, true, () =>
        objects.has(key) ? Effect.fail(new ObjectExists({ key })) : put("create", key, body)
      )
    const localPath = (key: string) =>
      Effect.flatMap(
        this.#call(machine, "withFile", key, false, () => read(key)),
        ({ body, etag }) => {
          const path = `object-${machine.name}-${etag}-${this.steps}`
          return Effect.acquireRelease(
            Effect.as(
              Effect.promise(() => writeFile(path, body)),
              path
            ),
            () => Effect.promise(() => rm(path))
          )
        }
      )
    return ObjectStore.of({
      create: (key, body) =>
        body instanceof Uint8Array
          ? Effect.suspend(() => create(key, body.slice()))
          : Effect.flatMap(
              Effect.promise(() => readFile(body.file)),
              (bytes) => create(key, bytes)
            ),
      replace: (key, body, expected) =>
        Effect.suspend(() => {
          const copy = body.slice()
          return this.#call(machine, "replace", key, true, (): Effect.Effect<string, ObjectMissing | ObjectChanged> => {
            const found = objects.get(key)
            if (found === undefined) return Effect.fail(new ObjectMissing({ key }))
            if (found.etag !== expected) return Effect.fail(new ObjectChanged({ key }))
            return put("replace", key, copy)
          })
        }),
      get: (key, range) =>
        Effect.map(
          this.#call(machine, "get", key, false, () => read(key)),
          (found) =>
            range === undefined
              ? found
              : { ...found, body: found.body.subarray(range.offset, range.offset + range.length) }
        ),
      list: (prefix, options) =>
        this.#call(machine, "list", prefix, false, () =>
          Effect.succeed(
            this.keys()
              .filter((key) => key.startsWith(prefix) && key > (options?.startAfter ?? ""))
              .slice(0, options?.limit ?? 1_000)
              .map((key) => ({ key, sizeBytes: objects.get(key)?.body.length ?? 0 }))
          )
        ),
      delete: (key) =>
        this.#call(machine, "delete", key, true, () => {
          objects.delete(key)
          this.onEffect(machine.name, "delete", key, undefined)
          return Effect.void
        }),
      localPath,
      withFile: withFileOf(localPath)
    })
  }

  #clockOf(machine: Machine): Clock.Clock {
    const nanos = (millis: number) => BigInt(Math.round(millis * 1_000)) * 1_000n
    return {
      currentTimeMillisUnsafe: () => machine.wallMillis(),
      currentTimeMillis: Effect.sync(() => machine.wallMillis()),
      currentTimeNanosUnsafe: () => nanos(machine.wallMillis()),
      currentTimeNanos: Effect.sync(() => nanos(machine.wallMillis())),
      monotonicTimeNanosUnsafe: () => nanos(machine.monotonicMillis()),
      monotonicTimeNanos: Effect.sync(() => nanos(machine.monotonicMillis())),
      sleep: (duration: Duration.Duration) =>
        Effect.callback<void>((resume) => {
          const timer: Timer = {
            machine,
            dueMonotonicMillis: machine.monotonicMillis() + Duration.toMillis(duration),
            resume: () => resume(Effect.void)
          }
          this.#timers.push(timer)
          return Effect.sync(() => {
            const at = this.#timers.indexOf(timer)
            if (at >= 0) this.#timers.splice(at, 1)
          })
        })
    }
  }
}

export const healthy: Illness = {
  refused: 0,
  late: 0,
  lost: 0,
  unanswered: 0,
  twice: 0,
  slow: 0,
  asleep: 0,
  killed: 0,
  clockSet: 0
}

/** Each kind of illness is absent from some runs and strong in others. */
export const illnessOf = (seed: number): Illness => {
  const random = seededRandom(seed * 7_919 + 13)
  const share = (most: number) => (random() < 0.4 ? 0 : random() * most)
  return {
    refused: share(0.08),
    late: share(0.15),
    lost: random(),
    unanswered: share(0.1),
    twice: share(0.15),
    slow: share(0.15),
    asleep: share(0.02),
    killed: share(0.006),
    clockSet: share(0.02)
  }
}

const failure = ({ what }: Parked, detail: string, uncertain: boolean): Effect.Effect<never, StoreFailure> => {
  const [operation = "", key = ""] = what.split(" ")
  return Effect.fail(new StoreFailure({ operation, key, detail: `simulated: ${detail}`, uncertain }))
}

const microtask = (run: () => void): (() => void) => {
  let cancelled = false
  queueMicrotask(() => {
    if (!cancelled) run()
  })
  return () => {
    cancelled = true
  }
}

/** When everything that can run without the scheduler has run: nothing but microtasks is used. */
const settled = (): Promise<void> => new Promise((resolve) => setImmediate(resolve))
