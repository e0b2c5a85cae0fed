/** Cursors: what is sealed comes back, for the same binding; anything else does not, in whatever way it is wrong. */
import { assert, describe, it } from "@effect/vitest"
import { Effect, Layer } from "effect"
import { defaultSettings, Settings } from "../../src/config.ts"
import { Cursors, secretKey } from "../../src/gateway/Cursors.ts"
import { endOfObject } from "../../src/protocol/IndexPartition.ts"
import { cursorCharsMax, partitionsMax, standingMembersMax } from "../../src/protocol/Limits.ts"
import { ObjectStore } from "../../src/tiers/ObjectStore.ts"
import { seeded, seedOf } from "../support/Seeded.ts"

const cursorsOf = (store: ObjectStore["Service"], cursorSecret = "") =>
  Effect.runPromise(
    Effect.scoped(
      Layer.build(
        Cursors.layer.pipe(
          Layer.provide(Layer.succeed(ObjectStore, store)),
          Layer.provide(Layer.succeed(Settings, { ...defaultSettings, cursorSecret }))
        )
      )
    ).pipe(Effect.flatMap((context) => Effect.provideContext(Cursors, context)))
  )

const memoryStore = () =>
  Effect.runPromise(
    Effect.scoped(Layer.build(ObjectStore.layerMemory)).pipe(
      Effect.flatMap((context) => Effect.provideContext(ObjectStore, context))
    )
  )

const binding = ["feed", "tenant", "me", "uid"]

describe("cursors", () => {
  it("come back as they were, of any size", () =>
    seeded(seedOf(11), async (random) => {
      const cursors = await cursorsOf(await memoryStore())
      const mine = cursors.binding(binding)
      const integer = () => Math.floor(random.next() * 2 ** random.below(53))
      for (let n = 0; n < 200; n++) {
        const positions = Array.from({ length: 1 + random.below(n === 0 ? partitionsMax : 8) }, () => ({
          seq: integer(),
          index: random.pick([-1, 0, 1, 127, 128, endOfObject, Math.min(integer(), 2 ** 40)])
        }))
        assert.deepStrictEqual(cursors.readFeed(mine, cursors.ofFeed(mine, positions)), positions)
        const members = Array.from({ length: random.below(standingMembersMax + 1) }, (_, i) => ({
          id: `${i}-${random.next()}`,
          version: `${random.next()}`,
          score: random.next()
        }))
        const seqs = positions.map(({ seq }) => seq)
        const read = cursors.readAnswer(mine, cursors.ofAnswer(mine, seqs, members))
        assert.deepStrictEqual(read?.positions, seqs)
        assert.strictEqual(read?.members.size, members.length)
        for (const member of members) {
          assert.strictEqual(read?.members.get(cursors.idHash(member.id)), cursors.stateHash(member))
        }
      }
      const most = Array.from({ length: partitionsMax }, () => 2 ** 53 - 1)
      const all = Array.from({ length: standingMembersMax }, (_, i) => ({ id: `${i}`, version: "v", score: i }))
      assert.isAtMost(cursors.ofAnswer(mine, most, all).length, cursorCharsMax)
      const farthest = most.map((seq) => ({ seq, index: 2 ** 40 }))
      assert.isAtMost(cursors.ofFeed(mine, farthest).length, cursorCharsMax)
    }))

  it("are refused with a bit changed, cut, lengthened, of another binding or of another secret", async () => {
    const store = await memoryStore()
    const cursors = await cursorsOf(store)
    const mine = cursors.binding(binding)
    const positions = [{ seq: 7, index: 3 }]
    const text = cursors.ofFeed(mine, positions)
    const bytes = Buffer.from(text, "base64url")
    for (let bit = 0; bit < bytes.length * 8; bit++) {
      const changed = Buffer.from(bytes)
      changed[bit >> 3] = (changed[bit >> 3] as number) ^ (1 << (bit & 7))
      assert.isUndefined(cursors.readFeed(mine, changed.toString("base64url")))
    }
    for (const last of "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_=") {
      const other = `${text.slice(0, -1)}${last}`
      if (other !== text) assert.isUndefined(cursors.readFeed(mine, other), other)
    }
    for (let length = 0; length < text.length; length++) {
      assert.isUndefined(cursors.readFeed(mine, text.slice(0, length)))
    }
    for (const other of ["", "x", "?", `${text}AA`, text.repeat(2), "A".repeat(cursorCharsMax + 1), "A".repeat(1e6)]) {
      assert.isUndefined(cursors.readFeed(mine, other))
      assert.isUndefined(cursors.readAnswer(mine, other))
    }
    for (const at of binding.keys()) {
      assert.isUndefined(cursors.readFeed(cursors.binding(binding.with(at, "another")), text))
    }
    // Where one part ends and the next begins counts.
    assert.isUndefined(cursors.readFeed(cursors.binding(["feed", "tenan", "tme", "uid"]), text))
    const elsewhere = await cursorsOf(await memoryStore())
    assert.isUndefined(elsewhere.readFeed(elsewhere.binding(binding), text))
    assert.deepStrictEqual((await cursorsOf(store)).readFeed(mine, text), positions)
  })

  it("are shared by all nodes of a store, also those that begin at once, and by those of one setting", async () => {
    const store = await memoryStore()
    const all = await Promise.all([1, 2, 3, 4].map(() => cursorsOf(store)))
    const texts = all.map((cursors) => cursors.sign("text"))
    assert.strictEqual(new Set(texts).size, 1)
    assert.strictEqual((await Effect.runPromise(store.get(secretKey))).body.length, 32)
    const set = await Promise.all([memoryStore(), memoryStore()])
    const [a, b] = await Promise.all(set.map((one) => cursorsOf(one, "a secret of 26 characters")))
    assert.strictEqual(a?.sign("text"), b?.sign("text"))
    assert.notStrictEqual(a?.sign("text"), texts[0])
  })
})
