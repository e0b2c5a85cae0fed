/** Opens the place that backups are in, a directory or a bucket, by what an operator calls it. */
import { mkdtemp, rm, stat } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join, relative, resolve } from "node:path"
import { Context, Data, Effect, Layer, type Scope } from "effect"
import { runsPrefix } from "./BackupReader.ts"
import { type BucketSettings, layer as bucketLayer, bucketOf, isBucketUrl } from "./Bucket.ts"
import * as FileObjectStore from "./FileObjectStore.ts"
import { ObjectStore } from "./ObjectStore.ts"

/** `message` is one line for people. */
export class BackupPlaceError extends Data.TaggedError("BackupPlaceError")<{ readonly message: string }> {}

/**
 * Opens a backup for writing: a directory, made where it is missing, or `gs://bucket/prefix`. It must not lie in what it is
 * a backup of, nor around it: `data` names that, a directory or a bucket.
 */
export const openToWrite = Effect.fn("BackupStore.openToWrite")(function* (
  place: string,
  data: string,
  settings: BucketSettings
): Effect.fn.Return<ObjectStore["Service"], BackupPlaceError, Scope.Scope> {
  yield* checkPlace(place)
  if (lieTogether(place, data)) {
    const message = `the backup ${shownPlace(place)} lies in the data ${isBucketUrl(data) ? "bucket's prefix" : "directory"}: choose a place that is not lost with it`
    return yield* new BackupPlaceError({ message })
  }
  return yield* openPlace(place, settings)
})

/** Opens a backup that is there. */
export const openToRead = Effect.fn("BackupStore.openToRead")(function* (
  place: string,
  settings: BucketSettings
): Effect.fn.Return<ObjectStore["Service"], BackupPlaceError, Scope.Scope> {
  yield* checkPlace(place)
  const missing = () => new BackupPlaceError({ message: `there is no backup in ${shownPlace(place)}` })
  if (!isBucketUrl(place)) {
    // Before the store is opened, which would make the directory.
    const found = yield* Effect.promise(() => stat(join(resolve(place), "runs")).catch(() => undefined))
    if (found === undefined) return yield* missing()
    return yield* openPlace(place, settings)
  }
  const store = yield* openPlace(place, settings)
  const runs = yield* Effect.mapError(
    store.list(runsPrefix, { limit: 1 }),
    ({ detail }) => new BackupPlaceError({ message: `the backup ${shownPlace(place)} cannot be read: ${detail}` })
  )
  return runs.length === 0 ? yield* missing() : store
})

/** A place as people are told it: directories in full. */
export const shownPlace = (place: string): string => (isBucketUrl(place) ? place : resolve(place))

const checkPlace = (place: string): Effect.Effect<void, BackupPlaceError> =>
  /^[a-z0-9+]+:\/\//.test(place) && !isBucketUrl(place)
    ? Effect.fail(new BackupPlaceError({ message: `${place}: expected a directory or gs://bucket/prefix` }))
    : Effect.void

const lieTogether = (place: string, data: string): boolean => {
  if (isBucketUrl(place) !== isBucketUrl(data)) return false
  if (!isBucketUrl(place)) {
    const within = relative(resolve(data), resolve(place))
    return within === "" || !(within.startsWith("..") || within.startsWith("/"))
  }
  const [one, other] = [bucketOf(place), bucketOf(data)]
  if (one === undefined || other === undefined || one.bucket !== other.bucket) return false
  return one.prefix.startsWith(other.prefix) || other.prefix.startsWith(one.prefix)
}

const openPlace = Effect.fnUntraced(function* (
  place: string,
  settings: BucketSettings
): Effect.fn.Return<ObjectStore["Service"], BackupPlaceError, Scope.Scope> {
  const layer: Layer.Layer<ObjectStore, { readonly detail: string }> = isBucketUrl(place)
    ? bucketLayer(place, yield* scratchDirectory, settings)
    : FileObjectStore.layer({ directory: resolve(place) })
  const context = yield* Effect.mapError(
    Layer.build(layer),
    ({ detail }) => new BackupPlaceError({ message: `the backup ${shownPlace(place)} cannot be opened: ${detail}` })
  )
  return Context.get(context, ObjectStore)
})

/** For downloads of a bucket, until the scope closes. */
export const scratchDirectory = Effect.acquireRelease(
  Effect.promise(() => mkdtemp(join(tmpdir(), "ruvector-scratch-"))),
  (directory) => Effect.promise(() => rm(directory, { recursive: true, force: true }))
)
