/**
 * The engine of a service: searches, inserts and subscriptions on one WebSocket (`Wire`), everything else, and all where
 * `streaming` is off, as requests of HTTP. All of it is safe to repeat, and is repeated within the deadline: all attempts at
 * one write have the same key, under which the server does it once.
 */
import { Cause, Effect, Queue, Stream } from "effect"
import { Backoff } from "./Backoff.ts"
import { errorOfProblem, isTransient, ownError, type ProblemMembers, VectorDBError } from "./ClientError.ts"
import type { ResolvedOptions } from "./ClientOptions.ts"
import type {
  CollectionChange,
  CollectionInfo,
  Engine,
  Heard,
  Item,
  MemberChange,
  Metadata,
  Query,
  SearchAnswer,
  SearchHit,
  SearchOptions,
  StoredVector,
  Vector,
  WriteOptions
} from "./Engine.ts"
import { type Entering, Members } from "./Members.ts"
import { Wire, type WireEvent } from "./Wire.ts"

export interface RemoteEngine extends Engine {
  /** Ends the connection; calls under way fail with `closed`. */
  readonly close: () => void
}

export const makeRemoteEngine = (options: ResolvedOptions): RemoteEngine => {
  const wire = new Wire(options)
  const http = new Http(options, wire)

  const insertOverWire = (items: ReadonlyArray<Item>, options: InsertOptions) => {
    const { collection, ack, deadlineMillis } = options
    const first = items[0]
    if (first === undefined) return Effect.succeed(0)
    const floats = joined(items)
    // Vectors of different lengths cannot go as bytes; as numbers, the server says which of them is wrong.
    const vectors = items.map(({ id, metadata, vector }) => ({
      id,
      ...(metadata === undefined ? {} : { metadata }),
      ...(floats === undefined ? { vector: [...vector] } : {})
    }))
    const frame = { type: "insert", collection, vectors, ...(ack === undefined ? {} : { ack }) }
    return keyed(options, (idempotency_key) =>
      once(wire, { ...frame, idempotency_key }, floats, deadlineMillis, (event) => Number(event["inserted"]))
    )
  }

  const insertOverHttp = (items: ReadonlyArray<Item>, options: InsertOptions) => {
    const { collection, ack, deadlineMillis } = options
    const vectors = items.map((item) => ({ ...item, vector: [...item.vector] }))
    const body = { collection, vectors, ...(ack === undefined ? {} : { ack }) }
    return keyed(options, (key) =>
      Effect.map(http.call("POST", "/insert", body, deadlineMillis, key), (answer) => Number(answer["inserted"]))
    )
  }

  const search = (query: Query, search: SearchOptions): Effect.Effect<SearchAnswer, VectorDBError> => {
    const { frame, floats } = searchFrame(query, search)
    if (options.streaming) return once(wire, { type: "search", ...frame }, floats, search.deadlineMillis, answerOf)
    const body = floats === undefined ? frame : { ...frame, query: [...floats] }
    return Effect.map(http.call("POST", "/search", body, search.deadlineMillis), answerOf)
  }

  const searchStream = (query: Query, search: SearchOptions): Stream.Stream<SearchHit, VectorDBError> => {
    if (!options.streaming) {
      return Stream.fromIterableEffect(Effect.map(engine.search(query, search), ({ hits }) => hits))
    }
    return Stream.callback<SearchHit, VectorDBError>((queue) =>
      Effect.acquireRelease(
        Effect.sync(() => {
          const { frame, floats } = searchFrame(query, search)
          // A search that was cut is run anew; what has been handed on already is not handed on twice.
          const given = new Set<string>()
          return wire.start({
            frame: () => ({ type: "search", stream: true, ...frame }),
            ...(floats === undefined ? {} : { floats }),
            deadlineMillis: search.deadlineMillis,
            onEvent: (event) => {
              if (event.event === "result") {
                const hit = hitOf(event)
                if (!given.has(hit.id)) {
                  given.add(hit.id)
                  Queue.offerUnsafe(queue, hit)
                }
              }
              if (event.event !== "search_complete") return false
              Queue.endUnsafe(queue)
              return true
            },
            onError: (error) => Queue.failCauseUnsafe(queue, Cause.fail(error))
          })
        }),
        (cancel) => Effect.sync(cancel)
      )
    )
  }

  /**
   * Events of a subscription as long as it is wanted. After a cut it goes on from the newest cursor; without one where that
   * is good no more. A reader that lags far behind is not sent more until it has caught up: what it has not read by then
   * comes as one difference.
   */
  const events = <A>(
    frame: Readonly<Record<string, unknown>>,
    floats: Float32Array | undefined,
    read: (event: WireEvent) => ReadonlyArray<A>,
    first?: string
  ): Stream.Stream<A, VectorDBError> =>
    Stream.callback<A, VectorDBError>((queue) =>
      Effect.acquireRelease(
        Effect.sync(() => {
          let cursor = first
          let timer: ReturnType<typeof setTimeout> | undefined
          let cancel = () => {}
          const later = (millis: number) => {
            timer = setTimeout(() => {
              if (Queue.sizeUnsafe(queue) > options.subscriptionBufferMax / 2) later(pausedMillis)
              else begin()
            }, millis)
          }
          const begin = () => {
            cancel = wire.start({
              frame: () => (cursor === undefined ? frame : { ...frame, cursor }),
              ...(floats === undefined ? {} : { floats }),
              deadlineMillis: Number.POSITIVE_INFINITY,
              endFrame: "unsubscribe",
              onEvent: (event) => {
                if (typeof event["cursor"] === "string") cursor = event["cursor"]
                for (const item of read(event)) Queue.offerUnsafe(queue, item)
                if (Queue.sizeUnsafe(queue) <= options.subscriptionBufferMax) return false
                cancel()
                later(pausedMillis)
                return false
              },
              onError: (error) => {
                if (error.code !== "invalid_cursor" || cursor === undefined || cursor === first) {
                  Queue.failCauseUnsafe(queue, Cause.fail(error))
                  return
                }
                cursor = undefined
                later(0)
              }
            })
          }
          if (options.streaming) begin()
          else Queue.failCauseUnsafe(queue, Cause.fail(notStreaming()))
          return () => {
            clearTimeout(timer)
            cancel()
          }
        }),
        (end) => Effect.sync(end)
      )
    )

  const engine: RemoteEngine = {
    subscribe: (query, { collection, k, minScore, filter, includeVector }) => {
      const floats = "id" in query ? undefined : floatsOf(query)
      const frame = {
        type: "subscribe",
        collection,
        k,
        ...("id" in query ? { query_vector_id: query.id } : {}),
        ...(minScore === undefined ? {} : { min_score: minScore }),
        ...(filter === undefined ? {} : { filter }),
        include: includeVector ? ["metadata", "vector"] : ["metadata"]
      }
      return Stream.suspend(() => {
        const members = new Members()
        return events(frame, floats, (event) => {
          switch (event.event) {
            case "subscribed":
              return members.answer((event["results"] as ReadonlyArray<Json>).map(enteringOf))
            case "resumed": {
              const keep = event["keep"] as ReadonlyArray<string> | undefined
              const leaves = keep === undefined ? [] : members.keep(new Set(keep))
              return [...leaves, ...members.apply(changesOf(event))]
            }
            case "changes":
              return members.apply(changesOf(event))
            default:
              return []
          }
        })
      })
    },
    follow: ({ collection, from }) =>
      events<CollectionChange>({ type: "follow", collection, from }, undefined, (event) => {
        if (event.event === "resync") return [{ kind: "resync" }]
        if (event.event !== "change") return []
        const kind = event["kind"] as "upsert" | "metadata" | "delete"
        return [{ kind, id: String(event["vector_id"]), version: String(event["version"]) }]
      }),
    topic: (operation, request, deadlineMillis) => {
      if (options.streaming) {
        return once(wire, { type: `topic.${operation}`, ...request }, undefined, deadlineMillis, answerOfTopic)
      }
      const { topic, ...body } = request
      const path = topic === undefined ? "/topics" : `/topics/${encodeURIComponent(String(topic))}`
      switch (operation) {
        case "create":
          return http.call("PUT", path, body, deadlineMillis)
        case "describe":
        case "list":
          return http.call("GET", path, undefined, deadlineMillis)
        case "delete":
          return http.call("DELETE", path, undefined, deadlineMillis)
        case "task":
          return http.call(
            "GET",
            `${path}/tasks/${encodeURIComponent(String(body["task_id"]))}`,
            undefined,
            deadlineMillis
          )
        case "tasks": {
          const parameters = new URLSearchParams(body as Record<string, string>)
          return http.call("GET", `${path}/tasks?${parameters}`, undefined, deadlineMillis)
        }
        default:
          return http.call("POST", `${path}/${operation}`, body, deadlineMillis)
      }
    },
    listen: (topic, { cursor, from, subscriber }) =>
      events<Heard>(
        {
          type: "listen",
          topic,
          ...(from === undefined ? {} : { from }),
          ...(subscriber === undefined ? {} : { subscriber })
        },
        undefined,
        (event) => {
          if (event.event === "gap") return [{ gap: true }]
          if (event.event !== "message") return []
          return [
            {
              id: String(event["message_id"]),
              key: String(event["key"]),
              message: event["message"],
              atMillis: Number(event["at_ms"]),
              cursor: String(event["cursor"])
            }
          ]
        },
        cursor
      ),
    insert: options.streaming ? insertOverWire : insertOverHttp,
    patch: (id, metadata, options) => {
      const path = `/vectors/${encodeURIComponent(id)}${inCollection(options.collection)}`
      return keyed(options, (key) =>
        Effect.map(http.call("PATCH", path, { metadata }, options.deadlineMillis, key), (body) => ({
          metadata: body["metadata"] as Metadata,
          version: String(body["version"])
        }))
      )
    },
    remove: (ids, options) =>
      keyed(options, (key) =>
        Effect.map(
          http.call("POST", "/delete", { collection: options.collection, ids }, options.deadlineMillis, key),
          (body) => Number(body["deleted"])
        )
      ),
    get: (id, { collection, deadlineMillis }) =>
      http.call("GET", `/embed/${encodeURIComponent(id)}${inCollection(collection)}`, undefined, deadlineMillis).pipe(
        Effect.map(storedOf),
        Effect.catchIf(
          ({ code }) => code === "vector_not_found",
          () => Effect.undefined
        )
      ),
    search,
    searchStream,
    createCollection: (name, parameters, deadlineMillis) =>
      Effect.map(http.call("PUT", `/collections/${name}`, parameters, deadlineMillis), infoOf),
    collection: (name, deadlineMillis) =>
      Effect.map(http.call("GET", `/collections/${name}`, undefined, deadlineMillis), infoOf),
    collections: (deadlineMillis) =>
      Effect.map(http.call("GET", "/collections", undefined, deadlineMillis), (body) =>
        (body["collections"] as ReadonlyArray<Json>).map(infoOf)
      ),
    deleteCollection: (name, deadlineMillis) =>
      Effect.asVoid(http.call("DELETE", `/collections/${name}`, undefined, deadlineMillis)),
    close: () => {
      wire.close()
      http.close()
    }
  }
  return engine
}

