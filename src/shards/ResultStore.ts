/**
 * The second level of the result cache: a store outside this process, for searches by GET, under the same revision. Not
 * there by default; a warm tier provides it. It never fails towards its callers: without it, searches are run.
 */
import { hash } from "node:crypto"
import { Context, type Effect, Option, Schema } from "effect"
import type { KeptResult, ResultKey } from "./ResultCache.ts"

export class ResultStore extends Context.Service<
  ResultStore,
  {
    readonly get: (key: string) => Effect.Effect<Uint8Array | undefined>
    readonly put: (key: string, bytes: Uint8Array, ttlMillis: number) => Effect.Effect<void>
  }
>()("ruvector/shards/ResultStore") {}

/** `<uid>/<SHA-256 of everything the answer depends on>`. */
export const storeKey = (key: ResultKey): string => `${key.uid}/${fingerprint(key)}`

/** 256 bits of everything an answer depends on, base64url. */
export const fingerprint = (key: ResultKey): string => {
  const { buffer, byteOffset, byteLength } = key.vector ?? noVector
  const vector = hash("sha256", new Uint8Array(buffer, byteOffset, byteLength), "hex")
  const parts = [key.uid, key.revision, key.k, key.ef, key.includes, key.filter, key.vectorId ?? null, vector]
  return hash("sha256", JSON.stringify(parts), "base64url")
}

/** JSON: `ids`, `scores` (they come back exactly), `metadata` texts, `vectors` in base64, `dimensions`. */
export const encodeResult = (result: KeptResult): Uint8Array => Buffer.from(JSON.stringify(encode(result)))

/** `undefined` for bytes that are no result: another release's, or damaged. */
export const decodeResult = (bytes: Uint8Array): KeptResult | undefined => {
  const stored = Option.getOrUndefined(decodeStored(Buffer.from(bytes).toString("utf8")))
  if (stored === undefined || stored.ids.length !== stored.scores.length) return undefined
  if (stored.metadata !== undefined && stored.metadata.length !== stored.ids.length) return undefined
  const vectors = stored.vectors === undefined ? undefined : new Uint8Array(Buffer.from(stored.vectors, "base64"))
  if (vectors !== undefined && vectors.length !== stored.ids.length * stored.dimensions * 4) return undefined
  return {
    ids: stored.ids,
    scores: Float32Array.from(stored.scores),
    ...(stored.metadata === undefined ? {} : { metadata: stored.metadata }),
    ...(vectors === undefined
      ? {}
      : { vectors: new Float32Array(vectors.buffer, vectors.byteOffset, vectors.length / 4) }),
    dimensions: stored.dimensions
  }
}

const StoredResult = Schema.fromJsonString(
  Schema.Struct({
    ids: Schema.Array(Schema.String),
    scores: Schema.Array(Schema.Finite),
    metadata: Schema.optionalKey(Schema.Array(Schema.String)),
    vectors: Schema.optionalKey(Schema.String),
    dimensions: Schema.Int
  })
)
const decodeStored = Schema.decodeUnknownOption(StoredResult)

const encode = ({ ids, scores, metadata, vectors, dimensions }: KeptResult) => ({
  ids,
  scores: Array.from(scores),
  metadata,
  vectors:
    vectors === undefined
      ? undefined
      : Buffer.from(vectors.buffer, vectors.byteOffset, vectors.byteLength).toString("base64"),
  dimensions
})

const noVector = new Float32Array(0)
