/**
 * The records of a partition as last-writer-wins registers: of each id the greatest version of its vector, of its
 * metadata and of its deletion. A register moves to a greater version only, so operations may come in any order and any
 * number of times.
 *
 * Kept is only what can still matter. A visible record has a vector newer than its deletion; since setting a vector sets
 * metadata too, its metadata is at least as new as its vector, and any version that its deletion would stop is stopped by
 * them already: the deletion is dropped. An id that is not visible keeps its deletion, and metadata newer than that.
 */
import type { Version } from "../../protocol/Version.ts"
import { Bitset } from "./Bitset.ts"

/** What is kept of an id that is not visible. */
export interface Hidden {
  readonly deleted: Version | undefined
  /** Metadata newer than the deletion, shown once a vector comes. */
  readonly orphan: { readonly version: Version; readonly metadata: string } | undefined
}

/** What an operation did; the codes of `Applied.effects`. */
export const effect = { none: 0, added: 1, changed: 2, removed: 3, hidden: 4 } as const

export class RecordTable {
  /** Slots of the visible records by id. */
  readonly slots = new Map<string, number>()
  readonly hidden = new Map<string, Hidden>()
  readonly live = new Bitset()
  /** By slot; what is at a free slot means nothing. */
  readonly ids: Array<string> = []
  readonly metadata: Array<string> = []
  /** Versions of metadata, by slot, where they are not the vector's. */
  readonly metadataVersions = new Map<number, Version>()
  readonly #free: Array<number> = []
  readonly #regions: Array<string> = []
  readonly #regionIndex = new Map<string, number>()
  readonly #regionCounters: Array<number> = []
  #times = new BigUint64Array(0)
  #counters = new Float64Array(0)
  #regionOf = new Uint16Array(0)
  #maxTime = 0n
  #tombstones = 0
  #textChars = 0

  /** Visible records. */
  get count(): number {
    return this.live.count
  }

  /** Ids whose deletion is kept. */
  get tombstones(): number {
    return this.#tombstones
  }

  /** One more than the greatest slot ever used. */
  get slotCount(): number {
    return this.ids.length
  }

  get maxTime(): bigint {
    return this.#maxTime
  }

