/**
 * From an answer of our actors to what goes out on a wire. Written as text by hand: metadata is JSON text already, and a
 * search's answer is the hottest thing this process writes.
 */
import type { PartitionRecord } from "../protocol/IndexPartition.ts"
import type { SearchAnswer } from "../protocol/StreamSession.ts"

/** The body of a search's answer, `SearchResponse` of the contract. */
export const searchResponse = (answer: SearchAnswer): string => {
  let text = `{"query_id":${JSON.stringify(answer.queryId)},"results":[`
  for (let i = 0; i < answer.ids.length; i++) {
    text += i === 0 ? `{${result(answer, i)}}` : `,{${result(answer, i)}}`
  }
  const took = Math.round(answer.tookMillis * 1_000) / 1_000
  return `${text}],"total_results":${answer.ids.length}${partial(answer, true)},"took_ms":${took}}`
}

/** The events of a streamed search, each a JSON text, in order: `search_start`, `result` ..., `search_complete`. */
export const searchEvents = function* (answer: SearchAnswer, envelope: string): Generator<string> {
  yield searchStart(answer.queryId, envelope)
  for (let i = 0; i < answer.ids.length; i++) yield searchResult(answer, i, envelope)
  yield searchComplete(answer, envelope)
}

/** `envelope`: members to add to an event, `,"id":"7"`, or nothing. */
export const searchStart = (queryId: string, envelope: string): string =>
  `{"event":"search_start","query_id":${JSON.stringify(queryId)}${envelope}}`

export const searchResult = (answer: SearchAnswer, i: number, envelope: string): string =>
  `{"event":"result",${result(answer, i)}${envelope}}`

export const searchComplete = (answer: SearchAnswer, envelope: string): string =>
  `{"event":"search_complete","total_results":${answer.ids.length}${partial(answer, false)}${envelope}}`

/** The whole answer as one WebSocket event. */
export const searchResults = (answer: SearchAnswer, envelope: string): string => {
  let text = '{"event":"results","results":['
  for (let i = 0; i < answer.ids.length; i++) {
    text += i === 0 ? `{${result(answer, i)}}` : `,{${result(answer, i)}}`
  }
  return `${text}],"total_results":${answer.ids.length}${partial(answer, true)}${envelope}}`
}

export const storedVector = (record: PartitionRecord): string =>
  `{"vector_id":${JSON.stringify(record.id)},"vector":${numbers(record.vector)},` +
  `"metadata":${record.metadata === "" ? "{}" : record.metadata},"version":"${record.version}"}`

const result = (answer: SearchAnswer, i: number): string => {
  let text = `"vector_id":${JSON.stringify(answer.ids[i])},"score":${answer.scores[i]}`
  if (answer.metadata !== undefined) text += `,"metadata":${answer.metadata[i] || "{}"}`
  if (answer.vectors !== undefined) {
    text += `,"vector":${numbers(answer.vectors.subarray(i * answer.dimensions, (i + 1) * answer.dimensions))}`
  }
  return text
}

const partial = (answer: SearchAnswer, always: boolean): string =>
  answer.missing.length > 0
    ? `,"partial":true,"missing_partitions":[${answer.missing.join(",")}]`
    : always
      ? ',"partial":false'
      : ""

const numbers = (vector: Float32Array): string => `[${vector.join(",")}]`
