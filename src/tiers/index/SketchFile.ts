/**
 * The sketch file of a snapshot: what is in memory of a partition whose records stay in their file. The layout is written
 * down in `docs/format-snapshot.md`; little-endian. The header is written last, so a file that was not finished is not one.
 */
import type { FileHandle } from "node:fs/promises"
import { crc32 } from "node:zlib"
import type { IndexSpec } from "../VectorIndex.ts"
import { memoryOf, pageBytes } from "./Assembler.ts"
import { blockBytes } from "./BlockCache.ts"
import { checkKernelOf } from "./CheckKernel.ts"
import { bucketsFor, IdTable } from "./IdTable.ts"
import { Encoder, type Quantiser, type RowSource, strideOf, subspacesOf, trainQuantiser } from "./Quantiser.ts"
import { expectSame, FileFault, metrics, type RecordsOutline, readAll, writeAll } from "./RecordsFile.ts"
import { offsetGroup, type RecordsMap } from "./RecordsView.ts"
import { codesBytesOf, Sketch, workingLayout } from "./Sketch.ts"
import { blockStride, blockVectors, codebookBytes, nibbleOf } from "./SketchKernel.ts"
import { settled, type Work, withFile } from "./Work.ts"

/** A snapshot of so many records and more has a sketch; fewer are opened as fast without. */
export const sketchRecordsMin = 2_000

/** Version of the layout; a reader refuses any other. */
export const sketchFormat = 1

export interface SketchRead {
  readonly sketch: Sketch
  readonly ids: IdTable
  readonly hashSeed: number
  readonly map: RecordsMap
  /** CRC-32 of the records file's header. */
  readonly recordsHeaderCrc: number
  readonly count: number
  readonly hiddenCount: number
  /** Hidden ids with a deletion. */
  readonly tombstones: number
}

/**
 * Writes a new file for a records file just written, whose vectors are those of `source` in the same order. The quantiser is
 * trained anew where none is given, or where that one no longer fits; the one that was used is returned.
 */
export const writeSketch = (
  file: string,
  spec: IndexSpec,
  records: RecordsOutline,
  tombstones: number,
  source: RowSource,
  quantiser: Quantiser | undefined
): Work<Quantiser> => withFile(file, "wx", (handle) => writeAllTo(handle, spec, records, tombstones, source, quantiser))

/** Reads a file. Throws {@link FileFault} where it is not whole or not of `spec`. */
export const readSketch = (file: string, spec: IndexSpec): Work<SketchRead> =>
  withFile(file, "r", (handle) => readAllOf(handle, spec))

/** Whether a quantiser still fits so many vectors that are encoded with such a mean error. */
const fits = (quantiser: Quantiser, count: number, error: number): boolean =>
  count <= quantiser.trainedOn * growthMax &&
  count * growthMax >= quantiser.trainedOn &&
  error <= quantiser.error * errorGrowthMax

function* writeAllTo(
  handle: FileHandle,
  spec: IndexSpec,
  records: RecordsOutline,
  tombstones: number,
  source: RowSource,
  known: Quantiser | undefined
): Work<Quantiser> {
  const isOfUse = known !== undefined && fits(known, source.count, 0)
  let quantiser = isOfUse ? known : yield* trainQuantiser(spec, source)
  let encoded = yield* encodeAll(quantiser, source)
  if (isOfUse && !fits(quantiser, source.count, encoded.error)) {
    quantiser = yield* trainQuantiser(spec, source)
    encoded = yield* encodeAll(quantiser, source)
  }
  const { sizes, slots, codes } = yield* grouped(quantiser, encoded, source.count)
  const { groups, offsets } = offsetsOf(records.offsets)
  const ids = IdTable.of(records.hashes)
  yield
  const spreads = Float32Array.from(sizes, (size, list) =>
    size === 0 ? 0 : Math.sqrt(encoded.squaredSpreads[list]! / size)
  )
  const sections: ReadonlyArray<Section> = [
    quantiser.centroids,
    quantiser.codebook,
    sizes,
    spreads,
    slots,
    groups,
    offsets,
    ids.starts,
    ids.fingerprints,
    ids.entries,
    records.blocks,
    codes
  ]
  const header = Buffer.alloc(headerBytes)
  header.writeUInt32LE(magic, 0)
  header.writeUInt16LE(sketchFormat, 4)
  header.writeUInt8(metrics.indexOf(spec.metric), 6)
  header.writeUInt32LE(spec.dimensions, 8)
  header.writeUInt32LE(source.count, 12)
  header.writeUInt32LE(records.hashes.length - source.count, 16)
  header.writeUInt32LE(tombstones, 20)
  header.writeUInt32LE(sizes.length, 24)
  header.writeUInt32LE(ids.starts.length - 1, 28)
  header.writeUInt32LE(records.hashSeed, 32)
  header.writeUInt32LE(records.headerCrc, 36)
  header.writeDoubleLE(records.bytes, 40)
  header.writeDoubleLE(quantiser.unit, 48)
  header.writeDoubleLE(quantiser.error, 56)
  header.writeUInt32LE(quantiser.trainedOn, 64)
  let position = headerBytes
  for (const [i, section] of sections.entries()) {
    const bytes = new Uint8Array(section.buffer, section.byteOffset, section.byteLength)
    let sum = 0
    for (let at = 0; at < bytes.length; at += stepBytes) {
      const part = bytes.subarray(at, at + stepBytes)
      sum = crc32(part, sum)
      yield* settled(writeAll(handle, part, position + at))
    }
    header.writeUInt32LE(sum, checksumsAt + i * 4)
    position += align(bytes.length)
  }
  yield* settled(handle.truncate(position))
  header.writeDoubleLE(position, 72)
  header.writeUInt32LE(crc32(header.subarray(0, headerBytes - 4)), headerBytes - 4)
  yield* settled(writeAll(handle, header, 0))
  return quantiser
}

