/**
 * A load over several collections that goes on while the server below it fails, and checks every answer: that each vector
 * and each metadata was written, that the record may have had it at the time, that the score is the one that the vectors
 * give, that a filter holds, that nothing is missing. What it finds is in `violations`.
 */
import { partitionOf } from "../../src/shards/PartitionMap.ts"
import type { Random } from "../support/Seeded.ts"
import { absent, type Operation, RecordModel, stateOf, tick, type Value, valueNamed, vectorOf } from "./loadModel.ts"

export interface CollectionSpec {
  readonly name: string
  readonly dimensions: number
  readonly metric: "cosine" | "l2" | "ip"
  readonly partitions: number
  readonly records: number
}

/** Errors that a server in trouble may answer with; any other is a violation. */
const honest = new Set([
  "storage_unavailable",
  "partition_unavailable",
  "overloaded",
  "shutting_down",
  "deadline_exceeded"
])

export class FaultyLoad {
  readonly collections: ReadonlyArray<CollectionSpec>
  readonly violations: Array<string> = []
  readonly counts = { acknowledged: 0, unknown: 0, reads: 0, searches: 0, hits: 0, errors: 0 }
  readonly #records = new Map<string, ReadonlyArray<RecordModel>>()
  readonly #source: Random
  #base: string | undefined
  #opened: Promise<void> = Promise.resolve()
  #open: () => void = () => {}
  #stopped = false
  #underWay = 0
  #states = 0