type InsertOptions = Parameters<Engine["insert"]>[1]
type Json = Readonly<Record<string, unknown>>

/** A write with its key: the caller's, or one of its own each time that it is run. */
const keyed = <A, E>(
  { idempotencyKey }: WriteOptions,
  write: (key: string) => Effect.Effect<A, E>
): Effect.Effect<A, E> => Effect.suspend(() => write(idempotencyKey ?? freshKey()))

const freshKey = (): string => {
  let key = ""
  for (const byte of crypto.getRandomValues(new Uint8Array(16))) key += byte.toString(16).padStart(2, "0")
  return key
}

/** A call with one answer. */
const once = <A>(
  wire: Wire,
  frame: Json,
  floats: Float32Array | undefined,
  deadlineMillis: number,
  read: (event: WireEvent) => A
): Effect.Effect<A, VectorDBError> =>
  Effect.callback((resume) => {
    const cancel = wire.start({
      frame: () => frame,
      ...(floats === undefined ? {} : { floats }),
      deadlineMillis,
      onEvent: (event) => {
        resume(Effect.succeed(read(event)))
        return true
      },
      onError: (error) => resume(Effect.fail(error))
    })
    return Effect.sync(cancel)
  })

const searchFrame = (query: Query, { collection, k, ef, filter, includeVector, deadlineMillis }: SearchOptions) => {
  const floats = "id" in query ? undefined : floatsOf(query)
  const frame = {
    collection,
    k,
    ...("id" in query ? { query_vector_id: query.id } : {}),
    ...(ef === undefined ? {} : { ef }),
    ...(filter === undefined ? {} : { filter }),
    include: includeVector ? ["metadata", "vector"] : ["metadata"],
    // Beyond this the server would refuse it; the client waits no longer than it was told to.
    deadline_ms: Math.max(1, Math.min(60_000, Math.trunc(deadlineMillis)))
  }
  return { frame, floats }
}

