/**
 * The requests that were lately done in one partition, by id: who asks again, because an answer was lost or because the call
 * was delivered to the next owner, is answered with what was done, and nothing is done twice.
 *
 * Bounded in time and in number: of the newest `entriesMax`, those of the last `millis`. Requests whose id this system gave
 * are counted apart from those whose id a client chose, so that they do not drive them out. An entry takes 48 bytes and up to
 * 16 of index, all in flat memory: a quarter of what a `Map` would take, and nothing for the garbage collector to walk.
 *
 * The log has the same (`LogSegment.ts`); a snapshot has a copy of the window, so that the log before it need not be read.
 */
import type { LogOp, SegmentRequests } from "./LogSegment.ts"
import type { Applied } from "./VectorIndex.ts"

/** A request that was done. */
export interface DoneRequest {
  readonly kind: LogOp["kind"]
  /** The log object that has it; 0 where it was not committed yet when it was added. */
  readonly seq: number
  /** When, in milliseconds since 1970. */
  readonly millis: number
  /** Of what was asked for; 0 where that is not compared. */
  readonly digest: number
  /** Operations that it was, or for deletes records that there were. */
  readonly result: number
  /** Its first operation in the log object. */
  readonly first: number
}

export interface RequestWindowOptions {
  readonly requestWindowMillis: number
  readonly requestWindowMax: number
}

/** Why a copy of a window cannot be read. */
export class WindowFault extends Error {}

export class RequestWindow {
  readonly #millis: number
  /** Of ids that clients chose, and of ids that were given. */
  readonly #rings: readonly [Ring, Ring]

  constructor({ requestWindowMillis, requestWindowMax }: RequestWindowOptions) {
    this.#millis = requestWindowMillis
    this.#rings = [new Ring(requestWindowMax), new Ring(requestWindowMax)]
  }

  /** What was done for a request, if that was within the window. */
  find(id: string, nowMillis: number): DoneRequest | undefined {
    const found = this.#ringOf(id).find(id)
    return found === undefined || this.#isPast(found.millis, nowMillis) ? undefined : found
  }

