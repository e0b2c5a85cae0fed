/** A TCP proxy between a client and a server of 127.0.0.1, which delays and cuts. */
import { once } from "node:events"
import { type AddressInfo, connect, createServer, type Socket } from "node:net"

export interface TcpProxy {
  readonly port: number
  /** Ends every connection that is open now, without a goodbye. */
  readonly cut: () => void
  /** Connections cut so far. */
  readonly cuts: () => number
  readonly close: () => Promise<void>
}

/** `delayMillis`: added to what the server sends. */
export const startTcpProxy = async (target: number, { delayMillis = 0 } = {}): Promise<TcpProxy> => {
  const open = new Set<Socket>()
  let cuts = 0
  const server = createServer((client) => {
    const upstream = connect(target, "127.0.0.1")
    open.add(client)
    const end = () => {
      open.delete(client)
      client.destroy()
      upstream.destroy()
    }
    for (const socket of [client, upstream]) socket.on("error", end).on("close", end)
    client.pipe(upstream)
    if (delayMillis === 0) upstream.pipe(client)
    else upstream.on("data", (data) => setTimeout(() => client.destroyed || client.write(data), delayMillis))
  })
  server.listen(0, "127.0.0.1")
  await once(server, "listening")
  const cut = () => {
    for (const client of [...open]) {
      cuts += 1
      client.resetAndDestroy()
    }
  }
  return {
    port: (server.address() as AddressInfo).port,
    cut,
    cuts: () => cuts,
    close: async () => {
      const closed = once(server, "close")
      server.close()
      for (const client of [...open]) client.destroy()
      await closed
    }
  }
}