const floatsOf = (vector: Vector): Float32Array => (vector instanceof Float32Array ? vector : Float32Array.from(vector))

/** Vectors one after the other; `undefined` where their lengths differ, or one is not of numbers. */
const joined = (items: ReadonlyArray<Item>): Float32Array | undefined => {
  const dimensions = items[0]?.vector.length ?? 0
  if (dimensions === 0) return undefined
  const floats = new Float32Array(items.length * dimensions)
  for (let i = 0; i < items.length; i++) {
    const { vector } = items[i] as Item
    if (vector.length !== dimensions) return undefined
    floats.set(vector, i * dimensions)
  }
  return floats
}

const inCollection = (collection: string): string => `?collection=${encodeURIComponent(collection)}`

const hitOf = (result: Json): SearchHit => ({
  id: String(result["vector_id"]),
  score: Number(result["score"]),
  metadata: (result["metadata"] ?? {}) as Metadata,
  ...(Array.isArray(result["vector"]) ? { vector: Float32Array.from(result["vector"] as Array<number>) } : {})
})

const enteringOf = (member: Json): Entering => ({ type: "enter", version: String(member["version"]), ...hitOf(member) })

const changesOf = (event: WireEvent): ReadonlyArray<MemberChange> =>
  (event["changes"] as ReadonlyArray<Json>).map((change) =>
    change["type"] === "leave"
      ? { type: "leave", id: String(change["vector_id"]) }
      : { ...enteringOf(change), type: change["type"] as "enter" | "update" }
  )