  constructor(collections: ReadonlyArray<CollectionSpec>, source: Random) {
    this.collections = collections
    this.#source = source
    for (const { name, records } of collections) {
      this.#records.set(
        name,
        Array.from({ length: records }, (_, i) => new RecordModel(`${name}-${i}`, i))
      )
    }
  }

  /** Makes the collections, and begins; the load then waits at the gate. */
  async begin(base: string): Promise<{ readonly ended: Promise<void> }> {
    for (const { name, dimensions, metric, partitions } of this.collections) {
      const made = await this.#ask(base, "PUT", `/api/v1/collections/${name}`, { dimensions, metric, partitions })
      if (made.status !== 201) throw new Error(`${name}: ${made.status} ${JSON.stringify(made.body)}`)
    }
    this.close()
    const loops = this.collections.flatMap((spec) => [
      this.#loop(() => this.#write(spec)),
      this.#loop(() => (this.#source.next() < 0.4 ? this.#read(spec) : this.#search(spec)))
    ])
    return { ended: Promise.all(loops).then(() => {}) }
  }

  /** Lets the load run against a server. */
  open(base: string): void {
    this.#base = base
    this.#open()
  }

  /** Lets nothing new begin. */
  close(): void {
    this.#base = undefined
    this.#opened = new Promise((resolve) => {
      this.#open = resolve
    })
  }

  /** When nothing is under way any more. */
  async quiet(): Promise<void> {
    while (this.#underWay > 0) await pause(2)
  }

  stop(): void {
    this.#stopped = true
    this.#open()
  }

  /** An id in a partition of a collection. */
  idIn(collection: string, partition: number): string {
    const spec = this.collections.find(({ name }) => name === collection) as CollectionSpec
    for (let i = 0; ; i++)
      if (partitionOf(`${collection}-${i}`, spec.partitions) === partition) return `${collection}-${i}`
  }

  /** Reads everything, with nothing under way: from here on it is known. Says what cannot be. */
  async verify(base: string): Promise<void> {
    for (const spec of this.collections) {
      const records = this.#records.get(spec.name) as ReadonlyArray<RecordModel>
      for (let from = 0; from < records.length; from += 24) {
        await Promise.all(
          records.slice(from, from + 24).map(async (record) => {
            const found = await this.#valueAt(base, spec, record)
            if (found === undefined) return this.#violation(`${record.id} cannot be read after a restart`)
            if (!record.values().has(found)) {
              this.#violation(`${record.id} is ${found} after a restart, not one of ${[...record.values()]}`)
            }
            record.settle(found)
          })
        )
      }
    }
  }

  /** The value of a record; `undefined` where an error was answered. A wrong vector is a violation. */
  async #valueAt(base: string, spec: CollectionSpec, record: RecordModel): Promise<Value | undefined> {
    for (let attempt = 0; attempt < 200; attempt++) {
      const answer = await this.#ask(base, "GET", `/api/v1/embed/${record.id}?collection=${spec.name}`)
      if (answer.status === 404) return absent
      if (answer.status === 200) return this.#checkRecord(spec, record, answer.body as StoredRecord)
      await pause(25)
    }
    return undefined
  }

  async #loop(step: () => Promise<void>): Promise<void> {
    for (;;) {
      await this.#opened
      if (this.#stopped) return
      this.#underWay += 1
      try {
        await step()
      } catch (error) {
        this.#violation(`the load met ${String((error as Error).stack)}`)
      }
      this.#underWay -= 1
      await pause(this.#source.below(4))
    }
  }

  async #write(spec: CollectionSpec): Promise<void> {
    const base = this.#base
    if (base === undefined) return
    const source = this.#source
    const records = this.#records.get(spec.name) as ReadonlyArray<RecordModel>
    const kind = source.pick(["upsert", "upsert", "upsert", "patch", "delete"] as const)
    const first = source.below(records.length)
    const touched = records.slice(first, first + (kind === "patch" ? 1 : 1 + source.below(5)))
    const number = ++this.#states
    const operation: Operation =
      kind === "upsert" ? { kind, state: number } : kind === "patch" ? { kind, tag: number } : { kind }
    for (const record of touched) record.begin(operation)
    const ids = touched.map(({ id }) => id)
    const answer =
      kind === "upsert"
        ? await this.#ask(base, "POST", "/api/v1/insert", {
            collection: spec.name,
            vectors: touched.map(({ id, index }) => ({
              id,
              vector: [...vectorOf(number, index, spec.dimensions)],
              metadata: metadataOf(number)
            }))
          })
        : kind === "patch"
          ? await this.#ask(base, "PATCH", `/api/v1/vectors/${ids[0]}?collection=${spec.name}`, {
              metadata: { tag: number }
            })
          : await this.#ask(base, "POST", "/api/v1/delete", { collection: spec.name, ids })
    const notFound = kind === "patch" && answer.status === 404
    if (answer.status !== 200 && !notFound) {
      this.counts.unknown += 1
      return this.#checkError(answer)
    }
    this.counts.acknowledged += 1
    for (const record of touched) {
      if (!record.acknowledge(operation, !notFound))
        this.#violation(`${kind} of ${record.id} answered ${answer.status}`)
    }
  }

  async #read(spec: CollectionSpec): Promise<void> {
    const base = this.#base
    if (base === undefined) return
    const record = this.#source.pick(this.#records.get(spec.name) as ReadonlyArray<RecordModel>)
    const start = tick()
    const answer = await this.#ask(base, "GET", `/api/v1/embed/${record.id}?collection=${spec.name}`)
    if (answer.status !== 200 && answer.status !== 404) return this.#checkError(answer)
    const value = answer.status === 404 ? absent : this.#checkRecord(spec, record, answer.body as StoredRecord)
    this.counts.reads += 1
    if (!record.mayHaveHad(value, start))
      this.#violation(`${record.id} was read as ${value}, is ${[...record.values()]}`)
  }

  async #search(spec: CollectionSpec): Promise<void> {
    const base = this.#base
    if (base === undefined) return
    const source = this.#source
    const records = this.#records.get(spec.name) as ReadonlyArray<RecordModel>
    const filter = source.next() < 0.5 ? undefined : source.pick(filters)
    const all = source.next() < 0.5
    const k = all ? records.length : 1 + source.below(10)
    const query = Float32Array.from(source.vector(spec.dimensions))
    const start = tick()
    const answer = await this.#ask(base, "POST", "/api/v1/search", {
      collection: spec.name,
      query: [...query],
      k,
      include: ["metadata", "vector"],
      ...(filter === undefined ? {} : { filter: filter.filter })
    })
    if (answer.status !== 200) return this.#checkError(answer)
    this.counts.searches += 1
    const { results, partial } = answer.body as SearchAnswer
    this.counts.hits += results.length
    if (results.length > k) this.#violation(`${results.length} results of ${k}`)
    const met = new Set<string>()
    let last = Number.POSITIVE_INFINITY
    for (const hit of results) {
      const record = records.find(({ id }) => id === hit.vector_id)
      if (record === undefined || met.has(hit.vector_id)) {
        this.#violation(`${hit.vector_id} was found, which is nobody's or twice`)
        continue
      }
      met.add(hit.vector_id)
      const value = this.#checkRecord(spec, record, hit)
      if (!record.mayHaveHad(value, start)) {
        this.#violation(`${record.id} was found as ${value}, is ${[...record.values()]}`)
      }
      const expected = scoreOf(spec.metric, query, vectorOf(stateOf(value), record.index, spec.dimensions))
      if (Math.abs(expected - hit.score) > 1e-4) {
        this.#violation(`${record.id} was found with ${hit.score}, its vector gives ${expected}`)
      }
      if (hit.score > last + 1e-6) this.#violation(`${record.id} is out of order`)
      last = hit.score
      if (filter !== undefined && !filter.holds(hit.metadata)) {
        this.#violation(
          `${record.id} was found with ${JSON.stringify(hit.metadata)} by ${JSON.stringify(filter.filter)}`
        )
      }
    }
    if (!all || partial) return
    // Everything that was there all the while has to be found.
    for (const record of records) {
      const value = record.certainSince(start)
      if (value === undefined || value === absent || met.has(record.id)) continue
      if (filter === undefined || filter.holds(metadataOf(stateOf(value)))) {
        this.#violation(`${record.id} is ${value} and was not found`)
      }
    }
  }

  #checkRecord(spec: CollectionSpec, record: RecordModel, { vector, metadata }: StoredRecord): Value {
    const { state, tag } = metadata
    const expected = vectorOf(state, record.index, spec.dimensions)
    if (vector.length !== expected.length || vector.some((component, i) => Math.fround(component) !== expected[i])) {
      this.#violation(`${record.id} has a vector that write ${state} did not write`)
    }
    const { parity, group } = metadataOf(state)
    if (metadata.parity !== parity || metadata.group !== group) {
      this.#violation(`${record.id} has the metadata ${JSON.stringify(metadata)}`)
    }
    return valueNamed(state, tag)
  }

  #checkError({ status, body }: Answer): void {
    this.counts.errors += 1
    if (status === 0) return
    const { code } = body as { code?: string }
    if (code === undefined || !honest.has(code)) this.#violation(`answered ${status} ${JSON.stringify(body)}`)
  }

  #violation(text: string): void {
    this.violations.push(text)
  }

  /** Status 0 where the connection broke. */
  async #ask(base: string, method: string, path: string, body?: unknown): Promise<Answer> {
    try {
      const response = await fetch(`${base}${path}`, {
        method,
        ...(body === undefined ? {} : { headers: { "content-type": "application/json" }, body: JSON.stringify(body) })
      })
      const text = await response.text()
      return { status: response.status, body: text === "" ? undefined : JSON.parse(text) }
    } catch {
      return { status: 0, body: undefined }
    }
  }
}

