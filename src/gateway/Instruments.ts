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

type Labels = Readonly<Record<string, string>>

/** What makes a series of a metric. One metric with its labels in the context would make a key anew for each other series. */
type Family = (attributes: Labels) => Metric.Metric<number, unknown>

const counter =
  (name: string, description: string): Family =>
  (attributes) =>
    Metric.counter(name, { description, incremental: true, attributes })
const gauge =
  (name: string, description: string): Family =>
  (attributes) =>
    Metric.gauge(name, { description, attributes })
const histogram =
  (name: string, description: string, boundaries: ReadonlyArray<number>): Family =>
  (attributes) =>
    Metric.histogram(name, { description, boundaries, attributes })

const requestMillis = histogram(
  "ruvector_request_duration_ms",
  "Time from a request's arrival to its answer, by wire and route",
  latencyBoundaries
)
const requestsTotal = counter("ruvector_requests", "Requests answered, by wire, route and status")
const connections = gauge("ruvector_connections", "Open connections, by wire")
const connectionsTotal = counter("ruvector_connections_opened", "Connections opened, by wire")
const closes = counter("ruvector_stream_closes", "Streams closed, by wire and close code")
const sentBytes = counter("ruvector_stream_sent_bytes", "Bytes sent on streams, by wire")
const connectionSeconds = histogram(
  "ruvector_connection_duration_s",
  "How long connections that are closed were open, by wire",
  [0.1, 1, 10, 60, 300, 1_800, 3_600, 21_600, 86_400]
)
const connectionFrames = counter("ruvector_connection_frames", "Frames taken from connections that are closed, by wire")
const sessionCloses = counter(
  "ruvector_session_closes",
  "Sessions of WebSockets that were closed while their connection went on, by code"
)
const notModified = counter("ruvector_http_not_modified", "Requests answered with 304, by route")
const refusals = counter(
  "ruvector_port_refusals",
  "Connections, sessions and requests that were refused or cut before a handler saw them, by reason"
)
const denials = counter("ruvector_access_refusals", "Requests refused for their credential, scope or rate, by reason")
const defects = counter("ruvector_defects", "Requests that met a defect of the server")

const cache = new Map<Family, Map<string, Metric.Metric<number, unknown>>>()

/** One series of a metric; the set of label values is small and fixed (routes, wires, statuses). */
const series = (family: Family, labels: Labels): Metric.Metric<number, unknown> => {
  let all = cache.get(family)
  if (all === undefined) {
    all = new Map()
    cache.set(family, all)
  }
  let key = ""
  for (const label in labels) key += `${labels[label]}|`
  let found = all.get(key)
  if (found === undefined) {
    found = family(labels)
    all.set(key, found)
  }
  return found
}

/** A request on some wire was answered. `status` is the HTTP status, or that of the problem sent. */
export const countRequest = (wire: string, route: string, status: number, millis: number): void => {
  const counted = requestsOf(wire, route)
  counted.millis.updateUnsafe(millis, context)
  let total = counted.total.get(status)
  if (total === undefined) {
    total = series(requestsTotal, { wire, route, status: String(status) })
    counted.total.set(status, total)
  }
  total.updateUnsafe(1, context)
}

const requestsOf = (wire: string, route: string): RequestSeries => {
  const found = requests.get(wire)?.get(route)
  if (found !== undefined) return found
  const made = { millis: series(requestMillis, { wire, route }), total: new Map() }
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
  series(connections, { wire }).updateUnsafe(now, context)
  series(connectionsTotal, { wire }).updateUnsafe(1, context)
}

/** `code`: the WebSocket close code, or `end`, `slow`, `gone` for SSE. `bytes` sent over its life. */
export const connectionClosed = (wire: string, code: number | string, bytes: number): void => {
  const now = (open.get(wire) ?? 1) - 1
  open.set(wire, now)
  series(connections, { wire }).updateUnsafe(now, context)
  series(closes, { wire, code: codeLabel(code) }).updateUnsafe(1, context)
  series(sentBytes, { wire }).updateUnsafe(bytes, context)
}

/** What else is known of a connection when it closes. */
export const connectionLived = (wire: string, millis: number, frames: number): void => {
  series(connectionSeconds, { wire }).updateUnsafe(millis / 1_000, context)
  series(connectionFrames, { wire }).updateUnsafe(frames, context)
}

/** One session of a connection was closed by the client (1000) or by us. */
export const sessionClosed = (code: number): void => {
  series(sessionCloses, { code: codeLabel(code) }).updateUnsafe(1, context)
}

/** Codes that are counted by name: ours, and those of a client that went as it should (1001), said none, or is gone. */
const knownCodes: ReadonlySet<number> = new Set([...Object.values(closeCodes), 1001, 1002, 1005, 1006, 1007])

/** A client may choose its code, so others than those are one label. */
const codeLabel = (code: number | string): string =>
  typeof code === "string" || knownCodes.has(code) ? String(code) : "other"

export const countNotModified = (route: string): void => {
  series(notModified, { route }).updateUnsafe(1, context)
}

/** A credential, a scope or a rate was not good enough. */
export const countDenial = (reason: string): void => {
  series(denials, { reason }).updateUnsafe(1, context)
}

/** `reason`: the setting whose bound was reached, or one of a few words of the port's. */
export const countRefusal = (reason: string): void => {
  series(refusals, { reason }).updateUnsafe(1, context)
}

export const countDefect = (): void => {
  series(defects, {}).updateUnsafe(1, context)
}
