/** A client of HTTP/2 by prior knowledge that is not ours: Node's, with its answers as values. */
import * as Http2 from "node:http2"

export interface Http2Answer {
  readonly status: number
  readonly headers: Http2.IncomingHttpHeaders
  readonly text: string
  /** 0: ended well. */
  readonly resetCode: number
}

export class Http2Client {
  readonly session: Http2.ClientHttp2Session
  readonly closed: Promise<void>
  /** The code of the peer's GOAWAY, once it has come. */
  goaway: number | undefined

  private constructor(session: Http2.ClientHttp2Session) {
    this.session = session
    this.closed = new Promise((resolve) => session.once("close", resolve))
    session.on("error", () => {})
    session.on("goaway", (code) => {
      this.goaway = code
    })
  }

  static async open(base: string, options: Http2.SecureClientSessionOptions = {}): Promise<Http2Client> {
    const session = Http2.connect(base, options)
    const client = new Http2Client(session)
    await new Promise((resolve, reject) => {
      // The server's settings bound what may be opened.
      session.once("remoteSettings", resolve)
      session.once("error", reject)
    })
    return client
  }

  /** Sends a request; with a body it is a POST of JSON, unless the headers say else. */
  ask(path: string, body?: string | Buffer, headers: Http2.OutgoingHttpHeaders = {}): Promise<Http2Answer> {
    const stream = this.session.request(
      {
        ":path": path,
        ...(body === undefined ? {} : { ":method": "POST", "content-type": "application/json" }),
        ...headers
      },
      { endStream: body === undefined }
    )
    if (body !== undefined) stream.end(body)
    return answerOf(stream)
  }

  json(path: string, body: unknown): Promise<Http2Answer> {
    return this.ask(path, JSON.stringify(body))
  }

  close(): void {
    this.session.destroy()
  }
}

/** The answer to a stream, once it is over. */
export const answerOf = (stream: Http2.ClientHttp2Stream): Promise<Http2Answer> =>
  new Promise((resolve) => {
    let headers: Http2.IncomingHttpHeaders = {}
    let text = ""
    stream.on("response", (received) => {
      headers = received
    })
    stream.setEncoding("utf8")
    stream.on("data", (chunk: string) => (text += chunk))
    stream.on("error", () => {})
    stream.once("close", () =>
      resolve({ status: Number(headers[":status"] ?? 0), headers, text, resetCode: stream.rstCode ?? 0 })
    )
  })
