/**
 * The directory in which a node without an object store keeps everything: `objects/` (a {@link FileObjectStore}),
 * `scratch/` (files under way), `FORMAT` (what wrote it) and `LOCK` (who uses it). One process at a time.
 *
 * Or the members of a cluster on one machine, or on a file system they share: then `CLUSTER` names their cell, each has
 * a folder of its own in `scratch/`, and they take `LOCK` only while they open the directory. What they write is fenced by the
 * epochs of the partitions.
 */
import { link, mkdir, open as openFile, readdir, readFile, rm, stat, unlink } from "node:fs/promises"
import { dirname, join, resolve } from "node:path"
import { Context, Data, Effect, Layer, Option, Schedule, Schema, type Scope } from "effect"
import * as DirectoryLock from "./DirectoryLock.ts"
import { formatIdentity, isAlive, ownIdentity, parseIdentity } from "./ProcessIdentity.ts"

export interface DataDirectoryOptions {
  /** Made where it is missing, with the directories above it. */
  readonly path: string
  /** The program and its version, written into `FORMAT` of a new directory. */
  readonly createdBy?: string
  /** The cell whose nodes share the directory. */
  readonly sharedBy?: string
}

export class DataDirectory extends Context.Service<
  DataDirectory,
  {
    /** Absolute, as are the others. */
    readonly path: string
    /** For the object store. */
    readonly objects: string
    /**
     * Where files are made before they become objects: on the same file system, so that they are moved and not copied.
     * Emptied when the directory is opened.
     */
    readonly scratch: string
  }
>()("ruvector/tiers/DataDirectory") {
  /** Opens the data directory; it is free for another process when the layer is released. */
  static layer(options: DataDirectoryOptions): Layer.Layer<DataDirectory, DataDirectoryError> {
    return Layer.effect(DataDirectory, open(options))
  }
}

/** The version of the directory's layout that this program writes, and the newest that it reads. */
export const directoryFormat = 1

/** Another process uses the directory. */
export class DataDirectoryLocked extends Data.TaggedError("DataDirectoryLocked")<{
  readonly directory: string
  readonly pid: number
  /** Name of the holder's machine or container; empty where it is this one. */
  readonly elsewhere: string
}> {
  override get message(): string {
    const where = this.elsewhere === "" ? "" : ` on ${this.elsewhere}`
    const wait =
      this.elsewhere === ""
        ? ""
        : ` (if that one is gone for good, try again in ${DirectoryLock.lockForeignStaleMillis / 1_000} s)`
    return `The data directory ${this.directory} is in use by process ${this.pid}${where}: stop it, or choose another directory${wait}.`
  }
}

/** What should be the directory, or a part of the path to it, is something else. */
export class DataDirectoryNotDirectory extends Data.TaggedError("DataDirectoryNotDirectory")<{
  readonly directory: string
}> {
  override get message(): string {
    return `The data directory ${this.directory} cannot be: it, or a part of the path to it, is a file.`
  }
}

/** This process may not make or write the directory. */
export class DataDirectoryNotWritable extends Data.TaggedError("DataDirectoryNotWritable")<{
  readonly directory: string
  readonly detail: string
}> {
  override get message(): string {
    return `The data directory ${this.directory} is not writable for this process: ${this.detail}.`
  }
}

/** The directory holds files of something else. */
export class DataDirectoryForeign extends Data.TaggedError("DataDirectoryForeign")<{
  readonly directory: string
  readonly found: string
}> {
  override get message(): string {
    return `The directory ${this.directory} is neither empty nor a data directory (it holds ${JSON.stringify(this.found)} and no FORMAT): choose another.`
  }
}

/** The directory was written by a newer version. */
export class DataDirectoryNewer extends Data.TaggedError("DataDirectoryNewer")<{
  readonly directory: string
  readonly format: number
  readonly createdBy: string
}> {
  override get message(): string {
    return `The data directory ${this.directory} has format ${this.format} (of ${this.createdBy}), this version reads up to ${directoryFormat}: start it with the version that wrote it, or a newer one.`
  }
}

/** The directory belongs to a cluster, and this is no node of it. */
export class DataDirectoryOfCluster extends Data.TaggedError("DataDirectoryOfCluster")<{
  readonly directory: string
  readonly cell: string
}> {
  override get message(): string {
    return `The data directory ${this.directory} belongs to the nodes of cell ${this.cell}: start this as one of them (--database-url, --cell), or remove the file ${clusterName} in it once none of them runs.`
  }
}

/** The directory could not be opened for another reason. */
export class DataDirectoryFailure extends Data.TaggedError("DataDirectoryFailure")<{
  readonly directory: string
  readonly detail: string
}> {
  override get message(): string {
    return `The data directory ${this.directory} cannot be opened: ${this.detail}.`
  }
}

