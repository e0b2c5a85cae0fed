/**
 * The two builds of hnswlib-node: `bare` is what `npm install` compiles by default (in this folder), `bare-simd` is the
 * one that the project's set-up compiles for the processor it runs on (in the project's root).
 */
import { createRequire } from "node:module"
import { dirname } from "node:path"
import { fileURLToPath } from "node:url"
import { compiledSimd } from "../scripts/setup.mjs"

export const builds = ["bare", "bare-simd"] as const

export type Build = (typeof builds)[number]

export const indexSettings = { m: 16, efConstruction: 200, seed: 100 } as const

export const loadHnswlib = (build: Build): typeof import("hnswlib-node") => {
  moduleDirectory(build)
  return requireOf(build)("hnswlib-node") as typeof import("hnswlib-node")
}

/** The vector instructions that a build uses, such as `sse`, `avx` or `avx512`. */
export const simdOf = (build: Build): string => {
  moduleDirectory(build)
  return compiledSimd(fileURLToPath(folderOf(build)))
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
