/**
 * A machine that loses its power, as a store's files see it. On its disk for certain is what `fsync` put there: a file's bytes
 * by one of the file, a folder's names by one of the folder. Of the rest, whatever the seed says.
 */
import { fstatSync, mkdirSync, readdirSync, readFileSync, statSync, writeFileSync } from "node:fs"
import { join, relative } from "node:path"
import { type FileCalls, nodeFiles } from "../../src/tiers/FileObjectStore.ts"
import type { Random } from "../support/Seeded.ts"

export interface LosingFiles {
  readonly calls: FileCalls
  /** A process on the machine, which dies with its `n`th call from now on, before or after that took effect. */
  readonly mortal: (n: number) => FileCalls
  /** What the disk holds after the power is lost now, as a new directory. */
  readonly lose: (into: string) => void
}

export const losingFiles = (directory: string, source: Random): LosingFiles => {
  /** By inode, bytes that are on disk. */
  const bytes = new Map<bigint, Uint8Array>()
  /** By folder, names that are on disk, of files. */
  const names = new Map<string, ReadonlyMap<string, bigint>>()
  const paths = new Map<number, string>()

  const namesIn = (folder: string): Map<string, bigint> =>
    new Map(
      readdirSync(folder, { withFileTypes: true })
        .filter((entry) => entry.isFile())
        .map(({ name }) => [name, statSync(join(folder, name), { bigint: true }).ino])
    )

  const synced = (fd: number): void => {
    const stats = fstatSync(fd, { bigint: true })
    const path = paths.get(fd) as string
    if (stats.isDirectory()) names.set(path, namesIn(path))
    else bytes.set(stats.ino, readFileSync(`/proc/self/fd/${fd}`))
  }

  const calls: FileCalls = {
    ...nodeFiles,
    open: async (path, flags) => {
      const fd = await nodeFiles.open(path, flags)
      paths.set(fd, path)
      return fd
    },
    fsync: async (fd) => synced(fd)
  }

  const mortal = (n: number): FileCalls => {
    let left = n
    const died = () => Object.assign(new Error("EIO: the process is dead"), { code: "EIO" })
    const dying =
      <A extends ReadonlyArray<never>, B>(call: (...args: A) => Promise<B>) =>
      async (...args: A): Promise<B> => {
        left -= 1
        if (left < 0 || (left === 0 && source.next() < 0.5)) throw died()
        const answer = await call(...args)
        if (left <= 0) throw died()
        return answer
      }
    return Object.fromEntries(Object.entries(calls).map(([name, call]) => [name, dying(call)])) as unknown as FileCalls
  }

  const lose = (into: string): void => {
    const walk = (folder: string): void => {
      const target = join(into, relative(directory, folder))
      mkdirSync(target, { recursive: true })
      const certain = names.get(folder) ?? new Map<string, bigint>()
      const seen = namesIn(folder)
      for (const name of new Set([...certain.keys(), ...seen.keys()])) {
        const [before, now] = [certain.get(name), seen.get(name)]
        const ino = before === now || source.next() < 0.5 ? now : before
        if (ino === undefined) continue
        const whole = now === ino ? readFileSync(join(folder, name)) : new Uint8Array(0)
        writeFileSync(join(target, name), bytes.get(ino) ?? whole.subarray(0, source.below(whole.length + 1)))
      }
      for (const entry of readdirSync(folder, { withFileTypes: true })) {
        if (entry.isDirectory()) walk(join(folder, entry.name))
      }
    }
    walk(directory)
  }

  return { calls, mortal, lose }
}
