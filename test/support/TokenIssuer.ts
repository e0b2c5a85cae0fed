/** An issuer of tokens on a port of 127.0.0.1: real keys, a real key set over HTTP, and the means to misbehave. */
import { createHmac } from "node:crypto"
import { createServer } from "node:http"
import type { AddressInfo } from "node:net"
import { type CryptoKey, exportJWK, exportSPKI, generateKeyPair, type JWK, SignJWT } from "jose"

export interface Claims {
  readonly [claim: string]: unknown
}

export interface TokenIssuer {
  readonly issuer: string
  readonly audience: string
  readonly jwks: string
  /** Times that the key set was asked for. */
  readonly asked: () => number
  /** A token by the newest key; claims given replace the usual ones, `undefined` leaves one out. */
  readonly token: (claims?: Claims) => Promise<string>
  /** Signed with a key of nobody, under the name of the newest. */
  readonly forged: () => Promise<string>
  /** Signed by HS256 with the text of the public key, as a verifier would take it that is told the algorithm by the token. */
  readonly confused: () => Promise<string>
  /** Of no signature at all. */
  readonly unsigned: () => string
  /** A new key from now on; `keepOld` says whether the old ones stay in the set. */
  readonly rotate: (keepOld: boolean) => Promise<void>
  /** The key set is answered with 503. */
  down: boolean
  readonly close: () => Promise<void>
}

export const startIssuer = async (): Promise<TokenIssuer> => {
  let keys: Array<{ readonly kid: string; readonly jwk: JWK; readonly pem: string; readonly key: CryptoKey }> = []
  let made = 0
  let asked = 0
  const rotate = async (keepOld: boolean) => {
    const { privateKey, publicKey } = await generateKeyPair("RS256", { extractable: true })
    const kid = `k${made++}`
    const jwk = { ...(await exportJWK(publicKey)), kid, alg: "RS256", use: "sig" }
    keys = [...(keepOld ? keys : []), { kid, jwk, pem: await exportSPKI(publicKey), key: privateKey }]
  }
  await rotate(false)
  const server = createServer((_, response) => {
    asked += 1
    if (issuer.down) {
      response.writeHead(503).end()
      return
    }
    response.writeHead(200, { "content-type": "application/json" })
    response.end(JSON.stringify({ keys: keys.map(({ jwk }) => jwk) }))
  })
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve))
  const { port } = server.address() as AddressInfo
  const name = `http://127.0.0.1:${port}/`
  const usual = () => ({
    iss: name,
    aud: "ruvector",
    sub: "alice",
    exp: Math.trunc(Date.now() / 1_000) + 600,
    tenant: "acme",
    scope: "read write"
  })
  const payload = (claims: Claims) => Object.fromEntries(Object.entries({ ...usual(), ...claims }))
  const newest = () => keys.at(-1) as (typeof keys)[number]
  const signed = (claims: Claims, key: CryptoKey) =>
    new SignJWT(payload(claims)).setProtectedHeader({ alg: "RS256", kid: newest().kid }).sign(key)
  const part = (value: unknown) => Buffer.from(JSON.stringify(value)).toString("base64url")

  const issuer: TokenIssuer = {
    issuer: name,
    audience: "ruvector",
    jwks: `${name}jwks.json`,
    asked: () => asked,
    token: (claims = {}) => signed(claims, newest().key),
    forged: async () => signed({}, (await generateKeyPair("RS256")).privateKey),
    confused: async () => {
      const text = `${part({ alg: "HS256", kid: newest().kid })}.${part(payload({}))}`
      return `${text}.${createHmac("sha256", newest().pem).update(text).digest("base64url")}`
    },
    unsigned: () => `${part({ alg: "none" })}.${part(payload({}))}.`,
    rotate,
    down: false,
    close: () => new Promise((resolve) => server.close(() => resolve()))
  }
  return issuer
}
