/**
 * Answers of searches, kept in this process until the collection changes. Every entry names the revision of the collection
 * it was computed at (`Router.revision`) and is given only at that one, so a hit is what the search itself would find; a
 * newer answer takes the place of the older one. Bounded by bytes (`resultCacheBytes`), least recently used out first.
 *
 * What a miss costs counts in every search, so: the hash samples the vector (the whole of it is compared on a hit), and a
 * search that no URL names is kept from its second sighting on (the doorkeeper of Einziger, Friedman and Manes,
 * "TinyLFU: A Highly Efficient Cache Admission Policy", 2017), so that searches that never repeat leave nothing behind.
 */
import { Context, Effect, Layer, Metric } from "effect"
import { Settings } from "../config.ts"
import type { Collection } from "../protocol/Collection.ts"
import type { PartitionHits } from "../protocol/IndexPartition.ts"
import type { SearchAnswer, SessionQuery } from "../protocol/StreamSession.ts"

/** What an answer depends on. Two keys that are equal in all of it have the same answer. */
export interface ResultKey {
  readonly hash: number
  readonly uid: string
  readonly revision: string
  readonly k: number
  readonly ef: number
  readonly includes: number
  readonly filter: string
  readonly vectorId: string | undefined
  readonly vector: Float32Array | undefined
}

/** The part of an answer that does not depend on who asked, and when. */
export interface KeptResult extends PartitionHits {
  readonly dimensions: number
}

/** The key of a query at a revision of its collection, with the defaults filled in. */
export const resultKey = (of: Collection, revision: string, query: SessionQuery): ResultKey => {
  const ef = Math.max(query.ef === 0 ? of.index.ef_search : query.ef, query.k)
  const includes = (query.includeMetadata ? 1 : 0) | (query.includeVector ? 2 : 0)
  let hash = mix(mix(seed, query.k), (ef << 2) | includes)
  hash = mixText(hash, of.uid)
  if (query.filter !== "") hash = mixText(hash, query.filter)
  hash = query.vector === undefined ? mixText(hash, query.vectorId as string) : mixVector(hash, query.vector)
  return {
    hash: finish(hash),
    uid: of.uid,
    revision,
    k: query.k,
    ef,
    includes,
    filter: query.filter,
    vectorId: query.vectorId,
    vector: query.vector
  }
}

/** The same query, whatever the revision. */
export const sameQuery = (a: ResultKey, b: ResultKey): boolean =>
  a.hash === b.hash &&
  a.k === b.k &&
  a.ef === b.ef &&
  a.includes === b.includes &&
  a.uid === b.uid &&
  a.vectorId === b.vectorId &&
  a.filter === b.filter &&
  sameVector(a.vector, b.vector)

export class ResultCache extends Context.Service<
  ResultCache,
  {
    /** Whether anything is kept at all. */
    readonly enabled: boolean
    /** The answer to `key`, which becomes the most recently used. Counts a hit or a miss. */
    readonly get: (key: ResultKey) => KeptResult | undefined
    /** Keeps an answer; one over a sixteenth of the budget is not kept. */
    readonly put: (key: ResultKey, answer: SearchAnswer | KeptResult) => void
    /** Whether the query was asked before, as far as is remembered; it is from now on. */
    readonly seen: (key: ResultKey) => boolean
    /** Forgets what a deleted collection's searches left. */
    readonly dropCollection: (uid: string) => void
    /** Gives up about so many bytes, of what was used longest ago. */
    readonly shrink: (bytes: number) => void
    readonly bytes: () => number
    readonly entries: () => number
    /** Brings the metrics up to date. */
    readonly report: () => void
  }
>()("ruvector/shards/ResultCache") {
  static readonly layer = Layer.effect(
    ResultCache,
    Effect.map(Settings, ({ resultCacheBytes }) => make(resultCacheBytes))
  )
}

