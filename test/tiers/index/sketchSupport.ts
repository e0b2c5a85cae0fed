/** What the tests of sketches share: clustered vectors, partitions of them, and snapshots. */
import { BlockCache } from "../../../src/tiers/index/BlockCache.ts"
import { Resident, type ResidentOptions } from "../../../src/tiers/index/Resident.ts"
import type { LogOp } from "../../../src/tiers/LogSegment.ts"
import type { IndexSpec } from "../../../src/tiers/VectorIndex.ts"
import type { Random } from "../../support/Seeded.ts"
import { finished, segmentOf } from "./indexSupport.ts"

/** A source of vectors around some centres, which lie in a subspace as those of real embeddings do. */
export const clustered = (source: Random, dimensions: number, centres = 30, offset = 0) => {
  const gaussian = () => Math.sqrt(-2 * Math.log(1 - source.next())) * Math.cos(2 * Math.PI * source.next())
  const middles = Array.from({ length: centres }, () => Array.from({ length: dimensions }, gaussian))
  return (): Float32Array => {
    const middle = source.pick(middles)
    return Float32Array.from(middle, (component) => offset + component + 0.6 * gaussian())
  }
}

export const residentOf = (spec: IndexSpec, options: Partial<ResidentOptions> = {}): Resident =>
  new Resident(spec, { cache: new BlockCache(1 << 20), sketchFrom: 1, ...options })

export const applied = (resident: Resident, ops: ReadonlyArray<LogOp>): Promise<Uint8Array> =>
  finished(resident.apply(segmentOf(resident.spec.dimensions, ops)))

/** Does all that it does of its own accord. */
export const settle = (resident: Resident): void => {
  while (resident.hasBackgroundWork) resident.backgroundStep()
}
