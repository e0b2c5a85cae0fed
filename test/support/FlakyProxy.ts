/**
 * A proxy in front of an emulator of Google Cloud Storage that fails as networks and servers do. What it does to a request
 * is said by `decide`, for each in turn.
 *
 * It also speaks the protocol of resumable uploads as Google documents it (308 with what is there, `bytes *\/total` to
 * ask), which fake-gcs-server does not: a finished upload goes to the server as one request.
 */

import { randomUUID } from "node:crypto"
import * as http from "node:http"

export type Fault =
  /** As it should be. */
  | "pass"
  /** The connection ends; the server gets nothing. */
  | "dropBefore"
  /** The server does it; the connection ends without an answer. */
  | "dropAfter"
  /** The connection ends; the server gets the request some milliseconds later. */
  | "late"
  /** 503, and nothing is done. */
  | "refuse"
  /** 503, and it is done. */
  | "refuseAfter"
  /** The answer's body is cut in its middle. */
  | "truncate"
  /** A bit of the answer's body is flipped. */
  | "flip"
  /** The answer says nothing of a checksum. */
  | "unsummed"
  /** Nothing is answered, ever. */
  | "stall"
  /** Of a piece of an upload, half arrives before the connection ends. Else as `dropBefore`. */
  | "half"

export interface SeenRequest {
  readonly method: string
  readonly path: string
  readonly bodyBytes: number
}

export interface FlakyProxy {
  readonly url: string
  /** Requests so far. */
  readonly seen: Array<SeenRequest>
  /** Most requests that were under way at one time. */
  readonly mostAtOnce: () => number
  decide: (request: SeenRequest) => Fault
  /** What was late has arrived. */
  readonly settled: () => Promise<void>
  readonly stop: () => Promise<void>
}

/** Most milliseconds that a late request comes late. */
const lateMillisMax = 30

