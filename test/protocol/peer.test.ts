/** What processes of a cluster ask each other survives the encoding that it goes by. */
import { assert, describe, it } from "@effect/vitest"
import { Schema } from "effect"
import * as SchemaBinary from "effect/encoding/SchemaBinary"
import { CollectionNotFound } from "../../src/protocol/Errors.ts"
import { NotHere, PeerRpcs } from "../../src/protocol/Peer.ts"

const through = <S extends Schema.Codec<unknown, unknown>>(schema: S, value: S["Type"]): S["Type"] => {
  const codec = SchemaBinary.toCodec(schema)
  return Schema.decodeUnknownSync(codec)(Schema.encodeSync(codec)(value))
}

const ask = {
  partition: "c/3",
  vector: Float32Array.from([0.5, -1, 2]),
  k: 10,
  ef: 64,
  filter: '{"a":1}',
  includeMetadata: true,
  includeVector: false
}
const hits = { ids: ["a", "b"], scores: Float32Array.from([0.9, 0.1]) }
const whole = { ...hits, metadata: ["{}", ""], vectors: Float32Array.from([1, 2, 3, 4]) }

describe("searches between nodes", () => {
  const rpc = <Tag extends "PeerSearch" | "PeerSearches">(tag: Tag) => {
    const found = PeerRpcs.requests.get(tag)
    assert.isDefined(found)
    return found as typeof found & { readonly _tag: Tag }
  }

  it("are asked alone and together", () => {
    assert.deepStrictEqual(through(rpc("PeerSearch").payloadSchema as never, ask as never), ask as never)
    const asks = { asks: [ask, { ...ask, filter: "" }] }
    assert.deepStrictEqual(through(rpc("PeerSearches").payloadSchema as never, asks as never), asks as never)
  })

  it("are answered alone and together, each by hits or by an error", () => {
    for (const answer of [hits, whole]) {
      assert.deepStrictEqual(through(rpc("PeerSearch").successSchema as never, answer as never), answer as never)
    }
    const answers = [
      { hits },
      { error: new NotHere() },
      { hits: whole },
      { error: new CollectionNotFound({ collection: "c" }) }
    ]
    const back = through(rpc("PeerSearches").successSchema as never, answers as never) as unknown as typeof answers
    assert.deepStrictEqual(back, answers)
  })
})
