/**
 * JSON Web Tokens of one issuer (RFC 7519, RFC 8725): signature by a key of the issuer's set and an algorithm that is accepted
 * (asymmetric ones only, so that a public key is never taken for a shared secret), `iss`, `aud`, `exp` (which there must be)
 * and `nbf`. What a token says of its bearer is read from the claims that the settings name.
 *
 * A token found good is known until it expires or the issuer's keys change, by its SHA-256: a signature is checked once, and
 * no token is kept.
 */
import { hash } from "node:crypto"
import { Data, Effect } from "effect"
import { errors, type JWTPayload, jwtVerify } from "jose"
import type { SettingValues } from "../config.ts"
import { type ApiError, AuthenticationUnavailable, Unauthenticated } from "../protocol/Errors.ts"
import { type Principal, type Scope, scopes, tenantPattern } from "../protocol/Principal.ts"
import { isUrl, KeySet, KeySetUnavailable } from "./KeySet.ts"
import { RecentMap } from "./RecentMap.ts"
import type { TokenVerifier } from "./TokenVerifier.ts"

/** The key set is a file that cannot be used. `message` is one line for people. */
export class KeySetRefused extends Data.TaggedError("KeySetRefused")<{ readonly message: string }> {}

/** By the settings' issuer. */
export const makeIssuedTokens = (settings: SettingValues): Effect.Effect<TokenVerifier["Service"], KeySetRefused> =>
  Effect.gen(function* () {
    const run = Effect.runForkWith(yield* Effect.context<never>())
    const known = new RecentMap<Principal>(settings.jwtTokensMax)
    let failure: string | undefined
    const keys = new KeySet({
      source: settings.jwtJwks,
      maxAgeMillis: settings.jwksMaxAgeMillis,
      cooldownMillis: settings.jwksCooldownMillis,
      timeoutMillis: settings.jwksTimeoutMillis,
      // A key that is gone from the set may be one that was stolen.
      onChange: () => known.clear(),
      onFailure: (detail) => {
        failure = detail
        run(Effect.logWarning("The key set of the token issuer cannot be read", { source: settings.jwtJwks, detail }))
      }
    })
    // A file is read before anything is served; an issuer may still be starting.
    const first = Effect.promise(() => keys.read())
    if (isUrl(settings.jwtJwks)) run(first)
    else {
      yield* first
      if (failure !== undefined) {
        return yield* new KeySetRefused({ message: `--jwt-jwks ${settings.jwtJwks} cannot be used: ${failure}` })
      }
    }

    const options = {
      issuer: settings.jwtIssuer,
      audience: settings.jwtAudience,
      algorithms: settings.jwtAlgorithms.split(","),
      clockTolerance: settings.jwtClockToleranceSeconds,
      requiredClaims: ["exp", "sub"]
    }
    const toleranceMillis = settings.jwtClockToleranceSeconds * 1_000

    const verify = async (token: string, digest: string): Promise<Principal | ApiError> => {
      try {
        const { payload } = await jwtVerify(token, keys.keyOf, options)
        const principal = principalOf(payload, settings, toleranceMillis)
        if (!("_tag" in principal)) known.set(digest, principal)
        return principal
      } catch (error) {
        return refusalOf(error)
      }
    }

    return {
      configured: true,
      authenticate: (token) => {
        if (token.length > tokenCharsMax) return refused(`The token has more than ${tokenCharsMax} characters.`)
        const digest = hash("sha256", token, "base64")
        const found = known.get(digest)
        if (found === undefined) return () => verify(token, digest)
        if (found.expiresAtMillis > Date.now()) return found
        known.delete(digest)
        return expired
      }
    }
  })

/** Characters of a token. */
const tokenCharsMax = 8_192

const refused = (detail: string) => new Unauthenticated({ reason: "invalid_token", detail })
const expired = refused("The token has expired.")

const refusalOf = (error: unknown): ApiError => {
  if (error instanceof KeySetUnavailable) {
    const detail = "The keys of the token issuer cannot be had now."
    return new AuthenticationUnavailable({ detail, retryAfterMillis: 1_000 })
  }
  if (error instanceof errors.JWTExpired) return expired
  if (error instanceof errors.JWTClaimValidationFailed) {
    return refused(
      `The token's claim ${error.claim} is ${error.reason === "missing" ? "missing" : "not the one expected"}.`
    )
  }
  if (error instanceof errors.JOSEAlgNotAllowed) return refused("The token's algorithm is not accepted.")
  if (error instanceof errors.JWSSignatureVerificationFailed) return refused("The token's signature is wrong.")
  if (error instanceof errors.JWKSNoMatchingKey || error instanceof errors.JWKSMultipleMatchingKeys) {
    return refused("The token is signed with a key that is not of the issuer.")
  }
  return refused("The token cannot be checked: it is not a signed JWT, or not one of the issuer's.")
}

const principalOf = (
  payload: JWTPayload,
  settings: SettingValues,
  toleranceMillis: number
): Principal | Unauthenticated => {
  const claimed = payload[settings.jwtTenantClaim] ?? (settings.jwtTenant === "" ? undefined : settings.jwtTenant)
  if (typeof claimed !== "string" || !tenantPattern.test(claimed)) {
    return refused(`The token names no tenant in its claim ${settings.jwtTenantClaim}.`)
  }
  const collections = payload[settings.jwtCollectionsClaim]
  if (collections !== undefined && !isTexts(collections)) {
    return refused(`The token's claim ${settings.jwtCollectionsClaim} is not a list of names.`)
  }
  return {
    // The subject is the issuer's word: bounded, and without what could break a line of a log.
    id: `jwt:${(payload.sub as string).slice(0, 128).replaceAll(/\p{Cc}/gu, "?")}`,
    tenant: claimed,
    scopes: new Set(scopesOf(payload[settings.jwtScopeClaim])),
    tier: payload[settings.jwtTierClaim] === "premium" ? "premium" : "standard",
    expiresAtMillis: (payload.exp as number) * 1_000 + toleranceMillis,
    ...(collections === undefined ? {} : { collections: new Set(collections) })
  }
}

/** `read` and `ruvector:read` are the same; what is none of ours is another service's. */
const scopesOf = (claim: unknown): ReadonlyArray<Scope> => {
  const given = typeof claim === "string" ? claim.split(" ") : isTexts(claim) ? claim : []
  return scopes.filter((scope) => given.includes(scope) || given.includes(`ruvector:${scope}`))
}

const isTexts = (value: unknown): value is ReadonlyArray<string> =>
  Array.isArray(value) && value.every((item) => typeof item === "string")
