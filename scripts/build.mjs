// Builds what a program installs: plain ESM with types, and the client as one file for pages without a bundler.
//
//   node scripts/build.mjs            into dist/

import { spawnSync } from "node:child_process"
import { readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs"
import { join } from "node:path"
import { ensureInstalled, main, nodeBinary, root, SetupError } from "./setup.mjs"

const target = join(root, "dist")

/** Modules that are named by address and not imported, which the compiler leaves as they are. */
const byAddress = /new URL\((["'])(\.{1,2}\/[^"']*)\.ts\1, import\.meta\.url\)/g

/** Imports in declarations, likewise. */
const imported = /(\bfrom |\bimport\()(["'])(\.{1,2}\/[^"']*)\.ts\2/g

const compile = () => {
  const { signal, status } = spawnSync(
    nodeBinary,
    [join(root, "node_modules", "typescript", "bin", "tsc"), "-p", join(root, "tsconfig.build.json")],
    { stdio: "inherit" }
  )
  if (signal) process.kill(process.pid, signal)
  if (status !== 0) throw new SetupError("the build failed; what the compiler said is above")
}

/** Names in what was built are those of files that were built. */
const rename = () => {
  for (const path of readdirSync(target, { recursive: true, encoding: "utf8" })) {
    if (!/\.(?:js|d\.ts)$/.test(path)) continue
    const file = join(target, path)
    const text = readFileSync(file, "utf8")
    const named = path.endsWith(".d.ts")
      ? text.replace(imported, "$1$2$3.js$2")
      : text.replace(byAddress, "new URL($1$2.js$1, import.meta.url)")
    if (named !== text) writeFileSync(file, named)
  }
}

/** The client as one file that imports nothing. */
const bundleClient = async () => {
  const { rolldown } = await import("rolldown")
  const bundle = await rolldown({ input: join(target, "client", "index.js"), platform: "browser" })
  await bundle.write({ file: join(target, "browser.js"), format: "esm", minify: true })
  await bundle.close()
}

await main(async () => {
  await ensureInstalled()
  rmSync(target, { recursive: true, force: true })
  compile()
  rename()
  await bundleClient()
})
