/**
 * The one object of a partition that is ever replaced: who owns its log, which snapshots there are, and from where on the
 * log is kept. JSON with a checksum over its own bytes; the layout is written down in `docs/format.md`.
 */
import { crc32 } from "node:zlib"
import { Result, Schema } from "effect"

/** One file of a snapshot: its key below the partition's prefix, its length and the CRC-32 of its bytes. */
export const SnapshotObject = Schema.Struct({ key: Schema.String, bytes: Schema.Int, crc32: Schema.Int })
export type SnapshotObject = typeof SnapshotObject.Type

export const Snapshot = Schema.Struct({
  /** The last log position that is in the snapshot. */
  seq: Schema.Int,
  records: SnapshotObject,
  graph: SnapshotObject,
  /** What the mapped form is opened from; a snapshot of few records has none. */
  sketch: Schema.optionalKey(SnapshotObject),
  /** The window of requests (`RequestWindow.ts`), where there was anything in it. */
  requests: Schema.optionalKey(SnapshotObject),
  createdMillis: Schema.Int
})
export type Snapshot = typeof Snapshot.Type

/** All files of a snapshot. */
export const objectsOf = ({ records, graph, sketch, requests }: Snapshot): ReadonlyArray<SnapshotObject> =>
  [records, graph, sketch, requests].filter((object) => object !== undefined)

export const PartitionManifest = Schema.Struct({
  /** Raised by every new owner. */
  epoch: Schema.Int.check(Schema.isGreaterThanOrEqualTo(1)),
  /** 16 hexadecimal digits, random for each owner. */
  owner: Schema.String,
  /** Log objects up to this position are not part of the log any more, also where they are still there. */
  prunedSeq: Schema.Int,
  /** Newest first. */
  snapshots: Schema.Array(Snapshot),
  /** How far the log was at some times, oldest first: what it is kept by for followers. Absent where it is kept for none. */
  marks: Schema.optionalKey(Schema.Array(Schema.Struct({ seq: Schema.Int, millis: Schema.Int })))
})
export type PartitionManifest = typeof PartitionManifest.Type

/** Version of the layout. A newer one keeps the checksum as it is, so that it can be told from damage. */
export const manifestFormat = 1

/** The bytes are no manifest that this version reads; `format` is set where they are whole, but of another version. */
export class ManifestFault {
  readonly detail: string
  readonly format: number | undefined
  constructor(detail: string, format?: number) {
    this.detail = detail
    this.format = format
  }
}

export const encodeManifest = (manifest: PartitionManifest): Uint8Array => {
  const { epoch, owner, prunedSeq, snapshots, marks } = manifest
  const text = JSON.stringify(
    { format: manifestFormat, checksum: noChecksum, epoch, owner, prunedSeq, snapshots, marks },
    null,
    1
  )
  return Buffer.from(text.replace(noChecksum, checksumOf(text)))
}

export const decodeManifest = (bytes: Uint8Array): Result.Result<PartitionManifest, ManifestFault> => {
  const text = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString("utf8")
  const checksum = checksumPattern.exec(text)?.[1]
  if (checksum === undefined) return Result.fail(new ManifestFault("not a manifest"))
  if (checksumOf(text.replace(checksumPattern, `"checksum": "${noChecksum}"`)) !== checksum) {
    return Result.fail(new ManifestFault("the checksum differs"))
  }
  let value: unknown
  try {
    value = JSON.parse(text)
  } catch {
    return Result.fail(new ManifestFault("not JSON"))
  }
  const format = (value as { readonly format?: unknown } | null)?.format
  if (format !== manifestFormat) {
    const detail = `format ${String(format)}, this version reads ${manifestFormat}`
    return Result.fail(new ManifestFault(detail, typeof format === "number" ? format : undefined))
  }
  return Result.mapError(decodeFields(value), (error) => new ManifestFault(error.message.replaceAll("\n", " ")))
}

const decodeFields = Schema.decodeUnknownResult(PartitionManifest)

const noChecksum = "00000000"
const checksumPattern = /"checksum": "([0-9a-f]{8})"/

/** Over the text with zeros in the checksum's place. */
const checksumOf = (text: string): string => crc32(text).toString(16).padStart(8, "0")
