/**
 * The package as a program has it: packed from a copy of the project, and installed by npm, without a network, beside the
 * dependencies that the project has already. Kept for as long as the sources are the same, for one test after another.
 */
import { execFile } from "node:child_process"
import { createHash, randomUUID } from "node:crypto"
import { cp, mkdir, mkdtemp, readdir, readFile, rename, rm, stat, symlink, writeFile } from "node:fs/promises"
import { delimiter, join } from "node:path"
import { promisify } from "node:util"

const root = new URL("../../", import.meta.url).pathname
const cache = join(root, ".cache")

/** What is packed, and what packs it. */
const parts = [
  "docs",
  "proto",
  "scripts",
  "src",
  "LICENSE",
  "README.md",
  "package-lock.json",
  "package.json",
  "tsconfig.build.json",
  "tsconfig.json"
]

export interface InstalledPackage {
  /** A folder of a program that has the package among its dependencies; this call's own. */
  readonly directory: string
  /** What runs a command of npm there on the Node of the project. */
  readonly environment: NodeJS.ProcessEnv
  readonly remove: () => Promise<void>
}

export const installedPackage = async (): Promise<InstalledPackage> => {
  const program = join(cache, `package-${await sourcesHash()}`)
  await mkdir(cache, { recursive: true })
  if (!(await exists(program))) await install(program)
  await removeOld(program)
  // Below the program's folder, where its node_modules are found.
  const directory = await mkdtemp(join(program, "run-"))
  return { directory, environment, remove: () => rm(directory, { recursive: true }) }
}

/** The Node of the project first, for programs that start with `#!/usr/bin/env node`. */
const environment: NodeJS.ProcessEnv = {
  ...process.env,
  PATH: [join(root, "node_modules", ".bin"), process.env["PATH"] ?? ""].join(delimiter)
}

const run = promisify(execFile)

const install = async (program: string): Promise<void> => {
  const work = join(cache, `packing-${randomUUID()}`)
  const project = join(work, "project")
  const fresh = join(work, "program")
  await mkdir(fresh, { recursive: true })
  try {
    for (const part of parts) {
      await cp(join(root, part), join(project, part), { recursive: true, filter: (path) => !isInstalled(path) })
    }
    await symlink(join(root, "node_modules"), join(project, "node_modules"))
    await run("npm", ["pack", "--pack-destination", fresh], { cwd: project, env: environment })
    const [tarball] = await readdir(fresh)
    const { name, dependencies } = JSON.parse(await readFile(join(root, "package.json"), "utf8")) as {
      readonly name: string
      readonly dependencies: Readonly<Record<string, string>>
    }
    const linked = Object.keys(dependencies).map((name) => [name, `file:${join(root, "node_modules", name)}`])
    const manifest = {
      name: "program",
      private: true,
      type: "module",
      dependencies: { ...Object.fromEntries(linked), [name]: `file:./${tarball}` }
    }
    await writeFile(join(fresh, "package.json"), JSON.stringify(manifest))
    await run("npm", ["install", "--offline", "--ignore-scripts", "--no-audit", "--no-fund"], {
      cwd: fresh,
      env: environment
    })
    // Another test may have been first.
    await rename(fresh, program).catch(async (error: unknown) => {
      if (!(await exists(program))) throw error
    })
  } finally {
    await rm(work, { recursive: true, force: true })
  }
}

/** Packages of a folder's own. */
const isInstalled = (path: string): boolean => path.slice(root.length).includes("node_modules")

const sourcesHash = async (): Promise<string> => {
  const hash = createHash("sha256")
  for (const part of parts) {
    const path = join(root, part)
    const files = (await stat(path)).isDirectory()
      ? (await readdir(path, { recursive: true, withFileTypes: true }))
          .filter((entry) => entry.isFile() && !isInstalled(entry.parentPath))
          .map((entry) => join(entry.parentPath, entry.name))
          .sort()
      : [path]
    for (const file of files) {
      hash.update(`${file.slice(root.length)}\0`)
      hash.update(await readFile(file))
    }
  }
  return hash.digest("hex").slice(0, 16)
}

/** Those of sources that are no more; one that is in use by another run of the tests is younger. */
const removeOld = async (current: string): Promise<void> => {
  for (const name of await readdir(cache)) {
    const path = join(cache, name)
    if (!name.startsWith("package-") || path === current) continue
    const age = Date.now() - ((await stat(path).catch(() => undefined))?.mtimeMs ?? Date.now())
    if (age > keptMillis) await rm(path, { recursive: true, force: true })
  }
}

const keptMillis = 3_600_000

const exists = (path: string): Promise<boolean> =>
  stat(path).then(
    () => true,
    () => false
  )
