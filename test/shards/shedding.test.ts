/** What is shed at each level, by the level alone. */
import { Context, Effect, Layer } from "effect"
import { assert, describe, test } from "vitest"
import { defaultSettings, Settings, type SettingValues } from "../../src/config.ts"
import { type Asker, Shedding } from "../../src/shards/Shedding.ts"
import { random, seedOf } from "../support/Seeded.ts"

const open = async (settings: Partial<SettingValues> = {}) => {
  const clock = { now: 0 }
  const layer = Shedding.layerWith({ random: random(seedOf(7)).next, now: () => clock.now }).pipe(
    Layer.provide(Layer.succeed(Settings, { ...defaultSettings, ...settings }))
  )
  const context = await Effect.runPromise(Effect.scoped(Layer.build(layer)))
  return { shedding: Context.get(context, Shedding), clock }
}

const ann: Asker = { user: "ann", tier: "standard" }
const premium: Asker = { user: "pat", tier: "premium" }
const nobody: Asker = { tier: "standard" }

const refusedOf = (shedding: Shedding["Service"], asker: Asker, times: number): number => {
  let refused = 0
  for (let i = 0; i < times; i++) if (shedding.refusal(asker) !== undefined) refused += 1
  return refused
}

describe("shedding", () => {
  test("at level 0 is nothing", async () => {
    const { shedding } = await open()
    assert.strictEqual(refusedOf(shedding, ann, 1_000), 0)
    assert.isUndefined(shedding.connectionRefusal())
  })

  test("at 85 and 90 lets each user ask ten times a second, premium as often as they like", async () => {
    for (const level of [85, 90] as const) {
      const { clock, shedding } = await open()
      shedding.setLevel(level)
      let answered = 0
      // Ten seconds, a request each ten milliseconds, of two users.
      for (clock.now = 0; clock.now < 10_000; clock.now += 10) {
        if (shedding.refusal(ann) === undefined) answered += 1
        shedding.refusal({ user: "bob", tier: "standard" })
      }
      // Ten to begin with, and ten each second.
      assert.closeTo(answered, 110, 2)
      assert.strictEqual(refusedOf(shedding, premium, 1_000), 0)
      assert.strictEqual(refusedOf(shedding, nobody, 1_000), 0)
      assert.isUndefined(shedding.connectionRefusal())
    }
  })

  test("tells a user to come back when there is room for a request again", async () => {
    const { clock, shedding } = await open()
    shedding.setLevel(85)
    refusedOf(shedding, ann, 10)
    const refusal = shedding.refusal(ann)
    assert.strictEqual(refusal?.bound, "shedUserRate")
    assert.isAtLeast(refusal?.retryAfterMillis ?? 0, 100)
    clock.now += refusal?.retryAfterMillis ?? 0
    assert.isUndefined(shedding.refusal(ann))
  })

  test("at 95 refuses a fifth of what is not premium, new connections, and limits premium users too", async () => {
    const { shedding } = await open()
    shedding.setLevel(95)
    assert.closeTo(refusedOf(shedding, nobody, 10_000), 2_000, 200)
    assert.strictEqual(refusedOf(shedding, premium, 10), 0)
    assert.strictEqual(shedding.refusal(premium)?.bound, "shedUserRate")
    const times = new Set(Array.from({ length: 50 }, () => shedding.connectionRefusal()?.retryAfterMillis))
    assert.isAbove(times.size, 25)
    assert.strictEqual(shedding.refused().get("connections"), 50)
  })

  test("remembers no more users than it may", async () => {
    const { shedding } = await open({ shedUsersMax: 100 })
    shedding.setLevel(85)
    assert.strictEqual(refusedOf(shedding, ann, 11), 1)
    for (let i = 0; i < 100; i++) shedding.refusal({ user: `u${i}`, tier: "standard" })
    assert.isUndefined(shedding.refusal(ann))
  })
})
