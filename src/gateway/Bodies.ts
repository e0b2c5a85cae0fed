/** Bodies of requests, read with a bound on their size, whole or compressed. */
import type { IncomingMessage } from "node:http"
import * as NodeHttpServerRequest from "@effect/platform-node/NodeHttpServerRequest"
import { Effect, Result } from "effect"
import type { HttpServerRequest } from "effect/http"
import type { SettingValues } from "../config.ts"
import { InvalidInput, TooLarge, UnsupportedMediaType } from "../protocol/Errors.ts"
import { decompress, encodingOf, encodings } from "./Decompression.ts"

export type BodyBounds = Pick<SettingValues, "maxBodyBytes" | "bodyRatioMax">

export type BodyError = TooLarge | UnsupportedMediaType | InvalidInput

/**
 * Reads a JSON body within its bounds and calls `done` once. A larger one is not read to its end: whoever answers closes
 * the connection.
 */
export const readJson = (
  message: IncomingMessage,
  bounds: BodyBounds,
  done: (body: Result.Result<unknown, BodyError>) => void
): void => {
  const type = message.headers["content-type"]
  if (type !== undefined && type !== "application/json" && !jsonType.test(type)) {
    return done(
      Result.fail(new UnsupportedMediaType({ expected: "content-type: application/json", got: type.slice(0, 80) }))
    )
  }
  readBytes(message, bounds, (body) => done(Result.flatMap(body, parse)))
}

/** The JSON body of a request that passed through Effect's router. */
export const json = (
  request: HttpServerRequest.HttpServerRequest,
  bounds: BodyBounds
): Effect.Effect<unknown, BodyError> =>
  Effect.callback((resume) => readJson(messageOf(request), bounds, (body) => resume(Effect.fromResult(body))))

/** The bytes of its body. */
export const bytes = (
  request: HttpServerRequest.HttpServerRequest,
  bounds: BodyBounds
): Effect.Effect<Buffer, BodyError> =>
  Effect.callback((resume) => readBytes(messageOf(request), bounds, (body) => resume(Effect.fromResult(body))))

const messageOf = (request: HttpServerRequest.HttpServerRequest): IncomingMessage =>
  NodeHttpServerRequest.toIncomingMessage(request) as IncomingMessage

/** The bytes of a body, decompressed where it is compressed. */
export const readBytes = (
  message: IncomingMessage,
  { maxBodyBytes, bodyRatioMax }: BodyBounds,
  done: (body: Result.Result<Buffer, BodyError>) => void
): void => {
  const encoding = encodingOf(message.headers["content-encoding"])
  if (encoding === null) {
    const expected = `a body that is not encoded, or by one of ${encodings.join(", ")}`
    const got = message.headers["content-encoding"]?.slice(0, 80) ?? ""
    return done(Result.fail(new UnsupportedMediaType({ expected, got })))
  }
  const tooLarge = () => {
    message.pause()
    done(Result.fail(new TooLarge({ what: "body", limitBytes: maxBodyBytes })))
  }
  if (Number(message.headers["content-length"] ?? 0) > maxBodyBytes) return tooLarge()
  let first: Buffer | undefined
  let more: Array<Buffer> | undefined
  let bytes = 0
  const onData = (chunk: Buffer) => {
    bytes += chunk.length
    if (bytes > maxBodyBytes) {
      stop()
      return tooLarge()
    }
    if (first === undefined) first = chunk
    else if (more === undefined) more = [first, chunk]
    else more.push(chunk)
  }
  const onEnd = () => {
    stop()
    const body = more === undefined ? (first ?? Buffer.alloc(0)) : Buffer.concat(more)
    if (encoding === undefined) return done(Result.succeed(body))
    decompress(body, encoding, { bytesMax: maxBodyBytes, ratioMax: bodyRatioMax }, done)
  }
  const onCut = () => {
    stop()
    const got = "a connection cut in the middle of it"
    done(Result.fail(new InvalidInput({ field: "", expected: "a whole body", got })))
  }
  const stop = () => {
    message.off("data", onData)
    message.off("end", onEnd)
    message.off("error", onCut)
    message.off("close", onCut)
  }
  message.on("data", onData)
  message.on("end", onEnd)
  message.on("error", onCut)
  message.on("close", onCut)
}

const jsonType = /^application\/(?:[a-z0-9.+-]+\+)?json\s*(?:;|$)/i

const utf8 = new TextDecoder("utf-8", { fatal: true })

const parse = (body: Buffer): Result.Result<unknown, InvalidInput> => {
  try {
    // `toString` is fast and lenient; only text it had to mend is looked at by the strict decoder.
    const text = body.toString("utf8")
    return Result.succeed(JSON.parse(text.includes("\ufffd") ? utf8.decode(body) : text))
  } catch (error) {
    const got = body.length === 0 ? "an empty body" : (error as Error).message.slice(0, 120)
    return Result.fail(new InvalidInput({ field: "", expected: "a JSON body in UTF-8", got }))
  }
}
