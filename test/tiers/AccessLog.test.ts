/** What is counted of accesses: never too low, bounded, decaying; trends are found in bursts and not in steady streams. */
import { assert, describe, it } from "@effect/vitest"
import { Effect } from "effect"
import fc from "fast-check"
import { defaultSettings } from "../../src/config.ts"
import { AccessCounts, type AccessSettings, type Trend } from "../../src/tiers/AccessLog.ts"
import { FrequencySketch } from "../../src/tiers/FrequencySketch.ts"
import { SpaceSaving } from "../../src/tiers/SpaceSaving.ts"
import { type Random, random, seedOf } from "../support/Seeded.ts"

const hour = 3_600_000
const partition = "c/u1/0"

/** A log on a clock of its own, which starts on the hour. */
const logAt = (settings: Partial<AccessSettings> = {}) => {
  const clock = { now: 1_700_000 * 1_000 * 1_000 - ((1_700_000 * 1_000 * 1_000) % hour) }
  return { clock, log: new AccessCounts({ ...defaultSettings, ...settings }, () => clock.now) }
}

describe("the sketch", () => {
  it("never estimates too low, and is off by little", () => {
    const source = random(seedOf(3))
    const sketch = new FrequencySketch(4_096)
    const truth = new Map<number, number>()
    for (let n = 0; n < 100_000; n++) {
      const key = zipf(source, 20_000)
      truth.set(key, (truth.get(key) ?? 0) + 1)
      sketch.add(Math.imul(key, 0x9e3779b9), Math.imul(key + 1, 0x85ebca6b), 1)
    }
    let over = 0
    for (const [key, count] of truth) {
      const estimate = sketch.estimate(Math.imul(key, 0x9e3779b9), Math.imul(key + 1, 0x85ebca6b))
      assert.isAtLeast(estimate, count)
      if (estimate > count + (2 * 100_000) / 4_096) over += 1
    }
    assert.isBelow(over / truth.size, 1 / 16)
    sketch.halve()
    assert.strictEqual(sketch.total, 50_000)
  })
})

describe("the most frequent by name", () => {
  it("holds every record above N/m, with counts between the truth and the truth plus its error", () => {
    fc.assert(
      fc.property(
        fc.array(fc.tuple(fc.integer({ min: 0, max: 60 }), fc.constantFrom(1, 0.25, 3)), { maxLength: 400 }),
        fc.integer({ min: 1, max: 40 }),
        (offers, capacity) => {
          const top = new SpaceSaving(capacity)
          const truth = new Map<string, number>()
          for (const [key, weight] of offers) {
            top.offer(key, "p", `r${key}`, weight)
            truth.set(`r${key}`, (truth.get(`r${key}`) ?? 0) + weight)
          }
          const total = offers.reduce((sum, [, weight]) => sum + weight, 0)
          assert.approximately(top.total, total, 1e-9)
          const held = top.top(capacity)
          assert.isAtMost(held.length, capacity)
          for (const { id, count, error } of held) {
            const true_ = truth.get(id) as number
            assert.isAtLeast(count + 1e-9, true_)
            assert.isAtMost(count - error, true_ + 1e-9)
            assert.isAtMost(error, total / capacity + 1e-9)
          }
          for (let i = 1; i < held.length; i++) {
            assert.isAtMost((held[i] as { count: number }).count, (held[i - 1] as { count: number }).count)
          }
          const names = new Set(held.map(({ id }) => id))
          for (const [id, count] of truth) if (count > total / capacity + 1e-9) assert.isTrue(names.has(id))
          // What is dropped is gone, the rest is as it was.
          const before = top.top(capacity)
          top.offer(1_000, "other", "x", 1)
          top.drop((of) => of === "p")
          assert.deepStrictEqual(
            top.top(capacity).map(({ id }) => id),
            ["x"]
          )
          assert.isTrue(before.every((one) => one.partition === "p"))
        }
      ),
      { seed: seedOf(5), numRuns: 300 }
    )
  })
})

