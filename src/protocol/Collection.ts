/** Collections: what a client asks for, and what one is once it exists. */
import { Schema } from "effect"
import {
  CollectionName,
  Dimensions,
  Ef,
  HnswEfConstruction,
  HnswM,
  Metric,
  Partitions,
  Quantization
} from "./Fields.ts"

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

/** A collection. `uid` is of this incarnation of the name: deleted and created again, it is another one. */
export const Collection = Schema.Struct({
  name: CollectionName,
  uid: Schema.String,
  dimensions: Dimensions,
  metric: Metric,
  partitions: Partitions,
  index: IndexParameters,
  created_ms: Schema.Int
}).annotate({ identifier: "Collection" })
export type Collection = typeof Collection.Type

/** As listed and read by clients. `count` is of visible vectors, where it was asked for. */
export const CollectionInfo = Schema.Struct({
  ...Collection.fields,
  count: Schema.optionalKey(Schema.Int)
}).annotate({ identifier: "CollectionInfo" })
export type CollectionInfo = typeof CollectionInfo.Type
