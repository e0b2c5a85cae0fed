/**
 * A desk between the main thread and a vector thread: shared memory for one search at a time, where its query is laid down
 * and its answer is. Both threads wait at it for each other, asleep, which takes a few microseconds; a message each way takes
 * some tens, for it goes through two event loops and is serialised besides.
 *
 * The main thread waits for a bounded time. What it has not been answered by then comes as a message, as ever.
 */
import type { IndexHits, IndexQuery } from "../VectorIndex.ts"
import { withMetadata, withVector } from "./ThreadMessages.ts"

/** Memory of a desk. A query or an answer that has no room in it goes as a message. */
export const deskBytes = 65_536

/** What the state of a desk is. */
const free = 0
/** A query is there, and its asker waits at the desk. */
const awaited = 1
/** The same, but the asker has gone: the answer is to be a message. */
const left = 2
/** The answer is being written. */
const writing = 3
const answered = 4

/** Words before the memory for a query or an answer. */
const state = 0
const bell = 1
const attends = 2
const engaged = 3
const bodyAt = 4

/** A query as the thread finds it. */
export interface DeskQuery {
  readonly request: number
  readonly partition: number
  readonly k: number
  readonly ef: number
  readonly flags: number
  readonly filter: string | undefined
  readonly vector: Float32Array
}

export class SearchDesk {
  readonly memory: SharedArrayBuffer
  readonly #words: Int32Array<SharedArrayBuffer>
  readonly #floats: Float32Array<SharedArrayBuffer>
  readonly #bytes: Buffer<SharedArrayBuffer>

  constructor(memory = new SharedArrayBuffer(deskBytes)) {
    this.memory = memory
    this.#words = new Int32Array(memory)
    this.#floats = new Float32Array(memory)
    this.#bytes = Buffer.from(memory)
  }

  // --- The main thread ---------------------------------------------------------------------------------------------------

