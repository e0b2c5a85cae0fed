// Installs what is missing, and nothing when nothing is: the packages of the lock file, the Node release that
// package.json names, and the vector graph (hnswlib-node) compiled for this machine's processor.
// Plain JavaScript without dependencies that runs on Node 18 and later, since it is what brings everything else.
//
//   node scripts/setup.mjs [folder…]     the project itself, then each folder that has its own package.json
//
// RUVECTOR_NATIVE_ARCH   the instruction set to compile the graph for: `native` (the default, this processor's own),
//                        or a level such as `x86-64-v3` for an image that is to run on other machines

import { spawn, spawnSync } from "node:child_process"
import { createHash } from "node:crypto"
import {
  closeSync,
  existsSync,
  linkSync,
  openSync,
  readFileSync,
  readlinkSync,
  readSync,
  realpathSync,
  renameSync,
  rmSync,
  statSync,
  utimesSync,
  writeFileSync
} from "node:fs"
import { cpus, hostname } from "node:os"
import { delimiter, dirname, join, relative, resolve } from "node:path"
import { fileURLToPath } from "node:url"

/** The project's folder. */
export const root = dirname(dirname(fileURLToPath(import.meta.url)))

/**
 * What set-up knows about a node_modules folder; npm removes it together with everything else there on `npm ci`.
 * @typedef {object} Stamp
 * @property {string} [lock] hash of the package-lock.json that was installed
 * @property {string} [installed] hash of npm's own record of what it installed
 * @property {string} [platform]
 * @property {NativeStamp} [native]
 */

/**
 * @typedef {object} NativeStamp
 * @property {string} key level, processor and version that the graph was compiled for
 * @property {string} file size and time of the compiled file
 * @property {string} level
 * @property {string} simd the widest vector code in it: `avx512`, `avx`, `sse` or `none`
 */

/**
 * @typedef {object} LockedPackage
 * @property {string} [version]
 * @property {string} [integrity]
 * @property {boolean} [optional]
 * @property {boolean} [devOptional]
 * @property {boolean} [peer]
 * @property {boolean} [extraneous]
 * @property {boolean} [hasInstallScript]
 */

/** A failure that is told in one line, without a stack. */
export class SetupError extends Error {}

/** Set-up was told to stop by a signal. */
export class SetupInterrupted extends Error {
  /** @param {NodeJS.Signals} signal */
  constructor(signal) {
    super(`stopped by ${signal}`)
    this.signal = signal
  }
}

const platform = `${process.platform}-${process.arch}`

/** @param {string} line */
const say = (line) => void process.stderr.write(`setup: ${line}\n`)

/** @param {string} text */
const hash = (text) => createHash("sha256").update(text).digest("hex").slice(0, 32)

/**
 * @param {string} file
 * @returns {string | undefined}
 */
const readText = (file) => {
  try {
    return readFileSync(file, "utf8")
  } catch {
    return undefined
  }
}

/**
 * @param {string | undefined} text
 * @returns {any}
 */
const parse = (text) => {
  try {
    return text === undefined ? undefined : JSON.parse(text)
  } catch {
    return undefined
  }
}

// --- The stamp -------------------------------------------------------------------------------------------------------

/** @param {string} dir */
const stampFile = (dir) => join(dir, "node_modules", ".ruvector-setup.json")

/**
 * @param {string} dir
 * @returns {Stamp}
 */
const readStamp = (dir) => parse(readText(stampFile(dir))) ?? {}

/**
 * @param {string} dir
 * @param {Stamp} change
 */
const writeStamp = (dir, change) => {
  const file = stampFile(dir)
  const next = `${file}.${process.pid}`
  writeFileSync(next, `${JSON.stringify({ ...readStamp(dir), ...change }, null, 2)}\n`)
  renameSync(next, file)
}

// --- One at a time ---------------------------------------------------------------------------------------------------

const lockFile = join(root, ".ruvector-setup.lock")
const heartbeat = 5_000
const staleAfter = 180_000

