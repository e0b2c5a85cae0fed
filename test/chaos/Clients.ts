/**
 * Clients of a cluster as programs are: the project's own client over all gateways, each with calls one after the other that write,
 * read and search, and followers and subscribers beside them. What they ask and are answered goes into a history.
 */
import { VectorDB, VectorDBError } from "../../src/client/index.ts"
import { partitionOf } from "../../src/shards/PartitionMap.ts"
import { type Random, random } from "../support/Seeded.ts"
import type { FeedEvent, History, MemberEvent, WriteOperation } from "./History.ts"

export interface ClientsOptions {
  readonly bases: ReadonlyArray<string>
  readonly history: History
  readonly seed: number
  readonly clients: number
  /** Keys of each client's own; there are as many that all of them write. */
  readonly keys: number
  /** Between two calls of a client, in the mean. */
  readonly pauseMillis: number
  readonly partitions: number
  readonly followers: number
  readonly subscribers: number
  readonly now: () => number
}

export interface Clients {
  /** Ends the calls; followers and subscribers go on. */
  readonly quiet: () => Promise<void>
  /** Reads every key once, until it is answered. */
  readonly readAll: () => Promise<void>
  readonly feeds: ReadonlyArray<Feed>
  readonly subscriptions: ReadonlyArray<Subscription>
  /** Whether an id is one of these clients' keys. */
  readonly isWritten: (id: string) => boolean
  readonly close: () => Promise<void>
}

export interface Feed {
  readonly name: string
  readonly events: Array<FeedEvent>
  /** What ended it, which nothing should. */
  failed: string | undefined
}

export interface Subscription {
  readonly name: string
  readonly query: Float32Array
  readonly k: number
  readonly events: Array<MemberEvent>
  failed: string | undefined
}

/** Keys read at once in the end. */
const readersAtOnce = 8

export const collection = "chaos"
export const dimensions = 16
const members = 10

/** Errors after which nothing was done, whatever became of attempts before. */
const refused = new Set(["queue_full", "invalid_input"])

/** The vector of a value: whoever reads one can tell whether it is the other's. */
export const vectorOf = (key: string, value: number): Float32Array => {
  let seed = value
  for (let i = 0; i < key.length; i++) seed = (Math.imul(seed, 31) + key.charCodeAt(i)) | 0
  return Float32Array.from(random(seed).vector(dimensions))
}

export const prepare = async (bases: ReadonlyArray<string>, partitions: number): Promise<void> => {
  const db = new VectorDB({ endpoint: bases, collection })
  await db.collections.create(collection, { dimensions, partitions }, { deadlineMillis: 60_000 })
  await db.close()
}

export const startClients = (options: ClientsOptions): Clients => {
  const { bases, history, now, seed } = options
  const shared = Array.from({ length: options.keys }, (_, n) => `all-${n}`)
  const ownOf = (client: number) => Array.from({ length: options.keys }, (_, n) => `c${client}-${n}`)
  const everyKey = [...shared, ...Array.from({ length: options.clients }, (_, client) => ownOf(client)).flat()]
  const connect = (n: number) =>
    // Half of them prefer the one gateway, half the other.
    new VectorDB({
      endpoint: bases.map((_, i) => bases[(i + n) % bases.length] as string),
      region: "test",
      collection,
      reconnectBaseMillis: 50,
      reconnectCapMillis: 1_000
    })
  const connections: Array<VectorDB> = []
  const connected = (n: number) => {
    const db = connect(n)
    connections.push(db)
    return db
  }
  let isQuiet = false

  const loops = Array.from({ length: options.clients }, async (_, client) => {
    const db = connected(client)
    const source = random(seed * 1_000 + client)
    const own = ownOf(client)
    while (!isQuiet) {
      await callOnce({ db, client, source, history, now, own, shared, everyKey })
      await new Promise((resolve) => setTimeout(resolve, source.next() * 2 * options.pauseMillis))
    }
  })

  const ending = new AbortController()
  const follow = (n: number): Feed => {
    const feed: Feed = { name: `follower ${n}`, events: [], failed: undefined }
    const run = async () => {
      for await (const event of connected(n).follow({ from: "oldest", signal: ending.signal })) {
        const what = event.kind === "resync" ? { id: "", version: "" } : { id: event.id, version: event.version }
        feed.events.push({ kind: event.kind, ...what, at: now() })
      }
    }
    void run().catch((error: unknown) => {
      if (!ending.signal.aborted) feed.failed = String(error)
    })
    return feed
  }
  const subscribe = (n: number): Subscription => {
    const query = vectorOf("subscription", n)
    const subscription: Subscription = { name: `subscriber ${n}`, query, k: members, events: [], failed: undefined }
    const run = async () => {
      for await (const change of connected(n).subscribe(query, { k: members, signal: ending.signal })) {
        const { id, type } = change
        const what =
          change.type === "leave" ? { version: "", score: 0 } : { version: change.version, score: change.score }
        subscription.events.push({ type, id, ...what, at: now() })
      }
    }
    void run().catch((error: unknown) => {
      if (!ending.signal.aborted) subscription.failed = String(error)
    })
    return subscription
  }
  const feeds = Array.from({ length: options.followers }, (_, n) => follow(n))
  const subscriptions = Array.from({ length: options.subscribers }, (_, n) => subscribe(n))

  return {
    quiet: async () => {
      isQuiet = true
      await Promise.all(loops)
    },
    readAll: async () => {
      const db = connected(0)
      const left = [...everyKey]
      const read = async () => {
        for (let key = left.pop(); key !== undefined; key = left.pop()) {
          await readOnce({ db, client: -1, history, now }, key, "final", 60_000)
        }
      }
      await Promise.all(Array.from({ length: readersAtOnce }, read))
    },
    feeds,
    subscriptions,
    isWritten: (id) => id.startsWith("c") || id.startsWith("all-"),
    close: async () => {
      isQuiet = true
      ending.abort()
      await Promise.all(connections.map((db) => db.close()))
    }
  }
}