  /** Of a request that is known already the first time counts. */
  add(id: string, request: DoneRequest): void {
    const ring = this.#ringOf(id)
    while (ring.size > 0 && this.#isPast(ring.oldestMillis(), request.millis)) ring.dropOldest()
    ring.add(id, request, (millis) => this.#isPast(millis, request.millis))
  }

  /** Takes note of what a log object was made for, once it is applied. */
  observe(seq: number, made: SegmentRequests | undefined, { effects }: Applied): void {
    if (made === undefined) return
    for (const { id, digest, kind, first, count } of made.requests) {
      const result = kind === "delete" ? deletedIn(effects, first, count) : count
      this.add(id, { kind, seq, millis: made.millis, digest, result, first })
    }
  }

  get size(): number {
    return this.#rings[0].size + this.#rings[1].size
  }

  /** Bytes that it holds. */
  get bytes(): number {
    return this.#rings[0].bytes + this.#rings[1].bytes
  }

  /** A copy of all that is within the window, oldest first; `undefined` where nothing is. */
  encode(nowMillis: number): Uint8Array | undefined {
    for (const ring of this.#rings) {
      while (ring.size > 0 && this.#isPast(ring.oldestMillis(), nowMillis)) ring.dropOldest()
    }
    if (this.size === 0) return undefined
    const bytes = new Uint8Array(headerBytes + this.size * entryBytes)
    const view = new DataView(bytes.buffer)
    view.setUint32(0, magic, true)
    view.setUint16(4, windowFormat, true)
    view.setUint32(8, this.size, true)
    let at = headerBytes
    for (const ring of this.#rings) at = ring.copyTo(bytes, at)
    return bytes
  }

  /** Takes what a copy has. Throws {@link WindowFault}; its checksum is the caller's to check. */
  load(bytes: Uint8Array): void {
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
    if (bytes.length < headerBytes || view.getUint32(0, true) !== magic) throw new WindowFault("no copy of a window")
    const format = view.getUint16(4, true)
    if (format !== windowFormat) throw new WindowFault(`format ${format}, this version reads ${windowFormat}`)
    const count = view.getUint32(8, true)
    if (bytes.length !== headerBytes + count * entryBytes)
      throw new WindowFault(`${bytes.length} bytes of ${count} entries`)
    const words = new Uint32Array(Uint8Array.prototype.slice.call(bytes, headerBytes).buffer)
    for (let at = 0; at < words.length; at += entryWords) {
      const isGiven = ((bytes[headerBytes + at * 4] as number) & 0x80) !== 0
      this.#rings[isGiven ? 1 : 0].take(words.subarray(at, at + entryWords))
    }
  }

  #ringOf(id: string): Ring {
    return this.#rings[isGiven(id) ? 1 : 0]
  }

  #isPast(millis: number, nowMillis: number): boolean {
    return nowMillis - millis > this.#millis
  }
}

/** Visible records that deletes found, of some operations. */
export const deletedIn = (effects: Uint8Array, first: number, count: number): number => {
  let deleted = 0
  for (let i = first; i < first + count; i++) if (effects[i] === deletedVisible) deleted += 1
  return deleted
}

/** `Applied.effects` of a delete that found a visible record. */
const deletedVisible = 3

/** Whether this system gave the id: the first of its 128 bits. */
export const isGiven = (id: string): boolean => digitsGiven.includes(id.charAt(0))

/** The digits of base64url whose first bit is set: 32 to 63. */
const digitsGiven = "ghijklmnopqrstuvwxyz0123456789-_"

const magic = 0x51525652 // "RVRQ"
const windowFormat = 1
const headerBytes = 16
const entryBytes = 48
const entryWords = entryBytes / 4
const idBytes = 16
const kinds = ["upsert", "metadata", "delete"] as const
/** Entries for which there is room at first. */
const capacityMin = 64

/** Entries in the order in which they came, the oldest overwritten, and a table by their ids. */
class Ring {
  readonly #entriesMax: number
  #capacity = 0
  #bytes = new Uint8Array(0)
  #view = new DataView(this.#bytes.buffer)
  #words = new Uint32Array(0)
  /** Slot + 1 by hash, linear probing; a power of two, at most half full. */
  #table = new Int32Array(1)
  #oldest = 0
  size = 0

  constructor(entriesMax: number) {
    this.#entriesMax = entriesMax
  }

  get bytes(): number {
    return this.#bytes.byteLength + this.#table.byteLength
  }

  find(id: string): DoneRequest | undefined {
    if (this.size === 0) return undefined
    const slot = (this.#table[this.#place(read(id))] as number) - 1
    return slot === -1 ? undefined : readEntry(this.#view, slot * entryBytes)
  }

  /** `isPast`: of when a request with the same id was done, whether it counts no more. */
  add(id: string, request: DoneRequest, isPast: (millis: number) => boolean): void {
    const words = read(id)
    const found = (this.#table[this.#place(words)] as number) - 1
    if (found !== -1) {
      const at = found * entryBytes
      if (isPast(this.#view.getFloat64(at + 24, true))) writeEntry(this.#view, at, request)
      return
    }
    const slot = this.#append(words)
    writeEntry(this.#view, slot * entryBytes, request)
  }

  /** Takes an entry as it is in a copy. */
  take(entry: Uint32Array): void {
    if (this.#table[this.#place(entry)] === 0) this.#append(entry)
  }

  #append(words: Uint32Array): number {
    if (this.size === this.#capacity) {
      if (this.#capacity < this.#entriesMax) this.#grow()
      else this.dropOldest()
    }
    const slot = (this.#oldest + this.size) % this.#capacity
    this.#table[this.#place(words)] = slot + 1
    this.#words.set(words, slot * entryWords)
    this.size += 1
    return slot
  }

  oldestMillis(): number {
    return this.#view.getFloat64(this.#oldest * entryBytes + 24, true)
  }

  dropOldest(): void {
    const slot = this.#oldest
    this.#oldest = (slot + 1) % this.#capacity
    this.size -= 1
    const mask = this.#table.length - 1
    let gap = this.#place(this.#words.subarray(slot * entryWords, (slot + 1) * entryWords))
    // What comes after moves up, unless its own place lies between.
    for (let at = (gap + 1) & mask; this.#table[at] !== 0; at = (at + 1) & mask) {
      const home = this.#home((this.#table[at] as number) - 1, mask)
      if (((at - home) & mask) >= ((at - gap) & mask)) {
        this.#table[gap] = this.#table[at] as number
        gap = at
      }
    }
    this.#table[gap] = 0
  }

  /** Copies the entries, oldest first; answers where they end. */
  copyTo(bytes: Uint8Array, from: number): number {
    const first = Math.min(this.size, this.#capacity - this.#oldest)
    const start = this.#oldest * entryBytes
    bytes.set(this.#bytes.subarray(start, start + first * entryBytes), from)
    bytes.set(this.#bytes.subarray(0, (this.size - first) * entryBytes), from + first * entryBytes)
    return from + this.size * entryBytes
  }

  #grow(): void {
    const capacity = Math.min(Math.max(capacityMin, this.#capacity * 2), this.#entriesMax)
    const bytes = new Uint8Array(capacity * entryBytes)
    this.copyTo(bytes, 0)
    this.#capacity = capacity
    this.#bytes = bytes
    this.#view = new DataView(bytes.buffer)
    this.#words = new Uint32Array(bytes.buffer)
    this.#oldest = 0
    this.#table = new Int32Array(2 ** (33 - Math.clz32(capacity - 1)))
    for (let slot = 0; slot < this.size; slot++) {
      this.#table[this.#place(this.#words.subarray(slot * entryWords, (slot + 1) * entryWords))] = slot + 1
    }
  }

  /** Where an id is in the table, or would be. */
  #place(words: Uint32Array): number {
    const mask = this.#table.length - 1
    // The ids are random; the first bit of all of a ring is the same, so not the first word.
    for (let at = (words[1] as number) & mask; ; at = (at + 1) & mask) {
      const slot = (this.#table[at] as number) - 1
      if (slot === -1 || this.#isAt(slot, words)) return at
    }
  }

  #home(slot: number, mask: number): number {
    return (this.#words[slot * entryWords + 1] as number) & mask
  }

  #isAt(slot: number, words: Uint32Array): boolean {
    const at = slot * entryWords
    for (let i = 0; i < idBytes / 4; i++) if (this.#words[at + i] !== words[i]) return false
    return true
  }
}

const scratch = new Uint32Array(idBytes / 4)
const scratchBytes = Buffer.from(scratch.buffer)

/** The 16 bytes of an id, until the next call. */
const read = (id: string): Uint32Array => {
  scratchBytes.write(id, "base64url")
  return scratch
}

const readEntry = (view: DataView, at: number): DoneRequest => ({
  seq: view.getFloat64(at + 16, true),
  millis: view.getFloat64(at + 24, true),
  digest: view.getUint32(at + 32, true),
  result: view.getUint32(at + 36, true),
  first: view.getUint32(at + 40, true),
  kind: kinds[view.getUint8(at + 44)] ?? "upsert"
})

const writeEntry = (view: DataView, at: number, { seq, millis, digest, result, first, kind }: DoneRequest): void => {
  view.setFloat64(at + 16, seq, true)
  view.setFloat64(at + 24, millis, true)
  view.setUint32(at + 32, digest, true)
  view.setUint32(at + 36, result, true)
  view.setUint32(at + 40, first, true)
  view.setUint8(at + 44, kinds.indexOf(kind))
}
