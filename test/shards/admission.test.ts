/** The door in front of searches: how many are under way, who waits, who is refused, and with what. */
import { Context, Effect, Exit, Fiber, Layer, Scope } from "effect"
import { afterEach, assert, describe, test } from "vitest"
import { defaultSettings, Settings, type SettingValues } from "../../src/config.ts"
import { Overloaded } from "../../src/protocol/Errors.ts"
import { Admission } from "../../src/shards/Admission.ts"
import { ConcurrencyLimit, type Kind } from "../../src/shards/ConcurrencyLimit.ts"
import { FairLine, type Waiter } from "../../src/shards/FairLine.ts"
import { LatencyWindow } from "../../src/shards/LatencyWindow.ts"
import { Shedding, type Tier } from "../../src/shards/Shedding.ts"
import { random, seeded, seedOf } from "../support/Seeded.ts"

/**
 * `servers` that each carry out one search at a time, fed with as many as the limit lets under way: a queue before them that
 * never ends. Returns the limit and the share of the time that servers were busy, over the last half.
 */
const saturate = (
  limit: ConcurrencyLimit,
  options: {
    readonly servers: number
    readonly serviceMillis: () => number
    readonly fromMillis: number
    readonly forMillis: number
    readonly kinds?: ReadonlyArray<{ readonly kind: Kind; readonly factor: number }>
    readonly random: () => number
  }
): { readonly limit: number; readonly busy: number; readonly slowdown: number } => {
  const { forMillis, fromMillis, random, servers, serviceMillis } = options
  const kinds = options.kinds ?? [{ kind: { aloneMillis: 0 }, factor: 1 }]
  const freeAt = new Array<number>(servers).fill(fromMillis)
  const underWay: Array<{ endsAt: number; beganAt: number; alone: boolean; kind: Kind }> = []
  let busyMillis = 0
  let limits = 0
  let slowdowns = 0
  let samples = 0
  const half = fromMillis + forMillis / 2
  for (let now = fromMillis; now < fromMillis + forMillis; ) {
    while (limit.hasRoom) {
      const { factor, kind } = kinds[Math.floor(random() * kinds.length)] as (typeof kinds)[number]
      const server = freeAt.indexOf(Math.min(...freeAt))
      const work = serviceMillis() * factor
      const endsAt = Math.max(now, freeAt[server] as number) + work
      freeAt[server] = endsAt
      if (now > half) busyMillis += work
      underWay.push({ endsAt, beganAt: now, alone: limit.begin(), kind })
    }
    underWay.sort((a, b) => a.endsAt - b.endsAt)
    const next = underWay.shift()
    if (next === undefined) throw new Error("nothing is under way")
    now = Math.max(now, next.endsAt)
    limit.end(next.kind, next.alone, now - next.beganAt, now)
    if (now > half) {
      limits += limit.limit
      slowdowns += limit.slowdown
      samples += 1
    }
  }
  for (const _ of underWay) limit.drop()
  return { limit: limits / samples, busy: busyMillis / servers / (forMillis / 2), slowdown: slowdowns / samples }
}

const limitOf = (parallel: number, initial: number) =>
  new ConcurrencyLimit({ min: 2, max: 1_000, initial, parallel, tolerance: 2, probeMillis: 2_000 }, 0)

