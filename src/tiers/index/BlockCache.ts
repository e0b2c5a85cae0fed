/**
 * Blocks of files, kept in memory up to a bound that all partitions of a thread share. Which block gives way is decided by a
 * clock hand: one that was read since the hand last passed stays (Corbató, "A Paging Experiment with the Multics System",
 * 1968).
 */

/** Bytes of a block; a checksum is kept of each. */
export const blockBytes = 4_096

/** Room for one block, and the same as float32s. */
export interface Frame {
  readonly bytes: Buffer
  readonly floats: Float32Array
}

export class BlockCache {
  readonly #framesMax: number
  readonly #frames: Array<Frame> = []
  /** Of each frame the file and the block that is in it, and whether it was read since the hand passed. */
  readonly #files: Array<CachedFile | undefined> = []
  readonly #blocks: Uint32Array
  readonly #read: Uint8Array
  #hand = 0
  #fileBytes = 0
  hits = 0
  misses = 0

  constructor(bytesMax: number) {
    this.#framesMax = Math.max(framesMin, Math.floor(bytesMax / blockBytes))
    this.#blocks = new Uint32Array(this.#framesMax)
    this.#read = new Uint8Array(this.#framesMax)
  }

  /** A file of so many blocks, none of which is here. */
  file(blocks: number): CachedFile {
    const file = new CachedFile(blocks)
    this.#fileBytes += file.frames.byteLength
    return file
  }

  /** The block, filled by `fill` where it is not there; valid until the next is asked for. `fill` may throw. */
  block(file: CachedFile, block: number, fill: (frame: Frame) => void): Frame {
    const known = file.frames[block]!
    if (known !== 0) {
      this.hits += 1
      this.#read[known - 1] = 1
      return this.#frames[known - 1]!
    }
    this.misses += 1
    const index = this.#free()
    const frame = this.#frames[index]!
    fill(frame)
    this.#files[index] = file
    this.#blocks[index] = block
    file.frames[block] = index + 1
    return frame
  }

  /** Lets go of a file and its blocks. */
  forget(file: CachedFile): void {
    for (let i = 0; i < this.#frames.length; i++) {
      if (this.#files[i] !== file) continue
      this.#files[i] = undefined
      this.#read[i] = 0
    }
    this.#fileBytes -= file.frames.byteLength
  }

  get bytes(): number {
    return this.#frames.length * (blockBytes + frameBytes) + this.#blocks.byteLength + this.#fileBytes
  }

  #free(): number {
    if (this.#frames.length < this.#framesMax) {
      const bytes = Buffer.from(new ArrayBuffer(blockBytes))
      this.#files.push(undefined)
      return this.#frames.push({ bytes, floats: new Float32Array(bytes.buffer) }) - 1
    }
    for (;;) {
      const index = this.#hand
      this.#hand = (index + 1) % this.#framesMax
      if (this.#read[index] === 1) {
        this.#read[index] = 0
        continue
      }
      const file = this.#files[index]
      if (file !== undefined) file.frames[this.#blocks[index]!] = 0
      this.#files[index] = undefined
      return index
    }
  }
}

/** Where each block of a file is: one more than its frame's number, 0 where it is in none. */
class CachedFile {
  readonly frames: Uint32Array

  constructor(blocks: number) {
    this.frames = new Uint32Array(blocks)
  }
}

export type { CachedFile }

/** Frames that there are whatever the bound: what one record needs at once. */
const framesMin = 16

/** V8's own for the objects of a frame, estimated. */
const frameBytes = 300
