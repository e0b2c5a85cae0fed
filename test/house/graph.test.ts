import { existsSync } from "node:fs"
import { describe, expect, test } from "vitest"
import { compiledSimd, expectedSimd, nodeBinary } from "../../scripts/setup.mjs"

describe("set-up", () => {
  test("brings the Node that the tests run on", () => {
    expect(existsSync(nodeBinary)).toBe(true)
    expect(Number(process.versions.node.split(".")[0])).toBeGreaterThanOrEqual(24)
  })

  test("compiles the vector graph with the widest vector code of this processor", () => {
    expect(compiledSimd()).toBe(expectedSimd() ?? compiledSimd())
  })
})
