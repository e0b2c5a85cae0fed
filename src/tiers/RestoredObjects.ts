/** Objects of a log as they come back from a backup: whole, and where nothing is yet. */
import { randomBytes } from "node:crypto"
import { Data, Effect } from "effect"
import { snapshotObjects, storedFault, withCopy } from "./Backup.ts"
import { BackupDamaged } from "./BackupManifest.ts"
import { hex16, type StoredSnapshot } from "./BackupReader.ts"
import { type ObjectStore, StoreFailure } from "./ObjectStore.ts"
import type { Snapshot } from "./PartitionManifest.ts"

type Store = ObjectStore["Service"]

/** The time is not one that can be restored, or the collection is none of that time. `message` is one line for people. */
export class NotRestorable extends Data.TaggedError("NotRestorable")<{ readonly message: string }> {}

/** ISO 8601, UTC. */
export const iso = (millis: number): string => new Date(millis).toISOString()

/** Objects of a partition are written under this epoch; the first owner raises it. */
export const restoredEpoch = 1

/** What is wrong with the objects of a snapshot. */
export const snapshotFault = Effect.fnUntraced(function* (store: Store, snapshot: StoredSnapshot) {
  for (const [name, digest] of Object.entries(snapshot.objects)) {
    const object = `${snapshot.prefix}/${name}`
    const detail = yield* storedFault(store, object, digest)
    if (detail !== undefined) return new BackupDamaged({ object, detail })
  }
  return undefined
})

/** Copies a snapshot below a prefix of the target. */
export const restoreSnapshot = Effect.fnUntraced(function* (
  backup: Store,
  target: Store,
  prefix: string,
  base: StoredSnapshot,
  scratch: string,
  progress: (bytes: number) => void
) {
  const folder = `snapshot/${hex16(base.seq)}-${restoredEpoch}-${randomBytes(8).toString("hex")}`
  const objects: Record<string, Snapshot["records"]> = {}
  for (const [name, digest] of Object.entries(base.objects)) {
    // The copy is another history: what was done in the one before has places in that one's log.
    if (name === "requests") continue
    const key = `${folder}/${name}`
    yield* withCopy(backup, `${base.prefix}/${name}`, digest, scratch, (file) =>
      target
        .create(`${prefix}/${key}`, { file })
        .pipe(Effect.catchTag("ObjectExists", () => Effect.fail(changedBeneath(key))))
    )
    objects[name] = { key, ...digest }
    progress(digest.bytes)
  }
  // Its objects by name, which a backup has for itself: that those are there without which there is no snapshot is seen below.
  const snapshot = { seq: base.seq, ...objects, createdMillis: base.createdMillis } as unknown as Snapshot
  for (const name of ["records", "graph"]) {
    if (snapshotObjects(snapshot).some(([found]) => found === name)) continue
    return yield* new BackupDamaged({ object: `${base.prefix}/about`, detail: `it names no ${name}` })
  }
  return snapshot
})

/** Creates an object that is not there. */
export const putNew = (target: Store, key: string, body: Uint8Array): Effect.Effect<void, StoreFailure> =>
  target.create(key, body).pipe(
    Effect.asVoid,
    Effect.catchTag("ObjectExists", () => Effect.fail(changedBeneath(key)))
  )

export const changedBeneath = (what: string) =>
  new StoreFailure({ operation: "restore", key: what, detail: "it was changed meanwhile", uncertain: false })
