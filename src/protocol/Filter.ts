/**
 * The filter language, in the JSON form clients send:
 *
 * - `{field: value}`: the field equals the value (string, number, boolean, null), or is an array that contains it;
 * - `{field: {"in": [...]}}`, `{field: {"gt" | "gte" | "lt" | "lte": number or string}}`, `{field: {"exists": true}}`;
 * - `{"and": [...]}`, `{"or": [...]}`, `{"not": {...}}`. Several keys of one object all have to hold.
 *
 * Fields are top-level fields of the metadata. Bounds: `filterConditionsMax`, `filterValuesMax`, `nestingMax`.
 */
import * as Limits from "./Limits.ts"

export type Scalar = string | number | boolean | null

/** A filter made ready to be evaluated. */
export type Condition =
  | { readonly op: "all"; readonly of: ReadonlyArray<Condition> }
  | { readonly op: "any"; readonly of: ReadonlyArray<Condition> }
  | { readonly op: "not"; readonly of: Condition }
  | { readonly op: "in"; readonly field: string; readonly values: ReadonlyArray<Scalar> }
  | { readonly op: "exists"; readonly field: string; readonly exists: boolean }
  | { readonly op: "range"; readonly field: string; readonly bounds: ReadonlyArray<Bound> }

export interface Bound {
  readonly op: "gt" | "gte" | "lt" | "lte"
  readonly value: string | number
}

export interface FilterFault {
  readonly path: ReadonlyArray<string | number>
  readonly expected: string
  readonly got: unknown
}

/** What is wrong with a filter, or `undefined`. */
export const checkFilter = (input: unknown): FilterFault | undefined => {
  try {
    parseFilter(input)
    return undefined
  } catch (fault) {
    if (fault instanceof Fault) return fault
    throw fault
  }
}

/** The conditions of a filter that {@link checkFilter} has passed. Throws on any other. */
export const parseFilter = (input: unknown): Condition => new Parser().object(input, [], Limits.nestingMax)

class Fault extends Error implements FilterFault {
  readonly path: ReadonlyArray<string | number>
  readonly expected: string
  readonly got: unknown
  constructor(path: ReadonlyArray<string | number>, expected: string, got: unknown) {
    super(expected)
    this.path = path
    this.expected = expected
    this.got = got
  }
}

type Path = ReadonlyArray<string | number>

const rangeOps = ["gt", "gte", "lt", "lte"] as const

class Parser {
  #conditions = 0

  object(input: unknown, path: Path, levels: number): Condition {
    if (typeof input !== "object" || input === null || Array.isArray(input))
      throw new Fault(path, "a filter object", input)
    if (levels === 0) throw new Fault(path, `at most ${Limits.nestingMax} levels of nesting`, "more")
    const entries = Object.entries(input)
    if (entries.length === 0) throw new Fault(path, "at least one condition", "an empty object")
    const all = entries.map(([key, value]) => this.entry(key, value, [...path, key], levels - 1))
    return all.length === 1 ? (all[0] as Condition) : { op: "all", of: all }
  }

  entry(key: string, value: unknown, path: Path, levels: number): Condition {
    this.#conditions += 1
    if (this.#conditions > Limits.filterConditionsMax) {
      throw new Fault(path, `at most ${Limits.filterConditionsMax} conditions`, "more")
    }
    if (key === "and" || key === "or") {
      if (!Array.isArray(value) || value.length === 0) throw new Fault(path, "an array of filters", value)
      const of = value.map((item: unknown, i) => this.object(item, [...path, i], levels))
      return { op: key === "and" ? "all" : "any", of }
    }
    if (key === "not") return { op: "not", of: this.object(value, path, levels) }
    if (typeof value === "object" && value !== null) return this.operators(key, value, path)
    return { op: "in", field: key, values: [this.scalar(value, path)] }
  }

  operators(field: string, value: object, path: Path): Condition {
    const expected = "a string, number, boolean or null, or one of in, gt, gte, lt, lte, exists"
    if (Array.isArray(value)) throw new Fault(path, expected, value)
    const of: Array<Condition> = []
    const bounds: Array<Bound> = []
    for (const [op, operand] of Object.entries(value) as Array<[string, unknown]>) {
      const at = [...path, op]
      if (op === "in") {
        if (!Array.isArray(operand) || operand.length > Limits.filterValuesMax) {
          throw new Fault(at, `an array of at most ${Limits.filterValuesMax} values`, operand)
        }
        of.push({ op: "in", field, values: operand.map((item: unknown, i) => this.scalar(item, [...at, i])) })
      } else if (op === "exists") {
        if (typeof operand !== "boolean") throw new Fault(at, "true or false", operand)
        of.push({ op: "exists", field, exists: operand })
      } else if ((rangeOps as ReadonlyArray<string>).includes(op)) {
        const bound = this.scalar(operand, at)
        if (typeof bound !== "string" && typeof bound !== "number") throw new Fault(at, "a number or a string", operand)
        bounds.push({ op: op as Bound["op"], value: bound })
      } else {
        throw new Fault(at, "one of in, gt, gte, lt, lte, exists", op)
      }
    }
    if (bounds.length > 0) of.push({ op: "range", field, bounds })
    if (of.length === 0) throw new Fault(path, expected, "an empty object")
    return of.length === 1 ? (of[0] as Condition) : { op: "all", of }
  }

  scalar(value: unknown, path: Path): Scalar {
    if (typeof value === "string") {
      if (value.length <= Limits.filterStringCharsMax) return value
      throw new Fault(
        path,
        `a string of at most ${Limits.filterStringCharsMax} characters`,
        `${value.length} characters`
      )
    }
    if (typeof value === "boolean" || value === null) return value
    if (typeof value === "number" && Number.isFinite(value)) return value
    throw new Fault(path, "a string, a finite number, a boolean or null", value)
  }
}
