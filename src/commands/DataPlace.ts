/** Opens the objects of a node's data, a directory or a bucket, for commands. */
import { existsSync } from "node:fs"
import { join } from "node:path"
import { Context, Effect, Layer, type Scope } from "effect"
import { defaultSettings } from "../config.ts"
import { scratchDirectory, shownPlace } from "../tiers/BackupStore.ts"
import * as Bucket from "../tiers/Bucket.ts"
import { isBucketUrl } from "../tiers/Bucket.ts"
import * as DataDirectory from "../tiers/DataDirectory.ts"
import * as FileObjectStore from "../tiers/FileObjectStore.ts"
import { ObjectStore } from "../tiers/ObjectStore.ts"
import { Refused, refusing } from "./Refused.ts"

export interface DataPlace {
  readonly store: ObjectStore["Service"]
  /** A directory for files under way. */
  readonly scratch: string
}

/**
 * Data that are there: a directory that no node uses, or a bucket or a cluster's directory, which nodes may use meanwhile: what
 * is read of these is whole and fenced, object by object.
 */
export const openData = (data: string): Effect.Effect<DataPlace, Refused, Scope.Scope> =>
  Effect.gen(function* () {
    if (isBucketUrl(data)) {
      const place = yield* openBucket(data)
      const [first] = yield* place.store.list("", { limit: 1 })
      if (first === undefined) return yield* new Refused({ message: `there are no data in ${data}` })
      return place
    }
    if (!existsSync(join(data, "FORMAT"))) {
      return yield* new Refused({ message: `there is no data directory ${shownPlace(data)}` })
    }
    return yield* openDirectory(data).pipe(
      Effect.catchTag("DataDirectoryLocked", (error) =>
        Effect.fail(
          new Refused({
            message: `a node uses ${shownPlace(data)} (process ${error.pid}): stop it, or let it back itself up with serve --backup-to`
          })
        )
      )
    )
  }).pipe(refusing)

/**
 * Where data are to be restored: a directory that no node uses, made where it is missing, or a bucket. Nodes of a cluster that
 * run do not look into the catalogue for collections that one of them did not make, so they are not restored beside.
 */
export const openTarget = (data: string): Effect.Effect<DataPlace, Refused, Scope.Scope> =>
  refusing<DataPlace, BucketError | DirectoryError | Refused, Scope.Scope>(
    isBucketUrl(data)
      ? openBucket(data)
      : Effect.gen(function* () {
          const [pid] = yield* Effect.promise(() => DataDirectory.sharersOf(data))
          if (pid === undefined) return yield* openDirectory(data)
          return yield* new Refused({
            message: `nodes of cell ${yield* cellOf(data)} use ${shownPlace(data)} (process ${pid}): stop all of them to restore into it, or restore into another directory`
          })
        })
  )

const cellOf = (path: string) => Effect.promise(() => DataDirectory.cellOf(path))

type BucketError = Effect.Error<ReturnType<typeof openBucket>>
type DirectoryError = Effect.Error<ReturnType<typeof openDirectory>>

const openBucket = Effect.fnUntraced(function* (url: string) {
  const scratch = yield* scratchDirectory
  const context = yield* Layer.build(Bucket.layer(url, scratch, defaultSettings))
  return { store: Context.get(context, ObjectStore), scratch }
})

const openDirectory = Effect.fnUntraced(function* (path: string) {
  const cell = yield* cellOf(path)
  const directory = yield* DataDirectory.open({ path, ...(cell === undefined ? {} : { sharedBy: cell }) })
  const context = yield* Layer.build(FileObjectStore.layer({ directory: directory.objects }))
  return { store: Context.get(context, ObjectStore), scratch: directory.scratch }
})
