/**
 * The fields that requests are made of, each checked against its bound while it is decoded. A vector becomes a
 * `Float32Array` in one pass; metadata and filters stay JSON.
 */
import { Effect, Result, Schema, SchemaIssue, SchemaTransformation } from "effect"
import { InvalidInput } from "./Errors.ts"
import { checkFilter } from "./Filter.ts"
import * as Limits from "./Limits.ts"

const invalid = (message: string, input: unknown) =>
  new SchemaIssue.InvalidValue({ message }, input, { reportInput: true })

const Float32 = Schema.instanceOf(Float32Array<ArrayBufferLike>)

const vectorFromNumbers = (input: unknown): Effect.Effect<Float32Array, SchemaIssue.Issue> => {
  const expected = `an array of 1 to ${Limits.dimensionsMax} finite numbers`
  if (input instanceof Float32Array && input.length > 0 && input.length <= Limits.dimensionsMax) {
    const at = input.findIndex((value) => !Number.isFinite(value))
    if (at === -1) return Effect.succeed(input)
    return Effect.fail(new SchemaIssue.Pointer([at], invalid("a finite float32 number", input[at])))
  }
  if (!Array.isArray(input) || input.length === 0 || input.length > Limits.dimensionsMax) {
    return Effect.fail(invalid(expected, Array.isArray(input) ? `an array of ${input.length}` : input))
  }
  const out = new Float32Array(input.length)
  for (let i = 0; i < out.length; i++) {
    const value: unknown = input[i]
    // A number beyond float32 becomes an infinity on assignment, so what is checked is what is kept.
    if (typeof value !== "number")
      return Effect.fail(new SchemaIssue.Pointer([i], invalid("a finite float32 number", value)))
    out[i] = value
    if (!Number.isFinite(out[i]))
      return Effect.fail(new SchemaIssue.Pointer([i], invalid("a finite float32 number", value)))
  }
  return Effect.succeed(out)
}

/** JSON array of numbers (or float32s already) <-> `Float32Array`. */
export const VectorFromNumbers = Schema.Unknown.pipe(
  Schema.decodeTo(
    Float32,
    SchemaTransformation.transformEffect({
      decode: vectorFromNumbers,
      encode: (vector) => Effect.succeed<unknown>(Array.from(vector))
    })
  )
)

/** Little-endian float32 bytes -> vector; `undefined` unless they are 1 to `dimensionsMax` finite numbers. */
export const vectorFromBytes = (bytes: Uint8Array): Float32Array | undefined => {
  if (bytes.length === 0 || bytes.length % 4 !== 0 || bytes.length > Limits.dimensionsMax * 4) return undefined
  const vector = new Float32Array(bytes.length / 4)
  new Uint8Array(vector.buffer).set(bytes)
  return vector.every(Number.isFinite) ? vector : undefined
}

/** The bytes of a vector, little-endian float32 (every platform Node runs on is little-endian). */
export const vectorToBytes = (vector: Float32Array): Uint8Array =>
  new Uint8Array(vector.buffer, vector.byteOffset, vector.byteLength)

const vectorBytesExpected = `little-endian float32 bytes of 1 to ${Limits.dimensionsMax} finite numbers`

/** Little-endian float32 bytes <-> `Float32Array`: the form of vectors between our processes and in RPC. */
export const VectorFromBytes = Schema.Uint8Array.pipe(
  Schema.decodeTo(
    Float32,
    SchemaTransformation.transformEffect({
      decode: (bytes) => {
        const vector = vectorFromBytes(bytes)
        return vector === undefined
          ? Effect.fail(invalid(vectorBytesExpected, `${bytes.length} bytes`))
          : Effect.succeed(vector)
      },
      encode: (vector) => Effect.succeed(vectorToBytes(vector))
    })
  )
)

/** A copy in a buffer of its own. Not `bytes.slice()`: of a Node `Buffer` that is a view of the same, larger one. */
const copied = (bytes: Uint8Array): ArrayBufferLike => Uint8Array.prototype.slice.call(bytes).buffer

