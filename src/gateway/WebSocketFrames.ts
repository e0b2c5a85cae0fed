/**
 * From the bytes of a WebSocket message to the frame it is, and from events to the bytes of frames. A search is most of what
 * comes, so one made of the usual fields is checked by hand; whatever that does not know goes to the schema, which names
 * what is wrong with it.
 */
import { Result, Schema } from "effect"
import { InvalidInput } from "../protocol/Errors.ts"
import { ClientId, decoderOf, describe } from "../protocol/Fields.ts"
import { CancelFrame, CloseFrame, CreditFrame, InsertFrame, PingFrame, SearchFrame } from "../protocol/Frames.ts"
import * as Limits from "../protocol/Limits.ts"

/** A JSON object of which no more is known yet. */
export type Frame = Readonly<Record<string, unknown>>

export const decodeText = (data: Buffer): Result.Result<Frame, InvalidInput> => {
  try {
    const value: unknown = JSON.parse(data.toString("utf8"))
    if (typeof value !== "object" || value === null || Array.isArray(value)) return Result.fail(notAnObject(value))
    return Result.succeed(value as Frame)
  } catch (error) {
    return Result.fail(
      new InvalidInput({ field: "", expected: "a JSON frame", got: (error as Error).message.slice(0, 120) })
    )
  }
}

const notAnObject = (got: unknown) => new InvalidInput({ field: "", expected: "a JSON object", got: describe(got) })

/** A binary frame as the text frame it stands for, its vectors as typed arrays. */
export const decodeBinary = (data: Buffer): Result.Result<Frame, InvalidInput> => {
  const fault = (expected: string, got: string) => Result.fail(new InvalidInput({ field: "", expected, got }))
  if (data.length < 4) return fault("a binary frame: length, JSON, vectors", `${data.length} bytes`)
  const length = data.readUInt32LE(0)
  if (length > data.length - 4)
    return fault(`${length} bytes of JSON, as the frame's length says`, `${data.length - 4} bytes`)
  return Result.flatMap(decodeText(data.subarray(4, 4 + length)), (frame) => {
    const bytes = data.subarray(4 + ((length + 3) & ~3))
    if (bytes.length % 4 !== 0) return fault("whole float32s after the JSON", `${bytes.length} bytes`)
    const floats = new Float32Array(bytes.length / 4)
    Buffer.from(floats.buffer).set(bytes)
    if (typeof frame["type"] === "string" && searching.has(frame["type"]))
      return Result.succeed({ ...frame, query: floats })
    const vectors = frame["vectors"]
    if (frame["type"] !== "insert" || !Array.isArray(vectors) || vectors.length === 0) {
      return floats.length === 0
        ? Result.succeed(frame)
        : fault("vectors only with a search or an insert", `${floats.length} numbers`)
    }
    if (floats.length % vectors.length !== 0) {
      return fault(`numbers for ${vectors.length} vectors of one length`, `${floats.length} numbers`)
    }
    const dimensions = floats.length / vectors.length
    return Result.succeed({
      ...frame,
      vectors: vectors.map((item: unknown, i) => ({
        ...(typeof item === "object" ? item : {}),
        vector: floats.slice(i * dimensions, (i + 1) * dimensions)
      }))
    })
  })
}

/** Types of frames whose vector is their `query`. */
const searching: ReadonlySet<string> = new Set(["search", "subscribe", "resume"])

/** Members that each answer to a frame carries: its id, where it has one that can be given back. */
export const envelopeOf = (frame: Frame): string => {
  const { id } = frame
  return typeof id === "string" && id.length <= Limits.clientIdCharsMax ? `,"id":${JSON.stringify(id)}` : ""
}

export const decodeInsert = decoderOf(InsertFrame)
export const decodeCancel = decoderOf(CancelFrame)
export const decodePing = decoderOf(PingFrame)
export const decodeClose = decoderOf(CloseFrame)
export const decodeCredit = decoderOf(CreditFrame)

