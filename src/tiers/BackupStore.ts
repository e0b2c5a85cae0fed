/** Opens the place that backups are in, by what an operator calls it. */
import { stat } from "node:fs/promises"
import { join, relative, resolve } from "node:path"
import { Context, Data, Effect, Layer, type Scope } from "effect"
import * as FileObjectStore from "./FileObjectStore.ts"
import { ObjectStore } from "./ObjectStore.ts"

/** `message` is one line for people. */
export class BackupPlaceError extends Data.TaggedError("BackupPlaceError")<{ readonly message: string }> {}

/**
 * Opens a backup for writing: a directory, made where it is missing, that does not lie in the data directory it is a
 * backup of.
 */
export const openToWrite = Effect.fn("BackupStore.openToWrite")(function* (
  place: string,
  dataDirectory: string
): Effect.fn.Return<ObjectStore["Service"], BackupPlaceError, Scope.Scope> {
  const directory = yield* directoryOf(place)
  const within = relative(resolve(dataDirectory), directory)
  if (within === "" || !(within.startsWith("..") || within.startsWith("/"))) {
    const message = `the backup ${directory} lies in the data directory: choose a place that is not lost with it`
    return yield* new BackupPlaceError({ message })
  }
  return yield* openDirectory(directory)
})

/** Opens a backup that is there. */
export const openToRead = Effect.fn("BackupStore.openToRead")(function* (
  place: string
): Effect.fn.Return<ObjectStore["Service"], BackupPlaceError, Scope.Scope> {
  const directory = yield* directoryOf(place)
  const found = yield* Effect.promise(() => stat(join(directory, "runs")).catch(() => undefined))
  if (found === undefined) return yield* new BackupPlaceError({ message: `there is no backup in ${directory}` })
  return yield* openDirectory(directory)
})

const directoryOf = (place: string): Effect.Effect<string, BackupPlaceError> =>
  /^[a-z0-9+]+:\/\//.test(place)
    ? Effect.fail(new BackupPlaceError({ message: `${place}: expected a directory` }))
    : Effect.succeed(resolve(place))

const openDirectory = (directory: string): Effect.Effect<ObjectStore["Service"], BackupPlaceError, Scope.Scope> =>
  Layer.build(FileObjectStore.layer({ directory })).pipe(
    Effect.map((context) => Context.get(context, ObjectStore)),
    Effect.mapError(
      ({ detail }) => new BackupPlaceError({ message: `the backup ${directory} cannot be opened: ${detail}` })
    )
  )