// A process id means something only inside its own process namespace.
const whereabouts = (() => {
  try {
    return `${hostname()} ${readlinkSync("/proc/self/ns/pid")}`
  } catch {
    return hostname()
  }
})()

/** @param {number} pid */
const isAlive = (pid) => {
  try {
    process.kill(pid, 0)
    return true
  } catch (error) {
    return /** @type {NodeJS.ErrnoException} */ (error).code === "EPERM"
  }
}

/** @param {string} file */
const age = (file) => {
  try {
    return Date.now() - statSync(file).mtimeMs
  } catch {
    return -1
  }
}

/**
 * Puts `file` there with its content in one step; false if somebody else's is there already.
 * @param {string} file
 * @param {string} content
 */
const claim = (file, content) => {
  const own = `${file}.${process.pid}`
  try {
    writeFileSync(own, content)
    linkSync(own, file)
    return true
  } catch (error) {
    const { code, message } = /** @type {NodeJS.ErrnoException} */ (error)
    if (code === "EEXIST") return false
    throw new SetupError(`something has to be installed, but the project's folder cannot be written to: ${message}`)
  } finally {
    rmSync(own, { force: true })
  }
}

/**
 * What a lock says of its owner. The npm that it runs counts too: it can outlive a set-up that was killed.
 * @param {number} [npm]
 */
const ownership = (npm) => JSON.stringify({ where: whereabouts, pids: [process.pid, ...(npm ? [npm] : [])] })

const ownerIsGone = () => {
  /** @type {{ where: string, pids: ReadonlyArray<number> } | undefined} */
  const owner = parse(readText(lockFile))
  if (owner?.where === whereabouts && !owner.pids.some(isAlive)) return true
  // Process numbers are used again, and those of another machine or container mean nothing here.
  return age(lockFile) > staleAfter
}

/** Removes the lock of a process that died, with a second claim so that only one waiting process does. */
const removeDeadLock = () => {
  const guard = `${lockFile}.steal`
  if (age(guard) > 10_000) rmSync(guard, { force: true })
  if (!claim(guard, "")) return
  try {
    if (ownerIsGone()) rmSync(lockFile, { force: true })
  } finally {
    rmSync(guard, { force: true })
  }
}

/**
 * The process that a step is waiting for, and the signal that stopped the set-up, if any.
 * @type {{ child: import("node:child_process").ChildProcess | undefined, signal: NodeJS.Signals | undefined }}
 */
const current = { child: undefined, signal: undefined }

/**
 * Runs `work` while no other set-up of this project runs.
 * @param {() => Promise<void>} work
 */
const exclusively = async (work) => {
  for (let waited = false; !claim(lockFile, ownership()); waited = true) {
    if (!waited) say("another start is installing; waiting for it")
    if (ownerIsGone()) removeDeadLock()
    await new Promise((done) => setTimeout(done, 250))
  }
  const beat = setInterval(() => {
    try {
      utimesSync(lockFile, new Date(), new Date())
    } catch {}
  }, heartbeat)
  /** @param {NodeJS.Signals} signal */
  const stop = (signal) => {
    current.signal ??= signal
    try {
      if (current.child?.pid) process.kill(-current.child.pid, signal)
    } catch {}
  }
  const signals = /** @type {const} */ (["SIGINT", "SIGTERM", "SIGHUP"])
  for (const signal of signals) process.on(signal, stop)
  try {
    await work()
  } finally {
    for (const signal of signals) process.off(signal, stop)
    clearInterval(beat)
    rmSync(lockFile, { force: true })
  }
  if (current.signal) throw new SetupInterrupted(current.signal)
}

// --- Running npm -----------------------------------------------------------------------------------------------------

/**
 * Runs a command silently; what it printed is shown only when it fails.
 * @param {string} name what the step is called when it fails
 * @param {string} command
 * @param {ReadonlyArray<string>} args
 * @param {{ cwd: string, env: NodeJS.ProcessEnv }} options
 * @returns {Promise<void>}
 */
