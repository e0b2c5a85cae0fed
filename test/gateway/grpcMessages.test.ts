/** Messages written and read by hand, held against the .proto through an implementation that is not ours. */
import protobuf from "protobufjs"
import { assert, describe, it } from "vitest"
import {
  faultOf,
  healthFrame,
  MalformedMessage,
  readHealthCheckRequest,
  readSearchRequest,
  resultFrames,
  servingStatus,
  summaryFrame
} from "../../src/gateway/GrpcMessages.ts"
import { grpcMessage } from "../../src/gateway/GrpcStatus.ts"
import { Overloaded } from "../../src/protocol/Errors.ts"
import type { SearchAnswer } from "../../src/protocol/StreamSession.ts"
import { framesIn, protoDirectory, protoFiles } from "../support/Grpc.ts"
import { seeded } from "../support/Seeded.ts"

const root = new protobuf.Root()
root.resolvePath = (_, target) => `${protoDirectory}${target}`
root.loadSync([...protoFiles], { keepCase: true })
const type = (name: string) => root.lookupType(name)
const request = type("ruvector.v1.SearchRequest")
const result = type("ruvector.v1.SearchResult")

const decoded = (of: protobuf.Type, bytes: Uint8Array) =>
  of.toObject(of.decode(bytes), { defaults: false, enums: String, longs: Number }) as Record<string, unknown>

const emptyRequest = {
  query: undefined,
  k: 0,
  metric: "",
  collection: "",
  queryVectorId: "",
  ef: 0,
  filter: "",
  includeMetadata: false,
  includeVector: false,
  deadlineMillis: 0,
  requestId: "",
  cancel: false
}

/** Fields of the .proto and ours. */
const requestFields: Readonly<Record<string, keyof typeof emptyRequest>> = {
  query: "query",
  k: "k",
  metric: "metric",
  collection: "collection",
  query_vector_id: "queryVectorId",
  ef: "ef",
  filter: "filter",
  include_metadata: "includeMetadata",
  include_vector: "includeVector",
  deadline_ms: "deadlineMillis",
  request_id: "requestId",
  cancel: "cancel"
}

const texts = ["", "a", "ü", "x".repeat(127), "x".repeat(128), "\u{1f600}".repeat(40), "v".repeat(20_000)]
const integers = [0, 1, 127, 128, 16_384, 2_147_483_647, -1, -2_147_483_648]

