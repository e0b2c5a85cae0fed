/**
 * The fenced log of one partition on an object store, with its snapshots. What an owner was told is in the log stays in the
 * log, and there is one history, however many processes take themselves for the owner.
 *
 * **Claim.** An opener raises the epoch in the manifest by a conditional replace, finds the end of the log, and writes an
 * empty segment of its epoch there. From then on no earlier owner can append: its next position is taken. What an earlier
 * owner got in before that is part of the history.
 *
 * **Append.** Position `seq` is the object `log/<seq>`, created only if absent. Where the store cannot tell whether a create
 * took effect, the object tells by its nonce; where it cannot be read either, the next append settles it.
 *
 * **Lease.** Pruned positions could be created a second time, by an owner that slept while others claimed, appended and
 * pruned. So an owner looks at the manifest after a create if it has not for `leaseMillis`, and nobody prunes until its own
 * claim is several times that old.
 */
import { randomBytes } from "node:crypto"
import { open as openFile } from "node:fs/promises"
import { crc32 } from "node:zlib"
import { Clock, Context, Data, Effect, Result, type Scope, Stream } from "effect"
import { encodeSegment, SegmentFault, type SegmentHeader, segmentFormat, verifySegment } from "./LogSegment.ts"
import { type ObjectChanged, type ObjectExists, type ObjectMissing, ObjectStore, StoreFailure } from "./ObjectStore.ts"
import {
  decodeManifest,
  encodeManifest,
  manifestFormat,
  objectsOf,
  type PartitionManifest,
  type Snapshot,
  type SnapshotObject
} from "./PartitionManifest.ts"

export interface LogEntry {
  readonly seq: number
  /** A whole segment whose checksums hold; the memory is the receiver's own. */
  readonly bytes: Uint8Array
}

/** What a segment to be appended must carry. */
export interface LogPosition {
  readonly epoch: number
  readonly seq: number
  readonly nonce: bigint
}

export interface Appended {
  readonly seq: number
  /**
   * Earlier appends that were reported as failed and turned out to be in the log, oldest first: they come before this one
   * and have to be applied before it. Each is reported once.
   */
  readonly recovered: ReadonlyArray<LogEntry>
}

export interface PartitionLogOptions {
  /** Snapshots kept, the newest included; at least 1. The log is kept from the oldest of them on. */
  readonly snapshotsKept?: number
  /** The same for everybody who opens the partition. 0: look at the manifest with every append, prune at any time. */
  readonly leaseMillis?: number
  /** The log is kept this long for followers, whatever the snapshots need. By default no longer. */
  readonly retainMillis?: number
  /** Passes over snapshots at or after this position, for a caller that could not open them; they are given up for good. */
  readonly snapshotsBefore?: number
  /**
   * Takes the newest snapshot unread, for a caller that checks what it reads of it itself, or with
   * {@link PartitionLogHandle.verifySnapshot} before it relies on the files as a whole.
   */
  readonly deferVerification?: boolean
  /** The manifest as {@link peek} has found it: it need not be read again, where it is still the same. */
  readonly seen?: SeenManifest
}

/** Files of a snapshot, on this machine. */
export interface SnapshotPaths {
  readonly records: string
  readonly graph: string
  readonly sketch?: string | undefined
  readonly requests?: string | undefined
}

/**
 * Up to which position a partition's log may be pruned, by its prefix; asked at each snapshot. By default as far as its
 * snapshots allow. A backup holds it back until it has copied what would go.
 */
export const PruneLimit = Context.Reference<(prefix: string) => number>("ruvector/tiers/PruneLimit", {
  defaultValue: () => () => Number.MAX_SAFE_INTEGER
})

export const snapshotsKeptDefault = 2
export const leaseMillisDefault = 2_000

/** Something of the partition is damaged or missing, and nothing was skipped over. */
export class LogCorrupt extends Data.TaggedError("LogCorrupt")<{
  /** Key of the object. */
  readonly object: string
  readonly fault: "missing" | "short" | "magic" | "checksum" | "format" | "position" | "epoch" | "manifest" | "snapshot"
  readonly detail: string
}> {
  override get message(): string {
    return `${this.object}: ${this.detail}`
  }
}

/** An object was written by a newer version of this program. */
export class NewerFormat extends Data.TaggedError("NewerFormat")<{
  readonly object: string
  readonly found: number
  readonly supported: number
}> {
  get detail(): string {
    return `format ${this.found}, this version reads up to ${this.supported}: open it with the version that wrote it, or a newer one`
  }
  override get message(): string {
    return `${this.object}: ${this.detail}`
  }
}

/** Another owner has claimed the partition, or the handle was closed. It stays so for this handle. */
export class NotOwner extends Data.TaggedError("NotOwner")<{
  readonly prefix: string
  readonly epoch: number
  readonly detail: string
}> {
  override get message(): string {
    return `${this.prefix}, epoch ${this.epoch}: ${this.detail}`
  }
}

/** The log no longer goes back that far. */
export class Compacted extends Data.TaggedError("Compacted")<{ readonly oldestSeq: number }> {}

export interface PartitionLogHandle {
  readonly prefix: string
  readonly epoch: number
  /** What to begin with: the newest snapshot whose files are whole, where that was looked at. Keys are the object store's. */
  readonly snapshot: Snapshot | undefined
  /** The newest snapshot by now, of this handle's making or what it began with. Keys are the object store's. */
  readonly newestSnapshot: () => Snapshot | undefined
  /** Reads the files of {@link newestSnapshot} and compares their checksums. What is wrong with them; `undefined` for nothing. */
  readonly verifySnapshot: Effect.Effect<string | undefined, StoreFailure>
  /** Log objects that were damaged at the very end and were moved to `damaged/`. */
  readonly cut: number
  /** Snapshots that were damaged, or that the caller passed over. */
  readonly snapshotsRefused: number
  /**
   * The log after the snapshot as it was when it was opened, oldest first, read ahead a bounded number. Positions increase;
   * those of empty segments are left out. Fails on damage and never skips it.
   */
  readonly tail: Stream.Stream<LogEntry, LogCorrupt | NewerFormat | StoreFailure>
  /**
   * Commits one segment. `encode` is called with its position, again with a later one where that is taken by an append of
   * this handle which had been reported as failed. One at a time (a second is a defect); not interruptible.
   *
   * `StoreFailure.uncertain`: false where the segment is not in the log (a store that applies a write late may still add
   * it; then it is recovered), true where it may be. The caller may go on appending in either case.
   */
  readonly append: (encode: (position: LogPosition) => Uint8Array) => Effect.Effect<Appended, NotOwner | StoreFailure>
  /**
   * Finds out what became of appends that failed, without one to append: nothing where there is no doubt, else an empty
   * segment. Returns what was recovered, as `append` does; not at the same time as `append`.
   */
  readonly settle: Effect.Effect<ReadonlyArray<LogEntry>, NotOwner | StoreFailure>
  /** Whether nobody has claimed the partition since, by the manifest as it is now. */
  readonly confirm: Effect.Effect<boolean, StoreFailure>
  /**
   * Makes files the snapshot of everything up to `seq`, moving them away; reads them back before it counts on them, and
   * only then prunes what is no longer needed. Prune failures are logged and made good next time. One at a time, also beside
   * appends. Does nothing where the newest snapshot is as new.
   */
  readonly commitSnapshot: (seq: number, files: SnapshotPaths) => Effect.Effect<void, NotOwner | StoreFailure>
  /** The log from a position on to what is its end when the stream is run; as `tail` otherwise. */
  readonly read: (fromSeq: number) => Stream.Stream<LogEntry, Compacted | LogCorrupt | NewerFormat | StoreFailure>
  /** Position of the last segment; 0 for none. */
  readonly lastSeq: () => number
  /** The first position that can be read; one after the last where there is none. */
  readonly oldestSeq: () => number
  /** Position of the newest snapshot; 0 for none. */
  readonly snapshotSeq: () => number
  /** Segments and bytes since the newest snapshot. */
  readonly tailCount: () => number
  readonly tailBytes: () => number
}

