/** API keys: what is asked for, what is kept, and what is told of one. The key itself is told once, when it is made. */
import { Schema } from "effect"
import { CollectionName } from "./Fields.ts"
import * as Limits from "./Limits.ts"
import { scopes, tenantPattern, tiers } from "./Principal.ts"

export const ScopeName = Schema.Literals(scopes)
export const TierName = Schema.Literals(tiers)

export const TenantName = Schema.String.check(
  Schema.makeFilter((name: string) => tenantPattern.test(name), {
    expected: "a tenant's name: 1 to 64 of a-z 0-9 -, neither beginning nor ending with -"
  })
)

const KeyName = Schema.String.check(
  Schema.makeFilter(
    (name: string) => name.length > 0 && name.length <= Limits.keyNameCharsMax && !/\p{Cc}/u.test(name),
    {
      expected: `a string of 1 to ${Limits.keyNameCharsMax} characters without control characters`
    }
  )
)

const some = <A>(item: Schema.Codec<A>, max: number, what: string) =>
  Schema.Array(item).check(
    Schema.makeFilter(
      (all: ReadonlyArray<A>) => all.length > 0 && all.length <= max && new Set(all).size === all.length,
      {
        expected: `1 to ${max} different ${what}`
      }
    )
  )

const Scopes = some(ScopeName, scopes.length, "scopes")
const Collections = some(CollectionName, Limits.keyCollectionsMax, "collections")
const TimeMillis = Schema.Int.check(
  Schema.makeFilter((n: number) => n >= 0 && n <= 8_640_000_000_000_000, { expected: "milliseconds since 1970" })
)

const described = {
  /** What it is for, for people. */
  name: KeyName,
  tenant: TenantName,
  scopes: Scopes,
  tier: TierName,
  /** Only these of the tenant's collections; absent: all. */
  collections: Schema.optionalKey(Collections),
  /** Absent: it has no end. */
  expires_ms: Schema.optionalKey(TimeMillis)
}

/** Body of `POST /keys`. */
export const KeyRequest = Schema.Struct({
  name: KeyName,
  /** The caller's own where it is left out; only operators may name another. */
  tenant: Schema.optionalKey(TenantName),
  /** `read` where it is left out. */
  scopes: Schema.optionalKey(Scopes),
  /** `standard` where it is left out. */
  tier: Schema.optionalKey(TierName),
  collections: Schema.optionalKey(Collections),
  expires_ms: Schema.optionalKey(TimeMillis)
}).annotate({ identifier: "KeyRequest" })
export type KeyRequest = typeof KeyRequest.Type

const kept = {
  id: Schema.String,
  ...described,
  created_ms: TimeMillis,
  revoked_ms: Schema.optionalKey(TimeMillis),
  /** When it was last used, to an hour or so; absent: never, or not for long. */
  last_used_ms: Schema.optionalKey(TimeMillis)
}

/** A key at rest. */
export const ApiKeyRecord = Schema.Struct({
  format: Schema.Literal(1),
  /** SHA-256 of the secret, hex. */
  hash: Schema.String.check(Schema.isPattern(/^[0-9a-f]{64}$/)),
  ...kept
})
export type ApiKeyRecord = typeof ApiKeyRecord.Type

/** What is told of a key. */
export const KeyInfo = Schema.Struct(kept).annotate({ identifier: "KeyInfo" })
export type KeyInfo = typeof KeyInfo.Type

/** What is told of a key when it is made; `key` is told this once. */
export const NewKeyInfo = Schema.Struct({ ...kept, key: Schema.String }).annotate({ identifier: "NewKeyInfo" })

export const keyInfo = ({ format: _, hash: __, ...info }: ApiKeyRecord): KeyInfo => info