export const startFlakyProxy = async (target: string, random: () => number): Promise<FlakyProxy> => {
  const agent = new http.Agent({ keepAlive: true, maxSockets: 64 })
  const seen: Array<SeenRequest> = []
  const late = new Set<Promise<unknown>>()
  const uploads = new Map<string, Session>()

  const handle = async (request: http.IncomingMessage, response: http.ServerResponse): Promise<void> => {
    const body = await bodyOf(request)
    const method = request.method ?? "GET"
    const path = request.url ?? "/"
    const note = { method, path, bodyBytes: body.length }
    seen.push(note)
    const fault = proxy.decide(note)
    const cut = () => void response.destroy()
    const act = () => answerTo(method, path, request.headers, body)
    if (fault === "stall") return
    if (fault === "dropBefore") return cut()
    if (fault === "half") {
      const session = uploads.get(path)
      const range = /^bytes (\d+)-/.exec(request.headers["content-range"] ?? "")
      // The store keeps whole units of 256 KiB.
      if (session !== undefined && range !== null) session.take(Number(range[1]), body.subarray(0, halfUnits(body)))
      return cut()
    }
    if (fault === "late") {
      const arriving = new Promise((resolve) => setTimeout(resolve, random() * lateMillisMax)).then(act)
      late.add(arriving)
      void arriving.finally(() => late.delete(arriving))
      return cut()
    }
    if (fault === "refuse") return void response.writeHead(503).end("try again")
    const answer = await act()
    if (fault === "dropAfter") return cut()
    if (fault === "refuseAfter") return void response.writeHead(503).end("try again")
    const whole = answer.body
    if (fault === "flip" && whole.length > 0) {
      const at = Math.floor(random() * whole.length)
      whole[at] = (whole[at] as number) ^ (1 << Math.floor(random() * 8))
    }
    const { "x-goog-hash": sum, ...others } = answer.headers
    response.writeHead(answer.status, fault === "unsummed" || sum === undefined ? others : answer.headers)
    if (fault === "truncate" && whole.length > 0) {
      response.write(whole.subarray(0, Math.floor(whole.length / 2)), cut)
      return
    }
    response.end(whole)
  }

  const answerTo = async (
    method: string,
    path: string,
    headers: http.IncomingHttpHeaders,
    body: Buffer
  ): Promise<Answer> => {
    const session = uploads.get(path)
    if (session !== undefined) {
      const answer = await session.put(headers["content-range"] ?? "", body)
      if (answer.status !== 308) uploads.delete(path)
      return answer
    }
    if (path.startsWith("/resumable/")) return { status: 404, headers: {}, body: Buffer.alloc(0) }
    if (method === "POST" && path.includes("uploadType=resumable")) {
      const place = `/resumable/${randomUUID()}`
      const finish = (whole: Buffer) => {
        const boundary = "finished-upload"
        const type = "content-type: application/json\r\n\r\n"
        const parts = [`--${boundary}\r\n${type}`, body, `\r\n--${boundary}\r\n${type}`, whole, `\r\n--${boundary}--`]
        const bytes = Buffer.concat(parts.map((part) => (typeof part === "string" ? Buffer.from(part) : part)))
        const related = {
          "content-type": `multipart/related; boundary=${boundary}`,
          "content-length": `${bytes.length}`
        }
        return forward("POST", path.replace("uploadType=resumable", "uploadType=multipart"), related, bytes)
      }
      uploads.set(place, new Session(finish))
      const headersOut = { location: `${proxy.url}${place}`, "content-length": "0" }
      return { status: 200, headers: headersOut, body: Buffer.alloc(0) }
    }
    return await forward(method, path, headers, body)
  }

  const forward = (method: string, path: string, headers: http.OutgoingHttpHeaders, body: Buffer): Promise<Answer> =>
    new Promise((resolve, reject) => {
      const { connection: _, host: __, ...passed } = headers
      const client = http.request(new URL(path, target), { method, headers: passed, agent }, (answer) => {
        bodyOf(answer).then((bytes) => {
          const { connection: ___, "transfer-encoding": ____, ...kept } = answer.headers
          const headersOut = { ...kept, "content-length": String(bytes.length) }
          resolve({ status: answer.statusCode ?? 500, headers: headersOut, body: bytes })
        }, reject)
      })
      client.on("error", reject)
      client.end(body)
    })

  let underWay = 0
  let mostAtOnce = 0
  const server = http.createServer((request, response) => {
    underWay += 1
    mostAtOnce = Math.max(mostAtOnce, underWay)
    response.once("close", () => (underWay -= 1))
    handle(request, response).catch(() => response.destroy())
  })
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve))
  const { port } = server.address() as { port: number }
  const proxy: FlakyProxy = {
    url: `http://127.0.0.1:${port}`,
    seen,
    mostAtOnce: () => mostAtOnce,
    decide: () => "pass",
    settled: async () => {
      await Promise.allSettled([...late])
    },
    stop: async () => {
      await Promise.allSettled([...late])
      server.closeAllConnections()
      await new Promise((resolve) => server.close(resolve))
      agent.destroy()
    }
  }
  return proxy
}

interface Answer {
  readonly status: number
  readonly headers: http.OutgoingHttpHeaders
  readonly body: Buffer
}

const unit = 262_144
const halfUnits = (body: Buffer): number => Math.floor(body.length / 2 / unit) * unit

/** An upload under way. */
class Session {
  readonly #finish: (whole: Buffer) => Promise<Answer>
  #parts: Array<Buffer> = []
  #bytes = 0

  constructor(finish: (whole: Buffer) => Promise<Answer>) {
    this.#finish = finish
  }

  take(at: number, piece: Buffer): void {
    // What is there already is passed over; a gap is none of the client's to make.
    const fresh = at <= this.#bytes ? piece.subarray(this.#bytes - at) : Buffer.alloc(0)
    this.#parts.push(fresh)
    this.#bytes += fresh.length
  }

  async put(range: string, piece: Buffer): Promise<Answer> {
    const [, start, total] = /^bytes (?:(\d+)-\d+|\*)\/(\d+)$/.exec(range) ?? []
    if (start !== undefined) this.take(Number(start), piece)
    if (this.#bytes === Number(total)) return await this.#finish(Buffer.concat(this.#parts))
    const kept = this.#bytes === 0 ? {} : { range: `bytes=0-${this.#bytes - 1}` }
    return { status: 308, headers: { ...kept, "content-length": "0" }, body: Buffer.alloc(0) }
  }
}

const bodyOf = async (message: http.IncomingMessage): Promise<Buffer> => {
  const parts: Array<Buffer> = []
  for await (const part of message) parts.push(part as Buffer)
  return Buffer.concat(parts)
}
