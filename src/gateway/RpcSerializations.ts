/**
 * How RPC messages are written: as SchemaBinary, as NDJSON, and as the NDJSON that clients of the Effect 3 package
 * `@effect/rpc` read.
 *
 * Each is Effect's own, made fit for strangers: what cannot be read is answered, and the connection goes on; a payload
 * that is not what its call takes reaches the handler as the `InvalidInput` to fail with.
 */
import { Effect, Result, Schema, SchemaTransformation } from "effect"
import { type RpcMessage, RpcSerialization } from "effect/rpc"
import { InvalidInput } from "../protocol/Errors.ts"
import { describe, invalidInputOf } from "../protocol/Fields.ts"
import * as Limits from "../protocol/Limits.ts"
import { RuvectorRpcs } from "../protocol/Rpcs.ts"

export type Serialization = RpcSerialization.RpcSerialization["Service"]

export interface Options {
  /** Bytes of one message. */
  readonly messageBytesMax: number
  /** Whether what is decoded is all there is (a body), not a part of a stream (a connection). */
  readonly whole: boolean
}

export const schemaBinaryContentType = "application/vnd.effect.rpc+schema-binary"
export const ndjsonContentTypes: ReadonlyArray<string> = ["application/ndjson", "application/x-ndjson"]

export const schemaBinary = (options: Options): Effect.Effect<Serialization> =>
  RpcSerialization.RpcSerialization.pipe(
    Effect.provide(RpcSerialization.layerSchemaBinary({ maxFrameSize: options.messageBytesMax })),
    Effect.map((base) => forStrangers(base, options, "SchemaBinary frames of RPC messages"))
  )

export const ndjson = (options: Options): Effect.Effect<Serialization> =>
  Effect.sync(() => {
    const base = RpcSerialization.makeNdjson({ maxBufferSize: options.messageBytesMax })
    return forStrangers(
      { ...base, makeUnsafe: () => checkedLines(base, options) },
      options,
      "lines of JSON RPC messages"
    )
  })

/**
 * NDJSON for clients of `@effect/rpc` 0.76 (Effect 3). Requests, chunks, acknowledgements, interrupts and pings are the
 * same in both. Differences are in what a call ends with: a cause is a list in Effect 4 and a tree in Effect 3; a call
 * without a result has `null` in 4 and no value in 3.
 */
export const ndjsonEffect3 = (options: Options): Effect.Effect<Serialization> =>
  Effect.map(ndjson(options), (base) => ({
    ...base,
    contentType: "application/ndjson",
    makeUnsafe: () => {
      const parser = base.makeUnsafe()
      return {
        decode: parser.decode,
        encode: (message) => {
          const encoded = parser.encode(Array.isArray(message) ? message.map(asEffect3) : asEffect3(message))
          return typeof encoded === "string" ? ascii(encoded) : encoded
        }
      }
    }
  }))

/** Says what was expected and what came, as the defect that every call of that client is ended with. */
export class Unreadable extends Error {
  override readonly name = "InvalidInput"
  constructor(expected: string, got: string) {
    super(`Expected ${expected}, got ${got}.`)
  }
}

const forStrangers = (base: Serialization, options: Options, expected: string): Serialization => ({
  ...base,
  codecFor: arrivalsIn(base.codecFor),
  makeUnsafe: () => {
    let parser = base.makeUnsafe()
    return {
      encode: parser.encode,
      decode: (data) => {
        let messages: ReadonlyArray<unknown>
        try {
          messages = parser.decode(data)
        } catch (error) {
          // The parser may be of no use from here on, and holds a part of what could not be read.
          parser = base.makeUnsafe()
          if (error instanceof RpcSerialization.MaxBufferSizeExceeded || error instanceof Unreadable) throw error
          throw new Unreadable(expected, reasonOf(error).slice(0, 200))
        }
        if (options.whole && messages.length === 0) throw new Unreadable(expected, "no whole message")
        if (messages.length > Limits.batchItemsMax) {
          throw new Unreadable(`at most ${Limits.batchItemsMax} messages at once`, String(messages.length))
        }
        // That a client ends is told by its connection; one that said so and went on would be cut off.
        return messages.some(isEof) ? messages.filter((message) => !isEof(message)) : messages
      }
    }
  }
})

const reasonOf = (error: unknown): string => {
  const cause = error instanceof RpcSerialization.NdjsonDecodeError ? error.cause : error
  return cause instanceof Error ? cause.message : "something else"
}

const isEof = (message: unknown): boolean => (message as { readonly _tag: unknown })._tag === "Eof"

/** Messages of NDJSON, whose shape nothing but this has looked at. */
const checkedLines = (base: Serialization, options: Options): RpcSerialization.Parser => {
  const parser = base.makeUnsafe()
  return {
    encode: parser.encode,
    decode: (data) => {
      // A body's last line may go without its end.
      const text = options.whole && typeof data === "string" && !data.endsWith("\n") ? `${data}\n` : data
      return parser.decode(text).map(messageOf)
    }
  }
}

