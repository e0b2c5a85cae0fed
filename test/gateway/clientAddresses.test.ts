/** Whom a request comes from: what a proxy that is trusted says, and nothing that a client may say of itself. */
import type { IncomingMessage } from "node:http"
import { assert, describe, it } from "@effect/vitest"
import { Effect, Layer } from "effect"
import { defaultSettings, readSettings, Settings } from "../../src/config.ts"
import { ClientAddresses, networkOf } from "../../src/gateway/ClientAddresses.ts"

const of = (trustedProxies: string, peer: string, forwarded?: string) =>
  Effect.gen(function* () {
    const { clientAddress } = yield* ClientAddresses
    const headers = forwarded === undefined ? {} : { "x-forwarded-for": forwarded }
    return clientAddress({ headers, socket: { remoteAddress: peer } } as unknown as IncomingMessage)
  }).pipe(
    Effect.provide(
      ClientAddresses.layer.pipe(Layer.provide(Layer.succeed(Settings, { ...defaultSettings, trustedProxies })))
    ),
    Effect.runSync
  )

describe("the address of a client", () => {
  const proxies = "10.0.0.0/8,2001:db8:1::/48"
  const cases: ReadonlyArray<readonly [what: string, peer: string, forwarded: string | undefined, expected: string]> = [
    ["of a peer that is no proxy", "192.0.2.7", undefined, "192.0.2.7"],
    ["whatever that peer says", "192.0.2.7", "198.51.100.1", "192.0.2.7"],
    ["behind a proxy", "10.0.0.1", "192.0.2.7", "192.0.2.7"],
    [
      "behind several, with what the client made up before them",
      "10.0.0.1",
      "1.1.1.1, 192.0.2.7, 10.2.3.4",
      "192.0.2.7"
    ],
    ["over IPv6 sockets", "::ffff:10.0.0.1", "::ffff:192.0.2.7", "192.0.2.7"],
    ["with ports", "10.0.0.1", "192.0.2.7:4711", "192.0.2.7"],
    ["of IPv6, with a port", "2001:db8:1::1", "[2001:db8:2::7]:4711", "2001:db8:2::7"],
    ["up to what is no address", "10.0.0.1", "192.0.2.7, unknown, 10.0.0.2", "10.0.0.2"],
    ["behind a proxy that says nothing", "10.0.0.1", "", "10.0.0.1"],
    ["all of them proxies", "10.0.0.1", "10.0.0.3, 10.0.0.2", "10.0.0.3"]
  ]
  for (const [what, peer, forwarded, expected] of cases) {
    it(what, () => assert.strictEqual(of(proxies, peer, forwarded), expected))
  }

  it("nobody is believed where none is trusted, and loopback by default", () => {
    assert.strictEqual(of("none", "127.0.0.1", "192.0.2.7"), "127.0.0.1")
    assert.strictEqual(of(defaultSettings.trustedProxies, "127.0.0.1", "192.0.2.7"), "192.0.2.7")
  })

  it("an IPv6 client is its /64", () => {
    assert.strictEqual(networkOf("192.0.2.7"), "192.0.2.7")
    assert.strictEqual(networkOf("2001:db8:0:1:aaaa:bbbb:cccc:dddd"), "2001:db8:0:1::/64")
    assert.strictEqual(networkOf("2001:db8:0:1::9"), networkOf("2001:db8:0:1:ffff::1"))
    assert.notStrictEqual(networkOf("2001:db8:0:1::9"), networkOf("2001:db8:0:2::9"))
    assert.strictEqual(networkOf("::1"), "0:0:0:0::/64")
  })

  it("what is no address or network is refused as a setting", () => {
    for (const text of ["10.0.0.0/33", "10.0.0", "10.0.0.0/8/8", "example.com", "::1/129", "10.0.0.1,"]) {
      assert.throws(
        () => readSettings({ trustedProxies: text }, {}),
        /--trusted-proxies: expected addresses or networks/
      )
    }
    assert.strictEqual(readSettings({ trustedProxies: "none" }, {}).trustedProxies, "none")
  })
})
