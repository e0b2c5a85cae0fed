/**
 * Ids of mutations: one that is delivered or tried again under the same id is done once, and answered as it was.
 *
 * Clients choose keys (`Idempotency-Key`), each its own; inside they are 16 bytes, so that no client meets another's and so
 * that a log can afford them (`shards/RequestIds.ts`).
 */
import { Schema } from "effect"
import { idempotencyKeyMax } from "./Limits.ts"

/** A client's key for one request. */
export const IdempotencyKey = Schema.String.check(
  Schema.makeFilter((key: string) => key.length <= idempotencyKeyMax && /^[\x20-\x7e]+$/.test(key), {
    expected: `a text of 1 to ${idempotencyKeyMax} printable ASCII characters`
  })
)

/** 16 bytes as base64url. The first bit says that the system gave it. */
export const RequestId = Schema.String.check(
  Schema.makeFilter((id: string) => /^[A-Za-z0-9_-]{21}[AQgw]$/.test(id), { expected: "16 bytes as base64url" })
)
