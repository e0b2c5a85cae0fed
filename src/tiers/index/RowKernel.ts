/**
 * Inner products and squared distances of a query with many rows, four lanes at once: a WebAssembly module of two loops,
 * since neither JavaScript nor hnswlib-node has them for rows of a memory. About six times as fast as the same in
 * JavaScript, which makes exact scans of thousands of rows cheaper than a graph's walk.
 *
 * Each function below is the stack machine's code of what its name says.
 */
import {
  add,
  addFloat,
  addLanes,
  advance,
  assemble,
  type Code,
  constant,
  define,
  type FunctionCode,
  get,
  greaterOrEqual,
  greaterThan,
  i32,
  Kernel,
  lane,
  lessThan,
  loadInt,
  loadLanes,
  loop,
  type Memory,
  multiply,
  multiplyLanes,
  repeatIf,
  set,
  shiftLeft,
  storeFloat,
  subtractLanes,
  tee,
  until,
  v128,
  zeroLanes
} from "./Assembler.ts"

export interface RowKernel {
  /**
   * Writes `count` float32s at `out`: of the query with each row whose number is in the list of int32s at `list`. A row
   * begins at `rows` + number * `rowBytes`; the query is from `query` to `queryEnd`, a multiple of 16 bytes.
   */
  readonly products: Scan
  readonly distances: Scan
}

export type Scan = (
  list: number,
  count: number,
  rows: number,
  rowBytes: number,
  query: number,
  queryEnd: number,
  out: number
) => void

/** The loops over one memory. */
export const rowKernelOf = (memory: Memory): RowKernel => kernel.on(memory)

const kernel = new Kernel<RowKernel>(() => assemble([scan("products", addProduct), scan("distances", addSquare)]))

/** Adds the product of four components of row and query to a sum. */
const addProduct: AddPart = (sum, { row, at }, offset) => [
  ...get(sum),
  ...get(row),
  ...loadLanes(offset),
  ...get(at),
  ...loadLanes(offset),
  ...multiplyLanes,
  ...addLanes,
  ...set(sum)
]

/** Adds the square of the difference of four components of row and query to a sum. */
const addSquare: AddPart = (sum, { row, at, difference }, offset) => [
  ...get(row),
  ...loadLanes(offset),
  ...get(at),
  ...loadLanes(offset),
  ...subtractLanes,
  ...set(difference),
  ...get(sum),
  ...get(difference),
  ...get(difference),
  ...multiplyLanes,
  ...addLanes,
  ...set(sum)
]

interface Locals {
  readonly row: number
  readonly at: number
  readonly difference: number
}

type AddPart = (sum: number, locals: Locals, offset: number) => Code

const scan = (name: string, addPart: AddPart): FunctionCode =>
  define(
    name,
    { list: i32, count: i32, rows: i32, rowBytes: i32, query: i32, queryEnd: i32, out: i32 },
    undefined,
    { row: i32, at: i32, listEnd: i32, sum0: v128, sum1: v128, sum2: v128, sum3: v128, difference: v128 },
    (local) => {
      const { list, count, rows, rowBytes, query, queryEnd, out, row, at, listEnd, sum0, sum1, sum2, sum3 } = local
      return [
        ...get(list),
        ...get(count),
        ...constant(2),
        ...shiftLeft,
        ...add,
        ...set(listEnd),
        ...loop([
          ...get(list),
          ...loadInt,
          ...get(rowBytes),
          ...multiply,
          ...get(rows),
          ...add,
          ...set(row),
          ...get(query),
          ...set(at),
          ...zeroLanes,
          ...tee(sum0),
          ...tee(sum1),
          ...tee(sum2),
          ...set(sum3),
          // Sixteen components at a time, in four sums that do not wait for each other, then four at a time.
          ...until(
            [...get(at), ...constant(64), ...add, ...get(queryEnd), ...greaterThan],
            [
              ...[sum0, sum1, sum2, sum3].flatMap((sum, i) => addPart(sum, local, i * 16)),
              ...advance(row, 64),
              ...advance(at, 64)
            ]
          ),
          ...until(
            [...get(at), ...get(queryEnd), ...greaterOrEqual],
            [...addPart(sum0, local, 0), ...advance(row, 16), ...advance(at, 16)]
          ),
          ...get(sum0),
          ...get(sum1),
          ...addLanes,
          ...get(sum2),
          ...get(sum3),
          ...addLanes,
          ...addLanes,
          ...set(sum0),
          ...get(out),
          ...[0, 1, 2, 3].flatMap((n) => [...get(sum0), ...lane(n)]),
          ...addFloat,
          ...addFloat,
          ...addFloat,
          ...storeFloat,
          ...advance(out, 4),
          ...get(list),
          ...constant(4),
          ...add,
          ...tee(list),
          ...get(listEnd),
          ...lessThan,
          ...repeatIf([])
        ])
      ]
    }
  )
