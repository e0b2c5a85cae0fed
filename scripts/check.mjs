// Checks the project without running it: types, lint and format, and the folder rule.
//
//   node scripts/check.mjs                      all of them, every one even if an earlier one fails
//   node scripts/check.mjs types|lint|house     one of them
//   node scripts/check.mjs format               writes instead of checking

import { spawnSync } from "node:child_process"
import { join } from "node:path"
import { ensureInstalled, main, nodeBinary, root, SetupError } from "./setup.mjs"

/** @param {ReadonlyArray<string>} path */
const tool = (...path) => join(root, "node_modules", ...path)

/** @type {Record<string, ReadonlyArray<string>>} */
const steps = {
  types: [tool("typescript", "bin", "tsc"), "--noEmit"],
  lint: [tool("@biomejs", "biome", "bin", "biome"), "check", "--error-on-warnings"],
  house: [join(root, "scripts", "check-house.mjs")],
  format: [tool("@biomejs", "biome", "bin", "biome"), "check", "--write"]
}

await main(async () => {
  const [name] = process.argv.slice(2)
  if (name !== undefined && !steps[name])
    throw new SetupError(`check knows ${Object.keys(steps).join(", ")}, not ${name}`)
  const chosen = name === undefined ? ["types", "lint", "house"] : [name]

  await ensureInstalled()
  // Folders with packages of their own: their types are needed to check what is in them.
  if (chosen.includes("types")) {
    for (const folder of ["bench", "test/interop"]) await ensureInstalled(folder)
  }

  const failed = chosen.filter((step) => {
    process.stdout.write(`check: ${step}\n`)
    const result = spawnSync(nodeBinary, steps[step], { cwd: root, stdio: "inherit" })
    if (result.signal) process.kill(process.pid, result.signal)
    return result.status !== 0
  })
  process.stdout.write(failed.length === 0 ? "check: all good\n" : `check: failed: ${failed.join(", ")}\n`)
  if (failed.length > 0) process.exitCode = 1
})