describe("heat", () => {
  it("of a partition is its accesses a minute, and halves with its half-life", () => {
    const { clock, log } = logAt({ heatHalfLifeMillis: 60_000 })
    for (let second = 0; second < 1_200; second++) {
      clock.now += 1_000
      log.touchPartition("steady")
      log.touchPartition("steady")
    }
    assert.approximately(log.partitionHeat("steady"), 120, 2)
    clock.now += 60_000
    assert.approximately(log.partitionHeat("steady"), 60, 1)
    clock.now += 600_000
    assert.isBelow(log.partitionHeat("steady"), 0.1)
    assert.strictEqual(log.partitionHeat("unknown"), 0)
  })

  it("is known of a bounded number of partitions, the coldest given up", () => {
    const { log } = logAt({ accessPartitionsMax: 100 })
    for (let n = 0; n < 50; n++) log.touchPartition("hot")
    for (let n = 0; n < 1_000; n++) log.touchPartition(`p${n}`)
    assert.isAbove(log.partitionHeat("hot"), 5)
    const known = Array.from({ length: 1_000 }, (_, n) => log.partitionHeat(`p${n}`)).filter((heat) => heat > 0)
    assert.isAtMost(known.length, 100)
  })

  it("goes on when the clock is set back", () => {
    const { clock, log } = logAt()
    log.touchRecord(partition, "a")
    clock.now -= 10 * hour
    const before = clock.now
    for (let n = 0; n < 3; n++) log.touchRecord(partition, "b")
    clock.now += 300_000
    log.touchRecord(partition, "c")
    const past = Effect.runSync(log.past({ fromMillis: before, toMillis: before + 1, limit: 10 }))
    assert.deepInclude(past, { partition, id: "b", accesses: 3 })
    log.touchPartition("p")
    clock.now -= hour
    log.touchPartition("p")
    assert.isAbove(log.partitionHeat("p"), 0)
  })

  it("of a record decays, and is never below what was counted since", () => {
    const { clock, log } = logAt()
    for (let n = 0; n < 100; n++) log.touchRecord(partition, "a")
    assert.isAtLeast(log.recordFrequency(partition, "a"), 100)
    clock.now += defaultSettings.accessHalfLifeMillis
    assert.approximately(log.recordFrequency(partition, "a"), 50, 1)
    clock.now += 20 * defaultSettings.accessHalfLifeMillis
    assert.isBelow(log.recordFrequency(partition, "a"), 0.01)
  })
})

describe("hot records", () => {
  it("are reported once a window, from the threshold on, hottest first", () => {
    const { clock, log } = logAt({ promoteAccesses: 3 })
    const touch = (id: string, times: number) => {
      for (let n = 0; n < times; n++) log.touchRecord(partition, id)
    }
    touch("twice", 2)
    touch("thrice", 3)
    touch("often", 9)
    const ids = () => log.takeReport().hot.map(({ id }) => id)
    assert.deepStrictEqual(ids(), ["often", "thrice"])
    touch("often", 9)
    touch("twice", 1)
    assert.deepStrictEqual(ids(), ["twice"])
    assert.deepStrictEqual(log.hottest(1), [{ partition, id: "often", accesses: 18 }])
    clock.now += 300_000
    assert.deepStrictEqual(ids(), [])
    touch("often", 3)
    assert.deepStrictEqual(ids(), ["often"])
    log.touchRecord(partition, "light", 0.25)
    log.touchRecord(partition, "light", 0.25)
    assert.deepStrictEqual(ids(), [])
  })
})

