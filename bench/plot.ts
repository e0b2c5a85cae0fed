/** Latency against rate as a small SVG: a line for each server and percentile, a point for each number in flight. */
import type { ServerName } from "./servers.ts"

export interface Curve {
  readonly server: ServerName
  readonly metric: "p50" | "p99"
  readonly points: ReadonlyArray<{ readonly lanes: number; readonly rate: number; readonly millis: number }>
}

export const latencyPlot = (curves: ReadonlyArray<Curve>, title: string): string => {
  const points = curves.flatMap((curve) => curve.points)
  const rateStep = niceStep(Math.max(...points.map((point) => point.rate)) / 6)
  const rateMax = rateStep * Math.ceil((Math.max(...points.map((point) => point.rate)) * 1.02) / rateStep)
  const millis = points.map((point) => point.millis)
  const low = largestTick(Math.min(...millis))
  const high = [...ticks].find((tick) => tick >= Math.max(...millis) * 1.2) ?? Math.max(...millis)

  const x = (rate: number): number => left + (rate / rateMax) * (right - left)
  const y = (value: number): number => bottom - (Math.log(value / low) / Math.log(high / low)) * (bottom - top)

  const rates = Array.from({ length: Math.round(rateMax / rateStep) + 1 }, (_, i) => i * rateStep)
  const grid = [
    ...rates.map(
      (rate) =>
        `<line x1="${n(x(rate))}" x2="${n(x(rate))}" y1="${top}" y2="${bottom}" stroke="#e5e7eb"/>` +
        label(x(rate), bottom + 20, rate.toLocaleString("en-US"), "middle")
    ),
    ...ticks
      .filter((tick) => tick >= low && tick <= high)
      .map(
        (tick) =>
          `<line x1="${left}" x2="${right}" y1="${n(y(tick))}" y2="${n(y(tick))}" stroke="#e5e7eb"/>` +
          label(left - 10, y(tick) + 4, String(tick), "end")
      )
  ]
  const lines = curves.map(({ server, metric, points }) => {
    const { color, shape } = look(server, metric)
    const path = points.map(({ rate, millis }) => `${n(x(rate))},${n(y(millis))}`).join(" ")
    const dots = points.map(
      ({ rate, millis, lanes }) =>
        `<circle cx="${n(x(rate))}" cy="${n(y(millis))}" r="3.5" fill="${color}"/>` +
        // The numbers in flight once for each server: beside its upper line.
        (metric === "p99" ? label(x(rate) - 6, y(millis) - 8, String(lanes), "end", color) : "")
    )
    return `<polyline points="${path}" fill="none" stroke="${color}" stroke-width="2"${shape}/>${dots.join("")}`
  })
  const legend = curves.map(({ server, metric }, i) => {
    const { color, shape } = look(server, metric)
    const at = top + 18 + i * 20
    return (
      `<line x1="${left + 16}" x2="${left + 50}" y1="${at}" y2="${at}" stroke="${color}" stroke-width="2"${shape}/>` +
      label(left + 58, at + 4, `${server} ${metric}`, "start")
    )
  })
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${height}" width="${width}" height="${height}" font-family="system-ui, sans-serif" font-size="13">`,
    `<title>Latency against rate: ${title}</title>`,
    `<rect width="${width}" height="${height}" fill="#ffffff"/>`,
    `<text x="${left}" y="28" font-size="16" font-weight="600" fill="#111827">${title}</text>`,
    label(left, 48, "Each point: the number of searches in flight. Further right and lower is better.", "start"),
    ...grid,
    ...lines,
    `<rect x="${left + 8}" y="${top + 4}" width="130" height="${curves.length * 20 + 8}" fill="#ffffff" opacity="0.85"/>`,
    ...legend,
    label((left + right) / 2, height - 12, "searches per second", "middle"),
    `<text transform="translate(20 ${(top + bottom) / 2}) rotate(-90)" text-anchor="middle" fill="#374151">latency, ms (log scale)</text>`,
    "</svg>",
    ""
  ].join("\n")
}

const width = 760
const height = 460
const left = 72
const right = 730
const top = 64
const bottom = 396

/** 1, 2, 5 in every decade of milliseconds that a search may take. */
const ticks: ReadonlyArray<number> = [-2, -1, 0, 1, 2, 3, 4].flatMap((power) =>
  [1, 2, 5].map((digit) => Number((digit * 10 ** power).toPrecision(1)))
)

const largestTick = (below: number): number => ticks.findLast((tick) => tick <= below) ?? below

const niceStep = (about: number): number => {
  const power = 10 ** Math.floor(Math.log10(about))
  return ([1, 2, 5, 10].find((digit) => digit * power >= about) ?? 10) * power
}

const colors: Record<ServerName, string> = { ours: "#2563eb", bare: "#d97706", "bare-simd": "#6b7280" }

const look = (server: ServerName, metric: Curve["metric"]): { readonly color: string; readonly shape: string } => ({
  color: colors[server],
  shape: metric === "p99" ? ' stroke-dasharray="6 4"' : ""
})

const label = (x: number, y: number, text: string, anchor: "start" | "middle" | "end", color = "#374151"): string =>
  `<text x="${n(x)}" y="${n(y)}" text-anchor="${anchor}" fill="${color}" ${halo}>${text}</text>`

/** A white edge keeps a label readable across a line. */
const halo = 'stroke="#ffffff" stroke-width="4" stroke-linejoin="round" paint-order="stroke"'

const n = (value: number): string => value.toFixed(1)
