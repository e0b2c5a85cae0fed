/**
 * What the wires count. Metrics of Effect, so that `/metrics` and OTLP export the same; updated without running an effect,
 * since this is the hot path.
 */
import { Context, Metric } from "effect"
import { closeCodes } from "../protocol/Frames.ts"

const context = Context.empty()

/** Milliseconds, from a quarter of one to ten seconds. */
const latencyBoundaries = [
  0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 50, 75, 100, 150, 250, 500, 1_000, 2_500, 5_000, 10_000
]

const requestMillis = Metric.histogram("ruvector_request_duration_ms", {
  description: "Time from a request's arrival to its answer, by wire and route",
  boundaries: latencyBoundaries
})
const requestsTotal = Metric.counter("ruvector_requests", {
  description: "Requests answered, by wire, route and status",
  incremental: true
})
const connections = Metric.gauge("ruvector_connections", { description: "Open connections, by wire" })
const connectionsTotal = Metric.counter("ruvector_connections_opened", {
  description: "Connections opened, by wire",
  incremental: true
})
const closes = Metric.counter("ruvector_stream_closes", {
  description: "Streams closed, by wire and close code",
  incremental: true
})
const sentBytes = Metric.counter("ruvector_stream_sent_bytes", {
  description: "Bytes sent on streams, by wire",
  incremental: true
})
const connectionSeconds = Metric.histogram("ruvector_connection_duration_s", {
  description: "How long connections that are closed were open, by wire",
  boundaries: [0.1, 1, 10, 60, 300, 1_800, 3_600, 21_600, 86_400]
})
const connectionFrames = Metric.counter("ruvector_connection_frames", {
  description: "Frames taken from connections that are closed, by wire",
  incremental: true
})
const sessionCloses = Metric.counter("ruvector_session_closes", {
  description: "Sessions of WebSockets that were closed while their connection went on, by code",
  incremental: true
})
const notModified = Metric.counter("ruvector_http_not_modified", {
  description: "Requests answered with 304, by route",
  incremental: true
})
const refusals = Metric.counter("ruvector_port_refusals", {
  description: "Connections, sessions and requests that were refused or cut before a handler saw them, by reason",
  incremental: true
})
const denials = Metric.counter("ruvector_access_refusals", {
  description: "Requests refused for their credential, scope or rate, by reason",
  incremental: true
})
const defects = Metric.counter("ruvector_defects", {
  description: "Requests that met a defect of the server",
  incremental: true
})

const cache = new Map<string, Metric.Metric<number, unknown>>()

/** One series of a metric; the set of label values is small and fixed (routes, wires, statuses). */
const series = <S>(
  metric: Metric.Metric<number, S>,
  name: string,
  labels: Record<string, string>
): Metric.Metric<number, unknown> => {
  const key = `${name}|${Object.values(labels).join("|")}`
  const found = cache.get(key)
  if (found !== undefined) return found
  const made = Metric.withAttributes(metric, labels)
  cache.set(key, made)
  return made
}

/** A request on some wire was answered. `status` is the HTTP status, or that of the problem sent. */
export const countRequest = (wire: string, route: string, status: number, millis: number): void => {
  const counted = requestsOf(wire, route)
  counted.millis.updateUnsafe(millis, context)
  let total = counted.total.get(status)
  if (total === undefined) {
    total = series(requestsTotal, "requestsTotal", { wire, route, status: String(status) })
    counted.total.set(status, total)
  }
  total.updateUnsafe(1, context)
}

const requestsOf = (wire: string, route: string): RequestSeries => {
  const found = requests.get(wire)?.get(route)
  if (found !== undefined) return found
  const made = { millis: series(requestMillis, "requestMillis", { wire, route }), total: new Map() }
  const routes = requests.get(wire) ?? new Map<string, RequestSeries>()
  requests.set(wire, routes.set(route, made))
  return made
}

/** By wire and route: found without making a key for each request. */
const requests = new Map<string, Map<string, RequestSeries>>()

interface RequestSeries {
  readonly millis: Metric.Metric<number, unknown>
  /** By status. */
  readonly total: Map<number, Metric.Metric<number, unknown>>
}

const open = new Map<string, number>()

export const connectionOpened = (wire: string): void => {
  const now = (open.get(wire) ?? 0) + 1
  open.set(wire, now)
  series(connections, "connections", { wire }).updateUnsafe(now, context)
  series(connectionsTotal, "connectionsTotal", { wire }).updateUnsafe(1, context)
}

/** `code`: the WebSocket close code, or `end`, `slow`, `gone` for SSE. `bytes` sent over its life. */
export const connectionClosed = (wire: string, code: number | string, bytes: number): void => {
  const now = (open.get(wire) ?? 1) - 1
  open.set(wire, now)
  series(connections, "connections", { wire }).updateUnsafe(now, context)
  series(closes, "closes", { wire, code: codeLabel(code) }).updateUnsafe(1, context)
  series(sentBytes, "sentBytes", { wire }).updateUnsafe(bytes, context)
}

/** What else is known of a connection when it closes. */
export const connectionLived = (wire: string, millis: number, frames: number): void => {
  series(connectionSeconds, "connectionSeconds", { wire }).updateUnsafe(millis / 1_000, context)
  series(connectionFrames, "connectionFrames", { wire }).updateUnsafe(frames, context)
}

/** One session of a connection was closed by the client (1000) or by us. */
export const sessionClosed = (code: number): void => {
  series(sessionCloses, "sessionCloses", { code: codeLabel(code) }).updateUnsafe(1, context)
}

/** Codes that are counted by name: ours, and those of a client that went as it should (1001), said none, or is gone. */
const knownCodes: ReadonlySet<number> = new Set([...Object.values(closeCodes), 1001, 1002, 1005, 1006, 1007])

/** A client may choose its code, so others than those are one label. */
const codeLabel = (code: number | string): string =>
  typeof code === "string" || knownCodes.has(code) ? String(code) : "other"

export const countNotModified = (route: string): void => {
  series(notModified, "notModified", { route }).updateUnsafe(1, context)
}

/** A credential, a scope or a rate was not good enough. */
export const countDenial = (reason: string): void => {
  series(denials, "denials", { reason }).updateUnsafe(1, context)
}

/** `reason`: the setting whose bound was reached, or one of a few words of the port's. */
export const countRefusal = (reason: string): void => {
  series(refusals, "refusals", { reason }).updateUnsafe(1, context)
}

export const countDefect = (): void => {
  series(defects, "defects", {}).updateUnsafe(1, context)
}
