/** Searches: requests on each wire, results, and the events of a streamed one, exactly as the contract has them. */
import { Schema } from "effect"
import {
  ClientId,
  CollectionName,
  DeadlineMillis,
  Ef,
  FilterObject,
  Include,
  K,
  Metric,
  VectorFromBase64Url,
  VectorFromNumbers,
  VectorId
} from "./Fields.ts"

const common = {
  collection: Schema.optionalKey(CollectionName),
  k: Schema.optionalKey(K),
  ef: Schema.optionalKey(Ef),
  metric: Schema.optionalKey(Metric),
  filter: Schema.optionalKey(FilterObject),
  include: Schema.optionalKey(Include),
  deadline_ms: Schema.optionalKey(DeadlineMillis)
}

/** What is searched for: one of a vector in one of its forms, or the id of a vector of the collection. */
export const querySource = {
  query: Schema.optionalKey(VectorFromNumbers),
  query_b64: Schema.optionalKey(VectorFromBase64Url),
  query_vector_id: Schema.optionalKey(VectorId)
}

/** Results of a search that names no k. */
export const defaultK = 10

/** Body of `POST /search`. */
export const SearchRequest = Schema.Struct({ ...common, ...querySource })
export type SearchRequest = typeof SearchRequest.Type

/** A WebSocket frame that searches. */
export const SearchFrame = Schema.Struct({
  type: Schema.Literal("search"),
  id: Schema.optionalKey(ClientId),
  session: Schema.optionalKey(ClientId),
  stream: Schema.optionalKey(Schema.Boolean),
  ...common,
  ...querySource
})
export type SearchFrame = typeof SearchFrame.Type

export interface SearchResult {
  readonly vector_id: string
  /** Higher is nearer: cosine similarity; inner product; negative Euclidean distance. */
  readonly score: number
  readonly metadata?: unknown
  readonly vector?: ReadonlyArray<number>
}

/** A whole answer. `partial` with the partitions that did not answer in time. */
export interface SearchResponse {
  readonly query_id: string
  readonly results: ReadonlyArray<SearchResult>
  readonly total_results: number
  readonly partial: boolean
  readonly missing_partitions?: ReadonlyArray<number>
  readonly took_ms: number
}

/** One event of a streamed search, as SSE `data:` and as a WebSocket frame (there with `id` and `query_id` added). */
export type SearchEvent =
  | { readonly event: "search_start"; readonly query_id: string }
  | ({ readonly event: "result" } & SearchResult)
  | {
      readonly event: "search_complete"
      readonly total_results: number
      readonly partial?: true
      readonly missing_partitions?: ReadonlyArray<number>
    }
