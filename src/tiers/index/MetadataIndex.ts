/**
 * Which slots' metadata meet a condition: of each top-level field, the slots by value. Conditions become sets by the
 * algebra of sets, so how many slots match is known before anything is searched.
 *
 * Strings longer than `filterStringCharsMax` are not indexed (no filter can name one); of arrays the scalars count;
 * objects only exist.
 */
import type { Bound, Condition, Scalar } from "../../protocol/Filter.ts"
import { filterStringCharsMax } from "../../protocol/Limits.ts"
import { Bitset } from "./Bitset.ts"
import { Posting } from "./Posting.ts"

export type Metadata = { readonly [field: string]: unknown }

/** The object that a metadata text says; `undefined` for an empty or unreadable one. */
export const parseMetadata = (text: string): Metadata | undefined => {
  if (text === "") return undefined
  try {
    const value: unknown = JSON.parse(text)
    return typeof value === "object" && value !== null && !Array.isArray(value) ? (value as Metadata) : undefined
  } catch {
    return undefined
  }
}

export class MetadataIndex {
  readonly #fields = new Map<string, Field>()
  readonly #memory: Memory = { bytes: 0 }

  add(slot: number, metadata: Metadata): void {
    for (const name of Object.keys(metadata)) {
      let field = this.#fields.get(name)
      if (field === undefined) {
        field = new Field(this.#memory)
        this.#fields.set(name, field)
        this.#memory.bytes += fieldBytes + name.length
      }
      field.add(slot, metadata[name])
    }
  }

  remove(slot: number, metadata: Metadata): void {
    for (const name of Object.keys(metadata)) {
      const field = this.#fields.get(name)
      if (field === undefined) continue
      field.remove(slot, metadata[name])
      if (field.present.size > 0) continue
      field.release()
      this.#fields.delete(name)
      this.#memory.bytes -= fieldBytes + name.length
    }
  }

  /** The slots of `live` whose metadata meet the condition. */
  select(condition: Condition, live: Bitset): Bitset {
    const found = this.#select(condition, live)
    return found === live ? live.copy() : found
  }

  /** Bytes held, maps and values estimated. */
  get bytes(): number {
    return this.#memory.bytes
  }

  #select(condition: Condition, live: Bitset): Bitset {
    switch (condition.op) {
      case "all": {
        const found = this.select(condition.of[0]!, live)
        for (let i = 1; i < condition.of.length && found.count > 0; i++) {
          found.intersect(this.#select(condition.of[i]!, live))
        }
        return found
      }
      case "any": {
        const found = this.select(condition.of[0]!, live)
        for (let i = 1; i < condition.of.length && found.count < live.count; i++) {
          found.union(this.#select(condition.of[i]!, live))
        }
        return found
      }
      case "not": {
        const found = live.copy()
        found.subtract(this.#select(condition.of, live))
        return found
      }
      case "in": {
        const found = new Bitset(live.words.length * 32)
        const field = this.#fields.get(condition.field)
        if (field !== undefined) for (const value of condition.values) field.addEqual(value, found)
        return found
      }
      case "exists": {
        const found = new Bitset(live.words.length * 32)
        this.#fields.get(condition.field)?.present.addTo(found)
        if (condition.exists) return found
        const absent = live.copy()
        absent.subtract(found)
        return absent
      }
      case "range": {
        const found = new Bitset(live.words.length * 32)
        this.#fields.get(condition.field)?.addRange(condition.bounds, found)
        return found
      }
    }
  }
}

/** Whether metadata meet a condition; says the same of one record as {@link MetadataIndex.select} of all. */
export const meets = (condition: Condition, metadata: Metadata | undefined): boolean => {
  switch (condition.op) {
    case "all":
      return condition.of.every((part) => meets(part, metadata))
    case "any":
      return condition.of.some((part) => meets(part, metadata))
    case "not":
      return !meets(condition.of, metadata)
    case "exists":
      return (metadata !== undefined && Object.hasOwn(metadata, condition.field)) === condition.exists
    case "in":
      return someValue(metadata, condition.field, (value) => condition.values.includes(value))
    case "range":
      return someValue(metadata, condition.field, (value) => isWithin(value, condition.bounds))
  }
}

const someValue = (metadata: Metadata | undefined, field: string, test: (value: Scalar) => boolean): boolean => {
  if (metadata === undefined || !Object.hasOwn(metadata, field)) return false
  const value = metadata[field]
  if (Array.isArray(value)) return value.some((item: unknown) => isIndexed(item) && test(item))
  return isIndexed(value) && test(value)
}

const isIndexed = (value: unknown): value is Scalar =>
  typeof value === "string" ? value.length <= filterStringCharsMax : typeof value !== "object" || value === null

const isWithin = (value: Scalar, bounds: ReadonlyArray<Bound>): boolean => {
  for (const bound of bounds) {
    if (typeof value !== typeof bound.value) return false
    const a = value as string | number
    switch (bound.op) {
      case "gt":
        if (!(a > bound.value)) return false
        break
      case "gte":
        if (!(a >= bound.value)) return false
        break
      case "lt":
        if (!(a < bound.value)) return false
        break
      case "lte":
        if (!(a <= bound.value)) return false
        break
    }
  }
  return true
}

/** Counted as things come and go, since asking must be cheap. */
interface Memory {
  bytes: number
}

class Field {
  /** Slots whose metadata have the field. */
  readonly present = new Posting()
  /** Slots by value; a lone slot is its own posting, since most values of most fields are of one record. */
  readonly #values = new Map<Scalar, Posting | number>()
  /** The number of each slot that has exactly one, once there are many different numbers: ranges are read from it. */
  #numbers: Float64Array | undefined
  #differentNumbers = 0
  /** Slots with several numbers, where there is a column. */
  readonly #several = new Map<number, ReadonlyArray<number>>()
  readonly #memory: Memory

  constructor(memory: Memory) {
    this.#memory = memory
  }

  add(slot: number, value: unknown): void {
    this.present.add(slot)
    this.#memory.bytes += slotBytes
    if (Array.isArray(value)) {
      for (const item of value) if (isIndexed(item)) this.#addValue(slot, item)
    } else if (isIndexed(value)) this.#addValue(slot, value)
    if (this.#numbers !== undefined) this.#addNumbers(slot, value)
  }

  remove(slot: number, value: unknown): void {
    this.present.remove(slot)
    this.#memory.bytes -= slotBytes
    if (Array.isArray(value)) {
      for (const item of value) if (isIndexed(item)) this.#removeValue(slot, item)
    } else if (isIndexed(value)) this.#removeValue(slot, value)
    if (this.#numbers !== undefined) {
      if (slot < this.#numbers.length) this.#numbers[slot] = Number.NaN
      this.#several.delete(slot)
    }
  }

  addEqual(value: Scalar, found: Bitset): void {
    addPosting(this.#values.get(value), found)
  }

  addRange(bounds: ReadonlyArray<Bound>, found: Bitset): void {
    const numbers = this.#numbers
    if (numbers !== undefined && bounds.every((bound) => typeof bound.value === "number")) {
      this.#addNumberRange(numbers, bounds, found)
      return
    }
    for (const [value, posting] of this.#values) if (isWithin(value, bounds)) addPosting(posting, found)
  }

  /** Gives back what is counted beside the values, when the last of them is gone. */
  release(): void {
    this.#memory.bytes -= this.#numbers?.byteLength ?? 0
  }

  #addValue(slot: number, value: Scalar): void {
    const posting = this.#values.get(value)
    if (posting === undefined) {
      this.#values.set(value, slot)
      this.#memory.bytes += valueBytes + (typeof value === "string" ? value.length : 0)
      if (typeof value !== "number") return
      this.#differentNumbers += 1
      if (this.#numbers === undefined && this.#differentNumbers > rangeValuesMax) this.#buildNumbers()
    } else if (typeof posting !== "number") posting.add(slot)
    else if (posting !== slot) {
      const grown = new Posting()
      grown.add(posting)
      grown.add(slot)
      this.#values.set(value, grown)
      this.#memory.bytes += postingBytes
    }
  }

  #removeValue(slot: number, value: Scalar): void {
    const posting = this.#values.get(value)
    if (posting === undefined) return
    if (typeof posting === "number") {
      if (posting !== slot) return
    } else {
      posting.remove(slot)
      if (posting.size > 0) return
    }
    this.#values.delete(value)
    if (typeof value === "number") this.#differentNumbers -= 1
    const chars = typeof value === "string" ? value.length : 0
    this.#memory.bytes -= valueBytes + chars + (typeof posting === "number" ? 0 : postingBytes)
  }

  /** A range over many different numbers: one pass over a column, however many values are within. */
  #addNumberRange(numbers: Float64Array, bounds: ReadonlyArray<Bound>, found: Bitset): void {
    let from = Number.NEGATIVE_INFINITY
    let to = Number.POSITIVE_INFINITY
    let fromOpen = false
    let toOpen = false
    for (const { op, value } of bounds as ReadonlyArray<{ readonly op: Bound["op"]; readonly value: number }>) {
      if (op === "gt" || op === "gte") {
        if (value > from || (value === from && op === "gt")) fromOpen = op === "gt"
        from = Math.max(from, value)
      } else {
        if (value < to || (value === to && op === "lt")) toOpen = op === "lt"
        to = Math.min(to, value)
      }
    }
    for (let slot = 0; slot < numbers.length; slot++) {
      const n = numbers[slot]!
      if (n >= from && n <= to && !(fromOpen && n === from) && !(toOpen && n === to)) found.add(slot)
    }
    for (const [slot, several] of this.#several) if (several.some((n) => isWithin(n, bounds))) found.add(slot)
  }

  #buildNumbers(): void {
    this.#numbers = new Float64Array(0)
    for (const [value, posting] of this.#values) {
      if (typeof value !== "number") continue
      const note = (slot: number) => {
        const several = this.#several.get(slot)
        const one = this.#numbers![slot]
        if (several !== undefined) this.#several.set(slot, [...several, value])
        else if (one === undefined || Number.isNaN(one)) this.#setNumbers(slot, [value])
        else {
          this.#numbers![slot] = Number.NaN
          this.#several.set(slot, [one, value])
        }
      }
      if (typeof posting === "number") note(posting)
      else posting.forEach(note)
    }
  }

  #addNumbers(slot: number, value: unknown): void {
    if (typeof value === "number") this.#setNumbers(slot, [value])
    else if (Array.isArray(value))
      this.#setNumbers(
        slot,
        value.filter((item: unknown) => typeof item === "number")
      )
  }

  #setNumbers(slot: number, numbers: ReadonlyArray<number>): void {
    if (numbers.length > 1) this.#several.set(slot, numbers)
    else if (numbers.length === 1) {
      let column = this.#numbers!
      if (slot >= column.length) {
        column = new Float64Array(Math.max(slot + 1, 64, Math.ceil(column.length * 1.5))).fill(Number.NaN)
        column.set(this.#numbers!)
        this.#memory.bytes += column.byteLength - this.#numbers!.byteLength
        this.#numbers = column
      }
      column[slot] = numbers[0]!
    }
  }
}

const addPosting = (posting: Posting | number | undefined, found: Bitset): void => {
  if (posting === undefined) return
  if (typeof posting === "number") found.add(posting)
  else posting.addTo(found)
}

/** Different numbers of a field up to which a range looks at each of them. */
const rangeValuesMax = 1_024

/** Estimates of V8's memory: a field, a value in its map, a posting of several slots, a slot in two postings. */
const fieldBytes = 600
const valueBytes = 60
const postingBytes = 150
const slotBytes = 8