describe("the limit", () => {
  test("comes down to what keeps few servers busy, and stays there for as long as there is too much", () =>
    seeded(seedOf(4), async ({ next: random }) => {
      const limit = limitOf(2, 500)
      const serviceMillis = () => 1 + random()
      const early = saturate(limit, { servers: 2, serviceMillis, fromMillis: 0, forMillis: 10_000, random })
      assert.isBelow(early.limit, 30)
      // A minute of nothing but overload: what searches take alone is not forgotten, so the limit does not creep up.
      const late = saturate(limit, { servers: 2, serviceMillis, fromMillis: 10_000, forMillis: 60_000, random })
      assert.isBelow(late.limit, 30)
      assert.isAbove(late.busy, 0.9)
    }))

  test("goes up with the servers there are", () =>
    seeded(seedOf(4), async ({ next: random }) => {
      const limit = limitOf(2, 8)
      const serviceMillis = () => 1 + random()
      const few = saturate(limit, { servers: 2, serviceMillis, fromMillis: 0, forMillis: 20_000, random })
      const many = saturate(limit, { servers: 16, serviceMillis, fromMillis: 20_000, forMillis: 20_000, random })
      assert.isAbove(many.limit, 2 * few.limit)
      assert.isAbove(many.busy, 0.9)
      const again = saturate(limit, { servers: 2, serviceMillis, fromMillis: 40_000, forMillis: 20_000, random })
      assert.isBelow(again.limit, many.limit / 2)
    }))

  test("is not lowered by searches that take long because they look at much", () =>
    seeded(seedOf(4), async ({ next: random }) => {
      const kinds = [1, 5, 50].map((factor) => ({ kind: { aloneMillis: 0 }, factor }))
      const limit = limitOf(4, 64)
      const serviceMillis = () => 0.2 + random() / 10
      const { busy } = saturate(limit, { servers: 4, serviceMillis, kinds, fromMillis: 0, forMillis: 30_000, random })
      assert.isAbove(busy, 0.85)
    }))

  test("stays as it is while few are under way", () => {
    const limit = limitOf(4, 40)
    const kind = { aloneMillis: 0 }
    for (let now = 0; now < 10_000; now += 2) {
      const alone = limit.begin()
      limit.end(kind, alone, 1, now + 1)
    }
    assert.strictEqual(limit.limit, 40)
  })
})

test("percentiles of the last periods are within a tenth", () => {
  const window = new LatencyWindow(3)
  for (let i = 1; i <= 1_000; i++) window.add(i)
  assert.closeTo(window.percentile(0.99), 990, 99)
  assert.closeTo(window.percentile(0.5), 500, 50)
  assert.strictEqual(window.percentile(0.99, 1_001), 0)
  window.turn()
  window.add(5)
  assert.closeTo(window.percentile(0.99), 990, 99)
  window.turn()
  window.turn()
  assert.closeTo(window.percentile(0.99), 5, 0.5)
  window.turn()
  assert.strictEqual(window.percentile(0.99), 0)
})

const scopes: Array<Scope.Closeable> = []
afterEach(async () => {
  for (const scope of scopes.splice(0)) await Effect.runPromise(Scope.close(scope, Exit.void))
})

/** A door with a clock that the test moves. */
const openDoor = async (settings: Partial<SettingValues> = {}) => {
  const clock = { now: 1_000 }
  const now = () => clock.now
  const scope = await Effect.runPromise(Scope.make())
  scopes.push(scope)
  const layer = Admission.layerWith({ parallel: 1, now }).pipe(
    Layer.provideMerge(Shedding.layerWith({ random: random(seedOf(4)).next, now })),
    Layer.provideMerge(
      Layer.succeed(Settings, { ...defaultSettings, searchLimitMin: 1, searchLimitMax: 1, ...settings })
    )
  )
  const context = await Effect.runPromise(Layer.buildWithScope(layer, scope))
  const admission = Context.get(context, Admission)
  const kind: Kind = { aloneMillis: 0 }
  const begun: Array<string> = []
  const running: Array<() => void> = []
  /** A search that ends when the test says so. */
  const search = (name: string, tier: Tier = "standard", deadlineMillis = 10_000, source?: string) => {
    let end: (effect: Effect.Effect<string>) => void = () => {}
    const work = Effect.callback<string>((resume) => {
      begun.push(name)
      end = resume
      running.push(() => resume(Effect.succeed(name)))
    })
    const fiber = Effect.runFork(admission.run({ kind, tier, source, deadlineMillis }, work))
    return { fiber, end: () => end(Effect.succeed(name)), exit: () => Effect.runPromise(Fiber.await(fiber)) }
  }
  /** Answers the one that has been under way longest; what follows from it has happened then. */
  const endOne = async () => {
    running.shift()?.()
    await new Promise((resolve) => setImmediate(resolve))
    await new Promise((resolve) => setImmediate(resolve))
  }
  return { admission, endOne, shedding: Context.get(context, Shedding), clock, search, begun, kind }
}

