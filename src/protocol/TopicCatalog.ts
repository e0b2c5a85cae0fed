/** Messages of the `TopicCatalog` entity, one for a node's data: the topics. It is the only writer of the object that lists them. */
import { Schema } from "effect"
import { Entity } from "effect/cluster"
import { Rpc } from "effect/rpc"
import { Overloaded, StorageUnavailable, TopicConflict, TopicNotFound } from "./Errors.ts"
import { StoredCollectionName } from "./Fields.ts"
import { Topic, TopicRequest } from "./Topic.ts"

/** The id of the one TopicCatalog entity. */
export const topicCatalogId = "topics"

export const TopicCatalog = Entity.make("TopicCatalog", [
  /** Creates a topic, or finds the one that is there with the same parameters. */
  Rpc.make("Create", {
    payload: { name: StoredCollectionName, request: TopicRequest },
    success: Schema.Struct({ topic: Topic, created: Schema.Boolean }),
    error: Schema.Union([TopicConflict, StorageUnavailable, Overloaded])
  }),
  /** Makes one that every tenant has, where it is asked for first. */
  Rpc.make("Read", {
    payload: { name: StoredCollectionName },
    success: Topic,
    error: Schema.Union([TopicNotFound, StorageUnavailable, Overloaded])
  }),
  Rpc.make("List", { success: Schema.Array(Topic), error: StorageUnavailable }),
  /** Takes the topic out of the list, then its channels and their objects. */
  Rpc.make("Delete", {
    payload: { name: StoredCollectionName },
    success: Schema.Void,
    error: Schema.Union([TopicNotFound, StorageUnavailable])
  })
])
