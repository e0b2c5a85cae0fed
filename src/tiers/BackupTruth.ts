/**
 * What a backup says that a collection was at a time, as the plainest map there is: built straight from the records files
 * and log segments, by nothing that a node or a restore goes through. A drill compares a restored node with it, `verify
 * --deep` reads everything by it.
 *
 * In memory whole: about the size of the collection's vectors.
 */
import { readFile } from "node:fs/promises"
import { crc32 } from "node:zlib"
import { Effect, Stream } from "effect"
import { compareVersions, type Version } from "../protocol/Version.ts"
import { BackupDamaged, type BackupRun } from "./BackupManifest.ts"
import { segmentsOf } from "./BackupReader.ts"
import { decodeSegment, type LogOp } from "./LogSegment.ts"
import { type ObjectStore, StoreFailure } from "./ObjectStore.ts"
import { planCollection } from "./Restore.ts"
import type { NotRestorable } from "./RestoredObjects.ts"

type Store = ObjectStore["Service"]

export interface TrueRecord {
  readonly vector: Float32Array
  /** JSON text of an object; empty for none. */
  readonly metadata: string
}

/** The visible records of a collection at a time, by id. */
export const truthOf = Effect.fnUntraced(function* (
  store: Store,
  run: BackupRun,
  uid: string,
  atMillis: number | undefined
): Effect.fn.Return<Map<string, TrueRecord>, BackupDamaged | NotRestorable | StoreFailure> {
  const one = run.collections.find(({ collection }) => collection.uid === uid)
  if (one === undefined) return new Map()
  const { parts } = yield* planCollection(store, run, one, atMillis)
  const at = atMillis === undefined ? 2n ** 64n : BigInt(atMillis) * 1_000_000n + 999_999n
  const visible = new Map<string, TrueRecord>()
  for (const { base, packs } of parts) {
    const registers = base === undefined ? new Registers() : yield* readRecordsObject(store, `${base.prefix}/records`)
    if (base !== undefined && registers.newest > at) {
      const object = `${base.prefix}/records`
      return yield* new BackupDamaged({ object, detail: "it has operations that its description does not reach to" })
    }
    yield* Stream.runForEach(segmentsOf(store, packs), ({ bytes }) =>
      Effect.sync(() => {
        for (const op of decodeSegment(bytes).ops) if (op.version.time <= at) registers.apply(op)
      })
    )
    for (const [id, record] of registers.visible()) visible.set(id, record)
  }
  return visible
})

/** Reads and checks a whole records file of a store (`docs/format-snapshot.md`). */
export const readRecordsObject = (store: Store, key: string): Effect.Effect<Registers, BackupDamaged | StoreFailure> =>
  store
    .withFile(key, (path) =>
      Effect.tryPromise({
        try: () => readFile(path),
        catch: (cause) => new StoreFailure({ operation: "read", key, detail: String(cause), uncertain: false })
      })
    )
    .pipe(
      Effect.catchTag("ObjectMissing", () => new BackupDamaged({ object: key, detail: "it is missing" })),
      Effect.flatMap((bytes) =>
        Effect.try({
          try: () => registersOf(bytes),
          catch: (cause) => new BackupDamaged({ object: key, detail: (cause as Error).message })
        })
      )
    )

/** Of each id the newest vector, metadata and deletion, each with its version. */
export class Registers {
  readonly #ids = new Map<string, Register>()
  /** Greatest version time seen. */
  newest = 0n

  apply(op: LogOp): void {
    switch (op.kind) {
      case "upsert":
        this.setVector(op.id, op.version, op.vector)
        return this.setMetadata(op.id, op.version, op.metadata)
      case "metadata":
        return this.setMetadata(op.id, op.version, op.metadata)
      case "delete":
        return this.setDeleted(op.id, op.version)
    }
  }

  setVector(id: string, version: Version, vector: Float32Array): void {
    const register = this.#of(id, version)
    if (isNewer(version, register.vector?.version)) register.vector = { version, value: vector }
  }

  setMetadata(id: string, version: Version, metadata: string): void {
    const register = this.#of(id, version)
    if (isNewer(version, register.metadata?.version)) register.metadata = { version, value: metadata }
  }

