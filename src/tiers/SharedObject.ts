/**
 * An object of JSON that several processes may change, each from what it has read: every change is a conditional replace of
 * what was read, so that nobody overwrites what he has not seen.
 */
import { Effect, Schema } from "effect"
import { StorageUnavailable } from "../protocol/Errors.ts"
import type { ObjectStore, StoreFailure } from "./ObjectStore.ts"

export interface SharedObjectOptions<A> {
  readonly key: string
  /** Its text. */
  readonly codec: Schema.Codec<A, string>
  /** What it is before it is first written. */
  readonly empty: A
  /** What errors call it. */
  readonly name: string
  /** Called with what is stored, whenever that is read. */
  readonly onRead: (value: A) => Effect.Effect<void>
}

export interface SharedObject<A> {
  /** As it was last read or written by this process. `etag`: `undefined` while there is none. */
  readonly read: Effect.Effect<{ readonly value: A; readonly etag: string | undefined }, StorageUnavailable>
  /** On any doubt about what is stored, what is in memory is forgotten and read anew. */
  readonly write: (value: A, etag: string | undefined) => Effect.Effect<void, StorageUnavailable>
}

export const make = <A>(
  store: ObjectStore["Service"],
  { codec, empty, key, name, onRead }: SharedObjectOptions<A>
): SharedObject<A> => {
  const decode = Schema.decodeUnknownEffect(codec)
  const encode = Schema.encodeEffect(codec)
  let current: { readonly value: A; readonly etag: string | undefined } | undefined

  const storageError = (failure: StoreFailure) =>
    new StorageUnavailable({ detail: `${name}: ${failure.detail}`, retryAfterMillis: 1_000 })

  const read = Effect.gen(function* () {
    if (current !== undefined) return current
    const object = yield* store.get(key).pipe(
      Effect.catchTag("ObjectMissing", () => Effect.undefined),
      Effect.mapError(storageError)
    )
    if (object === undefined) {
      current = { value: empty, etag: undefined }
      return current
    }
    const value = yield* decode(Buffer.from(object.body).toString("utf8")).pipe(
      Effect.mapError(
        (error) =>
          new StorageUnavailable({ detail: `${name} cannot be read: ${error.message}`, retryAfterMillis: 10_000 })
      )
    )
    current = { value, etag: object.etag }
    yield* onRead(value)
    return current
  })

  const write = (value: A, etag: string | undefined) =>
    Effect.gen(function* () {
      const body = Buffer.from(yield* Effect.orDie(encode(value)))
      const stored = etag === undefined ? store.create(key, body) : store.replace(key, body, etag)
      current = { value, etag: yield* stored }
    }).pipe(
      Effect.tapError(() => Effect.sync(() => (current = undefined))),
      Effect.mapError((error) =>
        error._tag === "StoreFailure"
          ? storageError(error)
          : new StorageUnavailable({ detail: `${name} was changed by another node.`, retryAfterMillis: 100 })
      )
    )

  return { read, write }
}
