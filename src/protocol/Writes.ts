/** Bodies of the requests that write, as they are decoded: number arrays become float32 in one pass. */
import { Schema } from "effect"
import * as Fields from "./Fields.ts"
import * as Limits from "./Limits.ts"

const collection = { collection: Schema.optionalKey(Fields.CollectionName) }

/** Body of `POST /insert`. */
export const InsertRequest = Schema.Struct({
  ...collection,
  vectors: Schema.Array(
    Schema.Struct({
      id: Fields.VectorId,
      vector: Fields.VectorFromNumbers,
      metadata: Schema.optionalKey(Fields.MetadataObject)
    })
  ).check(
    Schema.makeFilter(
      (vectors: ReadonlyArray<unknown>) => vectors.length > 0 && vectors.length <= Limits.batchItemsMax,
      {
        expected: `1 to ${Limits.batchItemsMax} vectors`
      }
    )
  ),
  ack: Schema.optionalKey(Fields.Ack)
})
export type InsertRequest = typeof InsertRequest.Type

/** Body of `POST /delete`. */
export const DeleteRequest = Schema.Struct({
  ...collection,
  ids: Schema.Array(Fields.VectorId).check(
    Schema.makeFilter((ids: ReadonlyArray<string>) => ids.length > 0 && ids.length <= Limits.batchItemsMax, {
      expected: `1 to ${Limits.batchItemsMax} ids`
    })
  )
}).annotate({ identifier: "DeleteRequest" })

/** Body of `PATCH /vectors/{id}`. */
export const PatchRequest = Schema.Struct({ metadata: Fields.MetadataObject })
