/**
 * Clients of subscriptions on each wire that go on after a cut with their last cursor, and what their events come to:
 * folded into an answer, or kept as a sequence. What is wrong with the events is counted as they come.
 */
import * as http from "node:http"
import { WebSocket } from "ws"
import type { Random } from "./Seeded.ts"

export interface Member {
  readonly vector_id: string
  readonly score: number
  readonly version: string
  readonly metadata?: unknown
}

type AnswerChange =
  | { readonly type: "leave"; readonly vector_id: string }
  | ({ readonly type: "enter" | "update" } & Member)

export interface WireEvent {
  readonly event: string
  readonly cursor?: string
  readonly results?: ReadonlyArray<Member>
  readonly changes?: ReadonlyArray<AnswerChange>
  readonly keep?: ReadonlyArray<string>
  readonly kind?: string
  readonly vector_id?: string
  readonly version?: string
  readonly problem?: { readonly code: string }
}

/** What should not be there. */
export interface Faults {
  gaps: number
  repeats: number
  outOfOrder: number
  /** The first few, in words. */
  readonly said: Array<string>
}

export const noFaults = (): Faults => ({ gaps: 0, repeats: 0, outOfOrder: 0, said: [] })

export interface Fold {
  readonly apply: (event: WireEvent) => void
}

/** A standing query's events, folded. */
export class AnswerFold implements Fold {
  readonly members = new Map<string, Member>()
  events = 0
  /** Leaves, enters and updates. */
  changes = 0
  readonly #faults: Faults
  /** The newest version seen of each id. */
  readonly #newest = new Map<string, string>()

  constructor(faults: Faults) {
    this.#faults = faults
  }

  readonly apply = (event: WireEvent): void => {
    this.events += 1
    if (event.event === "subscribed") {
      this.members.clear()
      for (const member of event.results ?? []) this.#set(member)
    }
    if (event.keep !== undefined) {
      const keep = new Set(event.keep)
      for (const id of this.members.keys()) if (!keep.has(id)) this.members.delete(id)
      for (const id of keep) if (!this.members.has(id)) this.#fault("gaps", `${id} is kept, and was not there`)
    }
    for (const change of event.changes ?? []) {
      this.changes += 1
      const known = this.members.get(change.vector_id)
      if (change.type === "leave") {
        if (!this.members.delete(change.vector_id)) this.#fault("gaps", `${change.vector_id} leaves, and was not there`)
      } else if (change.type === "enter") {
        if (known !== undefined) this.#fault("repeats", `${change.vector_id} enters, and was there`)
        this.#set(change)
      } else {
        if (known === undefined) this.#fault("gaps", `${change.vector_id} is updated, and was not there`)
        else if (known.version === change.version && known.score === change.score) {
          this.#fault("repeats", `${change.vector_id} is updated to what it was`)
        }
        this.#set(change)
      }
    }
  }

  /** Ids, versions, scores and metadata, nearest first. */
  answer(): ReadonlyArray<Member> {
    return [...this.members.values()].sort((a, b) => b.score - a.score || (a.vector_id < b.vector_id ? -1 : 1))
  }

  #set({ vector_id, score, version, metadata }: Member): void {
    const newest = this.#newest.get(vector_id)
    if (newest !== undefined && version < newest) this.#fault("outOfOrder", `${vector_id} goes back to ${version}`)
    this.#newest.set(vector_id, version)
    this.members.set(vector_id, { vector_id, score, version, ...(metadata === undefined ? {} : { metadata }) })
  }

  #fault(kind: "gaps" | "repeats" | "outOfOrder", words: string): void {
    this.#faults[kind] += 1
    if (this.#faults.said.length < 10) this.#faults.said.push(words)
  }
}

export interface FollowedChange {
  readonly kind: string
  readonly id: string
  readonly version: string
}

/** A change feed's events, in the order they came in. */
export class FeedFold implements Fold {
  readonly changes: Array<FollowedChange> = []
  resyncs = 0
  readonly #faults: Faults
  readonly #seen = new Set<string>()
  readonly #newest = new Map<number, string>()
  readonly #partitionOf: (id: string) => number

