#!/usr/bin/env node
// The command `ruvector`: in an installed package what was built from src/main.ts, in a clone src/main.ts itself.
// Plain JavaScript that runs on Node 18 and later, so that an older one is told what is needed.

import { existsSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { fileURLToPath } from "node:url"
import { nodeFlags, serverEnvironment } from "./nodeOptions.mjs"

const nodeMajorLeast = 24

const program = fileURLToPath(new URL("../dist/main.js", import.meta.url))

/** The program on this Node, as it runs best: this process becomes it, so that signals reach it and nothing else. */
const become = async () => {
  const [major = 0] = process.versions.node.split(".").map(Number)
  if (major < nodeMajorLeast) {
    process.stderr.write(`ruvector: needs Node ${nodeMajorLeast} or later; this is ${process.version}\n`)
    process.exitCode = 1
    return
  }
  // Windows has no such thing; there the program does without the flags.
  if (process.platform === "win32" || process.execve === undefined) {
    process.argv[1] = program
    await import(new URL("../dist/main.js", import.meta.url).href)
    return
  }
  process.execve(process.execPath, [process.execPath, ...nodeFlags, program, ...process.argv.slice(2)], {
    NODE_COMPILE_CACHE: join(tmpdir(), "node-compile-cache"),
    ...serverEnvironment,
    ...process.env
  })
}

if (existsSync(new URL("../src/main.ts", import.meta.url))) {
  const { launch } = await import("./run.mjs")
  await launch("src/main.ts", process.argv.slice(2))
} else {
  await become()
}
