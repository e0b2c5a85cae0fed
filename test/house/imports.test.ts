import { execFileSync, spawnSync } from "node:child_process"
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs"
import { tmpdir } from "node:os"
import { dirname, join } from "node:path"
import { fileURLToPath } from "node:url"
import { afterEach, describe, expect, test } from "vitest"
import { importsOf, violations } from "../../scripts/check-house.mjs"

const root = fileURLToPath(new URL("../../", import.meta.url))
const program = join(root, "scripts", "check-house.mjs")

const trees: Array<string> = []

/** A made-up project with these files. */
const tree = (files: Record<string, string>): string => {
  const dir = mkdtempSync(join(tmpdir(), "house-"))
  trees.push(dir)
  const all = { "package.json": `{ "name": "made-up", "exports": { ".": "./src/index.ts" } }`, ...files }
  for (const [path, text] of Object.entries(all)) {
    mkdirSync(dirname(join(dir, path)), { recursive: true })
    writeFileSync(join(dir, path), text)
  }
  return dir
}

/** What the rule says of one file that has this one import in its first line. */
const says = (file: string, specifier: string) => violations(tree({ [file]: `import "${specifier}"\n` }))

afterEach(() => {
  for (const dir of trees.splice(0)) rmSync(dir, { recursive: true })
})