  /** Lays a query down; false where there is no room for it, or somebody's is there. */
  ask(request: number, partition: number, query: IndexQuery): boolean {
    if (Atomics.load(this.#words, state) !== free) return false
    const { vector, k, ef, filter } = query
    const floatsAt = bodyAt + queryWords
    const textAt = (floatsAt + vector.length) * 4
    if (textAt + (filter?.length ?? 0) * utf8BytesMax > this.#bytes.length) return false
    const words = this.#words
    words[bodyAt] = request
    words[bodyAt + 1] = partition
    words[bodyAt + 2] = k
    words[bodyAt + 3] = ef
    words[bodyAt + 4] = (query.includeMetadata ? withMetadata : 0) | (query.includeVector ? withVector : 0)
    words[bodyAt + 5] = vector.length
    words[bodyAt + 6] = filter === undefined ? -1 : this.#bytes.write(filter, textAt)
    this.#floats.set(vector, floatsAt)
    Atomics.store(words, state, awaited)
    return true
  }

  /** Whether the thread has long work in hand, which a search would have to wait for. */
  get isEngaged(): boolean {
    return Atomics.load(this.#words, engaged) !== 0
  }

  /** Calls the thread; false where it does not attend the desk, and a message has to call it. */
  ring(): boolean {
    Atomics.add(this.#words, bell, 1)
    if (Atomics.load(this.#words, attends) === 0) return false
    Atomics.notify(this.#words, bell)
    return true
  }

  /**
   * Waits for the answer at most so long. `undefined`: it comes as a message. What has begun to be written by then is waited
   * for, which is a matter of microseconds, unless the thread dies of it.
   */
  wait(millis: number): IndexHits | undefined {
    const words = this.#words
    Atomics.wait(words, state, awaited, millis)
    if (Atomics.compareExchange(words, state, awaited, left) === awaited) return undefined
    Atomics.wait(words, state, writing, writingMillisMax)
    if (Atomics.load(words, state) !== answered) return undefined
    const hits = this.#read()
    Atomics.store(words, state, free)
    return hits
  }

  #read(): IndexHits {
    const words = this.#words
    const count = words[bodyAt]!
    const flags = words[bodyAt + 1]!
    const dimensions = words[bodyAt + 2]!
    const textBytes = words[bodyAt + 3]!
    const lengthsAt = bodyAt + answerWords
    const texts = (flags & withMetadata) === 0 ? count : 2 * count
    const scoresAt = lengthsAt + texts
    const vectorsAt = scoresAt + count
    const components = (flags & withVector) === 0 ? 0 : count * dimensions
    const textAt = (vectorsAt + components) * 4
    const text = this.#bytes.toString("utf8", textAt, textAt + textBytes)
    let at = 0
    const take = (length: number): string => {
      at += length
      return text.slice(at - length, at)
    }
    const ids = new Array<string>(count)
    for (let i = 0; i < count; i++) ids[i] = take(words[lengthsAt + i]!)
    let metadata: Array<string> | undefined
    if ((flags & withMetadata) !== 0) {
      metadata = new Array<string>(count)
      for (let i = 0; i < count; i++) metadata[i] = take(words[lengthsAt + count + i]!)
    }
    return {
      ids,
      scores: new Float32Array(this.#floats.subarray(scoresAt, vectorsAt)),
      metadata,
      vectors:
        (flags & withVector) === 0
          ? undefined
          : new Float32Array(this.#floats.subarray(vectorsAt, vectorsAt + components))
    }
  }

  // --- The vector thread -------------------------------------------------------------------------------------------------

  set isEngaged(is: boolean) {
    Atomics.store(this.#words, engaged, Number(is))
  }

  /** How often the bell has been rung; read before looking what there is to do. */
  get rung(): number {
    return Atomics.load(this.#words, bell)
  }

  /** Waits until the bell is rung more often than that; false where it is not within the time. */
  linger(rung: number, millis: number): boolean {
    Atomics.store(this.#words, attends, 1)
    Atomics.wait(this.#words, bell, rung, millis)
    return Atomics.load(this.#words, bell) !== rung
  }

  /** Attends the desk no more; false where the bell has been rung more often than that, and nobody else would hear. */
  leave(rung: number): boolean {
    Atomics.store(this.#words, attends, 0)
    return Atomics.load(this.#words, bell) === rung
  }

  /** The query that lies there; the same each time until it is answered or given back. From then on the desk is attended. */
  peek(): DeskQuery | undefined {
    const words = this.#words
    const now = Atomics.load(words, state)
    if (now !== awaited && now !== left) return undefined
    Atomics.store(words, attends, 1)
    const components = words[bodyAt + 5]!
    const floatsAt = bodyAt + queryWords
    const textAt = (floatsAt + components) * 4
    const textBytes = words[bodyAt + 6]!
    return {
      request: words[bodyAt]!,
      partition: words[bodyAt + 1]!,
      k: words[bodyAt + 2]!,
      ef: words[bodyAt + 3]!,
      flags: words[bodyAt + 4]!,
      filter: textBytes === -1 ? undefined : this.#bytes.toString("utf8", textAt, textAt + textBytes),
      vector: new Float32Array(this.#floats.subarray(floatsAt, floatsAt + components))
    }
  }

  /** Answers where the asker waits; false where it has gone, or there is no room: then the answer is to be a message. */
  answer(hits: IndexHits, flags: number, dimensions: number): boolean {
    const words = this.#words
    if (Atomics.compareExchange(words, state, awaited, writing) !== awaited) {
      this.giveBack()
      return false
    }
    const { ids, metadata, scores, vectors } = hits
    const lengthsAt = bodyAt + answerWords
    const scoresAt = lengthsAt + ids.length + (metadata?.length ?? 0)
    const vectorsAt = scoresAt + scores.length
    const textAt = (vectorsAt + (vectors?.length ?? 0)) * 4
    const text = metadata === undefined ? ids.join("") : ids.join("") + metadata.join("")
    if (textAt + text.length * utf8BytesMax > this.#bytes.length) {
      this.giveBack()
      return false
    }
    words[bodyAt] = ids.length
    words[bodyAt + 1] = flags
    words[bodyAt + 2] = dimensions
    words[bodyAt + 3] = this.#bytes.write(text, textAt)
    for (let i = 0; i < ids.length; i++) words[lengthsAt + i] = ids[i]!.length
    if (metadata !== undefined) {
      for (let i = 0; i < metadata.length; i++) words[lengthsAt + ids.length + i] = metadata[i]!.length
    }
    this.#floats.set(scores, scoresAt)
    if (vectors !== undefined) this.#floats.set(vectors, vectorsAt)
    this.#settle(answered)
    return true
  }

  /** Leaves the desk to the next: this one is answered by a message, or not at all. */
  giveBack(): void {
    this.#settle(free)
  }

  #settle(to: number): void {
    Atomics.store(this.#words, state, to)
    Atomics.notify(this.#words, state)
  }
}

/** Wait for an answer that is being written. */
const writingMillisMax = 1_000

/** Bytes that a character of a string takes as UTF-8, at most. */
const utf8BytesMax = 3

const queryWords = 8
const answerWords = 4
