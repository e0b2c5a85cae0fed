// Adds to lock files the optional packages of other platforms that a registry did not have when they were written.
// npm leaves those out, and then `npm ci` refuses the file. They are added without a checksum, which npm fills in where
// it can reach them. Needed after `npm install` behind a registry that is not complete; test/house/lock.test.ts tells.
//
//   node scripts/complete-lock.mjs [FILE…]     package-lock.json of the project and its folders by default

import { existsSync, readFileSync, writeFileSync } from "node:fs"
import { join } from "node:path"
import { isProgram, root } from "./setup.mjs"

/**
 * @typedef {object} Entry
 * @property {string} [version]
 * @property {boolean} [dev]
 * @property {boolean} [optional]
 * @property {string} [license]
 * @property {Array<string>} [os]
 * @property {Array<string>} [cpu]
 * @property {Array<string>} [libc]
 * @property {Record<string, string>} [engines]
 * @property {Record<string, string>} [optionalDependencies]
 */

/** The lock files of the project. */
export const lockFiles = [".", "bench", "scripts/docs", "test/interop"]
  .map((folder) => join(root, folder, "package-lock.json"))
  .filter((file) => existsSync(file))

/**
 * Whether a package that is found at `path` in node_modules sees one called `name`.
 * @param {Record<string, Entry>} packages
 * @param {string} path
 * @param {string} name
 */
const sees = (packages, path, name) => {
  for (let at = path; ; at = at.slice(0, Math.max(0, at.lastIndexOf("/node_modules/")))) {
    if (packages[`${at}/node_modules/${name}`]) return true
    if (!at.includes("/node_modules/")) return packages[`node_modules/${name}`] !== undefined
  }
}

/**
 * The optional packages that a lock file asks for and does not have, each with what asks for it.
 * @param {Record<string, Entry>} packages
 */
export const missingFrom = (packages) =>
  Object.entries(packages).flatMap(([path, parent]) =>
    Object.entries(parent.optionalDependencies ?? {})
      .filter(([name]) => !sees(packages, path, name))
      .map(([name, version]) => ({ name, version, parent }))
  )

/**
 * What the lock file should say of a package, as far as its name tells.
 * @param {{ name: string, version: string, parent: Entry }} missing
 * @returns {Entry}
 */
const entryFor = ({ name, version, parent }) => {
  const os = /\b(aix|android|darwin|freebsd|linux|netbsd|openbsd|openharmony|sunos|win32)\b/.exec(name)?.[1]
  const cpu = /\b(arm64|arm|x64|ia32|ppc64|riscv64|s390x|loong64|mips64el|wasm32)\b/.exec(name)?.[1]
  const libc = /\b(musl|gnu|glibc)/.exec(name)?.[1]
  if (!/^\d/.test(version)) throw new Error(`${name} is asked for as ${version}, which names no single version`)
  if (!os || !cpu) throw new Error(`${name} does not say which platform it is for`)
  return {
    version,
    cpu: [cpu],
    ...(parent.dev ? { dev: true } : {}),
    ...(libc ? { libc: [libc === "musl" ? "musl" : "glibc"] } : {}),
    ...(parent.license ? { license: parent.license } : {}),
    optional: true,
    os: [os],
    ...(parent.engines ? { engines: parent.engines } : {})
  }
}

if (isProgram(import.meta.url)) {
  const files = process.argv.length > 2 ? process.argv.slice(2) : lockFiles
  for (const file of files) {
    /** @type {{ packages: Record<string, Entry> }} */
    const lock = JSON.parse(readFileSync(file, "utf8"))
    const missing = missingFrom(lock.packages)
    if (missing.length === 0) continue
    for (const one of missing) lock.packages[`node_modules/${one.name}`] = entryFor(one)
    // In npm's order, so that its next change is a small one.
    const entries = Object.entries(lock.packages).sort(([a], [b]) => a.localeCompare(b, "en"))
    lock.packages = Object.fromEntries(entries)
    writeFileSync(file, `${JSON.stringify(lock, null, 2)}\n`)
    process.stdout.write(`${file}: added ${missing.map(({ name }) => name).join(", ")}\n`)
  }
}
