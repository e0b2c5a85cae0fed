/** A peer that keeps to no protocol: bytes over TCP, and frames of HTTP/2 made by hand. */
import * as net from "node:net"

export class RawClient {
  readonly socket: net.Socket
  readonly closed: Promise<string>
  read = Buffer.alloc(0)

  constructor(port: number, bytes: string | Buffer = "") {
    this.socket = net.connect(port, "127.0.0.1")
    this.socket.setNoDelay(true)
    this.socket.on("error", () => {})
    this.socket.on("data", (chunk) => {
      this.read = Buffer.concat([this.read, chunk])
    })
    this.closed = new Promise((resolve) => this.socket.once("close", () => resolve(this.read.toString("latin1"))))
    if (bytes.length > 0) this.socket.write(bytes)
  }

  /** Sends a piece again and again until the server has had enough. */
  async flood(piece: Buffer, everyMillis: number): Promise<string> {
    const timer = setInterval(() => this.socket.write(piece), everyMillis)
    const text = await this.closed
    clearInterval(timer)
    return text
  }
}

export const frame = (type: number, flags: number, stream: number, payload: Buffer = Buffer.alloc(0)): Buffer => {
  const head = Buffer.alloc(9)
  head.writeUIntBE(payload.length, 0, 3)
  head.writeUInt8(type, 3)
  head.writeUInt8(flags, 4)
  head.writeUInt32BE(stream, 5)
  return Buffer.concat([head, payload])
}

export const preface = Buffer.concat([Buffer.from("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), frame(4, 0, 0)])

/** The code of the last GOAWAY among frames received; NaN where there is none. */
export const goawayCode = (text: string): number => {
  const bytes = Buffer.from(text, "latin1")
  let code = Number.NaN
  for (let at = 0; at + 9 <= bytes.length; at += 9 + bytes.readUIntBE(at, 3)) {
    if (bytes[at + 3] === 7) code = bytes.readUInt32BE(at + 9 + 4)
  }
  return code
}

/** HPACK without compression: literal fields, not indexed. */
export const fields = (headers: Record<string, string>): Buffer =>
  Buffer.concat(
    Object.entries(headers).flatMap(([name, value]) => [
      Buffer.from([0, name.length]),
      Buffer.from(name),
      Buffer.from([value.length]),
      Buffer.from(value)
    ])
  )
export const get = (path: string) =>
  fields({ ":method": "GET", ":scheme": "http", ":authority": "localhost", ":path": path })
