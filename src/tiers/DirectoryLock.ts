/**
 * One process at a time in a directory, by a file `LOCK` that names its holder and goes away with it.
 *
 * The file is put there by `link`, whole and only where there is none. A holder that died leaves it behind; then the right
 * to replace that one file is itself taken by `link`, of `LOCK.<nonce of the dead holder>.taken`, a name that no other lock
 * ever has. Whoever has the right and still finds the dead holder's file puts its own in its place by `rename`. Dying on
 * the way leaves the right behind, which is taken over the same way.
 */
import { randomBytes } from "node:crypto"
import { type FileHandle, link, open, readdir, readFile, rename, stat, unlink } from "node:fs/promises"
import { hostname } from "node:os"
import { join } from "node:path"
import { Data, Effect, Option, Schema, type Scope } from "effect"
import { isAlive, ownIdentity } from "./ProcessIdentity.ts"

/** The lock's name in its directory. */
export const lockName = "LOCK"

/** Names in the directory that belong to the lock. */
export const isLockFile = (name: string): boolean => lockFilePattern.test(name)

/**
 * How often a holder says that it lives, for processes that cannot see it (another machine or container), and how long
 * after the last time those take the lock over.
 */
export const lockBeatMillis = 5_000
export const lockForeignStaleMillis = 30_000

/** Another process has the lock. */
export class LockHeld extends Data.TaggedError("LockHeld")<{
  readonly directory: string
  readonly pid: number
  /** Empty where the holder is a process of this machine and container. */
  readonly elsewhere: string
}> {}

/** The file system failed, or the lock's file is none. `code` is the system's error code, if it was the system. */
export class LockFailure extends Data.TaggedError("LockFailure")<{
  readonly directory: string
  readonly detail: string
  readonly code: string | undefined
}> {}

/** Takes the lock until the scope closes. */
export const acquire: (directory: string) => Effect.Effect<void, LockHeld | LockFailure, Scope.Scope> = Effect.fn(
  "DirectoryLock.acquire"
)(function* (directory: string) {
  const held = yield* Effect.acquireRelease(
    Effect.tryPromise({
      try: () => take(directory),
      catch: (cause) =>
        cause instanceof LockHeld || cause instanceof LockFailure
          ? cause
          : new LockFailure({ directory, detail: String(cause), code: codeOf(cause) })
    }),
    (lock) => Effect.promise(() => giveBack(lock))
  )
  yield* Effect.forkScoped(beat(held))
})

const lockFilePattern = /^LOCK(?:\.[0-9a-f]{16}(?:\.taken)?)?$/

/** Times that taking the lock starts over because others came and went meanwhile. */
const attemptsMax = 256

const Holder = Schema.Struct({
  pid: Schema.Int,
  /** The kernel's start time of the process, and the machine start and pid namespace that it and `pid` belong to. */
  start: Schema.String,
  scope: Schema.String,
  host: Schema.String,
  nonce: Schema.String.check(Schema.isPattern(/^[0-9a-f]{16}$/))
})
type Holder = typeof Holder.Type

const decodeHolder = Schema.decodeUnknownOption(Schema.fromJsonString(Holder))

interface Held {
  readonly path: string
  readonly nonce: string
  readonly file: FileHandle
  readonly inode: bigint
}

const codeOf = (cause: unknown): string | undefined => {
  const code = (cause as { readonly code?: unknown } | undefined)?.code
  return typeof code === "string" ? code : undefined
}

const take = async (directory: string): Promise<Held> => {
  const nonce = randomBytes(8).toString("hex")
  const path = join(directory, lockName)
  const own = join(directory, `${lockName}.${nonce}`)
  const file = await open(own, "wx", 0o644)
  try {
    const holder: Holder = { ...ownIdentity(), host: hostname(), nonce }
    await file.writeFile(`${JSON.stringify(holder)}\n`)
    // So that a lock found after a power loss is a whole one.
    await file.sync()
    const { ino } = await file.stat({ bigint: true })
    await compete(directory, path, own)
    await sweep(directory, nonce)
    return { path, nonce, file, inode: ino }
  } catch (cause) {
    await file.close()
    throw cause
  } finally {
    await unlinkIfThere(own)
  }
}

