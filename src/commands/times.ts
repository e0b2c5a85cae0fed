/**
 * A time as an operator gives it: ISO 8601 (`2026-11-25T04:00:00Z`), milliseconds since 1970, or so long ago (`-15m`; s, m,
 * h, d). `undefined` for `latest`. Throws a `RangeError` that says what was expected.
 */
export const parseTime = (text: string, nowMillis: number): number | undefined => {
  if (text === "latest") return undefined
  if (/^\d{10,15}$/.test(text)) return Number(text)
  const ago = /^-(\d{1,9})([smhd])$/.exec(text)
  if (ago !== null) return nowMillis - Number(ago[1]) * unitMillis[ago[2] as keyof typeof unitMillis]
  const millis = /^\d{4}-\d\d-\d\dT\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:\d\d)$/.test(text)
    ? Date.parse(text)
    : Number.NaN
  if (Number.isNaN(millis)) {
    throw new RangeError(
      `--at: expected a time such as 2026-11-25T04:00:00Z, -15m or latest, got ${JSON.stringify(text)}`
    )
  }
  return millis
}

const unitMillis = { s: 1_000, m: 60_000, h: 3_600_000, d: 86_400_000 }
