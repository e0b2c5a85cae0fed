/** A Postgres of one's own in a directory, for a cluster on one machine: found where it is installed, never downloaded. */
import { spawnSync } from "node:child_process"
import { randomBytes } from "node:crypto"
import { existsSync, readdirSync } from "node:fs"
import { chown, mkdir, readFile, rename, rm, writeFile } from "node:fs/promises"
import { delimiter, dirname, join } from "node:path"
import { Refused } from "./Refused.ts"

export interface LocalPostgres {
  /** With its password. */
  readonly url: string
  readonly file: string
  readonly args: ReadonlyArray<string>
  readonly user: User | undefined
}

export interface User {
  readonly uid: number
  readonly gid: number
}

/** Makes the directory where there is none, and says how to start what serves it. */
export const preparePostgres = async (directory: string, port: number): Promise<LocalPostgres> => {
  const programs = findPrograms()
  if (programs.length === 0) throw new Refused({ message: missing })
  const user = ordinaryUser()
  const secret = `${directory}.password`
  if (!existsSync(directory)) {
    const made = `${directory}.new`
    await rm(made, { recursive: true, force: true })
    await mkdir(made, { recursive: true, mode: 0o700 })
    await rm(secret, { force: true })
    await writeFile(secret, randomBytes(24).toString("hex"), { mode: 0o600 })
    if (user !== undefined) {
      await chown(made, user.uid, user.gid)
      await chown(secret, user.uid, user.gid)
      checkReach(made, user)
    }
    const words = ["--pgdata", made, "--username", name, "--auth", "scram-sha-256", "--pwfile", secret]
    const { status, stdout, stderr } = spawnSync(
      join(programs[0] as string, "initdb"),
      [...words, "--encoding", "UTF8", "--locale", "C"],
      { ...user, cwd: dirname(made), encoding: "utf8" }
    )
    if (status !== 0) throw new Refused({ message: `initdb ended with ${status}: ${`${stdout}${stderr}`.trim()}` })
    await rename(made, directory)
  }
  if (user !== undefined) checkReach(directory, user)
  const version = (await readFile(join(directory, "PG_VERSION"), "utf8")).trim()
  const folder = programs.find((one) => versionOf(one) === version)
  if (folder === undefined) {
    throw new Refused({
      message: `${directory} is of Postgres ${version}, and there is ${programs.map(versionOf).join(", ")}: install postgresql-${version}, or name another with --database-url`
    })
  }
  const password = (await readFile(secret, "utf8")).trim()
  const options = {
    listen_addresses: "127.0.0.1",
    port: `${port}`,
    unix_socket_directories: "",
    max_connections: "400",
    log_min_messages: "error",
    shared_buffers: "32MB"
  }
  return {
    url: `postgres://${name}:${password}@127.0.0.1:${port}/postgres`,
    file: join(folder, "postgres"),
    args: ["-D", directory, ...Object.entries(options).flatMap(([option, value]) => ["-c", `${option}=${value}`])],
    user
  }
}

/** Its superuser. */
const name = "ruvector"

const missing =
  "there is no Postgres: install it (Debian, Ubuntu: apt-get install postgresql; macOS: brew install postgresql), or name one with --database-url postgres://user:password@host/database"

/** Folders with `initdb` and `postgres`: on the path, or where Debian keeps them, the newest first. */
const findPrograms = (): ReadonlyArray<string> => {
  const debian = "/usr/lib/postgresql"
  const versions = existsSync(debian) ? readdirSync(debian).sort((a, b) => Number(b) - Number(a)) : []
  return [
    ...versions.map((version) => join(debian, version, "bin")),
    ...(process.env["PATH"] ?? "").split(delimiter)
  ].filter((folder) => existsSync(join(folder, "initdb")) && existsSync(join(folder, "postgres")))
}

const versionOf = (folder: string): string =>
  /(\d+)/.exec(spawnSync(join(folder, "postgres"), ["--version"], { encoding: "utf8" }).stdout)?.[1] ?? "?"

/** Postgres refuses to run as root. */
const ordinaryUser = (): User | undefined => {
  if (process.getuid?.() !== 0) return undefined
  for (const candidate of ["postgres", "nobody"]) {
    const [uid, gid] = ["-u", "-g"].map((flag) => {
      const { status, stdout } = spawnSync("id", [flag, candidate], { encoding: "utf8" })
      return status === 0 ? Number(stdout) : undefined
    })
    if (uid !== undefined && gid !== undefined) return { uid, gid }
  }
  throw new Refused({ message: "Postgres does not run as root, and there is no user postgres or nobody to run it as" })
}

const checkReach = (directory: string, user: User): void => {
  if (spawnSync("/bin/sh", ["-c", 'cd "$1"', "sh", directory], { ...user, cwd: "/" }).status === 0) return
  throw new Refused({
    message: `Postgres does not run as root, and user ${user.uid}, as which it would, cannot reach ${directory}: let others pass the folders above it (chmod o+x), choose another --data, or run this as an ordinary user`
  })
}
