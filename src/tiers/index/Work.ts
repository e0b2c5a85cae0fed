import { type FileHandle, open } from "node:fs/promises"

/**
 * Work that a vector thread does in short steps, so that searches go in between: it yields after each step, or yields a
 * promise to be resumed when that settles (the value is then the yield's, the rejection is thrown there).
 */
export type Work<A> = Generator<Promise<unknown> | undefined, A, unknown>

/** Waits for a promise inside of work. */
export function* settled<A>(promise: Promise<A>): Work<A> {
  return (yield promise) as A
}

/** Uses a file, and closes it however the using ends; also where the work is given up while the file is being opened. */
export function* withFile<A>(path: string, flags: "r" | "wx", use: (handle: FileHandle) => Work<A>): Work<A> {
  const opening = open(path, flags)
  try {
    return yield* use(yield* settled(opening))
  } finally {
    yield* settled(
      opening.then(
        (handle) => handle.close(),
        () => {}
      )
    )
  }
}
