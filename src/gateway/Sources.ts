/**
 * What searches wait their turns with (`shards/FairLine.ts`): a principal's, on all connections together; without one those of
 * a connection, or of an address where a proxy that is trusted sends many clients' on one.
 */
import type { IncomingMessage } from "node:http"
import type { ServerHttp2Stream } from "node:http2"
import { anonymous, type Principal } from "../protocol/Principal.ts"
import type { SessionQuery } from "../protocol/StreamSession.ts"
import { addressOf } from "./Callers.ts"
import { plainAddress } from "./ClientAddresses.ts"
import { instance } from "./Queries.ts"

/** Where a search comes from. `connection` is whatever stays the same for as long as the connection does. */
export const sourceOf = ({ id, tenant }: Principal, connection: object): string =>
  id === anonymous.id ? nameOf(connection) : `${tenant}/${id}`

/** The same of what may have come by a proxy: `address` is the client's, `peer` that of the connection. */
export const sourceBehind = (
  principal: Principal,
  connection: object,
  address: string,
  peer: string | undefined
): string =>
  principal.id === anonymous.id && address !== plainAddress(peer) ? address : sourceOf(principal, connection)

/** The same of a request that came through the door. Streams of HTTP/2 have sockets of their own, which are not meant. */
export const sourceOfRequest = (request: IncomingMessage, principal: Principal): string => {
  const { stream } = request as { readonly stream?: ServerHttp2Stream }
  return sourceBehind(principal, stream?.session ?? request.socket, addressOf(request), request.socket.remoteAddress)
}

/** The query, with what the door before searches has to know of who asks. */
export const askedBy = (query: SessionQuery, { tier }: Principal, source: string): SessionQuery =>
  tier === "standard" ? { ...query, source } : { ...query, source, tier }

const names = new WeakMap<object, string>()
let named = 0

/** Unique over processes, since sessions may be in another. Given with the first search: most connections are idle. */
const nameOf = (connection: object): string => {
  const known = names.get(connection)
  if (known !== undefined) return known
  const name = `c_${instance}${(named++).toString(36)}`
  names.set(connection, name)
  return name
}