const run = (name, command, args, options) =>
  new Promise((done, fail) => {
    if (current.signal) return fail(new SetupInterrupted(current.signal))
    // In a group of its own, so that a signal ends the compiler too and not only npm.
    const child = spawn(command, [...args], { ...options, detached: true, stdio: ["ignore", "pipe", "pipe"] })
    current.child = child
    writeFileSync(`${lockFile}.${process.pid}`, ownership(child.pid))
    renameSync(`${lockFile}.${process.pid}`, lockFile)
    let output = ""
    /** @param {Buffer} chunk */
    const collect = (chunk) => {
      output = (output + chunk).slice(-20_000)
    }
    child.stdout.on("data", collect)
    child.stderr.on("data", collect)
    child.on("error", (error) => {
      current.child = undefined
      fail(new SetupError(`${name} could not be started: ${error.message}`))
    })
    child.on("close", (code, signal) => {
      current.child = undefined
      if (current.signal) return fail(new SetupInterrupted(current.signal))
      if (code === 0) return done()
      process.stderr.write(output.endsWith("\n") || output === "" ? output : `${output}\n`)
      fail(new SetupError(`${name} failed (${signal ?? `exit code ${code}`}); its output is above`))
    })
  })

/** The node_modules/.bin folders that `npm run` puts in front: there `node` may be what is about to be replaced. */
const outerPath = () =>
  (process.env["PATH"] ?? "")
    .split(delimiter)
    .filter((entry) => !/[\\/](?:node_modules[\\/]\.bin|node-gyp-bin)[\\/]?$/.test(entry))
    .join(delimiter)

/** @param {{ ownNode: boolean }} options whether npm itself runs on the Node release that the project brings */
const npmEnvironment = ({ ownNode }) => {
  /** @type {NodeJS.ProcessEnv} */
  const env = {}
  for (const [key, value] of Object.entries(process.env)) {
    // What an outer `npm start` says about itself is not for the npm that is run inside.
    if (!/^npm_(?:package|lifecycle|command|node_execpath|config_local_prefix|config_global_prefix)/.test(key)) {
      env[key] = value
    }
  }
  env["PATH"] = ownNode ? [join(root, "node_modules", ".bin"), outerPath()].join(delimiter) : outerPath()
  // The headers of that release are in its package: nothing is downloaded to compile against it.
  const headers = nodeHeaders()
  if (headers) env["npm_config_nodedir"] = headers
  return env
}

const quiet = ["--no-audit", "--no-fund", "--no-progress", "--no-update-notifier", "--loglevel=error"]

// --- Packages --------------------------------------------------------------------------------------------------------

/**
 * Whether node_modules holds what package-lock.json asks for.
 * @param {string} dir
 * @returns {"stamped" | "same" | "missing"} `same`: it does, but not by a set-up that left its stamp
 */
const packagesState = (dir) => {
  const lockText = readText(join(dir, "package-lock.json"))
  if (lockText === undefined) {
    throw new SetupError(`${shown(dir)} has no package-lock.json: run npm install there once and commit the file`)
  }
  const installedText = readText(join(dir, "node_modules", ".package-lock.json"))
  if (installedText === undefined) return "missing"
  const stamp = readStamp(dir)
  if (stamp.platform !== undefined && stamp.platform !== platform) return "missing"
  if (stamp.lock === hash(lockText) && stamp.installed === hash(installedText)) return "stamped"

  /** @type {Record<string, LockedPackage>} */
  const wanted = parse(lockText)?.packages ?? {}
  /** @type {Record<string, LockedPackage>} */
  const installed = parse(installedText)?.packages ?? {}
  for (const [path, entry] of Object.entries(installed)) {
    const want = wanted[path]
    if (entry.extraneous) continue
    if (!want || want.version !== entry.version || want.integrity !== entry.integrity) return "missing"
  }
  for (const [path, want] of Object.entries(wanted)) {
    if (path === "") continue
    if (installed[path] ? !existsSync(join(dir, path)) : !want.optional && !want.devOptional) return "missing"
  }
  return "same"
}

