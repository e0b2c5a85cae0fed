/**
 * The loops of product quantisation, in WebAssembly's vector instructions: training, encoding, a query's tables and the scan
 * of codes.
 *
 * The scan is the one of André, Kermarrec and Le Scouarnec, "Quicker ADC: Unlocking the hidden potential of product
 * quantization with SIMD" (2019), as faiss has it (`IndexIVFPQFastScan`): a code names one of 16 centroids of each
 * subspace; the 16 distances of a query to them are a table of 16 bytes, which one instruction looks up for 16 codes at
 * once. Sums are of 16 bits. Distances are smaller for what is nearer, whatever the metric.
 */
import {
  add,
  addInts,
  addLanes,
  addShorts,
  advance,
  and,
  andLanes,
  assemble,
  bitmaskBytes,
  type Code,
  constant,
  constantFloats,
  constantInts,
  countTrailingZeros,
  define,
  type FunctionCode,
  f32,
  get,
  greaterOrEqual,
  i32,
  intsOfFloats,
  isValid,
  isZero,
  Kernel,
  lane,
  laneInt,
  lessFloats,
  lessShorts,
  lessThan,
  loadLanes,
  loadShort,
  loadSplat,
  loop,
  type Memory,
  maxFloat,
  maxLanes,
  minInts,
  minLanes,
  multiplyLanes,
  narrowIntsUnsigned,
  narrowShorts,
  narrowShortsUnsigned,
  or,
  orLanes,
  relaxedSwizzle,
  repeatIf,
  selectBits,
  set,
  shiftLeft,
  shiftLeftShorts,
  shiftRightShorts,
  shuffleFloats,
  splatFloat,
  splatShort,
  storeByte,
  storeInt,
  storeLanes,
  subtract,
  subtractFloat,
  subtractLanes,
  subtractShorts,
  swizzle,
  tee,
  until,
  v128,
  zeroLanes
} from "./Assembler.ts"

/** Centroids of a subspace; a code has 4 bits. */
export const subspaceCentroids = 16

/** Components of a subspace. */
export const subspaceComponents = 2

/** Bytes of one subspace in a codebook: the first component of the 16 centroids, then the second; float32. */
export const codebookBytes = subspaceCentroids * subspaceComponents * 4

/** Vectors whose codes lie together: of each subspace 16 bytes, see {@link nibbleOf}. */
export const blockVectors = 32

/** Bytes of a block, for each subspace. */
export const blockStride = 16

/** Where in its subspace's 16 bytes of a block a vector's code is: which byte, and by how many bits it is shifted. */
export const nibbleOf = (position: number): { readonly byte: number; readonly shift: number } => ({
  byte: (position & 7) * 2 + ((position >>> 3) & 1),
  shift: (position >>> 4) * 4
})

/** All arguments but `threshold`, `first`, `scale` and `cap` are addresses, of multiples of 16 but where they are of one float. */
export interface SketchKernel {
  /**
   * Writes of each vector in the blocks from `codes` to `codesEnd` whose sum is below `threshold` its position (`first` is
   * that of the first one) and its sum, two int32s, and returns where they end. `sums` is room for 64 bytes.
   */
  readonly scan: (
    codes: number,
    codesEnd: number,
    tables: number,
    tablesEnd: number,
    threshold: number,
    first: number,
    sums: number,
    out: number
  ) => number
  /** Writes 16 float32s for each subspace: the negated products of the query's components with its centroids. */
  readonly products: (query: number, codebook: number, codebookEnd: number, out: number) => void
  /** The same with the squared distances. */
  readonly distances: (query: number, codebook: number, codebookEnd: number, out: number) => void
  /** Of tables of float32s: writes the least of each (16 bytes apart), and returns the greatest difference in one. */
  readonly range: (tables: number, tablesEnd: number, leasts: number) => number
  /** Writes tables of bytes: what each entry is above its table's least, times `scale`, `cap` at most. */
  readonly quantise: (
    tables: number,
    tablesEnd: number,
    leasts: number,
    scale: number,
    cap: number,
    out: number
  ) => void
  /** Writes of each row from `rows` to `rowsEnd` the number of the nearest centroid in one subspace, a byte. `rows` is of the subspace's first component. */
  readonly encode: (rows: number, rowsEnd: number, rowBytes: number, codebook: number, out: number) => void
  /**
   * Finds of each row the centroid with the least `halfNorm - product`: writes four float32s and four int32s, the best
   * of every fourth centroid and which it is. Centroids are rows too, a multiple of four.
   */
  readonly nearest: (
    rows: number,
    rowsEnd: number,
    rowBytes: number,
    centroids: number,
    halfNorms: number,
    halfNormsEnd: number,
    out: number
  ) => void
}

