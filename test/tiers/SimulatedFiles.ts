/**
 * What of Node is not deterministic, or takes a thread, in memory: the files that snapshots pass through, and random bytes.
 * A simulation puts it in the place of `node:fs/promises` and `node:crypto` (`vi.mock`), so that a seed gives one run.
 */
import type * as Crypto from "node:crypto"
import type * as Files from "node:fs/promises"

const files = new Map<string, Uint8Array>()

/** Files there are; a simulation that is over has to have left none. */
export const simulatedFiles = (): number => files.size

export const removeSimulatedFiles = (): void => files.clear()

const contentOf = (path: unknown): Uint8Array => {
  const found = files.get(String(path))
  if (found !== undefined) return found
  throw Object.assign(new Error(`ENOENT: no such file, open '${String(path)}'`), { code: "ENOENT" })
}

/** `node:fs/promises` with the calls that snapshots are made of in memory. */
export const withSimulatedFiles = (original: typeof Files): typeof Files =>
  ({
    ...original,
    open: async (path: unknown) => {
      const content = contentOf(path)
      return {
        stat: async () => ({ size: content.length }),
        read: async (into: Uint8Array, offset: number, length: number, position: number) => {
          const part = content.subarray(position, position + length)
          into.set(part, offset)
          return { bytesRead: part.length, buffer: into }
        },
        close: async () => {}
      }
    },
    readFile: async (path: unknown, encoding?: unknown) => {
      const content = contentOf(path)
      return encoding === undefined ? new Uint8Array(content) : Buffer.from(content).toString("utf8")
    },
    writeFile: async (path: unknown, content: string | Uint8Array) => {
      files.set(String(path), typeof content === "string" ? new TextEncoder().encode(content) : new Uint8Array(content))
    },
    rm: async (path: unknown) => {
      files.delete(String(path))
    }
  }) as unknown as typeof Files

let bytes: () => number = Math.random

/** Random bytes come from here from now on; numbers from 0 to below 1. */
export const seedRandomBytes = (random: () => number): void => {
  bytes = random
}

/** `node:crypto` with seeded `randomBytes`. */
export const withSimulatedRandom = (original: typeof Crypto): typeof Crypto =>
  ({
    ...original,
    randomBytes: (count: number) => Buffer.from(Array.from({ length: count }, () => Math.floor(bytes() * 256)))
  }) as unknown as typeof Crypto
