/**
 * An object store in a directory, durable against power loss and safe between processes that share the directory.
 *
 * An object `a/b` is the file `a/b`, put there whole by `link`, which fails where the name is taken; on disk before that, or
 * (`checked`) right after it, and then two names say that it may not be on disk yet. Once replaced, its
 * states are the files `a/b~/<generation>`, each made by `link` too, and the highest is the current one; `a/b` stays and
 * says that the object exists. A generation that is a directory says that the object was deleted. Nothing but names
 * carries meaning, so a plain copy of the directory is a copy of the store. `~` is in no key.
 *
 * Two processes may therefore race for anything: one `link` wins. A process that slept through a generation's whole life
 * could find its name free again, so that after each `link` of a generation the winner looks whether it came in time.
 */
import {
  type BigIntStats,
  close,
  constants,
  copyFile,
  type Dirent,
  fstat,
  fsync,
  futimes,
  link,
  mkdir,
  open,
  read,
  readdir,
  rm,
  rmdir,
  stat,
  unlink,
  write
} from "node:fs"
import { dirname, join, resolve } from "node:path"
import { promisify } from "node:util"
import { Effect, Layer, Semaphore } from "effect"
import {
  checkObjectKey,
  checkObjectPrefix,
  type ListedObject,
  listLimitDefault,
  type ObjectBody,
  ObjectChanged,
  ObjectExists,
  ObjectMissing,
  ObjectStore,
  type StoredObject,
  StoreFailure,
  withFileOf
} from "./ObjectStore.ts"
import { formatIdentity, isAlive, ownIdentity, parseIdentity } from "./ProcessIdentity.ts"

export interface FileObjectStoreOptions {
  /** Made where it is missing. */
  readonly directory: string
  /** The file system, where a test wants another one than the machine's. */
  readonly files?: FileCalls
}

/** A directory as an {@link ObjectStore}. Fails where the directory cannot be made or written. */
export const layer = (options: FileObjectStoreOptions): Layer.Layer<ObjectStore, StoreFailure> =>
  Layer.effect(ObjectStore, make(options))

/** Operations on files under way at one time; more wait. */
export const concurrentFileOperationsMax = 32

/** Times an operation starts over because another one changed the object under it. */
const attemptsMax = 64

/**
 * Generations of a replaced object that stay beside the current one, so that a slow reader still finds what it has seen
 * the name of, and a slow writer can tell whether it came first.
 */
const generationsKept = 2

/** Sizes that a listing asks for at one time. */
const statsAtOnce = 16

/** Age in milliseconds after which left-over temporary files of another machine or container are removed. */
const foreignTempAgeMillis = 24 * 60 * 60 * 1_000

/** Files being closed, and temporary names being removed, that no operation waits for; with more of them it does. */
const tidyingMax = 32

/** Where objects lie until they are whole. No key begins with a tilde. */
const tempName = "~tmp"

/** What the store asks of the file system. Rejects with Node's errors, which carry a `code`. */
export interface FileCalls {
  readonly open: (path: string, flags: number | string) => Promise<number>
  readonly close: (fd: number) => Promise<void>
  readonly read: (fd: number, into: Uint8Array, offset: number, length: number, position: number) => Promise<number>
  readonly write: (fd: number, from: Uint8Array, offset: number, length: number, position: number) => Promise<number>
  readonly fsync: (fd: number) => Promise<void>
  readonly futimes: (fd: number, accessSeconds: number, modifiedSeconds: number) => Promise<void>
  readonly fstat: (fd: number) => Promise<BigIntStats>
  readonly stat: (path: string) => Promise<BigIntStats>
  readonly link: (from: string, to: string) => Promise<void>
  readonly unlink: (path: string) => Promise<void>
  readonly mkdir: (path: string) => Promise<void>
  readonly rmdir: (path: string) => Promise<void>
  readonly readdir: (path: string) => Promise<ReadonlyArray<Dirent>>
  readonly copyFile: (from: string, to: string) => Promise<void>
}

const readInto = promisify(read)
const writeFrom = promisify(write)
const statOfFile = promisify(fstat)
const statOfPath = promisify(stat)
const makeFolder = promisify(mkdir)
const entriesOf = promisify(readdir)

/** The machine's own file system. */
export const nodeFiles: FileCalls = {
  open: promisify<string, number | string, number>(open),
  close: promisify(close),
  read: async (fd, into, offset, length, position) => (await readInto(fd, into, offset, length, position)).bytesRead,
  write: async (fd, from, offset, length, position) =>
    (await writeFrom(fd, from, offset, length, position)).bytesWritten,
  fsync: promisify(fsync),
  futimes: promisify(futimes),
  fstat: (fd) => statOfFile(fd, { bigint: true }),
  stat: (path) => statOfPath(path, { bigint: true }),
  link: promisify(link),
  unlink: promisify(unlink),
  mkdir: async (path) => {
    await makeFolder(path)
  },
  rmdir: promisify(rmdir),
  readdir: (path) => entriesOf(path, { withFileTypes: true }),
  copyFile: promisify<string, string>(copyFile)
}

