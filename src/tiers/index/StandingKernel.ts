/** The loop over standing queries, in WebAssembly's vector instructions: which of them may a vector reach? */
import {
  add,
  addInts,
  addLanes,
  advance,
  and,
  assemble,
  bitmaskInts,
  type Code,
  constant,
  countTrailingZeros,
  define,
  dotShorts,
  extendHighBytes,
  extendLowBytes,
  f32,
  floatsOfInts,
  get,
  greaterOrEqual,
  greaterOrEqualFloats,
  i32,
  isZero,
  Kernel,
  lessThan,
  loadLanes,
  loop,
  type Memory,
  multiplyLanes,
  repeatIf,
  set,
  shiftRight,
  shuffleFloats,
  splatFloat,
  storeInt,
  subtract,
  tee,
  until,
  v128,
  zeroLanes
} from "./Assembler.ts"

/** Rows that lie together, followed by their {@link factorBytes}. */
export const blockRows = 4

/** Of the rows of a block: four scales, four margins, four bars; float32. */
export const factorBytes = 48

export interface StandingKernel {
  /**
   * Writes the number of each row, an int32, for which `product * row's scale * scale + margin >= (bar + shift) * factor`, and
   * returns where they end. `product` is of the row's int8s with the int16s from `query` to `queryEnd`; a row has half as
   * many bytes as those, a multiple of 16. `first` is the number of the first row.
   */
  readonly reached: (
    blocks: number,
    blocksEnd: number,
    query: number,
    queryEnd: number,
    scale: number,
    shift: number,
    factor: number,
    first: number,
    out: number
  ) => number
}

export const standingKernelOf = (memory: Memory): StandingKernel => kernel.on(memory)

const kernel = new Kernel<StandingKernel>(() => assemble([reached]))

const reached = define(
  "reached",
  { blocks: i32, blocksEnd: i32, query: i32, queryEnd: i32, scale: f32, shift: f32, factor: f32, first: i32, out: i32 },
  i32,
  {
    at: i32,
    bits: i32,
    rowBytes: i32,
    row0: i32,
    row1: i32,
    row2: i32,
    row3: i32,
    low: v128,
    high: v128,
    part: v128,
    sum0: v128,
    sum1: v128,
    sum2: v128,
    sum3: v128,
    scales: v128,
    shifts: v128,
    factors: v128
  },
  (local) => {
    const { blocks, blocksEnd, query, queryEnd, scale, shift, factor, first, out } = local
    const { at, bits, rowBytes, low, high, part, scales, shifts, factors } = local
    const rows = [local.row0, local.row1, local.row2, local.row3]
    const sums = [local.sum0, local.sum1, local.sum2, local.sum3]
    const [sum0, sum1, sum2, sum3] = sums as [number, number, number, number]
    const addRow = (row: number, sum: number): Code => [
      ...get(row),
      ...loadLanes(0),
      ...tee(part),
      ...extendLowBytes,
      ...get(low),
      ...dotShorts,
      ...get(part),
      ...extendHighBytes,
      ...get(high),
      ...dotShorts,
      ...addInts,
      ...get(sum),
      ...addInts,
      ...set(sum),
      ...advance(row, 16)
    ]
    /** Of two sums of four lanes each the sums of their lanes by pairs: first, second, first, second. */
    const paired = (a: number, b: number): Code => [
      ...get(a),
      ...get(b),
      ...shuffleFloats(0, 4, 1, 5),
      ...get(a),
      ...get(b),
      ...shuffleFloats(2, 6, 3, 7),
      ...addInts
    ]
    return [
      ...get(scale),
      ...splatFloat,
      ...set(scales),
      ...get(shift),
      ...splatFloat,
      ...set(shifts),
      ...get(factor),
      ...splatFloat,
      ...set(factors),
      // Half of the query's bytes.
      ...get(queryEnd),
      ...get(query),
      ...subtract,
      ...constant(1),
      ...shiftRight,
      ...set(rowBytes),
      ...until(
        [...get(blocks), ...get(blocksEnd), ...greaterOrEqual],
        [
          ...get(blocks),
          ...set(rows[0]!),
          ...[1, 2, 3].flatMap((i) => [...get(rows[i - 1]!), ...get(rowBytes), ...add, ...set(rows[i]!)]),
          ...sums.flatMap((sum) => [...zeroLanes, ...set(sum)]),
          ...get(query),
          ...set(at),
          ...loop([
            ...get(at),
            ...loadLanes(0),
            ...set(low),
            ...get(at),
            ...loadLanes(16),
            ...set(high),
            ...rows.flatMap((row, i) => addRow(row, sums[i]!)),
            ...get(at),
            ...constant(32),
            ...add,
            ...tee(at),
            ...get(queryEnd),
            ...lessThan,
            ...repeatIf([])
          ]),
          // The last row ends where the factors begin.
          ...get(rows[3]!),
          ...set(blocks),
          ...paired(sum0, sum1),
          ...set(sum0),
          ...paired(sum2, sum3),
          ...set(sum2),
          ...get(sum0),
          ...get(sum2),
          ...shuffleFloats(0, 1, 4, 5),
          ...get(sum0),
          ...get(sum2),
          ...shuffleFloats(2, 3, 6, 7),
          ...addInts,
          ...floatsOfInts,
          ...get(blocks),
          ...loadLanes(0),
          ...multiplyLanes,
          ...get(scales),
          ...multiplyLanes,
          ...get(blocks),
          ...loadLanes(16),
          ...addLanes,
          ...get(blocks),
          ...loadLanes(32),
          ...get(shifts),
          ...addLanes,
          ...get(factors),
          ...multiplyLanes,
          ...greaterOrEqualFloats,
          ...bitmaskInts,
          ...set(bits),
          ...advance(blocks, factorBytes),
          ...until(
            [...get(bits), ...isZero],
            [
              ...get(out),
              ...get(first),
              ...get(bits),
              ...countTrailingZeros,
              ...add,
              ...storeInt(0),
              ...advance(out, 4),
              ...get(bits),
              ...get(bits),
              ...constant(1),
              ...subtract,
              ...and,
              ...set(bits)
            ]
          ),
          ...advance(first, blockRows)
        ]
      ),
      ...get(out)
    ]
  }
)
