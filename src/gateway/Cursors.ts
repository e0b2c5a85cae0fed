/**
 * Cursors: what an event carries, so that its stream is gone on with after it, on any node and after any time. Opaque and
 * authenticated: bound to who was given it and to what it was given for, which are not in it, so that another's, or one
 * for something else, is as good as a forged one, and the difference is not told.
 *
 * Text: base64url of a format byte, the first 16 bytes of AMAC with SHA-512/256 (Bellare, Bernstein, Tessaro, 2016: the hash
 * of key and message, cut) over binding and payload, and the payload. Each event of each subscription has one, and HMAC
 * takes two hashes for it. The payload is by partition the position in its log; of a standing query also its members, each as 48 bits of a keyed hash
 * of its id and 32 bits of one of its version and score.
 */
import { createHmac, createSecretKey, hash, randomBytes, timingSafeEqual } from "node:crypto"
import { crc32 } from "node:zlib"
import { Context, Effect, Layer } from "effect"
import { Settings } from "../config.ts"
import { type ChangePosition, endOfObject } from "../protocol/IndexPartition.ts"
import { cursorCharsMax } from "../protocol/Limits.ts"
import { ObjectStore, type StoreFailure } from "../tiers/ObjectStore.ts"

/** Who and what cursors are for, digested. */
export type Binding = Uint8Array

/** What is hashed of a member. */
export interface CursorMember {
  readonly id: string
  readonly version: string
  readonly score: number
}

/** Members of an answer that was given before: by the hash of their id, the hash of what was sent of them. */
export type KnownMembers = ReadonlyMap<number, number>

export class Cursors extends Context.Service<
  Cursors,
  {
    /** `parts`: kind of stream, whose, and of what. */
    readonly binding: (parts: ReadonlyArray<string>) => Binding
    readonly ofFeed: (binding: Binding, positions: ReadonlyArray<ChangePosition>) => string
    readonly ofAnswer: (
      binding: Binding,
      positions: ReadonlyArray<number>,
      members: ReadonlyArray<CursorMember>
    ) => string
    /** `undefined` where the text is no cursor of this binding. */
    readonly readFeed: (binding: Binding, text: string) => ReadonlyArray<ChangePosition> | undefined
    readonly readAnswer: (
      binding: Binding,
      text: string
    ) => { readonly positions: ReadonlyArray<number>; readonly members: KnownMembers } | undefined
    readonly idHash: (id: string) => number
    readonly stateHash: (member: CursorMember) => number
    /** 22 characters that say that a text is ours. */
    readonly sign: (text: string) => string
    readonly isSigned: (text: string, signature: string) => boolean
  }
>()("ruvector/gateway/Cursors") {
  /** With the secret of the settings, else with one that all nodes of the object store share. */
  static readonly layer = Layer.effect(
    Cursors,
    Effect.gen(function* () {
      const { cursorSecret } = yield* Settings
      return make(cursorSecret === "" ? yield* sharedSecret : hash("sha256", cursorSecret, "buffer"))
    })
  )
}

/** Where the secret lies that was made for all nodes of a store. */
export const secretKey = "cursor-secret"

const secretBytes = 32

/** Made once: whoever comes second reads the first one's. */
const sharedSecret: Effect.Effect<Buffer, StoreFailure, ObjectStore> = Effect.gen(function* () {
  const store = yield* ObjectStore
  const read = Effect.map(store.get(secretKey), ({ body }) => Buffer.from(body))
  return yield* Effect.catchTag(read, "ObjectMissing", () =>
    Effect.andThen(
      Effect.catchTag(
        Effect.asVoid(store.create(secretKey, randomBytes(secretBytes))),
        "ObjectExists",
        () => Effect.void
      ),
      Effect.catchTag(read, "ObjectMissing", (error) => Effect.die(error))
    )
  )
}).pipe(Effect.retry({ times: 3 }))

const format = 2
const macBytes = 16
const headBytes = 1 + macBytes
const memberBytes = 10

