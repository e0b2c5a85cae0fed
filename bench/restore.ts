/**
 * Restore to a point in time: so many word vectors, a backup, then changes with the time noted halfway through them, and a
 * second backup. The state at that time is restored by the command, served, and compared record by record; then a drill.
 *
 *   node scripts/run.mjs --with bench bench/restore.ts [count]
 */
import { spawn } from "node:child_process"
import { mkdtempSync, rmSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { fileURLToPath } from "node:url"
import { type Server, startOurs } from "./servers.ts"
import { dimensions, loadWords, vectorOf, vectorText } from "./words.ts"

const count = Number(process.argv[2] ?? 100_000)
const changes = Math.floor(count / 10)
const deletions = Math.floor(count / 100)
const batch = 500
const readsAtOnce = 64

const { base, reserve } = loadWords({ count, queries: 100, seed: 1 })
const directory = mkdtempSync(join(tmpdir(), "ruvector-restore-"))
process.on("exit", () => rmSync(directory, { recursive: true, force: true }))
const data = join(directory, "data")
const place = join(directory, "backup")
const restored = join(directory, "restored")
const main = fileURLToPath(new URL("../src/main.ts", import.meta.url))

/** By id the row of its vector, in `base` or, after it, in `reserve`. */
const rows = new Map<string, number>()

const run = async (words: ReadonlyArray<string>): Promise<number> => {
  const started = performance.now()
  const child = spawn(process.execPath, [...process.execArgv, main, ...words], {
    stdio: ["ignore", "inherit", "inherit"]
  })
  const code = await new Promise((resolve) => child.once("exit", resolve))
  if (code !== 0) throw new Error(`${words[0]} ended with ${code}`)
  return (performance.now() - started) / 1_000
}

const post = async (server: Server, path: string, body: string): Promise<void> => {
  const response = await fetch(`${server.url}${path}`, {
    method: "POST",
    body,
    headers: { "content-type": "application/json" }
  })
  const text = await response.text()
  if (response.status !== 200) throw new Error(`${path}: ${response.status} ${text}`)
}

const write = async (server: Server, ids: ReadonlyArray<string>, firstRow: number): Promise<void> => {
  for (let at = 0; at < ids.length; at += batch) {
    const vectors = ids.slice(at, at + batch).map((id, i) => {
      const row = firstRow + at + i
      rows.set(id, row)
      const vector = row < count ? vectorText(base, row) : vectorText(reserve, row - count)
      return `{"id":${JSON.stringify(id)},"vector":${vector}}`
    })
    await post(server, "/api/v1/insert", `{"vectors":[${vectors.join(",")}]}`)
  }
}

const remove = async (server: Server, ids: ReadonlyArray<string>): Promise<void> => {
  await post(server, "/api/v1/delete", JSON.stringify({ ids }))
  for (const id of ids) rows.delete(id)
}

const ids = base.words.slice(0, count)
let server = await startOurs(data)
await write(server, ids, 0)
await server.stop()
await run(["backup", "--data", data, "--to", place])

server = await startOurs(data)
await write(server, ids.slice(0, changes), count)
await remove(server, ids.slice(-deletions))
await new Promise((resolve) => setTimeout(resolve, 5))
const atMillis = Date.now() - 1
await new Promise((resolve) => setTimeout(resolve, 5))
const then = new Map(rows)
await write(server, ids.slice(changes, 2 * changes), count + changes)
await remove(server, ids.slice(0, deletions))
await server.stop()
const seconds = await run(["backup", "--data", data, "--to", place])
console.log(`backup of what is new: ${seconds.toFixed(1)} s`)

const restoreSeconds = await run(["restore", "--from", place, "--at", String(atMillis), "--data", restored])
const started = performance.now()
server = await startOurs(restored)
const readySeconds = (performance.now() - started) / 1_000
const differing = await compare(server)
await server.stop()
await run(["verify", "--from", place, "--deep"])
await run(["drill", "--from", place, "--at", String(atMillis)])
console.log(
  `restore of ${then.size} vectors of ${dimensions} dimensions to a point in time: ${restoreSeconds.toFixed(1)} s, ` +
    `node ready after another ${readySeconds.toFixed(1)} s; ${differing === 0 ? "exact" : `${differing} DIFFER`}`
)
if (differing > 0) process.exitCode = 1

/** How many of all ids ever written are not what they were at the time. */
async function compare(of: Server): Promise<number> {
  let wrong = 0
  const all = ids.values()
  const worker = async () => {
    for (const id of all) {
      const response = await fetch(`${of.url}/api/v1/embed/${encodeURIComponent(id)}`)
      const row = then.get(id)
      const body = (await response.json()) as { readonly vector?: ReadonlyArray<number> }
      if (row === undefined) {
        if (response.status !== 404) wrong += 1
        continue
      }
      const expected = row < count ? vectorOf(base, row) : vectorOf(reserve, row - count)
      if (body.vector === undefined || !expected.every((x, i) => x === Math.fround(body.vector?.[i] ?? Number.NaN))) {
        wrong += 1
      }
    }
  }
  await Promise.all(Array.from({ length: readsAtOnce }, worker))
  return wrong
}
