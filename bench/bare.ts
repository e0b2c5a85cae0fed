/**
 * The baseline: hnswlib-node behind the thinnest JSON server that node:http allows, in one process and one thread. It
 * speaks the insert and search calls of the HTTP contract, writes nothing to disk and checks nothing. It prints its port
 * as a line of JSON and ends when its standard input closes.
 *
 *   node bare.ts [--build bare|bare-simd] [--capacity N]
 */
import { createServer, type IncomingMessage, type ServerResponse } from "node:http"
import type { AddressInfo } from "node:net"
import { parseArgs } from "node:util"
import type { HierarchicalNSW } from "hnswlib-node"
import { builds, indexSettings, loadHnswlib } from "./bareIndex.ts"

interface InsertBody {
  readonly vectors: ReadonlyArray<{ readonly id: string; readonly vector: Array<number> }>
}

interface SearchBody {
  readonly query: Array<number>
  readonly k: number
  readonly ef?: number
}

const main = (): void => {
  const { values } = parseArgs({
    options: { build: { type: "string", default: "bare" }, capacity: { type: "string", default: "120000" } }
  })
  const build = builds.find((name) => name === values.build)
  if (build === undefined) throw new Error(`--build is ${builds.join(" or ")}, not ${values.build}`)
  const bare = new BareIndex(loadHnswlib(build).HierarchicalNSW, Number(values.capacity))

  const server = createServer((request, response) => {
    const chunks: Array<Buffer> = []
    request.on("data", (chunk: Buffer) => chunks.push(chunk))
    request.on("end", () => answer(bare, request, response, Buffer.concat(chunks).toString()))
  })
  server.listen(0, "127.0.0.1", () => console.log(JSON.stringify({ port: (server.address() as AddressInfo).port })))
  process.stdin.on("close", () => process.exit()).resume()
}

const answer = (bare: BareIndex, request: IncomingMessage, response: ServerResponse, body: string): void => {
  let result: object | undefined
  if (request.url === "/api/v1/search") result = bare.search(JSON.parse(body) as SearchBody)
  else if (request.url === "/api/v1/insert") result = bare.insert(JSON.parse(body) as InsertBody)
  const text = JSON.stringify(result ?? { status: 404 })
  response.writeHead(result === undefined ? 404 : 200, {
    "content-type": "application/json",
    "content-length": Buffer.byteLength(text)
  })
  response.end(text)
}

class BareIndex {
  #index: HierarchicalNSW | undefined
  #searches = 0
  #capacity: number
  readonly #Index: typeof HierarchicalNSW
  readonly #ids: Array<string> = []
  readonly #labels = new Map<string, number>()

  constructor(Index: typeof HierarchicalNSW, capacity: number) {
    this.#Index = Index
    this.#capacity = capacity
  }

  insert({ vectors }: InsertBody): object {
    for (const { id, vector } of vectors) {
      const index = this.#indexFor(vector.length)
      let label = this.#labels.get(id)
      if (label === undefined) {
        label = this.#ids.push(id) - 1
        this.#labels.set(id, label)
        if (label >= this.#capacity) {
          this.#capacity = Math.ceil(this.#capacity * 1.2)
          index.resizeIndex(this.#capacity)
        }
      }
      index.addPoint(vector, label)
    }
    return { inserted: vectors.length }
  }

  search({ query, k, ef }: SearchBody): object {
    const started = performance.now()
    const index = this.#indexFor(query.length)
    index.setEf(ef ?? 128)
    const { neighbors, distances } = index.searchKnn(query, Math.min(k, this.#ids.length))
    return {
      query_id: `q${++this.#searches}`,
      results: neighbors.map((label, i) => ({ vector_id: this.#ids[label], score: 1 - (distances[i] as number) })),
      total_results: neighbors.length,
      partial: false,
      took_ms: performance.now() - started
    }
  }

  /** Made with the dimensions of the first vector that comes. */
  #indexFor(dimensions: number): HierarchicalNSW {
    if (this.#index === undefined) {
      const { m, efConstruction, seed } = indexSettings
      this.#index = new this.#Index("cosine", dimensions)
      this.#index.initIndex(this.#capacity, m, efConstruction, seed)
    }
    return this.#index
  }
}

main()