interface Encoded {
  /** List of each vector, and its codes, two in a byte. */
  readonly listOf: Uint32Array
  readonly packed: Uint8Array
  readonly error: number
  readonly squaredSpreads: Float64Array
}

function* encodeAll(quantiser: Quantiser, source: RowSource): Work<Encoded> {
  const encoder = new Encoder(quantiser)
  const subspaces = subspacesOf(quantiser.dimensions)
  const stride = Math.ceil(subspaces / 2)
  const listOf = new Uint32Array(source.count)
  const packed = new Uint8Array(source.count * stride)
  for (let from = 0; from < source.count; ) {
    const count = encoder.encode(source, from)
    listOf.set(encoder.listOf.subarray(0, count), from)
    const { codes, chunk } = encoder
    for (let m = 0; m < subspaces; m++) {
      const shift = (m & 1) * 4
      for (let i = 0, at = from * stride + (m >>> 1); i < count; i++, at += stride) {
        packed[at] = packed[at]! | (codes[m * chunk + i]! << shift)
      }
    }
    from += count
    yield
  }
  const error = source.count === 0 ? 0 : encoder.squaredErrors / source.count
  return { listOf, packed, error, squaredSpreads: encoder.squaredSpreads }
}

/** Codes and slots in blocks, list by list. */
function* grouped(
  quantiser: Quantiser,
  { listOf, packed }: Encoded,
  count: number
): Work<{ readonly sizes: Uint32Array; readonly slots: Int32Array; readonly codes: Uint8Array }> {
  const { dimensions } = quantiser
  const subspaces = subspacesOf(dimensions)
  const stride = Math.ceil(subspaces / 2)
  const sizes = new Uint32Array(quantiser.centroids.length / strideOf(dimensions))
  for (let i = 0; i < count; i++) sizes[listOf[i]!]! += 1
  const next = new Float64Array(sizes.length)
  let blocks = 0
  for (let list = 0; list < sizes.length; list++) {
    next[list] = blocks * blockVectors
    blocks += Math.ceil(sizes[list]! / blockVectors)
  }
  const slots = new Int32Array(blocks * blockVectors).fill(-1)
  const codes = new Uint8Array(codesBytesOf(sizes, dimensions))
  for (let slot = 0; slot < count; slot++) {
    const place = next[listOf[slot]!]!++
    slots[place] = slot
    const { byte, shift } = nibbleOf(place % blockVectors)
    let at = Math.floor(place / blockVectors) * subspaces * blockStride + byte
    for (let m = 0; m < subspaces; m++, at += blockStride) {
      const code = (packed[slot * stride + (m >>> 1)]! >>> ((m & 1) * 4)) & 15
      codes[at] = codes[at]! | (code << shift)
    }
    if (slot % vectorsInStep === 0) yield
  }
  return { sizes, slots, codes }
}

/** Offsets as a sketch keeps them. */
export const offsetsOf = (all: Float64Array): Pick<RecordsMap, "groups" | "offsets"> => {
  const groups = new Float64Array(Math.ceil(all.length / offsetGroup))
  const offsets = new Uint32Array(all.length)
  for (let i = 0; i < all.length; i++) {
    if (i % offsetGroup === 0) groups[i / offsetGroup] = all[i]!
    offsets[i] = all[i]! - groups[Math.floor(i / offsetGroup)]!
  }
  return { groups, offsets }
}

