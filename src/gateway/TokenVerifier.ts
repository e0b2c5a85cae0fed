/**
 * Tokens beside API keys, where the settings name an issuer of them. What checks them is loaded only then
 * (`IssuedTokens.ts`).
 */
import { Context, Effect, Layer } from "effect"
import { Settings } from "../config.ts"
import { type ApiError, Unauthenticated } from "../protocol/Errors.ts"
import type { Principal } from "../protocol/Principal.ts"

export class TokenVerifier extends Context.Service<
  TokenVerifier,
  {
    /** Whether tokens are accepted at all. */
    readonly configured: boolean
    /** Whose token it is, where it was seen before; else how to find out. */
    readonly authenticate: (token: string) => Principal | ApiError | (() => Promise<Principal | ApiError>)
  }
>()("ruvector/gateway/TokenVerifier") {
  static readonly layer = Layer.effect(
    TokenVerifier,
    Effect.gen(function* () {
      const settings = yield* Settings
      if (settings.jwtIssuer === "") return TokenVerifier.of({ configured: false, authenticate: () => noTokens })
      const { makeIssuedTokens } = yield* Effect.promise(() => import("./IssuedTokens.ts"))
      return TokenVerifier.of(yield* makeIssuedTokens(settings))
    })
  )
}

const noTokens = new Unauthenticated({ reason: "invalid_token", detail: "This service accepts API keys only." })
