/**
 * What a client and the server said to each other, as it was recorded: bytes that the client sent, and the events that they
 * were answered with. Played against a server of now, a recording shows whether an old client is still understood, and
 * still understands: what is answered has at least the members that it had, in the same shapes.
 */
import * as net from "node:net"
import { Effect, Schema } from "effect"
import { Rpc, type RpcMessage, RpcSchema, RpcSerialization } from "effect/rpc"
import { WebSocket } from "ws"
import { RuvectorRpcs } from "../../src/protocol/Rpcs.ts"

/**
 * `http`: whole requests, whose bodies are answered as JSON, lines of JSON or Server-Sent Events. `ws`: frames, answered by
 * JSON. `rpc-ndjson`, `rpc-binary`: RPC messages in frames.
 */
export type Wire = "http" | "ws" | "rpc-ndjson" | "rpc-binary"

export type Step =
  /** A frame, or bytes of a request. `{{cursor}}` stands for the newest cursor that came. */
  | { readonly send: string; readonly isBinary?: boolean }
  /** Another client's write, in the contract's REST form. */
  | { readonly write: string; readonly body: unknown }
  /** What is to come before the next step. */
  | { readonly answers: ReadonlyArray<unknown>; readonly raw?: ReadonlyArray<string> }

export interface Exchange {
  readonly name: string
  readonly wire: Wire
  /** Of the WebSocket. */
  readonly path: string
  readonly steps: ReadonlyArray<Step>
}

/** What is asked for while recording: `answers` says how many are waited for. */
export type ScriptStep =
  | { readonly send: string | Buffer }
  | { readonly write: string; readonly body: unknown }
  | { readonly answers: number }

const waitMillis = 10_000

/** Plays the steps; answers what came, by the step that waits for it. */
export const play = async (
  base: string,
  { wire, path }: Pick<Exchange, "wire" | "path">,
  steps: ReadonlyArray<ScriptStep>
): Promise<ReadonlyArray<{ readonly answers: ReadonlyArray<unknown>; readonly raw: ReadonlyArray<string> }>> => {
  const connection = wire === "http" ? overHttp(base) : await overWebSocket(base, path, wire)
  const came: Array<{ readonly answers: Array<unknown>; readonly raw: Array<string> }> = []
  let cursor = ""
  try {
    for (const step of steps) {
      if ("send" in step) {
        connection.send(typeof step.send === "string" ? step.send.replaceAll("{{cursor}}", cursor) : step.send)
      } else if ("write" in step) {
        const [method = "", at = ""] = step.write.split(" ")
        const headers = { "content-type": "application/json" }
        const response = await fetch(`${base}${at}`, { method, headers, body: JSON.stringify(step.body) })
        if (!response.ok) throw new Error(`${step.write}: ${response.status} ${await response.text()}`)
      } else {
        const answers: Array<unknown> = []
        const raw: Array<string> = []
        while (answers.length < step.answers) {
          const next = await connection.next()
          answers.push(...next.answers)
          raw.push(next.raw)
          cursor = cursorIn(next.answers) ?? cursor
        }
        came.push({ answers, raw })
      }
    }
  } finally {
    connection.close()
  }
  return came
}

/** The script of a recording. */
export const scriptOf = ({ steps }: Exchange): ReadonlyArray<ScriptStep> =>
  steps.map((step) => {
    if ("answers" in step) return { answers: step.answers.length }
    if ("write" in step) return step
    return { send: step.isBinary === true ? Buffer.from(step.send, "base64") : step.send }
  })

/** The last cursor in what came, at whatever depth. */
const cursorIn = (value: unknown): string | undefined => {
  if (typeof value !== "object" || value === null) return undefined
  let found: string | undefined
  for (const [key, inner] of Object.entries(value)) {
    if ((key === "cursor" || key === "id:") && typeof inner === "string") found = inner
    else found = cursorIn(inner) ?? found
  }
  return found
}

interface Connection {
  readonly send: (data: string | Buffer) => void
  readonly next: () => Promise<{ readonly answers: ReadonlyArray<unknown>; readonly raw: string }>
  readonly close: () => void
}