/** A look whether a reader that lags has caught up. */
const pausedMillis = 50

const notStreaming = () =>
  ownError("not_streaming", "Subscriptions need a connection: this client was made with `streaming: false`.")

const answerOf = (body: Json): SearchAnswer => ({
  hits: (body["results"] as ReadonlyArray<Json>).map(hitOf),
  missingPartitions: (body["missing_partitions"] ?? []) as ReadonlyArray<number>
})

const answerOfTopic = ({ event: _, id: __, ...answer }: WireEvent): Json => answer

const storedOf = (body: Json): StoredVector => ({
  id: String(body["vector_id"]),
  vector: Float32Array.from(body["vector"] as Array<number>),
  metadata: (body["metadata"] ?? {}) as Metadata,
  version: String(body["version"])
})

/** As the server has it: answers of the contract are not checked anew in a client of 40 KB. */
const infoOf = (body: Json): CollectionInfo => body as unknown as CollectionInfo

interface Request {
  readonly method: string
  readonly path: string
  readonly body: unknown
  readonly key: string | undefined
}

/** Requests of HTTP: tried again, within the deadline, where the server puts them off or cannot be reached. */
class Http {
  readonly #options: ResolvedOptions
  readonly #wire: Wire
  readonly #closed = new AbortController()

  constructor(options: ResolvedOptions, wire: Wire) {
    this.#options = options
    this.#wire = wire
  }

