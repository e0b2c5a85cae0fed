// Loaded in front of a node that chaos is done to, and in front of its threads: a wall clock that is wrong, and a file system
// that takes its time. Both are read from the file that RUVECTOR_WEATHER names, again and again:
//
//   { "skewMillis": 30000, "diskMillis": 200 }

import fs from "node:fs"
import { syncBuiltinESMExports } from "node:module"

/** Milliseconds between two looks at the file. */
const lookMillis = 100

const path = process.env["RUVECTOR_WEATHER"]
const { readFileSync } = fs
let skewMillis = 0
let diskMillis = 0

const look = () => {
  try {
    ;({ skewMillis = 0, diskMillis = 0 } = JSON.parse(readFileSync(path ?? "", "utf8")))
  } catch {
    // It is being written.
  }
}

if (path !== undefined) {
  look()
  setInterval(look, lookMillis).unref()

  const RealDate = Date
  const now = () => RealDate.now() + skewMillis
  globalThis.Date = new Proxy(RealDate, {
    construct: (target, words, newTarget) => Reflect.construct(target, words.length === 0 ? [now()] : words, newTarget),
    apply: () => new RealDate(now()).toString(),
    get: (target, name, receiver) => (name === "now" ? now : Reflect.get(target, name, receiver))
  })

  // Whatever waits for the disk in a node's object store: opening, flushing, and giving a file its name.
  /** @type {Record<string, (...words: Array<unknown>) => unknown>} */
  const calls = /** @type {any} */ (fs)
  for (const name of ["open", "fsync", "link", "unlink"]) {
    const real = calls[name]
    calls[name] = (...words) => {
      if (diskMillis === 0) real?.(...words)
      else setTimeout(() => real?.(...words), diskMillis * (0.5 + Math.random()))
    }
  }
  syncBuiltinESMExports()
}