const settle = () => new Promise((resolve) => setTimeout(resolve, 5))

const errorOf = (exit: Exit.Exit<unknown, unknown>): unknown => {
  const error = Exit.findErrorOption(exit)
  return error._tag === "Some" ? error.value : undefined
}

describe("the door", () => {
  test("sees an overload by many sources that each ask little, and refuses nearly all of it before it is read", async () => {
    const { admission, clock, endOne, search } = await openDoor({ searchQueueMin: 4 })
    let atTheDoor = 0
    let later = 0
    let arrived = 0
    // One a millisecond is answered, and three come, of a thousand sources in turn.
    for (let millisecond = 0; millisecond < 2_000; millisecond++) {
      clock.now += 1
      for (let i = 0; i < 3; i++) {
        const source = `s${arrived++ % 1_000}`
        const isLate = millisecond >= 1_000
        if (admission.isPressed() && admission.refusal({ tier: "standard" }, source) !== undefined) {
          if (isLate) atTheDoor += 1
        } else {
          search(source, "standard", 10_000, source).fiber.addObserver((exit) => {
            if (isLate && Exit.isFailure(exit)) later += 1
          })
        }
      }
      await endOne()
    }
    assert.isAtMost(admission.state().waiting, 8)
    assert.isAbove(atTheDoor, 1_500)
    assert.isBelow(later, atTheDoor / 10)
  })

  test("refuses nobody for a look at what searches take alone: who would be under way waits", async () => {
    const underWay = 8
    const { admission, clock, endOne, search } = await openDoor({
      ...{ searchLimitMin: underWay, searchLimitMax: underWay, searchProbeMillis: 500 },
      ...{ searchQueueMin: 4, searchQueueMillis: 1 }
    })
    let arrived = 0
    let looks = 0
    // As above, an overload.
    for (let millisecond = 0; millisecond < 3_000; millisecond++) {
      clock.now += 1
      for (let i = 0; i < 3; i++) {
        const source = `s${arrived++ % 1_000}`
        if (admission.refusal({ tier: "standard" }, source) === undefined) search(source, "standard", 10_000, source)
      }
      await endOne()
      const state = admission.state()
      if (millisecond < 1_000 || state.limit === underWay) continue
      looks += 1
      assert.isAtLeast(state.underWay + state.waiting, underWay + 4 - 1)
    }
    assert.isAbove(looks, 10)
  })

  test("lets begin as many as the limit says, the others in the order they came", async () => {
    const { admission, begun, search } = await openDoor()
    const all = ["a", "b", "c"].map((name) => search(name))
    assert.deepStrictEqual(begun, ["a"])
    assert.strictEqual(admission.state().waiting, 2)
    for (const one of all) {
      one.end()
      await settle()
    }
    assert.deepStrictEqual(begun, ["a", "b", "c"])
    assert.strictEqual(admission.state().underWay, 0)
  })

  test("refuses, typed and with a time to come back, where the queue is full; before a body is read too", async () => {
    const { admission, search } = await openDoor({ searchQueueMax: 2 })
    const under = search("under way")
    assert.isUndefined(admission.refusal({ tier: "standard" }))
    const waiting = [search("w1"), search("w2")]
    const refusal = admission.refusal({ tier: "standard" })
    assert.strictEqual(refusal?.bound, "searchQueue")
    const refused = errorOf(await search("r").exit())
    assert.instanceOf(refused, Overloaded)
    assert.isAtLeast((refused as Overloaded).retryAfterMillis, defaultSettings.shedRetryMillis / 2)
    for (const one of [under, ...waiting]) {
      one.end()
      await settle()
    }
    assert.isUndefined(admission.refusal({ tier: "standard" }))
  })

  test("takes premium first, in the place of the newest that is not where the queue is full", async () => {
    const { admission, begun, search } = await openDoor({ searchQueueMax: 2 })
    const under = search("under way")
    const first = search("s1")
    const second = search("s2")
    assert.isUndefined(admission.refusal({ tier: "premium" }))
    const premium = search("p", "premium")
    assert.instanceOf(errorOf(await second.exit()), Overloaded)
    for (const one of [under, premium, first]) {
      one.end()
      await settle()
    }
    assert.deepStrictEqual(begun, ["under way", "p", "s1"])
    assert.strictEqual(admission.state().waiting, 0)
  })

  test("gives back the place of a search that was interrupted, waiting or under way", async () => {
    const { admission, begun, search } = await openDoor()
    const under = search("under way")
    const gone = search("gone")
    const next = search("next")
    await Effect.runPromise(Fiber.interrupt(gone.fiber))
    await Effect.runPromise(Fiber.interrupt(under.fiber))
    await settle()
    assert.deepStrictEqual(begun, ["under way", "next"])
    next.end()
    await settle()
    assert.deepStrictEqual(admission.state().underWay, 0)
    assert.deepStrictEqual(admission.state().waiting, 0)
  })

  test("refuses at once what cannot be answered within its deadline", async () => {
    const { clock, search } = await openDoor()
    // Ten milliseconds each, for long enough to be known.
    for (let i = 0; i < 40; i++) {
      const one = search("warm")
      clock.now += 10
      one.end()
      await one.exit()
    }
    const under = search("under way")
    const waiting = Array.from({ length: 5 }, () => search("w"))
    const late = errorOf(await search("late", "standard", 20).exit())
    assert.instanceOf(late, Overloaded)
    assert.strictEqual((late as Overloaded).bound, "deadline_ms")
    const inTime = search("in time", "standard", 500)
    for (const one of [under, ...waiting, inTime]) {
      one.end()
      await settle()
    }
    assert.deepStrictEqual(await inTime.exit(), Exit.succeed("in time"))
  })

  test("keeps the queue short once it has stood for a while, and lets it be again when the load is gone", async () => {
    const { admission, clock, endOne, search } = await openDoor({ searchQueueMin: 3, searchQueueMillis: 5 })
    // Three come for each that is answered, of ten milliseconds.
    let longest = 0
    for (let i = 0; i < 300; i++) {
      for (let n = 0; n < 3; n++) search("x")
      longest = i < 100 ? 0 : Math.max(longest, admission.state().waiting)
      clock.now += 10
      await endOne()
    }
    assert.isAtMost(longest, 3)
    while (admission.state().underWay > 0) await endOne()
    for (let i = 0; i < 300; i++) {
      search("alone")
      clock.now += 10
      await endOne()
    }
    for (let i = 0; i < 20; i++) search("burst")
    assert.strictEqual(admission.state().waiting, 19)
    while (admission.state().underWay > 0) await endOne()
  })
})

