/** Streams that are open, have had one answer, and then do nothing: what does one cost the server? */
import { once } from "node:events"
import { connect, type Socket } from "node:net"
import type { WebSocket } from "ws"
import { truthK } from "./truth.ts"
import { openWebSocket, searchFields } from "./wires.ts"
import { vectorOf, type WordVectors } from "./words.ts"

export interface Idle {
  /** How many are still open: a server that has closed some would seem to need less memory. */
  readonly open: () => number
  readonly close: () => void
}

export interface IdleOptions {
  readonly url: URL
  readonly wire: "ws" | "sse"
  readonly count: number
  readonly queries: WordVectors
}

export const openIdle = async ({ url, wire, count, queries }: IdleOptions): Promise<Idle> => {
  const streams: Array<IdleStream> = []
  let next = 0
  const openSome = async (): Promise<void> => {
    while (next < count) {
      const query = next++ % queries.words.length
      streams.push(await (wire === "ws" ? openIdleWebSocket : openIdleSse)(url, queries, query))
    }
  }
  await Promise.all(Array.from({ length: openingAtOnce }, openSome))
  return {
    open: () => streams.filter((stream) => stream.isOpen()).length,
    close: () => {
      for (const stream of streams) stream.close()
    }
  }
}

interface IdleStream {
  readonly isOpen: () => boolean
  readonly close: () => void
}

const openingAtOnce = 32

const openIdleWebSocket = async (url: URL, queries: WordVectors, query: number): Promise<IdleStream> => {
  const socket: WebSocket = await openWebSocket(url)
  socket.send(`{"type":"search","id":"0",${searchFields(queries, query, {})}}`)
  const [message] = (await once(socket, "message")) as [Buffer]
  if (!message.includes('"event":"results"')) throw new Error(`not an answer to a search: ${message}`)
  return { isOpen: () => socket.readyState === socket.OPEN, close: () => socket.terminate() }
}

const openIdleSse = async (url: URL, queries: WordVectors, query: number): Promise<IdleStream> => {
  const vector = vectorOf(queries, query)
  const base64 = Buffer.from(vector.buffer, vector.byteOffset, vector.byteLength).toString("base64url")
  const path = `/api/v1/stream/search?query_b64=${base64}&k=${truthK}&keep_open=true`
  const socket: Socket = connect(Number(url.port), url.hostname)
  await once(socket, "connect")
  socket.write(`GET ${path} HTTP/1.1\r\nhost: ${url.host}\r\naccept: text/event-stream\r\n\r\n`)
  await new Promise<void>((resolve, reject) => {
    let text = ""
    const onData = (chunk: Buffer): void => {
      text += chunk.toString("latin1")
      if (!text.startsWith("HTTP/1.1 200")) reject(new Error(`the stream was refused: ${text}`))
      else if (text.includes('"search_complete"')) resolve()
    }
    socket.on("data", onData)
    socket.on("error", reject)
    socket.on("close", () => reject(new Error(`the stream was closed after: ${text}`)))
  })
  // Nothing more is expected, but what comes (a keep-alive) must not fill the socket.
  socket.removeAllListeners("data").resume()
  return { isOpen: () => !socket.destroyed && !socket.readableEnded, close: () => socket.destroy() }
}
