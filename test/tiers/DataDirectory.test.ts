import { type ChildProcess, spawn } from "node:child_process"
import { once } from "node:events"
import { chmod, mkdir, readdir, readFile, rm, symlink, utimes, writeFile } from "node:fs/promises"
import { join } from "node:path"
import { createInterface } from "node:readline"
import { fileURLToPath } from "node:url"
import { assert, describe, it } from "@effect/vitest"
import { Context, Effect, Exit, Layer, Scope } from "effect"
import * as DataDirectory from "../../src/tiers/DataDirectory.ts"
import * as DirectoryLock from "../../src/tiers/DirectoryLock.ts"
import { ownIdentity } from "../../src/tiers/ProcessIdentity.ts"
import { range, tempFolder } from "./objectStoreSuite.ts"

const holderProgram = fileURLToPath(new URL("dataDirectoryHolder.ts", import.meta.url))

interface Starter {
  readonly child: ChildProcess
  readonly outcome: string
  readonly message: string | undefined
}

/** A process that opens the directory; ends with the scope. */
const start = (directory: string, startAt = 0) =>
  Effect.acquireRelease(
    Effect.promise(async (): Promise<Starter> => {
      const child = spawn(process.execPath, [holderProgram, directory, String(startAt)], {
        stdio: ["pipe", "pipe", "inherit"]
      })
      const ended = once(child, "exit").then(() => `{"outcome":"ended without a word"}`)
      const line = once(createInterface({ input: child.stdout }), "line").then(([text]) => String(text))
      return { child, ...(JSON.parse(await Promise.race([line, ended])) as Pick<Starter, "outcome" | "message">) }
    }),
    ({ child }) => Effect.promise(() => end(child))
  )

const end = async (child: ChildProcess, signal?: NodeJS.Signals): Promise<void> => {
  if (child.exitCode !== null || child.signalCode !== null) return
  const ended = once(child, "exit")
  if (signal === undefined) child.stdin?.end()
  else child.kill(signal)
  await ended
}

const names = (directory: string) => Effect.promise(async () => (await readdir(directory)).sort())

const holder = (identity: Partial<ReturnType<typeof ownIdentity>>, nonce = "00000000000000aa") =>
  `${JSON.stringify({ ...ownIdentity(), host: "somewhere", nonce, ...identity })}\n`

const dead = { start: "1" }
const elsewhere = { scope: "0".repeat(16) }

/** What dead processes may leave: a lock; and starters that died with the right to replace it, one after the other. */
const leftovers: ReadonlyArray<ReadonlyArray<readonly [string, string]>> = [
  [],
  [["LOCK", holder(dead)]],
  [
    ["LOCK", holder(dead)],
    ["LOCK.00000000000000aa.taken", holder(dead, "00000000000000bb")],
    ["LOCK.00000000000000bb.taken", holder(dead, "00000000000000cc")],
    ["LOCK.00000000000000cc", holder(dead, "00000000000000cc")]
  ]
]

