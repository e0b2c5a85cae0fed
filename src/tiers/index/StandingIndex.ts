/** Finds of many standing queries those whose bar a vector reaches. */
import type { Metric } from "../../protocol/Fields.ts"
import { VectorArena } from "./VectorArena.ts"

export class StandingIndex {
  readonly #arena: VectorArena
  readonly #free: Array<number> = []
  #bars: Array<number> = []

  constructor(dimensions: number, metric: Metric) {
    this.#arena = new VectorArena(dimensions, metric)
  }

  /** Takes a query in, at a slot that is returned; nothing reaches it yet. */
  add(vector: Float32Array): number {
    const slot = this.#free.pop() ?? this.#bars.length
    this.#arena.set(slot, vector)
    this.#bars[slot] = Number.POSITIVE_INFINITY
    return slot
  }

  remove(slot: number): void {
    this.#bars[slot] = Number.POSITIVE_INFINITY
    this.#free.push(slot)
  }

  /** The least score that reaches the query. */
  setBar(slot: number, bar: number): void {
    this.#bars[slot] = bar
  }

  /** The score that a search by the query gives a record of this vector. */
  score(slot: number, vector: Float32Array): number {
    return Math.fround(this.#arena.score(vector, this.#arena.factorOf(vector), slot))
  }

  /** Calls `use` with each query that is reached, and with the score. */
  reached(vector: Float32Array, use: (slot: number, score: number) => void): void {
    const factor = this.#arena.factorOf(vector)
    for (let slot = 0; slot < this.#bars.length; slot++) {
      const score = Math.fround(this.#arena.score(vector, factor, slot))
      if (score >= this.#bars[slot]!) use(slot, score)
    }
  }

  get bytes(): number {
    return this.#arena.bytes + this.#bars.length * 8
  }
}
