/** JSON bodies of requests, read with a bound on their size. */
import type { IncomingMessage } from "node:http"
import { Result } from "effect"
import { InvalidInput, TooLarge, UnsupportedMediaType } from "../protocol/Errors.ts"

export type Body = Result.Result<unknown, TooLarge | UnsupportedMediaType | InvalidInput>

/**
 * Reads a JSON body of at most `maxBytes` and calls `done` once. A larger one is not read to its end: whoever answers
 * closes the connection.
 */
export const readJson = (message: IncomingMessage, maxBytes: number, done: (body: Body) => void): void => {
  const type = message.headers["content-type"]
  if (type !== undefined && type !== "application/json" && !jsonType.test(type)) {
    return done(
      Result.fail(new UnsupportedMediaType({ expected: "content-type: application/json", got: type.slice(0, 80) }))
    )
  }
  const encoding = message.headers["content-encoding"]
  if (encoding !== undefined && encoding !== "identity") {
    return done(
      Result.fail(new UnsupportedMediaType({ expected: "a body that is not encoded", got: encoding.slice(0, 80) }))
    )
  }
  const tooLarge = () => {
    message.pause()
    done(Result.fail(new TooLarge({ what: "body", limitBytes: maxBytes })))
  }
  if (Number(message.headers["content-length"] ?? 0) > maxBytes) return tooLarge()
  let first: Buffer | undefined
  let more: Array<Buffer> | undefined
  let bytes = 0
  const onData = (chunk: Buffer) => {
    bytes += chunk.length
    if (bytes > maxBytes) {
      stop()
      return tooLarge()
    }
    if (first === undefined) first = chunk
    else if (more === undefined) more = [first, chunk]
    else more.push(chunk)
  }
  const onEnd = () => {
    stop()
    done(parse(more === undefined ? (first ?? Buffer.alloc(0)) : Buffer.concat(more)))
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
