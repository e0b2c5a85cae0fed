/**
 * The public keys of a token issuer (a JWKS), from a URL or a file. Read before the first token needs it, again when it is
 * older than `maxAgeMillis` (in the background: the keys at hand go on meanwhile, and for as long as the issuer is down), and
 * at once for a token whose key is not in it, so that an issuer can change keys. Two readings are `cooldownMillis` apart at
 * least, whatever tokens come.
 *
 * Not `createRemoteJWKSet` of jose: it lets no token pass once the set is old and the issuer is down, and asks an issuer that is
 * down once for every token.
 */
import { readFile } from "node:fs/promises"
import { createLocalJWKSet, errors, type FlattenedJWSInput, type JSONWebKeySet, type JWSHeaderParameters } from "jose"

export interface KeySetOptions {
  /** `http(s)://...`, or the path of a file. */
  readonly source: string
  readonly maxAgeMillis: number
  readonly cooldownMillis: number
  readonly timeoutMillis: number
  /** The keys are others than before. */
  readonly onChange: () => void
  /** It could not be read; `detail` is for a log. */
  readonly onFailure: (detail: string) => void
}

/** There is no key set yet, or none with the key asked for, and none could be had. */
export class KeySetUnavailable extends Error {}

/** Bytes of a key set. */
const keySetBytesMax = 1_048_576

export class KeySet {
  readonly #options: KeySetOptions
  #keys: ReturnType<typeof createLocalJWKSet> | undefined
  #text = ""
  #readAt = Number.NEGATIVE_INFINITY
  #triedAt = Number.NEGATIVE_INFINITY
  #failed = false
  #reading: Promise<void> | undefined

  constructor(options: KeySetOptions) {
    this.#options = options
  }

  /** The key of a token, for jose. Fails with {@link KeySetUnavailable}, or as jose does where there is no such key. */
  readonly keyOf = async (header: JWSHeaderParameters, token: FlattenedJWSInput) => {
    const now = performance.now()
    if (this.#keys === undefined) await this.read()
    else if (now - this.#readAt >= this.#options.maxAgeMillis) void this.read()
    if (this.#keys === undefined) throw new KeySetUnavailable("there is no key set")
    try {
      return await this.#keys(header, token)
    } catch (error) {
      if (!(error instanceof errors.JWKSNoMatchingKey)) throw error
      const before = this.#keys
      await this.read()
      if (this.#keys !== before) return await this.#keys(header, token)
      // The issuer may have changed its keys while it cannot be asked: then nobody knows.
      if (this.#failed) throw new KeySetUnavailable("the key set cannot be read")
      throw error
    }
  }

  /** Reads it, unless it was tried just now; never fails. */
  read(): Promise<void> {
    if (this.#reading !== undefined) return this.#reading
    const now = performance.now()
    if (now - this.#triedAt < this.#options.cooldownMillis) return Promise.resolve()
    this.#triedAt = now
    this.#reading = this.#fetch().then(
      (text) => this.#learn(text, now),
      (error: unknown) => this.#fail(error)
    )
    return this.#reading
  }

  #learn(text: string, at: number): void {
    this.#reading = undefined
    try {
      if (text !== this.#text) {
        this.#keys = createLocalJWKSet(JSON.parse(text) as JSONWebKeySet)
        this.#text = text
        this.#options.onChange()
      }
      this.#readAt = at
      this.#failed = false
    } catch (error) {
      this.#fail(error)
    }
  }

  #fail(error: unknown): void {
    this.#reading = undefined
    this.#failed = true
    this.#options.onFailure(detailOf(error))
  }

  async #fetch(): Promise<string> {
    const { source, timeoutMillis } = this.#options
    if (!isUrl(source)) return await readFile(source, "utf8")
    const response = await fetch(source, {
      headers: { accept: "application/json" },
      redirect: "error",
      signal: AbortSignal.timeout(timeoutMillis)
    })
    if (response.status !== 200) {
      void response.body?.cancel()
      throw new Error(`status ${response.status}`)
    }
    const parts: Array<Uint8Array> = []
    let bytes = 0
    for await (const part of response.body ?? []) {
      bytes += part.byteLength
      if (bytes > keySetBytesMax) throw new Error(`more than ${keySetBytesMax} bytes`)
      parts.push(part)
    }
    return Buffer.concat(parts).toString("utf8")
  }
}

export const isUrl = (source: string): boolean => /^https?:\/\//.test(source)

const detailOf = (error: unknown): string => {
  if (!(error instanceof Error)) return String(error)
  const cause = error.cause instanceof Error ? `: ${error.cause.message}` : ""
  return `${error.message}${cause}`.slice(0, 300)
}
