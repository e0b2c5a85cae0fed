/**
 * Programs in the documents do what the documents say: each is run as it stands, with the package installed and against a
 * node, and its output compared.
 */
import { spawn } from "node:child_process"
import { readFile, writeFile } from "node:fs/promises"
import { join } from "node:path"
import { afterAll, assert, beforeAll, describe, it } from "@effect/vitest"
import { type InstalledPackage, installedPackage } from "../support/InstalledPackage.ts"
import { type RunningNode, startNode } from "../support/Node.ts"

const root = new URL("../../", import.meta.url).pathname
const text = await readFile(join(root, "docs/client.md"), "utf8")
const programs = [...text.matchAll(/^## (.+)$|^```ts\n([\s\S]*?)^```$/gm)].reduce<
  Array<{ title: string; code: string }>
>((found, [, title, code]) => {
  if (title !== undefined) found.push({ title, code: "" })
  else if (found.length > 0) found[found.length - 1] = { title: found.at(-1)?.title ?? "", code: code ?? "" }
  return found
}, [])

const run = (
  path: string
): Promise<{ readonly code: number | null; readonly output: string; readonly errors: string }> =>
  new Promise((resolve) => {
    const child = spawn(process.execPath, [path], { stdio: ["ignore", "pipe", "pipe"] })
    let output = ""
    let errors = ""
    child.stdout.on("data", (chunk: Buffer) => (output += chunk.toString()))
    child.stderr.on("data", (chunk: Buffer) => (errors += chunk.toString()))
    const late = setTimeout(() => child.kill("SIGKILL"), 30_000)
    child.once("close", (code) => {
      clearTimeout(late)
      resolve({ code, output, errors })
    })
  })

describe("docs/client.md", () => {
  let node: RunningNode
  let installed: InstalledPackage
  beforeAll(async () => {
    installed = await installedPackage()
    node = await startNode()
  }, 120_000)
  afterAll(async () => {
    await node?.stop()
    await installed?.remove()
  })

  const withCode = programs.filter(({ code }) => code !== "")
  it("has programs", () => {
    assert.isAtLeast(withCode.length, 5)
  })

  for (const [n, { title, code }] of withCode.entries()) {
    it(title, { timeout: 40_000 }, async () => {
      const path = join(installed.directory, `${n}.ts`)
      await writeFile(path, code.replaceAll("http://127.0.0.1:8080", node.base))
      const expected = [...code.matchAll(/^\s*\/\/ => (.*)$/gm)].map(([, line]) => `${line}\n`).join("")
      const { code: status, output, errors } = await run(path)
      assert.deepStrictEqual([status, output], [0, expected], errors)
    })
  }
})