export const sketchKernelOf = (memory: Memory): SketchKernel => kernel.on(memory)

/** The functions with one or the other instruction for looking codes up. */
export const sketchFunctions = (lookUp: Code): ReadonlyArray<FunctionCode> => [
  scan(lookUp),
  tables("products", addProduct),
  tables("distances", addSquare),
  range,
  quantise,
  encode,
  nearest
]

const kernel = new Kernel<SketchKernel>(() => {
  // One instruction instead of two on x86-64; the codes are below 16, where both are the same.
  const relaxed = assemble(sketchFunctions(relaxedSwizzle))
  return isValid(relaxed) ? relaxed : assemble(sketchFunctions(swizzle))
})

const scan = (lookUp: Code): FunctionCode =>
  define(
    "scan",
    { codes: i32, codesEnd: i32, tables: i32, tablesEnd: i32, threshold: i32, first: i32, sums: i32, out: i32 },
    i32,
    {
      at: i32,
      bits: i32,
      one: i32,
      code: v128,
      table: v128,
      found: v128,
      even0: v128,
      odd0: v128,
      even1: v128,
      odd1: v128,
      below: v128
    },
    (local) => {
      const { codes, codesEnd, tables, tablesEnd, threshold, first, sums, out } = local
      const { at, bits, one, code, table, found, even0, odd0, even1, odd1, below } = local
      // Bytes looked up are added as pairs; the upper ones by themselves too, and taken away from the pairs in the end.
      const gather = (nibbles: Code, even: number, odd: number): Code => [
        ...get(table),
        ...nibbles,
        ...constantInts(0x0f0f0f0f),
        ...andLanes,
        ...lookUp,
        ...tee(found),
        ...get(even),
        ...addShorts,
        ...set(even),
        ...get(found),
        ...constant(8),
        ...shiftRightShorts,
        ...get(odd),
        ...addShorts,
        ...set(odd)
      ]
      const settle = (even: number, odd: number, offset: number): Code => [
        ...get(even),
        ...get(odd),
        ...constant(8),
        ...shiftLeftShorts,
        ...subtractShorts,
        ...set(even),
        ...get(sums),
        ...get(even),
        ...storeLanes(offset),
        ...get(sums),
        ...get(odd),
        ...storeLanes(offset + 16)
      ]
      /** A bit for each of 16 sums that is below the threshold. */
      const belowBits = (even: number, odd: number): Code => [
        ...get(even),
        ...get(below),
        ...lessShorts,
        ...get(odd),
        ...get(below),
        ...lessShorts,
        ...narrowShorts,
        ...bitmaskBytes
      ]
      return [
        ...get(threshold),
        ...splatShort,
        ...set(below),
        ...until(
          [...get(codes), ...get(codesEnd), ...greaterOrEqual],
          [
            ...zeroLanes,
            ...tee(even0),
            ...tee(odd0),
            ...tee(even1),
            ...set(odd1),
            ...get(tables),
            ...set(at),
            ...loop([
              ...get(at),
              ...loadLanes(0),
              ...set(table),
              ...get(codes),
              ...loadLanes(0),
              ...set(code),
              ...gather(get(code), even0, odd0),
              ...gather([...get(code), ...constant(4), ...shiftRightShorts], even1, odd1),
              ...advance(codes, blockStride),
              ...get(at),
              ...constant(16),
              ...add,
              ...tee(at),
              ...get(tablesEnd),
              ...lessThan,
              ...repeatIf([])
            ]),
            ...settle(even0, odd0, 0),
            ...settle(even1, odd1, 32),
            ...belowBits(even0, odd0),
            ...belowBits(even1, odd1),
            ...constant(16),
            ...shiftLeft,
            ...or,
            ...set(bits),
            ...until(
              [...get(bits), ...isZero],
              [
                ...get(bits),
                ...countTrailingZeros,
                ...set(one),
                ...get(out),
                ...get(first),
                ...get(one),
                ...add,
                ...storeInt(0),
                ...get(out),
                ...get(sums),
                ...get(one),
                ...constant(1),
                ...shiftLeft,
                ...add,
                ...loadShort,
                ...storeInt(4),
                ...advance(out, 8),
                ...get(bits),
                ...get(bits),
                ...constant(1),
                ...subtract,
                ...and,
                ...set(bits)
              ]
            ),
            ...advance(first, blockVectors)
          ]
        ),
        ...get(out)
      ]
    }
  )

