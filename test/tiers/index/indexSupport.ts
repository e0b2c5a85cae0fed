/** What the tests of the vector threads' insides share: segments, runs to the end, brute force. */
import type { Metric } from "../../../src/protocol/Fields.ts"
import type { Version } from "../../../src/protocol/Version.ts"
import { Partition } from "../../../src/tiers/index/Partition.ts"
import type { Work } from "../../../src/tiers/index/Work.ts"
import { encodeSegment, type LogOp } from "../../../src/tiers/LogSegment.ts"

export const segmentOf = (dimensions: number, ops: ReadonlyArray<LogOp>): Uint8Array =>
  encodeSegment({ epoch: 1, seq: 1, nonce: 1n, dimensions }, ops)

/** Does work that waits for nothing. */
export const done = <A>(work: Work<A>): A => {
  for (;;) {
    const step = work.next()
    if (step.done === true) return step.value
    if (step.value !== undefined) throw new Error("this work waits for something")
  }
}

/** Does work that waits for files. */
export const finished = async <A>(work: Work<A>): Promise<A> => {
  let resumed: () => IteratorResult<Promise<unknown> | undefined, A> = () => work.next()
  for (;;) {
    const step = resumed()
    if (step.done === true) return step.value
    resumed = await Promise.resolve(step.value).then(
      (value) => () => work.next(value),
      (error: unknown) => () => work.throw(error)
    )
  }
}

/** With a graph from fewer records, and walks of it rather than exact scans, so that tests need not many. */
export const partitionOf = (dimensions: number, metric: Metric = "cosine"): Partition =>
  new Partition({ dimensions, metric, m: 16, efConstruction: 200 }, { graphFrom: 500, exactRowsPerBeam: 1 })

export const apply = (partition: Partition, ops: ReadonlyArray<LogOp>): Uint8Array =>
  done(partition.apply(segmentOf(partition.spec.dimensions, ops)))

/** Stamps versions of one region, each later than the one before. */
export const stamper = (region = "local") => {
  let counter = 0
  return (): Version => {
    counter += 1
    return { time: BigInt(counter), region, counter }
  }
}

/** The score that the contract says, in double precision. */
export const scoreOf = (metric: Metric, a: ArrayLike<number>, b: ArrayLike<number>): number => {
  let product = 0
  let aa = 0
  let bb = 0
  let distance = 0
  for (let i = 0; i < a.length; i++) {
    product += a[i]! * b[i]!
    aa += a[i]! * a[i]!
    bb += b[i]! * b[i]!
    distance += (a[i]! - b[i]!) ** 2
  }
  switch (metric) {
    case "cosine":
      return aa === 0 || bb === 0 ? 0 : product / Math.sqrt(aa * bb)
    case "ip":
      return product
    case "l2":
      return -Math.sqrt(distance)
  }
}

/** The ids of the best `k`, by brute force. */
export const nearest = (
  metric: Metric,
  query: ArrayLike<number>,
  records: Iterable<readonly [id: string, vector: ArrayLike<number>]>,
  k: number
): Array<string> =>
  [...records]
    .map(([id, vector]) => ({ id, score: scoreOf(metric, query, vector) }))
    .sort((a, b) => b.score - a.score)
    .slice(0, k)
    .map(({ id }) => id)
