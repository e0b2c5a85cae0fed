/**
 * Warming: records are brought into the fast tiers before they are asked for, from a list or from what was read most in a
 * past window, and read back from there.
 */
import { Result, Schema } from "effect"
import { InvalidInput } from "./Errors.ts"
import { CollectionName, describe, VectorId } from "./Fields.ts"
import * as Limits from "./Limits.ts"

const integer = (minimum: number, maximum: number) =>
  Schema.Int.check(
    Schema.makeFilter((n: number) => n >= minimum && n <= maximum, {
      expected: `an integer from ${minimum} to ${maximum}`
    })
  )

/** Milliseconds since 1970, to the end of what a `Date` can be. */
export const TimeMillis = integer(0, 8_640_000_000_000_000)
/** As far back as anything can be remembered (`accessPastHours`). */
export const LastMinutes = integer(1, 10_080)
export const WarmLimit = integer(1, Limits.warmRecordsMax)

/** A stretch of the past: `from_ms` and `to_ms`, or `last_minutes`. */
export const WarmWindow = Schema.Struct({
  from_ms: Schema.optionalKey(TimeMillis),
  to_ms: Schema.optionalKey(TimeMillis),
  last_minutes: Schema.optionalKey(LastMinutes)
})

/** Records of a warming that names no `limit`. */
export const warmLimitDefault = 10_000

/**
 * Body of `POST /warm`: exactly one of `ids` (of `collection`, or of the default one) and `window` (of `collection`, or of all).
 */
export const WarmRequest = Schema.Struct({
  collection: Schema.optionalKey(CollectionName),
  ids: Schema.optionalKey(
    Schema.Array(VectorId).check(
      Schema.makeFilter((ids: ReadonlyArray<string>) => ids.length > 0 && ids.length <= Limits.warmRecordsMax, {
        expected: `1 to ${Limits.warmRecordsMax} ids`
      })
    )
  ),
  window: Schema.optionalKey(WarmWindow),
  limit: Schema.optionalKey(WarmLimit)
}).annotate({ identifier: "WarmRequest" })
export type WarmRequest = typeof WarmRequest.Type

export const WarmReport = Schema.Struct({
  /** Records asked for: different ids of the list, or records read most in the window. */
  requested: Schema.Int,
  /** Of them, those there are: read from the partitions, and not deleted before they were read back. */
  found: Schema.Int,
  /** Not there, or gone when they were read back. */
  missing: Schema.Int,
  /** At most 20 of the missing. */
  missing_sample: Schema.Array(Schema.String),
  /** Records whose partition could not be asked. */
  unavailable: Schema.Int,
  /** Why, for the first of them. */
  unavailable_detail: Schema.optionalKey(Schema.String),
  /** Bytes of the records that were loaded: vectors, metadata, ids. */
  bytes: Schema.Int,
  /** Of the found, when they were read back: those in the record cache, those in the warm tier, and those in neither. */
  hot: Schema.Int,
  warm: Schema.Int,
  cold: Schema.Int,
  /** (found - cold) / found; 0 where nothing was found. */
  hit_rate: Schema.Finite,
  load_ms: Schema.Int,
  verify_ms: Schema.Int
}).annotate({ identifier: "WarmReport" })
export type WarmReport = typeof WarmReport.Type

/** What a request asks to be warmed, checked as a whole. */
export type WarmSelection =
  | { readonly ids: ReadonlyArray<string> }
  | { readonly fromMillis: number; readonly toMillis: number }

export const warmSelectionOf = (
  request: WarmRequest,
  nowMillis: number
): Result.Result<WarmSelection, InvalidInput> => {
  const { ids, window } = request
  const fault = (field: string, expected: string, got: unknown) =>
    Result.fail(new InvalidInput({ field, expected, got: typeof got === "string" ? got : describe(got) }))
  if ((ids === undefined) === (window === undefined)) {
    return fault("ids", "exactly one of ids and window", ids === undefined ? "none" : "2")
  }
  if (ids !== undefined) return Result.succeed({ ids })
  const { from_ms, to_ms, last_minutes } = window as typeof WarmWindow.Type
  if (last_minutes !== undefined) {
    if (from_ms !== undefined || to_ms !== undefined) {
      return fault("window", "either last_minutes, or from_ms and to_ms", window)
    }
    return Result.succeed({ fromMillis: nowMillis - last_minutes * 60_000, toMillis: nowMillis + 1 })
  }
  if (from_ms === undefined || to_ms === undefined) {
    return fault("window", "either last_minutes, or from_ms and to_ms", window)
  }
  if (to_ms <= from_ms) return fault("window.to_ms", `more than from_ms (${from_ms})`, to_ms)
  return Result.succeed({ fromMillis: from_ms, toMillis: to_ms })
}
