/** Who asks: what a credential says of its bearer. Every wire finds it out once, and asks `gateway/Access.ts` with it. */

export const scopes = ["read", "write", "admin"] as const

/**
 * `read`: searches, reads, subscriptions. `write`: inserts, deletions, new collections. `admin`: keys, deleted collections,
 * what the tiers do. None includes another.
 */
export type Scope = (typeof scopes)[number]

export const tiers = ["premium", "standard"] as const
/** Under overload `standard` is shed first. */
export type Tier = (typeof tiers)[number]

export interface Principal {
  /** `key:<id>` of an API key, `jwt:<subject>` of a token, {@link anonymous}'s. Fit for logs, no secret. */
  readonly id: string
  /** Whose collections are meant. */
  readonly tenant: string
  readonly scopes: ReadonlySet<Scope>
  readonly tier: Tier
  /** When the credential ends, milliseconds since 1970; Infinity: never. */
  readonly expiresAtMillis: number
  /** Where the credential is for some of the tenant's collections only: those. */
  readonly collections?: ReadonlySet<string>
}

/** The tenant of what was there before there were tenants; its admins are the operators, who see every tenant. */
export const defaultTenant = "default"

/** Who asks without a credential, where that is allowed: on loopback, or where the operator says so. */
export const anonymous: Principal = {
  id: "anonymous",
  tenant: defaultTenant,
  scopes: new Set(scopes),
  tier: "standard",
  expiresAtMillis: Number.POSITIVE_INFINITY
}

/** An operator: may do what concerns the whole node, and act for any tenant. */
export const isOperator = (principal: Principal): boolean =>
  principal.tenant === defaultTenant && principal.scopes.has("admin") && principal.collections === undefined

/** A tenant's name. */
export const tenantPattern = /^[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?$/