describe("requests", () => {
  it("are read as they were meant, whatever is left out, repeated or unknown", () =>
    seeded(20_401, async (source) => {
      assert.deepStrictEqual(Object.keys(request.fields).sort(), Object.keys(requestFields).sort())
      for (let round = 0; round < 300; round++) {
        const sent: Record<string, unknown> = {}
        const expected: Record<string, unknown> = { ...emptyRequest }
        for (const [name, field] of Object.entries(request.fields)) {
          if (source.next() < 0.4) continue
          const value =
            field.type === "float"
              ? source.vector(1 + source.below(200))
              : field.type === "string"
                ? source.pick(texts)
                : field.type === "bool"
                  ? source.next() < 0.5
                  : source.pick(integers)
          sent[name] = value
          expected[requestFields[name] as string] = Array.isArray(value) ? new Float32Array(value) : value
        }
        const writer = protobuf.Writer.create()
        // Fields of a later version, of every kind.
        writer.uint32((900 << 3) | 0).uint64(2 ** 50)
        writer.uint32((901 << 3) | 1).double(1)
        writer.uint32((902 << 3) | 2).string("later")
        writer
          .uint32((903 << 3) | 3)
          .uint32((1 << 3) | 5)
          .float(1)
          .uint32((903 << 3) | 4)
        writer.uint32((904 << 3) | 5).float(1)
        const bytes = Buffer.concat([writer.finish(), request.encode(sent).finish()])
        assert.deepStrictEqual<unknown>(readSearchRequest(bytes), expected)
      }
    }))

  it("have their query packed, one by one, or in parts", () => {
    const one = (value: number) =>
      protobuf.Writer.create()
        .uint32((1 << 3) | 5)
        .float(value)
        .finish()
    const packed = request.encode({ query: [2, 3] }).finish()
    const bytes = Buffer.concat([one(1), packed, one(4)])
    assert.deepStrictEqual(readSearchRequest(bytes).query, new Float32Array([1, 2, 3, 4]))
  })

  it("are refused where they are cut, or are no message", () =>
    seeded(20_402, async (source) => {
      const whole = Buffer.from(
        request.encode({ query: [1, 2, 3], k: 300, filter: "{}", request_id: "ü", include_vector: true }).finish()
      )
      const ends = new Set(endsOf(whole))
      for (let length = 0; length < whole.length; length++) {
        const read = attempt(() => readSearchRequest(whole.subarray(0, length)))
        assert.strictEqual(read !== undefined, ends.has(length), `cut at ${length}`)
      }
      for (let round = 0; round < 20_000; round++) {
        const bytes = Buffer.from(whole)
        for (let i = 0; i <= source.below(4); i++) bytes[source.below(bytes.length)] = source.below(256)
        attempt(() => readSearchRequest(bytes))
        attempt(() => readHealthCheckRequest(bytes))
      }
      const wrong: Record<string, Buffer> = {
        "a string that is not UTF-8": Buffer.from([0x1a, 1, 0xff]),
        "floats that are not whole": Buffer.from([0x0a, 3, 0, 0, 0]),
        "a length beyond the end": Buffer.from([0x1a, 0xff, 0xff, 0xff, 0xff, 0x0f]),
        "an endless number": Buffer.alloc(20, 0xff),
        "a field numbered 0": Buffer.from([0, 0]),
        "the end of a group that did not begin": Buffer.from([0x0c]),
        "groups without end": Buffer.alloc(1_000, 0x0b),
        "a kind there is not": Buffer.from([0x0e])
      }
      for (const [what, bytes] of Object.entries(wrong)) {
        assert.throws(() => readSearchRequest(bytes), MalformedMessage, undefined, what)
      }
    }))
})

/** Where the fields of a message end, and so may the message. */
const endsOf = (bytes: Buffer): Array<number> => {
  const reader = protobuf.Reader.create(bytes)
  const ends = [0]
  while (reader.pos < reader.len) {
    reader.skipType(reader.uint32() & 7)
    ends.push(reader.pos)
  }
  return ends
}

/** What it gives, or `undefined` where it refuses. */
const attempt = <A>(read: () => A): A | undefined => {
  try {
    return read()
  } catch (error) {
    if (error instanceof MalformedMessage) return undefined
    throw error
  }
}

const answerOf = (count: number, more: Partial<SearchAnswer> = {}): SearchAnswer => ({
  queryId: "q_1",
  ids: Array.from({ length: count }, (_, i) => texts[1 + (i % 5)] as string),
  scores: Float32Array.from({ length: count }, (_, i) => 1 - i / 7),
  dimensions: 3,
  missing: [],
  tookMillis: 1.2345,
  ...more
})

