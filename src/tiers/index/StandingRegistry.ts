/**
 * The standing queries of one partition: their answers are kept as records change, without asking them again.
 *
 * **Kept.** Of each query its best `k` records and some more: all that score at least its *bar*, so a record that leaves has
 * its successor at hand. Only when those beyond `k` are used up is the query searched anew (Yi et al., "Efficient Maintenance
 * of Materialized Top-k Views", 2003).
 *
 * **A change** affects the queries that hold the record, found by its id, and those whose bar its new vector reaches, found
 * by an index of the queries (`StandingIndex.ts`). What a group of changes did to a query is told in one piece. A query that
 * has to be searched anew says nothing until it was: what it has said stays exact for the position it was said at.
 *
 * The first answer, and a search in between, is as exact as searches of the partition are; what changes afterwards is met
 * exactly. Of equal scores at the end of an answer any may be in it.
 */
import { type Condition, parseFilter } from "../../protocol/Filter.ts"
import type { IndexSpec } from "../VectorIndex.ts"
import { meets, parseMetadata } from "./MetadataIndex.ts"
import type { Hits } from "./Resident.ts"
import { StandingIndex } from "./StandingIndex.ts"
import { entered, held, left, type Matches, nothing, type RecordsAnswer, type WatchCommand } from "./ThreadMessages.ts"
import type { Work } from "./Work.ts"

/** The partition that the queries stand at. */
export interface StandingSource {
  readonly spec: IndexSpec
  search(
    vector: Float32Array,
    k: number,
    ef: number,
    filter: string | undefined,
    withMetadata: boolean,
    withVectors: boolean
  ): Hits
  /** Whether a search may name a filter; background work brings it about. */
  filtersReady(): boolean
  /** What can be seen of a record now; the vector may be a view. */
  visible(id: string): { readonly vector: Float32Array; readonly metadata: string } | undefined
  read(request: number, ids: ReadonlyArray<string>): RecordsAnswer
}

export class StandingRegistry {
  readonly #source: StandingSource
  readonly #index: StandingIndex
  readonly #queries = new Map<number, Query>()
  /** Of each slot in the index its query. */
  readonly #bySlot: Array<Query | undefined> = []
  /** Records that some query holds, or has said. */
  readonly #members = new Map<string, Member>()
  readonly #filters = new Map<string, Filter>()
  /** Those of them with queries that every record reaches which passes. */
  readonly #open = new Set<Filter>()
  /** Queries to be searched anew, the one that waits longest first. */
  readonly #thin = new Set<Query>()
  readonly #changed = new Set<Query>()
  /** Counts changes of records: a member's stamp says whether it is the one that was told. */
  #tick = 0
  /** Log position of the last segment applied. */
  seq = 0
  #told: Told = new Told()

  constructor(source: StandingSource) {
    this.#source = source
    this.#index = new StandingIndex(source.spec.dimensions, source.spec.metric)
  }

  get size(): number {
    return this.#queries.size
  }

  /** Registers a query under the number that the command names, and tells its answer. */
  add(command: WatchCommand): void {
    const { watch, vector, k, ef, minScore, flags } = command
    this.remove(watch)
    const filter = this.#filterOf(command.filter)
    const slot = this.#index.add(vector)
    const query = new Query(watch, slot, vector, k, ef, minScore, flags, filter)
    this.#queries.set(watch, query)
    this.#bySlot[slot] = query
    filter.queries += 1
    this.#search(query)
    for (const id of command.seeds) this.#seed(query, id)
    this.#setBar(query)
    this.#tell(query)
  }

  remove(watch: number): void {
    const query = this.#queries.get(watch)
    if (query === undefined) return
    this.#queries.delete(watch)
    this.#thin.delete(query)
    this.#changed.delete(query)
    for (const member of query.members) this.#letGo(member, query)
    for (const member of query.told) this.#untell(member)
    const { filter } = query
    this.#unopen(query)
    filter.queries -= 1
    if (filter.queries === 0) this.#filters.delete(filter.text)
    this.#index.remove(query.slot)
    this.#bySlot[query.slot] = undefined
  }

