/** What a vector thread tells of standing queries, made into what each of them is told. */
import type { StandingMember, WatchChange } from "../../protocol/StandingQuery.ts"
import { formatVersion } from "../../protocol/Version.ts"
import { entered, entryWords, held, left, type Matches, withMetadata, withVector } from "./ThreadMessages.ts"

/** Calls `use` with each query that something is told of, once. */
export const forEachChange = (
  { seq, entries, scores, ids, records }: Matches,
  dimensions: number,
  first: boolean,
  use: (watch: number, change: WatchChange) => void
): void => {
  // Of each id its place among those that are there, and what all queries say of it in the same words.
  const places = new Int32Array(ids.length)
  const versions = new Array<string | undefined>(ids.length)
  const vectors = new Array<Float32Array | undefined>(ids.length)
  for (let i = 0, place = 0; i < ids.length; i++) places[i] = records.there[i] === true ? place++ : -1

  const memberOf = (at: number, flags: number, score: number): StandingMember => {
    const place = places[at]!
    versions[at] ??= formatVersion({
      time: records.times[place]!,
      region: records.regions[place]!,
      counter: records.counters[place]!
    })
    const id = ids[at]!
    const version = versions[at]
    if ((flags & (withMetadata | withVector)) === 0) return { id, version, score }
    if ((flags & withVector) !== 0) {
      vectors[at] ??= records.vectors.slice(place * dimensions, (place + 1) * dimensions)
    }
    return {
      id,
      version,
      score,
      ...((flags & withMetadata) === 0 ? {} : { metadata: records.metadata[place]! }),
      ...((flags & withVector) === 0 ? {} : { vector: vectors[at]! })
    }
  }

  for (let i = 0; i < scores.length; ) {
    const watch = entries[i * entryWords]!
    const gone: Array<string> = []
    const came: Array<StandingMember> = []
    let isHeld = false
    for (; i < scores.length && entries[i * entryWords] === watch; i++) {
      const what = entries[i * entryWords + 1]!
      const at = entries[i * entryWords + 2]!
      if ((what & left) !== 0) gone.push(ids[at]!)
      else if ((what & entered) !== 0) came.push(memberOf(at, what, scores[i]!))
      isHeld = (what & held) !== 0
    }
    use(watch, { first, seq, held: isHeld, left: gone, entered: came })
  }
}