/** Any number of float32s <-> their little-endian bytes: scores, and vectors that are answers. */
export const Float32FromBytes = Schema.Uint8Array.pipe(
  Schema.decodeTo(
    Float32,
    SchemaTransformation.transform({
      decode: (bytes): Float32Array => new Float32Array(copied(bytes), 0, Math.trunc(bytes.length / 4)),
      encode: vectorToBytes
    })
  )
)

/** base64url of little-endian float32 bytes <-> `Float32Array`: the form of vectors in query strings. */
export const VectorFromBase64Url = Schema.String.pipe(
  Schema.decodeTo(
    Float32,
    SchemaTransformation.transformEffect({
      decode: (text) => {
        const vector = /^[A-Za-z0-9_-]+={0,2}$/.test(text) ? vectorFromBytes(Buffer.from(text, "base64url")) : undefined
        return vector === undefined
          ? Effect.fail(invalid(`base64url of ${vectorBytesExpected}`, text))
          : Effect.succeed(vector)
      },
      encode: (vector) => Effect.succeed(Buffer.from(vectorToBytes(vector)).toString("base64url"))
    })
  )
)

const loneSurrogate = /\p{Surrogate}/u
const utf8Bytes = (text: string): number => Buffer.byteLength(text, "utf8")

/** A vector's id: 1 to `idBytesMax` bytes of UTF-8, no control characters. */
export const VectorId = Schema.String.check(
  Schema.makeFilter((id: string) => id.length > 0 && utf8Bytes(id) <= Limits.idBytesMax && !controlOrBroken(id), {
    expected: `a string of 1 to ${Limits.idBytesMax} bytes of UTF-8 without control characters`
  })
)

const controlOrBroken = (text: string): boolean => {
  for (let i = 0; i < text.length; i++) {
    const code = text.charCodeAt(i)
    if (code < 0x20 || code === 0x7f) return true
    if (code >= 0xd800 && code <= 0xdfff && loneSurrogate.test(text)) return true
  }
  return false
}

const collectionPattern = /^[A-Za-z0-9][A-Za-z0-9_.-]*$/

export const CollectionName = Schema.String.check(
  Schema.makeFilter((name: string) => name.length <= Limits.collectionNameCharsMax && collectionPattern.test(name), {
    expected: `a name of 1 to ${Limits.collectionNameCharsMax} characters of A-Z a-z 0-9 _ . - beginning with a letter or digit`
  })
)

const storedPattern = /^(?:[a-z0-9-]+:)?[A-Za-z0-9][A-Za-z0-9_.-]*$/

/** The name of a collection inside: the client's, behind its tenant's (`Tenant.ts`). Never a client's word. */
export const StoredCollectionName = Schema.String.check(
  Schema.makeFilter(
    (name: string) =>
      name.length <= Limits.tenantCharsMax + 1 + Limits.collectionNameCharsMax && storedPattern.test(name),
    { expected: "the name of a collection, as it is stored" }
  )
)

export const defaultCollection = "default"

export const Metric = Schema.Literals(["cosine", "l2", "ip"])
export type Metric = typeof Metric.Type

/**
 * How a collection keeps its vectors in memory, where they need not be as they were inserted: as bfloat16, as bytes, or as
 * product-quantised codes alone. Answers have exact scores and exact vectors whatever it is.
 */
export const Quantization = Schema.Literals(["none", "bf16", "i8", "pq"])
export type Quantization = typeof Quantization.Type

export const integer = (minimum: number, maximum: number) =>
  Schema.Number.check(
    Schema.makeFilter((n: number) => Number.isInteger(n) && n >= minimum && n <= maximum, {
      expected: `an integer from ${minimum} to ${maximum}`
    })
  )

