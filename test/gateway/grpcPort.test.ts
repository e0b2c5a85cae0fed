/** Calls on the port: what they send is not taken for noise, also while it is not read; noise beside them is. */
import type { ServerHttp2Stream } from "node:http2"
import { connect } from "node:net"
import { Context, Effect, Exit, Layer, Scope } from "effect"
import { afterEach, assert, it } from "vitest"
import { defaultSettings, Settings } from "../../src/config.ts"
import { ClientAddresses } from "../../src/gateway/ClientAddresses.ts"
import * as OnePort from "../../src/gateway/OnePort.ts"
import { bidirectionalPath, RawConnection } from "../support/Grpc.ts"

let scope: Scope.Closeable
let raw: RawConnection

afterEach(async () => {
  raw.close()
  await Effect.runPromise(Scope.close(scope, Exit.void))
})

const open = async (onCall: (stream: ServerHttp2Stream, onBytes: (bytes: number) => void) => void) => {
  const refused: Array<string> = []
  const settings = { ...defaultSettings, port: 0, h2OverheadBytesPerSecond: 1_024 }
  scope = await Effect.runPromise(Scope.make())
  const { address } = await Effect.runPromise(
    Effect.gen(function* () {
      const layer = Layer.provide(ClientAddresses.layer, Layer.succeed(Settings, settings))
      const addresses = Context.get(yield* Layer.build(layer), ClientAddresses)
      return yield* OnePort.make(settings, addresses, {
        onConnection: () => {},
        onRequest: (_, response) => response.end(),
        onUpgrade: (_, socket) => socket.destroy(),
        onGrpc: (stream, _, onBytes) => onCall(stream, onBytes),
        onRefused: (reason) => refused.push(reason)
      })
    }).pipe(Scope.provide(scope))
  )
  raw = new RawConnection(address.port)
  return refused
}

const sleep = (millis: number) => new Promise((resolve) => setTimeout(resolve, millis))

it("a call that is not read for a while keeps its connection, and is read then", async () => {
  let read = 0
  const refused = await open((stream, onBytes) => {
    setTimeout(() => {
      stream.on("data", (chunk: Buffer) => {
        read += chunk.length
        onBytes(chunk.length)
      })
      stream.on("end", () => stream.respond({ ":status": 200 }, { endStream: true }))
    }, 2_500)
  })
  const stream = raw.open(bidirectionalPath)
  const ended = new Promise((resolve) => stream.on("close", resolve))
  stream.end(Buffer.alloc(500_000))
  await ended
  assert.deepStrictEqual([read, refused], [500_000, []])
})

it("a call does not cover for a flood of frames that belong to none", async () => {
  const refused = await open((stream) => stream.resume())
  const socket = connect(raw.port, "127.0.0.1")
  const noisy = new RawConnection(raw.port, { createConnection: () => socket })
  noisy.open(bidirectionalPath)
  // Frames of an unknown kind are to be ignored, and are: until they are too many.
  const length = 8_000
  const unknown = Buffer.concat([
    Buffer.from([0, length >> 8, length & 0xff, 0xfa, 0, 0, 0, 0, 0]),
    Buffer.alloc(length)
  ])
  const until = Date.now() + 10_000
  while (refused.length === 0 && Date.now() < until) {
    await sleep(10)
    for (let i = 0; i < 20 && !socket.destroyed; i++) socket.write(unknown)
  }
  assert.deepStrictEqual(refused, ["frame_flood"])
  noisy.close()
})
