/**
 * Messages of the `Catalog` entity, one for a node's data: the collections. It is the only writer of the catalogue object.
 */
import { Schema } from "effect"
import * as Entity from "effect/cluster/Entity"
import * as Rpc from "effect/rpc/Rpc"
import { Collection, CollectionRequest } from "./Collection.ts"
import { CollectionConflict, CollectionNotFound, InvalidInput, Overloaded, StorageUnavailable } from "./Errors.ts"
import { NoticeMillis, StoredCollectionName } from "./Fields.ts"

/** The id of the one Catalog entity. */
export const catalogId = "catalog"

export const Catalog = Entity.make("Catalog", [
  /** Creates a collection, or finds the one that is there with the same parameters. */
  Rpc.make("Create", {
    payload: { name: StoredCollectionName, request: CollectionRequest },
    success: Schema.Struct({ collection: Collection, created: Schema.Boolean }),
    error: Schema.Union([CollectionConflict, CollectionNotFound, StorageUnavailable, Overloaded, InvalidInput])
  }),
  Rpc.make("Read", {
    payload: { name: StoredCollectionName },
    success: Collection,
    error: Schema.Union([CollectionNotFound, StorageUnavailable])
  }),
  Rpc.make("List", { success: Schema.Array(Collection), error: StorageUnavailable }),
  /** All collections where they are not those of `state`, of an earlier answer or empty; else `null`. */
  Rpc.make("ListChanged", {
    payload: { state: Schema.String },
    success: Schema.NullOr(Schema.Struct({ state: Schema.String, collections: Schema.Array(Collection) })),
    error: StorageUnavailable
  }),
  /** Raises the collection's cache generation once `notice_ms` have passed; answers the collection and when that is. */
  Rpc.make("Invalidate", {
    payload: { name: StoredCollectionName, notice_ms: NoticeMillis },
    success: Schema.Struct({ collection: Collection, effective_ms: Schema.Int }),
    error: Schema.Union([CollectionNotFound, StorageUnavailable, Overloaded])
  }),
  /** Takes the collection out of the catalogue, then its partitions and their objects. */
  Rpc.make("Delete", {
    payload: { name: StoredCollectionName },
    success: Schema.Void,
    error: Schema.Union([CollectionNotFound, StorageUnavailable])
  })
])
