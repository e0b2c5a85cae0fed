/**
 * API keys at rest: one object each, `access/keys/<id>`, so that any number of nodes and commands may read and change them at
 * once; every change is a conditional write of the object that was read.
 *
 * A key is `rvk_<id>_<secret>`. The secret is 256 random bits, and of it only the SHA-256 is kept: nobody can guess his way
 * through 2^256 secrets however fast the hash is, so that a slow one, which passwords need because people choose them, would
 * only cost every request.
 */
import { hash, randomBytes } from "node:crypto"
import { Data, Effect, Option, Schema } from "effect"
import { ApiKeyRecord } from "../protocol/ApiKey.ts"
import type { ObjectChanged, ObjectMissing, ObjectStore, StoreFailure } from "./ObjectStore.ts"

type Store = ObjectStore["Service"]

/** Keys in one store. */
export const apiKeysMax = 10_000

/** Milliseconds after which a key that is revoked or past its end makes room for others where there are too many. */
const deadKeptMillis = 30 * 86_400_000

/** Attempts at a change that another one came before. */
const attemptsMax = 8

/** Keys read at one time. */
const readsAtOnce = 16

const prefix = "access/keys/"

/** There are {@link apiKeysMax} keys, and none of them is long dead. */
export class TooManyKeys extends Data.TaggedError("TooManyKeys")<Record<never, never>> {
  override get message(): string {
    return `There are ${apiKeysMax} keys, the most there may be: revoke some; they are removed 30 days later.`
  }
}

/** What a new key is to be. */
export type NewKey = Omit<ApiKeyRecord, "format" | "id" | "hash" | "created_ms" | "revoked_ms" | "last_used_ms">

export interface ParsedKey {
  readonly id: string
  readonly secret: string
}

const pattern = /^rvk_([0-9a-z]{16})_([A-Za-z0-9_-]{43})$/

/** The parts of a key; `undefined` for what is none. */
export const parseKey = (text: string): ParsedKey | undefined => {
  const match = pattern.exec(text)
  return match === null ? undefined : { id: match[1] as string, secret: match[2] as string }
}

export const isKeyId = (text: string): boolean => /^[0-9a-z]{16}$/.test(text)

/** What is kept of a secret. */
export const secretHash = (secret: string): Buffer => hash("sha256", secret, "buffer")

/** Makes a key; the answer is the only time that it can be read. */
export const createKey = Effect.fn("ApiKeys.createKey")(function* (store: Store, wanted: NewKey) {
  yield* makeRoom(store)
  const id = randomBytes(16)
    .reduce((text, byte) => text + idAlphabet[byte & 31], "")
    .slice(0, 16)
  const secret = randomBytes(32).toString("base64url")
  const record: ApiKeyRecord = {
    ...wanted,
    format: 1,
    id,
    hash: secretHash(secret).toString("hex"),
    created_ms: Date.now()
  }
  // Eighty random bits: an id that is there already is a defect.
  yield* Effect.catchTag(store.create(prefix + id, encode(record)), "ObjectExists", Effect.die)
  return { record, key: `rvk_${id}_${secret}` }
})

const idAlphabet = "0123456789abcdefghjkmnpqrstvwxyz"

export interface StoredKey {
  readonly record: ApiKeyRecord
  readonly etag: string
}

/** A key's record; `undefined` where there is none, or none that can be read. */
export const readKey = (store: Store, id: string): Effect.Effect<StoredKey | undefined, StoreFailure> =>
  store.get(prefix + id).pipe(
    Effect.map(({ body, etag }) => {
      const record = Option.getOrUndefined(decode(Buffer.from(body).toString("utf8")))
      return record === undefined || record.id !== id ? undefined : { record, etag }
    }),
    Effect.catchTag("ObjectMissing", () => Effect.undefined)
  )

/** All keys, oldest first. */
export const listKeys = Effect.fn("ApiKeys.listKeys")(function* (store: Store) {
  const read = yield* Effect.forEach(yield* keyIds(store), (id) => readKey(store, id), { concurrency: readsAtOnce })
  return read
    .flatMap((one) => (one === undefined ? [] : [one.record]))
    .sort((a, b) => a.created_ms - b.created_ms || (a.id < b.id ? -1 : 1))
})

/** Puts keys as they are into a store that has none of them. */
export const putKeys = (store: Store, records: ReadonlyArray<ApiKeyRecord>) =>
  Effect.forEach(records, (record) => store.create(prefix + record.id, encode(record)), {
    concurrency: readsAtOnce,
    discard: true
  })

/** Whether there is any key, dead or alive. */
export const anyKey = (store: Store): Effect.Effect<boolean, StoreFailure> =>
  Effect.map(store.list(prefix, { limit: 1 }), (found) => found.length > 0)

/** Ends a key for good. `undefined` where there is none, or `mayChange` says no; one that is revoked stays as it is. */
export const revokeKey = Effect.fn("ApiKeys.revokeKey")(function* (
  store: Store,
  id: string,
  mayChange: (record: ApiKeyRecord) => boolean = () => true
) {
  return yield* change(store, id, (record) =>
    !mayChange(record) ? undefined : record.revoked_ms === undefined ? { ...record, revoked_ms: Date.now() } : record
  )
})

/** Notes that a key was used. Gives way to any other change, which another use makes good. */
export const noteUse = (store: Store, { record, etag }: StoredKey, nowMillis: number): Effect.Effect<void> =>
  Effect.ignore(store.replace(prefix + record.id, encode({ ...record, last_used_ms: nowMillis }), etag))

const change = (
  store: Store,
  id: string,
  next: (record: ApiKeyRecord) => ApiKeyRecord | undefined
): Effect.Effect<ApiKeyRecord | undefined, StoreFailure | ObjectChanged | ObjectMissing> =>
  Effect.gen(function* () {
    const found = yield* readKey(store, id)
    if (found === undefined) return undefined
    const changed = next(found.record)
    if (changed !== undefined && changed !== found.record) {
      yield* store.replace(prefix + id, encode(changed), found.etag)
    }
    return changed
  }).pipe(Effect.retry({ times: attemptsMax - 1, while: (error) => error._tag === "ObjectChanged" }))

const makeRoom = Effect.fnUntraced(function* (store: Store) {
  const ids = yield* keyIds(store)
  if (ids.length < apiKeysMax) return
  const before = Date.now() - deadKeptMillis
  let removed = 0
  for (const { id, revoked_ms, expires_ms } of yield* listKeys(store)) {
    if (Math.min(revoked_ms ?? Infinity, expires_ms ?? Infinity) > before) continue
    yield* store.delete(prefix + id)
    removed += 1
  }
  if (removed === 0) return yield* new TooManyKeys()
})

const keyIds = (store: Store): Effect.Effect<ReadonlyArray<string>, StoreFailure> =>
  Effect.map(store.list(prefix, { limit: apiKeysMax }), (found) => found.map(({ key }) => key.slice(prefix.length)))

const Text = Schema.fromJsonString(ApiKeyRecord)
const decode = Schema.decodeUnknownOption(Text)
const encode = (record: ApiKeyRecord): Buffer => Buffer.from(Schema.encodeSync(Text)(record))
