/**
 * Checks a graph file before hnswlib reads it, which believes what it finds: a wrong length or link there ends the
 * process. The layout is hnswlib's own (`saveIndex` of its hnswalg.h), 64-bit little-endian.
 */
import type { FileHandle } from "node:fs/promises"
import type { IndexSpec } from "../VectorIndex.ts"
import { FileFault } from "./RecordsFile.ts"
import { settled, type Work, withFile } from "./Work.ts"

/** What the file says where there is no graph: the records are too few to need one. */
export const noGraph = "RVNG"

/** The nodes of a graph file, 0 where it says that there is none. Throws {@link FileFault} where it is anything else. A block a step. */
export const checkGraphFile = (file: string, spec: IndexSpec): Work<number> =>
  withFile(file, "r", (handle) => check(handle, spec))

function* check(handle: FileHandle, spec: IndexSpec): Work<number> {
  const { size } = yield* settled(handle.stat())
  const buffer = Buffer.allocUnsafeSlow(Math.max(blockBytes, spec.m * 8 + 12 + spec.dimensions * 4))
  const allWords = new Uint32Array(buffer.buffer, buffer.byteOffset, Math.floor(buffer.length / 4))
  /** What is read is there until the next is. */
  const read = function* (bytes: number, position: number): Work<Buffer> {
    if (position + bytes > size) throw new FileFault("a graph file that ends early")
    const block = buffer.subarray(0, bytes)
    for (let at = 0; at < bytes; ) {
      const { bytesRead } = yield* settled(handle.read(block, at, bytes - at, position + at))
      if (bytesRead === 0) throw new FileFault("a graph file that ends early")
      at += bytesRead
    }
    return block
  }

  const linksMax = spec.m * 2
  const labelAt = linksMax * 4 + 4 + spec.dimensions * 4
  const nodeBytes = labelAt + 8
  if (size === noGraph.length && (yield* read(size, 0)).toString("latin1") === noGraph) return 0
  const header = yield* read(headerBytes, 0)
  const word = (at: number) => Number(header.readBigUInt64LE(at))
  const nodes = word(16)
  if (nodes < 1 || nodes > nodesMax) throw new FileFault(`graph: ${nodes} nodes`)
  const expected: ReadonlyArray<readonly [string, number, number]> = [
    ["level offset", word(0), 0],
    ["bytes of a node", word(24), nodeBytes],
    ["label offset", word(32), labelAt],
    ["vector offset", word(40), linksMax * 4 + 4],
    ["links of upper levels", word(56), spec.m],
    ["links of the lowest level", word(64), linksMax],
    ["m", word(72), spec.m],
    ["efConstruction", word(88), Math.max(spec.efConstruction, spec.m)]
  ]
  for (const [what, got, want] of expected)
    if (got !== want) throw new FileFault(`graph: ${what} ${got}, expected ${want}`)
  const room = word(8)
  if (room < nodes || room > nodes * roomFactorMax + roomMin) throw new FileFault(`graph: room for ${room} nodes`)
  const multiplier = header.readDoubleLE(80)
  if (!(Math.abs(multiplier - 1 / Math.log(spec.m)) < 1e-9))
    throw new FileFault(`graph: level multiplier ${multiplier}`)
  const top = header.readInt32LE(48)
  const entry = header.readUInt32LE(52)
  if (top < 0 || top > levelsMax || entry >= nodes) throw new FileFault(`graph: entry ${entry} at level ${top}`)

  const nodesInBlock = Math.max(1, Math.floor(blockBytes / nodeBytes))
  for (let first = 0; first < nodes; first += nodesInBlock) {
    const count = Math.min(nodesInBlock, nodes - first)
    yield* read(count * nodeBytes, headerBytes + first * nodeBytes)
    const words = allWords
    const stride = nodeBytes / 4
    for (let i = 0; i < count; i++) {
      const at = i * stride
      const links = words[at]!
      if (links > linksMax) throw new FileFault(`graph: node ${first + i} has ${links} links`)
      for (let j = 1; j <= links; j++) {
        if (words[at + j]! >= nodes) throw new FileFault(`graph: node ${first + i} links to ${words[at + j]}`)
      }
      const label = at + labelAt / 4
      if (words[label] !== first + i || words[label + 1] !== 0) {
        throw new FileFault(`graph: node ${first + i} is labelled ${words[label]}`)
      }
    }
  }

  const levels = new Uint8Array(nodes)
  const upper: Array<readonly [level: number, links: Uint32Array]> = []
  const levelWords = spec.m + 1
  let position = headerBytes + nodes * nodeBytes
  let block = yield* read(Math.min(blockBytes, size - position), position)
  let at = 0
  for (let node = 0; node < nodes; node++) {
    const ready = block.length - at
    if (ready < 4 + levelsMax * levelWords * 4 && position + block.length < size) {
      position += at
      block = yield* read(Math.min(blockBytes, size - position), position)
      at = 0
    }
    if (at + 4 > block.length) throw new FileFault("a graph file that ends early")
    const bytes = block.readUInt32LE(at)
    at += 4
    const level = bytes / (levelWords * 4)
    if (!Number.isInteger(level) || level > top || at + bytes > block.length) {
      throw new FileFault(`graph: node ${node} has ${bytes} bytes of upper levels`)
    }
    if (node % nodesInStep === 0) yield
    levels[node] = level
    for (let of = 1; of <= level; of++, at += levelWords * 4) {
      const links = block.readUInt32LE(at)
      if (links > spec.m) throw new FileFault(`graph: node ${node} has ${links} links at level ${of}`)
      const list = new Uint32Array(links)
      for (let j = 0; j < links; j++) list[j] = block.readUInt32LE(at + 4 + j * 4)
      upper.push([of, list])
    }
  }
  if (position + at !== size) throw new FileFault(`graph: ${size - position - at} bytes after the last node`)
  yield
  // A link at a level that its end does not have would be followed into memory that is not its own.
  for (const [level, links] of upper) {
    for (const link of links) {
      if (link >= nodes || levels[link]! < level) throw new FileFault(`graph: a link to ${link} at level ${level}`)
    }
  }
  if (levels[entry] !== top) throw new FileFault(`graph: entry ${entry} is not at level ${top}`)
  return nodes
}

const headerBytes = 96

/** Bytes read at once; what is done with them is one step. More than all levels of a node. */
const blockBytes = 1 << 18

/** Nodes whose upper levels are looked at in one step. */
const nodesInStep = 4_096

/** Levels of a graph: with the fewest links there may be (2), level 64 is one draw in 2^64. */
const levelsMax = 64

/** Nodes are numbered with 32 bits, and slots with 31. */
const nodesMax = 2 ** 31 - 1

/** Room that a graph is given beyond its nodes; what a file says is allocated. */
const roomFactorMax = 4
const roomMin = 65_536