const messageOf = (value: unknown): unknown => {
  if (typeof value !== "object" || value === null || Array.isArray(value)) {
    throw new Unreadable("a message (an object)", describe(value))
  }
  const message = value as Readonly<Record<string, unknown>>
  switch (message["_tag"]) {
    case "Request": {
      const { headers = [], payload = null } = message
      if (!isId(message["id"])) throw new Unreadable("a string or number as id of a Request", describe(message["id"]))
      if (typeof message["tag"] !== "string") {
        throw new Unreadable("the name of a call as tag of a Request", describe(message["tag"]))
      }
      if (!Array.isArray(headers) || !headers.every(isHeader)) {
        throw new Unreadable("an array of pairs of strings as headers of a Request", describe(headers))
      }
      return { ...message, headers, payload }
    }
    case "Ack":
    case "Interrupt":
      if (isId(message["requestId"])) return message
      throw new Unreadable(`a string or number as requestId of ${message["_tag"]}`, describe(message["requestId"]))
    case "Ping":
    case "Eof":
      return message
    default:
      throw new Unreadable("Request, Ack, Interrupt or Ping as _tag of a message", describe(message["_tag"]))
  }
}

const isId = (id: unknown): boolean => typeof id === "string" || typeof id === "number"

const isHeader = (header: unknown): boolean =>
  Array.isArray(header) && header.length === 2 && typeof header[0] === "string" && typeof header[1] === "string"

const payloadSchemas: ReadonlySet<unknown> = new Set(
  Array.from(RuvectorRpcs.requests.values(), (rpc) => rpc.payloadSchema)
)

/**
 * Codecs that are `codecFor`'s own except for payloads: one that cannot be decoded arrives as an {@link InvalidInput}.
 * Left to the RPC server it would end as a defect, which names no field that a program could read.
 */
const arrivalsIn = (codecFor: RpcSerialization.CodecFor): RpcSerialization.CodecFor => {
  const arrivals: RpcSerialization.CodecFor = (schema) => {
    const codec = codecFor(schema)
    // The payloads of our group decode without services, and a server never encodes one. That a payload may be an
    // InvalidInput is what handlers look at first (RpcHandlers.ts): the group's own types cannot say it.
    return payloadSchemas.has(schema) ? (arrivalOf(codec as Schema.Codec<unknown, unknown>) as typeof codec) : codec
  }
  return arrivals
}

const arrivalOf = (codec: Schema.Codec<unknown, unknown>) => {
  const decode = Schema.decodeUnknownResult(codec, { reportInput: true, errors: "first", onExcessProperty: "error" })
  return Schema.Unknown.pipe(
    Schema.decodeTo(
      Schema.Unknown,
      SchemaTransformation.transform({
        decode: (input) => {
          const decoded = decode(input)
          return Result.isSuccess(decoded) ? decoded.success : invalidInputOf(decoded.failure.issue)
        },
        encode: (payload) => payload
      })
    )
  )
}

type Reason = Extract<RpcMessage.ExitEncoded<unknown, unknown>, { readonly _tag: "Failure" }>["cause"][number]

/** A cause as Effect 3 encodes it, of the kinds that a list of reasons comes to. */
type CauseTree =
  | { readonly _tag: "Empty" }
  | { readonly _tag: "Fail"; readonly error: unknown }
  | { readonly _tag: "Die"; readonly defect: unknown }
  | { readonly _tag: "Interrupt"; readonly fiberId: FiberId }
  | { readonly _tag: "Parallel"; readonly left: CauseTree; readonly right: CauseTree }

type FiberId =
  | { readonly _tag: "None" }
  | { readonly _tag: "Runtime"; readonly id: number; readonly startTimeMillis: 0 }

const asEffect3 = (message: unknown): unknown => {
  const response = message as RpcMessage.FromServerEncoded
  if (response._tag !== "Exit") return response
  const { exit, requestId } = response
  if (exit._tag === "Failure") {
    return { _tag: "Exit", requestId, exit: { _tag: "Failure", cause: causeTree(exit.cause) } }
  }
  // No call of ours succeeds with null, so null is the absence of a result.
  return exit.value === null ? { _tag: "Exit", requestId, exit: { _tag: "Success" } } : response
}

/** The tree form of a list of reasons. None caused another, as far as the list says: they stand side by side. */
export const causeTree = (reasons: ReadonlyArray<Reason>): CauseTree => {
  const [first, ...rest] = reasons.map(reasonTree)
  if (first === undefined) return { _tag: "Empty" }
  return rest.reduce<CauseTree>((left, right) => ({ _tag: "Parallel", left, right }), first)
}

const reasonTree = (reason: Reason): CauseTree => {
  if (reason._tag !== "Interrupt") return reason
  const { fiberId } = reason
  return {
    _tag: "Interrupt",
    fiberId: typeof fiberId === "number" ? { _tag: "Runtime", id: fiberId, startTimeMillis: 0 } : { _tag: "None" }
  }
}

/**
 * The same JSON in ASCII. Clients of Effect 3 decode each chunk of a body for itself, so that a character of several bytes
 * that falls on two chunks would be lost.
 */
const ascii = (json: string): string =>
  json.replace(/[\u0080-\uffff]/g, (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`)