interface Caller {
  readonly db: VectorDB
  readonly client: number
  readonly history: History
  readonly now: () => number
}

interface Turn extends Caller {
  readonly source: Random
  readonly own: ReadonlyArray<string>
  readonly shared: ReadonlyArray<string>
  readonly everyKey: ReadonlyArray<string>
}

const callOnce = async (turn: Turn): Promise<void> => {
  const { db, history, own, shared, source } = turn
  const key = source.below(4) === 0 ? source.pick(shared) : source.pick(own)
  const what = source.below(100)
  if (what < 35)
    return await writeOnce(turn, "upsert", [key], (value) => db.insertMany([itemOf(key, value[0] as number)]))
  if (what < 45) {
    const keys = [...new Set(Array.from({ length: 4 }, () => source.pick(own)))]
    return await writeOnce(turn, "upsert", keys, (values) =>
      db.insertMany(keys.map((one, i) => itemOf(one, values[i] as number)))
    )
  }
  if (what < 55) return await writeOnce(turn, "patch", [key], ([value]) => db.update(key, { metadata: { value } }))
  if (what < 60) return await writeOnce(turn, "delete", [key], () => db.delete(key))
  if (what < 80) return await readOnce(turn, source.pick(turn.everyKey), "get")
  // What was written last, so that it is among what is found.
  const near = history.writes.at(-1 - source.below(20))
  const query = near === undefined ? vectorOf("any", 0) : vectorOf(near.key, near.value)
  return await searchOnce(turn, query)
}

const itemOf = (key: string, value: number) => ({
  id: key,
  vector: vectorOf(key, value),
  metadata: { value, base: value }
})

/** Calls, and notes how it went; the answer, or `undefined`. */
const called = async <A>(
  { client, history, now }: Caller,
  kind: string,
  call: () => Promise<A>
): Promise<{ readonly answer?: A; readonly failed?: string; readonly invoked: number; readonly completed: number }> => {
  const invoked = now()
  try {
    const answer = await call()
    const completed = now()
    history.calls.push({ client, kind, invoked, completed, failed: undefined })
    return { answer, invoked, completed }
  } catch (error) {
    const failed = error instanceof VectorDBError ? error.code : String(error)
    const completed = now()
    // That there is no record is an answer.
    history.calls.push({ client, kind, invoked, completed, failed: failed === "vector_not_found" ? undefined : failed })
    return { failed, invoked, completed }
  }
}

const writeOnce = async (
  turn: Turn,
  kind: WriteOperation["kind"],
  keys: ReadonlyArray<string>,
  write: (values: ReadonlyArray<number>) => Promise<unknown>
): Promise<void> => {
  const { client, history } = turn
  const values = keys.map(() => history.value())
  const { completed, failed, invoked } = await called(turn, kind, () => write(values))
  keys.forEach((key, i) => {
    if (failed === "vector_not_found") {
      history.reads.push({ kind: "get", client, key, value: undefined, invoked, completed })
    }
    if (failed !== undefined && refused.has(failed)) return
    const value = values[i] as number
    history.writes.push({ kind, client, key, value, invoked, completed: failed === undefined ? completed : undefined })
  })
}

const readOnce = async (caller: Caller, key: string, kind: "get" | "final", deadlineMillis?: number): Promise<void> => {
  const { client, history } = caller
  const call = () => caller.db.get(key, deadlineMillis === undefined ? {} : { deadlineMillis })
  const { answer, completed, failed, invoked } = await called(caller, kind, call)
  if (failed !== undefined) {
    if (kind === "final") history.violations.push({ kind: "lost write", what: `${key} cannot be read: ${failed}` })
    return
  }
  const value = answer === undefined ? undefined : Number(answer.metadata["value"])
  history.reads.push({ kind, client, key, value, invoked, completed })
  if (answer === undefined) return
  const base = Number(answer.metadata["base"])
  const expected = vectorOf(key, base)
  if (answer.vector.length === dimensions && answer.vector.every((x, i) => x === expected[i])) return
  history.violations.push({ kind: "torn record", what: `${key}: the vector of value ${value} is not that of ${base}` })
}

const searchOnce = async (turn: Turn, query: Float32Array): Promise<void> => {
  const { client, history } = turn
  const { answer, completed, invoked } = await called(turn, "search", () => turn.db.search(query, { k: 10 }))
  for (const { id, metadata } of answer ?? []) {
    if (metadata["value"] === undefined) continue
    history.reads.push({ kind: "search", client, key: id, value: Number(metadata["value"]), invoked, completed })
  }
}

/** An id of each partition, that no client writes. */
export const probeIds = (partitions: number): ReadonlyArray<string> =>
  Array.from({ length: partitions }, (_, partition) => {
    for (let n = 0; ; n++) if (partitionOf(`probe-${n}`, partitions) === partition) return `probe-${n}`
  })