describe("answers", () => {
  it("are frames of results, as many as fit, and a summary", () => {
    const count = 40
    const answer = answerOf(count, {
      metadata: Array.from({ length: count }, (_, i) => (i === 0 ? "" : JSON.stringify({ text: "ü".repeat(i * 11) }))),
      vectors: Float32Array.from({ length: count * 3 }, (_, i) => i / 3),
      missing: [0, 3, 200]
    })
    for (const requestId of ["", "r", "ü".repeat(100)]) {
      for (const bytesMax of [1, 500, 1_000_000]) {
        const messages: Array<Record<string, unknown>> = []
        let pieces = 0
        for (let at = 0; at < count; pieces++) {
          const { buffer, next } = resultFrames(answer, at, bytesMax, requestId)
          const frames = framesIn(buffer)
          assert.isTrue(buffer.length <= bytesMax || frames.length === 1)
          assert.strictEqual(frames.length, next - at)
          for (const { message } of frames) messages.push(decoded(result, message))
          at = next
        }
        assert.strictEqual(pieces, bytesMax === 1 ? count : bytesMax === 500 ? pieces : 1)
        for (const [i, message] of messages.entries()) {
          assert.deepStrictEqual(message, {
            vector_id: answer.ids[i],
            score: answer.scores[i],
            metadata: Buffer.from(answer.metadata?.[i] || "{}"),
            ...(requestId === "" ? {} : { request_id: requestId }),
            vector: Array.from(answer.vectors?.subarray(i * 3, i * 3 + 3) ?? [])
          })
        }
      }
    }
    const [summary] = framesIn(summaryFrame("r", answer))
    assert.deepStrictEqual(decoded(result, summary?.message as Buffer), {
      request_id: "r",
      summary: { query_id: "q_1", total_results: count, partial: true, missing_partitions: [0, 3, 200], took_ms: 1.235 }
    })
  })

  it("have what was not asked for left out", () => {
    const { buffer } = resultFrames(answerOf(1), 0, 1_000, "")
    assert.deepStrictEqual(decoded(result, framesIn(buffer)[0]?.message as Buffer), { vector_id: "a", score: 1 })
    const [summary] = framesIn(summaryFrame("", answerOf(0, { tookMillis: 0 })))
    assert.deepStrictEqual(decoded(result, summary?.message as Buffer), { summary: { query_id: "q_1" } })
  })

  it("tell a fault as google.rpc.Status begins, and more", () => {
    const fault = faultOf(new Overloaded({ bound: "sessionsMax", retryAfterMillis: 5_000 }))
    const [frame] = framesIn(summaryFrame("r", fault))
    assert.deepStrictEqual(decoded(result, frame?.message as Buffer), {
      request_id: "r",
      summary: {
        error: {
          code: 8,
          message: "The bound sessionsMax is reached; nothing was done.",
          problem: "overloaded",
          field: "sessionsMax",
          retry_after_ms: 5_000
        }
      }
    })
    const all = { code: 13, message: "m", problem: "p", field: "f", expected: "e", got: "g" }
    const [whole] = framesIn(summaryFrame("", { ...all, retryAfterMillis: 1, serverRequestId: "s" }))
    const error = { ...all, retry_after_ms: 1, server_request_id: "s" }
    assert.deepStrictEqual(decoded(result, whole?.message as Buffer), { summary: { error } })
    assert.deepStrictEqual(Object.keys(type("ruvector.v1.SearchError").fields).sort(), Object.keys(error).sort())
  })
})

it("health is as its .proto has it", () => {
  const check = type("grpc.health.v1.HealthCheckRequest")
  assert.strictEqual(readHealthCheckRequest(Buffer.from(check.encode({ service: "a.B" }).finish())), "a.B")
  assert.strictEqual(readHealthCheckRequest(Buffer.alloc(0)), "")
  const names = { serving: "SERVING", notServing: "NOT_SERVING", serviceUnknown: "SERVICE_UNKNOWN" } as const
  for (const [ours, theirs] of Object.entries(names)) {
    const [frame] = framesIn(healthFrame(servingStatus[ours as keyof typeof names]))
    assert.deepStrictEqual(decoded(type("grpc.health.v1.HealthCheckResponse"), frame?.message as Buffer), {
      status: theirs
    })
  }
})

it("grpc-message is percent-encoded UTF-8, and never longer than a header may be", () => {
  assert.strictEqual(grpcMessage("all plain ~"), "all plain ~")
  assert.strictEqual(grpcMessage("100% ü\n\u{1f600}"), "100%25 %C3%BC%0A%F0%9F%98%80")
  assert.strictEqual(grpcMessage("\ud800"), "%EF%BF%BD")
  assert.isAtMost(grpcMessage("ü".repeat(100_000)).length, 8_192)
})
