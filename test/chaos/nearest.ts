/** The records that logs end with, and those nearest to a vector: the answer that a standing query has to come to. */
import { formatVersion } from "../../src/protocol/Version.ts"
import type { Member } from "./feeds.ts"
import type { PartitionHistory } from "./partitionHistory.ts"

export interface FinalRecord {
  readonly id: string
  readonly vector: Float32Array
  readonly version: string
}

export const recordsOf = (logs: ReadonlyArray<PartitionHistory>): ReadonlyArray<FinalRecord> => {
  const records = new Map<string, FinalRecord>()
  for (const { segments } of logs) {
    for (const op of segments.flatMap(({ ops }) => ops)) {
      const { id } = op
      const version = formatVersion(op.version)
      const before = records.get(id)
      if (op.kind === "delete") records.delete(id)
      else if (op.kind === "upsert") records.set(id, { id, vector: op.vector, version })
      else if (before !== undefined) records.set(id, { ...before, version })
    }
  }
  return [...records.values()]
}

/** All records with their cosine similarity, nearest first. */
export const nearestTo = (query: Float32Array, records: ReadonlyArray<FinalRecord>): ReadonlyArray<Member> =>
  records
    .map(({ id, vector, version }) => ({ id, version, score: cosine(query, vector) }))
    .sort((a, b) => b.score - a.score)

const cosine = (a: Float32Array, b: Float32Array): number => {
  let product = 0
  let squares = 0
  let others = 0
  for (let i = 0; i < a.length; i++) {
    const x = a[i] as number
    const y = b[i] as number
    product += x * y
    squares += x * x
    others += y * y
  }
  return product / Math.sqrt(squares * others)
}
