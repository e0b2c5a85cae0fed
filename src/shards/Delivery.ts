/** What can go wrong on the way to an actor, before it was told anything: of every call of an entity's client beside its own errors. */
import type * as ClusterError from "effect/cluster/ClusterError"

export type DeliveryError =
  | ClusterError.MailboxFull
  | ClusterError.AlreadyProcessingMessage
  | ClusterError.PersistenceError
  | ClusterError.EntityNotAssignedToRunner

/** Whether an error is of the way, and not of who was asked. */
export const isDelivery = (error: { readonly _tag: string }): error is DeliveryError => tags.has(error._tag)

const tags: ReadonlySet<string> = new Set<DeliveryError["_tag"]>([
  "MailboxFull",
  "AlreadyProcessingMessage",
  "PersistenceError",
  "EntityNotAssignedToRunner"
])