/** The session that a frame names, whatever else it says. */
export const decodeLabel = (frame: Frame) => decodeSession("session" in frame ? { session: frame["session"] } : {})

const decodeSession = decoderOf(Schema.Struct({ session: Schema.optionalKey(ClientId) }))

export const decodeSearch = (frame: Frame): Result.Result<SearchFrame, InvalidInput> => {
  const usual = usualSearch(frame)
  return usual === undefined ? decodeBySchema(frame) : Result.succeed(usual)
}

const decodeBySchema = decoderOf(SearchFrame)

/** A search of the usual fields, all as they should be; `undefined` for any other, right or wrong. */
const usualSearch = (frame: Frame): SearchFrame | undefined => {
  const search: Record<string, unknown> = {}
  for (const key in frame) {
    const value = frame[key]
    switch (key) {
      case "type":
        break
      case "id":
      case "session":
        if (typeof value !== "string" || !isPlain(value, Limits.clientIdCharsMax)) return undefined
        break
      case "stream":
        if (typeof value !== "boolean") return undefined
        break
      case "collection":
        if (typeof value !== "string" || value.length > Limits.collectionNameCharsMax || !plainName.test(value))
          return undefined
        break
      case "k":
        if (!isWithin(value, Limits.kMax)) return undefined
        break
      case "ef":
        if (!isWithin(value, Limits.efMax)) return undefined
        break
      case "deadline_ms":
        if (!isWithin(value, Limits.deadlineMillisMax)) return undefined
        break
      case "query": {
        const vector = Array.isArray(value) ? vectorOf(value) : undefined
        if (vector === undefined) return undefined
        search[key] = vector
        continue
      }
      default:
        return undefined
    }
    search[key] = value
  }
  return search as unknown as SearchFrame
}

const plainName = /^[A-Za-z0-9][A-Za-z0-9_.-]*$/

const isWithin = (value: unknown, maximum: number): boolean =>
  Number.isInteger(value) && (value as number) >= 1 && (value as number) <= maximum

/** Whether it is printable ASCII of 1 to so many characters. */
const isPlain = (text: string, charsMax: number): boolean => {
  if (text.length === 0 || text.length > charsMax) return false
  for (let i = 0; i < text.length; i++) {
    const code = text.charCodeAt(i)
    if (code < 0x20 || code > 0x7e) return false
  }
  return true
}

const vectorOf = (values: ReadonlyArray<unknown>): Float32Array | undefined => {
  if (values.length === 0 || values.length > Limits.dimensionsMax) return undefined
  const vector = new Float32Array(values.length)
  for (let i = 0; i < vector.length; i++) {
    const value = values[i]
    if (typeof value !== "number") return undefined
    vector[i] = value
    if (!Number.isFinite(vector[i])) return undefined
  }
  return vector
}

/**
 * Texts as unmasked WebSocket frames, one after the other in one buffer: one copy and one write for all events of a turn
 * of the event loop.
 */
export const encodeTexts = (texts: ReadonlyArray<string>): Buffer => {
  let size = 0
  const lengths = new Array<number>(texts.length)
  for (let i = 0; i < texts.length; i++) {
    const length = Buffer.byteLength(texts[i] as string)
    lengths[i] = length
    size += headBytes(length) + length
  }
  const buffer = Buffer.allocUnsafe(size)
  let at = 0
  for (let i = 0; i < texts.length; i++) {
    const length = lengths[i] as number
    buffer[at] = wholeText
    if (length < 126) buffer[at + 1] = length
    else if (length < 65_536) {
      buffer[at + 1] = 126
      buffer.writeUInt16BE(length, at + 2)
    } else {
      buffer[at + 1] = 127
      buffer.writeBigUInt64BE(BigInt(length), at + 2)
    }
    at += headBytes(length)
    at += buffer.write(texts[i] as string, at)
  }
  return buffer
}

/** First byte of a frame that is a whole text message. */
const wholeText = 0x81

const headBytes = (length: number): number => (length < 126 ? 2 : length < 65_536 ? 4 : 10)
