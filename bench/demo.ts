/**
 * Real input in the terminal: loads 50,000 English words as vectors, then streams the neighbours of words over the
 * WebSocket, each printed as it arrives.
 *
 *   npm run demo -- [WORD...] [--url URL] [--data DIR] [--collection NAME] [--k 10] [--count 50000]
 *
 * Without --url it starts a server of its own, whose data is gone afterwards unless --data names a directory for it.
 */
import { mkdtempSync, rmSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { createInterface } from "node:readline"
import { parseArgs } from "node:util"
import type { WebSocket } from "ws"
import { Progress } from "./Progress.ts"
import { type Server, startOurs } from "./servers.ts"
import { nearestSpellings } from "./spelling.ts"
import { openWebSocket } from "./wires.ts"
import { dimensions, frequentWords, vectorText, type WordVectors } from "./words.ts"

interface Options {
  readonly words: ReadonlyArray<string>
  readonly url: URL | undefined
  readonly data: string | undefined
  readonly collection: string
  readonly k: number
  readonly count: number
}

const main = async (): Promise<void> => {
  const options = readOptions()
  for (const signal of ["SIGINT", "SIGTERM"] as const) process.on(signal, () => process.exit(130))
  const server = options.url === undefined ? await startServer(options.data) : undefined
  try {
    const url = options.url ?? new URL((server as Server).url)
    const loaded = frequentWords(options.count)
    await load(url, options.collection, loaded)
    const demo = new Demo(options, url, loaded, await openWebSocket(url))
    for (const word of options.words) await demo.show(word)
    // On a terminal the prompt follows, so that the server is still there for the curl line.
    if (options.words.length === 0 || process.stdin.isTTY) await demo.prompt()
    else if (server !== undefined)
      console.log("\nThis server ends now. `npm start` starts one that stays: give the demo its address with --url.")
    demo.close()
  } finally {
    await server?.stop()
  }
}

const readOptions = (): Options => {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      url: { type: "string" },
      data: { type: "string" },
      collection: { type: "string" },
      k: { type: "string", default: "10" },
      count: { type: "string", default: "50000" }
    }
  })
  const url = values.url === undefined ? undefined : URL.parse(values.url)
  if (url === null || (url !== undefined && url.protocol !== "http:")) {
    throw new Error(`--url is an address such as http://127.0.0.1:8080, not ${values.url}`)
  }
  const k = Number(values.k)
  const count = Number(values.count)
  if (!Number.isInteger(k) || k < 1 || k > 100) throw new Error(`--k is a number from 1 to 100, not ${values.k}`)
  if (!Number.isInteger(count) || count < 1) throw new Error(`--count is a number of words, not ${values.count}`)
  return {
    words: positionals,
    url,
    data: values.data,
    // In a server that was there before, its default collection is not ours to fill.
    collection: values.collection ?? (url === undefined ? "default" : "words"),
    k,
    count
  }
}

const startServer = async (data: string | undefined): Promise<Server> => {
  const directory = data ?? mkdtempSync(join(tmpdir(), "ruvector-demo-"))
  if (data === undefined) process.on("exit", () => rmSync(directory, { recursive: true, force: true, maxRetries: 3 }))
  const server = await startOurs(directory)
  console.log(`Server at ${server.url}, data in ${directory}${data === undefined ? " (removed at the end)" : ""}`)
  return server
}

/** Creates the collection and fills it, unless it is there with all its words. */
const load = async (url: URL, collection: string, { words, vectors }: WordVectors): Promise<void> => {
  const created = await call(
    url,
    "PUT",
    `/collections/${encodeURIComponent(collection)}`,
    `{"dimensions":${dimensions}}`
  )
  if (created.status === 409) {
    throw new Error(
      `the collection ${collection} at ${url.origin} is of another kind; choose one with --collection NAME`
    )
  }
  const { count } = (await (await call(url, "GET", `/collections/${encodeURIComponent(collection)}`)).json()) as {
    count: number
  }
  if (count >= words.length) {
    console.log(`The collection ${collection} has ${count.toLocaleString("en-US")} vectors already.`)
    return
  }
  const progress = new Progress("Loading words", words.length)
  let next = 0
  const insertSome = async (): Promise<void> => {
    while (next < words.length) {
      const from = next
      next = Math.min(from + batchSize, words.length)
      const rows = Array.from({ length: next - from }, (_, i) => from + i)
      const records = rows.map(
        (row) => `{"id":${JSON.stringify(words[row])},"vector":${vectorText({ words, vectors }, row)}}`
      )
      await call(
        url,
        "POST",
        "/insert",
        `{"collection":${JSON.stringify(collection)},"vectors":[${records.join(",")}]}`
      )
      progress.add(rows.length)
    }
  }
  try {
    await Promise.all(Array.from({ length: batchesInFlight }, insertSome))
  } catch (error) {
    progress.stop()
    throw error
  }
}

const batchSize = 200
const batchesInFlight = 2

const call = async (url: URL, method: string, path: string, body?: string): Promise<Response> => {
  let response: Response
  try {
    response = await fetch(new URL(`/api/v1${path}`, url), {
      method,
      ...(body === undefined ? {} : { body, headers: { "content-type": "application/json" } })
    })
  } catch (cause) {
    throw new Error(`no server answers at ${url.origin}`, { cause })
  }
  if (response.ok || response.status === 409) return response
  const problem = (await response.json().catch(() => ({}))) as Problem
  throw new Error(`${method} ${path} was answered with ${response.status} ${problem.detail ?? problem.title ?? ""}`)
}