/** Of a query's components, each in all lanes, and four centroids of a subspace: what a table has. */
type Entry = (first: number, second: number, firsts: Code, seconds: Code) => Code

const addProduct: Entry = (first, second, firsts, seconds) => [
  ...zeroLanes,
  ...get(first),
  ...firsts,
  ...multiplyLanes,
  ...subtractLanes,
  ...get(second),
  ...seconds,
  ...multiplyLanes,
  ...subtractLanes
]

const addSquare: Entry = (first, second, firsts, seconds) => {
  const square = (component: number, components: Code): Code => [
    ...get(component),
    ...components,
    ...subtractLanes,
    ...get(component),
    ...components,
    ...subtractLanes,
    ...multiplyLanes
  ]
  return [...square(first, firsts), ...square(second, seconds), ...addLanes]
}

/** Byte offsets of a subspace's centroids, four at a time. */
const fours = [0, 16, 32, 48]
const secondsAt = subspaceCentroids * 4

const tables = (name: string, entry: Entry): FunctionCode =>
  define(
    name,
    { query: i32, codebook: i32, codebookEnd: i32, out: i32 },
    undefined,
    { first: v128, second: v128 },
    ({ query, codebook, codebookEnd, out, first, second }) =>
      until(
        [...get(codebook), ...get(codebookEnd), ...greaterOrEqual],
        [
          ...get(query),
          ...loadSplat(0),
          ...set(first),
          ...get(query),
          ...loadSplat(4),
          ...set(second),
          ...fours.flatMap((offset) => [
            ...get(out),
            ...entry(
              first,
              second,
              [...get(codebook), ...loadLanes(offset)],
              [...get(codebook), ...loadLanes(offset + secondsAt)]
            ),
            ...storeLanes(offset)
          ]),
          ...advance(query, 8),
          ...advance(codebook, codebookBytes),
          ...advance(out, 64)
        ]
      )
  )

const range = define(
  "range",
  { tables: i32, tablesEnd: i32, leasts: i32 },
  f32,
  { widest: f32, least: v128, most: v128 },
  ({ tables, tablesEnd, leasts, widest, least, most }) => {
    const reduced = (from: number, reduce: Code): Code => [
      ...fours.flatMap((offset, i) => [...get(tables), ...loadLanes(offset), ...(i === 0 ? [] : reduce)]),
      ...tee(from),
      ...get(from),
      ...get(from),
      ...shuffleFloats(2, 3, 0, 1),
      ...reduce,
      ...tee(from),
      ...get(from),
      ...get(from),
      ...shuffleFloats(1, 0, 3, 2),
      ...reduce,
      ...set(from)
    ]
    return [
      ...until(
        [...get(tables), ...get(tablesEnd), ...greaterOrEqual],
        [
          ...reduced(least, minLanes),
          ...reduced(most, maxLanes),
          ...get(leasts),
          ...get(least),
          ...storeLanes(0),
          ...get(most),
          ...lane(0),
          ...get(least),
          ...lane(0),
          ...subtractFloat,
          ...get(widest),
          ...maxFloat,
          ...set(widest),
          ...advance(tables, 64),
          ...advance(leasts, 16)
        ]
      ),
      ...get(widest)
    ]
  }
)

