/** An HTTP proxy that leads every tunnel (`CONNECT`), whatever host it is for, to one port of 127.0.0.1. */
import { once } from "node:events"
import { createServer } from "node:http"
import { type AddressInfo, connect, type Socket } from "node:net"

export interface ConnectProxy {
  readonly url: string
  /** What tunnels were asked for, `host:port`. */
  readonly asked: ReadonlySet<string>
  readonly close: () => void
}

export const startConnectProxy = async (target: number): Promise<ConnectProxy> => {
  const asked = new Set<string>()
  const open = new Set<Socket>()
  const server = createServer()
  server.on("connect", (request, client: Socket, head) => {
    asked.add(request.url ?? "")
    const upstream = connect(target, "127.0.0.1", () => {
      client.write("HTTP/1.1 200 OK\r\n\r\n")
      upstream.write(head)
      client.pipe(upstream).pipe(client)
    })
    for (const socket of [client, upstream]) {
      open.add(socket)
      socket.on("error", () => socket.destroy())
      socket.on("close", () => {
        open.delete(socket)
        client.destroy()
        upstream.destroy()
      })
    }
  })
  server.listen(0, "127.0.0.1")
  await once(server, "listening")
  return {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`,
    asked,
    close: () => {
      for (const socket of open) socket.destroy()
      server.close()
    }
  }
}
