/**
 * gRPC exchanges as they were recorded, byte for byte: what a client of today sends, and what it is answered. One that
 * changes breaks a client that is out there, unless a client may ignore what is new (a field of a message, a trailer). Then,
 * and only then: `RUVECTOR_RECORD=1` writes them anew.
 */
import { readdirSync, readFileSync, writeFileSync } from "node:fs"
import { Effect } from "effect"
import { afterAll, assert, beforeAll, describe, it } from "vitest"
import { type GrpcTestServer, openGrpcServer } from "../gateway/grpcServer.ts"
import { bidirectionalPath, frameOf, framesIn, RawConnection } from "../support/Grpc.ts"

interface Exchange {
  readonly about: string
  readonly path: string
  readonly headers: Readonly<Record<string, string>>
  /** DATA of the client, hexadecimal; the last one ends its side. */
  readonly sends: ReadonlyArray<string>
  readonly answer: {
    readonly headers: Readonly<Record<string, unknown>>
    /** Hexadecimal; of a session in no order, since requests are answered as they are done. */
    readonly frames: ReadonlyArray<string>
    readonly trailers: Readonly<Record<string, unknown>>
  }
}

const folder = new URL("grpc/", import.meta.url)
const files = readdirSync(folder).filter((file) => file.endsWith(".json"))
const recording = process.env["RUVECTOR_RECORD"] === "1"

let server: GrpcTestServer

beforeAll(async () => {
  server = await openGrpcServer()
  server.readiness.set({ state: "ready" })
  const records = [1, 2, 3].map((i) => ({
    id: i === 3 ? "drei-ü" : `v${i}`,
    vector: new Float32Array([i, 1]),
    metadata: i === 2 ? "" : JSON.stringify({ i, text: "für" })
  }))
  await Effect.runPromise(server.router.upsert("default", records))
})
afterAll(() => server.close())

describe("recorded exchanges", () => {
  it("are there", () => assert.isAbove(files.length, 5))

  for (const file of files) {
    it(file, async () => {
      const exchange = JSON.parse(readFileSync(new URL(file, folder), "utf8")) as Exchange
      const connection = new RawConnection(server.port)
      const sends = exchange.sends.map((hex) => Buffer.from(hex.replaceAll(" ", ""), "hex"))
      const { headers, body, trailers } = await connection.call(exchange.path, sends, exchange.headers)
      connection.close()
      const frames = framesIn(body).map(({ flag, message }) => {
        const same = Buffer.from(withoutQueryIds(message.toString("latin1")), "latin1")
        return frameOf(same, flag).toString("hex")
      })
      if (exchange.path === bidirectionalPath) frames.sort()
      // As JSON has them: Node's own symbols in the headers are left out.
      const answer = JSON.parse(withoutQueryIds(JSON.stringify({ headers, frames, trailers }))) as object
      if (recording) {
        writeFileSync(new URL(file, folder), `${JSON.stringify({ ...exchange, answer }, null, 2)}\n`)
      }
      assert.deepStrictEqual<unknown>(answer, exchange.answer)
    })
  }
})

/** A query's id is never the same twice; its length is. */
const withoutQueryIds = (text: string): string => text.replaceAll(/q_[0-9a-f]{8}[0-9a-z]/g, "q_000000000")
