/**
 * Collects the garbage of the calling thread's heap, now. V8 lets a heap grow far beyond what lives in it, and learns of
 * memory that WebAssembly gave up only when it collects; where memory is short that is too late.
 *
 * Takes about a millisecond for each megabyte that lives: for moments of need only.
 */
import { getHeapStatistics, setFlagsFromString } from "node:v8"
import { runInNewContext } from "node:vm"

export const collectGarbage = (): void => {
  if (collect === undefined) {
    setFlagsFromString("--expose-gc")
    const gc = runInNewContext("gc") as (options: object) => void
    // The last resort also gives back the pages that V8 keeps for later: measured, two thirds of the process.
    collect = () => gc({ type: "major", execution: "sync", flavor: "last-resort" })
    setFlagsFromString("--no-expose-gc")
  }
  collect()
  livedBytes = getHeapStatistics().used_heap_size
}

/** The same where the heap has grown enough since the last time to be worth its cost. */
export const collectGrown = (): void => {
  if (getHeapStatistics().used_heap_size - livedBytes >= grownBytes) collectGarbage()
}

/** What may lie in the heap of a thread without being collected for it. */
const grownBytes = 12 * 1_048_576

/** What the heap held after garbage was last collected here. */
let livedBytes = 0

let collect: (() => void) | undefined
