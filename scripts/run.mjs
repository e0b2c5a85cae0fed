// Starts a program of the project on the Node release that package.json names, after installing what is missing.
// Plain JavaScript that runs on Node 18 and later.
//
//   node scripts/run.mjs [--with FOLDER]… PROGRAM [ARGUMENT]…
//
// PROGRAM is relative to the project; it runs in the folder one is in. --with installs a folder that has its own
// package.json first, if it is there. The launcher passes signals on and ends the way the program ended.

import { spawn } from "node:child_process"
import { closeSync, openSync, realpathSync } from "node:fs"
import { constants } from "node:os"
import { delimiter, join, resolve } from "node:path"
import { nodeFlags, serverEnvironment } from "./nodeOptions.mjs"
import { ensureInstalled, isProgram, main, nodeBinary, root, SetupError } from "./setup.mjs"

// Compiled code of all modules, kept from start to start: a third of the time that starting takes.
const compileCache = join(root, "node_modules", ".cache", "ruvector-compile")

const parent = process.ppid

const tether = new URL("./tether.mjs", import.meta.url).href

/** Whether a key such as Ctrl-C at a terminal reaches this process. */
const hasTerminal = () => {
  try {
    closeSync(openSync("/dev/tty", "r"))
    return true
  } catch {
    return false
  }
}

/** What a program of the project runs best with, unless it is set otherwise. */
export const nodeEnvironment = () => ({
  ...serverEnvironment,
  NODE_COMPILE_CACHE: compileCache
})

/** @returns {NodeJS.ProcessEnv} */
const environment = () => ({
  ...nodeEnvironment(),
  ...process.env,
  PATH: [join(root, "node_modules", ".bin"), process.env["PATH"] ?? ""].join(delimiter),
  RUVECTOR_LAUNCHER: String(process.pid)
})

/**
 * Runs a program and ends this process the way it ended.
 * @param {string} program relative to the project
 * @param {ReadonlyArray<string>} args
 */
const execute = (program, args) => {
  // At a terminal Ctrl-C reaches every process of the foreground group, and npm passes it on once more, so that a
  // program in that group would get it two or three times. There it has a session of its own, and gets what comes
  // from here, once.
  const detached = hasTerminal()
  const child = spawn(realpathSync(nodeBinary), [...nodeFlags, "--import", tether, resolve(root, program), ...args], {
    stdio: "inherit",
    env: environment(),
    detached
  })

  /** @type {Map<NodeJS.Signals, number>} */
  const passedOn = new Map()
  /** @param {NodeJS.Signals} signal */
  const passOn = (signal) => {
    const now = performance.now()
    // The same key press, once from the terminal and once from npm.
    if (now - (passedOn.get(signal) ?? Number.NEGATIVE_INFINITY) < 500) return
    passedOn.set(signal, now)
    child.kill(signal)
  }
  /** @type {Array<NodeJS.Signals>} */
  const signals = ["SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"]
  for (const signal of signals) process.on(signal, passOn)
  if (detached) {
    process.on("SIGWINCH", () => child.kill("SIGWINCH"))
    // Ctrl-Z stops the program too, and `fg` or `bg` lets it go on.
    process.on("SIGTSTP", () => {
      child.kill("SIGSTOP")
      process.kill(process.pid, "SIGSTOP")
    })
    process.on("SIGCONT", () => child.kill("SIGCONT"))
  }

  // An npm that is killed with no chance to pass it on ends the program too, as it does by the signals it passes on.
  if (process.env["npm_lifecycle_event"] !== undefined) {
    const watch = setInterval(() => {
      if (process.ppid === parent) return
      clearInterval(watch)
      passOn("SIGTERM")
    }, 1_000)
    watch.unref()
  }

  child.on("error", (error) => {
    process.stderr.write(`${program} could not be started: ${error.message}\n`)
    process.exit(1)
  })
  child.on("exit", (code, signal) => {
    if (signal === null) process.exit(code ?? 1)
    for (const name of signals) process.removeAllListeners(name)
    process.kill(process.pid, signal)
    // Reached only with a signal that does not end this process.
    setTimeout(() => process.exit(128 + constants.signals[signal]), 1_000)
  })
}

/**
 * Installs what is missing, then runs a program.
 * @param {string} program relative to the project
 * @param {ReadonlyArray<string>} args
 * @param {ReadonlyArray<string>} folders further folders to install first
 */
export const launch = (program, args, folders = []) =>
  main(async () => {
    await ensureInstalled()
    for (const folder of folders) await ensureInstalled(folder)
    execute(program, args)
  })

if (isProgram(import.meta.url)) {
  await main(async () => {
    const args = process.argv.slice(2)
    const folders = []
    while (args[0] === "--with") folders.push(...args.splice(0, 2).slice(1))
    const program = args.shift()
    if (program === undefined) throw new SetupError("usage: node scripts/run.mjs [--with FOLDER]… PROGRAM [ARGUMENT]…")
    await launch(program, args, folders)
  })
}
