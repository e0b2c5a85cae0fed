/**
 * An owner of a partition as the real one behaves, with a list of ids in the place of an index, for tests of the log.
 */
import { randomUUID } from "node:crypto"
import { readFile, rm, writeFile } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { Effect, Stream } from "effect"
import { decodeSegment, encodeSegment } from "../../src/tiers/LogSegment.ts"
import { ObjectStore } from "../../src/tiers/ObjectStore.ts"
import * as PartitionLog from "../../src/tiers/PartitionLog.ts"

export const prefix = "collections/c1/p000"

export const logKey = (seq: number): string => `${prefix}/log/${seq.toString(16).padStart(16, "0")}`

/** What an index has applied: positions and the ids of their segments. */
export type Applied = ReadonlyArray<readonly [seq: number, id: string]>

export interface Owner {
  readonly log: PartitionLog.PartitionLogHandle
  /** As the index knows it; after a failure of `append` it may lack what the log has. */
  readonly applied: () => Applied
  readonly append: (id: string) => Effect.Effect<number, PartitionLog.NotOwner | AppendFailure>
  readonly settle: Effect.Effect<void, PartitionLog.NotOwner | AppendFailure>
  /** Snapshots everything applied. */
  readonly snapshot: Effect.Effect<void, PartitionLog.NotOwner | AppendFailure>
}

type AppendFailure = Effect.Error<ReturnType<PartitionLog.PartitionLogHandle["append"]>>

export const segmentOf = (position: PartitionLog.LogPosition, id: string): Uint8Array =>
  encodeSegment({ ...position, dimensions: 1 }, [
    { kind: "delete", id, version: { time: 1n, region: "r", counter: position.seq } }
  ])

export const idOf = (bytes: Uint8Array): string => decodeSegment(bytes).ops[0]?.id ?? ""

/** Opens the partition, with the snapshot and the tail applied. Strict by default: no lease. */
export const openOwner = Effect.fnUntraced(function* (
  options: PartitionLog.PartitionLogOptions = { leaseMillis: 0 },
  open: typeof PartitionLog.open = PartitionLog.open
) {
  const store = yield* ObjectStore
  const log = yield* open(prefix, options)
  const applied: Array<readonly [number, string]> = []
  const { snapshot } = log
  if (snapshot !== undefined) {
    const text = yield* store.withFile(snapshot.records.key, (path) => Effect.promise(() => readFile(path, "utf8")))
    applied.push(...(JSON.parse(text) as Applied))
  }
  yield* Stream.runForEach(log.tail, ({ seq, bytes }) =>
    Effect.sync(() => {
      applied.push([seq, idOf(bytes)])
    })
  )
  const recover = (entries: ReadonlyArray<PartitionLog.LogEntry>) => {
    for (const { seq, bytes } of entries) applied.push([seq, idOf(bytes)])
  }
  const owner: Owner = {
    log,
    applied: () => applied,
    append: (id) =>
      Effect.map(
        log.append((position) => segmentOf(position, id)),
        ({ seq, recovered }) => {
          recover(recovered)
          applied.push([seq, id])
          return seq
        }
      ),
    settle: Effect.map(log.settle, recover),
    snapshot: Effect.suspend(() => {
      const seq = applied.at(-1)?.[0] ?? 0
      return withSnapshotFiles(applied, (files) => log.commitSnapshot(seq, files))
    })
  }
  return owner
})

/** Calls `use` with two files of the form that the index's threads give. */
export const withSnapshotFiles = <A, E, R>(
  applied: Applied,
  use: (files: { readonly records: string; readonly graph: string }) => Effect.Effect<A, E, R>
): Effect.Effect<A, E, R> =>
  Effect.acquireUseRelease(
    Effect.promise(async () => {
      const files = { records: temporary(), graph: temporary() }
      await Promise.all([
        writeFile(files.records, JSON.stringify(applied)),
        writeFile(files.graph, `graph of ${applied.length}`)
      ])
      return files
    }),
    use,
    (files) => Effect.promise(() => Promise.all([rm(files.records, { force: true }), rm(files.graph, { force: true })]))
  )

const temporary = (): string => join(tmpdir(), `ruvector-snapshot-${randomUUID()}`)

/** Overwrites an object, as a failing disk would. */
export const damage = Effect.fnUntraced(function* (key: string, change: (bytes: Uint8Array) => Uint8Array) {
  const store = yield* ObjectStore
  const { body, etag } = yield* store.get(key)
  yield* store.replace(key, change(new Uint8Array(body)), etag)
})
