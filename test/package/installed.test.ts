/** The package as a program gets it: installed from its tarball, imported and run by plain Node, typed in strict settings. */
import { type ChildProcess, execFile, spawn } from "node:child_process"
import { once } from "node:events"
import { readdir, readFile, writeFile } from "node:fs/promises"
import { join } from "node:path"
import { createInterface } from "node:readline"
import { promisify } from "node:util"
import { gzipSync } from "node:zlib"
import { afterAll, assert, beforeAll, describe, it } from "@effect/vitest"
import { type InstalledPackage, installedPackage } from "../support/InstalledPackage.ts"
import { type RunningNode, startNode } from "../support/Node.ts"

const compiler = new URL("../../node_modules/typescript/bin/tsc", import.meta.url).pathname
const run = promisify(execFile)

describe("the installed package", () => {
  let installed: InstalledPackage
  let server: RunningNode
  beforeAll(async () => {
    installed = await installedPackage()
    server = await startNode()
  }, 120_000)
  afterAll(async () => {
    await server?.stop()
    await installed?.remove()
  })

  /** What a program prints. */
  const output = async (name: string, text: string, args: ReadonlyArray<string> = []): Promise<string> => {
    const path = join(installed.directory, name)
    await writeFile(path, text)
    const { stderr, stdout } = await run(process.execPath, [path, ...args], { timeout: 20_000 })
    assert.strictEqual(stderr, "")
    return stdout
  }

  it("opens the engine in the program's process", async () => {
    const text = `
      import { VectorDB } from "ruvector-streaming"
      await using db = await VectorDB.open({ path: process.argv[2] })
      await db.insertMany([{ id: "a", vector: [1, 0, 0] }, { id: "b", vector: [0.8, 0.6, 0] }])
      console.log((await db.search([1, 0, 0])).map(({ id }) => id).join())
    `
    assert.strictEqual(await output("embedded.mjs", text, [join(installed.directory, "data")]), "a,b\n")
  })

  it("has a client and an engine on the program's own Effect", async () => {
    const text = `
      import { Effect } from "effect"
      import { layerEmbedded, VectorClient } from "ruvector-streaming/effect"
      const program = Effect.gen(function* () {
        const client = yield* VectorClient
        yield* client.insert({ id: "a", vector: [1, 0, 0] })
        return yield* client.search([1, 0, 0])
      })
      const [hit] = await Effect.runPromise(Effect.provide(program, layerEmbedded({ path: process.argv[2] })))
      console.log(hit.id)
    `
    const printed = await output("effect.mjs", text, [join(installed.directory, "effect")])
    assert.strictEqual(printed.trim().split("\n").at(-1), "a")
  })

  it("talks to a service, imported, required, and by the entries for pages", async () => {
    const text = `
      const clients = [
        require("ruvector-streaming").VectorDB,
        import("ruvector-streaming/client").then(({ VectorDB }) => VectorDB),
        import("ruvector-streaming/browser").then(({ VectorDB }) => VectorDB)
      ]
      const main = async () => {
        for (const VectorDB of await Promise.all(clients)) {
          const db = new VectorDB({ endpoint: process.argv[2] })
          await db.insert("a", [1, 0, 0], { metadata: { from: "there" } })
          for await (const { id, metadata } of db.searchStream([1, 0, 0], { k: 1 })) console.log(id, metadata.from)
          await db.close()
        }
      }
      main()
    `
    assert.strictEqual(await output("remote.cjs", text, [server.base]), "a there\n".repeat(3))
  })

  it("brings the command", async () => {
    const options = { cwd: installed.directory, env: installed.environment, timeout: 20_000 }
    const { stdout } = await run("npx", ["--no-install", "ruvector", "--help"], options)
    assert.match(stdout, /^ {2}serve /m)
  })

  it("serves, and ends when it is told to", async () => {
    const child: ChildProcess = spawn(
      join(installed.directory, "../node_modules/.bin/ruvector"),
      ["serve", "--port", "0", "--data", join(installed.directory, "served")],
      { cwd: installed.directory, env: installed.environment, stdio: ["ignore", "pipe", "ignore"] }
    )
    const exited = once(child, "exit")
    try {
      let base: string | undefined
      for await (const line of createInterface({ input: child.stdout! })) {
        base = /listens on (\S+),/.exec(line)?.[1]
        if (base !== undefined) break
      }
      const response = await fetch(`${base}/api/v1/insert`, {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify({ vectors: [{ id: "a", vector: [1, 0] }] })
      })
      assert.strictEqual(response.status, 200, await response.text())
    } finally {
      child.kill("SIGTERM")
    }
    assert.deepStrictEqual(await exited, [0, null])
  })

  it("is typed, in strict settings that check declarations too", { timeout: 60_000 }, async () => {
    const program = `
      import { Effect } from "effect"
      import { VectorDB } from "ruvector-streaming"
      import { type Hit, type Metadata, VectorClient, type VectorDBError } from "ruvector-streaming/effect"
      import { VectorDB as Client } from "ruvector-streaming/client"
      const db: VectorDB = await VectorDB.open({ path: "data" })
      const [hit] = await db.search([1, 2])
      export const score: number | undefined = hit?.score
      // @ts-expect-error: a score is no text
      export const wrong: string | undefined = hit?.score
      // @ts-expect-error: k is a number
      await new Client({ endpoint: "http://localhost" }).search([1], { k: "1" })
      export const found: Effect.Effect<ReadonlyArray<Hit<Metadata>>, VectorDBError, VectorClient> = Effect.gen(function* () {
        return yield* (yield* VectorClient).search([1, 2])
      })
    `
    const compilerOptions = {
      strict: true,
      noEmit: true,
      exactOptionalPropertyTypes: true,
      noUncheckedIndexedAccess: true,
      skipLibCheck: false,
      module: "nodenext",
      target: "esnext",
      lib: ["esnext", "dom"],
      types: []
    }
    await writeFile(join(installed.directory, "typed.ts"), program)
    await writeFile(
      join(installed.directory, "tsconfig.json"),
      JSON.stringify({ compilerOptions, files: ["typed.ts"] })
    )
    const { stdout } = await run(process.execPath, [compiler, "-p", installed.directory]).catch((error) => error)
    assert.strictEqual(stdout, "")
  })

  it("has the client for pages in one small file", async () => {
    const code = await readFile(join(installed.directory, "../node_modules/ruvector-streaming/dist/browser.js"), "utf8")
    assert.notMatch(code, /\bimport\s*[("'{*]|\bfrom\s*["']/)
    assert.isAtMost(gzipSync(code, { level: 9 }).length, 40 * 1_024)
  })

  it("says whose code is in its bundles, and under which licence", async () => {
    for (const file of ["bundle/licenses.txt", "browser.licenses.txt"]) {
      const text = await readFile(join(installed.directory, "../node_modules/ruvector-streaming/dist", file), "utf8")
      assert.match(text, /^effect [\d.]+ \(MIT\)\n\nMIT License\n/)
    }
  })

  it("has what it needs and no more", async () => {
    const names = await readdir(join(installed.directory, "../node_modules/ruvector-streaming"))
    const expected = ["LICENSE", "README.md", "dist", "docs", "package.json", "proto", "scripts"]
    assert.deepStrictEqual(names.sort(), expected)
  })
})
