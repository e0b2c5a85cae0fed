/** The reference of what a program imports is that of the sources, and nothing in it is without a docstring. */
import { spawnSync } from "node:child_process"
import { existsSync } from "node:fs"
import { mkdtemp, readdir, readFile, rm } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { assert, describe, it } from "@effect/vitest"

const root = new URL("../../", import.meta.url).pathname

const without = (): boolean => {
  if (existsSync(join(root, "scripts/docs/node_modules/typedoc")) || process.env["RUVECTOR_CI"] !== undefined) {
    return false
  }
  console.warn("skipped, as there is no typedoc: node scripts/setup.mjs scripts/docs")
  return true
}

describe("docs/api", () => {
  it.skipIf(without())("is what npm run docs:api writes", { timeout: 120_000 }, async () => {
    const directory = await mkdtemp(join(tmpdir(), "ruvector-api-"))
    try {
      const { status, stdout, stderr } = spawnSync(
        process.execPath,
        [join(root, "scripts/docs/write.mjs"), directory],
        { encoding: "utf8" }
      )
      assert.strictEqual(status, 0, `${stdout}${stderr}`)
      const written = await pages(directory)
      assert.isAbove(written.size, 0)
      assert.deepStrictEqual(await pages(join(root, "docs/api")), written, "npm run docs:api writes them anew")
    } finally {
      await rm(directory, { recursive: true })
    }
  })
})

const pages = async (directory: string): Promise<Map<string, string>> => {
  const names = (await readdir(directory)).sort()
  return new Map(
    await Promise.all(names.map(async (name) => [name, await readFile(join(directory, name), "utf8")] as const))
  )
}