  setDeleted(id: string, version: Version): void {
    const register = this.#of(id, version)
    if (isNewer(version, register.deleted)) register.deleted = version
  }

  /** An id is visible where its vector is newer than its deletion; so is its metadata. */
  *visible(): Generator<readonly [string, TrueRecord]> {
    for (const [id, { vector, metadata, deleted }] of this.#ids) {
      if (vector === undefined || !isNewer(vector.version, deleted)) continue
      const text = metadata !== undefined && isNewer(metadata.version, deleted) ? metadata.value : ""
      yield [id, { vector: vector.value, metadata: text }]
    }
  }

  #of(id: string, { time }: Version): Register {
    if (time > this.newest) this.newest = time
    const found = this.#ids.get(id)
    if (found !== undefined) return found
    const made: Register = { vector: undefined, metadata: undefined, deleted: undefined }
    this.#ids.set(id, made)
    return made
  }
}

interface Register {
  vector: { readonly version: Version; readonly value: Float32Array } | undefined
  metadata: { readonly version: Version; readonly value: string } | undefined
  deleted: Version | undefined
}

const isNewer = (a: Version, b: Version | undefined): boolean => b === undefined || compareVersions(a, b) > 0

const headerBytes = 96
const magic = 0x54525652
const vectorsAlign = 64
const hasMetadataVersion = 1
const hasDeletion = 1
const hasOrphan = 2

/** Throws an `Error` that says what is wrong. */
const registersOf = (bytes: Buffer): Registers => {
  if (bytes.length < headerBytes) throw new Error(`${bytes.length} bytes, a header has ${headerBytes}`)
  if (bytes.readUInt32LE(0) !== magic) throw new Error("not a records file")
  if (bytes.readUInt32LE(64) !== crc32(bytes.subarray(0, 64))) throw new Error("its header's checksum differs")
  const dimensions = bytes.readUInt32LE(8)
  const count = bytes.readUInt32LE(24)
  const textEnd = bytes.readDoubleLE(48)
  let at = headerBytes
  const text = (length: number): string => {
    at += length
    return bytes.toString("utf8", at - length, at)
  }
  const regions = Array.from({ length: bytes.readUInt32LE(20) }, () => {
    const length = bytes.readUInt8(at)
    at += 9
    return text(length)
  })
  const version = (): Version => {
    const region = regions[bytes.readUInt16LE(at + 16)]
    if (region === undefined) throw new Error("a version of no known region")
    const read = { time: bytes.readBigUInt64LE(at), counter: bytes.readDoubleLE(at + 8), region }
    at += 18
    return read
  }
  const registers = new Registers()
  const vectorsAt = Math.ceil(textEnd / vectorsAlign) * vectorsAlign
  if (bytes.length < vectorsAt + count * dimensions * 4) throw new Error("it is shorter than its counts say")
  for (let i = 0; i < count; i++) {
    const vectorVersion = version()
    const flags = bytes.readUInt16LE(at)
    const idBytes = bytes.readUInt16LE(at + 6)
    const metadataBytes = bytes.readUInt32LE(at + 8)
    at += 12
    const metadataVersion = (flags & hasMetadataVersion) === 0 ? vectorVersion : version()
    const id = text(idBytes)
    const from = bytes.byteOffset + vectorsAt + i * dimensions * 4
    registers.setVector(
      id,
      vectorVersion,
      new Float32Array(bytes.buffer.slice(from, from + dimensions * 4) as ArrayBuffer)
    )
    registers.setMetadata(id, metadataVersion, text(metadataBytes))
  }
  for (let i = 0; i < bytes.readUInt32LE(28); i++) {
    const flags = bytes.readUInt16LE(at)
    const idBytes = bytes.readUInt16LE(at + 2)
    const metadataBytes = bytes.readUInt32LE(at + 4)
    at += 8
    const deleted = (flags & hasDeletion) === 0 ? undefined : version()
    const orphan = (flags & hasOrphan) === 0 ? undefined : version()
    const id = text(idBytes)
    const metadata = text(metadataBytes)
    if (deleted !== undefined) registers.setDeleted(id, deleted)
    if (orphan !== undefined) registers.setMetadata(id, orphan, metadata)
  }
  if (at !== textEnd) throw new Error(`${textEnd - at} bytes after the last record`)
  return registers
}
