/** WebSocket peers that break the rules or wear the node down: each ends within its bound, and others are served. */
import * as net from "node:net"
import { afterAll, assert, beforeAll, describe, it } from "@effect/vitest"
import { Effect } from "effect"
import { SocketClient } from "../support/Streams.ts"
import { answerOf, type SocketServer, startSocketServer } from "./socketServer.ts"

let server: SocketServer
let other: SocketClient

beforeAll(async () => {
  server = await startSocketServer((query) => Effect.succeed(answerOf(query.queryId, query.k, "x".repeat(2_000))), {
    maxFrameBytes: 100_000,
    outboundBytesMax: 262_144,
    controlFramesMax: 100,
    requestTimeoutMillis: 600,
    pingIntervalMillis: 200,
    idleTimeoutMillis: 1_500
  })
  other = await SocketClient.open(server.base)
})
afterAll(async () => {
  await other.close()
  await server.stop()
})

/** A connection that is upgraded and then written to byte by byte. */
class RawPeer {
  readonly socket: net.Socket
  /** The code of the close frame, or 1006 where the connection ended without one. */
  readonly closed: Promise<number>
  received = Buffer.alloc(0)

  private constructor(socket: net.Socket) {
    this.socket = socket
    socket.on("data", (chunk) => {
      this.received = Buffer.concat([this.received, chunk])
    })
    socket.on("error", () => {})
    this.closed = new Promise((resolve) => socket.once("close", () => resolve(closeCodeIn(this.received))))
  }

  static async open(): Promise<RawPeer> {
    const socket = net.connect(server.port, "127.0.0.1")
    const peer = new RawPeer(socket)
    socket.write(
      "GET /api/v1/ws HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n" +
        "sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    while (!peer.received.includes("\r\n\r\n")) await new Promise((resolve) => setTimeout(resolve, 2))
    peer.received = peer.received.subarray(peer.received.indexOf("\r\n\r\n") + 4)
    return peer
  }

  /** A masked frame with a mask of zeros. */
  frame(first: number, payload: Buffer | string = ""): void {
    const data = Buffer.from(payload)
    const head = data.length < 126 ? [first, 0x80 | data.length] : [first, 0xfe, data.length >> 8, data.length & 255]
    this.socket.write(Buffer.concat([Buffer.from(head), Buffer.alloc(4), data]))
  }
}

/** Frames of the server have no mask. */
const closeCodeIn = (bytes: Buffer): number => {
  for (let at = 0; at + 2 <= bytes.length; ) {
    const short = (bytes[at + 1] as number) & 0x7f
    const head = short < 126 ? 2 : short === 126 ? 4 : 10
    if (at + head > bytes.length) break
    const length =
      short < 126 ? short : short === 126 ? bytes.readUInt16BE(at + 2) : Number(bytes.readBigUInt64BE(at + 2))
    if (bytes[at] === 0x88) return bytes.readUInt16BE(at + head)
    at += head + length
  }
  return 1006
}

const othersAreServed = async () => {
  for (let n = 0; n < 5; n++) {
    assert.strictEqual((await other.ask({ type: "search", query: [1], k: 1 })).event, "results")
  }
}

const text = 0x01
const textFin = 0x81
const continuation = 0x00
const ping = 0x89

describe("a peer that", () => {
  it("floods with pings is closed with 4029", async () => {
    const peer = await RawPeer.open()
    for (let n = 0; n < 200; n++) peer.frame(ping, "x".repeat(125))
    assert.strictEqual(await peer.closed, 4029)
    await othersAreServed()
  })

  it("pings and reads nothing is owed no more than one pong, and is closed", async () => {
    const peer = await RawPeer.open()
    peer.socket.pause()
    // Its answers fill what lies between, then what may wait for it.
    for (let n = 0; n < 250; n++) peer.frame(textFin, '{"type":"search","query":[1],"k":20}')
    for (let n = 0; n < 50; n++) peer.frame(ping, `${n}`)
    await othersAreServed()
    setTimeout(() => peer.socket.resume(), 2_600)
    assert.include([4008, 1006], await peer.closed)
    await othersAreServed()
  })

  it("sends fragments for ever is closed with 1008, also where it pings between them", async () => {
    const peer = await RawPeer.open()
    peer.frame(text, '{"type":')
    const timer = setInterval(() => {
      peer.frame(continuation, " ".repeat(10))
      peer.frame(ping)
    }, 50)
    assert.strictEqual(await peer.closed, 1008)
    clearInterval(timer)
    await othersAreServed()
  })

  it("sends a message of very many fragments is closed with 1008; one too large with 1009", async () => {
    const many = await RawPeer.open()
    many.frame(text, "[")
    for (let n = 0; n < 1_100; n++) many.frame(continuation, " ")
    assert.strictEqual(await many.closed, 1008)
    const large = await RawPeer.open()
    large.frame(text, "[")
    for (let n = 0; n < 40; n++) large.frame(continuation, " ".repeat(4_000))
    assert.strictEqual(await large.closed, 1009)
    await othersAreServed()
  })

  it("announces a huge frame is closed before it is awaited", async () => {
    const peer = await RawPeer.open()
    peer.socket.write(Buffer.from([0x81, 0xff, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]))
    assert.strictEqual(await peer.closed, 1009)
    await othersAreServed()
  })

  it("is half open (answers no ping, and no close frame) is let go", async () => {
    const peer = await RawPeer.open()
    assert.strictEqual(await peer.closed, 4009)
    await othersAreServed()
    assert.strictEqual(server.gateway.count(), 1)
  })

  it("pings now and then, and says a frame in fragments in time, is served", async () => {
    const peer = await RawPeer.open()
    peer.frame(ping, "hello")
    for (const part of ['{"type":', '"ping",', '"id":"f"']) {
      peer.frame(part.startsWith("{") ? text : continuation, part)
      peer.frame(ping, "between")
    }
    peer.frame(0x80, "}")
    while (!peer.received.includes('{"event":"pong","id":"f"}')) await new Promise((resolve) => setTimeout(resolve, 5))
    assert.isTrue(peer.received.includes("hello"))
    peer.frame(0x88, Buffer.from([0x03, 0xe8]))
    assert.strictEqual(await peer.closed, 1000)
  })
})