const queue = <A>() => {
  const items: Array<A> = []
  let wake = () => {}
  return {
    push: (item: A) => {
      items.push(item)
      wake()
    },
    next: async (): Promise<A> => {
      const until = Date.now() + waitMillis
      while (items.length === 0) {
        if (Date.now() > until) throw new Error("nothing came")
        await new Promise<void>((resolve) => {
          wake = resolve
          setTimeout(resolve, 200)
        })
      }
      return items.shift() as A
    }
  }
}

const overWebSocket = async (base: string, path: string, wire: Wire): Promise<Connection> => {
  const socket = new WebSocket(`${base.replace("http", "ws")}${path}`, { perMessageDeflate: false })
  const came = queue<{ readonly answers: ReadonlyArray<unknown>; readonly raw: string }>()
  const binary = wire === "rpc-binary" ? binaryDecoder() : undefined
  socket.on("error", () => {})
  socket.on("message", (data: Buffer) => {
    const answers =
      binary === undefined
        ? data
            .toString()
            .split("\n")
            .filter((line) => line.trim() !== "")
            .map((line) => JSON.parse(line) as unknown)
        : binary.decode(data)
    came.push({ answers, raw: data.toString("base64") })
  })
  await new Promise((resolve, reject) => socket.once("open", resolve).once("error", reject))
  return {
    send: (data) => {
      if (Buffer.isBuffer(data)) binary?.sent(data)
      socket.send(data)
    },
    next: came.next,
    close: () => socket.terminate()
  }
}

/** Decodes messages of SchemaBinary with the schemas of now: a request's are those of the call it named. */
export const binaryDecoder = () => {
  const { codecFor, makeUnsafe } = binarySerialization
  const fromServer = makeUnsafe()
  const fromClient = makeUnsafe()
  const calls = new Map<string, Rpc.AnyWithProps>()
  const plain = (value: unknown): unknown => JSON.parse(JSON.stringify(value, bytesAsText)) as unknown
  return {
    sent: (data: Buffer): void => {
      for (const message of fromClient.decode(new Uint8Array(data)) as ReadonlyArray<RpcMessage.FromClientEncoded>) {
        if (message._tag === "Request") calls.set(String(message.id), rpcOf(message.tag))
      }
    },
    decode: (data: Buffer): ReadonlyArray<unknown> => {
      const messages = fromServer.decode(new Uint8Array(data)) as ReadonlyArray<RpcMessage.FromServerEncoded>
      return messages.map((message) => {
        if (message._tag === "Chunk") {
          const rpc = calls.get(String(message.requestId)) as Rpc.AnyWithProps
          if (!RpcSchema.isStreamSchema(rpc.successSchema)) throw new Error(`${rpc._tag} is no stream`)
          const values = Schema.NonEmptyArray(rpc.successSchema.success)
          const decode = Schema.decodeUnknownSync(codecFor(values) as unknown as Schema.Codec<unknown>)
          return plain({ ...message, values: decode(message.values) })
        }
        if (message._tag === "Exit") {
          const rpc = calls.get(String(message.requestId)) as Rpc.AnyWithProps
          const decode = Schema.decodeUnknownSync(codecFor(Rpc.exitSchema(rpc)) as Schema.Codec<unknown>)
          return plain({ ...message, exit: decode(message.exit) })
        }
        return plain(message)
      })
    }
  }
}

const rpcOf = (tag: string): Rpc.AnyWithProps => RuvectorRpcs.requests.get(tag) as unknown as Rpc.AnyWithProps

const bytesAsText = (_: string, value: unknown): unknown => {
  if (value instanceof Float32Array) return { float32: Array.from(value) }
  return typeof value === "bigint" ? String(value) : value
}

/** A request as a client of SchemaBinary sends it. */
export const binaryRequest = (id: string, tag: string, payload: unknown): Buffer => {
  const { codecFor, makeUnsafe } = binarySerialization
  const encode = Schema.encodeSync(codecFor(rpcOf(tag).payloadSchema) as unknown as Schema.Codec<unknown>)
  const message = { _tag: "Request", id, tag, payload: encode(payload), headers: [] }
  return Buffer.from(makeUnsafe().encode(message as never) as Uint8Array)
}

