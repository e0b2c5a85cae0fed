/**
 * Which process something on disk belongs to, such that a reused process id is not mistaken for its earlier bearer.
 *
 * Process ids mean something only within one start of one machine and one pid namespace (containers have their own):
 * that is the identity's `scope`. Of a process in another scope nothing can be known from here but what it leaves on disk.
 */
import { createHash } from "node:crypto"
import { readFileSync, readlinkSync } from "node:fs"
import { hostname } from "node:os"

export interface ProcessIdentity {
  readonly pid: number
  /** When the process started, in the kernel's own unit; empty where the platform does not tell. */
  readonly start: string
  readonly scope: string
}

/** The identity of this process. */
export const ownIdentity = (): ProcessIdentity => {
  own ??= { pid: process.pid, start: statusOf(process.pid)?.start ?? "", scope: ownScope() }
  return own
}

/** Whether a process lives. `unknown` where it belongs to another machine or container. */
export const isAlive = (identity: ProcessIdentity): "alive" | "dead" | "unknown" => {
  if (identity.scope !== ownIdentity().scope) return "unknown"
  const status = statusOf(identity.pid)
  if (status !== undefined) {
    // A zombie has closed its files already; only its parent has not asked yet how it ended.
    if (status.state === "Z" || status.state === "X") return "dead"
    return identity.start === "" || status.start === identity.start ? "alive" : "dead"
  }
  // No /proc, or one that hides the processes of other users.
  try {
    process.kill(identity.pid, 0)
    return "alive"
  } catch (cause) {
    return (cause as NodeJS.ErrnoException).code === "ESRCH" ? "dead" : "alive"
  }
}

/** One word of `A-Za-z0-9.-`, for file names. */
export const formatIdentity = (identity: ProcessIdentity): string =>
  `${identity.scope}-${identity.pid}-${identity.start === "" ? "0" : identity.start}`

/** The inverse of {@link formatIdentity}, of a text that begins with one; `undefined` where it does not. */
export const parseIdentity = (text: string): ProcessIdentity | undefined => {
  const match = /^([0-9a-f]{16})-(\d{1,10})-(\d{1,20})(?:-|$)/.exec(text)
  if (match === null) return undefined
  return { scope: match[1] as string, pid: Number(match[2]), start: match[3] === "0" ? "" : (match[3] as string) }
}

let own: ProcessIdentity | undefined

/** State letter and start time of a process from /proc; `undefined` where there is none. */
const statusOf = (pid: number): { readonly state: string; readonly start: string } | undefined => {
  const text = textOf(() => readFileSync(`/proc/${pid}/stat`, "latin1"))
  if (text === undefined) return undefined
  // The second field is the program's name in parentheses and may hold anything, so count from the last one.
  const fields = text.slice(text.lastIndexOf(")") + 2).split(" ")
  const state = fields[0]
  const start = fields[19]
  return state === undefined || start === undefined ? undefined : { state, start }
}

const ownScope = (): string => {
  const boot = textOf(() => readFileSync("/proc/sys/kernel/random/boot_id", "latin1").trim())
  const namespace = textOf(() => readlinkSync("/proc/self/ns/pid"))
  const scope = boot === undefined ? `host ${hostname()}` : `${boot} ${namespace ?? ""}`
  return createHash("sha256").update(scope).digest("hex").slice(0, 16)
}

const textOf = (read: () => string): string | undefined => {
  try {
    return read()
  } catch {
    return undefined
  }
}