  /** Ends what is under way. */
  close(): void {
    this.#closed.abort()
  }

  /** `key`: of a write. */
  call(
    method: string,
    path: string,
    body: unknown,
    deadlineMillis: number,
    key?: string
  ): Effect.Effect<Json, VectorDBError> {
    return Effect.callback((resume) => {
      const controller = new AbortController()
      const request = { method, path, body, key }
      this.#attempts(request, Date.now() + deadlineMillis, controller.signal, deadlineMillis).then(
        (answer) => resume(Effect.succeed(answer)),
        (error: unknown) => resume(error instanceof VectorDBError ? Effect.fail(error) : Effect.die(error))
      )
      return Effect.sync(() => controller.abort())
    })
  }

  async #attempts(request: Request, deadlineAt: number, signal: AbortSignal, deadlineMillis: number): Promise<Json> {
    const backoff = new Backoff(this.#options.reconnectBaseMillis, this.#options.reconnectCapMillis)
    for (;;) {
      const left = deadlineAt - Date.now()
      const outcome = left <= 0 ? undefined : await this.#attempt(request, left, signal)
      if (this.#closed.signal.aborted) throw ownError("closed", "The client was closed.")
      if (outcome === undefined) {
        throw ownError("disconnected", `${this.#options.endpoints.join(", ")}: no answer within ${deadlineMillis} ms.`)
      }
      if (!(outcome instanceof VectorDBError)) return outcome
      if (signal.aborted) throw outcome
      const passes = outcome.code === "disconnected" || isTransient(outcome.code)
      const wait = Math.max(backoff.next(), outcome.retryAfterMillis ?? 0)
      if (!passes || Date.now() + wait >= deadlineAt) throw outcome
      await this.#wait(wait, signal)
    }
  }

  /** Ends at once where nobody waits for the call any more. */
  #wait(millis: number, signal: AbortSignal): Promise<void> {
    const ended = AbortSignal.any([signal, this.#closed.signal])
    return new Promise((resolve) => {
      const end = () => {
        clearTimeout(timer)
        ended.removeEventListener("abort", end)
        resolve()
      }
      const timer = setTimeout(end, millis)
      ended.addEventListener("abort", end)
      if (ended.aborted) end()
    })
  }

  async #attempt(
    { method, path, body, key }: Request,
    leftMillis: number,
    signal: AbortSignal
  ): Promise<Json | VectorDBError | undefined> {
    const closed = this.#closed.signal
    if (closed.aborted) return undefined
    const endpoint = await this.#wire.endpoint
    try {
      const token = await this.#options.credential?.()
      const response = await this.#options.fetch(`${endpoint}/api/v1${path}`, {
        method,
        headers: {
          ...(body === undefined ? {} : { "content-type": "application/json" }),
          ...(key === undefined ? {} : { "idempotency-key": key }),
          ...(token === undefined ? {} : { authorization: `Bearer ${token}` })
        },
        ...(body === undefined ? {} : { body: JSON.stringify(body) }),
        // What one has written one reads: not what a cache on the way still has.
        cache: "no-store",
        signal: AbortSignal.any([signal, closed, AbortSignal.timeout(leftMillis)])
      })
      const text = await response.text()
      if (response.ok) return text === "" ? {} : (JSON.parse(text) as Json)
      return errorOfProblem(problemOf(response.status, text))
    } catch (error) {
      if (signal.aborted || closed.aborted || (error as Error).name === "TimeoutError") return undefined
      this.#wire.failed(endpoint)
      return ownError("disconnected", `${endpoint}: ${(error as Error).message}`)
    }
  }
}

/** What is no problem document comes from something between: a proxy, a load balancer. */
const problemOf = (status: number, text: string): ProblemMembers => {
  try {
    const problem = JSON.parse(text) as ProblemMembers
    if (typeof problem.code === "string") return problem
  } catch {}
  const code = status === 502 || status === 503 || status === 504 ? "partition_unavailable" : `http_${status}`
  return { code, status, detail: `HTTP ${status}: ${text.slice(0, 120)}` }
}