  /** The greatest counter seen, by region. */
  get counters(): ReadonlyMap<string, number> {
    return new Map(this.#regions.map((region, i) => [region, this.#regionCounters[i]!]))
  }

  get regions(): ReadonlyArray<string> {
    return this.#regions
  }

  vectorVersion(slot: number): Version {
    return {
      time: this.#times[slot]!,
      region: this.#regions[this.#regionOf[slot]!]!,
      counter: this.#counters[slot]!
    }
  }

  metadataVersion(slot: number): Version {
    return this.metadataVersions.get(slot) ?? this.vectorVersion(slot)
  }

  /** Takes note of a version, so that {@link maxTime} and {@link counters} cover it. */
  observe(version: Version): void {
    if (version.time > this.#maxTime) this.#maxTime = version.time
    const region = this.#regionOfName(version.region)
    if (version.counter > this.#regionCounters[region]!) this.#regionCounters[region] = version.counter
  }

  /** Whether an upsert of this version would set the id's vector. */
  takesVector(id: string, version: Version): boolean {
    const slot = this.slots.get(id)
    if (slot !== undefined) return this.#isNewerThanVector(slot, version)
    const deleted = this.hidden.get(id)?.deleted
    return deleted === undefined || isNewer(version, deleted)
  }

  /** Sets vector and metadata of an id whose vector this version sets ({@link takesVector}). Returns its slot. */
  upsert(id: string, version: Version, metadata: string): number {
    const known = this.slots.get(id)
    if (known !== undefined) {
      const current = this.metadataVersions.get(known)
      this.#setVectorVersion(known, version)
      if (current === undefined || isNewer(version, current)) {
        this.metadataVersions.delete(known)
        this.#setMetadata(known, metadata)
      }
      return known
    }
    const orphan = this.hidden.get(id)?.orphan
    this.#dropHidden(id)
    const slot = this.add(id, version)
    if (orphan !== undefined && isNewer(orphan.version, version)) {
      this.metadataVersions.set(slot, orphan.version)
      this.#setMetadata(slot, orphan.metadata)
    } else {
      this.#setMetadata(slot, metadata)
    }
    return slot
  }

  /** Sets the metadata of an id. Returns what that did. */
  setMetadata(id: string, version: Version, metadata: string): number {
    const slot = this.slots.get(id)
    if (slot !== undefined) {
      if (!isNewer(version, this.metadataVersion(slot))) return effect.none
      this.metadataVersions.set(slot, version)
      this.#setMetadata(slot, metadata)
      return effect.changed
    }
    const hidden = this.hidden.get(id)
    if (hidden?.deleted !== undefined && !isNewer(version, hidden.deleted)) return effect.none
    if (hidden?.orphan !== undefined && !isNewer(version, hidden.orphan.version)) return effect.none
    this.hide(id, { deleted: hidden?.deleted, orphan: { version, metadata } })
    return effect.hidden
  }

  /** Deletes an id. Returns what that did; a removed record's slot is free afterwards. */
  delete(id: string, version: Version): number {
    const slot = this.slots.get(id)
    if (slot !== undefined) {
      if (isNewer(this.vectorVersion(slot), version)) return effect.none
      const metadataVersion = this.metadataVersion(slot)
      const orphan = isNewer(metadataVersion, version)
        ? { version: metadataVersion, metadata: this.metadata[slot]! }
        : undefined
      this.slots.delete(id)
      this.live.delete(slot)
      this.metadataVersions.delete(slot)
      this.#setMetadata(slot, "")
      this.#textChars -= id.length
      this.ids[slot] = ""
      this.#free.push(slot)
      this.hide(id, { deleted: version, orphan })
      return effect.removed
    }
    const hidden = this.hidden.get(id)
    if (hidden?.deleted !== undefined && !isNewer(version, hidden.deleted)) return effect.none
    const orphan = hidden?.orphan !== undefined && isNewer(hidden.orphan.version, version) ? hidden.orphan : undefined
    this.hide(id, { deleted: version, orphan })
    return effect.hidden
  }

  /** Keeps what is given of an id that is not visible. */
  hide(id: string, hidden: Hidden): void {
    this.#dropHidden(id)
    this.hidden.set(id, hidden)
    this.#textChars += id.length + (hidden.orphan?.metadata.length ?? 0)
    if (hidden.deleted !== undefined) this.#tombstones += 1
  }

  /** Puts a visible record with no metadata at a slot of its own, which is returned; its id is of none here. */
  add(id: string, version: Version): number {
    const slot = this.#free.pop() ?? this.ids.length
    this.place(slot, id, version)
    return slot
  }

  /** Puts a visible record with no metadata at a slot that is free or the next new one. */
  place(slot: number, id: string, version: Version): void {
    if (slot === this.ids.length) {
      this.ids.push("")
      this.metadata.push("")
      this.#reserve(slot + 1)
    }
    this.ids[slot] = id
    this.#textChars += id.length
    this.slots.set(id, slot)
    this.live.add(slot)
    this.#setVectorVersion(slot, version)
  }

  /** Sets the text of a record just {@link place}d, and its version where that is not the vector's. */
  restoreMetadata(slot: number, metadata: string, version: Version | undefined): void {
    this.#setMetadata(slot, metadata)
    if (version !== undefined) this.metadataVersions.set(slot, version)
  }

  /** Bytes held, texts and maps estimated. */
  get bytes(): number {
    return (
      this.#times.byteLength +
      this.#counters.byteLength +
      this.#regionOf.byteLength +
      this.live.bytes +
      this.#textChars +
      this.slots.size * recordBytes +
      this.hidden.size * hiddenBytes +
      this.metadataVersions.size * versionBytes +
      this.#free.length * 8
    )
  }

  #setMetadata(slot: number, metadata: string): void {
    this.#textChars += metadata.length - this.metadata[slot]!.length
    this.metadata[slot] = metadata
  }

  #dropHidden(id: string): void {
    const hidden = this.hidden.get(id)
    if (hidden === undefined) return
    this.hidden.delete(id)
    this.#textChars -= id.length + (hidden.orphan?.metadata.length ?? 0)
    if (hidden.deleted !== undefined) this.#tombstones -= 1
  }

  #setVectorVersion(slot: number, version: Version): void {
    this.#times[slot] = version.time
    this.#counters[slot] = version.counter
    this.#regionOf[slot] = this.#regionOfName(version.region)
  }

  #isNewerThanVector(slot: number, version: Version): boolean {
    const time = this.#times[slot]!
    if (version.time !== time) return version.time > time
    return isNewer(version, this.vectorVersion(slot))
  }

  #regionOfName(region: string): number {
    let index = this.#regionIndex.get(region)
    if (index === undefined) {
      index = this.#regions.length
      if (index > regionsMax) throw new Error(`more than ${regionsMax} regions`)
      this.#regions.push(region)
      this.#regionCounters.push(0)
      this.#regionIndex.set(region, index)
    }
    return index
  }

  #reserve(slots: number): void {
    if (slots <= this.#times.length) return
    const capacity = Math.max(slots, 16, Math.ceil(this.#times.length * 1.5))
    const times = new BigUint64Array(capacity)
    times.set(this.#times)
    this.#times = times
    const counters = new Float64Array(capacity)
    counters.set(this.#counters)
    this.#counters = counters
    const regionOf = new Uint16Array(capacity)
    regionOf.set(this.#regionOf)
    this.#regionOf = regionOf
  }
}

/** Whether `a` is the later one: the order of `compareVersions`, whose module would bring Effect into the thread. */
export const isNewer = (a: Version, b: Version): boolean => {
  if (a.time !== b.time) return a.time > b.time
  if (a.region !== b.region) return a.region > b.region
  return a.counter > b.counter
}

/** Regions that one partition's versions name; bounded by the width of their index. */
const regionsMax = 65_535

/** Estimates of V8's memory: a map entry, a string's header and the places in the two arrays of texts. */
const recordBytes = 110
const hiddenBytes = 220
const versionBytes = 120