interface Answer {
  readonly status: number
  readonly body: unknown
}

interface Metadata {
  readonly state: number
  readonly parity: string
  readonly group: number
  readonly tag?: number
}

interface StoredRecord {
  readonly vector: ReadonlyArray<number>
  readonly metadata: Metadata
}

interface SearchAnswer {
  readonly partial: boolean
  readonly results: ReadonlyArray<StoredRecord & { readonly vector_id: string; readonly score: number }>
}

const metadataOf = (state: number): Metadata => ({
  state,
  parity: state % 2 === 0 ? "even" : "odd",
  group: state % 10
})

const filters = [
  { filter: { parity: "even" }, holds: ({ parity }: Metadata) => parity === "even" },
  { filter: { group: { lt: 3 } }, holds: ({ group }: Metadata) => group < 3 },
  { filter: { group: { in: [1, 5, 7] } }, holds: ({ group }: Metadata) => [1, 5, 7].includes(group) },
  { filter: { not: { parity: "odd" } }, holds: ({ parity }: Metadata) => parity !== "odd" }
]

/** As the contract has it: cosine, inner product, negative Euclidean distance. */
const scoreOf = (metric: CollectionSpec["metric"], a: Float32Array, b: Float32Array): number => {
  let product = 0
  let squares = 0
  let aa = 0
  let bb = 0
  for (let i = 0; i < a.length; i++) {
    const x = a[i] as number
    const y = b[i] as number
    product += x * y
    squares += (x - y) ** 2
    aa += x * x
    bb += y * y
  }
  if (metric === "ip") return product
  return metric === "l2" ? -Math.sqrt(squares) : product / Math.sqrt(aa * bb)
}

const pause = (millis: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, millis))
