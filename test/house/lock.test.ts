import { readFileSync } from "node:fs"
import { relative } from "node:path"
import { describe, expect, test } from "vitest"
import { lockFiles, missingFrom } from "../../scripts/complete-lock.mjs"
import { root } from "../../scripts/setup.mjs"

describe.each(lockFiles.map((file) => [relative(root, file), file] as const))("%s", (_, file) => {
  const text = readFileSync(file, "utf8")

  test("has every platform's packages, or npm ci refuses it (node scripts/complete-lock.mjs adds them)", () => {
    expect(missingFrom(JSON.parse(text).packages).map(({ name }) => name)).toEqual([])
  })

  test("names no registry", () => {
    expect(text).not.toContain('"resolved": "http')
  })
})
