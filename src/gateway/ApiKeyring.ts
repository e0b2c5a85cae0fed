/**
 * API keys as this process knows them. A key seen before is checked in memory; its record is read again in the background
 * when half of `keyRefreshMillis` has passed, and before it is believed when all of it has. So a key that was revoked
 * anywhere works here for no longer than that; on the node that revoked it, for no moment more.
 *
 * While the store cannot be read, keys seen before go on for `keyOutageMillis`: searches do not need the store either.
 */
import { timingSafeEqual } from "node:crypto"
import { Context, Effect, Exit, Layer } from "effect"
import { Settings } from "../config.ts"
import type { ApiKeyRecord } from "../protocol/ApiKey.ts"
import { type ApiError, AuthenticationUnavailable, Overloaded, Unauthenticated } from "../protocol/Errors.ts"
import type { Principal } from "../protocol/Principal.ts"
import * as ApiKeys from "../tiers/ApiKeys.ts"
import { ObjectStore, type StoreFailure } from "../tiers/ObjectStore.ts"
import { RecentMap } from "./RecentMap.ts"

export class ApiKeyring extends Context.Service<
  ApiKeyring,
  {
    /** Whose key it is, where it was seen before and its record is fresh; else how to find out. */
    readonly authenticate: (key: string) => Principal | ApiError | (() => Promise<Principal | ApiError>)
    /** Whether there are, or were, any keys in the store. */
    readonly any: () => boolean
    readonly create: (
      wanted: ApiKeys.NewKey
    ) => Effect.Effect<{ readonly record: ApiKeyRecord; readonly key: string }, StoreFailure | ApiKeys.TooManyKeys>
    readonly list: Effect.Effect<ReadonlyArray<ApiKeyRecord>, StoreFailure>
    /** Revokes a key, in this process at once. `undefined` where there is none that `mayRevoke`. */
    readonly revoke: (
      id: string,
      mayRevoke: (record: ApiKeyRecord) => boolean
    ) => Effect.Effect<ApiKeyRecord | undefined, Effect.Error<ReturnType<typeof ApiKeys.revokeKey>>>
    /** Why a key that was good is good no more, as far as is known; reads its record again where that is due. */
    readonly ended: (principal: Principal) => Unauthenticated | undefined
  }