const quantise = define(
  "quantise",
  { tables: i32, tablesEnd: i32, leasts: i32, scale: f32, cap: f32, out: i32 },
  undefined,
  { least: v128, scales: v128, caps: v128 },
  ({ tables, tablesEnd, leasts, scale, cap, out, least, scales, caps }) => {
    const ints = (offset: number): Code => [
      ...get(tables),
      ...loadLanes(offset),
      ...get(least),
      ...subtractLanes,
      ...get(scales),
      ...multiplyLanes,
      ...constantFloats(0.5),
      ...addLanes,
      ...get(caps),
      ...minLanes,
      ...intsOfFloats
    ]
    return [
      ...get(scale),
      ...splatFloat,
      ...set(scales),
      ...get(cap),
      ...splatFloat,
      ...set(caps),
      ...until(
        [...get(tables), ...get(tablesEnd), ...greaterOrEqual],
        [
          ...get(leasts),
          ...loadLanes(0),
          ...set(least),
          ...get(out),
          ...ints(0),
          ...ints(16),
          ...narrowIntsUnsigned,
          ...ints(32),
          ...ints(48),
          ...narrowIntsUnsigned,
          ...narrowShortsUnsigned,
          ...storeLanes(0),
          ...advance(tables, 64),
          ...advance(leasts, 16),
          ...advance(out, 16)
        ]
      )
    ]
  }
)

const encode = define(
  "encode",
  { rows: i32, rowsEnd: i32, rowBytes: i32, codebook: i32, out: i32 },
  undefined,
  {
    first: v128,
    second: v128,
    best: v128,
    firsts0: v128,
    firsts1: v128,
    firsts2: v128,
    firsts3: v128,
    seconds0: v128,
    seconds1: v128,
    seconds2: v128,
    seconds3: v128
  },
  (local) => {
    const { rows, rowsEnd, rowBytes, codebook, out, first, second, best } = local
    const firsts = [local.firsts0, local.firsts1, local.firsts2, local.firsts3]
    const seconds = [local.seconds0, local.seconds1, local.seconds2, local.seconds3]
    return [
      ...firsts.flatMap((one, i) => [...get(codebook), ...loadLanes(i * 16), ...set(one)]),
      ...seconds.flatMap((one, i) => [...get(codebook), ...loadLanes(secondsAt + i * 16), ...set(one)]),
      ...until(
        [...get(rows), ...get(rowsEnd), ...greaterOrEqual],
        [
          ...get(rows),
          ...loadSplat(0),
          ...set(first),
          ...get(rows),
          ...loadSplat(4),
          ...set(second),
          // Floats that are not negative are ordered as their bits are: the last four give way to the centroid's number.
          ...fours.flatMap((_, i) => [
            ...addSquare(first, second, get(firsts[i]!), get(seconds[i]!)),
            ...constantInts(-16),
            ...andLanes,
            ...constantInts(i * 4, i * 4 + 1, i * 4 + 2, i * 4 + 3),
            ...orLanes,
            ...(i === 0 ? [] : minInts)
          ]),
          ...tee(best),
          ...get(best),
          ...get(best),
          ...shuffleFloats(2, 3, 0, 1),
          ...minInts,
          ...set(best),
          ...get(out),
          ...get(best),
          ...get(best),
          ...get(best),
          ...shuffleFloats(1, 0, 3, 2),
          ...minInts,
          ...laneInt(0),
          ...constant(15),
          ...and,
          ...storeByte,
          ...advance(out, 1),
          ...get(rows),
          ...get(rowBytes),
          ...add,
          ...set(rows)
        ]
      )
    ]
  }
)

