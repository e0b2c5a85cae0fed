/** Collections: what a client asks for, and what one is once it exists. */
import { Schema } from "effect"
import {
  CollectionName,
  Dimensions,
  Ef,
  HnswEfConstruction,
  HnswM,
  Metric,
  NoticeMillis,
  Partitions,
  Quantization,
  StoredCollectionName,
  VectorId
} from "./Fields.ts"
import { invalidationIdsMax } from "./Limits.ts"

/** Graph parameters (Malkov and Yashunin, "Efficient and robust approximate nearest neighbor search using HNSW", 2016). */
export const IndexParameters = Schema.Struct({
  /** Links of a node a level; twice that on the lowest. */
  m: HnswM,
  /** Width of the beam while building. */
  ef_construction: HnswEfConstruction,
  /** Width of the beam of a search that names none. */
  ef_search: Ef,
  /** Absent in collections made before there was a choice: `none`. */
  quantization: Schema.optionalKey(Quantization)
})
export type IndexParameters = typeof IndexParameters.Type

/** Body of `PUT /collections/{name}`. What is left out takes the server's defaults. */
export const CollectionRequest = Schema.Struct({
  dimensions: Dimensions,
  metric: Schema.optionalKey(Metric),
  partitions: Schema.optionalKey(Partitions),
  index: Schema.optionalKey(
    Schema.Struct({
      m: Schema.optionalKey(HnswM),
      ef_construction: Schema.optionalKey(HnswEfConstruction),
      ef_search: Schema.optionalKey(Ef),
      quantization: Schema.optionalKey(Quantization)
    })
  )
}).annotate({ identifier: "CollectionRequest" })
export type CollectionRequest = typeof CollectionRequest.Type

/**
 * What has been told to caches of this collection's answers: how often everything was invalidated, and when (milliseconds
 * since 1970) the invalidations take effect whose notice had not passed.
 */
export const CacheState = Schema.Struct({ generation: Schema.Int, pending_ms: Schema.Array(Schema.Int) })
export type CacheState = typeof CacheState.Type

/** A collection. `uid` is of this incarnation of the name: deleted and created again, it is another one. */
export const Collection = Schema.Struct({
  name: StoredCollectionName,
  uid: Schema.String,
  dimensions: Dimensions,
  metric: Metric,
  partitions: Partitions,
  index: IndexParameters,
  created_ms: Schema.Int,
  /** Absent until something was invalidated. */
  cache: Schema.optionalKey(CacheState)
}).annotate({ identifier: "Collection" })
export type Collection = typeof Collection.Type

/** The cache generation in force at a time, and the invalidations still to come. */
export const cacheStateAt = (of: Collection, nowMillis: number): CacheState => {
  if (of.cache === undefined) return { generation: 0, pending_ms: [] }
  const pending_ms = of.cache.pending_ms.filter((at) => at > nowMillis)
  return { generation: of.cache.generation + of.cache.pending_ms.length - pending_ms.length, pending_ms }
}

/** How often it was invalidated, what is still to come included: grows, so that of two readings the newer is known. */
export const invalidationsOf = ({ cache }: Collection): number =>
  cache === undefined ? 0 : cache.generation + cache.pending_ms.length

/** As listed and read by clients. `count` is of visible vectors, where it was asked for. */
export const CollectionInfo = Schema.Struct({
  ...Collection.fields,
  count: Schema.optionalKey(Schema.Int)
}).annotate({ identifier: "CollectionInfo" })
export type CollectionInfo = typeof CollectionInfo.Type

/** Body of `POST /collections/{name}/invalidate`. */
export const InvalidateRequest = Schema.Struct({
  scope: Schema.Literals(["all", "ids"]),
  /** With scope `ids`. */
  ids: Schema.optionalKey(
    Schema.Array(VectorId).check(
      Schema.makeFilter((ids: ReadonlyArray<string>) => ids.length > 0 && ids.length <= invalidationIdsMax, {
        expected: `1 to ${invalidationIdsMax} ids`
      })
    )
  ),
  /** With scope `all`: time until it takes effect. Answers given until then are cached no longer than that. */
  notice_ms: Schema.optionalKey(NoticeMillis)
}).annotate({ identifier: "InvalidateRequest" })
export type InvalidateRequest = typeof InvalidateRequest.Type

/** `tags`: what a cache in front of the service has to purge, once the notice has passed. */
export const Invalidation = Schema.Struct({
  collection: CollectionName,
  scope: Schema.Literals(["all", "ids"]),
  /** The generation that answers carry from `effective_ms` on. */
  generation: Schema.Int,
  effective_ms: Schema.Int,
  tags: Schema.Array(Schema.String)
}).annotate({ identifier: "Invalidation" })
export type Invalidation = typeof Invalidation.Type