>()("ruvector/gateway/ApiKeyring") {
  static readonly layer = Layer.effect(
    ApiKeyring,
    Effect.gen(function* () {
      const settings = yield* Settings
      const store = yield* ObjectStore
      const run = Effect.runForkWith(yield* Effect.context<never>())
      const known = new RecentMap<Entry>(settings.keysCachedMax)
      const lookups = new Map<string, Promise<Entry | ApiError>>()
      // A store that cannot be read now may have some.
      let any = yield* Effect.catch(ApiKeys.anyKey(store), () => Effect.succeed(true))

      /** Reads a key's record; one reading for all who wait for it. */
      const lookUp = (id: string): Promise<Entry | ApiError> => {
        const underWay = lookups.get(id)
        if (underWay !== undefined) return underWay
        if (lookups.size >= settings.keyLookupsMax) {
          return Promise.resolve(new Overloaded({ bound: "keyLookupsMax", retryAfterMillis: 250 }))
        }
        const askedAt = Date.now()
        const looking = new Promise<Entry | ApiError>((resolve) => {
          run(ApiKeys.readKey(store, id)).addObserver((exit) => {
            lookups.delete(id)
            resolve(Exit.isSuccess(exit) ? learn(id, exit.value, askedAt) : unavailable)
          })
        })
        lookups.set(id, looking)
        return looking
      }

      const learn = (id: string, stored: ApiKeys.StoredKey | undefined, readAt: number): Entry => {
        const entry = known.get(id) ?? { id, readAt, hash: undefined, principal: undefined, ended: undefined }
        known.set(id, entry)
        entry.readAt = Math.max(entry.readAt, readAt)
        if (stored === undefined) {
          entry.ended = unknown
          return entry
        }
        any = true
        const { record } = stored
        // What a key is never changes, so neither does its principal: only its end comes.
        entry.hash ??= Buffer.from(record.hash, "hex")
        entry.principal ??= principalOf(record)
        if (record.revoked_ms !== undefined) entry.ended = revoked
        if (entry.usedAt !== undefined && entry.usedAt - (record.last_used_ms ?? 0) > useNotedMillis) {
          run(ApiKeys.noteUse(store, stored, entry.usedAt))
        }
        return entry
      }

      const check = (entry: Entry, secret: string): Principal | Unauthenticated => {
        if (entry.hash === undefined || entry.principal === undefined) return unknown
        if (!timingSafeEqual(ApiKeys.secretHash(secret), entry.hash)) return unknown
        if (entry.ended !== undefined) return entry.ended
        const now = Date.now()
        if (entry.principal.expiresAtMillis <= now) return expired
        entry.usedAt = now
        return entry.principal
      }

      const isGoing = (entry: Entry, age: number): boolean =>
        entry.principal !== undefined && age < settings.keyRefreshMillis + settings.keyOutageMillis

      return ApiKeyring.of({
        authenticate: (key) => {
          const parsed = ApiKeys.parseKey(key)
          if (parsed === undefined) return malformed
          const entry = known.get(parsed.id)
          if (entry !== undefined) {
            const age = Date.now() - entry.readAt
            // The end of a key is final, and ids are given once.
            if (entry.ended !== undefined || age < settings.keyRefreshMillis) {
              if (entry.ended === undefined && age * 2 >= settings.keyRefreshMillis) void lookUp(parsed.id)
              return check(entry, parsed.secret)
            }
          }
          return () =>
            lookUp(parsed.id).then((found) => {
              if (!("_tag" in found)) return check(found, parsed.secret)
              const isKnown = entry !== undefined && isGoing(entry, Date.now() - entry.readAt)
              return isKnown ? check(entry, parsed.secret) : found
            })
        },
        any: () => any,
        create: (wanted) =>
          Effect.tap(ApiKeys.createKey(store, wanted), () =>
            Effect.sync(() => {
              any = true
            })
          ),
        list: ApiKeys.listKeys(store),
        revoke: (id, mayRevoke) =>
          Effect.tap(ApiKeys.revokeKey(store, id, mayRevoke), (record) =>
            Effect.sync(() => {
              const entry = known.get(id)
              if (record !== undefined && entry !== undefined) entry.ended = revoked
            })
          ),
        ended: (principal) => {
          const id = idOf(principal)
          const entry = known.get(id)
          if (entry === undefined) {
            // Forgotten by the cache, not by who holds a stream open with it.
            void lookUp(id)
            return undefined
          }
          const age = Date.now() - entry.readAt
          if (entry.ended === undefined && age * 2 >= settings.keyRefreshMillis) void lookUp(id)
          return entry.ended
        }
      })
    })
  )
}

interface Entry {
  readonly id: string
  /** When its record was asked for: what came about before is known. */
  readAt: number
  hash: Buffer | undefined
  principal: Principal | undefined
  ended: Unauthenticated | undefined
  usedAt?: number
}

/** Accuracy of a key's last use, which costs a write. */
const useNotedMillis = 3_600_000

const principalPrefix = "key:"

export const isKeyPrincipal = (principal: Principal): boolean => principal.id.startsWith(principalPrefix)

const idOf = (principal: Principal): string => principal.id.slice(principalPrefix.length)

const principalOf = (record: ApiKeyRecord): Principal => ({
  id: principalPrefix + record.id,
  tenant: record.tenant,
  scopes: new Set(record.scopes),
  tier: record.tier,
  expiresAtMillis: record.expires_ms ?? Number.POSITIVE_INFINITY,
  ...(record.collections === undefined ? {} : { collections: new Set(record.collections) })
})

const refused = (detail: string) => new Unauthenticated({ reason: "invalid_token", detail })
const malformed = refused("The API key is not one.")
/** The same for an id that is not there and a secret that is wrong. */
const unknown = refused("The API key is not known.")
const revoked = refused("The API key was revoked.")
const expired = refused("The API key has expired.")

const unavailable = new AuthenticationUnavailable({
  detail: "The store of keys cannot be read now.",
  retryAfterMillis: 1_000
})