/** Each has a one-line `message` for people. */
export type DataDirectoryError =
  | DataDirectoryLocked
  | DataDirectoryNotDirectory
  | DataDirectoryNotWritable
  | DataDirectoryForeign
  | DataDirectoryNewer
  | DataDirectoryOfCluster
  | DataDirectoryFailure

/** Opens the data directory until the scope closes. */
export const open: (
  options: DataDirectoryOptions
) => Effect.Effect<DataDirectory["Service"], DataDirectoryError, Scope.Scope> = Effect.fn("DataDirectory.open")(
  function* (options: DataDirectoryOptions) {
    const directory = resolve(options.path)
    const attempt = <A>(work: () => Promise<A>): Effect.Effect<A, DataDirectoryError> =>
      Effect.tryPromise({ try: work, catch: (cause) => errorOf(directory, cause) })

    yield* attempt(() => prepare(directory))
    const objects = join(directory, "objects")
    const scratches = join(directory, "scratch")
    const lock = DirectoryLock.acquire(directory).pipe(
      Effect.mapError((error) => {
        if (error._tag === "LockHeld") {
          return new DataDirectoryLocked({ directory, pid: error.pid, elsewhere: error.elsewhere })
        }
        return errorOf(directory, Object.assign(new Error(error.detail), { code: error.code }))
      })
    )
    const opened = (work: () => Promise<void>) =>
      attempt(async () => {
        await checkFormat(directory, options.createdBy ?? "ruvector-streaming")
        await checkCluster(directory, options.sharedBy)
        await work()
        await mkdir(objects, { recursive: true })
        await sync(directory)
      })
    const cell = options.sharedBy
    if (cell === undefined) {
      yield* lock
      yield* opened(async () => {
        await rm(scratches, { recursive: true, force: true })
        await mkdir(scratches)
      })
      return { path: directory, objects, scratch: scratches }
    }
    const scratch = join(scratches, formatIdentity(ownIdentity()))
    // Held for as long as opening takes; another node may be at it.
    yield* Effect.andThen(
      lock,
      opened(async () => {
        await mkdir(scratches, { recursive: true })
        for (const name of await readdir(scratches)) {
          const owner = parseIdentity(name)
          if (owner !== undefined && isAlive(owner) !== "dead") continue
          await rm(join(scratches, name), { recursive: true, force: true })
        }
        await mkdir(scratch)
      })
    ).pipe(
      Effect.scoped,
      Effect.retry({
        while: (error) => error._tag === "DataDirectoryLocked",
        schedule: Schedule.upTo(Schedule.spaced(lockPauseMillis), { duration: lockWaitMillis })
      })
    )
    yield* Effect.addFinalizer(() => Effect.ignore(attempt(() => rm(scratch, { recursive: true, force: true }))))
    return { path: directory, objects, scratch }
  }
)

/** The cell whose nodes share the directory; `undefined` where there is none. */
export const cellOf = async (path: string): Promise<string | undefined> => {
  const text = await readFile(join(path, clusterName), "utf8").catch(() => undefined)
  return text === undefined ? undefined : Option.getOrUndefined(decodeSharing(text))?.cell
}

/** Other processes that have a directory open which a cell shares: nodes and commands, of this machine or of another. */
export const sharersOf = async (path: string): Promise<ReadonlyArray<number>> => {
  const names = await readdir(join(path, "scratch")).catch(() => [])
  const identities = names.flatMap((name) => parseIdentity(name) ?? [])
  const own = formatIdentity(ownIdentity())
  return identities.filter((one) => formatIdentity(one) !== own && isAlive(one) !== "dead").map(({ pid }) => pid)
}

/** How long a node of a cluster waits for others that open the directory, and between two looks. */
const lockWaitMillis = 10_000
const lockPauseMillis = 50

/** Names the cell whose nodes share the directory. */
const clusterName = "CLUSTER"

const Sharing = Schema.Struct({ cell: Schema.String })
const decodeSharing = Schema.decodeUnknownOption(Schema.fromJsonString(Sharing))

/** Refuses a directory that is another's, and marks it as the cell's. */
const checkCluster = async (directory: string, cell: string | undefined): Promise<void> => {
  const path = join(directory, clusterName)
  const found = await readFile(path, "utf8").catch((cause: NodeJS.ErrnoException) => {
    if (cause.code !== "ENOENT") throw cause
    return undefined
  })
  if (found === undefined) {
    if (cell !== undefined) await writeWhole(directory, clusterName, `${JSON.stringify({ cell })}\n`)
    return
  }
  const other = Option.getOrUndefined(decodeSharing(found))?.cell ?? "(unreadable)"
  if (other !== cell) throw new DataDirectoryOfCluster({ directory, cell: other })
}

