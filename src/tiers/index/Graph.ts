/**
 * A graph of vectors, by slot. hnswlib's update of a point costs ten times an insertion, and its deletion mark makes every
 * later insertion dearer; so a slot whose vector changes gets a new node, and its old node stays on the ways but is left
 * out of results. When too many nodes are such, the partition builds a new graph.
 */
import hnswlib from "hnswlib-node"
import type { IndexSpec } from "../VectorIndex.ts"

export class Graph {
  readonly #native: hnswlib.HierarchicalNSW
  readonly #spec: IndexSpec
  /** Slot of each node, -1 where the node stands for nothing any more. */
  #slotOf: Int32Array
  /** Node of each slot, -1 where it has none. */
  #nodeOf = new Int32Array(0)
  #nodes = 0
  #alive = 0
  #ef = 0

  /** A graph with room for `capacity` nodes at first. */
  static create(spec: IndexSpec, capacity: number): Graph {
    const native = new hnswlib.HierarchicalNSW(spec.metric, spec.dimensions)
    const room = Math.max(capacity, capacityMin)
    native.initIndex(room, spec.m, spec.efConstruction, levelSeed)
    return new Graph(native, spec, room)
  }

  /** The graph of a file that `GraphFile.ts` has checked, read in libuv's pool. Its nodes stand for nothing yet. */
  static async load(spec: IndexSpec, file: string): Promise<Graph> {
    const native = new hnswlib.HierarchicalNSW(spec.metric, spec.dimensions)
    await native.readIndex(file)
    const graph = new Graph(native, spec, native.getMaxElements())
    graph.#nodes = native.getCurrentCount()
    return graph
  }

  private constructor(native: hnswlib.HierarchicalNSW, spec: IndexSpec, capacity: number) {
    this.#native = native
    this.#spec = spec
    this.#slotOf = new Int32Array(capacity).fill(-1)
  }

  /** Says which node stands for each slot, where none does yet. Throws where two slots have one, or one has none. */
  assign(nodeOfSlot: Uint32Array): void {
    for (let slot = 0; slot < nodeOfSlot.length; slot++) {
      const node = nodeOfSlot[slot]!
      if (node >= this.#nodes || this.#slotOf[node] !== -1) throw new Error(`slot ${slot} has no node of its own`)
      this.#slotOf[node] = slot
    }
    this.#nodeOf = Int32Array.from(nodeOfSlot)
    this.#alive = nodeOfSlot.length
  }

  /** All nodes, those left out of results included. */
  get nodes(): number {
    return this.#nodes
  }

  /** Nodes that are left out of results. */
  get dead(): number {
    return this.#nodes - this.#alive
  }

  nodeOf(slot: number): number {
    return slot < this.#nodeOf.length ? this.#nodeOf[slot]! : -1
  }

  slotOf(node: number): number {
    return this.#slotOf[node]!
  }

  /** Makes a new node stand for the slot. */
  set(slot: number, point: Array<number>): void {
    this.remove(slot)
    if (this.#nodes === this.#slotOf.length) this.#grow()
    if (slot >= this.#nodeOf.length) {
      const grown = new Int32Array(Math.max(slot + 1, Math.ceil(this.#nodeOf.length * growthFactor), capacityMin)).fill(
        -1
      )
      grown.set(this.#nodeOf)
      this.#nodeOf = grown
    }
    const node = this.#nodes
    this.#native.addPoint(point, node)
    this.#nodes += 1
    this.#alive += 1
    this.#slotOf[node] = slot
    this.#nodeOf[slot] = node
  }

  /** Leaves the slot out of results. */
  remove(slot: number): void {
    const node = this.nodeOf(slot)
    if (node === -1) return
    this.#nodeOf[slot] = -1
    this.#slotOf[node] = -1
    this.#alive -= 1
  }

  /** The nearest `k` nodes (dead ones too), nearest first, by a walk with a beam of `ef`. */
  search(point: Array<number>, k: number, ef: number): ReadonlyArray<number> {
    if (ef !== this.#ef) {
      this.#native.setEf(ef)
      this.#ef = ef
    }
    return this.#native.searchKnn(point, Math.min(k, this.#nodes)).neighbors
  }

  /** Writes the graph's file; searches may go on, changes must wait. */
  write(file: string): Promise<boolean> {
    return this.#native.writeIndex(file)
  }

  /** Gives the native memory back now; the graph is of no use afterwards. */
  dispose(): void {
    // The collector would do it, but knows nothing of how much there is to gain.
    this.#native.initIndex(1, 2, 8)
    this.#nodes = 0
    this.#alive = 0
  }

  get bytes(): number {
    const { dimensions, m } = this.#spec
    const node = 2 * m * 4 + 4 + dimensions * 4 + 8 + labelBytes + (m * 4 + 4) / Math.max(1, m - 1)
    const capacity = this.#slotOf.length
    return labelLocksBytes + Math.ceil(this.#nodes * node) + capacity * (lockBytes + 14 + 4) + this.#nodeOf.byteLength
  }

  #grow(): void {
    const capacity = Math.ceil(this.#slotOf.length * growthFactor)
    this.#native.resizeIndex(capacity)
    const grown = new Int32Array(capacity).fill(-1)
    grown.set(this.#slotOf)
    this.#slotOf = grown
  }
}

/** By what the room for nodes grows; the vectors' memory is remapped, not copied. */
const growthFactor = 1.5
const capacityMin = 1_024
/** Levels are drawn at random; from the same seed, so that two builds of the same operations are the same graph. */
const levelSeed = 100

/** hnswlib's memory beside the vectors: 65,536 locks of 40 bytes, one for each node, its map from label to node. */
const labelLocksBytes = 65_536 * 40
const lockBytes = 40
const labelBytes = 56