/** Any other message of such a client. */
export const binaryMessage = (message: object): Buffer =>
  Buffer.from(binarySerialization.makeUnsafe().encode(message as never) as Uint8Array)

const binarySerialization = Effect.runSync(
  Effect.provide(RpcSerialization.RpcSerialization, RpcSerialization.layerSchemaBinary())
)

/** One request after the other, each on a connection of its own. */
const overHttp = (base: string): Connection => {
  const { hostname, port } = new URL(base)
  const came = queue<{ readonly answers: ReadonlyArray<unknown>; readonly raw: string }>()
  let socket: net.Socket | undefined
  const send = (data: string | Buffer) => {
    socket?.destroy()
    const own = net.connect(Number(port), hostname)
    socket = own
    let head: string | undefined
    let chunked = false
    let bytes = Buffer.alloc(0)
    let text = ""
    own.on("error", () => {})
    own.on("data", (chunk: Buffer) => {
      bytes = Buffer.concat([bytes, chunk])
      if (head === undefined) {
        const end = bytes.indexOf("\r\n\r\n")
        if (end === -1) return
        head = bytes.subarray(0, end).toString("latin1")
        bytes = bytes.subarray(end + 4)
        chunked = /transfer-encoding: chunked/i.test(head)
        const contentType = /content-type: ([^\r;]*)/i.exec(head)?.[1] ?? ""
        came.push({ answers: [{ status: Number(head.slice(9, 12)), "content-type": contentType }], raw: "" })
      }
      if (chunked) {
        for (;;) {
          const end = bytes.indexOf("\r\n")
          const size = end === -1 ? Number.NaN : Number.parseInt(bytes.subarray(0, end).toString("latin1"), 16)
          if (!(bytes.length >= end + 2 + size + 2)) break
          text += bytes.subarray(end + 2, end + 2 + size).toString()
          bytes = bytes.subarray(end + 2 + size + 2)
        }
      } else {
        text += bytes.toString()
        bytes = Buffer.alloc(0)
      }
      if (/content-type: text\/event-stream/i.test(head)) {
        for (let end = text.indexOf("\n\n"); end !== -1; end = text.indexOf("\n\n")) {
          came.push({ answers: [sseEvent(text.slice(0, end))], raw: "" })
          text = text.slice(end + 2)
        }
      } else if (text.length > 0 && text.length >= Number(/content-length: (\d+)/i.exec(head)?.[1] ?? 1)) {
        came.push({ answers: [JSON.parse(text) as unknown], raw: "" })
        text = ""
      }
    })
    own.write(data)
  }
  return { send, next: came.next, close: () => socket?.destroy() }
}

/** A block's fields, its data as what it says. */
const sseEvent = (block: string): object => {
  const event: Record<string, unknown> = {}
  for (const line of block.split("\n")) {
    const at = line.indexOf(": ")
    const field = line.slice(0, at + 1)
    event[field] = field === "data:" ? (JSON.parse(line.slice(at + 2)) as unknown) : line.slice(at + 2)
  }
  return event
}

/** Texts that say what something is, and so have to be the same. */
const names = new Set(["event", "type", "kind", "code", "_tag", "vector_id", "field", "content-type", "tag"])

/** Where what is answered now lacks what was answered then; empty where it does not. */
export const lacking = (then: unknown, now: unknown, path = ""): string => {
  if (typeof then !== "object" || then === null) {
    if (typeof then !== typeof now || (then === null) !== (now === null)) {
      return `${path}: ${JSON.stringify(now)}, where it was ${JSON.stringify(then)}`
    }
    const key = path.slice(path.lastIndexOf(".") + 1)
    return names.has(key) && then !== now ? `${path}: ${JSON.stringify(now)}, where it was ${JSON.stringify(then)}` : ""
  }
  if (typeof now !== "object" || now === null || Array.isArray(then) !== Array.isArray(now)) {
    return `${path}: ${JSON.stringify(now)}, where it was ${JSON.stringify(then)}`
  }
  for (const [key, value] of Object.entries(then)) {
    const fault = lacking(value, (now as Record<string, unknown>)[key], `${path}.${key}`)
    if (fault !== "") return fault
  }
  return ""
}
