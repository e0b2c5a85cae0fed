// Writes docs/api, the reference of what a program imports, from the docstrings; fails where one is missing.
//
//   npm run docs:api [-- FOLDER]     another folder than docs/api

import { spawnSync } from "node:child_process"
import { fileURLToPath } from "node:url"

const here = fileURLToPath(new URL(".", import.meta.url))
const [folder] = process.argv.slice(2)

const { signal, status } = spawnSync(
  process.execPath,
  ["node_modules/typedoc/bin/typedoc", "--logLevel", "Warn", ...(folder === undefined ? [] : ["--out", folder])],
  { cwd: here, stdio: "inherit" }
)
if (signal) process.kill(process.pid, signal)
process.exitCode = status ?? 1
