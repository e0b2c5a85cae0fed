/**
 * The version that every record carries: which of two writes of one id is the later one, wherever they were made.
 *
 * `time` is a hybrid logical clock in nanoseconds since 1970 (Kulkarni et al., "Logical Physical Clocks", 2014, with the
 * logical part folded into the nanoseconds the wall clock does not resolve): never behind the wall clock when stamped,
 * always ahead of every version the same partition has seen. `region` is where the write was accepted; `counter` counts
 * that region's writes to the partition, so that concurrent writes can be told from ordered ones.
 */
import { Schema } from "effect"

export interface Version {
  /** Nanoseconds since 1970, unsigned 64 bit. */
  readonly time: bigint
  /** 1-32 characters of `a-z0-9-`. */
  readonly region: string
  /** The region's writes to this partition before and with this one; a safe integer. */
  readonly counter: number
}

/** Total order: time, then region (lexicographic), then counter. Negative when `a` is the earlier one. */
export const compareVersions = (a: Version, b: Version): number => {
  if (a.time !== b.time) return a.time < b.time ? -1 : 1
  if (a.region !== b.region) return a.region < b.region ? -1 : 1
  return a.counter - b.counter
}

/** As clients see it: fixed-width hex time, counter in base 36, region. Opaque to them but for equality. */
export const formatVersion = (version: Version): string =>
  `${version.time.toString(16).padStart(16, "0")}-${version.counter.toString(36)}-${version.region}`

export const regionPattern = /^[a-z0-9-]{1,32}$/

const versionPattern = /^([0-9a-f]{16})-([0-9a-z]{1,11})-([a-z0-9-]{1,32})$/

/** The inverse of {@link formatVersion}; `undefined` where the text is no version. */
export const parseVersion = (text: string): Version | undefined => {
  const match = versionPattern.exec(text)
  if (match === null) return undefined
  return { time: BigInt(`0x${match[1]}`), counter: Number.parseInt(match[2] as string, 36), region: match[3] as string }
}

/** A version's text form. */
export const VersionText = Schema.String.check(Schema.isPattern(versionPattern))

/** Stamps the versions of one partition: strictly increasing, whatever the wall clock does. */
export class VersionClock {
  readonly region: string
  #time: bigint
  #counter: number

  /** `time` and `counter` are the greatest the partition has recorded (zero for a new one). */
  constructor(region: string, time: bigint, counter: number) {
    this.region = region
    this.#time = time
    this.#counter = counter
  }

  /** `wallMillis` is the wall clock, milliseconds since 1970; a clock that went back is waited out logically. */
  next(wallMillis: number): Version {
    const wall = BigInt(Math.trunc(wallMillis)) * 1_000_000n
    this.#time = wall > this.#time ? wall : this.#time + 1n
    this.#counter += 1
    return { time: this.#time, region: this.region, counter: this.#counter }
  }

  /** Takes note of a version seen elsewhere, so that the next one stamped here is greater. */
  observe(version: Version): void {
    if (version.time > this.#time) this.#time = version.time
    if (version.region === this.region && version.counter > this.#counter) this.#counter = version.counter
  }
}
