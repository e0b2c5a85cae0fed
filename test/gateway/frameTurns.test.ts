/** Frames of WebSockets leave turns of the event loop to others, and go on in their order. */
import { assert, describe, it } from "@effect/vitest"
import { WebSocket } from "ws"
import { type FrameSource, FrameTurns } from "../../src/gateway/FrameTurns.ts"
import { startConnections } from "./socketServer.ts"

/** Keeps the thread for longer than a turn of `new FrameTurns(1)`. */
const work = () => {
  for (const until = performance.now() + 1.5; performance.now() < until; );
}

describe("turns of frames", () => {
  it("are cut when their time is over, and each connection has some before one has all", async () => {
    const turns = new FrameTurns(1)
    const read: Array<string> = []
    let immediates = 0
    let isOver = false
    const count = () => {
      immediates += 1
      if (!isOver) setImmediate(count)
    }
    const source = (name: string, frames: number): FrameSource => ({
      readWaiting: (framesMax) => {
        const now = Math.min(framesMax, frames)
        frames -= now
        for (let i = 0; i < now; i++) read.push(name)
        work()
        return frames > 0
      }
    })
    assert.isTrue(turns.mayRead())
    work()
    assert.isFalse(turns.mayRead())
    turns.wait(source("many", 100))
    turns.wait(source("one", 1))
    turns.wait(source("few", 20))
    count()
    // Whoever comes later is not read before those that wait.
    assert.isFalse(turns.mayRead())
    while (read.length < 121) await new Promise((resolve) => setImmediate(resolve))
    isOver = true
    assert.isBelow(read.indexOf("one"), read.lastIndexOf("few"))
    assert.isBelow(read.lastIndexOf("few"), read.lastIndexOf("many"))
    // A turn each for what took longer than a turn.
    assert.isAtLeast(immediates, 8)
    await new Promise((resolve) => setTimeout(resolve, 5))
    assert.isTrue(turns.mayRead())
  })

  it("keep the order of one connection's frames, and answer all", async () => {
    const server = await startConnections({}, { frameTurnMillis: 1 })
    try {
      const client = new WebSocket(server.base, { perMessageDeflate: false })
      const other = new WebSocket(server.base, { perMessageDeflate: false })
      for (const one of [client, other]) await new Promise((resolve) => one.once("open", resolve))
      const frames = 4_000
      const answered = (socket: WebSocket, count: number) =>
        new Promise<Array<string>>((resolve) => {
          const ids: Array<string> = []
          socket.on("message", (data: Buffer) => {
            ids.push((JSON.parse(data.toString()) as { readonly id: string }).id)
            if (ids.length === count) resolve(ids)
          })
        })
      const all = answered(client, frames)
      const little = answered(other, 10)
      for (let i = 0; i < frames; i++) client.send(`{"type":"ping","id":"${i}"}`)
      for (let i = 0; i < 10; i++) other.send(`{"type":"ping","id":"${i}"}`)
      assert.deepStrictEqual(
        await little,
        Array.from({ length: 10 }, (_, i) => String(i))
      )
      assert.deepStrictEqual(
        await all,
        Array.from({ length: frames }, (_, i) => String(i))
      )
      // It is read again.
      const last = answered(client, 1)
      client.send('{"type":"ping","id":"last"}')
      assert.deepStrictEqual(await last, ["last"])
      client.terminate()
      other.terminate()
    } finally {
      await server.stop()
    }
  })
})
