/**
 * Who a request comes from, for limits by address and for logs: the peer of its connection, or, where that is a proxy that
 * is trusted, the nearest address in `X-Forwarded-For` that is not one.
 */
import type { IncomingHttpHeaders, IncomingMessage } from "node:http"
import type { ServerHttp2Stream } from "node:http2"
import { BlockList, isIP } from "node:net"
import { Context, Effect, Layer } from "effect"
import { Settings } from "../config.ts"

export class ClientAddresses extends Context.Service<
  ClientAddresses,
  {
    /** Of a request of HTTP/1.1 or HTTP/2, or an upgrade. Empty where the connection is gone. */
    readonly clientAddress: (request: Pick<IncomingMessage, "headers" | "socket">) => string
    /** Of a stream of HTTP/2 that has no request. */
    readonly streamAddress: (stream: ServerHttp2Stream, headers: IncomingHttpHeaders) => string
    readonly isTrusted: (address: string) => boolean
  }
>()("ruvector/gateway/ClientAddresses") {
  static readonly layer = Layer.effect(
    ClientAddresses,
    Effect.map(Settings, ({ trustedProxies }) => make(trustedProxies))
  )
}

/** The address without what one client may choose of it: an IPv6 client has a whole /64. For counting by client. */
export const networkOf = (address: string): string => {
  if (!address.includes(":")) return address
  const [left = "", right] = (address.split("%", 1)[0] as string).split("::")
  const groups = left === "" ? [] : left.split(":")
  if (right !== undefined) {
    const tail = right === "" ? [] : right.split(":")
    while (groups.length + tail.length < 8) groups.push("0")
  }
  const network = groups.slice(0, 4).map((group) => Number.parseInt(group, 16).toString(16))
  return `${network.join(":")}::/64`
}

/** IPv4 as IPv4, also where it came over a socket of IPv6. */
export const plainAddress = (address: string | undefined): string =>
  address === undefined ? "" : address.startsWith("::ffff:") && address.includes(".") ? address.slice(7) : address

const trustedNetworks = (text: string): BlockList => {
  const list = new BlockList()
  for (const entry of text === "none" ? [] : text.split(",")) {
    const [address = "", prefix] = entry.trim().split("/")
    const family = isIP(address) === 6 ? "ipv6" : "ipv4"
    list.addSubnet(address, prefix === undefined ? (family === "ipv6" ? 128 : 32) : Number(prefix), family)
  }
  return list
}

const make = (trustedProxies: string): ClientAddresses["Service"] => {
  const networks = trustedNetworks(trustedProxies)
  // Few peers are asked about very often: proxies, or the clients of this second.
  const known = new Map<string, boolean>()
  const isTrusted = (address: string): boolean => {
    const found = known.get(address)
    if (found !== undefined) return found
    const version = isIP(address)
    const trusted = version !== 0 && networks.check(address, version === 6 ? "ipv6" : "ipv4")
    if (known.size >= knownMax) known.clear()
    known.set(address, trusted)
    return trusted
  }
  const behind = (peer: string, forwarded: string | Array<string> | undefined): string => {
    if (forwarded === undefined || !isTrusted(peer)) return peer
    let address = peer
    let rest = Array.isArray(forwarded) ? forwarded.join(",") : forwarded
    // From the right: each proxy appends whom it was asked by, and what stands further left may be made up.
    while (isTrusted(address) && rest !== "") {
      const comma = rest.lastIndexOf(",")
      const next = entryAddress(rest.slice(comma + 1).trim())
      rest = comma === -1 ? "" : rest.slice(0, comma)
      if (next === undefined) break
      address = next
    }
    return address
  }
  return {
    clientAddress: ({ headers, socket }) => behind(plainAddress(socket.remoteAddress), headers["x-forwarded-for"]),
    streamAddress: (stream, headers) =>
      behind(plainAddress(stream.session?.socket?.remoteAddress), headers["x-forwarded-for"]),
    isTrusted
  }
}

/** Addresses whose trust is remembered. */
const knownMax = 4_096

/** `192.0.2.1`, `192.0.2.1:4711`, `2001:db8::1`, `[2001:db8::1]:4711`. */
const entryAddress = (entry: string): string | undefined => {
  const match = /^\[([^\]]*)\](?::\d+)?$/.exec(entry) ?? /^(\d+\.\d+\.\d+\.\d+):\d+$/.exec(entry)
  const address = plainAddress(match === null ? entry : match[1])
  return isIP(address) === 0 ? undefined : address
}
