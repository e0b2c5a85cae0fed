/** Reads a backup: its newest whole run, and of each chain the snapshots and packs of log that count. */

import { Effect, Result, Stream } from "effect"
import { BackupDamaged, type BackupRun, type BackupSnapshot, decodeRun, decodeSnapshot } from "./BackupManifest.ts"
import { SegmentFault, type SegmentHeader, verifySegment } from "./LogSegment.ts"
import type { ListedObject, ObjectStore, StoreFailure } from "./ObjectStore.ts"

type Store = ObjectStore["Service"]

/** A run that is whole, and the newer ones that are not. */
export interface NewestRun {
  readonly run: BackupRun | undefined
  /** Number of the newest run, whole or not; 0 for none. */
  readonly newest: number
  readonly damaged: ReadonlyArray<BackupDamaged>
}

export const runsPrefix = "runs/"
export const runKey = (run: number): string => `${runsPrefix}${hex16(run)}`

/** Finds the newest whole run. A damaged one is read twice before it is believed. */
export const newestRun = Effect.fnUntraced(function* (store: Store): Effect.fn.Return<NewestRun, StoreFailure> {
  const keys = (yield* listAll(store, runsPrefix)).map(({ key }) => key).filter((key) => runPattern.test(key))
  const newest = keys.length === 0 ? 0 : Number.parseInt(keys.at(-1)?.slice(runsPrefix.length) ?? "0", 16)
  const damaged: Array<BackupDamaged> = []
  for (const key of keys.reverse()) {
    const read = yield* readTwice(store, key, (bytes) => decodeRun(key, bytes))
    if (Result.isSuccess(read)) return { run: read.success, newest, damaged }
    damaged.push(read.failure)
  }
  return { run: undefined, newest, damaged }
})

/** The newest whole run of a backup that has to be one. */
export const openBackup = (store: Store): Effect.Effect<BackupRun, BackupDamaged | StoreFailure> =>
  Effect.flatMap(newestRun(store), ({ run, damaged }) =>
    run === undefined
      ? Effect.fail(damaged[0] ?? new BackupDamaged({ object: runsPrefix, detail: "there is no backup here" }))
      : Effect.succeed(run)
  )

/** Key prefix of a chain's objects. */
export const chainPrefix = (partition: string, chain: string): string => `${partition}/${chain}`

export const packKey = (prefix: string, first: number, last: number, attempt: string): string =>
  `${prefix}/log/${hex16(first)}-${hex16(last)}-${attempt}`

export const snapshotPrefix = (prefix: string, seq: number, attempt: string): string =>
  `${prefix}/snapshot/${hex16(seq)}-${attempt}`

/** A snapshot in a backup, with the key prefix of its objects. */
export interface StoredSnapshot extends BackupSnapshot {
  readonly prefix: string
}

/** The snapshots of a chain that count, by position ascending; `damaged` are those that say nothing. */
export const snapshotsOf = Effect.fnUntraced(function* (
  store: Store,
  run: BackupRun,
  prefix: string
): Effect.fn.Return<
  { readonly snapshots: ReadonlyArray<StoredSnapshot>; readonly damaged: ReadonlyArray<BackupDamaged> },
  StoreFailure
> {
  const attempts = new Set(run.attempts)
  const damaged: Array<BackupDamaged> = []
  const snapshots: Array<StoredSnapshot> = []
  // Where an object was lost, its description may be the one.
  const folders = new Set<string>()
  for (const { key } of yield* listAll(store, `${prefix}/snapshot/`)) folders.add(key.slice(0, key.lastIndexOf("/")))
  for (const folder of folders) {
    if (!attempts.has(attemptOf(folder) ?? "")) continue
    const key = `${folder}/about`
    const read = yield* readTwice(store, key, (bytes) => decodeSnapshot(key, bytes))
    if (Result.isSuccess(read)) snapshots.push({ ...read.success, prefix: folder })
    else damaged.push(read.failure)
  }
  return { snapshots: snapshots.sort((a, b) => a.seq - b.seq), damaged }
})

/** Log segments of positions `first` to `last`, one after the other in one object. */
export interface Pack {
  readonly key: string
  readonly first: number
  readonly last: number
  readonly sizeBytes: number
}

/** The packs of a chain that count, by position ascending. */
export const packsOf = (
  store: Store,
  run: BackupRun,
  prefix: string
): Effect.Effect<ReadonlyArray<Pack>, StoreFailure> => {
  const attempts = new Set(run.attempts)
  return Effect.map(listAll(store, `${prefix}/log/`), (objects) =>
    objects
      .flatMap(({ key, sizeBytes }) => {
        const match = packPattern.exec(key)
        if (match === null || !attempts.has(match[3] as string)) return []
        const [first, last] = [Number.parseInt(match[1] as string, 16), Number.parseInt(match[2] as string, 16)]
        return [{ key, first, last, sizeBytes }]
      })
      .sort((a, b) => a.first - b.first)
  )
}

