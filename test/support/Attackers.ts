/** Peers that mean harm, on every wire at once, each going on until it is told to stop. */
import { randomBytes } from "node:crypto"
import * as net from "node:net"
import * as Zlib from "node:zlib"
import { WebSocket } from "ws"
import { fields, frame, get, preface, RawClient } from "./RawClient.ts"

export interface Attack {
  /** How often each kind was begun, by name. */
  readonly attempts: ReadonlyMap<string, number>
  readonly stop: () => Promise<void>
}

/** `each`: how many of each kind at once. */
export const attack = (port: number, each: number): Attack => {
  const attempts = new Map<string, number>()
  const open = new Set<{ destroy(): void }>()
  let stopped = false
  const loops: Array<Promise<void>> = []
  for (const [name, once] of Object.entries(kinds)) {
    for (let i = 0; i < each; i++) {
      loops.push(
        (async () => {
          while (!stopped) {
            attempts.set(name, (attempts.get(name) ?? 0) + 1)
            await once(port, (closable) => open.add(closable)).catch(() => {})
            await pause(againMillis)
          }
        })()
      )
    }
  }
  return {
    attempts,
    stop: async () => {
      stopped = true
      // Those that are begun meanwhile end too.
      const timer = setInterval(() => {
        for (const closable of open) closable.destroy()
        open.clear()
      }, 20)
      await Promise.all(loops)
      clearInterval(timer)
    }
  }
}

/** Milliseconds before one that was cut begins again. */
const againMillis = 200

type Kind = (port: number, opened: (closable: { destroy(): void }) => void) => Promise<unknown>

const pause = (millis: number) => new Promise((resolve) => setTimeout(resolve, millis))

const raw = (bytes: string | Buffer, piece?: string | Buffer, everyMillis = 50): Kind => {
  return async (port, opened) => {
    const client = new RawClient(port, bytes)
    opened(client.socket)
    if (piece !== undefined) await client.flood(Buffer.from(piece), everyMillis)
    else await client.closed
  }
}

const json = "host: localhost\r\ncontent-type: application/json\r\n"
const search = '{"query_vector_id":"v1","k":50,"include":["metadata"]}'
const bomb = Zlib.gzipSync(Buffer.alloc(32 << 20, 32))
const postFields = fields({
  ":method": "POST",
  ":scheme": "http",
  ":authority": "localhost",
  ":path": "/api/v1/search",
  "content-type": "application/json"
})
const events = get("/api/v1/stream/search?query_vector_id=v1&k=1&keep_open=true")

const kinds: Record<string, Kind> = {
  silent: raw(""),
  "slow headers": raw(`POST /api/v1/search HTTP/1.1\r\n${json}`, "x: y\r\n"),
  "slow body": raw(`POST /api/v1/search HTTP/1.1\r\n${json}content-length: 100000\r\n\r\n{"query":[`, "1,"),
  "large headers": raw(`GET / HTTP/1.1\r\n${json}x: ${"y".repeat(65_536)}\r\n\r\n`),
  "not HTTP": raw(randomBytes(4_096)),
  "compressed bomb": raw(
    Buffer.concat([
      Buffer.from(
        `POST /api/v1/insert HTTP/1.1\r\n${json}content-encoding: gzip\r\ncontent-length: ${bomb.length}\r\nconnection: close\r\n\r\n`
      ),
      bomb
    ])
  ),
  "answers unread": async (port, opened) => {
    const socket = net.connect(port, "127.0.0.1")
    opened(socket)
    socket.on("error", () => {})
    socket.pause()
    const request = `POST /api/v1/search HTTP/1.1\r\n${json}content-length: ${search.length}\r\n\r\n${search}`
    socket.write(request.repeat(20))
    // One that does not read sees no end either.
    await Promise.race([new Promise((resolve) => socket.once("close", resolve)), pause(3_000)])
    socket.destroy()
  },
  "h2: slow preface": raw("PRI * HTTP/2.0\r\n"),
  "h2: headers without end": raw(
    Buffer.concat([preface, frame(1, 0, 1, get("/health/live"))]),
    frame(9, 0, 1, fields({ x: "y" }))
  ),
  "h2: slow body": raw(Buffer.concat([preface, frame(1, 4, 1, postFields)]), frame(0, 0, 1, Buffer.from(" "))),
  "h2: large headers": raw(
    Buffer.concat([
      preface,
      frame(1, 1, 1, get("/health/live")),
      ...Array.from({ length: 4 }, (_, i) =>
        frame(9, i === 3 ? 4 : 0, 1, Buffer.concat(Array(120).fill(fields({ x: "y".repeat(120) }))))
      )
    ])
  ),
  "h2: rapid reset": raw(
    Buffer.concat([preface, frame(4, 1, 0)]),
    Buffer.concat(
      Array.from({ length: 100 }, (_, i) =>
        Buffer.concat([
          frame(1, 4, 2 * i + 1, postFields),
          frame(0, 1, 2 * i + 1, Buffer.from(search)),
          frame(3, 0, 2 * i + 1, Buffer.from([0, 0, 0, 8]))
        ])
      )
    ),
    1_000
  ),
  "h2: pings": raw(
    Buffer.concat([preface, frame(4, 1, 0), frame(1, 5, 1, events)]),
    Buffer.concat(Array(200).fill(frame(6, 0, 0, Buffer.alloc(8))))
  ),
  "h2: settings": raw(
    Buffer.concat([preface, frame(4, 1, 0), frame(1, 5, 1, events)]),
    Buffer.concat(Array(200).fill(frame(4, 0, 0)))
  ),
  "h2: answers unread": raw(
    // No window at all for its answers.
    Buffer.concat([
      Buffer.from("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
      frame(4, 0, 0, Buffer.from([0, 4, 0, 0, 0, 0])),
      ...Array.from({ length: 50 }, (_, i) =>
        Buffer.concat([frame(1, 4, 2 * i + 1, postFields), frame(0, 1, 2 * i + 1, Buffer.from(search))])
      )
    ])
  ),
  "WebSocket: frames of no sense": async (port, opened) => {
    const socket = new WebSocket(`ws://127.0.0.1:${port}/api/v1/ws`, { perMessageDeflate: false })
    opened({ destroy: () => socket.terminate() })
    socket.on("error", () => {})
    await new Promise((resolve, reject) => {
      socket.once("open", resolve)
      socket.once("error", reject)
    })
    for (let i = 0; i < 50; i++) {
      socket.send(i % 2 === 0 ? randomBytes(200) : '{"type":"search","query":[],"k":-1}')
    }
    socket.send("x".repeat(2_000_000))
    await new Promise((resolve) => socket.once("close", resolve))
  },
  "WebSocket: answers unread": async (port, opened) => {
    const socket = new WebSocket(`ws://127.0.0.1:${port}/api/v1/ws`, { perMessageDeflate: false })
    opened({ destroy: () => socket.terminate() })
    socket.on("error", () => {})
    await new Promise((resolve, reject) => {
      socket.once("open", resolve)
      socket.once("error", reject)
    })
    socket.pause()
    for (let i = 0; i < 200; i++) socket.send(`{"type":"search",${search.slice(1)}`)
    await pause(2_000)
    socket.terminate()
  }
}