interface Model extends Waiter<Model> {
  readonly name: number
}

/** What the line does, said with plain arrays. */
class PlainLine {
  /** In the order of their turns, each with what it has waiting, oldest first. */
  sources: Array<{ readonly source: string; waiting: Array<Model> }> = []

  of(source: string): Array<Model> {
    return this.sources.find((one) => one.source === source)?.waiting ?? []
  }
  push(waiter: Model): void {
    const { source } = waiter
    if (this.of(source).length === 0) this.sources.push({ source, waiting: [] })
    this.of(source).push(waiter)
  }
  remove(waiter: Model): void {
    const waiting = this.of(waiter.source)
    waiting.splice(waiting.indexOf(waiter), 1)
    this.sources = this.sources.filter((one) => one.waiting.length > 0)
  }
  turnIsOver(source: string): void {
    const at = this.sources.findIndex((one) => one.source === source)
    if (at >= 0) this.sources.push(...this.sources.splice(at, 1))
  }
  get longest(): number {
    return Math.max(0, ...this.sources.map(({ waiting }) => waiting.length))
  }
}

test("the line is what a plain one is, whatever is done with it", () =>
  seeded(seedOf(6), async ({ below, next, pick }) => {
    const line = new FairLine<Model>()
    const plain = new PlainLine()
    const names = ["a", "b", "c", "d", "e"]
    for (let i = 0; i < 3_000; i++) {
      const act = next()
      if (act < 0.45) {
        const waiter: Model = { name: i, source: pick(names), older: undefined, newer: undefined }
        line.push(waiter)
        plain.push(waiter)
      } else if (act < 0.7) {
        const first = plain.sources[0]?.waiting[0]
        assert.strictEqual(line.take(), first)
        if (first === undefined) continue
        plain.remove(first)
        if (next() < 0.8) {
          line.turnIsOver(first.source)
          plain.turnIsOver(first.source)
        }
      } else if (act < 0.85) {
        const { longest } = plain
        const taken = line.takeOfLongest()
        assert.strictEqual(taken === undefined, longest === 0)
        if (taken === undefined) continue
        const waiting = plain.of(taken.source)
        assert.strictEqual(waiting.length, longest)
        assert.strictEqual(waiting.at(-1), taken)
        plain.remove(taken)
      } else {
        const all = plain.sources.flatMap(({ waiting }) => waiting)
        if (all.length === 0) continue
        const gone = all[below(all.length)] as Model
        line.remove(gone)
        plain.remove(gone)
      }
      const all = plain.sources.flatMap(({ waiting }) => waiting)
      assert.strictEqual(line.size, all.length)
      assert.strictEqual(line.longest, plain.longest)
      for (const name of names) {
        assert.strictEqual(line.sizeOf(name), plain.of(name).length)
        assert.strictEqual(line.yieldsTo(name), plain.longest >= plain.of(name).length + 2)
      }
      const even = ({ name }: Model) => name % 2 === 0
      const over = plain.sources.flatMap(({ waiting }) => {
        const first = waiting.findIndex((one) => !even(one))
        return first === -1 ? waiting : waiting.slice(0, first)
      })
      assert.deepStrictEqual(
        line.over(even).map(({ name }) => name),
        over.map(({ name }) => name)
      )
    }
  }))

