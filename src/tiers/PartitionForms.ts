/**
 * The resident partitions of this process and the form each is in: *full* (records, float32 rows and graph in memory) or
 * *mapped* (quantised codes in memory, rows read from disk). What the promoter moves between them, it moves through this.
 */
import { Context, Effect, Layer } from "effect"

export type Form = "mapped" | "full"

export interface PartitionForm {
  /** `<collection name>/<uid>/<partition>`. */
  readonly partition: string
  readonly form: Form
  /** Bytes it holds in memory now. */
  readonly bytes: number
  /** Bytes of its full form: measured where it is full, else estimated. */
  readonly fullBytesEstimate: number
  /** Decayed accesses a minute. */
  readonly heat: number
  /** Under way between forms, or not to be moved now. */
  readonly busy: boolean
}

export class PartitionForms extends Context.Service<
  PartitionForms,
  {
    readonly list: Effect.Effect<ReadonlyArray<PartitionForm>>
    /** Bytes that all of them together may hold. */
    readonly budgetBytes: Effect.Effect<number>
    /** Loads the full form; answers when it serves, `false` where it did not come to that. */
    readonly promote: (partition: string) => Effect.Effect<boolean>
    /** Goes back to the mapped form; `false` where it could not be. */
    readonly demote: (partition: string) => Effect.Effect<boolean>
  }
>()("ruvector/tiers/PartitionForms") {
  /** Of a node whose partitions have one form only: there is nothing to move. */
  static readonly layerOneForm = Layer.succeed(PartitionForms, {
    list: Effect.succeed([]),
    budgetBytes: Effect.succeed(0),
    promote: () => Effect.succeed(false),
    demote: () => Effect.succeed(false)
  })
}