  /** Brings the answers up to date with records that have changed, a record or a number of queries a step. */
  *match(ids: Iterable<string>): Work<void> {
    for (const id of ids) {
      yield* this.#match(id)
      yield
    }
    let done = 0
    for (const query of this.#changed) {
      this.#settle(query)
      if (++done % queriesInStep === 0) yield
    }
    this.#changed.clear()
  }

  /** Whether a query waits to be searched, and can be. */
  get hasWork(): boolean {
    return this.#nextThin() !== undefined
  }

  /** Searches the query that has waited longest. */
  workStep(): void {
    const query = this.#nextThin()
    if (query === undefined) return
    this.#thin.delete(query)
    if (query.isThin) this.#search(query)
    this.#setBar(query)
    this.#tell(query)
  }

  /** What there is to tell since the last call; `undefined` where that is nothing. */
  take(): Matches | undefined {
    const told = this.#told
    if (told.isEmpty) return undefined
    this.#told = new Told()
    return told.matches(this.seq, this.#source)
  }

  /** Bytes held, V8's own estimated. */
  get bytes(): number {
    let held = 0
    for (const query of this.#queries.values()) held += query.members.length + query.told.length
    return this.#index.bytes + this.#queries.size * queryBytes + held * heldBytes + this.#members.size * memberBytes
  }

  *#match(id: string): Work<void> {
    const record = this.#source.visible(id)
    const known = this.#members.get(id)
    const factor = record === undefined ? 0 : this.#index.factorOf(record.vector)
    this.#tick += 1
    let done = 0
    if (known !== undefined) {
      known.stamp = this.#tick
      for (const query of [...known.holders]) {
        this.#changed.add(query)
        query.take(query.members.indexOf(known))
        const score =
          record !== undefined && this.#passes(query.filter, record.metadata)
            ? this.#index.score(query.slot, record.vector, factor)
            : Number.NaN
        if (score >= query.bar) query.put(known, score)
        else this.#letGo(known, query)
        if (++done % queriesInStep === 0) yield
      }
    }
    if (record === undefined) return
    const reached: Array<Query> = []
    const scores: Array<number> = []
    this.#index.reached(record.vector, factor, (slot, score) => {
      reached.push(this.#bySlot[slot]!)
      scores.push(score)
    })
    for (const filter of this.#open) {
      if (!this.#passes(filter, record.metadata)) continue
      for (const query of filter.open) {
        reached.push(query)
        scores.push(this.#index.score(query.slot, record.vector, factor))
      }
    }
    for (let i = 0; i < reached.length; i++) {
      const query = reached[i]!
      if (++done % queriesInStep === 0) yield
      if (!(scores[i]! >= query.bar) || !this.#passes(query.filter, record.metadata)) continue
      if (known !== undefined && query.members.includes(known)) continue
      this.#hold(query, this.#memberOf(id), scores[i]!)
      this.#changed.add(query)
    }
  }

  /** After a change: what is too much goes; what is too little is searched for, else it is told. */
  #settle(query: Query): void {
    this.#setBar(query)
    if (!query.isThin) {
      this.#thin.delete(query)
      this.#tell(query)
      return
    }
    this.#thin.add(query)
    if (query.isHeld) return
    query.isHeld = true
    this.#told.add(query.watch, held, undefined, 0)
  }

  /** Drops what is beyond the query's room, and says from which score on records reach it. */
  #setBar(query: Query): void {
    while (query.members.length > query.room) {
      const last = query.members.length - 1
      query.bar = above(query.scores[last]!)
      const member = query.members[last]!
      query.take(last)
      this.#letGo(member, query)
    }
    const isOpen = query.bar === Number.NEGATIVE_INFINITY
    if (isOpen) this.#open.add(query.filter)
    if (isOpen) query.filter.open.add(query)
    else this.#unopen(query)
    this.#index.setBar(query.slot, isOpen ? Number.NaN : query.bar)
  }

  #unopen(query: Query): void {
    const { filter } = query
    if (filter.open.delete(query) && filter.open.size === 0) this.#open.delete(filter)
  }

