/**
 * The resident partitions of this process and the form each is in: *full* (records, float32 rows and graph in memory) or
 * *mapped* (quantised codes in memory, rows read from disk). What the promoter moves between them, it moves through this.
 */
import { Context, Effect, Layer } from "effect"
import { AccessLog } from "./AccessLog.ts"
import { MemoryBudget } from "./MemoryBudget.ts"
import type { IndexForm } from "./VectorIndex.ts"

export type Form = IndexForm

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
  /** What the memory budget knows to be resident. */
  static readonly layer: Layer.Layer<PartitionForms, never, MemoryBudget | AccessLog> = Layer.effect(
    PartitionForms,
    Effect.gen(function* () {
      const budget = yield* MemoryBudget
      const access = yield* AccessLog
      const found = (partition: string) => budget.residents().find((one) => one.partition === partition)
      return PartitionForms.of({
        list: Effect.sync(() =>
          budget.residents().map(
            (one): PartitionForm => ({
              partition: one.partition,
              form: one.form(),
              bytes: one.bytes(),
              fullBytesEstimate: one.fullBytes(),
              heat: access.partitionHeat(one.partition),
              // One that has no other form is not to be moved.
              busy: one.changing() || (one.form() === "full" && one.mappedBytes() === undefined) || !one.hasFull
            })
          )
        ),
        budgetBytes: Effect.sync(() => budget.state().partitionRoomBytes),
        promote: (partition) => found(partition)?.promote ?? Effect.succeed(false),
        demote: (partition) => found(partition)?.demote ?? Effect.succeed(false)
      })
    })
  )
}
