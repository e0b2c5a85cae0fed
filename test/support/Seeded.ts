/** Randomness that can be had again: tests print the seed when they fail. */

export interface Random {
  readonly seed: number
  /** In [0, 1). */
  readonly next: () => number
  /** An integer in [0, below). */
  readonly below: (below: number) => number
  readonly pick: <A>(items: ReadonlyArray<A>) => A
  readonly vector: (dimensions: number) => Array<number>
}

/** Mulberry32. */
export const random = (seed: number): Random => {
  let state = seed | 0
  const next = () => {
    state = (state + 0x6d2b79f5) | 0
    let t = Math.imul(state ^ (state >>> 15), 1 | state)
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t
    return ((t ^ (t >>> 14)) >>> 0) / 4_294_967_296
  }
  const below = (n: number) => Math.floor(next() * n)
  return {
    seed,
    next,
    below,
    pick: (items) => items[below(items.length)] as (typeof items)[number],
    vector: (dimensions) => Array.from({ length: dimensions }, () => next() * 2 - 1)
  }
}

/** The seed of this run: `RUVECTOR_SEED`, or a fixed one, so that a plain run is the same every time. */
export const seedOf = (fallback: number): number => {
  const given = process.env["RUVECTOR_SEED"]
  return given === undefined ? fallback : Number(given)
}

/** Runs with a seeded source; a failure names the seed. */
export const seeded = async <A>(seed: number, use: (source: Random) => Promise<A>): Promise<A> => {
  try {
    return await use(random(seed))
  } catch (error) {
    throw new Error(`with RUVECTOR_SEED=${seed}`, { cause: error })
  }
}
