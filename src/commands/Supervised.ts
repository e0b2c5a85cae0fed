/**
 * A process that is kept running: started again when it ends by itself, with a back-off; its lines are handed on. It ends with this
 * one however that ends: it is given a pipe as its standard input, which closes with the process that holds the other end.
 */
import { type ChildProcess, spawn } from "node:child_process"
import { once } from "node:events"
import { createInterface } from "node:readline"

export interface SupervisedOptions {
  readonly name: string
  readonly file: string
  readonly args: ReadonlyArray<string>
  readonly env?: NodeJS.ProcessEnv
  readonly user?: { readonly uid: number; readonly gid: number } | undefined
  /** Whether the line says that it serves. */
  readonly isReady: (line: string) => boolean
  readonly onLine: (line: string) => void
  /** What the supervisor has to say of it. */
  readonly onNote: (text: string) => void
  /** Asks it to end. */
  readonly end: (child: ChildProcess) => void
  /** Ends it at once. */
  readonly killSignal?: NodeJS.Signals
}

export class Supervised {
  readonly name: string
  readonly #options: SupervisedOptions
  #child: ChildProcess | undefined
  #ended: Promise<unknown> = Promise.resolve()
  #timer: NodeJS.Timeout | undefined
  #stopping = false
  #failures = 0
  #last = ""

  constructor(options: SupervisedOptions) {
    this.#options = options
    this.name = options.name
  }

  /** Of the process as it is now; none between two. */
  get pid(): number | undefined {
    return this.#child?.pid
  }

  /** Starts it for the first time; rejects with its last line if it ends before it serves. */
  start(): Promise<void> {
    return new Promise((resolve, reject) => {
      this.#launch(resolve, (why) => reject(new Error(`${this.name} does not start: ${this.#last || why}`)))
    })
  }

  /** Asks it to end and waits; ends it at once when it has not by then. */
  async stop(graceMillis: number): Promise<void> {
    this.#stopping = true
    clearTimeout(this.#timer)
    const child = this.#child
    if (child === undefined) return
    this.#options.end(child)
    const late = setTimeout(() => this.kill(), graceMillis)
    await this.#ended
    clearTimeout(late)
  }

  kill(): void {
    this.#stopping = true
    clearTimeout(this.#timer)
    this.#child?.kill(this.#options.killSignal ?? "SIGKILL")
  }

  #launch(ready: () => void, failed: ((why: string) => void) | undefined): void {
    const { file, args, env, user, isReady, onLine, onNote } = this.#options
    const startedAt = performance.now()
    // A session of its own: Ctrl-C at a terminal is this process's to hear, which ends the others in order.
    const child = spawn(file, args, {
      ...user,
      ...(env === undefined ? {} : { env }),
      stdio: ["pipe", "pipe", "pipe"],
      detached: true
    })
    this.#child = child
    child.stdin.on("error", () => {})
    let isUp = false
    for (const stream of [child.stdout, child.stderr]) {
      createInterface({ input: stream }).on("line", (line) => {
        if (line !== "") this.#last = line
        onLine(line)
        if (isUp || !isReady(line)) return
        isUp = true
        ready()
      })
    }
    const exited = once(child, "close").catch((error: Error) => [error.message, null])
    this.#ended = exited.then(([code, signal]) => {
      this.#child = undefined
      if (this.#stopping) return
      const why = `it ended with ${signal ?? `code ${code}`}`
      if (!isUp && failed !== undefined) return failed(why)
      if (performance.now() - startedAt > calmMillis) this.#failures = 0
      const delay = Math.min(restartMillisMin * 2 ** this.#failures, restartMillisMax)
      this.#failures += 1
      onNote(`${why}; it starts again in ${delay / 1_000} s`)
      this.#timer = setTimeout(() => this.#launch(() => onNote("it serves again"), undefined), delay)
    })
  }
}

/** One that lived for that long had started well. */
const calmMillis = 60_000
const restartMillisMin = 500
const restartMillisMax = 30_000

/** In a process that is supervised: tells it to end, as SIGTERM does, once the supervisor is gone. */
export const endWithSupervisor = (): void => {
  if (process.env[supervisedVariable] === undefined) return
  // What this process starts is its own to end.
  delete process.env[supervisedVariable]
  const end = () => process.kill(process.pid, "SIGTERM")
  process.stdin.once("end", end).once("error", end).resume()
  ;(process.stdin as { unref?: () => void }).unref?.()
}

/** Set for processes of ours whose standard input is the supervisor's pipe. */
export const supervisedVariable = "RUVECTOR_SUPERVISED"

/** Runs a program of another kind such that it ends, by the signal, when standard input does. */
export const tethered = (signal: "INT" | "TERM", words: ReadonlyArray<string>): ReadonlyArray<string> => [
  "-c",
  `exec 3<&0
"$@" 3<&- </dev/null &
child=$!
{ read -r _ <&3; kill -${signal} "$child" 2>/dev/null; } &
keeper=$!
trap 'kill -QUIT "$child" 2>/dev/null' QUIT
wait "$child"; code=$?
while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done
kill "$keeper" 2>/dev/null
exit "$code"`,
  "sh",
  ...words
]