/** @param {string} dir */
const stampPackages = (dir) =>
  writeStamp(dir, {
    lock: hash(readText(join(dir, "package-lock.json")) ?? ""),
    installed: hash(readText(join(dir, "node_modules", ".package-lock.json")) ?? ""),
    platform
  })

/** @param {string} dir */
const shown = (dir) => relative(root, dir) || "the project"

// --- Node ------------------------------------------------------------------------------------------------------------

/** The Node release that the project brings. */
export const nodeBinary = join(root, "node_modules", "node", "bin", process.platform === "win32" ? "node.exe" : "node")

/** The folder of that release with `include/node` in it, where it ships one. */
const nodeHeaders = () => {
  const names = [`node-${platform}`, `node-bin-${platform}`]
  const places = [join(root, "node_modules", "node", "node_modules"), join(root, "node_modules")]
  const folders = places.flatMap((place) => names.map((name) => join(place, name)))
  return folders.find((folder) => existsSync(join(folder, "include", "node", "node_api.h")))
}

/** Whether the Node release in node_modules is the one that was asked for and runs here. */
const nodeRuns = () => {
  const version = parse(readText(join(root, "node_modules", "node", "package.json")))?.version
  if (version === undefined || !existsSync(nodeBinary)) return false
  const result = spawnSync(nodeBinary, ["--version"], { encoding: "utf8" })
  return result.stdout?.trim() === `v${version}`
}

const fetchNode = async () => {
  const version = parse(readText(join(root, "node_modules", "node", "package.json")))?.version
  say(`fetching Node ${version}`)
  await run("fetching Node", "npm", ["rebuild", "node", "--ignore-scripts=false", ...quiet], {
    cwd: root,
    env: npmEnvironment({ ownNode: false })
  })
  if (!nodeRuns()) throw new SetupError(`the package "node" did not bring a Node that runs here (${platform})`)
}

// --- The vector graph ------------------------------------------------------------------------------------------------

const nativeLevel = () => {
  const level = process.env["RUVECTOR_NATIVE_ARCH"] || "native"
  if (!/^[a-z0-9][a-z0-9._+-]*$/i.test(level)) {
    throw new SetupError(
      `RUVECTOR_NATIVE_ARCH must name an instruction set such as native or x86-64-v3, not "${level}"`
    )
  }
  return level
}

/** @param {string} level */
const archFlag = (level) => {
  // On ARM -march=native says less than -mcpu=native; a name such as armv8.2-a is an architecture, others are cores.
  if (process.arch === "arm64") return level.startsWith("armv") ? `-march=${level}` : `-mcpu=${level}`
  return `-march=${level}`
}

/** The processor: its name alone can be the same for machines with different instructions, so those are in it too. */
const processor = () => {
  if (process.platform === "linux") {
    try {
      const file = openSync("/proc/cpuinfo", "r")
      const buffer = Buffer.alloc(16_384)
      const length = readSync(file, buffer, 0, buffer.length, 0)
      closeSync(file)
      const first = buffer.toString("latin1", 0, length).split("\n\n")[0] ?? ""
      /** @param {string} name */
      const field = (name) => new RegExp(`^${name}\\s*:\\s*(.*)$`, "m").exec(first)?.[1] ?? ""
      return {
        model: field("model name") || field("CPU part"),
        flags: field("flags") || field("Features")
      }
    } catch {}
  }
  return { model: cpus()[0]?.model ?? "", flags: "" }
}

/** @param {string} dir */
const graphVersion = (dir) =>
  /** @type {string | undefined} */ (
    parse(readText(join(dir, "node_modules", "hnswlib-node", "package.json")))?.version
  )

/** @param {string} dir */
const graphBinary = (dir) => join(dir, "node_modules", "hnswlib-node", "build", "Release", "addon.node")