describe("the folder rule", () => {
  test("holds in this project", () => {
    expect(violations(root)).toEqual([])
    expect(execFileSync(process.execPath, [program], { encoding: "utf8" })).toBe("")
  })

  test.each([
    ["src/main.ts", "./gateway/Server.ts"],
    ["src/main.ts", "./index.ts"],
    ["src/main.ts", "./client/Client.ts"],
    ["src/index.ts", "./client/Client.ts"],
    ["src/index.ts", "./protocol/Search.ts"],
    ["src/gateway/Server.ts", "../actors/Session.ts"],
    ["src/gateway/Server.ts", "../protocol/Search.ts"],
    ["src/gateway/Server.ts", "../config.ts"],
    ["src/gateway/http/Routes.ts", "../Server.ts"],
    ["src/actors/Session.ts", "../shards/Shard.ts"],
    ["src/shards/Shard.ts", "../tiers/VectorIndex.ts"],
    ["src/tiers/VectorIndex.ts", "../protocol/Search.ts"],
    ["src/tiers/VectorIndex.ts", "../config.ts"],
    ["src/config.ts", "./protocol/Limits.ts"],
    ["src/client/Client.ts", "../protocol/Search.ts"],
    ["src/client/Client.ts", "./Stream.ts"],
    ["src/tiers/VectorIndex.ts", "hnswlib-node"],
    ["src/tiers/VectorIndex.ts", "node:fs"],
    ["src/main.ts", "../package.json"]
  ])("%s may import %s", (file, specifier) => {
    expect(says(file, specifier)).toEqual([])
  })

  test.each([
    ["src/index.ts", "./main.ts"],
    ["src/actors/Session.ts", "../gateway/Server.ts"],
    ["src/shards/Shard.ts", "../actors/Session.ts"],
    ["src/tiers/VectorIndex.ts", "../shards/Shard.ts"],
    ["src/protocol/Search.ts", "../tiers/VectorIndex.ts"],
    ["src/protocol/Search.ts", "../index.ts"],
    ["src/protocol/deep/er/Search.ts", "../../../shards/Shard.ts"],
    ["src/tiers/VectorIndex.ts", "../tiers/../gateway/Server.ts"],
    ["src/tiers/VectorIndex.ts", "../gateway"],
    ["src/tiers/VectorIndex.ts", "../gateway/Server.ts?worker"],
    ["src/tiers/VectorIndex.ts", "made-up"]
  ])("%s must not import %s, which lies above it", (file, specifier) => {
    expect(says(file, specifier)).toEqual([`${file}:1  imports  ${specifier}  which lies above it`])
  })

  test.each([
    ["src/protocol/Search.ts", "../config.ts"],
    ["src/client/Client.ts", "../config.ts"],
    ["src/client/Client.ts", "../tiers/VectorIndex.ts"],
    ["src/config.ts", "./tiers/VectorIndex.ts"],
    ["src/config.ts", "./client/Client.ts"],
    ["src/gateway/Server.ts", "../client/Client.ts"],
    ["src/protocol/Search.ts", "../client/Client.ts"],
    ["src/main.ts", "../test/house/imports.test.ts"],
    ["src/gateway/Server.ts", "../../bench/words.ts"],
    ["src/gateway/Server.ts", "../../deploy/cluster.ts"],
    ["src/main.ts", "../scripts/setup.mjs"],
    ["src/main.ts", "./helpers/anything.ts"],
    ["src/helpers/anything.ts", "node:fs"],
    ["src/main.ts", "/etc/passwd"],
    ["src/main.ts", "#private"],
    ["src/tiers/VectorIndex.ts", "../gate%77ay/Server.ts"]
  ])("%s must not import %s", (file, specifier) => {
    const found = says(file, specifier)
    expect(found).toHaveLength(1)
    expect(found[0]).toMatch(`${file}:1  `)
  })

  test("a cycle between folders cannot hide, in whichever way its upward half is written", () => {
    const upward = [
      `import { Server } from "../gateway/Server.ts"`,
      `import type { Server } from '../gateway/Server.ts'`,
      `import Server, * as all from "../gateway/Server.ts"`,
      `import {\n  Server, // "the" server\n  type Options\n} from "../gateway/Server.ts"`,
      `export * from "../gateway/Server.ts"`,
      `export * as gateway from "../gateway/Server.ts"`,
      `export type { Server } from "../gateway/Server.ts"`,
      `export { Server as "the server" } from "../gateway/Server.ts"`,
      `const load = () => import("../gateway/Server.ts")`,
      "const load = () => import(\n  /* later */ `../gateway/Server.ts`)",
      "const load = (name: string) => import(`../gateway/${name}.ts`)",
      `type Server = import("../gateway/Server.ts").Server`,
      `const server = require("../gateway/Server.ts")`,
      `const worker = new Worker(new URL("../gateway/Server.ts", import.meta.url))`,
      `const worker = new Worker(import.meta.resolve("../gateway/Server.ts"))`
    ]
    for (const text of upward) {
      const found = violations(
        tree({
          "src/gateway/Server.ts": `import { Shard } from "../shards/Shard.ts"\nexport class Server {}\n`,
          "src/shards/Shard.ts": `const started = 1\n${text}\n`
        })
      )
      expect(found, text).toHaveLength(1)
      expect(found[0], text).toMatch(/^src\/shards\/Shard\.ts:[2-5] {2}imports {2}\.\.\/gateway\//)
    }
  })

  test("only imports count, not what looks like one", () => {
    const text = [
      `// import "../gateway/Server.ts"`,
      `/* import "../gateway/Server.ts"\n   export * from "../gateway/Server.ts" */`,
      `const a = 'import "../gateway/Server.ts"'`,
      'const b = `import "../gateway/Server.ts" ${a + `import("../gateway/Server.ts")`} import "../gateway/Server.ts"`',
      `const c = /import "..\\/gateway\\/Server.ts"[/"'\`]/.test(a)`,
      `if (c) /["'\`]import("..")/.test(b)`,
      `const d = 4 / 2 / 1 // it's "fine"`,
      `bulk.import("../gateway/Server.ts")`,
      `const e = { import: "../gateway/Server.ts", from: "../gateway/Server.ts" }`,
      `export { a }`,
      `const from = "../gateway/Server.ts"`
    ]
    expect(violations(tree({ "src/shards/Shard.ts": `${text.join("\n")}\n` }))).toEqual([])
  })

  test("what follows such text is read again, with its line", () => {
    const text = 'const a = `${`}"`}` // `\nconst b = /`/\nconst c = "\\""\nimport "./x.ts"\nimport("./y.ts")\n'
    expect(importsOf(text).map(({ line, specifier }) => [line, specifier])).toEqual([
      [4, "./x.ts"],
      [5, "./y.ts"]
    ])
  })

  test("the command names file and line and fails", () => {
    const dir = tree({
      "src/tiers/A.ts": `import "../protocol/B.ts"\n\nexport * from "../gateway/C.ts"\n`,
      "src/protocol/B.ts": `import "../config.ts"\n`
    })
    const result = spawnSync(process.execPath, [program, dir], { encoding: "utf8" })
    expect(result.stdout.split("\n")).toEqual([
      "src/protocol/B.ts:1  imports  ../config.ts  which is not for src/protocol",
      "src/tiers/A.ts:3  imports  ../gateway/C.ts  which lies above it",
      ""
    ])
    expect(result.status).toBe(1)
  })
})