describe("between sources", () => {
  const standard = { tier: "standard" } as const

  test("each has its turn: one that has much waiting waits for itself", async () => {
    const { begun, endOne, search } = await openDoor()
    for (const name of ["g1", "g2", "g3", "g4"]) search(name, "standard", 10_000, "greedy")
    search("m1", "standard", 10_000, "modest")
    search("n1", "standard", 10_000, "other")
    search("m2", "standard", 10_000, "modest")
    for (let i = 0; i < 7; i++) await endOne()
    assert.deepStrictEqual(begun, ["g1", "g2", "m1", "n1", "g3", "m2", "g4"])
  })

  test("where the queue is full, the newest of who has most makes room, also before a body is read", async () => {
    const { admission, begun, endOne, search } = await openDoor({ searchQueueMax: 4 })
    const greedy = ["g1", "g2", "g3", "g4", "g5"].map((name) => search(name, "standard", 10_000, "greedy"))
    assert.strictEqual(admission.refusal(standard, "greedy")?.bound, "searchQueue")
    assert.isUndefined(admission.refusal(standard, "modest"))
    search("m1", "standard", 10_000, "modest")
    assert.instanceOf(errorOf(await (greedy[4] as (typeof greedy)[0]).exit()), Overloaded)
    // Three and one: another of the modest one's has a place too, and then both have as much.
    search("m2", "standard", 10_000, "modest")
    assert.instanceOf(errorOf(await (greedy[3] as (typeof greedy)[0]).exit()), Overloaded)
    assert.strictEqual(admission.refusal(standard, "modest")?.bound, "searchQueue")
    assert.instanceOf(errorOf(await search("m3", "standard", 10_000, "modest").exit()), Overloaded)
    assert.strictEqual(admission.state().waiting, 4)
    for (let i = 0; i < 5; i++) await endOne()
    assert.deepStrictEqual(begun, ["g1", "g2", "m1", "g3", "m2"])
  })

  test("premium sources have turns among themselves, before all others", async () => {
    const { begun, endOne, search } = await openDoor({ searchQueueMax: 4 })
    search("under way")
    for (const name of ["s1", "s2"]) search(name, "standard", 10_000, "standard")
    for (const name of ["p1", "p2", "p3", "p4", "p5"]) search(name, "premium", 10_000, "greedy")
    search("q1", "premium", 10_000, "modest")
    for (let i = 0; i < 5; i++) await endOne()
    assert.deepStrictEqual(begun, ["under way", "p1", "q1", "p2", "p3"])
  })

  test("what waited too long does not cost its source its turn", async () => {
    const { begun, clock, endOne, search } = await openDoor({ searchQueueBurstMillis: 100 })
    search("under way")
    search("o1", "standard", 10_000, "other")
    const late = ["g1", "g2", "g3"].map((name) => search(name, "standard", 10_000, "greedy"))
    clock.now += 90
    search("g4", "standard", 10_000, "greedy")
    search("m1", "standard", 10_000, "modest")
    clock.now += 20
    // Nor is the only one of a source refused for it.
    await endOne()
    assert.deepStrictEqual(begun, ["under way", "o1"])
    await endOne()
    for (const one of late) assert.instanceOf(errorOf(await one.exit()), Overloaded)
    assert.deepStrictEqual(begun, ["under way", "o1", "g4"])
    await endOne()
    assert.deepStrictEqual(begun, ["under way", "o1", "g4", "m1"])
    await endOne()
  })

  test("nobody waits longer than his deadline, also where nothing ends", async () => {
    const { admission, begun, clock, endOne, search } = await openDoor({ searchQueueBurstMillis: 20 })
    search("under way")
    const only = search("only", "standard", 50, "modest")
    const late = search("late", "standard", 10_000, "greedy")
    search("last", "standard", 10_000, "greedy")
    clock.now += 40
    assert.instanceOf(errorOf(await late.exit()), Overloaded)
    assert.strictEqual(admission.state().waiting, 2)
    clock.now += 20
    const error = errorOf(await only.exit())
    assert.strictEqual((error as Overloaded).bound, "deadline_ms")
    await endOne()
    assert.deepStrictEqual(begun, ["under way", "last"])
    await endOne()
  })

  test("a greedy one is served with what modest ones leave, and these as if it were one of them", () =>
    seeded(seedOf(6), async ({ below, next }) => {
      // One search at a time, of ten milliseconds: the greedy one keeps hundreds waiting, each modest one at most one.
      const searchMillis = 10
      const { admission, clock, endOne, search } = await openDoor({ searchQueueMax: 200, searchQueueMin: 16 })
      const modest = 6
      const waits: Array<number> = []
      const asked = new Map<string, ReturnType<typeof search> | undefined>()
      let served = 0
      let refused = 0
      let greedyServed = 0
      let greedyRefused = 0
      let longestWithout = 0
      let without = 0
      for (let step = 0; step < 3_000; step++) {
        for (let n = below(8); n > 0; n--) {
          if (admission.refusal(standard, "greedy") !== undefined) {
            greedyRefused += 1
            continue
          }
          search("g", "standard", 10_000, "greedy").fiber.addObserver((exit) => {
            if (Exit.isSuccess(exit)) {
              greedyServed += 1
              without = 0
            } else greedyRefused += 1
          })
        }
        for (let m = 0; m < modest; m++) {
          const source = `modest ${m}`
          // A mean of less than its share, which is one in seven.
          if (asked.get(source) !== undefined || next() > 0.1) continue
          if (admission.refusal(standard, source) !== undefined) refused += 1
          const from = step
          const one = search("m", "standard", 10_000, source)
          asked.set(source, one)
          one.fiber.addObserver((exit) => {
            asked.set(source, undefined)
            if (Exit.isSuccess(exit)) {
              served += 1
              waits.push(step - from)
            } else refused += 1
          })
        }
        assert.isAtLeast(admission.state().underWay, step < 10 ? 0 : 1, "there is always somebody to serve")
        clock.now += searchMillis
        without += 1
        await endOne()
        longestWithout = Math.max(longestWithout, without)
      }
      assert.strictEqual(refused, 0, "a modest source was refused")
      assert.isAbove(waits.length, 500)
      // Its own, the one under way, and one of each other source.
      assert.isAtMost(Math.max(...waits), modest + 2)
      assert.isAtLeast(served + greedyServed, 2_980, "work was left undone")
      assert.isAbove(greedyServed, 3_000 - modest * 0.1 * 3_000)
      assert.isAbove(greedyRefused, 1_000)
      assert.isAtMost(longestWithout, modest + 2, "the greedy source was starved")
      while (admission.state().underWay > 0) await endOne()
    }))
})
