/** The door in front of searches: how many are under way, who waits, who is refused, and with what. */
import { Context, Effect, Exit, Fiber, Layer, Scope } from "effect"
import { afterEach, assert, describe, test } from "vitest"
import { defaultSettings, Settings, type SettingValues } from "../../src/config.ts"
import { Overloaded } from "../../src/protocol/Errors.ts"
import { Admission } from "../../src/shards/Admission.ts"
import { ConcurrencyLimit, type Kind } from "../../src/shards/ConcurrencyLimit.ts"
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
  const search = (name: string, tier: Tier = "standard", deadlineMillis = 10_000) => {
    let end: (effect: Effect.Effect<string>) => void = () => {}
    const work = Effect.callback<string>((resume) => {
      begun.push(name)
      end = resume
      running.push(() => resume(Effect.succeed(name)))
    })
    const fiber = Effect.runFork(admission.run({ kind, tier, deadlineMillis }, work))
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