const nearest = define(
  "nearest",
  { rows: i32, rowsEnd: i32, rowBytes: i32, centroids: i32, halfNorms: i32, halfNormsEnd: i32, out: i32 },
  undefined,
  {
    at: i32,
    rowEnd: i32,
    other0: i32,
    other1: i32,
    other2: i32,
    other3: i32,
    halfNorm: i32,
    part: v128,
    sum0: v128,
    sum1: v128,
    sum2: v128,
    sum3: v128,
    best: v128,
    which: v128,
    bestOf: v128
  },
  (local) => {
    const { rows, rowsEnd, rowBytes, centroids, halfNorms, halfNormsEnd, out } = local
    const { at, rowEnd, halfNorm, part, best, which, bestOf } = local
    const others = [local.other0, local.other1, local.other2, local.other3]
    const sums = [local.sum0, local.sum1, local.sum2, local.sum3]
    /** Of two vectors of partial sums: two sums of one beside two of the other. */
    const folded = (a: number, b: number): Code => [
      ...get(a),
      ...get(b),
      ...shuffleFloats(0, 4, 1, 5),
      ...get(a),
      ...get(b),
      ...shuffleFloats(2, 6, 3, 7),
      ...addLanes
    ]
    return until(
      [...get(rows), ...get(rowsEnd), ...greaterOrEqual],
      [
        ...get(rows),
        ...get(rowBytes),
        ...add,
        ...set(rowEnd),
        ...constantFloats(Number.POSITIVE_INFINITY),
        ...set(best),
        ...zeroLanes,
        ...set(bestOf),
        ...constantInts(0, 1, 2, 3),
        ...set(which),
        ...get(halfNorms),
        ...set(halfNorm),
        ...get(centroids),
        ...set(others[0]!),
        ...loop([
          ...others.slice(1).flatMap((other, i) => [...get(others[i]!), ...get(rowBytes), ...add, ...set(other)]),
          ...zeroLanes,
          ...tee(sums[0]!),
          ...tee(sums[1]!),
          ...tee(sums[2]!),
          ...set(sums[3]!),
          ...get(rows),
          ...set(at),
          ...loop([
            ...get(at),
            ...loadLanes(0),
            ...set(part),
            ...others.flatMap((other, i) => [
              ...get(part),
              ...get(other),
              ...loadLanes(0),
              ...multiplyLanes,
              ...get(sums[i]!),
              ...addLanes,
              ...set(sums[i]!),
              ...advance(other, 16)
            ]),
            ...advance(at, 16),
            ...get(at),
            ...get(rowEnd),
            ...lessThan,
            ...repeatIf([])
          ]),
          ...get(others[3]!),
          ...set(others[0]!),
          ...folded(sums[0]!, sums[1]!),
          ...set(sums[0]!),
          ...folded(sums[2]!, sums[3]!),
          ...set(sums[2]!),
          ...get(halfNorm),
          ...loadLanes(0),
          ...get(sums[0]!),
          ...get(sums[2]!),
          ...shuffleFloats(0, 1, 4, 5),
          ...get(sums[0]!),
          ...get(sums[2]!),
          ...shuffleFloats(2, 3, 6, 7),
          ...addLanes,
          ...subtractLanes,
          ...set(part),
          ...get(which),
          ...get(bestOf),
          ...get(part),
          ...get(best),
          ...lessFloats,
          ...selectBits,
          ...set(bestOf),
          ...get(best),
          ...get(part),
          ...minLanes,
          ...set(best),
          ...get(which),
          ...constantInts(4),
          ...addInts,
          ...set(which),
          ...advance(halfNorm, 16),
          ...get(halfNorm),
          ...get(halfNormsEnd),
          ...lessThan,
          ...repeatIf([])
        ]),
        ...get(out),
        ...get(best),
        ...storeLanes(0),
        ...get(out),
        ...get(bestOf),
        ...storeLanes(16),
        ...advance(out, 32),
        ...get(rowEnd),
        ...set(rows)
      ]
    )
  }
)
