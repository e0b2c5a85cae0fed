/**
 * The slots that recently asked filters select. Kept true as records change, one record at a time, so that a filter asked
 * again during writes costs nothing.
 */
import type { Condition } from "../../protocol/Filter.ts"
import type { Bitset } from "./Bitset.ts"
import { type Metadata, meets } from "./MetadataIndex.ts"

export class FilterCache {
  /** By the filter's text, the one asked longest ago first. */
  readonly #entries = new Map<string, { readonly condition: Condition; readonly slots: Bitset }>()

  get size(): number {
    return this.#entries.size
  }

  get(filter: string): Bitset | undefined {
    const entry = this.#entries.get(filter)
    if (entry === undefined) return undefined
    this.#entries.delete(filter)
    this.#entries.set(filter, entry)
    return entry.slots
  }

  put(filter: string, condition: Condition, slots: Bitset): void {
    if (filter.length > filterCharsMax) return
    if (this.#entries.size >= filtersMax) this.#entries.delete(this.#entries.keys().next().value!)
    this.#entries.set(filter, { condition, slots })
  }

  /** A record at this slot is new or has other metadata. */
  changed(slot: number, metadata: Metadata | undefined): void {
    for (const { condition, slots } of this.#entries.values()) {
      if (meets(condition, metadata)) slots.add(slot)
      else slots.delete(slot)
    }
  }

  /** The record at this slot is gone. */
  removed(slot: number): void {
    for (const { slots } of this.#entries.values()) slots.delete(slot)
  }

  get bytes(): number {
    let bytes = 0
    for (const [filter, { slots }] of this.#entries) bytes += filter.length + slots.bytes
    return bytes
  }
}

/** Filters kept for one partition; each write looks at all of them. */
const filtersMax = 32

/** Characters of a filter that is kept. */
const filterCharsMax = 16_384