/** Returns when `own` is at `path`. */
const compete = async (directory: string, path: string, own: string): Promise<void> => {
  for (let attempt = 0; attempt < attemptsMax; attempt++) {
    if (await linkIfFree(own, path)) return
    const holder = await readHolder(directory, path)
    if (holder === undefined) continue
    if (!holder.stale) throw heldBy(directory, holder)
    const right = await takeRight(directory, own, holder)
    if (right === undefined) continue
    const still = await readHolder(directory, path)
    if (still?.nonce === holder.nonce) {
      await rename(own, path)
      return
    }
    // Somebody had the right before and has used it.
    await unlinkIfThere(right)
  }
  throw new LockFailure({ directory, detail: "others took and left the lock again and again", code: undefined })
}

/** The right to replace a dead holder's file; `undefined` where it has been used meanwhile. */
const takeRight = async (directory: string, own: string, dead: Holder): Promise<string | undefined> => {
  let from = dead
  for (let depth = 0; depth < attemptsMax; depth++) {
    const right = join(directory, `${lockName}.${from.nonce}.taken`)
    if (await linkIfFree(own, right)) return right
    const taker = await readHolder(directory, right)
    if (taker === undefined) return undefined
    if (!taker.stale) throw heldBy(directory, taker)
    from = taker
  }
  return undefined
}

const heldBy = (directory: string, holder: Holder): LockHeld =>
  new LockHeld({ directory, pid: holder.pid, elsewhere: holder.scope === ownIdentity().scope ? "" : holder.host })

const readHolder = async (directory: string, path: string): Promise<(Holder & { stale: boolean }) | undefined> => {
  let text: string
  let beatMillis: number
  try {
    text = await readFile(path, "utf8")
    beatMillis = (await stat(path)).mtimeMs
  } catch (cause) {
    if (codeOf(cause) === "ENOENT") return undefined
    throw cause
  }
  const holder = Option.getOrUndefined(decodeHolder(text))
  if (holder === undefined) {
    const detail = `${path} is no lock of this program; remove it if no other process uses the directory`
    throw new LockFailure({ directory, detail, code: undefined })
  }
  const alive = isAlive(holder)
  const stale = alive === "dead" || (alive === "unknown" && Date.now() - beatMillis > lockForeignStaleMillis)
  return { ...holder, stale }
}

const linkIfFree = async (from: string, to: string): Promise<boolean> => {
  try {
    await link(from, to)
    return true
  } catch (cause) {
    if (codeOf(cause) === "EEXIST") return false
    throw cause
  }
}

const unlinkIfThere = async (path: string): Promise<void> => {
  try {
    await unlink(path)
  } catch (cause) {
    if (codeOf(cause) !== "ENOENT") throw cause
  }
}

/** Removes what dead starters left behind. Called by the holder: rights to earlier locks are worth nothing any more. */
const sweep = async (directory: string, nonce: string): Promise<void> => {
  for (const name of await readdir(directory)) {
    if (name === lockName || name.startsWith(`${lockName}.${nonce}`) || !isLockFile(name)) continue
    const path = join(directory, name)
    try {
      const holder = await readHolder(directory, path)
      if (holder?.stale === true || name.endsWith(".taken")) await unlinkIfThere(path)
    } catch {
      // A starter's file before it is written, or not ours to remove: it is in nobody's way.
    }
  }
}

const giveBack = async (lock: Held): Promise<void> => {
  try {
    if (await isOurs(lock)) await unlink(lock.path)
  } catch {
    // It names a process that is gone in a moment.
  }
  await lock.file.close()
}

const isOurs = async (lock: Held): Promise<boolean> => {
  try {
    return (await stat(lock.path, { bigint: true })).ino === lock.inode
  } catch (cause) {
    if (codeOf(cause) === "ENOENT") return false
    throw cause
  }
}

/** Says every few seconds that the holder lives; ends, with an error logged, when the lock is another's. */
const beat = Effect.fnUntraced(function* (lock: Held) {
  while (true) {
    yield* Effect.sleep(lockBeatMillis)
    const ours = yield* Effect.promise(async () => {
      try {
        const now = Date.now() / 1_000
        await lock.file.utimes(now, now)
        return await isOurs(lock)
      } catch {
        // A disk that fails now and then; the next beat tells.
        return true
      }
    })
    if (!ours)
      return yield* Effect.logError(
        "The data directory's lock is gone or another's; stop one of the processes",
        lock.path
      )
  }
})