/** The packs that hold the positions after one up to another, in order; fails where one is missing. */
export const coveringPacks = (
  packs: ReadonlyArray<Pack>,
  prefix: string,
  after: number,
  upTo: number
): Result.Result<ReadonlyArray<Pack>, BackupDamaged> => {
  const chosen: Array<Pack> = []
  let next = after + 1
  for (const pack of packs) {
    if (next > upTo) break
    if (pack.last < next) continue
    if (pack.first > next) break
    chosen.push(pack)
    next = pack.last + 1
  }
  if (next > upTo) return Result.succeed(chosen)
  return Result.fail(
    new BackupDamaged({ object: `${prefix}/log/${hex16(next)}`, detail: "the log from this position on is missing" })
  )
}

export interface BackupSegment {
  readonly pack: Pack
  readonly header: SegmentHeader
  /** Aligned to four bytes. */
  readonly bytes: Uint8Array
}

/** The segments of packs, each checked, in order. */
export const segmentsOf = (
  store: Store,
  packs: ReadonlyArray<Pack>
): Stream.Stream<BackupSegment, BackupDamaged | StoreFailure> =>
  Stream.suspend(() => {
    // Packs of one history may overlap.
    let next = 0
    return Stream.fromIterable(packs).pipe(
      Stream.mapEffect((pack) => readPack(store, pack), { concurrency: packsReadAhead }),
      Stream.flatMap((segments) => Stream.fromIterable(segments)),
      Stream.filter(({ header }) => {
        if (header.seq < next) return false
        next = header.seq + 1
        return true
      })
    )
  })

/** Reads and checks one pack. A damaged one is read twice before it is believed. */
export const readPack = Effect.fnUntraced(function* (
  store: Store,
  pack: Pack
): Effect.fn.Return<ReadonlyArray<BackupSegment>, BackupDamaged | StoreFailure> {
  const read = yield* readTwice(store, pack.key, (bytes) => splitPack(pack, bytes))
  return yield* Effect.fromResult(read)
})

/** Everything under a prefix, by key. */
export const listAll = Effect.fnUntraced(function* (
  store: Store,
  prefix: string
): Effect.fn.Return<Array<ListedObject>, StoreFailure> {
  const all: Array<ListedObject> = []
  for (;;) {
    const page = yield* store.list(prefix, { startAfter: all.at(-1)?.key ?? "", limit: pageObjects })
    all.push(...page)
    if (page.length < pageObjects) return all
  }
})

/** The attempt that a key of an object of a chain ends with; of a snapshot's object its folder's. */
export const attemptOf = (key: string): string | undefined => attemptPattern.exec(key)?.[1]

/** Bytes of a segment, by its header. */
export const segmentBytes = (bytes: Uint8Array): number =>
  segmentHeaderBytes + new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength).getUint32(40, true)

export const hex16 = (n: number | bigint): string => n.toString(16).padStart(16, "0")

const segmentHeaderBytes = 64

/** Objects asked for in one listing. */
const pageObjects = 1_000

/** Packs read ahead of their consumer. */
const packsReadAhead = 2

const runPattern = /^runs\/[0-9a-f]{16}$/
const packPattern = /\/log\/([0-9a-f]{16})-([0-9a-f]{16})-(\d+-[0-9a-f]{8})$/
const attemptPattern = /\/(?:log\/[0-9a-f]{16}|snapshot)\/?-?[0-9a-f]{16}-(\d+-[0-9a-f]{8})(?:\/[^/]+)?$/

const readTwice = Effect.fnUntraced(function* <A>(
  store: Store,
  key: string,
  decode: (bytes: Uint8Array) => Result.Result<A, BackupDamaged>
): Effect.fn.Return<Result.Result<A, BackupDamaged>, StoreFailure> {
  for (let attempt = 1; ; attempt++) {
    const found = yield* Effect.result(store.get(key))
    if (Result.isFailure(found)) {
      if (found.failure._tag === "StoreFailure") return yield* found.failure
      return Result.fail(new BackupDamaged({ object: key, detail: "it is missing" }))
    }
    const decoded = decode(found.success.body)
    if (Result.isSuccess(decoded) || attempt === 2) return decoded
  }
})

const splitPack = (pack: Pack, body: Uint8Array): Result.Result<ReadonlyArray<BackupSegment>, BackupDamaged> => {
  const damaged = (detail: string) => Result.fail(new BackupDamaged({ object: pack.key, detail }))
  // Not `slice`, which for a Buffer is a view at the same unaligned place.
  const whole = body.byteOffset % 4 === 0 ? body : new Uint8Array(body)
  const segments: Array<BackupSegment> = []
  let at = 0
  let seq = pack.first
  try {
    while (at < whole.length) {
      if (whole.length - at < segmentHeaderBytes) return damaged(`it ends inside of position ${seq}`)
      const bytes = whole.subarray(at, at + segmentBytes(whole.subarray(at)))
      const header = verifySegment(bytes)
      if (header.seq !== seq) return damaged(`position ${header.seq} is where ${seq} should be`)
      segments.push({ pack, header, bytes })
      at += bytes.length
      seq += 1
    }
  } catch (fault) {
    if (!(fault instanceof SegmentFault)) throw fault
    return damaged(`position ${seq}: ${fault.message}`)
  }
  return seq === pack.last + 1 ? Result.succeed(segments) : damaged(`it ends before position ${seq}`)
}