/** The whole file is read into the sketch's own memory at once, and what is in it is used there. */
function* readAllOf(handle: FileHandle, spec: IndexSpec): Work<SketchRead> {
  const header = Buffer.alloc(headerBytes)
  const [{ size }] = yield* settled(Promise.all([handle.stat(), readAll(handle, header, 0)]))
  if (header.readUInt32LE(0) !== magic) throw new FileFault("not a sketch file")
  if (header.readUInt32LE(headerBytes - 4) !== crc32(header.subarray(0, headerBytes - 4))) {
    throw new FileFault("the sketch's header checksum differs")
  }
  const format = header.readUInt16LE(4)
  if (format !== sketchFormat) throw new FileFault(`a sketch of format ${format}, this version reads ${sketchFormat}`)
  expectSame("the sketch's metric", metrics[header.readUInt8(6)], spec.metric)
  expectSame("the sketch's dimensions", header.readUInt32LE(8), spec.dimensions)
  expectSame("the sketch's size", size, header.readDoubleLE(72))
  const count = header.readUInt32LE(12)
  const hiddenCount = header.readUInt32LE(16)
  const listCount = header.readUInt32LE(24)
  const buckets = header.readUInt32LE(28)
  const recordsBytes = header.readDoubleLE(40)
  const entries = count + hiddenCount
  if (listCount < 1 || listCount > listsMax) throw new FileFault(`a sketch of ${listCount} lists`)
  expectSame("the sketch's buckets", buckets, bucketsFor(entries))
  if (!(recordsBytes >= 0 && recordsBytes <= Number.MAX_SAFE_INTEGER))
    throw new FileFault(`records of ${recordsBytes} bytes`)
  const unit = header.readDoubleLE(48)
  if (!(unit > 0 && unit < Number.POSITIVE_INFINITY)) throw new FileFault(`a sketch whose unit is ${unit}`)

  // Behind the file there is room for a bit of each slot.
  const { at: working, bytes: workingBytes } = workingLayout(spec.dimensions, listCount)
  const bits = workingBytes + align(size)
  const memory = memoryOf(Math.ceil((bits + Math.ceil(count / 32) * 4) / pageBytes))
  yield* settled(
    readAll(handle, new Uint8Array(memory.buffer, workingBytes + headerBytes, size - headerBytes), headerBytes)
  )
  const image = new Image(memory.buffer, workingBytes, size, header)

  // What there is up to the slots has a length that the header says; theirs is that of the lists.
  const centroids = yield* image.take(Float32Array, listCount * strideOf(spec.dimensions))
  const codebook = yield* image.take(Float32Array, (subspacesOf(spec.dimensions) * codebookBytes) / 4)
  const sizes = yield* image.take(Uint32Array, listCount)
  const spreads = yield* image.take(Float32Array, listCount)
  let sum = 0
  let blocks = 0
  for (let list = 0; list < listCount; list++) {
    sum += sizes[list]!
    blocks += Math.ceil(sizes[list]! / blockVectors)
  }
  expectSame("the vectors in the sketch's lists", sum, count)
  const slots = yield* image.take(Int32Array, blocks * blockVectors)
  const groups = yield* image.take(Float64Array, Math.ceil(entries / offsetGroup))
  const offsets = yield* image.take(Uint32Array, entries)
  const starts = yield* image.take(Uint32Array, buckets + 1)
  const fingerprints = yield* image.take(Uint16Array, entries)
  const idEntries = yield* image.take(Uint32Array, entries)
  const blockSums = yield* image.take(Uint32Array, Math.ceil(recordsBytes / blockBytes))
  const codes = yield* image.take(Uint8Array, codesBytesOf(sizes, spec.dimensions))
  expectSame("the sketch's size by its counts", size, image.bytes)

  const checks = checkKernelOf(memory)
  for (const floats of [centroids, codebook, spreads]) {
    if (checks.endless(floats.byteOffset, endOf(floats)) > 0)
      throw new FileFault("a sketch with a centroid that is nowhere")
  }
  if (checks.distinct(slots.byteOffset, endOf(slots), count, bits) !== count)
    throw new FileFault("a sketch whose lists have not every slot")
  checkEmptyPlaces(slots, sizes)
  yield
  if (checks.stalling(offsets.byteOffset, endOf(offsets), offsetGroup - 1) > 0)
    throw new FileFault("a sketch whose entries do not follow each other")
  checkGroups(groups, offsets, recordsBytes)
  yield
  if (starts[0] !== 0 || starts[buckets] !== entries || checks.falling(starts.byteOffset, endOf(starts)) > 0)
    throw new FileFault("a sketch whose buckets are not all")
  if (checks.beyond(idEntries.byteOffset, endOf(idEntries), entries) > 0)
    throw new FileFault("a sketch with an id that is nowhere")
  yield

  // Kept by who makes the next sketch with it, when this memory has gone.
  const quantiser: Quantiser = {
    dimensions: spec.dimensions,
    metric: spec.metric,
    unit,
    centroids: centroids.slice(),
    codebook: codebook.slice(),
    trainedOn: header.readUInt32LE(64),
    error: header.readDoubleLE(56)
  }
  const ids = new IdTable(starts, fingerprints, idEntries)
  const sketch = new Sketch(
    quantiser,
    { sizes, spreads, slots },
    {
      memory,
      working,
      centroids: centroids.byteOffset,
      codebook: codebook.byteOffset,
      codes: codes.byteOffset,
      otherBytes: ids.bytes + groups.byteLength + offsets.byteLength + blockSums.byteLength
    }
  )
  return {
    sketch,
    ids,
    hashSeed: header.readUInt32LE(32),
    map: { recordsBytes, groups, offsets, blocks: blockSums },
    recordsHeaderCrc: header.readUInt32LE(36),
    count,
    hiddenCount,
    tombstones: Math.min(hiddenCount, header.readUInt32LE(20))
  }
}

