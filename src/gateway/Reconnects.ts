/** When clients that are told to come back do so: spread, so that they do not all come at once. */

/** Nobody is told to wait longer. */
const spreadMillisMax = 30_000

/** Beside the spread: until another node, or this one anew, is there. */
const leastMillis = 250

/** Milliseconds after which one of so many clients comes back, where so many are to come a second. */
export const reconnectMillis = (clients: number, reconnectsPerSecond: number): number => {
  const spread = Math.min(spreadMillisMax, (clients * 1_000) / reconnectsPerSecond)
  return leastMillis + Math.floor(Math.random() * spread)
}

/** The last event of a stream of Server-Sent Events whose client is to come back. */
export const byeEvent = (retryMillis: number): string =>
  `retry: ${retryMillis}\nevent: bye\ndata: {"event":"bye","retry_after_ms":${retryMillis}}\n\n`