const make = Effect.fnUntraced(function* (options: FileObjectStoreOptions) {
  const files = new ObjectFiles(resolve(options.directory), options.files ?? nodeFiles)
  const permits = yield* Semaphore.make(concurrentFileOperationsMax)

  // A promise cannot be stopped, so neither is the fiber that waits for it: what it counts and holds stays true.
  const run = <A, E extends StoreError>(operation: string, key: string, act: () => Promise<A>): Effect.Effect<A, E> =>
    permits.withPermit(
      Effect.uninterruptible(
        Effect.callback<A, E>((resume) => {
          act().then(
            (value) => resume(Effect.succeed(value)),
            (cause: unknown) => {
              if (isStoreError(cause)) resume(Effect.fail(cause as E))
              else if (codeOf(cause) === undefined) resume(Effect.die(cause))
              else resume(Effect.fail(failureOf(operation, key, cause, false) as E))
            }
          )
        })
      )
    )

  yield* Effect.acquireRelease(
    run<void, StoreFailure>("open", options.directory, () => files.start()),
    () => Effect.promise(() => files.stop())
  )

  const localPath = (key: string) =>
    Effect.acquireRelease(
      run<string, ObjectMissing | StoreFailure>("localPath", key, () => files.hold(key)),
      (path) => Effect.promise(() => files.discard(path))
    )

  return ObjectStore.of({
    create: (key, body, createOptions) =>
      run("create", key, () => files.create(key, body, createOptions?.checked === true)),
    replace: (key, body, expected) => run("replace", key, () => files.replace(key, body, expected)),
    get: (key, range) => run("get", key, () => files.get(key, range)),
    list: (prefix, listOptions) =>
      run("list", prefix, () =>
        files.list(prefix, listOptions?.startAfter ?? "", listOptions?.limit ?? listLimitDefault)
      ),
    delete: (key) => run("delete", key, () => files.delete(key)),
    localPath,
    withFile: withFileOf(localPath)
  })
})

type StoreError = ObjectExists | ObjectMissing | ObjectChanged | StoreFailure

const isStoreError = (cause: unknown): cause is StoreError =>
  cause instanceof ObjectExists ||
  cause instanceof ObjectMissing ||
  cause instanceof ObjectChanged ||
  cause instanceof StoreFailure

const codeOf = (cause: unknown): string | undefined => {
  const code = (cause as { readonly code?: unknown } | undefined)?.code
  return typeof code === "string" ? code : undefined
}

/** Nothing of that name: also where what should be a folder on the way is a file. */
const isAbsent = (cause: unknown): boolean => codeOf(cause) === "ENOENT" || codeOf(cause) === "ENOTDIR"

const reasons: Readonly<Record<string, string>> = {
  ENOSPC: "no space left on the device",
  EDQUOT: "the disk quota is used up",
  EIO: "the device failed",
  EMFILE: "this process has too many files open",
  ENFILE: "the system has too many files open",
  EACCES: "no permission",
  EPERM: "not permitted",
  EROFS: "the file system is read-only",
  ENAMETOOLONG: "the name is too long for the file system",
  ENOTDIR: "a part of the path is an object"
}

const failureOf = (operation: string, key: string, cause: unknown, uncertain: boolean): StoreFailure => {
  const code = codeOf(cause)
  const reason = code === undefined ? undefined : reasons[code]
  const detail = reason === undefined ? String(cause) : `${reason} (${code})`
  return new StoreFailure({ operation, key, detail, uncertain })
}

const storeFailure = (operation: string, key: string, uncertain: boolean, detail: string): StoreFailure =>
  new StoreFailure({ operation, key, detail, uncertain })

/** The highest generation under `K~/`; 0 where the object was replaced by nothing yet. */
interface Top {
  readonly generation: number
  readonly deleted: boolean
}

const generationPattern = /^(?:0|[1-9]\d{0,14})$/

const generationsIn = (entries: ReadonlyArray<Dirent>): Array<number> =>
  entries
    .filter((entry) => generationPattern.test(entry.name))
    .map((entry) => Number(entry.name))
    .sort((a, b) => a - b)

const topOf = (entries: ReadonlyArray<Dirent>): Top | undefined => {
  let top: Top | undefined
  for (const entry of entries) {
    if (!generationPattern.test(entry.name)) continue
    const generation = Number(entry.name)
    if (top === undefined || generation > top.generation) top = { generation, deleted: entry.isDirectory() }
  }
  return top
}

