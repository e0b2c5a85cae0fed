// Builds what a program installs: plain ESM with types; the client and the engine with promises in a few files that a program
// loads in a fraction of the time; and the client as one file for pages without a bundler.
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

/** What is imported of Effect by the name of a module. */
const ofEffect = /^import (type )?\{([^}]*)\} from (["'])(effect(?:\/[a-z-]+)?)\3;$/gm

/**
 * The modules of Effect that an index of it names, by name.
 * @type {Map<string, ReadonlyMap<string, string>>}
 */
const indices = new Map()

/** @param {string} index `effect` or `effect/http` */
const modulesOf = (index) => {
  const known = indices.get(index)
  if (known) return known
  const text = readFileSync(
    join(root, "node_modules", "effect", "dist", index.slice("effect".length), "index.js"),
    "utf8"
  )
  const modules = new Map(
    [...text.matchAll(/^export \* as (\w+) from "\.\/(\w+)\.js";?$/gm)].map(([, name = "", file]) => [
      name,
      `${index}/${file}`
    ])
  )
  indices.set(index, modules)
  return modules
}

/**
 * The modules of Effect that are used, each by itself: its indices load all there are, which takes a program that starts
 * twice as long, and one whose types are checked.
 * @param {string} text
 */
const withoutIndices = (text) =>
  text.replace(ofEffect, (whole, type = "", names, _, index) => {
    const modules = modulesOf(index)
    const imports = String(names)
      .split(",")
      .map((name) =>
        name
          .trim()
          .replace(/^type /, "")
          .split(/ as /)
      )
      .map(([name = "", alias = name]) => [alias, modules.get(name)])
    // Single functions are left to the index.
    if (imports.some(([, module]) => module === undefined)) return whole
    return imports.map(([alias, module]) => `import ${type}* as ${alias} from "${module}";`).join("\n")
  })

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
    const named = withoutIndices(
      path.endsWith(".d.ts")
        ? text.replace(imported, "$1$2$3.js$2")
        : text.replace(byAddress, "new URL($1$2.js$1, import.meta.url)")
    )
    if (named !== text) writeFileSync(file, named)
  }
}

/** The client as one file that imports nothing. */
const bundleClient = async () => {
  const { rolldown } = await import("rolldown")
  const bundle = await rolldown({ input: join(target, "client", "index.js"), platform: "browser" })
  const written = await bundle.write({ file: join(target, "browser.js"), format: "esm", minify: true })
  await bundle.close()
  writeFileSync(join(target, "browser.licenses.txt"), licensesOf(written))
}

/**
 * The client and the engine as few files, Effect and all: what a program that uses promises loads. Native code and what only
 * some settings need stay packages of their own.
 */
const bundleEngine = async () => {
  const { rolldown } = await import("rolldown")
  const bundle = await rolldown({
    input: { index: join(target, "index.js"), vectorThread: join(target, "tiers", "vectorThread.js") },
    platform: "node",
    external: [/^hnswlib-node/, /^ioredis/, /^@google-cloud\//, ofNodes]
  })
  // Side by side, since the engine starts the thread by its address.
  const written = await bundle.write({ dir: join(target, "bundle"), format: "esm", minify: true })
  await bundle.close()
  writeFileSync(join(target, "bundle", "licenses.txt"), licensesOf(written))
}

/**
 * The licences of the packages whose code is in a bundle, which they ask for.
 * @param {import("rolldown").RolldownOutput} written
 */
const licensesOf = ({ output }) => {
  const folders = new Set()
  for (const chunk of output) {
    for (const module of chunk.type === "chunk" ? chunk.moduleIds : []) {
      const folder = /^.*\/node_modules\/(?:@[^/]+\/)?[^/]+(?=\/)/.exec(module)?.[0]
      if (folder) folders.add(folder)
    }
  }
  return [...folders]
    .sort()
    .map((folder) => {
      const { license, name, version } = JSON.parse(readFileSync(join(folder, "package.json"), "utf8"))
      const file = readdirSync(folder).find((entry) => /^licen[cs]e/i.test(entry))
      if (!file) throw new SetupError(`${name} is in a bundle and has no file with its licence`)
      return `${name} ${version} (${license})\n\n${readFileSync(join(folder, file), "utf8").trim()}\n`
    })
    .join("\n---\n\n")
}

/** What nodes with wires, or in a cluster, load when their settings ask for it. An engine in a program's process is neither. */
const ofNodes = /\/(?:PostgresCluster|PostgresDirectory|IssuedTokens)\.js$/

await main(async () => {
  await ensureInstalled()
  rmSync(target, { recursive: true, force: true })
  compile()
  rename()
  await bundleEngine()
  await bundleClient()
})
