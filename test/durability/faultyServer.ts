/**
 * `main.ts` on a machine that fails when it is told to: a disk that is full, loses its fsyncs, cannot be read or loses
 * answers; clocks that are set; a vector thread that dies. Told by messages, each of which is answered when it holds.
 *
 * What fails is Node's own file system below the real store, so that nothing of the program is another one than users run.
 */
import { createRequire, syncBuiltinESMExports } from "node:module"
import type { Worker } from "node:worker_threads"

export interface FaultMessage {
  /** What goes wrong with calls of the file system, from now on, and with which share of them; `none`: nothing. */
  readonly disk?: "none" | "full" | "fsync" | "read" | "answers"
  readonly share?: number
  /** Milliseconds to put the wall clock and the monotonic clock forward by; the wall clock may go back. */
  readonly wallMillis?: number
  readonly monotonicMillis?: number
  /** Ends one vector thread. */
  readonly killThread?: boolean
}

const require = createRequire(import.meta.url)
const files = require("node:fs") as Record<string, (...parameters: Array<unknown>) => unknown>
const threads = require("node:worker_threads") as { Worker: typeof Worker }

let disk: FaultMessage["disk"] = "none"
let share = 0
let wallMillis = 0
let monotonicNanos = 0n

const fails = (): boolean => Math.random() < share

/** A call that fails in a mode: before it, or after it has taken effect. */
const breakable = (name: string, mode: FaultMessage["disk"], code: string, afterEffect = false): void => {
  const original = files[name] as (...parameters: Array<unknown>) => unknown
  const broken = (...parameters: Array<unknown>) => {
    const done = parameters.at(-1)
    if (disk !== mode || typeof done !== "function" || !fails()) return original(...parameters)
    const error = Object.assign(new Error(`${code}: injected, ${name}`), { code, syscall: name })
    if (!afterEffect) return setImmediate(() => done(error))
    return original(...parameters.slice(0, -1), () => done(error))
  }
  // How `promisify` names the results of a call goes along with it.
  const before = files[name] as object
  files[name] = Object.defineProperties(broken, {
    ...Object.getOwnPropertyDescriptors(before),
    ...Object.fromEntries(
      Object.getOwnPropertySymbols(before).map((symbol) => [symbol, Object.getOwnPropertyDescriptor(before, symbol)])
    )
  } as PropertyDescriptorMap)
}
breakable("write", "full", "ENOSPC")
breakable("fsync", "fsync", "EIO")
breakable("read", "read", "EIO")
breakable("link", "answers", "EIO", true)

const started: Array<Worker> = []
threads.Worker = class extends threads.Worker {
  constructor(...parameters: ConstructorParameters<typeof Worker>) {
    super(...parameters)
    started.push(this)
    this.once("exit", () => started.splice(started.indexOf(this), 1))
  }
}
syncBuiltinESMExports()

const realNow = Date.now
Date.now = () => realNow() + wallMillis
const realMonotonic = process.hrtime.bigint
process.hrtime.bigint = () => realMonotonic.call(process.hrtime) + monotonicNanos

process.on("message", (message: FaultMessage) => {
  if (message.disk !== undefined) {
    disk = message.disk
    share = message.share ?? 1
  }
  wallMillis += message.wallMillis ?? 0
  monotonicNanos += BigInt(message.monotonicMillis ?? 0) * 1_000_000n
  if (message.killThread === true) void started[Math.floor(Math.random() * started.length)]?.terminate()
  process.send?.({ done: true })
})
// It ends when the server does, not with its parent's messages.
process.channel?.unref()

await import("../../src/main.ts")