  /** Finds the best of all records. What the query holds stays, where it belongs: a walk of the graph may miss it. */
  #search(query: Query): void {
    const { vector, room, ef, filter, floor } = query
    const { ids, scores } = this.#source.search(vector, room, ef, filter.name, false, false)
    const found = ids.length
    for (let i = 0; i < found && scores[i]! >= floor; i++) {
      const member = this.#memberOf(ids[i]!)
      if (!query.members.includes(member)) this.#hold(query, member, scores[i]!)
    }
    query.bar = found < room || scores[found - 1]! < floor ? floor : above(scores[found - 1]!)
  }

  #seed(query: Query, id: string): void {
    const record = this.#source.visible(id)
    const member = this.#members.get(id)
    if (record === undefined || (member !== undefined && query.members.includes(member))) return
    // Another record than the last one that a filter's verdict is kept of.
    this.#tick += 1
    if (!this.#passes(query.filter, record.metadata)) return
    const score = this.#index.score(query.slot, record.vector, this.#index.factorOf(record.vector))
    if (score >= query.bar) this.#hold(query, this.#memberOf(id), score)
  }

  /** Tells the difference between what was told last and what the answer is. */
  #tell(query: Query): void {
    const { watch, told, toldStamps, members, scores, flags } = query
    const count = Math.min(query.k, members.length)
    for (let i = 0; i < told.length; i++) told[i]!.place = i
    const came: Array<number> = []
    for (let i = 0; i < count; i++) {
      const member = members[i]!
      if (member.place === -1 || toldStamps[member.place] !== member.stamp) came.push(i)
      member.place = -1
    }
    let changes = came.length
    for (const member of told) {
      if (member.place === -1) continue
      member.place = -1
      this.#told.add(watch, left, member.id, 0)
      changes += 1
    }
    for (const i of came) this.#told.add(watch, entered | flags, members[i]!.id, scores[i]!)
    if (query.isHeld && changes === 0) this.#told.add(watch, nothing, undefined, 0)
    query.isHeld = false
    if (changes === 0) return
    const now = members.slice(0, count)
    for (const member of now) member.tellers += 1
    query.told = now
    query.toldStamps = now.map((member) => member.stamp)
    for (const member of told) this.#untell(member)
  }

  #nextThin(): Query | undefined {
    for (const query of this.#thin) {
      if (query.filter.condition === undefined || this.#source.filtersReady()) return query
    }
    return undefined
  }

  /** Whether the record at hand passes; looked at once for all queries that ask the same. */
  #passes(filter: Filter, metadata: string): boolean {
    if (filter.condition === undefined) return true
    if (filter.tick !== this.#tick) {
      filter.tick = this.#tick
      filter.verdict = meets(filter.condition, parseMetadata(metadata))
    }
    return filter.verdict
  }

  #filterOf(text: string): Filter {
    let filter = this.#filters.get(text)
    if (filter === undefined) {
      filter = new Filter(text)
      this.#filters.set(text, filter)
    }
    return filter
  }

  #memberOf(id: string): Member {
    let member = this.#members.get(id)
    if (member === undefined) {
      member = new Member(id, this.#tick)
      this.#members.set(id, member)
    }
    return member
  }

  #hold(query: Query, member: Member, score: number): void {
    query.put(member, score)
    member.holders.push(query)
  }

  /** The query holds the member no longer. */
  #letGo(member: Member, query: Query): void {
    const { holders } = member
    const at = holders.indexOf(query)
    holders[at] = holders[holders.length - 1]!
    holders.pop()
    this.#forget(member)
  }

  #untell(member: Member): void {
    member.tellers -= 1
    this.#forget(member)
  }

  #forget(member: Member): void {
    if (member.holders.length === 0 && member.tellers === 0) this.#members.delete(member.id)
  }
}

/** A record that queries hold. */
class Member {
  readonly id: string
  /** When it last changed. */
  stamp: number
  readonly holders: Array<Query> = []
  /** Queries that have told of it last. */
  tellers = 0
  /** Its place in what a query has told, while that is compared; else -1. */
  place = -1