// The inode alone is reused at once, and so may be the time: `prepare` gives each file a random one.
const identityOf = (stats: BigIntStats): string => `${stats.ino.toString(36)}-${stats.mtimeNs.toString(36)}`

const etagOf = (generation: number, stats: BigIntStats): string => `${generation}.${identityOf(stats)}`

const segmentPattern = /^[A-Za-z0-9_.-]+$/

class ObjectFiles {
  readonly #root: string
  readonly #calls: FileCalls
  readonly #temp: string
  #temps = 0
  /** Directories that are there and whose own names are on disk. */
  readonly #made = new Map<string, Promise<void>>()
  /** Directories whose last fsync failed with an object left in them: what is seen there may not be on disk. */
  readonly #unsynced = new Set<string>()
  /** Objects whose own fsync failed and that could not be taken back: what they hold may never be on disk. */
  readonly #doubtful = new Set<string>()
  readonly #tidying = new Set<Promise<void>>()

  constructor(root: string, calls: FileCalls) {
    this.#root = root
    this.#calls = calls
    const nonce = Math.floor(Math.random() * 0xffff_ffff).toString(36)
    this.#temp = join(root, tempName, `${formatIdentity(ownIdentity())}-${nonce}`)
  }

  async start(): Promise<void> {
    await this.#makeRoot(this.#root)
    const temps = join(this.#root, tempName)
    await this.#makeDirectory(temps)
    for (const entry of await this.#calls.readdir(temps)) await this.#sweep(join(temps, entry.name), entry.name)
    await this.#makeDirectory(this.#temp)
  }

  async stop(): Promise<void> {
    await Promise.all(this.#tidying)
    await ignoring(this.#removeTemps(this.#temp))
  }

  async create(key: string, body: ObjectBody, isChecked: boolean): Promise<string> {
    checkObjectKey(key)
    const path = this.#pathOf(key)
    if (isChecked && body instanceof Uint8Array) {
      const etag = await this.#createChecked(key, path, body)
      if (etag !== undefined) return etag
    }
    for (let attempt = 0; attempt < attemptsMax; attempt++) {
      const [top, prepared] = await both(this.#top(path), this.#prepare("create", key, body))
      try {
        if (top !== undefined && !top.deleted) throw new ObjectExists({ key })
        const etag =
          top === undefined
            ? await this.#createFirst(key, path, prepared)
            : await this.#createAgain(key, path, prepared, top.generation + 1)
        if (etag === undefined) continue
        // What was moved in is not left behind as well.
        if (!(body instanceof Uint8Array)) await ignoring(this.#calls.unlink(body.file))
        return etag
      } finally {
        await ignoring(this.#calls.unlink(prepared.path))
      }
    }
    throw storeFailure("create", key, false, "others created and deleted the object again and again")
  }

  async replace(key: string, body: Uint8Array, expected: string): Promise<string> {
    checkObjectKey(key)
    const path = this.#pathOf(key)
    const folder = `${path}~`
    for (let attempt = 0; attempt < attemptsMax; attempt++) {
      const current = await this.#current(key, path)
      const stats = await this.#statIfThere(current.path)
      if (stats === undefined) {
        if (!current.frozen) throw new ObjectMissing({ key })
        // Superseded between the look at the names and the look at the file.
        continue
      }
      if (etagOf(current.generation, stats) !== expected) throw new ObjectChanged({ key })
      const identity = identityOf(stats)
      const prepared = await this.#prepare("replace", key, body)
      try {
        if (!current.frozen && !(await this.#freeze(key, path, folder, identity))) continue
        const generation = current.generation + 1
        const target = join(folder, String(generation))
        try {
          await this.#calls.link(prepared.path, target)
        } catch (cause) {
          if (codeOf(cause) === "EEXIST") throw new ObjectChanged({ key })
          if (isAbsent(cause)) continue
          await this.#settleLink("replace", key, cause, prepared.stats, target)
        }
        const [before, top] = await both(this.#statIfThere(join(folder, String(current.generation))), this.#top(path))
        // Names become free in ascending order, and only generation 0 can be made a second time (by `#freeze`). So where
        // the predecessor is in its place, this name had not been taken before.
        const first = current.generation === 0 && top?.generation !== generation
        if (first || before === undefined || identityOf(before) !== identity) {
          // Later replacements are there already: built on this one, or this one comes long after its time.
          await ignoring(this.#calls.unlink(target))
          throw storeFailure("replace", key, true, "superseded at once")
        }
        await this.#syncOrUndo("replace", key, folder, target, prepared.stats, path, generation)
        await ignoring(this.#removeGenerationsBelow(folder, generation - generationsKept))
        return etagOf(generation, prepared.stats)
      } finally {
        await ignoring(this.#calls.unlink(prepared.path))
      }
    }
    throw storeFailure("replace", key, false, "others changed the object again and again")
  }

  async get(key: string, range?: { readonly offset: number; readonly length: number }): Promise<StoredObject> {
    checkObjectKey(key)
    const path = this.#pathOf(key)
    for (let attempt = 0; attempt < attemptsMax; attempt++) {
      const current = await this.#current(key, path)
      const fd = await this.#openIfThere(current.path)
      if (fd === undefined) {
        if (current.generation === 0 && !current.frozen) throw new ObjectMissing({ key })
        continue
      }
      try {
        const stats = await this.#calls.fstat(fd)
        if (!stats.isFile()) throw new ObjectMissing({ key })
        if (stats.nlink > current.names) await this.#calls.fsync(fd)
        const sizeBytes = Number(stats.size)
        const offset = Math.min(range?.offset ?? 0, sizeBytes)
        const length = Math.min(range?.length ?? sizeBytes, sizeBytes - offset)
        // Memory of its own, not a part of Node's pool: vectors in it are aligned, and it can be transferred.
        const body = Buffer.allocUnsafeSlow(length)
        let done = 0
        while (done < length) {
          const count = await this.#calls.read(fd, body, done, length - done, offset + done)
          if (count === 0)
            throw storeFailure("get", key, false, `the file ended after ${offset + done} bytes of ${sizeBytes}`)
          done += count
        }
        return { body, etag: etagOf(current.generation, stats), sizeBytes }
      } finally {
        await this.#calls.close(fd)
      }
    }
    throw storeFailure("get", key, false, "others changed the object again and again")
  }

  async list(prefix: string, startAfter: string, limit: number): Promise<ReadonlyArray<ListedObject>> {
    checkObjectPrefix(prefix)
    const found: Array<ListedObject> = []
    const folder = prefix.slice(0, prefix.lastIndexOf("/") + 1)
    await this.#walk(folder, prefix, startAfter, limit, found)
    return found
  }

  async delete(key: string): Promise<void> {
    checkObjectKey(key)
    const path = this.#pathOf(key)
    const folder = `${path}~`
    for (let attempt = 0; attempt < attemptsMax; attempt++) {
      const top = await this.#top(path)
      if (top === undefined) {
        const removed = await this.#unlinkObject(path)
        this.#doubtful.delete(path)
        // A first replacement that began meanwhile has kept the object under its other name.
        if (removed && (await this.#top(path)) !== undefined) continue
        if (removed) await this.#removeEmptyFolders(dirname(path))
        return
      }
      if (top.deleted) return
      const generation = top.generation + 1
      const marker = join(folder, String(generation))
      try {
        await this.#calls.mkdir(marker)
      } catch (cause) {
        if (codeOf(cause) === "EEXIST" || isAbsent(cause)) continue
        throw cause
      }
      if ((await this.#top(path))?.generation !== generation) {
        await ignoring(this.#calls.rmdir(marker))
        continue
      }
      try {
        await this.#sync(folder)
      } catch (cause) {
        throw failureOf("delete", key, cause, true)
      }
      // Deleted. Who made the marker cleans up, and nobody else, so that nothing newer is hit. The marker goes last, and
      // only when nothing that it hides can come back.
      await ignoring(this.#cleanUp(path, folder, generation, marker))
      return
    }
    throw storeFailure("delete", key, false, "others changed the object again and again")
  }

  /** A second name for the object's bytes, which stay there until {@link discard}, whatever becomes of the object. */
  async hold(key: string): Promise<string> {
    checkObjectKey(key)
    const path = this.#pathOf(key)
    for (let attempt = 0; attempt < attemptsMax; attempt++) {
      const current = await this.#current(key, path)
      const held = this.#tempPath()
      try {
        await this.#calls.link(current.path, held)
        if ((await this.#calls.stat(held)).nlink > current.names + 1n) await this.#sync(held)
        return held
      } catch (cause) {
        // Linking a folder is not permitted, and no object.
        const code = codeOf(cause)
        if (code === "EPERM" && (await this.#statIfThere(current.path))?.isFile() !== true)
          throw new ObjectMissing({ key })
        if (!isAbsent(cause)) throw cause
        if (current.generation === 0 && !current.frozen) throw new ObjectMissing({ key })
      }
    }
    throw storeFailure("localPath", key, false, "others changed the object again and again")
  }

  async discard(path: string): Promise<void> {
    await ignoring(this.#calls.unlink(path))
  }

  #pathOf(key: string): string {
    return join(this.#root, key)
  }

  #tempPath(): string {
    this.#temps += 1
    return join(this.#temp, String(this.#temps))
  }

  /** The highest generation of a replaced object; `undefined` where the object was never replaced. */
  async #top(path: string): Promise<Top | undefined> {
    try {
      return topOf(await this.#calls.readdir(`${path}~`))
    } catch (cause) {
      if (isAbsent(cause)) return undefined
      throw cause
    }
  }

  /** Where the object's bytes are, and under how many names; `frozen` where that is a generation's file. */
  async #current(key: string, path: string) {
    const folder = dirname(path)
    if (this.#doubtful.has(path)) throw storeFailure("get", key, false, "what it holds could not be put on disk")
    if (this.#unsynced.size > 0) {
      for (const doubtful of [folder, `${path}~`]) {
        if (!this.#unsynced.has(doubtful)) continue
        await this.#sync(doubtful)
        this.#unsynced.delete(doubtful)
      }
    }
    const top = await this.#top(path)
    if (top === undefined) return { generation: 0, path, frozen: false, names: 1n }
    if (top.deleted) throw new ObjectMissing({ key })
    const { generation } = top
    return { generation, path: join(`${path}~`, String(generation)), frozen: true, names: generation === 0 ? 2n : 1n }
  }

  async #createFirst(key: string, path: string, prepared: Prepared): Promise<string | undefined> {
    const folder = dirname(path)
    await this.#makeDirectory(folder)
    if (!(await this.#linkFirst(key, path, prepared.path, Promise.resolve(prepared.stats)))) return undefined
    const [, top] = await both(
      this.#syncOrUndo("create", key, folder, path, prepared.stats, path, undefined),
      this.#top(path)
    )
    return await this.#firstEtag(key, path, prepared.stats, top)
  }

  /**
   * Named before it is on disk, so that one commit of the file system's journal takes the bytes and the name. Until then the
   * file keeps its temporary name too: who sees it with two names puts it on disk before relying on it. `undefined` where it
   * has to be done otherwise.
   */
  async #createChecked(key: string, path: string, body: Uint8Array): Promise<string | undefined> {
    const folder = dirname(path)
    await this.#makeDirectory(folder)
    const temp = await this.#writeTemp(body)
    try {
      const looking = this.#calls.fstat(temp.fd)
      const [stats, isNamed] = await both(looking, this.#linkFirst(key, path, temp.path, looking))
      if (!isNamed) return undefined
      const [, top] = await both(
        this.#syncOrUndo("create", key, folder, path, stats, path, undefined, temp.fd),
        this.#top(path)
      )
      if (top?.deleted === true) {
        // Not seen by anybody: the object was deleted, and what says so is still there.
        if ((await this.#statIfThere(path))?.ino === stats.ino) await this.#calls.unlink(path)
        return undefined
      }
      return await this.#firstEtag(key, path, stats, top)
    } finally {
      await this.#later(ignoring(this.#calls.close(temp.fd)).then(() => this.#calls.unlink(temp.path)))
    }
  }

  /** Gives a prepared file its name. False where the folder was empty and was removed. */
  async #linkFirst(key: string, path: string, temp: string, stats: Promise<BigIntStats>): Promise<boolean> {
    try {
      await this.#calls.link(temp, path)
    } catch (cause) {
      const code = codeOf(cause)
      if (code === "EEXIST") {
        if ((await this.#statIfThere(path))?.isDirectory() !== true) throw new ObjectExists({ key })
        throw storeFailure("create", key, false, "the key is the folder of other objects")
      }
      if (code === "ENOENT") {
        this.#forgetWithParents(dirname(path))
        return false
      }
      await this.#settleLink("create", key, cause, await stats, path)
    }
    return true
  }

  async #firstEtag(key: string, path: string, stats: BigIntStats, top: Top | undefined): Promise<string> {
    if (top !== undefined) {
      // Either somebody has replaced the new object already, or the key's earlier life was not over.
      const first = await this.#statIfThere(join(`${path}~`, "0"))
      if (first?.ino !== stats.ino) throw storeFailure("create", key, true, "superseded at once")
    }
    return etagOf(0, stats)
  }

  async #createAgain(key: string, path: string, prepared: Prepared, generation: number): Promise<string | undefined> {
    const folder = `${path}~`
    const target = join(folder, String(generation))
    try {
      await this.#calls.link(prepared.path, target)
    } catch (cause) {
      if (codeOf(cause) === "EEXIST" || isAbsent(cause)) return undefined
      await this.#settleLink("create", key, cause, prepared.stats, target)
    }
    if ((await this.#top(path))?.generation !== generation) {
      await ignoring(this.#calls.unlink(target))
      throw storeFailure("create", key, true, "superseded at once")
    }
    await this.#syncOrUndo("create", key, folder, target, prepared.stats, path, generation)
    return etagOf(generation, prepared.stats)
  }

  /**
   * Gives a never replaced object its generation 0, a second name of the same file, so that whatever comes next has to
   * compete for generation 1. False where the object is another one by now.
   */
  async #freeze(key: string, path: string, folder: string, identity: string): Promise<boolean> {
    const first = join(folder, "0")
    try {
      await this.#calls.mkdir(folder)
    } catch (cause) {
      if (isAbsent(cause)) throw new ObjectMissing({ key })
      if (codeOf(cause) !== "EEXIST") throw cause
    }
    try {
      await this.#calls.link(path, first)
    } catch (cause) {
      if (isAbsent(cause)) {
        await ignoring(this.#calls.rmdir(folder))
        return false
      }
      if (codeOf(cause) !== "EEXIST") throw cause
    }
    const stats = await this.#statIfThere(first)
    if (stats === undefined || identityOf(stats) !== identity) return false
    if ((await this.#top(path))?.generation !== 0) {
      // The name was free again: this comes after the object's first replacements.
      await ignoring(this.#calls.unlink(first))
      return false
    }
    await this.#sync(dirname(path))
    return true
  }

  /** Writes a body where no name shows it, on disk when it returns. */
  async #prepare(operation: string, key: string, body: ObjectBody): Promise<Prepared> {
    if (!(body instanceof Uint8Array)) return await this.#prepareFile(operation, key, body.file)
    const { fd, path } = await this.#writeTemp(body)
    try {
      await this.#calls.fsync(fd)
      return { path, stats: await this.#calls.fstat(fd) }
    } catch (cause) {
      await ignoring(this.#calls.unlink(path))
      throw cause
    } finally {
      await this.#calls.close(fd)
    }
  }

  /** A body in a temporary file that is open and not on disk yet. */
  async #writeTemp(body: Uint8Array): Promise<Temp> {
    const path = this.#tempPath()
    const fd = await this.#inTemp(() => this.#calls.open(path, "wx"))
    try {
      let done = 0
      while (done < body.length) done += await this.#calls.write(fd, body, done, body.length - done, done)
      await this.#mark(fd)
      return { fd, path }
    } catch (cause) {
      await ignoring(this.#calls.unlink(path))
      await ignoring(this.#calls.close(fd))
      throw cause
    }
  }

  /** What nobody waits for, up to a bound. */
  async #later(work: Promise<unknown>): Promise<void> {
    const tidying = ignoring(work).then(() => void this.#tidying.delete(tidying))
    this.#tidying.add(tidying)
    if (this.#tidying.size > tidyingMax) await Promise.race(this.#tidying)
  }

  async #prepareFile(operation: string, key: string, file: string): Promise<Prepared> {
    if ((await this.#statIfThere(file))?.isFile() !== true) {
      throw storeFailure(operation, key, false, `there is no file ${file}`)
    }
    const path = this.#tempPath()
    try {
      await this.#inTemp(() => this.#calls.link(file, path))
    } catch {
      // On another file system, or not ours to link.
      await this.#calls.copyFile(file, path)
    }
    try {
      const fd = await this.#calls.open(path, "r+")
      try {
        await this.#mark(fd)
        await this.#calls.fsync(fd)
        return { path, stats: await this.#calls.fstat(fd) }
      } finally {
        await this.#calls.close(fd)
      }
    } catch (cause) {
      await ignoring(this.#calls.unlink(path))
      throw cause
    }
  }

  /** Another process may take this one for dead after a day without a write, and sweep its temporary folder away. */
  async #inTemp<A>(act: () => Promise<A>): Promise<A> {
    try {
      return await act()
    } catch (cause) {
      if (codeOf(cause) !== "ENOENT") throw cause
      this.#forgetWithParents(this.#temp)
      await this.#makeDirectory(this.#temp)
      return await act()
    }
  }

  /** Gives a file a time of its own: see {@link identityOf}. */
  async #mark(fd: number): Promise<void> {
    const seconds = Math.floor(Date.now() / 1_000)
    await this.#calls.futimes(fd, seconds, seconds + Math.random())
  }

  /** A `link` failed otherwise than because of the names: returns where it took effect all the same, else throws. */
  async #settleLink(operation: string, key: string, cause: unknown, stats: BigIntStats, target: string): Promise<void> {
    let there: BigIntStats | undefined
    try {
      there = await this.#statIfThere(target)
    } catch {
      throw failureOf(operation, key, cause, true)
    }
    if (there?.ino !== stats.ino || there.dev !== stats.dev) throw failureOf(operation, key, cause, false)
  }

  /** Puts a directory's new name on disk, and its file before where that is open; else takes the name away again and throws. */
  async #syncOrUndo(
    operation: string,
    key: string,
    folder: string,
    target: string,
    stats: BigIntStats,
    path: string,
    generation: number | undefined,
    file?: number
  ): Promise<void> {
    let isOnDisk = file === undefined
    const putOnDisk = async (fd: number) => {
      await this.#calls.fsync(fd)
      isOnDisk = true
    }
    try {
      await this.#sync(folder, file === undefined ? undefined : putOnDisk(file))
    } catch (cause) {
      let undone = false
      try {
        const there = await this.#statIfThere(target)
        if (there?.ino === stats.ino && there.dev === stats.dev) {
          await this.#calls.unlink(target)
          const top = await this.#top(path)
          // Not undone where somebody has built on it already.
          undone = top === undefined || (generation !== undefined && top.generation < generation)
        }
      } catch {
        undone = false
      }
      if (!undone) {
        this.#unsynced.add(folder)
        if (!isOnDisk) this.#doubtful.add(target)
      }
      throw failureOf(operation, key, cause, !undone)
    }
  }

  /** Puts a folder's names on disk, or a file; where there is something to be done before, after that. */
  async #sync(path: string, before: Promise<void> = Promise.resolve()): Promise<void> {
    const [opened, done] = await Promise.allSettled([this.#calls.open(path, constants.O_RDONLY), before])
    if (opened.status === "rejected") throw opened.reason
    try {
      if (done.status === "rejected") throw done.reason
      await this.#calls.fsync(opened.value)
    } finally {
      await this.#later(this.#calls.close(opened.value))
    }
  }

  async #removeGenerationsBelow(folder: string, generation: number): Promise<void> {
    // Ascending, so that the name before one that is free again is free too.
    for (const older of generationsIn(await this.#calls.readdir(folder))) {
      if (older < generation) await removeEither(this.#calls, join(folder, String(older)))
    }
  }

  async #cleanUp(path: string, folder: string, generation: number, marker: string): Promise<void> {
    await this.#unlinkObject(path)
    await this.#removeGenerationsBelow(folder, generation)
    await this.#sync(dirname(path))
    await this.#sync(folder)
    await this.#calls.rmdir(marker)
    await this.#calls.rmdir(folder)
    await this.#removeEmptyFolders(dirname(path))
  }

  /** Whether there was a file to unlink. */
  async #unlinkObject(path: string): Promise<boolean> {
    try {
      await this.#calls.unlink(path)
      return true
    } catch (cause) {
      const code = codeOf(cause)
      // A folder of other objects is none: Linux says EISDIR, others EPERM.
      if (isAbsent(cause) || code === "EISDIR") return false
      if (code === "EPERM" && (await this.#statIfThere(path))?.isDirectory() === true) return false
      throw cause
    }
  }

  async #statIfThere(path: string): Promise<BigIntStats | undefined> {
    try {
      return await this.#calls.stat(path)
    } catch (cause) {
      if (isAbsent(cause)) return undefined
      throw cause
    }
  }

  async #openIfThere(path: string): Promise<number | undefined> {
    try {
      return await this.#calls.open(path, constants.O_RDONLY)
    } catch (cause) {
      if (isAbsent(cause)) return undefined
      throw cause
    }
  }

  async #walk(
    folder: string,
    prefix: string,
    startAfter: string,
    limit: number,
    found: Array<ListedObject>
  ): Promise<void> {
    let entries: ReadonlyArray<Dirent>
    try {
      entries = await this.#calls.readdir(join(this.#root, folder))
    } catch (cause) {
      if (isAbsent(cause)) return
      throw cause
    }
    // Name of a key's last segment, or of a folder with its slash -> whether the object has generations.
    const names = new Map<string, boolean>()
    for (const entry of entries) {
      const { name } = entry
      const replaced = name.endsWith("~") && entry.isDirectory()
      const base = replaced ? name.slice(0, -1) : name
      if (!segmentPattern.test(base)) continue
      const key = `${folder}${base}`
      if (replaced || !entry.isDirectory()) {
        if (key.startsWith(prefix) && key > startAfter) names.set(base, replaced || names.get(base) === true)
        continue
      }
      const below = `${key}/`
      const wanted = below.startsWith(prefix) || prefix.startsWith(below)
      if (wanted && (below > startAfter || startAfter.startsWith(below))) names.set(`${base}/`, false)
    }
    // Folders sort by the slash that their keys go on with.
    const sorted = [...names.keys()].sort()
    for (let at = 0; at < sorted.length && found.length < limit; ) {
      const name = sorted[at] as string
      if (name.endsWith("/")) {
        at += 1
        await this.#walk(`${folder}${name}`, prefix, startAfter, limit, found)
        continue
      }
      let end = at + 1
      const most = at + Math.min(statsAtOnce, limit - found.length)
      while (end < sorted.length && end < most && !(sorted[end] as string).endsWith("/")) end += 1
      const group = sorted.slice(at, end)
      const sizes = await Promise.all(group.map((base) => this.#sizeOf(`${folder}${base}`, names.get(base) === true)))
      for (let i = 0; i < group.length; i++) {
        const sizeBytes = sizes[i]
        if (sizeBytes !== undefined) found.push({ key: `${folder}${group[i]}`, sizeBytes })
      }
      at = end
    }
  }

  /** `undefined` where there is no such object any more. */
  async #sizeOf(key: string, replaced: boolean): Promise<number | undefined> {
    const path = this.#pathOf(key)
    for (let attempt = 0; attempt < attemptsMax; attempt++) {
      try {
        const current = replaced ? await this.#current(key, path) : { path, frozen: false }
        const stats = await this.#statIfThere(current.path)
        if (stats !== undefined) return stats.isFile() ? Number(stats.size) : undefined
        if (!current.frozen) return undefined
      } catch (cause) {
        if (cause instanceof ObjectMissing) return undefined
        throw cause
      }
    }
    return undefined
  }

  /** Makes the root and the folders above it, and puts the new names on disk. */
  async #makeRoot(folder: string): Promise<void> {
    const above = dirname(folder)
    try {
      await this.#calls.mkdir(folder)
    } catch (cause) {
      const code = codeOf(cause)
      if (code === "ENOENT" && above !== folder) {
        await this.#makeRoot(above)
        return await this.#makeRoot(folder)
      }
      if ((await this.#statIfThere(folder))?.isDirectory() !== true) throw cause
      return
    }
    await this.#sync(above)
  }

  /** Makes a folder and those above it; each new name is put on disk once. */
  #makeDirectory(folder: string): Promise<void> {
    if (folder === this.#root) return Promise.resolve()
    const known = this.#made.get(folder)
    if (known !== undefined) return known
    const above = dirname(folder)
    const making = this.#makeDirectory(above)
      .then(() => this.#calls.mkdir(folder))
      .catch(async (cause) => {
        if (codeOf(cause) !== "ENOENT") throw cause
        // Another process has removed what is above, since it was empty.
        this.#forgetWithParents(above)
        await this.#makeDirectory(above)
        await this.#calls.mkdir(folder)
      })
      .catch((cause) => {
        if (codeOf(cause) !== "EEXIST") throw cause
      })
      // Also where it was there: who made it may have died before its name was on disk.
      .then(() => this.#sync(above))
    this.#made.set(folder, making)
    making.catch(() => this.#forgetWithParents(folder))
    return making
  }

  #forget(folder: string): void {
    this.#made.delete(folder)
  }

  #forgetWithParents(folder: string): void {
    for (let at = folder; at.length > this.#root.length; at = dirname(at)) this.#forget(at)
  }

  async #removeEmptyFolders(folder: string): Promise<void> {
    try {
      for (let at = folder; at.length > this.#root.length; at = dirname(at)) {
        await this.#calls.rmdir(at)
        this.#forget(at)
      }
    } catch {
      // Not empty, or gone already.
    }
  }

  /** Removes what another process left behind, if that process is dead. */
  async #sweep(path: string, name: string): Promise<void> {
    const owner = parseIdentity(name)
    const alive = owner === undefined ? "unknown" : isAlive(owner)
    if (alive === "alive") return
    if (alive === "unknown") {
      const stats = await this.#statIfThere(path)
      if (stats === undefined || Date.now() - Number(stats.mtimeMs) < foreignTempAgeMillis) return
    }
    await ignoring(this.#removeTemps(path))
  }

  /** Removes a temporary folder, after putting on disk what may not be: it says so no longer then. */
  async #removeTemps(folder: string): Promise<void> {
    for (const entry of await this.#calls.readdir(folder)) {
      const path = join(folder, entry.name)
      const stats = entry.isFile() ? await this.#statIfThere(path) : undefined
      if (stats !== undefined && stats.nlink > 1n) await this.#sync(path)
    }
    await removeAll(folder)
  }
}

/** A temporary file that is open. */
interface Temp {
  readonly fd: number
  readonly path: string
}

/** A whole body on disk, under a temporary name. */
interface Prepared {
  readonly path: string
  readonly stats: BigIntStats
}

const removeAll = (path: string): Promise<void> => promisify(rm)(path, { recursive: true, force: true })

const removeEither = async (calls: FileCalls, path: string): Promise<void> => {
  try {
    await calls.unlink(path)
  } catch (cause) {
    if (isAbsent(cause)) return
    await ignoring(calls.rmdir(path))
  }
}

/** What is only tidying up never fails what it tidies up after; what is left is removed at the next start. */
const ignoring = async (work: Promise<unknown>): Promise<void> => {
  try {
    await work
  } catch {}
}

/** Waits for both, also where the first fails, so that nothing goes on unseen. */
const both = async <A, B>(first: Promise<A>, second: Promise<B>): Promise<readonly [A, B]> => {
  const [a, b] = await Promise.allSettled([first, second])
  if (a.status === "rejected") throw a.reason
  if (b.status === "rejected") throw b.reason
  return [a.value, b.value]
}