export const Dimensions = integer(1, Limits.dimensionsMax)
export const Partitions = integer(1, Limits.partitionsMax)
export const K = integer(1, Limits.kMax)
export const StandingK = integer(1, Limits.standingMembersMax)
export const Ef = integer(1, Limits.efMax)
export const HnswM = integer(2, 128)
export const HnswEfConstruction = integer(8, 2_000)
export const NoticeMillis = integer(0, Limits.noticeMillisMax)
export const DeadlineMillis = integer(1, Limits.deadlineMillisMax)
export const Credits = integer(0, Limits.creditsMax)

/** A label given by a client: a request's id, a session's. Printable, bounded. */
export const ClientId = Schema.String.check(
  Schema.makeFilter((id: string) => id.length > 0 && id.length <= Limits.clientIdCharsMax && !controlOrBroken(id), {
    expected: `a string of 1 to ${Limits.clientIdCharsMax} characters`
  })
)

/** How durable a write is when it is acknowledged. */
export const Ack = Schema.Literals(["memory", "warm", "cold"])
export type Ack = typeof Ack.Type

export type Json = Schema.Json
export type Metadata = { readonly [key: string]: Json }

const depthOver = (value: unknown, levels: number): boolean => {
  if (typeof value !== "object" || value === null) return false
  if (levels === 0) return true
  if (Array.isArray(value)) return value.some((item) => depthOver(item, levels - 1))
  return Object.values(value).some((item) => depthOver(item, levels - 1))
}

/** Why a value is no metadata, or `undefined` where it is. Bounds: `metadataBytesMax`, `nestingMax`. */
const metadataFault = (value: unknown): string | undefined => {
  if (typeof value !== "object" || value === null || Array.isArray(value)) return "a JSON object"
  if (depthOver(value, Limits.nestingMax)) return `at most ${Limits.nestingMax} levels of nesting`
  if (utf8Bytes(JSON.stringify(value)) > Limits.metadataBytesMax)
    return `at most ${Limits.metadataBytesMax} bytes of JSON`
  return undefined
}

/** A JSON object of at most `metadataBytesMax` bytes and `nestingMax` levels. */
export const MetadataObject = Schema.Unknown.pipe(
  Schema.decodeTo(
    Schema.declare((u): u is Metadata => typeof u === "object" && u !== null),
    SchemaTransformation.transformEffect({
      decode: (input: unknown) => {
        const fault = metadataFault(input)
        return fault === undefined ? Effect.succeed(input as Metadata) : Effect.fail(invalid(fault, input))
      },
      encode: (metadata) => Effect.succeed<unknown>(metadata)
    })
  )
)

/** A JSON value of at most so many bytes and `nestingMax` levels. The check says that it is one, which its type cannot follow. */
export const Json = (bytesMax: number): Schema.Codec<Json> =>
  Schema.Unknown.check(
    Schema.makeFilter((value: unknown) => isJsonWithin(value, bytesMax), {
      expected: `a JSON value of at most ${bytesMax} bytes and ${Limits.nestingMax} levels`
    })
  ) as unknown as Schema.Codec<Json>

const isJsonWithin = (value: unknown, bytesMax: number): boolean => {
  if (depthOver(value, Limits.nestingMax)) return false
  // `undefined` where it is no value of JSON.
  const text = JSON.stringify(value) as string | undefined
  if (text === undefined || text.length > bytesMax) return false
  return text.length * utf8BytesOfUnitMax <= bytesMax || utf8Bytes(text) <= bytesMax
}

/** Bytes of UTF-8 that one unit of UTF-16 takes at most. */
const utf8BytesOfUnitMax = 3

/** A filter in the contract's JSON form (see `Filter.ts`). */
export const FilterObject = Schema.Unknown.pipe(
  Schema.decodeTo(
    Schema.declare((u): u is Metadata => typeof u === "object" && u !== null),
    SchemaTransformation.transformEffect({
      decode: (input: unknown) => {
        const fault = checkFilter(input)
        if (fault === undefined) return Effect.succeed(input as Metadata)
        const issue = invalid(fault.expected, fault.got)
        return Effect.fail(fault.path.length === 0 ? issue : new SchemaIssue.Pointer(fault.path, issue))
      },
      encode: (filter) => Effect.succeed<unknown>(filter)
    })
  )
)

