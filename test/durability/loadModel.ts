/**
 * What a client knows of records that it writes while the server fails around it: of each record the values that it may
 * have. An acknowledged write leaves one. A write whose answer never came, or was an error, leaves those before and after it.
 *
 * A value names its write (`state`) and the last change of its metadata (`tag`); the vector follows from the state, so that
 * any vector that is ever returned can be checked.
 */
import { random } from "../support/Seeded.ts"

/** `state/tag`, or {@link absent}. */
export type Value = string

export const absent: Value = "-"

export const valueNamed = (state: number, tag: number | undefined): Value => `${state}/${tag ?? ""}`

export const stateOf = (value: Value): number => Number(value.split("/")[0])

/** The vector that a write puts into a record, as float32. */
export const vectorOf = (state: number, index: number, dimensions: number): Float32Array => {
  const source = random(state * 1_000_003 + index)
  return Float32Array.from({ length: dimensions }, () => source.next() * 2 - 1)
}

export type Operation =
  | { readonly kind: "upsert"; readonly state: number }
  | { readonly kind: "patch"; readonly tag: number }
  | { readonly kind: "delete" }

const after = (value: Value, operation: Operation): Value => {
  if (operation.kind === "upsert") return valueNamed(operation.state, undefined)
  if (operation.kind === "delete") return absent
  return value === absent ? absent : valueNamed(stateOf(value), operation.tag)
}

let ticks = 0

/** A moment in the life of all records of this process. */
export const tick = (): number => ++ticks

export class RecordModel {
  readonly id: string
  readonly index: number
  /** Each value that it may have had, and until when; infinity where it may have it now. */
  readonly #until = new Map<Value, number>([[absent, Number.POSITIVE_INFINITY]])
  #before: ReadonlySet<Value> = new Set()
  /** When the values last changed. */
  #changedAt = 0

  constructor(id: string, index: number) {
    this.id = id
    this.index = index
  }

  values(): ReadonlySet<Value> {
    return new Set([...this.#until].filter(([, until]) => until === Number.POSITIVE_INFINITY).map(([value]) => value))
  }

  /** Whether it may have had the value at some moment since `start`. */
  mayHaveHad(value: Value, start: number): boolean {
    return (this.#until.get(value) ?? 0) >= start
  }

  /** The one value that it has had since `start`; `undefined` where that is not known. */
  certainSince(start: number): Value | undefined {
    const [value, ...others] = this.values()
    return others.length === 0 && this.#changedAt < start ? value : undefined
  }

  begin(operation: Operation): void {
    this.#before = this.values()
    this.#set(new Set([...this.#before, ...[...this.#before].map((value) => after(value, operation))]))
  }

  /** The operation happened. `found`: a patch met a record. False where what was said cannot be. */
  acknowledge(operation: Operation, found = true): boolean {
    const base = [...this.#before]
    const next =
      operation.kind !== "patch"
        ? new Set(base.map((value) => after(value, operation)))
        : found
          ? new Set(base.filter((value) => value !== absent).map((value) => after(value, operation)))
          : new Set(base.filter((value) => value === absent))
    if (next.size === 0) return false
    this.#set(next)
    return true
  }

  /** What it was found to be, when nothing was under way that could change it. */
  settle(value: Value): void {
    this.#set(new Set([value]))
  }

  #set(values: ReadonlySet<Value>): void {
    const now = tick()
    const before = this.values()
    if (before.size === values.size && [...values].every((value) => before.has(value))) return
    this.#changedAt = now
    for (const value of before) if (!values.has(value)) this.#until.set(value, now)
    for (const value of values) this.#until.set(value, Number.POSITIVE_INFINITY)
  }
}
