/** Reads of records from their partitions, by entity id: directly where the partition is resident here, else by message. */
import { Context, Effect, Layer } from "effect"
import { Overloaded, PartitionUnavailable } from "../protocol/Errors.ts"
import {
  IndexPartition,
  type PartitionError,
  type PartitionRecord,
  partitionAddressOf
} from "../protocol/IndexPartition.ts"
import { LocalActors } from "../shards/LocalActors.ts"

export class PartitionReads extends Context.Service<
  PartitionReads,
  {
    /** Past every cache. `null` where there is no visible record. */
    readonly get: (
      partition: string,
      ids: ReadonlyArray<string>
    ) => Effect.Effect<ReadonlyArray<PartitionRecord | null>, PartitionError>
    /** Whether it is resident in this process. */
    readonly isResident: (partition: string) => boolean
  }
>()("ruvector/actors/PartitionReads") {
  static readonly layer = Layer.effect(
    PartitionReads,
    Effect.suspend(() => make)
  )
}

const make = Effect.gen(function* () {
  const local = yield* LocalActors
  const client = yield* IndexPartition.client
  const get: PartitionReads["Service"]["get"] = (partition, ids) =>
    Effect.suspend(() => {
      const resident = local.partitions.get(partition)
      if (resident !== undefined) return resident.get(ids)
      return Effect.mapError(client(partition).Get({ ids: [...ids] }), (error): PartitionError => {
        switch (error._tag) {
          case "MailboxFull":
            return new Overloaded({ bound: "mailbox", retryAfterMillis: 250 })
          case "AlreadyProcessingMessage":
          case "PersistenceError":
          case "EntityNotAssignedToRunner": {
            const { collection, partition: number } = partitionAddressOf(partition)
            const detail = "It cannot be reached now."
            return new PartitionUnavailable({ collection, partition: number, detail, retryAfterMillis: 1_000 })
          }
          default:
            return error
        }
      })
    })
  return PartitionReads.of({ get, isResident: (partition) => local.partitions.has(partition) })
})