const formatName = "FORMAT"

const Format = Schema.Struct({ format: Schema.Int, createdBy: Schema.optionalKey(Schema.String) })

const decodeFormat = Schema.decodeUnknownOption(Schema.fromJsonString(Format))

/** What an empty directory may hold: a new file system's own folder, and what file managers leave. */
const ignored = new Set(["lost+found", ".DS_Store"])

const isError = (cause: unknown): cause is DataDirectoryError =>
  cause instanceof DataDirectoryForeign ||
  cause instanceof DataDirectoryNewer ||
  cause instanceof DataDirectoryOfCluster ||
  cause instanceof DataDirectoryFailure

const errorOf = (directory: string, cause: unknown): DataDirectoryError => {
  if (isError(cause)) return cause
  const code = (cause as NodeJS.ErrnoException | undefined)?.code
  const detail = cause instanceof Error ? cause.message : String(cause)
  switch (code) {
    case "EACCES":
    case "EPERM":
      return new DataDirectoryNotWritable({ directory, detail: "permission denied" })
    case "EROFS":
      return new DataDirectoryNotWritable({ directory, detail: "the file system is read-only" })
    case "ENOTDIR":
    case "EEXIST":
      return new DataDirectoryNotDirectory({ directory })
    case "ENOSPC":
      return new DataDirectoryFailure({ directory, detail: "no space is left on its device" })
    default:
      return new DataDirectoryFailure({ directory, detail })
  }
}

/** Makes the directory, and refuses one that is something else's before anything is written into it. */
const prepare = async (directory: string): Promise<void> => {
  const made = await makeMissing(directory)
  if (made !== undefined) {
    // `made` is the first of the directories that were missing: each of their names is to be on disk.
    for (let at = directory; at.length >= made.length; at = dirname(at)) await sync(dirname(at))
  }
  if (!(await stat(directory)).isDirectory()) throw Object.assign(new Error(directory), { code: "ENOTDIR" })
  const names = await readdir(directory)
  if (names.includes(formatName)) return
  const found = names.find((name) => !DirectoryLock.isLockFile(name) && !ignored.has(name) && !isOwnTemp(name))
  if (found !== undefined) throw new DataDirectoryForeign({ directory, found })
}

/**
 * Makes a directory and what is missing above it; the first of them that was made. Not `mkdir`'s own `recursive`, which
 * never returns in a place like `/proc`, where nothing can be made and nothing says so.
 */
const makeMissing = async (directory: string): Promise<string | undefined> => {
  const make = (): Promise<boolean> =>
    mkdir(directory).then(
      () => true,
      async (cause: NodeJS.ErrnoException) => {
        if (cause.code === "EEXIST" && (await stat(directory)).isDirectory()) return false
        throw cause
      }
    )
  try {
    return (await make()) ? directory : undefined
  } catch (cause) {
    if ((cause as NodeJS.ErrnoException).code !== "ENOENT" || dirname(directory) === directory) throw cause
    const above = await makeMissing(dirname(directory))
    return (await make()) ? (above ?? directory) : above
  }
}

const tempSuffix = ".new"
const isOwnTemp = (name: string): boolean => name === `${formatName}${tempSuffix}`

/** Reads `FORMAT`, or writes it where the directory is new. */
const checkFormat = async (directory: string, createdBy: string): Promise<void> => {
  const path = join(directory, formatName)
  let text: string
  try {
    text = await readFile(path, "utf8")
  } catch (cause) {
    if ((cause as NodeJS.ErrnoException).code !== "ENOENT") throw cause
    await writeWhole(directory, formatName, `${JSON.stringify({ format: directoryFormat, createdBy })}\n`)
    return
  }
  const found = Option.getOrUndefined(decodeFormat(text))
  if (found === undefined || found.format < 1) {
    throw new DataDirectoryFailure({ directory, detail: `${path} is damaged` })
  }
  if (found.format > directoryFormat) {
    throw new DataDirectoryNewer({ directory, format: found.format, createdBy: found.createdBy ?? "a newer version" })
  }
}

/** Puts a file there that is either whole or missing. */
const writeWhole = async (directory: string, name: string, text: string): Promise<void> => {
  const temp = join(directory, `${name}${tempSuffix}`)
  await rm(temp, { force: true })
  const file = await openFile(temp, "wx")
  try {
    await file.writeFile(text)
    await file.sync()
  } finally {
    await file.close()
  }
  await link(temp, join(directory, name))
  await unlink(temp)
  await sync(directory)
}

const sync = async (directory: string): Promise<void> => {
  const handle = await openFile(directory, "r")
  try {
    await handle.sync()
  } finally {
    await handle.close()
  }
}
