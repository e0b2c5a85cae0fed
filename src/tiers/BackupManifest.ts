/**
 * The two JSON objects of a backup that say what counts: one for each run, written last, and one for each snapshot. Both
 * carry a checksum over their own bytes. The layout of a backup is written down in `docs/format.md`.
 */
import { crc32 } from "node:zlib"
import { Data, Result, Schema } from "effect"
import { ApiKeyRecord } from "../protocol/ApiKey.ts"
import { Collection } from "../protocol/Collection.ts"
import { Topic } from "../protocol/Topic.ts"

/**
 * A stretch of one partition's log without a gap: it begins with the log itself (`fromSeq` 1) or after a snapshot of the
 * position before. A new one begins where the source does not continue what was copied.
 */
export const Chain = Schema.Struct({
  /** 8 hexadecimal digits; the chain's objects lie in a folder of that name. */
  id: Schema.String,
  fromSeq: Schema.Int,
  /** The last position copied; `fromSeq - 1` for none. */
  lastSeq: Schema.Int,
  /** Nonce of the segment at `lastSeq`, 16 hexadecimal digits; empty for none. By it a run sees whether the source continues it. */
  lastNonce: Schema.String,
  /** Greatest version time copied, nanoseconds in decimal. */
  lastTime: Schema.String,
  /** Every operation acknowledged up to this time of the source's clock is in the chain, if it is not older than its base. */
  horizonMillis: Schema.Int,
  /** Position, time of copying and bytes of the newest snapshot copied; zeros for none. */
  snapshotSeq: Schema.Int,
  snapshotMillis: Schema.Int,
  snapshotBytes: Schema.Int,
  /** Bytes of log copied since that snapshot was. */
  logBytes: Schema.Int
})
export type Chain = typeof Chain.Type

export const BackupCollection = Schema.Struct({
  collection: Collection,
  /** When it was deleted, or was first seen to be gone. */
  removedMillis: Schema.optionalKey(Schema.Int),
  /** Of each partition its chains, oldest first; none of a partition that was never written. */
  partitions: Schema.Array(Schema.Array(Chain))
})
export type BackupCollection = typeof BackupCollection.Type

export const BackupTopic = Schema.Struct({
  topic: Topic,
  /** When it was first seen to be gone. */
  removedMillis: Schema.optionalKey(Schema.Int),
  /** Of each channel, and at last of the tasks, the chains as a partition's. */
  logs: Schema.Array(Schema.Array(Chain))
})
export type BackupTopic = typeof BackupTopic.Type

export const BackupRun = Schema.Struct({
  /** From 1. */
  run: Schema.Int,
  /** `<run>-<8 hexadecimal digits>`: it ends the names of what this run has copied. */
  attempt: Schema.String,
  horizonMillis: Schema.Int,
  endedMillis: Schema.Int,
  /** When superfluous objects were last looked for. */
  prunedMillis: Schema.Int,
  /** Attempts whose objects count. Those of others were left by runs that did not come to their end. */
  attempts: Schema.Array(Schema.String),
  /** All that can be restored, deleted ones included. */
  collections: Schema.Array(BackupCollection),
  /** The same of topics; absent where there are none. */
  topics: Schema.optionalKey(Schema.Array(BackupTopic)),
  /** API keys, of each the hash of its secret; absent where there are none. */
  keys: Schema.optionalKey(Schema.Array(ApiKeyRecord))
})
export type BackupRun = typeof BackupRun.Type

const Digest = Schema.Struct({ bytes: Schema.Int, crc32: Schema.Int })

/** What a snapshot in a backup consists of, by the names of its objects. */
export const BackupSnapshot = Schema.Struct({
  seq: Schema.Int,
  createdMillis: Schema.Int,
  /** Greatest version time in it, nanoseconds in decimal. */
  maxTime: Schema.String,
  objects: Schema.Record(Schema.String, Digest)
})
export type BackupSnapshot = typeof BackupSnapshot.Type

/** Version of the layout of a backup. */
export const backupFormat = 1

/** Something of a backup, or of what is to be backed up, is damaged or missing. */
export class BackupDamaged extends Data.TaggedError("BackupDamaged")<{
  /** Key of the object. */
  readonly object: string
  readonly detail: string
}> {
  override get message(): string {
    return `${this.object}: ${this.detail}`
  }
}

export const encodeRun = (run: BackupRun): Uint8Array => encode(run)

/** Fails with what is wrong. */
export const decodeRun = (key: string, bytes: Uint8Array): Result.Result<BackupRun, BackupDamaged> =>
  decode(key, bytes, decodeRunFields)

export const encodeSnapshot = (snapshot: BackupSnapshot): Uint8Array => encode(snapshot)

/** Fails with what is wrong. */
export const decodeSnapshot = (key: string, bytes: Uint8Array): Result.Result<BackupSnapshot, BackupDamaged> =>
  decode(key, bytes, decodeSnapshotFields)

const decodeRunFields = Schema.decodeUnknownResult(BackupRun)
const decodeSnapshotFields = Schema.decodeUnknownResult(BackupSnapshot)

const noChecksum = "00000000"
const checksumPattern = /"checksum": "([0-9a-f]{8})"/

/** Over the text with zeros in the checksum's place. */
const checksumOf = (text: string): string => crc32(text).toString(16).padStart(8, "0")

const encode = (value: BackupRun | BackupSnapshot): Uint8Array => {
  const text = JSON.stringify({ format: backupFormat, checksum: noChecksum, ...value }, null, 1)
  return Buffer.from(text.replace(noChecksum, checksumOf(text)))
}

const decode = <A>(
  object: string,
  bytes: Uint8Array,
  fields: (value: unknown) => Result.Result<A, Schema.SchemaError>
): Result.Result<A, BackupDamaged> => {
  const damaged = (detail: string) => Result.fail(new BackupDamaged({ object, detail }))
  const text = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString("utf8")
  const checksum = checksumPattern.exec(text)?.[1]
  if (checksum === undefined) return damaged("it is none of a backup")
  if (checksumOf(text.replace(checksumPattern, `"checksum": "${noChecksum}"`)) !== checksum) {
    return damaged("its checksum differs")
  }
  const value = JSON.parse(text) as { readonly format?: unknown }
  if (value.format !== backupFormat) {
    return damaged(`it is of format ${String(value.format)}, this version reads ${backupFormat}`)
  }
  return Result.mapError(
    fields(value),
    (error) => new BackupDamaged({ object, detail: error.message.replaceAll("\n", " ") })
  )
}
