/**
 * Bodies of requests that are compressed: taken apart once they are whole, a few at a time, and given up as soon as what
 * they become is over its bound or out of proportion to what came.
 */
import type { Transform } from "node:stream"
import * as Zlib from "node:zlib"
import { Result } from "effect"
import { InvalidInput, TooLarge } from "../protocol/Errors.ts"

const decoders = {
  gzip: () => Zlib.createGunzip({ chunkSize }),
  br: () => Zlib.createBrotliDecompress({ chunkSize }),
  // RFC 9659: no more than 8 MiB of window has to be kept for a content coding.
  zstd: () => Zlib.createZstdDecompress({ chunkSize, params: { [Zlib.constants.ZSTD_d_windowLogMax]: 23 } })
} satisfies Record<string, () => Transform>

export type Encoding = keyof typeof decoders

export const encodings = Object.keys(decoders) as ReadonlyArray<Encoding>

/** `undefined`: not encoded. `null`: in a way that is not read here, or in several. */
export const encodingOf = (header: string | undefined): Encoding | undefined | null => {
  if (header === undefined) return undefined
  const encoding = header.trim().toLowerCase()
  if (encoding === "identity" || encoding === "") return undefined
  if (encoding === "x-gzip") return "gzip"
  return Object.hasOwn(decoders, encoding) ? (encoding as Encoding) : null
}

export interface DecompressionBounds {
  readonly bytesMax: number
  /** Bytes that one byte may become, once they are more than {@link bytesFree}. */
  readonly ratioMax: number
}

export const decompress = (
  compressed: Buffer,
  encoding: Encoding,
  bounds: DecompressionBounds,
  done: (body: Result.Result<Buffer, TooLarge | InvalidInput>) => void
): void => {
  const begin = () => {
    running += 1
    const limitBytes = Math.min(bounds.bytesMax, Math.max(bytesFree, bounds.ratioMax * compressed.length))
    const decoder = decoders[encoding]()
    const chunks: Array<Buffer> = []
    let bytes = 0
    let ended = false
    const end = (body: Result.Result<Buffer, TooLarge | InvalidInput>) => {
      if (ended) return
      ended = true
      running -= 1
      decoder.destroy()
      // What is whole is a chunk itself or a copy of them all.
      if (Result.isFailure(body) || chunks.length > 1) giveBack(chunks)
      waiting.shift()?.()
      done(body)
    }
    decoder.on("data", (chunk: Buffer) => {
      if (ended) return
      bytes += chunk.length
      chunks.push(chunk)
      if (bytes > limitBytes) end(Result.fail(new TooLarge({ what: "decompressed body", limitBytes })))
    })
    decoder.on("end", () => end(Result.succeed(chunks.length === 1 ? (chunks[0] as Buffer) : Buffer.concat(chunks))))
    decoder.on("error", (error: NodeJS.ErrnoException) => {
      const got = error.code ?? error.message.slice(0, 80)
      end(Result.fail(new InvalidInput({ field: "", expected: `a whole body of ${encoding}`, got })))
    })
    decoder.end(compressed)
  }
  // Each waits with its body in memory, as those do that are not compressed; there are at most as many as requests.
  if (running < runningMax) begin()
  else waiting.push(begin)
}

/**
 * Gives the memory of chunks back at once. V8 counts it against its heap until it collects, and a few bombs a second would
 * have it collect all the time. Only of chunks that fill what was allocated for them: the decoder goes on in others.
 */
const giveBack = (chunks: ReadonlyArray<Buffer>): void => {
  for (const { buffer, length } of chunks) {
    if (length === chunkSize && buffer.byteLength === chunkSize) (buffer as ArrayBuffer).transfer(0)
  }
}

const chunkSize = 65_536

/** Bytes a body may become whatever it was: small ones are often out of proportion, and do no harm. */
const bytesFree = 1_048_576

/** As many as Node has threads for it. */
const runningMax = 4
let running = 0
const waiting: Array<() => void> = []