  constructor(id: string, stamp: number) {
    this.id = id
    this.stamp = stamp
  }
}

class Query {
  readonly watch: number
  readonly slot: number
  readonly vector: Float32Array
  readonly k: number
  readonly ef: number
  /** Records held, at most. */
  readonly room: number
  readonly flags: number
  readonly filter: Filter
  /** The least score that the answer takes. */
  readonly floor: number
  /** All records that score so much are held. */
  bar: number
  /** Best first. */
  readonly members: Array<Member> = []
  readonly scores: Array<number> = []
  told: ReadonlyArray<Member> = []
  toldStamps: ReadonlyArray<number> = []
  isHeld = false

  constructor(
    watch: number,
    slot: number,
    vector: Float32Array,
    k: number,
    ef: number,
    minScore: number,
    flags: number,
    filter: Filter
  ) {
    this.watch = watch
    this.slot = slot
    this.vector = vector
    this.k = k
    this.ef = ef
    this.room = k + slackOf(k)
    this.flags = flags
    this.filter = filter
    const floor = Math.fround(minScore)
    this.floor = floor < minScore ? above(floor) : floor
    this.bar = this.floor
  }

  /** Whether there may be better records than some of the answer, or more. */
  get isThin(): boolean {
    return this.members.length < this.k && this.bar > this.floor
  }

  put(member: Member, score: number): void {
    const { members, scores } = this
    let at = scores.length
    while (at > 0 && (score > scores[at - 1]! || (score === scores[at - 1]! && member.id < members[at - 1]!.id)))
      at -= 1
    members.splice(at, 0, member)
    scores.splice(at, 0, score)
  }

  take(at: number): void {
    this.members.splice(at, 1)
    this.scores.splice(at, 1)
  }
}

/** A filter, and the queries that ask it. */
class Filter {
  readonly text: string
  readonly condition: Condition | undefined
  queries = 0
  /** Those that every record reaches which passes. */
  readonly open = new Set<Query>()
  /** What was found of the record that changed at this tick. */
  tick = -1
  verdict = false

  constructor(text: string) {
    this.text = text
    this.condition = text === "" ? undefined : parseFilter(JSON.parse(text))
  }

  get name(): string | undefined {
    return this.condition === undefined ? undefined : this.text
  }
}

/** Gathers what there is to tell. */
class Told {
  readonly #entries: Array<number> = []
  readonly #scores: Array<number> = []
  readonly #ids = new Map<string, number>()

  get isEmpty(): boolean {
    return this.#entries.length === 0
  }

  add(watch: number, what: number, id: string | undefined, score: number): void {
    let at = -1
    if (id !== undefined) {
      const known = this.#ids.get(id)
      at = known ?? this.#ids.size
      if (known === undefined) this.#ids.set(id, at)
    }
    this.#entries.push(watch, what, at)
    this.#scores.push(score)
  }

  matches(seq: number, source: StandingSource): Matches {
    const ids = [...this.#ids.keys()]
    // Whole, of all: what has left is still there mostly, and there is little of it.
    const records = source.read(0, ids)
    return { seq, entries: Int32Array.from(this.#entries), scores: Float32Array.from(this.#scores), ids, records }
  }
}

/** Queries looked at in one step. */
const queriesInStep = 256

/** Records held beyond those of the answer: as many again, within bounds. */
const slackOf = (k: number): number => Math.min(slackMax, Math.max(slackMin, k))
const slackMin = 8
const slackMax = 64

/** The next float32 above one. */
const above = (x: number): number => {
  if (x === 0) return smallestFloat
  if (x === Number.POSITIVE_INFINITY) return x
  float[0] = x
  bits[0] = bits[0]! + (x > 0 ? 1 : -1)
  return float[0]!
}
const float = new Float32Array(1)
const bits = new Int32Array(float.buffer)
const smallestFloat = 2 ** -149

/** Estimates of V8's memory: a query with its arrays, a place in them and in a member's, a member with its id's place in the map. */
const queryBytes = 500
const heldBytes = 28
const memberBytes = 160
