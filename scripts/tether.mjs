// Loaded in front of a program that scripts/run.mjs starts: when the launcher dies without being able to pass on a
// signal (kill -9, out of memory), the program is told to end as if by SIGTERM, so that no server is left behind.

import { isMainThread } from "node:worker_threads"

const launcher = process.env["RUVECTOR_LAUNCHER"]

if (isMainThread && launcher !== undefined) {
  // Only for this process: what it starts itself is its own to end.
  delete process.env["RUVECTOR_LAUNCHER"]
  const timer = setInterval(() => {
    if (process.ppid === Number(launcher)) return
    clearInterval(timer)
    process.kill(process.pid, "SIGTERM")
  }, 1_000)
  timer.unref()
}
