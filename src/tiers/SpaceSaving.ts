/**
 * The most frequent records of a stream, by name, in bounded memory: Space-Saving (Metwally, Agrawal and El Abbadi,
 * "Efficient computation of frequent and top-k elements in data streams", 2005) over a binary heap, so that weights need
 * not be whole.
 *
 * With capacity m and total weight N: every record of weight above N/m is in it, and a count exceeds the truth by at
 * most the entry's `error`, itself at most N/m.
 */

export interface Counted {
  readonly partition: string
  readonly id: string
  /** At least the truth. */
  readonly count: number
  /** By how much `count` may exceed it. */
  readonly error: number
}

export class SpaceSaving {
  readonly #capacity: number
  /** Entry by 53 bit key. Two records of one key would be counted as one: at a million records, one chance in 18,000. */
  readonly #entries = new Map<number, number>()
  readonly #keys: Float64Array
  readonly #counts: Float64Array
  readonly #errors: Float64Array
  readonly #taken: Uint8Array
  readonly #partitions: Array<string> = []
  readonly #ids: Array<string> = []
  /** Entries as a binary heap, least count first, and where each entry is in it. */
  readonly #heap: Int32Array
  readonly #places: Int32Array
  #size = 0
  #total = 0

  constructor(capacity: number) {
    this.#capacity = capacity
    this.#keys = new Float64Array(capacity)
    this.#counts = new Float64Array(capacity)
    this.#errors = new Float64Array(capacity)
    this.#taken = new Uint8Array(capacity)
    this.#heap = new Int32Array(capacity)
    this.#places = new Int32Array(capacity)
  }

  get size(): number {
    return this.#size
  }

  /** Weight of everything offered since it was cleared. */
  get total(): number {
    return this.#total
  }

  offer(key: number, partition: string, id: string, weight: number): void {
    this.#total += weight
    const known = this.#entries.get(key)
    if (known !== undefined) {
      this.#counts[known] = (this.#counts[known] as number) + weight
      this.#sink(this.#places[known] as number)
      return
    }
    if (this.#size < this.#capacity) {
      const entry = this.#size++
      this.#set(entry, key, partition, id, weight, 0)
      this.#heap[entry] = entry
      this.#places[entry] = entry
      this.#rise(entry)
      return
    }
    const entry = this.#heap[0] as number
    const least = this.#counts[entry] as number
    this.#entries.delete(this.#keys[entry] as number)
    this.#set(entry, key, partition, id, least + weight, least)
    this.#sink(0)
  }

  /** What is surely of a record's: its count less its error; 0 for one that is not in it. */
  guaranteed(key: number): number {
    const entry = this.#entries.get(key)
    return entry === undefined ? 0 : (this.#counts[entry] as number) - (this.#errors[entry] as number)
  }

  /** Records surely counted at least `minimum`, in no order. */
  *atLeast(minimum: number): Generator<Counted & { readonly key: number }> {
    for (let entry = 0; entry < this.#size; entry++) {
      if ((this.#counts[entry] as number) - (this.#errors[entry] as number) >= minimum) {
        yield { ...this.#read(entry), key: this.#keys[entry] as number }
      }
    }
  }

  /** Records surely counted at least `minimum`, the most counted first, at most `limit`; each is given once until cleared. */
  take(minimum: number, limit: number): ReadonlyArray<Counted> {
    const found: Array<number> = []
    for (let entry = 0; entry < this.#size; entry++) {
      const sure = (this.#counts[entry] as number) - (this.#errors[entry] as number)
      if (this.#taken[entry] === 0 && sure >= minimum) found.push(entry)
    }
    return this.#hottest(found, limit).map((entry) => {
      this.#taken[entry] = 1
      return this.#read(entry)
    })
  }

  /** The most counted first, at most `limit`. */
  top(limit: number): ReadonlyArray<Counted> {
    return this.#hottest(
      Array.from({ length: this.#size }, (_, entry) => entry),
      limit
    ).map((entry) => this.#read(entry))
  }

  clear(): void {
    this.#entries.clear()
    this.#partitions.length = 0
    this.#ids.length = 0
    this.#size = 0
    this.#total = 0
  }

  /** Forgets the records of some partitions. */
  drop(isDropped: (partition: string) => boolean): void {
    const kept: Array<Counted & { readonly key: number; readonly taken: number }> = []
    for (let entry = 0; entry < this.#size; entry++) {
      if (isDropped(this.#partitions[entry] as string)) continue
      kept.push({
        ...this.#read(entry),
        key: this.#keys[entry] as number,
        taken: this.#taken[entry] as number
      })
    }
    if (kept.length === this.#size) return
    this.clear()
    for (const { key, partition, id, count, error, taken } of kept) {
      this.offer(key, partition, id, count)
      const entry = this.#size - 1
      this.#errors[entry] = error
      this.#taken[entry] = taken
    }
  }

  #set(entry: number, key: number, partition: string, id: string, count: number, error: number): void {
    this.#entries.set(key, entry)
    this.#keys[entry] = key
    this.#counts[entry] = count
    this.#errors[entry] = error
    this.#taken[entry] = 0
    this.#partitions[entry] = partition
    this.#ids[entry] = id
  }

  #read(entry: number): Counted {
    return {
      partition: this.#partitions[entry] as string,
      id: this.#ids[entry] as string,
      count: this.#counts[entry] as number,
      error: this.#errors[entry] as number
    }
  }

  #hottest(entries: Array<number>, limit: number): ReadonlyArray<number> {
    return entries.sort((a, b) => (this.#counts[b] as number) - (this.#counts[a] as number)).slice(0, limit)
  }

  #sink(from: number): void {
    const heap = this.#heap
    const entry = heap[from] as number
    const count = this.#counts[entry] as number
    let place = from
    for (;;) {
      let child = 2 * place + 1
      if (child >= this.#size) break
      const right = child + 1
      if (right < this.#size && this.#countAt(right) < this.#countAt(child)) child = right
      if (this.#countAt(child) >= count) break
      this.#put(place, heap[child] as number)
      place = child
    }
    this.#put(place, entry)
  }

  #rise(from: number): void {
    const heap = this.#heap
    const entry = heap[from] as number
    const count = this.#counts[entry] as number
    let place = from
    while (place > 0) {
      const parent = (place - 1) >>> 1
      if (this.#countAt(parent) <= count) break
      this.#put(place, heap[parent] as number)
      place = parent
    }
    this.#put(place, entry)
  }

  #countAt(place: number): number {
    return this.#counts[this.#heap[place] as number] as number
  }

  #put(place: number, entry: number): void {
    this.#heap[place] = entry
    this.#places[entry] = place
  }
}
