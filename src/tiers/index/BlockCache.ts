/**
 * Blocks of files, kept in memory up to a bound that all partitions of a thread share. Which block gives way is decided by a
 * clock hand: one that was read since the hand last passed stays (Corbató, "A Paging Experiment with the Multics System",
 * 1968).
 */

/** Bytes of a block; a checksum is kept of each. */
export const blockBytes = 4_096

export class BlockCache {
  readonly #framesMax: number
  readonly #slabs: Array<Buffer> = []
  readonly #frameOf = new Map<number, number>()
  /** Of each frame the key of its block, and whether it was read since the hand passed. */
  readonly #keys: Float64Array
  readonly #read: Uint8Array
  #frames = 0
  #hand = 0
  #nextFile = 0
  hits = 0
  misses = 0

  constructor(bytesMax: number) {
    this.#framesMax = Math.max(framesMin, Math.floor(bytesMax / blockBytes))
    this.#keys = new Float64Array(this.#framesMax).fill(-1)
    this.#read = new Uint8Array(this.#framesMax)
  }

  /** A number for a file, to name its blocks by. */
  file(): number {
    return this.#nextFile++
  }

  /** The block, filled by `fill` where it is not there; valid until the next is asked for. `fill` may throw. */
  block(file: number, block: number, fill: (frame: Buffer) => void): Buffer {
    const key = file * blocksMax + block
    const known = this.#frameOf.get(key)
    if (known !== undefined) {
      this.hits += 1
      this.#read[known] = 1
      return this.#frame(known)
    }
    this.misses += 1
    const index = this.#free()
    const frame = this.#frame(index)
    this.#keys[index] = -1
    fill(frame)
    this.#keys[index] = key
    this.#frameOf.set(key, index)
    return frame
  }

  /** Lets go of a file's blocks. */
  forget(file: number): void {
    for (let i = 0; i < this.#frames; i++) {
      const key = this.#keys[i]!
      if (Math.floor(key / blocksMax) !== file) continue
      this.#frameOf.delete(key)
      this.#keys[i] = -1
      this.#read[i] = 0
    }
  }

  get bytes(): number {
    return this.#slabs.length * slabFrames * blockBytes + this.#keys.byteLength + this.#frameOf.size * mapEntryBytes
  }

  #frame(index: number): Buffer {
    const at = (index % slabFrames) * blockBytes
    return this.#slabs[Math.floor(index / slabFrames)]!.subarray(at, at + blockBytes)
  }

  #free(): number {
    if (this.#frames < this.#framesMax) {
      if (this.#frames % slabFrames === 0) this.#slabs.push(Buffer.allocUnsafeSlow(slabFrames * blockBytes))
      return this.#frames++
    }
    for (;;) {
      const index = this.#hand
      this.#hand = (index + 1) % this.#framesMax
      if (this.#read[index] === 1) {
        this.#read[index] = 0
        continue
      }
      if (this.#keys[index] !== -1) this.#frameOf.delete(this.#keys[index]!)
      return index
    }
  }
}

/** Blocks of a file; its number and the block's are one whole number below 2^53. */
const blocksMax = 2 ** 31

/** Frames that there are whatever the bound: what one record needs at once. */
const framesMin = 16

/** Frames allocated at once. */
const slabFrames = 64

const mapEntryBytes = 40