/** A cache of at most `budget` bytes; 0 keeps nothing. */
export const make = (budget: number): ResultCache["Service"] => {
  /** By the query's hash, least recently used first. Two queries of one hash take turns. */
  const kept = new Map<number, Entry>()
  const doorkeeper = new Int32Array(doorkeeperSlots)
  let bytes = 0
  let sightings = 0
  let hits = 0
  let misses = 0

  const drop = (entry: Entry) => {
    kept.delete(entry.key.hash)
    bytes -= entry.bytes
  }

  const dropTo = (target: number) => {
    for (const entry of kept.values()) {
      if (bytes <= target) return
      drop(entry)
    }
  }

  return ResultCache.of({
    enabled: budget > 0,
    get: (key) => {
      const entry = kept.get(key.hash)
      if (entry === undefined || !sameQuery(entry.key, key) || entry.key.revision !== key.revision) {
        misses += 1
        return undefined
      }
      hits += 1
      kept.delete(key.hash)
      kept.set(key.hash, entry)
      return entry.result
    },
    put: (key, answer) => {
      const size = entryBytes(key, answer)
      if (size * 16 > budget) return
      const there = kept.get(key.hash)
      if (there !== undefined) drop(there)
      kept.set(key.hash, {
        key: key.vector === undefined ? key : { ...key, vector: owned(key.vector) },
        result: {
          ids: answer.ids,
          scores: owned(answer.scores),
          ...(answer.metadata === undefined ? {} : { metadata: answer.metadata }),
          ...(answer.vectors === undefined ? {} : { vectors: owned(answer.vectors) }),
          dimensions: answer.dimensions
        },
        bytes: size
      })
      bytes += size
      dropTo(budget)
    },
    seen: ({ hash }) => {
      // Emptied now and then, so that "before" means lately.
      if (++sightings > doorkeeperSlots) {
        doorkeeper.fill(0)
        sightings = 0
      }
      const slot = (hash >>> 8) % doorkeeperSlots
      if (doorkeeper[slot] === hash) return true
      doorkeeper[slot] = hash
      return false
    },
    dropCollection: (uid) => {
      for (const entry of kept.values()) if (entry.key.uid === uid) drop(entry)
    },
    shrink: (given) => dropTo(Math.max(0, bytes - given)),
    bytes: () => bytes,
    entries: () => kept.size,
    report: () => {
      hitCounter.updateUnsafe(hits, context)
      missCounter.updateUnsafe(misses, context)
      hits = 0
      misses = 0
      bytesGauge.updateUnsafe(bytes, context)
    }
  })
}

interface Entry {
  readonly key: ResultKey
  readonly result: KeptResult
  readonly bytes: number
}

const context = Context.empty()
const hitCounter = Metric.counter("ruvector_result_cache_hits", {
  description: "Searches answered from the result cache",
  incremental: true
})
const missCounter = Metric.counter("ruvector_result_cache_misses", {
  description: "Searches looked for in the result cache in vain",
  incremental: true
})
const bytesGauge = Metric.gauge("ruvector_result_cache_bytes", { description: "Bytes held by the result cache" })

/** Queries the doorkeeper remembers, and sightings after which it forgets them. */
const doorkeeperSlots = 65_536

/** Components of a vector that its hash looks at. */
const sampledMax = 256

/** Of an entry, its key, and the map's slot for it. */
const entryOverhead = 400

/** Of a string beside its characters. */
const textOverhead = 24

/** Upper bound of what an entry holds: two bytes a character, four a component. */
const entryBytes = (key: ResultKey, answer: SearchAnswer | KeptResult): number => {
  let bytes =
    entryOverhead +
    2 * (key.filter.length + key.revision.length + (key.vectorId?.length ?? 0)) +
    (key.vector?.byteLength ?? 0) +
    answer.scores.byteLength +
    (answer.vectors?.byteLength ?? 0)
  for (const id of answer.ids) bytes += textOverhead + 2 * id.length
  if (answer.metadata !== undefined) for (const text of answer.metadata) bytes += textOverhead + 2 * text.length
  return bytes
}

/** Not a window on a larger buffer, which it would keep alive. */
const owned = (vector: Float32Array): Float32Array =>
  vector.byteLength === vector.buffer.byteLength ? vector : vector.slice()

/** By bits: what differs in its bits only (0 and -0) is another query, which is no harm. */
const sameVector = (a: Float32Array | undefined, b: Float32Array | undefined): boolean => {
  if (a === undefined || b === undefined) return a === b
  if (a.length !== b.length) return false
  for (let i = 0; i < a.length; i++) if (a[i] !== b[i]) return false
  return true
}

const seed = 0x2545_f491
const one = 0x9e37_79b1 | 0
const two = 0x85eb_ca77 | 0

/** A round of xxHash32 (Collet). */
const mix = (hash: number, word: number): number => {
  const sum = (hash + Math.imul(word, two)) | 0
  return Math.imul((sum << 13) | (sum >>> 19), one)
}

const mixText = (hash: number, text: string): number => {
  let mixed = mix(hash, text.length)
  for (let i = 0; i < text.length; i++) mixed = mix(mixed, text.charCodeAt(i))
  return mixed
}

const mixVector = (hash: number, vector: Float32Array): number => {
  const words = new Int32Array(vector.buffer, vector.byteOffset, vector.length)
  const step = Math.ceil(words.length / sampledMax)
  let mixed = mix(hash, words.length)
  for (let i = 0; i < words.length; i += step) mixed = mix(mixed, words[i] as number)
  return mixed
}

/** Never 0, which is the doorkeeper's empty slot. */
const finish = (hash: number): number => {
  const folded = Math.imul(hash ^ (hash >>> 15), two)
  return folded ^ (folded >>> 13) || 1
}
