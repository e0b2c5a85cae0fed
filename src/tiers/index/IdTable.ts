/**
 * Where each id of a records file is, by a hash of the id: entries in buckets, each with sixteen bits of its hash, so that
 * few ids are read that are not the one looked for. Typed arrays only, as they lie in the file; some 6.5 bytes an entry.
 */

/** Hash of an id's UTF-8 bytes: FNV-1a from a seed, then MurmurHash3's finaliser. */
export const hashOf = (id: Uint8Array, seed: number): number => {
  let hash = (0x811c9dc5 ^ seed) | 0
  for (let i = 0; i < id.length; i++) hash = Math.imul(hash ^ id[i]!, 0x01000193)
  hash = Math.imul(hash ^ (hash >>> 16), 0x85ebca6b)
  hash = Math.imul(hash ^ (hash >>> 13), 0xc2b2ae35)
  return (hash ^ (hash >>> 16)) >>> 0
}

export class IdTable {
  /** Of each bucket where its entries begin, and where the last one's end: 2^n + 1. */
  readonly starts: Uint32Array
  /** The lower half of each entry's hash. */
  readonly fingerprints: Uint16Array
  readonly entries: Uint32Array
  readonly #shift: number

  constructor(starts: Uint32Array, fingerprints: Uint16Array, entries: Uint32Array) {
    this.starts = starts
    this.fingerprints = fingerprints
    this.entries = entries
    this.#shift = 32 - Math.log2(starts.length - 1)
  }

  /** Entry i has the hash i. */
  static of(hashes: Uint32Array): IdTable {
    const buckets = bucketsFor(hashes.length)
    const shift = 32 - Math.log2(buckets)
    const starts = new Uint32Array(buckets + 1)
    for (let i = 0; i < hashes.length; i++) starts[bucketOf(hashes[i]!, shift) + 1]! += 1
    for (let i = 0; i < buckets; i++) starts[i + 1] = starts[i + 1]! + starts[i]!
    const next = starts.slice()
    const fingerprints = new Uint16Array(hashes.length)
    const entries = new Uint32Array(hashes.length)
    for (let i = 0; i < hashes.length; i++) {
      const hash = hashes[i]!
      const at = next[bucketOf(hash, shift)]!++
      fingerprints[at] = hash & 0xffff
      entries[at] = i
    }
    return new IdTable(starts, fingerprints, entries)
  }

  /** The first entry with this hash of which `is` is true, or -1. */
  find(hash: number, is: (entry: number) => boolean): number {
    const bucket = bucketOf(hash, this.#shift)
    const fingerprint = hash & 0xffff
    for (let at = this.starts[bucket]!; at < this.starts[bucket + 1]!; at++) {
      if (this.fingerprints[at] === fingerprint && is(this.entries[at]!)) return this.entries[at]!
    }
    return -1
  }

  get bytes(): number {
    return this.starts.byteLength + this.fingerprints.byteLength + this.entries.byteLength
  }
}

/** A power of two. */
export const bucketsFor = (entries: number): number =>
  2 ** Math.min(bucketBitsMax, Math.max(1, Math.ceil(Math.log2(Math.max(1, entries) / bucketEntries))))

const bucketOf = (hash: number, shift: number): number => hash >>> shift

/** Entries of a bucket, about. */
const bucketEntries = 8
const bucketBitsMax = 24