/** @param {string} dir */
const nativeKey = (dir) => {
  const level = nativeLevel()
  const cpu = level === "native" ? processor() : { model: "", flags: "" }
  return [graphVersion(dir), platform, level, cpu.model, cpu.flags && hash(cpu.flags)].filter(Boolean).join(" ")
}

/** @param {string} file */
const fileMark = (file) => {
  try {
    const { mtimeMs, size } = statSync(file)
    return `${size} ${Math.round(mtimeMs)}`
  } catch {
    return ""
  }
}

/** @param {string} dir */
const nativeIsCurrent = (dir) => {
  const { native } = readStamp(dir)
  const file = fileMark(graphBinary(dir))
  return native !== undefined && file !== "" && native.file === file && native.key === nativeKey(dir)
}

/**
 * The widest vector code in a compiled graph, read from the names of its distance functions: each of them is there
 * only if the compiler was allowed to use those instructions.
 * @param {string} dir
 * @returns {"avx512" | "avx" | "sse" | "none"}
 */
export const compiledSimd = (dir = root) => {
  const binary = readFileSync(graphBinary(dir))
  if (binary.includes("SIMD16ExtAVX512")) return "avx512"
  if (binary.includes("SIMD16ExtAVX")) return "avx"
  return binary.includes("SIMD16ExtSSE") ? "sse" : "none"
}

/**
 * The vector code that a compiled graph should have, where that can be told.
 * @returns {"avx512" | "avx" | "sse" | undefined}
 */
export const expectedSimd = () => {
  if (process.arch !== "x64") return undefined
  const level = nativeLevel()
  if (level === "x86-64-v4") return "avx512"
  if (level === "x86-64-v3") return "avx"
  if (level !== "native") return undefined
  const flags = ` ${processor().flags} `
  if (flags.includes(" avx512f ")) return "avx512"
  return flags.includes(" avx ") ? "avx" : undefined
}

/** @param {string} command */
const isOnPath = (command) =>
  command.includes("/")
    ? existsSync(command)
    : (process.env["PATH"] ?? "").split(delimiter).some((folder) => folder !== "" && existsSync(join(folder, command)))

/** Makes sure of everything that is needed to compile a package: the tools, and the headers of Node. */
const requireCompiler = async () => {
  const missing = [
    ...(isOnPath("make") ? [] : ["make"]),
    ...(process.env["CXX"] || isOnPath("g++") || isOnPath("c++") || isOnPath("clang++") ? [] : ["g++"]),
    ...(process.env["PYTHON"] || isOnPath("python3") ? [] : ["python3"])
  ]
  if (missing.length > 0) {
    throw new SetupError(
      `the vector graph is compiled on this machine, which lacks ${missing.join(", ")}: install the packages make, g++ and python3 and start again`
    )
  }
  // `npm install` of a further package removes them: npm does not know that they belong to the package "node".
  if (!nodeHeaders()) await fetchNode()
}

// Builds a graph of three points and searches it: a build for another processor dies here instead of in the server.
const graphTrial = `
  const { HierarchicalNSW } = require(process.argv[1])
  const index = new HierarchicalNSW("l2", 32)
  index.initIndex(3)
  for (const n of [0, 1, 2]) index.addPoint(new Array(32).fill(n), n)
  if (index.searchKnn(new Array(32).fill(1.9), 1).neighbors[0] !== 2) process.exit(1)
`

