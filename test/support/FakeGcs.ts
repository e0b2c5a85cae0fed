/**
 * fake-gcs-server (https://github.com/fsouza/fake-gcs-server) for tests: a process of its own, in memory, on a free port,
 * ended by its pid. Found by `FAKE_GCS_SERVER`, in `PATH`, or where `go install` puts it.
 */
import { type ChildProcess, execFileSync, spawn } from "node:child_process"
import { accessSync, constants } from "node:fs"
import { homedir } from "node:os"
import { delimiter, join } from "node:path"
import { freePort } from "../../src/shards/freePort.ts"

export const fakeGcsVersion = "v1.56.1"

export interface FakeGcs {
  /** Such as `http://127.0.0.1:4443`: for `STORAGE_EMULATOR_HOST`, or as a store's endpoint. */
  readonly url: string
  readonly pid: number
  readonly createBucket: (name: string) => Promise<void>
  readonly stop: () => Promise<void>
}

const howToGet = `go install github.com/fsouza/fake-gcs-server@${fakeGcsVersion}`

/** Where it is; `undefined` where it is not. */
export const fakeGcsBinary = (): string | undefined => {
  const name = "fake-gcs-server"
  const places = [
    process.env["FAKE_GCS_SERVER"] ?? "",
    ...(process.env["PATH"] ?? "").split(delimiter).map((folder) => join(folder, name)),
    join(goPath(), "bin", name)
  ]
  return places.find(isExecutable)
}

/**
 * Whether tests that need the server are left out: with a line that says how to get it, and not where the whole suite has
 * to run (`RUVECTOR_CI`), where they then fail.
 */
export const withoutFakeGcs = (): boolean => {
  if (fakeGcsBinary() !== undefined || process.env["RUVECTOR_CI"] !== undefined) return false
  console.warn(`skipped, as there is no fake-gcs-server: ${howToGet}`)
  return true
}

/** Starts it and waits until it answers. */
export const startFakeGcs = async (): Promise<FakeGcs> => {
  const binary = fakeGcsBinary()
  if (binary === undefined) throw new Error(`there is no fake-gcs-server: ${howToGet}`)
  // Another process may take the port that was free.
  for (let attempt = 1; ; attempt++) {
    const port = await freePort("127.0.0.1")
    const started = await startOn(binary, port)
    if (started !== undefined) return started
    if (attempt === startAttemptsMax) throw new Error(`fake-gcs-server did not start ${attempt} times`)
  }
}

const startAttemptsMax = 5
const startMillisMax = 15_000

const children = new Set<ChildProcess>()
process.on("exit", () => {
  for (const child of children) child.kill("SIGKILL")
})

const startOn = async (binary: string, port: number): Promise<FakeGcs | undefined> => {
  // A public host without a port is this one at any port, so that a proxy may be in between.
  const flags = ["-scheme", "http", "-host", "127.0.0.1", "-port", String(port), "-public-host", "127.0.0.1"]
  const child = spawn(binary, [...flags, "-backend", "memory", "-log-level", "error"], { stdio: "ignore" })
  children.add(child)
  const ended = new Promise<void>((resolve) => {
    child.once("error", () => resolve())
    child.once("exit", () => resolve())
  })
  let running = true
  void ended.then(() => {
    running = false
    children.delete(child)
  })
  const url = `http://127.0.0.1:${port}`
  const until = Date.now() + startMillisMax
  while (running && Date.now() < until) {
    const answers = await fetch(`${url}/storage/v1/b?project=test`).then(
      (response) => response.ok,
      () => false
    )
    if (answers && child.pid !== undefined) {
      return {
        url,
        pid: child.pid,
        createBucket: (name) => createBucket(url, name),
        stop: async () => {
          child.kill("SIGTERM")
          await ended
        }
      }
    }
    await new Promise((resolve) => setTimeout(resolve, 20))
  }
  child.kill("SIGKILL")
  await ended
  return undefined
}

const createBucket = async (url: string, name: string): Promise<void> => {
  const headers = { "content-type": "application/json" }
  const answer = await fetch(`${url}/storage/v1/b?project=test`, {
    method: "POST",
    headers,
    body: JSON.stringify({ name })
  })
  if (!answer.ok) throw new Error(`bucket ${name}: ${answer.status} ${await answer.text()}`)
}

const goPath = (): string => {
  for (const go of ["go", "/usr/local/go/bin/go"]) {
    try {
      return execFileSync(go, ["env", "GOPATH"], { encoding: "utf8", stdio: ["ignore", "pipe", "ignore"] }).trim()
    } catch {}
  }
  return join(homedir(), "go")
}

const isExecutable = (path: string): boolean => {
  try {
    accessSync(path, constants.X_OK)
    return path !== ""
  } catch {
    return false
  }
}