interface Problem {
  readonly title?: string
  readonly detail?: string
}

/** What the server sends for a streamed search. */
type StreamEvent = { readonly id?: string } & (
  | { readonly event: "search_start" }
  | { readonly event: "result"; readonly vector_id: string; readonly score: number }
  | { readonly event: "search_complete" }
  | { readonly event: "error"; readonly problem: Problem }
)

class Demo {
  readonly #options: Options
  readonly #url: URL
  readonly #loaded: WordVectors
  readonly #socket: WebSocket
  readonly #rows: ReadonlyMap<string, number>
  #searches = 0

  constructor(options: Options, url: URL, loaded: WordVectors, socket: WebSocket) {
    this.#options = options
    this.#url = url
    this.#loaded = loaded
    this.#socket = socket
    this.#rows = new Map(loaded.words.map((word, row) => [word, row]))
    socket.on("error", () => {})
  }

  async prompt(): Promise<void> {
    console.log("\nType words to see their neighbours; `exit` or Ctrl-D ends.")
    const lines = createInterface({
      input: process.stdin,
      ...(process.stdin.isTTY ? { output: process.stdout, prompt: "word> ", completer: this.#complete } : {})
    })
    // A terminal in raw mode gives Ctrl-C to the line editor, not to the process.
    lines.on("SIGINT", () => lines.close())
    // Piped input ends, and closes the reader, long before the last line of it is answered.
    let closed = false
    lines.on("close", () => {
      closed = true
    })
    lines.prompt()
    for await (const line of lines) {
      const words = line.split(/\s+/).filter((word) => word !== "")
      if (words[0] === "exit" && words.length === 1) break
      for (const word of words) await this.show(word)
      if (!closed) lines.prompt()
    }
    lines.close()
    console.log("")
  }

  async show(asked: string): Promise<void> {
    const word = [asked, asked.toLowerCase()].find((form) => this.#rows.has(form))
    if (word === undefined) {
      const near = nearestSpellings(asked.toLowerCase(), this.#loaded.words, 5)
      console.log(`\n${asked} is not among the ${this.#loaded.words.length.toLocaleString("en-US")} words.`)
      if (near.length > 0) console.log(`Spelled nearly so: ${near.join(", ")}`)
      return
    }
    console.log(`\nNeighbours of ${word}:`)
    const started = performance.now()
    const printed = await this.#stream(word)
    console.log(`${printed} neighbours streamed in ${(performance.now() - started).toFixed(1)} ms. The same with curl:`)
    console.log(`  ${this.#curl(word)}`)
  }

  close(): void {
    this.#socket.close()
  }

  /** Prints each result as it arrives; how many there were. */
  #stream(word: string): Promise<number> {
    const { k, collection } = this.#options
    const id = String(++this.#searches)
    return new Promise((resolve, reject) => {
      let printed = 0
      const onMessage = (data: Buffer): void => {
        const event = JSON.parse(data.toString()) as StreamEvent
        if (event.id !== id) return
        if (event.event === "result" && event.vector_id !== word && printed < k) {
          console.log(resultLine(++printed, event.vector_id, event.score))
        } else if (event.event === "search_complete") {
          done()
          resolve(printed)
        } else if (event.event === "error") {
          done()
          reject(new Error(`the search was refused: ${event.problem.detail ?? event.problem.title}`))
        }
      }
      const onClose = (code: number): void => reject(new Error(`the server closed the connection (${code})`))
      const done = (): void => {
        this.#socket.off("message", onMessage)
        this.#socket.off("close", onClose)
      }
      if (this.#socket.readyState !== this.#socket.OPEN) return onClose(1006)
      this.#socket.on("message", onMessage)
      this.#socket.on("close", onClose)
      // One more than is shown: the word itself is the nearest.
      const query = vectorText(this.#loaded, this.#rows.get(word) as number)
      this.#socket.send(
        `{"type":"search","id":"${id}","collection":${JSON.stringify(collection)},"query":${query},"k":${k + 1},"stream":true}`
      )
    })
  }

  #curl(word: string): string {
    const parameters = new URLSearchParams({ query_vector_id: word, k: String(this.#options.k) })
    if (this.#options.collection !== "default") parameters.set("collection", this.#options.collection)
    // URLSearchParams leaves no quote or space as it is, so the address is safe between quotes.
    return `curl -N '${this.#url.origin}/api/v1/stream/search?${parameters}'`
  }

  readonly #complete = (line: string): [Array<string>, string] => {
    const begun = line.split(/\s+/).at(-1) ?? ""
    return [begun === "" ? [] : this.#loaded.words.filter((word) => word.startsWith(begun)).slice(0, 12), begun]
  }
}

const resultLine = (place: number, word: string, score: number): string =>
  `${String(place).padStart(3)}  ${word.padEnd(22)} ${score.toFixed(4)}  ${"█".repeat(Math.round(Math.max(0, score) * 30))}`

try {
  await main()
} catch (error) {
  process.stderr.write(`demo: ${error instanceof Error ? error.message : String(error)}\n`)
  process.exit(1)
}
