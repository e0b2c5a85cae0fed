/** Frames decoded by hand are what the schema says they are, and frames encoded by hand are what `ws` reads. */
import { assert, describe, it } from "@effect/vitest"
import { Result } from "effect"
import * as fc from "fast-check"
import * as ws from "ws"
import { decodeSearch, encodeTexts } from "../../src/gateway/WebSocketFrames.ts"
import { decoderOf } from "../../src/protocol/Fields.ts"
import { SearchFrame } from "../../src/protocol/Frames.ts"
import { seedOf } from "../support/Seeded.ts"

/** Not among the types of ws. */
const { Receiver } = ws as unknown as {
  readonly Receiver: new (options: { isServer: boolean }) => NodeJS.WritableStream
}

const seed = seedOf(71)

describe("a search frame", () => {
  const bySchema = decoderOf(SearchFrame)
  const odd = fc.oneof(
    fc.constantFrom<unknown>(
      null,
      "",
      0,
      -1,
      1.5,
      Number.MAX_VALUE,
      [],
      {},
      "\u0007",
      "é".repeat(70),
      "\ud800",
      "x".repeat(129),
      true
    ),
    fc.jsonValue()
  )
  const mostly = (usual: fc.Arbitrary<unknown>) =>
    fc.oneof({ weight: 40, arbitrary: usual }, { weight: 1, arbitrary: odd })
  const label = fc.oneof(
    fc.string({ minLength: 1, maxLength: 130 }),
    fc.string({ unit: "grapheme", minLength: 1, maxLength: 20 })
  )
  const frame = fc.record(
    {
      type: fc.constant("search"),
      id: mostly(label),
      session: mostly(label),
      stream: mostly(fc.boolean()),
      collection: mostly(fc.constantFrom("default", "a-b.c_9", "x", "y.z", "a b")),
      k: mostly(fc.integer({ min: 0, max: 10_001 })),
      ef: mostly(fc.integer({ min: 0, max: 10_001 })),
      deadline_ms: mostly(fc.integer({ min: 0, max: 60_001 })),
      query: mostly(fc.array(mostly(fc.double({ noNaN: true })), { maxLength: 8 })),
      include: mostly(fc.constantFrom(["metadata"], ["vector", "metadata"], ["score"])),
      query_vector_id: mostly(fc.string()),
      metric: mostly(fc.constantFrom("cosine", "l2", "ip"))
    },
    { requiredKeys: ["type"] }
  )

  it("is what the schema makes of it, or the fault that the schema names", () => {
    let usual = 0
    void fc.assert(
      fc.property(frame, fc.option(odd, { freq: 8 }), (made, surprise) => {
        // As it arrives.
        const arrived = JSON.parse(JSON.stringify(surprise === null ? made : { ...made, surprise })) as Record<
          string,
          unknown
        >
        const expected = bySchema(arrived)
        const got = decodeSearch(arrived)
        assert.deepStrictEqual(got, expected)
        if (Result.isSuccess(got)) usual++
      }),
      { seed, numRuns: 5_000 }
    )
    // Else it would have compared little but refusals.
    assert.isAbove(usual, 100)
  })

  it("of the usual fields is taken", () => {
    const got = decodeSearch({ type: "search", id: "1", session: "s", stream: true, query: [1, 0.5], k: 3 })
    assert.deepStrictEqual(
      got,
      Result.succeed({
        type: "search",
        id: "1",
        session: "s",
        stream: true,
        query: Float32Array.of(1, 0.5),
        k: 3
      } as const)
    )
  })
})

describe("texts as frames", () => {
  it("are read by ws as they were, of every length and character", () => {
    const texts = ["", "a", "é😀".repeat(40), ..."x".repeat(3)]
    for (const length of [125, 126, 127, 65_535, 65_536, 70_000]) texts.push("y".repeat(length), "ü".repeat(length))
    const received: Array<string> = []
    const receiver = new Receiver({ isServer: false })
    receiver.on("message", (data: Buffer) => received.push(data.toString()))
    receiver.write(encodeTexts(texts))
    assert.deepStrictEqual(received, texts)
  })
})