const make = (secret: Buffer): Cursors["Service"] => {
  /** One key for each use. */
  const keyFor = (use: string) => createHmac("sha256", secret).update(use).digest()
  const macOf = amacSha512(keyFor("cursor"))
  const signKey = createSecretKey(keyFor("text"))
  const idSalt = keyFor("id").toString("base64url")
  const members = new WeakMap<CursorMember, { readonly id: number; readonly state: number }>()

  const seal = (binding: Binding, writer: Writer): string => {
    const bytes = writer.bytes()
    bytes[0] = format
    bytes.write(macOf(binding, bytes, headBytes), 1, macBytes, "latin1")
    return bytes.toString("base64url")
  }

  const unseal = (binding: Binding, text: string): Buffer | undefined => {
    if (text.length > cursorCharsMax || !/^[A-Za-z0-9_-]+$/.test(text)) return undefined
    const bytes = Buffer.from(text, "base64url")
    // Bits of the last character that say nothing make no other cursor.
    if (bytes.length < headBytes || bytes[0] !== format || bytes.toString("base64url") !== text) return undefined
    const payload = bytes.subarray(headBytes)
    const right = Buffer.from(macOf(binding, bytes, headBytes), "latin1").subarray(0, macBytes)
    return timingSafeEqual(right, bytes.subarray(1, headBytes)) ? payload : undefined
  }

  /** Of the ids that came last: one record is a member of many answers, as another object in each. */
  const idHashes = new Map<string, number>()
  const idHash = (id: string): number => {
    const known = idHashes.get(id)
    if (known !== undefined) return known
    const made = hash("sha256", idSalt + id, "buffer").readUIntBE(0, 6)
    if (idHashes.size >= idHashesMax) idHashes.clear()
    idHashes.set(id, made)
    return made
  }
  const stateHash = ({ version, score }: CursorMember): number => crc32(`${version} ${score}`)
  const hashesOf = (member: CursorMember) => {
    const known = members.get(member)
    if (known !== undefined) return known
    const made = { id: idHash(member.id), state: stateHash(member) }
    members.set(member, made)
    return made
  }

  const sign = (text: string): string =>
    createHmac("sha256", signKey).update(text).digest().subarray(0, macBytes).toString("base64url")

  return Cursors.of({
    binding: (parts) => hash("sha256", JSON.stringify(parts), "buffer"),
    ofFeed: (binding, positions) => {
      const writer = new Writer(positions.length * 16)
      writer.integer(positions.length)
      for (const { seq, index } of positions) {
        writer.integer(seq)
        // Before an object's first change, after all of them, after one of them.
        writer.integer(index === endOfObject ? 1 : index === -1 ? 0 : index + 2)
      }
      return seal(binding, writer)
    },
    ofAnswer: (binding, positions, answer) => {
      const writer = new Writer(positions.length * 8 + answer.length * memberBytes)
      writer.integer(positions.length)
      for (const seq of positions) writer.integer(seq)
      for (const member of answer) {
        const { id, state } = hashesOf(member)
        writer.fixed(id, 6)
        writer.fixed(state, 4)
      }
      return seal(binding, writer)
    },
    readFeed: (binding, text) => {
      const payload = unseal(binding, text)
      if (payload === undefined) return undefined
      const reader = new Reader(payload)
      return Array.from({ length: reader.integer() }, () => {
        const seq = reader.integer()
        const index = reader.integer()
        return { seq, index: index === 1 ? endOfObject : index === 0 ? -1 : index - 2 }
      })
    },
    readAnswer: (binding, text) => {
      const payload = unseal(binding, text)
      if (payload === undefined) return undefined
      const reader = new Reader(payload)
      const positions = Array.from({ length: reader.integer() }, () => reader.integer())
      const known = new Map<number, number>()
      while (reader.left >= memberBytes) {
        const id = reader.fixed(6)
        known.set(id, reader.fixed(4))
      }
      return { positions, members: known }
    },
    idHash,
    stateHash,
    sign,
    isSigned: (text, signature) => {
      const right = Buffer.from(sign(text))
      const given = Buffer.from(signature)
      return right.length === given.length && timingSafeEqual(right, given)
    }
  })
}

/** Ids whose hashes are kept. */
const idHashesMax = 4_096

/**
 * The hash of a key and of two parts, the second from a place on, as a text of its bytes: a buffer of the engine's for each
 * would cost as much again when it is collected. The key fills a block, so that all that is hashed after it depends on it.
 */
const amacSha512 = (key: Buffer): ((first: Uint8Array, second: Uint8Array, from: number) => string) => {
  const block = 128
  let all = Buffer.concat([key, Buffer.alloc(block - key.length + 1_024)])
  return (first, second, from) => {
    const length = block + first.length + second.length - from
    if (length > all.length) all = Buffer.concat([all.subarray(0, block), Buffer.alloc(length)])
    all.set(first, block)
    all.set(from === 0 ? second : second.subarray(from), block + first.length)
    return hash("sha512-256", all.subarray(0, length), "binary")
  }
}

/** A cursor's bytes, with room for its head. */
class Writer {
  readonly #buffer: Buffer
  #at = headBytes

  constructor(payloadMax: number) {
    this.#buffer = Buffer.allocUnsafe(headBytes + 8 + payloadMax)
  }

  /** LEB128, up to 2^53 - 1. */
  integer(value: number): void {
    let rest = value
    while (rest >= 128) {
      this.#buffer[this.#at++] = (rest % 128) | 128
      rest = Math.floor(rest / 128)
    }
    this.#buffer[this.#at++] = rest
  }

  fixed(value: number, bytes: number): void {
    this.#at = this.#buffer.writeUIntBE(value, this.#at, bytes)
  }

  bytes(): Buffer {
    return this.#buffer.subarray(0, this.#at)
  }
}

class Reader {
  readonly #buffer: Buffer
  #at = 0

  constructor(buffer: Buffer) {
    this.#buffer = buffer
  }

  get left(): number {
    return this.#buffer.length - this.#at
  }

  integer(): number {
    let value = 0
    for (let scale = 1; ; scale *= 128) {
      const byte = this.#buffer[this.#at++] ?? 0
      value += (byte & 127) * scale
      if (byte < 128) return value
    }
  }

  fixed(bytes: number): number {
    const value = this.#buffer.readUIntBE(this.#at, bytes)
    this.#at += bytes
    return value
  }
}
