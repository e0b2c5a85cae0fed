/** The window of requests against a list: the newest so many of the last so long are known, each as it was first done. */
import { assert, describe, it } from "@effect/vitest"
import { type DoneRequest, RequestWindow, WindowFault } from "../../src/tiers/RequestWindow.ts"
import { seeded, seedOf } from "../support/Seeded.ts"

const idOf = (n: number, isGiven: boolean): string => {
  const bytes = Buffer.alloc(16)
  // Many ids that begin their search at one place of the table.
  bytes.writeUInt32LE(n % 3 === 0 ? 5 : n, 4)
  bytes.writeUInt32LE(n, 12)
  if (isGiven) bytes[0] = 0x80
  return bytes.toString("base64url")
}

const kinds = ["upsert", "metadata", "delete"] as const

describe("the window of requests", () => {
  for (const [entriesMax, millis] of [
    [1, 1_000_000],
    [100, 1_000_000],
    [1_000, 300]
  ] as const) {
    it(`knows the newest ${entriesMax} of the last ${millis} ms`, () =>
      seeded(seedOf(entriesMax), async (source) => {
        const options = { requestWindowMillis: millis, requestWindowMax: entriesMax }
        let window = new RequestWindow(options)
        /** Of chosen and of given ids, oldest first. */
        const model: [Array<readonly [string, DoneRequest]>, Array<readonly [string, DoneRequest]>] = [[], []]
        let now = 1_000
        for (let n = 0; n < 4_000; n++) {
          now += source.below(3)
          const isGiven = source.below(2) === 1
          const id = idOf(source.below(600), isGiven)
          const list = model[isGiven ? 1 : 0]
          const known = list.find(([other, { millis: at }]) => other === id && now - at <= millis)?.[1]
          assert.deepStrictEqual(window.find(id, now), known, `${n}`)
          if (source.below(3) > 0) {
            const done: DoneRequest = {
              kind: source.pick(kinds),
              seq: source.below(2 ** 31) * 2 ** 20,
              millis: now,
              digest: source.below(2 ** 32),
              result: source.below(10_000),
              first: source.below(10_000)
            }
            window.add(id, done)
            if (known === undefined) {
              const kept = list.filter(([other, { millis: at }]) => other !== id && now - at <= millis)
              list.splice(0, list.length, ...kept.slice(-(entriesMax - 1) || kept.length), [id, done])
              if (entriesMax === 1) list.splice(0, list.length - 1)
            }
          }
          if (source.below(200) === 0) {
            const copy = window.encode(now)
            window = new RequestWindow(options)
            if (copy !== undefined) window.load(copy)
          }
        }
        assert.isAtMost(window.size, 2 * entriesMax)
        assert.isAtMost(window.bytes, 2 * entriesMax * 64 + 8)
      }))
  }

  it("refuses what is no copy of one", () => {
    const window = new RequestWindow({ requestWindowMillis: 1_000, requestWindowMax: 10 })
    window.add(idOf(1, false), { kind: "upsert", seq: 1, millis: 0, digest: 0, result: 1, first: 0 })
    const copy = window.encode(0) as Uint8Array
    for (const bad of [copy.subarray(0, 10), copy.subarray(0, copy.length - 1), copy.fill(0, 0, 4)]) {
      assert.throws(() => window.load(bad), WindowFault)
    }
    assert.isUndefined(window.encode(5_000), "nothing of it is within the window by then")
  })
})
