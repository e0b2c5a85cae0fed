/** Ids of mutations inside, out of what clients call them. */
import { createHash, randomFillSync } from "node:crypto"

/**
 * The id of what a caller calls `key`: the same each time, and no other caller's. The first bit is 0: it was chosen.
 * `owner` is whatever tells callers apart.
 */
export const requestIdOf = (owner: string, key: string): string => {
  const hash = createHash("sha256").update(`${owner.length}:${owner}${key}`).digest().subarray(0, idBytes)
  hash[0] = (hash[0] as number) & 0x7f
  return hash.toString("base64url")
}

/** An id for a mutation that nobody named. The first bit is 1: it was given. */
export const giveRequestId = (): string => {
  if (at === pool.length) {
    randomFillSync(pool)
    at = 0
  }
  const id = pool.subarray(at, at + idBytes)
  at += idBytes
  id[0] = (id[0] as number) | 0x80
  return id.toString("base64url")
}

const idBytes = 16

/** Random bytes ahead: a call of the system for each id would cost more than the id. */
const pool = Buffer.alloc(256 * idBytes)
let at = pool.length