  constructor(faults: Faults, partitionOf: (id: string) => number) {
    this.#faults = faults
    this.#partitionOf = partitionOf
  }

  readonly apply = (event: WireEvent): void => {
    if (event.event === "resync") this.resyncs += 1
    if (event.event !== "change") return
    const { kind = "", vector_id: id = "", version = "" } = event
    const partition = this.#partitionOf(id)
    const words = `${kind} ${id} ${version}`
    if (this.#seen.has(words)) this.#fault("repeats", words)
    // Where every write is committed before it is visible, versions rise along the log.
    else if ((this.#newest.get(partition) ?? "") >= version) this.#fault("outOfOrder", words)
    this.#seen.add(words)
    this.#newest.set(partition, version)
    this.changes.push({ kind, id, version })
  }

  #fault(kind: "repeats" | "outOfOrder", words: string): void {
    this.#faults[kind] += 1
    if (this.#faults.said.length < 10) this.#faults.said.push(words)
  }
}

/** What is asked for, on any wire. */
export type Asked =
  | {
      readonly stream: "subscribe"
      readonly collection: string
      readonly query: ReadonlyArray<number>
      readonly k: number
      readonly min_score?: number
      readonly filter?: object
      readonly include?: ReadonlyArray<"metadata">
    }
  | { readonly stream: "changes"; readonly collection: string; readonly from: "oldest" | "newest" }

export type Wire = "sse" | "ws" | "rpc"

/** Follows a stream through cuts until it is stopped. */
export class Subscriber {
  readonly asked: Asked
  readonly wire: Wire
  /** Connections that were made. */
  connections = 0
  /** Those that began with a cursor and were answered. */
  resumed = 0
  refusals: Array<string> = []
  cursor: string | undefined
  readonly #port: () => number
  readonly #fold: Fold
  #stopped = false
  #cut: () => void = () => {}
  #done: Promise<void>

  constructor(wire: Wire, port: () => number, asked: Asked, fold: Fold) {
    this.wire = wire
    this.asked = asked
    this.#port = port
    this.#fold = fold
    this.#done = this.#run()
  }

  /** Destroys the client's socket. */
  cut(): void {
    this.#cut()
  }

  async stop(): Promise<void> {
    this.#stopped = true
    this.#cut()
    await this.#done
  }

  async #run(): Promise<void> {
    while (!this.#stopped) {
      this.connections += 1
      await connect[this.wire](this.#port(), this.asked, this.cursor, {
        onEvent: (event) => this.#event(event),
        onRefused: (code) => {
          if (this.refusals.length < 20) this.refusals.push(code)
        },
        cutBy: (cut) => {
          this.#cut = cut
          if (this.#stopped) cut()
        }
      })
      if (!this.#stopped) await new Promise((resolve) => setTimeout(resolve, 5))
    }
  }

  #event(event: WireEvent): void {
    if (this.#stopped) return
    if (event.event === "bye") return
    if (event.event === "error") {
      if (this.refusals.length < 20) this.refusals.push(event.problem?.code ?? "?")
      return this.#cut()
    }
    if (event.event === "resumed" || (event.event === "following" && this.cursor !== undefined)) this.resumed += 1
    this.#fold.apply(event)
    if (event.cursor !== undefined) this.cursor = event.cursor
  }
}

interface Hooks {
  readonly onEvent: (event: WireEvent) => void
  readonly onRefused: (code: string) => void
  readonly cutBy: (cut: () => void) => void
}

/** Ends when the connection has. */
type Connect = (port: number, asked: Asked, cursor: string | undefined, hooks: Hooks) => Promise<void>

const overSse: Connect = (port, asked, cursor, { onEvent, onRefused, cutBy }) =>
  new Promise((resolve) => {
    const headers = cursor === undefined ? {} : { "last-event-id": cursor }
    const request = http.get({ host: "127.0.0.1", port, path: urlOf(asked), headers, agent: false }, (response) => {
      let text = ""
      response.setEncoding("utf8")
      response.on("error", () => {})
      response.on("data", (chunk: string) => {
        text += chunk
        for (let end = text.indexOf("\n\n"); end !== -1 && response.statusCode === 200; end = text.indexOf("\n\n")) {
          const block = text.slice(0, end)
          text = text.slice(end + 2)
          const data = /^data: (.*)$/m.exec(block)?.[1]
          const id = /^id: (.*)$/m.exec(block)?.[1]
          if (data === undefined) continue
          onEvent({ ...(JSON.parse(data) as WireEvent), ...(id === undefined ? {} : { cursor: id }) })
        }
      })
      response.on("close", () => {
        if (response.statusCode !== 200) onRefused(codeIn(text))
        resolve()
      })
    })
    request.on("error", () => resolve())
    cutBy(() => request.destroy())
  })

const codeIn = (text: string): string => /"code":"(\w+)"/.exec(text)?.[1] ?? text.slice(0, 80)

export const urlOf = (asked: Asked): string => {
  const parameters = new URLSearchParams({ collection: asked.collection })
  if (asked.stream === "changes") parameters.set("from", asked.from)
  else {
    parameters.set("query_b64", Buffer.from(Float32Array.from(asked.query).buffer).toString("base64url"))
    parameters.set("k", String(asked.k))
    if (asked.min_score !== undefined) parameters.set("min_score", String(asked.min_score))
    if (asked.filter !== undefined) parameters.set("filter", JSON.stringify(asked.filter))
    if (asked.include !== undefined) parameters.set("include", asked.include.join(","))
  }
  return `/api/v1/stream/${asked.stream}?${parameters}`
}

const overWebSocket: Connect = (port, asked, cursor, { onEvent, cutBy }) =>
  new Promise((resolve) => {
    const socket = new WebSocket(`ws://127.0.0.1:${port}/api/v1/ws`, { perMessageDeflate: false })
    socket.on("error", () => {})
    socket.on("close", () => resolve())
    socket.on("open", () => socket.send(JSON.stringify(frameOf(asked, cursor))))
    socket.on("message", (data: Buffer) => onEvent(JSON.parse(data.toString()) as WireEvent))
    cutBy(() => socket.terminate())
  })

const frameOf = ({ stream, ...asked }: Asked, cursor: string | undefined): object => {
  const type = stream === "changes" ? "follow" : cursor === undefined ? "subscribe" : "resume"
  return { type, id: "only", ...asked, ...(cursor === undefined ? {} : { cursor }) }
}

const overRpc: Connect = (port, asked, cursor, { onEvent, onRefused, cutBy }) =>
  new Promise((resolve) => {
    const options = {
      host: "127.0.0.1",
      port,
      path: "/api/v1/rpc",
      method: "POST",
      headers: { "content-type": "application/ndjson" },
      agent: false
    }
    const request = http.request(options, (response) => {
      let text = ""
      response.setEncoding("utf8")
      response.on("error", () => {})
      response.on("data", (chunk: string) => {
        text += chunk
        for (let end = text.indexOf("\n"); end !== -1; end = text.indexOf("\n")) {
          const line = text.slice(0, end)
          text = text.slice(end + 1)
          if (line.trim() === "") continue
          const message = JSON.parse(line) as { readonly _tag: string; readonly values?: ReadonlyArray<WireEvent> }
          for (const event of message.values ?? []) onEvent(parsed(event))
          if (message._tag === "Exit") onRefused(/"_tag":"Fail","error":\{"_tag":"(\w+)"/.exec(line)?.[1] ?? line)
        }
      })
      response.on("close", () => resolve())
    })
    request.on("error", () => resolve())
    request.end(`${JSON.stringify({ _tag: "Request", id: "1", headers: [], ...rpcOf(asked, cursor) })}\n`)
    cutBy(() => request.destroy())
  })

const rpcOf = (asked: Asked, cursor: string | undefined): object => {
  const resumed = cursor === undefined ? {} : { cursor }
  if (asked.stream === "changes") {
    return { tag: "Changes", payload: { collection: asked.collection, from: asked.from, ...resumed } }
  }
  const { collection, k, min_score, filter, include, query } = asked
  const payload = {
    collection,
    k,
    query: Buffer.from(Float32Array.from(query).buffer).toString("base64"),
    ...(min_score === undefined ? {} : { min_score }),
    ...(filter === undefined ? {} : { filter: JSON.stringify(filter) }),
    ...(include === undefined ? {} : { include_metadata: true }),
    ...resumed
  }
  return { tag: "Subscribe", payload }
}

/** Metadata is JSON text on this wire. */
const parsed = (event: WireEvent): WireEvent => {
  const member = <A extends object>(of: A): A =>
    "metadata" in of && typeof of.metadata === "string" ? { ...of, metadata: JSON.parse(of.metadata) as unknown } : of
  return {
    ...event,
    ...(event.results === undefined ? {} : { results: event.results.map(member) }),
    ...(event.changes === undefined ? {} : { changes: event.changes.map(member) })
  }
}

const connect: Record<Wire, Connect> = { sse: overSse, ws: overWebSocket, rpc: overRpc }

/** A load of changes to a few ids, one at a time for each, and what they came to. */
export class ChangeLoad {
  /**
   * By id, every change that was acknowledged, in order. With `?`: one whose answer was lost, so that it may have been made
   * or not.
   */
  readonly acknowledged = new Map<string, Array<string>>()
  readonly #base: () => string
  readonly #collection: string
  readonly #random: Random
  readonly #ids: ReadonlyArray<string>
  readonly #dimensions: number
  readonly #busy = new Set<string>()
  readonly #there = new Set<string>()
  changes = 0

  constructor(base: () => string, collection: string, random: Random, ids: number, dimensions: number) {
    this.#base = base
    this.#collection = collection
    this.#random = random
    this.#ids = Array.from({ length: ids }, (_, i) => `v${i}`)
    this.#dimensions = dimensions
  }

  /** So many changes, some at a time. */
  async run(changes: number, atOnce = 4): Promise<void> {
    let left = changes
    const worker = async () => {
      while (left > 0) {
        left -= 1
        await this.#one()
      }
    }
    await Promise.all(Array.from({ length: atOnce }, worker))
  }

  /** Every record as it is now. */
  async records(): Promise<ReadonlyArray<{ id: string; vector: Array<number>; metadata: object; version: string }>> {
    const found = await Promise.all(
      this.#ids.map(async (id) => {
        const response = await fetch(`${this.#base()}/api/v1/embed/${id}?collection=${this.#collection}`)
        if (response.status !== 200) return undefined
        const record = (await response.json()) as { vector: Array<number>; metadata: object; version: string }
        return { id, ...record }
      })
    )
    return found.filter((record) => record !== undefined)
  }

  async #one(): Promise<void> {
    const free = this.#ids.filter((id) => !this.#busy.has(id))
    const id = this.#random.pick(free)
    this.#busy.add(id)
    try {
      const dice = this.#random.next()
      const n = this.changes++
      if (!this.#there.has(id) || dice < 0.6) {
        this.#there.delete(id)
        const record = { id, vector: this.#random.vector(this.#dimensions), metadata: { n, even: n % 2 === 0 } }
        const body = { collection: this.#collection, vectors: [record] }
        if (await this.#send("POST", "insert", body, id, "upsert")) this.#there.add(id)
      } else if (dice < 0.8) {
        const body = { metadata: { n, even: n % 2 === 0 } }
        const path = `vectors/${id}?collection=${this.#collection}`
        if (!(await this.#send("PATCH", path, body, id, "metadata"))) this.#there.delete(id)
      } else {
        this.#there.delete(id)
        await this.#send("POST", "delete", { collection: this.#collection, ids: [id] }, id, "delete")
      }
    } finally {
      this.#busy.delete(id)
    }
  }

  /** Whether it was acknowledged; throws where it was refused. */
  async #send(method: string, path: string, body: object, id: string, kind: string): Promise<boolean> {
    const headers = { "content-type": "application/json" }
    const answer = await fetch(`${this.#base()}/api/v1/${path}`, { method, headers, body: JSON.stringify(body) }).then(
      async (response) => ({ status: response.status, text: await response.text() }),
      () => undefined
    )
    if (answer !== undefined && answer.status < 500 && answer.status !== 429 && answer.status >= 300) {
      throw new Error(`${method} ${path}: ${answer.status} ${answer.text}`)
    }
    const made = answer !== undefined && answer.status < 300
    const kinds = this.acknowledged.get(id) ?? []
    this.acknowledged.set(id, kinds)
    kinds.push(made ? kind : `${kind}?`)
    if (!made) await new Promise((resolve) => setTimeout(resolve, 20))
    return made
  }
}

/** Whether a sequence of changes is what was acknowledged, with or without each of those whose answer was lost. */
export const isSequenceOf = (followed: ReadonlyArray<string>, acknowledged: ReadonlyArray<string>): boolean => {
  // Ends in `followed` that the acknowledged so far can come to.
  let ends = new Set([0])
  for (const kind of acknowledged) {
    const next = new Set<number>()
    for (const end of ends) {
      if (kind.endsWith("?")) next.add(end)
      if (followed[end] === kind.replace("?", "")) next.add(end + 1)
    }
    ends = next
  }
  return ends.has(followed.length)
}

/** The answer of a standing query over all records, by comparing with each of them. */
export const bruteForce = (
  records: ReadonlyArray<{ id: string; vector: Array<number>; metadata: object; version: string }>,
  asked: Asked & { readonly stream: "subscribe" }
): ReadonlyArray<Member> => {
  const query = Float32Array.from(asked.query)
  return records
    .filter(({ metadata }) =>
      Object.entries(asked.filter ?? {}).every(
        ([field, value]) => (metadata as Record<string, unknown>)[field] === value
      )
    )
    .map(({ id, vector, metadata, version }) => ({
      vector_id: id,
      score: cosine(query, vector),
      version,
      ...(asked.include === undefined ? {} : { metadata })
    }))
    .filter(({ score }) => score >= (asked.min_score ?? Number.NEGATIVE_INFINITY))
    .sort((a, b) => b.score - a.score)
    .slice(0, asked.k)
}

const cosine = (a: ArrayLike<number>, b: ArrayLike<number>): number => {
  let dot = 0
  let aa = 0
  let bb = 0
  for (let i = 0; i < a.length; i++) {
    const x = a[i] as number
    const y = b[i] as number
    dot += x * y
    aa += x * x
    bb += y * y
  }
  return dot / Math.sqrt(aa * bb)
}

/** What differs between the folded answer and the right one, in words; empty where nothing does. */
export const differences = (folded: ReadonlyArray<Member>, right: ReadonlyArray<Member>): string => {
  const words: Array<string> = []
  const byId = new Map(folded.map((member) => [member.vector_id, member]))
  for (const member of right) {
    const found = byId.get(member.vector_id)
    byId.delete(member.vector_id)
    if (found === undefined) words.push(`${member.vector_id} is missing`)
    else if (found.version !== member.version)
      words.push(`${member.vector_id} is ${found.version}, not ${member.version}`)
    else if (Math.abs(found.score - member.score) > 1e-5) {
      words.push(`${member.vector_id} scores ${found.score}, not ${member.score}`)
    } else if (JSON.stringify(found.metadata) !== JSON.stringify(member.metadata)) {
      words.push(`${member.vector_id} has ${JSON.stringify(found.metadata)}, not ${JSON.stringify(member.metadata)}`)
    }
  }
  for (const id of byId.keys()) words.push(`${id} is too many`)
  return words.join("; ")
}