/** @param {string} dir */
const compileGraph = async (dir) => {
  await requireCompiler()
  const level = nativeLevel()
  const key = nativeKey(dir)
  say(`compiling the vector graph for ${level === "native" ? "this processor" : level}`)
  const env = npmEnvironment({ ownNode: true })
  // The flags come after the package's own, so they win. Without them the build has SSE only.
  env["CXXFLAGS"] = [process.env["CXXFLAGS"], "-O3", archFlag(level)].filter(Boolean).join(" ")
  await run("compiling hnswlib-node", "npm", ["rebuild", "hnswlib-node", "--ignore-scripts=false", ...quiet], {
    cwd: dir,
    env
  })
  if (!existsSync(graphBinary(dir))) throw new SetupError("compiling hnswlib-node left no addon.node behind")
  const trial = spawnSync(nodeBinary, ["-e", graphTrial, join(dir, "node_modules", "hnswlib-node")])
  if (trial.status !== 0) {
    const how = trial.signal ?? trial.stderr.toString("utf8").trim().split("\n").pop() ?? "wrong result"
    throw new SetupError(`the vector graph compiled for ${level} does not work on this processor (${how})`)
  }
  const simd = compiledSimd(dir)
  const expected = expectedSimd()
  if (expected !== undefined && simd !== expected) {
    say(`warning: the vector graph has ${simd} code, where ${expected} was expected; searches will be slower`)
  }
  writeStamp(dir, { native: { key, file: fileMark(graphBinary(dir)), level, simd } })
}

// --- All of it -------------------------------------------------------------------------------------------------------

const installProject = async () => {
  const state = packagesState(root)
  if (state === "missing") {
    say("installing packages (npm ci)")
    // No package's script runs here: the two that have one follow, each as its own step.
    await run("npm ci", "npm", ["ci", "--include=dev", "--include=optional", "--ignore-scripts", ...quiet], {
      cwd: root,
      env: npmEnvironment({ ownNode: false })
    })
  }
  if ((state !== "stamped" || !existsSync(nodeBinary)) && !nodeRuns()) await fetchNode()
  if (state !== "stamped") stampPackages(root)
  if (!nativeIsCurrent(root)) await compileGraph(root)
}

/** @param {string} dir */
const installFolder = async (dir) => {
  const state = packagesState(dir)
  if (state === "missing") {
    /** @type {Record<string, LockedPackage>} */
    const wanted = parse(readText(join(dir, "package-lock.json")))?.packages ?? {}
    if (wanted["node_modules/hnswlib-node"]) await requireCompiler()
    say(`installing packages of ${shown(dir)} (npm ci)`)
    await run(`npm ci in ${shown(dir)}`, "npm", ["ci", "--include=dev", "--ignore-scripts=false", ...quiet], {
      cwd: dir,
      env: npmEnvironment({ ownNode: true })
    })
  }
  if (state !== "stamped") stampPackages(dir)
}

/** @param {string} dir */
const isReady = (dir) => {
  if (packagesState(dir) !== "stamped") return false
  return dir === root ? existsSync(nodeBinary) && nativeIsCurrent(dir) : true
}

/**
 * Installs what a folder with a package.json lacks; the project itself comes first, since it brings Node.
 * Does nothing, and says nothing, when all is there. A folder without a package.json has nothing to install.
 * @param {string} [dir] relative to the project
 */
export const ensureInstalled = async (dir = root) => {
  const folder = resolve(root, dir)
  if (!isReady(root)) await exclusively(async () => void (isReady(root) || (await installProject())))
  if (folder === root || !existsSync(join(folder, "package.json"))) return
  if (!isReady(folder)) await exclusively(async () => void (isReady(folder) || (await installFolder(folder))))
}

/**
 * Whether a module is the program that was started, rather than imported by another.
 * @param {string} url
 */
export const isProgram = (url) => {
  const program = process.argv[1]
  return program !== undefined && existsSync(program) && realpathSync(program) === realpathSync(fileURLToPath(url))
}

/**
 * Runs a program of scripts/: a failed set-up is told in one line, a stopped one ends by the signal that stopped it.
 * @param {() => Promise<unknown>} program
 */
export const main = async (program) => {
  try {
    await program()
  } catch (error) {
    if (error instanceof SetupInterrupted) return void process.kill(process.pid, error.signal)
    if (!(error instanceof SetupError)) throw error
    say(error.message)
    process.exitCode = 1
  }
}

if (isProgram(import.meta.url)) {
  await main(async () => {
    await ensureInstalled()
    for (const dir of process.argv.slice(2)) await ensureInstalled(dir)
  })
}