/**
 * Claims a partition and finds its end. The handle is dead when the scope closes; the claim ends with the next one, and of
 * several openers the last to claim succeeds. The partition's first object is made here.
 */
export const open: (
  prefix: string,
  options?: PartitionLogOptions
) => Effect.Effect<PartitionLogHandle, LogCorrupt | NewerFormat | NotOwner | StoreFailure, ObjectStore | Scope.Scope> =
  Effect.fn("PartitionLog.open")(function* (prefix: string, options?: PartitionLogOptions) {
    const store = yield* ObjectStore
    const log = new Log(store, prefix, options ?? {}, yield* PruneLimit)
    yield* log.open().pipe(Effect.annotateLogs({ partition: prefix }))
    yield* Effect.addFinalizer(() => Effect.sync(() => log.close()))
    return log.handle()
  })

/**
 * The manifest, without a claim, and the newest snapshot that it names, by keys of the store and unread; `undefined` where
 * there is none.
 */
export const peek: (
  prefix: string
) => Effect.Effect<
  { readonly seen: SeenManifest; readonly snapshot: Snapshot | undefined } | undefined,
  StoreFailure,
  ObjectStore
> = Effect.fnUntraced(function* (prefix: string) {
  const store = yield* ObjectStore
  const found = yield* Effect.catchTag(store.get(`${prefix}/manifest`), "ObjectMissing", () => Effect.undefined)
  const manifest = found === undefined ? undefined : Result.getOrUndefined(decodeManifest(found.body))
  if (found === undefined || manifest === undefined) return undefined
  return { seen: { manifest, etag: found.etag }, snapshot: withStoreKeys(prefix, manifest.snapshots[0]) }
})

/**
 * The same for who opens it beside its owner: `verify` reads its files and compares their
 * checksums. What is wrong with them; `undefined` for nothing.
 */
export const peekFiles: (prefix: string) => Effect.Effect<
  | {
      readonly snapshot: Snapshot
      readonly verify: Effect.Effect<string | undefined, StoreFailure>
    }
  | undefined,
  StoreFailure,
  ObjectStore
> = Effect.fnUntraced(function* (prefix: string) {
  const store = yield* ObjectStore
  const snapshot = (yield* peek(prefix))?.snapshot
  if (snapshot === undefined) return undefined
  const verify = Effect.gen(function* () {
    for (const object of objectsOf(snapshot)) {
      const fault = yield* objectFault(store, object.key, object)
      if (fault !== undefined) return fault
    }
    return undefined
  })
  return { snapshot, verify }
})

/**
 * Deletes everything of a partition, the manifest first, so that an owner stops. Idempotent: after a failure, or where
 * an owner went on for a moment, it is called again.
 */
export const remove: (prefix: string) => Effect.Effect<void, StoreFailure, ObjectStore> = Effect.fn(
  "PartitionLog.remove"
)(function* (prefix: string) {
  const store = yield* ObjectStore
  yield* store.delete(`${prefix}/manifest`)
  for (let pass = 0; pass < removePassesMax; pass++) {
    let startAfter = ""
    for (;;) {
      const page = yield* store.list(`${prefix}/`, { startAfter, limit: pageObjects })
      const last = page.at(-1)
      if (last === undefined) break
      yield* Effect.forEach(page, ({ key }) => store.delete(key), { concurrency: deletesAtOnce, discard: true })
      startAfter = last.key
    }
    if (startAfter === "") return
  }
})

/** Segments read ahead of their consumer. */
const readAheadSegments = 8
/** Objects asked for in one listing. */
const pageObjects = 1_000
/** Objects deleted at one time. */
const deletesAtOnce = 16
/** Passes of a removal, for objects that appear while it runs. */
const removePassesMax = 4
/** Times that a replace of the manifest is tried again after a race; of several openers at least one gets on each time. */
const racesMax = 64
/** Writes of a claim that nobody could tell the outcome of, before it gives up. */
const doubtsMax = 4
/** Segments of an earlier owner that a claim takes over while it looks for the end of the log. */
const takeOversMax = 100_000
/** Age of a claim, in leases, from which its owner prunes. */
const pruneAfterLeases = 4

/** Marks of how far the log was, over the time that it is kept for. */
const marksKept = 16
/** Recovered segments that wait to be reported; beyond, the partition has to be opened again. */
const recoveredMax = 64
/** Bytes of a snapshot read at one time for its checksum. */
const checksumChunkBytes = 1_048_576

const sumOf = (sizes: ReadonlyArray<number>): number => sizes.reduce((sum, bytes) => sum + bytes, 0)

const hex16 = (n: number | bigint): string => n.toString(16).padStart(16, "0")

type Store = ObjectStore["Service"]

/** What a read of a position found. */
type Found =
  | { readonly _tag: "segment"; readonly header: SegmentHeader; readonly bytes: Uint8Array; readonly etag: string }
  | { readonly _tag: "damaged"; readonly fault: SegmentFault; readonly bytes: Uint8Array; readonly etag: string }
  | { readonly _tag: "missing" }