/** Places behind the vectors of each list. */
const checkEmptyPlaces = (slots: Int32Array, sizes: Uint32Array): void => {
  let place = 0
  for (let list = 0; list < sizes.length; list++) {
    place += sizes[list]!
    for (; place % blockVectors !== 0; place++) {
      if (slots[place] !== -1) throw new FileFault(`a sketch whose place ${place} is not empty`)
    }
  }
}

/** What follows each other in every group does so from one to the next, and all is in the file. */
const checkGroups = (groups: Float64Array, offsets: Uint32Array, recordsBytes: number): void => {
  let before = 0
  for (let group = 0; group < groups.length; group++) {
    const begins = groups[group]!
    const first = begins + offsets[group * offsetGroup]!
    if (!Number.isInteger(begins) || first <= before)
      throw new FileFault(`a sketch whose group ${group} is at ${first}`)
    before = begins + offsets[Math.min(offsets.length, (group + 1) * offsetGroup) - 1]!
  }
  if (before > recordsBytes) throw new FileFault(`a sketch whose last entry is at ${before}`)
}

const endOf = ({ byteOffset, byteLength }: Section): number => byteOffset + byteLength

/** The bytes of a file in memory, and the sections in it, one after another. */
class Image {
  readonly #buffer: ArrayBuffer
  readonly #from: number
  readonly #size: number
  readonly #header: Buffer
  #sections = 0
  /** Those up to the end of the section taken last. */
  bytes = headerBytes

  constructor(buffer: ArrayBuffer, from: number, size: number, header: Buffer) {
    this.#buffer = buffer
    this.#from = from
    this.#size = size
    this.#header = header
  }

  /** The next section, whose checksum holds. */
  *take<A extends Section>(kind: SectionKind<A>, length: number): Work<A> {
    const from = this.#from + this.bytes
    const byteLength = length * kind.BYTES_PER_ELEMENT
    this.bytes += align(byteLength)
    if (this.bytes > this.#size) throw new FileFault("a sketch that ends early")
    const bytes = new Uint8Array(this.#buffer, from, byteLength)
    let sum = 0
    for (let at = 0; at < byteLength; at += stepBytes) {
      sum = crc32(bytes.subarray(at, at + stepBytes), sum)
      yield
    }
    const section = this.#sections++
    const expected = this.#header.readUInt32LE(checksumsAt + section * 4)
    expectSame(`the checksum of the sketch's section ${section}`, sum, expected)
    return new kind(this.#buffer, from, length)
  }
}

interface SectionKind<A> {
  readonly BYTES_PER_ELEMENT: number
  new (buffer: ArrayBuffer, byteOffset: number, length: number): A
}

type Section = Float32Array | Float64Array | Int32Array | Uint32Array | Uint16Array | Uint8Array

const magic = 0x4b535652 // "RVSK"
const headerBytes = 160
/** A CRC-32 of each section. */
const checksumsAt = 80
const align = (n: number): number => Math.ceil(n / 16) * 16

/** Lists that a file may have. */
const listsMax = 65_536

/** A quantiser is trained anew when there are so many times more or fewer vectors, or their mean error is so much greater. */
const growthMax = 2
const errorGrowthMax = 1.5

/** Bytes written in one step. */
const stepBytes = 1 << 20

/** Vectors put into blocks in one step. */
const vectorsInStep = 4_096
