/** What was recorded of every wire is played again: old clients are understood, and understand. */
import { readdirSync, readFileSync } from "node:fs"
import { afterAll, assert, beforeAll, describe, it } from "@effect/vitest"
import { type RunningNode, startNode } from "../support/Node.ts"
import { binaryDecoder, type Exchange, lacking, play, scriptOf } from "./Exchange.ts"
import { prepare } from "./prepare.ts"

const vectors = new URL("./vectors/", import.meta.url)
const exchanges = readdirSync(vectors)
  .filter((name) => name.endsWith(".json"))
  .map((name) => JSON.parse(readFileSync(new URL(name, vectors), "utf8")) as Exchange)

let node: RunningNode

beforeAll(async () => {
  node = await startNode()
  await prepare(node.base)
})
afterAll(() => node.stop())

describe("recorded exchanges", () => {
  for (const exchange of exchanges) {
    it(exchange.name, async () => {
      const came = await play(node.base, exchange, scriptOf(exchange))
      const recorded = exchange.steps.flatMap((step) => ("answers" in step ? [step] : []))
      assert.isAbove(recorded.length, 0)
      for (const [i, { answers }] of recorded.entries()) assert.strictEqual(lacking(answers, came[i]?.answers), "")
    })
  }

  it("of SchemaBinary are read by a client of now, as they were then", () => {
    const binary = exchanges.filter(({ wire }) => wire === "rpc-binary")
    assert.isAbove(binary.length, 0)
    for (const { steps } of binary) {
      const decoder = binaryDecoder()
      for (const step of steps) {
        if ("send" in step) decoder.sent(Buffer.from(step.send, "base64"))
        if (!("answers" in step)) continue
        const now = (step.raw ?? []).flatMap((raw) => decoder.decode(Buffer.from(raw, "base64")))
        assert.strictEqual(lacking(step.answers, now), "")
      }
    }
  })

  it("that lack something are told from those that do not", () => {
    assert.strictEqual(
      lacking({ event: "a", n: 1, of: [{ id: "x" }] }, { of: [{ id: "y", more: 1 }], n: 2, event: "a" }),
      ""
    )
    for (const now of [
      { event: "b", n: 1, of: [{ id: "x" }] },
      { event: "a", of: [{ id: "x" }] },
      { event: "a", n: "1", of: [{ id: "x" }] },
      { event: "a", n: 1, of: [] },
      { event: "a", n: 1, of: [{ name: "x" }] },
      { event: "a", n: 1, of: { 0: { id: "x" } } },
      null
    ]) {
      assert.notStrictEqual(lacking({ event: "a", n: 1, of: [{ id: "x" }] }, now), "")
    }
  })
})
