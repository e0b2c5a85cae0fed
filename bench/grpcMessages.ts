/**
 * Main thread's time for the messages of one streamed search over gRPC: read and written by hand, as the server does, and by
 * protobufjs, whose code for a message is generated from the .proto.
 *
 *   npm run bench:grpc
 */
import protobuf from "protobufjs"
import { frameHeadBytes, readSearchRequest, resultFrames } from "../src/gateway/GrpcMessages.ts"
import type { SearchAnswer } from "../src/protocol/StreamSession.ts"

const root = protobuf.loadSync(new URL("../proto/ruvector/v1/vector_search.proto", import.meta.url).pathname)
const request = root.lookupType("ruvector.v1.SearchRequest")
const result = root.lookupType("ruvector.v1.SearchResult")

const rounds = 5
const millisEach = 400

/** Microseconds a call, the best of some rounds, so that what else runs here counts little. */
const micros = (call: () => unknown): number => {
  let best = Number.POSITIVE_INFINITY
  for (let round = 0; round < rounds; round++) {
    const start = performance.now()
    let calls = 0
    while (performance.now() - start < millisEach) for (let i = 0; i < 100; i++, calls++) call()
    best = Math.min(best, ((performance.now() - start) * 1_000) / calls)
  }
  return best
}

const row = (what: string, ours: number, theirs: number): void => {
  console.log(`${what.padEnd(44)} ${ours.toFixed(2).padStart(8)} ${theirs.toFixed(2).padStart(12)} us`)
}

console.log(`${"".padEnd(44)} ${"by hand".padStart(8)} ${"protobufjs".padStart(12)}`)
for (const dimensions of [128, 768, 1_536]) {
  const query = Float32Array.from({ length: dimensions }, (_, i) => Math.sin(i))
  const bytes = Buffer.from(request.encode({ query, k: 10, request_id: "r1" }).finish())
  row(
    `a request, ${dimensions} floats, as a Float32Array`,
    micros(() => readSearchRequest(bytes)),
    micros(() => new Float32Array((request.decode(bytes) as unknown as { query: ReadonlyArray<number> }).query))
  )
}

const answer: SearchAnswer = {
  queryId: "q_1",
  ids: Array.from({ length: 10 }, (_, i) => `document-${i * 7_919}`),
  scores: Float32Array.from({ length: 10 }, (_, i) => 1 - i / 20),
  dimensions: 128,
  missing: [],
  tookMillis: 1
}
row(
  "ten results as frames",
  micros(() => resultFrames(answer, 0, 65_536, "")),
  micros(() => {
    const frames: Array<Uint8Array> = []
    for (let i = 0; i < answer.ids.length; i++) {
      const message = result.encode({ vectorId: answer.ids[i], score: answer.scores[i] }).finish()
      const head = Buffer.allocUnsafe(frameHeadBytes)
      head[0] = 0
      head.writeUInt32BE(message.length, 1)
      frames.push(head, message)
    }
    return Buffer.concat(frames)
  })
)