describe("data directory", () => {
  it.effect("is made, opened, closed and opened again", () =>
    Effect.gen(function* () {
      const directory = join(yield* tempFolder, "not", "there", "yet")
      for (let round = 0; round < 3; round++) {
        yield* Effect.scoped(
          Effect.gen(function* () {
            const opened = yield* DataDirectory.open({ path: directory, createdBy: "a test" })
            assert.deepStrictEqual(opened, {
              path: directory,
              objects: join(directory, "objects"),
              scratch: join(directory, "scratch")
            })
            assert.deepStrictEqual(yield* names(directory), ["FORMAT", "LOCK", "objects", "scratch"])
            assert.deepStrictEqual(yield* names(opened.scratch), [])
            yield* Effect.promise(() => writeFile(join(opened.scratch, "left"), "x"))
          })
        )
        assert.deepStrictEqual(yield* names(directory), ["FORMAT", "objects", "scratch"])
      }
      const format = JSON.parse(yield* Effect.promise(() => readFile(join(directory, "FORMAT"), "utf8")))
      assert.deepStrictEqual(format, { format: 1, createdBy: "a test" })
    })
  )

  it.effect("offers its paths as a service", () =>
    Effect.gen(function* () {
      const directory = yield* tempFolder
      const services = yield* Layer.build(DataDirectory.DataDirectory.layer({ path: directory }))
      assert.strictEqual(Context.get(services, DataDirectory.DataDirectory).objects, join(directory, "objects"))
    })
  )

  it.effect("is refused to a second opener, also of the same process", () =>
    Effect.gen(function* () {
      const directory = yield* tempFolder
      yield* DataDirectory.open({ path: directory })
      const error = yield* Effect.flip(DataDirectory.open({ path: directory }))
      assert.isTrue(error._tag === "DataDirectoryLocked" && error.pid === process.pid)
      assert.strictEqual(
        error.message,
        `The data directory ${directory} is in use by process ${process.pid}: stop it, or choose another directory.`
      )
      const { outcome, message } = yield* start(directory)
      assert.strictEqual(outcome, "DataDirectoryLocked")
      assert.include(message, `process ${process.pid}`)
    })
  )

  it.live(
    "is free again when its holder is killed, even where nobody has asked how it ended",
    () =>
      Effect.gen(function* () {
        const directory = yield* tempFolder
        for (let round = 0; round < 3; round++) {
          const { child, outcome } = yield* start(directory)
          assert.strictEqual(outcome, "held")
          const refused = yield* Effect.flip(DataDirectory.open({ path: directory }))
          assert.isTrue(refused._tag === "DataDirectoryLocked" && refused.pid === child.pid)
          yield* Effect.promise(() => end(child, "SIGKILL"))
          assert.include(yield* names(directory), "LOCK")
          yield* Effect.scoped(DataDirectory.open({ path: directory }))
          assert.deepStrictEqual(yield* names(directory), ["FORMAT", "objects", "scratch"])
        }
      }),
    30_000
  )

  it.effect("is held by one of many that start together, whatever is left of earlier ones", () =>
    Effect.gen(function* () {
      for (let round = 0; round < 40; round++) {
        const directory = yield* tempFolder
        for (const [name, text] of leftovers[round % leftovers.length] ?? []) {
          yield* Effect.promise(() => writeFile(join(directory, name), text))
        }
        const scopes = yield* Effect.forEach(range(20), () => Scope.make())
        const exits = yield* Effect.forEach(
          scopes,
          (scope) => Effect.exit(DirectoryLock.acquire(directory).pipe(Scope.provide(scope))),
          { concurrency: "unbounded" }
        )
        assert.strictEqual(exits.filter(Exit.isSuccess).length, 1)
        for (const exit of exits) {
          if (Exit.isFailure(exit)) assert.strictEqual((yield* Effect.flip(exit))._tag, "LockHeld")
        }
        assert.deepStrictEqual(yield* names(directory), ["LOCK"])
        for (const scope of scopes) yield* Scope.close(scope, Exit.void)
        assert.deepStrictEqual(yield* names(directory), [])
      }
    })
  )

  it.live(
    "is held by one of twenty processes that start together after a crash",
    () =>
      Effect.gen(function* () {
        const directory = yield* tempFolder
        for (const [name, text] of leftovers.at(-1) ?? []) {
          yield* Effect.promise(() => writeFile(join(directory, name), text))
        }
        const startAt = Date.now() + 4_000
        const starters = yield* Effect.forEach(range(20), () => start(directory, startAt), {
          concurrency: "unbounded"
        })
        const outcomes = starters.map(({ outcome }) => outcome).sort()
        assert.deepStrictEqual(outcomes, [...range(19).map(() => "DataDirectoryLocked"), "held"])
        assert.deepStrictEqual(yield* names(directory), ["FORMAT", "LOCK", "objects", "scratch"])
      }),
    60_000
  )

  it.effect("does not take a reused process id for its earlier bearer", () =>
    Effect.gen(function* () {
      const directory = yield* tempFolder
      yield* Effect.scoped(DataDirectory.open({ path: directory }))
      yield* Effect.promise(() => writeFile(join(directory, "LOCK"), holder(dead)))
      yield* Effect.scoped(DataDirectory.open({ path: directory }))
    })
  )

  it.effect("waits for a holder that it cannot see to fall silent", () =>
    Effect.gen(function* () {
      const directory = yield* tempFolder
      yield* Effect.scoped(DataDirectory.open({ path: directory }))
      const lock = join(directory, "LOCK")
      yield* Effect.promise(() => writeFile(lock, holder({ ...elsewhere, pid: 7 })))
      const error = yield* Effect.flip(DataDirectory.open({ path: directory }))
      assert.isTrue(error._tag === "DataDirectoryLocked" && error.elsewhere === "somewhere" && error.pid === 7)
      assert.include(error.message, "process 7 on somewhere")
      const silent = new Date(Date.now() - DirectoryLock.lockForeignStaleMillis - 1_000)
      yield* Effect.promise(() => utimes(lock, silent, silent))
      yield* Effect.scoped(DataDirectory.open({ path: directory }))
    })
  )

  it.effect("leaves another's lock alone when it closes", () =>
    Effect.gen(function* () {
      const directory = yield* tempFolder
      const scope = yield* Scope.make()
      yield* DataDirectory.open({ path: directory }).pipe(Scope.provide(scope))
      const lock = join(directory, "LOCK")
      yield* Effect.promise(async () => {
        await rm(lock)
        await writeFile(lock, holder(elsewhere))
      })
      yield* Scope.close(scope, Exit.void)
      assert.strictEqual(yield* Effect.promise(() => readFile(lock, "utf8")), holder(elsewhere))
    })
  )

  it.effect("refuses a lock that is none, and does not touch it", () =>
    Effect.gen(function* () {
      const directory = yield* tempFolder
      yield* Effect.promise(() => writeFile(join(directory, "LOCK"), "mine\n"))
      const error = yield* Effect.flip(DataDirectory.open({ path: directory }))
      assert.strictEqual(error._tag, "DataDirectoryFailure")
      assert.include(error.message, "LOCK is no lock of this program")
      assert.deepStrictEqual(yield* names(directory), ["LOCK"])
    })
  )

  it.effect("refuses a newer format, damage, and what is something else's", () =>
    Effect.gen(function* () {
      const folder = yield* tempFolder
      const directory = join(folder, "data")
      const refusal = (at = directory) =>
        Effect.map(Effect.flip(Effect.scoped(DataDirectory.open({ path: at }))), (error) => {
          assert.notInclude(error.message, "\n")
          return `${error._tag}: ${error.message}`
        })
      const format = (text: string) => Effect.promise(() => writeFile(join(directory, "FORMAT"), text))

      yield* Effect.scoped(DataDirectory.open({ path: directory }))
      yield* format(`{"format":2,"createdBy":"ruvector-streaming 9.0.0","more":[1]}`)
      assert.match(
        yield* refusal(),
        /^DataDirectoryNewer: .* format 2 \(of ruvector-streaming 9\.0\.0\).*start it with/
      )
      for (const text of ["", "{}", `{"format":"1"}`, `{"format":0,"createdBy":"x"}`, "\0\0"]) {
        yield* format(text)
        assert.match(yield* refusal(), /^DataDirectoryFailure: .*FORMAT is damaged/)
      }
      yield* Effect.promise(() => rm(join(directory, "FORMAT")))
      assert.match(yield* refusal(), /^DataDirectoryForeign: .*"objects"|"scratch"/)
      assert.notInclude(yield* names(directory), "LOCK")

      yield* Effect.promise(async () => {
        await mkdir(join(folder, "home"))
        await writeFile(join(folder, "home", "letter.txt"), "dear")
      })
      assert.match(yield* refusal(join(folder, "home")), /^DataDirectoryForeign: .*"letter\.txt"/)
      assert.deepStrictEqual(yield* names(join(folder, "home")), ["letter.txt"])
      assert.match(yield* refusal(join(folder, "home", "letter.txt")), /^DataDirectoryNotDirectory: /)
      assert.match(yield* refusal(join(folder, "home", "letter.txt", "data")), /^DataDirectoryNotDirectory: /)
      yield* Effect.promise(() => symlink(join(folder, "nowhere"), join(folder, "dangling")))
      assert.match(yield* refusal(join(folder, "dangling")), /^DataDirectory(NotDirectory|Failure): /)
    })
  )

  it.effect("refuses what it may not write", () =>
    Effect.gen(function* () {
      const folder = yield* tempFolder
      const directory = join(folder, "data")
      yield* Effect.promise(async () => {
        await mkdir(directory)
        await chmod(directory, 0o555)
        await chmod(folder, 0o555)
      })
      // Before the folder is removed, which needs it.
      yield* Effect.addFinalizer(() => Effect.promise(() => chmod(folder, 0o755)))
      yield* asOrdinaryUser
      for (const path of [directory, join(directory, "below")]) {
        const error = yield* Effect.flip(Effect.scoped(DataDirectory.open({ path })))
        assert.strictEqual(error._tag, "DataDirectoryNotWritable", error.message)
        assert.include(error.message, "permission denied")
      }
    })
  )
})

/** The superuser may write anything, so that such a test steps down while its scope is open. */
const asOrdinaryUser = Effect.acquireRelease(
  Effect.sync(() => {
    if (process.geteuid?.() !== 0) return false
    process.seteuid?.(65_534)
    return true
  }),
  (changed) => Effect.sync(() => (changed ? process.seteuid?.(0) : undefined))
)
