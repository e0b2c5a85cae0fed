/**
 * What access costs a request: finding out who it is from (an API key, a token, nobody), whether it may, and whether too
 * often; beside it the library's rate limiter alone, which a request would pass twice.
 *
 *     npm run bench:access
 */

import { mkdtempSync, rmSync, writeFileSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { Context, Effect, Layer, Logger } from "effect"
import { RateLimiter } from "effect/persistence"
import { exportJWK, generateKeyPair, SignJWT } from "jose"
import { defaultSettings, Settings } from "../src/config.ts"
import { Access, isPrincipal } from "../src/gateway/Access.ts"
import { ApiKeyring } from "../src/gateway/ApiKeyring.ts"
import { RateLimits } from "../src/gateway/RateLimits.ts"
import { TokenVerifier } from "../src/gateway/TokenVerifier.ts"
import type { Principal } from "../src/protocol/Principal.ts"
import { ObjectStore } from "../src/tiers/ObjectStore.ts"

const rounds = 5
const calls = 100_000

/** The best of some rounds, microseconds a call. */
const microseconds = (n: number, act: () => void): number => {
  let best = Number.POSITIVE_INFINITY
  for (let round = 0; round < rounds; round++) {
    const started = performance.now()
    for (let i = 0; i < n; i++) act()
    best = Math.min(best, ((performance.now() - started) / n) * 1_000)
  }
  return best
}

const directory = mkdtempSync(join(tmpdir(), "ruvector-access-"))
const { privateKey, publicKey } = await generateKeyPair("RS256")
writeFileSync(join(directory, "jwks.json"), JSON.stringify({ keys: [{ ...(await exportJWK(publicKey)), kid: "k" }] }))
const token = await new SignJWT({ scope: "read write", tenant: "acme" })
  .setProtectedHeader({ alg: "RS256", kid: "k" })
  .setIssuer("https://issuer.example/")
  .setAudience("ruvector")
  .setSubject("alice")
  .setExpirationTime("1h")
  .sign(privateKey)

const layer = Access.layer.pipe(
  Layer.provideMerge(Layer.mergeAll(ApiKeyring.layer, TokenVerifier.layer, RateLimits.layerWith)),
  Layer.provide(ObjectStore.layerMemory),
  Layer.provide(
    Layer.succeed(Settings, {
      ...defaultSettings,
      jwtIssuer: "https://issuer.example/",
      jwtAudience: "ruvector",
      jwtJwks: join(directory, "jwks.json"),
      keyRate: 1_000_000,
      keyBurst: 1_000_000,
      addressRate: 1_000_000,
      addressBurst: 1_000_000
    })
  ),
  Layer.provide(Logger.layer([]))
)

const program = Effect.gen(function* () {
  const context = yield* Layer.build(layer)
  const access = Context.get(context, Access)
  const keys = Context.get(context, ApiKeyring)
  const { key } = yield* keys.create({ name: "bench", tenant: "acme", scopes: ["read"], tier: "standard" })
  const address = "192.0.2.7"
  const requests = {
    nobody: { headers: {}, address },
    key: { headers: { authorization: `Bearer ${key}` }, address },
    token: { headers: { authorization: `Bearer ${token}` }, address }
  }
  const principals: Record<string, Principal> = {}
  for (const [name, request] of Object.entries(requests)) {
    const answer = yield* Effect.promise(async () => access.authenticate(request))
    if (!isPrincipal(answer)) throw new Error(`${name}: ${answer._tag}`)
    principals[name] = answer
  }
  const line = (what: string, value: number) => process.stdout.write(`${what.padEnd(58)} ${value.toFixed(2)} us\n`)
  for (const [name, request] of Object.entries(requests)) {
    const principal = principals[name] as Principal
    line(
      `authenticate, ${name}`,
      microseconds(calls, () => void access.authenticate(request))
    )
    line(
      `  all three questions`,
      microseconds(calls, () => {
        access.authenticate(request)
        access.allow(principal, "read", "docs")
        access.admit(principal, address)
      })
    )
  }
  const byKey = principals["key"] as Principal
  line(
    "admit (two token buckets)",
    microseconds(calls, () => void access.admit(byKey, address))
  )
  line(
    "allow",
    microseconds(calls, () => void access.allow(byKey, "read", "docs"))
  )

  const limiter = yield* RateLimiter.make.pipe(Effect.provide(RateLimiter.layerStoreMemory))
  const consume = limiter.consume({
    algorithm: "token-bucket",
    window: "1 second",
    limit: 1_000_000,
    key: "k"
  })
  line(
    "the library's limiter in memory, one bucket, runSync",
    microseconds(20_000, () => void Effect.runSync(consume))
  )
  const started = performance.now()
  for (let i = 0; i < 200; i++) {
    const fresh = `${token.slice(0, -4)}${String(i).padStart(4, "A")}`
    yield* Effect.promise(async () =>
      access.authenticate({ headers: { authorization: `Bearer ${fresh}` }, address: `198.51.100.${i}` })
    )
  }
  line("a token that is not known: its signature checked (RS256)", ((performance.now() - started) / 200) * 1_000)
})

await Effect.runPromise(Effect.scoped(program))
rmSync(directory, { recursive: true })