/** What the log after a snapshot is seen to be before it is claimed. */
interface Glimpse {
  readonly base: number
  readonly sizes: Array<number>
  /** What is at its end. */
  readonly end: Found | undefined
}

class Log {
  readonly #prefix: string
  readonly #store: Store
  readonly #snapshotsKept: number
  readonly #leaseMillis: number
  readonly #retainMillis: number
  readonly #snapshotsBefore: number
  readonly #deferVerification: boolean
  readonly #peeked: SeenManifest | undefined
  readonly #pruneLimit: (prefix: string) => number
  readonly #owner = randomBytes(8).toString("hex")
  /** The upper 40 bits of every nonce of this handle. The lower 24 count its attempts. */
  readonly #nonces = BigInt(`0x${randomBytes(5).toString("hex")}`) << 24n
  #attempts = 0

  #epoch = 0
  /** What to begin with; its keys are the store's. */
  #snapshot: Snapshot | undefined
  #cut = 0
  #snapshotsRefused = 0
  #manifest: PartitionManifest = { epoch: 0, owner: "", prunedSeq: 0, snapshots: [] }
  #etag = ""
  /** The last position that is in the log for certain. */
  #last = 0
  /** Bytes of each segment after the newest snapshot, and the position before the first of them. */
  #sizes: Array<number> = []
  #sizesAfter = 0
  #tailBytes = 0
  #lost: NotOwner | undefined
  /** Whether an append of this handle may be, or may come to be, at the position after the last. */
  #unsettled = false
  #recovered: Array<LogEntry> = []
  #appending = false
  #snapshotting = false
  #claimedAt: Instant = { monotonicNanos: 0n, wallMillis: 0 }
  #seenAt: Instant = this.#claimedAt

  constructor(store: Store, prefix: string, options: PartitionLogOptions, pruneLimit: (prefix: string) => number) {
    this.#pruneLimit = pruneLimit
    this.#store = store
    this.#prefix = prefix
    this.#snapshotsKept = Math.max(1, options.snapshotsKept ?? snapshotsKeptDefault)
    this.#leaseMillis = options.leaseMillis ?? leaseMillisDefault
    this.#retainMillis = options.retainMillis ?? 0
    this.#snapshotsBefore = options.snapshotsBefore ?? Number.POSITIVE_INFINITY
    this.#deferVerification = options.deferVerification ?? false
    this.#peeked = options.seen
  }

