/**
 * Connections that were opened while new ones are rejected. They are told so with the answer to their first request, because a
 * client that is cut before it asked would not know why; and what operators and load balancers ask is answered, since they
 * open a connection for it. Once connections are taken again, these are as good as any.
 */
import type { Socket } from "node:net"
import { type Refusal, type Shedding, shedsConnectionsFrom } from "../shards/Shedding.ts"

interface Ends {
  readonly remoteAddress?: string | undefined
  readonly remotePort?: number | undefined
}

export class RejectedConnections {
  readonly #shedding: Shedding["Service"]
  /** By the peer's address and port: what HTTP/2 shows of a socket is another object. */
  readonly #rejected = new Map<string, Refusal>()

  constructor(shedding: Shedding["Service"]) {
    this.#shedding = shedding
  }

  opened(socket: Socket): void {
    const refusal = this.#shedding.connectionRefusal()
    if (refusal === undefined) return
    const key = keyOf(socket)
    this.#rejected.set(key, refusal)
    socket.once("close", () => this.#rejected.delete(key))
  }

  /** Why what comes on this connection is refused. */
  refusal(socket: Ends): Refusal | undefined {
    if (this.#rejected.size === 0 || this.#shedding.level() < shedsConnectionsFrom) return undefined
    return this.#rejected.get(keyOf(socket))
  }
}

const keyOf = ({ remoteAddress, remotePort }: Ends): string => `${remoteAddress} ${remotePort}`
