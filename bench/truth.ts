/**
 * Exact answers by full scan, without a filter and with filters that match a known share of the loaded words, so that
 * recall is measured against what is true and not against another index.
 */
import { cached } from "./cacheFile.ts"
import { type Data, dimensions, type WordVectors } from "./words.ts"

export const truthK = 10

/** Metadata fields whose equality filter matches one row in `modulus`. */
export const shares = [
  { field: "half", modulus: 2, percent: 50 },
  { field: "tenth", modulus: 10, percent: 10 },
  { field: "hundredth", modulus: 100, percent: 1 },
  { field: "thousandth", modulus: 1000, percent: 0.1 }
] as const

export type ShareField = (typeof shares)[number]["field"]

export const metadataOf = (row: number): Record<ShareField, number> => ({
  half: row % 2,
  tenth: row % 10,
  hundredth: row % 100,
  thousandth: row % 1000
})

/** Every query asks for another value, so that no server gains by having seen the filter before. */
export const filterOf = (field: ShareField, query: number): Partial<Record<ShareField, number>> => ({
  [field]: metadataOf(query)[field]
})

export interface Truth {
  /** The words truly nearest to a query, nearest first; fewer than `truthK` if fewer match. */
  readonly nearest: (query: number, field?: ShareField) => Array<string>
}

export const exactTruth = (data: Data): Truth => {
  const { count, queries, seed } = data.options
  const bytes = cached(`truth-1-${count}-${queries}-${seed}`, () => scan(data))
  const rows = new Int32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4)
  return {
    nearest: (query, field) => {
      const list = field === undefined ? 0 : 1 + shares.findIndex((share) => share.field === field)
      const from = (list * queries + query) * truthK
      return [...rows.subarray(from, from + truthK)]
        .filter((row) => row !== noRow)
        .map((row) => data.base.words[row] as string)
    }
  }
}

/** The share of the true answers that were given, over all queries that were asked (those with an answer). */
export const recallOf = (
  truth: Truth,
  answers: ReadonlyArray<ReadonlyArray<string> | undefined>,
  field?: ShareField
): number => {
  let wanted = 0
  let found = 0
  for (const [query, answer] of answers.entries()) {
    if (answer === undefined) continue
    const given = new Set(answer.slice(0, truthK))
    const nearest = truth.nearest(query, field)
    wanted += nearest.length
    found += nearest.filter((word) => given.has(word)).length
  }
  return wanted === 0 ? 1 : found / wanted
}

const noRow = -1

const scan = (data: Data): Buffer => {
  process.stderr.write("Computing the exact answers (once, some 10 s for 100,000 words) ...\n")
  const base = normalised(data.base)
  const queries = normalised(data.queries)
  const rowCount = data.base.words.length
  const queryCount = data.queries.words.length
  const rows = new Int32Array((1 + shares.length) * queryCount * truthK)
  for (let query = 0; query < queryCount; query++) {
    const lists = [undefined, ...shares].map(() => new Nearest())
    const own = queries.subarray(query * dimensions, (query + 1) * dimensions)
    for (let row = 0; row < rowCount; row++) {
      const score = dot(own, base, row * dimensions)
      lists[0]?.offer(row, score)
      // Each share divides the next, so the first that does not match ends it.
      for (let share = 0; share < shares.length; share++) {
        const modulus = shares[share]?.modulus as number
        if (row % modulus !== query % modulus) break
        lists[share + 1]?.offer(row, score)
      }
    }
    for (const [list, nearest] of lists.entries()) rows.set(nearest.rows, (list * queryCount + query) * truthK)
  }
  return Buffer.from(rows.buffer)
}

const normalised = ({ vectors }: WordVectors): Float32Array => {
  const result = new Float32Array(vectors.length)
  for (let from = 0; from < vectors.length; from += dimensions) {
    const scale = 1 / Math.sqrt(dot(vectors.subarray(from, from + dimensions), vectors, from))
    for (let i = from; i < from + dimensions; i++) result[i] = (vectors[i] as number) * scale
  }
  return result
}

/** Four sums side by side: a single one would wait for each addition. */
const dot = (a: Float32Array, b: Float32Array, from: number): number => {
  let s0 = 0
  let s1 = 0
  let s2 = 0
  let s3 = 0
  for (let i = 0; i < dimensions; i += 4) {
    s0 += (a[i] as number) * (b[from + i] as number)
    s1 += (a[i + 1] as number) * (b[from + i + 1] as number)
    s2 += (a[i + 2] as number) * (b[from + i + 2] as number)
    s3 += (a[i + 3] as number) * (b[from + i + 3] as number)
  }
  return s0 + s1 + (s2 + s3)
}

/** The best rows offered so far, best first. */
class Nearest {
  readonly rows = new Int32Array(truthK).fill(noRow)
  readonly #scores = new Float64Array(truthK).fill(Number.NEGATIVE_INFINITY)

  offer(row: number, score: number): void {
    if (score <= (this.#scores[truthK - 1] as number)) return
    let at = truthK - 1
    for (; at > 0 && score > (this.#scores[at - 1] as number); at--) {
      this.#scores[at] = this.#scores[at - 1] as number
      this.rows[at] = this.rows[at - 1] as number
    }
    this.#scores[at] = score
    this.rows[at] = row
  }
}