describe("trends", () => {
  const keys = 5_000

  /** Runs a Zipf stream of `perSecond` accesses; what `extra` names is touched beside it. */
  const run = (
    { clock, log }: ReturnType<typeof logAt>,
    source: Random,
    seconds: number,
    perSecond: number,
    extra: ReadonlyArray<string> = []
  ): Array<Trend> => {
    const trends: Array<Trend> = []
    for (let second = 0; second < seconds; second++) {
      clock.now += 1_000
      for (let n = 0; n < perSecond; n++) log.touchRecord(partition, `r${zipf(source, keys)}`)
      for (const id of extra) log.touchRecord(partition, id)
      if (second % 5 === 4) trends.push(...log.takeReport().trending)
    }
    return trends
  }

  it("are not found in a steady Zipf stream, nor where all of it becomes ten times as much", () => {
    for (const seed of [seedOf(7), 8, 9]) {
      const at = logAt()
      const source = random(seed)
      assert.deepStrictEqual(run(at, source, 1_800, 40), [], `seed ${seed}`)
      assert.deepStrictEqual(run(at, source, 300, 400), [], `ten times as much, seed ${seed}`)
      assert.deepStrictEqual(run(at, source, 600, 4), [], `a hundredth of it, seed ${seed}`)
    }
  })

  it("are found in a burst, before a minute of it has passed, once, and by name", () => {
    for (const seed of [seedOf(7), 8, 9]) {
      const at = logAt()
      const source = random(seed)
      run(at, source, 1_800, 40)
      const burst = ["new", "r4321"]
      const found = run(at, source, 50, 40, burst)
      assert.sameMembers(
        found.map(({ id }) => id),
        burst,
        `seed ${seed}`
      )
      for (const trend of found) {
        assert.isAtLeast(trend.accesses, defaultSettings.trendAccesses)
        assert.isAtLeast(trend.ratio, defaultSettings.trendRatio)
      }
      assert.deepStrictEqual(run(at, source, 100, 40, burst), [], `again, seed ${seed}`)
    }
  })

  it("are found when the sketch was halved in the middle of the burst, and not made by halving", () => {
    const at = logAt({ accessHalfLifeMillis: 60_000 })
    const source = random(seedOf(13))
    assert.deepStrictEqual(run(at, source, 1_200, 40), [])
    const found = run(at, source, 90, 40, ["burst"])
    assert.deepStrictEqual(
      found.map(({ id }) => id),
      ["burst"]
    )
  })

  it("are not found before there is a past", () => {
    const at = logAt()
    assert.deepStrictEqual(run(at, random(seedOf(17)), 290, 40, ["burst"]), [])
  })
})

describe("the past", () => {
  const past = (log: AccessCounts, fromMillis: number, toMillis: number, limit = 10, collectionUid?: string) =>
    Effect.runSync(
      log.past({ fromMillis, toMillis, limit, ...(collectionUid === undefined ? {} : { collectionUid }) })
    ).map(({ id, accesses }) => `${id} ${accesses}`)

  it("is told by five minutes for two hours, by the hour before that, and not beyond its bound", () => {
    const { clock, log } = logAt({ accessPastHours: 5 })
    const start = clock.now
    // Every five minutes of eight hours: one record of that window, and one of always.
    for (let window = 0; window < 96; window++) {
      for (let n = 0; n < 3; n++) log.touchRecord(partition, `w${window}`)
      log.touchRecord(partition, "always")
      clock.now += 300_000
    }
    const window = (n: number) => start + n * 300_000
    assert.deepStrictEqual(past(log, window(90), window(91)), ["w90 3", "always 1"])
    assert.deepStrictEqual(past(log, window(90), window(92), 2), ["w90 3", "w91 3"])
    // Four and a half hours ago: the hour as a whole.
    const byHour = past(log, window(48), window(49), 100)
    assert.include(byHour, "always 12")
    assert.include(byHour, "w59 3")
    assert.lengthOf(byHour, 13)
    assert.deepStrictEqual(past(log, window(0), window(12)), [])
    // Everything that is known, each window once.
    const always = past(log, 0, Number.MAX_SAFE_INTEGER, 1_000).find((one) => one.startsWith("always"))
    assert.strictEqual(always, `always ${5 * 12}`)
    // The window under way.
    log.touchRecord(partition, "now")
    assert.deepStrictEqual(past(log, clock.now, clock.now + 1), ["now 1"])
  })

  it("is of one collection where asked for, and a deleted collection is in none of it", () => {
    const { clock, log } = logAt()
    for (const of of ["a/u1/0", "a/u1/1", "b/u2/0"]) {
      log.touchPartition(of)
      for (let n = 0; n < 5; n++) log.touchRecord(of, `${of}:x`)
    }
    clock.now += 300_000
    log.touchRecord("b/u2/0", "fresh")
    assert.lengthOf(past(log, 0, clock.now + 1, 10, "u1"), 2)
    assert.lengthOf(past(log, 0, clock.now + 1), 4)
    log.dropCollection("u2")
    assert.deepStrictEqual(past(log, 0, clock.now + 1), ["a/u1/0:x 5", "a/u1/1:x 5"])
    assert.strictEqual(log.partitionHeat("b/u2/0"), 0)
    assert.deepStrictEqual(log.hottest(10), [])
  })
})

/** A key of Zipf's law, exponent 1, by inversion of its continuous approximation. */
const zipf = (source: Random, keys: number): number => Math.floor(keys ** source.next()) - 1
