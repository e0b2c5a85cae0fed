/** Reads of records from their partitions, by entity id: directly where the partition is resident here, else by message. */
import { Context, Effect, Layer } from "effect"
import { Overloaded, PartitionUnavailable } from "../protocol/Errors.ts"
import {
  IndexPartition,
  type PartitionError,
  type PartitionRecord,
  partitionAddressOf,
  partitionsGroup
} from "../protocol/IndexPartition.ts"
import { Calls } from "../shards/Calls.ts"
import { isDelivery } from "../shards/Delivery.ts"
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
  const calls = yield* Calls
  const client = yield* IndexPartition.client
  const get: PartitionReads["Service"]["get"] = (partition, ids) =>
    Effect.suspend(() => {
      const resident = local.partitions.get(partition)
      if (resident !== undefined) return resident.get(ids)
      const { collection, partition: number } = partitionAddressOf(partition)
      const unavailable = (detail: string) =>
        new PartitionUnavailable({ collection, partition: number, detail, retryAfterMillis: 1_000 })
      const call = calls.to({ group: partitionsGroup, id: partition }, client(partition).Get({ ids: [...ids] }), () =>
        unavailable("It has not answered in time.")
      )
      return Effect.mapError(call, (error): PartitionError => {
        if (!isDelivery(error)) return error
        return error._tag === "MailboxFull"
          ? new Overloaded({ bound: "mailbox", retryAfterMillis: 250 })
          : unavailable("It cannot be reached now.")
      })
    })
  return PartitionReads.of({ get, isResident: (partition) => local.partitions.has(partition) })
})