/** What a record's parts a search or read brings along. */
export const Include = Schema.Array(Schema.Literals(["metadata", "vector"])).check(
  Schema.makeFilter((parts: ReadonlyArray<string>) => parts.length <= 2, { expected: "metadata, vector, or both" })
)

/**
 * A decoder whose failure is an {@link InvalidInput} that names the field. `root` prefixes the field's path.
 */
export const decoderOf = <S extends Schema.ConstraintDecoder<unknown>>(
  schema: S,
  root = ""
): ((input: unknown) => Result.Result<S["Type"], InvalidInput>) => {
  const decode = Schema.decodeUnknownResult(schema, { reportInput: true, errors: "first", onExcessProperty: "error" })
  return (input) => Result.mapError(decode(input), (error) => invalidInputOf(error.issue, root))
}

/** The first fault of a decoding, as the contract's error. */
export const invalidInputOf = (issue: SchemaIssue.Issue, root = ""): InvalidInput => {
  let path = root
  let expected = ""
  let at: SchemaIssue.Issue = issue
  let got: unknown = SchemaIssue.hasInput(issue) ? issue.input : undefined
  let known = SchemaIssue.hasInput(issue)
  for (;;) {
    if (SchemaIssue.hasInput(at)) {
      got = at.input
      known = true
    }
    switch (at._tag) {
      case "Pointer":
        for (const key of at.path) {
          path += typeof key === "number" ? `[${key}]` : path === "" ? String(key) : `.${String(key)}`
          if (known && typeof got === "object" && got !== null) got = (got as Record<PropertyKey, unknown>)[key]
        }
        at = at.issue
        continue
      case "Filter":
        expected = at.filter.annotations?.["expected"]?.toString() ?? expected
        if (at.issue._tag === "Pointer" || expected === "") {
          at = at.issue
          continue
        }
        return new InvalidInput({ field: path, expected, got: describe(got) })
      case "Encoding":
        at = at.issue
        continue
      case "Composite": {
        at = at.issues[0]
        continue
      }
      case "AnyOf": {
        const inner = at.issues[0]
        if (inner === undefined) return new InvalidInput({ field: path, expected: expectedOf(at), got: describe(got) })
        if (at.issues.length > 1) return new InvalidInput({ field: path, expected: expectedOf(at), got: describe(got) })
        at = inner
        continue
      }
      case "MissingKey":
        return new InvalidInput({ field: path, expected: "a value", got: "nothing" })
      case "UnexpectedKey":
        return new InvalidInput({ field: path, expected: "no such field", got: describe(got) })
      case "InvalidValue":
        return new InvalidInput({
          field: path,
          expected: at.annotations?.message?.toString() ?? (expected === "" ? expectedOf(at) : expected),
          got: describe(got)
        })
      default:
        return new InvalidInput({ field: path, expected: expectedOf(at), got: describe(got) })
    }
  }
}

const formatIssue = SchemaIssue.makeFormatterDefault()

const expectedOf = (issue: SchemaIssue.Issue): string => {
  const text = formatIssue(issue).split("\n")[0] ?? ""
  const match = /^Expected (.*?)(?:, (?:got|actual) .*)?$/.exec(text)
  return match?.[1] ?? text
}

const gotCharsMax = 80

/** What came, for people: short, one line, never the whole of a large value. */
export const describe = (value: unknown): string => {
  if (value === undefined) return "nothing"
  if (typeof value === "number" || typeof value === "boolean" || value === null) return String(value)
  if (typeof value === "string")
    return value.length > gotCharsMax ? `${JSON.stringify(value.slice(0, gotCharsMax))}...` : value
  if (Array.isArray(value)) return `an array of ${value.length}`
  if (typeof value === "object") return "an object"
  return typeof value
}
