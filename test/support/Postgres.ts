/**
 * A Postgres server of the test's own on a free port, ended by its pid. It survives the death of its processes, not of the
 * machine: what it commits is written, and not flushed to the disk.
 */
import { type ChildProcess, spawn, spawnSync } from "node:child_process"
import { once } from "node:events"
import { existsSync, readdirSync } from "node:fs"
import { appendFile, chown, mkdtemp, rm } from "node:fs/promises"
import { tmpdir } from "node:os"
import { delimiter, join } from "node:path"
import { freePort } from "../../src/shards/freePort.ts"

export interface Postgres {
  /** `postgres://postgres@127.0.0.1:<port>/postgres` */
  readonly url: string
  readonly port: number
  readonly pid: () => number | undefined
  /** Ends all of its processes at once, as a crash does; what was committed is there when it starts again. */
  readonly kill: () => Promise<void>
  /** Starts it again on the same port. */
  readonly start: () => Promise<void>
  /** Cuts every connection, and starts again: what an operator does. */
  readonly restart: () => Promise<void>
  /** Ends it for good. */
  readonly stop: () => Promise<void>
}

/** Where `initdb` and `postgres` are: on the path, or where Debian keeps them, the newest first. */
const programs = ((): string | undefined => {
  const debian = "/usr/lib/postgresql"
  const versions = existsSync(debian) ? readdirSync(debian).sort((a, b) => Number(b) - Number(a)) : []
  const folders = [
    ...(process.env["PATH"] ?? "").split(delimiter),
    ...versions.map((version) => join(debian, version, "bin"))
  ]
  return folders.find((folder) => existsSync(join(folder, "initdb")) && existsSync(join(folder, "postgres")))
})()

export const postgresInstalled = programs !== undefined

/** Whether tests with Postgres are to be skipped; in CI they are not, and fail where it is not installed. */
export const skipPostgres = !postgresInstalled && process.env["RUVECTOR_CI"] === undefined
if (skipPostgres) console.warn("Tests with Postgres are skipped: install it with `apt-get install postgresql`.")

/** `host`: the address to listen on; whoever reaches it may do everything. */
export const startPostgres = async ({ host = "127.0.0.1" } = {}): Promise<Postgres> => {
  if (programs === undefined) throw new Error("there is no Postgres: install it with `apt-get install postgresql`")
  const folder = programs
  const directory = await mkdtemp(join(tmpdir(), "ruvector-postgres-"))
  const user = ordinaryUser()
  if (user !== undefined) await chown(directory, user.uid, user.gid)

  const made = spawnSync(
    join(folder, "initdb"),
    ["--pgdata", directory, "--username", "postgres", "--auth", "trust", "--encoding", "UTF8", "--locale", "C", "-N"],
    { ...user, cwd: directory, encoding: "utf8" }
  )
  if (made.status !== 0) throw new Error(`initdb ended with ${made.status}: ${made.stdout}${made.stderr}`)
  if (host !== "127.0.0.1") await appendFile(join(directory, "pg_hba.conf"), "host all all samenet trust\n")

  const port = await freePort(host)
  let child: ChildProcess | undefined
  const end = async (signal: NodeJS.Signals) => {
    const running = child
    child = undefined
    if (running === undefined || running.exitCode !== null || running.signalCode !== null) return
    const exited = once(running, "exit")
    running.kill(signal)
    await exited
  }
  const start = async () => {
    child = await launch(folder, directory, host, port, user)
  }
  await start()
  return {
    url: `postgres://postgres@${host}:${port}/postgres`,
    port,
    pid: () => child?.pid,
    // The postmaster ends its children first, which a SIGKILL of it alone would leave behind.
    kill: () => end("SIGQUIT"),
    start,
    restart: async () => {
      await end("SIGINT")
      await start()
    },
    stop: async () => {
      await end("SIGQUIT")
      await rm(directory, { recursive: true, force: true })
    }
  }
}

interface User {
  readonly uid: number
  readonly gid: number
}

/** Postgres refuses to run as root. */
const ordinaryUser = (): User | undefined => {
  if (process.getuid?.() !== 0) return undefined
  const idOf = (name: string, flag: string) => {
    const { status, stdout } = spawnSync("id", [flag, name], { encoding: "utf8" })
    return status === 0 ? Number(stdout) : undefined
  }
  const name = idOf("postgres", "-u") === undefined ? "nobody" : "postgres"
  const uid = idOf(name, "-u")
  const gid = idOf(name, "-g")
  return uid === undefined || gid === undefined ? undefined : { uid, gid }
}

const launch = (
  folder: string,
  directory: string,
  host: string,
  port: number,
  user: User | undefined
): Promise<ChildProcess> =>
  new Promise((resolve, reject) => {
    const options = {
      listen_addresses: host,
      port: `${port}`,
      unix_socket_directories: "",
      fsync: "off",
      full_page_writes: "off",
      shared_buffers: "16MB",
      max_connections: "200",
      log_min_messages: "log"
    }
    const words = Object.entries(options).flatMap(([name, value]) => ["-c", `${name}=${value}`])
    const child = spawn(join(folder, "postgres"), ["-D", directory, ...words], {
      ...user,
      cwd: directory,
      stdio: ["ignore", "ignore", "pipe"]
    })
    let output = ""
    child.stderr.on("data", (chunk: Buffer) => {
      if (output.length < 65_536) output += chunk.toString()
      if (output.includes("ready to accept connections")) resolve(child)
    })
    child.once("error", reject)
    child.once("exit", (code) => reject(new Error(`postgres ended with ${code}: ${output}`)))
  })
