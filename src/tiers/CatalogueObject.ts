/** The object that lists a node's collections, and where their partitions lie. The `Catalog` actor is its one writer. */
import { Schema } from "effect"
import { Collection } from "../protocol/Collection.ts"

export const catalogueKey = "catalog"
export const catalogueFormat = 1

/** A collection that was deleted, so that a backup knows until when there was one. */
export const RemovedCollection = Schema.Struct({ name: Schema.String, uid: Schema.String, removed_ms: Schema.Int })
export type RemovedCollection = typeof RemovedCollection.Type

export const Catalogue = Schema.Struct({
  format: Schema.Literal(catalogueFormat),
  collections: Schema.Array(Collection),
  /** Deleted, but their partitions are not all gone yet. */
  removing: Schema.Array(Collection),
  /** The newest deletions, oldest first, at most {@link removedKept}. */
  removed: Schema.optionalKey(Schema.Array(RemovedCollection))
})
export type Catalogue = typeof Catalogue.Type

/** Its JSON text. */
export const CatalogueText = Schema.fromJsonString(Catalogue)

/** Deletions that the catalogue remembers. */
export const removedKept = 1_000

/** Key prefix of a partition's objects. */
export const partitionPrefix = (uid: string, partition: number): string =>
  `collections/${uid}/p${String(partition).padStart(3, "0")}`
