/** When clients that are told to come back do so: spread, so that they do not all come at once. */

/** Beside the spread: until another node, or this one anew, is there. */
const leastMillis = 250

/** Milliseconds after which one of many clients comes back. */
export const reconnectMillis = (spreadMillis: number): number => leastMillis + Math.floor(Math.random() * spreadMillis)

/** The last event of a stream of Server-Sent Events whose client is to come back. */
export const byeEvent = (retryMillis: number): string =>
  `retry: ${retryMillis}\nevent: bye\ndata: {"event":"bye","retry_after_ms":${retryMillis}}\n\n`
