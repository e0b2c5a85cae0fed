/**
 * Collects the garbage of the calling thread's heap, now. V8 lets a heap grow far beyond what lives in it, and learns of
 * memory that WebAssembly gave up only when it collects; where memory is short that is too late.
 *
 * Takes about a millisecond for each megabyte that lives: for moments of need only.
 */
import { setFlagsFromString } from "node:v8"
import { runInNewContext } from "node:vm"

export const collectGarbage = (): void => {
  if (collect === undefined) {
    setFlagsFromString("--expose-gc")
    collect = runInNewContext("gc") as () => void
    setFlagsFromString("--no-expose-gc")
  }
  collect()
}

let collect: (() => void) | undefined