  handle(): PartitionLogHandle {
    return {
      prefix: this.#prefix,
      epoch: this.#epoch,
      snapshot: this.#snapshot,
      newestSnapshot: () => withStoreKeys(this.#prefix, this.#manifest.snapshots[0]),
      verifySnapshot: Effect.suspend(() => {
        const newest = this.#manifest.snapshots[0]
        if (newest === undefined) return Effect.undefined
        return Effect.map(this.#snapshotFault(newest), (fault) => fault?.detail)
      }),
      cut: this.#cut,
      snapshotsRefused: this.#snapshotsRefused,
      tail: this.#tail(this.#last),
      append: (encode) => this.#append(encode),
      settle: Effect.suspend(() => this.#settle()),
      confirm: Effect.suspend(() => (this.#lost === undefined ? this.#isOwner() : Effect.succeed(false))),
      commitSnapshot: (seq, files) => this.#commitSnapshot(seq, files),
      read: (fromSeq) => this.#read(fromSeq),
      lastSeq: () => this.#last,
      oldestSeq: () => this.#manifest.prunedSeq + 1,
      snapshotSeq: () => this.#snapshotSeq(),
      tailCount: () => this.#sizes.length,
      tailBytes: () => this.#tailBytes
    }
  }

  close(): void {
    this.#lost ??= this.#notOwner("closed")
  }

  /** See {@link open}. */
  readonly open = Effect.fnUntraced(function* (this: Log) {
    const { isNew, glimpse } = yield* this.#claim()
    // Not when it was asked for: the claim may have taken its time, and others count from when it took effect.
    this.#claimedAt = yield* now
    yield* Effect.catchTag(this.#locate(isNew, glimpse), "LogCorrupt", (error) => this.#unlessOvertaken(error))
  })

  /** What looks like damage may be what a newer owner has pruned under this one's eyes. */
  #unlessOvertaken<E>(error: E): Effect.Effect<never, E | NotOwner | StoreFailure> {
    return Effect.flatMap(
      this.#isOwner(),
      (isOwner): Effect.Effect<never, E | NotOwner> => (isOwner ? Effect.fail(error) : this.#overtaken())
    )
  }

  /** Makes this handle the manifest's owner. `isNew` where there was no manifest before. */
  #claim = Effect.fnUntraced(function* (this: Log) {
    let doubts = 0
    for (let race = 0; race < racesMax; race++) {
      const at = yield* now
      const seen = (race === 0 ? this.#peeked : undefined) ?? (yield* this.#readManifest())
      // A claim whose outcome was uncertain has taken effect.
      if (seen !== undefined && seen.manifest.owner === this.#owner && seen.manifest.epoch > this.#epoch) {
        return { isNew: this.#claimed(seen, at, seen.manifest.epoch === 1), glimpse: undefined }
      }
      if (seen === undefined) {
        const left = yield* this.#anythingLeft()
        if (left !== undefined) {
          const again = yield* this.#readManifest()
          if (again !== undefined) continue
          const detail = `it is missing, but ${left} is there`
          return yield* new LogCorrupt({ object: this.#manifestKey, fault: "missing", detail })
        }
      }
      const manifest: PartitionManifest =
        seen === undefined
          ? { epoch: 1, owner: this.#owner, prunedSeq: 0, snapshots: [] }
          : { ...seen.manifest, epoch: seen.manifest.epoch + 1, owner: this.#owner }
      const body = encodeManifest(manifest)
      const write: Effect.Effect<string, ObjectChanged | ObjectExists | ObjectMissing | StoreFailure> =
        seen === undefined
          ? this.#store.create(this.#manifestKey, body)
          : this.#store.replace(this.#manifestKey, body, seen.etag)
      // Most often the log is the same before the claim and after it.
      const glimpse = seen === undefined ? Effect.undefined : this.#glimpse(seen.manifest)
      const [written, glimpsed] = yield* Effect.all([Effect.result(write), glimpse], { concurrency: 2 })
      if (Result.isSuccess(written)) {
        const isNew = this.#claimed({ manifest, etag: written.success }, at, seen === undefined)
        return { isNew, glimpse: glimpsed }
      }
      const error = written.failure
      if (error._tag === "StoreFailure" && (!error.uncertain || ++doubts > doubtsMax)) return yield* error
    }
    return yield* new StoreFailure({
      operation: "claim",
      key: this.#manifestKey,
      detail: `${racesMax} attempts lost the race for the manifest`,
      uncertain: false
    })
  })

  #claimed({ manifest, etag }: SeenManifest, at: Instant, isNew: boolean): boolean {
    this.#epoch = manifest.epoch
    this.#manifest = manifest
    this.#etag = etag
    this.#seenAt = at
    return isNew
  }

  /**
   * The log after a manifest's newest snapshot. A claim on top of that manifest finds this and perhaps more: what is pruned
   * is before the snapshot, and the end is looked for from here on. `undefined` where it cannot be told.
   */
  #glimpse(manifest: PartitionManifest): Effect.Effect<Glimpse | undefined> {
    const base = manifest.snapshots[0]?.seq ?? 0
    return Effect.gen({ self: this }, function* () {
      const sizes = yield* this.#listSizes(base)
      const end = sizes.length === 0 ? undefined : yield* this.#readSegment(base + sizes.length)
      return end?._tag === "missing" ? undefined : { base, sizes, end }
    }).pipe(Effect.catch(() => Effect.undefined))
  }

  /** Finds the snapshot to begin with and the end of the log, and closes the end. */
  #locate = Effect.fnUntraced(function* (this: Log, isNew: boolean, glimpse: Glimpse | undefined) {
    yield* this.#chooseSnapshot()
    const base = this.#snapshotSeq()
    const known = glimpse?.base === base ? glimpse : undefined
    const sizes = known?.sizes ?? (yield* this.#listSizes(base))
    yield* this.#closeEnd(base, sizes, isNew, known?.end)
    // Also a true end: what was found may have been the gap that a newer owner's pruning has left.
    if (!(yield* this.#isOwner())) return yield* this.#overtaken()
    this.#sizes = sizes
    this.#tailBytes = sumOf(sizes)
    this.#sizesAfter = base
    this.#last = base + sizes.length
  })

  #chooseSnapshot = Effect.fnUntraced(function* (this: Log) {
    const all = this.#manifest.snapshots
    let first: LogCorrupt | undefined
    let at = 0
    for (; at < all.length; at++) {
      const snapshot = all[at] as Snapshot
      const passedOver = snapshot.seq >= this.#snapshotsBefore
      const isRead = !passedOver && !this.#deferVerification
      const fault = isRead ? yield* this.#snapshotFault(snapshot) : undefined
      if (!passedOver && fault === undefined) break
      first ??= new LogCorrupt({
        object: this.#keyOf(fault?.key ?? snapshot.records.key),
        fault: "snapshot",
        detail: fault?.detail ?? "passed over, since it could not be opened"
      })
      yield* Effect.logWarning(
        `Snapshot of position ${snapshot.seq} refused: ${fault?.detail ?? "it could not be opened"}`
      )
    }
    this.#snapshot = withStoreKeys(this.#prefix, all[at])
    if (at === 0) return
    if (at === all.length && this.#manifest.prunedSeq > 0 && first !== undefined) return yield* first
    // Forgotten for good, before the log goes on: it may be cut below a refused snapshot, and then that is another history.
    this.#snapshotsRefused += at
    const refused = new Set(all.slice(0, at).map(({ seq }) => seq))
    yield* this.#changeManifest((manifest) => ({
      ...manifest,
      snapshots: manifest.snapshots.filter(({ seq }) => !refused.has(seq))
    }))
  })

  #snapshotFault = Effect.fnUntraced(function* (this: Log, snapshot: Snapshot) {
    for (const object of objectsOf(snapshot)) {
      const fault = yield* this.#objectFault(object)
      if (fault !== undefined) return { key: object.key, detail: fault }
    }
    return undefined
  })

  #objectFault(object: SnapshotObject): Effect.Effect<string | undefined, StoreFailure> {
    return objectFault(this.#store, this.#keyOf(object.key), object)
  }

  /** Bytes of each segment after a position; they have to follow each other without a gap. */
  #listSizes = Effect.fnUntraced(function* (this: Log, after: number) {
    const sizes: Array<number> = []
    let startAfter = this.#logKey(after)
    for (;;) {
      const page = yield* this.#store.list(`${this.#prefix}/log/`, { startAfter, limit: pageObjects })
      for (const { key, sizeBytes } of page) {
        startAfter = key
        const seq = seqOf(key)
        // Something that is not ours, such as a file manager's.
        if (seq === undefined) continue
        const expected = after + sizes.length + 1
        if (seq !== expected) {
          const detail = `it is missing, but ${key} is there`
          return yield* new LogCorrupt({ object: this.#logKey(expected), fault: "missing", detail })
        }
        sizes.push(sizeBytes)
      }
      if (page.length < pageObjects) return sizes
    }
  })

  /** Takes over what is at the end of the log and puts an empty segment of this epoch there. */
  #closeEnd = Effect.fnUntraced(function* (
    this: Log,
    base: number,
    sizes: Array<number>,
    isNew: boolean,
    end: Found | undefined
  ) {
    let doubts = 0
    for (let step = 0; step < takeOversMax; step++) {
      const last = base + sizes.length
      if (sizes.length > 0) {
        const found = (step === 0 ? end : undefined) ?? (yield* this.#readSegment(last))
        if (found._tag === "missing") return yield* this.#faultError(last, "missing")
        if (found._tag === "damaged") {
          if (found.fault.kind === "format") return yield* this.#faultError(last, found.fault)
          if (last - 1 > base) yield* this.#checkBefore(last)
          const size = yield* this.#cutEnd(last, found)
          if (size === undefined) continue
          sizes[sizes.length - 1] = size
          return
        }
        const { header } = found
        if (header.epoch === this.#epoch && this.#isMine(header.nonce)) return
        yield* this.#checkEarlier(last, header)
      }
      // Nobody was there before.
      if (isNew && sizes.length === 0) return
      const fence = this.#emptySegment(last + 1)
      const created = yield* Effect.result(this.#store.create(this.#logKey(last + 1), fence))
      if (Result.isSuccess(created)) {
        sizes.push(fence.length)
        return
      }
      const error = created.failure
      if (error._tag === "StoreFailure" && (!error.uncertain || ++doubts > doubtsMax)) return yield* error
      const there = yield* this.#readSegment(last + 1)
      if (there._tag !== "missing") sizes.push(there.bytes.length)
    }
    return yield* new StoreFailure({
      operation: "claim",
      key: this.#logKey(base + sizes.length + 1),
      detail: `the end of the log was not reached in ${takeOversMax} steps`,
      uncertain: false
    })
  })

  /** Only the very end may be damaged. */
  #checkBefore = Effect.fnUntraced(function* (this: Log, end: number) {
    const before = yield* this.#readSegment(end - 1)
    if (before._tag === "missing") return yield* this.#faultError(end - 1, "missing")
    if (before._tag === "damaged") return yield* this.#faultError(end - 1, before.fault)
    yield* this.#checkEarlier(end - 1, before.header)
  })

  /** The end of the log has to be an earlier owner's. */
  #checkEarlier = Effect.fnUntraced(function* (this: Log, seq: number, header: SegmentHeader) {
    if (header.seq !== seq) return yield* this.#misplaced(seq, header.seq)
    if (header.epoch < this.#epoch) return
    const detail = `it is of epoch ${header.epoch}, but the manifest has only come to ${this.#epoch}`
    return yield* new LogCorrupt({ object: this.#logKey(seq), fault: "epoch", detail })
  })

  /**
   * Keeps a copy of a damaged end and replaces it by an empty segment, if it is still the same object: never deleted, so
   * that nobody can take the position meanwhile. `undefined` where it has changed.
   */
  #cutEnd = Effect.fnUntraced(function* (this: Log, seq: number, found: Extract<Found, { _tag: "damaged" }>) {
    const aside = `${this.#prefix}/damaged/${hex16(seq)}-${hex16(this.#nextNonce())}`
    yield* this.#store.create(aside, found.bytes).pipe(Effect.catchTag("ObjectExists", () => Effect.void))
    const fence = this.#emptySegment(seq)
    const replaced = yield* Effect.result(this.#store.replace(this.#logKey(seq), fence, found.etag))
    if (Result.isFailure(replaced)) {
      const error = replaced.failure
      if (error._tag !== "StoreFailure") return undefined
      if (!error.uncertain) return yield* error
      const there = yield* this.#readSegment(seq)
      if (there._tag !== "segment" || !this.#isMine(there.header.nonce)) return undefined
    }
    this.#cut += 1
    yield* Effect.logWarning(
      `The log's last object ${this.#logKey(seq)} is damaged and was cut off: ${found.fault.message}. It is kept as ${aside}.`
    )
    return fence.length
  })

  #read(fromSeq: number): ReturnType<PartitionLogHandle["read"]> {
    return Stream.suspend(() => {
      const { prunedSeq } = this.#manifest
      if (fromSeq <= prunedSeq) return Stream.fail(new Compacted({ oldestSeq: prunedSeq + 1 }))
      return this.#segments(fromSeq - 1, this.#last, (seq, error) =>
        Effect.flatMap(
          this.#prunedSeq(),
          (pruned): Effect.Effect<never, Compacted | LogCorrupt | NewerFormat> =>
            Effect.fail(seq <= pruned ? new Compacted({ oldestSeq: pruned + 1 }) : error)
        )
      )
    })
  }

  #tail(upTo: number): PartitionLogHandle["tail"] {
    return this.#segments(this.#snapshot?.seq ?? 0, upTo, (seq, error) =>
      Effect.catchTag(this.#unlessOvertaken(error), "NotOwner", ({ detail }) =>
        Effect.fail(new StoreFailure({ operation: "tail", key: this.#logKey(seq), detail, uncertain: false }))
      )
    )
  }

  /** The segments after one position up to another that hold anything, checked, in order. */
  #segments<E>(
    after: number,
    upTo: number,
    failWith: (seq: number, error: LogCorrupt | NewerFormat) => Effect.Effect<never, E>
  ): Stream.Stream<LogEntry, E | StoreFailure> {
    return Stream.suspend(() => {
      let epoch = 0
      return Stream.range(after + 1, upTo).pipe(
        Stream.mapEffect((seq) => Effect.map(this.#readSegment(seq), (found) => ({ seq, found })), {
          concurrency: readAheadSegments
        }),
        Stream.mapEffect(({ seq, found }) => {
          const fail = (error: Effect.Effect<never, LogCorrupt | NewerFormat>) =>
            Effect.catch(error, (reason) => failWith(seq, reason))
          if (found._tag === "missing") return fail(this.#faultError(seq, "missing"))
          if (found._tag === "damaged") return fail(this.#faultError(seq, found.fault))
          const { header, bytes } = found
          if (header.seq !== seq) return fail(this.#misplaced(seq, header.seq))
          if (header.epoch < epoch || header.epoch > this.#epoch) {
            const detail = `it is of epoch ${header.epoch}, after one of epoch ${epoch} and under an owner of epoch ${this.#epoch}`
            return fail(Effect.fail(new LogCorrupt({ object: this.#logKey(seq), fault: "epoch", detail })))
          }
          epoch = header.epoch
          return Effect.succeed({ seq, bytes, count: header.count })
        }),
        Stream.filter(({ count }) => count > 0),
        Stream.map(({ seq, bytes }) => ({ seq, bytes }))
      )
    })
  }

  #append(encode: (position: LogPosition) => Uint8Array): Effect.Effect<Appended, NotOwner | StoreFailure> {
    return Effect.uninterruptible(
      Effect.suspend(() => {
        if (this.#appending) return Effect.die(new Error(`${this.#prefix}: two appends at one time`))
        this.#appending = true
        return Effect.ensuring(
          this.#appendOne(encode),
          Effect.sync(() => {
            this.#appending = false
          })
        )
      })
    )
  }

  #settle(): PartitionLogHandle["settle"] {
    if (this.#lost !== undefined) return Effect.fail(this.#lost)
    if (!this.#unsettled) return Effect.succeed(this.#recovered.splice(0))
    return Effect.map(
      this.#append((position) => encodeSegment({ ...position, dimensions: 0 }, [])),
      ({ recovered }) => recovered
    )
  }

  #appendOne = Effect.fnUntraced(function* (this: Log, encode: (position: LogPosition) => Uint8Array) {
    // Once more for each earlier attempt that turns out to be there, and there is at most one at a position.
    for (;;) {
      if (this.#lost !== undefined) return yield* this.#lost
      const seq = this.#last + 1
      const nonce = this.#nextNonce()
      const bytes = encode({ epoch: this.#epoch, seq, nonce })
      const sizeBytes = bytes.length
      const created = yield* Effect.result(this.#store.create(this.#logKey(seq), bytes, { checked: true }))
      let earlier: Extract<Found, { _tag: "segment" }> | undefined
      if (Result.isFailure(created)) {
        const there = yield* this.#whatIsThere(seq, created.failure)
        if (there.header.nonce !== nonce) earlier = there
      }
      yield* this.#confirmOwner(seq)
      this.#unsettled = false
      this.#last = seq
      this.#sizes.push(earlier?.bytes.length ?? sizeBytes)
      this.#tailBytes += earlier?.bytes.length ?? sizeBytes
      if (earlier === undefined) return { seq, recovered: this.#recovered.splice(0) }
      yield* Effect.logWarning(`An append that was reported as failed is in the log: ${this.#logKey(seq)}`)
      if (earlier.header.count > 0) this.#recovered.push({ seq, bytes: earlier.bytes })
      if (this.#recovered.length > recoveredMax) {
        return yield* this.#lose(`more than ${recoveredMax} appends were found after they had been reported as failed`)
      }
    }
  })

  /** After a create that did not succeed: the segment of this handle that is at the position. Fails where there is none. */
  #whatIsThere = Effect.fnUntraced(function* (this: Log, seq: number, error: ObjectExists | StoreFailure) {
    if (error._tag === "StoreFailure" && !error.uncertain) return yield* error
    const key = this.#logKey(seq)
    const read = yield* Effect.result(this.#readSegment(seq))
    if (Result.isFailure(read)) {
      this.#unsettled = true
      const first = error._tag === "StoreFailure" ? `${error.detail}; then ` : ""
      return yield* new StoreFailure({
        operation: "append",
        key,
        detail: `${first}${read.failure.detail}`,
        uncertain: true
      })
    }
    const found = read.success
    if (found._tag === "damaged") return yield* this.#lose(`${key} is taken by something that is no segment`)
    if (found._tag === "segment") {
      if (this.#isMine(found.header.nonce)) return found
      return yield* this.#lose(`${key} is of epoch ${found.header.epoch}`)
    }
    if (error._tag === "StoreFailure") {
      this.#unsettled = true
      // It may have been there, and pruned by another owner while this one slept.
      yield* this.#confirmOwner(seq)
      return yield* new StoreFailure({ ...fieldsOf(error), uncertain: false })
    }
    yield* this.#confirmOwner(seq, true)
    return yield* new StoreFailure({ operation: "append", key, detail: "it was there and is gone", uncertain: false })
  })

  /** Fails unless nobody else had claimed the partition when `seq` was created, or looked for: see the lease, above. */
  #confirmOwner = Effect.fnUntraced(function* (this: Log, seq: number, always = false) {
    if (!always && this.#leaseMillis > 0) {
      if (elapsedMillis(this.#seenAt, yield* now) < this.#leaseMillis) return
    }
    const owner = yield* Effect.result(this.#isOwner())
    if (Result.isFailure(owner)) {
      this.#unsettled = true
      const detail = `it may be written, and whether this is still the owner is not known: ${owner.failure.detail}`
      return yield* new StoreFailure({ operation: "append", key: this.#logKey(seq), detail, uncertain: true })
    }
    if (!owner.success) return yield* this.#overtaken()
  })

  #isOwner = Effect.fnUntraced(function* (this: Log) {
    const at = yield* now
    const seen = yield* Effect.result(this.#readManifest())
    if (Result.isFailure(seen)) {
      const error = seen.failure
      if (error._tag === "StoreFailure") return yield* error
      return yield* new StoreFailure({
        operation: "get",
        key: this.#manifestKey,
        detail: error.detail,
        uncertain: false
      })
    }
    if (!this.#isOwn(seen.success)) return false
    this.#seenAt = at
    return true
  })

  #isOwn(seen: SeenManifest | undefined): seen is SeenManifest {
    return seen !== undefined && seen.manifest.owner === this.#owner && seen.manifest.epoch === this.#epoch
  }

  #commitSnapshot(seq: number, files: SnapshotPaths): Effect.Effect<void, NotOwner | StoreFailure> {
    return Effect.suspend(() => {
      if (this.#snapshotting) return Effect.die(new Error(`${this.#prefix}: two snapshots at one time`))
      if (!Number.isInteger(seq) || seq < 0 || seq > this.#last) {
        return Effect.die(new RangeError(`${this.#prefix}: a snapshot of position ${seq}, the last is ${this.#last}`))
      }
      this.#snapshotting = true
      return Effect.ensuring(
        this.#makeSnapshot(seq, files),
        Effect.sync(() => {
          this.#snapshotting = false
        })
      ).pipe(Effect.annotateLogs({ partition: this.#prefix }), Effect.withSpan("PartitionLog.commitSnapshot"))
    })
  }

  #makeSnapshot = Effect.fnUntraced(function* (this: Log, seq: number, files: SnapshotPaths) {
    if (this.#lost !== undefined) return yield* this.#lost
    if (seq <= this.#snapshotSeq()) return
    const folder = `snapshot/${hex16(seq)}-${this.#epoch}-${hex16(this.#nextNonce())}`
    const records = yield* this.#storeFile(`${folder}/records`, files.records)
    const graph = yield* this.#storeFile(`${folder}/graph`, files.graph)
    const sketch =
      files.sketch === undefined ? {} : { sketch: yield* this.#storeFile(`${folder}/sketch`, files.sketch) }
    const requests =
      files.requests === undefined ? {} : { requests: yield* this.#storeFile(`${folder}/requests`, files.requests) }
    const createdMillis = yield* Clock.currentTimeMillis
    const snapshot: Snapshot = { seq, records, graph, ...sketch, ...requests, createdMillis }
    const fault = yield* this.#snapshotFault(snapshot)
    if (fault !== undefined) {
      const detail = `it reads back otherwise than it was written: ${fault.detail}`
      return yield* new StoreFailure({ operation: "snapshot", key: this.#keyOf(fault.key), detail, uncertain: false })
    }
    yield* Effect.uninterruptible(this.#changeManifest((manifest) => this.#withSnapshot(manifest, snapshot)))
    yield* this.#prune().pipe(
      Effect.catch((error) =>
        Effect.logWarning(
          `What the snapshot of position ${seq} made superfluous is not removed yet: ${error.detail}`,
          error.key
        )
      )
    )
  })

  #withSnapshot(manifest: PartitionManifest, snapshot: Snapshot): PartitionManifest {
    const others = manifest.snapshots.filter(({ seq }) => seq < snapshot.seq)
    const snapshots = [snapshot, ...others].slice(0, this.#snapshotsKept)
    // With fewer snapshots than are kept the whole log stays beside them.
    const oldest = snapshots.length === this.#snapshotsKept ? (snapshots.at(-1)?.seq ?? 0) : 0
    const limit = Math.min(oldest, this.#pruneLimit(this.#prefix))
    const { marks: before = [], ...rest } = manifest
    if (this.#retainMillis === 0) return { ...rest, snapshots, prunedSeq: Math.max(manifest.prunedSeq, limit) }
    const now = snapshot.createdMillis
    // What was in the log when it was marked is as old as the mark, or older.
    const isOld = ({ millis }: { readonly millis: number }) => now - millis >= this.#retainMillis
    const old = before.findLast(isOld)
    const upTo = Math.min(limit, old?.seq ?? 0)
    const newest = before.at(-1)
    const isDue = newest === undefined || now - newest.millis >= this.#retainMillis / marksKept
    const kept = before.filter((mark) => mark === old || !isOld(mark))
    const marks = isDue ? [...kept, { seq: snapshot.seq, millis: now }] : kept
    return { ...rest, snapshots, marks, prunedSeq: Math.max(manifest.prunedSeq, upTo) }
  }

  #storeFile = Effect.fnUntraced(function* (this: Log, key: string, file: string) {
    const { bytes, crc32 } = yield* checksumFile(file, this.#keyOf(key))
    const created = yield* Effect.result(this.#store.create(this.#keyOf(key), { file }))
    // Where nobody can say, reading it back does.
    if (Result.isFailure(created) && !(created.failure._tag === "StoreFailure" && created.failure.uncertain)) {
      if (created.failure._tag === "StoreFailure") return yield* created.failure
    }
    return { key, bytes, crc32 }
  })

  /** Removes log objects and snapshots that the manifest no longer counts. */
  #prune = Effect.fnUntraced(function* (this: Log) {
    // By the clock that nobody sets: a wall clock put forward would have it prune while an earlier owner's lease still runs.
    const age = monotonicMillis(this.#claimedAt, yield* now)
    if (age < this.#leaseMillis * pruneAfterLeases) return
    const end = this.#logKey(this.#manifest.prunedSeq)
    yield* this.#deleteWhere("log/", (key) => key <= end, end)
    const kept = new Set(this.#manifest.snapshots.flatMap(objectsOf).map(({ key }) => this.#keyOf(key)))
    // A newer owner's snapshots may be here before any manifest names them.
    yield* this.#deleteWhere("snapshot/", (key) => !kept.has(key) && (epochOf(key) ?? 0) <= this.#epoch, undefined)
  })

  #deleteWhere = Effect.fnUntraced(function* (
    this: Log,
    below: string,
    wanted: (key: string) => boolean,
    end: string | undefined
  ) {
    let startAfter = ""
    for (;;) {
      const page = yield* this.#store.list(`${this.#prefix}/${below}`, { startAfter, limit: pageObjects })
      yield* Effect.forEach(
        page.filter(({ key }) => wanted(key)),
        ({ key }) => this.#store.delete(key),
        { concurrency: deletesAtOnce, discard: true }
      )
      const last = page.at(-1)
      if (last === undefined || page.length < pageObjects || (end !== undefined && last.key >= end)) return
      startAfter = last.key
    }
  })

  /** Replaces the manifest, as long as this handle is its owner. `change` may be applied more than once. */
  #changeManifest = Effect.fnUntraced(function* (
    this: Log,
    change: (manifest: PartitionManifest) => PartitionManifest
  ) {
    for (let race = 0; race < racesMax; race++) {
      const manifest = change(this.#manifest)
      const body = encodeManifest(manifest)
      const replaced = yield* Effect.result(this.#store.replace(this.#manifestKey, body, this.#etag))
      if (Result.isSuccess(replaced)) {
        this.#adopt({ manifest, etag: replaced.success })
        return
      }
      const error = replaced.failure
      if (error._tag === "StoreFailure" && !error.uncertain) return yield* error
      const read = yield* Effect.result(this.#readManifest())
      if (Result.isFailure(read)) {
        const detail = `${error._tag === "StoreFailure" ? error.detail : error._tag}; then ${read.failure.detail}`
        return yield* new StoreFailure({ operation: "replace", key: this.#manifestKey, detail, uncertain: true })
      }
      const seen = read.success
      if (!this.#isOwn(seen)) return yield* this.#overtaken()
      // Ours: this write after all, or one of an earlier call that had been uncertain and came late.
      this.#adopt(seen)
      if (Buffer.from(encodeManifest(seen.manifest)).equals(body)) return
      if (error._tag === "StoreFailure") return yield* error
    }
    return yield* new StoreFailure({
      operation: "replace",
      key: this.#manifestKey,
      detail: `${racesMax} attempts met a changed manifest`,
      uncertain: false
    })
  })

  #adopt({ manifest, etag }: SeenManifest): void {
    this.#manifest = manifest
    this.#etag = etag
    this.#tailBytes -= sumOf(this.#sizes.splice(0, this.#snapshotSeq() - this.#sizesAfter))
    this.#sizesAfter = this.#snapshotSeq()
  }

  #snapshotSeq(): number {
    return this.#manifest.snapshots[0]?.seq ?? 0
  }

  /** The manifest as it is now; `undefined` where there is none. A damaged one is read twice before it is believed. */
  #readManifest = Effect.fnUntraced(function* (this: Log) {
    const object = this.#manifestKey
    for (let attempt = 1; ; attempt++) {
      const found = yield* Effect.result(this.#store.get(object))
      if (Result.isFailure(found)) {
        if (found.failure._tag === "ObjectMissing") return undefined
        return yield* found.failure
      }
      const { body, etag } = found.success
      const decoded = decodeManifest(body)
      if (Result.isSuccess(decoded)) return { manifest: decoded.success, etag }
      if (attempt < 2) continue
      const { detail, format } = decoded.failure
      if (format !== undefined && format > manifestFormat) {
        return yield* new NewerFormat({ object, found: format, supported: manifestFormat })
      }
      return yield* new LogCorrupt({ object, fault: "manifest", detail })
    }
  })

  /** The segment at a position. A damaged one is read twice before it is believed. */
  #readSegment = Effect.fnUntraced(function* (this: Log, seq: number): Effect.fn.Return<Found, StoreFailure> {
    for (let attempt = 1; ; attempt++) {
      const found = yield* Effect.result(this.#store.get(this.#logKey(seq)))
      if (Result.isFailure(found)) {
        if (found.failure._tag === "ObjectMissing") return { _tag: "missing" }
        return yield* found.failure
      }
      const { body: bytes, etag } = found.success
      try {
        return { _tag: "segment", header: verifySegment(bytes), bytes, etag }
      } catch (fault) {
        if (!(fault instanceof SegmentFault)) throw fault
        if (attempt === 2) return { _tag: "damaged", fault, bytes, etag }
      }
    }
  })

  /** The first object of a partition without a manifest. */
  #anythingLeft = Effect.fnUntraced(function* (this: Log) {
    for (const below of ["log/", "snapshot/"]) {
      const [first] = yield* this.#store.list(`${this.#prefix}/${below}`, { limit: 1 })
      if (first !== undefined) return first.key
    }
    return undefined
  })

  /** Up to where the log is pruned, also where another owner did it; where that cannot be read, nothing is damaged for certain. */
  #prunedSeq(): Effect.Effect<number, StoreFailure> {
    return this.#readManifest().pipe(
      // Without a manifest the whole partition was removed.
      Effect.map((seen) => seen?.manifest.prunedSeq ?? Number.MAX_SAFE_INTEGER - 1),
      Effect.catchTag(["LogCorrupt", "NewerFormat"], () => Effect.succeed(0)),
      Effect.map((seen) => Math.max(this.#manifest.prunedSeq, seen))
    )
  }

  #faultError(seq: number, fault: SegmentFault | "missing"): Effect.Effect<never, LogCorrupt | NewerFormat> {
    const object = this.#logKey(seq)
    if (fault === "missing") {
      return Effect.fail(new LogCorrupt({ object, fault, detail: "it is missing from the middle of the log" }))
    }
    if (fault.format !== undefined && fault.format > segmentFormat) {
      return Effect.fail(new NewerFormat({ object, found: fault.format, supported: segmentFormat }))
    }
    return Effect.fail(new LogCorrupt({ object, fault: fault.kind, detail: fault.message }))
  }

  #misplaced(seq: number, found: number): Effect.Effect<never, LogCorrupt> {
    const detail = `it holds the segment of position ${found}`
    return Effect.fail(new LogCorrupt({ object: this.#logKey(seq), fault: "position", detail }))
  }

  #overtaken(): Effect.Effect<never, NotOwner> {
    return this.#lose("another owner has claimed it")
  }

  #lose(detail: string): Effect.Effect<never, NotOwner> {
    this.#lost ??= this.#notOwner(detail)
    return Effect.fail(this.#lost)
  }

  #notOwner(detail: string): NotOwner {
    return new NotOwner({ prefix: this.#prefix, epoch: this.#epoch, detail })
  }

  #nextNonce(): bigint {
    this.#attempts += 1
    return this.#nonces | BigInt(this.#attempts & 0xff_ffff)
  }

  #isMine(nonce: bigint): boolean {
    return nonce >> 24n === this.#nonces >> 24n
  }

  #emptySegment(seq: number): Uint8Array {
    return encodeSegment({ epoch: this.#epoch, seq, nonce: this.#nextNonce(), dimensions: 0 }, [])
  }

  get #manifestKey(): string {
    return `${this.#prefix}/manifest`
  }

  #logKey(seq: number): string {
    return `${this.#prefix}/log/${hex16(seq)}`
  }

  #keyOf(key: string): string {
    return `${this.#prefix}/${key}`
  }
}

/** The snapshot with the keys of its objects as the store has them, where the manifest's are below its prefix. */
const withStoreKeys = (prefix: string, snapshot: Snapshot | undefined): Snapshot | undefined => {
  if (snapshot === undefined) return undefined
  const withKey = (object: SnapshotObject) => ({ ...object, key: `${prefix}/${object.key}` })
  const sketch = snapshot.sketch === undefined ? {} : { sketch: withKey(snapshot.sketch) }
  const requests = snapshot.requests === undefined ? {} : { requests: withKey(snapshot.requests) }
  return { ...snapshot, records: withKey(snapshot.records), graph: withKey(snapshot.graph), ...sketch, ...requests }
}

/** What is wrong with a snapshot's object; `undefined` where it is whole. */
const objectFault = (
  store: Store,
  key: string,
  object: SnapshotObject
): Effect.Effect<string | undefined, StoreFailure> =>
  store
    .withFile(key, (path) =>
      Effect.map(checksumFile(path, key), (found) => {
        if (found.bytes !== object.bytes) return `${object.key} has ${found.bytes} bytes, not ${object.bytes}`
        return found.crc32 === object.crc32 ? undefined : `the checksum of ${object.key} differs`
      })
    )
    .pipe(Effect.catchTag("ObjectMissing", () => Effect.succeed(`${object.key} is missing`)))

export interface SeenManifest {
  readonly manifest: PartitionManifest
  readonly etag: string
}

/** Two clocks, since the one stands still while a machine sleeps and the other may be set back. */
interface Instant {
  readonly monotonicNanos: bigint
  readonly wallMillis: number
}

const now: Effect.Effect<Instant> = Clock.clockWith((clock) =>
  Effect.sync(() => ({
    monotonicNanos: clock.monotonicTimeNanosUnsafe(),
    wallMillis: clock.currentTimeMillisUnsafe()
  }))
)

const monotonicMillis = (from: Instant, to: Instant): number => Number(to.monotonicNanos - from.monotonicNanos) / 1e6

/** At least what has passed, so that a lease is never thought to run on. */
const elapsedMillis = (from: Instant, to: Instant): number =>
  Math.max(monotonicMillis(from, to), to.wallMillis - from.wallMillis)

const seqOf = (key: string): number | undefined => {
  const name = /\/log\/([0-9a-f]{16})$/.exec(key)?.[1]
  return name === undefined ? undefined : Number.parseInt(name, 16)
}

/** The epoch in a snapshot object's key. */
const epochOf = (key: string): number | undefined => {
  const epoch = /\/snapshot\/[0-9a-f]{16}-(\d{1,15})-[^/]*\/[^/]+$/.exec(key)?.[1]
  return epoch === undefined ? undefined : Number(epoch)
}

const fieldsOf = ({ operation, key, detail }: StoreFailure) => ({ operation, key, detail })

/** Length and CRC-32 of a file; `key` is what errors name. */
export const checksumFile = (
  path: string,
  key: string
): Effect.Effect<{ bytes: number; crc32: number }, StoreFailure> =>
  Effect.tryPromise({
    try: async () => {
      const file = await openFile(path, "r")
      try {
        const { size } = await file.stat()
        const chunk = Buffer.allocUnsafeSlow(Math.max(1, Math.min(size, checksumChunkBytes)))
        let bytes = 0
        let sum = 0
        for (;;) {
          const { bytesRead } = await file.read(chunk, 0, chunk.length, bytes)
          if (bytesRead === 0) return { bytes, crc32: sum }
          sum = crc32(chunk.subarray(0, bytesRead), sum)
          bytes += bytesRead
        }
      } finally {
        await file.close()
      }
    },
    catch: (cause) => new StoreFailure({ operation: "checksum", key, detail: String(cause), uncertain: false })
  })
