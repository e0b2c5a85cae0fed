/**
 * The two builds of hnswlib-node: `bare` is what `npm install` compiles by default (in this folder), `bare-simd` is the
 * one that the project's set-up compiles for the processor it runs on (in the project's root).
 */
import { createHash } from "node:crypto"
import { readFileSync } from "node:fs"
import { createRequire } from "node:module"
import { dirname, join } from "node:path"
import { fileURLToPath } from "node:url"

export const builds = ["bare", "bare-simd"] as const

export type Build = (typeof builds)[number]

export const indexSettings = { m: 16, efConstruction: 200, seed: 100 } as const

export const loadHnswlib = (build: Build): typeof import("hnswlib-node") => {
  moduleDirectory(build)
  return requireOf(build)("hnswlib-node") as typeof import("hnswlib-node")
}

/** Why the two builds cannot be told apart, or undefined if they differ. */
export const sameBuildWarning = (): string | undefined => {
  const [first, second] = builds.map((build) => {
    const addon = readFileSync(join(moduleDirectory(build), "build/Release/addon.node"))
    return createHash("sha256").update(addon).digest("hex")
  })
  return first === second
    ? "hnswlib-node is the same binary in the project and in bench/: bare-simd is not a SIMD build here (run the project's set-up)"
    : undefined
}

const folderOf = (build: Build): URL => new URL(build === "bare" ? "./" : "../", import.meta.url)

const requireOf = (build: Build): NodeJS.Require => createRequire(new URL("package.json", folderOf(build)))

const moduleDirectory = (build: Build): string => {
  const expected = fileURLToPath(new URL("node_modules/hnswlib-node", folderOf(build)))
  let found: string
  try {
    found = dirname(requireOf(build).resolve("hnswlib-node/package.json"))
  } catch {
    found = ""
  }
  // Without a copy of its own, bench/ would silently resolve to the project's, and the baseline would be another.
  if (found !== expected) {
    throw new Error(
      `hnswlib-node is not installed for ${build}: run \`npm ci\` in ${build === "bare" ? "bench/" : "the project"}`
    )
  }
  return expected
}
