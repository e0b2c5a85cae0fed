/** A proxy of TCP connections that cuts them where it is told to: after so many bytes, in the middle of an event or not. */
import * as net from "node:net"

export interface CutProxy {
  readonly port: number
  /** Where connections go from now on. */
  target: number
  /** Bytes that a new connection lets through to the client before it is cut; `undefined`: not at all. */
  allowance: () => number | undefined
  /** Connections cut so far. */
  readonly cuts: () => number
  /** Cuts whatever is open. */
  readonly cutAll: () => void
  readonly stop: () => Promise<void>
}

export const startCutProxy = async (target: number): Promise<CutProxy> => {
  const open = new Set<() => void>()
  let cuts = 0
  const server = net.createServer((client) => {
    const upstream = net.connect(proxy.target, "127.0.0.1")
    const allowance = proxy.allowance()
    let passed = 0
    const end = () => {
      open.delete(cut)
      client.destroy()
      upstream.destroy()
    }
    const cut = () => {
      if (!open.has(cut)) return
      cuts += 1
      end()
    }
    open.add(cut)
    client.setNoDelay(true)
    client.on("error", end)
    upstream.on("error", end)
    client.on("close", end)
    upstream.on("close", end)
    client.pipe(upstream)
    upstream.on("data", (chunk: Buffer) => {
      const room = allowance === undefined ? chunk.length : allowance - passed
      passed += chunk.length
      if (chunk.length <= room) {
        if (!client.write(chunk)) {
          upstream.pause()
          client.once("drain", () => upstream.resume())
        }
        return
      }
      upstream.pause()
      if (room <= 0) return cut()
      client.write(chunk.subarray(0, room), cut)
    })
  })
  const proxy: CutProxy = {
    port: 0,
    target,
    allowance: () => undefined,
    cuts: () => cuts,
    cutAll: () => {
      for (const cut of [...open]) cut()
    },
    stop: () =>
      new Promise((resolve) => {
        for (const cut of [...open]) cut()
        server.close(() => resolve())
      })
  }
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve))
  return Object.assign(proxy, { port: (server.address() as net.AddressInfo).port })
}
